//! The operator's side of an agent over gRPC: reads requests, calls `Control`, writes views.

mod dags;
mod diff;
mod watch;

/// What a tree of DAGs may be, for both ends.
pub(crate) mod limits {
    pub(crate) use super::dags::{FILE_BYTES_MAX, FILES_MAX, PIECE_BYTES_MAX, TREE_BYTES_MAX, check_path};
}

use std::pin::Pin;
use std::sync::Arc;

use dc_agent::control::Control;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, RunId, SiteId};
use dc_core::run::Run;
use dc_wire::convert::{status_of, to_json};
use dc_wire::link::Peer;
use dc_wire::pb;
use dc_wire::pb::control_server::{Control as Door, ControlServer};
use futures::Stream;
use serde::Serialize;
use tonic::{Request, Response, Status, Streaming};

use crate::spec_file;

/// Runs that a list holds when none are asked for by number.
const RUNS_SHOWN: usize = 100;

/// Serves an agent's `Control` to operators and viewers.
///
/// Goes behind `dc_wire::link::serve`, which refuses callers without the right and makes
/// the caller known to the handlers.
pub fn control_service(control: Arc<dyn Control>) -> ControlServer<ControlDoor> {
    ControlServer::new(ControlDoor { control, receiving: Arc::default() })
}

/// The door itself; see [`control_service`].
pub struct ControlDoor {
    control: Arc<dyn Control>,
    receiving: Arc<dags::OneAtATime>,
}

type Answer = Result<Response<pb::Report>, Status>;

