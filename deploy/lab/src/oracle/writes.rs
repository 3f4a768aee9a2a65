//! Judges the writes of one plane in one move: lost, duplicated, out of order, overlapping, and whether enough was
//! seen to say so.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::history::{Event, Id, Outcome};
use crate::oracle::{Findings, Reason, Window, ms_between};
use crate::world::{Plane, Site};

/// What one site holds: per place (table, partition, bucket) the writes in stored order.
pub type Content = BTreeMap<String, Vec<Id>>;

/// Least evidence per plane, site and move.
#[derive(Debug, Clone, Copy)]
pub struct Least {
    /// Acknowledgements at the old site before the fence.
    pub before: usize,
    /// Refusals at the old site after its last acknowledgement.
    pub refused: usize,
    /// Acknowledgements at the new site.
    pub after: usize,
    /// Acknowledged but not yet readable at the target when the fence came; 0 in a timing run.
    pub backlog: usize,
}

/// Writes that earlier moves were blamed for already: each is reported once.
#[derive(Debug, Default)]
pub struct Known {
    missing: HashSet<Id>,
    extra: HashMap<(Site, Id), usize>,
}

/// What was seen on one plane in one move.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// Acknowledged at the old and at the new site.
    pub acked: (usize, usize),
    /// Refused at both sites.
    pub refused: usize,
    /// Refused at the old site after its last acknowledgement.
    pub refused_after: usize,
    /// Without an answer, at both sites.
    pub unknown: usize,
    /// Acknowledged and missing.
    pub lost: usize,
    /// Copies beyond the first.
    pub duplicated: usize,
    /// How long the old site acknowledged after the new one had.
    pub overlap_ms: f64,
    /// Last acknowledgement at the old site to the first at the new one.
    pub outage_ms: Option<f64>,
}

/// The time of the last acknowledgement at the old site and of the first one at the new site.
pub fn edges(events: &[Event], w: &Window) -> (Option<u64>, Option<u64>) {
    let acked = |site: Site| {
        in_window(events, w).filter(move |e| e.site == site && e.outcome == Outcome::Acked).map(|e| e.done)
    };
    (acked(w.source).max(), acked(w.target).min())
}

/// The first refusal at the old site after its last acknowledgement: the fence as a client saw it.
pub fn fence_seen(events: &[Event], w: &Window) -> Option<u64> {
    let last = edges(events, w).0.unwrap_or(w.from);
    let refused = |e: &&Event| {
        e.site == w.source && e.outcome == Outcome::Refused && e.done > last && e.done >= w.asked
    };
    in_window(events, w).filter(refused).map(|e| e.done).min()
}

fn in_window<'a>(events: &'a [Event], w: &Window) -> impl Iterator<Item = &'a Event> {
    let (from, to) = (w.from, w.to);
    events.iter().filter(move |e| e.done > from && e.done <= to)
}

/// Judges one plane: its whole history, the contents of both sites as read after `w.to`, and the backlog.
pub fn judge(
    plane: Plane,
    events: &[Event],
    w: &Window,
    contents: (&Content, &Content),
    backlog: Option<usize>,
    least: Least,
    known: &mut Known,
) -> (Seen, Vec<Reason>) {
    let mut found = Findings::new(plane, w.number);
    let seen = count(events, w);
    let (target, source) = contents;
    let seen = Seen {
        lost: lost(events, w, target, known, &mut found),
        duplicated: duplicated(w.target, target, known, &mut found)
            + duplicated(w.source, source, known, &mut found),
        ..seen
    };
    ghosts(events, target, w, &mut found);
    disorder(w.target, target, &mut found);
    disorder(w.source, source, &mut found);
    behind(events, w, source, target, &mut found);
    found.fail_if(seen.overlap_ms > 0.0, "overlap", || {
        format!("{} acknowledged {:.1} ms after {} had begun to", w.source, seen.overlap_ms, w.target)
    });
    found.fail_if(seen.acked.1 == 0, "not_open", || {
        format!("{} acknowledged nothing after the move", w.target)
    });
    if w.moved {
        thin(&seen, backlog, least, w, &mut found);
    }
    (seen, found.reasons)
}

