//! dc-lab: three datacenters of real parts on one machine, load on them, moves between them, and an oracle that
//! judges what happened from what clients were told. Never ships, and names none of the product's crates: it runs
//! the product's binaries, as an operator would.

mod agents;
mod bench;
mod crashes;
mod history;
mod judge;
mod keeper;
mod load;
mod oracle;
mod parts;
mod prereq;
mod process;
mod proxy;
mod refusals;
mod releases;
mod report;
mod run;
mod sabotage;
mod world;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use oracle::Verdict;
use run::Order;
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
    /// Build the world, move it there and back under load, judge and report
    Run(Run),
    /// Start or stop the real parts only, without agents
    #[command(subcommand)]
    Parts(Parts),
    /// Stop a lab that was left running
    Down(Down),
    /// Put load on running parts without moving them, and judge what applies
    Selftest(Selftest),
    /// Run every sabotage and its control: each must fail by the check it names
    SabotageSuite(Suite),
    /// Print the folder of a lab
    Where(Named),
    /// Move back and forth while agents and parts die in every stage
    Crashes(Crashes),
    /// Break every plane's way to the target at once: a move must be refused with all findings, and nothing changed
    Refusals(Refusals),
    /// Move back and forth under load for a while and print what every step took
    Bench(Measure),
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
struct Run {
    #[command(flatten)]
    up: Up,
    /// Moves to make; the first goes from rome to fra
    #[arg(long, default_value_t = 2)]
    moves: usize,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Leave everything running at the end
    #[arg(long)]
    keep: bool,
    /// Tell agents that are built for it to do this wrong
    #[arg(long, value_name = "WHAT")]
    sabotage: Option<String>,
    /// Binary of the agents, if it is not the one beside this program
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// No delay between the sites and no backlog asked for: measures outages (same as --delay 0)
    #[arg(long)]
    timing: bool,
    /// Seconds that building took, for the report
    #[arg(long, hide = true)]
    build_s: Option<f64>,
}

#[derive(Debug, Args)]
struct Suite {
    /// Name of the labs, one after another
    #[arg(long, default_value = "sabotage")]
    name: String,
    /// Binary of agents that can be told to do wrong, if it is not the one beside this program
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Only sabotages whose name contains this
    #[arg(long, default_value = "", value_name = "WORD")]
    only: String,
}

#[derive(Debug, Args)]
struct Crashes {
    #[command(flatten)]
    named: Named,
    /// Planes that take part
    #[arg(long, value_delimiter = ',', default_values_t = [Plane::Postgres, Plane::Kafka, Plane::S3])]
    planes: Vec<Plane>,
    /// Delay of replication between the sites, each way, in milliseconds
    #[arg(long, default_value_t = 20, value_name = "MS")]
    delay: u64,
    /// What the rounds follow from; printed, and another each time if not given
    #[arg(long)]
    seed: Option<u64>,
    /// How many agents are killed; nine hold every stage once and every victim three times
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Only rounds whose name contains this
    #[arg(long, default_value = "", value_name = "WORD")]
    only: String,
    /// Leave everything running at the end
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
struct Refusals {
    #[command(flatten)]
    named: Named,
    /// Planes that are broken
    #[arg(long, value_delimiter = ',', default_values_t = [Plane::Postgres, Plane::Kafka, Plane::S3])]
    planes: Vec<Plane>,
    /// Delay of replication between the sites, each way, in milliseconds
    #[arg(long, default_value_t = 20, value_name = "MS")]
    delay: u64,
}

#[derive(Debug, Args)]
struct Measure {
    #[command(flatten)]
    up: Up,
    /// How long moves are made one after another
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// How often the leading agent is killed after them
    #[arg(long, default_value_t = 5)]
    elections: usize,
    /// Write the table
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// No delay between the sites (same as --delay 0)
    #[arg(long)]
    timing: bool,
}

#[derive(Debug, Args)]
struct Selftest {
    #[command(flatten)]
    named: Named,
    /// How long
    #[arg(long, default_value_t = 15)]
    seconds: u64,
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

/// A thread that is still busy once all is told is not waited for any longer.
const REST: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let done = tokio::runtime::Runtime::new().context("start").and_then(|runtime| {
        let done = runtime.block_on(perform(command));
        runtime.shutdown_timeout(REST);
        done
    });
    match done {
        Ok(verdict) => ExitCode::from(verdict.code()),
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(Verdict::Invalid.code()) // what was not carried out proves nothing
        }
    }
}

async fn perform(command: Cmd) -> Result<Verdict> {
    match command {
        Cmd::Run(run) => run::run(&order(&run)).await,
        Cmd::Parts(Parts::Up(up)) => parts_up(&up).await.map(|()| Verdict::Pass),
        Cmd::Parts(Parts::Down(down)) | Cmd::Down(down) => take_down(&down).await.map(|()| Verdict::Pass),
        Cmd::Selftest(test) => selftest(&test).await,
        Cmd::SabotageSuite(suite) => sabotage::run(&suite.name, suite.agent, &suite.only).await,
        Cmd::Where(named) => World::load(&named.name).map(|world| {
            println!("{}", world.root.display());
            Verdict::Pass
        }),
        Cmd::Crashes(crashes) => crashes::play(&game(&crashes)).await,
        Cmd::Refusals(asked) => refusals::play(&plain(&asked.named, &asked.planes, asked.delay)).await,
        Cmd::Bench(measure) => bench::switchover(&measured(&measure)).await,
        Cmd::Keeper { root } => keep(&root).await.map(|()| Verdict::Pass),
    }
}

fn order(run: &Run) -> Order {
    Order {
        name: run.up.named.name.clone(),
        planes: run.up.planes.iter().copied().collect(),
        moves: run.moves,
        delay: Duration::from_millis(if run.timing { 0 } else { run.up.delay }),
        report: run.report.clone(),
        keep: run.keep,
        sabotage: run.sabotage.clone(),
        agent: run.agent.clone().or_else(|| run.sabotage.as_ref().map(|_| sabotage::agent())),
        build_s: run.build_s,
    }
}

/// A lab on whose moves nothing is asked but what follows.
fn plain(named: &Named, planes: &[Plane], delay: u64) -> Order {
    Order {
        name: named.name.clone(),
        planes: planes.iter().copied().collect(),
        moves: 0,
        delay: Duration::from_millis(delay),
        report: None,
        keep: false,
        sabotage: None,
        agent: None,
        build_s: None,
    }
}

fn game(asked: &Crashes) -> crashes::Game {
    let order = Order { keep: asked.keep, ..plain(&asked.named, &asked.planes, asked.delay) };
    let seed = asked.seed.unwrap_or_else(crashes::any_seed);
    crashes::Game { order, seed, rounds: asked.rounds, only: asked.only.clone() }
}

fn measured(asked: &Measure) -> bench::Asked {
    let delay = if asked.timing { 0 } else { asked.up.delay };
    let order = Order { report: asked.report.clone(), ..plain(&asked.up.named, &asked.up.planes, delay) };
    bench::Asked { order, lasts: Duration::from_mins(asked.minutes), elections: asked.elections }
}

async fn selftest(test: &Selftest) -> Result<Verdict> {
    run::still(&World::load(&test.named.name)?, test.seconds).await
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
    run::end(&world, down.purge).await
}
