//! Each act of the plane: probe, do, verify, and what was seen.

use std::time::Duration;

use dc_core::act::{Act, AirflowAct, Evidence, Outcome, Progress};
use dc_core::authority::{Authority, Origin};
use dc_core::position::Position;
use dc_plane::{Deadline, PlaneError, wait_until};

use crate::checks;
use crate::site::{Moving, Site, policy_key};
use crate::tools;
use crate::units::{Gate, Unit};

/// A scheduler that beats this recently is alive.
pub(crate) const ALIVE: Duration = Duration::from_secs(15);
/// What is kept back of a deadline to say what went wrong.
const RESERVE: Duration = Duration::from_secs(5);

/// Whether the work of an act stands.
pub(crate) async fn probe(
    site: &Site,
    name: AirflowAct,
    act: &Act,
    until: Deadline,
) -> Result<Progress, PlaneError> {
    let stands = match name {
        AirflowAct::StartWriters | AirflowAct::RerunPolicy => site.writers_serve(until).await?.map(|row| {
            let noted = site.noted(&policy_key(act, false)).map(|done| format!("; {}", done.seen));
            format!("own scheduler row {} beats{}", row.id, noted.unwrap_or_default())
        }),
        AirflowAct::WarmApi | AirflowAct::WarmStandby | AirflowAct::Stand => standby(site, until).await?,
        AirflowAct::OpenApi => open_api_stands(site, until).await?,
        AirflowAct::CloseApi => {
            let gate = site.units.gate(Unit::Api, until).await?;
            let kept = site.units.kept(Unit::Api, until).await?;
            let alone = kept.is_some_and(|kept| kept.pids.len() <= 1);
            gate.filter(|gate| gate.state == "closed" && alone)
                .map(|_| "API closed: only its warm interpreter is left".to_owned())
        }
        AirflowAct::Serve => match (open_api_stands(site, until).await?, site.writers_serve(until).await?) {
            (Some(api), Some(row)) => Some(format!("{api}; own scheduler row {} beats", row.id)),
            _ => None,
        },
        AirflowAct::SelfClose => closed(site, until).await?,
        // these read, or prove anew each time
        AirflowAct::Preflight
        | AirflowAct::Recheck
        | AirflowAct::Quiesce
        | AirflowAct::ProveGone
        | AirflowAct::UploadTaskLogs
        | AirflowAct::Verify => None,
    };
    Ok(stands.map_or(Progress::NotYet, |seen| Progress::Done(Evidence::already(seen))))
}

/// Does an act, or finds it done.
pub(crate) async fn perform(
    site: &Site,
    name: AirflowAct,
    act: &Act,
    by: &Authority,
    until: Deadline,
) -> Result<Evidence, PlaneError> {
    if let Progress::Done(evidence) = probe(site, name, act, until).await? {
        return Ok(evidence);
    }
    match name {
        AirflowAct::Preflight | AirflowAct::Recheck => checks::run(site, act, until).await,
        AirflowAct::WarmApi | AirflowAct::WarmStandby | AirflowAct::Stand => stand(site, by, until).await,
        AirflowAct::Quiesce => quiesce(site, until).await,
        AirflowAct::ProveGone => prove_gone(site, until).await,
        AirflowAct::UploadTaskLogs => upload_task_logs(site, until).await,
        AirflowAct::CloseApi => {
            let (seen, changed) = site.close_api(until).await?;
            Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
        }
        AirflowAct::RerunPolicy => {
            let done = site.apply_policy(&policy_key(act, false), by, until).await?;
            Ok(Evidence::changed(done.seen))
        }
        AirflowAct::StartWriters => {
            let (moving, warmed) = site.open_writers(&policy_key(act, false), by, until).await?;
            Ok(Evidence::changed(told(&moving, warmed)))
        }
        AirflowAct::OpenApi => open_api(site, by, until).await,
        AirflowAct::Verify => verify(site, act, by, until).await,
        AirflowAct::SelfClose => self_close(site, until).await,
        AirflowAct::Serve => serve(site, act, by, until).await,
    }
}

