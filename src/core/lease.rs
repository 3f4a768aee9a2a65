//! The lease: how long a site may act, counted so that no two clocks have to agree.
//!
//! The holder counts from when it *sent* a renewal, every voter from when it *applied*
//! it; only durations cross machines. Inequalities I1 to I4 tie the two together, and a
//! profile that breaks one is refused before anything runs on it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::SiteId;
use crate::time::Time;

/// Worst clock-rate error allowed for: one part in this many (NTP slews at most 1 in 2000).
const DRIFT: u32 = 1000;

/// The times of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Between two renewals (P).
    pub renew: Duration,
    /// What a holder counts from its sending (L_h).
    pub hold: Duration,
    /// What every voter counts from its applying (L_g).
    pub grant: Duration,
    /// How long before its end the holder starts closing (s1).
    pub lead: Duration,
    /// Until a gate acts (kappa).
    pub gate: Duration,
    /// How long a delivered statement may still take effect (delta).
    pub effect: Duration,
    /// Of the watchdog device (T_wd).
    pub watchdog: Duration,
    /// Engine: between two heartbeats.
    pub heartbeat: Duration,
    /// Engine: least election timeout.
    pub election_min: Duration,
    /// Engine: greatest election timeout.
    pub election_max: Duration,
    /// Greatest round trip between voters that it is made for.
    pub round_trip: Duration,
}

/// A profile that would let two sites act at once, or fence a healthy one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("profile breaks {rule}: {left:?} must be {relation} {right:?} ({meaning})")]
pub struct BrokenProfile {
    rule: &'static str,
    relation: &'static str,
    left: Duration,
    right: Duration,
    meaning: &'static str,
}

impl Profile {
    /// Sites in one city: round trips up to 5 ms.
    pub const METRO: Self = Self {
        renew: Duration::from_secs(1),
        hold: Duration::from_secs(4),
        grant: Duration::from_secs(7),
        lead: Duration::from_millis(500),
        gate: Duration::from_millis(250),
        effect: Duration::from_millis(1500),
        watchdog: Duration::from_secs(3),
        heartbeat: Duration::from_millis(50),
        election_min: Duration::from_millis(200),
        election_max: Duration::from_millis(400),
        round_trip: Duration::from_millis(5),
    };
    /// The default: round trips up to 60 ms.
    pub const WAN: Self = Self {
        renew: Duration::from_secs(2),
        hold: Duration::from_secs(8),
        grant: Duration::from_secs(12),
        lead: Duration::from_secs(1),
        gate: Duration::from_millis(250),
        effect: Duration::from_secs(2),
        watchdog: Duration::from_secs(5),
        heartbeat: Duration::from_millis(150),
        election_min: Duration::from_millis(600),
        election_max: Duration::from_millis(1200),
        round_trip: Duration::from_millis(60),
    };
    /// Continents apart: round trips up to 150 ms.
    pub const FAR: Self = Self {
        renew: Duration::from_secs(2),
        hold: Duration::from_secs(12),
        grant: Duration::from_secs(17),
        lead: Duration::from_secs(1),
        gate: Duration::from_millis(250),
        effect: Duration::from_secs(2),
        watchdog: Duration::from_secs(7),
        heartbeat: Duration::from_millis(300),
        election_min: Duration::from_millis(1200),
        election_max: Duration::from_millis(2400),
        round_trip: Duration::from_millis(150),
    };

