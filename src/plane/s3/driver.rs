//! The plane of one group at one site: which act does what, and nothing of how.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use dc_core::act::{Act, ActName, Evidence, Outcome, Progress, S3Act};
use dc_core::authority::{Authority, Origin};
use dc_core::ids::{GroupName, PlaneKind, RunId, SiteId};
use dc_core::position::Position;
use dc_core::spec::GroupSpec;
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::{BuildError, Checked, Config};
use crate::copy::{Conditions, Copier};
use crate::materialise::Shelf;
use crate::passes::{Last, Mode};
use crate::publish::Names;
use crate::pull::Report;
use crate::state::State;
use crate::store::{Answer, Retries, Store, http};

/// One group's objects at this site.
pub(crate) struct Here {
    pub(crate) cfg: Checked,
    pub(crate) group: GroupName,
    pub(crate) own: Store,
    pub(crate) peer: Store,
    pub(crate) canary: Store,
    pub(crate) names: Names,
    pub(crate) shelf: Shelf,
    pub(crate) state: State,
    pub(crate) puller: Arc<tokio::sync::Mutex<()>>,
    pub(crate) proved: Mutex<Option<Conditions>>,
    pub(crate) last: Mutex<Last>,
    pub(crate) copier: Arc<Copier>,
    pub(crate) data_dir: PathBuf,
    pub(crate) running: Mutex<Option<Arc<AtomicBool>>>,
    pub(crate) followers: Mutex<Option<tokio::task::AbortHandle>>,
}

struct S3Plane(Arc<Here>);

/// Builds the plane of a group at this site.
///
/// Repeat: safe, changes nothing but making `data_dir`. Errors: everything that can be found wrong without a network.
pub fn build(
    config: Config,
    spec: &GroupSpec,
    site: SiteId,
    data_dir: PathBuf,
) -> Result<Arc<dyn Plane>, BuildError> {
    let cfg = config.check(spec, site)?;
    let fault = |key: &str, why: String| BuildError { key: key.to_owned(), why };
    std::fs::create_dir_all(&data_dir)
        .map_err(|e| fault("data_dir", format!("{}: {e}", data_dir.display())))?;
    let http = http(cfg.ca_pem.as_deref()).map_err(|why| fault("s3.ca_file", why))?;
    let store = |place: (&SiteId, &str), keys, retries| {
        Store::new(http.clone(), place, &cfg.spec.bucket, &cfg.region, keys, retries)
    };
    let here = (&cfg.site, cfg.own_endpoint.as_str());
    let own = store(here, &cfg.own_keys, Retries::Some);
    let peer = store((&cfg.peer, cfg.peer_endpoint.as_str()), &cfg.peer_keys, Retries::Some);
    let canary = store(here, &cfg.canary_keys, Retries::None);
    let state =
        State::open(data_dir.join(format!("s3-{}.json", spec.name))).map_err(|why| fault("data_dir", why))?;
    Ok(Arc::new(S3Plane(Arc::new(Here {
        group: spec.name.clone(),
        copier: Arc::new(Copier::new(peer.clone(), own.clone())),
        names: Names::new(&cfg.spec.dag_prefix),
        shelf: Shelf::new(&cfg.releases_dir),
        puller: Arc::new(tokio::sync::Mutex::new(())),
        proved: Mutex::new(None),
        last: Mutex::new(Last::default()),
        running: Mutex::new(None),
        followers: Mutex::new(None),
        own,
        peer,
        canary,
        state,
        data_dir,
        cfg,
    }))))
}

impl Here {
    /// The object that writers' tries are made on.
    pub(crate) fn probe_key(&self) -> String {
        format!("{}/.dc/probe/{}", self.cfg.spec.log_prefix, self.cfg.site)
    }

    /// Refuses to pull where this site was opened in the same or a later epoch.
    fn may_pull(&self, act: &Act) -> Result<(), PlaneError> {
        match self.state.now().opened {
            Some(opened) if act.epoch <= opened => Err(PlaneError::refused(
                "DC-0513",
                format!("{} was opened in epoch {opened}, this act is of epoch {}", self.cfg.site, act.epoch),
            )),
            _ => Ok(()),
        }
    }

    async fn recheck(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let mut evidence = self.preflight(act, until).await?;
        if self.cfg.site == act.source && evidence.blocking().next().is_none() {
            let count = self.remember_own(until).await?;
            evidence.seen = format!("{}; {count} objects of this site remembered", evidence.seen);
        }
        Ok(evidence)
    }

