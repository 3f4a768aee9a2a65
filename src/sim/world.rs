//! The world: one tick after the other, and the laws looked at in each.

mod judge;

use std::collections::{BTreeMap, BTreeSet};

use dc_core::ids::{GroupName, PlaneKind, RunId, SiteId, Token};
use dc_core::invariant::Marks;
use dc_core::lease::Profile;
use dc_core::registry::{Command, Entry};
use dc_core::run::{RunResult, Status};
use dc_core::script;
use dc_core::time::WallTime;
use dc_plane::fake::{Fakes, Group};

use crate::agent::{Agent, Lent, Performed};
use crate::dice::Dice;
use crate::host::{Host, TICK_MS};
use crate::log::Log;
use crate::operator::{Operator, Order};
use crate::sin::{self, Sin};
use crate::trouble::{Crash, Fault, Moment, Victim, by_chance};

/// Ticks for which faults by chance go on: two minutes.
const TROUBLED: u64 = 2_400;
/// Ticks after which everything must have ended: half an hour and more.
const LIMIT: u64 = 40_000;
/// Ticks that a plane at the end has to serve.
const SETTLE: u64 = 300;
/// The quorum's store has to grow, which it cannot on a full disk, once in so many ticks.
const STORE_GROWS: u64 = 100;

/// What became of everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The seed, to see it again.
    pub seed: u64,
    /// How each run ended.
    pub results: Vec<(RunId, RunResult)>,
    /// Laws that did not hold, the first ones.
    pub violations: Vec<String>,
    /// Whether the planned death came to pass.
    pub struck: bool,
    /// Ticks that it took.
    pub ticks: u64,
    /// The last things that happened, for who has to find out why.
    pub story: Vec<String>,
}

/// A world in a box.
pub struct World {
    seed: u64,
    dice: Dice,
    tick: u64,
    group: GroupName,
    planes: Vec<PlaneKind>,
    profile: Profile,
    log: Log,
    hosts: BTreeMap<SiteId, Host>,
    fakes: Fakes,
    operator: Operator,
    orders: Vec<Order>,
    planned: Vec<(u64, Fault)>,
    crash: Option<Crash>,
    struck: bool,
    chance: bool,
    unlinked: BTreeMap<PlaneKind, u64>,
    breaks_until: u64,
    /// Since when each site's agent runs and knows the group.
    runs_since: BTreeMap<SiteId, u64>,
    sin: Option<Sin>,
    marks: Marks,
    violations: Vec<String>,
    looked: u64,
}

impl World {
    /// A healthy world of that seed, in which one group of all planes is moved once.
    ///
    /// Errors: never for the names used here; the type of names demands it.
    pub fn seeded(seed: u64) -> Result<Self, dc_core::ids::BadName> {
        let mut dice = Dice::new(seed);
        let group = GroupName::new("orders")?;
        let mut hosts = BTreeMap::new();
        for name in ["rome", "fra", "oslo"] {
            let drift = i64::try_from(dice.between(0, 1000)).unwrap_or(0) - 500;
            let site = SiteId::new(name)?;
            hosts.insert(site.clone(), Host::new(site, dice.between(10_000, 10_000_000), drift));
        }
        let (rome, fra) = (SiteId::new("rome")?, SiteId::new("fra")?);
        let grants = BTreeSet::from([script::grant("orders")]);
        let planes = PlaneKind::ALL.to_vec();
        let fakes = Fakes::new(Group::founded(&planes, &rome, &fra, grants));
        Ok(Self {
            seed,
            dice,
            tick: 0,
            operator: Operator::new(group.clone(), Vec::new()),
            group,
            planes,
            profile: Profile::WAN,
            log: Log::new(None),
            hosts,
            fakes,
            orders: vec![Order::Move],
            planned: Vec::new(),
            crash: None,
            struck: false,
            chance: false,
            unlinked: BTreeMap::new(),
            breaks_until: 0,
            runs_since: BTreeMap::new(),
            sin: None,
            marks: Marks::default(),
            violations: Vec::new(),
            looked: 0,
        })
    }

    /// With other orders than one move.
    #[must_use]
    pub fn orders(mut self, orders: Vec<Order>) -> Self {
        self.orders = orders;
        self
    }

    /// With a death at a step of the first run.
    #[must_use]
    pub fn crash(mut self, crash: Crash) -> Self {
        self.crash = Some(crash);
        self
    }

    /// With a fault at a tick.
    #[must_use]
    pub fn at(mut self, tick: u64, fault: Fault) -> Self {
        self.planned.push((tick, fault));
        self
    }

    /// With orders and faults by chance, for two minutes.
    #[must_use]
    pub fn troubled(mut self) -> Self {
        self.chance = true;
        self.orders = (0..3)
            .map(|_| match self.dice.between(0, 9) {
                0 | 1 => Order::MoveAndAbort(usize::try_from(self.dice.between(0, 36)).unwrap_or(0)),
                2 | 3 => Order::MoveAndReturn(u32::try_from(self.dice.between(1, 3)).unwrap_or(1)),
                4 => Order::MoveAndAbortLate,
                5 => Order::MoveAndReturnLate,
                _ => Order::Move,
            })
            .collect();
        self
    }

