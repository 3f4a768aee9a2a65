//! The load: writers of every plane at both sites, each with one fixed address, that try all the time and note what
//! they were told. They learn nothing from the product, not even that a move is under way: only the pace of tries
//! against a closed site rises while one is asked for, so that the outage is measured finely.

pub mod airflow;
pub mod groups;
pub mod kafka;
pub mod postgres;
pub mod s3;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::history::{History, wall_ns};
use crate::world::{Plane, Site, World};

/// How far back a sample of the backlog looks, in nanoseconds: older acknowledgements count as carried or lost.
pub const RECENT: u64 = 10_000_000_000;

/// What all writers share.
#[derive(Debug)]
pub struct Shared {
    /// The lab.
    pub world: World,
    /// Histories by plane.
    pub histories: BTreeMap<Plane, Arc<History>>,
    /// What consumer groups did.
    pub groups: groups::Log,
    /// What was acknowledged and not yet readable at the other site, over time.
    pub backlog: Backlog,
    /// A move is being asked for: closed sites are tried often.
    pub moving: AtomicBool,
    /// Rises after each move: clients that must not outlive a move start anew.
    pub generation: AtomicU64,
    /// Numbers of all writers begin above this: those of an earlier load are not met again.
    pub base: u64,
    /// Of Airflow's tasks.
    pub lengths: airflow::Lengths,
    /// Ends everything.
    pub stop: CancellationToken,
}

impl Shared {
    /// The history of a plane of this lab.
    pub fn history(&self, plane: Plane) -> Result<&Arc<History>> {
        self.histories.get(&plane).with_context(|| format!("this lab has no {plane}"))
    }

    /// Waits before a closed site is tried again: `often` while a move is asked for, else a quarter of a second.
    ///
    /// With several writers per site the plane is tried several times as often; more would cost the move itself.
    pub async fn pause(&self, often: Duration) {
        let moving = self.moving.load(Ordering::Relaxed);
        self.sleep(if moving { often } else { Duration::from_millis(250) }).await;
    }

    /// Waits, or less if the load ends.
    pub async fn sleep(&self, time: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(time) => {}
        }
    }

    /// Has the load been asked to end?
    pub fn over(&self) -> bool {
        self.stop.is_cancelled()
    }
}

/// Samples of what a source acknowledged and its target could not read yet; a copy goes to `root/history`.
#[derive(Debug)]
pub struct Backlog {
    samples: Mutex<BTreeMap<(Plane, Site), Samples>>,
    file: Option<Mutex<File>>,
}

/// When, and how many waited.
type Samples = Vec<(u64, usize)>;

/// Samples that say how a fence was met.
const LAST: usize = 20;

impl Backlog {
    fn open(world: &World) -> Result<Backlog> {
        let path = world.root.join("history/backlog.tsv");
        let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        Ok(Backlog { samples: Mutex::default(), file: Some(Mutex::new(file)) })
    }

    /// Adds a sample taken at `at`.
    pub fn note(&self, plane: Plane, source: Site, at: u64, waiting: usize) {
        if let Some(Ok(mut file)) = self.file.as_ref().map(Mutex::lock) {
            let _ = writeln!(file, "{at}\t{plane}\t{source}\t{waiting}"); // a copy; the oracle reads the memory
        }
        if let Ok(mut samples) = self.samples.lock() {
            samples.entry((plane, source)).or_default().push((at, waiting));
        }
    }

    /// The backlog with which a fence met the plane: the highest of the last twenty samples before it, none of them
    /// older than the order to move.
    ///
    /// Not the very last one, because a target may be closed to readers, or waited for on purpose, just before.
    pub fn before(&self, plane: Plane, source: Site, asked: u64, fence: u64) -> Option<usize> {
        let samples = self.samples.lock().ok()?;
        let since =
            samples.get(&(plane, source))?.iter().rev().filter(|(at, _)| *at >= asked && *at <= fence);
        since.take(LAST).map(|(_, n)| *n).max()
    }
}

/// A load under way. Its writers end with it, also those in threads of their own, which nobody else could end.
#[derive(Debug)]
pub struct Load {
    /// What its writers share.
    pub shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Starts the writers of every plane of the lab; `active` serves now, and Airflow's tasks take `lengths`.
    pub async fn start(world: &World, active: Site, lengths: airflow::Lengths) -> Result<Load> {
        let open = |p: &Plane| Ok((*p, Arc::new(History::open(world, *p)?)));
        let histories = world.planes.iter().map(open).collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            world: world.clone(),
            histories,
            groups: groups::Log::default(),
            backlog: Backlog::open(world)?,
            moving: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            base: wall_ns() / 1_000_000_000 * 1_000_000,
            lengths,
            stop: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        for plane in &world.planes {
            match plane {
                Plane::Postgres => postgres::start(&shared, active, &mut tasks).await?,
                Plane::Kafka => kafka::start(&shared, &mut tasks)?,
                Plane::S3 => s3::start(&shared, &mut tasks)?,
                Plane::Airflow => airflow::start(&shared, &mut tasks)?,
            }
        }
        Ok(Load { shared, tasks })
    }

    /// Adds a task that ends with the load.
    pub fn also(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Ends all writers and waits for them.
    pub async fn stop(mut self) {
        self.shared.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(20), all).await.is_err() {
            self.tasks.shutdown().await;
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::ROME;

    #[test]
    fn takes_the_highest_of_the_last_samples_before_the_fence_since_the_order() {
        let backlog = Backlog { samples: Mutex::default(), file: None };
        let note = |at, n| backlog.note(Plane::Kafka, ROME, at, n);
        note(10, 99); // before the order
        (0..30).for_each(|k| note(100 + k, if k == 5 { 50 } else { 4 })); // the fifth is too old
        note(200, 7); // after the fence
        assert_eq!(backlog.before(Plane::Kafka, ROME, 20, 150), Some(4));
        assert_eq!(backlog.before(Plane::Kafka, ROME, 20, 90), None);
    }
}
