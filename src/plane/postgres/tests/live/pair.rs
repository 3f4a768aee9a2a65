//! The pair under test: its drivers, the acts of a run, and clients that never stop trying.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dc_core::act::{Act, ActName, Direction, Evidence, Finding, Outcome, PostgresAct};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, RunId, SiteId, Token};
use dc_core::position::Timelines;
use dc_core::spec::GroupSpec;
use dc_plane::{Deadline, Plane, PlaneError, suite};
use dc_plane_postgres::Config;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

/// An agent's file, of which the driver reads one section.
#[derive(serde::Deserialize)]
struct AgentFile {
    data_dir: PathBuf,
    postgres: Config,
}

/// Both sites of the world under test.
pub struct Pair {
    root: PathBuf,
    spec: GroupSpec,
}

/// Where the world is.
pub fn root() -> Result<PathBuf> {
    std::env::var_os("DC_LAB_WORLD").map(PathBuf::from).context(
        "DC_LAB_WORLD is not set; make a world with `dc-lab parts up --planes postgres --name NAME --delay 0`",
    )
}

impl Pair {
    pub fn open() -> Result<Self> {
        let root = root()?;
        let spec = toml::from_str(&std::fs::read_to_string(root.join("group.toml"))?)?;
        Ok(Self { root, spec })
    }

    fn file(&self, site: &SiteId) -> Result<AgentFile> {
        let path = self.root.join(site.as_str()).join("agent.toml");
        let text = std::fs::read_to_string(&path)?;
        toml::from_str(&text).with_context(|| format!("read {}", path.display()))
    }

    /// The settings of a site's driver.
    pub fn config(&self, site: &SiteId) -> Result<Config> {
        Ok(self.file(site)?.postgres)
    }

    /// A driver that remembers nothing but what is on disk.
    pub fn driver(&self, site: &SiteId) -> Result<Arc<dyn Plane>> {
        self.driver_with(site, self.config(site)?)
    }

    /// A driver with other settings.
    pub fn driver_with(&self, site: &SiteId, config: Config) -> Result<Arc<dyn Plane>> {
        let data_dir = self.file(site)?.data_dir;
        Ok(dc_plane_postgres::build(config, &self.spec, site.clone(), data_dir)?)
    }

    pub fn sites(&self) -> (SiteId, SiteId) {
        (self.spec.sites[0].clone(), self.spec.sites[1].clone())
    }