/// Takes an act back, before the takeover.
pub(crate) async fn undo(
    site: &Site,
    name: AirflowAct,
    act: &Act,
    by: &Authority,
    until: Deadline,
) -> Result<Evidence, PlaneError> {
    match name {
        AirflowAct::Quiesce | AirflowAct::ProveGone => {
            if let Some(row) = site.writers_serve(until).await? {
                return Ok(Evidence::already(format!("own scheduler row {} beats", row.id)));
            }
            let key = policy_key(act, true);
            let gate = site.units.gate(Unit::Writers, until).await?;
            let mut decided = String::new();
            if !gate.as_ref().is_some_and(Gate::open) {
                // what still drains holds tasks that no new scheduler may find running
                let gone = site.units.end(Unit::Writers, Duration::ZERO, until).await?;
                let done = site.apply_policy(&key, by, until).await?;
                decided = format!("{} processes of the old unit were ended; {}; ", gone.killed, done.seen);
            }
            let (moving, warmed) = site.open_writers(&key, by, until).await?;
            Ok(Evidence::changed(format!("{decided}{}", told(&moving, warmed))))
        }
        AirflowAct::CloseApi => {
            let (_, changed) = site.open_api(by, until).await?;
            site.api_answers(until).await?;
            let seen = "API answers, its task routes are built";
            Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
        }
        _ => Ok(Evidence::already("nothing of this act is to be taken back")),
    }
}

fn told(moving: &Moving, warmed: Duration) -> String {
    format!(
        "own scheduler row {} of {} seen after {:.2} s, its heartbeat moved after {:.2} s (warm after {:.2} s)",
        moving.row.id,
        moving.row.host,
        moving.seen.as_secs_f64(),
        moving.moved.as_secs_f64(),
        warmed.as_secs_f64()
    )
}

/// A warm standby: the API answers on the replica, the writers wait behind a closed gate.
async fn standby(site: &Site, until: Deadline) -> Result<Option<String>, PlaneError> {
    let api = site.units.gate(Unit::Api, until).await?;
    let writers = site.units.gate(Unit::Writers, until).await?;
    let warm = api.is_some_and(|gate| gate.open()) && writers.is_some_and(|gate| gate.state == "closed");
    if !warm || site.api.execution_health(until).await.is_err() {
        return Ok(None);
    }
    Ok(Some("API answers on the replica, writers are warm behind a closed gate".to_owned()))
}

async fn stand(site: &Site, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
    // closing first: a scheduler that runs where it must not is the worse of two faults
    let mut ended = 0;
    let writers = site.units.gate(Unit::Writers, until).await?;
    if writers.is_some_and(|gate| gate.state != "closed") {
        ended = site.units.end(Unit::Writers, Duration::ZERO, until).await?.killed;
    }
    if site.database.writable(until).await? {
        return Err(PlaneError::refused(
            "DC-0604",
            "the metadata database here takes writes: this is no standby, and its API would not be one",
        ));
    }
    let (api, writers) = tokio::join!(site.open_api(by, until), site.units.warm(Unit::Writers, until));
    let ((_, api_started), (_, writers_started)) = (api?, writers?);
    site.api_answers(until).await?;
    let mut seen = "API answers on the replica, writers are warm behind a closed gate".to_owned();
    if ended > 0 {
        seen = format!("{ended} processes of writers that ran here were ended; {seen}");
    }
    let changed = ended > 0 || api_started || writers_started;
    Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
}

