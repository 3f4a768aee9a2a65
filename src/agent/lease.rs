//! This site's lease: renewed, counted from sending, closed for when it ends.
//!
//! What a lease means is core's (`dc_core::lease`), what a process knows of it is `book`'s;
//! here are only the clock, the file that survives a restart and the proposals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_core::lease::{Profile, Watch};
use dc_core::registry::{Command, Entry, Registry};
use dc_core::time::Time;
use dc_quorum::LogEngine;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::book::{Book, Kept};
use crate::clock::{Gaps, boot_id, now, wall};

/// How often the clock is looked at for a gap or a jump.
const TICK: Duration = Duration::from_millis(100);

/// The lease of this site, and what it knows of the others'.
pub struct LeaseKeeper {
    me: SiteId,
    profile: Profile,
    file: PathBuf,
    book: Mutex<Book>,
    /// What the file says.
    kept: Mutex<Option<Time>>,
    changed: watch::Sender<u64>,
    sent: AtomicU64,
    missed: AtomicU64,
}

impl LeaseKeeper {
    /// Starts without a lease, knowing how long the process before this one had one.
    pub fn new(me: SiteId, profile: Profile, data_dir: &Path) -> Self {
        let file = data_dir.join("lease.json");
        let inherited = inherit(&file, &boot_id());
        Self {
            me: me.clone(),
            profile,
            file,
            book: Mutex::new(Book::new(me, profile, inherited)),
            kept: Mutex::new(None),
            changed: watch::Sender::new(0),
            sent: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        }
    }

    /// What is left of the lease; none when it is over or was never had by this process.
    pub fn left(&self) -> Option<Duration> {
        self.book.lock().left(now())
    }

    /// Whether this site has to close, now or because it has no lease at all.
    pub fn closing(&self) -> bool {
        self.book.lock().closing(now())
    }

    /// The leases of all sites, as this voter counts them.
    pub fn watch(&self) -> Watch {
        self.book.lock().watch().clone()
    }

    /// Renewals proposed by this process, and how many of them were not confirmed in time.
    pub fn renewals(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.missed.load(Ordering::Relaxed))
    }

    /// Ticks whenever the lease was renewed, lost or given up.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes in what was applied here.
    pub fn applied(&self, registry: &Registry) {
        let mut book = self.book.lock();
        let time = now();
        if book.applied(registry, time).is_none() {
            return;
        }
        let left = book.left(time);
        drop(book);
        self.changed.send_modify(|n| *n += 1);
        if let Some(left) = left {
            self.keep(time.plus(left), time);
        }
    }

    fn keep(&self, until: Time, at: Time) {
        if self.kept.lock().replace(until) == Some(until) {
            return;
        }
        let kept = Kept { boot: boot_id(), until, at, wall: wall() };
        let written = serde_json::to_vec(&kept).map_err(std::io::Error::other);
        if let Err(cause) = written.and_then(|body| std::fs::write(&self.file, body)) {
            // Only a restart would miss it, and closes early instead of late.
            warn!(%cause, "lease not kept for a restart");
        }
    }

    /// Renews for ever; the first renewal opens a session above the last one known.
    pub async fn renew(&self, engine: Arc<dyn LogEngine>) {
        let session = loop {
            if engine.barrier(Instant::now() + self.profile.hold).await.is_ok() {
                let chance = u64::try_from(ulid::Ulid::new().random() & u128::from(u64::MAX)).unwrap_or(0);
                break self.book.lock().open(&engine.state(), chance);
            }
            tokio::time::sleep(self.profile.heartbeat).await;
        };
        info!(session, "lease session opened");
        let mut tick = interval(self.profile.renew);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let renewal = self.book.lock().send(now());
            let entry = Entry::Renew { site: self.me.clone(), renewal };
            let command = Command { by: format!("agent/{}", self.me), wall: wall(), entry };
            // A renewal without an answer is no lease and no error: the next one has a higher number.
            let until = Instant::now() + self.profile.renew * 2;
            self.sent.fetch_add(1, Ordering::Relaxed);
            if let Err(cause) = engine.propose(vec![command], until).await {
                self.missed.fetch_add(1, Ordering::Relaxed);
                warn!(number = renewal.number, %cause, "renewal not confirmed");
            }
        }
    }

    /// Follows what is applied, for ever.
    pub async fn follow(&self, engine: Arc<dyn LogEngine>) {
        let mut applied = engine.applied();
        loop {
            let state = applied.borrow_and_update().state.clone();
            self.applied(&state);
            if applied.changed().await.is_err() {
                return;
            }
        }
    }

    /// Gives the lease up after a gap or a jump of the clock: close first, ask after.
    pub async fn watch_clock(&self) {
        let mut gaps = Gaps::new(now(), wall());
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Some(what) = gaps.tick(now(), wall()) {
                warn!(what, "lease given up");
                self.book.lock().give_up(now());
                self.changed.send_modify(|n| *n += 1);
            }
        }
    }
}

