//! Entries, applied one by one.

use super::{Answer, Command, Entry, Group, Registry};
use crate::act::{Direction, Evidence, QuorumAct};
use crate::codes::Code;
use crate::fail::{Exit, Fail};
use crate::ids::{Epoch, GroupName, RunId, SiteId, Token};
use crate::plan::{self, StepId};
use crate::position::{Cut, DagRelease};
use crate::run::{self, Ended, Run, RunResult, Status, Step, Taken, Trouble};
use crate::spec::GroupSpec;
use crate::time::WallTime;

/// Ended runs that are kept.
const RUNS_KEPT: usize = 200;

impl Registry {
    /// Applies one command. `at` is its place in the log and the token of what it intends.
    ///
    /// Repeat: a command applied twice changes nothing the second time, or is refused.
    pub fn apply(&mut self, at: Token, command: &Command) -> Answer {
        let ctx = Ctx { at, wall: command.wall, by: &command.by };
        match &command.entry {
            Entry::Renew { site, renewal } => {
                let known = self.sites.entry(site.clone()).or_default();
                if *renewal <= *known {
                    return Answer::Stale;
                }
                *known = *renewal;
                Answer::Done
            }
            Entry::ApplyGroup { spec, over } => self.apply_group(&ctx, spec, *over),
            Entry::Start { run, group, to, plan_hash, reason } => {
                self.start(&ctx, run, group, to, plan_hash, reason)
            }
            Entry::Finish { run, step, token, took_ms, result } => {
                self.finish(&ctx, run, *step, *token, *took_ms, result)
            }
            Entry::Overdue { run, step, token } => self.overdue(&ctx, run, *step, *token),
            Entry::Retry { run } => self.retry(&ctx, run),
            Entry::Takeover { run, epoch, cut } => self.takeover(&ctx, run, *epoch, cut),
            Entry::Opened { run, epoch } => self.opened(&ctx, run, *epoch),
            Entry::Abort { run, why } => self.abort(&ctx, run, why),
            Entry::Return { run, epoch } => self.turn(&ctx, run, *epoch),
            Entry::Publish { group, parent, root, epoch } => self.publish(&ctx, group, *parent, root, *epoch),
        }
    }

    fn apply_group(&mut self, ctx: &Ctx, spec: &GroupSpec, over: u64) -> Answer {
        let what = format!("group {} not applied", spec.name);
        if let Err(faults) = spec.check() {
            let why = faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            return refuse(
                Fail::refused(Code::BAD_SPEC, what, why).next("dc-switch group apply FILE --dry-run"),
            );
        }
        let claims = spec.claims();
        for (name, other) in self.groups.iter().filter(|(name, _)| **name != spec.name) {
            for theirs in other.spec.claims() {
                if claims.iter().any(|mine| mine.overlaps(&theirs)) {
                    let why = format!("group {name} claims {theirs}");
                    return refuse(
                        Fail::refused(Code::CLAIM_OVERLAP, what, why)
                            .next(format!("dc-switch group show {name}")),
                    );
                }
            }
        }
        let Some(known) = self.groups.get_mut(&spec.name) else {
            return self.found(ctx, spec);
        };
        if known.spec == *spec {
            return Answer::Done;
        }
        let forbidden = if known.spec_version != over {
            Some(format!("it was compared with version {over}, and {} is applied", known.spec_version))
        } else if let Some(run) = &known.run {
            Some(format!("run {run} holds the group"))
        } else if known.spec.sites != spec.sites {
            Some("sites cannot change by a file".to_owned())
        } else if known.spec.planes() != spec.planes() {
            Some("planes cannot change by a file".to_owned())
        } else {
            None
        };
        if let Some(why) = forbidden {
            return refuse(Fail::refused(Code::SPEC_CHANGE, what, why).next("dc-switch group diff FILE"));
        }
        known.spec = spec.clone();
        known.spec_version += 1;
        let version = known.spec_version;
        self.note(ctx, format!("group {} spec version {version}", spec.name));
        Answer::Done
    }

    fn found(&mut self, ctx: &Ctx, spec: &GroupSpec) -> Answer {
        let Some(holder) = spec.sites.first().cloned() else {
            return Answer::Stale; // checked before: a spec has two sites
        };
        let epoch = Epoch { incarnation: self.incarnation, counter: 1 };
        self.note(ctx, format!("group {} founded, {holder} holds it in epoch {epoch}", spec.name));
        self.groups.insert(
            spec.name.clone(),
            Group {
                spec: spec.clone(),
                spec_version: 1,
                holder,
                epoch,
                opened: true,
                timeline_high: 0,
                grants: None,
                mirror: spec.kafka.as_ref().map(|k| k.mirror.clone()),
                release: None,
                fences: Vec::new(),
                run: None,
            },
        );
        Answer::Done
    }

