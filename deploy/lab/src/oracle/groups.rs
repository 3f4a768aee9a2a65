//! Judges the positions of consumer groups across a move: the next record of each group must be the one it would have
//! read at the old site. Compared by content, because offsets differ between sites.

use std::collections::{BTreeMap, BTreeSet};

use crate::history::Id;
use crate::oracle::{Findings, Reason, Window};
use crate::world::Plane;

/// Where a group stood on one partition when it left, told by content: the record before its position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// The record before the last acknowledged position. `None`: nothing was ever committed.
    pub acked: Option<Id>,
    /// Records before positions whose commit got no answer after that.
    pub unknown: BTreeSet<Id>,
}

/// Where a group stands on one partition at the new site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Index into the partition's records of the committed position, as the broker says. `None`: no position there.
    pub committed: Option<usize>,
    /// Index of the first record that a member was given there.
    pub first: Option<usize>,
}

/// One partition of one group.
#[derive(Debug, Clone)]
pub struct Position<'a> {
    /// Group and partition, for people.
    pub name: String,
    /// Records of the partition at the new site, in stored order.
    pub records: &'a [Id],
    /// Where the group stood.
    pub left: Left,
    /// Where it stands.
    pub found: Found,
}

/// What was seen of all groups in a move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Partitions whose position was compared.
    pub positions: usize,
    /// Records that a group got again although it had committed them.
    pub reread: usize,
    /// Records that a group never got.
    pub skipped: usize,
}

/// Judges all positions.
pub fn judge(w: &Window, positions: &[Position<'_>]) -> (Seen, Vec<Reason>) {
    let mut found = Findings::new(Plane::Kafka, w.number);
    let mut seen = Seen::default();
    let mut wrong: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for p in positions {
        let index = |id: &Id| p.records.iter().position(|r| r == id).map(|i| i + 1);
        let Some(acked) = &p.left.acked else { continue };
        let Some(least) = index(acked) else { continue }; // the record itself is lost: told by `lost`
        let most = p.left.unknown.iter().filter_map(index).max().unwrap_or(least).max(least);
        seen.positions += 1;
        for at in [p.found.committed.or(Some(0)), p.found.first].into_iter().flatten() {
            if at < least {
                seen.reread = seen.reread.max(least - at);
                wrong.entry("group_reread").or_default().push(format!("{} at {at}, left at {least}", p.name));
            }
            if at > most {
                seen.skipped = seen.skipped.max(at - most);
                wrong.entry("group_skipped").or_default().push(format!("{} at {at}, left at {most}", p.name));
            }
        }
    }
    for (check, names) in wrong {
        found.fail_if(true, check, || format!("positions moved: {}", names.join("; ")));
    }
    found.invalid_if(seen.positions == 0, "thin_groups", || {
        "no consumer group had a position to compare".into()
    });
    (seen, found.reasons)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Verdict;
    use crate::world::{FRA, ROME};

    const W: Window = Window { number: 1, from: 0, asked: 1, to: 2, source: ROME, target: FRA, moved: true };
    const RECORDS: [Id; 5] = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5)];

    fn run(
        acked: Option<Id>,
        unknown: &[Id],
        committed: Option<usize>,
        first: Option<usize>,
    ) -> (Seen, Vec<(&'static str, Verdict)>) {
        let left = Left { acked, unknown: unknown.iter().copied().collect() };
        let found = Found { committed, first };
        let position = Position { name: "billing orders-0".into(), records: &RECORDS, left, found };
        let (seen, reasons) = judge(&W, &[position]);
        (seen, reasons.into_iter().map(|r| (r.check, r.verdict)).collect())
    }

    #[test]
    fn passes_an_exact_position() {
        let (seen, reasons) = run(Some((1, 3)), &[], Some(3), Some(3));
        assert_eq!((seen, reasons), (Seen { positions: 1, reread: 0, skipped: 0 }, vec![]));
    }

    #[test]
    fn fails_when_a_group_reads_again() {
        assert_eq!(run(Some((1, 3)), &[], Some(1), Some(1)).1, [("group_reread", Verdict::Fail)]);
        assert_eq!(run(Some((1, 3)), &[], None, None).1, [("group_reread", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_a_group_skips() {
        assert_eq!(run(Some((1, 3)), &[], Some(4), None).1, [("group_skipped", Verdict::Fail)]);
        assert_eq!(run(Some((1, 3)), &[], Some(3), Some(5)).1, [("group_skipped", Verdict::Fail)]);
    }

    #[test]
    fn allows_a_commit_of_unknown_outcome_either_way() {
        assert_eq!(run(Some((1, 2)), &[(1, 4)], Some(2), Some(2)).1, []);
        assert_eq!(run(Some((1, 2)), &[(1, 4)], Some(4), Some(4)).1, []);
        assert_eq!(run(Some((1, 2)), &[(1, 4)], Some(5), None).1, [("group_skipped", Verdict::Fail)]);
    }

    #[test]
    fn is_invalid_when_no_group_had_a_position() {
        assert_eq!(run(None, &[], None, None).1, [("thin_groups", Verdict::Invalid)]);
    }
}
