//! The way back before the takeover: what was intended is taken back, latest first,
//! each site's planes side by side.

use super::advance::end;
use super::{Run, RunResult, Status, Step, Trouble};
use crate::act::{ActName, KafkaAct};
use crate::ids::{PlaneKind, RunId, Token};
use crate::registry::Group;
use crate::time::WallTime;

/// Attempts before a human is called; the undo itself goes on being tried.
pub(super) const ATTEMPTS: u32 = 3;

/// Turns the run round. What is to be undone comes from committed intents, not results:
/// an act whose answer never came may have been done all the same.
pub fn begin(run: &mut Run, group: &mut Group, why: Trouble, at: Token, wall: WallTime) {
    if run.aborting.is_some() || run.taken.is_some() || run.ended.is_some() {
        return;
    }
    run.aborting = Some(why);
    for step in &mut run.steps {
        let begun = matches!(step.status, Status::Doing { .. } | Status::Done { .. } | Status::Failed { .. });
        if begun && step.plan.undo {
            step.status = Status::ToUndo;
        } else if matches!(step.status, Status::Doing { .. }) {
            step.status = Status::Dropped;
        }
    }
    forget_record(run, group);
    advance(run, group, at, wall);
}

/// A record of grants that no fence has touched is no longer needed: they still stand.
/// Kept, it would be given at the next holder in place of what its owner granted since.
fn forget_record(run: &Run, group: &mut Group) {
    let fence = ActName::Kafka(KafkaAct::FenceApps);
    let touched = run.steps.iter().any(|s| s.plan.act == fence && s.status != Status::Waiting);
    if let Some(recorded) = group.grants.as_mut().filter(|g| g.run == run.id && !touched) {
        recorded.settled = true;
    }
}

pub(super) fn advance(run: &mut Run, group: &mut Group, at: Token, wall: WallTime) {
    let ready: Vec<usize> = (0..run.steps.len()).filter(|place| may_undo(run, &run.steps[*place])).collect();
    for place in ready {
        run.steps[place].status = Status::Undoing { token: at, attempt: 1, since: wall };
    }
    let open =
        |s: &Step| matches!(s.status, Status::ToUndo | Status::Undoing { .. } | Status::UndoFailed { .. });
    if !run.steps.iter().any(open) {
        end(run, group, RunResult::RolledBack, wall);
    }
}

/// Tries failed steps once more. Returns how many.
///
/// Of an aborting run these are undos alone: what failed before it is given up. Those of
/// one plane at one site still go latest first, so some may have to wait for another call.
pub fn again(run: &mut Run, at: Token, wall: WallTime) -> usize {
    let aborting = run.aborting.is_some();
    let mut again = 0;
    for place in (0..run.steps.len()).rev() {
        let next = match run.steps[place].status {
            Status::Failed { attempt, .. } if !aborting => {
                Status::Doing { token: at, attempt: attempt + 1, since: wall }
            }
            Status::UndoFailed { attempt, .. } if unblocked(run, &run.steps[place]) => {
                Status::Undoing { token: at, attempt: attempt + 1, since: wall }
            }
            _ => continue,
        };
        run.steps[place].status = next;
        again += 1;
    }
    again
}

fn may_undo(run: &Run, step: &Step) -> bool {
    step.status == Status::ToUndo && unblocked(run, step)
}

/// Whether no undo that comes first is under way. A failed one blocks no other.
fn unblocked(run: &Run, step: &Step) -> bool {
    let under_way = |s: &Step| matches!(s.status, Status::ToUndo | Status::Undoing { .. });
    !run.steps.iter().filter(|s| under_way(s) && s.plan.site == step.plan.site).any(|other| {
        let (plane, above) = (step.plan.act.plane(), other.plan.act.plane());
        // Two hands at one plane meet, whichever was first; otherwise the latest goes first.
        let meets = matches!(other.status, Status::Undoing { .. }) && other.plan.id != step.plan.id;
        let same = above == plane && (meets || other.plan.id > step.plan.id);
        // Tasks write to the database and the buckets: both serve before a scheduler starts.
        let beneath = plane == Some(PlaneKind::Airflow)
            && matches!(above, Some(PlaneKind::Postgres | PlaneKind::S3))
            && other.fences();
        same || beneath
    })
}

/// Lifts the fence of a step that was proved undone.
pub(super) fn lift(group: &mut Group, run: &RunId, step: &Step) {
    group.fences.retain(|f| !(f.run == *run && f.step == step.plan.id));
    if step.plan.act == ActName::Kafka(KafkaAct::FenceApps)
        && let Some(recorded) = &mut group.grants
    {
        recorded.settled = true;
    }
}
