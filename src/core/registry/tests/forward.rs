//! The way forward, step by step, and what each entry makes ready.

use super::*;
use crate::act::{Outcome, QuorumAct};
use crate::position::Cut;
use crate::run::Status;

#[test]
fn a_run_of_every_set_of_planes_ends_done_at_the_target() {
    for planes in subsets() {
        let (mut bench, run) = started(&planes);
        bench.finish();
        assert_eq!(result(&bench, &run), Some(RunResult::Done), "{planes:?}");
        let group = bench.group("orders").unwrap();
        assert_eq!((group.holder.as_str(), group.epoch.counter, group.opened), ("fra", 2, true));
        assert_eq!(group.run, None);
        for plane in planes {
            assert!(bench.registry.may_serve(&orders(), &site("fra"), plane).is_ok(), "{plane}");
            assert!(bench.registry.may_serve(&orders(), &site("rome"), plane).is_err(), "{plane}");
        }
        assert!(bench.registry.audit.unbroken());
    }
}

#[test]
fn there_and_back_ends_where_it_began_three_epochs_later() {
    let (mut bench, _) = started(ALL);
    bench.finish();
    let (back, answer) = bench.start("orders", "rome").unwrap();
    assert_eq!(answer, Answer::Done);
    bench.finish();
    assert_eq!(result(&bench, &back), Some(RunResult::Done));
    let group = bench.group("orders").unwrap();
    assert_eq!((group.holder.as_str(), group.epoch.counter), ("rome", 3));
    assert!(group.grants.as_ref().unwrap().settled);
    assert_eq!(bench.registry.may_serve(&orders(), &site("rome"), Kafka), Ok(group.epoch));
}

#[test]
fn no_step_begins_before_all_it_needs_is_done() {
    let (mut bench, run) = started(ALL);
    loop {
        let seen = bench.run(&run).unwrap().clone();
        for step in seen.steps.iter().filter(|s| s.status != Status::Waiting) {
            for need in &step.plan.after {
                assert!(seen.step(*need).unwrap().done(), "{} began before step {need}", step.plan.act);
            }
        }
        if !bench.step() {
            return;
        }
    }
}

#[test]
fn an_intent_is_committed_by_the_entry_that_made_it_ready_and_its_index_is_the_token() {
    let (mut bench, _) = started(&[Kafka]);
    let first = bench.intents();
    assert_eq!(first.len(), 2, "both preflights begin with the run");
    assert!(first.iter().all(|i| i.token == Token(bench.at)));
    bench.step();
    bench.step();
    let next = bench.intents();
    assert!(!next.is_empty() && next.iter().all(|i| i.token == Token(bench.at)), "{next:?}");
}

#[test]
fn a_stale_token_answers_nothing() {
    let (mut bench, run) = started(ALL);
    let intent = bench.intents().remove(0);
    let before = bench.registry.clone();
    let evidence = crate::script::evidence(&intent.act);
    let stale = Intent { token: Token(intent.token.0 + 1), ..intent.clone() };
    assert_eq!(bench.answer(&stale, Ok(evidence.clone())), Answer::Stale);
    assert_eq!(bench.registry, before);
    assert_eq!(bench.answer(&intent, Ok(evidence.clone())), Answer::Done);
    assert_eq!(bench.answer(&intent, Ok(evidence)), Answer::Stale, "the first answer counts");
    assert_eq!(bench.answer(&intent, Err(trouble("late"))), Answer::Stale);
    assert!(bench.run(&run).unwrap().step(intent.step).unwrap().done());
}

#[test]
fn the_takeover_is_refused_with_another_cut_or_epoch() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| b.run(&run).unwrap().due() == Some(QuorumAct::Takeover));
    let cut = bench.run(&run).unwrap().cut();
    let epoch = bench.group("orders").unwrap().epoch;
    let before = bench.registry.clone();
    let mut short = cut.clone();
    short.0.pop();
    for (epoch, cut) in [
        (epoch.next(), Cut::default()),
        (epoch.next(), short),
        (epoch, cut.clone()),
        (epoch.next().next(), cut.clone()),
    ] {
        let answer = bench.propose(Entry::Takeover { run: run.clone(), epoch, cut });
        assert_eq!((answer, &bench.registry), (Answer::Stale, &before));
    }
    let takeover = Entry::Takeover { run: run.clone(), epoch: epoch.next(), cut };
    assert_eq!(bench.propose(takeover.clone()), Answer::Done);
    assert_eq!(bench.group("orders").unwrap().holder, site("fra"));
    assert!(!bench.group("orders").unwrap().opened);
    assert_eq!(bench.propose(takeover), Answer::Stale, "a second copy changes nothing");
}

#[test]
fn the_takeover_waits_for_every_step_before_it() {
    let (mut bench, run) = started(ALL);
    loop {
        let before = bench.registry.clone();
        let early = bench.run(&run).unwrap().due() != Some(QuorumAct::Takeover);
        let (cut, epoch) = (bench.run(&run).unwrap().cut(), bench.group("orders").unwrap().epoch.next());
        if !early {
            return;
        }
        let answer = bench.propose(Entry::Takeover { run: run.clone(), epoch, cut });
        assert_eq!((answer, &bench.registry), (Answer::Stale, &before));
        bench.step();
    }
}

