//! The hands of the site, and the only place that changes a plane.
//!
//! What is to be done is read off the applied state (`duty`); here it is done, one act at
//! a time on each plane, under an authority, by a deadline, and its answer is proposed. An
//! intent that the applied state no longer shows is dropped at once, wherever it stands.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dc_core::act::{Change, Evidence};
use dc_core::authority::Authority;
use dc_core::codes::Code;
use dc_core::ids::{GroupName, PlaneKind, RunId, SiteId, Token};
use dc_core::plan::StepId;
use dc_core::registry::{Command, Entry};
use dc_core::run::Trouble;
use dc_core::time::millis;
use dc_plane::{Deadline, Plane, PlaneError};
use dc_quorum::LogEngine;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::clock::wall;
use crate::duty::{Intent, Upkeep, intents, may_open, upkeep, upkeep_act};
use crate::lease::LeaseKeeper;
use crate::shelf::Shelf;
use crate::tokens::{Rank, Tokens};

type Place = (GroupName, PlaneKind);

/// Acts of one site.
pub struct Hands {
    me: SiteId,
    engine: Arc<dyn LogEngine>,
    lease: Arc<LeaseKeeper>,
    shelf: Arc<Shelf>,
    tokens: Tokens,
    closed_dir: std::path::PathBuf,
    /// One act at a time on each plane.
    turns: Mutex<BTreeMap<Place, Arc<tokio::sync::Mutex<()>>>>,
    running: Mutex<BTreeMap<(RunId, StepId), Running>>,
    keeping: Mutex<BTreeMap<Place, AbortHandle>>,
    /// Planes that this process has reopened: of any other it cannot know whether the
    /// process before it closed it, and lost the mark with its disk.
    reopened: Mutex<BTreeSet<Place>>,
    /// Whether everything committed before this process began is applied.
    caught_up: AtomicBool,
}

struct Running {
    token: Token,
    undo: bool,
    place: Place,
    task: AbortHandle,
}

impl Hands {
    /// Starts with nothing under way.
    ///
    /// Errors: when the memory of tokens or closings cannot be read.
    pub fn new(
        me: SiteId,
        engine: Arc<dyn LogEngine>,
        lease: Arc<LeaseKeeper>,
        shelf: Arc<Shelf>,
        data_dir: &std::path::Path,
    ) -> std::io::Result<Self> {
        let closed_dir = data_dir.join("closed");
        std::fs::create_dir_all(&closed_dir)?;
        let tokens = Tokens::load(data_dir)?;
        Ok(Self {
            me,
            engine,
            lease,
            shelf,
            tokens,
            closed_dir,
            turns: Mutex::default(),
            running: Mutex::default(),
            keeping: Mutex::default(),
            reopened: Mutex::default(),
            caught_up: AtomicBool::new(false),
        })
    }

