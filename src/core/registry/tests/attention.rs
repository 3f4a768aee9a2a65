//! Findings, silence, and when a human is called.

use super::*;
use crate::act::{Evidence, Finding, Outcome};
use crate::codes::Code;

fn finding(code: &str, at: &str, blocking: bool) -> Finding {
    let text = format!("{code} at {at}");
    Finding { code: code.into(), plane: Some(Kafka), site: site(at), blocking, text }
}

#[test]
fn a_refused_preflight_shows_all_findings_of_both_sites_and_changes_nothing() {
    let (mut bench, run) = started(ALL);
    let before = bench.group("orders").unwrap().clone();
    bench.script("rome kafka.preflight", false, Scripted::Finds(vec![finding("DC-0401", "rome", true)]));
    bench.script("fra kafka.preflight", false, Scripted::Finds(vec![finding("DC-0402", "fra", true)]));
    bench.script("fra s3.preflight", false, Scripted::Fails(trouble("bucket is unreachable")));
    bench.script("fra airflow.preflight", false, Scripted::Finds(vec![finding("DC-0603", "fra", false)]));
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Refused));
    let found = &bench.run(&run).unwrap().findings;
    let blocking: Vec<_> = found.iter().filter(|f| f.blocking).map(|f| f.code.as_str()).collect();
    assert_eq!(blocking, ["DC-0401", "DC-0402", "DC-0999"]);
    assert!(found.iter().any(|f| f.code == "DC-0603"), "what is merely worth saying is said too");
    let after = bench.group("orders").unwrap();
    assert_eq!(*after, Group { run: None, timeline_high: 1, ..before }, "but a timeline was seen");
    assert!(bench.run(&run).unwrap().steps.iter().all(|s| s.plan.act.plane().is_none()
        || s.plan.stage == crate::plan::Stage::Preflight
        || s.status == crate::run::Status::Waiting));
}

#[test]
fn a_finding_that_does_not_block_lets_the_run_go_on() {
    let (mut bench, run) = started(&[Kafka]);
    bench.script("fra kafka.preflight", false, Scripted::Finds(vec![finding("DC-0403", "fra", false)]));
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Done));
}

#[test]
fn a_preflight_that_never_answers_refuses_like_one_that_failed() {
    let (mut bench, run) = started(&[Kafka]);
    bench.script("fra kafka.preflight", false, Scripted::Silent);
    bench.finish();
    assert_eq!(result(&bench, &run), None);
    bench.overdue();
    assert_eq!(result(&bench, &run), Some(RunResult::Refused));
    assert!(bench.run(&run).unwrap().findings[0].text.contains("no answer"));
}

#[test]
fn a_recheck_that_finds_something_rolls_back() {
    let (mut bench, run) = started(ALL);
    bench.script("rome kafka.recheck", false, Scripted::Finds(vec![finding("DC-0404", "rome", true)]));
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
    let why = bench.run(&run).unwrap().aborting.clone().unwrap();
    assert_eq!(why.code, "DC-0404");
}

fn print(at: &str, digest: &str) -> Outcome {
    Outcome::Fingerprint { plane: Airflow, site: site(at), of: "fernet key".into(), digest: digest.into() }
}

#[test]
fn keys_that_differ_between_sites_refuse_at_preflight() {
    let (mut bench, run) = started(ALL);
    for (place, digest) in [("rome", "aa"), ("fra", "bb")] {
        let named = |i: &Intent| i.act.name.to_string() == "airflow.preflight" && i.act.site == site(place);
        let intent = bench.intents().into_iter().find(named).unwrap();
        bench.answer(&intent, Ok(Evidence::changed("read").with(print(place, digest))));
    }
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Refused));
    let found = &bench.run(&run).unwrap().findings;
    assert_eq!(found[0].code, Code::SITES_DIFFER.as_str());
    assert!(found[0].text.contains("fernet key") && !found[0].text.contains("aa"));
}

