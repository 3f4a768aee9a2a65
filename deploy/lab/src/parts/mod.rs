//! The real parts: a file per plane, each with the same six functions.
//!
//! `install` brings what is missing (pinned, checksummed, shared by all labs), `start` brings both sites up with
//! users, topics, buckets, grants and the founding direction rome to fra, `stop` ends them, `agent_toml` and
//! `group_toml` write the plane's sections, `versions` names what runs. All may be repeated.
//!
//! What load and oracle expect of the parts at both sites, with secrets by [`World::secret`] of that name:
//!
//! - Postgres: role `app` (`postgres-app`) owning database `app`, shut out by a fence; role `dclab` (`postgres-dclab`)
//!   with `pg_read_all_data`, for the oracle only.
//! - Kafka, SASL PLAIN over plaintext on the client listener: `app` (`kafka-app`) writes and reads at the active site
//!   and is fenced; `dclab` (`kafka-dclab`) may read everything at both sites at all times. Topics and groups are those
//!   of group.toml: `orders`, `payments`; `billing`, `audit`.
//! - S3: key `app` (`s3-app`) writes below the log prefix and is fenced; the root key `root` (`s3-root`) reads at both.
//! - Airflow: user `admin` (`airflow-admin`); tasks append marks to `root/marks/marks.tsv`, one line each, tab separated:
//!   unix seconds with fraction, site, dag, run, task, map index, try, release of the DAGs, `start` or `end`, pid.
//!   DAGs are the files of `parts-data/airflow/dags`, all started by request only: `lab_rerun` (one task of about 3 s,
//!   policy rerun), `lab_fail` and `lab_hold`. The lab publishes them again and again as DAG releases, each with another
//!   `release.txt` beside them; marks carry the serial of the release that the code came from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::world::{DATA_SITES, Plane, Site, World, port};

pub mod airflow;
pub mod kafka;
pub mod postgres;
pub mod s3;

/// Name of the failover group that the lab moves.
pub const GROUP: &str = "orders";

/// Installs the parts of every plane of the lab, one after another.
pub async fn install(world: &World) -> Result<()> {
    for plane in &world.planes {
        let begun = Instant::now();
        match plane {
            Plane::Postgres => postgres::install(world).await,
            Plane::Kafka => kafka::install(world).await,
            Plane::S3 => s3::install(world).await,
            Plane::Airflow => airflow::install(world).await,
        }
        .with_context(|| format!("install parts of {plane}"))?;
        eprintln!("  {plane} installed ({:.1} s)", begun.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Starts every plane's parts at both sites: Postgres, Kafka and S3 side by side, Airflow on top of them.
pub async fn start(world: &World) -> Result<()> {
    let side = |plane| Box::pin(one(world, plane));
    let (p, k, s) = tokio::join!(side(Plane::Postgres), side(Plane::Kafka), side(Plane::S3));
    p.and(k).and(s)?;
    side(Plane::Airflow).await
}

async fn one(world: &World, plane: Plane) -> Result<()> {
    if !world.planes.contains(&plane) {
        return Ok(());
    }
    let begun = Instant::now();
    match plane {
        Plane::Postgres => postgres::start(world).await,
        Plane::Kafka => kafka::start(world).await,
        Plane::S3 => s3::start(world).await,
        Plane::Airflow => airflow::start(world).await,
    }
    .with_context(|| format!("start parts of {plane}"))?;
    eprintln!("  {plane} is up at both sites ({:.1} s)", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Starts what is down of a plane at a site, as whoever looks after the parts would. Returns whether anything was.
pub async fn mend(world: &World, site: Site, plane: Plane) -> Result<bool> {
    let name = match plane {
        Plane::Postgres => return postgres::mend(world, &site).await,
        Plane::Kafka => format!("{site}.kafka-1"),
        Plane::S3 => format!("{site}.s3"),
        Plane::Airflow => bail!("nobody but its agent starts {plane}"),
    };
    if world.alive(&name) {
        return Ok(false);
    }
    if plane == Plane::Kafka {
        kafka::start(world).await?;
    } else {
        s3::start(world).await?;
    }
    Ok(true)
}

/// Stops every plane's parts, Airflow first. All are tried; the first error is returned.
pub async fn stop(world: &World) -> Result<()> {
    let mut result = Ok(());
    for plane in world.planes.iter().rev() {
        let stopped = match plane {
            Plane::Postgres => postgres::stop(world).await,
            Plane::Kafka => kafka::stop(world).await,
            Plane::S3 => s3::stop(world).await,
            Plane::Airflow => airflow::stop(world).await,
        };
        result = result.and(stopped.with_context(|| format!("stop parts of {plane}")));
    }
    result
}

/// Versions of all parts of the lab.
pub fn versions(world: &World) -> BTreeMap<String, String> {
    let of = |plane: &Plane| match plane {
        Plane::Postgres => postgres::versions(world),
        Plane::Kafka => kafka::versions(world),
        Plane::S3 => s3::versions(world),
        Plane::Airflow => airflow::versions(world),
    };
    world.planes.iter().flat_map(of).collect()
}

/// The agent's file of a site: head, and a section per plane at the data sites.
pub fn agent_toml(world: &World, site: &Site) -> String {
    let dir = world.dir(site);
    let dir = dir.display();
    let ip = world.ip(site);
    let mut text = format!(
        "site = \"{site}\"\ndata_dir = \"{dir}/agent\"\nprofile = \"wan\"\n\n\
         [listen]\ngrpc = \"{ip}:{grpc}\"\nhttp = \"{ip}:{http}\"\n\n\
         [tls]\nca = \"{dir}/tls/ca.pem\"\ncert = \"{dir}/tls/agent.pem\"\nkey = \"{dir}/tls/agent.key\"\n\n[peers]\n",
        grpc = port::AGENT_GRPC,
        http = port::AGENT_HTTP,
    );
    for peer in crate::world::SITES {
        let _ = writeln!(text, "{peer} = \"{}:{}\"", world.ip(&peer), port::AGENT_GRPC);
    }
    if !DATA_SITES.contains(site) {
        return text.replacen("profile = \"wan\"\n", "profile = \"wan\"\nwitness = true\n", 1);
    }
    for plane in &world.planes {
        text.push('\n');
        text.push_str(&match plane {
            Plane::Postgres => postgres::agent_toml(world, site),
            Plane::Kafka => kafka::agent_toml(world, site),
            Plane::S3 => s3::agent_toml(world, site),
            Plane::Airflow => airflow::agent_toml(world, site),
        });
    }
    text
}

/// The group's file.
pub fn group_toml(world: &World) -> String {
    let mut text = format!("name = \"{GROUP}\"\nsites = [\"rome\", \"fra\"]\n");
    for plane in &world.planes {
        text.push('\n');
        text.push_str(&match plane {
            Plane::Postgres => postgres::group_toml(world),
            Plane::Kafka => kafka::group_toml(world),
            Plane::S3 => s3::group_toml(world),
            Plane::Airflow => airflow::group_toml(world),
        });
    }
    text.push_str(
        "\n[policy]\nlag_bytes_max = 16777216\nlag_records_max = 50000\nlag_objects_max = 1000\n\
         stop_limit = \"10s\"\ndrain_limit = \"30s\"\n",
    );
    text
}

/// Writes `SITE/agent.toml` and `group.toml` into the lab.
pub fn write_files(world: &World) -> Result<()> {
    for site in crate::world::SITES {
        world.write(&world.dir(&site).join("agent.toml"), &agent_toml(world, &site), 0o644)?;
    }
    world.write(&world.root.join("group.toml"), &group_toml(world), 0o644)
}
