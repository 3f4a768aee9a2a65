//! A fence that was proved stands until the undo of that run and plane, or the takeover.
//!
//! Between the commit of an intent and its evidence the site may not know of it yet, so
//! the evidence is what binds here.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let mut broken = Vec::new();
    for run in now.registry.open_runs().filter(|r| r.group == *now.group && r.taken.is_none()) {
        for step in run.steps.iter().filter(|s| s.fences() && s.done()) {
            let (Some(site), Some(plane)) = (&step.plan.site, step.plan.act.plane()) else { continue };
            let Some(seen) = now.plane(site, plane) else { continue };
            if !seen.shut.contains(&step.plan.act) {
                broken.push(format!("{} at {site} was proved and does not stand", step.plan.act));
            }
            if seen.writable && *site == run.source {
                broken.push(format!("{plane} takes writes at {site} behind {}", step.plan.act));
            }
        }
    }
    broken
}
