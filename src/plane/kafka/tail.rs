//! How far a mirror got, read from the topic in which Connect keeps positions, without its REST interface.
//!
//! With exactly-once the position of a record is committed in the transaction of the record itself, so what a
//! `read_committed` reader finds here *is* at the target. The topic is read on from where the last reading ended; only
//! the first one reads it whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dc_plane::{Deadline, PlaneError};
use kafka_protocol::records::Record;
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::cluster::{Cluster, Tp};
use crate::log::{self, End};

/// Positions of all mirrors whose worker writes to one site.
#[derive(Default)]
pub struct Tail {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    next: BTreeMap<Tp, i64>,
    positions: HashMap<String, BTreeMap<Tp, i64>>,
}

#[derive(Deserialize)]
struct Key(String, Partition);

/// Of a source connector of MirrorMaker 2; checkpoint connectors have other members.
#[derive(Deserialize)]
struct Partition {
    #[serde(rename = "cluster")]
    _cluster: String,
    topic: String,
    #[serde(rename = "partition")]
    number: i32,
}

#[derive(Deserialize)]
struct Position {
    offset: i64,
}

impl Known {
    fn learn(&mut self, record: &Record) {
        let Some(Key(connector, of)) = record.key.as_deref().and_then(|k| serde_json::from_slice(k).ok())
        else {
            return;
        };
        let known = self.positions.entry(connector).or_default();
        let tp = (of.topic, of.number);
        match record.value.as_deref().map(serde_json::from_slice::<Option<Position>>) {
            Some(Ok(Some(position))) => {
                known.insert(tp, position.offset);
            }
            None | Some(Ok(None)) => {
                known.remove(&tp);
            }
            Some(Err(_)) => {}
        }
    }
}

impl Tail {
    /// Source offset of the last record carried, by partition, of one connector; reads on to the end first.
    ///
    /// A partition of which nothing was carried yet has no entry. Errors: as a read of the topic.
    pub async fn positions(
        &self,
        cluster: &Cluster,
        topic: &str,
        connector: &str,
        until: Deadline,
    ) -> Result<BTreeMap<Tp, i64>, PlaneError> {
        let mut known = self.known.lock().await;
        known.read_on(cluster, topic, until).await?;
        Ok(known.positions.get(connector).cloned().unwrap_or_default())
    }
}

impl Known {
    async fn read_on(&mut self, cluster: &Cluster, topic: &str, until: Deadline) -> Result<(), PlaneError> {
        let topics = BTreeSet::from([topic]);
        let map = cluster.full_map(&topics, until).await?;
        if self.next.is_empty() {
            self.next = log::ends(cluster, &map, &topics, End::Start, until).await?;
        }
        for (leader, tps) in map.by_leader(&topics)? {
            let mut from: BTreeMap<Tp, i64> =
                tps.into_iter().map(|tp| (tp.clone(), self.next.get(&tp).copied().unwrap_or(0))).collect();
            while !from.is_empty() {
                for (tp, chunk) in log::fetch(cluster, &map, leader, &from, until).await? {
                    if chunk.out_of_range {
                        // Compacted away or made anew: what was known may be false.
                        *self = Self::default();
                        return Box::pin(self.read_on(cluster, topic, until)).await;
                    }
                    chunk.records.iter().for_each(|record| self.learn(record));
                    self.next.insert(tp.clone(), chunk.next);
                    if chunk.next >= chunk.stable {
                        from.remove(&tp);
                    } else {
                        from.insert(tp, chunk.next);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use kafka_protocol::indexmap::IndexMap;
    use kafka_protocol::records::TimestampType;

    use super::*;

    fn told(key: &str, value: Option<&str>) -> Record {
        Record {
            transactional: true,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: 0,
            producer_id: 1,
            producer_epoch: 0,
            timestamp_type: TimestampType::Creation,
            offset: 0,
            sequence: 0,
            timestamp: 0,
            key: Some(Bytes::copy_from_slice(key.as_bytes())),
            value: value.map(|v| Bytes::copy_from_slice(v.as_bytes())),
            headers: IndexMap::default(),
        }
    }

    #[test]
    fn keeps_the_last_position_of_each_partition_and_forgets_what_was_deleted() {
        let mut known = Known::default();
        let key = |p: i32| format!(r#"["m",{{"cluster":"rome","partition":{p},"topic":"t"}}]"#);
        known.learn(&told(&key(0), Some(r#"{"offset":59}"#)));
        known.learn(&told(&key(0), Some(r#"{"offset":61}"#)));
        known.learn(&told(&key(1), Some(r#"{"offset":7}"#)));
        known.learn(&told(&key(1), None));
        let expected = BTreeMap::from([(("t".to_owned(), 0), 61)]);
        assert_eq!(known.positions.get("m"), Some(&expected));
    }

    #[test]
    fn passes_over_rows_of_other_connectors_and_over_nonsense() {
        let mut known = Known::default();
        for key in [r#"["c",{"group":"g","partition":0,"topic":"t"}]"#, "nonsense", r#"["c",null]"#, "[]"] {
            known.learn(&told(key, Some(r#"{"offset":0}"#)));
        }
        known.learn(&told(r#"["m",{"cluster":"a","partition":0,"topic":"t"}]"#, Some("{}")));
        assert!(known.positions.values().all(BTreeMap::is_empty));
    }
}
