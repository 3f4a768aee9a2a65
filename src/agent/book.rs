//! What one process knows of leases: its own, the one it found, and the others'.
//!
//! Pure: the clock is an argument. Shared by the running agent and the simulation.

use std::time::Duration;

use dc_core::ids::SiteId;
use dc_core::lease::{OwnLease, Profile, Renewal, Watch};
use dc_core::registry::Registry;
use dc_core::time::{Time, WallTime};
use serde::{Deserialize, Serialize};

use crate::clock::{Gaps, off};

/// What outlives a restart of the agent, within one boot of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Of the host.
    pub boot: String,
    /// When the lease ends.
    pub until: Time,
    /// When this was written.
    pub at: Time,
    /// The same by the wall clock.
    pub wall: WallTime,
}

impl Kept {
    /// When the lease of the process before this one ends; none when its clock is not this one's.
    pub fn until(&self, boot: &str, now: Time, wall: WallTime) -> Option<Time> {
        let same = !boot.is_empty() && self.boot == boot;
        (same && off((self.at, self.wall), (now, wall)) <= Gaps::JUMP_MS).then_some(self.until)
    }
}

/// A session above the known one that no other process of this site ever opens: two that
/// die young read the same known one, and a copy of the first one's renewal, applied
/// before the second's was sent, must not pass for it.
pub fn session_above(known: u64, chance: u64) -> u64 {
    const OWN_BITS: u32 = 20;
    (((known >> OWN_BITS) + 1) << OWN_BITS) | (chance & ((1 << OWN_BITS) - 1))
}

/// The leases as one process knows them.
#[derive(Debug)]
pub struct Book {
    me: SiteId,
    profile: Profile,
    /// Its own.
    pub own: OwnLease,
    watch: Watch,
    session: u64,
    number: u64,
    /// When the lease of the process before this one ends: until then nothing has to close.
    inherited: Option<Time>,
}

impl Book {
    /// Without a lease; `inherited` is when that of the process before this one ends.
    pub fn new(me: SiteId, profile: Profile, inherited: Option<Time>) -> Self {
        let (own, watch) = (OwnLease::default(), Watch::default());
        Self { me, profile, own, watch, session: 0, number: 0, inherited }
    }

    /// Opens this process's session, above the one that stands in the applied state.
    pub fn open(&mut self, registry: &Registry, chance: u64) -> u64 {
        let known = registry.sites.get(&self.me).map_or(0, |known| known.session);
        self.session = session_above(known, chance);
        self.session
    }

    /// Whether this process opened its session.
    pub fn is_open(&self) -> bool {
        self.session != 0
    }

    /// The next renewal, counted from now: it is about to be sent.
    pub fn send(&mut self, now: Time) -> Renewal {
        self.number += 1;
        let renewal = Renewal { session: self.session, number: self.number };
        self.own.sent(renewal, now);
        renewal
    }

    /// Takes in what was applied here. Returns its own site's renewal if it is of this session.
    pub fn applied(&mut self, registry: &Registry, now: Time) -> Option<Renewal> {
        for (site, renewal) in &registry.sites {
            self.watch.applied(site, *renewal, now);
        }
        let mine = *registry.sites.get(&self.me).filter(|r| r.session == self.session)?;
        self.own.applied(mine, &self.profile);
        Some(mine)
    }

    /// What is left of the lease; none when it is over or was never had by this process.
    pub fn left(&self, now: Time) -> Option<Duration> {
        self.own.left(now)
    }

    /// Whether this site has to close, now or because it has no lease at all.
    pub fn closing(&self, now: Time) -> bool {
        let inherited = self.inherited.is_some_and(|until| until > now.plus(self.profile.lead));
        self.own.closing(now, &self.profile) && !inherited
    }

    /// The leases of all sites, by this voter's clock.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// After a gap or a jump of the clock: nobody can say how long any lease has run.
    pub fn give_up(&mut self, now: Time) {
        self.own.forget();
        self.inherited = None;
        self.watch.restart(now);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

    use super::*;

    fn kept() -> Kept {
        Kept { boot: "b".into(), until: Time(9_000), at: Time(1_000), wall: WallTime(501_000) }
    }

    fn rome() -> SiteId {
        SiteId::new("rome").unwrap()
    }

    #[test]
    fn a_lease_is_inherited_within_one_boot_and_one_clock() {
        let (now, wall) = (Time(3_000), WallTime(503_000));
        assert_eq!(kept().until("b", now, wall), Some(Time(9_000)));
        assert_eq!(kept().until("c", now, wall), None, "another boot counts from its own zero");
        let nameless = Kept { boot: String::new(), ..kept() };
        assert_eq!(nameless.until("", now, wall), None, "boots without a name are not the same");
        assert_eq!(kept().until("b", now, WallTime(533_000)), None, "the host stood still meanwhile");
        assert_eq!(kept().until("b", now, WallTime(490_000)), None, "somebody set the clock back");
        assert_eq!(kept().until("b", Time(500), WallTime(503_000)), None, "the host was set back");
    }

    #[test]
    fn an_inherited_lease_keeps_open_until_its_lead_and_opens_nothing() {
        let profile = Profile::WAN;
        let book = Book::new(rome(), profile, Some(Time(9_000)));
        assert!(!book.closing(Time(3_000)));
        assert_eq!(book.left(Time(3_000)), None);
        assert!(book.closing(Time(9_000 - dc_core::time::millis(profile.lead))));
        assert!(Book::new(rome(), profile, None).closing(Time(3_000)));
    }

    #[test]
    fn a_gap_ends_what_was_held_and_what_was_inherited() {
        let mut book = Book::new(rome(), Profile::WAN, Some(Time(9_000)));
        book.give_up(Time(3_000));
        assert!(book.closing(Time(3_000)));
    }

    #[test]
    fn a_session_lies_above_the_old_one_and_is_its_processs_own() {
        let mut registry = Registry::default();
        let mut first = Book::new(rome(), Profile::WAN, None);
        let old = first.open(&registry, 0xf_ffff);
        registry.sites.insert(rome(), first.send(Time(0)));
        for chance in [0, 1, u64::MAX] {
            let mut next = Book::new(rome(), Profile::WAN, None);
            let session = next.open(&registry, chance);
            assert!(session > old, "{session} after {old}");
            assert!(next.send(Time(0)) > first.send(Time(0)), "renewals of the old process stay below");
        }
        assert_ne!(session_above(old, 1), session_above(old, 2), "two that die young");
    }

    #[test]
    fn only_a_renewal_of_its_own_session_counts() {
        let mut registry = Registry::default();
        let mut book = Book::new(rome(), Profile::WAN, None);
        book.open(&registry, 7);
        let mine = book.send(Time(1_000));
        registry.sites.insert(rome(), Renewal { session: mine.session - 1, number: 9 });
        assert_eq!(book.applied(&registry, Time(1_100)), None);
        assert_eq!(book.left(Time(1_100)), None);
        registry.sites.insert(rome(), mine);
        assert_eq!(book.applied(&registry, Time(1_200)), Some(mine));
        assert_eq!(book.left(Time(1_200)), Some(Time(1_000).plus(Profile::WAN.hold).since(Time(1_200))));
    }
}
