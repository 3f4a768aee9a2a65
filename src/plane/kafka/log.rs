//! Partitions as logs: where they end, and what a `read_committed` reader finds in them.
//!
//! Reads use Fetch of the `kafka-protocol` crate over this room's own connections instead of a consumer library:
//! a consumer brings threads, a group, caches that outlive a fence and, in librdkafka's case, code that may abort the
//! process that also votes in the quorum. What it costs is one rule, kept in `readable`: records of aborted
//! transactions and control records are skipped as the broker's list of aborted transactions says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use dc_core::position::Ends;
use dc_plane::{Deadline, PlaneError, wait_until};
use futures::future::try_join_all;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::{FetchRequest, ListOffsetsRequest};
use kafka_protocol::records::{Record, RecordBatchDecoder};
use sha2::{Digest, Sha256};

use crate::cluster::{Cluster, Map, Tp, Who, by_topic, failed};
use crate::wire::{text, words};

const OFFSET_OUT_OF_RANGE: i16 = 1;
const FETCH_BYTES: i32 = 16 << 20;
const PARTITION_BYTES: i32 = 1 << 20;

/// Which end of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The first offset still kept.
    Start,
    /// Up to here nothing can change any more: no open transaction below.
    Stable,
    /// The true end, records not yet replicated included. `read_uncommitted` would give only the high watermark.
    Log,
}

/// Offsets of one kind for every partition of the topics given.
///
/// Errors: a leader that does not answer, or a partition that refuses.
pub async fn ends(
    cluster: &Cluster,
    map: &Map,
    topics: &BTreeSet<&str>,
    end: End,
    until: Deadline,
) -> Result<BTreeMap<Tp, i64>, PlaneError> {
    // -1: an ordinary client. -2: a debugging one, which is told the true end and needs no more than DESCRIBE.
    let (time, replica, committed) = match end {
        End::Start => (-2, -1, 0),
        End::Stable => (-1, -1, 1),
        End::Log => (-1, -2, 0),
    };
    let each = map.by_leader(topics)?.into_iter().map(|(leader, tps)| async move {
        let named = by_topic(&tps).into_iter().map(|(topic, partitions)| {
            let asked = partitions
                .into_iter()
                .map(|p| ListOffsetsPartition::default().with_partition_index(p).with_timestamp(time));
            ListOffsetsTopic::default().with_name(text(topic).into()).with_partitions(asked.collect())
        });
        let ask = ListOffsetsRequest::default()
            .with_replica_id(replica.into())
            .with_isolation_level(committed)
            .with_topics(named.collect());
        cluster.at(map, leader, Who::Agent, &ask, until).await
    });
    let mut found = BTreeMap::new();
    for answer in try_join_all(each).await? {
        for topic in &answer.topics {
            for part in &topic.partitions {
                let tp = (topic.name.0.to_string(), part.partition_index);
                if part.error_code != 0 {
                    let why = format!("{}/{} of {}: {}", tp.0, tp.1, cluster.site, words(part.error_code));
                    return Err(failed("read end offsets", why));
                }
                found.insert(tp, part.offset);
            }
        }
    }
    Ok(found)
}

