//! The contract of a plane, kept by the acts of this driver.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dc_core::act::{Act, ActName, Evidence, PostgresAct, Progress};
use dc_core::authority::Authority;
use dc_core::ids::PlaneKind;
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts};

use crate::acts::upkeep_reopen;
use crate::local::Local;

/// PostgreSQL of one group at one site.
pub(crate) struct Postgres(pub Arc<Local>);

fn ours(act: &Act) -> Result<PostgresAct, PlaneError> {
    match act.name {
        ActName::Postgres(name) => Ok(name),
        other => Err(PlaneError::refused("DC-0332", format!("{other} is no act of postgres"))),
    }
}

/// What comes too late is not begun.
fn in_time(act: &Act, until: Deadline) -> Result<(), PlaneError> {
    if until.passed() {
        return Err(PlaneError::TimedOut { what: format!("begin {}", act.name), waited: Duration::ZERO });
    }
    Ok(())
}

#[async_trait]
impl Plane for Postgres {
    fn kind(&self) -> PlaneKind {
        PlaneKind::Postgres
    }

    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        until.bound("observe postgres", self.0.observe(depth, until)).await?
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        self.0.check_addressee(act)?;
        let local = &self.0;
        let name = ours(act)?;
        let probe = async {
            match name {
                PostgresAct::FenceClients => local.probe_fence(act, until).await,
                PostgresAct::PreSync => local.probe_pre_sync(act, until).await,
                PostgresAct::Stop => local.probe_stop(act, until).await,
                PostgresAct::Promote => local.probe_promote(act, until).await,
                PostgresAct::Open => local.probe_open(act, until).await,
                PostgresAct::Follow => local.probe_follow(act, until).await,
                PostgresAct::SelfClose => Ok(local.probe_self_close()),
                // these read, or are as cheap to repeat as to ask about
                PostgresAct::Preflight
                | PostgresAct::Checkpoint
                | PostgresAct::Recheck
                | PostgresAct::Replayed
                | PostgresAct::Verify
                | PostgresAct::Stand
                | PostgresAct::Serve => Ok(Progress::NotYet),
            }
        };
        until.bound(&format!("probe {}", act.name), probe).await?
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        self.0.check_addressee(act)?;
        in_time(act, until)?;
        let local = &self.0;
        match ours(act)? {
            PostgresAct::Preflight => local.preflight(act, false, until).await,
            PostgresAct::Recheck => local.preflight(act, true, until).await,
            PostgresAct::Checkpoint => local.checkpoint(act, until).await,
            PostgresAct::PreSync => local.pre_sync(act, until).await,
            PostgresAct::FenceClients => local.fence_clients(by, until).await,
            PostgresAct::Stop => local.stop_source(act, by, until).await,
            PostgresAct::Replayed => local.replayed(act, until).await,
            PostgresAct::Promote => local.promote(act, by, until).await,
            PostgresAct::Open => local.open(act, by, until).await,
            PostgresAct::Follow => local.follow(act, by, until).await,
            PostgresAct::Verify => local.verify(act, until).await,
            PostgresAct::SelfClose => local.self_close(until).await,
            PostgresAct::Stand => local.stand(act, until).await,
            PostgresAct::Serve => local.serve(act, by, until).await,
        }
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        self.0.check_addressee(act)?;
        in_time(act, until)?;
        let local = &self.0;
        match ours(act)? {
            PostgresAct::Checkpoint => {
                local.revive(act, until).await?;
                local.undo_checkpoint(act, until).await
            }
            PostgresAct::PreSync => local.undo_pre_sync(by, until).await,
            PostgresAct::FenceClients => {
                local.revive(act, until).await?;
                local.undo_fence(act, by, until).await
            }
            PostgresAct::Stop => local.undo_stop(by, until).await,
            PostgresAct::SelfClose => upkeep_reopen(local, act, by, until).await,
            PostgresAct::Preflight
            | PostgresAct::Recheck
            | PostgresAct::Replayed
            | PostgresAct::Verify
            | PostgresAct::Stand
            | PostgresAct::Serve => Ok(Evidence::already("nothing to undo")),
            PostgresAct::Promote | PostgresAct::Open | PostgresAct::Follow => {
                let why =
                    format!("{} comes after the takeover; the way back is a return of the run", act.name);
                Err(PlaneError::refused("DC-0332", why))
            }
        }
    }
}
