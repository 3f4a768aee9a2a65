//! A world: three sites on loopback addresses, their folders, secrets, links and processes.
//!
//! Everything a lab writes lies under one root folder, every process it starts carries that folder in its
//! environment and in a record of its own (pid and start time), and nothing else is ever ended. A world knows no
//! plane: what a plane needs is in `parts`.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::process;

/// Ports at every site, the same for each; addresses differ.
pub mod port {
    /// Agents, operators, Raft.
    pub const AGENT_GRPC: u16 = 7400;
    /// Health of the agent.
    pub const AGENT_HTTP: u16 = 7401;
    /// `PostgreSQL`.
    pub const POSTGRES: u16 = 25432;
    /// Kafka, clients of the site.
    pub const KAFKA: u16 = 19092;
    /// Kafka, `KRaft` controller.
    pub const KAFKA_CONTROLLER: u16 = 19093;
    /// Kafka, where the mirror of the other site reads.
    pub const KAFKA_MIRROR: u16 = 19094;
    /// Kafka, a second broker's clients (tests of the plane only).
    pub const KAFKA_SECOND: u16 = 19192;
    /// Kafka, a second broker's mirror listener (tests of the plane only).
    pub const KAFKA_SECOND_MIRROR: u16 = 19194;
    /// Connect REST.
    pub const CONNECT: u16 = 18083;
    /// S3.
    pub const S3: u16 = 17070;
    /// Administration of S3 users.
    pub const S3_ADMIN: u16 = 17071;
    /// Airflow API server.
    pub const AIRFLOW_API: u16 = 18080;
    /// Airflow log server.
    pub const AIRFLOW_LOGS: u16 = 18793;
    /// Every port that a site may use.
    pub const ALL: [u16; 13] = [
        AGENT_GRPC,
        AGENT_HTTP,
        POSTGRES,
        KAFKA,
        KAFKA_CONTROLLER,
        KAFKA_MIRROR,
        KAFKA_SECOND,
        KAFKA_SECOND_MIRROR,
        CONNECT,
        S3,
        S3_ADMIN,
        AIRFLOW_API,
        AIRFLOW_LOGS,
    ];
    /// Ports that one site asks of another: each has a delaying link per directed pair.
    pub const LINKED: [u16; 6] = [POSTGRES, KAFKA, KAFKA_MIRROR, KAFKA_SECOND_MIRROR, S3, AIRFLOW_API];
}

/// One datacenter of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Name as in the agent's file.
    pub name: &'static str,
    /// 1, 2, 3: the third octet of its address.
    pub index: u8,
}

/// The founding holder.
pub const ROME: Site = Site { name: "rome", index: 1 };
/// The founding standby.
pub const FRA: Site = Site { name: "fra", index: 2 };
/// The witness: votes, holds no data.
pub const OSLO: Site = Site { name: "oslo", index: 3 };
/// All three.
pub const SITES: [Site; 3] = [ROME, FRA, OSLO];
/// The two that hold data.
pub const DATA_SITES: [Site; 2] = [ROME, FRA];

impl Site {
    /// The other data site.
    pub fn other(self) -> Site {
        if self == ROME { FRA } else { ROME }
    }

