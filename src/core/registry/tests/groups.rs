//! Groups, what they claim, and their DAG releases.

use super::*;
use crate::codes::Code;
use crate::script::spec;

fn apply(bench: &mut Bench, spec: GroupSpec, over: u64) -> Answer {
    bench.propose(Entry::ApplyGroup { spec: Box::new(spec), over })
}

#[test]
fn the_first_site_of_a_spec_founds_the_group_opened_in_its_first_epoch() {
    let bench = Bench::with("orders", ALL).unwrap();
    let group = bench.group("orders").unwrap();
    assert_eq!((group.holder.as_str(), group.epoch.counter, group.opened), ("rome", 1, true));
    assert!(bench.registry.may_serve(&orders(), &site("rome"), Postgres).is_ok());
    let fra = bench.registry.may_serve(&orders(), &site("fra"), Postgres);
    assert_eq!(fra, Err(NotServing::HeldBy(site("rome"))));
}

#[test]
fn overlapping_claims_are_refused_with_the_other_groups_name() {
    type Bend = fn(&mut GroupSpec);
    let bends: &[(&str, Bend)] = &[
        ("the PostgreSQL instance", |_| {}),
        ("topic orders", |s| s.kafka.as_mut().unwrap().topics.push("orders".into())),
        ("consumer group", |s| s.kafka.as_mut().unwrap().groups.push("orders-billing".into())),
        ("connector", |s| s.kafka.as_mut().unwrap().mirror = "orders-rome-fra-0".into()),
        ("prefix orders/logs", |s| {
            let s3 = s.s3.as_mut().unwrap();
            s3.bucket = "orders".into();
            s3.dag_prefix = "other".into();
            s3.log_prefix = "logs/below".into();
        }),
    ];
    for (i, (claim, bend)) in bends.iter().enumerate() {
        let mut bench = Bench::with("orders", ALL).unwrap();
        let planes: &[PlaneKind] = if i == 0 { &[Postgres] } else { &[Kafka, S3] };
        let mut other = spec("other", planes).unwrap();
        bend(&mut other);
        let before = bench.registry.clone();
        let answer = apply(&mut bench, other, 0);
        let fail = refused(&answer);
        assert_eq!(fail.code, Code::CLAIM_OVERLAP, "{claim}");
        assert!(fail.why.contains("group orders claims") && fail.why.contains(claim), "{}", fail.why);
        assert_eq!(bench.registry, before);
    }
    let mut bench = Bench::with("orders", ALL).unwrap();
    assert_eq!(apply(&mut bench, spec("other", &[Kafka, S3]).unwrap(), 0), Answer::Done);
}

#[test]
fn a_spec_with_faults_is_refused_with_all_of_them() {
    let mut bench = Bench::default();
    let mut bad = spec("orders", &[Kafka, S3]).unwrap();
    bad.sites.push(site("rome"));
    bad.kafka.as_mut().unwrap().topics.clear();
    bad.s3.as_mut().unwrap().log_prefix = "dags/logs".into();
    let answer = apply(&mut bench, bad, 0);
    let why = &refused(&answer).why;
    for part in ["sites", "rome", "kafka.topics", "dags/logs"] {
        assert!(why.contains(part), "{why}");
    }
}

#[test]
fn a_spec_that_comes_late_replaces_no_newer_one() {
    let mut bench = Bench::with("orders", ALL).unwrap();
    let first = bench.group("orders").unwrap().spec.clone();
    let second = GroupSpec {
        policy: crate::spec::Policy { lag_records_max: 2, ..first.policy.clone() },
        ..first.clone()
    };
    let third =
        GroupSpec { policy: crate::spec::Policy { lag_records_max: 3, ..first.policy.clone() }, ..first };
    assert_eq!(apply(&mut bench, second.clone(), 1), Answer::Done);
    assert_eq!(apply(&mut bench, second.clone(), 1), Answer::Done, "the same twice");
    assert_eq!(bench.group("orders").unwrap().spec_version, 2);
    assert_eq!(apply(&mut bench, third.clone(), 2), Answer::Done);
    let answer = apply(&mut bench, second, 1);
    assert_eq!(refused(&answer).code, Code::SPEC_CHANGE);
    assert_eq!(bench.group("orders").unwrap().spec, third);
}

#[test]
fn a_spec_changes_neither_sites_nor_planes_nor_under_a_run() {
    let (mut bench, run) = started(&[Kafka, S3]);
    let spec = bench.group("orders").unwrap().spec.clone();
    let mut other = spec.clone();
    other.policy.lag_records_max = 7;
    assert_eq!(refused(&apply(&mut bench, other.clone(), 1)).code, Code::SPEC_CHANGE);
    abort(&mut bench, &run);
    bench.finish();
    assert_eq!(apply(&mut bench, other, 1), Answer::Done);
    for bad in
        [GroupSpec { s3: None, ..spec.clone() }, GroupSpec { sites: vec![site("fra"), site("rome")], ..spec }]
    {
        assert_eq!(refused(&apply(&mut bench, bad, 2)).code, Code::SPEC_CHANGE);
    }
}

fn publish(bench: &mut Bench, parent: Option<u64>, root: &str) -> Answer {
    let epoch = bench.group("orders").unwrap().epoch;
    let root = root.repeat(64);
    bench.propose(Entry::Publish { group: orders(), parent, root, epoch })
}

fn serial(answer: &Answer) -> Option<u64> {
    match answer {
        Answer::Release(release) => Some(release.serial),
        _ => None,
    }
}

#[test]
fn releases_count_up_and_the_same_tree_is_the_same_release() {
    let mut bench = Bench::with("orders", &[S3]).unwrap();
    assert_eq!(serial(&publish(&mut bench, None, "a")), Some(1));
    assert_eq!(serial(&publish(&mut bench, None, "a")), Some(1), "asked twice");
    assert_eq!(serial(&publish(&mut bench, Some(1), "b")), Some(2));
    let late = publish(&mut bench, None, "a");
    assert_eq!(refused(&late).code, Code::RELEASE_REFUSED, "a late copy brings no old release back");
    assert_eq!(serial(&publish(&mut bench, Some(2), "a")), Some(3), "but a person may");
}

#[test]
fn releases_are_refused_with_another_parent_epoch_or_root_and_while_a_run_is_open() {
    let mut bench = Bench::with("orders", &[S3]).unwrap();
    publish(&mut bench, None, "a");
    let epoch = bench.group("orders").unwrap().epoch;
    let root = "b".repeat(64);
    for (parent, root, epoch) in [
        (None, root.clone(), epoch),
        (Some(9), root.clone(), epoch),
        (Some(1), "short".into(), epoch),
        (Some(1), "z".repeat(64), epoch),
        (Some(1), root.clone(), epoch.next()),
    ] {
        let before = bench.registry.clone();
        let answer = bench.propose(Entry::Publish { group: orders(), parent, root, epoch });
        assert_eq!(refused(&answer).code, Code::RELEASE_REFUSED);
        assert_eq!(bench.registry, before);
    }
    let (run, _) = bench.start("orders", "fra").unwrap();
    assert_eq!(refused(&publish(&mut bench, Some(1), "b")).code, Code::RELEASE_REFUSED);
    bench.finish();
    assert_eq!(result(&bench, &run), Some(RunResult::Done));
    let old = bench.propose(Entry::Publish { group: orders(), parent: Some(1), root, epoch });
    assert!(refused(&old).why.contains("epoch"), "uploaded before the move: {old:?}");
}
