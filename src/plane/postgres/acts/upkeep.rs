//! Between runs: the holder serves, the standby follows, a site whose lease ends closes itself; and the canary.

use std::sync::Arc;
use std::time::Duration;

use dc_core::act::{Act, Evidence, Progress};
use dc_core::authority::{Authority, Origin};
use dc_plane::{Deadline, PlaneError, wait_until};
use tokio_postgres::types::Type;

use crate::acts::must_open;
use crate::db;
use crate::local::{Local, Part, Stop};

/// How long a self-fence gives sessions to end before it stops the instance hard.
const CLOSE_GENTLY: Duration = Duration::from_millis(1500);
/// How often the standby is asked for the canary.
const LOOK_EVERY: Duration = Duration::from_millis(5);

impl Local {
    /// A committed row of our own, seen at the standby.
    pub(crate) async fn verify(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if self.site != *act.new_holder() {
            return Err(PlaneError::refused(
                "DC-0332",
                format!("verify is for {}, the holder", act.new_holder()),
            ));
        }
        self.ensure_tables(until).await?;
        let id = crate::door::fresh_nonce();
        let site = self.site.as_str();
        let begun = tokio::time::Instant::now();
        let sql = "with old as (delete from dcswitch.canary where written_at < now() - interval '1 hour')
                   insert into dcswitch.canary (id, site) values ($1, $2)";
        self.own.all(until, "write a canary", sql, &[(&id, Type::TEXT), (&site, Type::TEXT)]).await?;
        let wrote = begun.elapsed();
        let sql =
            "select pg_is_in_recovery() and exists (select from dcswitch.canary where id = $1) as there";
        wait_until(until, LOOK_EVERY, "the canary is seen at the standby", || async {
            let row = self.other.one(until, "look for the canary", sql, &[(&id, Type::TEXT)]).await?;
            Ok(db::get::<bool>(&row, "there")?.then_some(()))
        })
        .await?;
        Ok(Evidence::changed(format!(
            "canary committed in {wrote:.1?}, seen at standby {} after {:.1?}",
            self.peer,
            begun.elapsed()
        )))
    }

    /// Closes this site: the instance stops, by force if it must. Needs nobody's leave.
    pub(crate) async fn self_close(&self, until: Deadline) -> Result<Evidence, PlaneError> {
        let Some(postmaster) = self.postmaster() else {
            return Ok(Evidence::already("no postmaster runs; nothing is acknowledged"));
        };
        let begun = tokio::time::Instant::now();
        let gently = Deadline(until.0.min(Deadline::within(CLOSE_GENTLY.min(until.left() / 2)).0));
        // no lock: whoever holds it cannot keep this site open
        let stopped = self.stop(Stop::Fast, gently).await;
        let how = if stopped.is_ok() { "stopped" } else { "stopped hard" };
        if stopped.is_err() {
            self.stop(Stop::Immediate, until).await?;
        }
        self.marks.update(move |m| m.self_closed = true).await?;
        Ok(Evidence::changed(format!("{how} in {:.1?}; process {} is gone", begun.elapsed(), postmaster.pid)))
    }

    /// Whether nothing of this instance can acknowledge a write.
    pub(crate) fn probe_self_close(&self) -> Progress {
        match self.postmaster() {
            None => Progress::Done(Evidence::already("no postmaster runs; nothing is acknowledged")),
            Some(_) => Progress::NotYet,
        }
    }

    /// Upkeep of the holder: runs as primary with its door open, unless a run's fence stands.
    ///
    /// Never promotes, and never lifts a run's fence.
    /// Errors: `Refused` when it would have to open and may not, or the data directory is a standby's.
    pub(crate) async fn serve(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let marks = self.marks.get()?;
        if let Some(held) = marks.fence {
            return Ok(Evidence::already(format!("left alone: run {} holds a fence here", held.run)));
        }
        let mut changed = Vec::new();
        if self.postmaster().is_none() {
            must_open(by)?;
        }
        changed.extend(self.ensure_primary(until).await?.map(|started| started.seen));
        let sql = "select pg_is_in_recovery() as in_recovery, current_setting('synchronous_standby_names') as names";
        let row = self.own.one(until, "read the role", sql, &[]).await?;
        if db::get::<bool>(&row, "in_recovery")? {
            let why = format!("{} holds the group and its instance is in recovery", self.site);
            return Err(PlaneError::refused("DC-0303", why));
        }
        // what an open run set is the run's to take back
        let names: &str = db::get(&row, "names")?;
        let left = marks.pre_sync.is_none() && names.contains(&Self::name_of(&self.peer));
        if left && self.clear_names(until).await? {
            changed.push("synchronous names that no run set cleared".to_owned());
        }
        if marks.delays.is_some() && self.restore_delays(until).await? {
            changed.push("replay delays given back".to_owned());
        }
        if self.door_is_shut()? != Some(false) {
            must_open(by)?;
            self.epoch_is_ours(act, by, until).await?;
            self.open_door(no_fence, until).await?;
            self.marks.update(move |m| m.self_closed = false).await?;
            changed.push(format!("door opened; {}", self.knock_all(until).await?));
        }
        Ok(if changed.is_empty() {
            Evidence::already("primary, door open")
        } else {
            Evidence::changed(changed.join("; "))
        })
    }