/// Waits until stable end and true end are equal, twice the same: nothing is open, nothing comes any more.
///
/// Errors: `TimedOut` naming the partitions that move or hold an open transaction.
pub async fn settled(
    cluster: &Cluster,
    map: &Map,
    topics: &BTreeSet<&str>,
    until: Deadline,
) -> Result<BTreeMap<Tp, i64>, PlaneError> {
    let mut before: Option<BTreeMap<Tp, i64>> = None;
    loop {
        let (stable, log) = futures::try_join!(
            ends(cluster, map, topics, End::Stable, until),
            ends(cluster, map, topics, End::Log, until)
        )?;
        if stable == log && before.as_ref() == Some(&log) {
            return Ok(log);
        }
        if until.left() < Duration::from_millis(20) {
            let open = log.iter().filter(|(tp, end)| {
                stable.get(*tp) != Some(*end) || before.as_ref().and_then(|b| b.get(*tp)) != Some(*end)
            });
            let told: Vec<String> = open.map(|(tp, end)| format!("{}/{} at {end}", tp.0, tp.1)).collect();
            let what = format!(
                "ends at {} to settle; moving or under an open transaction: {}",
                cluster.site,
                told.join(", ")
            );
            return Err(PlaneError::TimedOut { what, waited: Duration::ZERO });
        }
        if stable == log {
            before = Some(log);
        } else {
            before = None;
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
}

/// The form in which ends stand in Raft.
pub fn to_ends(found: &BTreeMap<Tp, i64>) -> Ends {
    let mut ends = Ends::new();
    for ((topic, partition), offset) in found {
        ends.entry(topic.clone()).or_default().insert(*partition, *offset);
    }
    ends
}

/// The other way round.
pub fn from_ends(ends: &Ends) -> BTreeMap<Tp, i64> {
    ends.iter().flat_map(|(t, parts)| parts.iter().map(|(p, o)| ((t.clone(), *p), *o))).collect()
}

/// What one Fetch brought of one partition.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Readable records, from the offset asked for.
    pub records: Vec<Record>,
    /// Where to go on.
    pub next: i64,
    /// The stable end as the broker saw it.
    pub stable: i64,
    /// The offset asked for lies before the log's start or behind its end.
    pub out_of_range: bool,
}

/// One Fetch at one leader, `read_committed`.
pub async fn fetch(
    cluster: &Cluster,
    map: &Map,
    leader: i32,
    from: &BTreeMap<Tp, i64>,
    until: Deadline,
) -> Result<BTreeMap<Tp, Chunk>, PlaneError> {
    let tps: Vec<Tp> = from.keys().cloned().collect();
    let named = by_topic(&tps).into_iter().map(|(topic, partitions)| {
        let asked = partitions.into_iter().map(|p| {
            FetchPartition::default()
                .with_partition(p)
                .with_fetch_offset(from.get(&(topic.to_owned(), p)).copied().unwrap_or(0))
                .with_partition_max_bytes(PARTITION_BYTES)
        });
        FetchTopic::default().with_topic(text(topic).into()).with_partitions(asked.collect())
    });
    let ask = FetchRequest::default()
        .with_replica_id((-1).into())
        .with_max_wait_ms(0)
        .with_min_bytes(0)
        .with_max_bytes(FETCH_BYTES)
        .with_isolation_level(1)
        .with_session_epoch(-1)
        .with_topics(named.collect());
    let answer = cluster.at(map, leader, Who::Agent, &ask, until).await?;
    if answer.error_code != 0 {
        return Err(failed("read records", words(answer.error_code)));
    }
    let mut found = BTreeMap::new();
    for topic in answer.responses {
        for part in topic.partitions {
            let tp = (topic.topic.0.to_string(), part.partition_index);
            let start = from.get(&tp).copied().unwrap_or(0);
            if part.error_code == OFFSET_OUT_OF_RANGE {
                found.insert(tp, Chunk { next: start, out_of_range: true, ..Chunk::default() });
                continue;
            }
            let wrong =
                |why: String| failed("read records", format!("{}/{} of {}: {why}", tp.0, tp.1, cluster.site));
            if part.error_code != 0 {
                return Err(wrong(words(part.error_code)));
            }
            let aborted = part.aborted_transactions.unwrap_or_default();
            let aborted = aborted.iter().map(|a| (a.first_offset, a.producer_id.0)).collect();
            let (records, next) =
                readable(part.records.unwrap_or_default(), aborted, start).map_err(wrong)?;
            found.insert(tp, Chunk { records, next, stable: part.last_stable_offset, out_of_range: false });
        }
    }
    Ok(found)
}

/// The records that a `read_committed` reader sees, and the offset after the last whole batch.
///
/// `aborted` holds first offset and producer of each aborted transaction that may lie in these bytes.
pub fn readable(bytes: Bytes, mut aborted: Vec<(i64, i64)>, from: i64) -> Result<(Vec<Record>, i64), String> {
    aborted.sort_unstable();
    let mut coming = aborted.into_iter().peekable();
    let mut open = BTreeSet::new();
    let mut seen = Vec::new();
    let mut next = from;
    let mut rest = bytes;
    while let Some(batch) = Batch::first(&rest)? {
        let mut whole = rest.split_to(batch.len);
        while let Some((_, producer)) = coming.next_if(|(first, _)| *first <= batch.last) {
            open.insert(producer);
        }
        next = next.max(batch.last + 1);
        if batch.transactional && !batch.control && open.contains(&batch.producer) {
            continue;
        }
        let set = RecordBatchDecoder::decode(&mut whole).map_err(|e| e.to_string())?;
        if batch.control {
            // Key of a control record: version, then type; type 0 ends an aborted transaction.
            let abort =
                set.records.iter().any(|r| r.key.as_deref().and_then(|k| k.get(2..4)) == Some(&[0, 0]));
            if abort {
                open.remove(&batch.producer);
            }
            continue;
        }
        seen.extend(set.records.into_iter().filter(|record| record.offset >= from));
    }
    Ok((seen, next))
}

/// What the head of a batch tells, without its records.
struct Batch {
    len: usize,
    last: i64,
    producer: i64,
    transactional: bool,
    control: bool,
}

impl Batch {
    const HEAD: usize = 61;

    /// The first batch; none when its end is not there yet, as a broker may cut the last one.
    fn first(bytes: &[u8]) -> Result<Option<Self>, String> {
        let Some(head) = bytes.get(..Self::HEAD) else { return Ok(None) };
        let int = |at: usize| i32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let long = |at: usize| i64::from(int(at)) << 32 | i64::from(int(at + 4)).rem_euclid(1 << 32);
        if head[16] != 2 {
            return Err(format!("batch of format {}, only 2 is read", head[16]));
        }
        let len = usize::try_from(int(8)).map_err(|_| "batch of negative length".to_owned())? + 12;
        if len < Self::HEAD {
            return Err(format!("batch of {len} bytes"));
        }
        if bytes.len() < len {
            return Ok(None);
        }
        let attributes = head[22];
        Ok(Some(Self {
            len,
            last: long(0) + i64::from(int(23)),
            producer: long(43),
            transactional: attributes & 0x10 != 0,
            control: attributes & 0x20 != 0,
        }))
    }
}

/// A record as the two sites are compared: where it stands, and what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Print {
    /// Differs between the sites.
    pub offset: i64,
    /// Of timestamp, key, value and headers: equal at both.
    pub of: [u8; 16],
}

