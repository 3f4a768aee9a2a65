//! What watches the engine: who leads, whether a majority answers, whether it lives.
//!
//! A leader that no majority answers stops its heartbeats, so that those who still hear it
//! join those who do not and elect another. Without that, a leader that reaches one voter
//! only can hold up a connected majority for as long as the cut lasts.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::ServerState;
use openraft::error::Fatal;
use tokio::time::{Instant, MissedTickBehavior};

use crate::engine::Inner;
use crate::founding::Standing;
use crate::{Leadership, Machine};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// What the guard goes by, as ages.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// None at a voter that does not lead.
    leading: Option<Duration>,
    /// Since a majority answered; none when it has not yet.
    acked: Option<Duration>,
    /// Since there was a leader.
    leaderless: Duration,
    /// Greatest election timeout.
    election_max: Duration,
    /// Between two heartbeats.
    heartbeat: Duration,
}

impl Seen {
    /// Whether a majority answers this leader, or may still do so for the first time.
    fn majority(&self) -> bool {
        let age = self.acked.or(self.leading).unwrap_or_default();
        age <= self.election_max * 2
    }

    /// Whether heartbeats are to be sent.
    fn heartbeats(&self) -> bool {
        self.leading.is_none() || self.majority()
    }

    /// Whether a voter that should not lead stands for election all the same.
    ///
    /// By then every other has stood once. Waiting longer would only cost time: when the
    /// witness alone holds the last entries, nobody else can win.
    fn stands(&self) -> bool {
        self.leaderless > self.election_max * 2 + self.heartbeat
    }
}

struct Monitor {
    heartbeats: bool,
    leading_since: Option<Instant>,
    led_until: Instant,
    last_leader: Option<(u64, u64)>,
}

/// Watches until the engine stops. `may_lead` is false at a witness.
pub(crate) async fn watch<M: Machine>(inner: Arc<Inner<M>>, may_lead: bool) {
    let mut server = inner.raft.server_metrics();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut monitor =
        Monitor { heartbeats: true, leading_since: None, led_until: Instant::now(), last_leader: None };
    if !may_lead {
        inner.raft.runtime_config().elect(false);
    }
    loop {
        tokio::select! {
            _ = look.tick() => {}
            changed = server.changed() => if changed.is_err() { break },
        }
        server.mark_unchanged();
        match life(&inner) {
            Life::Runs => {}
            Life::Stopped => break,
            Life::Died(why) => {
                inner.disk.die(&why);
                break;
            }
        }
        monitor.step(&inner, may_lead);
    }
    inner.standing.send_replace(Standing::Stopped);
    inner.leadership.send_replace(Leadership::default());
}

enum Life {
    Runs,
    Stopped,
    Died(String),
}

fn life<M: Machine>(inner: &Inner<M>) -> Life {
    match &inner.raft.metrics().borrow().running_state {
        Ok(()) => Life::Runs,
        Err(Fatal::Stopped) => Life::Stopped,
        Err(fatal) => Life::Died(format!("DC-0112: the quorum engine died: {fatal}")),
    }
}

impl Monitor {
    fn step<M: Machine>(&mut self, inner: &Inner<M>, may_lead: bool) {
        let now = Instant::now();
        let metrics = inner.raft.metrics();
        let metrics = metrics.borrow();
        let leads = metrics.state == ServerState::Leader;
        let election_max = inner.profile.election_max;
        self.leading_since = leads.then(|| self.leading_since.unwrap_or(now));
        let heard = inner.heard_ago().is_some_and(|age| age <= election_max * 2);
        if leads || heard {
            self.led_until = now;
        }
        let seen = Seen {
            leading: self.leading_since.map(|since| now - since),
            acked: metrics.millis_since_quorum_ack.map(Duration::from_millis),
            leaderless: now - self.led_until,
            election_max,
            heartbeat: inner.profile.heartbeat,
        };
        if seen.heartbeats() != self.heartbeats {
            self.heartbeats = seen.heartbeats();
            inner.raft.runtime_config().heartbeat(self.heartbeats);
            tracing::warn!(on = self.heartbeats, acked = ?seen.acked, "heartbeats of this leader switched");
        }
        if !may_lead {
            inner.raft.runtime_config().elect(seen.stands());
        }
        let leader = metrics.current_leader.filter(|_| leads || heard);
        if let Some(found) = leader.map(|id| (metrics.current_term, id))
            && self.last_leader != Some(found)
        {
            self.last_leader = Some(found);
            inner.elections.fetch_add(1, Ordering::Relaxed);
        }
        let view = Leadership {
            leader: leader.and_then(|id| inner.site_of(id)).cloned(),
            term: metrics.current_term,
            me: leads,
            quorum_ok: if leads { seen.acked.is_some() && seen.majority() } else { leader.is_some() },
        };
        drop(metrics);
        inner.leadership.send_if_modified(|old| {
            let differs = *old != view;
            if differs {
                *old = view;
            }
            differs
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(leading: Option<u64>, acked: Option<u64>) -> Seen {
        Seen {
            leading: leading.map(Duration::from_millis),
            acked: acked.map(Duration::from_millis),
            leaderless: Duration::ZERO,
            election_max: Duration::from_millis(1200),
            heartbeat: Duration::from_millis(150),
        }
    }

    #[test]
    fn a_leader_that_no_majority_answers_stops_its_heartbeats() {
        assert!(seen(None, None).heartbeats(), "a follower sends none anyway");
        assert!(seen(Some(9_000), Some(2_400)).heartbeats());
        assert!(!seen(Some(9_000), Some(2_401)).heartbeats());
    }

    #[test]
    fn a_new_leader_has_the_time_of_two_elections_for_its_first_answer() {
        assert!(seen(Some(2_400), None).heartbeats());
        assert!(!seen(Some(2_401), None).heartbeats());
    }

    #[test]
    fn a_witness_stands_only_once_every_other_has_stood() {
        let mut witness = seen(None, None);
        witness.leaderless = Duration::from_millis(2_550);
        assert!(!witness.stands());
        witness.leaderless = Duration::from_millis(2_551);
        assert!(witness.stands());
    }
}