    /// Finds a site by name.
    pub fn named(name: &str) -> Option<Site> {
        SITES.into_iter().find(|s| s.name == name)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A replicated system of the group.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Plane {
    /// `PostgreSQL`.
    Postgres,
    /// Kafka with `MirrorMaker` 2.
    Kafka,
    /// Object store: DAG releases and logs.
    S3,
    /// Airflow.
    Airflow,
}

impl Plane {
    /// All four, in the order in which their parts start.
    pub const ALL: [Plane; 4] = [Plane::Postgres, Plane::Kafka, Plane::S3, Plane::Airflow];

    /// Name as in files, arguments and the report.
    pub fn name(self) -> &'static str {
        match self {
            Plane::Postgres => "postgres",
            Plane::Kafka => "kafka",
            Plane::S3 => "s3",
            Plane::Airflow => "airflow",
        }
    }
}

impl fmt::Display for Plane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One lab on this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct World {
    /// Name, unique per user of the machine.
    pub name: String,
    /// Lab number N: addresses are 127.N.site.1.
    pub number: u8,
    /// Everything of this lab lies below.
    pub root: PathBuf,
    /// Installed parts, shared by all labs: pinned, checksummed, never changed by a running lab.
    pub parts_dir: PathBuf,
    /// Delay each way between data sites, for replication. Zero: direct.
    pub delay: Duration,
    /// Planes that this lab has.
    pub planes: BTreeSet<Plane>,
    /// The user and group that every part runs as, when the lab itself runs as root.
    pub owner: Option<(u32, u32)>,
}

/// What outlives one command: `root/world.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    number: u8,
    delay_ms: u64,
    planes: BTreeSet<Plane>,
}

/// The folder of all labs of this user: `/var/lib/dc-lab` for root, else below the user's state folder.
/// `DC_LAB_STATE` names another one.
pub fn base_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("DC_LAB_STATE") {
        let dir = PathBuf::from(dir);
        ensure!(dir.is_absolute(), "DC_LAB_STATE is {}, not an absolute path", dir.display());
        return Ok(dir);
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/dc-lab"));
    }
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    Ok(PathBuf::from(home).join(".local/state/dc-lab"))
}

/// A lab's name is the name of a folder beside those of other labs and of the parts.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(
        !name.is_empty()
            && !name.starts_with(['_', '-'])
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
        "lab name {name:?}: letters, digits, - and _ only, not starting with _ or -"
    );
    Ok(())
}

impl World {
    /// Opens the lab of that name, or makes it: takes a free number and keeps it while the lab lives.
    ///
    /// Repeat: an existing lab gets the planes in addition and keeps its number and delay if it runs.
    /// Errors: no free number; the stored number is held by another lab.
    pub async fn create(name: &str, planes: BTreeSet<Plane>, delay: Duration) -> Result<World> {
        check_name(name)?;
        let base = base_dir()?;
        let owner = owner_of_parts()?;
        let root = base.join(name);
        let parts_dir = base.join("_parts");
        let saved = read_saved(&root)?;
        let mut world = World { name: name.into(), number: 0, root, parts_dir, delay, planes, owner };
        world.mkdir(&world.parts_dir)?;
        for dir in ["", "log", "run", "secrets", "history"] {
            world.mkdir(&world.root.join(dir))?;
        }
        if let Some(saved) = &saved {
            world.number = saved.number;
            world.planes.extend(saved.planes.iter().copied());
            if world.alive("keeper") {
                world.delay = Duration::from_millis(saved.delay_ms);
                world.save()?;
                return Ok(world);
            }
        }
        let lock = crate::keeper::take_number(saved.map(|s| s.number))?;
        world.number = lock.number;
        world.save()?;
        for site in SITES {
            world.mkdir(&world.dir(&site))?;
        }
        crate::keeper::spawn(&world, lock).await.context("start keeper of the lab's number and links")?;
        Ok(world)
    }

    /// Opens the lab of that name as it stands.
    pub fn load(name: &str) -> Result<World> {
        check_name(name)?;
        World::open(&base_dir()?.join(name))
    }

    /// Opens the lab in that folder as it stands.
    pub fn open(root: &Path) -> Result<World> {
        let Some(saved) = read_saved(root)? else { bail!("there is no lab in {}", root.display()) };
        let base = root.parent().context("a lab lies below a folder")?;
        let name = root.file_name().context("a lab has a name")?;
        Ok(World {
            name: name.to_string_lossy().into_owned(),
            number: saved.number,
            root: root.to_path_buf(),
            parts_dir: base.join("_parts"),
            delay: Duration::from_millis(saved.delay_ms),
            planes: saved.planes,
            owner: owner_of_parts()?,
        })
    }

    /// Have its files not been removed?
    pub fn exists(&self) -> bool {
        saved_in(&self.root).exists()
    }

