//! Runs: one execution of a plan, as replicated state that advances by its own entries.
//!
//! A step that may begin is marked `Doing` by the very entry that made it ready, so its
//! intent is committed before anybody acts, and no leader is needed to go on. Agents
//! perform what the applied state says is theirs. Only three things come from outside:
//! results, silence past a deadline, and the entries takeover and opened.

mod advance;
mod undo;

use serde::{Deserialize, Serialize};

pub use advance::advance;
pub(crate) use advance::{file, react};
pub(crate) use undo::again;
pub use undo::begin as begin_undo;

use crate::act::{Act, ActName, Direction, Evidence, Finding, Outcome, QuorumAct};
use crate::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use crate::plan::{Effect, PlannedStep, Stage, StepId};
use crate::position::{Cut, Position};
use crate::registry::Group;
use crate::time::WallTime;

/// Why a step did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Page of the catalogue, as in `DC-0302`.
    pub code: String,
    /// What and why.
    pub text: String,
}

/// Where a step stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")] // not tagged inside: JSON could not read number keys back
pub enum Status {
    /// Not begun.
    Waiting,
    /// Its intent is committed.
    Doing {
        /// Of the intent.
        token: Token,
        /// Counts from 1.
        attempt: u32,
        /// When the intent was proposed.
        since: WallTime,
    },
    /// It stands.
    Done {
        /// Of its intent.
        token: Token,
        /// What the agent measured.
        took_ms: u64,
        /// When the result was proposed.
        at: WallTime,
        /// What proves it.
        evidence: Evidence,
    },
    /// The last attempt failed.
    Failed {
        /// Attempts so far.
        attempt: u32,
        /// When the result was proposed.
        at: WallTime,
        /// Why.
        trouble: Trouble,
    },
    /// It will be undone once what came after it is.
    ToUndo,
    /// The intent to undo is committed.
    Undoing {
        /// Of the intent.
        token: Token,
        /// Counts from 1.
        attempt: u32,
        /// When the intent was proposed.
        since: WallTime,
    },
    /// It was taken back.
    Undone {
        /// What the agent measured.
        took_ms: u64,
        /// What proves it.
        evidence: Evidence,
    },
    /// The last attempt to undo failed.
    UndoFailed {
        /// Attempts so far.
        attempt: u32,
        /// When the result was proposed.
        at: WallTime,
        /// Why.
        trouble: Trouble,
    },
    /// Begun, without effect to undo, and given up with the run.
    Dropped,
}

/// A step and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// As planned.
    pub plan: PlannedStep,
    /// Where it stands.
    pub status: Status,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// The target holds the group and is protected again.
    Done,
    /// Preflight refused; nothing was changed.
    Refused,
    /// Undone before the takeover; the old site serves.
    RolledBack,
    /// Returned before `Opened`; nothing was lost.
    Returned,
}

impl RunResult {
    /// As reports say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::RolledBack => "rolled_back",
            Self::Returned => "returned",
        }
    }
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub result: RunResult,
    /// When the last entry was proposed.
    pub at: WallTime,
}

/// One execution of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its name.
    pub id: RunId,
    /// Of which group.
    pub group: GroupName,
    /// The holder when it began.
    pub source: SiteId,
    /// The site that shall hold the group.
    pub target: SiteId,
    /// The group's epoch when it began.
    pub epoch_before: Epoch,
    /// The group's epoch by its last takeover or return; before it, the one it would create.
    pub epoch: Epoch,
    /// Hash of the plan.
    pub plan_hash: String,
    /// Who began it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When it was proposed.
    pub started: WallTime,
    /// Which way it goes.
    pub direction: Direction,
    /// Whether its takeover is committed.
    pub taken: Option<Taken>,
    /// Why it is being undone.
    pub aborting: Option<Trouble>,
    /// Its steps; a return adds its own.
    pub steps: Vec<Step>,
    /// Steps of a direction that was turned round; kept for their outcomes.
    pub past: Vec<Step>,
    /// What a human must look at, while the run is open.
    pub attention: Option<Trouble>,
    /// What forbade it, when it was refused.
    pub findings: Vec<Finding>,
    /// Set once.
    pub ended: Option<Ended>,
}

