//! What clients were told: one history per plane, written by the load, read by the oracle.
//!
//! Times are nanoseconds of CLOCK_BOOTTIME, which every process of the machine shares. A history is kept in memory
//! and, line by line, in `root/history`, so that a judgement can be checked by hand afterwards.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

use crate::world::{Plane, Site, World};

/// Nanoseconds of CLOCK_BOOTTIME.
pub fn now_ns() -> u64 {
    nanos(ClockId::Boottime)
}

/// Nanoseconds since 1970, for what other processes stamped by the wall clock.
pub fn wall_ns() -> u64 {
    nanos(ClockId::Realtime)
}

fn nanos(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec).unwrap_or(0)
}

/// Which write: its writer and the writer's own running number.
pub type Id = (u16, u64);

/// What the client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The write stands.
    Acked,
    /// The write does not stand, and never will.
    Refused,
    /// No answer that says either.
    Unknown,
}

/// One try of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The site whose address the writer holds.
    pub site: Site,
    /// What was written.
    pub id: Id,
    /// When the try began.
    pub sent: u64,
    /// When the client knew.
    pub done: u64,
    /// What it knew.
    pub outcome: Outcome,
}

/// All tries on one plane.
#[derive(Debug)]
pub struct History {
    events: Mutex<Vec<Event>>,
    file: Mutex<File>,
}

impl History {
    /// Opens a history and its file.
    pub fn open(world: &World, plane: Plane) -> Result<History> {
        let path = world.root.join("history").join(format!("{plane}.tsv"));
        let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        Ok(History { events: Mutex::new(Vec::new()), file: Mutex::new(file) })
    }

    /// Adds one try that ends now.
    pub fn add(&self, site: Site, id: Id, sent: u64, outcome: Outcome) {
        let event = Event { site, id, sent, done: now_ns(), outcome };
        let line = format!("{sent}\t{}\t{site}\t{}\t{}\t{outcome:?}\n", event.done, id.0, id.1);
        if let Ok(mut file) = self.file.lock() {
            let _ = file.write_all(line.as_bytes()); // the file is a copy; the oracle reads the memory
        }
        if let Ok(mut events) = self.events.lock() {
            events.push(event);
        }
    }

    /// All tries so far.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().map(|e| e.clone()).unwrap_or_default()
    }

    /// How many tries fit, without copying them.
    pub fn count(&self, fits: impl Fn(&Event) -> bool) -> usize {
        self.events.lock().map_or(0, |e| e.iter().filter(|e| fits(e)).count())
    }

    /// Acknowledged writes at a site since a time.
    pub fn acked(&self, site: Site, since: u64) -> usize {
        self.count(|e| e.site == site && e.done >= since && e.outcome == Outcome::Acked)
    }

    /// The site that acknowledged last.
    pub fn active(&self) -> Option<Site> {
        let events = self.events.lock().ok()?;
        events.iter().rev().find(|e| e.outcome == Outcome::Acked).map(|e| e.site)
    }

    /// Every write that a site was asked for up to a time and may have done.
    pub fn possible_ids(&self, site: Site, to: u64) -> Vec<Id> {
        let Ok(events) = self.events.lock() else { return Vec::new() };
        let fits = |e: &&Event| e.site == site && e.outcome != Outcome::Refused && e.done <= to;
        events.iter().filter(fits).map(|e| e.id).collect()
    }

    /// Every write acknowledged up to a time by a site.
    pub fn acked_ids(&self, site: Site, from: u64, to: u64) -> Vec<Id> {
        let Ok(events) = self.events.lock() else { return Vec::new() };
        let fits =
            |e: &&Event| e.site == site && e.outcome == Outcome::Acked && e.done >= from && e.done <= to;
        events.iter().filter(fits).map(|e| e.id).collect()
    }
}