    /// The profile of that name: `metro`, `wan` or `far`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "metro" => Some(Self::METRO),
            "wan" => Some(Self::WAN),
            "far" => Some(Self::FAR),
            _ => None,
        }
    }

    /// Longest expected time from the loss of the engine's leader to the next commit (E).
    pub fn reelection(&self) -> Duration {
        self.election_max * 2 + self.round_trip * 4
    }

    /// Longest expected commit (C): two round trips and a slow disk.
    pub fn commit(&self) -> Duration {
        self.round_trip * 2 + Duration::from_millis(100)
    }

    /// Checks the inequalities that make the lease sound.
    ///
    /// Errors: the first one broken, with both sides.
    pub fn check(&self) -> Result<(), BrokenProfile> {
        let slow_holder = slower(self.hold) + self.gate + self.effect;
        at_least("I1", self.grant, slower(slow_holder), "the holder is shut before anyone may take over")?;
        let renewal = self.renew + self.reelection() + self.commit() * 2 + self.lead;
        at_least("I2", self.hold, renewal, "a new engine leader must not fence a healthy site")?;
        let round = self.election_max * 2 + self.round_trip * 4;
        at_least("I3", self.hold, round, "the lease outlives one election round")?;
        let watched = self.grant.saturating_sub(self.grant * 2 / DRIFT);
        at_least("I4", watched, self.watchdog * 2, "the watchdog ends a wedged host in time")?;
        at_least("E1", self.heartbeat, self.round_trip * 2, "a heartbeat is also the engine's deadline")?;
        at_least("E2", self.election_min, self.heartbeat * 4, "one lost heartbeat is no election")?;
        at_least("E3", self.election_max, self.election_min * 2, "voters must not stand at once")
    }
}

/// A duration as a clock that runs slow by the allowed error would show it, seen from a true one.
fn slower(span: Duration) -> Duration {
    span + span * 2 / DRIFT
}

fn at_least(
    rule: &'static str,
    left: Duration,
    right: Duration,
    meaning: &'static str,
) -> Result<(), BrokenProfile> {
    if left >= right {
        Ok(())
    } else {
        Err(BrokenProfile { rule, relation: "at least", left, right, meaning })
    }
}

/// Identifies one renewal of a site: its session, then a number that only rises within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Renewal {
    /// Rises each time the agent starts.
    pub session: u64,
    /// Rises with each renewal of the session.
    pub number: u64,
}

/// What a holder knows of its own lease.
///
/// A restarted agent starts with an empty one and so holds nothing until a renewal of
/// its new session is applied here.
#[derive(Debug, Clone, Default)]
pub struct OwnLease {
    sent: BTreeMap<Renewal, Time>,
    deadline: Option<Time>,
}

impl OwnLease {
    /// Notes a renewal at the moment before it is sent. Sent again, it keeps its first
    /// moment: nobody can tell which copy the voters counted from.
    pub fn sent(&mut self, renewal: Renewal, now: Time) {
        self.sent.entry(renewal).or_insert(now);
    }

    /// Counts a renewal that was applied *at this agent*: the deadline is its sending plus `hold`.
    pub fn applied(&mut self, renewal: Renewal, profile: &Profile) {
        if let Some(sent) = self.sent.get(&renewal) {
            let until = sent.plus(profile.hold);
            self.deadline = Some(self.deadline.map_or(until, |known| known.max(until)));
        }
        self.sent = self.sent.split_off(&renewal);
        self.sent.remove(&renewal);
    }

    /// What is left of the lease; none when it is over or was never had.
    pub fn left(&self, now: Time) -> Option<Duration> {
        self.deadline.filter(|until| *until > now).map(|until| until.since(now))
    }

    /// Whether closing must begin: the lead before the end is reached.
    pub fn closing(&self, now: Time, profile: &Profile) -> bool {
        self.left(now).is_none_or(|left| left <= profile.lead)
    }

    /// Gives the lease up at once: after a gap or a jump of the clock.
    pub fn forget(&mut self) {
        self.sent.clear();
        self.deadline = None;
    }
}

/// What a voter knows of the other sites' leases, by its own clock and its own applying.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    seen: BTreeMap<SiteId, (Renewal, Time)>,
}

impl Watch {
    /// Notes the newest renewal of a site as applied here. Only a higher one moves the timer.
    pub fn applied(&mut self, site: &SiteId, renewal: Renewal, now: Time) {
        let newer = self.seen.get(site).is_none_or(|(known, _)| renewal > *known);
        if newer {
            self.seen.insert(site.clone(), (renewal, now));
        }
    }

    /// Gives every site the full grant again: after a restart or an installed snapshot.
    pub fn restart(&mut self, now: Time) {
        for (_, since) in self.seen.values_mut() {
            *since = now;
        }
    }

    /// The renewal whose grant is over by this voter's clock; none while it runs or none is known.
    pub fn expired(&self, site: &SiteId, now: Time, profile: &Profile) -> Option<Renewal> {
        let (renewal, since) = self.seen.get(site)?;
        (now.since(*since) >= profile.grant).then_some(*renewal)
    }

