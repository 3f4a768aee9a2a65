//! Positions of consumer groups at the target, exact by content.

use std::collections::BTreeMap;

use dc_core::act::{Act, Evidence};
use dc_plane::{Deadline, PlaneError};

use crate::cluster::{Cluster, Map, Tp};
use crate::groups::{self, Positions};
use crate::log::{self, End, Print};
use crate::{KafkaPlane, translate};

/// More readable records than this behind its end, and a group's position is not translated within an outage.
pub(super) const LEFT_MAX: usize = 200_000;

/// Where groups shall stand, and what that rests on.
struct Wanted {
    map: std::sync::Arc<Map>,
    positions: BTreeMap<String, Positions>,
    /// Where they stand at the target so far.
    now: BTreeMap<String, Positions>,
    compared: usize,
}

impl Wanted {
    /// Partitions at which the target's positions differ from those wanted.
    fn differing(&self) -> usize {
        let all = self.positions.iter().flat_map(|(group, rows)| rows.iter().map(move |row| (group, row)));
        all.filter(|(group, (tp, at))| self.now.get(*group).and_then(|rows| rows.get(*tp)) != Some(at))
            .count()
    }
}

/// Positions below the end, by partition, the lowest of all groups; and whether there is anything to set at all.
fn lowest(known: &BTreeMap<String, Positions>, ends: &BTreeMap<Tp, i64>) -> BTreeMap<Tp, i64> {
    let mut low = BTreeMap::<Tp, i64>::new();
    for (tp, position) in known.values().flatten() {
        if ends.get(tp).is_some_and(|end| position < end) {
            low.entry(tp.clone()).and_modify(|at| *at = (*at).min(*position)).or_insert(*position);
        }
    }
    low
}

impl KafkaPlane {
    /// Where each group stands at the source and has to stand at the target: one read of each site for all groups.
    async fn wanted(&self, act: &Act, until: Deadline) -> Result<Wanted, PlaneError> {
        let (Some(source_ends), Some(target_ends)) = (act.source_ends(), act.target_ends()) else {
            return Err(PlaneError::refused("DC-0418", "the ends of this run are not known yet"));
        };
        let (source_ends, target_ends) = (log::from_ends(source_ends), log::from_ends(target_ends));
        let carried = self.carried();
        let (source, target) = (&self.source(act)?.cluster, &self.target(act)?.cluster);
        let (source_map, map) =
            futures::try_join!(source.full_map(&carried, until), target.full_map(&carried, until))?;
        let (mut known, now) = futures::try_join!(
            groups::positions(source, &source_map, &self.spec.groups, until),
            groups::positions(target, &map, &self.spec.groups, until)
        )?;
        for positions in known.values_mut() {
            positions.retain(|tp, _| source_ends.contains_key(tp));
        }
        let low = lowest(&known, &source_ends);
        let ranges: BTreeMap<Tp, (i64, i64)> = low
            .iter()
            .map(|(tp, at)| (tp.clone(), (*at, source_ends.get(tp).copied().unwrap_or(*at))))
            .collect();
        let (at_source, at_target) = futures::try_join!(
            log::prints(source, &source_map, &ranges, LEFT_MAX, until),
            self.lasts(target, &map, &ranges, &target_ends, until)
        )?;
        // The first guess at the target rests on offsets; what the source really holds decides.
        let at_target = self.enough(target, &map, &at_source, at_target, &target_ends, until).await?;
        let none = Vec::new();
        let mut positions = BTreeMap::<String, Positions>::new();
        for (group, rows) in &known {
            let into = positions.entry(group.clone()).or_default();
            for (tp, at) in rows {
                let end = target_ends.get(tp).copied().unwrap_or(0);
                let (here, there) = (at_source.get(tp).unwrap_or(&none), at_target.get(tp).unwrap_or(&none));
                let found = translate::position(*at, here, there, end).map_err(|cause| {
                    let why = format!("{group} {}/{} at {at}: {cause}", tp.0, tp.1);
                    PlaneError::refused("DC-0412", why)
                })?;
                into.insert(tp.clone(), found);
            }
        }
        let compared = at_source.values().map(Vec::len).sum();
        Ok(Wanted { map, positions, now, compared })
    }

