//! The fakes pass the suite, act by act in the order of a plan; and the suite can fail.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use dc_core::act::{Act, Evidence, Progress};
use dc_core::authority::Authority;
use dc_core::ids::{PlaneKind, SiteId};
use dc_core::plan::Effect;
use dc_core::script::{Bench, Intent, grant};
use dc_plane::fake::{Fakes, Group};
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts, suite};

const LIMIT: Duration = Duration::from_secs(5);

struct Bank {
    bench: Bench,
    fakes: Fakes,
}

impl Bank {
    fn new() -> Self {
        let mut bench = Bench::with("orders", &PlaneKind::ALL).unwrap();
        bench.start("orders", "fra").unwrap();
        let (rome, fra) = (SiteId::new("rome").unwrap(), SiteId::new("fra").unwrap());
        let group = Group::founded(&PlaneKind::ALL, &rome, &fra, BTreeSet::from([grant("orders")]));
        Self { bench, fakes: Fakes::new(group) }
    }

    fn next(&self) -> Option<(Intent, std::sync::Arc<dc_plane::fake::FakePlane>, Authority, Effect)> {
        let intent = self.bench.intents().into_iter().next()?;
        let plane = self.fakes.plane(intent.act.name.plane()?, &intent.act.site);
        let by = Authority::step(intent.run.clone(), intent.act.epoch, intent.token);
        let step = self.bench.run(&intent.run)?.step(intent.step)?;
        Some((intent, plane, by, step.plan.effect))
    }
}

#[tokio::test]
async fn every_act_of_a_move_keeps_its_promises() {
    let mut bank = Bank::new();
    let mut acts = 0;
    loop {
        if bank.bench.due().is_some() {
            bank.bench.step();
        }
        let Some((intent, plane, by, effect)) = bank.next() else { break };
        suite::observes(plane.as_ref(), LIMIT).await.unwrap();
        let mut evidence = suite::keeps(plane.as_ref(), &intent.act, &by, effect, LIMIT).await.unwrap();
        if effect == Effect::Fences {
            suite::undoes(plane.as_ref(), &intent.act, &by, LIMIT).await.unwrap();
            evidence = suite::stands(plane.as_ref(), &intent.act, &by, LIMIT).await.unwrap();
        }
        bank.bench.answer(&intent, Ok(evidence));
        acts += 1;
    }
    assert_eq!(bank.bench.registry.open_runs().count(), 0, "the move is over");
    assert!(acts > 40, "{acts}");
}

/// A plane with one broken promise.
struct Broken(std::sync::Arc<dc_plane::fake::FakePlane>, &'static str);

#[async_trait]
impl Plane for Broken {
    fn kind(&self) -> PlaneKind {
        self.0.kind()
    }
    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        self.0.observe(depth, until).await
    }
    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        if self.1 == "forgets" { Ok(Progress::NotYet) } else { self.0.probe(act, until).await }
    }
    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        match self.1 {
            "late" => {
                let far = Deadline::within(LIMIT);
                self.0.perform(act, by, far).await
            }
            "hasty" => self.0.perform(act, &Authority::reopen(dc_core::ids::Epoch::default()), until).await,
            "mute" => {
                let mut seen = self.0.perform(act, by, until).await?;
                if seen.change == dc_core::act::Change::Already {
                    seen.outcomes.clear();
                }
                Ok(seen)
            }
            _ => self.0.perform(act, by, until).await,
        }
    }
    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        if self.1 == "keeps" {
            return Ok(Evidence::changed("says it is taken back"));
        }
        self.0.undo(act, by, until).await
    }
}

#[tokio::test]
async fn each_broken_promise_is_seen_by_its_check() {
    for (sin, act) in [
        ("forgets", "s3.fence_writers"),
        ("keeps", "s3.fence_writers"),
        ("late", "s3.fence_writers"),
        ("mute", "kafka.prepare_reverse"),
        ("hasty", "s3.open_writers"),
    ] {
        let mut bank = Bank::new();
        let (intent, plane, by) = loop {
            if bank.bench.due().is_some() {
                bank.bench.step();
            }
            let wanted = bank.bench.intents().into_iter().find(|i| i.act.name.to_string() == act);
            if let Some(intent) = wanted {
                let plane = bank.fakes.plane(intent.act.name.plane().unwrap(), &intent.act.site);
                let by = Authority::step(intent.run.clone(), intent.act.epoch, intent.token);
                break (intent, plane, by);
            }
            bank.bench.step();
        };
        let plane = Broken(plane, sin);
        let seen = match sin {
            "late" => suite::keeps_its_deadline(&plane, &intent.act, &by).await,
            "hasty" => suite::refuses_to_open(&plane, &intent.act, LIMIT).await,
            "keeps" => {
                suite::stands(&plane, &intent.act, &by, LIMIT).await.unwrap();
                suite::undoes(&plane, &intent.act, &by, LIMIT).await
            }
            "mute" => suite::repeatable(&plane, &intent.act, &by, LIMIT).await.map(|_| ()),
            _ => suite::stands(&plane, &intent.act, &by, LIMIT).await.map(|_| ()),
        };
        assert!(seen.is_err(), "{sin} was not seen");
    }
}