    fn save(&self) -> Result<()> {
        let delay_ms = u64::try_from(self.delay.as_millis())?;
        let saved = Saved { number: self.number, delay_ms, planes: self.planes.clone() };
        self.write(&saved_in(&self.root), &serde_json::to_string_pretty(&saved)?, 0o644)
    }

    /// The address of a site, without port.
    pub fn ip(&self, site: &Site) -> String {
        Ipv4Addr::new(127, self.number, site.index, 1).to_string()
    }

    /// The folder of a site.
    pub fn dir(&self, site: &Site) -> PathBuf {
        self.root.join(site.name)
    }

    /// The address at which `from` reaches a port of `to`: direct, or a link that delays each way.
    pub fn link(&self, from: &Site, to: &Site, port: u16) -> (String, u16) {
        if from == to || self.delay.is_zero() || !port::LINKED.contains(&port) {
            return (self.ip(to), port);
        }
        (self.link_ip(from, to).to_string(), port)
    }

    /// The address on which the link from one site to another listens, with the ports of the target.
    pub fn link_ip(&self, from: &Site, to: &Site) -> Ipv4Addr {
        Ipv4Addr::new(127, self.number, from.index * 10 + to.index, 1)
    }

    /// The path of a secret; [`World::secret`] makes it.
    pub fn secret_path(&self, name: &str) -> PathBuf {
        self.root.join("secrets").join(name)
    }

    /// A random secret of 32 hex digits, made once, readable by the parts' user only.
    pub fn secret(&self, name: &str) -> Result<String> {
        let path = self.secret_path(name);
        if let Ok(text) = fs::read_to_string(&path) {
            return Ok(text.trim().to_string());
        }
        let mut bytes = [0_u8; 16];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        let text = hex::encode(bytes);
        self.write(&path, &text, 0o600)?;
        Ok(text)
    }

