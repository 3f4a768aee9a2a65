//! Starts, renewals and retries that are refused, stale or repeated.

use super::*;
use crate::codes::Code;

#[test]
fn a_second_run_of_a_group_is_refused_and_names_the_first() {
    let (mut bench, run) = started(ALL);
    let (_, answer) = bench.start("orders", "fra").unwrap();
    let fail = refused(&answer);
    assert_eq!(fail.code, Code::RUN_OPEN);
    assert!(fail.why.contains(&run.0) && fail.next.contains("attach"), "{fail:?}");
}

#[test]
fn a_plan_shown_before_something_changed_is_not_run() {
    let mut bench = Bench::with("orders", ALL).unwrap();
    let shown = bench.plan("orders", "fra").unwrap().unwrap().hash();
    let mut spec = bench.group("orders").unwrap().spec.clone();
    spec.policy.lag_bytes_max = 1;
    assert_eq!(bench.propose(Entry::ApplyGroup { spec: Box::new(spec), over: 1 }), Answer::Done);
    let (run, answer) = bench.start_planned("orders", "fra", &shown).unwrap();
    assert_eq!(refused(&answer).code, Code::STALE_PLAN);
    assert!(bench.run(&run).is_none() && bench.group("orders").unwrap().run.is_none());
}

#[test]
fn a_plan_of_an_epoch_that_is_over_is_not_run() {
    let (mut bench, _) = started(ALL);
    let shown = Bench::with("orders", ALL).unwrap().plan("orders", "fra").unwrap().unwrap().hash();
    bench.finish();
    let (back, _) = bench.start("orders", "rome").unwrap();
    bench.finish();
    assert_eq!(result(&bench, &back), Some(RunResult::Done));
    let (_, answer) = bench.start_planned("orders", "fra", &shown).unwrap();
    assert_eq!(refused(&answer).code, Code::STALE_PLAN);
}

#[test]
fn impossible_targets_and_unknown_groups_are_refused_by_name() {
    let mut bench = Bench::with("orders", ALL).unwrap();
    for (group, to, code) in [
        ("orders", "rome", Code::BAD_TARGET),
        ("orders", "oslo", Code::BAD_TARGET),
        ("other", "fra", Code::UNKNOWN_GROUP),
    ] {
        let before = bench.registry.clone();
        let (_, answer) = bench.start_planned(group, to, "").unwrap();
        assert_eq!(refused(&answer).code, code);
        assert_eq!(bench.registry, before);
    }
}

#[test]
fn a_start_that_arrives_twice_begins_one_run() {
    let mut bench = Bench::with("orders", &[Kafka]).unwrap();
    let start = Entry::Start {
        run: RunId("RUN0001".into()),
        group: orders(),
        to: site("fra"),
        plan_hash: bench.plan("orders", "fra").unwrap().unwrap().hash(),
        reason: "test".into(),
    };
    assert_eq!(bench.propose(start.clone()), Answer::Done);
    let before = bench.registry.clone();
    assert_eq!(bench.propose(start.clone()), Answer::Done);
    assert_eq!(bench.registry, before);
    abort(&mut bench, &RunId("RUN0001".into()));
    bench.finish();
    assert_eq!(bench.propose(start), Answer::Done);
    assert_eq!(bench.registry.open_runs().count(), 0, "nor does one begin after it ended");
}

#[test]
fn a_renewal_never_falls_whatever_order_its_copies_come_in() {
    let mut bench = Bench::default();
    let mut renew = |session, number| {
        let renewal = Renewal { session, number };
        bench.propose(Entry::Renew { site: site("rome"), renewal })
    };
    assert_eq!(renew(1, 1), Answer::Done);
    assert_eq!(renew(1, 2), Answer::Done);
    assert_eq!(renew(1, 1), Answer::Stale, "a relayed copy");
    assert_eq!(renew(1, 2), Answer::Stale);
    assert_eq!(renew(2, 1), Answer::Done, "a new session is above every number of the old one");
    assert_eq!(renew(1, 3), Answer::Stale);
    assert_eq!(bench.registry.sites[&site("rome")], Renewal { session: 2, number: 1 });
}

#[test]
fn a_retry_of_a_run_in_which_nothing_failed_is_refused() {
    let (mut bench, run) = started(ALL);
    let answer = bench.propose(Entry::Retry { run });
    assert_eq!(refused(&answer).code, Code::NOTHING_TO_RETRY);
    let answer = bench.propose(Entry::Retry { run: RunId("NONE".into()) });
    assert_eq!(refused(&answer).code, Code::UNKNOWN_RUN);
}

#[test]
fn every_refusal_says_that_nothing_was_changed_and_what_to_type_next() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| opened(b, &run));
    let spec = bench.group("orders").unwrap().spec.clone();
    let answers = [
        abort(&mut bench, &run),
        turn(&mut bench, &run),
        bench.propose(Entry::Retry { run: run.clone() }),
        bench.start("orders", "rome").unwrap().1,
        bench.propose(Entry::ApplyGroup {
            spec: Box::new(GroupSpec {
                policy: crate::spec::Policy { lag_bytes_max: 7, ..spec.policy },
                ..spec
            }),
            over: 1,
        }),
    ];
    for answer in &answers {
        let fail = refused(answer);
        assert!(fail.what.contains("nothing was changed"), "{fail:?}");
        assert!(fail.next.starts_with("dc-switch ") && !fail.why.is_empty(), "{fail:?}");
        assert!(fail.code.page().is_some(), "{} has no page", fail.code);
    }
}

#[test]
fn the_same_log_gives_the_same_state_and_survives_being_written_down() {
    let (mut bench, _) = started(ALL);
    while bench.step() {
        let text = serde_json::to_string(&bench.registry).unwrap();
        let read: Registry = serde_json::from_str(&text).unwrap();
        assert!(read == bench.registry, "what is read back differs at {}", bench.at);
    }
}

#[test]
fn only_the_newest_ended_runs_are_kept() {
    let mut bench = Bench::with("orders", &[S3]).unwrap();
    for _ in 0..230 {
        let (run, answer) = bench.start("orders", "fra").unwrap();
        assert_eq!(answer, Answer::Done);
        abort(&mut bench, &run);
        bench.finish();
    }
    assert!(bench.registry.runs.len() <= 201, "{}", bench.registry.runs.len());
    assert!(bench.registry.runs.contains_key(&RunId("RUN0230".into())));
    assert!(bench.registry.audit.unbroken());
}
