//! Following a run wherever it is told of, and saying how it ended.

use std::pin::pin;
use std::time::Duration;

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::RunId;
use dc_core::run::{Run, RunResult, Status};
use dc_core::view::RunView;
use dc_wire::convert::fail_of;
use dc_wire::pb;
use futures::{Stream, StreamExt, stream};
use serde_json::json;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tonic::Streaming;

use super::fails::of;
use super::out::{Out, clean, envelope, span};
use super::progress::{Progress, line, stage_times, way_out};
use super::reach::{Home, Reach, plainly, read};
use super::{local, plan, shape, table};

/// A stream that is silent for this long is opened again, at whoever sees a quorum by then.
const SILENCE: Duration = Duration::from_secs(15);
/// How long nobody may answer before the command gives up; the run does not.
const LOST: Duration = Duration::from_mins(1);
/// Between two tries to find an agent.
const PAUSE: Duration = Duration::from_millis(500);
/// How long an order may take to show at the agent that is asked.
const ORDER_SHOWS: Duration = Duration::from_secs(5);

/// What the caller wants the run to come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    /// That the target holds the group.
    Moved,
    /// That it is undone.
    RolledBack,
    /// That it goes back after its takeover.
    Returned,
}

/// Why following ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Ended,
    NeedsHuman,
    Detached,
    TimedOut,
}

/// Follows a run to its end, to a human's turn, to Ctrl-C or to `limit`, and tells it.
///
/// `ordered` is set when an order was just given: what stood still before may still show.
/// Errors: nobody answers for a minute, or no such run.
pub(crate) async fn follow(
    reach: &Reach,
    home: &Home,
    run: &RunId,
    out: &Out,
    (goal, limit, ordered): (Goal, Option<Duration>, bool),
) -> Result<Exit, Fail> {
    let started = Instant::now();
    let mut views = pin!(views(reach, home, run, out));
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    let mut tick = interval(Duration::from_secs(1));
    let mut progress = Progress::new(out);
    let mut latest: Option<Run> = None;
    let last = loop {
        tokio::select! {
            biased;
            _ = &mut interrupted => break Last::Detached,
            () = until(limit.map(|limit| started + limit)) => break Last::TimedOut,
            Some(view) = views.next() => {
                let view = view?;
                latest = Some(view.run.clone());
                progress.update(view);
            }
            _ = tick.tick() => progress.tick(),
        }
        let patient = ordered && started.elapsed() < ORDER_SHOWS;
        match &latest {
            Some(run) if run.ended.is_some() => break Last::Ended,
            Some(run) if run.attention.is_some() && !patient => break Last::NeedsHuman,
            _ => {}
        }
    };
    progress.finish();
    Ok(tell(out, run, latest.as_ref(), last, goal))
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

struct Watch<'a> {
    reach: &'a Reach,
    home: &'a Home,
    run: &'a RunId,
    out: &'a Out,
    stream: Option<Streaming<pb::Report>>,
    began: Instant,
    lost: Option<Instant>,
    first: bool,
}

/// States of a run, from whichever agent tells them.
fn views<'a>(
    reach: &'a Reach,
    home: &'a Home,
    run: &'a RunId,
    out: &'a Out,
) -> impl Stream<Item = Result<RunView, Fail>> + 'a {
    let began = Instant::now();
    let watch = Watch { reach, home, run, out, stream: None, began, lost: None, first: true };
    stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) })
}

