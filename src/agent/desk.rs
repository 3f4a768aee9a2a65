//! Where operators are answered: what they may ask is `control`, what is true is the registry.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dc_core::act::{Act, Finding, Outcome};
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, RunId, SiteId};
use dc_core::plan;
use dc_core::registry::{Answer, Command, Entry, Group, Registry};
use dc_core::run::Run;
use dc_core::spec::{Claim, GroupSpec};
use dc_core::view::{ApplyChange, ApplyView, GroupShow, PlanView, PublishView, RunView, StatusView};
use dc_plane::Deadline;
use dc_plane::releases::Sealing;
use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Agent;
use crate::clock::wall;
use crate::control::{Control, Health};
use crate::duty::preflight_act;
use crate::peer::look;

/// Of one proposal; an answer that takes longer is unknown and said to be.
const PROPOSAL: Duration = Duration::from_secs(10);
/// Of a preflight for a plan.
const LOOK: Duration = Duration::from_secs(15);

impl Agent {
    /// Proposes one entry and gives its answer.
    ///
    /// Errors: no quorum, with the outcome unknown; the rule's own refusal.
    async fn propose(&self, by: &str, entry: Entry) -> Result<Answer, Fail> {
        let command = Command { by: by.to_owned(), wall: wall(), entry };
        let answered = self.engine.propose(vec![command], Instant::now() + PROPOSAL).await;
        let (_, answer) = answered
            .map_err(|cause| no_quorum(&cause.to_string()))?
            .pop()
            .ok_or_else(|| no_quorum("an empty answer"))?;
        match answer {
            Answer::Refused(fail) => Err(*fail),
            other => Ok(other),
        }
    }

    /// Reads on the leader's side of everything committed before now.
    async fn fresh(&self) -> Result<Arc<Registry>, Fail> {
        let until = Instant::now() + PROPOSAL;
        self.engine.barrier(until).await.map_err(|cause| no_quorum(&cause.to_string()))?;
        Ok(self.engine.state())
    }

    /// Every plane's preflight at both sites, side by side.
    async fn preflight(
        &self,
        state: &Registry,
        group: &GroupName,
        known: &Group,
        to: &SiteId,
    ) -> Vec<Finding> {
        let planes = known.spec.planes();
        let acts = planes
            .iter()
            .flat_map(|plane| [&known.holder, to].map(|site| preflight_act(state, group, to, site, *plane)));
        let looks = acts.flatten().map(|act| async move {
            let seen = if act.site == self.me {
                look(&self.shelf, &act, LOOK).await
            } else {
                self.peers.check(&act, LOOK).await
            };
            (act, seen)
        });
        let (mut found, mut told) = (Vec::new(), Vec::new());
        for (act, seen) in join_all(looks).await {
            match seen {
                Ok(evidence) => told.extend(evidence.outcomes),
                Err(text) => found.push(unanswered(&act, text)),
            }
        }
        found.extend(plan::compare(&told, &known.holder, to));
        found.extend(told.into_iter().flat_map(|o| match o {
            Outcome::Findings(found) => found,
            _ => Vec::new(),
        }));
        found
    }

    fn known(&self, name: &GroupName) -> Result<Group, Fail> {
        self.engine.state().groups.get(name).cloned().ok_or_else(|| {
            let fail =
                Fail::refused(Code::UNKNOWN_GROUP, "asked for a group", format!("there is no group {name}"));
            fail.next("dc-switch status")
        })
    }
}

fn unanswered(act: &Act, text: String) -> Finding {
    Finding { code: "DC-0222".into(), plane: act.name.plane(), site: act.site.clone(), blocking: true, text }
}

fn no_quorum(cause: &str) -> Fail {
    let what = "the quorum did not confirm it; whether it was changed is not known yet";
    Fail::new(Code::from_text("DC-0223"), Exit::NoQuorum, what, cause).next("dc-switch status")
}

fn unknown_run(id: &str, why: &str) -> Fail {
    Fail::refused(Code::UNKNOWN_RUN, format!("asked for run {id}"), why).next("dc-switch run list")
}

#[async_trait]
impl Control for Agent {
    fn status(&self) -> StatusView {
        self.look_around()
    }

    async fn plan(&self, group: &GroupName, to: &SiteId) -> Result<PlanView, Fail> {
        let state = self.fresh().await?;
        let plan = plan::switchover(&state, group, to)?;
        let known = self.known(group)?;
        let findings = self.preflight(&state, group, &known, to).await;
        let expected_ms = plan.steps.iter().map(|s| state.learned.get(&s.act.to_string()).copied()).collect();
        let outage_ms = plan.expected_outage_ms(&state.learned);
        Ok(PlanView { id: plan.id(), hash: plan.hash(), outage_ms, findings, expected_ms, plan })
    }

    async fn switchover(
        &self,
        by: &str,
        group: &GroupName,
        to: &SiteId,
        shown: Option<&str>,
        reason: &str,
    ) -> Result<RunId, Fail> {
        let state = self.fresh().await?;
        let open = state.open_runs().find(|run| run.group == *group && run.aborting.is_none());
        if let Some(run) = open.filter(|run| run.winner() == to) {
            return Ok(run.id.clone());
        }
        let plan = plan::switchover(&state, group, to)?;
        let plan_hash = match shown {
            Some(shown) if shown.len() >= 8 && plan.hash().starts_with(shown) => plan.hash(),
            Some(shown) => {
                let what = format!("switchover of {group} to {to} refused");
                let why = format!("plan {shown} was shown, the plan is {} by now", plan.id());
                let next = format!("dc-switch plan switchover {group} --to {to}");
                return Err(Fail::refused(Code::STALE_PLAN, what, why).next(next));
            }
            None => plan.hash(),
        };
        let run = RunId(ulid::Ulid::new().to_string());
        let (group, to, reason) = (group.clone(), to.clone(), reason.to_owned());
        self.propose(by, Entry::Start { run: run.clone(), group, to, plan_hash, reason }).await?;
        Ok(run)
    }

