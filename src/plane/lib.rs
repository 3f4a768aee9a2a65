//! The contract that every plane keeps, and nothing about any one of them.
//!
//! This room never decides what is done or where; it is told by an act and must hold an
//! authority to change anything. Every method may be repeated after a crash at any line.

pub mod fake;
pub mod releases;
pub mod suite;

use std::time::Duration;

use async_trait::async_trait;
use dc_core::act::{Act, Evidence, Progress};
use dc_core::authority::Authority;
use dc_core::ids::PlaneKind;
use tokio::time::Instant;

pub use dc_core::observe::{PlaneFacts, Role};

/// The moment by which a call must have ended, with success or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// A deadline that far from now.
    pub fn within(span: Duration) -> Self {
        Self(Instant::now() + span)
    }
    /// What is left; zero once it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
    /// Runs `work`, giving up at the deadline.
    ///
    /// Errors: `TimedOut` naming `what` once the deadline has passed.
    pub async fn bound<T>(self, what: &str, work: impl Future<Output = T>) -> Result<T, PlaneError> {
        let left = self.left();
        tokio::time::timeout_at(self.0, work)
            .await
            .map_err(|_| PlaneError::TimedOut { what: what.to_owned(), waited: left })
    }
}

/// Waits until `ready` says so, asking every `every`.
///
/// Errors: `TimedOut` naming `what` once `until` has passed; `ready`'s own error at once.
pub async fn wait_until<F, Fut, T>(
    until: Deadline,
    every: Duration,
    what: &str,
    mut ready: F,
) -> Result<T, PlaneError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>, PlaneError>>,
{
    let began = Instant::now();
    loop {
        if let Some(found) = until.bound(what, ready()).await?? {
            return Ok(found);
        }
        if until.left() <= every {
            return Err(PlaneError::TimedOut { what: what.to_owned(), waited: began.elapsed() });
        }
        tokio::time::sleep(every).await;
    }
}

/// How deep an observation looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Cheap enough for every second.
    Shallow,
    /// Everything that can be read; for every minute.
    Deep,
}

/// Why a plane could not do or see something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaneError {
    /// Its deadline passed.
    #[error("timed out after {waited:.1?}: {what}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The other side did not answer, or refused the connection.
    #[error("{what} is unreachable: {why}")]
    Unreachable {
        /// Which part, with its address.
        what: String,
        /// The cause chain in words.
        why: String,
    },
    /// The act must not be done now. Nothing was changed.
    #[error("refused: {why}")]
    Refused {
        /// Page of the error catalogue.
        code: String,
        /// What and why, with number and limit.
        why: String,
    },
    /// It was tried and did not succeed; what it left may be probed.
    #[error("{what} failed: {why}")]
    Failed {
        /// Bare verb phrase, as in `promote`.
        what: String,
        /// The cause chain in words.
        why: String,
    },
}

impl PlaneError {
    /// A failure of `what` for the cause given, with all its sources.
    pub fn failed(what: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::Failed { what: what.into(), why: chain(cause) }
    }
    /// A part that did not answer.
    pub fn unreachable(what: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::Unreachable { what: what.into(), why: chain(cause) }
    }
    /// An act that must not be done now.
    pub fn refused(code: &str, why: impl Into<String>) -> Self {
        Self::Refused { code: code.to_owned(), why: why.into() }
    }
}

/// An error and its sources in one line.
pub fn chain(cause: &dyn std::error::Error) -> String {
    let mut text = cause.to_string();
    let mut next = cause.source();
    while let Some(inner) = next {
        let words = inner.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = inner.source();
    }
    text
}

/// One replicated system at one site, for one group.
#[async_trait]
pub trait Plane: Send + Sync {
    /// Which plane this is.
    fn kind(&self) -> PlaneKind;

    /// Reads what the plane is at this site. Changes nothing.
    ///
    /// Repeat: safe. Errors: `TimedOut` or `Unreachable`, never later than `until`.
    async fn observe(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError>;

    /// Whether the work of an act already stands. Changes nothing.
    ///
    /// Repeat: safe. Errors: as `observe`.
    async fn probe(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError>;

    /// Probes, acts if needed, verifies, and returns what proves it.
    ///
    /// Repeat: safe, finds its work done. Errors: any; after one, `probe` tells what stands.
    async fn perform(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError>;

    /// Takes back what `perform` of this act did, however far it came, before takeover.
    ///
    /// Repeat: safe. Errors: any; the run then says what a human must do.
    async fn undo(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError>;
}