    fn start(
        &mut self,
        ctx: &Ctx,
        id: &RunId,
        name: &GroupName,
        to: &SiteId,
        hash: &str,
        reason: &str,
    ) -> Answer {
        if self.runs.contains_key(id) {
            return Answer::Done; // asked twice
        }
        let plan = match plan::switchover(self, name, to) {
            Ok(plan) => plan,
            Err(refusal) => return refuse(refusal),
        };
        let what = format!("switchover of {name} to {to} refused");
        let Some(group) = self.groups.get_mut(name) else { return Answer::Stale };
        if let Some(open) = &group.run {
            let why = format!("run {open} holds the group");
            return refuse(
                Fail::refused(Code::RUN_OPEN, what, why).next(format!("dc-switch run attach {open}")),
            );
        }
        if plan.hash() != hash {
            let why = format!("the plan is {} by now", plan.id());
            return refuse(
                Fail::refused(Code::STALE_PLAN, what, why)
                    .next(format!("dc-switch plan switchover {name} --to {to}")),
            );
        }
        let mut run = Run {
            id: id.clone(),
            group: name.clone(),
            source: plan.source,
            target: plan.target,
            epoch_before: group.epoch,
            epoch: group.epoch.next(),
            plan_hash: hash.to_owned(),
            by: ctx.by.to_owned(),
            reason: reason.to_owned(),
            started: ctx.wall,
            direction: Direction::Forward,
            taken: None,
            aborting: None,
            steps: plan.steps.into_iter().map(|plan| Step { plan, status: Status::Waiting }).collect(),
            past: Vec::new(),
            attention: None,
            findings: Vec::new(),
            ended: None,
        };
        group.run = Some(id.clone());
        run::advance(&mut run, group, ctx.at, ctx.wall);
        self.note(ctx, format!("run {id}: {name} from {} to {to}: {reason}", run.source));
        self.runs.insert(id.clone(), run);
        self.prune();
        Answer::Done
    }

    fn finish(
        &mut self,
        ctx: &Ctx,
        id: &RunId,
        step: StepId,
        token: Token,
        took_ms: u64,
        result: &Result<Evidence, Trouble>,
    ) -> Answer {
        let Some((run, group)) = self.open(id) else { return Answer::Stale };
        if !run::file(run, group, step, token, took_ms, result.clone(), ctx.wall) {
            return Answer::Stale;
        }
        let line = line(run, step, took_ms, result);
        run::react(run, group, step, ctx.at, ctx.wall);
        clear_attention(run);
        run::advance(run, group, ctx.at, ctx.wall);
        self.note(ctx, line);
        self.learn(id);
        Answer::Done
    }

    fn overdue(&mut self, ctx: &Ctx, id: &RunId, step: StepId, token: Token) -> Answer {
        let Some((run, group)) = self.open(id) else { return Answer::Stale };
        let Some(found) = run.step(step).filter(|s| s.intent().is_some_and(|(asked, _)| asked == token))
        else {
            return Answer::Stale;
        };
        let site = found.plan.site.as_ref().map_or("quorum", |s| s.as_str());
        let text = format!("{} at {site}: no answer within its deadline", found.plan.act);
        let trouble = Trouble { code: Code::NEEDS_HUMAN.as_str().into(), text: text.clone() };
        if run.taken.is_some() || run.aborting.is_some() {
            // The intent stays: the site does it when it is back, and nobody else can.
            if run.attention.as_ref() == Some(&trouble) {
                return Answer::Done; // said before
            }
            run.attention = Some(trouble);
        } else {
            run::file(run, group, step, token, 0, Err(trouble), ctx.wall);
            exhaust(run, step);
            run::react(run, group, step, ctx.at, ctx.wall);
            run::advance(run, group, ctx.at, ctx.wall);
        }
        self.note(ctx, format!("run {id}: {text}"));
        Answer::Done
    }

    fn retry(&mut self, ctx: &Ctx, id: &RunId) -> Answer {
        let Some((run, _)) = self.open(id) else { return unknown_run(id) };
        let again = run::again(run, ctx.at, ctx.wall);
        if again == 0 {
            return refuse(
                Fail::refused(Code::NOTHING_TO_RETRY, format!("retry of {id} refused"), "no step has failed")
                    .next(format!("dc-switch run show {id}")),
            );
        }
        self.note(ctx, format!("run {id}: failed steps tried once more: {again}"));
        Answer::Done
    }

