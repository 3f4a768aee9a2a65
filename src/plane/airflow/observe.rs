//! One reading of the plane, cheap enough for every second: the gates each time, the database every few.

use std::time::Duration;

use dc_core::act::Finding;
use dc_core::ids::PlaneKind;
use dc_plane::{Deadline, Depth, PlaneError, PlaneFacts, Role};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::acts::ALIVE;
use crate::checks::finding;
use crate::db::Reading;
use crate::site::Site;
use crate::units::{Gate, Unit};

/// The last reading of the database and when it was made.
#[derive(Default)]
pub(crate) struct Seen(Mutex<Option<(Instant, Reading)>>);

/// How old a reading of the database may be when only a shallow look is asked for.
const OLD: Duration = Duration::from_secs(5);

/// Reads what the plane is here.
///
/// Errors: none of a unit or a database that does not answer: that is what is told.
pub(crate) async fn observe(
    site: &Site,
    seen: &Seen,
    depth: Depth,
    until: Deadline,
) -> Result<PlaneFacts, PlaneError> {
    let (api, writers) =
        tokio::join!(site.units.gate(Unit::Api, until), site.units.gate(Unit::Writers, until));
    let (api, writers) = (api?, writers?);
    let known = seen.0.lock().clone().filter(|(at, _)| depth == Depth::Shallow && at.elapsed() < OLD);
    let reading = match known {
        Some((at, reading)) => Ok((at.elapsed(), reading)),
        None => match site.database.read(until).await {
            Ok(reading) => {
                *seen.0.lock() = Some((Instant::now(), reading.clone()));
                Ok((Duration::ZERO, reading))
            }
            Err(cause) => Err(cause),
        },
    };
    let reading = reading.as_ref();
    let role = role(api.as_ref(), writers.as_ref(), reading.ok().map(|(_, reading)| reading));
    let mut findings = Vec::new();
    let summary = match reading {
        Ok((age, reading)) => {
            said(site, &mut findings, writers.as_ref(), reading);
            told(site, api.as_ref(), writers.as_ref(), reading, *age)
        }
        Err(cause) => format!("{}; {cause}", gates(api.as_ref(), writers.as_ref())),
    };
    Ok(PlaneFacts { plane: PlaneKind::Airflow, role: Some(role), lag: None, summary, findings })
}

fn open(gate: Option<&Gate>) -> bool {
    gate.is_some_and(Gate::open)
}

/// Writers that drain still finish tasks: a site is closed only when none of their parts is left.
fn role(api: Option<&Gate>, writers: Option<&Gate>, reading: Option<&Reading>) -> Role {
    let working = writers.is_some_and(|gate| gate.state != "closed");
    match reading {
        _ if api.is_none() && writers.is_none() => Role::Down,
        _ if working => Role::Writable,
        Some(reading) if open(api) && reading.replica => Role::Following,
        _ => Role::Closed,
    }
}

fn gates(api: Option<&Gate>, writers: Option<&Gate>) -> String {
    let word = |gate: Option<&Gate>| gate.map_or_else(|| "down".to_owned(), |gate| gate.state.clone());
    format!("API {}, writers {}", word(api), word(writers))
}

fn told(site: &Site, api: Option<&Gate>, writers: Option<&Gate>, reading: &Reading, age: Duration) -> String {
    let own = writers.and_then(|gate| site.own(&reading.schedulers, gate));
    let scheduler = own.map_or_else(
        || "no scheduler of its own".to_owned(),
        |row| format!("scheduler row {}, heartbeat {:.0} s old", row.id, (row.beat_age + age).as_secs_f64()),
    );
    let count = |state: &str| reading.tasks.get(state).copied().unwrap_or(0);
    let database = if reading.replica { "replica" } else { "primary" };
    format!(
        "{} on the {database}; {scheduler}; {} tasks running, {} queued",
        gates(api, writers),
        count("running"),
        count("queued")
    )
}

fn said(site: &Site, findings: &mut Vec<Finding>, writers: Option<&Gate>, reading: &Reading) {
    if writers.is_some_and(|gate| gate.state != "closed") && reading.replica {
        findings.push(finding(
            site,
            "DC-0609",
            true,
            "writers are not closed although the database is a replica",
        ));
    }
    if let Some(row) = writers.and_then(|gate| site.own(&reading.schedulers, gate))
        && row.beat_age > Duration::from_secs(30)
    {
        let text =
            format!("the own scheduler row {} has not moved for {:.0} s", row.id, row.beat_age.as_secs_f64());
        findings.push(finding(site, "DC-0616", false, &text));
    }
    if !reading.replica {
        for row in site.foreign(&reading.schedulers, ALIVE) {
            let text = format!("scheduler row {} of {} beats and is not kept here", row.id, row.host);
            findings.push(finding(site, "DC-0610", true, &text));
        }
    }
    if reading.import_errors > 0 {
        let text = format!("{} DAG files cannot be imported", reading.import_errors);
        findings.push(finding(site, "DC-0606", false, &text));
    }
}
