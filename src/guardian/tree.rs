//! Which processes belong to whom, as `/proc` tells it.
//!
//! While a keeper lives, its descendants are its unit: it is the subreaper, so an orphan's
//! parent is the keeper again. Without a keeper a process is known by its session, its mark in
//! the environment, its cgroup, or by descending from one that is known.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::unit::{MARK, Note, Unit};

/// One line of the process table. Zombies are not in it: they do nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Parent.
    pub parent: i32,
    /// Session.
    pub session: i32,
    /// Ticks since boot.
    pub started: u64,
}

/// The living processes by id.
pub type Table = BTreeMap<i32, Entry>;

/// Reads the process table. A process that ends meanwhile is left out.
pub fn table() -> Table {
    let Ok(dir) = fs::read_dir("/proc") else { return Table::new() };
    dir.flatten()
        .filter_map(|found| found.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| Some((pid, entry(pid)?)))
        .collect()
}

/// One process of the table; none when it ended or is a zombie.
pub fn entry(pid: i32) -> Option<Entry> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command name may hold blanks and brackets, so the fields count from the last bracket.
fn parse_stat(text: &str) -> Option<Entry> {
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X" | "x") {
        return None;
    }
    Some(Entry {
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

/// This boot of the machine.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// All that descend from `roots`, the roots not included.
pub fn below(table: &Table, roots: &BTreeSet<i32>) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    loop {
        let more: Vec<i32> = table
            .iter()
            .filter(|(pid, at)| {
                !found.contains(*pid) && (roots.contains(&at.parent) || found.contains(&at.parent))
            })
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// The processes of a unit whose keeper is dead.
pub fn leftovers(unit: &Unit, note: Option<&Note>) -> BTreeSet<i32> {
    let table = table();
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let note = note.filter(|note| note.boot == boot_id());
    let mark = format!("{MARK}={}", unit.mark());
    let in_cgroup = note.and_then(|note| note.cgroup.as_deref()).map(members).unwrap_or_default();
    let known: BTreeSet<i32> = table
        .iter()
        .filter(|(pid, at)| {
            in_cgroup.contains(pid)
                || note.is_some_and(|note| of_session(&table, at.session, note))
                || marked(**pid, &mark)
        })
        .map(|(pid, _)| *pid)
        .filter(|pid| *pid != me)
        .collect();
    let mut all = below(&table, &known);
    all.extend(known);
    all.remove(&me);
    all
}

/// Whether that session is the keeper's. A session's number is not given to a new process while
/// the session has a member; were it given, its leader would have another start.
fn of_session(table: &Table, session: i32, note: &Note) -> bool {
    session == note.keeper && table.get(&session).is_none_or(|leader| leader.started == note.started)
}

fn marked(pid: i32, mark: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|all| all.split(|byte| *byte == 0).any(|setting| setting == mark.as_bytes()))
}

/// The processes of a cgroup v2 leaf; none when it is not there.
pub fn members(leaf: &Path) -> BTreeSet<i32> {
    let text = fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Signals one process, provided it is still the one that was seen: the handle is opened first
/// and the start compared after, so that a reused number is never hit.
pub fn signal(pid: i32, started: u64, with: Signal) -> bool {
    let Some(id) = Pid::from_raw(pid) else { return false };
    let Ok(handle) = pidfd_open(id, PidfdFlags::empty()) else { return false };
    entry(pid).is_some_and(|at| at.started == started) && pidfd_send_signal(&handle, with).is_ok()
}

/// Signals every process of a set that still is what the table says.
pub fn signal_all(table: &Table, pids: &BTreeSet<i32>, with: Signal) -> usize {
    pids.iter().filter(|pid| table.get(pid).is_some_and(|at| signal(**pid, at.started, with))).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_brackets_and_blanks_does_not_shift_the_fields() {
        let line = "12 (a) b) S 1 12 7 0 -1 4 0 0 0 0 1 2 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_stat(line), Some(Entry { parent: 1, session: 7, started: 4242 }));
        assert_eq!(parse_stat(&line.replace(" S ", " Z ")), None);
        assert_eq!(parse_stat("nonsense"), None);
    }

    #[test]
    fn descendants_are_found_at_any_depth_and_strangers_are_not() {
        let at = |parent| Entry { parent, session: 1, started: 1 };
        let table = Table::from([(2, at(1)), (3, at(2)), (4, at(3)), (9, at(1))]);
        assert_eq!(below(&table, &BTreeSet::from([2])), BTreeSet::from([3, 4]));
    }

    #[test]
    fn a_session_whose_number_went_to_a_stranger_is_not_ours() {
        let note = Note { boot: boot_id(), keeper: 5, started: 10, cgroup: None };
        let leader = |started| Table::from([(5, Entry { parent: 1, session: 5, started })]);
        assert!(of_session(&Table::new(), 5, &note), "the leader died, its session lives");
        assert!(of_session(&leader(10), 5, &note));
        assert!(!of_session(&leader(11), 5, &note));
    }
}