    fn takeover(&mut self, ctx: &Ctx, id: &RunId, epoch: Epoch, cut: &Cut) -> Answer {
        let Some((run, group)) = self.open(id) else { return Answer::Stale };
        let whole = group.spec.planes().into_iter().all(|plane| cut.covers(plane));
        let current = group.epoch == run.epoch_before && epoch == group.epoch.next() && *cut == run.cut();
        if run.due() != Some(QuorumAct::Takeover) || !whole || !current {
            return Answer::Stale;
        }
        run.epoch = epoch;
        run.taken = Some(Taken { cut: cut.clone(), at: ctx.wall, opened: None });
        group.epoch = epoch;
        group.holder = run.target.clone();
        group.opened = false;
        settle(
            run,
            QuorumAct::Takeover,
            ctx,
            format!("{} holds the group in epoch {epoch}", run.target.clone()),
        );
        run::advance(run, group, ctx.at, ctx.wall);
        let line = format!("run {id}: takeover, {} holds {} in epoch {epoch}", group.holder, run.group);
        self.note(ctx, line);
        Answer::Done
    }

    fn opened(&mut self, ctx: &Ctx, id: &RunId, epoch: Epoch) -> Answer {
        let Some((run, group)) = self.open(id) else { return Answer::Stale };
        let current = group.epoch == epoch && run.epoch == epoch && group.holder == *run.winner();
        if run.due() != Some(QuorumAct::Opened) || !current {
            return Answer::Stale;
        }
        group.opened = true;
        group.fences.retain(|fence| fence.site != group.holder);
        if let Some(taken) = &mut run.taken {
            taken.opened = Some(ctx.wall);
        }
        settle(run, QuorumAct::Opened, ctx, format!("epoch {epoch} may be written to"));
        run::advance(run, group, ctx.at, ctx.wall);
        self.note(ctx, format!("run {id}: opened epoch {epoch}"));
        Answer::Done
    }

    fn abort(&mut self, ctx: &Ctx, id: &RunId, why: &str) -> Answer {
        let Some((run, group)) = self.open(id) else { return unknown_run(id) };
        if run.taken.is_some() {
            let fail = Fail::refused(
                Code::PAST_TAKEOVER,
                format!("abort of {id} refused"),
                "its takeover is committed",
            );
            return refuse(fail.next(format!("dc-switch run return {id}")));
        }
        let trouble = Trouble { code: Code::ROLLED_BACK.as_str().into(), text: why.to_owned() };
        run::begin_undo(run, group, trouble, ctx.at, ctx.wall);
        self.note(ctx, format!("run {id}: abort: {why}"));
        Answer::Done
    }

    /// Turns a run round between its takeover and `Opened`; a return may itself be returned.
    fn turn(&mut self, ctx: &Ctx, id: &RunId, left: Epoch) -> Answer {
        let Some((run, group)) = self.open(id) else { return unknown_run(id) };
        if run.taken.is_none() || group.opened {
            let why = if group.opened { "epoch is opened" } else { "its takeover is not committed" };
            let next = if group.opened { "dc-switch run show" } else { "dc-switch run abort" };
            let fail = Fail::refused(Code::NO_RETURN, format!("return of {id} refused"), why);
            return refuse(fail.next(format!("{next} {id}")));
        }
        if run.epoch != left {
            return Answer::Stale;
        }
        run.direction = match run.direction {
            Direction::Forward => Direction::Return,
            Direction::Return => Direction::Forward,
        };
        group.epoch = group.epoch.next();
        run.epoch = group.epoch;
        group.holder = run.winner().clone();
        run.attention = None;
        let first = run.steps.iter().chain(&run.past).map(|s| s.plan.id).max().unwrap_or(0) + 1;
        let rest = plan::after_takeover(group, &group.holder, run.direction, first);
        run.past.append(&mut run.steps);
        run.steps = rest.into_iter().map(|plan| Step { plan, status: Status::Waiting }).collect();
        run::advance(run, group, ctx.at, ctx.wall);
        let line = format!("run {id}: return, {} holds {} in epoch {}", group.holder, run.group, group.epoch);
        self.note(ctx, line);
        Answer::Done
    }

