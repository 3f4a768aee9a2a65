//! The way back before the takeover.

use super::*;
use crate::run::Status;

/// Starts a run and does `steps` things; none when it ended earlier or is past its takeover.
fn stopped_after(planes: &[PlaneKind], steps: usize) -> Option<(Bench, RunId)> {
    let (mut bench, run) = started(planes);
    for _ in 0..steps {
        bench.step();
    }
    (!taken(&bench, &run)).then_some((bench, run))
}

#[test]
fn an_abort_at_any_point_ends_rolled_back_with_no_fence_and_no_unsettled_grant() {
    for planes in subsets() {
        let mut points = 0;
        while let Some((mut bench, run)) = stopped_after(&planes, points) {
            let before = bench.group("orders").unwrap().clone();
            assert_eq!(abort(&mut bench, &run), Answer::Done, "after {points} things");
            bench.finish();
            assert_eq!(result(&bench, &run), Some(RunResult::RolledBack), "after {points} things");
            let group = bench.group("orders").unwrap();
            assert_eq!((&group.holder, group.epoch, group.opened), (&before.holder, before.epoch, true));
            assert_eq!(group.fences, Vec::new(), "after {points} things");
            assert_eq!(group.run, None);
            assert!(group.grants.as_ref().is_none_or(|g| g.settled), "after {points} things");
            for plane in &planes {
                assert!(bench.registry.may_serve(&orders(), &site("rome"), *plane).is_ok());
            }
            let (next, _) = bench.start("orders", "fra").unwrap();
            bench.finish();
            assert_eq!(result(&bench, &next), Some(RunResult::Done), "a later run after {points} things");
            points += 1;
        }
        assert!(points >= 8, "{planes:?} has {points} points");
    }
}

#[test]
fn what_is_undone_comes_from_intents_not_from_results() {
    let (mut bench, run) = started(&[Kafka]);
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "kafka.fence_apps"));
    abort(&mut bench, &run);
    let undo = bench.intents().remove(0);
    assert!(undo.undo && undo.act.name.to_string() == "kafka.fence_apps", "{undo:?}");
    assert!(undo.token > Token(0) && undo.token == Token(bench.at), "with a token of its own");
    assert_eq!(bench.group("orders").unwrap().fences.len(), 1, "and fenced until it is answered");
}

#[test]
fn undos_of_one_plane_at_one_site_go_one_by_one_latest_first() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| b.run(&run).unwrap().due().is_some());
    abort(&mut bench, &run);
    let mut undone: Vec<(String, u32)> = Vec::new();
    while result(&bench, &run).is_none() {
        let mut hands: Vec<_> =
            bench.intents().iter().map(|i| (i.act.site.clone(), i.act.name.plane())).collect();
        let all = hands.len();
        hands.sort();
        hands.dedup();
        assert_eq!(hands.len(), all, "two undos meet at one plane of one site");
        let next = bench.intents().remove(0);
        undone.push((format!("{} {:?}", next.act.site, next.act.name.plane()), next.step));
        bench.step();
    }
    for (i, (hand, id)) in undone.iter().enumerate() {
        assert!(undone[..i].iter().all(|(h, earlier)| h != hand || earlier > id), "{undone:?}");
    }
}

#[test]
fn no_scheduler_starts_before_the_database_and_the_buckets_serve_again() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| b.run(&run).unwrap().due().is_some());
    abort(&mut bench, &run);
    while result(&bench, &run).is_none() {
        let airflow = bench.intents().iter().any(|i| i.act.name.plane() == Some(Airflow));
        let shut = |plane| bench.registry.may_serve(&orders(), &site("rome"), plane).is_err();
        assert!(!airflow || !(shut(Postgres) || shut(S3)), "{:?}", bench.intents());
        bench.step();
    }
}

#[test]
fn a_failed_undo_blocks_no_other_and_calls_a_human_after_three_attempts() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| b.run(&run).unwrap().due().is_some());
    for _ in 0..3 {
        bench.script("rome kafka.fence_apps", true, Scripted::Fails(trouble("broker is away")));
    }
    abort(&mut bench, &run);
    bench.finish();
    let seen = bench.run(&run).unwrap();
    assert!(seen.ended.is_none() && seen.attention.is_none());
    let open: Vec<_> = seen.steps.iter().filter(|s| matches!(s.status, Status::UndoFailed { .. })).collect();
    assert_eq!(open.len(), 1, "everything else was undone");
    assert!(bench.registry.may_serve(&orders(), &site("rome"), Postgres).is_ok());
    assert!(bench.registry.may_serve(&orders(), &site("rome"), Kafka).is_err());
    for _ in 0..2 {
        assert_eq!(bench.propose(Entry::Retry { run: run.clone() }), Answer::Done);
        bench.finish();
    }
    let said = bench.run(&run).unwrap().attention.clone().unwrap();
    assert!(said.text.contains("undo of kafka.fence_apps at rome: broker is away"), "{said:?}");
    assert!(!bench.group("orders").unwrap().grants.as_ref().unwrap().settled, "the record is kept");
    bench.propose(Entry::Retry { run: run.clone() });
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
    assert_eq!(bench.run(&run).unwrap().attention, None);
}