    /// With a rule that is not kept.
    #[must_use]
    pub fn sinning(mut self, sin: Sin) -> Self {
        self.sin = Some(sin);
        self
    }

    /// Lets everything happen, until all has ended and settled, or a law does not hold.
    pub fn run(mut self) -> Report {
        self.log = Log::new(self.sin);
        if self.sin == Some(Sin::MarkLiftedByAnother) {
            self.log.twice_in = 2;
        }
        self.fakes.lock().sins = sin::of_planes(self.sin);
        self.operator = Operator::new(self.group.clone(), self.orders.clone());
        let mut settled = 0;
        while self.tick < LIMIT && self.violations.is_empty() && settled < SETTLE {
            self.tick += 1;
            self.step();
            let quiet = self.operator.is_done() && self.planned.is_empty() && !self.in_trouble();
            settled = if quiet { settled + 1 } else { 0 };
        }
        if self.violations.is_empty() {
            self.judge_the_end();
        }
        Report {
            seed: self.seed,
            results: self.operator.results,
            violations: self.violations,
            struck: self.struck,
            ticks: self.tick,
            story: self.log.story.split_off(self.log.story.len().saturating_sub(60)),
        }
    }

    fn in_trouble(&self) -> bool {
        self.chance && self.tick < TROUBLED
            || self.hosts.values().any(|h| !h.reachable(self.tick) || h.full_until > self.tick)
            || !self.unlinked.is_empty()
            || self.breaks_until > self.tick
    }

    fn step(&mut self) {
        self.trouble();
        self.elect();
        self.log.tick(self.tick, &mut self.dice);
        if self.tick == 20 || (self.tick.is_multiple_of(40) && self.log.truth.groups.is_empty()) {
            self.found();
        }
        if self.tick > 100 && self.tick.is_multiple_of(20) {
            self.operator.tick(self.tick, &mut self.log, &mut self.dice);
        }
        self.strike_by_status();
        let sites: Vec<SiteId> = self.hosts.keys().cloned().collect();
        for site in &sites {
            for performed in self.tick_host(site) {
                self.strike_by_act(&performed);
            }
        }
        self.clients();
        self.look();
    }

    fn found(&mut self) {
        if let Ok(spec) = script::spec(self.group.as_str(), &self.planes) {
            let entry = Entry::ApplyGroup { spec: Box::new(spec), over: 0 };
            let command = Command { by: "operator/olga".into(), wall: WallTime(self.tick * TICK_MS), entry };
            self.log.propose(self.tick, command, &mut self.dice);
        }
    }

    fn elect(&mut self) {
        let reachable = |h: &&Host| h.reachable(self.tick);
        let able: Vec<SiteId> = self.hosts.values().filter(reachable).map(|h| h.site.clone()).collect();
        if self.log.leader.as_ref().is_some_and(|leader| !able.contains(leader)) {
            self.log.leader = None;
            self.log.vacant_until = self.tick + self.dice.between(15, 60);
        }
        if able.len() < 2 {
            self.log.leader = None;
        } else if self.log.leader.is_none() && self.tick >= self.log.vacant_until {
            self.log.leader = self.dice.one(&able).cloned();
        }
    }

    fn trouble(&mut self) {
        let now = self.tick;
        let (due, later) = std::mem::take(&mut self.planned).into_iter().partition(|(at, _)| *at <= now);
        self.planned = later;
        for (_, fault) in due {
            self.inflict(fault);
        }
        if self.chance && now < TROUBLED {
            let sites: Vec<SiteId> = self.hosts.keys().cloned().collect();
            let linked: Vec<PlaneKind> =
                self.planes.iter().copied().filter(|p| *p != PlaneKind::Airflow).collect();
            if let Some(fault) = by_chance(&mut self.dice, &sites, &linked) {
                self.inflict(fault);
            }
        }
        let healed: Vec<PlaneKind> =
            self.unlinked.iter().filter(|(_, until)| **until <= now).map(|(plane, _)| *plane).collect();
        for plane in healed {
            self.unlinked.remove(&plane);
            self.link(plane, true);
        }
        for host in self.hosts.values_mut() {
            if self.dice.once_in(20) {
                host.lag = self.dice.between(0, 8);
            }
        }
    }

    fn link(&self, plane: PlaneKind, up: bool) {
        if let Some(link) = self.fakes.lock().links.get_mut(&plane) {
            link.up = up;
        }
    }

