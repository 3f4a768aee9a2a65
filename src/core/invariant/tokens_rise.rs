//! L4: a step's token never falls, and no plane begins a step with a lower one than before.

use super::{Marks, Sight};

pub(super) fn check(before: &Marks, now: &Sight<'_>) -> Vec<String> {
    let steps = now.steps().filter_map(|(step, token)| {
        let known = before.steps.get(&step).filter(|known| **known > token)?;
        Some(format!("step {} of {} fell from token {known} to {token}", step.1, step.0))
    });
    let planes = now.planes().filter_map(|(site, p)| {
        let known = before.planes.get(&(site.clone(), p.plane)).filter(|known| **known > p.token)?;
        Some(format!("{} at {site} fell from token {known} to {}", p.plane, p.token))
    });
    steps.chain(planes).collect()
}