fn report<T: Serialize>(what: &'static str, view: &T) -> Answer {
    Ok(Response::new(pb::Report { body_json: to_json(what, view)? }))
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn refused(fail: Fail) -> Status {
    status_of(&fail, None)
}

/// The caller as the audit names it, as in `operator/olga`.
fn by<T>(call: &Request<T>) -> Result<String, Status> {
    let peer = call.extensions().get::<Peer>().ok_or_else(|| Status::unauthenticated("no certificate"))?;
    Ok(format!("{}/{}", peer.identity.role(), peer.identity.name()))
}

fn bad_name(cause: &dc_core::ids::BadName) -> Status {
    let fail = Fail::new(Code::BAD_NAME, Exit::Usage, "the name is not usable", cause.to_string());
    refused(fail.next("dc-switch status"))
}

fn group_name(given: &str) -> Result<GroupName, Status> {
    GroupName::new(given).map_err(|e| bad_name(&e))
}

impl ControlDoor {
    fn find(&self, run: &str) -> Result<RunId, Status> {
        self.control.run(run).map(|view| view.run.id).map_err(refused)
    }

    fn show(&self, run: &RunId) -> Answer {
        report("run", &self.control.run(&run.0).map_err(refused)?)
    }
}

/// Why an order without the target's name is not taken.
fn unconfirmed(to: &SiteId, group: &GroupName, confirm: &str) -> Status {
    let why = match confirm {
        "" => "the name of the site was not confirmed".to_owned(),
        other => format!("{other:?} was confirmed, the site to activate is {to}"),
    };
    let what = format!("switchover of {group} to {to} not begun; nothing was changed");
    let fail = Fail::new(Code::from_text("DC-0009"), Exit::NotConfirmed, what, why);
    refused(fail.next(format!("dc-switch switchover {group} --to {to} --confirm {to}")))
}

#[tonic::async_trait]
impl Door for ControlDoor {
    async fn status(&self, call: Request<pb::StatusRequest>) -> Answer {
        let mut view = self.control.status();
        let group = call.into_inner().group;
        if !group.is_empty() {
            let group = group_name(&group)?;
            view.groups.retain(|g| g.name == group);
        }
        report("status", &view)
    }

    async fn plan(&self, call: Request<pb::PlanRequest>) -> Answer {
        let asked = call.into_inner();
        let to = SiteId::new(&asked.to).map_err(|e| bad_name(&e))?;
        report("plan", &self.control.plan(&group_name(&asked.group)?, &to).await.map_err(refused)?)
    }

    async fn switchover(&self, call: Request<pb::SwitchoverRequest>) -> Answer {
        let by = by(&call)?;
        let asked = call.into_inner();
        let group = group_name(&asked.group)?;
        let to = SiteId::new(&asked.to).map_err(|e| bad_name(&e))?;
        if asked.confirm != to.as_str() {
            return Err(unconfirmed(&to, &group, &asked.confirm));
        }
        let plan = (!asked.plan.is_empty()).then_some(asked.plan.as_str());
        let run = self.control.switchover(&by, &group, &to, plan, &asked.reason).await.map_err(refused)?;
        report("run", &run)
    }

    async fn run_list(&self, call: Request<pb::RunListRequest>) -> Answer {
        let asked = call.into_inner();
        let group = if asked.group.is_empty() { None } else { Some(group_name(&asked.group)?) };
        let mut runs = self.control.runs(group.as_ref());
        let most = usize::try_from(asked.limit).unwrap_or(RUNS_SHOWN);
        runs.truncate(if most == 0 { RUNS_SHOWN } else { most });
        report("runs", &runs)
    }

    async fn run_show(&self, call: Request<pb::RunRequest>) -> Answer {
        report("run", &self.control.run(&call.into_inner().run).map_err(refused)?)
    }

    type RunWatchStream = Pin<Box<dyn Stream<Item = Result<pb::Report, Status>> + Send>>;

    async fn run_watch(
        &self,
        call: Request<pb::RunRequest>,
    ) -> Result<Response<Self::RunWatchStream>, Status> {
        let run = self.find(&call.into_inner().run)?;
        Ok(Response::new(Box::pin(watch::reports(self.control.clone(), run))))
    }

    async fn run_abort(&self, call: Request<pb::RunOrder>) -> Answer {
        let by = by(&call)?;
        let asked = call.into_inner();
        let run = self.find(&asked.run)?;
        let why = if asked.reason.is_empty() { format!("aborted by {by}") } else { asked.reason };
        self.control.abort(&by, &run, &why).await.map_err(refused)?;
        self.show(&run)
    }

    async fn run_retry(&self, call: Request<pb::RunOrder>) -> Answer {
        let by = by(&call)?;
        let run = self.find(&call.into_inner().run)?;
        self.control.retry(&by, &run).await.map_err(refused)?;
        self.show(&run)
    }

    async fn run_return(&self, call: Request<pb::RunOrder>) -> Answer {
        let by = by(&call)?;
        let run = self.find(&call.into_inner().run)?;
        self.control.turn(&by, &run).await.map_err(refused)?;
        self.show(&run)
    }

    async fn group_apply(&self, call: Request<pb::GroupApplyRequest>) -> Answer {
        let by = by(&call)?;
        let asked = call.into_inner();
        let spec = spec_file::parse(&asked.file, &asked.spec_toml).map_err(refused)?;
        report("apply", &self.control.apply_group(&by, spec, asked.dry_run).await.map_err(refused)?)
    }

    async fn group_show(&self, call: Request<pb::GroupRequest>) -> Answer {
        let group = group_name(&call.into_inner().group)?;
        report("group", &self.control.group(&group).map_err(refused)?)
    }

    async fn group_diff(&self, call: Request<pb::GroupDiffRequest>) -> Answer {
        let asked = call.into_inner();
        let spec = spec_file::parse(&asked.file, &asked.spec_toml).map_err(refused)?;
        let known = self.control.group(&spec.name).ok().map(|shown| shown.spec);
        report("diff", &diff::diff(known.as_ref(), &spec))
    }

    async fn dags_publish(&self, call: Request<Streaming<pb::DagsChunk>>) -> Answer {
        let by = by(&call)?;
        let receiving = self.receiving.clone();
        report("release", &dags::receive(self.control.as_ref(), &receiving, &by, call.into_inner()).await?)
    }
}

/// Whether a run has ended, for those who wait.
fn over(run: &Run) -> bool {
    run.ended.is_some()
}
