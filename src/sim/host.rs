//! A site's host: its clock, its disk, and the agent that may or may not live on it.

use std::collections::BTreeMap;

use dc_agent::book::Kept;
use dc_core::ids::{PlaneKind, SiteId, Token};
use dc_core::time::{Time, WallTime};

use crate::agent::Agent;

/// Milliseconds of one tick of the world.
pub const TICK_MS: u64 = 50;
/// What wall clocks show when the world begins.
const DAWN_MS: u64 = 1_700_000_000_000;

/// What survives the agent.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// Entries of the log whose state was written down; the rest is learned again.
    pub applied: usize,
    /// Highest token of each plane.
    pub tokens: BTreeMap<PlaneKind, Token>,
    /// Planes that closed themselves.
    pub closed: BTreeMap<PlaneKind, bool>,
    /// When the lease ends, and by which clock.
    pub lease: Option<Kept>,
}

/// A host.
pub struct Host {
    /// Where.
    pub site: SiteId,
    /// What survives the agent.
    pub disk: Disk,
    /// Lives, or not.
    pub agent: Option<Agent>,
    /// When it is started again, if it is down.
    pub starts_at: u64,
    /// Until when the network to the others is cut.
    pub cut_until: u64,
    /// Until when its disk is full.
    pub full_until: u64,
    /// Highest token that it may have known when it last lost its disk.
    pub forgot: Token,
    /// Until when the whole host stands still.
    pub frozen_until: u64,
    /// Ticks between a commit and its applying here.
    pub lag: u64,
    /// Counts boots: readings of the clock compare only within one.
    pub boot: u64,
    booted: u64,
    base: u64,
    drift_ppm: i64,
    jumped: i64,
    /// How far its wall clock is off.
    wall_off: i64,
}

impl Host {
    /// A host whose clock began at `base` and runs off by so many parts in a million.
    pub fn new(site: SiteId, base: u64, drift_ppm: i64) -> Self {
        Self {
            site,
            disk: Disk::default(),
            agent: None,
            starts_at: 0,
            cut_until: 0,
            full_until: 0,
            forgot: Token(0),
            frozen_until: 0,
            lag: 1,
            boot: 1,
            booted: 0,
            base,
            drift_ppm,
            jumped: 0,
            wall_off: 0,
        }
    }

    /// Its own clock: goes on while it stands still, begins anew at a boot.
    pub fn now(&self, tick: u64) -> Time {
        let passed = (tick - self.booted) * TICK_MS;
        let off = i64::try_from(passed).unwrap_or(i64::MAX / 2) / 1000 * self.drift_ppm / 1000;
        Time((self.base + passed).saturating_add_signed(self.jumped).saturating_add_signed(off))
    }

    /// Its wall clock: goes on through everything, unless somebody sets it.
    pub fn wall(&self, tick: u64) -> WallTime {
        WallTime((DAWN_MS + tick * TICK_MS).saturating_add_signed(self.wall_off))
    }

    /// Its clock jumps ahead.
    pub fn jump(&mut self, by_ms: u64) {
        self.jumped = self.jumped.saturating_add_unsigned(by_ms);
    }

    /// Somebody sets its wall clock.
    pub fn set_wall(&mut self, by_ms: i64) {
        self.wall_off += by_ms;
    }

    /// The whole host is stopped with its clock, as a virtual one is; its wall clock is put
    /// right when it goes on.
    pub fn pause(&mut self, tick: u64, span: u64) {
        let more = (tick + span).saturating_sub(self.frozen_until.max(tick));
        self.frozen_until = self.frozen_until.max(tick + span);
        self.jumped = self.jumped.saturating_sub_unsigned(more * TICK_MS);
    }

    /// The agent's process ends where it stands; `reboot` ends the host with it.
    pub fn kill(&mut self, tick: u64, back_after: u64, reboot: bool) {
        self.agent = None;
        self.starts_at = tick + back_after;
        if reboot {
            (self.boot, self.booted, self.base, self.jumped) = (self.boot + 1, tick, 1_000, 0);
        }
    }

    /// The agent's directory is gone; `newest` is the highest token that stood in it.
    pub fn lose_disk(&mut self, newest: Token) {
        self.disk = Disk::default();
        self.forgot = newest;
    }

    /// Whether the network reaches it and it runs.
    pub fn reachable(&self, tick: u64) -> bool {
        self.agent.is_some() && self.cut_until <= tick && self.frozen_until <= tick
    }
}
