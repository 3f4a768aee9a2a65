//! Before the fence: checkpoint, replay that waits for nobody, the slot for the way back, the synchronous target.

use std::sync::Arc;
use std::time::Duration;

use dc_core::act::{Act, Evidence, Progress};
use dc_core::authority::Authority;
use dc_core::ids::SiteId;
use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::process::Signal;
use tokio_postgres::types::Type;

use crate::acts::{at_source, must_open, shown};
use crate::conf;
use crate::db;
use crate::local::Local;
use crate::marks::Delays;

/// How often the server's view of the standby is read while it becomes synchronous.
const SYNC_EVERY: Duration = Duration::from_millis(2);
/// How long the target may take to become synchronous; commits wait meanwhile.
const SYNC_LIMIT: Duration = Duration::from_secs(5);
/// A synchronous target whose stream is lost that long is dropped again, so that commits go on.
const LOST_LIMIT: Duration = Duration::from_millis(700);
/// How often the stream of a synchronous target is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How long a setting may take to reach a session.
const SETTLE: Duration = Duration::from_secs(5);

/// Our own tables: the epoch row of every takeover and the canaries.
pub(crate) const TABLES: &str = "
    create schema if not exists dcswitch;
    create table if not exists dcswitch.epoch (
        group_name text not null, incarnation bigint not null, counter bigint not null,
        site text not null, run text, timeline bigint not null, written_at timestamptz not null default now(),
        primary key (group_name, incarnation, counter));
    create table if not exists dcswitch.canary (
        id text primary key, site text not null, written_at timestamptz not null default now());";

impl Local {
    /// Makes sure our tables exist at a primary.
    pub(crate) async fn ensure_tables(&self, until: Deadline) -> Result<bool, PlaneError> {
        let sql = "select to_regclass('dcswitch.epoch') is not null and to_regclass('dcswitch.canary') is not null as there";
        let there: bool = db::get(&self.own.one(until, "find our tables", sql, &[]).await?, "there")?;
        if !there {
            self.own.run(until, "make our tables", TABLES).await?;
        }
        Ok(there)
    }

    /// CHECKPOINT at this site; at the target also the replay delays and the slot for the source.
    pub(crate) async fn checkpoint(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let mut seen = Vec::new();
        if at_source(act) {
            self.ensure_tables(until).await?;
        } else {
            self.no_replay_delay(until).await?;
            seen.push("both replay delays are 0".to_owned());
            seen.push(format!(
                "slot {} {}",
                Self::name_of(&act.source),
                self.ensure_slot(&act.source, until).await?
            ));
            let ended = self.end_replay_blockers(until).await?;
            if ended > 0 {
                seen.push(format!("{ended} sessions that held up replay were ended"));
            }
        }
        // in a session of its own: nobody else shall wait behind it
        self.own.sibling().run(until, "checkpoint", "checkpoint").await?;
        let control = self.control(until).await?;
        seen.insert(0, format!("checkpoint at {}, timeline {}", control.checkpoint, control.timeline));
        Ok(Evidence::changed(seen.join("; ")))
    }

