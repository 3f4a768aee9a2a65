//! What the agents show: everything a screen or a script reads, each figure with its age.

use serde::{Deserialize, Serialize};

use crate::act::Finding;
use crate::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId};
use crate::observe::PlaneFacts;
use crate::plan::Plan;
use crate::position::DagRelease;
use crate::run::Run;
use crate::spec::GroupSpec;
use crate::time::WallTime;

/// Everything at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Trust domain of the certificates: the environment's name.
    pub environment: String,
    /// The site whose agent answered.
    pub asked: SiteId,
    /// Its wall clock.
    pub wall: WallTime,
    /// The quorum as that agent sees it.
    pub quorum: QuorumView,
    /// Every voter's site.
    pub sites: Vec<SiteView>,
    /// Every group.
    pub groups: Vec<GroupView>,
}

/// The quorum as one agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuorumView {
    /// How many vote.
    pub voters: usize,
    /// Site of the leader, if one is known.
    pub leader: Option<SiteId>,
    /// The engine's term.
    pub term: u64,
    /// Whether a majority answered lately. When false everything below is a local view.
    pub answering: bool,
}

/// One site as the asked agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteView {
    /// Which.
    pub site: SiteId,
    /// Whether it holds no group's planes and only votes.
    pub witness: bool,
    /// How long ago its agent was heard of, in milliseconds; none when never.
    pub heard_ms: Option<u64>,
    /// What is left of its lease, in milliseconds: exact for the asked site, none for others.
    pub lease_ms: Option<u64>,
    /// Version of its agent; none while unknown.
    pub version: Option<String>,
}

/// One group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupView {
    /// Which.
    pub name: GroupName,
    /// The site that holds it.
    pub holder: SiteId,
    /// Of its activation.
    pub epoch: Epoch,
    /// Whether the epoch is opened.
    pub opened: bool,
    /// Both sites.
    pub sites: Vec<SiteId>,
    /// The newest release.
    pub release: Option<DagRelease>,
    /// The run that holds it.
    pub run: Option<RunId>,
    /// What a human must look at.
    pub attention: Option<String>,
    /// Each plane at each site.
    pub planes: Vec<PlaneView>,
}

/// One plane at one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaneView {
    /// Which plane.
    pub plane: PlaneKind,
    /// Where.
    pub site: SiteId,
    /// The last reading; none when there was none.
    pub facts: Option<PlaneFacts>,
    /// How old it is, in milliseconds.
    pub age_ms: Option<u64>,
}

/// A plan with what it would meet now. Nothing was changed to make it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanView {
    /// Short name for `--plan`.
    pub id: String,
    /// Full hash.
    pub hash: String,
    /// The plan.
    pub plan: Plan,
    /// Expected milliseconds of the slowest writer plane's outage; none before a first run.
    pub outage_ms: Option<u64>,
    /// What every plane's preflight found, blocking or not.
    pub findings: Vec<Finding>,
    /// What each step took on average, in milliseconds, in the order of the plan.
    pub expected_ms: Vec<Option<u64>>,
}

/// A group as applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupShow {
    /// As applied.
    pub spec: GroupSpec,
    /// Counts from 1.
    pub spec_version: u64,
    /// The site that holds it.
    pub holder: SiteId,
    /// Of its activation.
    pub epoch: Epoch,
    /// What it owns alone, in words.
    pub claims: Vec<String>,
}

/// What applying a spec did, or would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApplyView {
    /// Which group.
    pub group: GroupName,
    /// Whether nothing was changed because it was only asked.
    pub dry_run: bool,
    /// Whether the group is new, changed or as it was.
    pub change: ApplyChange,
    /// What it owns alone, in words.
    pub claims: Vec<String>,
}

/// What a spec does to what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApplyChange {
    /// Founds the group.
    New,
    /// Changes it.
    Changed,
    /// Says what is known.
    Same,
}

/// What a spec would change of the one that is applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffView {
    /// Which group.
    pub group: GroupName,
    /// Whether the group is known; if not, everything is new.
    pub known: bool,
    /// Each key that differs.
    pub changes: Vec<KeyChange>,
}

/// A key of a spec that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyChange {
    /// As in `policy.stop_limit`.
    pub key: String,
    /// As applied; none when it is not there.
    pub is: Option<String>,
    /// As in the file; none when it is not there.
    pub becomes: Option<String>,
}

/// A run with what one can do about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunView {
    /// The run as replicated.
    pub run: Run,
    /// The asked agent's wall clock.
    pub wall: WallTime,
}

/// A release that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishView {
    /// Its name.
    pub release: DagRelease,
    /// Files in it.
    pub files: u64,
    /// Bytes in it.
    pub bytes: u64,
}
