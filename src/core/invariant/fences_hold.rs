//! A fence that was proved stands until the undo of that run and plane, or the takeover.
//!
//! Between the commit of an intent and its evidence the site may not know of it yet, so
//! the evidence is what binds here.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let Some(group) = now.known() else { return Vec::new() };
    let mut broken = Vec::new();
    for mark in &group.fences {
        let Some(run) = now.registry.runs.get(&mark.run).filter(|r| r.taken.is_none()) else { continue };
        let Some(step) = run.step(mark.step).filter(|s| s.done()) else { continue };
        let Some(plane) = now.plane(&mark.site, mark.plane) else { continue };
        if !plane.shut.contains(&step.plan.act) {
            broken.push(format!("{} at {} was proved and does not stand", step.plan.act, mark.site));
        }
        if plane.writable && mark.site == run.source {
            broken.push(format!("{} takes writes at {} behind {}", mark.plane, mark.site, step.plan.act));
        }
    }
    broken
}
