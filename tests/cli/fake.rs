//! Three agents in one process: the real law of `core`, the real gRPC door and mutual TLS,
//! and hands that do every act as told instead of touching a plane.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dc_agent::control::{Control, Health};
use dc_core::act::{Evidence, Finding, Outcome, QuorumAct};
use dc_core::codes::Code;
use dc_core::fail::Fail;
use dc_core::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use dc_core::observe::{PlaneFacts, Role};
use dc_core::plan;
use dc_core::position::{Lag, LagUnit, Lsn, Position, ShutdownToken};
use dc_core::registry::{Answer, Command, Entry, Registry};
use dc_core::run::{Run, Status, Step, Trouble};
use dc_core::spec::GroupSpec;
use dc_core::time::WallTime;
use dc_core::view::{
    ApplyChange, ApplyView, GroupShow, GroupView, PlanView, PlaneView, PublishView, QuorumView, RunView,
    SiteView, StatusView,
};
use dc_wire::identity::Role as Who;
use dc_wire::pki::{self, CaFiles, Order};
use dc_wire::tls::{Tls, TlsFiles};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

pub const GROUP: &str = "name = \"orders\"\nsites = [\"rome\", \"fra\"]\n\n[postgres]\ndatabases = [\"app\"]\napp_roles = [\"app\"]\n\n\
    [kafka]\ntopics = [\"orders\"]\nproducers = [\"app\"]\nconsumers = [\"app\"]\ngroups = [\"billing\"]\nmirror = \"orders-0\"\n\n\
    [s3]\nbucket = \"orders\"\ndag_prefix = \"dags\"\nlog_prefix = \"logs\"\nwriters = [\"app\"]\n";

/// What the hands do otherwise than well.
#[derive(Default)]
pub struct Script {
    /// Acts that fail, and how often they still do.
    pub failing: BTreeMap<String, u32>,
    /// An act that is begun and not answered.
    pub held: Option<String>,
    /// What preflights find, at every site.
    pub findings: Vec<Finding>,
    /// Between two rounds of the hands.
    pub pace: Duration,
}

pub struct World {
    pub folder: TempDir,
    pub script: Mutex<Script>,
    pub quorum: AtomicBool,
    pub summary: Mutex<String>,
    pub stale: AtomicBool,
    registry: Mutex<Registry>,
    changed: watch::Sender<Arc<Registry>>,
    token: AtomicU64,
    ca: CaFiles,
    pub published: Mutex<Vec<(String, String, u64)>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(dc_core::time::millis(since))
}

pub fn site(name: &str) -> SiteId {
    SiteId::new(name).unwrap()
}

/// One agent that can be stopped.
pub struct Agent {
    pub site: SiteId,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
}

impl Agent {
    /// Dies: its connections end and its address refuses.
    pub fn stop(&mut self) {
        self.stop.take();
    }
}

impl World {
    pub fn new() -> Arc<Self> {
        let folder = tempfile::tempdir().unwrap();
        let ca = pki::init(&folder.path().join("ca"), "lab.example", 2).unwrap();
        let (changed, _) = watch::channel(Arc::new(Registry::default()));
        let world = Arc::new(Self {
            folder,
            script: Mutex::new(Script { pace: Duration::from_millis(5), ..Script::default() }),
            quorum: AtomicBool::new(true),
            summary: Mutex::new("as it should be".into()),
            stale: AtomicBool::new(false),
            registry: Mutex::default(),
            changed,
            token: AtomicU64::new(1),
            ca,
            published: Mutex::default(),
        });
        let hands = world.clone();
        tokio::spawn(async move {
            loop {
                let pace = lock(&hands.script).pace;
                tokio::time::sleep(pace).await;
                hands.work();
            }
        });
        world
    }

    /// A world in which the group is applied, with three agents and an operator's context.
    pub async fn running() -> (Arc<Self>, Vec<Agent>, PathBuf) {
        let world = Self::new();
        let spec: GroupSpec = toml::from_str(GROUP).unwrap();
        assert_eq!(
            world.apply("operator/test", Entry::ApplyGroup { spec: Box::new(spec), over: 0 }),
            Answer::Done
        );
        let mut agents = Vec::new();
        for name in ["fra", "oslo", "rome"] {
            agents.push(world.serve(name, Duration::ZERO).await);
        }
        let context = world.context(&agents, Who::Operator, "olga");
        (world, agents, context)
    }

