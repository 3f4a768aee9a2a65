//! The `[airflow]` section of agent.toml, and everything about it that can be checked without a network.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use dc_core::ids::{PlaneKind, SiteId};
use dc_core::spec::{AirflowSpec, GroupSpec};
use serde::Deserialize;

/// How units are started and stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// Units under `dc-guardian keep` on the agent's host.
    Exec,
}

/// The `[airflow]` section of an agent's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How units are started and stopped.
    pub driver: Driver,
    /// `AIRFLOW_HOME`; units run in it.
    pub home: PathBuf,
    /// Folder with the `python` that has Airflow and `dcswitch_airflow` installed.
    pub bin_dir: PathBuf,
    /// Settings of every Airflow process, as `KEY=value` lines; readable by its owner only. It must hold
    /// `AIRFLOW__DATABASE__SQL_ALCHEMY_CONN`, the metadata database of this site.
    pub env_file: PathBuf,
    /// User of the REST API, with the right to change DAGs and task instances.
    pub user: String,
    /// File with the user's password, readable by its owner only.
    pub password_file: PathBuf,
    /// Where keepers put sockets and logs; `airflow` in the agent's data folder when not said.
    #[serde(default)]
    pub run_dir: Option<PathBuf>,
    /// The guardian's binary; beside the running executable when not said.
    #[serde(default)]
    pub guardian_bin: Option<PathBuf>,
    /// A cgroup v2 folder in which units get a leaf of their own, where it can be written.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// The DAG that is run once after a move.
    #[serde(default = "canary")]
    pub canary_dag: String,
    /// The Airflow of each site.
    pub sites: BTreeMap<SiteId, SiteConfig>,
}

/// The Airflow of one site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// As in `http://127.1.1.1:18080`.
    pub api: String,
}

fn canary() -> String {
    "dc_switch_canary".to_owned()
}

/// A configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct BuildError {
    /// Which key of which file.
    pub key: String,
    /// What is wrong with it, with what was found.
    pub why: String,
}

fn fault(key: &str, why: impl Into<String>) -> BuildError {
    BuildError { key: key.to_owned(), why: why.into() }
}

/// Everything the rest of the room needs, checked. Never printed: it holds secrets.
#[derive(Clone)]
pub(crate) struct Checked {
    pub(crate) spec: AirflowSpec,
    pub(crate) site: SiteId,
    pub(crate) api: String,
    pub(crate) user: String,
    pub(crate) password: String,
    pub(crate) database: tokio_postgres::Config,
    /// The name by which this site's scheduler signs its row; none when the settings do not say it.
    pub(crate) host: Option<String>,
    pub(crate) settings: Vec<(String, String)>,
    pub(crate) python: PathBuf,
    pub(crate) home: PathBuf,
    pub(crate) env_file: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) guardian: PathBuf,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) canary_dag: String,
}

/// Reads a file of secrets that only its owner may read.
fn private(key: &str, path: &Path) -> Result<String, BuildError> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|e| fault(key, format!("{shown} cannot be read: {e}")))?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(fault(key, format!("{shown} has mode {mode:04o}, others may read it; chmod 0600")));
    }
    fs::read_to_string(path).map_err(|e| fault(key, format!("{shown} cannot be read: {e}")))
}

/// Reads `KEY=value` lines as `dc-guardian keep --env-file` does.
fn settings(key: &str, text: &str) -> Result<Vec<(String, String)>, BuildError> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (name, value) =
            line.split_once('=').ok_or_else(|| fault(key, format!("line {} is not KEY=value", at + 1)))?;
        found.push((name.to_owned(), value.to_owned()));
    }
    Ok(found)
}

fn database(key: &str, settings: &[(String, String)]) -> Result<tokio_postgres::Config, BuildError> {
    const NAME: &str = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN";
    let (_, url) = settings
        .iter()
        .rev()
        .find(|(name, _)| name == NAME)
        .ok_or_else(|| fault(key, format!("{NAME} is not set in it")))?;
    let (scheme, rest) = url
        .split_once("://")
        .ok_or_else(|| fault(key, format!("{NAME} is no URL as in postgresql://...")))?;
    if !matches!(scheme.split('+').next(), Some("postgresql" | "postgres")) {
        return Err(fault(key, format!("{NAME} begins with {scheme:?}; only PostgreSQL is known")));
    }
    let mut parsed: tokio_postgres::Config = format!("postgresql://{rest}")
        .parse()
        .map_err(|_| fault(key, format!("{NAME} cannot be understood as a PostgreSQL URL")))?;
    if matches!(parsed.get_ssl_mode(), tokio_postgres::config::SslMode::Require) {
        return Err(fault(
            key,
            format!("{NAME} asks for sslmode=require, which this version does not speak"),
        ));
    }
    parsed.application_name("dc-switch");
    Ok(parsed)
}

