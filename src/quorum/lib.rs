//! The quorum: one log that all sites agree on, and the state that follows from it.
//!
//! This room keeps the log, elects a leader and applies entries; it never reads what a
//! command says. The rest of the house sees [`LogEngine`] alone, which names no engine, so
//! that another one can stand behind it.
//!
//! Invariants: what was answered is on the disks of a majority; the same request is applied
//! once however often it is proposed; a voter that lost its disk takes no part; a disk that
//! hangs ends the process rather than the agreement.

#[cfg(test)]
mod crash;
mod disk;
mod engine;
mod founding;
mod log_store;
mod monitor;
mod network;
mod propose;
mod replica;
mod service;
#[cfg(test)]
mod toy;
mod types;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{SiteId, Token};
use dc_core::registry::{Answer, Command, Registry};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::Instant;

pub use disk::{OnDeath, abort};
pub use engine::{Engine, Options};
pub use founding::Standing;
pub use service::QuorumService;

/// Commands in one entry, at most; a token is the entry's index times this, plus the place.
pub const BATCH_MAX: usize = 256;
/// Size of one entry's commands, at most, in bytes of JSON.
pub const BATCH_BYTES_MAX: usize = 512 * 1024;

/// A state that changes by commands alone, the same way at every site.
pub trait Machine: Clone + Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// A proposed change.
    type Command: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What applying it answered.
    type Answer: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Applies one command. Pure and total.
    fn apply(&mut self, at: Token, command: &Self::Command) -> Self::Answer;
}

impl Machine for Registry {
    type Command = Command;
    type Answer = Answer;

    fn apply(&mut self, at: Token, command: &Command) -> Answer {
        Registry::apply(self, at, command)
    }
}

/// The state as of one entry.
#[derive(Debug)]
pub struct Applied<M> {
    /// Index of the last applied entry; 0 before the first.
    pub index: u64,
    /// The state after it.
    pub state: Arc<M>,
}

impl<M> Clone for Applied<M> {
    fn clone(&self) -> Self {
        Self { index: self.index, state: self.state.clone() }
    }
}

/// Who leads, as far as this site knows. A hint for routing, never a permission.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The leader heard of within the last two election times.
    pub leader: Option<SiteId>,
    /// Its term.
    pub term: u64,
    /// Whether this site leads. It has the whole log only after a barrier.
    pub me: bool,
    /// Whether a majority answered the leader within two election times; at another site,
    /// whether that leader was heard within as much.
    pub quorum_ok: bool,
}

/// Figures of the engine since its start.
#[derive(Debug, Clone, Default)]
pub struct EngineMetrics {
    /// How long the last commits proposed here took, at most 1024, oldest first.
    pub commits: Vec<Duration>,
    /// How many commits were proposed here.
    pub commits_total: u64,
    /// How long ago a majority last answered; none at a site that does not lead.
    pub quorum_ack_age: Option<Duration>,
    /// How often the leader changed.
    pub elections_total: u64,
    /// Present term.
    pub term: u64,
    /// Last entry applied here.
    pub applied: u64,
    /// Last entry in the log here.
    pub last_log: u64,
    /// Last entry that the newest snapshot holds.
    pub snapshot: u64,
}

/// Why a proposal has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nothing was proposed: no leader was found in time.
    #[error("no leader answered within {waited:.1?}; nothing was proposed")]
    NoLeader {
        /// How long was waited.
        waited: Duration,
    },
    /// It was sent and no answer came: applied or not, the log knows. Read after a barrier.
    #[error("no answer within {waited:.1?}: whether it was committed is not known")]
    Unknown {
        /// How long was waited.
        waited: Duration,
    },
    /// More than one entry holds. Nothing was proposed.
    #[error("{commands} commands of {bytes} bytes do not fit one entry ({BATCH_MAX}, {BATCH_BYTES_MAX})")]
    TooLarge {
        /// How many.
        commands: usize,
        /// Their size.
        bytes: usize,
    },
    /// This voter lost its data directory and takes no part. Nothing was proposed.
    #[error("{by} knows another data directory of this site, so it takes no part")]
    Refused {
        /// Who knows it.
        by: SiteId,
    },
    /// The engine has stopped. Nothing was proposed.
    #[error("the quorum engine of this site is not running: {why}")]
    Stopped {
        /// Why.
        why: String,
    },
}

impl ProposeError {
    /// The same for an operator; `what` was to be done, as in `group apply`.
    pub fn fail(&self, what: &str) -> Fail {
        let (code, text) = match self {
            Self::NoLeader { .. } | Self::Stopped { .. } => {
                ("DC-0113", format!("{what} was not done; nothing was changed"))
            }
            Self::Unknown { .. } => ("DC-0114", format!("{what} may have been done")),
            Self::TooLarge { .. } => ("DC-0116", format!("{what} was not done; nothing was changed")),
            Self::Refused { .. } => ("DC-0110", format!("{what} was not done; nothing was changed")),
        };
        Fail::new(Code::from_text(code), Exit::NoQuorum, text, self.to_string()).next("dc-switch status")
    }
}

impl BarrierError {
    /// The same for an operator; `what` was to be read.
    pub fn fail(&self, what: &str) -> Fail {
        let code = if matches!(self, Self::Refused { .. }) { "DC-0110" } else { "DC-0113" };
        let text = format!("{what} is not known for certain");
        Fail::new(Code::from_text(code), Exit::NoQuorum, text, self.to_string()).next("dc-switch status")
    }
}

/// Why a barrier was not reached. Repeat: safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// No leader with a majority confirmed an index in time.
    #[error("no leader with a majority answered within {waited:.1?}")]
    NoQuorum {
        /// How long was waited.
        waited: Duration,
    },
    /// The index was confirmed but is not applied here yet.
    #[error("entry {index} is not applied here after {waited:.1?}; applied is {applied}")]
    Behind {
        /// What the leader confirmed.
        index: u64,
        /// What is applied here.
        applied: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// This voter lost its data directory and takes no part.
    #[error("{by} knows another data directory of this site, so it takes no part")]
    Refused {
        /// Who knows it.
        by: SiteId,
    },
    /// The engine has stopped.
    #[error("the quorum engine of this site is not running")]
    Stopped,
}

/// A replicated log and the state that follows from it.
#[async_trait]
pub trait LogEngine<M: Machine = Registry>: Send + Sync {
    /// Commits the commands as one entry and returns each one's token and answer.
    ///
    /// Works at any site; the entry reaches the leader by itself. Within the call it is sent
    /// as often as needed and applied once. Repeating the call is another proposal.
    /// Errors: see [`ProposeError`]; never later than `until`.
    async fn propose(
        &self,
        commands: Vec<M::Command>,
        until: Instant,
    ) -> Result<Vec<(Token, M::Answer)>, ProposeError>;

    /// Waits until everything committed before the call is applied here; returns its index.
    ///
    /// Repeat: safe. Errors: see [`BarrierError`]; never later than `until`.
    async fn barrier(&self, until: Instant) -> Result<u64, BarrierError>;

    /// The state as applied here; may lie behind the leader's.
    fn state(&self) -> Arc<M>;

    /// Changes with every entry that is applied here.
    fn applied(&self) -> watch::Receiver<Applied<M>>;

    /// Changes when the leader does, and when a majority is lost or found.
    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// Whether this voter takes part, and if not, why.
    fn standing(&self) -> watch::Receiver<Standing>;

    /// Figures for `/metrics` and for the lease's own alarms.
    fn metrics(&self) -> EngineMetrics;

    /// Stops taking part and closes the store. Repeat: safe.
    async fn shutdown(&self);
}