impl Print {
    /// The print of a record.
    pub fn of(record: &Record) -> Self {
        let mut hash = Sha256::new();
        let mut part = |bytes: Option<&[u8]>| {
            hash.update(bytes.map_or(-1, |b| i64::try_from(b.len()).unwrap_or(i64::MAX)).to_be_bytes());
            hash.update(bytes.unwrap_or_default());
        };
        part(Some(&record.timestamp.to_be_bytes()));
        part(record.key.as_deref());
        part(record.value.as_deref());
        for (name, value) in &record.headers {
            part(Some(name.as_bytes()));
            part(value.as_deref());
        }
        let mut of = [0; 16];
        of.copy_from_slice(&hash.finalize()[..16]);
        Self { offset: record.offset, of }
    }
}

/// Prints of every readable record in the ranges given (start included, end not), all leaders side by side.
///
/// A start before the log's own is moved up to it. Errors: a leader that does not answer, bytes that are no records,
/// more than `most` records in one partition.
pub async fn prints(
    cluster: &Cluster,
    map: &Map,
    ranges: &BTreeMap<Tp, (i64, i64)>,
    most: usize,
    until: Deadline,
) -> Result<BTreeMap<Tp, Vec<Print>>, PlaneError> {
    let mut by_leader = BTreeMap::<i32, BTreeMap<Tp, (i64, i64)>>::new();
    for (tp, range) in ranges.iter().filter(|(_, (start, end))| start < end) {
        let leader = map.leaders.get(tp).copied().unwrap_or(-1);
        by_leader.entry(leader).or_default().insert(tp.clone(), *range);
    }
    let each =
        by_leader.into_iter().map(|(leader, ranges)| at_leader(cluster, map, leader, ranges, most, until));
    let mut found: BTreeMap<Tp, Vec<Print>> = ranges.keys().map(|tp| (tp.clone(), Vec::new())).collect();
    for part in try_join_all(each).await? {
        found.extend(part);
    }
    Ok(found)
}

