//! This site's lease: renewed, counted from sending, closed for when it ends.
//!
//! What a lease means is core's (`dc_core::lease`); here are only the clock, the file that
//! survives a restart and the proposals.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_core::lease::{OwnLease, Profile, Renewal, Watch};
use dc_core::registry::{Command, Entry, Registry};
use dc_core::time::Time;
use dc_quorum::LogEngine;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::clock::{Gaps, boot_id, now, wall};

/// How often the clock is looked at for a gap or a jump.
const TICK: Duration = Duration::from_millis(100);

/// A session above the known one that no other process of this site ever opens: two that
/// die young read the same known one, and a copy of the first one's renewal, applied
/// before the second's was sent, must not pass for it.
fn session_above(known: u64) -> u64 {
    const OWN_BITS: u32 = 20;
    let own = u64::try_from(ulid::Ulid::new().random() & ((1 << OWN_BITS) - 1)).unwrap_or(0);
    (((known >> OWN_BITS) + 1) << OWN_BITS) | own
}

/// The lease of this site, and what it knows of the others'.
pub struct LeaseKeeper {
    me: SiteId,
    profile: Profile,
    file: PathBuf,
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    sent: AtomicU64,
    missed: AtomicU64,
}

struct Inner {
    own: OwnLease,
    watch: Watch,
    session: u64,
    /// When the lease of the process before this one ends: until then nothing has to close.
    inherited: Option<Time>,
}

/// What outlives a restart of the agent, within one boot of the host.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot: String,
    until: Time,
}

impl LeaseKeeper {
    /// Starts without a lease, knowing how long the process before this one had one.
    pub fn new(me: SiteId, profile: Profile, data_dir: &std::path::Path) -> Self {
        let file = data_dir.join("lease.json");
        let kept = std::fs::read(&file).ok().and_then(|body| serde_json::from_slice::<Kept>(&body).ok());
        let inherited = kept.filter(|k| !k.boot.is_empty() && k.boot == boot_id()).map(|k| k.until);
        let inner = Inner { own: OwnLease::default(), watch: Watch::default(), session: 0, inherited };
        Self {
            me,
            profile,
            file,
            inner: Mutex::new(inner),
            changed: watch::Sender::new(0),
            sent: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        }
    }

    /// What is left of the lease; none when it is over or was never had by this process.
    pub fn left(&self) -> Option<Duration> {
        self.inner.lock().own.left(now())
    }

    /// Whether this site has to close, now or because it has no lease at all.
    pub fn closing(&self) -> bool {
        let inner = self.inner.lock();
        let time = now();
        let inherited = inner.inherited.is_some_and(|until| until > time.plus(self.profile.lead));
        inner.own.closing(time, &self.profile) && !inherited
    }

    /// How long ago a renewal of that site was applied here.
    pub fn age(&self, site: &SiteId) -> Option<Duration> {
        self.inner.lock().watch.age(site, now())
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
        let mut inner = self.inner.lock();
        let time = now();
        for (site, renewal) in &registry.sites {
            inner.watch.applied(site, *renewal, time);
        }
        let Some(mine) = registry.sites.get(&self.me).filter(|r| r.session == inner.session) else { return };
        inner.own.applied(*mine, &self.profile);
        let left = inner.own.left(time);
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        if let Some(left) = left {
            self.keep(time.plus(left));
        }
    }

    fn keep(&self, until: Time) {
        let kept = Kept { boot: boot_id(), until };
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
                break session_above(engine.state().sites.get(&self.me).map_or(0, |known| known.session));
            }
            tokio::time::sleep(self.profile.heartbeat).await;
        };
        self.inner.lock().session = session;
        info!(session, "lease session opened");
        let mut tick = interval(self.profile.renew);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 1.. {
            tick.tick().await;
            let renewal = Renewal { session, number };
            self.inner.lock().own.sent(renewal, now());
            let entry = Entry::Renew { site: self.me.clone(), renewal };
            let command = Command { by: format!("agent/{}", self.me), wall: wall(), entry };
            // A renewal without an answer is no lease and no error: the next one has a higher number.
            let until = Instant::now() + self.profile.renew * 2;
            self.sent.fetch_add(1, Ordering::Relaxed);
            if let Err(cause) = engine.propose(vec![command], until).await {
                self.missed.fetch_add(1, Ordering::Relaxed);
                warn!(number, %cause, "renewal not confirmed");
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
                let mut inner = self.inner.lock();
                inner.own.forget();
                inner.inherited = None;
                // Nor can it say how long the others' have run: they get their full grant again.
                inner.watch.restart(now());
                drop(inner);
                self.changed.send_modify(|n| *n += 1);
            }
        }
    }
}
