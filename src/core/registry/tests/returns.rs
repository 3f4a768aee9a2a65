//! The way back between takeover and opened, and the way back from that.

use super::*;
use crate::codes::Code;

#[test]
fn a_return_at_any_point_before_opened_ends_returned_and_the_source_serves() {
    for planes in subsets() {
        let (mut bench, run) = started(&planes);
        bench.until(|b| taken(b, &run));
        let cut = bench.run(&run).unwrap().taken.clone().unwrap().cut;
        assert_eq!(turn(&mut bench, &run), Answer::Done);
        let group = bench.group("orders").unwrap();
        assert_eq!((group.holder.as_str(), group.epoch.counter, group.opened), ("rome", 3, false));
        bench.finish();
        assert_eq!(result(&bench, &run), Some(RunResult::Returned), "{planes:?}");
        let group = bench.group("orders").unwrap();
        assert!(group.opened && group.grants.as_ref().is_none_or(|g| g.settled));
        for plane in &planes {
            assert!(bench.registry.may_serve(&orders(), &site("rome"), *plane).is_ok());
        }
        assert_eq!(bench.run(&run).unwrap().taken.clone().unwrap().cut, cut);
    }
}

#[test]
fn a_return_may_be_returned_and_its_duplicate_turns_nothing() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| taken(b, &run));
    let left = bench.group("orders").unwrap().epoch;
    let first = Entry::Return { run: run.clone(), epoch: left };
    assert_eq!(bench.propose(first.clone()), Answer::Done);
    let turned = bench.registry.clone();
    assert_eq!(bench.propose(first), Answer::Stale, "a copy that comes late");
    assert_eq!(bench.registry, turned);
    assert_eq!(turn(&mut bench, &run), Answer::Done);
    assert_eq!(bench.group("orders").unwrap().holder, site("fra"));
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Done));
    assert_eq!(bench.group("orders").unwrap().epoch.counter, 4);
}

#[test]
fn intents_and_opened_of_the_direction_that_was_left_are_void() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| taken(b, &run));
    let promote = bench.intents().remove(0);
    let old = bench.group("orders").unwrap().epoch;
    turn(&mut bench, &run);
    let evidence = crate::script::evidence(&promote.act);
    assert_eq!(bench.answer(&promote, Ok(evidence)), Answer::Stale);
    assert_eq!(bench.propose(Entry::Opened { run: run.clone(), epoch: old }), Answer::Stale);
    bench.until(|b| b.run(&run).unwrap().due().is_some());
    assert_eq!(bench.propose(Entry::Opened { run: run.clone(), epoch: old }), Answer::Stale);
    assert!(!bench.group("orders").unwrap().opened);
    let numbers: Vec<_> = {
        bench
            .run(&run)
            .unwrap()
            .steps
            .iter()
            .chain(&bench.run(&run).unwrap().past)
            .map(|s| s.plan.id)
            .collect()
    };
    let mut once = numbers.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), numbers.len(), "numbers of steps are never used again");
}

#[test]
fn no_return_before_the_takeover_nor_after_opened() {
    let (mut bench, run) = started(ALL);
    assert_eq!(refused(&turn(&mut bench, &run)).code, Code::NO_RETURN);
    bench.until(|b| opened(b, &run));
    let before = bench.registry.clone();
    assert_eq!(refused(&turn(&mut bench, &run)).code, Code::NO_RETURN);
    assert_eq!(bench.registry, before);
    bench.finish();
    assert_eq!(refused(&turn(&mut bench, &run)).code, Code::UNKNOWN_RUN);
}

#[test]
fn no_abort_after_the_takeover_not_even_on_a_return() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| taken(b, &run));
    let before = bench.registry.clone();
    let answer = abort(&mut bench, &run);
    assert_eq!(refused(&answer).code, Code::PAST_TAKEOVER);
    assert!(refused(&answer).next.contains("run return"), "{answer:?}");
    assert_eq!(bench.registry, before);
    turn(&mut bench, &run);
    assert_eq!(refused(&abort(&mut bench, &run)).code, Code::PAST_TAKEOVER);
}

#[test]
fn a_return_lifts_the_fences_of_the_source_only_with_its_own_opened() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| taken(b, &run));
    turn(&mut bench, &run);
    let at_rome = |b: &Bench| b.group("orders").unwrap().fences.iter().any(|m| m.site == site("rome"));
    while !bench.group("orders").unwrap().opened {
        assert!(at_rome(&bench));
        bench.step();
    }
    assert!(!at_rome(&bench));
}

#[test]
fn a_return_is_not_mistaken_for_a_refusal_when_fingerprints_differ_by_then() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "airflow.warm_api"));
    bench.until(|b| taken(b, &run));
    turn(&mut bench, &run);
    for place in ["rome", "fra"] {
        let intent = bench.intents().remove(0);
        let print = crate::act::Outcome::Fingerprint {
            plane: Airflow,
            site: site(place),
            of: "fernet key".into(),
            digest: place.into(),
        };
        bench.answer(&intent, Ok(crate::script::evidence(&intent.act).with(print)));
        bench.until(|b| !b.intents().is_empty());
    }
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Returned));
}
