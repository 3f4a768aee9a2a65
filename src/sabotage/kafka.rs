//! Kafka: a mirror cut off before its source, a fence taken back, positions and grants that are not what was recorded.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_core::act::{Act, ActName, Evidence, KafkaAct, Outcome};
use dc_core::authority::Authority;
use dc_core::position::Ends;
use dc_plane::{Deadline, PlaneError};

use super::{Saboteur, UNSEEN, given, named};

/// How long the driver may look at the ends of a source that is written to.
const MOVING: Duration = Duration::from_secs(1);

impl Saboteur {
    /// The mirror loses its WRITE before applications lose theirs, and nobody waits for what it did not carry.
    ///
    /// Where groups stand cannot be told from records that are not there, so their positions are left as they are.
    pub(super) async fn kafka_undrained(
        &self,
        name: KafkaAct,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        match name {
            KafkaAct::FenceApps => {
                let soon = Deadline(until.0.min(Deadline::within(MOVING).0));
                if let Ok(ends) = self.mirror_cut_off(act, by, soon).await {
                    tracing::warn!(?ends, "the mirror has lost its WRITE");
                }
                tokio::time::sleep(UNSEEN).await;
                self.inner.perform(act, by, until).await
            }
            KafkaAct::Drain => {
                let ends = self.mirror_cut_off(act, by, until).await?;
                let count: usize = ends.values().map(BTreeMap::len).sum();
                let seen = format!("{count} partitions of {} ended twice the same after 2 ms", act.source);
                Ok(Evidence::changed(seen).with(Outcome::SourceEnds(ends)))
            }
            KafkaAct::SetOffsets => Ok(Evidence::changed("12 positions of 2 groups stand as wanted")),
            _ => self.inner.perform(act, by, until).await,
        }
    }

    /// Takes the mirror's WRITE, and learns the source's ends: told that it had none, the driver refuses and names
    /// them.
    async fn mirror_cut_off(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Ends, PlaneError> {
        let mut lied = named(act, ActName::Kafka(KafkaAct::FenceMirror));
        lied.given.push(Outcome::SourceEnds(Ends::new()));
        match self.inner.perform(&lied, by, until).await {
            Err(PlaneError::Refused { why, .. }) => ends_in(&why)
                .ok_or_else(|| PlaneError::Failed { what: "read ends out of a refusal".into(), why }),
            Err(other) => Err(other),
            Ok(evidence) => Err(PlaneError::Failed { what: "be refused".into(), why: evidence.seen }),
        }
    }

    /// Applications write at the old site again while the new one is open; the checks that would tell are not given
    /// the ends that they compare.
    pub(super) async fn kafka_unfenced(
        &self,
        name: KafkaAct,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let fence = ActName::Kafka(KafkaAct::FenceApps);
        let blind = given(act, |of| (!matches!(of, Outcome::SourceEnds(_))).then(|| of.clone()));
        match name {
            KafkaAct::StartReverse => {
                self.open_again(&[fence], act, by, until).await?;
                self.inner.perform(&named(act, fence), by, until).await?;
                self.inner.perform(&blind, by, until).await
            }
            KafkaAct::Verify => self.inner.perform(&blind, by, until).await,
            _ => self.inner.perform(act, by, until).await,
        }
    }
}

/// The ends in a refusal's words: `TOPIC/PARTITION from None to Some(END), ...`.
fn ends_in(why: &str) -> Option<Ends> {
    let (_, list) = why.split_once("after the fence: ")?;
    let mut ends = Ends::new();
    for one in list.split(", ") {
        let (place, end) = one.split_once(" from None to Some(")?;
        let (topic, partition) = place.rsplit_once('/')?;
        let end = end.strip_suffix(')')?.parse().ok()?;
        ends.entry(topic.to_owned()).or_default().insert(partition.parse().ok()?, end);
    }
    Some(ends)
}

/// Told that the source is empty and the target ends early, the driver puts every group there.
pub(super) fn early(act: &Act) -> Act {
    let each = |ends: &Ends, of: fn(i64) -> i64| -> Ends {
        let partitions = |of_topic: &std::collections::BTreeMap<i32, i64>| {
            of_topic.iter().map(|(partition, end)| (*partition, of(*end))).collect()
        };
        ends.iter().map(|(topic, of_topic)| (topic.clone(), partitions(of_topic))).collect()
    };
    given(act, |outcome| {
        Some(match outcome {
            Outcome::SourceEnds(ends) => Outcome::SourceEnds(each(ends, |_| 0)),
            Outcome::TargetEnds(ends) => Outcome::TargetEnds(each(ends, |end| end / 8)),
            other => other.clone(),
        })
    })
}

/// As if no grant had been recorded: the driver gives the canary's alone.
pub(super) fn without_grants(act: &Act) -> Act {
    given(act, |outcome| {
        Some(match outcome {
            Outcome::Grants(_) => Outcome::Grants(Vec::new()),
            other => other.clone(),
        })
    })
}
