//! What an entry makes ready.

use super::{Ended, Run, RunResult, Status, Step, Trouble, undo};
use crate::act::{ActName, Direction, Evidence, Finding, Outcome, QuorumAct};
use crate::codes::Code;
use crate::ids::{PlaneKind, Token};
use crate::plan::{Effect, Stage};
use crate::position::Timelines;
use crate::registry::{FenceMark, Group};
use crate::time::WallTime;

/// Marks every step that may begin now as begun, and ends the run when nothing is left.
///
/// `at` becomes the token of the intents; the entry that calls this commits them.
pub fn advance(run: &mut Run, group: &mut Group, at: Token, wall: WallTime) {
    if run.ended.is_some() {
        return;
    }
    if run.aborting.is_some() {
        undo::advance(run, group, at, wall);
        return;
    }
    match judge(run, group) {
        Verdict::Open => {}
        Verdict::Blocked(findings) => {
            run.findings = findings;
            return end(run, group, RunResult::Refused, wall);
        }
        Verdict::Doubt(trouble) => return undo::begin(run, group, trouble, at, wall),
    }
    while let Some(place) = run.steps.iter().position(|s| run.ready(s) && begins_itself(s)) {
        begin(run, group, place, at, wall);
    }
    if run.steps.iter().all(Step::done) {
        let result = match run.direction {
            Direction::Forward => RunResult::Done,
            Direction::Return => RunResult::Returned,
        };
        end(run, group, result, wall);
    }
}

/// Takeover and opened are entries of their own, with checks that only a leader can make.
fn begins_itself(step: &Step) -> bool {
    !matches!(step.plan.act, ActName::Quorum(QuorumAct::Takeover | QuorumAct::Opened))
}

fn begin(run: &mut Run, group: &mut Group, place: usize, at: Token, wall: WallTime) {
    let seen: u32 = run.outcomes().filter_map(timeline).max().unwrap_or(0);
    let step = &mut run.steps[place];
    if step.plan.act == ActName::Quorum(QuorumAct::ReserveTimelines) {
        let high = group.timeline_high.max(seen);
        let set = Timelines { target: high + 1, back: high + 2 };
        group.timeline_high = set.back;
        let evidence = Evidence::changed(format!("timelines {} and {} set aside", set.target, set.back))
            .with(Outcome::Timelines(set));
        step.status = Status::Done { token: at, took_ms: 0, at: wall, evidence };
        return;
    }
    step.status = Status::Doing { token: at, attempt: 1, since: wall };
    if step.plan.effect == Effect::Fences
        && let (Some(plane), Some(site)) = (step.plan.act.plane(), step.plan.site.clone())
    {
        group.fences.push(FenceMark { run: run.id.clone(), step: step.plan.id, plane, site, token: at });
    }
}

fn timeline(outcome: &Outcome) -> Option<u32> {
    match outcome {
        Outcome::Timeline(number) => Some(*number),
        _ => None,
    }
}

enum Verdict {
    Open,
    Blocked(Vec<Finding>),
    Doubt(Trouble),
}

/// Preflight answers are judged together, so that an operator sees all of them at once;
/// the recheck's one by one, for by then the run has something to take back.
fn judge(run: &Run, group: &Group) -> Verdict {
    if run.taken.is_some() {
        return Verdict::Open; // from here on what is found is told, and the way back is a return
    }
    let later = |s: &&Step| s.plan.stage != Stage::Preflight;
    if !run.steps.iter().filter(later).any(|s| s.status != Status::Waiting) {
        return judge_preflight(run);
    }
    let mut found: Vec<Finding> =
        run.steps.iter().filter(later).filter(|s| s.done()).flat_map(blockers).collect();
    found.extend(crate::plan::compare(run.outcomes(), &run.source, &run.target));
    found.retain(|f| f.blocking);
    if let Some(one) = found.first() {
        let text = found.iter().map(|f| format!("{} at {}: {}", f.code, f.site, f.text)).collect::<Vec<_>>();
        return Verdict::Doubt(Trouble { code: one.code.clone(), text: text.join("; ") });
    }
    match unproved(run, group) {
        None => Verdict::Open,
        Some(plane) => Verdict::Doubt(Trouble {
            code: Code::ROLLED_BACK.as_str().into(),
            text: format!("every step before the takeover is done, and none proved {plane}'s final position"),
        }),
    }
}

fn judge_preflight(run: &Run) -> Verdict {
    let asked = run.steps.iter().filter(|s| s.plan.stage == Stage::Preflight && s.plan.site.is_some());
    if !asked.clone().all(|s| matches!(s.status, Status::Done { .. } | Status::Failed { .. })) {
        return Verdict::Open;
    }
    let mut found: Vec<Finding> = asked.flat_map(blockers).collect();
    found.extend(crate::plan::compare(run.outcomes(), &run.source, &run.target));
    if found.iter().any(|f| f.blocking) { Verdict::Blocked(found) } else { Verdict::Open }
}