    /// How long ago a renewal of that site was applied here.
    pub fn age(&self, site: &SiteId, now: Time) -> Option<Duration> {
        self.seen.get(site).map(|(_, since)| now.since(*since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn renewal(number: u64) -> Renewal {
        Renewal { session: 1, number }
    }

    #[test]
    fn every_profile_we_ship_keeps_the_inequalities() {
        for profile in [Profile::METRO, Profile::WAN, Profile::FAR] {
            assert_eq!(profile.check(), Ok(()));
        }
    }

    #[test]
    fn refuses_a_grant_one_margin_short_with_both_numbers() {
        let short = Profile { grant: Profile::WAN.hold, ..Profile::WAN };
        let said = short.check().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains("I1") && said.contains("8s") && said.contains("10.2"), "{said}");
    }

    #[test]
    fn refuses_a_hold_that_an_election_would_outlast() {
        let hasty = Profile { election_max: 4 * SECOND, ..Profile::WAN };
        assert!(hasty.check().is_err_and(|e| e.to_string().contains("I2")));
    }

    #[test]
    fn each_inequality_alone_is_refused_by_its_name() {
        let wan = Profile::WAN;
        let grants = wan.grant.saturating_sub(wan.grant * 2 / DRIFT);
        let broken = [
            ("I1", Profile { gate: wan.grant, ..wan }),
            ("I2", Profile { lead: wan.hold, ..wan }),
            ("I4", Profile { watchdog: grants / 2 + Duration::from_millis(1), ..wan }),
            ("E1", Profile { heartbeat: wan.round_trip, ..wan }),
            ("E2", Profile { election_min: wan.heartbeat * 3, ..wan }),
            ("E3", Profile { election_max: wan.election_min, ..wan }),
        ];
        for (rule, profile) in broken {
            let said = profile.check().err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.contains(&format!("breaks {rule}:")), "{rule}: {said}");
        }
    }

    #[test]
    fn the_holder_counts_from_sending_and_only_what_was_applied_here() {
        let mut lease = OwnLease::default();
        lease.sent(renewal(1), Time(1_000));
        assert_eq!(lease.left(Time(1_100)), None, "sent is not held");
        lease.applied(renewal(1), &Profile::WAN);
        assert_eq!(lease.left(Time(4_000)), Some(5 * SECOND));
        assert_eq!(lease.left(Time(9_000)), None);
    }

    #[test]
    fn a_renewal_sent_again_counts_from_its_first_sending() {
        let mut lease = OwnLease::default();
        lease.sent(renewal(1), Time(1_000));
        lease.sent(renewal(1), Time(5_000));
        lease.applied(renewal(1), &Profile::WAN);
        assert_eq!(lease.left(Time(5_000)), Some(4 * SECOND));
    }

    #[test]
    fn an_unknown_renewal_gives_a_restarted_agent_nothing() {
        let mut lease = OwnLease::default();
        lease.applied(renewal(7), &Profile::WAN);
        assert_eq!(lease.left(Time(0)), None);
    }

    #[test]
    fn a_late_old_renewal_never_shortens_the_lease() {
        let mut lease = OwnLease::default();
        lease.sent(renewal(1), Time(0));
        lease.sent(renewal(2), Time(2_000));
        lease.applied(renewal(2), &Profile::WAN);
        lease.applied(renewal(1), &Profile::WAN);
        assert_eq!(lease.left(Time(2_000)), Some(8 * SECOND));
    }

    #[test]
    fn a_voter_counts_from_applying_and_restarts_with_the_full_grant() -> Result<(), crate::ids::BadName> {
        let rome = SiteId::new("rome")?;
        let mut watch = Watch::default();
        watch.applied(&rome, renewal(1), Time(0));
        watch.applied(&rome, renewal(1), Time(5_000));
        assert_eq!(watch.expired(&rome, Time(11_999), &Profile::WAN), None);
        assert_eq!(watch.expired(&rome, Time(12_000), &Profile::WAN), Some(renewal(1)));
        watch.restart(Time(12_000));
        assert_eq!(watch.expired(&rome, Time(20_000), &Profile::WAN), None);
        Ok(())
    }
}
