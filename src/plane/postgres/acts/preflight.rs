//! Preflight and recheck: everything that forbids a move, all at once, nothing changed.

use dc_core::act::{Act, Evidence, Finding, Outcome};
use dc_core::ids::{PlaneKind, SiteId};
use dc_plane::{Deadline, PlaneError};
use tokio_postgres::types::Type;

use crate::acts::at_source;
use crate::control::State;
use crate::db;
use crate::instance::Snapshot;
use crate::local::Local;
use crate::procs::SERVER_WORDS;

/// Findings as they are collected at one site.
struct Report {
    site: SiteId,
    found: Vec<Finding>,
}

impl Report {
    fn add(&mut self, code: &str, blocking: bool, text: impl Into<String>) {
        self.found.push(Finding {
            code: code.to_owned(),
            plane: Some(PlaneKind::Postgres),
            site: self.site.clone(),
            blocking,
            text: text.into(),
        });
    }
    fn block(&mut self, code: &str, text: impl Into<String>) {
        self.add(code, true, text);
    }
    fn note(&mut self, code: &str, text: impl Into<String>) {
        self.add(code, false, text);
    }
}

/// Settings that a standby must have at least as large as its primary, or replay stops.
const AT_LEAST: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

impl Local {
    /// Reads both ends of the link and says everything that forbids a move.
    ///
    /// `again` is the recheck just before the fence: replay must then wait for nobody.
    /// Errors: none of what is found; only what keeps the findings from being told.
    pub(crate) async fn preflight(
        &self,
        act: &Act,
        again: bool,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mut report = Report { site: self.site.clone(), found: Vec::new() };
        let mut timeline = None;
        self.check_host(&mut report);
        match Snapshot::read(&self.own, until).await {
            Err(e) => report.block("DC-0301", format!("{}: {e}", self.own.place())),
            Ok(own) => {
                timeline = Some(own.timeline);
                if let Err(e) = self.check_instance(act, &own, &mut report, until).await {
                    report.block("DC-0301", format!("a check could not be made: {e}"));
                }
                match Snapshot::read(&self.other, until).await {
                    Err(e) => {
                        report.block("DC-0302", format!("{} of {}: {e}", self.other.place(), self.peer));
                    }
                    Ok(other) => self.compare(&own, &other, &mut report),
                }
                let role = if at_source(act) {
                    self.check_source(act, &own, &mut report, until).await
                } else {
                    self.check_target(act, &own, again, &mut report, until).await
                };
                if let Err(e) = role {
                    report.block("DC-0301", format!("a check could not be made: {e}"));
                }
            }
        }
        let blocking = report.found.iter().filter(|f| f.blocking).count();
        let seen = format!(
            "{} findings, {blocking} of them blocking; timeline {}",
            report.found.len(),
            timeline.map_or_else(|| "unknown".to_owned(), |t| t.to_string())
        );
        let mut evidence = Evidence::already(seen).with(Outcome::Findings(report.found));
        if let Some(timeline) = timeline {
            evidence = evidence.with(Outcome::Timeline(timeline));
        }
        Ok(evidence)
    }

    /// What this host must allow the driver.
    fn check_host(&self, report: &mut Report) {
        use std::os::unix::fs::MetadataExt;
        let me = rustix::process::geteuid().as_raw();
        for path in [self.config.data_dir.clone(), self.rules()] {
            match std::fs::metadata(&path) {
                Err(e) => report.block("DC-0320", format!("{}: {e}", path.display())),
                Ok(meta) if meta.uid() != me => report.block(
                    "DC-0320",
                    format!("{} belongs to user {}, the agent runs as {me}", path.display(), meta.uid()),
                ),
                Ok(_) => {}
            }
        }
    }

