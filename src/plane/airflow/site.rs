//! What the plane does at its site, as verbs; which act needs which of them stands in `acts`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use dc_core::act::Act;
use dc_core::authority::Authority;
use dc_core::ids::SiteId;
use dc_plane::{Deadline, PlaneError, wait_until};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::config::Checked;
use crate::db::{Database, Scheduler};
use crate::policy;
use crate::rest::Api;
use crate::units::{Gate, SCHEDULER, Unit, Units};

/// One Airflow at one site.
pub(crate) struct Site {
    pub(crate) checked: Checked,
    pub(crate) units: Units,
    pub(crate) database: Database,
    pub(crate) api: Api,
}

/// A scheduler of this site, of this start, with a heartbeat that was seen to move.
#[derive(Debug, Clone)]
pub(crate) struct Moving {
    pub(crate) row: Scheduler,
    /// From the first look to the first sight of the row, and to the heartbeat after it.
    pub(crate) seen: Duration,
    pub(crate) moved: Duration,
}

/// The policy's own record on disk, by the run that applied it.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    key: String,
    done: policy::Done,
}

/// How often the database is asked for a scheduler's row.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Clocks of the database's host and of the scheduler's may differ by this much.
const CLOCK_SLACK: Duration = Duration::from_secs(2);
/// Requests under way at an API that is told to end.
const API_GRACE: Duration = Duration::from_millis(1_500);

impl Site {
    pub(crate) fn name(&self) -> &SiteId {
        &self.checked.site
    }

    /// The API open, its task routes built. Repeat: safe.
    pub(crate) async fn open_api(&self, by: &Authority, until: Deadline) -> Result<(Gate, bool), PlaneError> {
        let (mut gate, mut changed) = self.units.warm(Unit::Api, until).await?;
        if !gate.open() {
            gate = self.units.open(Unit::Api, Unit::Api.parts(), by, until).await?;
            changed = true;
        }
        patiently("the task routes of the API", until, || self.api.execution_health(until)).await?;
        Ok((gate, changed))
    }

    /// The API reads its database. A pool that lost its sessions needs a moment.
    pub(crate) async fn api_answers(&self, until: Deadline) -> Result<(), PlaneError> {
        patiently("an answer of the API", until, || self.api.answers(until)).await
    }

    /// Ends the API's working part and proves that only its warm interpreter is left, or nothing at all.
    pub(crate) async fn close_api(&self, until: Deadline) -> Result<(String, bool), PlaneError> {
        let kept = self.units.kept(Unit::Api, until).await?;
        let gate = self.units.gate(Unit::Api, until).await?;
        if kept.is_some_and(|kept| kept.state == "running") && gate.is_some() {
            let was_open = gate.is_some_and(|gate| gate.open());
            self.units.close_api(API_GRACE, until).await?;
            let pids = wait_until(until, ASK_AGAIN, "the API's processes to end", || async {
                let gate = self.units.gate(Unit::Api, until).await?;
                let kept = self.units.kept(Unit::Api, until).await?;
                let closed = gate.is_some_and(|gate| gate.state == "closed" && gate.parts.is_empty());
                Ok(kept.filter(|kept| closed && kept.pids.len() <= 1).map(|kept| kept.pids.len()))
            })
            .await?;
            return Ok((
                format!(
                    "API closed: its tree has {pids} process, the warm interpreter, which holds no session"
                ),
                was_open,
            ));
        }
        let gone = self.units.end(Unit::Api, Duration::ZERO, until).await?;
        Ok((format!("API gone: its tree is empty, {} processes were ended", gone.killed), gone.killed > 0))
    }

