//! What surfaces may ask of an agent. They parse, call and show; the agent decides.

use std::path::Path;

use async_trait::async_trait;
use dc_core::fail::Fail;
use dc_core::ids::{GroupName, RunId, SiteId};
use dc_core::registry::Registry;
use dc_core::spec::GroupSpec;
use dc_core::view::{ApplyView, GroupShow, PlanView, PublishView, RunView, StatusView};
use std::sync::Arc;
use tokio::sync::watch;

/// The operator's side of an agent. `by` is the caller as its certificate names it.
#[async_trait]
pub trait Control: Send + Sync {
    /// Sites, groups, planes, quorum; from this agent's own knowledge, never waiting on others.
    fn status(&self) -> StatusView;

    /// Plans a move and runs every plane's preflight at both sites. Changes nothing.
    ///
    /// Errors: a refusal; unreachable sites are findings of the plan, not errors.
    async fn plan(&self, group: &GroupName, to: &SiteId) -> Result<PlanView, Fail>;

    /// Begins a move, or names the open run that already goes to that site.
    ///
    /// `plan` is the id or hash that was shown. Repeat: attaches.
    /// Errors: a refusal with its rule; no quorum.
    async fn switchover(
        &self,
        by: &str,
        group: &GroupName,
        to: &SiteId,
        plan: Option<&str>,
        reason: &str,
    ) -> Result<RunId, Fail>;

    /// Runs, newest first.
    fn runs(&self, group: Option<&GroupName>) -> Vec<RunView>;

    /// One run by its name or an unambiguous beginning of it.
    ///
    /// Errors: unknown or ambiguous.
    fn run(&self, id: &str) -> Result<RunView, Fail>;

    /// The applied state, with a notice of each change.
    fn changes(&self) -> watch::Receiver<Arc<Registry>>;

    /// Undoes a run before its takeover.
    ///
    /// Errors: a refusal with its rule.
    async fn abort(&self, by: &str, run: &RunId, why: &str) -> Result<(), Fail>;

    /// Tries failed steps once more.
    ///
    /// Errors: a refusal with its rule.
    async fn retry(&self, by: &str, run: &RunId) -> Result<(), Fail>;

    /// Turns a run round between its takeover and `Opened`.
    ///
    /// Errors: a refusal with its rule.
    async fn turn(&self, by: &str, run: &RunId) -> Result<(), Fail>;

    /// Registers a group or a change of its spec; with `dry_run` only says what it would do.
    ///
    /// Errors: a refusal with all faults or the other group's name.
    async fn apply_group(&self, by: &str, spec: GroupSpec, dry_run: bool) -> Result<ApplyView, Fail>;

    /// A group as applied.
    ///
    /// Errors: unknown.
    fn group(&self, name: &GroupName) -> Result<GroupShow, Fail>;

    /// Publishes a tree of DAGs as the group's newest release. Only at the holder.
    ///
    /// Repeat: the same tree gives the same release.
    /// Errors: a refusal that names the holder to ask, or what is wrong with the tree.
    async fn publish(&self, by: &str, group: &GroupName, tree: &Path) -> Result<PublishView, Fail>;

    /// What probes ask: whether the loop lives, is ready, and what this site is.
    fn health(&self) -> Health;
}

/// What the health endpoints tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The main loop ticked within twice its interval.
    pub live: bool,
    /// Config loaded, quorum joined, planes read once. When not: what is missing.
    pub ready: Result<(), String>,
    /// Groups that this site holds, opened, with lease left above the closing lead.
    pub active: Vec<GroupName>,
    /// Groups for which this site is a standby whose planes were read lately.
    pub standby: Vec<GroupName>,
    /// Lines in Prometheus' text format.
    pub metrics: String,
}
