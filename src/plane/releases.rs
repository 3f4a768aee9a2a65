//! DAG releases as the agent sees them: bytes are staged first, then the quorum decides, then copies are published.
//!
//! Serial, root and epoch of a release are decided in Raft alone. `stage` brings the bytes to the bucket under
//! names that follow from their content, so a publish that dies leaves only things nobody refers to; `seal`
//! publishes what the quorum decided.

use std::path::Path;

use async_trait::async_trait;
use dc_core::act::Evidence;
use dc_core::ids::Epoch;
use dc_core::position::DagRelease;
use dc_core::time::WallTime;
use serde::{Deserialize, Serialize};

use crate::{Deadline, PlaneError};

/// A tree of DAG files that lies whole and verified in this site's bucket, and has no serial yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// SHA-256 over the manifest's sorted entries, 64 hex digits: what the quorum is asked to commit.
    pub root: String,
    /// Files in the tree.
    pub files: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Blobs that were not in the bucket before.
    pub uploaded: u64,
}

/// A release as the quorum committed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealing {
    /// Its serial and root.
    pub release: DagRelease,
    /// The epoch it was committed in.
    pub epoch: Epoch,
    /// The release before it; none for the first.
    pub parent: Option<DagRelease>,
    /// Who published it, for people.
    pub author: String,
    /// When, for people.
    pub created: WallTime,
}

/// Where DAG releases are published.
#[async_trait]
pub trait Releases: Send + Sync {
    /// Brings the files below `dir` to this site's bucket and reads every one of them back.
    ///
    /// Repeat: safe, uploads only what is missing. Errors: `Refused` when the tree changes while it is read, or
    /// holds what no release may hold; nothing refers to what an interrupted call left.
    async fn stage(&self, dir: &Path, until: Deadline) -> Result<Staged, PlaneError>;

    /// Publishes a committed release: its manifest by serial, and the pointer to it, both read back.
    ///
    /// Repeat: safe. Errors: `Refused` when its root was not staged here.
    async fn seal(&self, sealing: &Sealing, until: Deadline) -> Result<Evidence, PlaneError>;
}
