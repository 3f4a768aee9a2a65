//! The operator: asks for moves one after the other, and changes her mind where she is told to.

use dc_core::ids::{GroupName, RunId, SiteId};
use dc_core::plan;
use dc_core::registry::{Command, Entry};
use dc_core::run::RunResult;
use dc_core::time::WallTime;

use crate::dice::Dice;
use crate::host::TICK_MS;
use crate::log::Log;

/// What is asked for, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Move the group to the other site, until the run ends.
    Move,
    /// The same, and abort once so many steps are done.
    MoveAndAbort(usize),
    /// The same, and return so many times between takeover and opened.
    MoveAndReturn(u32),
    /// The same, and abort once the takeover is committed, which must be refused.
    MoveAndAbortLate,
    /// The same, and return once it is opened, which must be refused.
    MoveAndReturnLate,
}

/// One person with a list.
pub struct Operator {
    group: GroupName,
    orders: Vec<Order>,
    next: usize,
    run: Option<RunId>,
    returns: u32,
    asked_epoch: Option<dc_core::ids::Epoch>,
    /// How each run ended.
    pub results: Vec<(RunId, RunResult)>,
}

impl Operator {
    /// A person with these orders.
    pub fn new(group: GroupName, orders: Vec<Order>) -> Self {
        Self { group, orders, next: 0, run: None, returns: 0, asked_epoch: None, results: Vec::new() }
    }

    /// Whether everything asked for has ended.
    pub fn is_done(&self) -> bool {
        self.next >= self.orders.len()
    }

    /// The run that is asked for now.
    pub fn run(&self) -> Option<&RunId> {
        self.run.as_ref()
    }

    /// Looks at what became of it, and asks again or for the next thing.
    pub fn tick(&mut self, tick: u64, log: &mut Log, dice: &mut Dice) {
        let Some(order) = self.orders.get(self.next).cloned() else { return };
        let Some(group) = log.truth.groups.get(&self.group) else { return };
        let Some(id) = self.run.clone() else {
            let name = RunId(format!("RUN{:04}", self.next + 1));
            self.run = Some(name);
            return;
        };
        let entry = match log.truth.runs.get(&id) {
            None => {
                let Some(to) = group.spec.other(&group.holder).cloned() else { return };
                self.start(log, &id, &to)
            }
            Some(run) => match &run.ended {
                Some(ended) => {
                    self.results.push((id, ended.result));
                    (self.run, self.returns, self.asked_epoch) = (None, 0, None);
                    self.next += 1;
                    return;
                }
                None => self.change_of_mind(&order, log, &id),
            },
        };
        if let Some(entry) = entry {
            let by = "operator/olga".to_owned();
            let command = Command { by, wall: WallTime(tick * TICK_MS), entry };
            log.propose(tick, command, dice);
        }
    }

    fn start(&self, log: &Log, id: &RunId, to: &SiteId) -> Option<Entry> {
        let plan = plan::switchover(&log.truth, &self.group, to).ok()?;
        Some(Entry::Start {
            run: id.clone(),
            group: self.group.clone(),
            to: to.clone(),
            plan_hash: plan.hash(),
            reason: "simulated".into(),
        })
    }

    fn change_of_mind(&mut self, order: &Order, log: &Log, id: &RunId) -> Option<Entry> {
        let run = log.truth.runs.get(id)?;
        let opened = log.truth.groups.get(&self.group)?.opened;
        let abort = || Some(Entry::Abort { run: id.clone(), why: "olga wants it".into() });
        let back = || Some(Entry::Return { run: id.clone(), epoch: run.epoch });
        match order {
            Order::Move => None,
            Order::MoveAndAbort(many) => {
                let done = run.steps.iter().filter(|s| s.done()).count();
                if done >= *many && run.aborting.is_none() && run.taken.is_none() { abort() } else { None }
            }
            Order::MoveAndAbortLate => {
                if run.taken.is_some() && run.aborting.is_none() {
                    abort()
                } else {
                    None
                }
            }
            Order::MoveAndReturnLate => {
                if run.taken.is_some() && opened && run.past.is_empty() {
                    back()
                } else {
                    None
                }
            }
            Order::MoveAndReturn(times) => {
                if run.taken.is_none() || opened {
                    return None;
                }
                // Asked again while the epoch is the same; each new epoch is another return.
                if self.asked_epoch != Some(run.epoch) {
                    if self.returns >= *times {
                        return None;
                    }
                    self.returns += 1;
                    self.asked_epoch = Some(run.epoch);
                }
                back()
            }
        }
    }
}