    /// Gives the replay delays back and drops the slot that nobody uses yet.
    pub(crate) async fn undo_checkpoint(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if at_source(act) {
            return Ok(Evidence::already("a checkpoint needs no undo"));
        }
        let back = self.restore_delays(until).await?;
        let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots
                   where slot_name = $1 and not active";
        let name = Self::name_of(&act.source);
        let dropped = self.own.all(until, "drop the slot", sql, &[(&name, Type::TEXT)]).await?.len();
        let seen = format!(
            "replay delays {}, {dropped} slots dropped",
            if back { "given back" } else { "as they were" }
        );
        Ok(if back || dropped > 0 { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    async fn no_replay_delay(&self, until: Deadline) -> Result<(), PlaneError> {
        let auto = conf::read(&self.config.data_dir.join("postgresql.auto.conf"))?;
        let were = Delays {
            streaming: conf::auto_value(&auto, "max_standby_streaming_delay"),
            archive: conf::auto_value(&auto, "max_standby_archive_delay"),
        };
        self.marks.update(move |m| m.delays = m.delays.take().or(Some(were))).await?;
        for name in ["max_standby_streaming_delay", "max_standby_archive_delay"] {
            self.own.run(until, "set a replay delay", &format!("alter system set {name} = '0'")).await?;
        }
        self.reload_until("max_standby_archive_delay", "0", until).await
    }

    /// Gives the replay delays back that a run set to 0. Returns whether there were any.
    pub(crate) async fn restore_delays(&self, until: Deadline) -> Result<bool, PlaneError> {
        let Some(were) = self.marks.get()?.delays else { return Ok(false) };
        let of =
            [("max_standby_streaming_delay", were.streaming), ("max_standby_archive_delay", were.archive)];
        for (name, value) in of {
            let sql = match value {
                Some(value) => format!("alter system set {name} = {}", conf::literal(&value)),
                None => format!("alter system reset {name}"),
            };
            self.own.run(until, "give a replay delay back", &sql).await?;
        }
        self.running()?.signal(Signal::HUP)?;
        self.marks.update(move |m| m.delays = None).await?;
        Ok(true)
    }

    /// Makes the server read its settings again and waits until a session sees the value.
    async fn reload_until(&self, name: &str, value: &str, until: Deadline) -> Result<(), PlaneError> {
        self.running()?.signal(Signal::HUP)?;
        let soon = Deadline(until.0.min(Deadline::within(SETTLE).0));
        let sql = "select setting = $2 as there from pg_settings where name = $1";
        wait_until(soon, SYNC_EVERY, &format!("{name} becomes {value:?}"), || async {
            let row = self
                .own
                .one(soon, "read a setting", sql, &[(&name, Type::TEXT), (&value, Type::TEXT)])
                .await?;
            Ok(db::get::<bool>(&row, "there")?.then_some(()))
        })
        .await
    }

    /// The slot by which a site will follow this instance; may be made at a standby too.
    pub(crate) async fn ensure_slot(&self, of: &SiteId, until: Deadline) -> Result<&'static str, PlaneError> {
        ensure_slot(&self.own, of, until).await
    }

    /// Ends sessions that hold up replay: a wait that began before the delays were 0 does not read them.
    async fn end_replay_blockers(&self, until: Deadline) -> Result<usize, PlaneError> {
        let sql = "select coalesce(wait_event_type = 'Lock' or wait_event like 'RecoveryConflict%', false) as stalled
                   from pg_stat_activity where backend_type = 'startup'";
        let rows = self.own.all(until, "read replay", sql, &[]).await?;
        match rows.first() {
            Some(row) if db::get::<bool>(row, "stalled")? => {}
            _ => return Ok(0),
        }
        let sql = "select pid from pg_stat_activity where backend_type = 'client backend' and usename <> current_user";
        let mut ended = 0;
        for row in self.own.all(until, "find readers", sql, &[]).await? {
            if let Some(reader) = crate::procs::Process::of(db::get(&row, "pid")?) {
                reader.signal(Signal::TERM)?;
                ended += 1;
            }
        }
        Ok(ended)
    }

    /// Whether this run's target is synchronous in the server's own view.
    pub(crate) async fn probe_pre_sync(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let name = Self::name_of(&act.target);
        if self.postmaster().is_none() || self.marks.get()?.pre_sync != act.run {
            return Ok(Progress::NotYet);
        }
        if self.names(until).await? != format!("FIRST 1 ({name})") {
            return Ok(Progress::NotYet);
        }
        Ok(match self.sync_state(&name, until).await? {
            Some((state, sync, flushed)) if state == "streaming" && sync == "sync" => {
                Progress::Done(Evidence::already(format!("{name} is synchronous, flushed {flushed}")))
            }
            _ => Progress::NotYet,
        })
    }

    async fn names(&self, until: Deadline) -> Result<String, PlaneError> {
        let sql = "select current_setting('synchronous_standby_names') as names";
        db::get(&self.own.one(until, "read names", sql, &[]).await?, "names")
    }

    /// Makes the target synchronous and waits until the server says so. What is acknowledged from then on is there.
    ///
    /// Errors: `Refused` when the target does not stream or does not become synchronous; the names are then as before.
    pub(crate) async fn pre_sync(
        self: &Arc<Self>,
        act: &Act,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let name = Self::name_of(&act.target);
        let begun = tokio::time::Instant::now();
        if let Progress::Done(evidence) = self.probe_pre_sync(act, until).await? {
            self.watch_sync(name);
            return Ok(evidence);
        }
        let before = self.sync_state(&name, until).await?;
        if before.is_none_or(|(state, _, _)| state != "streaming") {
            return Err(PlaneError::refused("DC-0305", format!("{} does not stream as {name}", act.target)));
        }
        let names = self.names(until).await?;
        let ours = format!("FIRST 1 ({name})");
        if !names.is_empty() && names != ours {
            return Err(PlaneError::refused("DC-0317", format!("synchronous_standby_names is {names:?}")));
        }
        let run = act.run.clone();
        self.marks.update(move |m| m.pre_sync = run).await?;
        let limit = Deadline(until.0.min(Deadline::within(SYNC_LIMIT).0));
        match self.become_sync(&ours, &name, limit).await {
            Ok(flushed) => {
                self.watch_sync(name.clone());
                let seen = format!("{name} is synchronous, flushed {flushed}, after {:.1?}", begun.elapsed());
                Ok(Evidence::changed(seen))
            }
            Err(e) => {
                self.clear_names(Deadline::within(SETTLE)).await?;
                self.marks.update(|m| m.pre_sync = None).await?;
                Err(PlaneError::refused("DC-0305", format!("{} did not become synchronous: {e}", act.target)))
            }
        }
    }

    async fn become_sync(&self, ours: &str, name: &str, until: Deadline) -> Result<String, PlaneError> {
        let sql = format!("alter system set synchronous_standby_names = {}", conf::literal(ours));
        self.own.run(until, "make the target synchronous", &sql).await?;
        self.running()?.signal(Signal::HUP)?;
        wait_until(until, SYNC_EVERY, "the target is synchronous", || async {
            let now = self.sync_state(name, until).await?;
            Ok(now
                .filter(|(state, sync, _)| state == "streaming" && sync == "sync")
                .map(|(_, _, flushed)| flushed))
        })
        .await
    }

    /// State, synchronous state and flushed position of the one standby of that name.
    async fn sync_state(
        &self,
        name: &str,
        until: Deadline,
    ) -> Result<Option<(String, String, String)>, PlaneError> {
        let sql = "select state, sync_state, flush_lsn::text as flushed from pg_stat_replication where application_name = $1";
        let rows = self.own.all(until, "read the standby", sql, &[(&name, Type::TEXT)]).await?;
        let [row] = rows.as_slice() else { return Ok(None) };
        let text = |column| db::get::<Option<String>>(row, column).map(Option::unwrap_or_default);
        Ok(Some((text("state")?, text("sync_state")?, shown(db::lsn(row, "flushed")?))))
    }

    /// No synchronous standby any more. Returns whether there was one.
    pub(crate) async fn clear_names(&self, until: Deadline) -> Result<bool, PlaneError> {
        let sql = "select current_setting('synchronous_standby_names') = '' as none";
        let none: bool = db::get(&self.own.one(until, "read names", sql, &[]).await?, "none")?;
        let auto = conf::read(&self.config.data_dir.join("postgresql.auto.conf"))?;
        if none && conf::auto_value(&auto, "synchronous_standby_names").is_none_or(|v| v.is_empty()) {
            return Ok(false);
        }
        self.own
            .run(until, "clear synchronous names", "alter system set synchronous_standby_names = ''")
            .await?;
        self.reload_until("synchronous_standby_names", "", until).await?;
        Ok(true)
    }

    /// Clears the names that pre-sync set; a primary that died meanwhile is started.
    pub(crate) async fn undo_pre_sync(
        &self,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        must_open(by)?;
        self.start_again(by, until).await?;
        let cleared = self.clear_names(until).await?;
        self.marks.update(|m| m.pre_sync = None).await?;
        let seen = format!("synchronous_standby_names is {:?}", self.names(until).await?);
        Ok(if cleared { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    /// Drops the synchronous target again when its stream is lost, until the instance stops or the names are gone.
    ///
    /// Nothing is lost by that: a promotion needs the token replayed, whoever waited for whom.
    fn watch_sync(self: &Arc<Self>, name: String) {
        let local = Arc::clone(self);
        tokio::spawn(async move {
            let Err(why) = local.keep_sync(&name).await else { return };
            tracing::debug!(%why, "watch of the synchronous target ended");
        });
    }

    async fn keep_sync(&self, name: &str) -> Result<(), PlaneError> {
        let sql = "select current_setting('synchronous_standby_names') <> '' as named,
                   exists (select from pg_stat_replication where application_name = $1 and state = 'streaming') as there";
        let mut seen = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(WATCH_EVERY).await;
            let soon = Deadline::within(Duration::from_secs(1));
            let row = self.watch.one(soon, "watch the target", sql, &[(&name, Type::TEXT)]).await?;
            if !db::get::<bool>(&row, "named")? {
                return Ok(());
            }
            if db::get::<bool>(&row, "there")? {
                seen = tokio::time::Instant::now();
            } else if seen.elapsed() >= LOST_LIMIT {
                tracing::warn!(
                    standby = name,
                    "synchronous target lost its stream; dropped so that commits go on"
                );
                self.clear_names(Deadline::within(SETTLE)).await?;
                return Ok(());
            }
        }
    }
}

/// Makes the slot of a site at an instance, if it is missing.
pub(crate) async fn ensure_slot(
    at: &db::Db,
    of: &SiteId,
    until: Deadline,
) -> Result<&'static str, PlaneError> {
    let name = Local::name_of(of);
    let sql = "select count(pg_create_physical_replication_slot($1, true)) as made
               where not exists (select from pg_replication_slots where slot_name = $1)";
    let row = at.one(until, "make a slot", sql, &[(&name, Type::NAME)]).await?;
    Ok(if db::get::<i64>(&row, "made")? > 0 { "made" } else { "stands" })
}
