//! What every plane must pass, whatever it drives: the promises of [`Plane`] as checks.
//!
//! A driver's live tests call these on real parts, act by act in the order of a plan; the
//! fakes pass them all. Nothing here knows any one plane.

use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use dc_core::act::{Act, Change, Evidence, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::plan::Effect;
use tokio::time::Instant;

use crate::{Deadline, Depth, Plane, PlaneError};

/// How much later than its deadline a call may come back.
pub const LATE: Duration = Duration::from_secs(2);

/// A promise that was not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{act}: {what}")]
pub struct Broken {
    /// The act, or `observe`.
    pub act: String,
    /// Which promise, and what was seen instead.
    pub what: String,
}

fn broken(act: &Act, what: impl Into<String>) -> Broken {
    Broken { act: format!("{} at {}", act.name, act.site), what: what.into() }
}

fn within<T>(act: &Act, what: &str, result: Result<T, PlaneError>) -> Result<T, Broken> {
    result.map_err(|cause| broken(act, format!("{what}: {cause}")))
}

/// Reads the plane at both depths, and by a deadline that has passed.
///
/// Errors: a reading that fails, is of another plane, or comes late.
pub async fn observes(plane: &dyn Plane, limit: Duration) -> Result<(), Broken> {
    let fault = |what: String| Broken { act: "observe".into(), what };
    for depth in [Depth::Shallow, Depth::Deep] {
        let facts = plane.observe(depth, Deadline::within(limit)).await;
        let facts = facts.map_err(|cause| fault(cause.to_string()))?;
        if facts.plane != plane.kind() {
            return Err(fault(format!("asked {}, and {} answered", plane.kind(), facts.plane)));
        }
    }
    let began = Instant::now();
    let _ = plane.observe(Depth::Deep, Deadline::within(Duration::ZERO)).await;
    if began.elapsed() > LATE {
        return Err(fault(format!("came back {:?} after its deadline", began.elapsed())));
    }
    Ok(())
}

/// Performs an act twice, as after a crash between the act and its answer.
///
/// The second answer is the one that is filed then, so it must bring what the first brought.
/// Errors: a failure of either, or a second answer that lacks something.
pub async fn repeatable(
    plane: &dyn Plane,
    act: &Act,
    by: &Authority,
    limit: Duration,
) -> Result<Evidence, Broken> {
    let first = within(act, "perform", plane.perform(act, by, Deadline::within(limit)).await)?;
    let again = within(act, "perform again", plane.perform(act, by, Deadline::within(limit)).await)?;
    if again.seen.is_empty() || first.seen.is_empty() {
        return Err(broken(act, "its evidence says nothing"));
    }
    let kinds = |e: &Evidence| e.outcomes.iter().map(discriminant).collect::<Vec<Discriminant<Outcome>>>();
    if let Some(lost) = first.outcomes.iter().find(|o| !kinds(&again).contains(&discriminant(o))) {
        return Err(broken(act, format!("done again, it no longer brings {lost:?}")));
    }
    Ok(again)
}

/// The same, and the plane itself says afterwards that the work stands.
///
/// For acts that do more than read. Errors: as `repeatable`; a probe that says otherwise.
pub async fn stands(
    plane: &dyn Plane,
    act: &Act,
    by: &Authority,
    limit: Duration,
) -> Result<Evidence, Broken> {
    let evidence = repeatable(plane, act, by, limit).await?;
    match within(act, "probe", plane.probe(act, Deadline::within(limit)).await)? {
        Progress::Done(_) => Ok(evidence),
        Progress::NotYet => Err(broken(act, "was performed, and its probe says not yet")),
    }
}

/// All that an act promises by what it does to writers, its undo apart.
///
/// Errors: the first promise that is broken.
pub async fn keeps(
    plane: &dyn Plane,
    act: &Act,
    by: &Authority,
    effect: Effect,
    limit: Duration,
) -> Result<Evidence, Broken> {
    if effect == Effect::Opens {
        refuses_to_open(plane, act, limit).await?;
    }
    keeps_its_deadline(plane, act, by).await?;
    match effect {
        Effect::Neither => repeatable(plane, act, by, limit).await,
        Effect::Fences | Effect::Opens => stands(plane, act, by, limit).await,
    }
}

/// Takes an act back twice; its work must not stand afterwards.
///
/// Errors: a failure of either; a probe that still says done.
pub async fn undoes(plane: &dyn Plane, act: &Act, by: &Authority, limit: Duration) -> Result<(), Broken> {
    within(act, "undo", plane.undo(act, by, Deadline::within(limit)).await)?;
    within(act, "undo again", plane.undo(act, by, Deadline::within(limit)).await)?;
    match within(act, "probe", plane.probe(act, Deadline::within(limit)).await)? {
        Progress::NotYet => Ok(()),
        Progress::Done(seen) => Err(broken(act, format!("was taken back, and stands: {}", seen.seen))),
    }
}

/// Performs an act whose deadline has passed, as after a long wait for its turn.
///
/// Errors: an answer that comes late; or a change that was made all the same.
pub async fn keeps_its_deadline(plane: &dyn Plane, act: &Act, by: &Authority) -> Result<(), Broken> {
    let stood = matches!(plane.probe(act, Deadline::within(LATE)).await, Ok(Progress::Done(_)));
    let began = Instant::now();
    let result = plane.perform(act, by, Deadline::within(Duration::ZERO)).await;
    if began.elapsed() > LATE {
        return Err(broken(act, format!("came back {:?} after its deadline", began.elapsed())));
    }
    match result {
        Ok(evidence) if !stood && evidence.change == Change::Changed => {
            Err(broken(act, format!("was done after its deadline: {}", evidence.seen)))
        }
        _ => Ok(()),
    }
}

/// Asks an opening act of a plane with an authority that may only close.
///
/// Errors: anything but a refusal that leaves what stood as it was, or the word that it stood already.
pub async fn refuses_to_open(plane: &dyn Plane, act: &Act, limit: Duration) -> Result<(), Broken> {
    let before = within(act, "probe", plane.probe(act, Deadline::within(limit)).await)?;
    let answer = plane.perform(act, &Authority::self_fence(), Deadline::within(limit)).await;
    let nothing_to_open =
        matches!((&before, &answer), (Progress::Done(_), Ok(found)) if found.change == Change::Already);
    if !nothing_to_open && !matches!(answer, Err(PlaneError::Refused { .. })) {
        return Err(broken(act, format!("opens for who may only close: {answer:?}")));
    }
    let after = within(act, "probe", plane.probe(act, Deadline::within(limit)).await)?;
    match (before, after) {
        (Progress::NotYet, Progress::Done(seen)) => {
            Err(broken(act, format!("refused, and done all the same: {}", seen.seen)))
        }
        _ => Ok(()),
    }
}
