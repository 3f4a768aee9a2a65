//! Log and vote on disk.
//!
//! The committed index is written with the next entry or vote rather than by a call of its
//! own: after a crash it may lie a little behind, and the leader tells the rest.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    AnyError, Entry, LogId, LogState, OptionalSend, RaftLogId, RaftLogReader, StorageError, StorageIOError,
    Vote,
};
use parking_lot::Mutex;
use redb::{Database, ReadableDatabase, ReadableTable};
use serde::de::DeserializeOwned;

use crate::Machine;
use crate::disk::{Disk, DiskError, LOG, META, change, read_meta, set_meta};
use crate::types::Types;

/// The log of one voter.
pub(crate) struct LogStore<M> {
    disk: Disk,
    committed: Arc<Mutex<Option<LogId<u64>>>>,
    machine: PhantomData<fn() -> M>,
}

impl<M> Clone for LogStore<M> {
    fn clone(&self) -> Self {
        Self { disk: self.disk.clone(), committed: self.committed.clone(), machine: PhantomData }
    }
}

impl<M> LogStore<M> {
    pub fn new(disk: Disk) -> Self {
        Self { disk, committed: Arc::new(Mutex::new(None)), machine: PhantomData }
    }

    /// What the next change writes along.
    fn along(&self) -> Result<Option<Vec<u8>>, DiskError> {
        let committed = *self.committed.lock();
        Ok(committed.map(|id| serde_json::to_vec(&id)).transpose()?)
    }
}

fn any(cause: &DiskError) -> AnyError {
    AnyError::new(cause)
}

fn write_logs(cause: &DiskError) -> StorageError<u64> {
    StorageIOError::write_logs(any(cause)).into()
}

fn read_logs(cause: &DiskError) -> StorageError<u64> {
    StorageIOError::read_logs(any(cause)).into()
}

fn decoded<T: DeserializeOwned>(bytes: Option<Vec<u8>>) -> Result<Option<T>, DiskError> {
    Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}

fn put_committed(change: &redb::WriteTransaction, along: Option<&[u8]>) -> Result<(), DiskError> {
    along.map_or(Ok(()), |bytes| set_meta(change, "committed", bytes))
}

impl<M: Machine> RaftLogReader<Types<M>> for LogStore<M> {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types<M>>>, StorageError<u64>> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        let rows = self.disk.run("read entries", move |database| entries(database, from, to)).await;
        let rows = rows.map_err(|e| read_logs(&e))?;
        rows.iter().map(|row| serde_json::from_slice(row).map_err(|e| read_logs(&e.into()))).collect()
    }
}

fn entries(database: &Database, from: u64, to: u64) -> Result<Vec<Vec<u8>>, DiskError> {
    let read = database.begin_read().map_err(redb::Error::from)?;
    let table = read.open_table(LOG).map_err(redb::Error::from)?;
    let mut found = Vec::new();
    for row in table.range(from..to).map_err(redb::Error::from)? {
        found.push(row.map_err(redb::Error::from)?.1.value().to_vec());
    }
    Ok(found)
}

impl<M: Machine> RaftLogStorage<Types<M>> for LogStore<M> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types<M>>, StorageError<u64>> {
        let read = self.disk.run("read the end of the log", |database| {
            let purged = read_meta(database, "purged")?;
            let read = database.begin_read().map_err(redb::Error::from)?;
            let table = read.open_table(LOG).map_err(redb::Error::from)?;
            let last = table.last().map_err(redb::Error::from)?.map(|(_, value)| value.value().to_vec());
            Ok((purged, last))
        });
        let (purged, last) = read.await.map_err(|e| read_logs(&e))?;
        let purged: Option<LogId<u64>> = decoded(purged).map_err(|e| read_logs(&e))?;
        let last: Option<Entry<Types<M>>> = decoded(last).map_err(|e| read_logs(&e))?;
        let last = last.map(|entry| *entry.get_log_id()).or(purged);
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let failed = |e: &DiskError| StorageError::from(StorageIOError::write_vote(any(e)));
        let vote = serde_json::to_vec(vote).map_err(|e| failed(&e.into()))?;
        let along = self.along().map_err(|e| failed(&e))?;
        let saved = self.disk.run("save a vote", move |database| {
            change(database, |change| {
                set_meta(change, "vote", &vote)?;
                put_committed(change, along.as_deref())
            })
        });
        saved.await.map_err(|e| failed(&e))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        let failed = |e: &DiskError| StorageError::from(StorageIOError::read_vote(any(e)));
        let vote = self.disk.run("read the vote", |database| read_meta(database, "vote")).await;
        decoded(vote.map_err(|e| failed(&e))?).map_err(|e| failed(&e))
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), StorageError<u64>> {
        *self.committed.lock() = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        let known = *self.committed.lock();
        if known.is_some() {
            return Ok(known);
        }
        let found =
            self.disk.run("read the committed index", |database| read_meta(database, "committed")).await;
        decoded(found.map_err(|e| read_logs(&e))?).map_err(|e| read_logs(&e))
    }

    async fn append<I>(&mut self, entries: I, flushed: LogFlushed<Types<M>>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<Types<M>>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut rows = Vec::new();
        for entry in entries {
            let row = serde_json::to_vec(&entry).map_err(|e| write_logs(&e.into()))?;
            rows.push((entry.get_log_id().index, row));
        }
        let along = self.along().map_err(|e| write_logs(&e))?;
        let written = self.disk.run("append entries", move |database| {
            change(database, |change| {
                let mut table = change.open_table(LOG).map_err(redb::Error::from)?;
                for (index, row) in &rows {
                    table.insert(index, row.as_slice()).map_err(redb::Error::from)?;
                }
                drop(table);
                put_committed(change, along.as_deref())
            })
        });
        match written.await {
            Ok(()) => {
                flushed.log_io_completed(Ok(()));
                Ok(())
            }
            Err(why) => {
                flushed.log_io_completed(Err(std::io::Error::other(why.to_string())));
                Err(write_logs(&why))
            }
        }
    }

    async fn truncate(&mut self, from: LogId<u64>) -> Result<(), StorageError<u64>> {
        let cut = self.disk.run("cut the log", move |database| {
            change(database, |change| {
                let mut table = change.open_table(LOG).map_err(redb::Error::from)?;
                table.retain_in(from.index.., |_, _| false).map_err(redb::Error::from)?;
                Ok(())
            })
        });
        cut.await.map_err(|e| write_logs(&e))
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        let mark = serde_json::to_vec(&upto).map_err(|e| write_logs(&e.into()))?;
        let purged = self.disk.run("purge the log", move |database| {
            change(database, |change| {
                let mut table = change.open_table(LOG).map_err(redb::Error::from)?;
                table.retain_in(..=upto.index, |_, _| false).map_err(redb::Error::from)?;
                drop(table);
                change
                    .open_table(META)
                    .map_err(redb::Error::from)?
                    .insert("purged", mark.as_slice())
                    .map_err(redb::Error::from)?;
                Ok(())
            })
        });
        purged.await.map_err(|e| write_logs(&e))
    }
}