#[test]
fn a_key_that_changes_after_preflight_rolls_back_and_never_ends_refused() {
    let (mut bench, run) = started(ALL);
    for place in ["rome", "fra"] {
        let named = |i: &Intent| i.act.name.to_string() == "airflow.preflight" && i.act.site == site(place);
        let intent = bench.intents().into_iter().find(named).unwrap();
        bench.answer(&intent, Ok(Evidence::changed("read").with(print(place, "aa"))));
    }
    bench.until(|b| b.intents().iter().any(|i| i.act.name.to_string() == "airflow.recheck"));
    let named = |i: &Intent| i.act.name.to_string() == "airflow.recheck" && i.act.site == site("fra");
    let intent = bench.intents().into_iter().find(named).unwrap();
    bench.answer(&intent, Ok(Evidence::changed("read").with(print("fra", "bb"))));
    assert!(bench.run(&run).unwrap().aborting.is_some());
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
    assert!(bench.group("orders").unwrap().fences.is_empty());
}

#[test]
fn silence_before_the_takeover_rolls_back_at_once_and_waits_for_the_silent_site() {
    let (mut bench, run) = started(ALL);
    bench.script("rome postgres.stop", false, Scripted::Silent);
    bench.script("rome postgres.stop", true, Scripted::Silent);
    bench.finish();
    bench.overdue();
    assert!(bench.run(&run).unwrap().aborting.is_some(), "not tried again while writers wait");
    bench.finish();
    assert_eq!(result(&bench, &run), None, "the undo at rome is still asked for");
    bench.overdue();
    let said = bench.run(&run).unwrap().attention.clone().unwrap();
    assert!(said.text.contains("postgres.stop at rome"), "{said:?}");
    let audit = bench.registry.audit.entries.len();
    bench.overdue();
    assert_eq!(bench.registry.audit.entries.len(), audit, "said once");
    let intent = bench.intents().into_iter().find(|i| i.undo).unwrap();
    bench.answer(&intent, Ok(Evidence::changed("started again")));
    assert_eq!(bench.run(&run).unwrap().attention, None, "nothing stands still any more");
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::RolledBack));
}

#[test]
fn silence_after_the_takeover_calls_a_human_and_keeps_the_intent() {
    let (mut bench, run) = started(ALL);
    bench.script("fra postgres.promote", false, Scripted::Silent);
    bench.finish();
    let asked = bench.intents().remove(0);
    bench.overdue();
    assert_eq!(bench.run(&run).unwrap().attention.clone().unwrap().code, Code::NEEDS_HUMAN.as_str());
    assert_eq!(bench.intents()[0].token, asked.token);
    bench.answer(&asked, Ok(Evidence::changed("promoted after all")));
    assert_eq!(bench.run(&run).unwrap().attention, None);
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Done));
}

#[test]
fn a_step_that_fails_after_the_takeover_is_tried_five_times_before_a_human_is_called() {
    let (mut bench, run) = started(ALL);
    for _ in 0..5 {
        bench.script("fra kafka.grant_apps", false, Scripted::Fails(trouble("broker is away")));
    }
    bench.finish();
    for _ in 0..4 {
        assert_eq!(bench.run(&run).unwrap().attention, None);
        assert_eq!(bench.propose(Entry::Retry { run: run.clone() }), Answer::Done);
        bench.finish();
    }
    let said = bench.run(&run).unwrap().attention.clone().unwrap();
    assert!(said.text.contains("kafka.grant_apps at fra: broker is away"), "{said:?}");
    assert_eq!(bench.propose(Entry::Retry { run: run.clone() }), Answer::Done);
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Done));
}

#[test]
fn an_overdue_that_answers_another_token_changes_nothing() {
    let (mut bench, run) = started(ALL);
    let intent = bench.intents().remove(0);
    let before = bench.registry.clone();
    let late = Entry::Overdue { run, step: intent.step, token: Token(intent.token.0 - 1) };
    assert_eq!((bench.propose(late), &bench.registry), (Answer::Stale, &before));
}