    pub fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        change(&mut lock(&self.script))
    }

    pub fn state(&self) -> Registry {
        lock(&self.registry).clone()
    }

    pub fn summary(&self, text: &str) {
        text.clone_into(&mut lock(&self.summary));
    }

    /// Files of a new identity.
    pub fn issue(&self, role: Who, name: &str) -> TlsFiles {
        let order = Order { role, name: name.into(), dns: vec![], ips: vec![], days: 1, replace: true };
        let made = pki::issue(&self.ca, self.folder.path(), &order).unwrap();
        TlsFiles { ca: self.ca.cert.clone(), cert: made.cert, key: made.key }
    }

    /// Starts the agent of a site; `delay` holds back its answers to `status`.
    pub async fn serve(self: &Arc<Self>, name: &str, delay: Duration) -> Agent {
        let me = Arc::new(Fake { world: self.clone(), me: site(name), delay });
        let tls = Arc::new(Tls::load(self.issue(Who::Agent, name)).unwrap());
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = (grpc.local_addr().unwrap(), http.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let routes = tonic::service::Routes::new(dc_surface::grpc::control_service(me.clone()));
        tokio::spawn(async move {
            tokio::select! {
                _ = dc_wire::link::serve(grpc, tls, routes, std::future::pending()) => {}
                _ = stopped => {}
            }
        });
        tokio::spawn(async move { axum::serve(http, dc_surface::http::router(me)).await });
        Agent { site: site(name), grpc: addresses.0, http: addresses.1, stop: Some(stop) }
    }

    /// A context file for someone, naming these agents.
    pub fn context(&self, agents: &[Agent], role: Who, name: &str) -> PathBuf {
        self.context_with(agents, &self.issue(role, name), name)
    }

    pub fn context_with(&self, agents: &[Agent], tls: &TlsFiles, name: &str) -> PathBuf {
        let agents: Vec<_> = agents.iter().map(|a| format!("{} = \"{}\"", a.site, a.grpc)).collect();
        let text = format!(
            "current = \"lab\"\n[contexts.lab]\nenvironment = \"LAB one\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n\
             [contexts.lab.agents]\n{}\n",
            tls.ca.display(),
            tls.cert.display(),
            tls.key.display(),
            agents.join("\n")
        );
        let path = self.folder.path().join(format!("context-{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn apply(&self, by: &str, entry: Entry) -> Answer {
        let at = Token(self.token.fetch_add(1, Ordering::SeqCst));
        let mut registry = lock(&self.registry);
        let answer = registry.apply(at, &Command { by: by.into(), wall: now(), entry });
        self.changed.send_replace(Arc::new(registry.clone()));
        answer
    }

    /// One round: whatever is intended is done, or fails as the script says.
    fn work(&self) {
        if !self.quorum.load(Ordering::SeqCst) {
            return;
        }
        let runs: Vec<Run> = self.state().open_runs().cloned().collect();
        for run in runs {
            for step in &run.steps {
                if let Some((token, _)) = step.intent() {
                    self.answer(&run, step, token);
                }
            }
            let again =
                |s: &Step| matches!(&s.status, Status::Failed { attempt, .. } if *attempt < s.plan.attempts);
            if run.aborting.is_none() && run.steps.iter().any(again) {
                self.apply("agent/rome", Entry::Retry { run: run.id.clone() });
            }
            let group = self.state().groups[&run.group].epoch;
            let entry = match run.due() {
                Some(QuorumAct::Takeover) => {
                    Entry::Takeover { run: run.id.clone(), epoch: group.next(), cut: run.cut() }
                }
                Some(QuorumAct::Opened) => Entry::Opened { run: run.id.clone(), epoch: group },
                _ => continue,
            };
            self.apply("agent/rome", entry);
        }
    }

    fn answer(&self, run: &Run, step: &Step, token: Token) {
        let name = step.plan.act.to_string();
        let result = self.script(|script| {
            if script.held.as_ref() == Some(&name) {
                return None;
            }
            if let Some(left) = script.failing.get_mut(&name).filter(|left| **left > 0) {
                *left -= 1;
                return Some(Err(Trouble {
                    code: "DC-0216".into(),
                    text: format!("{name} was told to fail"),
                }));
            }
            let found = if name.ends_with(".preflight") { script.findings.clone() } else { Vec::new() };
            Some(Ok(evidence(&name).with(Outcome::Findings(found))))
        });
        let Some(result) = result else { return };
        let (run, step) = (run.id.clone(), step.plan.id);
        self.apply("agent/rome", Entry::Finish { run, step, token, took_ms: 12, result });
    }
}

fn evidence(act: &str) -> Evidence {
    let seen = Evidence::changed("seen by the fake's hands");
    match act {
        "postgres.replayed" => {
            let token = ShutdownToken { system_id: 7, timeline: 1, checkpoint: Lsn(100) };
            seen.with(Outcome::Position(Position::Postgres { token, replayed: Lsn(200) }))
        }
        "kafka.set_offsets" => seen.with(Outcome::Position(Position::Kafka {
            source: BTreeMap::default(),
            target: BTreeMap::default(),
        })),
        "s3.last_pass" => seen.with(Outcome::Position(Position::S3 { release: None, logs: 0 })),
        _ => seen,
    }
}

struct Fake {
    world: Arc<World>,
    me: SiteId,
    delay: Duration,
}

impl Fake {
    fn planes(&self, holder: &SiteId, spec: &GroupSpec) -> Vec<PlaneView> {
        let age_ms = Some(if self.world.stale.load(Ordering::SeqCst) { 60_000 } else { 400 });
        let mut planes = Vec::new();
        for plane in spec.planes() {
            for at in &spec.sites {
                let here = at == holder;
                let unit = match plane {
                    PlaneKind::Postgres => LagUnit::Bytes,
                    PlaneKind::Kafka => LagUnit::Records,
                    _ => LagUnit::Objects,
                };
                let lag = (!here).then_some(Lag { amount: 1_204, unit, age_ms: Some(700) });
                let role = Some(if here { Role::Writable } else { Role::Following });
                let summary = lock(&self.world.summary).clone();
                let facts = Some(PlaneFacts { plane, role, lag, summary, findings: Vec::new() });
                planes.push(PlaneView { plane, site: at.clone(), facts, age_ms });
            }
        }
        planes
    }

    fn answered(&self, by: &str, entry: Entry) -> Result<Answer, Fail> {
        match self.world.apply(by, entry) {
            Answer::Refused(fail) => Err(*fail),
            other => Ok(other),
        }
    }
}

#[async_trait]
impl Control for Fake {
    fn status(&self) -> StatusView {
        std::thread::sleep(self.delay);
        let state = self.world.state();
        let answering = self.world.quorum.load(Ordering::SeqCst);
        let sites = ["fra", "oslo", "rome"].map(|name| SiteView {
            site: site(name),
            witness: name == "oslo",
            heard_ms: Some(300),
            lease_ms: (site(name) == self.me).then_some(7_200),
            version: Some("0.1.0".into()),
        });
        let groups = state.groups.values().map(|group| GroupView {
            name: group.spec.name.clone(),
            holder: group.holder.clone(),
            epoch: group.epoch,
            opened: group.opened,
            sites: group.spec.sites.clone(),
            release: group.release.clone(),
            run: group.run.clone(),
            attention: None,
            planes: self.planes(&group.holder, &group.spec),
        });
        StatusView {
            environment: "lab.example".into(),
            asked: self.me.clone(),
            wall: now(),
            quorum: QuorumView { voters: 3, leader: answering.then(|| site("rome")), term: 4, answering },
            sites: sites.into(),
            groups: groups.collect(),
        }
    }

    async fn plan(&self, group: &GroupName, to: &SiteId) -> Result<PlanView, Fail> {
        let plan = plan::switchover(&self.world.state(), group, to)?;
        let expected_ms = plan.steps.iter().map(|s| (s.id % 2 == 0).then_some(340)).collect();
        let findings = self.world.script(|script| script.findings.clone());
        Ok(PlanView { id: plan.id(), hash: plan.hash(), outage_ms: Some(940), findings, expected_ms, plan })
    }

    async fn switchover(
        &self,
        by: &str,
        group: &GroupName,
        to: &SiteId,
        shown: Option<&str>,
        reason: &str,
    ) -> Result<RunId, Fail> {
        let plan = plan::switchover(&self.world.state(), group, to)?;
        let hash = plan.hash();
        let plan_hash = match shown {
            Some(shown) if !hash.starts_with(shown) => shown.to_owned(),
            _ => hash,
        };
        let run = RunId(format!("01K{:023}", self.world.token.load(Ordering::SeqCst)));
        let entry = Entry::Start {
            run: run.clone(),
            group: group.clone(),
            to: to.clone(),
            plan_hash,
            reason: reason.into(),
        };
        self.answered(by, entry).map(|_| run)
    }

    fn runs(&self, group: Option<&GroupName>) -> Vec<RunView> {
        let state = self.world.state();
        let runs = state.runs.values().rev().filter(|r| group.is_none_or(|g| r.group == *g));
        runs.map(|run| RunView { run: run.clone(), wall: now() }).collect()
    }

    fn run(&self, id: &str) -> Result<RunView, Fail> {
        let state = self.world.state();
        let found = state.runs.values().find(|run| run.id.0.starts_with(id));
        found.map(|run| RunView { run: run.clone(), wall: now() }).ok_or_else(|| {
            Fail::refused(Code::UNKNOWN_RUN, format!("asked for run {id}"), "no run begins like this")
                .next("dc-switch run list")
        })
    }

    fn changes(&self) -> watch::Receiver<Arc<Registry>> {
        self.world.changed.subscribe()
    }

    async fn abort(&self, by: &str, run: &RunId, why: &str) -> Result<(), Fail> {
        self.answered(by, Entry::Abort { run: run.clone(), why: why.into() }).map(|_| ())
    }

    async fn retry(&self, by: &str, run: &RunId) -> Result<(), Fail> {
        self.answered(by, Entry::Retry { run: run.clone() }).map(|_| ())
    }

    async fn turn(&self, by: &str, run: &RunId) -> Result<(), Fail> {
        let epoch: Epoch = self.run(&run.0)?.run.epoch;
        self.answered(by, Entry::Return { run: run.clone(), epoch }).map(|_| ())
    }

    async fn apply_group(&self, by: &str, spec: GroupSpec, dry_run: bool) -> Result<ApplyView, Fail> {
        let known = self.world.state().groups.get(&spec.name).cloned();
        let change = match &known {
            None => ApplyChange::New,
            Some(known) if known.spec == spec => ApplyChange::Same,
            Some(_) => ApplyChange::Changed,
        };
        let (group, claims) = (spec.name.clone(), spec.claims().iter().map(ToString::to_string).collect());
        if !dry_run {
            let over = known.map_or(0, |known| known.spec_version);
            self.answered(by, Entry::ApplyGroup { spec: Box::new(spec), over })?;
        }
        Ok(ApplyView { group, dry_run, change, claims })
    }

    fn group(&self, name: &GroupName) -> Result<GroupShow, Fail> {
        let state = self.world.state();
        let group = state.groups.get(name).ok_or_else(|| {
            Fail::refused(Code::UNKNOWN_GROUP, "asked for a group", format!("there is no group {name}"))
                .next("dc-switch status")
        })?;
        Ok(GroupShow {
            spec: group.spec.clone(),
            spec_version: group.spec_version,
            holder: group.holder.clone(),
            epoch: group.epoch,
            claims: group.spec.claims().iter().map(ToString::to_string).collect(),
        })
    }

    async fn publish(&self, by: &str, group: &GroupName, tree: &Path) -> Result<PublishView, Fail> {
        let (mut files, mut bytes) = (0, 0);
        let mut folders = vec![tree.to_owned()];
        while let Some(folder) = folders.pop() {
            for item in std::fs::read_dir(folder).unwrap() {
                let path = item.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let size = path.metadata().unwrap().len();
                    (files, bytes) = (files + 1, bytes + size);
                    let name = path.strip_prefix(tree).unwrap().display().to_string();
                    lock(&self.world.published).push((format!("{} {by}", self.me), name, size));
                }
            }
        }
        let epoch = self.world.state().groups[group].epoch;
        let entry = Entry::Publish { group: group.clone(), parent: None, root: "ab".repeat(32), epoch };
        match self.answered(by, entry)? {
            Answer::Release(release) => Ok(PublishView { release, files, bytes }),
            other => panic!("{other:?}"),
        }
    }

    fn health(&self) -> Health {
        let state = self.world.state();
        let (active, standby) = state
            .groups
            .values()
            .filter(|g| g.spec.sites.contains(&self.me))
            .map(|g| (g.spec.name.clone(), g.holder == self.me))
            .partition::<Vec<_>, _>(|(_, holds)| *holds);
        let names = |list: Vec<(GroupName, bool)>| list.into_iter().map(|(name, _)| name).collect();
        let quorum = self.world.quorum.load(Ordering::SeqCst);
        Health {
            live: true,
            ready: if quorum { Ok(()) } else { Err("no quorum".into()) },
            active: names(active),
            standby: names(standby),
            metrics: "dcswitch_quorum_ok 1\n".into(),
        }
    }
}
