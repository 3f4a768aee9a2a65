//! Consumer groups: where they stand, whether anyone is in them, and setting them while nobody is.
//!
//! A missing DESCRIBE is silent: rows are simply not there. Preflight therefore checks the agent's own grants. A
//! commit answers per partition, and takes any number: what is set is read back and compared.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_plane::{Deadline, PlaneError, wait_until};
use futures::future::try_join_all;
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestGroup;
use kafka_protocol::messages::{
    ConsumerGroupDescribeRequest, DescribeGroupsRequest, FindCoordinatorRequest, OffsetCommitRequest,
    OffsetFetchRequest,
};

use crate::cluster::{Cluster, Map, Tp, Who, failed};
use crate::wire::{text, words};

/// Positions by partition.
pub type Positions = BTreeMap<Tp, i64>;

fn passing(code: i16) -> bool {
    matches!(
        ResponseError::try_from_code(code),
        Some(
            ResponseError::CoordinatorNotAvailable
                | ResponseError::CoordinatorLoadInProgress
                | ResponseError::NotCoordinator
                | ResponseError::UnstableOffsetCommit
        )
    )
}

/// The broker that keeps each group, groups by broker.
async fn coordinators(
    cluster: &Cluster,
    groups: &[String],
    until: Deadline,
) -> Result<BTreeMap<i32, Vec<String>>, PlaneError> {
    if groups.is_empty() {
        return Ok(BTreeMap::new());
    }
    let ask = FindCoordinatorRequest::default()
        .with_coordinator_keys(groups.iter().map(|group| text(group.as_str())).collect());
    let what = format!("coordinators of groups at {}", cluster.site);
    // The first question ever makes the topic of groups: until then no coordinator is available.
    wait_until(until, Duration::from_millis(50), &what, || async {
        let answer = cluster.anywhere(Who::Agent, &ask, until).await?;
        let mut found = BTreeMap::<i32, Vec<String>>::new();
        for one in &answer.coordinators {
            if passing(one.error_code) {
                return Ok(None);
            }
            if one.error_code != 0 {
                let why = format!("{} at {}: {}", one.key.as_str(), cluster.site, words(one.error_code));
                return Err(failed("find the coordinator of a group", why));
            }
            found.entry(one.node_id.0).or_default().push(one.key.to_string());
        }
        Ok(Some(found))
    })
    .await
}

/// Where each group stands, of the partitions given as topics; a group without a position has no entry for it.
///
/// Waits while a transaction holds a position open. Errors: as `words` of Kafka's.
pub async fn positions(
    cluster: &Cluster,
    map: &Map,
    groups: &[String],
    until: Deadline,
) -> Result<BTreeMap<String, Positions>, PlaneError> {
    let what = format!("positions of groups at {} to be stable", cluster.site);
    wait_until(until, Duration::from_millis(20), &what, || async {
        let each = coordinators(cluster, groups, until).await?;
        let each = each.iter().map(|(broker, groups)| async move {
            let asked = groups.iter().map(|group| {
                // No topics means none, a null means all.
                OffsetFetchRequestGroup::default()
                    .with_group_id(text(group.as_str()).into())
                    .with_topics(None)
            });
            let ask = OffsetFetchRequest::default().with_groups(asked.collect()).with_require_stable(true);
            cluster.at(map, *broker, Who::Agent, &ask, until).await
        });
        let mut found = BTreeMap::<String, Positions>::new();
        for answer in try_join_all(each).await? {
            for group in &answer.groups {
                let into = found.entry(group.group_id.0.to_string()).or_default();
                let rows = group.topics.iter().flat_map(|t| t.partitions.iter().map(move |p| (t, p)));
                let mut codes = rows.clone().map(|(_, p)| p.error_code).chain([group.error_code]);
                if let Some(code) = codes.find(|code| *code != 0) {
                    if passing(code) {
                        return Ok(None);
                    }
                    let why = format!("{} at {}: {}", group.group_id.0.as_str(), cluster.site, words(code));
                    return Err(failed("read positions of a group", why));
                }
                for (topic, part) in rows.filter(|(_, p)| p.committed_offset >= 0) {
                    into.insert((topic.name.0.to_string(), part.partition_index), part.committed_offset);
                }
            }
        }
        Ok(Some(found))
    })
    .await
}

