//! How long a plan is expected to shut writers out: the longest way from the first fence
//! of a writer plane to the last opening, by the times of earlier runs.

use std::collections::BTreeMap;

use super::{Effect, Plan, Stage, StepId};
use crate::ids::PlaneKind;
use crate::registry::Learned;

pub(super) fn outage(plan: &Plan, learned: &Learned) -> Option<u64> {
    let mut end: BTreeMap<StepId, u64> = BTreeMap::new();
    let mut slowest = 0;
    for step in plan.steps.iter().filter(|s| s.stage >= Stage::Fence && s.stage <= Stage::Open) {
        let took = learned.get(&step.act.to_string()).copied()?;
        let start = step.after.iter().filter_map(|id| end.get(id)).max().copied().unwrap_or(0);
        end.insert(step.id, start + took);
        if step.effect == Effect::Opens && step.act.plane() != Some(PlaneKind::Airflow) {
            slowest = slowest.max(start + took);
        }
    }
    Some(slowest)
}
