//! Who may act: the right to one act as a value one must hold.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, RunId, Token};

/// The right to change a plane. Only the agent makes one, after its checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    origin: Origin,
}

/// Where a right comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A step of a run, by its committed intent.
    Step {
        /// Which run.
        run: RunId,
        /// The epoch it creates.
        epoch: Epoch,
        /// Log index of the intent.
        token: Token,
    },
    /// The site closes itself, or keeps itself a standby; it may never open.
    SelfFence,
    /// An applied renewal: holder and epoch are this site's and `Opened` is applied.
    Reopen {
        /// The epoch in which the site holds the group.
        epoch: Epoch,
    },
}

impl Authority {
    /// The right to one step. Made once the token was found not stale.
    pub fn step(run: RunId, epoch: Epoch, token: Token) -> Self {
        Self { origin: Origin::Step { run, epoch, token } }
    }
    /// The right to close, which needs nobody's leave.
    pub fn self_fence() -> Self {
        Self { origin: Origin::SelfFence }
    }
    /// The right to serve on. Made only through `Registry::may_serve` and a lease that runs.
    pub fn reopen(epoch: Epoch) -> Self {
        Self { origin: Origin::Reopen { epoch } }
    }
    /// Where it comes from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }
    /// Whether it may let writers in.
    pub fn may_open(&self) -> bool {
        !matches!(self.origin, Origin::SelfFence)
    }
}