    fn inflict(&mut self, fault: Fault) {
        let now = self.tick;
        self.log.story.push(format!("tick {now}: {fault:?}"));
        match fault {
            Fault::Vacancy(span) => {
                self.log.leader = None;
                self.log.vacant_until = now + span;
            }
            Fault::Unlink(plane, span) => {
                self.unlinked.insert(plane, now + span);
                self.link(plane, false);
            }
            Fault::Breaks(span) => self.breaks_until = now + span,
            Fault::Kill(site, back) => self.with(&site, |h| h.kill(now, back, false)),
            Fault::Reboot(site, back) => self.with(&site, |h| h.kill(now, back, true)),
            Fault::LoseDisk(site, back) => {
                let newest = Token(self.log.entries.len() as u64);
                self.with(&site, |h| {
                    h.kill(now, back, false);
                    h.lose_disk(newest);
                });
            }
            Fault::FillDisk(site, span) => self.with(&site, |h| h.full_until = now + span),
            Fault::Cut(site, span) => self.with(&site, |h| h.cut_until = now + span),
            Fault::Freeze(site, span) => self.with(&site, |h| h.frozen_until = now + span),
            Fault::Jump(site, by) => self.with(&site, |h| h.jump(by)),
            Fault::SetWall(site, by) => self.with(&site, |h| h.set_wall(by)),
            Fault::Pause(site, span) => self.with(&site, |h| h.pause(now, span)),
        }
    }

    fn with(&mut self, site: &SiteId, what: impl FnOnce(&mut Host)) {
        if let Some(host) = self.hosts.get_mut(site) {
            what(host);
        }
    }

    fn tick_host(&mut self, site: &SiteId) -> Vec<Performed> {
        let Some(host) = self.hosts.get_mut(site) else { return Vec::new() };
        if host.frozen_until > self.tick || (host.agent.is_none() && host.starts_at > self.tick) {
            self.runs_since.insert(site.clone(), self.tick);
            return Vec::new();
        }
        let full = host.full_until > self.tick;
        if full && host.agent.is_some() && self.dice.once_in(STORE_GROWS) {
            host.kill(self.tick, self.dice.between(10, 60), false);
            return Vec::new();
        }
        let breaks = self.breaks_until > self.tick;
        let boot = host.boot.to_string();
        let mut lent = Lent {
            tick: self.tick,
            now: host.now(self.tick),
            wall: host.wall(self.tick),
            boot: &boot,
            disk: &mut host.disk,
            full,
            connected: host.cut_until <= self.tick,
            lag: host.lag,
            log: &mut self.log,
            fakes: &self.fakes,
            dice: &mut self.dice,
            breaks_in: if breaks { 5 } else { 0 },
            sin: self.sin,
        };
        let leads = lent.log.leader.as_ref() == Some(site);
        let agent = host
            .agent
            .get_or_insert_with(|| Agent::start(site.clone(), self.group.clone(), self.profile, &mut lent));
        let performed = agent.tick(&mut lent, leads);
        // Until it has caught up it may not even know that it holds the group.
        if !(agent.caught_up && agent.registry.groups.contains_key(&self.group)) {
            self.runs_since.insert(site.clone(), self.tick);
        }
        performed
    }

    /// Whether the planned death is due because of what the log says of its step.
    fn strike_by_status(&mut self) {
        let Some(crash) = self.crash.filter(|c| c.moment != Moment::Between) else { return };
        let first = RunId("RUN0001".into());
        let Some(run) = self.log.truth.runs.get(&first) else { return };
        let Some(step) = run.steps.get(crash.step).filter(|_| run.past.is_empty()) else { return };
        let due = match (crash.moment, &step.status) {
            (Moment::Before, Status::Doing { .. }) | (Moment::After, Status::Done { .. }) => true,
            (Moment::Before, Status::Waiting) => step.plan.site.is_none() && run.ready(step),
            _ => false,
        };
        if due {
            self.strike(crash);
        }
    }

    fn strike_by_act(&mut self, performed: &Performed) {
        let Some(crash) = self.crash.filter(|c| c.moment == Moment::Between) else { return };
        let run = self.log.truth.runs.get(&performed.run);
        let step = run.and_then(|run| run.steps.get(crash.step));
        if step.is_some_and(|s| s.plan.id == performed.step) && performed.run.0 == "RUN0001" {
            self.strike(crash);
        }
    }

    fn strike(&mut self, crash: Crash) {
        let run = self.log.truth.runs.get(&RunId("RUN0001".into()));
        let site = match crash.victim {
            Victim::Leader => self.log.leader.clone(),
            Victim::Source => run.map(|r| r.source.clone()),
            Victim::Target => run.map(|r| r.target.clone()),
        };
        if let Some(site) = site {
            let back = self.dice.between(10, 150);
            self.inflict(Fault::Kill(site, back));
            self.crash = None;
            self.struck = true;
        }
    }

    /// Clients write where they are let in, and links carry it over.
    fn clients(&mut self) {
        let mut group = self.fakes.lock();
        for (place, host) in self.hosts.values().enumerate() {
            if host.frozen_until > self.tick {
                continue;
            }
            for plane in &self.planes {
                if (self.tick + place as u64).is_multiple_of(12) {
                    group.write(&host.site, *plane);
                }
            }
        }
        for plane in &self.planes {
            if self.dice.once_in(12) {
                group.replicate(*plane, 3);
            }
        }
    }
}
