//! Judges Airflow by the marks that tasks leave outside every plane: nothing ends twice, nothing starts at the old
//! site after the fence, reruns only where the DAG's policy allows them, no accepted run disappears.

use std::collections::{BTreeMap, BTreeSet};

use crate::oracle::{Findings, Reason, Window, ms_between};
use crate::world::{Plane, Site};

/// What a task said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It began.
    Start,
    /// It came to its end.
    End,
}

/// One task instance.
pub type Task = (String, String, String, i64);

/// One line of the marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// When, on the boot clock.
    pub at: u64,
    /// The site whose Airflow ran it.
    pub site: Site,
    /// DAG, run, task, map index.
    pub task: Task,
    /// Which try.
    pub attempt: u32,
    /// The DAG release that the code came from.
    pub release: u64,
    /// Begin or end.
    pub phase: Phase,
    /// Process that ran it.
    pub pid: u32,
}

/// Reads the marks. `shift` is what the wall clock is ahead of the boot clock.
///
/// A line that is not a whole mark (one being written) is left out.
pub fn parse(text: &str, shift: u64) -> Vec<Mark> {
    text.lines().filter_map(|line| parse_line(line, shift)).collect()
}

fn parse_line(line: &str, shift: u64) -> Option<Mark> {
    let f: Vec<&str> = line.split('\t').collect();
    let [at, site, dag, run, task, map, attempt, release, phase, pid] = f.as_slice() else { return None };
    let (seconds, fraction) = at.split_once('.').unwrap_or((at, "0"));
    let nanos: u64 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let wall = seconds.parse::<u64>().ok()? * 1_000_000_000 + nanos;
    let phase = match *phase {
        "start" => Phase::Start,
        "end" => Phase::End,
        _ => return None,
    };
    Some(Mark {
        at: wall.saturating_sub(shift),
        site: Site::named(site)?,
        task: ((*dag).to_string(), (*run).to_string(), (*task).to_string(), map.parse().ok()?),
        attempt: attempt.parse().ok()?,
        release: release.parse().unwrap_or(0),
        phase,
        pid: pid.parse().ok()?,
    })
}

/// What else the oracle knows of Airflow in a move.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// When the old site was seen fenced: the first refused request to start a run.
    pub fence: Option<u64>,
    /// Runs whose request was accepted before the window's end.
    pub accepted: BTreeSet<String>,
    /// Runs that the new site's Airflow knows.
    pub known: BTreeSet<String>,
    /// Runs that the old site accepted: each stays with the DAG release of its time.
    pub older: BTreeSet<String>,
    /// Accepted runs that have not ended although they had time to.
    pub unfinished: BTreeSet<String>,
    /// The newest DAG release published before the move was asked for; 0 if none.
    pub release: u64,
}

/// Least evidence of a move.
#[derive(Debug, Clone, Copy)]
pub struct Least {
    /// Task ends at each site.
    pub runs: usize,
    /// Tasks running when the fence came; 0 in a timing run.
    pub backlog: usize,
}

/// What was seen of Airflow in a move.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// Task runs that ended at the old and at the new site.
    pub ended: (usize, usize),
    /// Tasks that ran when the old site stopped starting any.
    pub running_at_fence: usize,
    /// Accepted runs that disappeared.
    pub lost: usize,
    /// Ends beyond the first.
    pub duplicated: usize,
    /// How long the old site started tasks after the new one had.
    pub overlap_ms: f64,
}