    /// The database was not carried past this epoch by another site.
    async fn epoch_is_ours(&self, act: &Act, by: &Authority, until: Deadline) -> Result<(), PlaneError> {
        let (Origin::Reopen { epoch } | Origin::Step { epoch, .. }) = by.origin() else { return Ok(()) };
        self.ensure_tables(until).await?;
        let sql = "select incarnation, counter, site from dcswitch.epoch where group_name = $1
                   order by incarnation desc, counter desc limit 1";
        let group = act.group.as_str();
        let rows = self.own.all(until, "read the epoch row", sql, &[(&group, Type::TEXT)]).await?;
        let Some(row) = rows.first() else { return Ok(()) }; // founding holder: no takeover yet
        let (incarnation, counter): (i64, i64) = (db::get(row, "incarnation")?, db::get(row, "counter")?);
        let ours = (i64::from(epoch.incarnation), i64::try_from(epoch.counter).unwrap_or(i64::MAX));
        if (incarnation, counter) <= ours {
            return Ok(());
        }
        let site: &str = db::get(row, "site")?;
        let why = format!(
            "the database carries epoch {incarnation}.{counter} of {site}, this site was told {epoch}"
        );
        Err(PlaneError::refused("DC-0330", why))
    }

    /// Starts a standby that died during a run, so that taking the run back waits for nobody.
    ///
    /// Does nothing at the source, whose instance is started by the undo of its fence. Repeat: safe.
    pub(crate) async fn revive(&self, act: &Act, until: Deadline) -> Result<(), PlaneError> {
        if self.site != act.target || self.postmaster().is_some() {
            return Ok(());
        }
        let _one = self.role_lock(until).await?;
        if self.postmaster().is_none() {
            self.start(Part::Standby(&act.source), until).await?;
        }
        Ok(())
    }

    /// Upkeep of a standby: runs and follows the holder. Cheap when all is well.
    ///
    /// Never rewinds: what diverged is a matter of a run. Errors: `Refused` while a rebuild is unfinished.
    pub(crate) async fn stand(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let holder = &act.source;
        if *holder == self.site {
            return Err(PlaneError::refused(
                "DC-0332",
                format!("{holder} holds the group; it does not stand"),
            ));
        }
        let fenced = self.marks.get()?.fence;
        let mut changed = Vec::new();
        let sql = "select pg_is_in_recovery() as in_recovery";
        let recovering = match self.postmaster() {
            Some(_) => {
                Some(db::get::<bool>(&self.own.one(until, "read the role", sql, &[]).await?, "in_recovery")?)
            }
            None => None,
        };
        if recovering != Some(true) {
            if let Some(held) = &fenced {
                return Ok(Evidence::already(format!("left alone: run {} holds a fence here", held.run)));
            }
            let _one = self.role_lock(until).await?;
            if recovering == Some(false) {
                self.come_down(until).await?;
                changed.push("was primary while another site holds the group: stopped".to_owned());
            }
            if self.postmaster().is_none() {
                self.start(Part::Standby(holder), until).await?;
                changed.push(format!("started as standby of {holder}"));
            }
        }
        if fenced.is_none() && self.door_is_shut()? != Some(false) {
            // readers only: this instance is in recovery
            self.open_door(no_fence, until).await?;
            self.marks.update(move |m| m.self_closed = false).await?;
            changed.push("readers let in".to_owned());
        }
        Ok(if changed.is_empty() {
            Evidence::already(format!("standby of {holder}, in recovery"))
        } else {
            Evidence::changed(changed.join("; "))
        })
    }
}

/// Refuses to open while a run's fence stands.
fn no_fence(marks: &crate::marks::Marks) -> Option<PlaneError> {
    let held = marks.fence.as_ref()?;
    Some(PlaneError::refused("DC-0331", format!("run {} holds a fence here", held.run)))
}

/// Undo of the self-fence: serve again, with the right to.
pub(crate) async fn reopen(
    local: &Arc<Local>,
    act: &Act,
    by: &Authority,
    until: Deadline,
) -> Result<Evidence, PlaneError> {
    must_open(by)?;
    local.serve(act, by, until).await
}
