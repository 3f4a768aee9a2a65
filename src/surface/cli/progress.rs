//! A run while it goes: redrawn on a terminal, else a line per step that ended, or an event.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use console::{Term, truncate_str};
use dc_core::ids::SiteId;
use dc_core::plan::Stage;
use dc_core::run::{Run, Status, Step};
use dc_core::time::{WallTime, millis};
use dc_core::view::RunView;
use serde_json::json;

use super::out::{Out, clean, columns, envelope, span};
use super::shape;
use super::table;

/// Shows a run to whoever started the command.
pub(crate) struct Progress<'a> {
    out: &'a Out,
    /// What was told already: step, and where it stood.
    told: BTreeSet<(u32, String)>,
    /// Lines on the screen that the next drawing replaces.
    drawn: usize,
    latest: Option<(RunView, Instant)>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(out: &'a Out) -> Self {
        Self { out, told: BTreeSet::new(), drawn: 0, latest: None }
    }

    /// A newer state of the run.
    pub(crate) fn update(&mut self, view: RunView) {
        if !self.out.live() {
            for (step, past) in all(&view.run) {
                self.tell(&view.run, step, past);
            }
        }
        self.latest = Some((view, Instant::now()));
        self.tick();
    }

    /// Time went on.
    pub(crate) fn tick(&mut self) {
        self.draw(true);
    }

    /// Nothing follows: the last drawing stays and offers nothing more.
    pub(crate) fn finish(&mut self) {
        self.draw(false);
    }

    fn draw(&mut self, going: bool) {
        let Some((view, at)) = self.latest.as_ref().filter(|_| self.out.live()) else { return };
        let now = WallTime(view.wall.0.saturating_add(millis(at.elapsed())));
        let mut lines = screen(&view.run, now, &self.out.for_talk());
        if going {
            lines.push(format!("Ctrl-C detaches, the run goes on.   {}", way_out(&view.run)));
        }
        let term = Term::stderr();
        let _ = term.clear_last_lines(self.drawn);
        for line in &lines {
            let _ = term.write_line(&truncate_str(line, columns().saturating_sub(1), "..."));
        }
        self.drawn = lines.len();
    }

    fn tell(&mut self, run: &Run, step: &Step, past: bool) {
        let place = match &step.status {
            Status::Waiting | Status::Doing { .. } | Status::ToUndo | Status::Undoing { .. } => return,
            Status::Failed { attempt, .. } | Status::UndoFailed { attempt, .. } => {
                format!("{} {attempt}", shape::state(&step.status))
            }
            _ => shape::state(&step.status).to_owned(),
        };
        if !self.told.insert((step.plan.id, place)) {
            return;
        }
        if self.out.stream() {
            let mut event = shape::step(step, past);
            event["event"] = json!("step");
            event["run"] = json!(run.id);
            self.out.json(&envelope(event));
        } else {
            self.out.say(&line(step, &self.out.for_talk()));
        }
    }
}

fn all(run: &Run) -> impl Iterator<Item = (&Step, bool)> {
    run.past.iter().map(|s| (s, true)).chain(run.steps.iter().map(|s| (s, false)))
}

fn place(step: &Step) -> &str {
    step.plan.site.as_ref().map_or("quorum", SiteId::as_str)
}

/// One step that ended, in one line.
pub(crate) fn line(step: &Step, out: &Out) -> String {
    let (word, rest) = match &step.status {
        Status::Done { evidence, .. } => (out.green("ok    "), evidence.seen.clone()),
        Status::Undone { evidence, .. } => (out.yellow("undone"), evidence.seen.clone()),
        Status::Failed { attempt, trouble, .. } => {
            (out.red("FAILED"), format!("attempt {attempt}: {} {}", trouble.code, trouble.text))
        }
        Status::UndoFailed { attempt, trouble, .. } => {
            (out.red("FAILED"), format!("undo, attempt {attempt}: {} {}", trouble.code, trouble.text))
        }
        other => (format!("{:<6}", shape::state(other)), String::new()),
    };
    let took = shape::took_ms(&step.status).map_or_else(|| "-".to_owned(), span);
    let name = step.plan.act.to_string();
    format!("{word}  {:<9} {name:<26} {:<8} {took:>8}  {}", step.plan.stage.word(), place(step), clean(&rest))
        .trim_end()
        .to_owned()
}

/// How a stage stands.
struct StageLine {
    over: usize,
    all: usize,
    failed: bool,
    undoing: bool,
    begun: Option<WallTime>,
    ended: Option<WallTime>,
}