    /// Makes a folder and its parents, owned by the parts' user. Repeat: safe.
    pub fn mkdir(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.mkdir(parent)?;
        }
        match fs::DirBuilder::new().mode(0o755).create(path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.with_context(|| format!("make folder {}", path.display()))?,
        }
        self.own(path)
    }

    /// Writes a file owned by the parts' user, replacing it whole. Parent folders are made.
    pub fn write(&self, path: &Path, text: &str, mode: u32) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.mkdir(parent)?;
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let fresh = PathBuf::from(name);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&fresh)
            .with_context(|| format!("write {}", fresh.display()))?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
        self.own(&fresh)?;
        fs::rename(&fresh, path).with_context(|| format!("write {}", path.display()))
    }

    /// Gives one file or folder to the parts' user (nothing to do when not root).
    pub fn own(&self, path: &Path) -> Result<()> {
        if let Some((uid, gid)) = self.owner {
            std::os::unix::fs::chown(path, Some(uid), Some(gid))
                .with_context(|| format!("chown {}", path.display()))?;
        }
        Ok(())
    }

    /// Prepares a command to run as the parts' user, in the lab's root folder, marked as this lab's.
    pub fn prepare(&self, cmd: &mut Command) {
        if let Some((uid, gid)) = self.owner {
            cmd.uid(uid).gid(gid).env("USER", LAB_USER).env("LOGNAME", LAB_USER);
            cmd.env("HOME", self.root.parent().unwrap_or(&self.root));
        }
        cmd.env(process::MARK, &self.root).current_dir(&self.root);
    }

    /// Runs a command to its end as the parts' user, within ten minutes.
    ///
    /// Errors: it cannot start, took too long, or ended with another code than 0 (with the last lines it wrote).
    pub async fn run(&self, cmd: &mut Command) -> Result<std::process::Output> {
        self.prepare(cmd);
        process::run(cmd, Duration::from_mins(10)).await
    }

    /// Starts a long-lived process as the parts' user: own session, log in `root/log/NAME.log`, recorded by pid and
    /// start time. Returns its pid. Repeat: a live process of that name is left alone.
    pub fn spawn(&self, name: &str, cmd: &Command) -> Result<u32> {
        if let Some(live) = process::recorded(&self.record(name)) {
            return Ok(live.pid);
        }
        process::spawn(self, name, cmd, None)
    }

    /// The log of a process.
    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("log").join(format!("{name}.log"))
    }

    /// The record of a process.
    pub fn record(&self, name: &str) -> PathBuf {
        self.root.join("run").join(format!("{name}.json"))
    }

    /// Is the recorded process of that name alive (same pid, same start time)?
    pub fn alive(&self, name: &str) -> bool {
        process::recorded(&self.record(name)).is_some()
    }

    /// The pid of the recorded process, if it is alive.
    pub fn pid(&self, name: &str) -> Option<u32> {
        process::recorded(&self.record(name)).map(|p| p.pid)
    }

    /// Ends a recorded process and its session: SIGTERM to the leader, SIGKILL to the session after `grace`.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<()> {
        process::stop(&self.record(name), grace).await
    }

    /// Ends everything that still carries this lab's mark. Returns what had to be ended.
    pub async fn sweep(&self) -> Vec<String> {
        process::sweep(&self.root, self.owner).await
    }

    /// Our own binary by name, copied to where the parts' user can run it (a checkout below /root is closed to it).
    ///
    /// Looked for beside `dc-lab` itself, or in the folder `DC_LAB_BIN`.
    pub fn bin(&self, name: &str) -> Result<PathBuf> {
        let from = match std::env::var_os("DC_LAB_BIN") {
            Some(dir) => PathBuf::from(dir).join(name),
            None => std::env::current_exe()?.with_file_name(name),
        };
        self.install(&from, name)
    }

    /// Copies a binary to where the parts' user can run it. Repeat: a copy that is as new is kept.
    pub fn install(&self, from: &Path, name: &str) -> Result<PathBuf> {
        let meta = fs::metadata(from).with_context(|| format!("{} is not built", from.display()))?;
        let to = self.root.join("bin").join(name);
        let same = fs::metadata(&to)
            .is_ok_and(|m| m.len() == meta.len() && m.modified().ok() >= meta.modified().ok());
        if !same {
            self.mkdir(&self.root.join("bin"))?;
            let fresh = to.with_extension("new");
            fs::copy(from, &fresh).with_context(|| format!("copy {}", from.display()))?;
            fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
            self.own(&fresh)?;
            fs::rename(&fresh, &to)?;
        }
        Ok(to)
    }
}

/// The user of all parts when the lab runs as root.
const LAB_USER: &str = "dclab";

fn owner_of_parts() -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    if let Some(ids) = look_up(LAB_USER)? {
        return Ok(Some(ids));
    }
    let status = std::process::Command::new("useradd")
        .args([
            "--system",
            "--user-group",
            "--no-create-home",
            "--home-dir",
            "/var/lib/dc-lab",
            "--shell",
            "/usr/sbin/nologin",
            LAB_USER,
        ])
        .status()
        .context("run useradd")?;
    match look_up(LAB_USER)? {
        Some(ids) => Ok(Some(ids)),
        None => bail!("user {LAB_USER} cannot be made: useradd ended with {status}"),
    }
}

fn look_up(user: &str) -> Result<Option<(u32, u32)>> {
    let text = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    for line in text.lines() {
        let mut f = line.split(':');
        if f.next() == Some(user) {
            let (uid, gid) = (f.nth(1), f.next());
            return Ok(uid.and_then(|u| u.parse().ok()).zip(gid.and_then(|g| g.parse().ok())));
        }
    }
    Ok(None)
}

fn saved_in(root: &Path) -> PathBuf {
    root.join("world.json")
}

fn read_saved(root: &Path) -> Result<Option<Saved>> {
    match fs::read_to_string(saved_in(root)) {
        Ok(text) => Ok(Some(serde_json::from_str(&text).context("read world.json")?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context("read world.json"),
    }
}
