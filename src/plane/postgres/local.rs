//! This site's instance: its files, its start and its stop.
//!
//! Nothing but this driver starts the instance: that is the boot gate. Every start writes the settings of the role
//! first and leaves the door shut; who opens it is decided by an act.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dc_core::ids::{GroupName, SiteId};
use dc_core::spec::{GroupSpec, Policy};
use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::process::Signal;
use tokio::process::Command;
use tokio::sync::{Mutex, MutexGuard};

use crate::conf;
use crate::config::{self, Address, BuildError, Config};
use crate::control::{self, Control};
use crate::db::{self, Db, Way};
use crate::door::{self, Block, Knock};
use crate::marks::MarkStore;
use crate::procs::{self, Process};

/// How often a stop looks whether it is over; it lies within the outage.
const STOP_EVERY: Duration = Duration::from_millis(2);
/// How often a start knocks.
const START_EVERY: Duration = Duration::from_millis(10);
/// How long a login that was refused may take to be gone.
const LEAVING: Duration = Duration::from_millis(250);
/// How long a started server may take to write its lock file before it counts as dead.
const BIRTH: Duration = Duration::from_secs(5);

/// What a history file holds whose number was given out to another promotion. It names no parent.
pub(crate) const PLACEHOLDER: &str = "# given out to another promotion\n";

/// What the instance shall be once started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// Takes writes.
    Primary,
    /// Follows the instance of that site.
    Standby(&'a SiteId),
    /// In recovery and following nobody, to be promoted onto a timeline of its own.
    Alone,
}

/// How hard an instance is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Sessions end, a last checkpoint is written and sent to the standby.
    Fast,
    /// At once; the next start recovers from the log.
    Immediate,
}

/// The driver's state for one group at one site.
pub(crate) struct Local {
    pub config: Config,
    pub group: GroupName,
    pub site: SiteId,
    pub peer: SiteId,
    pub databases: Vec<String>,
    pub app_roles: Vec<String>,
    pub policy: Policy,
    /// Where this driver keeps what must outlive the data directory.
    pub state_dir: PathBuf,
    pub marks: MarkStore,
    /// For acts.
    pub own: Db,
    /// For observations, so that none waits behind an act's statement.
    pub watch: Db,
    /// At the other site.
    pub other: Db,
    /// Held by whoever starts, stops, promotes or rebuilds.
    role: Mutex<()>,
    /// When the server was last seen to have loaded a shut door, in clock ticks; 0 for open or not seen.
    shut_since: AtomicU64,
    /// Held by whoever rewrites the door.
    door: Mutex<()>,
}

impl Local {
    /// Checks the settings and opens the marks.
    pub fn new(config: Config, spec: &GroupSpec, site: SiteId, data_dir: &Path) -> Result<Self, BuildError> {
        let Some(postgres) = &spec.postgres else {
            return Err(BuildError::new("databases", format!("group {} has no [postgres]", spec.name)));
        };
        let Some(peer) = spec.other(&site).filter(|_| spec.sites.contains(&site)).cloned() else {
            return Err(BuildError::new("sites", format!("{site} is no site of group {}", spec.name)));
        };
        config.check(&site, &peer, &postgres.app_roles)?;
        let state_dir = data_dir.join("postgres");
        std::fs::create_dir_all(&state_dir)
            .map_err(|e| BuildError::new("data_dir", format!("{}: {e}", state_dir.display())))?;
        let marks = MarkStore::open(&state_dir).map_err(|why| BuildError::new("data_dir", why))?;
        let (Some(here), Some(there)) = (config.sites.get(&site), config.sites.get(&peer)) else {
            return Err(BuildError::new("sites", "both sites of the group need an address"));
        };
        let socket = Way::Socket { dir: config.socket_dir.clone(), port: here.port };
        let session = |way: Way| Db::new(way, &config.user, &config.password_file, &config.database);
        let (own, other) = (session(socket), session(Way::Tcp(there.clone())));
        Ok(Self {
            watch: own.sibling(),
            own,
            other,
            group: spec.name.clone(),
            site,
            peer,
            databases: postgres.databases.clone(),
            app_roles: postgres.app_roles.clone(),
            policy: spec.policy.clone(),
            state_dir,
            marks,
            config,
            shut_since: AtomicU64::new(0),
            role: Mutex::new(()),
            door: Mutex::new(()),
        })
    }

    /// The name by which an instance follows, and of its slot at the instance it follows.
    pub fn name_of(site: &SiteId) -> String {
        format!("dcswitch_{}", site.as_str().replace('-', "_"))
    }