/// A plane that the cut lacks although its takeover is due: the run would wait for ever.
fn unproved(run: &Run, group: &Group) -> Option<PlaneKind> {
    if run.due() != Some(QuorumAct::Takeover) {
        return None;
    }
    let cut = run.cut();
    group.spec.planes().into_iter().find(|plane| !cut.covers(*plane))
}

/// What a step found, its own failure included.
fn blockers(step: &Step) -> Vec<Finding> {
    match &step.status {
        Status::Done { evidence, .. } => evidence
            .outcomes
            .iter()
            .flat_map(|o| match o {
                Outcome::Findings(found) => found.clone(),
                _ => Vec::new(),
            })
            .collect(),
        Status::Failed { trouble, .. } => step
            .plan
            .site
            .iter()
            .map(|site| Finding {
                code: trouble.code.clone(),
                plane: step.plan.act.plane(),
                site: site.clone(),
                blocking: true,
                text: format!("{}: {}", step.plan.act, trouble.text),
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// Ends a run; the group is free for the next one.
pub(super) fn end(run: &mut Run, group: &mut Group, result: RunResult, wall: WallTime) {
    run.ended = Some(Ended { result, at: wall });
    run.attention = None;
    if group.run.as_ref() == Some(&run.id) {
        group.run = None;
    }
}

/// Files the answer to an intent, whichever way it went.
///
/// Returns whether it answered anything: a stale token answers nothing.
pub(crate) fn file(
    run: &mut Run,
    group: &mut Group,
    id: u32,
    token: Token,
    took_ms: u64,
    result: Result<Evidence, Trouble>,
    wall: WallTime,
) -> bool {
    let Some(step) = run.steps.iter_mut().find(|s| s.plan.id == id) else { return false };
    match (&step.status, result) {
        (Status::Doing { token: asked, .. }, Ok(evidence)) if *asked == token => {
            own(group, &run.id, step.plan.act, &evidence);
            step.status = Status::Done { token, took_ms, at: wall, evidence };
        }
        (Status::Doing { token: asked, attempt, .. }, Err(trouble)) if *asked == token => {
            step.status = Status::Failed { attempt: *attempt, at: wall, trouble };
        }
        (Status::Undoing { token: asked, .. }, Ok(evidence)) if *asked == token => {
            undo::lift(group, &run.id, step);
            step.status = Status::Undone { took_ms, evidence };
        }
        (Status::Undoing { token: asked, attempt, .. }, Err(trouble)) if *asked == token => {
            step.status = Status::UndoFailed { attempt: *attempt, at: wall, trouble };
        }
        _ => return false,
    }
    true
}

/// What of an outcome belongs to the group from now on.
fn own(group: &mut Group, run: &crate::ids::RunId, act: ActName, evidence: &Evidence) {
    use crate::act::KafkaAct;
    use crate::registry::RecordedGrants;
    for outcome in &evidence.outcomes {
        match outcome {
            Outcome::Timeline(number) => group.timeline_high = group.timeline_high.max(*number),
            Outcome::Mirror(name) => group.mirror = Some(name.clone()),
            Outcome::Grants(grants)
                if act == ActName::Kafka(KafkaAct::RecordGrants)
                    && group.grants.as_ref().is_none_or(|known| known.settled) =>
            {
                group.grants =
                    Some(RecordedGrants { run: run.clone(), grants: grants.clone(), settled: false });
            }
            _ => {}
        }
    }
    if act == ActName::Kafka(KafkaAct::GrantApps)
        && let Some(recorded) = &mut group.grants
    {
        recorded.settled = true;
    }
}

/// Decides what a failed step means: another attempt, the way back, or a human.
pub(crate) fn react(run: &mut Run, group: &mut Group, id: u32, at: Token, wall: WallTime) {
    let Some(step) = run.step(id) else { return };
    let words = |trouble: &Trouble| Trouble {
        code: trouble.code.clone(),
        text: format!(
            "{} at {}: {}",
            step.plan.act,
            step.plan.site.as_ref().map_or("quorum", |s| s.as_str()),
            trouble.text
        ),
    };
    match &step.status {
        Status::Failed { attempt, trouble, .. } if *attempt >= step.plan.attempts => {
            let trouble = words(trouble);
            if run.taken.is_some() {
                run.attention = Some(Trouble { code: Code::NEEDS_HUMAN.as_str().into(), text: trouble.text });
            } else if step.plan.stage != Stage::Preflight {
                undo::begin(run, group, trouble, at, wall);
            }
        }
        Status::UndoFailed { attempt, trouble, .. } if *attempt >= undo::ATTEMPTS => {
            let text = format!("undo of {}", words(trouble).text);
            run.attention = Some(Trouble { code: Code::NEEDS_HUMAN.as_str().into(), text });
        }
        _ => {}
    }
}
