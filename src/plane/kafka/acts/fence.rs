//! The two fences: applications at the source, the mirror at the target.

use dc_core::act::{Act, Evidence, Outcome};
use dc_core::authority::Authority;
use dc_core::position::{Grant, Position};
use dc_plane::{Deadline, PlaneError};

use crate::canary::{self, Verdict};
use crate::cluster::{Cluster, Map};
use crate::{KafkaPlane, acl, log, opening};

/// Of recorded grants those that a fence takes. Group grants stay: without READ on topics nobody can fetch or commit,
/// and clients live on; without READ on the group some die.
fn on_topics(grants: &[Grant]) -> Vec<Grant> {
    grants.iter().filter(|grant| grant.resource == "topic").cloned().collect()
}

impl KafkaPlane {
    /// Whether a grant lets an application write or read the group's topics.
    fn lets_in(&self, grant: &Grant) -> bool {
        grant.resource == "topic" && self.moves(grant)
    }

    /// Proof that nobody may write: no broker enforces a grant, and every leader refuses the canary, whose own grant
    /// was the last to go.
    async fn prove_shut(&self, cluster: &Cluster, map: &Map, until: Deadline) -> Result<String, PlaneError> {
        let (seen, brokers) = futures::try_join!(
            canary::wait_for(cluster, map, &self.canary_topic, &Verdict::Denied, until),
            self.wait_gone(cluster, map, |grant| self.lets_in(grant), until)
        )?;
        Ok(format!(
            "canary denied at {} of {} leaders (round {}), no grant enforced at {brokers} brokers",
            seen.leaders, seen.leaders, seen.tries
        ))
    }

