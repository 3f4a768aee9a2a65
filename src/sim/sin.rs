//! Rules of the house taken away one by one, to prove that the simulation would notice.

use dc_core::act::{ActName, Outcome, QuorumAct};
use dc_core::ids::Token;
use dc_core::plan::Effect;
use dc_core::registry::{Answer, Command, Entry, Registry};
use dc_core::run::Status;

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sin {
    /// Opening acts wait for no `Opened`.
    OpenBeforeOpened,
    /// An abort is accepted after the takeover.
    AbortAfterTakeover,
    /// What is undone comes from results, not from intents.
    UndoFromResults,
    /// A fence reads the grants that it takes, and each try replaces the record.
    GrantsReRead,
    /// The undo of one run lifts the fences of another.
    MarkLiftedByAnother,
    /// A restarted agent keeps the lease of the process before it.
    RestartKeepsLease,
    /// A restarted agent acts on what it had applied, without a barrier, and opens without a lease.
    NoBarrier,
    /// A lease is counted from when its renewal was applied.
    LeaseFromAck,
    /// An agent goes on when its clock jumped or its host stood still.
    IgnoresJump,
    /// An act is begun although its token could not be written down.
    ActsWithoutTokenOnDisk,
    /// A drain believes its link.
    DrainWithoutLooking,
    /// A return is accepted after `Opened`.
    ReturnAfterOpened,
}

/// Applies a command as the sin would have it.
pub fn apply(state: &mut Registry, at: Token, command: &Command, sin: Option<Sin>) -> Answer {
    match (sin, &command.entry) {
        (Some(Sin::OpenBeforeOpened), Entry::Start { run, .. }) => {
            let answer = state.apply(at, command);
            if let Some(run) = state.runs.get_mut(run) {
                let opened = ActName::Quorum(QuorumAct::Opened);
                let found = run.steps.iter().find(|s| s.plan.act == opened);
                if let Some((id, before)) = found.map(|s| (s.plan.id, s.plan.after.clone())) {
                    for step in run.steps.iter_mut().filter(|s| s.plan.effect == Effect::Opens) {
                        step.plan.after.retain(|need| *need != id);
                        step.plan.after.extend(&before);
                    }
                }
            }
            answer
        }
        (Some(Sin::AbortAfterTakeover), Entry::Abort { run, .. }) => {
            let kept = state.runs.get_mut(run).and_then(|r| r.taken.take());
            let answer = state.apply(at, command);
            if let (Some(run), true) = (state.runs.get_mut(run), kept.is_some()) {
                run.taken = kept;
                if let Some(group) = state.groups.get_mut(&run.group) {
                    group.holder = run.source.clone(); // the rest of the rules then follows it
                    group.opened = true;
                    group.epoch = run.epoch_before;
                }
            }
            answer
        }
        (Some(Sin::UndoFromResults), _) => undo_from_results(state, at, command),
        (Some(Sin::GrantsReRead), Entry::Finish { run, result: Ok(evidence), .. }) => {
            let answer = state.apply(at, command);
            let group = state.runs.get(run).map(|r| r.group.clone());
            let record = group.and_then(|g| state.groups.get_mut(&g)).and_then(|g| g.grants.as_mut());
            let read = evidence.outcomes.iter().rev().find_map(|o| match o {
                Outcome::Grants(read) => Some(read.clone()),
                _ => None,
            });
            if let (Some(record), Some(read), Answer::Done) = (record, read, &answer) {
                record.grants = read;
            }
            answer
        }
        (Some(Sin::MarkLiftedByAnother), Entry::Finish { run, step, result: Ok(_), .. }) => {
            let undone = state.runs.get(run).and_then(|r| {
                let step = r.step(*step).filter(|_| r.aborting.is_some())?;
                Some((r.group.clone(), step.plan.site.clone()?, step.plan.act.plane()?))
            });
            let answer = state.apply(at, command);
            if let Some((group, site, plane)) = undone
                && let Some(group) = state.groups.get_mut(&group)
            {
                group.fences.retain(|f| f.site != site || f.plane != plane);
            }
            answer
        }
        (Some(Sin::ReturnAfterOpened), Entry::Return { run, .. }) => {
            if let Some(group) = state.runs.get(run).map(|r| r.group.clone())
                && let Some(group) = state.groups.get_mut(&group)
            {
                group.opened = false;
            }
            state.apply(at, command)
        }
        _ => state.apply(at, command),
    }
}

/// What was asked and not answered is dropped by an abort instead of being undone.
fn undo_from_results(state: &mut Registry, at: Token, command: &Command) -> Answer {
    let (Entry::Abort { run, .. } | Entry::Overdue { run, .. } | Entry::Finish { run, .. }) = &command.entry
    else {
        return state.apply(at, command);
    };
    let before = state.runs.get(run).cloned();
    let answer = state.apply(at, command);
    let (Some(before), Some(after)) = (before, state.runs.get_mut(run)) else { return answer };
    if before.aborting.is_some() || after.aborting.is_none() {
        return answer;
    }
    let mut dropped = Vec::new();
    for step in &mut after.steps {
        let asked = before.step(step.plan.id).is_some_and(|s| matches!(s.status, Status::Doing { .. }));
        if asked && matches!(step.status, Status::ToUndo | Status::Undoing { .. }) {
            step.status = Status::Dropped;
            dropped.push(step.plan.id);
        }
    }
    if let Some(group) = state.groups.get_mut(&after.group) {
        group.fences.retain(|f| f.run != after.id || !dropped.contains(&f.step));
        dc_core::run::advance(after, group, at, command.wall);
    }
    answer
}

/// Which sin the planes commit, if it is theirs.
pub fn of_planes(sin: Option<Sin>) -> Vec<dc_plane::fake::Sin> {
    match sin {
        Some(Sin::GrantsReRead) => vec![dc_plane::fake::Sin::FenceRecordsGrants],
        Some(Sin::DrainWithoutLooking) => vec![dc_plane::fake::Sin::DrainWithoutLooking],
        _ => Vec::new(),
    }
}
