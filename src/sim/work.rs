//! An act under way: a future of the plane's own, moved on one breath at a time.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dc_agent::duty::{Intent, Upkeep, upkeep_act};
use dc_core::act::Evidence;
use dc_core::authority::Authority;
use dc_core::ids::{PlaneKind, SiteId};
use dc_core::registry::Group;
use dc_core::run::Trouble;
use dc_core::time::Time;
use dc_plane::fake::Fakes;
use dc_plane::{Deadline, Plane, PlaneError};

type Doing = Pin<Box<dyn Future<Output = Result<Evidence, PlaneError>>>>;

/// Never reached: the world ends an act by its own clock.
const FAR: Duration = Duration::from_hours(1000);

/// What is done.
pub enum Work {
    /// A step of a run.
    Step(Intent),
    /// What a plane needs between runs.
    Upkeep(Upkeep),
}

/// An act under way.
pub struct Task {
    /// What it is.
    pub work: Work,
    /// By this host's clock.
    pub until: Time,
    /// Whether it was moved on at all.
    pub begun: bool,
    doing: Doing,
}

/// How far it came.
pub enum Polled {
    /// It goes on.
    Pending,
    /// It ended.
    Done(Result<Evidence, Trouble>),
}

impl Task {
    /// A step, not begun yet.
    pub fn step(intent: Intent, fakes: &Fakes, until: Time) -> Self {
        let plane = fakes.plane(intent.act.name.plane().unwrap_or(PlaneKind::Postgres), &intent.act.site);
        let (act, undo) = (intent.act.clone(), intent.undo);
        let by = Authority::step(intent.run.clone(), intent.act.epoch, intent.token);
        let doing = Box::pin(async move {
            let until = Deadline::within(FAR);
            if undo { plane.undo(&act, &by, until).await } else { plane.perform(&act, &by, until).await }
        });
        Self { work: Work::Step(intent), until, begun: false, doing }
    }

    /// Upkeep of a plane; none where there is nothing to do.
    pub fn upkeep(
        group: &Group,
        kind: PlaneKind,
        me: &SiteId,
        wanted: Upkeep,
        closed: bool,
        fakes: &Fakes,
    ) -> Option<Self> {
        let plane = fakes.plane(kind, me);
        let act = upkeep_act(group, &group.spec.name, kind, me, wanted)?;
        let close = upkeep_act(group, &group.spec.name, kind, me, Upkeep::Close)?;
        let doing: Doing = Box::pin(async move {
            let until = Deadline::within(FAR);
            match wanted {
                Upkeep::Serve(epoch) => {
                    let by = Authority::reopen(epoch);
                    if closed {
                        plane.undo(&close, &by, until).await?;
                    }
                    plane.perform(&act, &by, until).await
                }
                _ => plane.perform(&act, &Authority::self_fence(), until).await,
            }
        });
        Some(Self { work: Work::Upkeep(wanted), until: Time(u64::MAX), begun: false, doing })
    }

    /// Moves it on by some breaths.
    pub fn poll(&mut self, breaths: u64) -> Polled {
        self.begun = true;
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..breaths {
            if let Poll::Ready(result) = self.doing.as_mut().poll(&mut context) {
                return Polled::Done(
                    result.map_err(|cause| Trouble { code: "DC-0222".into(), text: cause.to_string() }),
                );
            }
        }
        Polled::Pending
    }
}
