//! Processes of a lab: started in their own session, known by pid and start time, ended by exactly that.
//!
//! Never ends anything that it cannot show to be this lab's own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::world::World;

/// Environment variable that every process of a lab carries: the lab's root folder.
pub const MARK: &str = "DC_LAB_WORLD";

/// One process, told apart from any later one that gets its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Process id; also its session.
    pub pid: u32,
    /// Start time in clock ticks since boot.
    pub start: u64,
}

/// Fields of `/proc/PID/stat` that the lab needs.
#[derive(Debug, Clone, Copy)]
struct Stat {
    state: char,
    session: u32,
    start: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = text.get(text.rfind(')')? + 2..)?;
    let f: Vec<&str> = rest.split(' ').collect();
    Some(Stat {
        state: f.first()?.chars().next()?,
        session: f.get(3)?.parse().ok()?,
        start: f.get(19)?.parse().ok()?,
    })
}

/// All process ids of the machine.
fn pids() -> Vec<u32> {
    let Ok(dir) = fs::read_dir("/proc") else { return Vec::new() };
    dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The recorded process, if it is still the same one and no zombie.
pub fn recorded(record: &Path) -> Option<Recorded> {
    let known: Recorded = serde_json::from_str(&fs::read_to_string(record).ok()?).ok()?;
    let now = stat(known.pid)?;
    (now.start == known.start && now.state != 'Z').then_some(known)
}

/// Resident memory of one process in KiB, its peak if `peak`. `None` once it is gone.
pub fn rss_kib(pid: u32, peak: bool) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let key = if peak { "VmHWM:" } else { "VmRSS:" };
    text.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Runs a command to its end.
///
/// Errors: cannot start, longer than `limit` (it is killed), or a code other than 0; the last lines are quoted.
pub async fn run(cmd: &mut Command, limit: Duration) -> Result<std::process::Output> {
    let shown = cmd.as_std().get_program().display().to_string();
    cmd.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let out = match tokio::time::timeout(limit, cmd.output()).await {
        Ok(out) => out.with_context(|| format!("run {shown}"))?,
        Err(_) => bail!("{shown} did not end within {limit:?}"),
    };
    if !out.status.success() {
        let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&out.stderr));
        bail!("{shown} ended with {}:\n{}", out.status, last_lines(&text, 15));
    }
    Ok(out)
}

/// The last `n` lines of a text.
pub fn last_lines(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

/// Starts a process of the lab in its own session; see [`World::spawn`]. `stdin` is kept open by the process.
pub fn spawn(world: &World, name: &str, cmd: &Command, stdin: Option<fs::File>) -> Result<u32> {
    let inner = cmd.as_std();
    let mut outer = Command::new("setsid"); // execs in place: a fresh child leads no group, so the pid stays
    outer.arg(inner.get_program()).args(inner.get_args());
    world.prepare(&mut outer);
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => outer.env(key, value),
            None => outer.env_remove(key),
        };
    }
    if let Some(dir) = inner.get_current_dir() {
        outer.current_dir(dir);
    }
    let log = world.log(name);
    let out = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open {}", log.display()))?;
    world.own(&log)?;
    outer.stdout(out.try_clone()?).stderr(out);
    outer.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
    let child = outer.spawn().with_context(|| format!("start {name}"))?;
    let pid = child.id().with_context(|| format!("{name} ended at once, see {}", log.display()))?;
    let start = stat(pid).with_context(|| format!("{name} ended at once, see {}", log.display()))?.start;
    world.write(&world.record(name), &serde_json::to_string(&Recorded { pid, start })?, 0o644)?;
    reap(child);
    Ok(pid)
}

/// Takes the exit of a child whenever it comes, so that no zombie looks alive.
fn reap(mut child: tokio::process::Child) {
    tokio::spawn(async move {
        let _ = child.wait().await;
    });
}

fn signal(pid: u32, what: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, what); // gone already is what we want
    }
}

fn session_of(leader: Recorded) -> Vec<u32> {
    let is_member = |p: &u32| {
        stat(*p).is_some_and(|s| s.session == leader.pid && s.start >= leader.start && s.state != 'Z')
    };
    pids().into_iter().filter(is_member).collect()
}