impl Config {
    /// Checks the section against the group's spec.
    ///
    /// Errors: the first fault, naming its key. Reads files, asks no network.
    pub(crate) fn check(
        self,
        spec: &GroupSpec,
        site: SiteId,
        data_dir: &Path,
    ) -> Result<Checked, BuildError> {
        let airflow =
            spec.airflow.clone().ok_or_else(|| fault("group airflow", "the group has no [airflow]"))?;
        let found =
            self.sites.get(&site).ok_or_else(|| fault(&format!("airflow.sites.{site}"), "is missing"))?;
        let api = found.api.trim_end_matches('/').to_owned();
        if !api
            .strip_prefix("http://")
            .is_some_and(|host| !host.is_empty() && !host.contains(['@', '?', '#', ' ']))
        {
            let why = format!("{:?} is no address as in \"http://127.1.1.1:18080\"", found.api);
            return Err(fault(&format!("airflow.sites.{site}.api"), why));
        }
        for (key, path) in [("airflow.home", &self.home), ("airflow.bin_dir", &self.bin_dir)] {
            if !path.is_absolute() || !path.is_dir() {
                return Err(fault(key, format!("{} is no folder with an absolute path", path.display())));
            }
        }
        let python = self.bin_dir.join("python");
        if !python.is_file() {
            return Err(fault("airflow.bin_dir", format!("{} is missing", python.display())));
        }
        let settings = settings("airflow.env_file", &private("airflow.env_file", &self.env_file)?)?;
        let password = private("airflow.password_file", &self.password_file)?.trim().to_owned();
        if password.is_empty() {
            return Err(fault("airflow.password_file", format!("{} is empty", self.password_file.display())));
        }
        let guardian = self.guardian_bin.map_or_else(beside, Ok)?;
        if !guardian.is_file() {
            return Err(fault("airflow.guardian_bin", format!("{} is missing", guardian.display())));
        }
        Ok(Checked {
            spec: airflow,
            site,
            api,
            user: self.user,
            password,
            database: database("airflow.env_file", &settings)?,
            host: settings
                .iter()
                .rev()
                .find(|(name, _)| name == "DC_SITE_HOST")
                .map(|(_, host)| host.clone()),
            settings,
            python,
            home: self.home,
            env_file: self.env_file,
            run_dir: self.run_dir.unwrap_or_else(|| data_dir.join(PlaneKind::Airflow.word())),
            guardian,
            cgroup: self.cgroup,
            canary_dag: self.canary_dag,
        })
    }
}

fn beside() -> Result<PathBuf, BuildError> {
    let own = std::env::current_exe().map_err(|e| {
        fault("airflow.guardian_bin", format!("is not set, and the own path is unknown: {e}"))
    })?;
    Ok(own.with_file_name("dc-guardian"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metadata_database_is_read_from_the_settings_and_its_password_is_never_told() {
        let with = |url: &str| {
            database("env", &[("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN".to_owned(), url.to_owned())])
        };
        let good = with("postgresql+psycopg2://airflow:s%40cret@127.1.1.1:25432/airflow").ok();
        let good = good.map(|c| (c.get_password().map(<[u8]>::to_vec), c.get_ports().to_vec()));
        assert_eq!(good, Some((Some(b"s@cret".to_vec()), vec![25432])));
        for bad in [
            "sqlite:////x",
            "postgresql://a:hidden@h:notaport/x",
            "nonsense-hidden",
            "postgresql://a@h/x?sslmode=require",
        ] {
            let told = with(bad).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(!told.is_empty() && !told.contains("hidden"), "{bad}: {told}");
        }
        assert!(database("env", &[]).is_err());
    }

    #[test]
    fn settings_that_others_may_read_are_refused() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("env");
        fs::write(&path, "A=1")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        assert!(private("k", &path).is_err_and(|e| e.why.contains("0600")));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        assert_eq!(private("k", &path).as_deref(), Ok("A=1"));
        Ok(())
    }
}