    async fn catch_up(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        self.may_pull(act)?;
        let release = self.releases(act, until).await?;
        let report = loop {
            let report = self.pass(Mode::Bring, act.epoch, until).await?;
            if report.left <= self.cfg.lag_objects_max {
                break report;
            }
            if until.left() < report.took {
                self.must_be_level(&report)?;
            }
        };
        let seen = format!(
            "{} objects compared, {} brought ({} bytes), {} left, {} ms; {}",
            report.compared,
            report.brought,
            report.brought_bytes,
            report.left,
            report.took.as_millis(),
            release.clone().unwrap_or_else(|| "releases stood".into()),
        );
        let idle = report.brought == 0 && release.is_none();
        let evidence = if idle { Evidence::already(seen) } else { Evidence::changed(seen) };
        Ok(self.with_kept(evidence, &report))
    }

    fn with_kept(&self, evidence: Evidence, report: &Report) -> Evidence {
        let Some(first) = report.kept.first() else { return evidence };
        let text = format!(
            "{} objects of {} were something that it did not know; each was kept beside before it was replaced, as {first}",
            report.kept.len(),
            self.cfg.site
        );
        evidence.with(Outcome::Findings(vec![self.finding("DC-0515", false, text)]))
    }

    /// Compares listings that begin after the source's fence, and brings and proves all that is missing or different.
    ///
    /// A second look follows only if the first left something. What a write under way at the fence adds behind the
    /// listing is brought by `late_pass`.
    async fn last_pass(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        self.may_pull(act)?;
        let began = Instant::now();
        let (release, first) =
            tokio::join!(self.releases(act, until), self.pass(Mode::Bring, act.epoch, until));
        let (release, mut report) = (release?, first?);
        let (mut brought, mut bytes, backlog) = (report.brought, report.brought_bytes, report.pending);
        while report.left > 0 {
            if until.left() < report.took {
                self.must_be_level(&report)?;
            }
            report = self.pass(Mode::Bring, act.epoch, until).await?;
            brought += report.brought;
            bytes += report.brought_bytes;
        }
        let seen = format!(
            "backlog 0: {} objects are as they are at {}; {backlog} were behind, {brought} brought and proved ({bytes} bytes), {} ms; {}",
            report.compared,
            self.peer.site,
            began.elapsed().as_millis(),
            release.unwrap_or_else(|| "releases stood".into()),
        );
        let position = Position::S3 { release: act.release().cloned(), logs: report.compared };
        let evidence = if brought == 0 { Evidence::already(seen) } else { Evidence::changed(seen) };
        Ok(evidence.with(Outcome::Position(position)))
    }

    /// Ends the puller and lets the writers in.
    async fn open_writers(
        self: &Arc<Self>,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        if self.cfg.site != *act.new_holder() {
            let why = format!("{} is not the site that shall hold the group", self.cfg.site);
            return Err(PlaneError::refused("DC-0513", why));
        }
        opening(by)?;
        self.end_puller(act.epoch, until).await?;
        self.reopen(
            |m| {
                m.run = None;
                m.site = false;
                m.standby = false;
                m.pulls = None;
            },
            until,
        )
        .await
    }

    /// Turns this site to pulling: writers denied here, one full pass done, and on for a while.
    async fn pull_reverse(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if self.cfg.site == *act.new_holder() {
            let why = format!("{} holds the group and follows nobody", self.cfg.site);
            return Err(PlaneError::refused("DC-0513", why));
        }
        self.may_pull(act)?;
        let epoch = act.epoch;
        self.close(
            |m| {
                m.run = None;
                m.standby = true;
                m.pulls = Some(epoch);
            },
            until,
        )
        .await?;
        let report = self.pass(Mode::Bring, epoch, until).await?;
        self.follow(epoch);
        let seen = format!(
            "pulls from {}: {} objects compared, {} brought, {} left, {} ms",
            self.peer.site,
            report.compared,
            report.brought,
            report.left,
            report.took.as_millis()
        );
        Ok(self.with_kept(Evidence::changed(seen), &report))
    }

    /// One pass of upkeep at the standby.
    async fn stand(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if act.source == self.cfg.site {
            return Err(PlaneError::refused("DC-0513", format!("{} holds the group", self.cfg.site)));
        }
        self.may_pull(act)?;
        if let Some(task) = self.followers.lock().take() {
            task.abort();
        }
        let fenced = until.bound("the bucket policy", self.fenced()).await??;
        if !(fenced && self.state.now().closed()) {
            self.close(|m| m.standby = true, until).await?;
        }
        let release = self.releases(act, until).await;
        let report = self.pass(Mode::Bring, act.epoch, until).await?;
        let release = release?;
        let seen = format!(
            "{} objects compared, {} brought, {} left; {}",
            report.compared,
            report.brought,
            report.left,
            release.clone().unwrap_or_else(|| "releases stood".into())
        );
        let idle = fenced && report.brought == 0 && release.is_none();
        let evidence = if idle { Evidence::already(seen) } else { Evidence::changed(seen) };
        Ok(self.with_kept(evidence, &report))
    }

