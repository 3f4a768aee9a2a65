//! The fence: clients out, the primary stopped by its own deadline; and the way back from each.

use std::time::Duration;

use dc_core::act::{Act, Evidence, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::position::ShutdownToken;
use dc_plane::{Deadline, PlaneError};
use rustix::process::Signal;
use tokio_postgres::types::Type;

use crate::acts::{foreign_fence, mark_of, must_open};
use crate::control::{Control, State};
use crate::db;
use crate::door::{self, Answer, Knock};
use crate::local::{Local, Part, Stop};
use crate::procs::{self, Process};

/// How long clients may take to end once told to.
const SWEEP_LIMIT: Duration = Duration::from_secs(5);
/// How long a server that works may take for one small question before it counts as stopping.
const ALIVE: Duration = Duration::from_millis(500);
/// Within this time a server has noticed the signal that tells it to stop.
const NOTICED: Duration = Duration::from_millis(200);

impl Local {
    /// Whether clients are shut out by this very run, proved as `fence_clients` proves it.
    pub(crate) async fn probe_fence(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let held = self.marks.get()?.fence;
        let ours = held.is_some_and(|held| Some(&held.run) == act.run.as_ref());
        if !ours || self.door_is_shut()? != Some(true) || self.postmaster().is_none() {
            return Ok(Progress::NotYet);
        }
        if !self.block_is_loaded(until).await? || !self.nobody_is_in(until).await? {
            return Ok(Progress::NotYet);
        }
        let knocked = self.knock_all(until).await?;
        if knocked.by_rule != knocked.asked {
            return Ok(Progress::NotYet);
        }
        Ok(Progress::Done(Evidence::already(format!("{knocked}; 0 client processes"))))
    }

    /// Shuts everybody out but our two roles, ends whoever is in, and proves that none is left.
    ///
    /// Errors: `Refused` when a client outlives it; the undo lets all in again.
    pub(crate) async fn fence_clients(
        &self,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mark = mark_of(by)?;
        if let Some(no) = foreign_fence(&self.marks.get()?, &mark) {
            return Err(no);
        }
        self.marks.update(move |m| m.fence = Some(mark)).await?;
        let begun = tokio::time::Instant::now();
        self.shut_door(until).await?;
        let shut = begun.elapsed();
        let soon = Deadline(until.0.min(Deadline::within(SWEEP_LIMIT).0));
        let swept = self.end_clients(soon).await?;
        let knocked = self.knock_all(until).await?;
        if knocked.by_rule != knocked.asked {
            return Err(PlaneError::refused("DC-0323", format!("the door is not shut: {knocked}")));
        }
        Ok(Evidence::changed(format!(
            "door shut after {shut:.1?}; {} client processes ended, 0 left after {:.1?} and {} looks; {knocked}",
            swept.ended,
            begun.elapsed(),
            swept.rounds
        )))
    }

    /// Lets clients in again at a site whose run was rolled back; a primary that died meanwhile is started.
    pub(crate) async fn undo_fence(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        must_open(by)?;
        let mine = mark_of(by)?;
        let marks = self.marks.get()?;
        if self.site == act.source {
            self.start_again(by, until).await?;
        }
        if marks.fence.is_none() && self.door_is_shut()? == Some(false) {
            return Ok(Evidence::already("no fence stands and the door is open"));
        }
        let begun = tokio::time::Instant::now();
        self.open_door(|marks| foreign_fence(marks, &mine), until).await?;
        self.marks.update(move |m| m.fence = None).await?;
        let knocked = self.knock_all(until).await?;
        Ok(Evidence::changed(format!("door open after {:.1?}; {knocked}", begun.elapsed())))
    }

    /// Says the name of each application role at both doors, for each of the group's databases.
    pub(crate) async fn knock_all(&self, until: Deadline) -> Result<Knocked, PlaneError> {
        let address = self.address(&self.site)?;
        let doors = [Knock::Socket(&self.config.socket_dir, address.port), Knock::Tcp(address)];
        let mut logins = Vec::new();
        for role in &self.app_roles {
            for database in &self.databases {
                logins.extend(doors.iter().map(|at| door::probe(at, role, database, until)));
            }
        }
        let mut knocked = Knocked::default();
        for answer in futures::future::try_join_all(logins).await? {
            knocked.asked += 1;
            knocked.by_rule += usize::from(answer.by_rule());
            knocked.let_in += usize::from(answer == Answer::Asked);
        }
        Ok(knocked)
    }

    /// Shuts the primary down by its own deadline and reads the token of its last word.
    ///
    /// Errors: `Refused` when the target does not stream (nothing was stopped), when the limit passed (it may still be
    /// stopping: undo starts it again), or when the control file does not say "shut down".
    pub(crate) async fn stop_source(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mark = mark_of(by)?;
        let _one = self.role_lock(until).await?;
        if let Some(no) = foreign_fence(&self.marks.get()?, &mark) {
            return Err(no);
        }
        if self.postmaster().is_none() {
            let control = self.control(until).await?;
            return Ok(stopped(token(&control)?, "was stopped", false));
        }
        let ended = match self.only_target_streams(act, until).await {
            // an order to stop got through before, and only its answer was lost
            Err(_) if procs::stopping(&self.config.data_dir) => 0,
            found => found?,
        };
        // a serve that comes now must find the fence, also when no act shut the clients out before
        self.marks
            .update(move |m| m.fence = m.fence.take().filter(|f| f.run == mark.run).or(Some(mark)))
            .await?;
        let begun = tokio::time::Instant::now();
        let limit = Deadline(until.0.min(Deadline::within(self.policy.stop_limit.0).0));
        if let Err(e) = self.stop(Stop::Fast, limit).await {
            let why = format!("{e}; limit {:?} (policy.stop_limit)", self.policy.stop_limit.0);
            return Err(PlaneError::refused("DC-0324", why));
        }
        let control = self.control(until).await?;
        let how = format!("stopped in {:.1?}, {ended} other readers of the log ended", begun.elapsed());
        Ok(stopped(token(&control)?, &how, true))
    }

    /// Whether the instance is stopped with a token, by this run.
    pub(crate) async fn probe_stop(&self, act: &Act, until: Deadline) -> Result<Progress, PlaneError> {
        let ours = self.marks.get()?.fence.is_some_and(|held| Some(&held.run) == act.run.as_ref());
        if !ours || self.postmaster().is_some() {
            return Ok(Progress::NotYet);
        }
        let control = self.control(until).await?;
        Ok(token(&control).map_or(Progress::NotYet, |t| Progress::Done(stopped(t, "was stopped", false))))
    }

    /// The target streams; whoever else reads the log is ended, or the shutdown would wait for it.
    async fn only_target_streams(&self, act: &Act, until: Deadline) -> Result<usize, PlaneError> {
        let name = Self::name_of(act.new_holder());
        let sql = "select pid, application_name = $1 as target, state = 'streaming' as streams from pg_stat_replication";
        let rows = self.own.all(until, "read standbys", sql, &[(&name, Type::TEXT)]).await?;
        let mut target = false;
        let mut others = Vec::new();
        for row in &rows {
            if db::get::<bool>(row, "target")? {
                target |= db::get::<Option<bool>>(row, "streams")?.unwrap_or(false);
            } else {
                others.extend(Process::of(db::get(row, "pid")?));
            }
        }
        if !target {
            let why = format!("{} does not stream as {name}; the source was not stopped", act.new_holder());
            return Err(PlaneError::refused("DC-0305", why));
        }
        for other in &others {
            other.signal(Signal::TERM)?;
        }
        Ok(others.len())
    }

    /// Starts the source again as primary, door shut: the undo of the client fence opens it.
    pub(crate) async fn undo_stop(&self, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        must_open(by)?;
        let mine = mark_of(by)?;
        let _one = self.role_lock(until).await?;
        if let Some(no) = foreign_fence(&self.marks.get()?, &mine) {
            return Err(no);
        }
        if self.postmaster().is_some() {
            if self.works(until).await {
                return Ok(Evidence::already("the primary runs and answers"));
            }
            // its shutdown hangs; the checkpoint, if it came to that, is on disk already
            self.stop(Stop::Immediate, until).await?;
        }
        self.start_as_primary(until).await
    }

    /// Whether a running server takes new sessions, which one that is stopping does not.
    ///
    /// Asked twice: a stop that was ordered just before may not have been noticed at the first time.
    async fn works(&self, until: Deadline) -> bool {
        for pause in [NOTICED, Duration::ZERO] {
            let soon = Deadline(until.0.min(Deadline::within(ALIVE).0));
            if self.own.sibling().run(soon, "ask whether it answers", "select 1").await.is_err() {
                return false;
            }
            tokio::time::sleep(pause).await;
        }
        true
    }

    /// Starts a source that died in a run which is taken back, door shut, unless another run fenced it.
    pub(crate) async fn start_again(&self, by: &Authority, until: Deadline) -> Result<(), PlaneError> {
        if let Some(no) = foreign_fence(&self.marks.get()?, &mark_of(by)?) {
            return Err(no);
        }
        self.ensure_primary(until).await.map(drop)
    }

    /// Starts the primary, door shut, if no instance runs.
    ///
    /// Errors: as of `start_as_primary`.
    pub(crate) async fn ensure_primary(&self, until: Deadline) -> Result<Option<Evidence>, PlaneError> {
        if self.postmaster().is_some() {
            return Ok(None);
        }
        let _one = self.role_lock(until).await?;
        if self.postmaster().is_some() {
            return Ok(None);
        }
        self.start_as_primary(until).await.map(Some)
    }

    /// Starts a data directory that was a primary's, as a primary, door shut.
    ///
    /// Errors: `Refused` for one that was a standby's: only a promotion makes a primary of that.
    pub(crate) async fn start_as_primary(&self, until: Deadline) -> Result<Evidence, PlaneError> {
        let control = self.control(until).await?;
        let standby = self.config.data_dir.join("standby.signal").exists();
        if !control.state.of_a_primary() || standby {
            let why = format!(
                "the data directory is a standby's ({:?}); only a promotion may open it",
                control.state.word()
            );
            return Err(PlaneError::refused("DC-0303", why));
        }
        let begun = tokio::time::Instant::now();
        let postmaster = self.start(Part::Primary, until).await?;
        let seen =
            format!("primary started in {:.1?} (process {}), door shut", begun.elapsed(), postmaster.pid);
        Ok(Evidence::changed(seen))
    }
}

/// Answers at the doors.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Knocked {
    /// Logins begun.
    pub asked: usize,
    /// Refused by a rule.
    pub by_rule: usize,
    /// Asked for a password.
    pub let_in: usize,
}

impl std::fmt::Display for Knocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { asked, by_rule, let_in } = self;
        write!(f, "{asked} probe logins, {by_rule} refused, {let_in} asked for a password")
    }
}

/// The token of a cleanly stopped primary.
fn token(control: &Control) -> Result<ShutdownToken, PlaneError> {
    if control.state != State::ShutDown {
        let why =
            format!("the control file says {:?}, a clean stop says \"shut down\"", control.state.word());
        return Err(PlaneError::refused("DC-0325", why));
    }
    Ok(ShutdownToken {
        system_id: control.system_id,
        timeline: control.timeline,
        checkpoint: control.checkpoint,
    })
}

fn stopped(token: ShutdownToken, how: &str, changed: bool) -> Evidence {
    let seen = format!(
        "{how}; shut down at checkpoint {}, timeline {}, system {}",
        token.checkpoint, token.timeline, token.system_id
    );
    let evidence = if changed { Evidence::changed(seen) } else { Evidence::already(seen) };
    evidence.with(Outcome::Shutdown(token))
}