/// No task starts any more; running ones finish up to the limit.
async fn quiesce(site: &Site, until: Deadline) -> Result<Evidence, PlaneError> {
    let living = site.units.kept(Unit::Writers, until).await?.map_or(0, |kept| kept.pids.len());
    let limit = site.checked.spec.drain_limit.0.min(until.left().saturating_sub(RESERVE));
    let began = tokio::time::Instant::now();
    if site.units.stop(Unit::Writers, limit, until).await? {
        return Ok(if living > 0 {
            Evidence::changed(format!(
                "scheduler, dag processor and triggerer ended after {:.2} s, {living} processes before",
                began.elapsed().as_secs_f64()
            ))
        } else {
            Evidence::already("no keeper of writers lives here")
        });
    }
    let held = site.api.held(until).await.unwrap_or_default();
    let named: Vec<String> = held.iter().take(5).map(crate::rest::Instance::shown).collect();
    Err(PlaneError::Failed {
        what: "quiesce".into(),
        why: format!(
            "{} tasks still run after {:.1} s, limit {:.1} s (airflow.drain_limit): {}",
            held.len(),
            began.elapsed().as_secs_f64(),
            limit.as_secs_f64(),
            named.join(", ")
        ),
    })
}

/// No process of the writers exists, and nobody else's scheduler beats in the database.
async fn prove_gone(site: &Site, until: Deadline) -> Result<Evidence, PlaneError> {
    let gone = site.units.end(Unit::Writers, Duration::ZERO, until).await?;
    let reading = site.database.read(until).await?;
    if let Some(other) = site.foreign(&reading.schedulers, ALIVE).first() {
        return Err(PlaneError::refused(
            "DC-0610",
            format!(
                "scheduler row {} of {} beat {:.1} s ago and is not kept here; stop it where it runs",
                other.id,
                other.host,
                other.beat_age.as_secs_f64()
            ),
        ));
    }
    let open_tasks = reading.held();
    let seen = format!(
        "the writers' process tree is empty ({} processes were ended for it), {open_tasks} tasks are open",
        gone.killed
    );
    let evidence = if gone.killed > 0 { Evidence::changed(seen) } else { Evidence::already(seen) };
    Ok(evidence.with(Outcome::Position(Position::Airflow { open_tasks })))
}

async fn upload_task_logs(site: &Site, until: Deadline) -> Result<Evidence, PlaneError> {
    const NONE: &str = "no finished attempt's log is on disk only";
    let working = |pids: usize| pids > 1; // the warm interpreter alone runs no task
    if site.units.kept(Unit::Writers, until).await?.is_some_and(|kept| working(kept.pids.len())) {
        return Err(PlaneError::refused(
            "DC-0622",
            "writers live here: the log of a running task would be cut",
        ));
    }
    if site.units.logs_waiting(until).await? == Some(0) {
        return Ok(Evidence::already(NONE));
    }
    let uploaded = tools::upload_logs(&site.checked, until).await?;
    Ok(if uploaded.found == 0 {
        Evidence::already(NONE)
    } else {
        Evidence::changed(format!("{} logs that were on disk only are in the bucket", uploaded.uploaded))
    })
}

fn canary_value(site: &Site, epoch: &str) -> String {
    format!("{} epoch {epoch}", site.name())
}

async fn open_api_stands(site: &Site, until: Deadline) -> Result<Option<String>, PlaneError> {
    let gate = site.units.gate(Unit::Api, until).await?;
    if !gate.is_some_and(|gate| gate.open()) || site.api.execution_health(until).await.is_err() {
        return Ok(None);
    }
    Ok(site.database.writable(until).await?.then(|| "API is open on a database that takes writes".to_owned()))
}

async fn open_api(site: &Site, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
    if !by.may_open() {
        return Err(PlaneError::refused(
            "DC-0620",
            "the API of a holder is opened by a step or a reopen only",
        ));
    }
    if !site.database.writable(until).await? {
        return Err(PlaneError::refused("DC-0604", "the metadata database here takes no writes"));
    }
    let (_, changed) = site.open_api(by, until).await?;
    site.api_answers(until).await?;
    let seen = "API is open on a database that takes writes, its task routes are built";
    Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
}

