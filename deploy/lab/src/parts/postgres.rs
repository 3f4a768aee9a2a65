//! Real parts of the postgres plane.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use crate::world::{Site, World};

/// Installs what is missing. Repeat: safe.
pub async fn install(_world: &World) -> Result<()> {
    bail!("parts of postgres cannot be installed by this build")
}

/// Starts the parts at both sites. Repeat: safe.
pub async fn start(_world: &World) -> Result<()> {
    bail!("parts of postgres cannot be started by this build")
}

/// Stops the parts at both sites. Repeat: safe.
pub async fn stop(_world: &World) -> Result<()> {
    Ok(())
}

/// The section of agent.toml.
pub fn agent_toml(_world: &World, _site: &Site) -> String {
    String::new()
}

/// The section of group.toml.
pub fn group_toml(_world: &World) -> String {
    String::new()
}

/// Versions of the parts.
pub fn versions(_world: &World) -> BTreeMap<String, String> {
    BTreeMap::new()
}
