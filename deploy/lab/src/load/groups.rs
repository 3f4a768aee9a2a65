//! Consumer groups: members that follow the active site by what producers were told, read at different paces and
//! commit, and note each position.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::Message;
use rdkafka::{Offset, TopicPartitionList};
use tokio::task::JoinSet;

use crate::history::{Id, Outcome, now_ns};
use crate::load::Shared;
use crate::load::kafka::{Records, TOPICS, config, parse, place};
use crate::oracle::groups::{Found, Left, Position};
use crate::oracle::writes::Content;
use crate::world::{Plane, ROME, Site};

/// Groups of the failover group, each with the pause of its member after a record: one keeps up, one falls behind.
const GROUPS: [(&str, Duration); 2] = [("billing", Duration::ZERO), ("audit", Duration::from_millis(10))];

/// What members of a group did.
#[derive(Debug, Clone)]
enum Entry {
    /// The broker's position of the group when a member was about to join: offset per partition.
    Joins { committed: BTreeMap<String, i64> },
    /// The first record a member was given of a partition since it joined.
    First { place: String, offset: i64 },
    /// A commit: per partition the record before the position.
    Commit { before: BTreeMap<String, Id>, outcome: Outcome },
}

#[derive(Debug, Clone)]
struct Line {
    at: u64,
    group: &'static str,
    site: Site,
    entry: Entry,
}

/// All that members of all groups did, in order.
#[derive(Debug, Default)]
pub struct Log(Mutex<Vec<Line>>);

impl Log {
    fn add(&self, group: &'static str, site: Site, entry: Entry) {
        if let Ok(mut lines) = self.0.lock() {
            lines.push(Line { at: now_ns(), group, site, entry });
        }
    }

    fn lines(&self, group: &str, site: Site, from: u64) -> Vec<Line> {
        let Ok(lines) = self.0.lock() else { return Vec::new() };
        lines.iter().filter(|l| l.group == group && l.site == site && l.at >= from).cloned().collect()
    }

    /// Has every group had a commit acknowledged at a site since a time?
    pub fn committed(&self, site: Site, since: u64) -> bool {
        let acked = |l: &Line| matches!(&l.entry, Entry::Commit { outcome: Outcome::Acked, .. });
        GROUPS.iter().all(|(g, _)| self.lines(g, site, since).iter().any(acked))
    }

    /// Positions of every group and partition across a move from `source` to `target` asked for at `asked`.
    pub fn positions<'a>(
        &self,
        asked: u64,
        source: (Site, &Records),
        target: (Site, &Records),
        contents: &'a Content,
    ) -> Vec<Position<'a>> {
        let mut positions = Vec::new();
        for (group, _) in GROUPS {
            let left = self.lines(group, source.0, 0);
            let came = self.lines(group, target.0, asked);
            for (place, records) in contents {
                let left = left_at(&left, place, source.1.get(place).map_or(&[], Vec::as_slice));
                let found = found_at(&came, place, target.1.get(place).map_or(&[], Vec::as_slice));
                positions.push(Position { name: format!("{group} {place}"), records, left, found });
            }
        }
        positions
    }
}

/// Where a group stood when it left: its last acknowledged commit, or the position with which it came.
fn left_at(lines: &[Line], place: &str, records: &[(i64, Id)]) -> Left {
    let mut left = Left::default();
    for line in lines {
        match &line.entry {
            Entry::Joins { committed } => {
                let before = committed.get(place).and_then(|at| records.iter().rev().find(|(o, _)| o < at));
                if let Some((_, id)) = before {
                    left = Left { acked: Some(*id), ..Left::default() };
                }
            }
            Entry::Commit { before, outcome } => match (before.get(place), outcome) {
                (Some(id), Outcome::Acked) => left = Left { acked: Some(*id), ..Left::default() },
                (Some(id), Outcome::Unknown) => drop(left.unknown.insert(*id)),
                _ => {}
            },
            Entry::First { .. } => {}
        }
    }
    left
}

/// Where a group stands: its position before the first member joined, and the first record that one was given.
fn found_at(lines: &[Line], place: &str, records: &[(i64, Id)]) -> Found {
    let index = |offset: i64| records.iter().filter(|(o, _)| *o < offset).count();
    let mut found = Found::default();
    let mut joins = 0;
    for line in lines {
        match &line.entry {
            Entry::Joins { committed } => {
                joins += 1;
                if joins > 1 {
                    break; // a later member stands where the first one committed
                }
                found.committed = committed.get(place).map(|at| index(*at));
            }
            Entry::First { place: of, offset } if of == place => found.first = Some(index(*offset)),
            _ => {}
        }
    }
    found
}

/// Starts one member per group.
pub fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) {
    for (group, pace) in GROUPS {
        let shared = shared.clone();
        tasks.spawn_blocking(move || {
            while !shared.over() {
                let site = shared.history(Plane::Kafka).ok().and_then(|h| h.active()).unwrap_or(ROME);
                if member(&shared, group, pace, site).is_err() {
                    std::thread::sleep(Duration::from_millis(300));
                }
            }
        });
    }
}

