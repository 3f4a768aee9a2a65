//! Real parts of the postgres plane: one instance per site, streaming rome to fra through the link.
//!
//! Instances are founded once and then left to the agents: a start here brings up what is down in the role its files
//! say, and never changes a role, for after a move rome is the standby.
//!
//! `pg_hba.conf` as founded: the agent's block comes at the head by the agent; below it `app`, `airflow` and `dclab`
//! may come in over TCP and the socket with a password, the superuser only over the socket. Settings of a site lie in
//! `postgresql.conf`, those of a role in `postgresql.auto.conf`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;
use tokio_postgres::NoTls;

use crate::world::{DATA_SITES, FRA, ROME, Site, World, port};

/// Where the server's tools may lie; the first folder that has all of them is used.
const BIN_DIRS: [&str; 5] = [
    "/usr/lib/postgresql/15/bin",
    "/usr/lib/postgresql/16/bin",
    "/usr/lib/postgresql/17/bin",
    "/usr/lib/postgresql/18/bin",
    "/usr/local/pgsql/bin",
];
/// Tools the plane and the lab call.
const TOOLS: [&str; 6] = ["postgres", "pg_ctl", "initdb", "pg_basebackup", "pg_rewind", "pg_controldata"];
/// Databases of the group, each owned by the role of its name.
const DATABASES: [&str; 2] = ["app", "airflow"];
/// How long an instance may take to start.
const START_LIMIT: Duration = Duration::from_mins(1);

fn bin_dir() -> Option<PathBuf> {
    let has_all = |dir: &&&str| TOOLS.iter().all(|tool| Path::new(dir).join(tool).is_file());
    BIN_DIRS.iter().find(has_all).map(PathBuf::from)
}

fn tool(name: &str) -> Result<Command> {
    Ok(Command::new(bin_dir().context("PostgreSQL is not installed")?.join(name)))
}

fn data_dir(world: &World, site: &Site) -> PathBuf {
    world.dir(site).join("postgres/data")
}

fn socket_dir(world: &World, site: &Site) -> PathBuf {
    world.dir(site).join("postgres/socket")
}

/// Installs PostgreSQL from the system's packages where it is missing. Repeat: safe.
pub async fn install(_world: &World) -> Result<()> {
    if bin_dir().is_some() {
        return Ok(());
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "PostgreSQL 15 to 18 is not installed; install the package postgresql and repeat"
    );
    eprintln!("  installing the package postgresql");
    // no cluster of the package's own: its port and its start are nobody's wish here
    let config = "mkdir -p /etc/postgresql-common && \
                  grep -qs create_main_cluster /etc/postgresql-common/createcluster.conf || \
                  echo 'create_main_cluster = false' >> /etc/postgresql-common/createcluster.conf";
    crate::process::run(Command::new("sh").args(["-c", config]), Duration::from_secs(30)).await?;
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "--no-install-recommends", "postgresql"])
        .env("DEBIAN_FRONTEND", "noninteractive");
    crate::process::run(&mut apt, Duration::from_mins(10)).await.context("install postgresql")?;
    ensure!(bin_dir().is_some(), "the package postgresql brought none of the folders {BIN_DIRS:?}");
    Ok(())
}

/// Founds both instances if they are not, and starts what is down. Repeat: safe.
pub async fn start(world: &World) -> Result<()> {
    for site in DATA_SITES {
        world.mkdir(&socket_dir(world, &site))?;
    }
    if founded(world, &ROME) {
        up(world, &ROME).await?;
    } else {
        found_primary(world).await.context("found the primary of rome")?;
    }
    if founded(world, &FRA) {
        up(world, &FRA).await?;
    } else {
        found_standby(world).await.context("found the standby of fra")?;
    }
    streams(world).await
}

/// A foundation that did not end leaves no such file and is begun anew.
fn founded(world: &World, site: &Site) -> bool {
    world.dir(site).join("postgres/founded").exists()
}

fn mark_founded(world: &World, site: &Site) -> Result<()> {
    world.write(&world.dir(site).join("postgres/founded"), "", 0o644)
}

