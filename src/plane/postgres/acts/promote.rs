//! The new holder: replayed past the token, promoted onto the reserved timeline, opened.

use std::sync::Arc;
use std::time::Duration;

use dc_core::act::{Act, Direction, Evidence, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::position::{Lsn, Position};
use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::process::Signal;
use tokio_postgres::types::Type;

use crate::acts::{mark_of, must_open, shown, token_of};
use crate::conf;
use crate::control::{self, Control};
use crate::db;
use crate::instance::Snapshot;
use crate::local::{Local, PLACEHOLDER, Part};

/// How often replay and promotion are looked at; both lie within the outage.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often a promotion is nudged. A promote request noticed while the receiver connects makes the server sleep for
/// five seconds otherwise; a reload wakes it.
const NUDGE_EVERY: Duration = Duration::from_millis(10);
/// How far a switch point may lie behind a token whose record size is not known.
const RECORD_MOST: u64 = 512;
/// How long the checkpoint after an opening may take.
const CHECKPOINT_LIMIT: Duration = Duration::from_mins(10);

impl Local {
    /// Waits until the target has replayed past the token, on the token's timeline.
    pub(crate) async fn replayed(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let token = token_of(act)?.clone();
        let begun = tokio::time::Instant::now();
        let sql = "
            select (select system_identifier::text from pg_control_system()) as system_id,
                   pg_is_in_recovery() as in_recovery, pg_last_wal_replay_lsn()::text as replayed,
                   greatest((select timeline_id from pg_control_checkpoint()),
                            (select min_recovery_end_timeline from pg_control_recovery()))::int as timeline";
        let what = format!("replay passes {}", token.checkpoint);
        let replayed = wait_until(until, LOOK_EVERY, &what, || async {
            let row = self.own.one(until, "read replay", sql, &[]).await?;
            let system_id: &str = db::get(&row, "system_id")?;
            let timeline = db::get::<i32>(&row, "timeline")?.cast_unsigned();
            if system_id.parse::<i64>().map(i64::cast_unsigned) != Ok(token.system_id)
                || timeline != token.timeline
            {
                let why = format!(
                    "system {system_id} on timeline {timeline} here, token of system {} on timeline {}",
                    token.system_id, token.timeline
                );
                return Err(PlaneError::refused("DC-0326", why));
            }
            if !db::get::<bool>(&row, "in_recovery")? {
                return Err(PlaneError::refused("DC-0326", "the target is not in recovery any more"));
            }
            Ok(db::lsn(&row, "replayed")?.filter(|at| *at > token.checkpoint))
        })
        .await?;
        let seen = format!(
            "replayed {replayed}, above the token {} on timeline {}, after {:.1?}",
            token.checkpoint,
            token.timeline,
            begun.elapsed()
        );
        let position = Position::Postgres { token, replayed };
        Ok(Evidence::already(seen).with(Outcome::Position(position)))
    }

    fn reserved(act: &Act) -> Result<u32, PlaneError> {
        let given = act.timelines().copied();
        let given =
            given.ok_or_else(|| PlaneError::refused("DC-0327", "the act came without reserved timelines"))?;
        Ok(match act.direction {
            Direction::Forward => given.target,
            Direction::Return => given.back,
        })
    }

    /// Whether this instance is the primary on the run's timeline and has its epoch row.
    pub(crate) async fn probe_promote(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let reserved = Self::reserved(act)?;
        if self.postmaster().is_none() {
            return Ok(Progress::NotYet);
        }
        let own = Snapshot::read(&self.own, until).await?;
        if own.in_recovery || own.timeline != reserved || !self.has_epoch_row(act, until).await? {
            return Ok(Progress::NotYet);
        }
        let switch = self.verify_switch(act, reserved)?;
        let seen =
            format!("primary on timeline {reserved}, switched at {switch}, epoch {} is written", act.epoch);
        Ok(Progress::Done(Evidence::already(seen).with(Outcome::SwitchPoint(switch))))
    }

    /// Promotes onto the reserved timeline, verifies the switch point, writes the epoch row.
    ///
    /// Errors: `Refused` when it is not where the token says, or a client is in; `Failed` with DC-0328's words when
    /// the promotion took another timeline or point: a human must look.
    pub(crate) async fn promote(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mark = mark_of(by)?;
        let reserved = Self::reserved(act)?;
        let token = token_of(act)?.clone();
        let _one = self.role_lock(until).await?;
        // set by the client fence already, as a rule: then nothing is written within the outage
        self.marks.update(|m| m.fence = m.fence.take().filter(|f| f.run == mark.run).or(Some(mark))).await?;
        if self.postmaster().is_none() {
            self.raise(reserved, until).await?;
        }
        let begun = tokio::time::Instant::now();
        let row = self.own.one(until, "read the standby", STANDING, &[]).await?;
        let recovering: bool = db::get(&row, "in_recovery")?;
        if recovering {
            let replayed = db::lsn(&row, "replayed")?;
            if replayed.is_none_or(|at| at <= token.checkpoint) {
                let why = format!("replayed {}, token {}", shown(replayed), token.checkpoint);
                return Err(PlaneError::refused("DC-0326", why));
            }
            if !db::get::<&str>(&row, "names")?.is_empty() {
                self.clear_names(until).await?;
            }
            self.end_late_clients(until).await?;
            self.reserve(reserved, db::get::<i32>(&row, "timeline")?.cast_unsigned())?;
            self.leave_recovery(until).await?;
        }
        let out = begun.elapsed();
        let switch = self.verify_switch(act, reserved)?;
        let timeline = self.write_epoch_row(act, reserved, until).await?;
        if timeline != reserved {
            let why = format!("the promotion took timeline {timeline}, reserved was {reserved}");
            return Err(PlaneError::refused("DC-0327", why));
        }
        let seen = format!(
            "primary on timeline {reserved} after {out:.1?}, switched at {switch} (token {} and its record), epoch {} written",
            token.checkpoint, act.epoch
        );
        let evidence = if recovering { Evidence::changed(seen) } else { Evidence::already(seen) };
        Ok(evidence.with(Outcome::SwitchPoint(switch)))
    }

    /// Starts an instance that is down and shall be promoted, or was being promoted when it died.
    async fn raise(&self, reserved: u32, until: Deadline) -> Result<(), PlaneError> {
        let control = self.control(until).await?;
        let promoted = self.history(reserved).exists() && control.state.of_a_primary();
        if promoted {
            self.start(Part::Primary, until).await?;
            return Ok(());
        }
        // died between writing the history and its first record: let the promotion take that number again
        conf::remove(&self.history(reserved))?;
        self.start(Part::Alone, until).await?;
        Ok(())
    }

    /// The door is still shut and no client slipped in since the fence. At a standby a held login would commit on the
    /// new primary.
    async fn end_late_clients(&self, until: Deadline) -> Result<(), PlaneError> {
        if self.door_is_shut()? != Some(true) {
            return Err(PlaneError::refused(
                "DC-0323",
                "the door is open; clients must be fenced before a promotion",
            ));
        }
        self.end_clients(until).await.map(|_| ())
    }

    /// Puts placeholders where lower numbers are free, so that the promotion takes exactly the reserved one.
    ///
    /// The server takes the number after the last history file it finds in a row. A placeholder names no parent, so a
    /// standby that looks at it goes on where it is. They stay: who follows later asks for each history in between.
    fn reserve(&self, reserved: u32, now: u32) -> Result<(), PlaneError> {
        if reserved <= now {
            return Err(PlaneError::refused(
                "DC-0327",
                format!("reserved timeline {reserved} is not above {now}"),
            ));
        }
        for number in now + 1..reserved {
            if !self.history(number).exists() {
                conf::replace(&self.history(number), PLACEHOLDER.as_bytes(), false)?;
            }
        }
        // one that a dead attempt left would push the promotion one further
        conf::remove(&self.history(reserved))
    }

    async fn leave_recovery(&self, until: Deadline) -> Result<(), PlaneError> {
        let postmaster = self.running()?;
        if let Err(why) = self.own.one(until, "ask for the promotion", "select pg_promote(false)", &[]).await
        {
            let row =
                self.own.one(until, "read the role", "select pg_is_in_recovery() as still", &[]).await?;
            if db::get::<bool>(&row, "still")? {
                return Err(why);
            } // an attempt before this one got through meanwhile
        }
        let client = self.own.client(until).await?;
        let mut nudged = tokio::time::Instant::now();
        wait_until(until, LOOK_EVERY, "the standby leaves recovery", || {
            let nudge = nudged.elapsed() >= NUDGE_EVERY;
            if nudge {
                nudged = tokio::time::Instant::now();
            }
            let client = &client;
            async move {
                if nudge {
                    postmaster.signal(Signal::HUP)?;
                }
                let rows = client.query_typed("select pg_is_in_recovery() as still", &[]).await;
                let rows = rows.map_err(|e| PlaneError::failed("watch the promotion", &e))?;
                let still = rows.first().map(|row| db::get::<bool>(row, "still")).transpose()?;
                Ok((still == Some(false)).then_some(()))
            }
        })
        .await
    }

    /// The new timeline left the old one exactly behind the token's record.
    fn verify_switch(&self, act: &Act, reserved: u32) -> Result<Lsn, PlaneError> {
        let token = token_of(act)?;
        let history = conf::read(&self.history(reserved))?;
        let wrong = |why: String| PlaneError::refused("DC-0328", why);
        let (parent, at) = control::switch_point(&history)
            .ok_or_else(|| wrong(format!("timeline {reserved} has no history that names a switch point")))?;
        if parent != token.timeline {
            return Err(wrong(format!(
                "timeline {reserved} left timeline {parent}, the token is of {}",
                token.timeline
            )));
        }
        let exact = control::end_of_shutdown_record(token.checkpoint);
        let close = at > token.checkpoint && at.0 - token.checkpoint.0 <= RECORD_MOST;
        if at == exact || (close && !self.record_is_known()) {
            return Ok(at);
        }
        Err(wrong(format!("switched at {at}, the token {} and its record end at {exact}", token.checkpoint)))
    }

    /// Whether the size of this server's shutdown record is known here.
    fn record_is_known(&self) -> bool {
        let raw = std::fs::read(self.config.data_dir.join("global/pg_control")).unwrap_or_default();
        control::parse(&raw).is_ok_and(|c: Control| c.version == 1300)
    }

    async fn has_epoch_row(&self, act: &Act, until: Deadline) -> Result<bool, PlaneError> {
        let (incarnation, counter) = epoch_numbers(act)?;
        let there = self.own.one(
            until,
            "find our tables",
            "select to_regclass('dcswitch.epoch') is not null as t",
            &[],
        );
        if !db::get::<bool>(&there.await?, "t")? {
            return Ok(false);
        }
        let sql = "select exists (select from dcswitch.epoch
                   where group_name = $1 and incarnation = $2 and counter = $3 and site = $4) as there";
        let (group, site) = (act.group.as_str(), self.site.as_str());
        let with: [db::Bound<'_>; 4] =
            [(&group, Type::TEXT), (&incarnation, Type::INT8), (&counter, Type::INT8), (&site, Type::TEXT)];
        db::get(&self.own.one(until, "read the epoch row", sql, &with).await?, "there")
    }

    /// Writes the epoch row and returns the timeline that this instance writes.
    ///
    /// Our tables came with the log, made before the fence; only if they did not, they are made here.
    async fn write_epoch_row(&self, act: &Act, timeline: u32, until: Deadline) -> Result<u32, PlaneError> {
        let (incarnation, counter) = epoch_numbers(act)?;
        let (group, site, timeline) = (act.group.as_str(), self.site.as_str(), i64::from(timeline));
        let run = act.run.as_ref().map(ToString::to_string);
        let sql = "insert into dcswitch.epoch (group_name, incarnation, counter, site, run, timeline)
                   values ($1, $2, $3, $4, $5, $6) on conflict (group_name, incarnation, counter)
                   do update set site = excluded.site, run = excluded.run, timeline = excluded.timeline
                   returning ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int as timeline";
        let with: [db::Bound<'_>; 6] = [
            (&group, Type::TEXT),
            (&incarnation, Type::INT8),
            (&counter, Type::INT8),
            (&site, Type::TEXT),
            (&run, Type::TEXT),
            (&timeline, Type::INT8),
        ];
        let row = match self.own.one(until, "write the epoch row", sql, &with).await {
            Err(PlaneError::Failed { .. }) => {
                self.ensure_tables(until).await?;
                self.own.one(until, "write the epoch row", sql, &with).await?
            }
            other => other?,
        };
        Ok(db::get::<i32>(&row, "timeline")?.cast_unsigned())
    }

    /// Whether the door is open here on a primary of the act's epoch.
    pub(crate) async fn probe_open(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        if self.postmaster().is_none()
            || self.door_is_shut()? != Some(false)
            || self.marks.get()?.fence.is_some()
        {
            return Ok(Progress::NotYet);
        }
        let own = Snapshot::read(&self.own, until).await?;
        if own.in_recovery || !self.has_epoch_row(act, until).await? {
            return Ok(Progress::NotYet);
        }
        let knocked = self.knock_all(until).await?;
        Ok(if knocked.by_rule == knocked.asked {
            Progress::NotYet
        } else {
            Progress::Done(Evidence::already(format!("the door is open: {knocked}")))
        })
    }

    /// Lets clients in at the new holder; a primary that died since its promotion is started.
    ///
    /// Errors: `Refused` unless this is the primary that carries the act's epoch row.
    pub(crate) async fn open(
        self: &Arc<Self>,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        must_open(by)?;
        let begun = tokio::time::Instant::now();
        self.ensure_primary(until).await?;
        let recovering = self.own.one(until, "read the role", "select pg_is_in_recovery() as r", &[]).await?;
        if db::get::<bool>(&recovering, "r")? || !self.has_epoch_row(act, until).await? {
            let why = format!("{} is not the primary that carries epoch {}", self.site, act.epoch);
            return Err(PlaneError::refused("DC-0330", why));
        }
        let epoch = act.epoch;
        let later = move |marks: &crate::marks::Marks| {
            let held = marks.fence.as_ref().filter(|held| held.epoch > epoch)?;
            Some(PlaneError::refused(
                "DC-0331",
                format!("run {} holds a fence of epoch {}", held.run, held.epoch),
            ))
        };
        self.open_door(later, until).await?;
        let opened = begun.elapsed();
        self.marks.update(move |m| (m.fence, m.pre_sync, m.self_closed) = (None, None, false)).await?;
        let knocked = self.knock_all(until).await?;
        if knocked.by_rule == knocked.asked && knocked.asked > 0 {
            tracing::warn!(
                "the door is open, and the site's own rules refuse every application role without TLS"
            );
        }
        let local = Arc::clone(self);
        // a rewind of the old primary reads the timeline from the control file, which only this updates
        tokio::spawn(async move {
            let within = Deadline::within(CHECKPOINT_LIMIT);
            if let Err(why) = local.own.sibling().run(within, "checkpoint after opening", "checkpoint").await
            {
                tracing::warn!(%why, "no checkpoint after opening; the follower asks for one itself");
            }
        });
        Ok(Evidence::changed(format!("door open after {opened:.1?}; {knocked}")))
    }
}

/// What a promotion must know of the standby, in one question.
const STANDING: &str = "
    select pg_is_in_recovery() as in_recovery, pg_last_wal_replay_lsn()::text as replayed,
           current_setting('synchronous_standby_names') as names,
           greatest((select timeline_id from pg_control_checkpoint()),
                    (select min_recovery_end_timeline from pg_control_recovery()))::int as timeline";

/// The epoch as the database stores it.
fn epoch_numbers(act: &Act) -> Result<(i64, i64), PlaneError> {
    let counter = i64::try_from(act.epoch.counter).map_err(|e| PlaneError::failed("store the epoch", &e))?;
    Ok((i64::from(act.epoch.incarnation), counter))
}
