//! The `[postgres]` section of an agent's file: read, checked together, once.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dc_core::ids::SiteId;
use serde::Deserialize;

/// How the agent starts, stops and promotes its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// With `pg_ctl`, signals and files of the same host and system user.
    Local,
}

/// Where an instance listens, as seen from this site.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// What differs by site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How the instance is driven.
    pub driver: Driver,
    /// Folder of `pg_ctl`, `pg_rewind`, `pg_basebackup` and `pg_controldata`.
    pub bin_dir: PathBuf,
    /// The data directory of this site's instance.
    pub data_dir: PathBuf,
    /// Folder of the instance's unix socket; outside `data_dir`.
    pub socket_dir: PathBuf,
    /// The agent's role.
    pub user: String,
    /// Its password, in a file that nobody else can read.
    pub password_file: PathBuf,
    /// The role by which one instance follows the other.
    pub replication_user: String,
    /// Its password, in a file that nobody else can read.
    pub replication_password_file: PathBuf,
    /// Database that the agent's own sessions use; our epoch rows lie there.
    #[serde(default = "maintenance")]
    pub database: String,
    /// Both instances of the pair, each at the address by which *this* site reaches it.
    pub sites: BTreeMap<SiteId, Address>,
}

fn maintenance() -> String {
    "postgres".to_owned()
}

/// Why the plane cannot be built from its settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct BuildError {
    /// Which key of which file.
    pub key: String,
    /// What is wrong, with the word or number found.
    pub why: String,
}

impl BuildError {
    pub(crate) fn new(key: &str, why: impl Into<String>) -> Self {
        Self { key: format!("postgres.{key}"), why: why.into() }
    }
}

impl Config {
    /// Checks all that can be checked without a network.
    ///
    /// Errors: the first fault, by its key.
    pub(crate) fn check(&self, own: &SiteId, peer: &SiteId, app_roles: &[String]) -> Result<(), BuildError> {
        for (key, path) in
            [("bin_dir", &self.bin_dir), ("data_dir", &self.data_dir), ("socket_dir", &self.socket_dir)]
        {
            if !path.is_absolute() {
                return Err(BuildError::new(key, format!("{} is not an absolute path", path.display())));
            }
            if path.to_str().is_none_or(|text| text.contains(['\n', '\'', '"', ','])) {
                return Err(BuildError::new(key, "holds a quote, a comma or a line break"));
            }
        }
        if self.socket_dir.starts_with(&self.data_dir) {
            let why = "lies within data_dir; base backups would carry its lock file to the other site";
            return Err(BuildError::new("socket_dir", why));
        }
        for tool in ["pg_ctl", "pg_rewind", "pg_basebackup", "pg_controldata"] {
            if !self.bin_dir.join(tool).is_file() {
                return Err(BuildError::new("bin_dir", format!("{} has no {tool}", self.bin_dir.display())));
            }
        }
        for site in [own, peer] {
            if !self.sites.contains_key(site) {
                return Err(BuildError::new("sites", format!("{site} has no address")));
            }
        }
        self.check_names(app_roles)?;
        for (key, path) in [
            ("password_file", &self.password_file),
            ("replication_password_file", &self.replication_password_file),
        ] {
            secret(path).map_err(|why| BuildError::new(key, why))?;
        }
        Ok(())
    }

    fn check_names(&self, app_roles: &[String]) -> Result<(), BuildError> {
        for (key, name) in
            [("user", &self.user), ("replication_user", &self.replication_user), ("database", &self.database)]
        {
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if name.is_empty() || name.len() > 40 || !plain {
                let why = format!("{name:?} is not 1 to 40 of letters, digits and '_'");
                return Err(BuildError::new(key, why));
            }
        }
        if self.user == self.replication_user {
            return Err(BuildError::new("replication_user", "is the agent's own role; it needs its own"));
        }
        if let Some(own) = app_roles.iter().find(|r| **r == self.user || **r == self.replication_user) {
            let why = format!("{own} is a role of the agent; a fence would shut the agent out");
            return Err(BuildError::new("app_roles", why));
        }
        Ok(())
    }
}

/// Reads a secret from a file that nobody else can read. Never shows it.
pub(crate) fn secret(path: &Path) -> Result<String, String> {
    let meta = std::fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mode = meta.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!("{} has mode {mode:o}; others can read it, make it 600", path.display()));
    }
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let text = text.trim_end_matches(['\n', '\r']);
    if text.is_empty() || text.contains('\n') {
        return Err(format!("{} must hold one line, the password", path.display()));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn refuses_a_secret_that_others_can_read() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("s");
        std::fs::write(&path, "hunter2\n")?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
        let refused = secret(&path);
        assert!(refused.as_ref().is_err_and(|why| why.contains("644") && !why.contains("hunter2")));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        assert_eq!(secret(&path).as_deref(), Ok("hunter2"));
        Ok(())
    }

    #[test]
    fn refuses_unknown_keys() {
        let text = "driver = 'local'\nbin_dir = '/b'\ndata_dir = '/d'\nsocket_dir = '/s'\nuser = 'a'\n\
                    password_file = '/p'\nreplication_user = 'r'\nreplication_password_file = '/q'\n\
                    typo = 1\n[sites]\n";
        let read = toml::from_str::<Config>(text);
        assert!(read.is_err_and(|e| e.to_string().contains("typo")));
    }
}
