//! Preflight and recheck: everything that speaks against a move, said at once. Changes nothing.

use std::fmt::Write as _;

use dc_core::act::{Act, Evidence, Finding, Outcome};
use dc_core::ids::PlaneKind;
use dc_plane::{Deadline, PlaneError};

use crate::acts::ALIVE;
use crate::db::Reading;
use crate::site::Site;
use crate::tools::{self, Facts};
use crate::units::{Gate, Unit};

/// A finding of this plane at this site.
pub(crate) fn finding(site: &Site, code: &str, blocking: bool, text: &str) -> Finding {
    Finding {
        code: code.to_owned(),
        plane: Some(PlaneKind::Airflow),
        site: site.name().clone(),
        blocking,
        text: text.to_owned(),
    }
}

struct Found<'a> {
    site: &'a Site,
    all: Vec<Finding>,
}

impl Found<'_> {
    fn block(&mut self, code: &str, text: impl AsRef<str>) {
        self.all.push(finding(self.site, code, true, text.as_ref()));
    }
    fn say(&mut self, code: &str, text: impl AsRef<str>) {
        self.all.push(finding(self.site, code, false, text.as_ref()));
    }
}

/// Whether this site holds the group while the act looks. A recheck comes after the writers were stopped.
fn holds(site: &Site, act: &Act) -> bool {
    *site.name() == act.source
}

/// All findings, and what both sites must have in common.
pub(crate) async fn run(site: &Site, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
    let recheck = act.name.word() == "recheck";
    let nonce = act.run.as_ref().map_or("upkeep", |run| run.0.as_str());
    let (facts, reading, api, writers) = tokio::join!(
        installation(site, nonce, until),
        site.database.read(until),
        site.api.answers(until),
        site.units.gate(Unit::Writers, until),
    );
    let mut found = Found { site, all: Vec::new() };
    match &facts {
        Ok(facts) => of_installation(&mut found, facts),
        Err(cause) => found.block("DC-0601", cause.to_string()),
    }
    match &reading {
        Ok(reading) => {
            of_database(&mut found, reading, holds(site, act));
            if let Some(why) = facts.as_ref().ok().and_then(|facts| schema(&reading.heads, facts)) {
                found.block("DC-0602", why);
            }
        }
        Err(cause) => found.block("DC-0604", cause.to_string()),
    }
    of_units(&mut found, act, recheck, api.err(), writers.ok().flatten().as_ref());
    let mut evidence = Evidence::already(told(facts.as_ref().ok(), reading.as_ref().ok(), found.all.len()));
    if let Ok(facts) = &facts {
        for (of, digest) in common(facts) {
            let plane = PlaneKind::Airflow;
            evidence = evidence.with(Outcome::Fingerprint { plane, site: site.name().clone(), of, digest });
        }
    }
    Ok(evidence.with(Outcome::Findings(found.all)))
}

/// As a running interpreter has it, else as a new one would.
async fn installation(site: &Site, nonce: &str, until: Deadline) -> Result<Facts, PlaneError> {
    match site.units.facts(nonce, until).await {
        Ok(Some(facts)) => Ok(facts),
        Ok(None) | Err(_) => tools::facts(&site.checked, nonce, until).await,
    }
}

/// What must be equal at both sites.
fn common(facts: &Facts) -> Vec<(String, String)> {
    let mut all = vec![
        ("airflow version".to_owned(), facts.version.clone()),
        ("airflow schema".to_owned(), facts.heads.join(" ")),
        ("airflow executor".to_owned(), facts.executor.clone()),
    ];
    all.extend(facts.fingerprints.iter().map(|(key, digest)| (key.replace('_', " "), digest.clone())));
    all
}

fn of_installation(found: &mut Found<'_>, facts: &Facts) {
    for key in &facts.missing {
        let why = format!("{key} is not set: every process would make its own, and tasks would be refused");
        found.block("DC-0607", why);
    }
    for key in &facts.short {
        found.say("DC-0607", format!("{key} has fewer than 16 characters: it can be guessed"));
    }
    if facts.executor != "LocalExecutor" {
        let why = format!(
            "executor {} runs tasks on other hosts; this driver can stop LocalExecutor only",
            facts.executor
        );
        found.block("DC-0613", why);
    }
    if !facts.remote_logging || facts.remote_log_base.is_empty() {
        found.say("DC-0611", "task logs stay on this host: they do not move with the group");
    }
}