    /// What holds for either role: files, grants, names.
    async fn check_instance(
        &self,
        act: &Act,
        own: &Snapshot,
        report: &mut Report,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let version = own.number("server_version_num") / 10_000;
        if !(13..=18).contains(&version) {
            report.block("DC-0322", format!("PostgreSQL {version}; this version moves 13 to 18"));
        }
        let rules = self.rules();
        if own.setting("hba_file") != rules.display().to_string() {
            report.block(
                "DC-0320",
                format!("the server reads {}, the agent writes {}", own.setting("hba_file"), rules.display()),
            );
        }
        for name in ["wal_log_hints", "data_checksums"] {
            if own.setting(name) == "on" {
                break;
            }
            if name == "data_checksums" {
                report.block(
                    "DC-0310",
                    "neither wal_log_hints nor data checksums are on; no rewind would be possible",
                );
            }
        }
        if own.setting("full_page_writes") != "on" {
            report.block("DC-0310", "full_page_writes is off; no rewind would be possible");
        }
        let marks = self.marks.get()?;
        if let Some(held) = marks.fence.filter(|held| Some(&held.run) != act.run.as_ref()) {
            report.block(
                "DC-0331",
                format!("run {} still holds a fence here (epoch {})", held.run, held.epoch),
            );
        }
        self.check_grants(own, report, until).await?;
        self.check_names(report, until).await
    }

    async fn check_grants(
        &self,
        own: &Snapshot,
        report: &mut Report,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let version = own.number("server_version_num") / 10_000;
        let sql = "
            with r(super, sender) as (select rolsuper, rolreplication from pg_roles where rolname = current_user)
            select missing from (
              select 'role pg_monitor' as missing where not pg_has_role(current_user, 'pg_monitor', 'usage')
              union all select 'attribute replication' from r where not super and not sender
              union all select 'execute on pg_promote'
                where not has_function_privilege('pg_promote(boolean, integer)', 'execute')
              union all select 'create on database ' || current_database()
                where to_regnamespace('dcswitch') is null
                  and not has_database_privilege(current_database(), 'create')
              union all select 'replication role ' || $1 || ' with attribute replication'
                where not exists (select from pg_roles where rolname = $1 and rolreplication)
              union all select 'execute on ' || f || ' for ' || $1
                from unnest(array['pg_ls_dir(text, boolean, boolean)', 'pg_stat_file(text, boolean)',
                  'pg_read_binary_file(text)', 'pg_read_binary_file(text, bigint, bigint, boolean)']) f
                where exists (select from pg_roles where rolname = $1)
                  and not has_function_privilege($1, f, 'execute')) m";
        let rows =
            self.own.all(until, "read grants", sql, &[(&self.config.replication_user, Type::TEXT)]).await?;
        let mut missing =
            rows.iter().map(|r| db::get::<String>(r, "missing")).collect::<Result<Vec<_>, _>>()?;
        if version >= 15 {
            let sql = "
                select 'role pg_checkpoint' as missing where not pg_has_role(current_user, 'pg_checkpoint', 'usage')
                union all select 'alter system on parameter ' || p
                  from unnest(array['synchronous_standby_names', 'max_standby_streaming_delay',
                    'max_standby_archive_delay']) p
                  where not has_parameter_privilege(p, 'alter system')";
            for row in self.own.all(until, "read grants", sql, &[]).await? {
                missing.push(db::get(&row, "missing")?);
            }
        }
        if !missing.is_empty() {
            report.block("DC-0321", format!("role {} lacks: {}", self.config.user, missing.join("; ")));
        }
        Ok(())
    }

    /// Databases and roles of the spec exist; no role looks like a server process.
    async fn check_names(&self, report: &mut Report, until: Deadline) -> Result<(), PlaneError> {
        let words: Vec<String> = SERVER_WORDS
            .iter()
            .chain(&["walsender", "stats", "parallel", "bgworker"])
            .map(|w| (*w).to_owned())
            .collect();
        let like_us = [&self.config.user, &self.config.replication_user].map(|user| format!("{user} %"));
        let sql = "
            select 'DC-0321' as code, 'database ' || d || ' does not exist' as text from unnest($1::text[]) d
              where not exists (select from pg_database where datname = d)
            union all select 'DC-0321', 'role ' || r || ' does not exist' from unnest($2::text[]) r
              where not exists (select from pg_roles where rolname = r)
            union all select 'DC-0333', 'role ' || quote_ident(rolname) || ' looks like a server process' from pg_roles
              where rolname = any($3::text[]) or rolname like any($4::text[])";
        let like_us = like_us.to_vec();
        let with: [db::Bound<'_>; 4] = [
            (&self.databases, Type::TEXT_ARRAY),
            (&self.app_roles, Type::TEXT_ARRAY),
            (&words, Type::TEXT_ARRAY),
            (&like_us, Type::TEXT_ARRAY),
        ];
        for row in self.own.all(until, "read names", sql, &with).await? {
            report.block(db::get(&row, "code")?, db::get::<&str>(&row, "text")?);
        }
        Ok(())
    }

