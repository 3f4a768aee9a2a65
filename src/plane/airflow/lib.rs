//! The Airflow plane: schedulers and their tasks at one site, for one group.
//!
//! A site has two units under keepers: the API, and the writers (scheduler, dag processor,
//! triggerer). Each is a warm interpreter behind a gate that opens only to a message which names
//! its authority, so nothing starts by itself: not after a crash, not when somebody promotes the
//! database. Invariants: no scheduler starts before the policy decided what its start would run
//! again; the end of writers is proved by an empty process tree, never by a pid; whether a
//! scheduler runs is told by its own row of this very start, never by a health page.
//!
//! It never moves the database, the DAGs or the logs: those are other planes.

mod acts;
mod checks;
mod config;
mod db;
mod observe;
mod policy;
mod rest;
mod site;
mod tools;
mod units;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use dc_core::act::{Act, ActName, AirflowAct, Evidence, Progress};
use dc_core::authority::Authority;
use dc_core::ids::{PlaneKind, SiteId};
use dc_core::spec::GroupSpec;
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts};

pub use config::{BuildError, Config, Driver, SiteConfig};

use crate::site::Site;

/// Builds the plane of one site, checking all that needs no network.
///
/// Errors: the first fault of the section, of its files, or of the spec, naming its key.
#[allow(clippy::needless_pass_by_value, reason = "every plane is built by the same call")]
pub fn build(
    config: Config,
    spec: &GroupSpec,
    site: SiteId,
    data_dir: PathBuf,
) -> Result<Arc<dyn Plane>, BuildError> {
    let checked = config.check(spec, site, &data_dir)?;
    let api = rest::Api::new(&checked).map_err(|e| BuildError {
        key: "airflow.sites".into(),
        why: format!("no client can be made: {e}"),
    })?;
    let site = Site {
        units: units::Units::new(&checked),
        database: db::Database::new(checked.database.clone()),
        api,
        checked,
    };
    Ok(Arc::new(Airflow { site, seen: observe::Seen::default() }))
}

/// One Airflow at one site.
struct Airflow {
    site: Site,
    seen: observe::Seen,
}

fn own(act: &Act) -> Result<AirflowAct, PlaneError> {
    match act.name {
        ActName::Airflow(name) => Ok(name),
        other => Err(PlaneError::refused("DC-0621", format!("{other} is no act of the Airflow plane"))),
    }
}

impl Airflow {
    fn at_home(&self, act: &Act) -> Result<AirflowAct, PlaneError> {
        let name = own(act)?;
        if act.site == *self.site.name() {
            return Ok(name);
        }
        Err(PlaneError::refused(
            "DC-0621",
            format!("{} is for {}, this is {}", act.name, act.site, self.site.name()),
        ))
    }
}

#[async_trait]
impl Plane for Airflow {
    fn kind(&self) -> PlaneKind {
        PlaneKind::Airflow
    }

    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        observe::observe(&self.site, &self.seen, depth, until).await
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        acts::probe(&self.site, self.at_home(act)?, act, until).await
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        acts::perform(&self.site, self.at_home(act)?, act, by, until).await
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        acts::undo(&self.site, self.at_home(act)?, act, by, until).await
    }
}