    fn secret(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.root.join("secrets").join(name))?.trim().to_owned())
    }

    /// A session over TCP, as a client has it.
    pub async fn connect(&self, site: &SiteId, role: &str, database: &str) -> Result<Client> {
        let config = self.config(site)?;
        let to = config.sites.get(site).context("no address")?;
        let mut settings = tokio_postgres::Config::new();
        settings.host(&to.host).port(to.port).user(role).dbname(database);
        settings.password(self.secret(&format!("postgres-{role}"))?).connect_timeout(Duration::from_secs(2));
        let (client, connection) = settings.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A session of the superuser at the unix socket.
    pub async fn superuser(&self, site: &SiteId) -> Result<Client> {
        let config = self.config(site)?;
        let mut settings = tokio_postgres::Config::new();
        settings.host_path(&config.socket_dir).port(config.sites.get(site).context("no address")?.port);
        settings.user("postgres").dbname("postgres").password(self.secret("postgres-superuser")?);
        let (client, connection) = settings.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Lifts the fence that a failed test left, as the undo of its own run.
    pub async fn heal(&self) -> Result<()> {
        let (a, b) = self.sites();
        for (site, other) in [(&a, &b), (&b, &a)] {
            if let Ok(admin) = self.superuser(site).await {
                admin.batch_execute("alter system set synchronous_standby_names = ''").await?;
                let upstream: String = admin.query_one("show primary_conninfo", &[]).await?.get(0);
                let real = self.config(site)?.sites.get(other).context("no address")?.port;
                if upstream.contains("port='1'") {
                    let upstream =
                        upstream.replace("port='1'", &format!("port='{real}'")).replace('\'', "''");
                    admin.batch_execute(&format!("alter system set primary_conninfo = '{upstream}'")).await?;
                }
                admin.batch_execute("select pg_reload_conf()").await?;
            }
            let path = self.file(site)?.data_dir.join("postgres/marks.json");
            let Ok(text) = std::fs::read_to_string(path) else { continue };
            let marks: serde_json::Value = serde_json::from_str(&text)?;
            if marks["fence"].is_null() {
                continue;
            }
            let run: RunId = serde_json::from_value(marks["fence"]["run"].clone())?;
            let epoch: Epoch = serde_json::from_value(marks["fence"]["epoch"].clone())?;
            println!("lifting a left fence of {run} at {site}");
            let act = Act {
                name: ActName::Postgres(PostgresAct::FenceClients),
                site: site.clone(),
                group: self.spec.name.clone(),
                run: Some(run.clone()),
                source: site.clone(),
                target: other.clone(),
                epoch,
                direction: Direction::Forward,
                given: Vec::new(),
            };
            let by = Authority::step(run, epoch, Token(u64::MAX));
            self.driver(site)?.undo(&act, &by, Deadline::within(LIMIT)).await?;
            let act = Act { name: ActName::Postgres(PostgresAct::PreSync), ..act };
            self.driver(site)?.undo(&act, &by, Deadline::within(LIMIT)).await?;
        }
        Ok(())
    }

    /// The site whose instance is a primary, and the other.
    pub async fn direction(&self) -> Result<(SiteId, SiteId)> {
        let (a, b) = self.sites();
        for (one, other) in [(&a, &b), (&b, &a)] {
            if let Ok(client) = self.superuser(one).await {
                let recovering: bool = client.query_one("select pg_is_in_recovery()", &[]).await?.get(0);
                if !recovering {
                    return Ok((one.clone(), other.clone()));
                }
            }
        }
        bail!("no site has a primary whose door is open")
    }

    /// The highest epoch that the database carries.
    pub async fn epoch(&self, holder: &SiteId) -> Result<u64> {
        let client = self.superuser(holder).await?;
        let there: bool =
            client.query_one("select to_regclass('dcswitch.epoch') is not null", &[]).await?.get(0);
        if !there {
            return Ok(1);
        }
        let row = client.query_one("select coalesce(max(counter), 1) from dcswitch.epoch", &[]).await?;
        Ok(row.get::<_, i64>(0).cast_unsigned())
    }
}

/// One run over the pair: what the executor would hold of it.
pub struct Run {
    pub pair: Pair,
    pub source: SiteId,
    pub target: SiteId,
    pub direction: Direction,
    pub given: Vec<Outcome>,
    id: RunId,
    epoch: Epoch,
    token: Mutex<u64>,
    /// Each act keeps what every plane promises: its deadline, and to be performed twice.
    pub twice: bool,
    drivers: Option<(Arc<dyn Plane>, Arc<dyn Plane>)>,
}

/// Time that an act may take in these tests.
const LIMIT: Duration = Duration::from_mins(1);

impl Run {
    /// A run from today's holder to the other site.
    pub async fn new(pair: Pair) -> Result<Self> {
        let (source, target) = pair.direction().await?;
        let counter = pair.epoch(&source).await? + 1;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos();
        let drivers = Some((pair.driver(&source)?, pair.driver(&target)?));
        Ok(Self {
            pair,
            source,
            target,
            direction: Direction::Forward,
            given: Vec::new(),
            id: RunId(format!("LIVE{now}")),
            epoch: Epoch { incarnation: 1, counter },
            token: Mutex::new(u64::try_from(now / 1_000_000)?),
            twice: false,
            drivers,
        })
    }

    pub fn act(&self, name: PostgresAct, site: &SiteId) -> Act {
        Act {
            name: ActName::Postgres(name),
            site: site.clone(),
            group: self.pair.spec.name.clone(),
            run: Some(self.id.clone()),
            source: self.source.clone(),
            target: self.target.clone(),
            epoch: self.epoch,
            direction: self.direction,
            given: self.given.clone(),
        }
    }

    /// Upkeep has no run and names the holder as source.
    pub fn upkeep(&self, name: PostgresAct, site: &SiteId, holder: &SiteId) -> Act {
        let standby = if *holder == self.source { &self.target } else { &self.source };
        Act { run: None, source: holder.clone(), target: standby.clone(), ..self.act(name, site) }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The run turns back before it opened: the quorum raises the epoch.
    pub fn turn_back(&mut self) {
        self.direction = Direction::Return;
        self.epoch = self.epoch.next();
    }

    pub fn authority(&self) -> Authority {
        let mut token = self.token.lock();
        *token += 1;
        Authority::step(self.id.clone(), self.epoch, Token(*token))
    }

    pub fn driver(&self, site: &SiteId) -> Result<Arc<dyn Plane>> {
        match &self.drivers {
            Some((source, _)) if *site == self.source => Ok(Arc::clone(source)),
            Some((_, target)) => Ok(Arc::clone(target)),
            None => self.pair.driver(site),
        }
    }

    /// From now on each act has a fresh driver, as after a crash.
    pub fn forget_drivers(&mut self) {
        self.drivers = None;
    }

    pub async fn perform(&mut self, name: PostgresAct, at: &SiteId) -> Result<Evidence, PlaneError> {
        let driver = self.driver(at).map_err(|e| failed(&e))?;
        let (act, by) = (self.act(name, at), self.authority());
        let begun = Instant::now();
        let evidence = if self.twice {
            let stays = matches!(name, PostgresAct::FenceClients | PostgresAct::PreSync | PostgresAct::Stop)
                || matches!(name, PostgresAct::Promote | PostgresAct::Open | PostgresAct::Follow);
            let seen = if stays {
                suite::keeps_its_deadline(driver.as_ref(), &act, &by).await.map_err(|e| failed(&e.into()))?;
                suite::stands(driver.as_ref(), &act, &by, LIMIT).await
            } else {
                suite::repeatable(driver.as_ref(), &act, &by, LIMIT).await
            };
            seen.map_err(|e| failed(&e.into()))?
        } else {
            driver.perform(&act, &by, Deadline::within(LIMIT)).await?
        };
        println!("  {:8.1} ms  {at:5} {}: {}", ms(begun.elapsed()), act.name, evidence.seen);
        self.given.extend(evidence.outcomes.iter().filter(|o| !matches!(o, Outcome::Findings(_))).cloned());
        Ok(evidence)
    }

    pub async fn undo(&self, name: PostgresAct, at: &SiteId) -> Result<Evidence> {
        let act = self.act(name, at);
        let begun = Instant::now();
        let evidence = self.driver(at)?.undo(&act, &self.authority(), Deadline::within(LIMIT)).await?;
        println!("  {:8.1} ms  {at:5} undo {}: {}", ms(begun.elapsed()), act.name, evidence.seen);
        Ok(evidence)
    }

    /// Preflight and what comes before the fence.
    pub async fn prepare(&mut self) -> Result<()> {
        let (source, target) = (self.source.clone(), self.target.clone());
        let mut highest = 0;
        for site in [&source, &target] {
            let evidence = self.perform(PostgresAct::Preflight, site).await?;
            let found: Vec<&Finding> = evidence.blocking().collect();
            ensure!(found.is_empty(), "preflight blocks: {found:#?}");
            highest = evidence
                .outcomes
                .iter()
                .fold(highest, |h, o| if let Outcome::Timeline(t) = o { h.max(*t) } else { h });
        }
        self.given.push(Outcome::Timelines(Timelines { target: highest + 2, back: highest + 3 }));
        for site in [&source, &target] {
            self.perform(PostgresAct::Checkpoint, site).await?;
        }
        for site in [&source, &target] {
            let evidence = self.perform(PostgresAct::Recheck, site).await?;
            let found: Vec<&Finding> = evidence.blocking().collect();
            ensure!(found.is_empty(), "recheck blocks: {found:#?}");
        }
        Ok(())
    }

    /// From the first fence to the proved cut.
    pub async fn fence(&mut self) -> Result<()> {
        for (name, at) in self.fencing() {
            self.perform(name, &at).await?;
        }
        let target = self.target.clone();
        self.perform(PostgresAct::Replayed, &target).await?;
        Ok(())
    }

    /// The fencing acts in order, each with its site.
    pub fn fencing(&self) -> Vec<(PostgresAct, SiteId)> {
        vec![
            (PostgresAct::FenceClients, self.target.clone()),
            (PostgresAct::PreSync, self.source.clone()),
            (PostgresAct::FenceClients, self.source.clone()),
            (PostgresAct::Stop, self.source.clone()),
        ]
    }

    /// What comes after the takeover, either way.
    pub async fn finish(&mut self) -> Result<()> {
        let (holder, other) = match self.direction {
            Direction::Forward => (self.target.clone(), self.source.clone()),
            Direction::Return => (self.source.clone(), self.target.clone()),
        };
        self.perform(PostgresAct::Promote, &holder).await?;
        self.perform(PostgresAct::Open, &holder).await?;
        self.perform(PostgresAct::Follow, &other).await?;
        self.perform(PostgresAct::Verify, &holder).await?;
        Ok(())
    }
}

fn failed(why: &anyhow::Error) -> PlaneError {
    PlaneError::Failed { what: "perform".into(), why: why.to_string() }
}

pub fn ms(of: Duration) -> f64 {
    of.as_secs_f64() * 1e3
}

/// What one client was told.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    pub at: Instant,
    pub writer: i32,
    pub seq: i64,
}

/// Clients at both sites that try to commit all the time, each at its own fixed site.
pub struct Load {
    acks: Vec<(SiteId, Arc<Mutex<Vec<Ack>>>)>,
    over: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` per site and waits for the holder's first acknowledgements.
    pub async fn start(holder: &SiteId, clients: i32) -> Result<Self> {
        let pair = Pair::open()?;
        let client = pair.connect(holder, "app", "app").await?;
        client
            .batch_execute(
                "create table if not exists live_rows (writer int, seq bigint, primary key (writer, seq))",
            )
            .await?;
        let base: i64 = client.query_one("select coalesce(max(seq), 0) from live_rows", &[]).await?.get(0);
        let over = Arc::new(AtomicBool::new(false));
        let mut load = Self { acks: Vec::new(), over: Arc::clone(&over), tasks: Vec::new() };
        let (a, b) = pair.sites();
        for (n, site) in [(0, a), (1, b)] {
            let acks = Arc::new(Mutex::new(Vec::new()));
            load.acks.push((site.clone(), Arc::clone(&acks)));
            for client in 0..clients {
                let (site, acks, over) = (site.clone(), Arc::clone(&acks), Arc::clone(&over));
                load.tasks.push(tokio::spawn(async move {
                    let Ok(pair) = Pair::open() else { return };
                    write_on(&pair, &site, n * 100 + client, base, &acks, &over).await;
                }));
            }
        }
        load.more_acks(holder, 50).await?;
        Ok(load)
    }

    /// Waits until a site acknowledged that many more.
    pub async fn more_acks(&self, site: &SiteId, count: usize) -> Result<()> {
        let acks = self.of(site)?;
        let from = acks.lock().len();
        let end = Instant::now() + Duration::from_secs(20);
        while acks.lock().len() < from + count {
            ensure!(Instant::now() < end, "{site} acknowledges nothing");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    fn of(&self, site: &SiteId) -> Result<Arc<Mutex<Vec<Ack>>>> {
        let found = self.acks.iter().find(|(s, _)| s == site);
        Ok(Arc::clone(&found.context("no such site")?.1))
    }

    /// Last acknowledgement at `from` before the first one at `to` after `since`; none may follow it.
    pub fn outage(&self, from: &SiteId, to: &SiteId, since: Instant) -> Result<Duration> {
        let first = self.of(to)?.lock().iter().map(|a| a.at).filter(|at| *at > since).min();
        let first = first.context("the new site acknowledged nothing")?;
        let last =
            self.of(from)?.lock().iter().map(|a| a.at).max().context("the old site acknowledged nothing")?;
        ensure!(last < first, "the old site acknowledged {:?} after the new one", last - first);
        Ok(first - last)
    }

    /// Ends the clients and checks at the holder, and at the standby, that each acknowledged row is there.
    pub async fn end(mut self, holder: &SiteId) -> Result<usize> {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            task.await?;
        }
        let told: BTreeSet<(i32, i64)> = self
            .acks
            .iter()
            .flat_map(|(_, a)| a.lock().iter().map(|a| (a.writer, a.seq)).collect::<Vec<_>>())
            .collect();
        let client = Pair::open()?.superuser_of("app", holder).await?;
        let rows = client.query("select writer, seq from live_rows", &[]).await?;
        let there: BTreeSet<(i32, i64)> = rows.iter().map(|r| (r.get(0), r.get(1))).collect();
        let lost: Vec<_> = told.difference(&there).collect();
        ensure!(lost.is_empty(), "{} of {} acknowledged rows are lost: {lost:?}", lost.len(), told.len());
        Ok(told.len())
    }
}

impl Pair {
    async fn superuser_of(&self, database: &str, site: &SiteId) -> Result<Client> {
        self.connect(site, "dclab", database).await
    }
}

async fn write_on(
    pair: &Pair,
    site: &SiteId,
    writer: i32,
    base: i64,
    acks: &Mutex<Vec<Ack>>,
    over: &AtomicBool,
) {
    let mut seq = base;
    let mut session: Option<Client> = None;
    while !over.load(Ordering::Relaxed) {
        let Some(client) = session.take() else {
            let opened = tokio::time::timeout(Duration::from_secs(2), pair.connect(site, "app", "app")).await;
            session = opened.ok().and_then(Result::ok);
            if session.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            continue;
        };
        seq += 1;
        let row: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&writer, &seq];
        let insert = client.execute("insert into live_rows values ($1, $2)", &row);
        match tokio::time::timeout(Duration::from_secs(20), insert).await {
            Ok(Ok(_)) => {
                acks.lock().push(Ack { at: Instant::now(), writer, seq });
                session = Some(client);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(Err(e)) if !client.is_closed() && e.as_db_error().is_some() => {
                session = Some(client); // a standby refuses and stays
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            _ => {}
        }
    }
}

/// The owner of the world, when the tests run as root, which no server of PostgreSQL does.
pub fn owner(root: &Path) -> Result<Option<(u32, u32)>> {
    use std::os::unix::fs::MetadataExt;
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let meta = std::fs::metadata(root)?;
    ensure!(meta.uid() != 0, "{} belongs to root", root.display());
    Ok(Some((meta.uid(), meta.gid())))
}
