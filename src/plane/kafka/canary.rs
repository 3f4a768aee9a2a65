//! The canary: a principal of its own that tries to write, and whose refusal at every leader is the fence.
//!
//! What it sends to probe can never be kept: its checksum is false *and* it asks for two acknowledgements, which no
//! broker accepts. The authorizer is asked before either is looked at. Only `tell` writes a record, to the canary
//! topic alone, so that the mirror's progress can be seen.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use dc_plane::{Deadline, PlaneError, wait_until};
use futures::future::try_join_all;
use kafka_protocol::error::ResponseError;
use kafka_protocol::indexmap::IndexMap;
use kafka_protocol::messages::ProduceRequest;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::records::{
    Compression, NO_PARTITION_LEADER_EPOCH, NO_PRODUCER_EPOCH, NO_PRODUCER_ID, NO_SEQUENCE, Record,
    RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};

use crate::cluster::{Cluster, Map, Tp, Who, by_topic, failed};
use crate::wire::{text, words};

/// Where the checksum stands in a batch.
const CHECKSUM: usize = 17;

/// What a leader said to a write that it could never keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The principal has no WRITE there.
    Denied,
    /// It has WRITE: only the batch itself was refused.
    Granted,
    /// The broker could not judge, as while it loses its lead.
    Unclear(String),
}

fn verdict(code: i16) -> Verdict {
    match ResponseError::try_from_code(code) {
        Some(ResponseError::TopicAuthorizationFailed | ResponseError::ClusterAuthorizationFailed) => {
            Verdict::Denied
        }
        Some(ResponseError::CorruptMessage | ResponseError::InvalidRequiredAcks) => Verdict::Granted,
        _ => Verdict::Unclear(words(code)),
    }
}

fn batch(value: &str, spoiled: bool) -> Result<Bytes, PlaneError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let record = Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: NO_PARTITION_LEADER_EPOCH,
        producer_id: NO_PRODUCER_ID,
        producer_epoch: NO_PRODUCER_EPOCH,
        timestamp_type: TimestampType::Creation,
        offset: 0,
        sequence: NO_SEQUENCE,
        timestamp: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        key: None,
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
        headers: IndexMap::default(),
    };
    let mut made = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression: Compression::None };
    RecordBatchEncoder::encode(&mut made, [&record], &options)
        .map_err(|e| failed("make a batch", e.to_string()))?;
    if spoiled {
        made[CHECKSUM] ^= 0xff;
    }
    Ok(made.freeze())
}

fn produce(tps: &[Tp], records: &Bytes, acks: i16) -> ProduceRequest {
    let topics = by_topic(tps).into_iter().map(|(topic, partitions)| {
        let data = partitions.into_iter().map(|partition| {
            PartitionProduceData::default().with_index(partition).with_records(Some(records.clone()))
        });
        TopicProduceData::default().with_name(text(topic).into()).with_partition_data(data.collect())
    });
    ProduceRequest::default().with_acks(acks).with_timeout_ms(5_000).with_topic_data(topics.collect())
}

/// Tries, as `who`, to write what cannot be kept to each partition given, at its leader, side by side.
///
/// Changes nothing. Errors: any leader that does not answer.
pub async fn try_write(
    cluster: &Cluster,
    map: &Map,
    who: Who,
    topics: &BTreeSet<&str>,
    until: Deadline,
) -> Result<BTreeMap<Tp, Verdict>, PlaneError> {
    let spoiled = batch("never kept", true)?;
    let each = map.by_leader(topics)?.into_iter().map(|(leader, tps)| {
        let ask = produce(&tps, &spoiled, 2);
        async move { cluster.at(map, leader, who, &ask, until).await }
    });
    let mut found = BTreeMap::new();
    for answer in try_join_all(each).await? {
        for topic in &answer.responses {
            for part in &topic.partition_responses {
                found.insert((topic.name.0.to_string(), part.index), verdict(part.error_code));
            }
        }
    }
    Ok(found)
}

/// Tries until every leader says the same as wanted; each broker learns of a change of grants by itself.
///
/// Returns how many leaders and tries it took. Errors: `TimedOut` while a leader differs or is silent.
pub async fn wait_for(
    cluster: &Cluster,
    map: &Map,
    topic: &str,
    wanted: &Verdict,
    until: Deadline,
) -> Result<Seen, PlaneError> {
    let topics = BTreeSet::from([topic]);
    let leaders = map.by_leader(&topics)?;
    let without: Vec<i32> =
        map.brokers.keys().filter(|broker| !leaders.contains_key(broker)).copied().collect();
    if !without.is_empty() {
        return Err(failed(
            "prove by the canary",
            format!(
                "{topic} has no leader on broker {without:?} of {}; give it more partitions",
                cluster.site
            ),
        ));
    }
    let mut tries = 0_u32;
    let what = format!("the canary {} at every leader of {}", told(wanted), cluster.site);
    let tries = wait_until(until, Duration::from_millis(2), &what, || {
        tries += 1;
        let topics = &topics;
        async move {
            let found = try_write(cluster, map, Who::Canary, topics, until).await?;
            Ok(found.values().all(|verdict| verdict == wanted).then_some(tries))
        }
    })
    .await?;
    Ok(Seen { leaders: leaders.len(), tries })
}

fn told(wanted: &Verdict) -> &'static str {
    match wanted {
        Verdict::Denied => "denied",
        Verdict::Granted => "accepted",
        Verdict::Unclear(_) => "unclear",
    }
}

/// How a verdict was seen.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Brokers that lead a partition of the canary topic.
    pub leaders: usize,
    /// Rounds it took.
    pub tries: u32,
}

/// Writes one record to partition 0 of the canary topic and returns its offset.
///
/// Errors: `Failed` when the broker does not keep it, as when the canary has no WRITE.
pub async fn tell(
    cluster: &Cluster,
    map: &Map,
    topic: &str,
    value: &str,
    until: Deadline,
) -> Result<i64, PlaneError> {
    let tp = (topic.to_owned(), 0);
    let leader = map.leaders.get(&tp).copied().unwrap_or(-1);
    let ask = produce(&[tp], &batch(value, false)?, -1);
    let answer = cluster.at(map, leader, Who::Canary, &ask, until).await?;
    let part = answer.responses.first().and_then(|t| t.partition_responses.first());
    match part {
        Some(part) if part.error_code == 0 => Ok(part.base_offset),
        Some(part) => Err(failed("write a canary record", words(part.error_code))),
        None => Err(failed("write a canary record", "the answer names no partition")),
    }
}

#[cfg(test)]
mod tests {
    use kafka_protocol::records::RecordBatchDecoder;

    use super::*;

    #[test]
    fn the_probing_batch_cannot_be_kept_and_the_telling_one_can() {
        let (Ok(spoiled), Ok(sound)) = (batch("x", true), batch("x", false)) else { panic!("both encode") };
        assert!(RecordBatchDecoder::decode(&mut spoiled.clone()).is_err());
        assert!(RecordBatchDecoder::decode(&mut sound.clone()).is_ok());
        assert_eq!(produce(&[("t".into(), 0)], &spoiled, 2).acks, 2);
    }

    #[test]
    fn only_an_authorization_error_counts_as_denied() {
        assert_eq!(verdict(29), Verdict::Denied);
        assert_eq!(verdict(2), Verdict::Granted);
        assert_eq!(verdict(21), Verdict::Granted);
        assert!(matches!(verdict(6), Verdict::Unclear(_)));
        assert!(matches!(verdict(0), Verdict::Unclear(_)));
    }
}
