//! dc-lab: three datacenters of real parts on one machine, load on them, moves between them, and an oracle that
//! judges what happened from what clients were told. Never ships, and names none of the product's crates: it runs
//! the product's binaries, as an operator would.

mod history;
mod judge;
mod keeper;
mod load;
mod oracle;
mod parts;
mod prereq;
mod process;
mod proxy;
mod report;
mod world;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use world::{Plane, World};

/// Builds a world of real parts on this machine, moves it under load and judges what happened.
#[derive(Debug, Parser)]
#[command(name = "dc-lab")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Start or stop the real parts only, without agents
    #[command(subcommand)]
    Parts(Parts),
    /// Stop a lab that was left running
    Down(Down),
    /// Hold the lab's number and its links (started by the lab itself)
    #[command(hide = true)]
    Keeper {
        /// Folder of the lab
        root: std::path::PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Parts {
    /// Install what is missing and start the parts at both sites
    Up(Up),
    /// Stop the parts
    Down(Down),
}

#[derive(Debug, Args)]
struct Named {
    /// Name of the lab
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Debug, Args)]
struct Up {
    #[command(flatten)]
    named: Named,
    /// Planes to start
    #[arg(long, value_delimiter = ',', default_values_t = Plane::ALL)]
    planes: Vec<Plane>,
    /// Delay of replication between the sites, each way, in milliseconds
    #[arg(long, default_value_t = 20, value_name = "MS")]
    delay: u64,
}

#[derive(Debug, Args)]
struct Down {
    #[command(flatten)]
    named: Named,
    /// Remove all that the lab wrote
    #[arg(long)]
    purge: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Cmd::Parts(Parts::Up(up)) => parts_up(&up).await,
        Cmd::Parts(Parts::Down(down)) | Cmd::Down(down) => take_down(&down).await,
        Cmd::Keeper { root } => keep(&root).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn keep(root: &std::path::Path) -> Result<()> {
    keeper::keep(&World::open(root)?).await
}

async fn parts_up(up: &Up) -> Result<()> {
    let planes: BTreeSet<Plane> = up.planes.iter().copied().collect();
    let world = World::create(&up.named.name, planes, Duration::from_millis(up.delay)).await?;
    eprintln!(
        "lab {} is number {}: 127.{}.1.1, 127.{}.2.1, 127.{}.3.1, files in {}",
        world.name,
        world.number,
        world.number,
        world.number,
        world.number,
        world.root.display()
    );
    parts::install(&world).await?;
    parts::start(&world).await?;
    parts::write_files(&world)
}

/// Stops all of a lab; its files stay unless purged. A lab that does not exist is down already.
async fn take_down(down: &Down) -> Result<()> {
    let Ok(world) = World::load(&down.named.name) else {
        eprintln!("there is no lab {}", down.named.name);
        return Ok(());
    };
    let stopped = parts::stop(&world).await;
    for name in process::names(&world).into_iter().filter(|n| n != "keeper") {
        world.stop(&name, Duration::from_secs(10)).await?;
    }
    world.stop("keeper", Duration::from_secs(2)).await?;
    for line in world.sweep().await {
        eprintln!("  ended a process that was left: {line}");
    }
    if down.purge {
        std::fs::remove_dir_all(&world.root)?;
    }
    stopped
}
