//! What the metadata database says. Its health endpoint is no witness: it answers "healthy" for a
//! read-only database, and for a scheduler of the other site.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_core::position::Lsn;
use dc_plane::{Deadline, PlaneError};
use tokio_postgres::{Client, NoTls};

/// A scheduler's row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scheduler {
    pub(crate) id: i32,
    pub(crate) host: String,
    /// How long ago it started, by the database's clock.
    pub(crate) age: Duration,
    /// Of its last heartbeat.
    pub(crate) beat_age: Duration,
    /// The heartbeat itself, to see it move.
    pub(crate) beat: String,
}

/// One reading.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    /// Whether the instance follows another one.
    pub(crate) replica: bool,
    /// Whether a session may write now.
    pub(crate) writable: bool,
    /// Schema revisions that stand in it.
    pub(crate) heads: Vec<String>,
    /// Task instances by state, open ones only.
    pub(crate) tasks: BTreeMap<String, u64>,
    /// Schedulers whose row says `running`, newest first.
    pub(crate) schedulers: Vec<Scheduler>,
    /// Files that the dag processor could not import.
    pub(crate) import_errors: u64,
    /// Where the instance is.
    pub(crate) at: Option<Lsn>,
}

impl Reading {
    /// Task instances that a scheduler or a worker holds.
    pub(crate) fn held(&self) -> u64 {
        ["running", "queued", "restarting"].iter().filter_map(|state| self.tasks.get(*state)).sum()
    }
}

/// The metadata database of this site.
pub(crate) struct Database {
    config: tokio_postgres::Config,
    shown: String,
}

const CONNECT_WITHIN: Duration = Duration::from_secs(3);
const OPEN: &str =
    "'running','queued','restarting','scheduled','deferred','up_for_retry','up_for_reschedule'";

impl Database {
    pub(crate) fn new(config: tokio_postgres::Config) -> Self {
        let host = config.get_hosts().iter().map(|h| format!("{h:?}")).collect::<Vec<_>>().join(",");
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let shown = format!("metadata database at {host}:{port}");
        Self { config, shown }
    }

    /// A session of its own per question: none lingers when the site is fenced.
    async fn session(&self, until: Deadline) -> Result<Client, PlaneError> {
        let soon = until.min(Deadline::within(CONNECT_WITHIN));
        let (client, connection) = soon
            .bound(&format!("connect to {}", self.shown), self.config.connect(NoTls))
            .await?
            .map_err(|e| PlaneError::unreachable(&self.shown, &e))?;
        // ends with its client; what goes wrong on it reaches the query
        tokio::spawn(connection);
        Ok(client)
    }

    /// The answer to one question, or why there is none.
    async fn answer<T>(
        &self,
        until: Deadline,
        question: impl Future<Output = Result<T, tokio_postgres::Error>> + Send,
    ) -> Result<T, PlaneError> {
        until
            .bound(&format!("ask {}", self.shown), question)
            .await?
            .map_err(|e| PlaneError::unreachable(&self.shown, &e))
    }

    /// Everything of a reading.
    ///
    /// Errors: `Unreachable` when the database is shut, `TimedOut` at the deadline.
    pub(crate) async fn read(&self, until: Deadline) -> Result<Reading, PlaneError> {
        let client = self.session(until).await?;
        self.answer(until, reading(&client)).await
    }

    /// Schedulers whose row says `running`, newest first.
    pub(crate) async fn schedulers(&self, until: Deadline) -> Result<Vec<Scheduler>, PlaneError> {
        let client = self.session(until).await?;
        self.answer(until, schedulers(&client)).await
    }

    /// Whether a session may write now.
    pub(crate) async fn writable(&self, until: Deadline) -> Result<bool, PlaneError> {
        let client = self.session(until).await?;
        let question = "select not pg_is_in_recovery() and current_setting('transaction_read_only') = 'off'";
        self.answer(until, async { client.query_one(question, &[]).await?.try_get(0) }).await
    }
}

async fn reading(client: &Client) -> Result<Reading, tokio_postgres::Error> {
    let one = client
        .query_one(
            "select pg_is_in_recovery(), current_setting('transaction_read_only') = 'off', \
             (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end)::text, \
             (select count(*) from import_error)::bigint, \
             coalesce((select array_agg(version_num::text order by 1) from alembic_version), '{}')",
            &[],
        )
        .await?;
    let tasks = client
        .query(
            &format!("select state, count(*)::bigint from task_instance where state in ({OPEN}) group by 1"),
            &[],
        )
        .await?;
    let tasks = tasks.iter().map(|row| Ok((row.try_get(0)?, count(row.try_get(1)?))));
    Ok(Reading {
        replica: one.try_get(0)?,
        writable: one.try_get(1)?,
        at: one.try_get::<_, Option<String>>(2)?.as_deref().and_then(Lsn::parse),
        import_errors: count(one.try_get(3)?),
        heads: one.try_get(4)?,
        tasks: tasks.collect::<Result<_, tokio_postgres::Error>>()?,
        schedulers: schedulers(client).await?,
    })
}

async fn schedulers(client: &Client) -> Result<Vec<Scheduler>, tokio_postgres::Error> {
    let rows = client
        .query(
            "select id, coalesce(hostname, ''), \
             extract(epoch from clock_timestamp() - start_date)::float8, \
             extract(epoch from clock_timestamp() - latest_heartbeat)::float8, latest_heartbeat::text \
             from job where job_type = 'SchedulerJob' and state = 'running' \
             and start_date is not null and latest_heartbeat is not null order by id desc limit 20",
            &[],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Scheduler {
                id: row.try_get(0)?,
                host: row.try_get(1)?,
                age: seconds(row.try_get(2)?),
                beat_age: seconds(row.try_get(3)?),
                beat: row.try_get(4)?,
            })
        })
        .collect()
}

fn seconds(given: f64) -> Duration {
    Duration::try_from_secs_f64(given.max(0.0)).unwrap_or_default()
}

fn count(given: i64) -> u64 {
    u64::try_from(given).unwrap_or(0)
}
