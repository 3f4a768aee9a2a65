//! Doing wrong on purpose, so that the lab can show that its oracle sees it.
//!
//! Built with the feature `sabotage` alone, which no shipped binary has. One plane of the agent is wrapped; the drivers
//! know nothing of it. Most of it is a lie told to a driver, which then does its honest work on it, so that evidence
//! and records look as they would; where a driver cannot be deceived, its evidence is made up.

mod airflow;
mod kafka;
mod postgres;
mod s3;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dc_core::act::{Act, ActName, Evidence, KafkaAct, Outcome, PostgresAct, Progress, S3Act};
use dc_core::authority::Authority;
use dc_core::ids::PlaneKind;
use dc_core::position::Lsn;
use dc_plane::{Deadline, Depth, Plane, PlaneError, PlaneFacts};
use tracing::warn;

use crate::config::Config;

/// Names what is to be done wrong, as in `kafka:skip-drain`.
const VARIABLE: &str = "DC_SABOTAGE";
/// How long the old site takes writes again: enough for clients that try it all the time, on a slow machine too.
const A_WHILE: Duration = Duration::from_secs(4);
/// How long writers go on once the target has stopped to follow.
const UNSEEN: Duration = Duration::from_secs(1);

/// What is done wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    /// The target opens without what the source acknowledged last.
    SkipDrain,
    /// The source takes writes again while the target is open.
    SkipFence,
    /// Consumer groups stand too early.
    EarlyOffsets,
    /// The recorded grants are lost on the way.
    DropGrantSave,
    /// The source's writers go on.
    DoubleScheduler,
}

const KNOWN: [(&str, PlaneKind, Wrong); 9] = [
    ("postgres:skip-drain", PlaneKind::Postgres, Wrong::SkipDrain),
    ("postgres:skip-fence", PlaneKind::Postgres, Wrong::SkipFence),
    ("kafka:skip-drain", PlaneKind::Kafka, Wrong::SkipDrain),
    ("kafka:skip-fence", PlaneKind::Kafka, Wrong::SkipFence),
    ("kafka:early-offsets", PlaneKind::Kafka, Wrong::EarlyOffsets),
    ("kafka:drop-grant-save", PlaneKind::Kafka, Wrong::DropGrantSave),
    ("s3:skip-drain", PlaneKind::S3, Wrong::SkipDrain),
    ("s3:skip-fence", PlaneKind::S3, Wrong::SkipFence),
    ("airflow:double-scheduler", PlaneKind::Airflow, Wrong::DoubleScheduler),
];

/// Wraps the plane that the environment names; without the variable nothing is changed.
///
/// Errors: a name that is not known, or a plane that is not there.
pub fn wrap(planes: &mut [Arc<dyn Plane>], config: &Config) -> Result<(), String> {
    let Ok(wanted) = std::env::var(VARIABLE) else { return Ok(()) };
    let Some((name, kind, wrong)) = KNOWN.into_iter().find(|(name, ..)| *name == wanted) else {
        let names = KNOWN.map(|(name, ..)| name).join(", ");
        return Err(format!("{VARIABLE}={wanted} is not known; known: {names}"));
    };
    let Some(plane) = planes.iter_mut().find(|plane| plane.kind() == kind) else {
        return Err(format!("{VARIABLE}={name}, and the group has no {kind}"));
    };
    warn!(site = %config.site, "this agent does wrong on purpose: {name}");
    *plane = Arc::new(Saboteur {
        inner: plane.clone(),
        wrong,
        data_dir: config.postgres.as_ref().map(|p| p.data_dir.clone()).unwrap_or_default(),
        once: AtomicBool::new(false),
        deaf: AtomicBool::new(false),
        replayed: OnceLock::new(),
    });
    Ok(())
}

/// A plane that does one thing wrong and all else as its driver does.
struct Saboteur {
    inner: Arc<dyn Plane>,
    wrong: Wrong,
    /// Of this site's Postgres.
    data_dir: PathBuf,
    /// Set once the fence was taken back: a repeated step does not do so again.
    once: AtomicBool,
    /// While set, the standby's upkeep brings nothing.
    deaf: AtomicBool,
    /// Where the target's replay ended, short of the source's last word.
    replayed: OnceLock<Lsn>,
}

impl Saboteur {
    /// Lets writers in at the old site for a while, by taking its fence back behind the run.
    async fn open_again(
        &self,
        fences: &[ActName],
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        if self.once.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        for fence in fences {
            self.inner.undo(&named(act, *fence), by, until).await?;
        }
        tokio::time::sleep(A_WHILE).await;
        Ok(())
    }
}

/// The same act under another name.
fn named(act: &Act, name: ActName) -> Act {
    Act { name, ..act.clone() }
}

/// The act with what it is given changed; none takes an outcome away.
fn given(act: &Act, change: impl Fn(&Outcome) -> Option<Outcome>) -> Act {
    Act { given: act.given.iter().filter_map(change).collect(), ..act.clone() }
}

#[async_trait]
impl Plane for Saboteur {
    fn kind(&self) -> PlaneKind {
        self.inner.kind()
    }

    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        self.inner.observe(depth, until).await
    }

    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        self.inner.probe(act, until).await
    }

    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        use Wrong::{DoubleScheduler, DropGrantSave, EarlyOffsets, SkipDrain, SkipFence};
        let at_source = act.site == act.source;
        match (self.wrong, act.name) {
            (SkipDrain, ActName::Postgres(name)) => self.postgres_undrained(name, act, by, until).await,
            (SkipFence, ActName::Postgres(PostgresAct::Follow)) => {
                self.postgres_unfenced(act, by, until).await
            }
            (SkipDrain, ActName::Kafka(name)) => self.kafka_undrained(name, act, by, until).await,
            (SkipFence, ActName::Kafka(name)) => self.kafka_unfenced(name, act, by, until).await,
            (EarlyOffsets, ActName::Kafka(KafkaAct::SetOffsets)) => {
                self.inner.perform(&kafka::early(act), by, until).await
            }
            (DropGrantSave, ActName::Kafka(KafkaAct::GrantApps)) => {
                self.inner.perform(&kafka::without_grants(act), by, until).await
            }
            (SkipDrain, ActName::S3(name)) => self.s3_undrained(name, act, by, until).await,
            (SkipFence, ActName::S3(S3Act::PullReverse)) => {
                self.open_again(&[ActName::S3(S3Act::FenceWriters)], act, by, until).await?;
                self.inner.perform(act, by, until).await
            }
            (DoubleScheduler, ActName::Airflow(name)) if at_source => match airflow::made_up(name) {
                Some(evidence) => Ok(evidence),
                None => self.inner.perform(act, by, until).await,
            },
            _ => self.inner.perform(act, by, until).await,
        }
    }

    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        self.inner.undo(act, by, until).await
    }
}
