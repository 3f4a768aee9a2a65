//! The state in memory, the memory of requests beside it, and both as a snapshot on disk.
//!
//! A voter's durable state is its last snapshot plus the log behind it, never a copy that is
//! written apart: state and applied index cannot disagree after a crash, because replay makes
//! both. The log is purged only up to a snapshot that is on disk.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;

use dc_core::ids::Token;
use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
    StorageError, StorageIOError, StoredMembership,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::disk::{Disk, DiskError, change, read_meta, set_meta};
use crate::types::{Outcome, Request, Types, Voter};
use crate::{Applied, BATCH_MAX, Machine};

/// How many of a proposer's requests are remembered with their answers.
pub(crate) const REMEMBERED: u64 = 256;

type Meta = SnapshotMeta<u64, Voter>;

/// What one proposer had applied, so that a repeated request is answered and not applied.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Memory<A> {
    life: u64,
    top: u64,
    answers: BTreeMap<u64, Remembered<A>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Remembered<A> {
    index: u64,
    answers: Vec<A>,
}

type Memories<A> = BTreeMap<u64, Memory<A>>;

/// What a snapshot is read into.
#[derive(Deserialize)]
#[serde(bound(deserialize = ""))]
struct Image<M: Machine> {
    state: M,
    memory: Memories<M::Answer>,
}

/// What a snapshot is written from.
#[derive(Serialize)]
#[serde(bound(serialize = ""))]
struct ImageRef<'a, M: Machine> {
    state: &'a M,
    memory: &'a Memories<M::Answer>,
}

/// State, memory and how far they are.
struct Replica<M: Machine> {
    state: Arc<M>,
    memory: Memories<M::Answer>,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, Voter>,
}

impl<M: Machine> Clone for Replica<M> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
            memory: self.memory.clone(),
            applied: self.applied,
            membership: self.membership.clone(),
        }
    }
}

impl<M: Machine> Replica<M> {
    fn blank() -> Self {
        Self {
            state: Arc::default(),
            memory: BTreeMap::new(),
            applied: None,
            membership: StoredMembership::default(),
        }
    }

    fn restore(meta: &Meta, bytes: &[u8]) -> Result<Self, DiskError> {
        let image: Image<M> = serde_json::from_slice(bytes)?;
        Ok(Self {
            state: Arc::new(image.state),
            memory: image.memory,
            applied: meta.last_log_id,
            membership: meta.last_membership.clone(),
        })
    }

    fn image(&self) -> Result<Vec<u8>, DiskError> {
        Ok(serde_json::to_vec(&ImageRef { state: &*self.state, memory: &self.memory })?)
    }

    fn step(&mut self, entry: Entry<Types<M>>) -> Outcome<M::Answer> {
        self.applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Outcome::Own,
            EntryPayload::Membership(members) => {
                self.membership = StoredMembership::new(Some(entry.log_id), members);
                Outcome::Own
            }
            EntryPayload::Normal(request) => self.once(entry.log_id.index, &request),
        }
    }

    /// Applies a request unless it was applied before or may have been.
    fn once(&mut self, index: u64, request: &Request<M::Command>) -> Outcome<M::Answer> {
        let memory = self.memory.entry(request.proposer).or_insert_with(|| Memory {
            life: 0,
            top: 0,
            answers: BTreeMap::new(),
        });
        if request.life < memory.life {
            return Outcome::Forgotten;
        }
        if request.life > memory.life {
            *memory = Memory { life: request.life, top: 0, answers: BTreeMap::new() };
        }
        if let Some(known) = memory.answers.get(&request.seq) {
            return Outcome::Applied { index: known.index, answers: known.answers.clone() };
        }
        if request.seq.saturating_add(REMEMBERED) <= memory.top {
            return Outcome::Forgotten;
        }
        let state = Arc::make_mut(&mut self.state);
        let answers: Vec<_> =
            (0..).zip(&request.commands).map(|(k, c)| state.apply(token(index, k), c)).collect();
        memory.top = memory.top.max(request.seq);
        memory.answers.insert(request.seq, Remembered { index, answers: answers.clone() });
        let floor = memory.top.saturating_sub(REMEMBERED - 1);
        memory.answers = memory.answers.split_off(&floor);
        Outcome::Applied { index, answers }
    }
}

/// The token of the `place`-th command of the entry at `index`.
pub(crate) fn token(index: u64, place: u64) -> Token {
    Token(index.saturating_mul(BATCH_MAX as u64).saturating_add(place))
}

/// The engine's hold on the replica.
pub(crate) struct ReplicaStore<M: Machine> {
    disk: Disk,
    replica: Arc<Mutex<Replica<M>>>,
    applied: watch::Sender<Applied<M>>,
}

impl<M: Machine> Clone for ReplicaStore<M> {
    fn clone(&self) -> Self {
        Self { disk: self.disk.clone(), replica: self.replica.clone(), applied: self.applied.clone() }
    }
}

impl<M: Machine> ReplicaStore<M> {
    /// Reads the last snapshot; what lies behind it is replayed by the engine.
    ///
    /// Errors: the disk's.
    pub async fn open(disk: Disk) -> Result<Self, DiskError> {
        let replica = match stored(&disk).await? {
            Some((meta, bytes)) => Replica::restore(&meta, &bytes)?,
            None => Replica::blank(),
        };
        let (applied, _) = watch::channel(published(&replica));
        Ok(Self { disk, replica: Arc::new(Mutex::new(replica)), applied })
    }

    pub fn watch(&self) -> watch::Receiver<Applied<M>> {
        self.applied.subscribe()
    }

