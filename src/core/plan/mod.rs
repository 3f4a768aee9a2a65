//! Plans: ordered acts as data, made by pure functions, shown and linted before they run.

mod compare;
mod expected;
mod lint;
mod switchover;

pub use compare::compare;
pub use lint::lint;
pub use switchover::{after_takeover, switchover};

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::act::ActName;
use crate::ids::{Epoch, GroupName, SiteId};

/// Number of a step within its plan.
pub type StepId = u32;

/// Part of a run that people follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Everything is read, nothing changed.
    Preflight,
    /// Writers live; slow work is done ahead.
    Prepare,
    /// Writers are shut out.
    Fence,
    /// Every plane reaches its final position at both sites.
    Drain,
    /// The point of no return.
    Takeover,
    /// The target becomes writable, for us only.
    Promote,
    /// Writers are let in.
    Open,
    /// Proof that it serves.
    Verify,
    /// The old site becomes the standby.
    Reverse,
}

impl Stage {
    /// As people read it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Prepare => "prepare",
            Self::Fence => "fence",
            Self::Drain => "drain",
            Self::Takeover => "takeover",
            Self::Promote => "promote",
            Self::Open => "open",
            Self::Verify => "verify",
            Self::Reverse => "reverse",
        }
    }
}

/// What an act does to writers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Lets them in.
    Opens,
    /// Shuts them out.
    Fences,
    /// Neither.
    Neither,
}

/// One step as planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Its number.
    pub id: StepId,
    /// What is done.
    pub act: ActName,
    /// Where; none for an entry of the quorum.
    pub site: Option<SiteId>,
    /// Steps that must be done before.
    pub after: Vec<StepId>,
    /// Of which stage.
    pub stage: Stage,
    /// What it does to writers.
    pub effect: Effect,
    /// Whether it is undone when the run is aborted.
    pub undo: bool,
    /// How long one attempt may take, in milliseconds.
    pub deadline_ms: u64,
    /// Attempts before the run is rolled back or a human is called.
    pub attempts: u32,
}

impl PlannedStep {
    /// How long one attempt may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }
}

/// What moves where, step by step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which group.
    pub group: GroupName,
    /// The holder it was made for.
    pub source: SiteId,
    /// The site that shall hold the group.
    pub target: SiteId,
    /// The group's epoch it was made for.
    pub epoch: Epoch,
    /// Version of the spec it was made for.
    pub spec_version: u64,
    /// In an order in which each step comes after those it needs.
    pub steps: Vec<PlannedStep>,
}

impl Plan {
    /// SHA-256 over the whole plan, in hex. Any difference gives another hash.
    pub fn hash(&self) -> String {
        // A plan is plain data with text keys, which serde_json cannot fail on; an empty
        // text would merely give a hash that no plan shown to anyone has.
        let text = serde_json::to_string(self).unwrap_or_default();
        crate::registry::hex(&Sha256::digest(text.as_bytes()))
    }

    /// The short name people type: the first eight digits of the hash.
    pub fn id(&self) -> String {
        self.hash().chars().take(8).collect()
    }

    /// Milliseconds for which the slowest writer plane is expected to be shut out, by the
    /// times learned from earlier runs; none where a time is not known yet.
    pub fn expected_outage_ms(&self, learned: &crate::registry::Learned) -> Option<u64> {
        expected::outage(self, learned)
    }
}
