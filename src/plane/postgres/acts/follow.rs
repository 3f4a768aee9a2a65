//! The old holder becomes the standby of the new one.

use std::time::Duration;

use dc_core::act::{Act, Direction, Evidence, Progress};
use dc_core::authority::Authority;
use dc_core::ids::SiteId;
use dc_plane::{Deadline, PlaneError, wait_until};
use tokio_postgres::types::Type;

use crate::acts::prepare::ensure_slot;
use crate::acts::{mark_of, shown};
use crate::control::{Control, State};
use crate::db;
use crate::instance::Snapshot;
use crate::local::{Local, Part, Stop};

/// How often the receiver is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a started standby may take to stream before a rewind is tried.
const STREAM_LIMIT: Duration = Duration::from_secs(20);
/// How long an instance without clients may take to stop before it is stopped hard.
const QUIET_STOP: Duration = Duration::from_secs(5);

/// What the receiver of a standby says.
const RECEIVER: &str = "
    select pg_is_in_recovery() as in_recovery, r.status, r.received_tli as timeline, r.sender_host as host,
           r.sender_port as port, r.slot_name::text as slot, pg_last_wal_replay_lsn()::text as replayed
    from (select 1) one left join pg_stat_wal_receiver r on true";

impl Local {
    /// Whether this instance streams from the holder on that timeline; what it says if so.
    pub(crate) async fn streams_from(
        &self,
        holder: &SiteId,
        timeline: u32,
        until: Deadline,
    ) -> Result<Option<String>, PlaneError> {
        let row = self.own.one(until, "read the receiver", RECEIVER, &[]).await?;
        let to = self.address(holder)?;
        let text = |column| db::get::<Option<&str>>(&row, column).map(Option::unwrap_or_default);
        let there =
            text("host")? == to.host && db::get::<Option<i32>>(&row, "port")? == Some(i32::from(to.port));
        let on: Option<i32> = db::get(&row, "timeline")?;
        let streams = db::get::<bool>(&row, "in_recovery")?
            && text("status")? == "streaming"
            && on == Some(timeline.cast_signed())
            && text("slot")? == Self::name_of(&self.site);
        if !(streams && there) {
            return Ok(None);
        }
        let replayed = shown(db::lsn(&row, "replayed")?);
        Ok(Some(format!("streams from {holder} ({to}) on timeline {timeline}, replayed {replayed}")))
    }

    /// Whether this site follows the holder and readers are let in.
    pub(crate) async fn probe_follow(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        if self.postmaster().is_none() || self.marks.get()?.fence.is_some() {
            return Ok(Progress::NotYet);
        }
        let holder = Snapshot::read(&self.other, until).await?;
        let streams = self.streams_from(act.new_holder(), holder.timeline, until).await?;
        Ok(streams.map_or(Progress::NotYet, |seen| Progress::Done(Evidence::already(seen))))
    }

    /// Makes this instance a standby of the new holder: started where it stopped, or rewound where it must be.
    ///
    /// Errors: `Refused` when the other site is no primary; `Failed` when neither way led to a stream.
    pub(crate) async fn follow(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mark = mark_of(by)?;
        let holder = act.new_holder();
        let _one = self.role_lock(until).await?;
        let there = self.holder_is_primary(holder, until).await?;
        ensure_slot(&self.other, &self.site, until).await?;
        let begun = tokio::time::Instant::now();
        let mut how = "streamed on";
        let mut seen = None;
        if self.postmaster().is_some() && !self.marks.get()?.rebuilding {
            seen = self.streams_from(holder, there.timeline, until).await?;
        }
        let already = seen.is_some();
        if seen.is_none() && !self.must_be_rebuilt(act, until).await? {
            how = "started as it stopped";
            let half = Deadline::within(until.left() / 2);
            let soon = Deadline(half.0.min(Deadline::within(STREAM_LIMIT).0));
            match self.start_standby(holder, there.timeline, soon).await {
                Ok(now) => seen = Some(now),
                Err(why) => tracing::warn!(%why, "the old primary does not follow as it is; it is rewound"),
            }
        }
        if seen.is_none() {
            how = self.rebuild(act, holder, there.timeline, until).await?;
            seen = Some(self.start_standby(holder, there.timeline, until).await?);
        }
        self.stand_open(mark.epoch, until).await?;
        let seen = format!("{how}: {} after {:.1?}", seen.unwrap_or_default(), begun.elapsed());
        Ok(if already { Evidence::already(seen) } else { Evidence::changed(seen) })
    }