    /// The last records of the target: twice the source's span, for each transaction there ends in a marker.
    async fn lasts(
        &self,
        target: &Cluster,
        map: &Map,
        source: &BTreeMap<Tp, (i64, i64)>,
        ends: &BTreeMap<Tp, i64>,
        until: Deadline,
    ) -> Result<BTreeMap<Tp, Vec<Print>>, PlaneError> {
        let ranges = source.iter().map(|(tp, (from, to))| {
            let end = ends.get(tp).copied().unwrap_or(0);
            (tp.clone(), ((end - 2 * (to - from) - 100).max(0), end))
        });
        log::prints(target, map, &ranges.collect(), usize::MAX, until).await
    }

    /// Reads further back wherever the target showed fewer records than the source has left.
    async fn enough(
        &self,
        target: &Cluster,
        map: &Map,
        source: &BTreeMap<Tp, Vec<Print>>,
        mut found: BTreeMap<Tp, Vec<Print>>,
        ends: &BTreeMap<Tp, i64>,
        until: Deadline,
    ) -> Result<BTreeMap<Tp, Vec<Print>>, PlaneError> {
        let lacks = |found: &BTreeMap<Tp, Vec<Print>>| -> Vec<Tp> {
            let short = |tp: &Tp, all: &Vec<Print>| found.get(tp).map_or(0, Vec::len) < all.len();
            source.iter().filter(|(tp, all)| short(tp, all)).map(|(tp, _)| tp.clone()).collect()
        };
        let mut short = lacks(&found);
        if short.is_empty() {
            return Ok(found);
        }
        let topics = short.iter().map(|tp| tp.0.as_str()).collect();
        let starts = log::ends(target, map, &topics, End::Start, until).await?;
        let mut span = 4_096_i64;
        while !short.is_empty() {
            let ranges: BTreeMap<Tp, (i64, i64)> = short
                .iter()
                .map(|tp| {
                    let (start, end) =
                        (starts.get(tp).copied().unwrap_or(0), ends.get(tp).copied().unwrap_or(0));
                    (tp.clone(), ((end - span).max(start), end))
                })
                .collect();
            found.extend(log::prints(target, map, &ranges, usize::MAX, until).await?);
            let whole = |tp: &Tp| ranges.get(tp).is_some_and(|r| Some(&r.0) == starts.get(tp));
            short = lacks(&found).into_iter().filter(|tp| !whole(tp)).collect();
            span = span.saturating_mul(4);
        }
        Ok(found)
    }

    fn told(wanted: &Wanted, site: &dc_core::ids::SiteId) -> String {
        let rows: usize = wanted.positions.values().map(BTreeMap::len).sum();
        format!(
            "{rows} positions of {} groups stand at {site} as wanted, {} records compared",
            wanted.positions.len(),
            wanted.compared,
        )
    }

    pub(super) async fn offsets_are_set(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let wanted = Box::pin(self.wanted(act, until)).await?;
        let same = wanted.differing() == 0;
        Ok(same.then(|| Evidence::already(Self::told(&wanted, &act.target))))
    }

    pub(super) async fn set_offsets(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let wanted = Box::pin(self.wanted(act, until)).await?;
        let differing = wanted.differing();
        if differing == 0 {
            return Ok(Evidence::already(Self::told(&wanted, &act.target)));
        }
        groups::set(&self.target(act)?.cluster, &wanted.map, &wanted.positions, until).await?;
        Ok(Evidence::changed(format!("{}, {differing} of them set now", Self::told(&wanted, &act.target))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_from_the_lowest_position_of_all_groups_and_not_where_all_are_at_the_end() {
        let tp = |p: i32| ("t".to_owned(), p);
        let ends = BTreeMap::from([(tp(0), 10), (tp(1), 10)]);
        let known = BTreeMap::from([
            ("a".to_owned(), BTreeMap::from([(tp(0), 7), (tp(1), 10)])),
            ("b".to_owned(), BTreeMap::from([(tp(0), 4), (tp(1), 12), (tp(9), 1)])),
        ]);
        assert_eq!(lowest(&known, &ends), BTreeMap::from([(tp(0), 4)]));
    }
}
