//! The instance's processes as the system shows them.
//!
//! SQL does not see a login that is still under way, and such a login may commit up to twice
//! `authentication_timeout` after the door was shut. The process table sees it, so the proof of an empty instance is
//! taken there: every child of the postmaster is auxiliary, a session of ours, or ended.

use std::fs;
use std::path::{Path, PathBuf};

use dc_plane::PlaneError;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

/// Where a lock file says what the instance is about to do, counted from 0.
const STATUS_LINE: usize = 7;

/// One process, told apart from any later one that gets its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start: u64,
}

/// What a child of the postmaster is to a fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Child {
    /// Part of the server.
    Auxiliary,
    /// A session of the agent's role, here or at the other site.
    Ours,
    /// Sends log to a standby, by our replication role.
    Sender,
    /// Anything else, a login under way included.
    Client,
}

struct Stat {
    state: char,
    parent: i32,
    start: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = text.get(text.rfind(')')? + 2..)?;
    let words: Vec<&str> = rest.split(' ').collect();
    Some(Stat {
        state: words.first()?.chars().next()?,
        parent: words.get(1)?.parse().ok()?,
        start: words.get(19)?.parse().ok()?,
    })
}

impl Process {
    /// The living process of that number; none for a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        let seen = stat(pid)?;
        (seen.state != 'Z' && seen.state != 'X').then_some(Self { pid, start: seen.start })
    }

    /// Whether this very process lives.
    pub fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal. A process that is gone is no error.
    ///
    /// Errors: `Failed` when the system forbids it: the agent must run as the instance's user.
    pub fn signal(self, signal: Signal) -> Result<(), PlaneError> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.lives()) else { return Ok(()) };
        match rustix::process::kill_process(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(PlaneError::failed(format!("signal process {}", self.pid), &e)),
        }
    }
}

/// The postmaster of a data directory; none when no instance runs there.
///
/// The lock file may be a dead instance's whose number went to someone else, so the process must also stand in the
/// directory, as every postmaster does.
pub(crate) fn postmaster(data_dir: &Path) -> Option<Process> {
    let lock = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let pid = lock.lines().next()?.trim().parse().ok()?;
    let process = Process::of(pid)?;
    let stands_in: PathBuf = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    (stands_in == fs::canonicalize(data_dir).ok()?).then_some(process)
}

/// Whether the instance says of itself, in its lock file, that it is on its way down.
pub(crate) fn stopping(data_dir: &Path) -> bool {
    let lock = fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    lock.lines().nth(STATUS_LINE).is_some_and(|status| status.trim() == "stopping")
}

/// One child as a look at the list saw it; without a start when it was gone before it could be asked.
pub(crate) type Seen = (i32, Option<u64>);

/// The children of a process that were born by `born_by`, zombies included, in the order of their birth.
///
/// The system reads its list in pieces and may miss a child while an older one that it named already is being reaped.
/// Two equal lists in a row therefore name everybody: whoever was reaped during the first would be missing in the
/// second. Children born later stand behind and do not disturb that.
pub(crate) fn children(of: Process, born_by: u64) -> Vec<Seen> {
    let mut seen = Vec::new();
    for pid in child_numbers(of.pid) {
        match stat(pid) {
            Some(child) if child.start > born_by => break,
            child => seen.push((pid, child.map(|c| c.start))),
        }
    }
    seen
}

fn child_numbers(of: i32) -> Vec<i32> {
    if let Ok(text) = fs::read_to_string(format!("/proc/{of}/task/{of}/children")) {
        return text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    }
    // a kernel without that list: the whole table
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<(u64, i32)> = all
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            stat(pid).filter(|s| s.parent == of).map(|s| (s.start, pid))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, pid)| pid).collect()
}

/// Clock ticks since boot, as the process table counts births: hundredths of a second on every Linux.
pub(crate) fn ticks() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 100 + u64::try_from(now.tv_nsec).unwrap_or(0) / 10_000_000
}

/// The title by which a server process describes itself; empty while it exits, none once it is gone.
pub(crate) fn title(pid: i32) -> Option<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&raw).replace('\0', " ").trim().to_owned())
}

