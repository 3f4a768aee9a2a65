//! Where a consumer group stands at the other site: at the k-th record from the end, k being how many it has left.
//!
//! After the drain both sites end with the same records; only offsets differ, by markers and aborted data. So the
//! lag in *readable records* names the position, and comparing what is left proves it.

use crate::log::Print;

/// Why a position cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untranslatable {
    /// Fewer records there than the group has left.
    #[error("the group has {left} records to read, the target keeps {kept} of them")]
    Shorter {
        /// At the source.
        left: usize,
        /// At the target.
        kept: usize,
    },
    /// The records differ.
    #[error(
        "record {nth} of {left} from the end differs: source offset {source_offset}, target offset {target_offset}"
    )]
    Differs {
        /// Counted from the end, from 1.
        nth: usize,
        /// How many the group has left.
        left: usize,
        /// Of the record at the source.
        source_offset: i64,
        /// Of the record at the target.
        target_offset: i64,
    },
}

/// The position at the target of a group that stands at `position` at the source.
///
/// `source` holds the readable records from `position` or below up to the end; `target` the last ones of the target,
/// which ends at `target_end`. Both in order.
pub fn position(
    position: i64,
    source: &[Print],
    target: &[Print],
    target_end: i64,
) -> Result<i64, Untranslatable> {
    let left = &source[source.partition_point(|print| print.offset < position)..];
    let Some(kept) = target.len().checked_sub(left.len()) else {
        return Err(Untranslatable::Shorter { left: left.len(), kept: target.len() });
    };
    let same = &target[kept..];
    let differs = left.iter().zip(same).position(|(a, b)| a.of != b.of);
    match differs {
        Some(at) => Err(Untranslatable::Differs {
            nth: left.len() - at,
            left: left.len(),
            source_offset: left[at].offset,
            target_offset: same[at].offset,
        }),
        None => Ok(same.first().map_or(target_end, |print| print.offset)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn print(offset: i64, says: u8) -> Print {
        Print { offset, of: [says; 16] }
    }

    #[test]
    fn a_group_at_the_end_stands_at_the_end_of_the_target_whatever_its_markers() {
        let source = [print(3, 1), print(5, 2)];
        assert_eq!(position(6, &source, &[print(10, 1), print(12, 2)], 14), Ok(14));
        assert_eq!(position(900, &source, &[], 14), Ok(14));
    }

    #[test]
    fn a_lagging_group_stands_at_the_same_record() {
        let source = [print(3, 1), print(5, 2), print(6, 3)];
        let target = [print(8, 9), print(10, 1), print(12, 2), print(13, 3)];
        assert_eq!(position(4, &source, &target, 15), Ok(12));
        assert_eq!(position(0, &source, &target, 15), Ok(10));
    }

    #[test]
    fn refuses_rather_than_skip_when_the_target_keeps_less_or_other_records() {
        let source = [print(3, 1), print(5, 2)];
        let shorter = Untranslatable::Shorter { left: 2, kept: 1 };
        assert_eq!(position(0, &source, &[print(9, 2)], 11), Err(shorter));
        let target = [print(8, 7), print(9, 2)];
        assert!(matches!(position(0, &source, &target, 11), Err(Untranslatable::Differs { nth: 2, .. })));
    }

    proptest! {
        /// The target as a mirror makes it: the same records at growing offsets with gaps, after some of its own.
        #[test]
        fn what_a_group_reads_on_is_what_it_had_left(
            records in prop::collection::vec((1_i64..4, 1_i64..4, any::<u8>()), 0..40),
            older in prop::collection::vec(1_i64..4, 0..5),
            at in 0_i64..150,
        ) {
            let (mut s, mut t) = (0, 0);
            let mut target: Vec<Print> = older.iter().map(|gap| { t += gap; print(t, 0) }).collect();
            let mut source = Vec::new();
            for (a, b, says) in &records {
                s += a;
                t += b;
                source.push(print(s, *says));
                target.push(print(t, *says));
            }
            let found = position(at, &source, &target, t + 2);
            prop_assert!(found.is_ok());
            let from = found.unwrap_or(0);
            let left: Vec<_> = source.iter().filter(|p| p.offset >= at).map(|p| p.of).collect();
            let reads: Vec<_> = target.iter().filter(|p| p.offset >= from).map(|p| p.of).collect();
            prop_assert_eq!(left, reads);
        }
    }
}