    /// Takes topic grants and the canary's last, and proves it. What is taken must be recorded before.
    pub(super) async fn shut(
        &self,
        cluster: &Cluster,
        recorded: &[Grant],
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let map = cluster.full_map(&self.carried(), until).await?;
        let mut taken = on_topics(recorded);
        taken.push(self.canary_grant());
        let count = acl::take(cluster, &taken, until).await?;
        let proof = self.prove_shut(cluster, &map, until).await?;
        let seen = format!("{count} grants taken at {}; {proof}", cluster.site);
        Ok(if count > 0 { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    /// Gives grants and the canary's last, and proves by the canary that writes would be taken at every leader.
    ///
    /// Given also where all of them stand: a taking that was broken off may be on its way, and lands before this.
    pub(super) async fn let_in(
        &self,
        cluster: &Cluster,
        grants: &[Grant],
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let map = cluster.full_map(&self.carried(), until).await?;
        let mut given = grants.to_vec();
        given.push(self.canary_grant());
        let stood = self.given_already(cluster, &map, &given, until).await.unwrap_or(false);
        acl::give(cluster, &given, until).await?;
        let (seen, brokers) = futures::try_join!(
            canary::wait_for(cluster, &map, &self.canary_topic, &Verdict::Granted, until),
            self.wait_given(cluster, &map, &given, until)
        )?;
        let text = format!(
            "{} grants stand at {brokers} brokers of {}, canary accepted at {} of {} leaders (round {})",
            given.len(),
            cluster.site,
            seen.leaders,
            seen.leaders,
            seen.tries
        );
        Ok(if stood { Evidence::already(text) } else { Evidence::changed(text) })
    }

    pub(super) async fn given_already(
        &self,
        cluster: &Cluster,
        map: &Map,
        given: &[Grant],
        until: Deadline,
    ) -> Result<bool, PlaneError> {
        let everywhere = acl::read_everywhere(cluster, map, until).await?;
        Ok(everywhere.values().all(|bindings| {
            let known: Vec<&Grant> = acl::allowed(bindings).collect();
            given.iter().all(|grant| known.contains(&grant))
        }))
    }

    pub(super) async fn apps_are_fenced(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let cluster = &self.source(act)?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        if self.left_over(cluster, &map, |grant| self.lets_in(grant), until).await?.is_some() {
            return Ok(None);
        }
        let topics = [self.canary_topic.as_str()].into();
        let found = canary::try_write(cluster, &map, crate::cluster::Who::Canary, &topics, until).await?;
        if found.values().any(|verdict| *verdict != Verdict::Denied) {
            return Ok(None);
        }
        Ok(Some(Evidence::already(self.prove_shut(cluster, &map, until).await?)))
    }

    pub(super) async fn fence_apps(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let recorded = self.recorded(act)?;
        let cluster = &self.source(act)?.cluster;
        // A grant that is not recorded could not be given back: it is left, named, and the fence fails.
        let known = acl::read(cluster, until).await?;
        let stray = acl::allowed(&known).find(|grant| self.lets_in(grant) && !recorded.contains(grant));
        if let Some(stray) = stray {
            let why = format!("{} at {} was given after grants were recorded", acl::show(stray), act.source);
            return Err(PlaneError::refused("DC-0415", why));
        }
        self.shut(cluster, recorded, until).await
    }

    pub(super) async fn unfence_apps(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        let Some(recorded) = act.grants() else {
            return Ok(Evidence::already("no grants were recorded, so none were taken"));
        };
        self.let_in(&self.source(act)?.cluster, &on_topics(recorded), until).await
    }

    /// Whether a grant lets the mirror write what it carries.
    pub(super) fn lets_mirror(&self, grant: &Grant) -> bool {
        grant.principal == acl::principal(&self.config.mirror_user)
            && self.carried().iter().any(|topic| acl::covers(grant, "topic", topic, "write"))
    }

    pub(super) async fn mirror_is_fenced(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let cluster = &self.target(act)?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        if self.left_over(cluster, &map, |grant| self.lets_mirror(grant), until).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(self.final_ends(act, &map, 0, until).await?))
    }

    pub(super) async fn fence_mirror(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let cluster = &self.target(act)?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        let taken = acl::take(cluster, &self.mirror_grants(), until).await?;
        self.wait_gone(cluster, &map, |grant| self.lets_mirror(grant), until).await?;
        self.final_ends(act, &map, taken, until).await
    }

    /// Ends of the target, final now, and those of the source, which must be as they were when it was drained.
    async fn final_ends(
        &self,
        act: &Act,
        map: &Map,
        taken: usize,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let Some(before) = act.source_ends() else {
            return Err(PlaneError::refused("DC-0418", "the source was not drained in this run"));
        };
        let carried = self.carried();
        let source = &self.source(act)?.cluster;
        let source_map = source.full_map(&carried, until).await?;
        let (target, now) = futures::try_join!(
            log::settled(&self.target(act)?.cluster, map, &carried, until),
            log::settled(source, &source_map, &carried, until)
        )?;
        let now = log::to_ends(&now);
        if now != *before {
            let why = format!(
                "ends at {} moved after the fence: {}",
                act.source,
                super::drain::moved(before, &now)
            );
            return Err(PlaneError::refused("DC-0418", why));
        }
        let ends = log::to_ends(&target);
        let seen = format!(
            "{taken} grants of the mirror taken at {}, none enforced at {} brokers; {} partitions end there, ends at {} unchanged",
            act.target,
            map.brokers.len(),
            target.len(),
            act.source
        );
        let evidence = if taken > 0 { Evidence::changed(seen) } else { Evidence::already(seen) };
        let position = Position::Kafka { source: now, target: ends.clone() };
        Ok(evidence.with(Outcome::TargetEnds(ends)).with(Outcome::Position(position)))
    }

    pub(super) async fn unfence_mirror(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        let cluster = &self.target(act)?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        let grants = self.mirror_grants();
        let stood = self.given_already(cluster, &map, &grants, until).await?;
        acl::give(cluster, &grants, until).await?;
        let brokers = self.wait_given(cluster, &map, &grants, until).await?;
        let name = act.mirror().unwrap_or(&self.spec.mirror);
        // A task that tried to write meanwhile has failed for good; it goes on where it was.
        let workers = &self.target(act)?.workers;
        let restarted = match workers.status(name, until).await? {
            Some(status) if !status.runs() && !status.is_stopped() => {
                workers.restart_failed(name, until).await?;
                ", its failed task started again"
            }
            _ => "",
        };
        let seen = format!("{} grants of the mirror stand at {brokers} brokers{restarted}", grants.len());
        Ok(if stood { Evidence::already(seen) } else { Evidence::changed(seen) })
    }
}
