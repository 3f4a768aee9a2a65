//! A run that says "rolled back" left no fence of its own standing, once nothing else runs.

use super::Sight;
use crate::run::{Ended, RunResult, Status};

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    if now.known().is_none_or(|group| group.run.is_some()) {
        return Vec::new();
    }
    // Names of runs rise with time, so the last one is the newest.
    let last = now.registry.runs.values().rfind(|run| run.group == *now.group);
    let Some(run) = last.filter(|r| matches!(r.ended, Some(Ended { result: RunResult::RolledBack, .. })))
    else {
        return Vec::new();
    };
    run.steps
        .iter()
        .filter(|s| s.fences() && s.status != Status::Waiting)
        .filter(|s| {
            let at = s.plan.site.as_ref().zip(s.plan.act.plane());
            let plane = at.and_then(|(site, plane)| now.plane(site, plane));
            plane.is_some_and(|p| p.shut.contains(&s.plan.act))
        })
        .map(|s| {
            let site = s.plan.site.as_ref().map_or("quorum", |site| site.as_str());
            format!("run {} rolled back, and its {} at {site} stands", run.id, s.plan.act)
        })
        .collect()
}