impl Watch<'_> {
    async fn next(&mut self) -> Result<RunView, Fail> {
        loop {
            if self.stream.is_none() {
                self.stream = Some(self.open().await?);
            }
            let Some(stream) = &mut self.stream else { continue };
            match timeout(SILENCE, stream.message()).await {
                Ok(Ok(Some(report))) => {
                    self.lost = None;
                    return read("run", &report);
                }
                Ok(Ok(None) | Err(_)) | Err(_) => self.stream = None,
            }
        }
    }

    /// Asks the agent that took the order first, after that whoever answers.
    async fn open(&mut self) -> Result<Streaming<pb::Report>, Fail> {
        loop {
            let home = if std::mem::take(&mut self.first) {
                Ok((self.home.site.clone(), self.home.client()))
            } else {
                self.reach.meet().await.map(|home| (home.site.clone(), home.client()))
            };
            let failed = match home {
                Err(fail) => fail,
                Ok((site, mut client)) => {
                    let asked = client.run_watch(pb::RunRequest { run: self.run.to_string() });
                    let answer = timeout(ORDER_SHOWS, asked).await;
                    match answer.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("no answer"))) {
                        Ok(stream) => return Ok(stream.into_inner()),
                        Err(status) => match fail_of(&status) {
                            None => plainly(&site, "the run", &status),
                            // an agent may be a little behind the one that took the order
                            Some((fail, _)) if self.began.elapsed() < ORDER_SHOWS => fail,
                            Some((fail, _)) => return Err(fail),
                        },
                    }
                }
            };
            if failed.exit == Exit::NotAllowed {
                return Err(failed);
            }
            let lost = *self.lost.get_or_insert_with(Instant::now);
            if lost.elapsed() > LOST {
                let why = format!("{} for {} s: {}", failed.what, LOST.as_secs(), failed.why);
                let what = format!("run {} can no longer be followed; it goes on by itself", self.run);
                return Err(of("DC-0015", Exit::NoQuorum, what, why)
                    .next(format!("dc-switch run attach {}", self.run)));
            }
            if lost.elapsed() < PAUSE && !self.out.live() {
                self.out.say(&format!("looking for an agent that answers ({})", clean(&failed.what)));
            }
            sleep(PAUSE).await;
        }
    }
}

/// Tells how it ended, and gives the exit code.
fn tell(out: &Out, id: &RunId, run: Option<&Run>, last: Last, goal: Goal) -> Exit {
    let exit = match (last, run) {
        (Last::Detached, _) => Exit::Detached,
        (Last::TimedOut, _) | (_, None) => Exit::StillRunning,
        (Last::NeedsHuman, Some(_)) => Exit::NeedsHuman,
        (Last::Ended, Some(run)) => match (goal, run.ended.as_ref().map(|e| e.result)) {
            (Goal::RolledBack, Some(RunResult::RolledBack)) | (Goal::Returned, Some(RunResult::Returned)) => {
                Exit::Done
            }
            _ => shape::exit(run),
        },
    };
    let attach = format!("dc-switch run attach {id}");
    match last {
        Last::Detached => out.say(&format!("Detached; run {id} goes on. Follow it again: {attach}")),
        Last::TimedOut => out.say(&format!("Not ended in time; run {id} goes on. Follow it again: {attach}")),
        Last::Ended | Last::NeedsHuman if out.human() => {
            if let Some(run) = run {
                screen(run, exit, out);
            }
        }
        Last::Ended | Last::NeedsHuman => {}
    }
    if !out.human() {
        let mut body = match run {
            Some(run) => shape::run(run, exit),
            None => envelope(json!({"run": id, "result": "running", "exit": exit as i32, "steps": []})),
        };
        if out.stream() {
            body["event"] = json!(if last == Last::Ended { "ended" } else { "left" });
        }
        out.json(&body);
    }
    exit
}

/// The last screen of a run that ended, or that waits for a human.
pub(crate) fn screen(run: &Run, exit: Exit, out: &Out) {
    out.print("");
    match run.ended.as_ref().map(|ended| ended.result) {
        None => needs_human(run, out),
        Some(RunResult::Done) => done(run, out),
        Some(RunResult::Refused) => refused(run, out),
        Some(RunResult::RolledBack) => rolled_back(run, out),
        Some(RunResult::Returned) => returned(run, out),
    }
    if exit != Exit::Done {
        out.print(&format!("exit {}", exit as i32));
    }
}

fn done(run: &Run, out: &Out) {
    let head = out.green("DONE");
    out.print(&format!(
        "{head}  {} holds {} in epoch {}    run {}",
        run.target, run.group, run.epoch, run.id
    ));
    times(run, out);
    out.print(&format!("Next: dc-switch status {}", run.group));
}

