//! The command line: a file per command; one that is understood either ends as asked or
//! says what, why and what to type next.
//!
//! Data goes to stdout, talk to stderr. A run lives in the quorum and not here: whoever
//! stops watching has stopped nothing.

mod ask;
mod cert;
mod config;
mod context;
mod dags;
mod explain;
mod fails;
mod follow;
mod group;
mod local;
mod out;
mod plan;
mod progress;
mod reach;
mod run;
mod shape;
mod status;
mod switchover;
mod table;
mod version;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use dc_core::fail::{Exit, Fail};

use out::{Color, Format, Out};
use reach::Reach;

/// What only the roof can do for the command line.
#[derive(Debug, Clone, Copy)]
pub struct Roof {
    /// Reads an agent's config, builds nothing, and says in one line what it found.
    ///
    /// Errors: every fault of the file, with its line.
    pub check_config: fn(&Path) -> Result<String, Fail>,
}

/// Moves Airflow, Kafka, PostgreSQL and S3 from one site to another as one unit.
///
/// Without a command: status.
#[derive(Debug, Parser)]
#[command(name = "dc-switch", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Global {
    /// File with contexts [default: ~/.config/dc-switch/config.toml]
    #[arg(long, global = true, env = "DC_SWITCH_CONFIG", value_name = "FILE", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Context to use instead of the file's current one
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// What stdout carries
    #[arg(long, global = true, value_enum, default_value_t = Format::Human)]
    output: Format,
    /// Whether words are coloured; NO_COLOR is honoured
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    color: Color,
    /// Never ask, even on a terminal
    #[arg(long, global = true)]
    no_input: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sites, groups, planes, lag and what to do next
    Status(status::Status),
    /// Shows what a command would do; changes nothing
    #[command(subcommand)]
    Plan(plan::Plan),
    /// Moves a group to another site, losing nothing, and follows the run
    Switchover(switchover::Switchover),
    /// Looks at runs and steers them
    #[command(subcommand)]
    Run(run::Run),
    /// Registers and shows failover groups
    #[command(subcommand)]
    Group(group::Group),
    /// Publishes DAGs
    #[command(subcommand)]
    Dags(dags::Dags),
    /// Makes and shows certificates; talks to no agent
    #[command(subcommand)]
    Cert(cert::Cert),
    /// Checks files; talks to no agent
    #[command(subcommand)]
    Config(config::Config),
    /// Explains an error code
    Explain(explain::Explain),
    /// Prints the version
    Version,
}

/// Why a command did not end as asked, and how to say so.
#[derive(Debug)]
pub struct Stopped {
    fail: Fail,
    out: Out,
}

impl Stopped {
    /// Says it where and as the caller wants to read it.
    ///
    /// Returns the exit code of its kind.
    pub fn print(&self) -> ExitCode {
        fails::print(&self.out, &self.fail);
        code(self.fail.exit)
    }
}

/// The process's exit code.
pub fn code(exit: Exit) -> ExitCode {
    // every kind of end is below 256
    ExitCode::from(u8::try_from(exit as i32).unwrap_or(1))
}

/// Runs one command to its end.
///
/// Errors: what stopped it; print it.
pub fn run(cli: Cli, roof: Roof) -> Result<Exit, Stopped> {
    let out = Out::new(cli.global.output, cli.global.color, cli.global.no_input);
    let command = cli.command.unwrap_or(Command::Status(status::Status::default()));
    let ended = match command {
        Command::Cert(command) => command.run(&out),
        Command::Config(command) => command.run(&out, roof),
        Command::Explain(command) => command.run(&out),
        Command::Version => Ok(version::run(&out)),
        command => online(&cli.global, command, &out),
    };
    ended.map_err(|fail| Stopped { fail, out })
}

fn online(global: &Global, command: Command, out: &Out) -> Result<Exit, Fail> {
    // what only reads local files is read before anything is contacted
    let prepared = match command {
        Command::Group(command) => Prepared::Group(command.prepare()?),
        Command::Dags(command) => Prepared::Dags(command.prepare(out)?),
        other => Prepared::Other(other),
    };
    let context = context::load(global.config.as_deref(), global.context.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| fails::unexpected("starting failed", &e.to_string()))?;
    runtime.block_on(async {
        let reach = Reach::new(context, out)?;
        match prepared {
            Prepared::Group(command) => command.run(&reach, out).await,
            Prepared::Dags(command) => command.run(&reach, out).await,
            Prepared::Other(Command::Plan(command)) => command.run(&reach, out).await,
            Prepared::Other(Command::Switchover(command)) => command.run(&reach, out).await,
            Prepared::Other(Command::Run(command)) => command.run(&reach, out).await,
            Prepared::Other(Command::Status(command)) => command.run(&reach, out).await,
            Prepared::Other(_) => {
                Err(fails::unexpected("nothing was done", "the command is not an online one"))
            }
        }
    })
}

enum Prepared {
    Group(group::Prepared),
    Dags(dags::Prepared),
    Other(Command),
}
