//! One reading of an instance, ours or the other site's, through SQL.

use std::collections::BTreeMap;

use dc_plane::{Deadline, PlaneError};

use crate::db::{self, Db};

/// What an instance is and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    /// Identity of the database cluster.
    pub system_id: u64,
    /// Whether it is in recovery, and so takes no writes.
    pub in_recovery: bool,
    /// The timeline it writes, receives or replays.
    pub timeline: u32,
    /// Settings by name, in the server's base units.
    pub settings: BTreeMap<String, String>,
}

/// The timeline of a standby is the highest that its control file or its receiver names: every restart point and
/// every flush of the replayed position writes it.
const READ: &str = "
select (select system_identifier::text from pg_control_system()) as system_id,
       pg_is_in_recovery() as in_recovery,
       (case when pg_is_in_recovery() then greatest(
            (select timeline_id from pg_control_checkpoint()),
            (select min_recovery_end_timeline from pg_control_recovery()),
            (select coalesce(max(received_tli), 0) from pg_stat_wal_receiver))
        else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end)::int as timeline,
       (select jsonb_object_agg(name, setting)::text from pg_settings) as settings";

impl Snapshot {
    /// Reads an instance. Repeat: safe, reads only. Errors: as any statement.
    pub async fn read(db: &Db, until: Deadline) -> Result<Self, PlaneError> {
        let row = db.one(until, "read the instance", READ, &[]).await?;
        let fail = |why: String| PlaneError::Failed { what: "read the instance".into(), why };
        let system_id =
            db::get::<&str>(&row, "system_id")?.parse::<i64>().map_err(|e| fail(e.to_string()))?;
        let settings =
            serde_json::from_str(db::get::<&str>(&row, "settings")?).map_err(|e| fail(e.to_string()))?;
        Ok(Self {
            system_id: system_id.cast_unsigned(),
            in_recovery: db::get(&row, "in_recovery")?,
            timeline: db::get::<i32>(&row, "timeline")?.cast_unsigned(),
            settings,
        })
    }

    /// A setting; empty when the server has none of that name.
    pub fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// A setting that is a number.
    pub fn number(&self, name: &str) -> i64 {
        self.setting(name).parse().unwrap_or(0)
    }
}
