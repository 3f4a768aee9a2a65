//! Sessions of the agent's role: one kept open per purpose, made anew when it broke.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dc_plane::{Deadline, PlaneError, chain};
use tokio::sync::Mutex;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, NoTls, Row};

use crate::config::{self, Address};

/// A value bound to a statement, with its type, so that one round trip is enough.
pub(crate) type Bound<'a> = (&'a (dyn ToSql + Sync), Type);

/// Where a session goes.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    /// This site's instance.
    Socket { dir: PathBuf, port: u16 },
    /// Over the network.
    Tcp(Address),
}

/// A session that is kept.
pub(crate) struct Db {
    way: Way,
    user: String,
    password_file: PathBuf,
    database: String,
    client: Mutex<Option<Arc<Client>>>,
}

impl Db {
    /// A session to be opened on first use.
    pub fn new(way: Way, user: &str, password_file: &Path, database: &str) -> Self {
        Self {
            way,
            user: user.to_owned(),
            password_file: password_file.to_owned(),
            database: database.to_owned(),
            client: Mutex::new(None),
        }
    }

    /// Another session to the same place.
    pub fn sibling(&self) -> Self {
        Self::new(self.way.clone(), &self.user, &self.password_file, &self.database)
    }

    /// The place in words, for errors.
    pub fn place(&self) -> String {
        match &self.way {
            Way::Socket { dir, port } => format!("postgres at {}:{port}", dir.display()),
            Way::Tcp(address) => format!("postgres at {address}"),
        }
    }

    fn settings(&self) -> Result<tokio_postgres::Config, PlaneError> {
        let password = config::secret(&self.password_file)
            .map_err(|why| PlaneError::Failed { what: "read the agent's password".into(), why })?;
        let mut to = tokio_postgres::Config::new();
        match &self.way {
            Way::Socket { dir, port } => to.host_path(dir).port(*port),
            Way::Tcp(address) => to.host(&address.host).port(address.port),
        };
        to.user(&self.user)
            .password(password)
            .dbname(&self.database)
            .application_name("dc-switch")
            .options("-c standard_conforming_strings=on -c default_transaction_read_only=off")
            .keepalives_idle(Duration::from_secs(10))
            .tcp_user_timeout(Duration::from_secs(10));
        Ok(to)
    }

    /// An open session.
    ///
    /// Errors: `Unreachable` when the server is away or refuses; `TimedOut`.
    pub async fn client(&self, until: Deadline) -> Result<Arc<Client>, PlaneError> {
        let place = self.place();
        let mut kept = until.bound(&place, self.client.lock()).await?;
        if let Some(open) = kept.as_ref().filter(|c| !c.is_closed()) {
            return Ok(Arc::clone(open));
        }
        let opened = until.bound(&place, self.settings()?.connect(NoTls)).await?;
        let (client, connection) = opened.map_err(|e| PlaneError::unreachable(&place, &e))?;
        // it ends with the last handle of the client, or with the server
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!(why = %chain(&e), "session ended");
            }
        });
        let client = Arc::new(client);
        *kept = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Forgets the session: its server is gone, or hangs.
    pub async fn forget(&self) {
        *self.client.lock().await = None;
    }

    /// The rows of one statement, in one round trip.
    ///
    /// A session that broke since its last use is replaced once, for statements that may be repeated.
    /// Errors: `Unreachable`, `TimedOut` (the session is then forgotten), or `Failed` with the server's words.
    pub async fn all(
        &self,
        until: Deadline,
        what: &str,
        sql: &str,
        with: &[Bound<'_>],
    ) -> Result<Vec<Row>, PlaneError> {
        for attempt in 0.. {
            let client = self.client(until).await?;
            match until.bound(what, client.query_typed(sql, with)).await {
                Err(late) => {
                    self.forget().await;
                    return Err(late);
                }
                Ok(Ok(rows)) => return Ok(rows),
                Ok(Err(e)) if attempt == 0 && gone(&e) => self.forget().await,
                Ok(Err(e)) if gone(&e) => return Err(PlaneError::unreachable(self.place(), &e)),
                Ok(Err(e)) => return Err(PlaneError::failed(what, &e)),
            }
        }
        Err(PlaneError::Failed { what: what.to_owned(), why: "no session".into() })
    }

    /// The one row of a statement.
    pub async fn one(
        &self,
        until: Deadline,
        what: &str,
        sql: &str,
        with: &[Bound<'_>],
    ) -> Result<Row, PlaneError> {
        let rows = self.all(until, what, sql, with).await?;
        let count = rows.len();
        rows.into_iter().next().filter(|_| count == 1).ok_or_else(|| PlaneError::Failed {
            what: what.to_owned(),
            why: format!("{count} rows came, 1 was due"),
        })
    }

    /// Runs statements that bring nothing back; each one of them may be repeated.
    pub async fn run(&self, until: Deadline, what: &str, sql: &str) -> Result<(), PlaneError> {
        let client = self.client(until).await?;
        match until.bound(what, client.batch_execute(sql)).await {
            Err(late) => {
                self.forget().await;
                Err(late)
            }
            Ok(done) => done.map_err(|e| PlaneError::failed(what, &e)),
        }
    }
}

/// Whether the session, and not the statement, failed.
fn gone(e: &tokio_postgres::Error) -> bool {
    use tokio_postgres::error::SqlState;
    let ended = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];
    e.is_closed() || e.code().map_or_else(|| e.as_db_error().is_none(), |code| ended.contains(code))
}

/// A column of a row.
///
/// Errors: `Failed` naming the column; nothing from outside may panic.
pub(crate) fn get<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    column: &str,
) -> Result<T, PlaneError> {
    row.try_get(column).map_err(|e| PlaneError::failed(format!("read column {column}"), &e))
}

/// A column that holds a log position as text.
pub(crate) fn lsn(row: &Row, column: &str) -> Result<Option<dc_core::position::Lsn>, PlaneError> {
    Ok(get::<Option<&str>>(row, column)?.and_then(dc_core::position::Lsn::parse))
}
