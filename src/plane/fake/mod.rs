//! Planes that exist in memory alone: data, doors, links and grants of one group at all sites.
//!
//! They keep the contract of [`Plane`] and stop to breathe between any two effects, so that
//! whoever drives them may let them die there. Upkeep is as dangerous here as a driver may
//! ever be: `serve` opens whatever it finds shut, so that only the decision not to serve
//! keeps a fence. Only tests and the simulation use them.

mod acts;
mod state;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use async_trait::async_trait;
use dc_core::act::{Act, Evidence, Progress};
use dc_core::authority::{Authority, Origin};
use dc_core::ids::{PlaneKind, SiteId};

pub use state::{Group, Here, Link, Sin};

use crate::{Deadline, Depth, Plane, PlaneError, PlaneFacts, Role};

/// One group's planes at every site, shared by all their handles.
#[derive(Debug, Clone)]
pub struct Fakes(Arc<Mutex<Group>>);

impl Fakes {
    /// A group held by the first site, followed by the second.
    pub fn new(group: Group) -> Self {
        Self(Arc::new(Mutex::new(group)))
    }

    /// The state of all planes; what is done through it happens at once.
    pub fn lock(&self) -> MutexGuard<'_, Group> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plane at a site, as an agent there drives it.
    pub fn plane(&self, kind: PlaneKind, site: &SiteId) -> Arc<FakePlane> {
        Arc::new(FakePlane { fakes: self.clone(), kind, site: site.clone() })
    }
}

/// One plane at one site.
#[derive(Debug)]
pub struct FakePlane {
    fakes: Fakes,
    kind: PlaneKind,
    site: SiteId,
}

/// What one piece of an act came to.
pub(crate) enum Piece {
    /// Another piece follows.
    More,
    /// The same piece is tried again after a breath.
    Again,
    /// The act is done.
    Done(Evidence),
}

/// Lets whoever drives the act look away, or let it die, before the next effect.
struct Breath(bool);

impl Future for Breath {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 {
            return Poll::Ready(());
        }
        self.0 = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

async fn breathe(act: &Act, until: Deadline) -> Result<(), PlaneError> {
    Breath(false).await;
    if until.passed() {
        return Err(PlaneError::TimedOut { what: act.name.to_string(), waited: std::time::Duration::ZERO });
    }
    Ok(())
}

impl FakePlane {
    fn mine(&self, act: &Act) -> Result<(), PlaneError> {
        if act.name.plane() == Some(self.kind) && act.site == self.site {
            return Ok(());
        }
        let why = format!("{} at {} is no act of {} at {}", act.name, act.site, self.kind, self.site);
        Err(PlaneError::refused("DC-0218", why))
    }

    fn begin(&self, act: &Act, by: &Authority, opens: bool) -> Result<(), PlaneError> {
        self.mine(act)?;
        if opens && !by.may_open() {
            let why = format!("{} lets writers in, and its authority may only close", act.name);
            return Err(PlaneError::refused("DC-0218", why));
        }
        if let Origin::Step { token, .. } = by.origin() {
            self.fakes.lock().here(&self.site, self.kind).token = *token;
        }
        Ok(())
    }
}

#[async_trait]
impl Plane for FakePlane {
    fn kind(&self) -> PlaneKind {
        self.kind
    }

    async fn observe(&self, _depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        if until.passed() {
            return Err(PlaneError::TimedOut { what: "observe".into(), waited: std::time::Duration::ZERO });
        }
        let mut group = self.fakes.lock();
        let lag = group.lag(self.kind);
        let here = group.here(&self.site, self.kind);
        let role = match (here.writable(), here.running) {
            (true, _) => Role::Writable,
            (false, true) if lag.is_some() => Role::Following,
            (false, true) => Role::Closed,
            (false, false) => Role::Down,
        };
        Ok(PlaneFacts {
            plane: self.kind,
            role: Some(role),
            lag: None,
            summary: format!("{} writes, behind by {lag:?}", here.kept.len()),
            findings: Vec::new(),
        })
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        self.mine(act)?;
        breathe(act, until).await?;
        Ok(self.fakes.lock().stands(act).map_or(Progress::NotYet, Progress::Done))
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        self.begin(act, by, acts::opens(act.name))?;
        if let Progress::Done(evidence) = self.probe(act, until).await? {
            return Ok(evidence);
        }
        let mut piece = 0;
        loop {
            breathe(act, until).await?;
            let done = self.fakes.lock().work(act, piece)?;
            match done {
                Piece::More => piece += 1,
                Piece::Again => {}
                Piece::Done(evidence) => {
                    breathe(act, until).await?;
                    return Ok(evidence);
                }
            }
        }
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        self.begin(act, by, acts::undo_opens(act))?;
        breathe(act, until).await?;
        let evidence = self.fakes.lock().take_back(act)?;
        breathe(act, until).await?;
        Ok(evidence)
    }
}