/// The own scheduler row moves; a value is written and one canary run goes through scheduler, executor and API.
async fn verify(site: &Site, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
    let moving = site.moving(until).await?;
    site.api.set_variable("dc_switch_canary", &canary_value(site, &act.epoch.to_string()), until).await?;
    let mut seen = format!(
        "own scheduler row {} of {} moves; a variable was written through the API",
        moving.row.id, moving.row.host
    );
    let dag = &site.checked.canary_dag;
    let ready = site.api.dag(dag, until).await?.filter(|found| !found.is_paused);
    if ready.is_none() {
        let text = format!("DAG {dag} is not published, or is paused: no canary run was made");
        let finding = checks::finding(site, "DC-0614", false, &text);
        seen.push_str("; no canary DAG");
        return Ok(Evidence::changed(seen).with(Outcome::Findings(vec![finding])));
    }
    let token = match by.origin() {
        Origin::Step { token, .. } => token.0,
        Origin::SelfFence | Origin::Reopen { .. } => 0,
    };
    let run = format!("dcswitch__{}__{token}", act.run.as_ref().map_or("upkeep", |run| run.0.as_str()));
    let began = tokio::time::Instant::now();
    site.api.trigger(dag, &run, until).await?;
    wait_until(until, Duration::from_millis(250), "the canary run to end", || async {
        match site.api.run_state(dag, &run, until).await?.as_deref() {
            Some("success") => Ok(Some(())),
            Some("failed") => {
                Err(PlaneError::Failed { what: "canary".into(), why: format!("run {run} of {dag} failed") })
            }
            _ => Ok(None),
        }
    })
    .await?;
    Ok(Evidence::changed(format!(
        "{seen}; canary run {run} ended with success after {:.1} s",
        began.elapsed().as_secs_f64()
    )))
}

async fn closed(site: &Site, until: Deadline) -> Result<Option<String>, PlaneError> {
    let writers = site.units.gate(Unit::Writers, until).await?;
    let api = site.units.gate(Unit::Api, until).await?;
    let kept = site.units.kept(Unit::Writers, until).await?;
    let shut = |gate: &Option<Gate>| gate.as_ref().is_some_and(|gate| gate.state == "closed");
    let alone = kept.is_some_and(|kept| kept.pids.len() <= 1);
    Ok((shut(&writers) && shut(&api) && alone).then(|| "both gates are closed, no part runs".to_owned()))
}

/// Closes without asking anybody: a third of the time for tasks to finish, then the tree is ended.
async fn self_close(site: &Site, until: Deadline) -> Result<Evidence, PlaneError> {
    let grace = until.left() / 3;
    let (writers, api) = tokio::join!(site.units.end(Unit::Writers, grace, until), site.close_api(until));
    let gone = writers?;
    let (api, _) = api?;
    Ok(Evidence::changed(format!(
        "the writers' process tree is empty, {} processes were ended for it; {api}",
        gone.killed
    )))
}

/// The holder's upkeep: what ended by itself is started again, after the policy.
async fn serve(site: &Site, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
    let api = open_api(site, by, until).await?;
    let gate = site.units.gate(Unit::Writers, until).await?;
    if gate.as_ref().is_some_and(|gate| gate.whole(Unit::Writers)) {
        let moving = site.moving(until).await?;
        return Ok(Evidence::already(format!("{}; own scheduler row {} moves", api.seen, moving.row.id)));
    }
    if gate.is_some_and(|gate| gate.state == "draining") {
        return Err(PlaneError::refused(
            "DC-0608",
            "the writers drain: they are left to finish their tasks before new ones start",
        ));
    }
    let key = policy_key(act, false);
    // of an earlier upkeep, after which a scheduler ran
    site.forget_note()?;
    let (moving, warmed) = site.open_writers(&key, by, until).await?;
    let decided = site.noted(&key).map(|done| done.seen).unwrap_or_default();
    Ok(Evidence::changed(format!("{}; {decided}; {}", api.seen, told(&moving, warmed))))
}
