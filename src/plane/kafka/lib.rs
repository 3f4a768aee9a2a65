//! The Kafka plane: two clusters, MirrorMaker 2 between them, and the grants that decide who writes where.
//!
//! What is true at all times: one class of writers per cluster. Applications write at the holder, the mirror at the
//! standby; a mirror that should be gone finds no WRITE and fails instead of looping. A fence takes ALLOW grants and
//! is proved by the refusal of a canary at every leader, for the answer to a deletion is no proof: another broker may
//! accept writes after it. Group positions are set exactly, from content. Failback starts at exact offsets.
//!
//! What this room never does: decide, start brokers or workers, make topics, write to a topic of applications, or
//! grant while its authority may only close.
//!
//! It talks to brokers by the `kafka-protocol` crate over connections of its own, reads included (the reason stands
//! in `log`), and to Connect over REST, never within the outage.

mod acl;
mod acts;
mod canary;
mod cluster;
mod config;
mod connect;
mod groups;
mod keep;
mod log;
mod mirror;
mod tail;
mod translate;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use dc_core::act::{Act, ActName, Evidence, Finding, KafkaAct, Progress};
use dc_core::authority::Authority;
use dc_core::ids::{GroupName, PlaneKind, SiteId};
use dc_core::position::Grant;
use dc_core::spec::{GroupSpec, KafkaSpec, Policy};
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts};

use cluster::{Cluster, failed};
pub use config::{BuildError, Config, SiteConfig};
use connect::Workers;
use keep::Kept;
use tail::Tail;

/// One site's half of Kafka, seen from an agent of either site.
struct Half {
    cluster: Cluster,
    /// Workers that write to this site.
    workers: Workers,
    /// Their positions.
    tail: Tail,
    config: SiteConfig,
}

/// Kafka of one group at one site.
struct KafkaPlane {
    site: SiteId,
    group: GroupName,
    spec: KafkaSpec,
    policy: Policy,
    config: Config,
    canary_topic: String,
    halves: BTreeMap<SiteId, Half>,
    kept: Kept,
    glance: parking_lot::Mutex<acts::Glance>,
}

/// Builds the plane of a group at a site. Connects to nothing.
///
/// Errors: what the section, the secrets it names or the group get wrong.
pub fn build(
    config: Config,
    spec: &GroupSpec,
    site: SiteId,
    data_dir: PathBuf,
) -> Result<Arc<dyn Plane>, BuildError> {
    let checked = config::check(&config, spec, &site)?;
    let mut halves = BTreeMap::new();
    for name in &spec.sites {
        let Some(of) = config.sites.get(name) else { continue };
        let cluster = Cluster::new(
            name.clone(),
            &of.bootstrap,
            checked.agent.clone(),
            checked.canary.clone(),
            checked.tls.clone(),
        );
        let workers = Workers::new(name.clone(), &of.connect)
            .map_err(|e| BuildError { key: format!("sites.{name}.connect"), why: e.to_string() })?;
        halves.insert(name.clone(), Half { cluster, workers, tail: Tail::default(), config: of.clone() });
    }
    Ok(Arc::new(KafkaPlane {
        kept: Kept::new(data_dir, &spec.name),
        site,
        group: spec.name.clone(),
        spec: checked.spec,
        policy: spec.policy.clone(),
        config,
        canary_topic: checked.canary_topic,
        halves,
        glance: parking_lot::Mutex::default(),
    }))
}

impl KafkaPlane {
    fn half(&self, site: &SiteId) -> Result<&Half, PlaneError> {
        self.halves
            .get(site)
            .ok_or_else(|| failed("find site", format!("{site} is no site of {}", self.group)))
    }

    /// Topics of applications.
    fn topics(&self) -> BTreeSet<&str> {
        self.spec.topics.iter().map(String::as_str).collect()
    }

    /// Topics that the mirror carries: those of applications and the canary's.
    fn carried(&self) -> BTreeSet<&str> {
        let mut topics = self.topics();
        topics.insert(&self.canary_topic);
        topics
    }

    /// The canary's WRITE, which stands where applications may write.
    fn canary_grant(&self) -> Grant {
        acl::on_topic(&self.config.canary_user, &self.canary_topic, "write")
    }

    /// The mirror's WRITE, which stands at the standby.
    fn mirror_grants(&self) -> Vec<Grant> {
        let user = &self.config.mirror_user;
        self.carried().into_iter().map(|topic| acl::on_topic(user, topic, "write")).collect()
    }

    /// Whether a grant lets somebody do that with a topic of the group.
    fn reaches(&self, grant: &Grant, operation: &str) -> bool {
        self.spec.topics.iter().any(|topic| acl::covers(grant, "topic", topic, operation))
    }

    /// Whether a grant is one of those that move: WRITE of a producer or READ of a consumer on the group's topics, or
    /// READ of a consumer on one of its consumer groups.
    fn moves(&self, grant: &Grant) -> bool {
        let one_of = |users: &[String]| users.iter().any(|user| acl::principal(user) == grant.principal);
        let group = || {
            !acl::is_wide(grant)
                && self.spec.groups.iter().any(|group| acl::covers(grant, "group", group, "read"))
        };
        (one_of(&self.spec.producers) && self.reaches(grant, "write"))
            || (one_of(&self.spec.consumers) && (self.reaches(grant, "read") || group()))
    }

    fn finding(site: &SiteId, code: &str, blocking: bool, text: impl Into<String>) -> Finding {
        Finding {
            code: code.to_owned(),
            plane: Some(PlaneKind::Kafka),
            site: site.clone(),
            blocking,
            text: text.into(),
        }
    }
}

/// The act of this plane; another plane's is refused.
fn named(act: &Act) -> Result<KafkaAct, PlaneError> {
    match act.name {
        ActName::Kafka(name) => Ok(name),
        other => Err(failed("perform", format!("{other} is no act of Kafka"))),
    }
}

/// Refuses what an authority that may only close must not do.
fn opening(by: &Authority) -> Result<(), PlaneError> {
    if by.may_open() {
        return Ok(());
    }
    Err(PlaneError::refused("DC-0424", "this would let writers in, and the authority may only close"))
}

#[async_trait]
impl Plane for KafkaPlane {
    fn kind(&self) -> PlaneKind {
        PlaneKind::Kafka
    }

    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        until.bound("observe Kafka", self.glance_at(depth, until)).await?
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let name = named(act)?;
        until.bound(name.word(), Box::pin(self.stands(name, act, until))).await?
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        let name = named(act)?;
        until.bound(name.word(), Box::pin(self.carry_out(name, act, by, until))).await?
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        let name = named(act)?;
        until.bound(name.word(), self.take_back(name, act, by, until)).await?
    }
}

/// What live tests need and the product must not have: grants given and taken as another user.
#[cfg(feature = "live")]
#[doc(hidden)]
pub mod hands {
    use dc_core::ids::SiteId;
    use dc_core::position::Grant;
    use dc_plane::{Deadline, PlaneError};

    use crate::cluster::Cluster;
    use crate::config::Login;

    /// Gives or takes grants at the cluster behind `bootstrap`.
    pub async fn change(
        site: &SiteId,
        bootstrap: &str,
        (user, password): (&str, &str),
        grants: &[Grant],
        give: bool,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let login = Login { user: user.to_owned(), password: password.to_owned() };
        let cluster = Cluster::new(site.clone(), bootstrap, login.clone(), login, None);
        if give {
            crate::acl::give(&cluster, grants, until).await
        } else {
            crate::acl::take(&cluster, grants, until).await.map(|_| ())
        }
    }
}
