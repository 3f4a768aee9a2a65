//! `config`: checks an agent's config before an agent reads it.

use std::path::PathBuf;

use clap::Subcommand;
use dc_core::fail::{Exit, Fail};
use serde_json::json;

use super::Roof;
use super::out::{Out, clean, envelope};

/// Of `config`.
#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Checks an agent's config; starts nothing
    Check {
        /// Agent's config, TOML
        file: PathBuf,
    },
}

impl Config {
    pub(crate) fn run(self, out: &Out, roof: Roof) -> Result<Exit, Fail> {
        let Self::Check { file } = self;
        let found = (roof.check_config)(&file)?;
        if out.human() {
            out.print(&format!("{} {}: {}", out.green("+ good"), file.display(), clean(&found)));
        } else {
            out.json(&envelope(json!({"file": file, "good": true, "found": found})));
        }
        Ok(Exit::Done)
    }
}