    /// The address of a site of the pair, as this site reaches it.
    pub fn address(&self, of: &SiteId) -> Result<&Address, PlaneError> {
        self.config.sites.get(of).ok_or_else(|| PlaneError::Failed {
            what: format!("find postgres.sites.{of}"),
            why: "the agent's file has no such address".into(),
        })
    }

    /// The rules file of the instance.
    pub fn rules(&self) -> PathBuf {
        self.config.data_dir.join("pg_hba.conf")
    }

    /// The postmaster, if the instance runs.
    pub fn postmaster(&self) -> Option<Process> {
        procs::postmaster(&self.config.data_dir)
    }

    /// The postmaster of an instance that must run.
    pub fn running(&self) -> Result<Process, PlaneError> {
        self.postmaster().ok_or_else(|| PlaneError::Unreachable {
            what: self.own.place(),
            why: format!("no postmaster runs in {}", self.config.data_dir.display()),
        })
    }

    /// What the instance last wrote about itself.
    pub async fn control(&self, until: Deadline) -> Result<Control, PlaneError> {
        control::read(&self.config.data_dir, &self.config.bin_dir, until).await
    }

    /// The right to start, stop, promote or rebuild, one at a time.
    pub async fn role_lock(&self, until: Deadline) -> Result<MutexGuard<'_, ()>, PlaneError> {
        until.bound("another act on this instance ends", self.role.lock()).await
    }

    /// Starts the instance in that part, door shut, and waits until it takes our session.
    ///
    /// Errors: `Refused` while a rebuild is unfinished; `Failed` with the server's last words; `TimedOut`.
    pub async fn start(&self, part: Part<'_>, until: Deadline) -> Result<Process, PlaneError> {
        self.write_role(part).await?;
        let log = self.state_dir.join("server.log");
        let what = format!("start postgres in {}", self.config.data_dir.display());
        let mut start = self.tool("pg_ctl");
        start.args(["start", "-W", "-s", "-D"]).arg(&self.config.data_dir).arg("-l").arg(&log);
        let out = until.bound(&what, start.output()).await?.map_err(|e| PlaneError::failed(&what, &e))?;
        if !out.status.success() {
            let why = String::from_utf8_lossy(&out.stderr).trim().to_owned();
            return Err(PlaneError::Failed { what, why: format!("{why}; {}", last_words(&log)) });
        }
        self.own.forget().await;
        let begun = tokio::time::Instant::now();
        let mut seen = None;
        wait_until(until, START_EVERY, &what, || {
            let now = self.postmaster();
            let died = now.is_none() && (seen.is_some() || begun.elapsed() > BIRTH);
            seen = seen.or(now);
            let what = &what;
            let log = &log;
            async move {
                if died {
                    return Err(PlaneError::Failed { what: what.clone(), why: last_words(log) });
                }
                let ready = self.own.client(until).await;
                Ok(now.filter(|_| ready.is_ok()))
            }
        })
        .await
    }

    /// Stops the instance and waits until its postmaster is gone. Not running is fine.
    ///
    /// Errors: `TimedOut`; the instance may then still be stopping.
    pub async fn stop(&self, how: Stop, until: Deadline) -> Result<(), PlaneError> {
        let Some(postmaster) = self.postmaster() else { return Ok(()) };
        postmaster.signal(match how {
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        })?;
        wait_until(until, STOP_EVERY, "postgres stops", || async { Ok((!postmaster.lives()).then_some(())) })
            .await
    }

    /// Writes what a role needs on disk: signal files, our settings, the shut door.
    async fn write_role(&self, part: Part<'_>) -> Result<(), PlaneError> {
        let marks = self.marks.get()?;
        if marks.rebuilding {
            let why = "a rewind of this instance began and did not end; it follows again once the rewind is repeated";
            return Err(PlaneError::refused("DC-0329", why));
        }
        let data = &self.config.data_dir;
        conf::remove_leftovers(data)?;
        conf::remove(&data.join("recovery.signal"))?;
        let signal = data.join("standby.signal");
        if part == Part::Primary {
            conf::remove(&signal)?;
        } else {
            conf::replace(&signal, b"", false)?;
        }
        if part != Part::Primary {
            self.remove_last_placeholders()?;
        }
        let auto = data.join("postgresql.auto.conf");
        let text = conf::rewrite_auto(&conf::read(&auto)?, &self.role_settings(part)?);
        conf::replace(&auto, text.as_bytes(), false)?;
        self.write_door(true).await.map(|_| ())
    }

    /// The history file of a timeline.
    pub fn history(&self, timeline: u32) -> PathBuf {
        self.config.data_dir.join(format!("pg_wal/{timeline:08X}.history"))
    }

    /// Removes placeholders above the last real history: a standby that finds one there at its start does not come up.
    fn remove_last_placeholders(&self) -> Result<(), PlaneError> {
        let dir = self.config.data_dir.join("pg_wal");
        let list =
            std::fs::read_dir(&dir).map_err(|e| PlaneError::failed(format!("list {}", dir.display()), &e))?;
        let mut numbers: Vec<u32> = list
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                u32::from_str_radix(name.to_str()?.strip_suffix(".history")?, 16).ok()
            })
            .collect();
        numbers.sort_unstable();
        while let Some(last) = numbers.pop() {
            let path = self.history(last);
            if conf::read(&path)? != PLACEHOLDER {
                break;
            }
            conf::remove(&path)?;
        }
        Ok(())
    }

    fn role_settings(&self, part: Part<'_>) -> Result<Vec<(&'static str, String)>, PlaneError> {
        let (upstream, slot) = match part {
            Part::Standby(holder) => (self.conninfo(holder, true)?, Self::name_of(&self.site)),
            Part::Primary | Part::Alone => (String::new(), String::new()),
        };
        Ok(vec![
            ("port", self.address(&self.site)?.port.to_string()),
            ("unix_socket_directories", self.config.socket_dir.display().to_string()),
            ("hot_standby", "on".to_owned()),
            ("recovery_target_timeline", "latest".to_owned()),
            ("synchronous_standby_names", String::new()),
            ("primary_conninfo", upstream),
            ("primary_slot_name", slot),
        ])
    }

    /// The connection string by which our replication role reaches a site; the password stays in its file.
    pub fn conninfo(&self, of: &SiteId, stream: bool) -> Result<String, PlaneError> {
        let to = self.address(of)?;
        let pass = self.write_passfile()?;
        let mut words = vec![
            ("host", to.host.clone()),
            ("port", to.port.to_string()),
            ("user", self.config.replication_user.clone()),
            ("passfile", pass.display().to_string()),
            ("connect_timeout", "3".to_owned()),
            ("keepalives_idle", "5".to_owned()),
            ("tcp_user_timeout", "10000".to_owned()),
        ];
        if stream {
            words.push(("application_name", Self::name_of(&self.site)));
        } else {
            words.push(("dbname", self.config.database.clone()));
        }
        let words = words.iter().map(|(key, value)| format!("{key}={}", conf::conninfo_value(value)));
        Ok(words.collect::<Vec<_>>().join(" "))
    }

    fn write_passfile(&self) -> Result<PathBuf, PlaneError> {
        let path = self.state_dir.join("pgpass");
        let password = config::secret(&self.config.replication_password_file)
            .map_err(|why| PlaneError::Failed { what: "read the replication password".into(), why })?;
        let password = password.replace('\\', "\\\\").replace(':', "\\:");
        let line = format!("*:*:*:{}:{password}\n", self.config.replication_user);
        if conf::read(&path)? != line {
            conf::replace(&path, line.as_bytes(), false)?;
        }
        Ok(path)
    }

    /// Writes the door's block without loading it. Returns the role that proves it loaded.
    async fn write_door(&self, shut: bool) -> Result<String, PlaneError> {
        let _one = self.door.lock().await;
        self.shut_since.store(0, Ordering::Relaxed);
        self.write_block(shut)
    }

    fn write_block(&self, shut: bool) -> Result<String, PlaneError> {
        let nonce = door::fresh_nonce();
        let block = Block {
            agent: &self.config.user,
            sender: &self.config.replication_user,
            database: &self.config.database,
            nonce: &nonce,
            shut,
        };
        door::write(&self.rules(), &block)?;
        Ok(nonce)
    }

    /// Shuts the door and proves it loaded. Sessions that are in stay in; see [`Local::end_clients`].
    pub async fn shut_door(&self, until: Deadline) -> Result<(), PlaneError> {
        let _one = until.bound("the door is free", self.door.lock()).await?;
        let nonce = self.write_block(true)?;
        self.load(&nonce, until).await?;
        self.shut_since.store(procs::ticks(), Ordering::Relaxed);
        Ok(())
    }

    /// Opens the door and proves it loaded, unless `forbidden` says otherwise at the last moment.
    ///
    /// The question is asked while nobody else can touch the door, so that an opener who was slow cannot undo a fence.
    pub async fn open_door(
        &self,
        forbidden: impl Fn(&crate::marks::Marks) -> Option<PlaneError>,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let _one = until.bound("the door is free", self.door.lock()).await?;
        if let Some(no) = forbidden(&self.marks.get()?) {
            return Err(no);
        }
        self.shut_since.store(0, Ordering::Relaxed);
        let nonce = self.write_block(false)?;
        self.load(&nonce, until).await
    }

    async fn load(&self, nonce: &str, until: Deadline) -> Result<(), PlaneError> {
        let port = self.address(&self.site)?.port;
        let socket = Knock::Socket(&self.config.socket_dir, port);
        door::load(self.running()?, &socket, nonce, &self.config.database, until).await
    }

    /// Whether the written door is shut; none when there is no block of ours.
    pub fn door_is_shut(&self) -> Result<Option<bool>, PlaneError> {
        Ok(door::is_shut(&conf::read(&self.rules())?))
    }

    /// Ends every client process, logins under way included, until none is left. The door must be shut.
    pub async fn end_clients(&self, until: Deadline) -> Result<door::Swept, PlaneError> {
        let cluster = self.cluster_name(until).await?;
        let mut shut_since = self.shut_since.load(Ordering::Relaxed);
        if shut_since == 0 {
            // an earlier process of ours shut it: prove now that the server knows
            if self.door_is_shut()? != Some(true) || !self.block_is_loaded(until).await? {
                return Err(PlaneError::refused(
                    "DC-0323",
                    "the door is not shut, or the server has not read that it is",
                ));
            }
            shut_since = procs::ticks();
        }
        let (agent, sender) = (&self.config.user, &self.config.replication_user);
        let is_client = |title: &str| door::is_client(title, &cluster, agent, sender);
        door::sweep(self.running()?, shut_since, is_client, until).await
    }

    /// Whether no client is in that came before the shut door was loaded, by two equal looks. Changes nothing.
    ///
    /// Logins that are being refused just now are given a moment to go.
    pub async fn nobody_is_in(&self, until: Deadline) -> Result<bool, PlaneError> {
        let cluster = self.cluster_name(until).await?;
        let (agent, sender) = (&self.config.user, &self.config.replication_user);
        let is_client = |title: &str| door::is_client(title, &cluster, agent, sender);
        let postmaster = self.running()?;
        let shut_since = match self.shut_since.load(Ordering::Relaxed) {
            0 => procs::ticks(),
            since => since,
        };
        let soon = Deadline(until.0.min(Deadline::within(LEAVING).0));
        let quiet = wait_until(soon, STOP_EVERY, "no client is in", || async {
            let (first, in_first) = door::look(postmaster, shut_since, is_client);
            let (second, in_second) = door::look(postmaster, shut_since, is_client);
            Ok((first == second && in_first.is_empty() && in_second.is_empty()).then_some(()))
        });
        Ok(quiet.await.is_ok())
    }

    /// Whether the server has loaded the block that is written.
    pub async fn block_is_loaded(&self, until: Deadline) -> Result<bool, PlaneError> {
        let Some(nonce) = door::nonce_of(&conf::read(&self.rules())?) else { return Ok(false) };
        let socket = Knock::Socket(&self.config.socket_dir, self.address(&self.site)?.port);
        Ok(door::probe(&socket, &nonce, &self.config.database, until).await? == door::Answer::Asked)
    }

    async fn cluster_name(&self, until: Deadline) -> Result<String, PlaneError> {
        let row =
            self.own.one(until, "read cluster_name", "select current_setting('cluster_name') as name", &[]);
        db::get(&row.await?, "name")
    }

    /// A tool of the server's own, without a terminal, without our libpq settings.
    pub fn tool(&self, name: &str) -> Command {
        let mut tool = Command::new(self.config.bin_dir.join(name));
        for (key, _) in std::env::vars_os() {
            if key.to_str().is_some_and(|k| k.starts_with("PG")) {
                tool.env_remove(&key);
            }
        }
        tool.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        tool
    }
}

/// The last line of a server's log that tells why it ended.
pub(crate) fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let tail = text.get(text.len().saturating_sub(16_384)..).unwrap_or_default();
    let tail = String::from_utf8_lossy(tail);
    let telling = |line: &&str| line.contains("FATAL") || line.contains("PANIC");
    tail.lines()
        .rfind(telling)
        .or_else(|| tail.lines().last())
        .unwrap_or("its log is empty")
        .trim()
        .to_owned()
}
