//! What Raft replicates, and the one function that changes it.
//!
//! `apply` is total and pure: the same state and command give the same state and answer
//! at every site. It never reads a clock; wall times are the proposer's and for people.

mod apply;
mod audit;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use audit::hex;
pub use audit::{Audit, AuditEntry};

use crate::act::Evidence;
use crate::fail::Fail;
use crate::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use crate::lease::Renewal;
use crate::plan::StepId;
use crate::position::{Cut, DagRelease, Grant};
use crate::run::{Run, Trouble};
use crate::spec::GroupSpec;
use crate::time::WallTime;

/// Milliseconds that each act took, by its full name, smoothed over past runs.
pub type Learned = BTreeMap<String, u64>;

/// The replicated state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// Rises when a lost quorum is rebuilt.
    pub incarnation: u32,
    /// The newest renewal of each site.
    pub sites: BTreeMap<SiteId, Renewal>,
    /// Every failover group.
    pub groups: BTreeMap<GroupName, Group>,
    /// Open runs, and the last that ended.
    pub runs: BTreeMap<RunId, Run>,
    /// How long acts took.
    pub learned: Learned,
    /// Decisions and acts, chained by hash.
    pub audit: Audit,
}

/// One failover group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// As applied.
    pub spec: GroupSpec,
    /// Counts from 1; rises with each change of the spec.
    pub spec_version: u64,
    /// The site that holds the group.
    pub holder: SiteId,
    /// Of its activation.
    pub epoch: Epoch,
    /// Whether `Opened`, or the founding entry, of this very epoch is applied.
    pub opened: bool,
    /// Highest timeline number seen or set aside.
    pub timeline_high: u32,
    /// Application grants, from their recording until proved restored or granted.
    pub grants: Option<RecordedGrants>,
    /// The connector that carries the holder's topics to the standby.
    pub mirror: Option<String>,
    /// The newest release.
    pub release: Option<DagRelease>,
    /// Fences that runs have ordered, from the commit of the intent on.
    pub fences: Vec<FenceMark>,
    /// The run that holds the group.
    pub run: Option<RunId>,
}

/// Grants as recorded before a fence took them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedGrants {
    /// By which run.
    pub run: RunId,
    /// The bindings.
    pub grants: Vec<Grant>,
    /// Whether they were proved restored, or granted at the new holder.
    pub settled: bool,
}

/// A fence ordered by a run; nothing reopens while it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceMark {
    /// By which run.
    pub run: RunId,
    /// By which of its steps.
    pub step: StepId,
    /// On which plane.
    pub plane: PlaneKind,
    /// At which site.
    pub site: SiteId,
    /// Of the intent.
    pub token: Token,
}

/// A proposed change, with who asks and when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Identity of who asks, as in `operator/olga` or `agent/rome`.
    pub by: String,
    /// The proposer's wall clock, for people.
    pub wall: WallTime,
    /// What is asked.
    pub entry: Entry,
}

/// The changes there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// A site's session goes on.
    Renew {
        /// Which site.
        site: SiteId,
        /// Above the stored one, or ignored.
        renewal: Renewal,
    },
    /// A group is registered, or its spec changed.
    ApplyGroup {
        /// As written by its owner.
        spec: Box<GroupSpec>,
        /// Version of the known spec that it was compared with; 0 for a group not known.
        /// A file that comes late replaces no newer one.
        over: u64,
    },
    /// A run begins.
    Start {
        /// Its name.
        run: RunId,
        /// Of which group.
        group: GroupName,
        /// Where to.
        to: SiteId,
        /// Of the plan that was shown; another plan is not run.
        plan_hash: String,
        /// Why, for the audit.
        reason: String,
    },
    /// A step ended, in either way.
    Finish {
        /// Of which run.
        run: RunId,
        /// Which step.
        step: StepId,
        /// Of the intent that it answers.
        token: Token,
        /// Measured by the agent that performed it.
        took_ms: u64,
        /// What it brought.
        result: Result<Evidence, Trouble>,
    },
    /// No answer came to an intent within its deadline.
    Overdue {
        /// Of which run.
        run: RunId,
        /// Which step.
        step: StepId,
        /// Of the intent.
        token: Token,
    },
    /// Failed steps are tried once more.
    Retry {
        /// Of which run.
        run: RunId,
    },
    /// The point of no return.
    Takeover {
        /// By which run.
        run: RunId,
        /// The next one of the group.
        epoch: Epoch,
        /// Equal to the positions that the steps proved.
        cut: Cut,
    },
    /// The new holder may be written to from here on.
    Opened {
        /// By which run.
        run: RunId,
        /// Of its takeover.
        epoch: Epoch,
    },
    /// The run is undone, before its takeover.
    Abort {
        /// Which run.
        run: RunId,
        /// Why, for people.
        why: String,
    },
    /// The run goes back, between its takeover and `Opened`.
    Return {
        /// Which run.
        run: RunId,
        /// The epoch that is left. A return may be returned: without it, an entry that
        /// arrives twice would turn the run round twice.
        epoch: Epoch,
    },
    /// A DAG release gets its serial.
    Publish {
        /// Of which group.
        group: GroupName,
        /// The serial it follows; none for the first.
        parent: Option<u64>,
        /// SHA-256 over its manifest's entries, 64 hex digits.
        root: String,
        /// The epoch in which its files were uploaded.
        epoch: Epoch,
    },
}

/// What applying a command answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was applied.
    Done,
    /// It came too late and changed nothing.
    Stale,
    /// A rule forbids it; nothing was changed.
    Refused(Box<Fail>),
    /// The release has this name.
    Release(DagRelease),
}

/// Why a site may not serve a plane of a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotServing {
    /// The group is not known.
    #[error("no such group")]
    Unknown,
    /// Another site holds it.
    #[error("{0} holds the group")]
    HeldBy(SiteId),
    /// The takeover's `Opened` is not applied.
    #[error("epoch {0} is not opened")]
    NotOpened(Epoch),
    /// A run fenced the plane here.
    #[error("run {0} fences it")]
    Fenced(RunId),
    /// A run has yet to open it, in its own order.
    #[error("run {0} has not opened it yet")]
    Opening(RunId),
}

impl Registry {
    /// Whether the applied state lets a site serve a plane, lease aside.
    ///
    /// Errors: which of the conditions does not hold. What a run opens step by step is not
    /// anticipated: tasks are treated by policy before a scheduler starts, for one.
    pub fn may_serve(&self, group: &GroupName, site: &SiteId, plane: PlaneKind) -> Result<Epoch, NotServing> {
        let group = self.groups.get(group).ok_or(NotServing::Unknown)?;
        if group.holder != *site {
            return Err(NotServing::HeldBy(group.holder.clone()));
        }
        if !group.opened {
            return Err(NotServing::NotOpened(group.epoch));
        }
        if let Some(fence) = group.fences.iter().find(|f| f.plane == plane && f.site == *site) {
            return Err(NotServing::Fenced(fence.run.clone()));
        }
        let run = group.run.as_ref().and_then(|id| self.runs.get(id));
        match run.filter(|run| run.opens_later(plane, site)) {
            Some(run) => Err(NotServing::Opening(run.id.clone())),
            None => Ok(group.epoch),
        }
    }

    /// Runs that have not ended.
    pub fn open_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.values().filter(|run| run.ended.is_none())
    }
}

#[cfg(test)]
mod tests;
