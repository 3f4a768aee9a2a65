//! Two short programs of `dcswitch_airflow`, run in this site's own Airflow environment.

use std::collections::BTreeMap;

use dc_plane::{Deadline, PlaneError};
use serde::Deserialize;
use tokio::process::Command;

use crate::config::Checked;
use crate::units::run;

/// What this Airflow installation is, as Airflow itself reads its settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Facts {
    /// Of Airflow.
    pub(crate) version: String,
    /// Schema revisions that these binaries want.
    pub(crate) heads: Vec<String>,
    /// As in `LocalExecutor`.
    pub(crate) executor: String,
    /// By name of the key; made under a nonce.
    pub(crate) fingerprints: BTreeMap<String, String>,
    /// Keys that are not set.
    pub(crate) missing: Vec<String>,
    /// Keys that could be guessed.
    pub(crate) short: Vec<String>,
    /// Settings that decide how soon a task ends itself and a dead scheduler's tasks are taken over.
    pub(crate) numbers: BTreeMap<String, f64>,
    /// Whether logs go to the bucket.
    pub(crate) remote_logging: bool,
    /// As in `s3://orders/logs`.
    pub(crate) remote_log_base: String,
}

impl Facts {
    /// Seconds after which a task that cannot report has ended itself, when its API is silent: each
    /// missed heartbeat costs its interval, all tries to their end, and the pauses between them.
    pub(crate) fn fencing_bound_s(&self) -> f64 {
        let number = |name: &str, default: f64| self.numbers.get(name).copied().unwrap_or(default);
        let (tries, longest) = (number("api_retries", 5.0), number("api_retry_wait_max_s", 90.0));
        let mut pauses = 0.0;
        let mut pause = 1.0_f64;
        let mut left = tries - 1.0;
        while left >= 1.0 {
            pauses += pause.min(longest);
            pause *= 2.0;
            left -= 1.0;
        }
        let one = number("heartbeat_interval_s", 5.0) + tries * number("api_timeout_s", 5.0) + pauses;
        number("heartbeats_failed_max", 3.0) * one + 5.0
    }
}

/// What became of logs that lay on disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Logs {
    /// Attempts whose log had content on disk.
    pub(crate) found: u64,
    /// Of them, now in the bucket.
    pub(crate) uploaded: u64,
    /// Of them, still on disk; the first ones by name.
    pub(crate) left: Vec<String>,
    /// How many are left.
    pub(crate) left_count: u64,
}

fn command(checked: &Checked, module: &str) -> Command {
    let mut command = Command::new(&checked.python);
    command.args(["-m", module]).current_dir(&checked.home).env_clear();
    for key in ["PATH", "HOME", "LANG"] {
        if let Some(value) = std::env::var_os(key) {
            command.env(key, value);
        }
    }
    command.envs(checked.settings.iter().map(|(name, value)| (name, value)));
    command
}

fn last_line(said: &str) -> &str {
    said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing")
}

/// Reads the facts. Changes nothing.
pub(crate) async fn facts(checked: &Checked, nonce: &str, until: Deadline) -> Result<Facts, PlaneError> {
    let mut command = command(checked, "dcswitch_airflow.facts");
    command.arg(nonce);
    let (code, said) = run(command, "read the facts of Airflow", until).await?;
    if code != Some(0) {
        let why = format!("it ended with {code:?}: {}", last_line(&said));
        return Err(PlaneError::Failed { what: "read the facts of Airflow".into(), why });
    }
    serde_json::from_str(last_line(&said)).map_err(|e| PlaneError::failed("read the facts of Airflow", &e))
}

/// Uploads logs of finished attempts that lie on disk.
///
/// Repeat: safe. Errors: `Failed` naming how many could not be uploaded.
pub(crate) async fn upload_logs(checked: &Checked, until: Deadline) -> Result<Logs, PlaneError> {
    const WHAT: &str = "upload task logs";
    let mut command = command(checked, "dcswitch_airflow.logs");
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    let out = until.bound(WHAT, command.output()).await?.map_err(|e| PlaneError::failed(WHAT, &e))?;
    let said = String::from_utf8_lossy(&out.stdout);
    let Ok(uploaded) = serde_json::from_str::<Logs>(last_line(&said)) else {
        let told = String::from_utf8_lossy(&out.stderr);
        return Err(PlaneError::Failed { what: WHAT.into(), why: last_line(&told).to_owned() });
    };
    if uploaded.left_count > 0 {
        let told = String::from_utf8_lossy(&out.stderr);
        let why = format!(
            "{} of {} are still on disk, first {}: {}",
            uploaded.left_count,
            uploaded.found,
            uploaded.left.first().map_or("", String::as_str),
            last_line(&told)
        );
        return Err(PlaneError::Failed { what: WHAT.into(), why });
    }
    Ok(uploaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(numbers: &[(&str, f64)]) -> Facts {
        Facts {
            version: "3.3.2".into(),
            heads: vec![],
            executor: "LocalExecutor".into(),
            fingerprints: BTreeMap::new(),
            missing: vec![],
            short: vec![],
            numbers: numbers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            remote_logging: true,
            remote_log_base: String::new(),
        }
    }

    #[test]
    fn the_fencing_bound_follows_from_the_settings() {
        let default = facts(&[]).fencing_bound_s();
        assert!((default - 140.0).abs() < 0.01, "{default}");
        let tuned = facts(&[
            ("heartbeat_interval_s", 3.0),
            ("heartbeats_failed_max", 2.0),
            ("api_retries", 3.0),
            ("api_timeout_s", 5.0),
            ("api_retry_wait_max_s", 3.0),
        ]);
        assert!((tuned.fencing_bound_s() - 47.0).abs() < 0.01, "{}", tuned.fencing_bound_s());
    }
}
