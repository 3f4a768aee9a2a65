//! Voters, their certificates and the cables between them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use dc_core::ids::{SiteId, Token};
use dc_core::lease::Profile;
use dc_quorum::{Engine, LogEngine, Machine, Options, Standing};
use dc_wire::identity::Role;
use dc_wire::link::{channel, serve};
use dc_wire::pb;
use dc_wire::pb::quorum_client::QuorumClient;
use dc_wire::pki::{self, Order};
use dc_wire::tls::{Expected, Tls, TlsFiles};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};
use tonic::service::Routes;
use tonic::transport::Channel;

/// Counts how often each key was put.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub rows: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Put(pub String);

impl Machine for Table {
    type Command = Put;
    type Answer = u64;

    fn apply(&mut self, _at: Token, put: &Put) -> u64 {
        let count = self.rows.entry(put.0.clone()).or_default();
        *count += 1;
        *count
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

type Cuts = Arc<watch::Sender<BTreeSet<(String, String)>>>;

struct Running {
    engine: Arc<Engine<Table>>,
    stop: oneshot::Sender<()>,
    answering: tokio::task::JoinHandle<()>,
}

pub struct World {
    folder: TempDir,
    pub profile: Profile,
    snapshot_every: u64,
    sites: Vec<String>,
    tls: BTreeMap<String, Arc<Tls>>,
    listens: BTreeMap<String, SocketAddr>,
    /// Where `from` reaches `to`.
    cables: BTreeMap<(String, String), SocketAddr>,
    cuts: Cuts,
    running: BTreeMap<String, Running>,
}

/// An address that no other voter of this machine has, and that no connection goes out from: a voter that is away
/// finds its port free when it comes back.
fn own_ip() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 | high >> 1, low, NEXT.fetch_add(1, Ordering::Relaxed))
}

impl World {
    pub async fn new(sites: &[&str], snapshot_every: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = pki::init(&folder.path().join("ca"), "test", 2).unwrap();
        let mut tls = BTreeMap::new();
        let mut listens = BTreeMap::new();
        for site in sites {
            let order = Order {
                role: Role::Agent,
                name: (*site).into(),
                dns: vec![],
                ips: vec![],
                days: 1,
                replace: false,
            };
            let pair = pki::issue(&ca, folder.path(), &order).unwrap();
            let files = TlsFiles { ca: ca.cert.clone(), cert: pair.cert, key: pair.key };
            tls.insert((*site).to_owned(), Arc::new(Tls::load(files).unwrap()));
            let listens_at = TcpListener::bind((own_ip(), 0)).await.unwrap().local_addr().unwrap();
            listens.insert((*site).to_owned(), listens_at);
        }
        let cuts: Cuts = Arc::new(watch::channel(BTreeSet::new()).0);
        let mut cables = BTreeMap::new();
        for from in sites {
            for to in sites.iter().filter(|to| *to != from) {
                let key = ((*from).to_owned(), (*to).to_owned());
                let address = lay_cable(key.clone(), listens[*to], cuts.clone()).await;
                cables.insert(key, address);
            }
        }
        let sites = sites.iter().map(ToString::to_string).collect();
        let profile = Profile::WAN;
        Self { folder, profile, snapshot_every, sites, tls, listens, cables, cuts, running: BTreeMap::new() }
    }

    /// Cuts both ways between two sites; silent, as a lost line is.
    pub fn cut(&self, a: &str, b: &str) {
        self.cuts.send_modify(|cuts| {
            cuts.insert((a.into(), b.into()));
            cuts.insert((b.into(), a.into()));
        });
    }

    pub fn heal(&self) {
        self.cuts.send_modify(BTreeSet::clear);
    }

    pub async fn up_all(&mut self) {
        for site in self.sites.clone() {
            self.start(&site).await;
        }
        for site in self.sites.clone() {
            self.joined(&site).await;
        }
    }

    pub async fn up(&mut self, site: &str) {
        self.start(site).await;
        self.joined(site).await;
    }

    async fn joined(&self, site: &str) {
        let mut standing = self.engine(site).standing();
        let member = standing.wait_for(|now| *now == Standing::Member);
        timeout(Duration::from_secs(20), member).await.unwrap().unwrap();
        // a voter that is behind cannot win an election; that is another test's business
        self.engine(site).barrier(Instant::now() + Duration::from_secs(20)).await.unwrap();
    }