async fn begin_anew(world: &World, site: &Site) -> Result<()> {
    halt(world, site).await?;
    match std::fs::remove_dir_all(data_dir(world, site)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context("remove an unfinished instance"),
        _ => Ok(()),
    }
}

async fn found_primary(world: &World) -> Result<()> {
    begin_anew(world, &ROME).await?;
    let data = data_dir(world, &ROME);
    world.secret("postgres-superuser")?; // made before its file is named
    let mut initdb = tool("initdb")?;
    initdb.arg("-D").arg(&data).args(["-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]);
    initdb.args(["--auth=scram-sha-256", "--pwfile"]).arg(world.secret_path("postgres-superuser"));
    world.run(&mut initdb).await?;
    write_site_files(world, &ROME)?;
    world.write(&data.join("postgresql.auto.conf"), "", 0o600)?;
    up(world, &ROME).await?;
    found_roles(world).await?;
    mark_founded(world, &ROME)
}

async fn found_standby(world: &World) -> Result<()> {
    begin_anew(world, &FRA).await?;
    let data = data_dir(world, &FRA);
    let conninfo = conninfo(world, &FRA, &ROME)?;
    let mut backup = tool("pg_basebackup")?;
    backup.arg("-D").arg(&data).arg("-d").arg(&conninfo).args([
        "-X",
        "stream",
        "-c",
        "fast",
        "-w",
        "--no-sync",
    ]);
    world.run(&mut backup).await?;
    write_site_files(world, &FRA)?;
    let auto = format!(
        "primary_conninfo = '{}'\nprimary_slot_name = 'dcswitch_fra'\n",
        conninfo.replace('\'', "''")
    );
    world.write(&data.join("postgresql.auto.conf"), &auto, 0o600)?;
    world.write(&data.join("standby.signal"), "", 0o600)?;
    up(world, &FRA).await?;
    mark_founded(world, &FRA)
}

/// How the standby at `from` reaches the primary at `to`. Passwords stay in a file.
fn conninfo(world: &World, from: &Site, to: &Site) -> Result<String> {
    let pass = world.dir(from).join("postgres/pgpass");
    world.write(&pass, &format!("*:*:*:dcrepl:{}\n", world.secret("postgres-replication")?), 0o600)?;
    let (host, port) = world.link(from, to, port::POSTGRES);
    Ok(format!(
        "host='{host}' port='{port}' user='dcrepl' passfile='{}' application_name='dcswitch_{from}'",
        pass.display()
    ))
}

/// `postgresql.conf` and `pg_hba.conf` of a site.
fn write_site_files(world: &World, site: &Site) -> Result<()> {
    let conf = format!(
        "# instance of {site} in lab {name}\nlisten_addresses = '{ip}'\nport = {port}\n\
         unix_socket_directories = '{socket}'\nmax_connections = 80\nshared_buffers = 32MB\nfsync = on\n\
         wal_log_hints = on\nwal_level = replica\nwal_keep_size = 128MB\nmax_wal_size = 512MB\nmax_wal_senders = 8\n\
         max_replication_slots = 8\nhot_standby = on\nhot_standby_feedback = on\npassword_encryption = scram-sha-256\n\
         log_line_prefix = '%m [%p] %u '\nlog_checkpoints = off\nlc_messages = 'C'\ntimezone = 'UTC'\n\
         log_timezone = 'UTC'\n",
        name = world.name,
        ip = world.ip(site),
        port = port::POSTGRES,
        socket = socket_dir(world, site).display(),
    );
    let data = data_dir(world, site);
    world.write(&data.join("postgresql.conf"), &conf, 0o600)?;
    let mut rules = String::from(
        "# rules of the site; the agent writes a block of its own above them\n\
         local  all          postgres            scram-sha-256\n\
         host   all          dcswitch  127.0.0.0/8  scram-sha-256\n\
         local  all          dcswitch            scram-sha-256\n\
         host   replication  dcrepl    127.0.0.0/8  scram-sha-256\n\
         host   postgres     dcrepl    127.0.0.0/8  scram-sha-256\n",
    );
    for role in ["app", "airflow", "dclab"] {
        let _ = writeln!(rules, "host   all          {role}  127.0.0.0/8  scram-sha-256");
        let _ = writeln!(rules, "local  all          {role}            scram-sha-256");
    }
    world.write(&data.join("pg_hba.conf"), &rules, 0o600)
}

/// The process that is a site's instance, as its own file says.
pub fn postmaster(world: &World, site: Site) -> Result<u32> {
    let file = data_dir(world, &site).join("postmaster.pid");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    text.lines().next().and_then(|l| l.trim().parse().ok()).context("postmaster.pid begins with a number")
}

/// Starts the instance of a site in the role its files say, and waits until it answers. Returns whether it was down.
pub async fn mend(world: &World, site: &Site) -> Result<bool> {
    let down = !status(world, site).await;
    up(world, site).await.map(|()| down)
}

/// Starts the instance of a site in the role its files say, and waits until it answers.
async fn up(world: &World, site: &Site) -> Result<()> {
    let data = data_dir(world, site);
    if status(world, site).await {
        return Ok(());
    }
    let log = world.log(&format!("{site}.postgres"));
    let mut start = tool("pg_ctl")?;
    start.args(["start", "-w", "-s", "-t", "60", "-D"]).arg(&data).arg("-l").arg(&log);
    world
        .run(&mut start)
        .await
        .with_context(|| format!("start postgres of {site}; its log is {}", log.display()))?;
    Ok(())
}

async fn status(world: &World, site: &Site) -> bool {
    let Ok(mut ask) = tool("pg_ctl") else { return false };
    ask.arg("status").arg("-D").arg(data_dir(world, site));
    world.run(&mut ask).await.is_ok()
}

/// Roles, databases and grants, with the passwords of this lab.
async fn found_roles(world: &World) -> Result<()> {
    let client = connect_as_superuser(world, &ROME).await?;
    let mut sql = String::new();
    for (role, attributes) in
        [("dcswitch", "replication"), ("dcrepl", "replication"), ("app", ""), ("airflow", ""), ("dclab", "")]
    {
        let password = world.secret(secret_of(role))?;
        let _ = writeln!(
            sql,
            "do $$ begin create role {role}; exception when duplicate_object then null; end $$;\n\
             alter role {role} login {attributes} password '{password}';"
        );
    }
    sql.push_str(
        "grant pg_read_all_data to dclab;
         grant pg_monitor to dcswitch;
         grant pg_checkpoint to dcswitch;
         grant execute on function pg_promote(boolean, integer) to dcswitch;
         grant alter system on parameter synchronous_standby_names, max_standby_streaming_delay,
           max_standby_archive_delay to dcswitch;
         grant create on database postgres to dcswitch;
         grant execute on function pg_ls_dir(text, boolean, boolean), pg_stat_file(text, boolean),
           pg_read_binary_file(text), pg_read_binary_file(text, bigint, bigint, boolean) to dcrepl;
         select pg_create_physical_replication_slot('dcswitch_fra', true)
           where not exists (select from pg_replication_slots where slot_name = 'dcswitch_fra');",
    );
    client.batch_execute(&sql).await.context("make roles and grants")?;
    for database in DATABASES {
        let there = client.query_opt("select 1 from pg_database where datname = $1", &[&database]).await?;
        if there.is_none() {
            client.batch_execute(&format!("create database {database} owner {database}")).await?;
        }
    }
    Ok(())
}

fn secret_of(role: &str) -> &'static str {
    match role {
        "dcswitch" => "postgres-agent",
        "dcrepl" => "postgres-replication",
        "airflow" => "postgres-airflow",
        "dclab" => "postgres-dclab",
        _ => "postgres-app",
    }
}

async fn connect_as_superuser(world: &World, site: &Site) -> Result<tokio_postgres::Client> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir(world, site)).port(port::POSTGRES).user("postgres").dbname("postgres");
    config.password(world.secret("postgres-superuser")?).connect_timeout(Duration::from_secs(10));
    let (client, connection) = config.connect(NoTls).await.with_context(|| format!("connect to {site}"))?;
    tokio::spawn(async move {
        let _ = connection.await; // ends with the client
    });
    Ok(client)
}