    fn publish(
        &mut self,
        ctx: &Ctx,
        name: &GroupName,
        parent: Option<u64>,
        root: &str,
        epoch: Epoch,
    ) -> Answer {
        let refused = |why: String| {
            let fail = Fail::refused(Code::RELEASE_REFUSED, format!("release of {name} not accepted"), why);
            refuse(fail.next("dc-switch dags publish DIR"))
        };
        let Some(group) = self.groups.get_mut(name) else {
            return refused(format!("there is no group {name}"));
        };
        if let Some(same) = group.release.as_ref().filter(|r| r.root == root) {
            return Answer::Release(same.clone());
        }
        if let Some(run) = &group.run {
            return refused(format!("run {run} holds the group; releases are frozen until it ends"));
        }
        if group.epoch != epoch {
            return refused(format!(
                "its files were uploaded in epoch {epoch}, the group is in {}",
                group.epoch
            ));
        }
        let last = group.release.as_ref().map(|r| r.serial);
        if last != parent {
            return refused(format!("it follows release {parent:?}, the last one is {last:?}"));
        }
        let sound = root.len() == 64 && root.bytes().all(|b| b.is_ascii_hexdigit());
        if !sound {
            return refused("its root is not 64 hex digits".into());
        }
        let release = DagRelease { serial: last.unwrap_or(0) + 1, root: root.to_owned() };
        group.release = Some(release.clone());
        self.note(ctx, format!("group {name}: release {}", release.version()));
        Answer::Release(release)
    }

    fn open(&mut self, id: &RunId) -> Option<(&mut Run, &mut Group)> {
        let run = self.runs.get_mut(id).filter(|run| run.ended.is_none())?;
        let group = self.groups.get_mut(&run.group)?;
        Some((run, group))
    }

    fn note(&mut self, ctx: &Ctx, what: String) {
        self.audit.note(ctx.at, ctx.wall, ctx.by, what);
    }

    /// Learns how long acts take from a run that ended well.
    fn learn(&mut self, id: &RunId) {
        let Some(run) = self.runs.get(id) else { return };
        if !matches!(run.ended, Some(Ended { result: RunResult::Done, .. })) {
            return;
        }
        for step in &run.steps {
            if let Status::Done { took_ms, .. } = step.status {
                let known = self.learned.entry(step.plan.act.to_string()).or_insert(took_ms);
                *known = (*known * 3 + took_ms) / 4;
            }
        }
    }

    fn prune(&mut self) {
        let ended: Vec<RunId> =
            self.runs.values().filter(|r| r.ended.is_some()).map(|r| r.id.clone()).collect();
        let many = ended.len().saturating_sub(RUNS_KEPT);
        for id in ended.into_iter().take(many) {
            self.runs.remove(&id);
        }
    }
}

/// What every entry is applied with.
struct Ctx<'a> {
    at: Token,
    wall: WallTime,
    by: &'a str,
}

fn refuse(fail: Fail) -> Answer {
    Answer::Refused(Box::new(fail))
}

fn unknown_run(id: &RunId) -> Answer {
    let fail = Fail::new(
        Code::UNKNOWN_RUN,
        Exit::Refused,
        format!("there is no open run {id}; nothing was changed"),
        "it has ended, or never was",
    );
    refuse(fail.next("dc-switch run list"))
}

/// Marks an entry of the quorum as done.
fn settle(run: &mut Run, act: QuorumAct, ctx: &Ctx, seen: String) {
    let due = crate::act::ActName::Quorum(act);
    if let Some(step) = run.steps.iter_mut().find(|s| s.plan.act == due) {
        let evidence = Evidence::changed(seen);
        step.status = Status::Done { token: ctx.at, took_ms: 0, at: ctx.wall, evidence };
    }
}

/// Silence is not tried again before the takeover: writers may be waiting.
fn exhaust(run: &mut Run, id: StepId) {
    if let Some(step) = run.steps.iter_mut().find(|s| s.plan.id == id)
        && let Status::Failed { attempt, .. } = &mut step.status
    {
        *attempt = step.plan.attempts;
    }
}

/// A human is needed only while something stands still.
fn clear_attention(run: &mut Run) {
    let aborting = run.aborting.is_some();
    let stuck = |s: &Step| match s.status {
        Status::Failed { .. } => !aborting, // given up with the run
        Status::UndoFailed { .. } => true,
        _ => false,
    };
    if !run.steps.iter().any(stuck) {
        run.attention = None;
    }
}

fn line(run: &Run, id: StepId, took_ms: u64, result: &Result<Evidence, Trouble>) -> String {
    let act = run.step(id).map(|s| s.plan.act.to_string()).unwrap_or_default();
    let site = run.step(id).and_then(|s| s.plan.site.as_ref()).map_or("quorum", |s| s.as_str()).to_owned();
    let undone =
        run.step(id).is_some_and(|s| matches!(s.status, Status::Undone { .. } | Status::UndoFailed { .. }));
    let verb = if undone { "undo of " } else { "" };
    match result {
        Ok(evidence) => format!("run {}: {verb}{act} at {site} in {took_ms} ms: {}", run.id, evidence.seen),
        Err(trouble) => {
            format!("run {}: {verb}{act} at {site} failed [{}]: {}", run.id, trouble.code, trouble.text)
        }
    }
}