fn count(events: &[Event], w: &Window) -> Seen {
    let of = |site: Site, what: Outcome| {
        in_window(events, w).filter(|e| e.site == site && e.outcome == what).count()
    };
    let (last, first) = edges(events, w);
    let after =
        |e: &&Event| e.site == w.source && e.outcome == Outcome::Refused && e.done > last.unwrap_or(w.from);
    Seen {
        acked: (of(w.source, Outcome::Acked), of(w.target, Outcome::Acked)),
        refused: of(w.source, Outcome::Refused) + of(w.target, Outcome::Refused),
        refused_after: in_window(events, w).filter(after).count(),
        unknown: of(w.source, Outcome::Unknown) + of(w.target, Outcome::Unknown),
        overlap_ms: last.zip(first).map_or(0.0, |(last, first)| ms_between(first, last)),
        outage_ms: last.zip(first).map(|(last, first)| ms_between(last, first)),
        ..Seen::default()
    }
}

fn lost(events: &[Event], w: &Window, target: &Content, known: &mut Known, found: &mut Findings) -> usize {
    let held: HashSet<Id> = target.values().flatten().copied().collect();
    let acked = events.iter().filter(|e| e.outcome == Outcome::Acked && e.done <= w.to);
    let missing: BTreeSet<Id> =
        acked.map(|e| e.id).filter(|id| !held.contains(id) && !known.missing.contains(id)).collect();
    found.fail_if(!missing.is_empty(), "lost", || {
        format!(
            "{} acknowledged writes are missing at {}, such as {}",
            missing.len(),
            w.target,
            some(&missing)
        )
    });
    known.missing.extend(&missing);
    missing.len()
}

fn duplicated(site: Site, content: &Content, known: &mut Known, found: &mut Findings) -> usize {
    let mut copies: HashMap<Id, usize> = HashMap::new();
    content.values().flatten().for_each(|id| *copies.entry(*id).or_default() += 1);
    let mut extra = 0;
    let mut ids = BTreeSet::new();
    for (id, n) in copies.into_iter().filter(|(_, n)| *n > 1) {
        let before = known.extra.insert((site, id), n - 1).unwrap_or(0);
        if n - 1 > before {
            extra += n - 1 - before;
            ids.insert(id);
        }
    }
    found.fail_if(extra > 0, "duplicated", || {
        format!("{extra} copies too many at {site}, such as {}", some(&ids))
    });
    extra
}

/// A write that the client was told does not stand, and that stands.
fn ghosts(events: &[Event], target: &Content, w: &Window, found: &mut Findings) {
    let held: HashSet<Id> = target.values().flatten().copied().collect();
    let tried = in_window(events, w);
    let ids: BTreeSet<Id> =
        tried.filter(|e| e.outcome == Outcome::Refused && held.contains(&e.id)).map(|e| e.id).collect();
    found.fail_if(!ids.is_empty(), "ghost", || {
        format!("{} refused writes stand at {}, such as {}", ids.len(), w.target, some(&ids))
    });
}

/// In one place the numbers of one writer only rise.
fn disorder(site: Site, content: &Content, found: &mut Findings) {
    let mut wrong = BTreeSet::new();
    for writes in content.values() {
        let mut last: HashMap<u16, u64> = HashMap::new();
        for (writer, seq) in writes {
            let highest = last.entry(*writer).or_insert(*seq);
            if seq < highest {
                wrong.insert((*writer, *seq));
            }
            *highest = (*highest).max(*seq);
        }
    }
    found.fail_if(!wrong.is_empty(), "order", || {
        format!("{} writes out of order at {site}, such as {}", wrong.len(), some(&wrong))
    });
}

/// The site that was left must hold by now what the new one acknowledged before the window's end.
fn behind(events: &[Event], w: &Window, source: &Content, target: &Content, found: &mut Findings) {
    let held: HashSet<Id> = source.values().flatten().copied().collect();
    let there: HashSet<Id> = target.values().flatten().copied().collect();
    let acked = events.iter().filter(|e| e.outcome == Outcome::Acked && e.done <= w.to).map(|e| e.id);
    let missing: BTreeSet<Id> = acked.filter(|id| there.contains(id) && !held.contains(id)).collect();
    found.fail_if(!missing.is_empty(), "standby_behind", || {
        format!(
            "{} acknowledged writes did not come to {} in the turned direction, such as {}",
            missing.len(),
            w.source,
            some(&missing)
        )
    });
}

