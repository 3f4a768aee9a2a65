//! The command line: `dc-switch --help`.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use dc_core::fail::Fail;
use dc_surface::cli::{Cli, Roof, code, run};
use dc_switch::config::Config;

fn main() -> ExitCode {
    match run(Cli::parse(), &Roof { check_config }) {
        Ok(exit) => code(exit),
        Err(stopped) => stopped.print(),
    }
}

fn check_config(file: &Path) -> Result<String, Fail> {
    Config::load(file).map(|config| {
        let planes = [
            ("postgres", config.postgres.is_some()),
            ("kafka", config.kafka.is_some()),
            ("s3", config.s3.is_some()),
            ("airflow", config.airflow.is_some()),
        ];
        let planes: Vec<_> = planes.into_iter().filter(|(_, has)| *has).map(|(word, _)| word).collect();
        let planes = if planes.is_empty() { "no plane".into() } else { planes.join(", ") };
        let voters = config.peers.len();
        format!("site {}, profile {}, {voters} voters, {planes}", config.site, config.profile)
    })
}