/// The takeover of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Where every plane was.
    pub cut: Cut,
    /// When it was proposed.
    pub at: WallTime,
    /// When `Opened` was proposed, if it is.
    pub opened: Option<WallTime>,
}

impl Run {
    /// The site that serves when the run ends as it goes now.
    pub fn winner(&self) -> &SiteId {
        match self.direction {
            Direction::Forward => &self.target,
            Direction::Return => &self.source,
        }
    }

    /// The step of that number.
    pub fn step(&self, id: StepId) -> Option<&Step> {
        self.steps.iter().find(|step| step.plan.id == id)
    }

    /// Whether every step it needs is done.
    pub fn ready(&self, step: &Step) -> bool {
        step.status == Status::Waiting
            && step.plan.after.iter().all(|id| self.step(*id).is_none_or(Step::done))
    }

    /// Whether it took the group over and has a step left that lets writers in there.
    pub fn opens_later(&self, plane: PlaneKind, site: &SiteId) -> bool {
        let here = |s: &&Step| s.plan.act.plane() == Some(plane) && s.plan.site.as_ref() == Some(site);
        self.taken.is_some()
            && self.steps.iter().filter(here).any(|s| s.plan.effect == Effect::Opens && !s.done())
    }

    /// An entry of the quorum that the leader has to propose now.
    pub fn due(&self) -> Option<QuorumAct> {
        if self.ended.is_some() || self.aborting.is_some() {
            return None;
        }
        self.steps.iter().find_map(|step| match step.plan.act {
            ActName::Quorum(act) if self.ready(step) => Some(act),
            _ => None,
        })
    }

    /// Everything that steps brought so far, oldest first.
    pub fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.past.iter().chain(&self.steps).filter_map(Step::evidence).flat_map(|e| &e.outcomes)
    }

    /// The final positions that its steps proved, one per plane.
    pub fn cut(&self) -> Cut {
        let mut positions: Vec<Position> = Vec::new();
        for outcome in self.outcomes() {
            if let Outcome::Position(found) = outcome {
                positions.retain(|p| p.plane() != found.plane());
                positions.push(found.clone());
            }
        }
        positions.sort_by_key(Position::plane);
        Cut(positions)
    }

    /// The act of a step with all that it is given.
    pub fn act(&self, step: &Step, group: &Group) -> Option<Act> {
        let mut given: Vec<Outcome> = Vec::new();
        given.extend(group.mirror.clone().map(Outcome::Mirror));
        given.extend(group.release.clone().map(Outcome::Release));
        if let Some(recorded) = group.grants.as_ref().filter(|g| !g.settled || g.run == self.id) {
            given.push(Outcome::Grants(recorded.grants.clone()));
        }
        given.extend(
            self.outcomes().filter(|o| !matches!(o, Outcome::Findings(_) | Outcome::Grants(_))).cloned(),
        );
        Some(Act {
            name: step.plan.act,
            site: step.plan.site.clone()?,
            group: self.group.clone(),
            run: Some(self.id.clone()),
            source: self.source.clone(),
            target: self.target.clone(),
            epoch: self.epoch,
            direction: self.direction,
            given,
        })
    }

    /// The stage it is in: of the first step that is not over.
    pub fn stage(&self) -> Stage {
        let open = self.steps.iter().filter(|s| !matches!(s.status, Status::Done { .. }));
        open.map(|s| s.plan.stage).min().unwrap_or(Stage::Verify)
    }
}

impl Step {
    /// Whether it stands.
    pub fn done(&self) -> bool {
        matches!(self.status, Status::Done { .. })
    }

    /// The evidence of a step that stands.
    pub fn evidence(&self) -> Option<&Evidence> {
        match &self.status {
            Status::Done { evidence, .. } => Some(evidence),
            _ => None,
        }
    }

    /// The token of a committed intent that nobody has answered, and whether it undoes.
    pub fn intent(&self) -> Option<(Token, bool)> {
        match self.status {
            Status::Doing { token, .. } => Some((token, false)),
            Status::Undoing { token, .. } => Some((token, true)),
            _ => None,
        }
    }

    /// Whether it keeps writers out while it stands or may stand.
    pub fn fences(&self) -> bool {
        self.plan.effect == Effect::Fences
    }
}
