//! What the instance is now, in one question over a session that stays open.

use dc_core::act::Finding;
use dc_core::ids::PlaneKind;
use dc_core::position::{Lag, LagUnit};
use dc_plane::{Deadline, Depth, PlaneError, PlaneFacts, Role};
use tokio_postgres::types::Type;

use crate::db;
use crate::local::Local;

const SHALLOW: &str = "
    select pg_is_in_recovery() as in_recovery, current_setting('synchronous_standby_names') as names,
      (case when pg_is_in_recovery() then greatest((select timeline_id from pg_control_checkpoint()),
           (select min_recovery_end_timeline from pg_control_recovery()), coalesce(r.received_tli, 0))
       else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end)::int as timeline,
      coalesce(r.status = 'streaming', false) as streaming,
      greatest(pg_wal_lsn_diff(greatest(r.latest_end_lsn, pg_last_wal_receive_lsn()), pg_last_wal_replay_lsn()), 0)::bigint
        as behind,
      (extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000)::bigint as replay_age,
      (extract(epoch from clock_timestamp() - r.last_msg_receipt_time) * 1000)::bigint as heard_age,
      (select state || ' ' || sync_state from pg_stat_replication where application_name = $1 limit 1) as peer
    from (select 1) one left join pg_stat_wal_receiver r on true";

impl Local {
    /// Reads what the instance is. Changes nothing.
    ///
    /// Errors: `Unreachable` or `TimedOut` when it runs and does not answer; a stopped one is a fact.
    pub(crate) async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        let marks = self.marks.get()?;
        let mut facts = PlaneFacts {
            plane: PlaneKind::Postgres,
            role: Some(Role::Down),
            lag: None,
            summary: "down".to_owned(),
            findings: Vec::new(),
        };
        if let Some(held) = &marks.fence {
            facts.findings.push(self.says("DC-0331", false, format!("run {} holds a fence here", held.run)));
        }
        if marks.rebuilding {
            facts.findings.push(self.says("DC-0329", true, "a rewind began and did not end".to_owned()));
        }
        if self.postmaster().is_none() {
            let control = self.control(until).await?;
            facts.summary =
                format!("down; control file says {:?}, timeline {}", control.state.word(), control.timeline);
            return Ok(facts);
        }
        let peer = Self::name_of(&self.peer);
        let row = self.watch.one(until, "observe", SHALLOW, &[(&peer, Type::TEXT)]).await?;
        let shut = self.door_is_shut()?.unwrap_or(false);
        let timeline: i32 = db::get(&row, "timeline")?;
        let door = if shut { ", door shut" } else { "" };
        if !db::get::<bool>(&row, "in_recovery")? {
            facts.role = Some(if shut { Role::Closed } else { Role::Writable });
            let stands: Option<&str> = db::get(&row, "peer")?;
            let follower = stands
                .map_or_else(|| format!("{} does not follow", self.peer), |s| format!("{} {s}", self.peer));
            facts.summary = format!("primary, timeline {timeline}{door}; {follower}");
            if stands.is_none() {
                facts.findings.push(self.says("DC-0305", true, follower));
            }
            return Ok(facts);
        }
        let streaming: bool = db::get(&row, "streaming")?;
        facts.role = Some(if streaming { Role::Following } else { Role::Closed });
        if streaming {
            let behind: Option<i64> = db::get(&row, "behind")?;
            let amount = behind.and_then(|b| u64::try_from(b).ok());
            let age: Option<i64> = db::get(&row, if amount == Some(0) { "heard_age" } else { "replay_age" })?;
            let age_ms = age.and_then(|a| u64::try_from(a).ok());
            facts.lag = amount.map(|amount| Lag {
                amount,
                unit: LagUnit::Bytes,
                age_ms: if amount == 0 { Some(0) } else { age_ms },
            });
            let heard = age_ms.map_or_else(String::new, |a| {
                format!(", {} {a} ms ago", if amount == Some(0) { "heard" } else { "newest commit" })
            });
            facts.summary = format!("streaming from {}, timeline {timeline}{door}{heard}", self.peer);
        } else {
            facts.summary = format!("in recovery and receives nothing, timeline {timeline}{door}");
            facts.findings.push(self.says("DC-0305", true, format!("no log is received from {}", self.peer)));
        }
        if depth == Depth::Deep && streaming {
            self.lag_by_the_primary(&mut facts, until).await;
        }
        Ok(facts)
    }

    /// The exact lag, as the primary's own end of log shows it; the receiver only knows what it was told last.
    async fn lag_by_the_primary(&self, facts: &mut PlaneFacts, until: Deadline) {
        let sql =
            "select case when pg_is_in_recovery() then null else pg_current_wal_flush_lsn() end::text as end";
        let Ok(there) = self.other.one(until, "ask the primary", sql, &[]).await else {
            facts.findings.push(self.says(
                "DC-0302",
                false,
                format!("{} cannot be asked for its end of log", self.peer),
            ));
            return;
        };
        let sql = "select pg_last_wal_replay_lsn()::text as replayed";
        let Ok(here) = self.watch.one(until, "observe", sql, &[]).await else { return };
        if let (Ok(Some(end)), Ok(Some(replayed))) = (db::lsn(&there, "end"), db::lsn(&here, "replayed")) {
            let amount = end.0.saturating_sub(replayed.0);
            let age_ms = if amount == 0 { Some(0) } else { facts.lag.and_then(|l| l.age_ms) };
            facts.lag = Some(Lag { amount, unit: LagUnit::Bytes, age_ms });
        }
    }

    fn says(&self, code: &str, blocking: bool, text: String) -> Finding {
        let (code, site) = (code.to_owned(), self.site.clone());
        Finding { code, plane: Some(PlaneKind::Postgres), site, blocking, text }
    }
}