/// Judges all marks so far against one move.
pub fn judge(marks: &[Mark], w: &Window, facts: &Facts, least: Least) -> (Seen, Vec<Reason>) {
    let mut found = Findings::new(Plane::Airflow, w.number);
    let inside = |m: &&Mark| m.at > w.from && m.at <= w.to;
    let ends =
        |site: Site| marks.iter().filter(inside).filter(|m| m.site == site && m.phase == Phase::End).count();
    let starts = |site: Site| {
        marks.iter().filter(inside).filter(move |m| m.site == site && m.phase == Phase::Start).map(|m| m.at)
    };
    let last_old = starts(w.source).max();
    let first_new = starts(w.target).min();
    let seen = Seen {
        ended: (ends(w.source), ends(w.target)),
        running_at_fence: running_at(marks, w, last_old),
        lost: facts.accepted.difference(&facts.known).count(),
        duplicated: twice(marks, w, &mut found),
        overlap_ms: last_old.zip(first_new).map_or(0.0, |(old, new)| ms_between(new, old)),
    };
    found.fail_if(seen.overlap_ms > 0.0, "overlap", || {
        format!("{} started a task {:.0} ms after {} had begun to", w.source, seen.overlap_ms, w.target)
    });
    let late = facts.fence.map_or(0, |fence| starts(w.source).filter(|at| *at > fence).count());
    found.fail_if(late > 0, "started_after_fence", || {
        format!("{late} tasks started at {} after its fence", w.source)
    });
    found.fail_if(seen.lost > 0, "lost", || {
        let runs: Vec<&String> = facts.accepted.difference(&facts.known).take(5).collect();
        format!("{} accepted runs are unknown at {}, such as {runs:?}", seen.lost, w.target)
    });
    found.fail_if(!facts.unfinished.is_empty(), "unfinished", || {
        format!(
            "{} accepted runs never ended, such as {:?}",
            facts.unfinished.len(),
            facts.unfinished.iter().next()
        )
    });
    reruns(marks, w, &mut found);
    releases(marks, w, facts, &mut found);
    found.fail_if(first_new.is_none(), "not_open", || {
        format!("no task started at {} after the move", w.target)
    });
    if !w.moved {
        return (seen, found.reasons);
    }
    found.invalid_if(seen.ended.0 < least.runs, "thin_before", || {
        format!("{} task runs at {}, {} needed", seen.ended.0, w.source, least.runs)
    });
    found.invalid_if(seen.ended.1 < least.runs, "thin_after", || {
        format!("{} task runs at {}, {} needed", seen.ended.1, w.target, least.runs)
    });
    found.invalid_if(facts.fence.is_none(), "thin_refused", || {
        format!("no request to start a run was refused at {}", w.source)
    });
    found.invalid_if(seen.running_at_fence < least.backlog, "no_backlog", || {
        format!("no task ran at {} when it was asked to stop", w.source)
    });
    (seen, found.reasons)
}

/// Tasks that were running at the old site when the move was asked for, or when it started its last one.
fn running_at(marks: &[Mark], w: &Window, last_start: Option<u64>) -> usize {
    let at = last_start.unwrap_or(w.asked).max(w.asked);
    let mut open: BTreeSet<(&Task, u32)> = BTreeSet::new();
    let mut order: Vec<&Mark> = marks.iter().filter(|m| m.site == w.source && m.at <= at).collect();
    order.sort_by_key(|m| m.at);
    for m in order {
        match m.phase {
            Phase::Start => open.insert((&m.task, m.attempt)),
            Phase::End => open.remove(&(&m.task, m.attempt)),
        };
    }
    open.len()
}

fn by_task(marks: &[Mark]) -> BTreeMap<&Task, Vec<&Mark>> {
    let mut tasks: BTreeMap<&Task, Vec<&Mark>> = BTreeMap::new();
    for m in marks {
        tasks.entry(&m.task).or_default().push(m);
    }
    for of in tasks.values_mut() {
        of.sort_by_key(|m| m.at);
    }
    tasks
}

fn twice(marks: &[Mark], w: &Window, found: &mut Findings) -> usize {
    let mut extra = 0;
    let mut names = Vec::new();
    for (task, of) in by_task(marks) {
        let ends: Vec<&&Mark> = of.iter().filter(|m| m.phase == Phase::End).collect();
        let here = ends.iter().skip(1).filter(|m| m.at > w.from && m.at <= w.to).count();
        if here > 0 {
            extra += here;
            names.push(format!("{}/{}", task.0, task.1));
        }
    }
    found.fail_if(extra > 0, "duplicated", || format!("{extra} ends too many: {}", names.join(" ")));
    extra
}