/// One life of a member: joins at a site, reads and commits until it is refused or another site acknowledges writes.
fn member(shared: &Shared, group: &'static str, pace: Duration, site: Site) -> Result<()> {
    let committed = committed(shared, group, site)?;
    shared.groups.add(group, site, Entry::Joins { committed });
    let mut c = config(&shared.world, site, "app")?;
    c.set("group.id", group).set("enable.auto.commit", "false").set("auto.offset.reset", "earliest");
    c.set("isolation.level", "read_committed")
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "1000");
    let consumer: BaseConsumer = c.create().context("make a member")?;
    consumer.subscribe(&TOPICS)?;
    let mut first: BTreeSet<String> = BTreeSet::new();
    let mut read: BTreeMap<(String, i32), (i64, Id)> = BTreeMap::new();
    let mut commit_at = Instant::now() + COMMIT_EVERY;
    let moved = || shared.history(Plane::Kafka).ok().and_then(|h| h.active()).is_some_and(|s| s != site);
    while !shared.over() && !moved() {
        match consumer.poll(Duration::from_millis(50)) {
            Some(Ok(m)) => {
                let of = place(m.topic(), m.partition());
                if first.insert(of.clone()) {
                    shared.groups.add(group, site, Entry::First { place: of, offset: m.offset() });
                }
                if let Some(id) = parse(&m) {
                    read.insert((m.topic().to_string(), m.partition()), (m.offset(), id));
                }
                std::thread::sleep(pace);
            }
            Some(Err(e)) if refused(&e) => anyhow::bail!("refused at {site}"),
            _ => {}
        }
        if Instant::now() >= commit_at && !read.is_empty() {
            commit(shared, &consumer, group, site, &std::mem::take(&mut read));
            commit_at = Instant::now() + COMMIT_EVERY;
        }
    }
    Ok(())
}

const COMMIT_EVERY: Duration = Duration::from_millis(200);

fn commit(
    shared: &Shared,
    consumer: &BaseConsumer,
    group: &'static str,
    site: Site,
    read: &BTreeMap<(String, i32), (i64, Id)>,
) {
    let mut list = TopicPartitionList::new();
    let mut before = BTreeMap::new();
    for ((topic, partition), (offset, id)) in read {
        if list.add_partition_offset(topic, *partition, Offset::Offset(offset + 1)).is_ok() {
            before.insert(place(topic, *partition), *id);
        }
    }
    let outcome = match consumer.commit(&list, CommitMode::Sync) {
        Ok(()) => Outcome::Acked,
        Err(e) if refused(&e) => Outcome::Refused,
        Err(_) => Outcome::Unknown,
    };
    shared.groups.add(group, site, Entry::Commit { before, outcome });
}

fn refused(e: &KafkaError) -> bool {
    matches!(e.rdkafka_error_code(), Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed))
}

/// The group's committed offsets at a site, read without joining.
fn committed(shared: &Shared, group: &str, site: Site) -> Result<BTreeMap<String, i64>> {
    let mut c = config(&shared.world, site, "dclab")?;
    c.set("group.id", group).set("enable.auto.commit", "false");
    let reader: BaseConsumer = c.create().context("make a reader of positions")?;
    let metadata = reader.fetch_metadata(None, Duration::from_secs(5)).context("read metadata")?;
    let mut list = TopicPartitionList::new();
    for topic in metadata.topics().iter().filter(|t| TOPICS.contains(&t.name())) {
        for p in topic.partitions() {
            list.add_partition(topic.name(), p.id());
        }
    }
    let found = reader.committed_offsets(list, Duration::from_secs(5)).context("read positions")?;
    let known = |e: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match e.offset() {
        Offset::Offset(at) => Some((place(e.topic(), e.partition()), at)),
        _ => None,
    };
    Ok(found.elements().iter().filter_map(known).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: [(i64, Id); 3] = [(0, (1, 1)), (2, (1, 2)), (5, (1, 3))];

    fn line(entry: Entry) -> Line {
        Line { at: 1, group: "billing", site: ROME, entry }
    }

    fn committed_before(id: Id, outcome: Outcome) -> Line {
        line(Entry::Commit { before: BTreeMap::from([("t-0".into(), id)]), outcome })
    }

    #[test]
    fn a_group_left_where_its_last_acknowledged_commit_says() {
        let lines = [
            committed_before((1, 1), Outcome::Acked),
            committed_before((1, 2), Outcome::Acked),
            committed_before((1, 3), Outcome::Unknown),
        ];
        let left = left_at(&lines, "t-0", &RECORDS);
        assert_eq!((left.acked, left.unknown.len()), (Some((1, 2)), 1));
    }

    #[test]
    fn a_group_that_committed_nothing_left_where_it_came() {
        let joins = line(Entry::Joins { committed: BTreeMap::from([("t-0".into(), 5)]) });
        assert_eq!(left_at(&[joins], "t-0", &RECORDS).acked, Some((1, 2)));
    }

    #[test]
    fn offsets_with_gaps_become_indices() {
        let joins = line(Entry::Joins { committed: BTreeMap::from([("t-0".into(), 4)]) });
        let first = line(Entry::First { place: "t-0".into(), offset: 5 });
        let found = found_at(&[joins, first], "t-0", &RECORDS);
        assert_eq!((found.committed, found.first), (Some(2), Some(2)));
    }
}