    async fn serve(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let done = self.releases(act, until).await?;
        let current = self.shelf.current().unwrap_or_else(|| "no release".into());
        Ok(match done {
            Some(done) => Evidence::changed(done),
            None => Evidence::already(format!("{current} stands")),
        })
    }

    async fn fence_writers(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let marks = self.state.now();
        if marks.opened.is_some_and(|opened| act.epoch < opened) {
            let why = format!("{} was opened in epoch {:?}", self.cfg.site, marks.opened);
            return Err(PlaneError::refused("DC-0513", why));
        }
        let run = act.run.clone().ok_or_else(|| PlaneError::refused("DC-0513", "only a run fences"))?;
        self.close(|m| m.run = Some(run), until).await
    }

    async fn unfence(&self, run: Option<&RunId>, until: Deadline) -> Result<Evidence, PlaneError> {
        let marks = self.state.now();
        if let Some(other) = marks.run.filter(|held| Some(held) != run) {
            let why = format!("the writers of {} were shut out by run {other}", self.cfg.site);
            return Err(PlaneError::refused("DC-0513", why));
        }
        self.reopen(|m| m.run = None, until).await
    }

    /// Lets the writers of a site in that closed itself, unless a run closed it.
    async fn unclose(&self, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        if let Some(run) = self.state.now().run {
            let why = format!("the writers of {} were shut out by run {run}", self.cfg.site);
            return Err(PlaneError::refused("DC-0513", why));
        }
        if !matches!(by.origin(), Origin::Reopen { .. }) {
            return Err(PlaneError::refused(
                "DC-0513",
                "a site that closed itself is reopened by a renewal only",
            ));
        }
        self.reopen(
            |m| {
                m.site = false;
                m.standby = false;
            },
            until,
        )
        .await
    }
}

/// Refuses an authority that may only close.
fn opening(by: &Authority) -> Result<(), PlaneError> {
    if by.may_open() {
        return Ok(());
    }
    Err(PlaneError::refused("DC-0513", "this authority may only close"))
}

/// The plane's own act of an act.
fn s3_act(act: &Act) -> Result<S3Act, PlaneError> {
    match act.name {
        ActName::S3(name) => Ok(name),
        other => Err(PlaneError::refused("DC-0513", format!("{other} is no act of this plane"))),
    }
}

#[async_trait]
impl Plane for S3Plane {
    fn kind(&self) -> PlaneKind {
        PlaneKind::S3
    }

    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        self.0.facts(depth, until).await
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let here = &self.0;
        let marks = here.state.now();
        let wanted = match s3_act(act)? {
            S3Act::FenceWriters if act.run.is_some() && marks.run == act.run => Answer::Refused,
            S3Act::SelfClose if marks.closed() => Answer::Refused,
            S3Act::OpenWriters if marks.opened == Some(act.epoch) && !marks.closed() => Answer::Accepted,
            _ => return Ok(Progress::NotYet),
        };
        let closed = wanted == Answer::Refused;
        let fenced = until.bound("the bucket policy", here.fenced()).await??;
        if fenced != closed || until.bound("a writer's PUT", here.knock()).await? != wanted {
            return Ok(Progress::NotYet);
        }
        let word = if closed { "refused" } else { "accepted" };
        Ok(Progress::Done(Evidence::already(format!(
            "policy of {} is {}, a PUT with the key {} is {word}",
            here.own.site,
            if closed { "with the Deny" } else { "without it" },
            here.cfg.canary_keys.access
        ))))
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        let here = &self.0;
        match s3_act(act)? {
            S3Act::Preflight => here.preflight(act, until).await,
            S3Act::CatchUp => here.catch_up(act, until).await,
            S3Act::Recheck => here.recheck(act, until).await,
            S3Act::FenceWriters => here.fence_writers(act, until).await,
            S3Act::LastPass => here.last_pass(act, until).await,
            S3Act::OpenWriters => here.open_writers(act, by, until).await,
            S3Act::LatePass => here.late_pass(act, until).await,
            S3Act::PullReverse => here.pull_reverse(act, until).await,
            S3Act::Verify => here.verify(act, until).await,
            S3Act::SelfClose => here.close(|m| m.site = true, until).await,
            S3Act::Stand => here.stand(act, until).await,
            S3Act::Serve => here.serve(act, until).await,
        }
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        let here = &self.0;
        match s3_act(act)? {
            S3Act::FenceWriters => {
                opening(by)?;
                here.unfence(act.run.as_ref(), until).await
            }
            S3Act::SelfClose => {
                opening(by)?;
                here.unclose(by, until).await
            }
            S3Act::OpenWriters => Err(PlaneError::refused(
                "DC-0513",
                "writers were let in after Opened: only forward, or by a new run",
            )),
            _ => Ok(Evidence::already("nothing to take back: nothing was closed or opened")),
        }
    }
}
