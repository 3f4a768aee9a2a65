//! What must be true of every plan, whoever made it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effect, PlannedStep, Stage, StepId};
use crate::act::{ActName, QuorumAct};

/// Checks a list of steps.
///
/// Returns every fault found, as sentences; none is what a plan must have to run.
pub fn lint(steps: &[PlannedStep]) -> Vec<String> {
    let mut faults = Vec::new();
    let reach = reach(steps, &mut faults);
    let before = |a: StepId, b: StepId| reach.get(&b).is_some_and(|known| known.contains(&a));
    for (i, a) in steps.iter().enumerate() {
        if a.effect == Effect::Fences && a.stage < Stage::Takeover && !a.undo {
            faults.push(format!("step {} {} shuts writers out and has no undo", a.id, a.act));
        }
        for b in &steps[i + 1..] {
            let same_hands = a.site.is_some() && a.site == b.site && a.act.plane() == b.act.plane();
            if same_hands && !before(a.id, b.id) {
                faults.push(format!(
                    "steps {} {} and {} {} meet at one plane of one site",
                    a.id, a.act, b.id, b.act
                ));
            }
        }
    }
    let entry = |wanted| steps.iter().find(|s| s.act == ActName::Quorum(wanted));
    if let Some(opened) = entry(QuorumAct::Opened) {
        for step in steps.iter().filter(|s| s.effect == Effect::Opens && !before(opened.id, s.id)) {
            faults.push(format!("step {} {} opens before the entry opened", step.id, step.act));
        }
    } else {
        faults.push("there is no entry opened".into());
    }
    if let Some(takeover) = entry(QuorumAct::Takeover) {
        for step in steps.iter().filter(|s| s.stage < Stage::Takeover && !before(s.id, takeover.id)) {
            faults.push(format!("step {} {} may still run at the takeover", step.id, step.act));
        }
        for step in steps.iter().filter(|s| s.stage > Stage::Takeover && !before(takeover.id, s.id)) {
            faults.push(format!("step {} {} may run before the takeover", step.id, step.act));
        }
    }
    faults
}

/// For each step, all the steps that come before it. Steps stand after those they need.
fn reach(steps: &[PlannedStep], faults: &mut Vec<String>) -> BTreeMap<StepId, BTreeSet<StepId>> {
    let mut reach: BTreeMap<StepId, BTreeSet<StepId>> = BTreeMap::new();
    for step in steps {
        let mut all = BTreeSet::new();
        for need in &step.after {
            match reach.get(need) {
                Some(earlier) => {
                    all.insert(*need);
                    all.extend(earlier);
                }
                None => faults.push(format!(
                    "step {} {} needs step {need}, which does not stand before it",
                    step.id, step.act
                )),
            }
        }
        reach.insert(step.id, all);
    }
    reach
}