    async fn keep(&self, meta: &Meta, bytes: Vec<u8>) -> Result<(), DiskError> {
        let meta = serde_json::to_vec(meta)?;
        let kept = self.disk.run("keep a snapshot", move |database| {
            change(database, |change| {
                set_meta(change, "snapshot_meta", &meta)?;
                set_meta(change, "snapshot", &bytes)
            })
        });
        kept.await
    }
}

fn published<M: Machine>(replica: &Replica<M>) -> Applied<M> {
    Applied { index: replica.applied.map_or(0, |id| id.index), state: replica.state.clone() }
}

async fn stored(disk: &Disk) -> Result<Option<(Meta, Vec<u8>)>, DiskError> {
    let read = disk.run("read the snapshot", |database| {
        Ok((read_meta(database, "snapshot_meta")?, read_meta(database, "snapshot")?))
    });
    match read.await? {
        (Some(meta), Some(bytes)) => Ok(Some((serde_json::from_slice(&meta)?, bytes))),
        _ => Ok(None),
    }
}

fn write_snapshot(cause: &DiskError) -> StorageError<u64> {
    StorageIOError::write_snapshot(None, AnyError::new(cause)).into()
}

impl<M: Machine> RaftStateMachine<Types<M>> for ReplicaStore<M> {
    type SnapshotBuilder = Builder<M>;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, Voter>), StorageError<u64>> {
        let replica = self.replica.lock();
        Ok((replica.applied, replica.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome<M::Answer>>, StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<Types<M>>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut replica = self.replica.lock();
        let outcomes = entries.into_iter().map(|entry| replica.step(entry)).collect();
        self.applied.send_replace(published(&replica));
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> Builder<M> {
        Builder { store: self.clone(), replica: self.replica.lock().clone() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &Meta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        let bytes = snapshot.into_inner();
        let fresh = Replica::restore(meta, &bytes).map_err(|e| write_snapshot(&e))?;
        self.keep(meta, bytes).await.map_err(|e| write_snapshot(&e))?;
        let mut replica = self.replica.lock();
        *replica = fresh;
        self.applied.send_replace(published(&replica));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types<M>>>, StorageError<u64>> {
        let failed =
            |e: &DiskError| StorageError::from(StorageIOError::read_snapshot(None, AnyError::new(e)));
        let found = stored(&self.disk).await.map_err(|e| failed(&e))?;
        Ok(found.map(|(meta, bytes)| Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) }))
    }
}

/// Makes a snapshot of the replica as it was when it was asked for.
pub(crate) struct Builder<M: Machine> {
    store: ReplicaStore<M>,
    replica: Replica<M>,
}

impl<M: Machine> RaftSnapshotBuilder<Types<M>> for Builder<M> {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types<M>>, StorageError<u64>> {
        let bytes = self.replica.image().map_err(|e| write_snapshot(&e))?;
        let applied = self.replica.applied;
        let snapshot_id =
            applied.map_or_else(|| "0".to_owned(), |id| format!("{}-{}", id.leader_id.term, id.index));
        let meta =
            Meta { last_log_id: applied, last_membership: self.replica.membership.clone(), snapshot_id };
        self.store.keep(&meta, bytes.clone()).await.map_err(|e| write_snapshot(&e))?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;
    use crate::toy::{Add, Toy};

    fn entry(index: u64, life: u64, seq: u64, by: u64) -> Entry<Types<Toy>> {
        let log_id = LogId::new(CommittedLeaderId::new(1, 1), index);
        let request = Request { proposer: 7, life, seq, commands: vec![Add(by), Add(1)] };
        Entry { log_id, payload: EntryPayload::Normal(request) }
    }

    fn index(outcome: &Outcome<u64>) -> Option<u64> {
        if let Outcome::Applied { index, .. } = outcome { Some(*index) } else { None }
    }

    #[test]
    fn a_repeated_request_is_answered_from_memory_and_applied_once() {
        let mut replica = Replica::<Toy>::blank();
        let first = replica.step(entry(5, 1, 1, 10));
        assert_eq!(first, Outcome::Applied { index: 5, answers: vec![10, 11] });
        assert_eq!(replica.step(entry(9, 1, 1, 10)), first);
        assert_eq!(replica.state.sum, 11);
    }

    #[test]
    fn requests_may_commit_out_of_order_within_the_memory() {
        let mut replica = Replica::<Toy>::blank();
        replica.step(entry(1, 1, 2, 1));
        assert_eq!(index(&replica.step(entry(2, 1, 1, 1))), Some(2));
        replica.step(entry(3, 1, REMEMBERED + 2, 1));
        assert_eq!(replica.step(entry(4, 1, 2, 1)), Outcome::Forgotten, "it could be a repetition");
        assert_eq!(index(&replica.step(entry(5, 1, 3, 1))), Some(5), "it cannot");
    }

    #[test]
    fn a_late_request_of_an_earlier_life_is_not_applied() {
        let mut replica = Replica::<Toy>::blank();
        replica.step(entry(1, 1, 1, 1));
        replica.step(entry(2, 2, 1, 1));
        assert_eq!(replica.step(entry(3, 1, 2, 1)), Outcome::Forgotten);
        assert_eq!(replica.state.sum, 4);
    }

    #[test]
    fn a_snapshot_remembers_requests_too() {
        let mut replica = Replica::<Toy>::blank();
        let first = replica.step(entry(5, 1, 1, 10));
        let meta = Meta { last_log_id: replica.applied, ..Meta::default() };
        let mut other = Replica::<Toy>::restore(&meta, &replica.image().unwrap()).unwrap();
        assert_eq!(other.step(entry(6, 1, 1, 10)), first);
        assert_eq!(other.state.sum, 11);
    }

    #[test]
    fn tokens_of_one_entry_stay_below_those_of_the_next() {
        assert_eq!(token(3, 0), Token(768));
        assert!(token(3, 255) < token(4, 0));
    }
}
