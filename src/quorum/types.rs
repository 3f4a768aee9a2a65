//! What the engine carries: its entries, its answers, its names for the voters.

use std::cmp::Ordering;
use std::fmt;
use std::io::Cursor;
use std::marker::PhantomData;

use dc_core::ids::SiteId;
use openraft::impls::OneshotResponder;
use openraft::{Entry, RaftTypeConfig, TokioRuntime};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Machine;

/// A voter's number: from its site's name alone, so that a new site renumbers nobody.
///
/// 53 bits, so that every reader of JSON keeps it exact.
pub(crate) fn voter_id(site: &SiteId) -> u64 {
    let hash = Sha256::digest(format!("dc-switch voter {site}"));
    let bytes = hash.iter().take(8).fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    bytes >> 11
}

/// A voter as the log knows it. Addresses are each site's own business.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Voter {
    pub site: String,
}

/// What the log keeps of one proposal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request<C> {
    /// Whose.
    pub proposer: u64,
    /// Which of its starts.
    pub life: u64,
    /// Which proposal of that start, from 1.
    pub seq: u64,
    /// At most `BATCH_MAX`.
    pub commands: Vec<C>,
}

/// What applying an entry answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Outcome<A> {
    /// The entry was the engine's own.
    Own,
    /// By the entry at `index`, which lies before this one when the request was repeated.
    Applied { index: u64, answers: Vec<A> },
    /// Too old to be remembered; nothing was applied by this entry.
    Forgotten,
}

/// The engine's types for one machine.
pub(crate) struct Types<M>(PhantomData<fn() -> M>);

impl<M: Machine> RaftTypeConfig for Types<M> {
    type D = Request<M::Command>;
    type R = Outcome<M::Answer>;
    type NodeId = u64;
    type Node = Voter;
    type Entry = Entry<Self>;
    type SnapshotData = Cursor<Vec<u8>>;
    type AsyncRuntime = TokioRuntime;
    type Responder = OneshotResponder<Self>;
}

// The engine asks these of a type that has no value; deriving them would ask them of M too.
impl<M> Copy for Types<M> {}
impl<M> Clone for Types<M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M> Default for Types<M> {
    fn default() -> Self {
        Self(PhantomData)
    }
}
impl<M> fmt::Debug for Types<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Types")
    }
}
impl<M> PartialEq for Types<M> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl<M> Eq for Types<M> {}
impl<M> PartialOrd for Types<M> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<M> Ord for Types<M> {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_voter_keeps_its_number_whoever_joins() {
        let ids: Vec<_> = ["fra", "oslo", "rome"]
            .iter()
            .filter_map(|n| SiteId::new(n).ok())
            .map(|s| voter_id(&s))
            .collect();
        assert_eq!(ids, [4_998_150_429_629_727, 73_607_984_355_312, 2_697_356_940_441_050]);
    }
}
