//! One site's agent: what it decides is the product's own (`dc_agent`'s duty, book, clock and
//! lead); what moves it - ticks, tasks, deaths - is made here, as the running agent does it.

use std::collections::BTreeMap;

use dc_agent::book::{Book, Kept};
use dc_agent::clock::Gaps;
use dc_agent::duty::{Intent, Upkeep, intents, may_open, upkeep};
use dc_agent::lead::Sayings;
use dc_agent::tokens::{Rank, rank};
use dc_core::act::Evidence;
use dc_core::ids::{GroupName, PlaneKind, RunId, SiteId};
use dc_core::lease::{OwnLease, Profile, Renewal};
use dc_core::plan::StepId;
use dc_core::registry::{Command, Entry, Registry};
use dc_core::run::Trouble;
use dc_core::time::{Time, WallTime};
use dc_plane::fake::Fakes;

use crate::dice::Dice;
use crate::host::Disk;
use crate::log::Log;
use crate::sin::Sin;
use crate::work::{Polled, Task, Work};

/// Ticks between two upkeeps.
const UPKEEP: u64 = 20;

/// What the world lends an agent for one tick.
pub struct Lent<'a> {
    /// Of the world.
    pub tick: u64,
    /// This host's clock.
    pub now: Time,
    /// This host's wall clock.
    pub wall: WallTime,
    /// Which boot of the host.
    pub boot: &'a str,
    /// This host's disk.
    pub disk: &'a mut Disk,
    /// Whether nothing more can be written to it.
    pub full: bool,
    /// Whether the others can be reached.
    pub connected: bool,
    /// Ticks between a commit and its applying here.
    pub lag: u64,
    /// The log.
    pub log: &'a mut Log,
    /// The planes.
    pub fakes: &'a Fakes,
    /// Chance.
    pub dice: &'a mut Dice,
    /// One act in so many breaks; none when 0.
    pub breaks_in: u64,
    /// The rule that is not kept.
    pub sin: Option<Sin>,
}

/// Something that happened at an agent, for who waits for the moment to strike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Performed {
    /// Of which run.
    pub run: RunId,
    /// Which step.
    pub step: StepId,
}

struct Answer {
    intent: Intent,
    command: Command,
    send_at: u64,
}

/// The memory of one process.
pub struct Agent {
    me: SiteId,
    group: GroupName,
    profile: Profile,
    /// As applied here.
    pub registry: Registry,
    /// Entries applied.
    pub applied: usize,
    /// Whether everything committed before this process began is applied.
    pub caught_up: bool,
    barrier: Option<usize>,
    renew_at: Time,
    /// What it knows of leases.
    pub book: Book,
    gaps: Gaps,
    tasks: BTreeMap<PlaneKind, Task>,
    answers: BTreeMap<(RunId, StepId), Answer>,
    upkeep_at: BTreeMap<PlaneKind, u64>,
    reopened: BTreeMap<PlaneKind, bool>,
    sayings: Sayings,
}

impl Agent {
    /// A process that begins with what the disk holds; `before` is the lease of the one before it.
    pub fn start(me: SiteId, group: GroupName, profile: Profile, lent: &mut Lent<'_>) -> Self {
        let mut registry = Registry::default();
        for at in 0..lent.disk.applied {
            lent.log.apply_to(&mut registry, at);
        }
        let sinful = lent.sin == Some(Sin::RestartKeepsLease);
        let inherited = lent.disk.lease.as_ref().and_then(|kept| {
            if sinful { Some(kept.until) } else { kept.until(lent.boot, lent.now, lent.wall) }
        });
        let mut book = Book::new(me.clone(), profile, inherited);
        if let (true, Some(until)) = (sinful, inherited) {
            let old = Renewal { session: 0, number: 1 };
            book.own.sent(old, Time(until.0.saturating_sub(dc_core::time::millis(profile.hold))));
            book.own.applied(old, &profile);
        }
        Self {
            me,
            group,
            profile,
            registry,
            applied: lent.disk.applied,
            caught_up: lent.sin == Some(Sin::NoBarrier),
            barrier: None,
            renew_at: lent.now,
            book,
            gaps: Gaps::new(lent.now, lent.wall),
            tasks: BTreeMap::new(),
            answers: BTreeMap::new(),
            upkeep_at: BTreeMap::new(),
            reopened: BTreeMap::new(),
            sayings: Sayings::new(profile),
        }
    }

    /// One tick. Returns the acts that ended in it and are not answered yet.
    pub fn tick(&mut self, lent: &mut Lent<'_>, leads: bool) -> Vec<Performed> {
        self.look_at_clock(lent);
        self.catch_up(lent);
        self.renew(lent);
        self.answer(lent);
        let performed = self.work(lent);
        if leads && lent.connected {
            for entry in self.sayings.entries(&self.registry, self.book.watch(), lent.now) {
                self.propose(lent, entry);
            }
        } else {
            self.sayings.step_down();
        }
        performed
    }

