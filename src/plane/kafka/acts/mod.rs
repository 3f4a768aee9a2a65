//! What each act does. An act names two sites, and either site's agent can perform it: both clusters are reached.

mod drain;
mod fence;
mod observe;
mod offsets;
mod open;
mod preflight;
mod reverse;
mod upkeep;

use std::collections::BTreeSet;
use std::time::Duration;

use dc_core::act::{Act, Direction, Evidence, KafkaAct, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::position::Grant;
use dc_plane::{Deadline, PlaneError, wait_until};

use crate::cluster::{Cluster, Map};
use crate::{Half, KafkaPlane, acl};
pub use observe::Glance;

/// Between two looks at grants as brokers enforce them; they follow within milliseconds.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

impl KafkaPlane {
    fn source(&self, act: &Act) -> Result<&Half, PlaneError> {
        self.half(&act.source)
    }

    fn target(&self, act: &Act) -> Result<&Half, PlaneError> {
        self.half(&act.target)
    }

    /// The grants as recorded in Raft.
    ///
    /// Errors: `Refused` without a record: what is taken could not be given back.
    fn recorded<'a>(&self, act: &'a Act) -> Result<&'a [Grant], PlaneError> {
        act.grants().map(Vec::as_slice).ok_or_else(|| {
            PlaneError::refused("DC-0415", format!("no grants of {} are recorded for this run", self.group))
        })
    }

    pub(crate) async fn stands(
        &self,
        name: KafkaAct,
        act: &Act,
        until: Deadline,
    ) -> Result<Progress, PlaneError> {
        let found = match name {
            KafkaAct::PrepareReverse => self.reverse_is_prepared(act, until).await?,
            KafkaAct::RecordGrants => Self::is_recorded(act),
            KafkaAct::FenceApps => self.apps_are_fenced(act, until).await?,
            KafkaAct::FenceMirror => self.mirror_is_fenced(act, until).await?,
            KafkaAct::SetOffsets => self.offsets_are_set(act, until).await?,
            KafkaAct::GrantApps => self.apps_are_granted(act, until).await?,
            KafkaAct::StopForward => self.forward_is_stopped(act, until).await?,
            KafkaAct::StartReverse => self.reverse_is_started(act, until).await?,
            KafkaAct::Preflight
            | KafkaAct::Recheck
            | KafkaAct::Drain
            | KafkaAct::Verify
            | KafkaAct::SelfClose
            | KafkaAct::Stand
            | KafkaAct::Serve => None,
        };
        Ok(found.map_or(Progress::NotYet, Progress::Done))
    }

    pub(crate) async fn carry_out(
        &self,
        name: KafkaAct,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        match name {
            KafkaAct::Preflight | KafkaAct::Recheck => Box::pin(self.check(name, act, until)).await,
            KafkaAct::PrepareReverse => self.prepare_reverse(act, until).await,
            KafkaAct::RecordGrants => self.record_grants(act, until).await,
            KafkaAct::FenceApps => self.fence_apps(act, until).await,
            KafkaAct::Drain => self.drain(act, until).await,
            KafkaAct::FenceMirror => self.fence_mirror(act, until).await,
            KafkaAct::SetOffsets => self.set_offsets(act, until).await,
            KafkaAct::GrantApps => self.grant_apps(act, by, until).await,
            KafkaAct::StopForward => self.stop_forward(act, until).await,
            KafkaAct::StartReverse => match act.direction {
                Direction::Forward => self.start_reverse(act, by, until).await,
                Direction::Return => self.go_on_forward(act, by, until).await,
            },
            KafkaAct::Verify => self.verify(act, until).await,
            KafkaAct::SelfClose => self.self_close(act, until).await,
            KafkaAct::Stand => self.stand(act, until).await,
            KafkaAct::Serve => self.serve(act, until).await,
        }
    }

    pub(crate) async fn take_back(
        &self,
        name: KafkaAct,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        match name {
            KafkaAct::PrepareReverse => self.delete_reverse(act, until).await,
            KafkaAct::FenceApps => self.unfence_apps(act, by, until).await,
            KafkaAct::FenceMirror => self.unfence_mirror(act, by, until).await,
            KafkaAct::SelfClose => self.reopen(act, by, until).await,
            KafkaAct::StartReverse | KafkaAct::StopForward | KafkaAct::GrantApps => {
                Err(PlaneError::refused("DC-0424", "it lies behind the takeover: the way back is a return"))
            }
            KafkaAct::Preflight
            | KafkaAct::RecordGrants
            | KafkaAct::Recheck
            | KafkaAct::Drain
            | KafkaAct::SetOffsets
            | KafkaAct::Verify
            | KafkaAct::Stand
            | KafkaAct::Serve => Ok(Evidence::already("nothing to take back")),
        }
    }

    /// The first grant that still lets somebody do what it should not, as each broker enforces grants now.
    async fn left_over(
        &self,
        cluster: &Cluster,
        map: &Map,
        fits: impl Fn(&Grant) -> bool,
        until: Deadline,
    ) -> Result<Option<String>, PlaneError> {
        let everywhere = acl::read_everywhere(cluster, map, until).await?;
        let found = everywhere.iter().find_map(|(broker, bindings)| {
            let grant = acl::allowed(bindings).find(|grant| fits(grant))?;
            Some(format!("{} at broker {broker} of {}", acl::show(grant), cluster.site))
        });
        Ok(found)
    }

    /// Waits until no broker enforces a grant of that kind any more.
    ///
    /// Errors: `Failed` at once for one that is nobody's to take, `TimedOut` naming one that stays.
    async fn wait_gone(
        &self,
        cluster: &Cluster,
        map: &Map,
        fits: impl Fn(&Grant) -> bool,
        until: Deadline,
    ) -> Result<usize, PlaneError> {
        let last = parking_lot::Mutex::new(None);
        let waited = wait_until(until, LOOK_AGAIN, "", || async {
            let left = self.left_over(cluster, map, &fits, until).await?;
            let gone = left.is_none();
            *last.lock() = left;
            Ok(gone.then_some(map.brokers.len()))
        });
        waited.await.map_err(|e| match (e, last.lock().take()) {
            (PlaneError::TimedOut { waited, .. }, Some(left)) => {
                PlaneError::TimedOut { what: format!("a grant to be gone: {left}"), waited }
            }
            (other, _) => other,
        })
    }

    /// Waits until every broker enforces these grants.
    async fn wait_given(
        &self,
        cluster: &Cluster,
        map: &Map,
        grants: &[Grant],
        until: Deadline,
    ) -> Result<usize, PlaneError> {
        let what = format!("{} grants to stand at every broker of {}", grants.len(), cluster.site);
        wait_until(until, LOOK_AGAIN, &what, || async {
            let everywhere = acl::read_everywhere(cluster, map, until).await?;
            let stand = everywhere.values().all(|bindings| {
                let known: BTreeSet<&Grant> = acl::allowed(bindings).collect();
                grants.iter().all(|grant| known.contains(grant))
            });
            Ok(stand.then_some(everywhere.len()))
        })
        .await
    }

    fn is_recorded(act: &Act) -> Option<Evidence> {
        let known = act.grants()?;
        let seen = format!("{} grants stand recorded and are not read again", known.len());
        Some(Evidence::already(seen).with(Outcome::Grants(known.clone())))
    }

    /// Reads the grants that move. A recorded set is returned unchanged: after a fence the cluster holds none of it.
    async fn record_grants(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if let Some(known) = Self::is_recorded(act) {
            return Ok(known);
        }
        let cluster = &self.source(act)?.cluster;
        let bindings = acl::read(cluster, until).await?;
        let grants: Vec<Grant> = acl::allowed(&bindings).filter(|grant| self.moves(grant)).cloned().collect();
        let writes = grants.iter().any(|grant| self.reaches(grant, "write"));
        if !writes && !self.spec.producers.is_empty() {
            let why = format!(
                "no producer of {} has a grant to write at {}; is it the holder?",
                self.group, act.source
            );
            return Err(PlaneError::refused("DC-0415", why));
        }
        let shown: Vec<String> = grants.iter().map(acl::show).collect();
        let seen = format!("{} grants at {}: {}", grants.len(), act.source, shown.join("; "));
        Ok(Evidence::changed(seen).with(Outcome::Grants(grants)))
    }
}