    /// The other site's instance, which must be a primary of the same cluster.
    pub(crate) async fn holder_is_primary(
        &self,
        holder: &SiteId,
        until: Deadline,
    ) -> Result<Snapshot, PlaneError> {
        if *holder != self.peer {
            return Err(PlaneError::refused(
                "DC-0332",
                format!("{holder} cannot be followed from {}", self.site),
            ));
        }
        let there = Snapshot::read(&self.other, until).await?;
        if there.in_recovery {
            return Err(PlaneError::refused("DC-0303", format!("{holder} is in recovery; it is no primary")));
        }
        let control = self.control(until).await?;
        if control.system_id != there.system_id {
            let why =
                format!("system identifier {} here, {} at {holder}", control.system_id, there.system_id);
            return Err(PlaneError::refused("DC-0304", why));
        }
        Ok(there)
    }

    /// Whether the data directory holds what the new holder's history does not, by its control file.
    async fn must_be_rebuilt(&self, act: &Act, until: Deadline) -> Result<bool, PlaneError> {
        if self.marks.get()?.rebuilding {
            return Ok(true);
        }
        self.come_down(until).await?;
        let control = self.control(until).await?;
        Ok(match control.state {
            // a standby that only replayed; whether it replayed too much shows when it does not stream
            State::ShutDownInRecovery | State::InArchiveRecovery => false,
            _ => !stopped_at_token(act, &control),
        })
    }

    /// Stops whatever runs here, hard if it must be: the other site holds the group.
    pub(crate) async fn come_down(&self, until: Deadline) -> Result<(), PlaneError> {
        let soon = Deadline(until.0.min(Deadline::within(QUIET_STOP).0));
        if self.stop(Stop::Fast, soon).await.is_ok() {
            return Ok(());
        }
        self.stop(Stop::Immediate, until).await
    }

    /// Starts as standby of the holder and waits until it streams.
    pub(crate) async fn start_standby(
        &self,
        holder: &SiteId,
        timeline: u32,
        until: Deadline,
    ) -> Result<String, PlaneError> {
        self.come_down(until).await?;
        self.start(Part::Standby(holder), until).await?;
        let what = format!("{} streams from {holder} on timeline {timeline}", self.site);
        wait_until(until, LOOK_EVERY, &what, || self.streams_from(holder, timeline, until)).await
    }

    /// Readers are let in at a proven standby; what a run left here of an epoch not above this one ends.
    async fn stand_open(&self, epoch: dc_core::ids::Epoch, until: Deadline) -> Result<(), PlaneError> {
        self.restore_delays(until).await?;
        let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots
                   where slot_name = $1 and not active";
        let name = Self::name_of(&self.peer);
        // it would keep log here for ever: the site that used it is followed now
        self.own.all(until, "drop the unused slot", sql, &[(&name, Type::TEXT)]).await?;
        let later = move |marks: &crate::marks::Marks| {
            let held = marks.fence.as_ref().filter(|held| held.epoch > epoch)?;
            Some(PlaneError::refused(
                "DC-0331",
                format!("run {} holds a fence of epoch {}", held.run, held.epoch),
            ))
        };
        self.open_door(later, until).await?;
        self.marks.update(move |m| (m.fence, m.pre_sync, m.self_closed) = (None, None, false)).await
    }
}

/// Whether the old primary lies exactly where the run stopped it.
fn stopped_at_token(act: &Act, control: &Control) -> bool {
    act.direction == Direction::Forward
        && control.state == State::ShutDown
        && act.shutdown().is_some_and(|token| {
            (token.system_id, token.timeline, token.checkpoint)
                == (control.system_id, control.timeline, control.checkpoint)
        })
}
