//! What Kafka is at this site: from grants, which say who may write, and from the mirror's progress.

use std::time::Duration;

use dc_core::position::{Lag, LagUnit};
use dc_plane::{Deadline, Depth, PlaneError, PlaneFacts, Role};
use tokio::time::Instant;

use crate::{Half, KafkaPlane, acl, connect, mirror};

/// REST is asked no more often than this for a glance each second; the age is shown.
const STATE_AGE_MAX: Duration = Duration::from_secs(5);

/// The mirror as its workers last told.
#[derive(Default)]
pub struct Glance {
    seen: Option<(Instant, Option<(String, connect::Status)>)>,
}

impl KafkaPlane {
    pub(crate) async fn glance_at(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        let mut facts = PlaneFacts {
            plane: dc_core::ids::PlaneKind::Kafka,
            role: None,
            lag: None,
            summary: String::new(),
            findings: Vec::new(),
        };
        let half = self.half(&self.site)?;
        let bindings = match acl::read(&half.cluster, until).await {
            Ok(bindings) => bindings,
            Err(e) => {
                // Nobody listens: it does not run. Silence may be the network: then nothing is known.
                facts.role = matches!(e, PlaneError::Unreachable { .. }).then_some(Role::Down);
                facts.summary = e.to_string();
                facts.findings.push(Self::finding(&self.site, "DC-0401", true, e.to_string()));
                return Ok(facts);
            }
        };
        let writers = acl::allowed(&bindings).filter(|g| self.moves(g) && self.reaches(g, "write")).count();
        let mirrors = acl::allowed(&bindings).any(|grant| self.lets_mirror(grant));
        facts.role = Some(match (writers > 0, mirrors) {
            (true, _) => Role::Writable,
            (false, true) => Role::Following,
            (false, false) => Role::Closed,
        });
        facts.summary = match facts.role {
            Some(Role::Writable) => format!("{writers} grants to write"),
            Some(Role::Closed) => "no grants to write".to_owned(),
            _ => String::new(),
        };
        if writers > 0 && mirrors {
            let text = format!("applications and mirror may both write at {}", self.site);
            facts.findings.push(Self::finding(&self.site, "DC-0407", true, text));
        }
        if facts.role == Some(Role::Following) {
            self.follow(half, depth, &mut facts, until).await;
        }
        Ok(facts)
    }

    async fn follow(&self, half: &Half, depth: Depth, facts: &mut PlaneFacts, until: Deadline) {
        let (age, mirror) = match self.state(half, depth, until).await {
            Ok(found) => found,
            Err(e) => {
                facts.summary = format!("mirror unknown: {e}");
                facts.findings.push(Self::finding(&self.site, "DC-0423", true, e.to_string()));
                return;
            }
        };
        let Some((name, status)) = mirror else {
            "no connector carries the group's topics".clone_into(&mut facts.summary);
            facts.findings.push(Self::finding(&self.site, "DC-0408", true, facts.summary.clone()));
            return;
        };
        facts.summary = format!("{name}: {} ({} s ago)", status.show(), age.as_secs());
        if !status.runs() {
            let text = format!("mirror {name} does not run: {}", status.show());
            facts.findings.push(Self::finding(&self.site, "DC-0408", true, text));
        }
        let other = self.halves.iter().find(|(site, _)| **site != self.site);
        let Some((_, source)) = other else { return };
        match self.lag(source, half, &name, until).await {
            Ok(amount) => facts.lag = Some(Lag { amount, unit: LagUnit::Records, age_ms: None }),
            Err(e) => facts.summary = format!("{}; lag unknown: {e}", facts.summary),
        }
    }

    /// The connector that carries the group's topics here, found by what it carries: names change with each move.
    async fn state(
        &self,
        half: &Half,
        depth: Depth,
        until: Deadline,
    ) -> Result<(Duration, Option<(String, connect::Status)>), PlaneError> {
        if let (Depth::Shallow, Some((at, found))) = (depth, &self.glance.lock().seen)
            && at.elapsed() < STATE_AGE_MAX
        {
            return Ok((at.elapsed(), found.clone()));
        }
        let carried = self.carried();
        let mut fitting: Vec<(String, connect::Status)> = half
            .workers
            .all(until)
            .await?
            .into_iter()
            .filter(|(_, (_, settings))| carried.is_subset(&mirror::topics(settings)))
            .map(|(name, (status, _))| (name, status))
            .collect();
        // A stopped one is the way back of a run; the one that carries comes first.
        fitting.sort_by_key(|(_, status)| (status.is_stopped(), !status.runs()));
        let found = fitting.into_iter().next();
        self.glance.lock().seen = Some((Instant::now(), found.clone()));
        Ok((Duration::ZERO, found))
    }
}