/// Every stage of a run with its counts and its times, in order.
fn stages(run: &Run) -> BTreeMap<Stage, StageLine> {
    let mut stages: BTreeMap<Stage, StageLine> = BTreeMap::new();
    for step in &run.steps {
        let line = stages.entry(step.plan.stage).or_insert(StageLine {
            over: 0,
            all: 0,
            failed: false,
            undoing: false,
            begun: None,
            ended: None,
        });
        line.all += 1;
        let begun = match &step.status {
            Status::Doing { since, .. } | Status::Undoing { since, .. } => Some(*since),
            Status::Done { took_ms, at, .. } => {
                line.over += 1;
                line.ended = line.ended.max(Some(*at));
                Some(WallTime(at.0.saturating_sub(*took_ms)))
            }
            _ => None,
        };
        line.begun = match (line.begun, begun) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        line.failed |= matches!(step.status, Status::Failed { .. } | Status::UndoFailed { .. });
        line.undoing |=
            matches!(step.status, Status::ToUndo | Status::Undoing { .. } | Status::Undone { .. });
    }
    stages
}

/// How long each stage took, for those that are over.
pub(crate) fn stage_times(run: &Run) -> Vec<(Stage, usize, u64)> {
    let over = |(stage, line): (Stage, StageLine)| {
        let took = line.ended?.0.saturating_sub(line.begun?.0);
        (line.over == line.all).then_some((stage, line.all, took))
    };
    stages(run).into_iter().filter_map(over).collect()
}

fn screen(run: &Run, now: WallTime, out: &Out) -> Vec<String> {
    let now = run.ended.as_ref().map_or(now, |ended| ended.at);
    let elapsed = span(now.0.saturating_sub(run.started.0));
    let title = format!("Run {}  {} {} -> {}", run.id, run.group, run.source, run.target);
    let mut lines = vec![format!("{}   elapsed {elapsed}", out.bold(&title))];
    if let Some(why) = &run.aborting {
        lines.push(out.yellow(&format!("  going back: {} {}", clean(&why.code), clean(&why.text))));
    }
    let mut crossed = false;
    for (stage, at) in stages(run) {
        if stage >= Stage::Takeover && !crossed && run.past.is_empty() {
            crossed = true;
            lines.push("      ---------- point of no return ----------".into());
        }
        let (mark, took) = mark(&at, now, out);
        lines.push(
            format!("  {mark}  {:<10} {:>2}/{:<2}  {took}", stage.word(), at.over, at.all).trim_end().into(),
        );
        let mut rows = Vec::new();
        for step in run.steps.iter().filter(|s| s.plan.stage == stage) {
            rows.extend(going(step, now));
        }
        lines.extend(table::lines("          ", &rows));
    }
    lines
}

fn mark(at: &StageLine, now: WallTime, out: &Out) -> (String, String) {
    let since = |end: WallTime| at.begun.map(|b| span(end.0.saturating_sub(b.0))).unwrap_or_default();
    if at.failed {
        (out.red("x "), since(now))
    } else if at.undoing {
        (out.yellow("<<"), String::new())
    } else if at.over == at.all {
        (out.green("ok"), since(at.ended.unwrap_or(now)))
    } else if at.begun.is_some() {
        ("..".into(), since(now))
    } else {
        ("  ".into(), String::new())
    }
}

/// A step that somebody works on or that stands still.
fn going(step: &Step, now: WallTime) -> Option<Vec<String>> {
    let (word, rest) = match &step.status {
        Status::Doing { attempt, since, .. } | Status::Undoing { attempt, since, .. } => {
            let again = if *attempt > 1 { format!(", attempt {attempt}") } else { String::new() };
            (shape::state(&step.status), format!("{}{again}", span(now.0.saturating_sub(since.0))))
        }
        Status::Failed { attempt, trouble, .. } | Status::UndoFailed { attempt, trouble, .. } => {
            let text = format!("attempt {attempt}: {} {}", trouble.code, trouble.text);
            (shape::state(&step.status), clean(&text).replace('\n', " "))
        }
        _ => return None,
    };
    Some(vec![word.into(), step.plan.act.to_string(), place(step).into(), rest])
}

/// How a run could be turned now.
pub(crate) fn way_out(run: &Run) -> String {
    match &run.taken {
        None if run.aborting.is_some() => String::new(),
        None => format!("Until the takeover: dc-switch run abort {}", run.id),
        Some(taken) if taken.opened.is_none() => format!("Until opened: dc-switch run return {}", run.id),
        Some(_) => String::new(),
    }
}