    fn propose(&self, lent: &mut Lent<'_>, entry: Entry) {
        let command = Command { by: format!("agent/{}", self.me), wall: lent.wall, entry };
        if lent.connected {
            lent.log.propose(lent.tick, command, lent.dice);
        }
    }

    /// Closes first and asks after, when the clock jumped or the host stood still.
    fn look_at_clock(&mut self, lent: &Lent<'_>) {
        let seen = self.gaps.tick(lent.now, lent.wall);
        if seen.is_some() && lent.sin != Some(Sin::IgnoresJump) {
            self.book.give_up(lent.now);
        }
    }

    fn catch_up(&mut self, lent: &mut Lent<'_>) {
        if !lent.connected {
            return;
        }
        let visible = lent.log.entries.iter().rposition(|(tick, _)| tick + lent.lag <= lent.tick);
        let visible = visible.map_or(0, |last| last + 1);
        while self.applied < visible {
            lent.log.apply_to(&mut self.registry, self.applied);
            self.applied += 1;
            self.follow_leases(lent);
        }
        if self.barrier.is_none() && lent.log.leader.is_some() && lent.dice.once_in(3) {
            self.barrier = Some(lent.log.entries.len());
        }
        if !self.caught_up && self.barrier.is_some_and(|needed| self.applied >= needed) {
            self.caught_up = true;
        }
        if lent.dice.once_in(8) && !lent.full {
            lent.disk.applied = lent.disk.applied.max(self.applied);
        }
    }

    fn follow_leases(&mut self, lent: &mut Lent<'_>) {
        let Some(mine) = self.book.applied(&self.registry, lent.now) else { return };
        if lent.sin == Some(Sin::LeaseFromAck) {
            self.book.own = OwnLease::default();
            self.book.own.sent(mine, lent.now);
            self.book.own.applied(mine, &self.profile);
        }
        if let Some(left) = self.book.left(lent.now) {
            let (boot, until) = (lent.boot.to_owned(), lent.now.plus(left));
            // Written anew each time: what finds no room leaves an empty file.
            let kept = Kept { boot, until, at: lent.now, wall: lent.wall };
            lent.disk.lease = (!lent.full).then_some(kept);
        }
    }

    fn renew(&mut self, lent: &mut Lent<'_>) {
        if !self.caught_up || lent.now < self.renew_at {
            return;
        }
        if !self.book.is_open() {
            self.book.open(&self.registry, lent.dice.roll());
        }
        let renewal = self.book.send(lent.now);
        self.renew_at = lent.now.plus(self.profile.renew);
        self.propose(lent, Entry::Renew { site: self.me.clone(), renewal });
    }

    /// Sends answers until the applied state shows them.
    fn answer(&mut self, lent: &mut Lent<'_>) {
        let due: Vec<Command> = self
            .answers
            .values_mut()
            .filter(|a| a.send_at <= lent.tick)
            .map(|a| {
                a.send_at = lent.tick + 20;
                a.command.clone()
            })
            .collect();
        for command in due {
            self.propose(lent, command.entry);
        }
    }

    fn work(&mut self, lent: &mut Lent<'_>) -> Vec<Performed> {
        let asked = if self.caught_up { intents(&self.registry, &self.me) } else { Vec::new() };
        let same =
            |a: &Intent, b: &Intent| (&a.run, a.step, a.token, a.undo) == (&b.run, b.step, b.token, b.undo);
        self.answers.retain(|_, a| asked.iter().any(|i| same(i, &a.intent)));
        self.tasks.retain(|_, t| match &t.work {
            Work::Step(intent) => asked.iter().any(|i| same(i, intent)),
            Work::Upkeep(_) => true,
        });
        for intent in &asked {
            self.begin(intent, lent);
        }
        let planes = self.registry.groups.get(&self.group).map(|g| g.spec.planes()).unwrap_or_default();
        for plane in planes {
            self.keep(plane, lent);
        }
        self.poll(lent)
    }

