//! The store dies at every write in turn: what was answered stands, what was not is whole or absent.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Arc;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt};
use openraft::testing::{blank_ent, log_id};
use openraft::{LogId, RaftLogReader, Vote};
use parking_lot::Mutex;
use redb::StorageBackend;

use crate::disk::{CALL_LIMIT, Disk, builder};
use crate::log_store::LogStore;
use crate::toy::Toy;
use crate::types::Types;

/// A disk in memory that loses power after a number of calls.
#[derive(Debug, Clone, Default)]
struct Shaky(Arc<Mutex<Platter>>);

#[derive(Debug, Default)]
struct Platter {
    seen: Vec<u8>,
    safe: Vec<u8>,
    since: Vec<(usize, Vec<u8>)>,
    calls_left: Option<u64>,
    calls: u64,
}

impl Platter {
    fn spend(&mut self) -> io::Result<()> {
        self.calls += 1;
        match &mut self.calls_left {
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What is found after the power came back: everything synced, and of the rest some
    /// writes whole, some by half, some not at all.
    fn after_power_loss(&self, seed: u64) -> Vec<u8> {
        let mut found = self.safe.clone();
        let mut dice = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        for (offset, data) in &self.since {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let kept = match dice >> 62 {
                0 => 0,
                1 => data.len() / 2,
                _ => data.len(),
            };
            let end = offset + kept;
            if found.len() < end {
                found.resize(end, 0);
            }
            found[*offset..end].copy_from_slice(&data[..kept]);
        }
        found
    }
}

impl StorageBackend for Shaky {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().seen.len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.0.lock();
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let found = platter.seen.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock();
        platter.spend()?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        platter.seen.resize(len, 0);
        // a file's length is as safe as its content only after a sync; longer is the harder case
        if platter.safe.len() < len {
            platter.safe.resize(len, 0);
        }
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock();
        platter.spend()?;
        platter.safe = platter.seen.clone();
        platter.since.clear();
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.0.lock();
        let left = platter.spend();
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        platter.since.push((from, data.to_vec())); // the last one may have reached the disk by half
        left?;
        platter
            .seen
            .get_mut(from..from + data.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?
            .copy_from_slice(data);
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Vote(u64),
    Append(u64, u64, u64),
    Cut(u64, u64),
    Purge(u64, u64),
}

/// A voter's life: it follows, votes, is overruled, follows again and purges.
const SCRIPT: [Op; 8] = [
    Op::Vote(1),
    Op::Append(1, 0, 4),
    Op::Append(1, 4, 7),
    Op::Vote(2),
    Op::Cut(1, 5),
    Op::Append(2, 5, 9),
    Op::Purge(1, 3),
    Op::Append(2, 9, 10),
];

#[derive(Debug, Clone, PartialEq)]
struct Shown {
    vote: Option<Vote<u64>>,
    purged: Option<LogId<u64>>,
    entries: Vec<LogId<u64>>,
}

async fn act(store: &mut LogStore<Toy>, op: Op) -> bool {
    match op {
        Op::Vote(term) => store.save_vote(&Vote::new(term, 1)).await.is_ok(),
        Op::Append(term, from, to) => {
            let entries: Vec<_> = (from..to).map(|index| blank_ent::<Types<Toy>>(term, 1, index)).collect();
            store.blocking_append(entries).await.is_ok()
        }
        Op::Cut(term, index) => store.truncate(log_id(term, 1, index)).await.is_ok(),
        Op::Purge(term, index) => store.purge(log_id(term, 1, index)).await.is_ok(),
    }
}

async fn shown(store: &mut LogStore<Toy>) -> Shown {
    Shown {
        vote: store.read_vote().await.unwrap(),
        purged: store.get_log_state().await.unwrap().last_purged_log_id,
        entries: store.try_get_log_entries(..).await.unwrap().iter().map(|entry| entry.log_id).collect(),
    }
}

fn open(platter: &Shaky) -> Option<(Disk, LogStore<Toy>)> {
    let database = builder().create_with_backend(platter.clone()).ok()?;
    let disk = Disk::over(database, CALL_LIMIT, Arc::new(|why| panic!("{why}"))).ok()?;
    Some((disk.clone(), LogStore::new(disk)))
}

/// A store as its maker left it, before anything was written to it.
async fn fresh() -> Shaky {
    let platter = Shaky::default();
    open(&platter).unwrap().0.close().await;
    platter.0.lock().calls = 0;
    platter
}

#[tokio::test]
async fn what_was_answered_survives_a_loss_of_power_at_any_write() {
    let whole = fresh().await;
    let (disk, mut store) = open(&whole).unwrap();
    let mut stages = vec![shown(&mut store).await];
    for op in SCRIPT {
        assert!(act(&mut store, op).await);
        stages.push(shown(&mut store).await);
    }
    disk.close().await;
    let calls = whole.0.lock().calls;
    assert!(calls > 20, "the script makes {calls} calls only");
    for at in 0..calls {
        let platter = fresh().await;
        platter.0.lock().calls_left = Some(at);
        let mut answered = 0;
        if let Some((disk, mut store)) = open(&platter) {
            while answered < SCRIPT.len() && act(&mut store, SCRIPT[answered]).await {
                answered += 1;
            }
            disk.close().await;
        }
        let found = platter.0.lock().after_power_loss(at);
        let again = Shaky::default();
        *again.0.lock() = Platter { safe: found.clone(), seen: found, ..Platter::default() };
        let (disk, mut store) = open(&again).unwrap();
        let now = shown(&mut store).await;
        let legal = &stages[answered..(answered + 2).min(stages.len())];
        assert!(
            legal.contains(&now),
            "power lost at call {at} after {answered} answers: {now:?}, not {legal:?}"
        );
        disk.close().await;
    }
}