    fn runs(&self, group: Option<&GroupName>) -> Vec<RunView> {
        let state = self.engine.state();
        let mut runs: Vec<&Run> =
            state.runs.values().filter(|r| group.is_none_or(|g| r.group == *g)).collect();
        runs.reverse(); // a ULID sorts by its time
        runs.into_iter().map(|run| RunView { run: run.clone(), wall: wall() }).collect()
    }

    fn run(&self, id: &str) -> Result<RunView, Fail> {
        let state = self.engine.state();
        let wanted = id.to_ascii_uppercase();
        let mut found = state.runs.values().filter(|run| run.id.0.starts_with(&wanted) && !wanted.is_empty());
        match (found.next(), found.next()) {
            (Some(run), None) => Ok(RunView { run: run.clone(), wall: wall() }),
            (Some(_), Some(_)) => Err(unknown_run(id, "several runs begin like this")),
            (None, _) => Err(unknown_run(id, "no run begins like this")),
        }
    }

    fn changes(&self) -> watch::Receiver<Arc<Registry>> {
        self.changes.subscribe()
    }

    async fn abort(&self, by: &str, run: &RunId, why: &str) -> Result<(), Fail> {
        self.propose(by, Entry::Abort { run: run.clone(), why: why.to_owned() }).await.map(|_| ())
    }

    async fn retry(&self, by: &str, run: &RunId) -> Result<(), Fail> {
        self.propose(by, Entry::Retry { run: run.clone() }).await.map(|_| ())
    }

    async fn turn(&self, by: &str, run: &RunId) -> Result<(), Fail> {
        let epoch = self.run(&run.0)?.run.epoch;
        self.propose(by, Entry::Return { run: run.clone(), epoch }).await.map(|_| ())
    }

    async fn apply_group(&self, by: &str, spec: GroupSpec, dry_run: bool) -> Result<ApplyView, Fail> {
        let state = self.fresh().await?;
        let strangers: Vec<_> =
            spec.sites.iter().filter(|s| !self.voters.contains_key(s)).map(SiteId::as_str).collect();
        if !strangers.is_empty() {
            let why = format!("sites: {} not among the agents' [peers]", strangers.join(", "));
            let what = format!("group {} not applied", spec.name);
            return Err(Fail::refused(Code::BAD_SPEC, what, why).next("dc-switch status"));
        }
        let change = match state.groups.get(&spec.name) {
            None => ApplyChange::New,
            Some(known) if known.spec == spec => ApplyChange::Same,
            Some(_) => ApplyChange::Changed,
        };
        let (group, claims) = (spec.name.clone(), claims(&spec));
        let over = state.groups.get(&spec.name).map_or(0, |known| known.spec_version);
        let entry = Entry::ApplyGroup { spec: Box::new(spec), over };
        if dry_run {
            let command = Command { by: by.to_owned(), wall: wall(), entry };
            if let Answer::Refused(fail) = (*state).clone().apply(dc_core::ids::Token(u64::MAX), &command) {
                return Err(*fail);
            }
        } else {
            self.propose(by, entry).await?;
        }
        Ok(ApplyView { group, dry_run, change, claims })
    }

    fn group(&self, name: &GroupName) -> Result<GroupShow, Fail> {
        let group = self.known(name)?;
        let claims = claims(&group.spec);
        let (spec_version, holder, epoch) = (group.spec_version, group.holder, group.epoch);
        Ok(GroupShow { spec: group.spec, spec_version, holder, epoch, claims })
    }

    async fn publish(&self, by: &str, name: &GroupName, tree: &Path) -> Result<PublishView, Fail> {
        self.fresh().await?;
        let group = self.known(name)?;
        let refused = |why: String| {
            Fail::refused(Code::RELEASE_REFUSED, format!("release of {name} not accepted"), why)
        };
        if group.holder != self.me {
            let why = format!("{} holds the group; its agent publishes", group.holder);
            return Err(refused(why).next(format!("dc-switch dags publish DIR --group {name}")));
        }
        let releases =
            self.shelf.releases(name).ok_or_else(|| refused(format!("{} has no [s3] for it", self.me)))?;
        let until = Deadline::within(Duration::from_mins(5));
        let staged = releases.stage(tree, until).await.map_err(|e| refused(e.to_string()))?;
        let parent = group.release.clone();
        let entry = Entry::Publish {
            group: name.clone(),
            parent: parent.as_ref().map(|r| r.serial),
            root: staged.root.clone(),
            epoch: group.epoch,
        };
        let Answer::Release(release) = self.propose(by, entry).await? else {
            return Err(refused("another answer than a release".into()));
        };
        let sealing = Sealing {
            release: release.clone(),
            epoch: group.epoch,
            parent,
            author: by.to_owned(),
            created: wall(),
        };
        // Committed is committed: a copy that is not published now is, by the holder's upkeep.
        releases.seal(&sealing, until).await.map_err(|e| {
            let what = format!("release {} is committed, its copies are not published", release.version());
            Fail::new(Code::RELEASE_REFUSED, Exit::Findings, what, e.to_string())
                .next(format!("dc-switch dags publish DIR --group {name}"))
        })?;
        Ok(PublishView { release, files: staged.files, bytes: staged.bytes })
    }

    fn health(&self) -> Health {
        self.health_now()
    }
}

fn claims(spec: &GroupSpec) -> Vec<String> {
    spec.claims().iter().map(Claim::to_string).collect()
}