    fn begin(&mut self, intent: &Intent, lent: &mut Lent<'_>) {
        let Some(plane) = intent.act.name.plane() else { return };
        if self.answers.contains_key(&(intent.run.clone(), intent.step)) {
            return;
        }
        match self.tasks.get(&plane).map(|t| &t.work) {
            Some(Work::Step(_) | Work::Upkeep(Upkeep::Close)) => return,
            Some(Work::Upkeep(_)) => {
                self.tasks.remove(&plane);
            }
            None => {}
        }
        match rank(lent.disk.tokens.get(&plane).copied(), intent.token) {
            Rank::Stale(_) => return, // a newer decision stands
            Rank::Same => {}
            Rank::Higher if !lent.full => {
                lent.disk.tokens.insert(plane, intent.token);
            }
            Rank::Higher if lent.sin == Some(Sin::ActsWithoutTokenOnDisk) => {}
            Rank::Higher => {
                let text = "its token was not remembered on disk".into();
                return self.answered(intent.clone(), Err(Trouble { code: "DC-0222".into(), text }), lent);
            }
        }
        let until = lent.now.plus(intent.limit);
        self.tasks.insert(plane, Task::step(intent.clone(), lent.fakes, until));
    }

    /// Keeps a plane as it should be between runs.
    fn keep(&mut self, plane: PlaneKind, lent: &mut Lent<'_>) {
        let closing = self.book.closing(lent.now);
        let due = self.upkeep_at.entry(plane).or_insert(lent.tick);
        if *due > lent.tick {
            return;
        }
        *due = lent.tick + UPKEEP;
        let lease = self.book.left(lent.now);
        let wanted = upkeep(&self.registry, &self.group, plane, &self.me, lease, closing);
        if !self.caught_up && wanted != Upkeep::Close {
            return;
        }
        match (wanted, self.tasks.get(&plane).map(|t| &t.work)) {
            (Upkeep::Leave, _) | (Upkeep::Close, Some(Work::Upkeep(Upkeep::Close))) => return,
            (Upkeep::Close, _) => {
                self.tasks.remove(&plane);
                self.answers.retain(|_, a| a.intent.act.name.plane() != Some(plane));
                self.reopened.remove(&plane);
                if !lent.full {
                    lent.disk.closed.insert(plane, true);
                }
            }
            (_, Some(_)) => return,
            (_, None) => {}
        }
        // A process that never reopened a plane does not know whether the one before it closed it.
        let closed = lent.disk.closed.get(&plane) == Some(&true) || !self.reopened.contains_key(&plane);
        let group = self.registry.groups.get(&self.group);
        let task = group.and_then(|g| Task::upkeep(g, plane, &self.me, wanted, closed, lent.fakes));
        if let Some(task) = task {
            self.tasks.insert(plane, task);
        }
    }

    fn poll(&mut self, lent: &mut Lent<'_>) -> Vec<Performed> {
        let mut performed = Vec::new();
        for plane in PlaneKind::ALL {
            let Some(task) = self.tasks.get_mut(&plane) else { continue };
            if let Work::Step(intent) = &task.work
                && intent.opens
                && lent.sin != Some(Sin::OpenBeforeOpened)
                && lent.sin != Some(Sin::NoBarrier)
                && !task.begun
                && !may_open(&self.registry, intent, &self.me, self.book.left(lent.now))
            {
                if lent.now >= task.until {
                    let trouble = Trouble { code: "DC-0217".into(), text: "has no lease".into() };
                    self.ended(plane, Polled::Done(Err(trouble)), lent, &mut performed);
                }
                continue;
            }
            let late = matches!(task.work, Work::Step(_)) && lent.now >= task.until;
            let breaks = lent.breaks_in > 0 && lent.dice.once_in(lent.breaks_in * 8);
            let polled = if late || breaks {
                let text = if late { "timed out" } else { "broke half-way" };
                Polled::Done(Err(Trouble { code: "DC-0222".into(), text: text.into() }))
            } else {
                task.poll(lent.dice.between(1, 3))
            };
            self.ended(plane, polled, lent, &mut performed);
        }
        performed
    }

    fn ended(&mut self, plane: PlaneKind, polled: Polled, lent: &mut Lent<'_>, all: &mut Vec<Performed>) {
        let Polled::Done(result) = polled else { return };
        let Some(task) = self.tasks.remove(&plane) else { return };
        match task.work {
            Work::Step(intent) => {
                all.push(Performed { run: intent.run.clone(), step: intent.step });
                self.answered(intent, result, lent);
            }
            Work::Upkeep(Upkeep::Serve(_)) if result.is_ok() => {
                lent.disk.closed.insert(plane, false);
                self.reopened.insert(plane, true);
            }
            Work::Upkeep(_) => {}
        }
    }

    /// Not in this tick, so that the process may die between the act and its answer.
    fn answered(&mut self, intent: Intent, result: Result<Evidence, Trouble>, lent: &Lent<'_>) {
        let (run, step, token) = (intent.run.clone(), intent.step, intent.token);
        let entry = Entry::Finish { run: run.clone(), step, token, took_ms: 50, result };
        let command = Command { by: String::new(), wall: WallTime(0), entry };
        self.answers.insert((run, step), Answer { intent, command, send_at: lent.tick + 1 });
    }
}
