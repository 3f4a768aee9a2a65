//! What a leader proposes, as the running agent's leader does: the two entries of the
//! quorum, silence past a deadline, and another try.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_core::act::QuorumAct;
use dc_core::ids::{RunId, SiteId, Token};
use dc_core::lease::{Profile, Watch};
use dc_core::plan::StepId;
use dc_core::registry::{Entry, Registry};
use dc_core::run::{Run, Status};
use dc_core::time::Time;

const GRACE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// A leader's timers.
pub struct Lead {
    me: SiteId,
    profile: Profile,
    seen: BTreeMap<(RunId, StepId, Token), Time>,
    again: BTreeMap<RunId, Time>,
    said: BTreeMap<RunId, Time>,
}

impl Lead {
    /// With no timers: a new leader gives every intent its full time.
    pub fn new(me: SiteId, profile: Profile) -> Self {
        Self { me, profile, seen: BTreeMap::new(), again: BTreeMap::new(), said: BTreeMap::new() }
    }

    /// Forgets its timers.
    pub fn step_down(&mut self) {
        self.seen.clear();
        self.again.clear();
        self.said.clear();
    }

    /// Everything it has to say about the applied state now.
    pub fn entries(&mut self, state: &Registry, watch: &Watch, now: Time) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut known = BTreeMap::new();
        for run in state.open_runs() {
            // A proposal under way is given a moment before it is made again.
            let quiet = self.said.get(&run.id).is_some_and(|at| now.since(*at) < Duration::from_millis(300));
            let due = if quiet { None } else { self.due(state, run, watch, now) };
            if due.is_some() {
                self.said.insert(run.id.clone(), now);
            }
            entries.extend(due);
            for step in &run.steps {
                let Some((token, _)) = step.intent() else { continue };
                let key = (run.id.clone(), step.plan.id, token);
                let since = self.seen.get(&key).copied().unwrap_or(now);
                known.insert(key, since);
                let late = now.since(since) > step.plan.deadline() + GRACE;
                if late && run.attention.is_none() {
                    entries.push(Entry::Overdue { run: run.id.clone(), step: step.plan.id, token });
                }
            }
            entries.extend(self.retry(run, now));
        }
        self.seen = known;
        entries
    }

    fn due(&self, state: &Registry, run: &Run, watch: &Watch, now: Time) -> Option<Entry> {
        let group = state.groups.get(&run.group)?;
        match run.due()? {
            QuorumAct::Takeover => {
                let here = run.target == self.me;
                let age = watch.age(&run.target, now);
                if here || age.is_some_and(|age| age < self.profile.hold) {
                    let (epoch, cut) = (group.epoch.next(), run.cut());
                    return Some(Entry::Takeover { run: run.id.clone(), epoch, cut });
                }
                let why = format!("the agent of {} is silent before the takeover", run.target);
                Some(Entry::Abort { run: run.id.clone(), why })
            }
            QuorumAct::Opened => Some(Entry::Opened { run: run.id.clone(), epoch: run.epoch }),
            QuorumAct::ReserveTimelines => None,
        }
    }

    fn retry(&mut self, run: &Run, now: Time) -> Option<Entry> {
        let attempts = run.steps.iter().filter_map(|s| match s.status {
            Status::Failed { .. } if run.aborting.is_some() => None,
            Status::Failed { attempt, .. } if run.taken.is_some() || attempt < s.plan.attempts => {
                Some(attempt)
            }
            Status::UndoFailed { attempt, .. } => Some(attempt),
            _ => None,
        });
        let Some(attempt) = attempts.max() else {
            self.again.remove(&run.id);
            return None;
        };
        let pause = (Duration::from_millis(500) * attempt * attempt).min(PAUSE_MAX);
        let at = *self.again.entry(run.id.clone()).or_insert(now.plus(pause));
        if now < at {
            return None;
        }
        self.again.remove(&run.id);
        Some(Entry::Retry { run: run.id.clone() })
    }
}
