//! The two units of a site: the API server, and the writers (scheduler, dag processor, triggerer).
//!
//! Each is a warm interpreter behind a gate, kept by a guardian. The keeper knows every process
//! of its unit and outlives the agent; the gate forks the parts that work when it is opened with
//! an authority. What no keeper answers for is proved gone by `dc-guardian reap` alone.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use dc_core::authority::{Authority, Origin};
use dc_core::time::millis;
use dc_plane::{Deadline, PlaneError, wait_until};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::config::Checked;
use crate::tools::Facts;

/// A unit of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// The API server, which tasks report to.
    Api,
    /// Scheduler, dag processor and triggerer.
    Writers,
}

impl Unit {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Writers => "writers",
        }
    }

    /// What works in it. Of the writers the scheduler alone decides how long tasks wait.
    pub(crate) fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Api => &["api"],
            Self::Writers => &[SCHEDULER, "dag-processor", "triggerer"],
        }
    }
}

/// The part that starts tasks.
pub(crate) const SCHEDULER: &str = "scheduler";

/// What a keeper says of its unit.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Kept {
    /// `running`, `orphaned` or `gone`.
    pub(crate) state: String,
    /// Living processes.
    pub(crate) pids: Vec<i32>,
}

/// What the gate of a unit says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Gate {
    /// `closed`, `open` or `draining`.
    pub(crate) state: String,
    /// Working parts by name.
    pub(crate) parts: std::collections::BTreeMap<String, i32>,
    /// Milliseconds since the gate was opened; none while it is not.
    pub(crate) open_ms: Option<u64>,
}

impl Gate {
    /// Whether every part of the unit works.
    pub(crate) fn whole(&self, unit: Unit) -> bool {
        self.open() && unit.parts().iter().all(|part| self.parts.contains_key(*part))
    }

    pub(crate) fn open(&self) -> bool {
        self.state == "open"
    }
}

#[derive(Deserialize)]
struct Waiting {
    waiting: u64,
}

/// Proof that no process of a unit exists.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Gone {
    /// Processes that had to be ended for it.
    pub(crate) killed: usize,
}

/// Where units are kept, and with what.
#[derive(Debug, Clone)]
pub(crate) struct Units {
    guardian: PathBuf,
    dir: PathBuf,
    env_file: PathBuf,
    home: PathBuf,
    python: PathBuf,
    cgroup: Option<PathBuf>,
}

const POLL: Duration = Duration::from_millis(20);
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
const KEPT: i32 = 3;
const LEFTOVERS: i32 = 4;

impl Units {
    pub(crate) fn new(checked: &Checked) -> Self {
        Self {
            guardian: checked.guardian.clone(),
            dir: checked.run_dir.clone(),
            env_file: checked.env_file.clone(),
            home: checked.home.clone(),
            python: checked.python.clone(),
            cgroup: checked.cgroup.clone(),
        }
    }

    fn path(&self, unit: Unit, ending: &str) -> PathBuf {
        self.dir.join(format!("{}.{ending}", unit.word()))
    }

    /// What the keeper says; none when none answers, which proves nothing.
    pub(crate) async fn kept(&self, unit: Unit, until: Deadline) -> Result<Option<Kept>, PlaneError> {
        ask(&self.path(unit, "sock"), &json!({"do": "status"}), soon(until)).await
    }

    /// What the gate says; none when none answers: not started, still importing, or ended.
    pub(crate) async fn gate(&self, unit: Unit, until: Deadline) -> Result<Option<Gate>, PlaneError> {
        ask(&self.path(unit, "gate"), &json!({"do": "status"}), soon(until)).await
    }