    fn compare(&self, own: &Snapshot, other: &Snapshot, report: &mut Report) {
        if own.system_id != other.system_id {
            report.block(
                "DC-0304",
                format!("system identifier {} here, {} at {}", own.system_id, other.system_id, self.peer),
            );
        }
        let major = |s: &Snapshot| s.number("server_version_num") / 10_000;
        if major(own) != major(other) {
            report.block(
                "DC-0322",
                format!("PostgreSQL {} here, {} at {}", major(own), major(other), self.peer),
            );
        }
        if own.in_recovery == other.in_recovery {
            let what = if own.in_recovery { "in recovery" } else { "primaries" };
            report.block("DC-0303", format!("both instances are {what}"));
        }
        let (standby, primary) = if own.in_recovery { (own, other) } else { (other, own) };
        if own.in_recovery {
            for name in AT_LEAST.iter().filter(|n| standby.number(n) < primary.number(n)) {
                report.block(
                    "DC-0309",
                    format!(
                        "{name} is {} here, {} at {}",
                        standby.number(name),
                        primary.number(name),
                        self.peer
                    ),
                );
            }
            if standby.timeline != primary.timeline {
                report.block(
                    "DC-0305",
                    format!("timeline {} here, {} at {}", standby.timeline, primary.timeline, self.peer),
                );
            }
        }
    }

    async fn check_source(
        &self,
        act: &Act,
        own: &Snapshot,
        report: &mut Report,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        if own.in_recovery {
            report.block("DC-0303", "the source is in recovery; it is no primary");
            return Ok(());
        }
        let names = own.setting("synchronous_standby_names");
        if !names.is_empty() && !names.contains(&Self::name_of(&act.target)) {
            report.block(
                "DC-0317",
                format!("synchronous_standby_names is {names:?}, which is not ours to change"),
            );
        }
        self.check_senders(act, report, until).await?;
        let sql = "
            select 'DC-0311' as code, true as blocking, 'a base backup runs (process ' || pid || ')' as text
              from pg_stat_progress_basebackup
            union all select 'DC-0312', true, 'prepared transaction ' || gid || ' of ' || owner || ' in ' || database
              from pg_prepared_xacts
            union all select 'DC-0313', true, 'logical slot ' || slot_name || ' in ' || coalesce(database, '?')
              from pg_replication_slots where slot_type = 'logical'
            union all select 'DC-0316', true, 'synchronous_commit=' || split_part(c, '=', 2) || ' set for '
                || coalesce('role ' || r.rolname, 'all roles') || ' in ' || coalesce('database ' || d.datname, 'all databases')
              from pg_db_role_setting s cross join unnest(s.setconfig) c
              left join pg_roles r on r.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
              where c ~* '^synchronous_commit=(off|local|false|no|0)$'
            union all select 'DC-0318', true, 'subscription ' || subname || ' writes here'
              from pg_subscription where subenabled";
        for row in self.own.all(until, "read what forbids a stop", sql, &[]).await? {
            report.add(db::get(&row, "code")?, db::get(&row, "blocking")?, db::get::<&str>(&row, "text")?);
        }
        if ["off", "local"].contains(&own.setting("synchronous_commit")) {
            report.block(
                "DC-0316",
                format!("synchronous_commit={} for the server", own.setting("synchronous_commit")),
            );
        }
        Ok(())
    }

