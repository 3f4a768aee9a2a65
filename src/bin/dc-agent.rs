//! The agent of one site: `dc-agent CONFIG`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// The agent of one site. It runs until it is told to stop, and may be killed at any time.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The agent's config file.
    config: PathBuf,
    /// Log as JSON lines.
    #[arg(long)]
    json: bool,
}

/// Runs the agent until it is told to stop.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,openraft=warn"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr);
    if args.json {
        log.json().init();
    } else {
        log.init();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(dc_switch::app::run(&args.config)),
        Err(cause) => {
            eprintln!("error: no runtime: {cause}");
            return ExitCode::FAILURE;
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(fail) => {
            eprintln!("error[{}]: {}\n  why:  {}\n  next: {}", fail.code, fail.what, fail.why, fail.next);
            ExitCode::from(fail.exit as u8)
        }
    }
}
