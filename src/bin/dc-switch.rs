//! The command line: `dc-switch --help`.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use dc_core::fail::Fail;
use dc_surface::cli::{Cli, Roof, code, run};
use dc_switch::config::Config;
use dc_wire::tls::Tls;

fn main() -> ExitCode {
    match run(Cli::parse(), Roof { check_config }) {
        Ok(exit) => code(exit),
        Err(stopped) => stopped.print(),
    }
}

/// What an agent would refuse to start on, its certificate and key included.
fn check_config(file: &Path) -> Result<String, Fail> {
    let config = Config::load(file)?;
    let tls = Tls::load(config.tls)?;
    let (site, profile, voters) = (config.site, config.profile, config.peers.len());
    Ok(format!("site {site}, profile {profile}, {voters} voters, certificate of {}", tls.identity()))
}