    /// The target streams, by name, once, and close enough; others are named.
    async fn check_senders(&self, act: &Act, report: &mut Report, until: Deadline) -> Result<(), PlaneError> {
        let name = Self::name_of(&act.target);
        let sql = "
            select pid, coalesce(usename, '?')::text as role, application_name as name, coalesce(state, '?') as state,
                   coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn), -1)::bigint as lag
            from pg_stat_replication";
        let mut streams = 0;
        for row in self.own.all(until, "read standbys", sql, &[]).await? {
            let (who, state): (&str, &str) = (db::get(&row, "name")?, db::get(&row, "state")?);
            if who != name {
                let role: &str = db::get(&row, "role")?;
                let text = format!(
                    "{who} (role {role}, {state}) also reads the log; it is ended and does not follow"
                );
                report.note("DC-0314", text);
                continue;
            }
            if state != "streaming" {
                report.block("DC-0305", format!("{} is connected as {name} and is {state}", act.target));
                continue;
            }
            streams += 1;
            let lag: i64 = db::get(&row, "lag")?;
            let limit = self.policy.lag_bytes_max;
            if u64::try_from(lag).is_ok_and(|lag| lag > limit) {
                report.block(
                    "DC-0306",
                    format!("{} lags {lag} bytes, limit {limit} (policy.lag_bytes_max)", act.target),
                );
            }
        }
        match streams {
            1 => {}
            0 => report
                .block("DC-0305", format!("{} does not stream from {} as {name}", act.target, self.site)),
            n => report
                .block("DC-0305", format!("{n} standbys stream as {name}; one name must be one standby")),
        }
        Ok(())
    }

    async fn check_target(
        &self,
        act: &Act,
        own: &Snapshot,
        again: bool,
        report: &mut Report,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        if !own.in_recovery {
            report.block("DC-0303", "the target is not in recovery; it is no standby");
            return Ok(());
        }
        if let Ok(control) = self.control(until).await
            && !matches!(control.state, State::InArchiveRecovery | State::ShutDownInRecovery)
        {
            report.note("DC-0303", format!("the control file says {:?}", control.state.word()));
        }
        let delay = own.number("recovery_min_apply_delay");
        if delay > 0 {
            report.block("DC-0308", format!("recovery_min_apply_delay is {delay} ms"));
        }
        let sql = "
            select pg_is_wal_replay_paused() as paused,
              (select count(*) from pg_stat_wal_receiver where status = 'streaming') as receivers,
              coalesce(pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), 0)::bigint as waiting,
              (select wait_event from pg_stat_activity where backend_type = 'startup') as event,
              (select wait_event_type from pg_stat_activity where backend_type = 'startup') as kind,
              (select count(*) from pg_replication_slots) as slots,
              exists (select from pg_replication_slots where slot_name = $1) as slot";
        let name = Self::name_of(&act.source);
        let row = self.own.one(until, "read replay", sql, &[(&name, Type::TEXT)]).await?;
        if db::get::<bool>(&row, "paused")? {
            report.block("DC-0307", "replay is paused");
        }
        if db::get::<i64>(&row, "receivers")? != 1 {
            report.block("DC-0305", format!("no log is received from {}", act.source));
        }
        let (slots, limit) = (db::get::<i64>(&row, "slots")?, own.number("max_replication_slots"));
        if !db::get::<bool>(&row, "slot")? && slots >= limit {
            report.block(
                "DC-0315",
                format!("all {limit} replication slots are taken; {} needs one here", act.source),
            );
        }
        let event: Option<&str> = db::get(&row, "event")?;
        let kind: Option<&str> = db::get(&row, "kind")?;
        let stalled = kind == Some("Lock")
            || event.is_some_and(|e| e.starts_with("RecoveryConflict") || e == "BufferPin");
        if again && stalled {
            let waiting: i64 = db::get(&row, "waiting")?;
            report.block(
                "DC-0319",
                format!("replay waits ({}) with {waiting} bytes to go", event.unwrap_or("lock")),
            );
        }
        Ok(())
    }
}
