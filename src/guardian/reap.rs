//! Ends what a dead keeper left, and proves the end.
//!
//! It never touches a unit whose keeper lives: that one is asked over its socket.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Serialize;

use crate::tree;
use crate::unit::{Fail, Unit};

/// Readings of the process table without a find, one after the other, that prove the end: a
/// process could slip through one reading by forking behind it, and die before it is read.
const EMPTY_READINGS: u32 = 3;
const AGAIN_AFTER: Duration = Duration::from_millis(20);

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reaped {
    /// Always `gone`.
    pub state: &'static str,
    /// How many processes were ended.
    pub killed: usize,
}

/// Kills every process of a unit without keeper until none is found.
///
/// Repeat: safe. Errors: code 3 while a keeper lives; code 4 when some are left at the limit.
pub fn reap(unit: &Unit, limit: Duration) -> Result<Reaped, Fail> {
    let _lock = unit.lock()?;
    let note = unit.note();
    let until = Instant::now() + limit;
    let (mut killed, mut empty) = (BTreeSet::new(), 0);
    while empty < EMPTY_READINGS {
        let left = tree::leftovers(unit, note.as_ref());
        if left.is_empty() {
            empty += 1;
            continue;
        }
        empty = 0;
        if Instant::now() >= until {
            return Err(Fail::leftovers(format!("{} still has processes {left:?}", unit.mark())));
        }
        tree::signal_all(&tree::table(), &left, Signal::KILL);
        killed.extend(left);
        thread::park_timeout(AGAIN_AFTER);
    }
    tidy(unit, note.and_then(|note| note.cgroup));
    Ok(Reaped { state: "gone", killed: killed.len() })
}

fn tidy(unit: &Unit, cgroup: Option<std::path::PathBuf>) {
    // what stays is found again by the next start or reap
    let _ = fs::remove_file(unit.path("sock"));
    if let Some(leaf) = cgroup {
        let _ = fs::remove_dir(leaf);
    }
}
