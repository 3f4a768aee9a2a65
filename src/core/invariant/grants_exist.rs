//! Each binding of an application exists at a cluster, or in the quorum's record.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let recorded = now.known().and_then(|g| g.grants.as_ref()).filter(|record| !record.settled);
    now.grants
        .iter()
        .filter(|grant| {
            let stands = now.planes().any(|(_, p)| p.grants.contains(grant));
            let kept = recorded.is_some_and(|record| record.grants.contains(grant));
            !stands && !kept
        })
        .map(|g| format!("{} on {} {} of {} is nowhere", g.operation, g.resource, g.name, g.principal))
        .collect()
}