/// Why these binaries cannot run on a schema; none if they can.
fn schema(heads: &[String], facts: &Facts) -> Option<String> {
    let (stands, wanted) = (heads.join(" "), facts.heads.join(" "));
    (stands != wanted)
        .then(|| format!("the schema is at {stands}, Airflow {} here wants {wanted}", facts.version))
}

fn of_database(found: &mut Found<'_>, reading: &Reading, holder: bool) {
    match (holder, reading.replica, reading.writable) {
        (true, _, false) => found.block("DC-0604", "the metadata database of the holder takes no writes"),
        (false, false, _) => found.block("DC-0604", "the metadata database of the standby is no replica"),
        _ => {}
    }
    if reading.import_errors > 0 {
        found.say("DC-0606", format!("{} DAG files cannot be imported", reading.import_errors));
    }
    if holder {
        let site = found.site;
        for row in site.foreign(&reading.schedulers, ALIVE) {
            found.block(
                "DC-0610",
                format!(
                    "scheduler row {} of {} beats and is not kept here: its end could not be proved",
                    row.id, row.host
                ),
            );
        }
    }
}

fn of_units(
    found: &mut Found<'_>,
    act: &Act,
    recheck: bool,
    api: Option<PlaneError>,
    writers: Option<&Gate>,
) {
    let holder = holds(found.site, act);
    let open = writers.is_some_and(Gate::open);
    if !holder && writers.is_some_and(|gate| gate.state != "closed") {
        found.block("DC-0609", "writers run at the standby");
    }
    // by the recheck the source's API is closed and its writers are gone
    if let Some(cause) = api.filter(|_| !(holder && recheck)) {
        let text = format!("the API does not answer: {cause}");
        if holder || recheck { found.block("DC-0603", text) } else { found.say("DC-0603", text) }
    }
    if holder && !recheck && !open {
        found.block(
            "DC-0605",
            "no writers are open at the holder under a keeper: there is nothing to stop and prove gone",
        );
    }
}

fn told(facts: Option<&Facts>, reading: Option<&Reading>, findings: usize) -> String {
    let mut text = match facts {
        Some(facts) => format!(
            "Airflow {}, tasks end themselves within {:.0} s of losing their API",
            facts.version,
            facts.fencing_bound_s()
        ),
        None => "Airflow unknown".to_owned(),
    };
    if let Some(reading) = reading {
        let replica = if reading.replica { "replica" } else { "primary" };
        let at = reading.at.map_or_else(String::new, |at| format!(" at {at}"));
        let heads = reading.heads.join(" ");
        let _ = write!(text, ", schema {heads} on a {replica}{at}, {} tasks held", reading.held());
    }
    // writing to a String cannot fail
    let _ = write!(text, ", {findings} findings");
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn facts(version: &str, head: &str, fernet: &str) -> Facts {
        Facts {
            version: version.into(),
            heads: vec![head.into()],
            executor: "LocalExecutor".into(),
            fingerprints: BTreeMap::from([("fernet_key".into(), fernet.into())]),
            missing: Vec::new(),
            short: Vec::new(),
            numbers: BTreeMap::new(),
            remote_logging: true,
            remote_log_base: "s3://orders/logs".into(),
        }
    }

    #[test]
    fn binaries_of_another_release_than_the_schema_are_named_with_both() {
        let here = facts("3.3.1", "aaaa", "k");
        assert_eq!(schema(&["aaaa".into()], &here), None);
        let why = schema(&["bbbb".into()], &here).unwrap_or_default();
        assert!(why.contains("is at bbbb, Airflow 3.3.1 here wants aaaa"), "{why}");
    }

    #[test]
    fn what_the_sites_must_have_in_common_differs_with_version_and_key() {
        let differs = |other: &Facts| {
            let (one, other) = (common(&facts("3.3.2", "aaaa", "k")), common(other));
            let pairs = one.into_iter().zip(other).filter(|(a, b)| a != b);
            pairs.map(|((of, _), _)| of).collect::<Vec<_>>()
        };
        assert!(differs(&facts("3.3.2", "aaaa", "k")).is_empty());
        assert_eq!(differs(&facts("3.3.1", "aaaa", "k")), ["airflow version"]);
        assert_eq!(differs(&facts("3.3.2", "bbbb", "other")), ["airflow schema", "fernet key"]);
    }
}