#[test]
fn a_retry_of_failed_undos_keeps_their_order() {
    let (mut bench, run) = started(&[Postgres]);
    bench.until(|b| b.run(&run).unwrap().due().is_some());
    for act in ["rome postgres.stop", "rome postgres.fence_clients", "rome postgres.pre_sync"] {
        bench.script(act, true, Scripted::Fails(trouble("the host is away")));
    }
    abort(&mut bench, &run);
    bench.finish();
    let mut order = Vec::new();
    while result(&bench, &run).is_none() {
        if bench.intents().is_empty() {
            assert_eq!(bench.propose(Entry::Retry { run: run.clone() }), Answer::Done);
        }
        assert_eq!(bench.intents().len(), 1, "{:?}", bench.intents());
        order.push(bench.intents()[0].act.name.to_string());
        bench.step();
    }
    assert_eq!(order, ["postgres.stop", "postgres.fence_clients", "postgres.pre_sync"]);
}

#[test]
fn a_retry_while_aborting_repeats_no_act_that_failed_before() {
    let (mut bench, run) = started(&[Kafka]);
    bench.script("fra kafka.drain", false, Scripted::Fails(trouble("mirror stands still")));
    bench.script("rome kafka.fence_apps", true, Scripted::Fails(trouble("broker is away")));
    bench.finish();
    assert!(bench.run(&run).unwrap().aborting.is_some());
    bench.propose(Entry::Retry { run: run.clone() });
    assert!(bench.intents().iter().all(|i| i.undo), "{:?}", bench.intents());
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
    let again = bench.propose(Entry::Retry { run });
    assert_eq!(refused(&again).code, crate::codes::Code::UNKNOWN_RUN);
}

#[test]
fn every_step_that_fails_before_the_takeover_ends_rolled_back_and_says_why() {
    for planes in [ALL, &[Postgres], &[Kafka], &[S3]] {
        let steps = Bench::with("orders", planes).unwrap().plan("orders", "fra").unwrap().unwrap().steps;
        let before = steps.iter().filter(|s| s.stage < crate::plan::Stage::Takeover);
        for step in before.filter(|s| s.stage > crate::plan::Stage::Preflight && s.site.is_some()) {
            let (mut bench, run) = started(planes);
            let act = format!("{} {}", step.site.as_ref().unwrap(), step.act);
            for _ in 0..step.attempts {
                bench.script(&act, false, Scripted::Fails(trouble("it broke")));
            }
            bench.finish();
            while result(&bench, &run).is_none() {
                assert_eq!(bench.propose(Entry::Retry { run: run.clone() }), Answer::Done, "{act}");
                bench.finish();
            }
            assert_eq!(result(&bench, &run), Some(RunResult::RolledBack), "{act}");
            let why = bench.run(&run).unwrap().aborting.clone().unwrap();
            assert!(why.text.contains("it broke") && why.text.contains(&step.act.to_string()), "{why:?}");
            assert!(bench.group("orders").unwrap().fences.is_empty(), "{act}");
        }
    }
}

#[test]
fn grants_recorded_and_never_fenced_do_not_outlive_their_run() {
    let (mut bench, run) = started(&[Kafka]);
    bench.until(|b| b.group("orders").unwrap().grants.is_some());
    abort(&mut bench, &run);
    bench.finish();
    let (next, _) = bench.start("orders", "fra").unwrap();
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "kafka.record_grants"));
    let record = bench.intents().into_iter().find(|i| i.act.name.to_string() == "kafka.record_grants");
    let newer = crate::script::grant("granted-since");
    let seen = crate::act::Evidence::changed("read").with(crate::act::Outcome::Grants(vec![newer.clone()]));
    bench.answer(&record.unwrap(), Ok(seen));
    let kept = bench.group("orders").unwrap().grants.clone().unwrap();
    assert_eq!((kept.run, kept.grants), (next, vec![newer]));
}

#[test]
fn recorded_grants_are_not_read_again_while_they_are_taken_away() {
    let (mut bench, run) = started(&[Kafka]);
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "kafka.fence_apps"));
    let fence = bench.intents().remove(0);
    let empty = crate::act::Evidence::changed("none left").with(crate::act::Outcome::Grants(Vec::new()));
    bench.answer(&fence, Ok(empty));
    let kept = bench.group("orders").unwrap().grants.clone().unwrap();
    assert_eq!((kept.run, kept.grants.len(), kept.settled), (run.clone(), 1, false));
    bench.until(|b| opened(b, &run));
    let given = bench.intents().into_iter().find(|i| i.act.name.to_string() == "kafka.grant_apps").unwrap();
    assert_eq!(given.act.grants().map(Vec::len), Some(1), "and they are what the new holder gets");
}

#[test]
fn a_rolled_back_run_leaves_marks_of_earlier_runs_alone() {
    let (mut bench, first) = started(ALL);
    bench.finish();
    let marks = bench.group("orders").unwrap().fences.clone();
    assert!(marks.iter().all(|m| m.run == first && m.site == site("rome")) && !marks.is_empty());
    let (back, _) = bench.start("orders", "rome").unwrap();
    bench.until(|b| b.run(&back).unwrap().due().is_some());
    abort(&mut bench, &back);
    bench.finish();
    assert_eq!(bench.group("orders").unwrap().fences, marks);
}