/// Only what the run itself measured; how long writers stood is theirs to say.
fn times(run: &Run, out: &Out) {
    let mut rows = vec![table::row(&["STAGE", "STEPS", "TOOK"])];
    rows.extend(
        stage_times(run)
            .into_iter()
            .map(|(stage, steps, ms)| vec![stage.word().into(), steps.to_string(), span(ms)]),
    );
    out.table("  ", &rows);
    if let Some(taken) = &run.taken {
        let opened = taken.opened.map(|o| format!(", opened {} later", span(o.0.saturating_sub(taken.at.0))));
        out.print(&format!("  takeover at {}{}", local::clock(taken.at), opened.unwrap_or_default()));
    }
    if let Some(ended) = &run.ended {
        out.print(&format!("  whole run {}", span(ended.at.0.saturating_sub(run.started.0))));
    }
}

fn refused(run: &Run, out: &Out) {
    let (group, to) = (&run.group, &run.target);
    let head = out.red("REFUSED");
    out.print(&format!("{head}  switchover of {group} to {to}; nothing was changed    {}", Code::PREFLIGHT));
    for finding in &run.findings {
        out.print(&format!("  {}", plan::finding_line(out, finding)));
    }
    out.print(&format!("  now    {} serves {group} as before (epoch {})", run.source, run.epoch_before));
    out.print(&format!("  do     mend what blocks, then: dc-switch plan switchover {group} --to {to}"));
}

fn rolled_back(run: &Run, out: &Out) {
    let (code, text) = run
        .aborting
        .as_ref()
        .map_or((Code::ROLLED_BACK.to_string(), String::new()), |t| (clean(&t.code), clean(&t.text)));
    let undone = run.steps.iter().filter(|s| matches!(s.status, Status::Undone { .. })).count();
    let head = out.red("ROLLED BACK");
    out.print(&format!("{head}  switchover of {} to {}    {code}", run.group, run.target));
    out.print(&format!("  why    {text}"));
    out.print(&format!(
        "  now    {} serves {} as before (epoch {}); {undone} steps were undone, nothing was lost",
        run.source, run.group, run.epoch_before
    ));
    out.print(&format!("  do     1  dc-switch run show {}    what each step saw", run.id));
    out.print(&format!("         2  dc-switch explain {code}"));
    out.print(&format!("         3  dc-switch plan switchover {} --to {}", run.group, run.target));
}

fn returned(run: &Run, out: &Out) {
    let head = out.yellow("RETURNED");
    out.print(&format!("{head}  {} holds {} again in epoch {}", run.source, run.group, run.epoch));
    out.print("  why    the run was turned round after its takeover and before anything was opened");
    out.print(&format!("  now    {} serves {}; nothing was lost", run.source, run.group));
    out.print(&format!("  do     dc-switch run show {}", run.id));
}

/// Says who may be written to, as far as the log tells it.
fn now(run: &Run) -> String {
    let at = format!("{} of epoch {}", run.winner(), run.epoch);
    match &run.taken {
        None if run.aborting.is_some() => {
            format!("going back to {}: what was fenced there opens as each undo is proved", run.source)
        }
        None => format!("{} holds {}; the run goes on", run.source, run.group),
        Some(taken) if taken.opened.is_none() => {
            format!("NOBODY accepts writes since {}; {at} is not opened", local::clock(taken.at))
        }
        Some(_) => format!("{at} is opened: planes whose step `open` is done accept writes there"),
    }
}

fn needs_human(run: &Run, out: &Out) {
    let (code, text) = run
        .attention
        .as_ref()
        .map_or((Code::NEEDS_HUMAN.to_string(), String::new()), |t| (clean(&t.code), clean(&t.text)));
    let head = out.red("A HUMAN MUST ACT");
    out.print(&format!("{head}  run {} of {}, stage {}    {code}", run.id, run.group, run.stage().word()));
    out.print(&format!("  why    {text}"));
    for step in &run.steps {
        if matches!(step.status, Status::Failed { .. } | Status::UndoFailed { .. }) {
            out.print(&format!("         {}", line(step, out)));
        }
    }
    out.print(&format!("  now    {}; the run stays open and is tried again by itself", now(run)));
    out.print(&format!(
        "  do     1  dc-switch run retry {}    when the cause is mended, to wait no longer",
        run.id
    ));
    let way = way_out(run);
    if run.taken.is_some() && !way.is_empty() {
        out.print(&format!(
            "         2  dc-switch run return {}    back to {}, nothing is lost",
            run.id, run.source
        ));
    }
    out.print(&format!("         -  dc-switch run show {}", run.id));
    out.print(&format!("         -  dc-switch explain {code}"));
}
