//! The drain: the source ends, and everything readable in it is at the target.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_core::act::{Act, Evidence, Outcome};
use dc_core::position::Ends;
use dc_plane::{Deadline, PlaneError};

use crate::cluster::{Map, Tp};
use crate::log::{self, End};
use crate::{Half, KafkaPlane};

/// Ranges longer than this are not read yet: the mirror still has most of it to carry.
const READ_WITHIN: i64 = 5_000;
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What of two sets of ends differs, in words.
pub(super) fn moved(before: &Ends, now: &Ends) -> String {
    let (before, now) = (log::from_ends(before), log::from_ends(now));
    let all = before.keys().chain(now.keys().filter(|tp| !before.contains_key(*tp)));
    let differing = all.filter(|tp| before.get(*tp) != now.get(*tp));
    let told: Vec<String> = differing
        .map(|tp| format!("{}/{} from {:?} to {:?}", tp.0, tp.1, before.get(tp), now.get(tp)))
        .collect();
    told.join(", ")
}

/// The drain rule for one partition. `carried` is the source offset of the last record at the target, `end` the
/// source's end.
fn is_drained(carried: Option<i64>, end: i64, rest: Rest) -> bool {
    let next = carried.map_or(0, |at| at + 1);
    next >= end
        || match rest {
            Rest::Unread => false,
            Rest::Empty => true,
            Rest::Last(last) => last < next,
        }
}

/// What was read between the last record carried and the end. Markers and aborted data are never carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Unread,
    /// Nothing readable.
    Empty,
    /// Offset of the last readable record.
    Last(i64),
}

/// Which partitions are not drained, and how far each is.
struct Left {
    /// Where each log of the source begins: what lies before was never to be carried.
    starts: BTreeMap<Tp, i64>,
    rest: BTreeMap<Tp, Rest>,
}

impl Left {
    /// Reads the rest of partitions that are near their end, once each, and returns those not drained.
    async fn look(
        &mut self,
        source: &Half,
        map: &Map,
        ends: &BTreeMap<Tp, i64>,
        carried: &BTreeMap<Tp, i64>,
        until: Deadline,
    ) -> Result<BTreeMap<Tp, i64>, PlaneError> {
        let mut left = BTreeMap::new();
        let mut unread = BTreeMap::new();
        for (tp, end) in ends {
            let at = carried.get(tp).copied();
            if is_drained(at, *end, self.rest.get(tp).copied().unwrap_or(Rest::Unread)) {
                continue;
            }
            let next = at.map_or(0, |at| at + 1).max(self.starts.get(tp).copied().unwrap_or(0));
            left.insert(tp.clone(), end - next);
            if end - next <= READ_WITHIN && !self.rest.contains_key(tp) {
                unread.insert(tp.clone(), (next, *end));
            }
        }
        if unread.is_empty() {
            return Ok(left);
        }
        for (tp, prints) in log::prints(&source.cluster, map, &unread, usize::MAX, until).await? {
            let rest = prints.last().map_or(Rest::Empty, |print| Rest::Last(print.offset));
            if is_drained(carried.get(&tp).copied(), ends.get(&tp).copied().unwrap_or(0), rest) {
                left.remove(&tp);
            }
            self.rest.insert(tp, rest);
        }
        Ok(left)
    }
}

impl KafkaPlane {
    /// Waits until the source has settled and the mirror has carried it all. Reads only.
    pub(super) async fn drain(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let carried = self.carried();
        let (source, target) = (self.source(act)?, self.target(act)?);
        let mirror = act.mirror().unwrap_or(&self.spec.mirror);
        let began = tokio::time::Instant::now();
        let map = source.cluster.full_map(&carried, until).await?;
        let (ends, starts) = futures::try_join!(
            log::settled(&source.cluster, &map, &carried, until),
            log::ends(&source.cluster, &map, &carried, End::Start, until)
        )?;
        let settled = began.elapsed();
        let mut left_over = Left { starts, rest: BTreeMap::new() };
        let mut looks = 0_u32;
        loop {
            looks += 1;
            let topic = &self.config.offsets_topic;
            let at = target.tail.positions(&target.cluster, topic, mirror, until).await?;
            let left = left_over.look(source, &map, &ends, &at, until).await?;
            if left.is_empty() {
                break;
            }
            if until.left() <= LOOK_AGAIN * 5 {
                let told: Vec<String> =
                    left.iter().map(|(tp, n)| format!("{}/{} by at most {n}", tp.0, tp.1)).collect();
                let what = format!("{mirror} to carry everything; behind: {}", told.join(", "));
                return Err(PlaneError::TimedOut { what, waited: began.elapsed() });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let seen = format!(
            "{} partitions of {} ended twice the same after {} ms and are at {} after {} ms ({looks} looks, {} read to their end)",
            ends.len(),
            act.source,
            settled.as_millis(),
            act.target,
            began.elapsed().as_millis(),
            left_over.rest.len(),
        );
        Ok(Evidence::changed(seen).with(Outcome::SourceEnds(log::to_ends(&ends))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drained_is_the_end_reached_or_nothing_readable_before_it() {
        assert!(is_drained(Some(59), 60, Rest::Unread));
        assert!(is_drained(None, 0, Rest::Unread));
        assert!(!is_drained(Some(58), 60, Rest::Unread), "unread: it may hold a record");
        assert!(is_drained(Some(58), 60, Rest::Empty), "only a marker follows");
        assert!(is_drained(Some(58), 60, Rest::Last(58)), "read from earlier on; the last record is carried");
        assert!(!is_drained(Some(57), 60, Rest::Last(58)));
        assert!(!is_drained(None, 3, Rest::Last(0)));
        assert!(is_drained(None, 3, Rest::Empty));
    }

    #[test]
    fn says_which_partition_moved_and_how_far() {
        let before = Ends::from([("t".to_owned(), BTreeMap::from([(0, 5), (1, 7)]))]);
        let now = Ends::from([("t".to_owned(), BTreeMap::from([(0, 5), (1, 8)]))]);
        assert_eq!(moved(&before, &now), "t/1 from Some(7) to Some(8)");
        assert_eq!(moved(&now, &now), "");
    }
}