    /// The newest scheduler row that is this site's and of this start of the gate.
    pub(crate) fn own<'a>(&self, rows: &'a [Scheduler], gate: &Gate) -> Option<&'a Scheduler> {
        let open = Duration::from_millis(gate.open_ms?);
        rows.iter().find(|row| {
            self.checked.host.as_ref().is_none_or(|host| *host == row.host) && row.age <= open + CLOCK_SLACK
        })
    }

    /// Rows of schedulers that beat and are not this site's.
    pub(crate) fn foreign<'a>(&self, rows: &'a [Scheduler], fresh: Duration) -> Vec<&'a Scheduler> {
        let own = |row: &Scheduler| self.checked.host.as_ref().is_none_or(|host| *host == row.host);
        rows.iter().filter(|row| row.beat_age < fresh && !own(row)).collect()
    }

    /// Waits for this start's own scheduler row, and for its heartbeat to move.
    pub(crate) async fn moving(&self, until: Deadline) -> Result<Moving, PlaneError> {
        let began = Instant::now();
        let look = || async {
            let gate = self.units.gate(Unit::Writers, until).await?;
            let Some(gate) = gate.filter(Gate::open) else {
                return Err(PlaneError::Failed {
                    what: "start writers".into(),
                    why: format!("the unit is not open; {}", self.units.last_words(Unit::Writers)),
                });
            };
            let rows = self.database.schedulers(until).await?;
            Ok(self.own(&rows, &gate).cloned())
        };
        let first = wait_until(until, LOOK_AGAIN, "the own scheduler row", look).await?;
        let seen = began.elapsed();
        let row = wait_until(until, LOOK_AGAIN, "the own scheduler row to move", || async {
            Ok(look().await?.filter(|row| row.id == first.id && row.beat != first.beat))
        })
        .await?;
        Ok(Moving { row, seen, moved: began.elapsed() })
    }

    /// Whether the writers are open, all of them, and this start's own row has beaten lately.
    pub(crate) async fn writers_serve(&self, until: Deadline) -> Result<Option<Scheduler>, PlaneError> {
        let gate = self.units.gate(Unit::Writers, until).await?;
        let Some(gate) = gate.filter(|gate| gate.whole(Unit::Writers)) else { return Ok(None) };
        let rows = self.database.schedulers(until).await?;
        Ok(self.own(&rows, &gate).filter(|row| row.beat_age < Duration::from_secs(30)).cloned())
    }

    /// Opens the writers' gate and waits for the own row. Before that the policy has been applied under `key`.
    pub(crate) async fn open_writers(
        &self,
        key: &str,
        by: &Authority,
        until: Deadline,
    ) -> Result<(Moving, Duration), PlaneError> {
        if !by.may_open() {
            return Err(PlaneError::refused("DC-0620", "writers are opened by a step or a reopen only"));
        }
        if !self.database.writable(until).await? {
            return Err(PlaneError::refused(
                "DC-0604",
                "the metadata database here takes no writes; a scheduler would end at once",
            ));
        }
        let began = Instant::now();
        let (gate, _) = self.units.warm(Unit::Writers, until).await?;
        let warmed = began.elapsed();
        if !gate.open() {
            if self.noted(key).is_none() {
                self.apply_policy(key, by, until).await?;
            }
            self.units.open(Unit::Writers, &[SCHEDULER], by, until).await?;
        }
        let moving = self.moving(until).await?;
        // what parses files comes after what starts tasks: on a small host they would slow each other
        let gate = self.units.open(Unit::Writers, Unit::Writers.parts(), by, until).await?;
        if !gate.whole(Unit::Writers) {
            let why = format!("only {:?} work", gate.parts.keys().collect::<Vec<_>>());
            return Err(PlaneError::Failed { what: "start writers".into(), why });
        }
        Ok((moving, warmed))
    }

    /// Decides what becomes of held tasks, through this site's own API, and notes it on disk.
    ///
    /// Repeat: safe while no scheduler runs here. Errors: `Refused` when the database takes no writes.
    pub(crate) async fn apply_policy(
        &self,
        key: &str,
        by: &Authority,
        until: Deadline,
    ) -> Result<policy::Done, PlaneError> {
        if !by.may_open() {
            return Err(PlaneError::refused("DC-0620", "tasks are decided by a step or a reopen only"));
        }
        if !self.database.writable(until).await? {
            return Err(PlaneError::refused("DC-0604", "the metadata database here takes no writes"));
        }
        self.open_api(by, until).await?;
        self.api_answers(until).await?;
        let done = policy::apply(&self.api, self.checked.spec.default_policy, until).await?;
        self.note(key, &done).map_err(|e| PlaneError::failed("note the policy on disk", &e))?;
        Ok(done)
    }

    fn note_path(&self) -> PathBuf {
        self.checked.run_dir.join("policy.json")
    }

    fn note(&self, key: &str, done: &policy::Done) -> std::io::Result<()> {
        let (path, fresh) = (self.note_path(), self.note_path().with_extension("new"));
        let text = serde_json::to_vec(&Noted { key: key.to_owned(), done: done.clone() })?;
        let mut file = File::create(&fresh)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(&self.checked.run_dir)?.sync_all()
    }

    /// What the policy did under that key; none when it has not been applied since another.
    pub(crate) fn noted(&self, key: &str) -> Option<policy::Done> {
        let text = fs::read(self.note_path()).ok()?;
        let noted: Noted = serde_json::from_slice(&text).ok()?;
        (noted.key == key).then_some(noted.done)
    }

    /// Forgets under which run the policy was applied: a scheduler runs from here on.
    pub(crate) fn forget_note(&self) -> Result<(), PlaneError> {
        match fs::remove_file(self.note_path()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(PlaneError::failed("forget the policy's note", &e))
            }
            _ => Ok(()),
        }
    }
}

/// Tries until it succeeds; the last error is told when it never does.
async fn patiently<F, Fut>(what: &str, until: Deadline, mut ask: F) -> Result<(), PlaneError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), PlaneError>>,
{
    let last = parking_lot::Mutex::new(None);
    let waited = wait_until(until, ASK_AGAIN, what, || {
        let (asked, last) = (ask(), &last);
        async move {
            match asked.await {
                Ok(()) => Ok(Some(())),
                Err(cause) => {
                    *last.lock() = Some(cause);
                    Ok(None)
                }
            }
        }
    })
    .await;
    match (waited, last.into_inner()) {
        (Err(PlaneError::TimedOut { waited, .. }), Some(cause)) => {
            Err(PlaneError::TimedOut { what: format!("{what}; last: {cause}"), waited })
        }
        (waited, _) => waited,
    }
}

/// Names one application of the policy: the run, which way it goes, and whether it is being undone.
pub(crate) fn policy_key(act: &Act, undo: bool) -> String {
    let run = act.run.as_ref().map_or("upkeep", |run| run.0.as_str());
    format!("{run} {} {:?} undo={undo}", act.epoch, act.direction)
}