    pub async fn start(&mut self, site: &str) {
        let me = SiteId::new(site).unwrap();
        let peers = self.sites.iter().map(|to| {
            let key = (site.to_owned(), to.clone());
            let address = self.cables.get(&key).unwrap_or(&self.listens[to]);
            (SiteId::new(to).unwrap(), address.to_string())
        });
        let options = Options {
            site: me,
            peers: peers.collect(),
            data_dir: self.folder.path().join(site),
            profile: self.profile,
            tls: self.tls[site].clone(),
            may_lead: site != "oslo",
            snapshot_every: self.snapshot_every,
            on_death: Arc::new(|why| panic!("{why}")),
        };
        let engine = Arc::new(Engine::<Table>::open(options).await.unwrap());
        let listener = TcpListener::bind(self.listens[site]).await.unwrap();
        let routes = Routes::new(engine.service());
        let (stop, stopped) = oneshot::channel();
        let server = serve(listener, self.tls[site].clone(), routes, std::future::pending());
        let answering = tokio::spawn(async move {
            tokio::select! {
                ended = server => ended.unwrap(),
                _ = stopped => {}
            }
        });
        self.running.insert(site.to_owned(), Running { engine, stop, answering });
    }

    /// Ends a voter at once, answering nothing any more.
    pub async fn down(&mut self, site: &str) {
        let running = self.running.remove(site).unwrap();
        running.stop.send(()).ok();
        running.answering.await.unwrap();
        running.engine.shutdown().await;
    }

    pub fn lose_disk(&self, site: &str) {
        std::fs::remove_dir_all(self.folder.path().join(site)).unwrap();
    }

    pub fn engine(&self, site: &str) -> Arc<Engine<Table>> {
        self.running[site].engine.clone()
    }

    pub async fn put(&self, site: &str, key: &str) {
        self.put_within(site, key, Duration::from_secs(10)).await;
    }

    pub async fn put_within(&self, site: &str, key: &str, limit: Duration) {
        let answer = self.engine(site).propose(vec![Put(key.into())], Instant::now() + limit).await;
        assert!(answer.is_ok(), "{site} could not put {key}: {answer:?}");
    }

    pub async fn states_after_barrier(&self) -> Vec<Table> {
        let mut states = Vec::new();
        for running in self.running.values() {
            running.engine.barrier(soon()).await.unwrap();
            states.push((*running.engine.state()).clone());
        }
        states
    }

    /// The site that leads by its own and a majority's word.
    pub async fn leader(&self) -> String {
        let look = async {
            loop {
                for (site, running) in &self.running {
                    let now = running.engine.leadership().borrow().clone();
                    if now.me && now.quorum_ok {
                        return site.clone();
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(20), look).await.unwrap()
    }

    pub fn client(&self, from: &str, to: &str) -> QuorumClient<Channel> {
        let expected = Expected::Agent(SiteId::new(to).unwrap());
        let limit = Duration::from_secs(2);
        let dialled = channel(self.tls[from].clone(), &self.listens[to].to_string(), expected, limit);
        QuorumClient::new(dialled.unwrap())
    }

    pub fn route(&self, from: &str, to: &str) -> pb::Route {
        let store = self.engine(from).store();
        pb::Route { from: from.into(), to: to.into(), via: String::new(), store }
    }
}

/// A cable carries bytes until it is cut; then what is on it is lost and no new call gets through.
async fn lay_cable(key: (String, String), to: SocketAddr, cuts: Cuts) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let held = Arc::new(Mutex::new(Vec::new()));
        loop {
            let Ok((near, _)) = listener.accept().await else { return };
            let (key, mut cuts, held) = (key.clone(), cuts.subscribe(), held.clone());
            tokio::spawn(async move {
                if cuts.borrow_and_update().contains(&key) {
                    held.lock().push(near); // neither refused nor answered
                    return;
                }
                let Ok(far) = TcpStream::connect(to).await else { return };
                near.set_nodelay(true).ok();
                far.set_nodelay(true).ok();
                let (mut near, mut far) = (near, far);
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    _ = cuts.wait_for(|cuts| cuts.contains(&key)) => held.lock().push(near),
                }
            });
        }
    });
    address
}