/// A second start needs a policy that allows it, and a first one that is over.
fn reruns(marks: &[Mark], w: &Window, found: &mut Findings) {
    let (mut forbidden, mut alive) = (Vec::new(), Vec::new());
    for (task, of) in by_task(marks) {
        let starts: Vec<&&Mark> = of.iter().filter(|m| m.phase == Phase::Start).collect();
        for pair in starts.windows(2).filter(|p| p[1].at > w.from && p[1].at <= w.to) {
            if !may_rerun(&task.0) {
                forbidden.push(format!("{}/{}", task.0, task.1));
            }
            let end =
                of.iter().find(|m| m.phase == Phase::End && m.pid == pair[0].pid && m.site == pair[0].site);
            if end.is_some_and(|e| e.at > pair[1].at) {
                alive.push(format!("{}/{}", task.0, task.1));
            }
        }
    }
    found.fail_if(!forbidden.is_empty(), "rerun_against_policy", || {
        format!("started again: {}", forbidden.join(" "))
    });
    found.fail_if(!alive.is_empty(), "two_copies", || format!("two copies ran at once: {}", alive.join(" ")));
}

/// DAGs whose name ends with the word of a policy that forbids a rerun.
fn may_rerun(dag: &str) -> bool {
    !(dag.ends_with("_fail") || dag.ends_with("_hold"))
}

