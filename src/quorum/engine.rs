//! openraft behind the house's own contract.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{SiteId, Token};
use dc_core::lease::Profile;
use dc_core::time::millis;
use dc_wire::pb::quorum_server::QuorumServer;
use dc_wire::tls::Tls;
use openraft::{Config, Raft, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::disk::{CALL_LIMIT, Disk, OnDeath, StoreFacts, introduce};
use crate::founding::{Standing, join};
use crate::log_store::LogStore;
use crate::monitor;
use crate::network::Peers;
use crate::replica::ReplicaStore;
use crate::service::QuorumService;
use crate::types::{Types, voter_id};
use crate::{Applied, BarrierError, EngineMetrics, Leadership, LogEngine, Machine, ProposeError};

/// Commits whose time is kept.
const COMMITS_KEPT: usize = 1024;

/// What a voter is started with.
#[derive(Clone)]
pub struct Options {
    /// This site.
    pub site: SiteId,
    /// Every voter with its `host:port`, this site included.
    pub peers: BTreeMap<SiteId, String>,
    /// Its folder; the store is `quorum.redb` in it.
    pub data_dir: PathBuf,
    /// Its times; every voter's must be the same.
    pub profile: Profile,
    /// Its certificate and key.
    pub tls: Arc<Tls>,
    /// False at a witness, which stands for election only once every other voter has.
    pub may_lead: bool,
    /// Entries between two snapshots.
    pub snapshot_every: u64,
    /// What to do when it cannot go on; `dc_quorum::abort()` outside of tests.
    pub on_death: OnDeath,
}

/// What the engine's own tasks share.
pub(crate) struct Inner<M: Machine> {
    pub site: SiteId,
    pub id: u64,
    pub raft: Raft<Types<M>>,
    pub peers: Peers,
    pub disk: Disk,
    pub replica: ReplicaStore<M>,
    pub facts: StoreFacts,
    pub stores: Mutex<BTreeMap<String, String>>,
    pub standing: watch::Sender<Standing>,
    pub leadership: watch::Sender<Leadership>,
    pub profile: Profile,
    pub seq: AtomicU64,
    pub elections: AtomicU64,
    heard: Mutex<Option<Instant>>,
    commits: Mutex<VecDeque<Duration>>,
    commits_total: AtomicU64,
}

impl<M: Machine> Inner<M> {
    /// A leader's message was taken.
    pub fn heard(&self) {
        *self.heard.lock() = Some(Instant::now());
    }

    /// How long ago one was.
    pub fn heard_ago(&self) -> Option<Duration> {
        self.heard.lock().map(|at| at.elapsed())
    }

    pub fn record_commit(&self, took: Duration) {
        self.commits_total.fetch_add(1, Ordering::Relaxed);
        let mut commits = self.commits.lock();
        if commits.len() == COMMITS_KEPT {
            commits.pop_front();
        }
        commits.push_back(took);
    }

    /// The leader as the engine last knew it; it may be dead.
    pub fn leader_id(&self) -> Option<u64> {
        self.raft.server_metrics().borrow().current_leader
    }

    pub fn site_of(&self, id: u64) -> Option<&SiteId> {
        if id == self.id { Some(&self.site) } else { self.peers.site(id) }
    }

    pub fn id_of(&self, word: &str) -> Option<u64> {
        SiteId::new(word).ok().map(|site| voter_id(&site)).filter(|id| self.site_of(*id).is_some())
    }

    pub fn leader_word(&self) -> String {
        self.leader_id().and_then(|id| self.site_of(id)).map(ToString::to_string).unwrap_or_default()
    }
}

/// One voter.
pub struct Engine<M: Machine> {
    inner: Arc<Inner<M>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl<M: Machine> Engine<M> {
    /// Opens the store and starts the voter. It takes part once its service is mounted at
    /// the other voters' address for it and, on its first day, all of them were reached.
    ///
    /// Errors: DC-0106 and DC-0115 about `peers`, DC-0111 about the store.
    pub async fn open(options: Options) -> Result<Self, Fail> {
        let Options { site, peers, data_dir, profile, tls, may_lead, snapshot_every, on_death } = options;
        let sites: Vec<SiteId> = peers.keys().cloned().collect();
        check_peers(&site, &sites, &tls)?;
        let path = data_dir.join("quorum.redb");
        let disk = Disk::open(&path, CALL_LIMIT, on_death)?;
        let unreadable = |why: String| {
            let what = format!("the store {} cannot be used", path.display());
            Fail::new(Code::from_text("DC-0111"), Exit::Unexpected, what, why)
        };
        let facts = introduce(&disk, &site).await.map_err(|e| unreadable(e.to_string()))?;
        let facts =
            facts.map_err(|owner| unreadable(format!("it belongs to site {owner}, this is {site}")))?;
        let peers = Peers::new(&site, &facts.store, &peers, &tls, profile.heartbeat)?;
        let replica = ReplicaStore::open(disk.clone()).await.map_err(|e| unreadable(e.to_string()))?;
        let config = config(&profile, snapshot_every).map_err(|e| unreadable(e.to_string()))?;
        let id = voter_id(&site);
        let log = LogStore::new(disk.clone());
        let raft = Raft::new(id, Arc::new(config), peers.clone(), log, replica.clone());
        let raft = raft.await.map_err(|e| unreadable(e.to_string()))?;
        check_members(&raft, &sites).await?;
        let standing =
            if facts.admitted { Standing::Member } else { Standing::Founding { waiting_for: Vec::new() } };
        let inner = Arc::new(Inner {
            site,
            id,
            raft,
            peers,
            disk,
            replica,
            stores: Mutex::new(facts.others.clone()),
            facts,
            standing: watch::channel(standing).0,
            leadership: watch::channel(Leadership::default()).0,
            profile,
            seq: AtomicU64::new(0),
            elections: AtomicU64::new(0),
            heard: Mutex::new(None),
            commits: Mutex::new(VecDeque::new()),
            commits_total: AtomicU64::new(0),
        });
        let tasks = vec![
            tokio::spawn(monitor::watch(inner.clone(), may_lead)),
            tokio::spawn(join(inner.clone(), sites)),
        ];
        Ok(Self { inner, tasks: Mutex::new(tasks) })
    }

    /// The service that the agent mounts for the other voters.
    pub fn service(&self) -> QuorumServer<QuorumService<M>> {
        QuorumService::server(self.inner.clone())
    }

    /// Name of this voter's data directory, as the other voters have it on record.
    pub fn store(&self) -> String {
        self.inner.facts.store.clone()
    }
}

fn check_peers(site: &SiteId, sites: &[SiteId], tls: &Tls) -> Result<(), Fail> {
    let refuse = |why: String| {
        let what = "[peers] cannot be used".to_owned();
        Fail::new(Code::from_text("DC-0115"), Exit::Usage, what, why).next("dc-switch config check")
    };
    if !sites.contains(site) {
        return Err(refuse(format!("{site}, this site, is not among them")));
    }
    let mut ids: Vec<u64> = sites.iter().map(voter_id).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() != sites.len() {
        return Err(refuse("two of their names give one voter number; rename one".into()));
    }
    let identity = tls.identity();
    if identity.name() != site.as_str() {
        return Err(refuse(format!("the certificate is {identity}, this is site {site}")));
    }
    Ok(())
}

/// Refuses a configuration that names other voters than the log does.
async fn check_members<M: Machine>(raft: &Raft<Types<M>>, sites: &[SiteId]) -> Result<(), Fail> {
    let members = raft.with_raft_state(|state| {
        let effective = state.membership_state.effective();
        effective.nodes().map(|(_, voter)| voter.site.clone()).collect::<std::collections::BTreeSet<_>>()
    });
    let members = members.await.unwrap_or_default();
    let given = sites.iter().map(ToString::to_string).collect();
    if members.is_empty() || members == given {
        return Ok(());
    }
    let why = format!("the quorum has {members:?}, the file names {given:?}");
    let what = "[peers] names other voters than the quorum has".to_owned();
    Err(Fail::new(Code::from_text("DC-0115"), Exit::Usage, what, why).next("dc-switch config check"))
}

fn config(profile: &Profile, snapshot_every: u64) -> Result<Config, openraft::ConfigError> {
    Config {
        cluster_name: "dc-switch".into(),
        heartbeat_interval: millis(profile.heartbeat),
        election_timeout_min: millis(profile.election_min),
        election_timeout_max: millis(profile.election_max),
        install_snapshot_timeout: 10_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_every),
        max_in_snapshot_log_to_keep: snapshot_every / 2,
        purge_batch_size: 256,
        // a full round of the largest entries stays below the largest message
        max_payload_entries: 64,
        ..Config::default()
    }
    .validate()
}

#[async_trait]
impl<M: Machine> LogEngine<M> for Engine<M> {
    async fn propose(
        &self,
        commands: Vec<M::Command>,
        until: Instant,
    ) -> Result<Vec<(Token, M::Answer)>, ProposeError> {
        self.inner.propose(commands, until).await
    }

    async fn barrier(&self, until: Instant) -> Result<u64, BarrierError> {
        self.inner.barrier(until).await
    }

    fn state(&self) -> Arc<M> {
        self.inner.replica.watch().borrow().state.clone()
    }

    fn applied(&self) -> watch::Receiver<Applied<M>> {
        self.inner.replica.watch()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.subscribe()
    }

    fn standing(&self) -> watch::Receiver<Standing> {
        self.inner.standing.subscribe()
    }

    fn metrics(&self) -> EngineMetrics {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow();
        EngineMetrics {
            commits: self.inner.commits.lock().iter().copied().collect(),
            commits_total: self.inner.commits_total.load(Ordering::Relaxed),
            quorum_ack_age: metrics.millis_since_quorum_ack.map(Duration::from_millis),
            elections_total: self.inner.elections.load(Ordering::Relaxed),
            term: metrics.current_term,
            applied: self.inner.replica.watch().borrow().index,
            last_log: metrics.last_log_index.unwrap_or(0),
            snapshot: metrics.snapshot.map_or(0, |id| id.index),
        }
    }

    async fn shutdown(&self) {
        self.inner.standing.send_replace(Standing::Stopped);
        if self.inner.raft.shutdown().await.is_err() {
            tracing::warn!("the quorum engine had died before it was shut down");
        }
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
        self.inner.disk.close().await;
        self.inner.leadership.send_replace(Leadership::default());
    }
}