/// Ends a recorded process with its session and removes the record; see [`World::stop`].
///
/// Errors: something of the session is still alive 5 s after SIGKILL.
pub async fn stop(record: &Path, grace: Duration) -> Result<()> {
    let Ok(text) = fs::read_to_string(record) else { return Ok(()) };
    let known: Recorded =
        serde_json::from_str(&text).with_context(|| format!("read {}", record.display()))?;
    let reused = stat(known.pid).is_some_and(|s| s.start != known.start);
    if !reused {
        if recorded(record).is_some() {
            signal(known.pid, Signal::TERM);
            wait_gone(grace, || recorded(record).is_none()).await;
        }
        let limit = Instant::now() + Duration::from_secs(5);
        loop {
            let left = session_of(known);
            if left.is_empty() {
                break;
            }
            if Instant::now() >= limit {
                bail!("processes {left:?} of {} outlive SIGKILL", record.display());
            }
            for pid in left {
                signal(pid, Signal::KILL);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    fs::remove_file(record).with_context(|| format!("remove {}", record.display()))
}

async fn wait_gone(limit: Duration, gone: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !gone() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

/// Does this process belong to the lab? By its environment, or by a file of the lab that it holds open for writing.
fn belongs(pid: u32, root: &Path, owner: Option<(u32, u32)>) -> bool {
    let Ok(meta) = fs::metadata(format!("/proc/{pid}")) else { return false };
    let uid = owner.map_or_else(|| rustix::process::geteuid().as_raw(), |o| o.0);
    if meta.uid() != uid || pid == std::process::id() {
        return false;
    }
    let mark = format!("{MARK}={}", root.display());
    let marked = fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|env| env.split(|b| *b == 0).any(|kv| kv == mark.as_bytes()));
    marked || writes_below(pid, root)
}

fn writes_below(pid: u32, root: &Path) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.filter_map(Result::ok).any(|fd| {
        let below = fs::read_link(fd.path()).is_ok_and(|p| p.starts_with(root));
        below && writable(pid, &fd.file_name().to_string_lossy())
    })
}

fn writable(pid: u32, fd: &str) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else { return false };
    let flags = text
        .lines()
        .find_map(|l| l.strip_prefix("flags:"))
        .and_then(|f| u32::from_str_radix(f.trim(), 8).ok());
    flags.is_some_and(|f| f & 0o3 != 0)
}

fn own_processes(root: &Path, owner: Option<(u32, u32)>) -> Vec<u32> {
    pids()
        .into_iter()
        .filter(|p| stat(*p).is_some_and(|s| s.state != 'Z') && belongs(*p, root, owner))
        .collect()
}

/// The processes of a lab that are alive now, each with its command line.
pub fn living(root: &Path, owner: Option<(u32, u32)>) -> Vec<String> {
    own_processes(root, owner).into_iter().map(shown).collect()
}

fn shown(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    format!("{pid} {}", line.chars().take(120).collect::<String>())
}

/// Ends all that still belongs to the lab: SIGTERM, 5 s, SIGKILL. Returns what was found.
pub async fn sweep(root: &Path, owner: Option<(u32, u32)>) -> Vec<String> {
    let found = own_processes(root, owner);
    let told: Vec<String> = found.iter().copied().map(shown).collect();
    for pid in &found {
        signal(*pid, Signal::TERM);
    }
    wait_gone(Duration::from_secs(5), || own_processes(root, owner).is_empty()).await;
    for _ in 0..50 {
        let left = own_processes(root, owner);
        if left.is_empty() {
            break;
        }
        for pid in left {
            signal(pid, Signal::KILL);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    told
}

/// The names of all recorded processes.
pub fn names(world: &World) -> Vec<String> {
    let Ok(dir) = fs::read_dir(world.root.join("run")) else { return Vec::new() };
    let stem =
        |p: PathBuf| (p.extension()? == "json").then(|| p.file_stem()?.to_str().map(String::from)).flatten();
    let mut names: Vec<String> = dir.filter_map(|e| stem(e.ok()?.path())).collect();
    names.sort();
    names
}
