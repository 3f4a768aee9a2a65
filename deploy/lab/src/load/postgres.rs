//! Committing clients of Postgres, and what the oracle reads of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls, Statement};

use crate::history::{History, Id, Outcome, now_ns};
use crate::load::{RECENT, Shared};
use crate::oracle::writes::Content;
use crate::world::{Plane, Site, World, port};

/// Clients per site.
const CLIENTS: u16 = 8;
/// Pause of a client before it tries a closed site again, while a move is asked for.
const OFTEN: Duration = Duration::from_millis(80);
/// Pause of a client between two commits: 8 clients make about 300 commits a second.
const BETWEEN: Duration = Duration::from_millis(25);
/// An answer that takes longer is none.
const ANSWER: Duration = Duration::from_secs(5);

/// Connects as one of the roles of the lab. The connection ends with the client.
pub async fn connect(world: &World, site: Site, role: &str) -> Result<Client> {
    connect_to(world, site, role, "app").await
}

/// As [`connect`], to another database.
pub async fn connect_to(world: &World, site: Site, role: &str, database: &str) -> Result<Client> {
    let mut config = tokio_postgres::Config::new();
    config.host(world.ip(&site)).port(port::POSTGRES).dbname(database).user(role);
    config.password(world.secret(&format!("postgres-{role}"))?).connect_timeout(Duration::from_secs(2));
    config.application_name(format!("dc-lab {role}"));
    let (client, connection) =
        timeout(ANSWER, config.connect(NoTls)).await.context("connect took too long")??;
    tokio::spawn(connection);
    Ok(client)
}

/// Makes the table and starts the clients of both sites.
pub async fn start(shared: &Arc<Shared>, active: Site, tasks: &mut JoinSet<()>) -> Result<()> {
    let client = connect(&shared.world, active, "app").await.context("connect to make the load's table")?;
    let table = "create table if not exists lab_load (writer int not null, seq bigint not null, \
                 at timestamptz not null default clock_timestamp());\
                 create index if not exists lab_load_seq on lab_load (writer, seq)";
    client.batch_execute(table).await.context("make the load's table")?;
    let history = shared.history(Plane::Postgres)?;
    for site in crate::world::DATA_SITES {
        for n in 1..=CLIENTS {
            let writer = u16::from(site.index) * 100 + n;
            tasks.spawn(write(shared.clone(), history.clone(), site, writer));
        }
        tasks.spawn(sample(shared.clone(), history.clone(), site));
    }
    Ok(())
}

async fn write(shared: Arc<Shared>, history: Arc<History>, site: Site, writer: u16) {
    let mut seq = shared.base;
    let mut session: Option<Client> = None;
    while !shared.over() {
        seq += 1;
        let sent = now_ns();
        let client = match session.take() {
            Some(client) => Ok(client),
            None => connect(&shared.world, site, "app").await,
        };
        let outcome = match &client {
            Ok(client) => commit(client, writer, seq).await,
            Err(_) => Outcome::Refused, // no session, so nothing was sent
        };
        history.add(site, (writer, seq), sent, outcome);
        if outcome == Outcome::Acked {
            session = client.ok();
            shared.sleep(BETWEEN).await;
        } else {
            session = client.ok().filter(|c| !c.is_closed() && outcome == Outcome::Refused);
            shared.pause(OFTEN).await;
        }
    }
}

/// One transaction. Before COMMIT was sent nothing can stand; after it only an answer tells.
async fn commit(client: &Client, writer: u16, seq: u64) -> Outcome {
    let (w, s) = (i32::from(writer), i64::try_from(seq).unwrap_or(i64::MAX));
    let insert = async {
        client.batch_execute("begin").await?;
        client.execute("insert into lab_load (writer, seq) values ($1, $2)", &[&w, &s]).await
    };
    match timeout(ANSWER, insert).await {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => {
            let _ = timeout(ANSWER, client.batch_execute("rollback")).await; // a dead session is seen as closed
            return Outcome::Refused;
        }
        Err(_) => return Outcome::Unknown,
    }
    match timeout(ANSWER, client.batch_execute("commit")).await {
        Ok(Ok(())) => Outcome::Acked,
        Ok(Err(e)) if e.as_db_error().is_some_and(|e| !e.severity().starts_with("FATAL")) => Outcome::Refused,
        _ => Outcome::Unknown,
    }
}

/// Reads all rows of the load at one site.
pub async fn content(world: &World, site: Site) -> Result<Content> {
    let client =
        connect(world, site, "dclab").await.with_context(|| format!("connect to Postgres of {site}"))?;
    let rows = timeout(
        Duration::from_mins(1),
        client.query("select writer, seq from lab_load order by writer, seq", &[]),
    )
    .await;
    let rows = rows.context("read of the load's table took too long")?.context("read the load's table")?;
    let ids = rows.iter().map(|r| id(r.get(0), r.get(1))).collect();
    Ok(Content::from([("lab_load".to_string(), ids)]))
}

fn id(writer: i32, seq: i64) -> Id {
    (u16::try_from(writer).unwrap_or(u16::MAX), u64::try_from(seq).unwrap_or(u64::MAX))
}

/// Rows acknowledged by `source` and not yet readable at the other site, each 50 ms until the load ends.
pub async fn sample(shared: Arc<Shared>, history: Arc<History>, source: Site) {
    let newest =
        "select w, coalesce((select max(seq) from lab_load where writer = w), 0) from unnest($1::int[]) w";
    let writers: Vec<i32> = (1..=CLIENTS).map(|n| i32::from(u16::from(source.index) * 100 + n)).collect();
    let mut session: Option<(Client, Statement)> = None;
    while !shared.over() {
        if session.is_none()
            && let Ok(client) = connect(&shared.world, source.other(), "dclab").await
            && let Ok(statement) = client.prepare(newest).await
        {
            session = Some((client, statement));
        }
        let at = now_ns(); // just before the one round trip: what was acknowledged by now may be missing there
        let mut pause = Duration::from_millis(500); // a site that closes is left alone
        if let Some((client, statement)) = session.take()
            && let Ok(Ok(rows)) = timeout(ANSWER, client.query(&statement, &[&writers])).await
        {
            let there: HashMap<u16, u64> = rows.iter().map(|r| id(r.get(0), r.get(1))).collect();
            let acked = history.acked_ids(source, at.saturating_sub(RECENT), at);
            let waiting = acked.iter().filter(|(w, s)| there.get(w).is_none_or(|max| s > max)).count();
            shared.backlog.note(Plane::Postgres, source, at, waiting);
            session = Some((client, statement));
            pause = Duration::from_millis(50);
        }
        shared.sleep(pause).await;
    }
}