/// Groups with members, each with its state and how many.
pub async fn active(
    cluster: &Cluster,
    map: &Map,
    groups: &[String],
    until: Deadline,
) -> Result<BTreeMap<String, String>, PlaneError> {
    let mut found = BTreeMap::new();
    for (broker, groups) in coordinators(cluster, groups, until).await? {
        // Each kind of group is unknown to the other kind's question: both are asked.
        let ids: Vec<_> = groups.iter().map(|group| text(group.as_str()).into()).collect();
        let classic = DescribeGroupsRequest::default().with_groups(ids.clone());
        let modern = ConsumerGroupDescribeRequest::default().with_group_ids(ids);
        let (classic, modern) = futures::try_join!(
            cluster.at(map, broker, Who::Agent, &classic, until),
            cluster.at(map, broker, Who::Agent, &modern, until)
        )?;
        let known = classic
            .groups
            .iter()
            .map(|g| (g.group_id.0.to_string(), g.group_state.to_string(), g.members.len()))
            .chain(
                modern
                    .groups
                    .iter()
                    .map(|g| (g.group_id.0.to_string(), g.group_state.to_string(), g.members.len())),
            );
        for (group, state, members) in known.filter(|(_, _, members)| *members > 0) {
            found.insert(group, format!("{state}, {members} members"));
        }
    }
    Ok(found)
}

/// Sets positions of groups that nobody is in, side by side, and reads them back.
///
/// Repeat: safe. Errors: `Failed` naming group and partition; an active group answers `UnknownMemberId`.
pub async fn set(
    cluster: &Cluster,
    map: &Map,
    wanted: &BTreeMap<String, Positions>,
    until: Deadline,
) -> Result<(), PlaneError> {
    let groups: Vec<String> = wanted.keys().cloned().collect();
    let each = coordinators(cluster, &groups, until).await?;
    let each = each.iter().flat_map(|(broker, groups)| groups.iter().map(move |group| (*broker, group)));
    let each = each.filter_map(|(broker, group)| Some((broker, group, wanted.get(group)?)));
    try_join_all(
        each.map(|(broker, group, positions)| set_one(cluster, map, broker, group, positions, until)),
    )
    .await?;
    let found = self::positions(cluster, map, &groups, until).await?;
    for (group, positions) in wanted {
        for (tp, wanted) in positions {
            let got = found.get(group).and_then(|known| known.get(tp));
            if got != Some(wanted) {
                let why = format!("{group} {}/{}: set {wanted}, read back {got:?}", tp.0, tp.1);
                return Err(failed("set positions of a group", why));
            }
        }
    }
    Ok(())
}

async fn set_one(
    cluster: &Cluster,
    map: &Map,
    broker: i32,
    group: &str,
    positions: &Positions,
    until: Deadline,
) -> Result<(), PlaneError> {
    if positions.is_empty() {
        return Ok(());
    }
    let mut topics = BTreeMap::<&str, Vec<OffsetCommitRequestPartition>>::new();
    for ((topic, partition), offset) in positions {
        if *offset < 0 {
            // Kafka would store it.
            return Err(failed("set positions of a group", format!("{group} {topic}/{partition}: {offset}")));
        }
        let part = OffsetCommitRequestPartition::default()
            .with_partition_index(*partition)
            .with_committed_offset(*offset)
            .with_committed_metadata(Some(text("")));
        topics.entry(topic).or_default().push(part);
    }
    let topics = topics.into_iter().map(|(topic, partitions)| {
        OffsetCommitRequestTopic::default().with_name(text(topic).into()).with_partitions(partitions)
    });
    let ask = OffsetCommitRequest::default().with_group_id(text(group).into()).with_topics(topics.collect());
    let what = format!("group {group} to take its positions");
    wait_until(until, Duration::from_millis(50), &what, || async {
        let answer = cluster.at(map, broker, Who::Agent, &ask, until).await?;
        for topic in &answer.topics {
            if let Some(part) = topic.partitions.iter().find(|p| p.error_code != 0) {
                if passing(part.error_code) {
                    return Ok(None);
                }
                let why = format!(
                    "{group} {}/{} at {}: {}",
                    topic.name.0.as_str(),
                    part.partition_index,
                    cluster.site,
                    words(part.error_code)
                );
                return Err(failed("set positions of a group", why));
            }
        }
        Ok(Some(()))
    })
    .await
}
