#![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

mod attention;
mod entries;
mod forward;
mod groups;
mod returns;
mod undo;

use super::*;
use crate::run::{Ended, RunResult};
use crate::script::{Bench, Intent, Scripted};
use PlaneKind::{Airflow, Kafka, Postgres, S3};

const ALL: &[PlaneKind] = &PlaneKind::ALL;

fn started(planes: &[PlaneKind]) -> (Bench, RunId) {
    let mut bench = Bench::with("orders", planes).unwrap();
    let (run, answer) = bench.start("orders", "fra").unwrap();
    assert_eq!(answer, Answer::Done);
    (bench, run)
}

fn site(name: &str) -> SiteId {
    SiteId::new(name).unwrap()
}

fn orders() -> GroupName {
    GroupName::new("orders").unwrap()
}

fn result(bench: &Bench, run: &RunId) -> Option<RunResult> {
    bench.run(run).unwrap().ended.as_ref().map(|Ended { result, .. }| *result)
}

fn trouble(text: &str) -> Trouble {
    Trouble { code: "DC-0999".into(), text: text.into() }
}

/// Every subset of planes that a spec may name.
fn subsets() -> Vec<Vec<PlaneKind>> {
    (1_u32..16)
        .map(|bits| PlaneKind::ALL.into_iter().enumerate().filter(move |(i, _)| bits >> i & 1 == 1))
        .map(|planes| planes.map(|(_, plane)| plane).collect::<Vec<_>>())
        .filter(|p| !p.contains(&Airflow) || (p.contains(&Postgres) && p.contains(&S3)))
        .collect()
}

fn refused(answer: &Answer) -> &crate::fail::Fail {
    match answer {
        Answer::Refused(fail) => fail,
        other => panic!("was not refused: {other:?}"),
    }
}

fn taken(bench: &Bench, run: &RunId) -> bool {
    bench.run(run).unwrap().taken.is_some()
}

fn opened(bench: &Bench, run: &RunId) -> bool {
    taken(bench, run) && bench.group("orders").unwrap().opened
}

fn abort(bench: &mut Bench, run: &RunId) -> Answer {
    bench.propose(Entry::Abort { run: run.clone(), why: "the operator wants it".into() })
}

fn turn(bench: &mut Bench, run: &RunId) -> Answer {
    let epoch = bench.group("orders").unwrap().epoch;
    bench.propose(Entry::Return { run: run.clone(), epoch })
}