/// When the lease of the process before this one ends, if that can be said.
fn inherit(file: &Path, boot: &str) -> Option<Time> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    kept.until(boot, now(), wall())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

    use dc_core::lease::Renewal;

    use super::*;

    fn keeper(folder: &Path) -> LeaseKeeper {
        LeaseKeeper::new(SiteId::new("rome").unwrap(), Profile::WAN, folder)
    }

    /// A keeper that was granted its lease just now.
    fn granted(folder: &Path) -> LeaseKeeper {
        let keeper = keeper(folder);
        grant(&keeper);
        keeper
    }

    fn grant(keeper: &LeaseKeeper) {
        let mut registry = Registry::default();
        keeper.book.lock().open(&registry, 7);
        let renewal = keeper.book.lock().send(now());
        registry.sites.insert(keeper.me.clone(), renewal);
        keeper.applied(&registry);
    }

    fn rewrite(folder: &Path, change: impl FnOnce(&mut Kept)) {
        let file = folder.join("lease.json");
        let mut kept: Kept = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        change(&mut kept);
        std::fs::write(&file, serde_json::to_vec(&kept).unwrap()).unwrap();
    }

    #[test]
    fn a_quick_restart_need_not_close_and_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert!(granted(folder.path()).left().is_some());
        let next = keeper(folder.path());
        assert!(!next.closing(), "the lease of the process before it runs on");
        assert_eq!(next.left(), None, "it is not this process's to open with");
    }

    #[test]
    fn a_restart_after_the_lease_or_a_reboot_closes() {
        let folder = tempfile::tempdir().unwrap();
        drop(granted(folder.path()));
        rewrite(folder.path(), |kept| kept.until = now());
        assert!(keeper(folder.path()).closing(), "it is over");
        drop(granted(folder.path()));
        rewrite(folder.path(), |kept| kept.boot = "another".into());
        assert!(keeper(folder.path()).closing(), "another boot counts from its own zero");
        drop(granted(folder.path()));
        rewrite(folder.path(), |kept| kept.wall.0 -= 60_000);
        assert!(keeper(folder.path()).closing(), "the host stood still, or somebody set its clock");
    }

    #[test]
    fn a_file_that_says_nothing_is_no_lease() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lease.json");
        assert!(keeper(folder.path()).closing(), "none");
        for body in ["", "{\"boot\":", "{}", "[]"] {
            std::fs::write(&file, body).unwrap();
            assert!(keeper(folder.path()).closing(), "{body:?}");
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(keeper(folder.path()).closing(), "a folder");
    }

    #[test]
    fn a_full_disk_costs_the_next_process_its_quick_restart_and_this_one_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let first = keeper(folder.path());
        // Not by mode: tests may run as root, who writes anywhere. And only now: reading it has no end.
        std::os::unix::fs::symlink("/dev/full", folder.path().join("lease.json")).unwrap();
        grant(&first);
        assert!(first.left().is_some());
        std::fs::remove_file(folder.path().join("lease.json")).unwrap();
        assert!(keeper(folder.path()).closing());
    }

    #[test]
    fn a_restarted_process_counts_no_renewal_of_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let first = granted(folder.path());
        let mut registry = Registry::default();
        let old = first.book.lock().send(now());
        registry.sites.insert(first.me.clone(), old);
        let next = keeper(folder.path());
        assert!(next.book.lock().open(&registry, 0) > old.session);
        let mine = next.book.lock().send(now());
        next.applied(&registry); // the old one's last renewal comes late
        assert_eq!(next.left(), None);
        registry.sites.insert(next.me.clone(), Renewal { number: mine.number + 1, ..old });
        next.applied(&registry);
        assert_eq!(next.left(), None);
        registry.sites.insert(next.me.clone(), mine);
        next.applied(&registry);
        assert!(next.left().is_some());
    }
}
