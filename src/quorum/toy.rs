//! A machine for tests, and the engine's own suite run on our store.
#![allow(clippy::unwrap_used)]

use dc_core::ids::Token;
use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use serde::{Deserialize, Serialize};

use crate::Machine;
use crate::disk::{CALL_LIMIT, Disk};
use crate::log_store::LogStore;
use crate::replica::ReplicaStore;
use crate::types::Types;

/// Adds up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Toy {
    pub sum: u64,
}

/// By how much.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Add(pub u64);

impl Machine for Toy {
    type Command = Add;
    type Answer = u64;

    fn apply(&mut self, _at: Token, command: &Add) -> u64 {
        self.sum += command.0;
        self.sum
    }
}

struct Stores;

impl StoreBuilder<Types<Toy>, LogStore<Toy>, ReplicaStore<Toy>, tempfile::TempDir> for Stores {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, LogStore<Toy>, ReplicaStore<Toy>), StorageError<u64>> {
        let folder = tempfile::tempdir().unwrap();
        let on_death = std::sync::Arc::new(|why: &str| panic!("{why}"));
        let disk = Disk::open(&folder.path().join("quorum.redb"), CALL_LIMIT, on_death).unwrap();
        let replica = ReplicaStore::open(disk.clone()).await.unwrap();
        Ok((folder, LogStore::new(disk), replica))
    }
}

#[test]
fn the_store_passes_the_suite_of_the_engine() {
    Suite::test_all(Stores).unwrap();
}