/// Runs that the new site accepted come from the newest release published before the move, or a later one.
fn releases(marks: &[Mark], w: &Window, facts: &Facts, found: &mut Findings) {
    let stale = marks
        .iter()
        .filter(|m| m.site == w.target && m.at > w.asked && m.at <= w.to && m.release < facts.release)
        .filter(|m| !facts.older.contains(&m.task.1))
        .count();
    found.fail_if(stale > 0, "stale_release", || {
        format!("{stale} marks at {} come from DAGs older than release {}", w.target, facts.release)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Verdict;
    use crate::world::{FRA, ROME};

    const W: Window =
        Window { number: 1, from: 0, asked: 300, to: 10_000, source: ROME, target: FRA, moved: true };
    const LEAST: Least = Least { runs: 2, backlog: 1 };

    fn mark(at: u64, site: Site, run: &str, phase: Phase) -> Mark {
        let task = ("lab_rerun".to_string(), run.to_string(), "work".to_string(), -1);
        Mark { at, site, task, attempt: 1, release: 7, phase, pid: u32::from(site.index) }
    }

    fn both(from: u64, to: u64, site: Site, run: &str) -> [Mark; 2] {
        [mark(from, site, run, Phase::Start), mark(to, site, run, Phase::End)]
    }

    fn clean() -> Vec<Mark> {
        [
            both(100, 200, ROME, "a"),
            both(250, 350, ROME, "b"),
            both(600, 700, FRA, "c"),
            both(710, 800, FRA, "d"),
        ]
        .concat()
    }

    fn facts() -> Facts {
        let runs: BTreeSet<String> = ["a", "b", "c", "d"].map(String::from).into();
        Facts {
            fence: Some(400),
            accepted: runs.clone(),
            known: runs,
            older: BTreeSet::new(),
            unfinished: BTreeSet::new(),
            release: 7,
        }
    }

    fn checks(marks: &[Mark], facts: &Facts) -> Vec<(&'static str, Verdict)> {
        judge(marks, &W, facts, LEAST).1.into_iter().map(|r| (r.check, r.verdict)).collect()
    }

    #[test]
    fn passes_a_clean_move() {
        let (seen, reasons) = judge(&clean(), &W, &facts(), LEAST);
        assert_eq!(reasons, []);
        assert_eq!((seen.ended, seen.running_at_fence), ((2, 2), 1));
    }

    #[test]
    fn fails_when_a_task_ends_twice() {
        let marks = [clean(), both(900, 950, FRA, "a").to_vec()].concat();
        assert_eq!(checks(&marks, &facts()), [("duplicated", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_the_old_site_starts_a_task_after_the_fence() {
        let marks = [clean(), both(450, 460, ROME, "e").to_vec()].concat();
        assert_eq!(checks(&marks, &facts()), [("started_after_fence", Verdict::Fail)]);
        let marks = [clean(), both(650, 660, ROME, "e").to_vec()].concat();
        let reasons = checks(&marks, &facts());
        assert!(reasons.contains(&("overlap", Verdict::Fail)), "{reasons:?}");
    }

    #[test]
    fn fails_when_a_task_is_rerun_against_its_policy() {
        let mut marks = clean();
        let mut first = mark(280, ROME, "h", Phase::Start);
        first.task.0 = "lab_hold".into();
        let mut second = Mark { at: 820, site: FRA, ..first.clone() };
        second.attempt = 2;
        marks.extend([first, second]);
        assert_eq!(checks(&marks, &facts()), [("rerun_against_policy", Verdict::Fail)]);
    }

    #[test]
    fn allows_a_rerun_by_policy_of_a_task_that_did_not_end() {
        let mut marks = clean();
        marks.push(mark(280, ROME, "r", Phase::Start));
        marks.extend(both(820, 900, FRA, "r"));
        assert_eq!(checks(&marks, &facts()), []);
    }

    #[test]
    fn fails_when_two_copies_of_a_task_run_at_once() {
        let mut marks = clean();
        marks.push(mark(290, ROME, "r", Phase::Start));
        marks.push(mark(820, FRA, "r", Phase::Start));
        marks.push(mark(850, ROME, "r", Phase::End));
        assert_eq!(checks(&marks, &facts()), [("two_copies", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_an_accepted_run_disappears_or_never_ends() {
        let mut f = facts();
        f.accepted.insert("gone".into());
        assert_eq!(checks(&clean(), &f), [("lost", Verdict::Fail)]);
        let mut f = facts();
        f.unfinished.insert("b".into());
        assert_eq!(checks(&clean(), &f), [("unfinished", Verdict::Fail)]);
    }

    #[test]
    fn fails_when_the_new_site_runs_an_older_release() {
        let f = Facts { release: 8, ..facts() };
        assert_eq!(checks(&clean(), &f), [("stale_release", Verdict::Fail)]);
        let f = Facts { older: ["c", "d"].map(String::from).into(), ..f };
        assert_eq!(checks(&clean(), &f), [], "asked for at the old site: the release of that time");
    }

    #[test]
    fn is_invalid_with_too_few_runs_or_nothing_running_at_the_fence() {
        assert_eq!(checks(&clean()[2..], &facts()), [("thin_before", Verdict::Invalid)]);
        assert_eq!(checks(&clean()[..6], &facts()), [("thin_after", Verdict::Invalid)]);
        let f = Facts { fence: None, ..facts() };
        assert_eq!(checks(&clean(), &f), [("thin_refused", Verdict::Invalid)]);
        let idle = [
            both(100, 200, ROME, "a"),
            both(210, 220, ROME, "b"),
            both(600, 700, FRA, "c"),
            both(710, 800, FRA, "d"),
        ]
        .concat();
        assert_eq!(checks(&idle, &facts()), [("no_backlog", Verdict::Invalid)]);
    }

    #[test]
    fn reads_the_line_a_task_writes_and_skips_a_torn_one() {
        let text = "1700000000.250\trome\tlab_rerun\tr1\twork\t-1\t1\t7\tstart\t42\n1700000001.0\trome\tlab";
        let marks = parse(text, 1_700_000_000_000_000_000);
        assert_eq!(marks.len(), 1);
        assert_eq!((marks[0].at, marks[0].pid, marks[0].phase), (250_000_000, 42, Phase::Start));
    }
}