/// Words that a server process uses for itself. A role of such a name would look like one; preflight refuses it.
pub(crate) const SERVER_WORDS: [&str; 9] = [
    "checkpointer",
    "background",
    "walwriter",
    "autovacuum",
    "logical",
    "logger",
    "archiver",
    "startup",
    "walreceiver",
];

/// Tells from its title what a child of the postmaster is.
///
/// `cluster` is the server's `cluster_name`, which titles carry; `agent` and `sender` are our two roles.
pub(crate) fn classify(title: &str, cluster: &str, agent: &str, sender: &str) -> Child {
    let Some(rest) = title.strip_prefix("postgres: ") else { return Child::Client };
    let rest = if cluster.is_empty() {
        Some(rest)
    } else {
        rest.strip_prefix(cluster).and_then(|r| r.strip_prefix(": "))
    };
    let Some(rest) = rest else { return Child::Client };
    let mut words = rest.split_whitespace();
    let first = words.next().unwrap_or_default();
    let second = words.next();
    let auxiliary = match first {
        "checkpointer" | "walwriter" | "logger" => second.is_none(),
        "background" => second == Some("writer"),
        "autovacuum" => matches!(second, Some("launcher" | "worker")),
        "logical" => rest.trim() == "logical replication launcher",
        "archiver" | "startup" | "walreceiver" => true,
        "stats" => second == Some("collector"),
        _ => false,
    };
    if auxiliary {
        return Child::Auxiliary;
    }
    match (first, second) {
        ("walsender", Some(role)) if role == sender => Child::Sender,
        (role, Some(_)) if role == agent => Child::Ours,
        _ => Child::Client,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(title: &str) -> Child {
        classify(title, "", "dcswitch", "dcrepl")
    }

    #[test]
    fn knows_the_server_from_its_clients_by_the_title() {
        for own in [
            "postgres: checkpointer",
            "postgres: background writer",
            "postgres: walwriter",
            "postgres: autovacuum launcher",
            "postgres: autovacuum worker app",
            "postgres: logical replication launcher",
            "postgres: startup recovering 000000010000000000000003",
            "postgres: walreceiver streaming 0/3000148",
            "postgres: archiver last was 000000010000000000000003",
        ] {
            assert_eq!(kind(own), Child::Auxiliary, "{own}");
        }
        assert_eq!(kind("postgres: walsender dcrepl 127.0.0.1(4242) streaming 0/3000148"), Child::Sender);
        assert_eq!(kind("postgres: dcswitch postgres [local] idle"), Child::Ours);
    }

    #[test]
    fn a_login_under_way_is_a_client() {
        for client in [
            "/usr/lib/postgresql/15/bin/postgres -D /data",
            "postgres: app app 127.0.0.1(4242) authentication",
            "postgres: app app 127.0.0.1(4242) idle in transaction",
            "postgres: walsender backup 127.0.0.1(4242) sending backup",
            "postgres: logical replication worker for subscription 16390",
            "postgres: parallel worker for PID 99",
            "postgres:",
            "",
        ] {
            assert_eq!(kind(client), Child::Client, "{client:?}");
        }
    }

    #[test]
    fn titles_carry_the_cluster_name_exactly() {
        let named = |title| classify(title, "rome", "dcswitch", "dcrepl");
        assert_eq!(named("postgres: rome: checkpointer"), Child::Auxiliary);
        assert_eq!(named("postgres: rome: dcswitch postgres [local] idle"), Child::Ours);
        assert_eq!(named("postgres: dcswitch postgres [local] idle"), Child::Client);
        assert_eq!(kind("postgres: x: dcswitch postgres [local] idle"), Child::Client);
    }

    #[test]
    fn finds_its_own_process_and_no_zombie_number() {
        let own = i32::try_from(std::process::id()).ok().and_then(Process::of);
        assert!(own.is_some_and(Process::lives));
        assert!(own.is_some_and(|p| !Process { start: p.start + 1, ..p }.lives()));
        assert!(own.is_some_and(|p| p.start <= ticks() && ticks() < p.start + 100 * 3600));
    }
}