/// Lets the replicating role log in at a primary, or not; without it the standbys' streams end and do not come back.
pub async fn replication(world: &World, site: &Site, may: bool) -> Result<()> {
    let client = connect_as_superuser(world, site).await?;
    let sql = if may {
        "alter role dcrepl login"
    } else {
        "alter role dcrepl nologin; select pg_terminate_backend(pid) from pg_stat_replication"
    };
    client.batch_execute(sql).await.context("change the replicating role")
}

/// Waits until one of the two streams from the other.
async fn streams(world: &World) -> Result<()> {
    let end = std::time::Instant::now() + START_LIMIT;
    loop {
        let mut seen = Vec::new();
        for site in DATA_SITES {
            // a door shut by a run's fence refuses the lab too; the agents are then at work
            let Ok(client) = connect_as_superuser(world, &site).await else {
                seen.push(format!("{site} refuses the lab"));
                continue;
            };
            let row =
                client.query_one("select count(*) from pg_stat_wal_receiver where status = 'streaming'", &[]);
            match row.await?.get::<_, i64>(0) {
                0 => seen.push(format!("{site} receives nothing")),
                _ => return Ok(()),
            }
        }
        if std::time::Instant::now() >= end {
            bail!("no instance of lab {} streams from the other: {}", world.name, seen.join("; "));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Stops both instances, the standby first. Repeat: safe.
pub async fn stop(world: &World) -> Result<()> {
    for site in [FRA, ROME] {
        halt(world, &site).await?;
    }
    Ok(())
}

async fn halt(world: &World, site: &Site) -> Result<()> {
    if bin_dir().is_none() || !data_dir(world, site).exists() || !status(world, site).await {
        return Ok(());
    }
    let halted = |mode: &'static str, limit: &'static str| async move {
        let mut stop = tool("pg_ctl")?;
        stop.args(["stop", "-w", "-s", "-m", mode, "-t", limit, "-D"]).arg(data_dir(world, site));
        world.run(&mut stop).await.map(|_| ())
    };
    match halted("fast", "15").await {
        Ok(()) => Ok(()),
        Err(_) => halted("immediate", "15").await.with_context(|| format!("stop postgres of {site}")),
    }
}

/// The section of agent.toml.
pub fn agent_toml(world: &World, site: &Site) -> String {
    let mut text = format!(
        "[postgres]\ndriver = \"local\"\nbin_dir = \"{}\"\ndata_dir = \"{}\"\nsocket_dir = \"{}\"\n\
         user = \"dcswitch\"\npassword_file = \"{}\"\nreplication_user = \"dcrepl\"\n\
         replication_password_file = \"{}\"\n",
        bin_dir().unwrap_or_default().display(),
        data_dir(world, site).display(),
        socket_dir(world, site).display(),
        world.secret_path("postgres-agent").display(),
        world.secret_path("postgres-replication").display(),
    );
    for other in DATA_SITES {
        let (host, port) = world.link(site, &other, port::POSTGRES);
        let _ = writeln!(text, "[postgres.sites.{other}]\nhost = \"{host}\"\nport = {port}");
    }
    text
}

/// The section of group.toml.
pub fn group_toml(_world: &World) -> String {
    "[postgres]\ndatabases = [\"app\", \"airflow\"]\napp_roles = [\"app\", \"airflow\"]\n".to_owned()
}

/// Versions of the parts.
pub fn versions(_world: &World) -> BTreeMap<String, String> {
    let asked = bin_dir()
        .and_then(|dir| std::process::Command::new(dir.join("postgres")).arg("--version").output().ok());
    let text = asked.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    BTreeMap::from([("postgresql".to_owned(), text.unwrap_or_else(|| "not installed".to_owned()))])
}