fn thin(seen: &Seen, backlog: Option<usize>, least: Least, w: &Window, found: &mut Findings) {
    let (before, after) = seen.acked;
    found.invalid_if(before < least.before, "thin_before", || {
        format!("{before} acknowledgements at {}, {} needed", w.source, least.before)
    });
    found.invalid_if(seen.refused_after < least.refused, "thin_refused", || {
        format!("{} refusals at {} after the fence, {} needed", seen.refused_after, w.source, least.refused)
    });
    found.invalid_if(after < least.after, "thin_after", || {
        format!("{after} acknowledgements at {}, {} needed", w.target, least.after)
    });
    let waiting = backlog.unwrap_or(0);
    found.invalid_if(waiting < least.backlog, "no_backlog", || {
        format!(
            "{waiting} writes were acknowledged and not yet readable at {} when the fence came, {} needed",
            w.target, least.backlog
        )
    });
}

fn some(ids: &BTreeSet<Id>) -> String {
    let shown: Vec<String> = ids.iter().take(5).map(|(w, s)| format!("{w}/{s}")).collect();
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Verdict;
    use crate::world::{FRA, ROME};

    const W: Window =
        Window { number: 1, from: 0, asked: 300, to: 1_000_000_000, source: ROME, target: FRA, moved: true };
    const LEAST: Least = Least { before: 3, refused: 2, after: 3, backlog: 1 };

    fn event(site: Site, writer: u16, seq: u64, done: u64, outcome: Outcome) -> Event {
        Event { site, id: (writer, seq), sent: done - 1, done: done * 1000, outcome }
    }

    /// A clean move: three writes at rome, refusals, three writes at fra.
    fn clean() -> Vec<Event> {
        let mut events = Vec::new();
        for k in 1..=3 {
            events.push(event(ROME, 1, k, 100 + k, Outcome::Acked));
            events.push(event(FRA, 2, k, 100 + k, Outcome::Refused));
            events.push(event(ROME, 1, 10 + k, 400 + k, Outcome::Refused));
            events.push(event(FRA, 2, 10 + k, 600 + k, Outcome::Acked));
        }
        events
    }

    fn content(ids: &[Id]) -> Content {
        Content::from([("t".to_string(), ids.to_vec())])
    }

    const ALL: [Id; 6] = [(1, 1), (1, 2), (1, 3), (2, 11), (2, 12), (2, 13)];

    fn checks(
        events: &[Event],
        target: &[Id],
        source: &[Id],
        backlog: Option<usize>,
    ) -> (Seen, Vec<(&'static str, Verdict)>) {
        let (target, source) = (content(target), content(source));
        let (seen, reasons) =
            judge(Plane::Postgres, events, &W, (&target, &source), backlog, LEAST, &mut Known::default());
        (seen, reasons.into_iter().map(|r| (r.check, r.verdict)).collect())
    }

    #[test]
    fn passes_a_clean_move() {
        let (seen, reasons) = checks(&clean(), &ALL, &ALL, Some(1));
        assert_eq!(reasons, []);
        assert_eq!((seen.acked, seen.refused_after, seen.outage_ms), ((3, 3), 3, Some(0.498)));
    }

    #[test]
    fn fails_when_an_acknowledged_write_is_missing_at_the_new_site() {
        let (seen, reasons) = checks(&clean(), &ALL[1..], &ALL, Some(1));
        assert_eq!(reasons, [("lost", Verdict::Fail)]);
        assert_eq!(seen.lost, 1);
    }

    #[test]
    fn blames_a_lost_write_once() {
        let mut known = Known::default();
        let (target, source) = (content(&ALL[1..]), content(&ALL));
        let first = judge(Plane::Kafka, &clean(), &W, (&target, &source), Some(1), LEAST, &mut known);
        let second = judge(Plane::Kafka, &clean(), &W, (&target, &source), Some(1), LEAST, &mut known);
        assert_eq!((first.0.lost, second.0.lost), (1, 0));
    }

    #[test]
    fn does_not_miss_a_write_of_unknown_outcome() {
        let mut events = clean();
        events.push(event(ROME, 1, 4, 390, Outcome::Unknown));
        assert_eq!(checks(&events, &ALL, &ALL, Some(1)).1, []);
        let with: Vec<Id> =
            ALL[..3].iter().copied().chain([(1, 4)]).chain(ALL[3..].iter().copied()).collect();
        assert_eq!(checks(&events, &with, &with, Some(1)).1, []);
    }

    #[test]
    fn fails_when_a_write_stands_twice_at_either_site() {
        let twice: Vec<Id> = ALL.iter().copied().chain([(2, 13)]).collect();
        assert_eq!(checks(&clean(), &twice, &ALL, Some(1)).1, [("duplicated", Verdict::Fail)]);
        assert_eq!(checks(&clean(), &ALL, &twice, Some(1)).1, [("duplicated", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_the_old_site_acknowledges_after_the_new_one() {
        let mut events = clean();
        events.push(event(ROME, 1, 20, 650, Outcome::Acked));
        events.extend((1..=3).map(|k| event(ROME, 1, 30 + k, 700 + k, Outcome::Refused)));
        let held: Vec<Id> = ALL.iter().copied().chain([(1, 20)]).collect();
        let (seen, reasons) = checks(&events, &held, &held, Some(1));
        assert_eq!(reasons, [("overlap", Verdict::Fail)]);
        assert!((seen.overlap_ms - 0.049).abs() < 1e-9, "{}", seen.overlap_ms);
    }

    #[test]
    fn fails_when_a_refused_write_stands() {
        let held: Vec<Id> =
            ALL[..3].iter().copied().chain([(1, 11)]).chain(ALL[3..].iter().copied()).collect();
        assert_eq!(checks(&clean(), &held, &held, Some(1)).1, [("ghost", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_writes_of_one_writer_are_out_of_order() {
        let mut held = ALL;
        held.swap(0, 1);
        assert_eq!(checks(&clean(), &held, &ALL, Some(1)).1, [("order", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_the_turned_direction_does_not_carry() {
        assert_eq!(checks(&clean(), &ALL, &ALL[..5], Some(1)).1, [("standby_behind", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_the_new_site_never_opens() {
        let events: Vec<Event> = clean().into_iter().filter(|e| e.site == ROME).collect();
        let reasons = checks(&events, &ALL[..3], &ALL[..3], Some(1)).1;
        assert!(reasons.contains(&("not_open", Verdict::Fail)), "{reasons:?}");
    }

    #[test]
    fn is_invalid_with_too_few_acknowledgements_or_refusals() {
        let few: Vec<Event> = clean().into_iter().filter(|e| e.id != (1, 3)).collect();
        assert_eq!(checks(&few, &ALL, &ALL, Some(1)).1, [("thin_before", Verdict::Invalid)]);
        let few: Vec<Event> = clean().into_iter().filter(|e| e.id != (2, 13)).collect();
        assert_eq!(checks(&few, &ALL, &ALL, Some(1)).1, [("thin_after", Verdict::Invalid)]);
        let few: Vec<Event> = clean().into_iter().filter(|e| e.id.1 < 12 || e.site == FRA).collect();
        assert_eq!(checks(&few, &ALL, &ALL, Some(1)).1, [("thin_refused", Verdict::Invalid)]);
    }

    #[test]
    fn is_invalid_without_a_backlog_at_the_fence() {
        assert_eq!(checks(&clean(), &ALL, &ALL, Some(0)).1, [("no_backlog", Verdict::Invalid)]);
        assert_eq!(checks(&clean(), &ALL, &ALL, None).1, [("no_backlog", Verdict::Invalid)]);
    }

    #[test]
    fn asks_no_evidence_of_a_move_that_was_not_made_but_judges_all_else() {
        let stays = Window { source: FRA, target: ROME, moved: false, ..W };
        let events: Vec<Event> = clean().into_iter().filter(|e| e.site == ROME).collect();
        let (whole, less) = (content(&ALL[..3]), content(&ALL[..2]));
        let judged = |target: &Content| {
            judge(Plane::S3, &events, &stays, (target, &whole), None, LEAST, &mut Known::default()).1
        };
        assert_eq!(judged(&whole), []);
        assert_eq!(judged(&less).into_iter().map(|r| r.check).collect::<Vec<_>>(), ["lost"]);
    }

    #[test]
    fn sees_the_fence_at_the_first_refusal_after_the_last_acknowledgement() {
        assert_eq!(fence_seen(&clean(), &W), Some(401_000));
    }
}