async fn at_leader(
    cluster: &Cluster,
    map: &Map,
    leader: i32,
    ranges: BTreeMap<Tp, (i64, i64)>,
    most: usize,
    until: Deadline,
) -> Result<BTreeMap<Tp, Vec<Print>>, PlaneError> {
    let mut found = BTreeMap::<Tp, Vec<Print>>::new();
    let mut from: BTreeMap<Tp, i64> = ranges.iter().map(|(tp, (start, _))| (tp.clone(), *start)).collect();
    while !from.is_empty() {
        let before = from.clone();
        for (tp, chunk) in fetch(cluster, map, leader, &from, until).await? {
            let end = ranges.get(&tp).map_or(0, |(_, end)| *end);
            if chunk.out_of_range {
                let start = start_of(cluster, map, &tp, until).await?;
                if start <= before.get(&tp).copied().unwrap_or(0) {
                    return Err(failed("read records", format!("{}/{} has lost its end {end}", tp.0, tp.1)));
                }
                from.insert(tp, start);
                continue;
            }
            let into = found.entry(tp.clone()).or_default();
            into.extend(chunk.records.iter().filter(|r| r.offset < end).map(Print::of));
            if into.len() > most {
                let why = format!("{}/{} of {}: more than {most} records", tp.0, tp.1, cluster.site);
                return Err(failed("read records", why));
            }
            if chunk.next >= end || chunk.next >= chunk.stable {
                from.remove(&tp);
            } else {
                from.insert(tp, chunk.next);
            }
        }
        if from == before {
            // A full answer leaves later partitions empty; one without any progress at all is only a pause.
            until.bound("records to be readable", tokio::time::sleep(Duration::from_millis(2))).await?;
            if until.passed() {
                return Err(PlaneError::TimedOut { what: "read records".into(), waited: Duration::ZERO });
            }
        }
    }
    Ok(found)
}

async fn start_of(cluster: &Cluster, map: &Map, tp: &Tp, until: Deadline) -> Result<i64, PlaneError> {
    let starts = ends(cluster, map, &BTreeSet::from([tp.0.as_str()]), End::Start, until).await?;
    starts.get(tp).copied().ok_or_else(|| failed("read log start", format!("{}/{} is gone", tp.0, tp.1)))
}