    /// What the running interpreter says of its installation; none when no gate answers.
    pub(crate) async fn facts(&self, nonce: &str, until: Deadline) -> Result<Option<Facts>, PlaneError> {
        let request = json!({"do": "facts", "nonce": nonce});
        for unit in [Unit::Writers, Unit::Api] {
            if let Some(found) = ask(&self.path(unit, "gate"), &request, until).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// How many finished attempts' logs wait on disk; none when no gate answers.
    pub(crate) async fn logs_waiting(&self, until: Deadline) -> Result<Option<u64>, PlaneError> {
        let found: Option<Waiting> =
            ask(&self.path(Unit::Api, "gate"), &json!({"do": "logs"}), until).await?;
        Ok(found.map(|found| found.waiting))
    }

    /// The unit kept and warm, its gate as it is. Starts it when it does not run, ends first
    /// what drains or what a dead keeper left.
    ///
    /// Repeat: safe. Errors: `Failed` with the log's last line when the unit ends while warming.
    pub(crate) async fn warm(&self, unit: Unit, until: Deadline) -> Result<(Gate, bool), PlaneError> {
        let mut started = false;
        loop {
            if self.kept(unit, until).await?.is_none_or(|kept| kept.state != "running") {
                self.end(unit, Duration::ZERO, until).await?;
                self.start(unit, until).await?;
                started = true;
            }
            let gate = self.answering(unit, until).await?;
            if gate.state != "draining" {
                return Ok((gate, started));
            }
            self.end(unit, Duration::ZERO, until).await?;
        }
    }

    /// Waits until the gate of a kept unit answers.
    async fn answering(&self, unit: Unit, until: Deadline) -> Result<Gate, PlaneError> {
        let what = format!("{} to be warm", unit.word());
        wait_until(until, POLL, &what, || async {
            if let Some(gate) = self.gate(unit, until).await? {
                return Ok(Some(gate));
            }
            match self.kept(unit, until).await? {
                Some(kept) if kept.state == "running" => Ok(None),
                _ => Err(PlaneError::Failed {
                    what: format!("warm {}", unit.word()),
                    why: format!("the unit ended; {}", self.last_words(unit)),
                }),
            }
        })
        .await
    }

    async fn start(&self, unit: Unit, until: Deadline) -> Result<(), PlaneError> {
        // a gate's socket of an ended unit refuses; of a killed one it lies about
        let _ = std::fs::remove_file(self.path(unit, "gate"));
        let mut command = Command::new(&self.guardian);
        command.args(["keep", unit.word(), "--dir"]).arg(&self.dir);
        command.arg("--env-file").arg(&self.env_file).arg("--cwd").arg(&self.home);
        if let Some(cgroup) = &self.cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command.arg("--").arg(&self.python).args(["-m", "dcswitch_airflow.boot", unit.word(), "--socket"]);
        command.arg(self.path(unit, "gate"));
        let (code, said) = run(command, &format!("keep {}", unit.word()), until).await?;
        match code {
            // a keeper that another caller started meanwhile is as good
            Some(0 | KEPT) => Ok(()),
            Some(LEFTOVERS) => Err(PlaneError::refused("DC-0610", format!("{}: {said}", unit.word()))),
            _ => Err(PlaneError::Failed { what: format!("keep {}", unit.word()), why: said }),
        }
    }

    /// Opens the gate with an authority that may open, for all parts or for these.
    ///
    /// Repeat: safe. Errors: `Refused` without such an authority.
    pub(crate) async fn open(
        &self,
        unit: Unit,
        parts: &[&str],
        by: &Authority,
        until: Deadline,
    ) -> Result<Gate, PlaneError> {
        let by = match by.origin() {
            Origin::Step { run, epoch, token } => {
                json!({"origin": "step", "run": run.0, "epoch": epoch.to_string(), "token": token.0})
            }
            Origin::Reopen { epoch } => json!({"origin": "reopen", "epoch": epoch.to_string()}),
            Origin::SelfFence if unit == Unit::Api => json!({"origin": "standby", "epoch": "none"}),
            Origin::SelfFence => {
                return Err(PlaneError::refused("DC-0620", "writers are opened by a step or a reopen only"));
            }
        };
        self.tell(unit, &json!({"do": "open", "by": by, "parts": parts}), soon(until)).await
    }

    /// Ends the API's working part; the warm interpreter stays, without a session anywhere.
    pub(crate) async fn close_api(&self, grace: Duration, until: Deadline) -> Result<Gate, PlaneError> {
        self.tell(Unit::Api, &json!({"do": "close", "grace_ms": millis(grace)}), until).await
    }

    async fn tell(&self, unit: Unit, request: &Value, until: Deadline) -> Result<Gate, PlaneError> {
        let found = ask(&self.path(unit, "gate"), request, until).await?;
        found.ok_or_else(|| PlaneError::Unreachable {
            what: format!("gate of {}", unit.word()),
            why: self.last_words(unit),
        })
    }

    /// Asks the unit to end and waits; never kills. True once the keeper says that nothing is left,
    /// or when no keeper answers.
    pub(crate) async fn stop(
        &self,
        unit: Unit,
        grace: Duration,
        until: Deadline,
    ) -> Result<bool, PlaneError> {
        let grace = grace.min(until.left());
        let request = json!({"do": "stop", "signal": "TERM", "grace_ms": millis(grace)});
        let answer = Deadline(tokio::time::Instant::now() + grace + ANSWER_WITHIN);
        let kept: Option<Kept> = ask(&self.path(unit, "sock"), &request, answer).await?;
        Ok(kept.is_none_or(|kept| kept.state == "gone"))
    }

    /// Ends the unit, with a grace before the kill, and proves that none of its processes exists.
    ///
    /// Repeat: safe. Errors: `Failed` naming what is left at the deadline.
    pub(crate) async fn end(&self, unit: Unit, grace: Duration, until: Deadline) -> Result<Gone, PlaneError> {
        let mut living = self.kept(unit, until).await?.map_or(0, |kept| kept.pids.len());
        if living > 0 && !grace.is_zero() && self.stop(unit, grace, until).await? {
            living = 0;
        }
        if living > 0 {
            let request = json!({"do": "kill", "grace_ms": millis(until.left().min(ANSWER_WITHIN))});
            let _: Option<Kept> = ask(&self.path(unit, "sock"), &request, until).await?;
        }
        let gone = self.reap(unit, until).await?;
        Ok(Gone { killed: gone.killed + living })
    }

    async fn reap(&self, unit: Unit, until: Deadline) -> Result<Gone, PlaneError> {
        let what = format!("prove {} gone", unit.word());
        wait_until(until, POLL, &what, || async {
            let mut command = Command::new(&self.guardian);
            command.args(["reap", unit.word(), "--dir"]).arg(&self.dir);
            match run(command, &what, until).await? {
                (Some(0), said) => {
                    serde_json::from_str(&said).map(Some).map_err(|e| PlaneError::failed(what.clone(), &e))
                }
                // the keeper has said its last word and is leaving
                (Some(KEPT), _) => Ok(None),
                (_, said) => Err(PlaneError::Failed { what: what.clone(), why: said }),
            }
        })
        .await
    }

    /// The last line of a unit's log.
    pub(crate) fn last_words(&self, unit: Unit) -> String {
        let path = self.path(unit, "log");
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
        let last: String = last.chars().take(300).collect();
        format!("{} ends with: {last}", path.display())
    }
}

fn soon(until: Deadline) -> Deadline {
    until.min(Deadline::within(ANSWER_WITHIN))
}

/// Runs a command to its end; its code, and what it said (its output, or its errors when it failed).
pub(crate) async fn run(
    mut command: Command,
    what: &str,
    until: Deadline,
) -> Result<(Option<i32>, String), PlaneError> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let out = until.bound(what, command.output()).await?.map_err(|e| PlaneError::failed(what, &e))?;
    let text = if out.status.success() { &out.stdout } else { &out.stderr };
    Ok((out.status.code(), String::from_utf8_lossy(text).trim().to_owned()))
}

#[derive(Deserialize)]
struct Misunderstood {
    error: String,
}

/// One request over a unit's socket; none when nobody listens there.
async fn ask<T: for<'de> Deserialize<'de>>(
    path: &Path,
    request: &Value,
    until: Deadline,
) -> Result<Option<T>, PlaneError> {
    let what = format!("ask {}", path.display());
    let talk = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(format!("{request}\n").as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line).await?;
        Ok::<_, std::io::Error>(line)
    };
    let line = match until.bound(&what, talk).await? {
        Ok(line) if line.is_empty() => return Ok(None),
        Ok(line) => line,
        Err(cause) => {
            return match cause.kind() {
                ErrorKind::NotFound
                | ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::BrokenPipe => Ok(None),
                _ => Err(PlaneError::unreachable(what, &cause)),
            };
        }
    };
    if let Ok(Misunderstood { error }) = serde_json::from_str(&line) {
        return Err(PlaneError::Failed { what, why: error });
    }
    serde_json::from_str(&line).map(Some).map_err(|e| PlaneError::failed(what, &e))
}
