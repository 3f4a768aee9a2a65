//! A run as scripts read it: one shape for `switchover`, `run show` and each ended run.

use dc_core::fail::Exit;
use dc_core::ids::{PlaneKind, SiteId};
use dc_core::run::{Run, RunResult, Status, Step};
use dc_core::time::WallTime;
use serde_json::{Map, Value, json};

use super::local::utc;
use super::out::envelope;

/// What the end of a run is to one who asked for it to be done.
pub(crate) fn exit(run: &Run) -> Exit {
    match run.ended.as_ref().map(|ended| ended.result) {
        Some(RunResult::Done) => Exit::Done,
        Some(RunResult::Refused) => Exit::Refused,
        Some(RunResult::RolledBack | RunResult::Returned) => Exit::RolledBack,
        None if run.attention.is_some() => Exit::NeedsHuman,
        None => Exit::StillRunning,
    }
}

/// The word for where a run is.
pub(crate) fn result(run: &Run) -> &'static str {
    match &run.ended {
        Some(ended) => ended.result.word(),
        None if run.attention.is_some() => "needs_human",
        None => "running",
    }
}

/// The whole run.
pub(crate) fn run(run: &Run, exit: Exit) -> Value {
    let mut body = Map::new();
    let facts = json!({
        "run": run.id, "group": run.group, "from": run.source, "to": run.target, "by": run.by,
        "reason": run.reason, "plan": run.plan_hash, "direction": run.direction,
        "epoch_before": run.epoch_before.to_string(), "epoch": run.epoch.to_string(),
        "stage": run.stage().word(), "result": result(run), "exit": exit as i32,
        "aborting": run.aborting, "attention": run.attention, "findings": run.findings,
    });
    if let Value::Object(facts) = facts {
        body.extend(facts);
    }
    let taken = run.taken.as_ref();
    stamp(&mut body, "started_at", Some(run.started));
    stamp(&mut body, "takeover_at", taken.map(|t| t.at));
    stamp(&mut body, "opened_at", taken.and_then(|t| t.opened));
    stamp(&mut body, "ended_at", run.ended.as_ref().map(|e| e.at));
    let past = run.past.iter().map(|s| step(s, true));
    body.insert("steps".into(), past.chain(run.steps.iter().map(|s| step(s, false))).collect());
    envelope(Value::Object(body))
}

/// A moment under two keys: `X` for people, `X_ms` for arithmetic.
fn stamp(body: &mut Map<String, Value>, name: &str, at: Option<WallTime>) {
    body.insert(name.to_owned(), json!(at.and_then(utc)));
    body.insert(format!("{name}_ms"), json!(at.map(|at| at.0)));
}

/// One step. `past` marks those of a direction that was turned round.
pub(crate) fn step(step: &Step, past: bool) -> Value {
    let mut body = Map::new();
    let facts = json!({
        "id": step.plan.id, "stage": step.plan.stage.word(),
        "plane": step.plan.act.plane().map_or("quorum", PlaneKind::word), "act": step.plan.act.word(),
        "site": step.plan.site.as_ref().map_or("quorum", SiteId::as_str), "past": past,
        "state": state(&step.status), "ms": took_ms(&step.status),
    });
    if let Value::Object(facts) = facts {
        body.extend(facts);
    }
    match &step.status {
        Status::Doing { token, attempt, since } | Status::Undoing { token, attempt, since } => {
            body.insert("token".into(), json!(token));
            body.insert("attempt".into(), json!(attempt));
            stamp(&mut body, "since", Some(*since));
        }
        Status::Done { token, took_ms, at, evidence } => {
            body.insert("token".into(), json!(token));
            body.insert("change".into(), json!(evidence.change));
            body.insert("seen".into(), json!(evidence.seen));
            // an agent measures the act itself and proposes its result at once
            stamp(&mut body, "since", Some(WallTime(at.0.saturating_sub(*took_ms))));
            stamp(&mut body, "at", Some(*at));
        }
        Status::Failed { attempt, at, trouble } | Status::UndoFailed { attempt, at, trouble } => {
            body.insert("attempt".into(), json!(attempt));
            body.insert("trouble".into(), json!(trouble));
            stamp(&mut body, "at", Some(*at));
        }
        Status::Undone { evidence, .. } => {
            body.insert("seen".into(), json!(evidence.seen));
        }
        Status::Waiting | Status::ToUndo | Status::Dropped => {}
    }
    Value::Object(body)
}

/// How long the act, or its undo, took; none while it has not ended well.
pub(crate) fn took_ms(status: &Status) -> Option<u64> {
    match status {
        Status::Done { took_ms, .. } | Status::Undone { took_ms, .. } => Some(*took_ms),
        _ => None,
    }
}

/// The word for where a step stands.
pub(crate) fn state(status: &Status) -> &'static str {
    match status {
        Status::Waiting => "waiting",
        Status::Doing { .. } => "doing",
        Status::Done { .. } => "done",
        Status::Failed { .. } => "failed",
        Status::ToUndo => "to_undo",
        Status::Undoing { .. } => "undoing",
        Status::Undone { .. } => "undone",
        Status::UndoFailed { .. } => "undo_failed",
        Status::Dropped => "dropped",
    }
}