/// Waits until the condition on the ends of some topics holds.
pub async fn wait_readable(
    cluster: &Cluster,
    map: &Map,
    tp: &Tp,
    print: [u8; 16],
    from: i64,
    until: Deadline,
) -> Result<i64, PlaneError> {
    let what = format!("a record of {} to be readable at {}", tp.0, cluster.site);
    wait_until(until, Duration::from_millis(20), &what, || async {
        let ranges = BTreeMap::from([(tp.clone(), (from, i64::MAX))]);
        let found = prints(cluster, map, &ranges, usize::MAX, until).await?;
        Ok(found.get(tp).and_then(|all| all.iter().find(|p| p.of == print)).map(|p| p.offset))
    })
    .await
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};
    use kafka_protocol::indexmap::IndexMap;
    use kafka_protocol::records::{Compression, RecordBatchEncoder, RecordEncodeOptions, TimestampType};

    use super::*;

    fn record(offset: i64, producer: i64, transactional: bool, value: &str) -> Record {
        Record {
            transactional,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: 0,
            producer_id: producer,
            producer_epoch: 0,
            timestamp_type: TimestampType::Creation,
            offset,
            sequence: i32::try_from(offset).unwrap_or(0),
            timestamp: 5,
            key: None,
            value: Some(Bytes::copy_from_slice(value.as_bytes())),
            headers: IndexMap::default(),
        }
    }

    fn batch(records: &[Record], compression: Compression) -> Bytes {
        let mut made = BytesMut::new();
        let options = RecordEncodeOptions { version: 2, compression };
        assert!(RecordBatchEncoder::encode(&mut made, records, &options).is_ok());
        made.freeze()
    }

    fn marker(offset: i64, producer: i64, commit: bool) -> Bytes {
        let mut end = record(offset, producer, true, "");
        end.control = true;
        end.key = Some(Bytes::copy_from_slice(&[0, 0, 0, u8::from(commit)]));
        batch(&[end], Compression::None)
    }

    fn offsets(bytes: &[Bytes], aborted: Vec<(i64, i64)>, from: i64) -> (Vec<i64>, i64) {
        let joined: Bytes = bytes.concat().into();
        match readable(joined, aborted, from) {
            Ok((records, next)) => (records.iter().map(|r| r.offset).collect(), next),
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn skips_aborted_transactions_and_markers_and_nothing_else() {
        let log = [
            batch(&[record(0, -1, false, "a"), record(1, -1, false, "b")], Compression::None),
            batch(&[record(2, 7, true, "x")], Compression::None),
            batch(&[record(3, 8, true, "c")], Compression::None),
            marker(4, 7, false),
            batch(&[record(5, 7, true, "d")], Compression::None),
            marker(6, 8, true),
            marker(7, 7, true),
        ];
        assert_eq!(offsets(&log, vec![(2, 7)], 0), (vec![0, 1, 3, 5], 8));
        assert_eq!(offsets(&log, vec![(2, 7)], 1), (vec![1, 3, 5], 8));
    }

    #[test]
    fn an_end_behind_markers_alone_holds_no_record() {
        let log = [marker(9, 7, false), marker(10, 8, true)];
        assert_eq!(offsets(&log, vec![], 9), (vec![], 11));
    }

    #[test]
    fn reads_every_compression_and_leaves_a_cut_batch_for_the_next_fetch() {
        for kind in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            let first = batch(&[record(0, -1, false, "a"), record(1, -1, false, "b")], kind);
            let second = batch(&[record(2, -1, false, "c")], kind);
            let mut cut = BytesMut::from(&first[..]);
            cut.put_slice(&second[..second.len() - 3]);
            assert_eq!(offsets(&[cut.freeze()], vec![], 0), (vec![0, 1], 2), "{kind:?}");
        }
    }

    #[test]
    fn a_print_tells_values_keys_and_absence_apart_and_ignores_the_offset() {
        let plain = Print::of(&record(1, -1, false, "a")).of;
        assert_eq!(plain, Print::of(&record(9, 3, true, "a")).of);
        assert_ne!(plain, Print::of(&record(1, -1, false, "b")).of);
        let mut empty = record(1, -1, false, "");
        let with_value = Print::of(&empty).of;
        empty.value = None;
        assert_ne!(with_value, Print::of(&empty).of);
        empty.key = Some(Bytes::new());
        assert_ne!(Print::of(&empty).of, with_value);
    }

    #[test]
    fn refuses_bytes_that_are_no_batch() {
        assert!(readable(Bytes::from(vec![1; 200]), Vec::new(), 0).is_err());
        assert_eq!(readable(Bytes::from_static(b"short"), Vec::new(), 3).map(|r| r.1), Ok(3));
    }

    #[test]
    fn ends_read_what_they_write() {
        let found =
            BTreeMap::from([(("a".to_owned(), 0), 5), (("a".to_owned(), 1), 0), (("b".to_owned(), 0), 9)]);
        assert_eq!(from_ends(&to_ends(&found)), found);
    }
}
