//! The one loop of a site: it observes its planes, keeps its lease, performs what the
//! applied state says is its own, and proposes what only a leader can.
//!
//! It never decides by itself who holds a group; all it may do without the quorum is
//! close. Only `execute` changes a plane. Everything here may die at any line: what is
//! to be done is read off the log again.

pub mod book;
pub mod clock;
pub mod control;
mod desk;
pub mod duty;
pub mod execute;
pub mod lead;
pub mod lease;
mod look;
pub mod peer;
pub mod shelf;
pub mod tokens;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, PlaneKind, SiteId};
use dc_core::lease::Profile;
use dc_core::registry::Registry;
use dc_plane::Depth;
use dc_quorum::LogEngine;
use dc_wire::tls::Tls;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::error;

use crate::execute::Hands;
use crate::lead::Lead;
use crate::lease::LeaseKeeper;
use crate::peer::Peers;
use crate::shelf::{Drivers, Shelf};

/// Between two readings of a plane, and two upkeeps.
const PERIOD: Duration = Duration::from_secs(1);
/// Of one reading.
const READ: Duration = Duration::from_secs(5);

/// What an agent is made of.
pub struct Parts {
    /// Its site.
    pub site: SiteId,
    /// Where it keeps its own state.
    pub data_dir: PathBuf,
    /// Every voter with its address.
    pub voters: BTreeMap<SiteId, String>,
    /// The lease's times, checked.
    pub profile: Profile,
    /// The quorum.
    pub engine: Arc<dyn LogEngine>,
    /// Its identity.
    pub tls: Arc<Tls>,
    /// Makes planes.
    pub drivers: Arc<dyn Drivers>,
}

/// The agent of one site.
pub struct Agent {
    me: SiteId,
    environment: String,
    voters: BTreeMap<SiteId, String>,
    profile: Profile,
    engine: Arc<dyn LogEngine>,
    lease: Arc<LeaseKeeper>,
    shelf: Arc<Shelf>,
    peers: Arc<Peers>,
    hands: Arc<Hands>,
    changes: watch::Sender<Arc<Registry>>,
    ticked: Mutex<Instant>,
}

/// A loop of the agent. The agent lives as long as all of them.
#[derive(Debug, Clone, Copy)]
enum Task {
    Renew,
    FollowLease,
    WatchClock,
    Perform,
    Lead,
    Planes,
    Share,
    Publish,
}

impl Agent {
    /// Builds an agent; nothing runs yet.
    ///
    /// Errors: a data directory that cannot be read, an address that is none.
    pub fn new(parts: Parts) -> Result<Arc<Self>, Fail> {
        let shelf = Arc::new(Shelf::new(parts.site.clone(), &parts.data_dir, parts.drivers));
        let lease = Arc::new(LeaseKeeper::new(parts.site.clone(), parts.profile, &parts.data_dir));
        let peers = Arc::new(Peers::new(parts.site.clone(), &parts.voters, &parts.tls, shelf.clone())?);
        let hands = Hands::new(
            parts.site.clone(),
            parts.engine.clone(),
            lease.clone(),
            shelf.clone(),
            &parts.data_dir,
        );
        let hands = hands.map_err(|cause| {
            let what =
                format!("agent of {} not started: its memory in {}", parts.site, parts.data_dir.display());
            Fail::new(dc_core::codes::Code::from_text("DC-0224"), Exit::Unexpected, what, cause.to_string())
                .next("mend the directory's owner or disk, then start the agent again")
        })?;
        Ok(Arc::new(Self {
            me: parts.site,
            environment: parts.tls.identity().trust_domain().to_owned(),
            voters: parts.voters,
            profile: parts.profile,
            changes: watch::Sender::new(parts.engine.state()),
            engine: parts.engine,
            lease,
            shelf,
            peers,
            hands: Arc::new(hands),
            ticked: Mutex::new(Instant::now()),
        }))
    }

    /// The side of the agent that other agents call.
    pub fn peer_service(&self) -> peer::PeerService {
        peer::PeerService(self.peers.clone())
    }

    /// Runs every loop until `stop`, or until one of them ends, which none may.
    ///
    /// Errors: which loop ended. The lease is left to its deadline, so that a quick restart goes on.
    pub async fn run(self: Arc<Self>, stop: impl Future<Output = ()>) -> Result<(), String> {
        let mut tasks: JoinSet<Task> = JoinSet::new();
        self.spawn(&mut tasks);
        let ended = tokio::select! {
            () = stop => return Ok(()),
            ended = tasks.join_next() => ended,
        };
        let which =
            ended.map_or_else(|| "none".into(), |e| e.map_or_else(|p| p.to_string(), |t| format!("{t:?}")));
        error!(which, "a loop of the agent ended; the process ends with it and starts anew");
        Err(which)
    }

    fn spawn(self: &Arc<Self>, tasks: &mut JoinSet<Task>) {
        let (lease, engine) = (self.lease.clone(), self.engine.clone());
        tasks.spawn(async move {
            lease.renew(engine).await;
            Task::Renew
        });
        let (lease, engine) = (self.lease.clone(), self.engine.clone());
        tasks.spawn(async move {
            lease.follow(engine).await;
            Task::FollowLease
        });
        let lease = self.lease.clone();
        tasks.spawn(async move {
            lease.watch_clock().await;
            Task::WatchClock
        });
        let hands = self.hands.clone();
        tasks.spawn(async move {
            hands.follow().await;
            Task::Perform
        });
        let lead = Lead::new(self.me.clone(), self.profile, self.engine.clone(), self.lease.clone());
        tasks.spawn(async move {
            lead.follow().await;
            Task::Lead
        });
        let agent = self.clone();
        tasks.spawn(async move {
            agent.keep_planes().await;
            Task::Planes
        });
        let agent = self.clone();
        tasks.spawn(async move {
            agent.share_changes().await;
            Task::Publish
        });
        for site in self.voters.keys().filter(|site| **site != self.me) {
            let (peers, site) = (self.peers.clone(), site.clone());
            tasks.spawn(async move {
                peers.exchange(site).await;
                Task::Share
            });
        }
    }

    /// Builds planes as groups come, and gives each its own reading and upkeep.
    async fn keep_planes(self: Arc<Self>) {
        let mut applied = self.engine.applied();
        let mut loops = JoinSet::new();
        let mut known = std::collections::BTreeSet::new();
        loop {
            *self.ticked.lock() = Instant::now();
            let state = applied.borrow_and_update().state.clone();
            for place in self.shelf.refresh(&state) {
                if known.insert(place.clone()) {
                    loops.spawn(self.clone().keep_plane(place.clone()));
                    loops.spawn(self.clone().read_plane(place));
                }
            }
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                Some(_) = loops.join_next() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    async fn keep_plane(self: Arc<Self>, place: (GroupName, PlaneKind)) {
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lease = self.lease.changes();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                _ = lease.changed() => {}
            }
            self.hands.keep(&place).await;
        }
    }

    async fn read_plane(self: Arc<Self>, (group, kind): (GroupName, PlaneKind)) {
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for turn in 0_u64.. {
            tick.tick().await;
            let depth = if turn % 60 == 0 { Depth::Deep } else { Depth::Shallow };
            self.shelf.read(&group, kind, depth, READ).await;
        }
    }

    async fn share_changes(&self) {
        let mut applied = self.engine.applied();
        while applied.changed().await.is_ok() {
            let state = applied.borrow_and_update().state.clone();
            self.changes.send_replace(state);
        }
    }
}