#[test]
fn nothing_opens_before_opened_and_opened_needs_the_promotion() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| taken(b, &run));
    let epoch = bench.group("orders").unwrap().epoch;
    let asked: Vec<_> = bench.intents().iter().map(|i| i.act.name.to_string()).collect();
    assert_eq!(asked, ["postgres.promote"]);
    assert_eq!(bench.propose(Entry::Opened { run: run.clone(), epoch }), Answer::Stale);
    bench.step();
    assert!(bench.intents().is_empty(), "only the entry opened is due");
    let old = bench.run(&run).unwrap().epoch_before;
    assert_eq!(bench.propose(Entry::Opened { run: run.clone(), epoch: old }), Answer::Stale);
    assert_eq!(bench.propose(Entry::Opened { run, epoch }), Answer::Done);
    assert_eq!(bench.intents().len(), 3, "three planes are opened side by side");
}

#[test]
fn a_plane_without_its_final_position_rolls_the_run_back_instead_of_waiting_for_ever() {
    let (mut bench, run) = started(&[S3]);
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "s3.last_pass"));
    let pass = bench.intents().remove(0);
    bench.answer(&pass, Ok(crate::act::Evidence::changed("nothing said of where it is")));
    let why = bench.run(&run).unwrap().aborting.clone().unwrap();
    assert!(why.text.contains("s3"), "{why:?}");
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
}

#[test]
fn timelines_are_set_aside_above_both_sites_and_never_twice() {
    let (mut bench, run) = started(&[Postgres]);
    let intents = bench.intents();
    for (intent, timeline) in intents.iter().zip([4, 9]) {
        let seen = crate::act::Evidence::changed("on a timeline").with(Outcome::Timeline(timeline));
        bench.answer(intent, Ok(seen));
    }
    let set = bench.run(&run).unwrap().outcomes().find_map(|o| match o {
        Outcome::Timelines(set) => Some(*set),
        _ => None,
    });
    assert_eq!(set.map(|s| (s.target, s.back)), Some((10, 11)));
    abort(&mut bench, &run);
    bench.finish();
    bench.start("orders", "fra").unwrap();
    bench.until(|b| b.intents().iter().any(|i| i.act.timelines().is_some()));
    let next = *bench.intents()[0].act.timelines().unwrap();
    assert_eq!((next.target, next.back), (12, 13));
}

#[test]
fn fence_marks_stand_from_the_intent_on_and_leave_the_new_holder_with_opened() {
    let (mut bench, run) = started(ALL);
    loop {
        let (seen, group) = (bench.run(&run).unwrap().clone(), bench.group("orders").unwrap().clone());
        for step in seen.steps.iter().filter(|s| s.fences() && s.status != Status::Waiting) {
            let marked = group.fences.iter().any(|m| m.run == run && m.step == step.plan.id);
            let freed = group.opened && step.plan.site.as_ref() == Some(&group.holder) && taken(&bench, &run);
            assert_eq!(marked, !freed, "{} while {:?}", step.plan.act, step.status);
        }
        for step in seen.steps.iter().filter(|s| s.status == Status::Waiting) {
            assert!(!group.fences.iter().any(|m| m.step == step.plan.id), "marked before its intent");
        }
        if !bench.step() {
            break;
        }
    }
    let left = &bench.group("orders").unwrap().fences;
    assert!(!left.is_empty() && left.iter().all(|m| m.site == site("rome")), "rome was not undone");
}

#[test]
fn upkeep_does_not_serve_what_the_run_has_yet_to_open() {
    let (mut bench, run) = started(ALL);
    bench.until(|b| opened(b, &run));
    let may = |b: &Bench, plane| b.registry.may_serve(&orders(), &site("fra"), plane);
    assert_eq!(may(&bench, Airflow), Err(NotServing::Opening(run.clone())));
    assert_eq!(may(&bench, Kafka), Err(NotServing::Opening(run.clone())));
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "airflow.start_writers"));
    assert!(may(&bench, Postgres).is_ok());
    assert_eq!(may(&bench, Airflow), Err(NotServing::Opening(run.clone())));
    bench.finish();
    assert!(may(&bench, Airflow).is_ok());
}

#[test]
fn a_run_that_ended_well_teaches_how_long_its_acts_took() {
    let (mut bench, _) = started(&[Postgres]);
    assert_eq!(bench.registry.learned.len(), 0);
    let first = bench.plan("orders", "fra").unwrap().unwrap();
    assert_eq!(first.expected_outage_ms(&bench.registry.learned), None, "unknown is not zero");
    bench.finish();
    let back = bench.plan("orders", "rome").unwrap().unwrap();
    let outage = back.expected_outage_ms(&bench.registry.learned);
    assert_eq!(outage, Some(70), "seven acts of 10 ms from the first fence to the door: {:?}", back.steps);
}