    /// Performs this site's intents as the applied state shows them, for ever.
    ///
    /// Begins after a barrier: what was applied before a restart may be long over.
    pub async fn follow(self: Arc<Self>) {
        while self.engine.barrier(Instant::now() + Duration::from_secs(5)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.caught_up.store(true, Ordering::Release);
        let mut applied = self.engine.applied();
        loop {
            let state = applied.borrow_and_update().state.clone();
            self.turn_to(&intents(&state, &self.me));
            if applied.changed().await.is_err() {
                return;
            }
        }
    }

    /// Drops what is no longer asked and begins what is. A task that has answered stays known
    /// until the applied state shows it, or it would be done twice.
    fn turn_to(self: &Arc<Self>, asked: &[Intent]) {
        let mut running = self.running.lock();
        running.retain(|(run, step), known| {
            let still = asked
                .iter()
                .any(|i| i.run == *run && i.step == *step && i.token == known.token && i.undo == known.undo);
            if !still {
                known.task.abort();
            }
            still
        });
        for intent in asked {
            let key = (intent.run.clone(), intent.step);
            let Some(plane) = intent.act.name.plane() else { continue };
            if running.contains_key(&key) {
                continue;
            }
            let place = (intent.act.group.clone(), plane);
            if let Some(upkeep) = self.keeping.lock().remove(&place) {
                upkeep.abort();
            }
            let task = tokio::spawn(self.clone().answer(intent.clone(), place.clone())).abort_handle();
            let (token, undo) = (intent.token, intent.undo);
            running.insert(key, Running { token, undo, place, task });
        }
    }

    /// Does one intent and proposes its answer until the log has it.
    async fn answer(self: Arc<Self>, intent: Intent, place: Place) {
        if intent.opens {
            // Waited for before the turn: a closing must find the plane free.
            self.leased(&intent, Deadline::within(intent.limit)).await;
        }
        let turn = self.turn(&place).await;
        let begun = Instant::now();
        let done = self.perform(&intent, &place).await;
        let took = begun.elapsed();
        drop(turn);
        let Some(result) = done else { return };
        self.tell(&intent, &result, took);
        let entry = Entry::Finish {
            run: intent.run.clone(),
            step: intent.step,
            token: intent.token,
            took_ms: millis(took),
            result,
        };
        // Dropped from outside once the applied state shows the answer, ours or another's.
        loop {
            let command = Command { by: format!("agent/{}", self.me), wall: wall(), entry: entry.clone() };
            match self.engine.propose(vec![command], Instant::now() + Duration::from_secs(5)).await {
                Ok(_) => return,
                Err(cause) => {
                    warn!(run = %intent.run, step = intent.step, %cause, "answer not committed yet");
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// None when the token is stale: a newer decision stands, and nothing is said.
    async fn perform(&self, intent: &Intent, place: &Place) -> Option<Result<Evidence, Trouble>> {
        match self.tokens.raise(&place.0, place.1, intent.token) {
            Ok(Rank::Higher | Rank::Same) => {}
            Ok(Rank::Stale(highest)) => {
                warn!(run = %intent.run, token = %intent.token, %highest, "stale intent not performed");
                return None;
            }
            Err(cause) => {
                // Tried again by the run: what the disk does not hold is not begun.
                let text = format!("not begun, for its token was not remembered on disk: {cause}");
                return Some(Err(trouble("DC-0222", &text)));
            }
        }
        let plane = match self.shelf.plane(&place.0, place.1) {
            Ok(plane) => plane,
            Err(why) => return Some(Err(trouble(Code::BAD_SPEC.as_str(), &why))),
        };
        let until = Deadline::within(intent.limit);
        if intent.opens && !may_open(&self.engine.state(), intent, &self.me, self.lease.left()) {
            let text = format!("{} has no lease in this epoch", self.me);
            return Some(Err(trouble(Code::NEEDS_HUMAN.as_str(), &text)));
        }
        let by = Authority::step(intent.run.clone(), intent.act.epoch, intent.token);
        let work = act(plane.as_ref(), intent, &by, until);
        Some(guarded(until, &intent.act.name.to_string(), work).await.map_err(|e| as_trouble(&e)))
    }

    /// Waits until opening is this site's right; each renewal and entry is looked at as it comes.
    async fn leased(&self, intent: &Intent, until: Deadline) -> bool {
        let mut lease = self.lease.changes();
        let mut applied = self.engine.applied();
        loop {
            let state = applied.borrow_and_update().state.clone();
            lease.borrow_and_update();
            if may_open(&state, intent, &self.me, self.lease.left()) {
                return true;
            }
            tokio::select! {
                _ = lease.changed() => {}
                _ = applied.changed() => {}
                () = tokio::time::sleep_until(until.0) => return false,
            }
        }
    }

    async fn turn(&self, place: &Place) -> OwnedMutexGuard<()> {
        let lock = self.turns.lock().entry(place.clone()).or_default().clone();
        lock.lock_owned().await
    }

    /// Keeps one plane as it should be between runs; called again and again.
    pub async fn keep(self: &Arc<Self>, place: &Place) {
        let state = self.engine.state();
        let wanted = upkeep(&state, &place.0, place.1, &self.me, self.lease.left(), self.lease.closing());
        // Before the barrier the state may be that of another life: it may close, nothing else.
        let known = self.caught_up.load(Ordering::Acquire) || wanted == Upkeep::Close;
        if wanted == Upkeep::Leave || !known {
            return;
        }
        if wanted == Upkeep::Close {
            self.drop_steps(place);
        }
        let mut task = {
            // An intent takes the plane from any upkeep but a closing: it waits here until it can see this one.
            let mut keeping = self.keeping.lock();
            let task = tokio::spawn(self.clone().tend(place.clone(), wanted));
            if wanted != Upkeep::Close {
                keeping.insert(place.clone(), task.abort_handle());
            }
            task
        };
        let ended = tokio::select! {
            ended = &mut task => ended,
            () = self.lease_ends(), if matches!(wanted, Upkeep::Serve(_)) => {
                task.abort(); // however long it would take, the closing comes first
                task.await
            }
        };
        if ended.is_err_and(|e| e.is_panic()) {
            error!(group = %place.0, plane = %place.1, "upkeep panicked");
        }
    }

    async fn lease_ends(&self) {
        while !self.lease.closing() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A step under way must not hold up a closing; it begins again once it may.
    fn drop_steps(&self, place: &Place) {
        self.running.lock().retain(|_, known| {
            let here = known.place == *place;
            if here {
                known.task.abort();
            }
            !here
        });
    }

    async fn tend(self: Arc<Self>, place: Place, wanted: Upkeep) {
        let _turn = self.turn(&place).await;
        // What was wanted before the turn came may be over by now.
        let state = self.engine.state();
        let (left, closing) = (self.lease.left(), self.lease.closing());
        if upkeep(&state, &place.0, place.1, &self.me, left, closing) != wanted {
            return;
        }
        let Some(group) = state.groups.get(&place.0) else { return };
        let Some(act) = upkeep_act(group, &place.0, place.1, &self.me, wanted) else { return };
        let Ok(plane) = self.shelf.plane(&place.0, place.1) else { return };
        let closed = self.is_closed(&place) || !self.reopened.lock().contains(&place);
        let result = match wanted {
            Upkeep::Leave => return,
            Upkeep::Close => {
                // first, for a closing that fails half-way has closed something
                self.reopened.lock().remove(&place);
                self.mark(&place, true);
                let until = Deadline::within(Duration::from_secs(10));
                guarded(until, "self_close", plane.perform(&act, &Authority::self_fence(), until)).await
            }
            Upkeep::Stand => {
                let until = Deadline::within(Duration::from_mins(1));
                guarded(until, "stand", plane.perform(&act, &Authority::self_fence(), until)).await
            }
            Upkeep::Serve(epoch) if closed => {
                let Some(act) = upkeep_act(group, &place.0, place.1, &self.me, Upkeep::Close) else { return };
                let until = Deadline::within(Duration::from_mins(1));
                guarded(until, "reopen", plane.undo(&act, &Authority::reopen(epoch), until)).await
            }
            Upkeep::Serve(epoch) => {
                let until = Deadline::within(Duration::from_mins(1));
                guarded(until, "serve", plane.perform(&act, &Authority::reopen(epoch), until)).await
            }
        };
        self.settle(&place, wanted, closed, &result);
    }

    fn settle(&self, place: &Place, wanted: Upkeep, closed: bool, result: &Result<Evidence, PlaneError>) {
        let (group, plane) = place;
        match (wanted, result) {
            (Upkeep::Close, Ok(evidence)) if closed && evidence.change == Change::Already => {}
            (Upkeep::Close, Ok(evidence)) => {
                warn!(%group, %plane, seen = evidence.seen, "closed, the lease ends");
            }
            (Upkeep::Serve(_), Ok(evidence)) if closed => {
                if evidence.change == Change::Changed {
                    info!(%group, %plane, seen = evidence.seen, "reopened");
                }
                self.mark(place, false);
                self.reopened.lock().insert(place.clone());
            }
            (_, Ok(evidence)) if evidence.change == Change::Changed => {
                info!(%group, %plane, seen = evidence.seen, "upkeep");
            }
            (_, Ok(_)) => {}
            (_, Err(cause)) => warn!(%group, %plane, ?wanted, %cause, "upkeep failed"),
        }
    }

    fn closed_file(&self, place: &Place) -> std::path::PathBuf {
        self.closed_dir.join(format!("{}.{}", place.0, place.1))
    }

    fn is_closed(&self, place: &Place) -> bool {
        self.closed_file(place).exists()
    }

    fn mark(&self, place: &Place, closed: bool) {
        let file = self.closed_file(place);
        let done = if closed { std::fs::write(&file, b"") } else { std::fs::remove_file(&file) };
        match done {
            Err(cause) if closed || cause.kind() != std::io::ErrorKind::NotFound => {
                warn!(file = %file.display(), %cause, "mark of a closing not written");
            }
            _ => {}
        }
    }

    fn tell(&self, intent: &Intent, result: &Result<Evidence, Trouble>, took: Duration) {
        let (run, group, act, site) = (&intent.run, &intent.act.group, intent.act.name, &self.me);
        let (undo, took_ms, token) = (intent.undo, millis(took), intent.token);
        match result {
            Ok(e) => info!(%run, %group, %act, %site, undo, took_ms, %token, seen = e.seen, "step done"),
            Err(t) => {
                warn!(%run, %group, %act, %site, undo, took_ms, %token, code = t.code, why = t.text, "step failed");
            }
        }
    }
}

async fn act(
    plane: &dyn Plane,
    intent: &Intent,
    by: &Authority,
    until: Deadline,
) -> Result<Evidence, PlaneError> {
    if intent.undo {
        plane.undo(&intent.act, by, until).await
    } else {
        plane.perform(&intent.act, by, until).await
    }
}

/// Ends a call a little after its own deadline, and turns a panic into a failure of this act alone.
async fn guarded(
    until: Deadline,
    what: &str,
    work: impl Future<Output = Result<Evidence, PlaneError>>,
) -> Result<Evidence, PlaneError> {
    let outer = Deadline(until.0 + Duration::from_secs(1));
    let caught = outer.bound(what, AssertUnwindSafe(work).catch_unwind()).await?;
    caught.unwrap_or_else(|_| {
        Err(PlaneError::Failed { what: what.to_owned(), why: "the driver panicked".into() })
    })
}

fn trouble(code: &str, text: &str) -> Trouble {
    Trouble { code: code.to_owned(), text: text.to_owned() }
}

fn as_trouble(error: &PlaneError) -> Trouble {
    let code = match error {
        PlaneError::Refused { code, .. } => code.clone(),
        PlaneError::TimedOut { .. } => "DC-0220".into(),
        PlaneError::Unreachable { .. } => "DC-0221".into(),
        PlaneError::Failed { .. } => "DC-0222".into(),
    };
    Trouble { code, text: error.to_string() }
}
