//! What only the leader proposes: the two entries of the quorum, silence, and another try.
//!
//! Whoever leads does this from the applied state alone; a new leader picks up where the
//! log stands. Everything it proposes is checked again when it is applied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dc_core::act::QuorumAct;
use dc_core::ids::{RunId, SiteId, Token};
use dc_core::lease::{Profile, Watch};
use dc_core::plan::StepId;
use dc_core::registry::{Command, Entry, Registry};
use dc_core::run::{Run, Status};
use dc_core::time::Time;
use dc_quorum::LogEngine;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::clock::{now, wall};
use crate::lease::LeaseKeeper;

/// What a site gets on top of a step's own limit: its answer has to travel, its agent may be starting.
const GRACE: Duration = Duration::from_secs(5);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How often timers are looked at; entries are looked at as they come.
const TICK: Duration = Duration::from_millis(250);

/// An entry that was said is not said again before: it is on its way.
const QUIET: Duration = Duration::from_millis(300);

/// What a leader has to say, from the applied state, the leases it watches and its own clock
/// alone. Pure; shared by the running agent and the simulation.
#[derive(Debug)]
pub struct Sayings {
    profile: Profile,
    /// When this leader first saw each intent.
    seen: BTreeMap<(RunId, StepId, Token), Time>,
    /// When the failed steps of a run are tried again.
    again: BTreeMap<RunId, Time>,
    /// What it said last, and when.
    said: Vec<(Entry, Time)>,
}

impl Sayings {
    /// Starts with no timers: a new leader gives every intent its full time.
    pub fn new(profile: Profile) -> Self {
        Self { profile, seen: BTreeMap::new(), again: BTreeMap::new(), said: Vec::new() }
    }

    /// Forgets its timers: another leads.
    pub fn step_down(&mut self) {
        *self = Self::new(self.profile);
    }

    /// Everything the leader has to say about the applied state now.
    pub fn entries(&mut self, state: &Registry, leases: &Watch, now: Time) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut known = BTreeMap::new();
        for run in state.open_runs() {
            entries.extend(self.due(state, run, leases, now));
            for step in &run.steps {
                let Some((token, _)) = step.intent() else { continue };
                let key = (run.id.clone(), step.plan.id, token);
                let since = self.seen.get(&key).copied().unwrap_or(now);
                known.insert(key, since);
                if now.since(since) > step.plan.deadline() + GRACE && run.attention.is_none() {
                    entries.push(Entry::Overdue { run: run.id.clone(), step: step.plan.id, token });
                }
            }
            entries.extend(self.retry(run, now));
        }
        self.seen = known;
        self.said.retain(|(_, at)| now.since(*at) < QUIET);
        entries.retain(|entry| self.said.iter().all(|(said, _)| said != entry));
        self.said.extend(entries.iter().map(|entry| (entry.clone(), now)));
        entries
    }

    /// Takeover and opened, when the run has come so far.
    fn due(&self, state: &Registry, run: &Run, leases: &Watch, now: Time) -> Option<Entry> {
        let group = state.groups.get(&run.group)?;
        match run.due()? {
            QuorumAct::Takeover => {
                let age = leases.age(&run.target, now);
                if age.is_some_and(|age| age < self.profile.hold) {
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

    /// Another try for failed steps, after a pause that grows.
    fn retry(&mut self, run: &Run, now: Time) -> Option<Entry> {
        let attempts = run.steps.iter().filter_map(|s| match s.status {
            Status::Failed { .. } if run.aborting.is_some() => None, // given up with the run
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

/// The leader's part of one agent.
pub struct Lead {
    me: SiteId,
    engine: Arc<dyn LogEngine>,
    lease: Arc<LeaseKeeper>,
    sayings: Sayings,
}

impl Lead {
    /// Starts with nothing said.
    pub fn new(me: SiteId, profile: Profile, engine: Arc<dyn LogEngine>, lease: Arc<LeaseKeeper>) -> Self {
        Self { me, engine, lease, sayings: Sayings::new(profile) }
    }

    /// Leads whenever this agent is the leader, for ever.
    pub async fn follow(mut self) {
        let mut applied = self.engine.applied();
        let leadership = self.engine.leadership();
        loop {
            let state = applied.borrow_and_update().state.clone();
            if leadership.borrow().me {
                let entries = self.sayings.entries(&state, &self.lease.watch(), now());
                if !entries.is_empty() {
                    self.propose(entries).await;
                }
            } else {
                self.sayings.step_down();
            }
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    async fn propose(&self, entries: Vec<Entry>) {
        let by = format!("agent/{}", self.me);
        for entry in &entries {
            if let Entry::Takeover { run, epoch, .. } = entry {
                info!(%run, %epoch, "takeover proposed");
            }
        }
        let commands =
            entries.into_iter().map(|entry| Command { by: by.clone(), wall: wall(), entry }).collect();
        if let Err(cause) = self.engine.propose(commands, Instant::now() + Duration::from_secs(2)).await {
            // Whatever became of it stands in the log; the next look tells.
            warn!(%cause, "leader's entries not confirmed");
        }
    }
}
