//! Kafka moved for real: two clusters, MirrorMaker 2, writers that go on through the fence.
//!
//! Needs a world of parts, by `DC_LAB_WORLD`; with two brokers at rome for the test that freezes one:
//!
//! ```text
//! DC_LAB_KAFKA_BROKERS=2 dc-lab parts up --planes kafka --name live
//! DC_LAB_WORLD=/var/lib/dc-lab/live cargo test -p dc-plane-kafka --features live --test live-kafka -- --nocapture
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at its first surprise")]

#[path = "live/clients.rs"]
mod clients;
#[path = "live/world.rs"]
mod world;

use std::time::Duration;

use dc_core::act::{Change, Direction, KafkaAct as K, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::ids::Epoch;
use dc_core::position::{Ends, Grant};
use dc_plane::{Depth, PlaneError, Role};

use clients::{Load, Read, commit, committed, read};
use world::{World, blocking, codes};

/// Every act up to the grant, each performed twice; returns how long nobody could write.
async fn over(world: &mut World, twice: bool) -> Duration {
    let (s, t) = (world.source.clone(), world.target.clone());
    for site in [&s, &t] {
        let found = world.go(K::Preflight, site).await;
        assert!(blocking(&found).is_empty(), "{:?}", blocking(&found));
    }
    let both = [K::PrepareReverse, K::RecordGrants];
    for act in both {
        world.go_twice(act, &s, twice).await;
    }
    for site in [&s, &t] {
        let found = world.go(K::Recheck, site).await;
        assert!(blocking(&found).is_empty(), "{:?}", blocking(&found));
    }
    let began = tokio::time::Instant::now();
    world.go_twice(K::FenceApps, &s, twice).await;
    world.go(K::Drain, &t).await;
    if twice {
        world.go(K::Drain, &t).await;
    }
    for act in [K::FenceMirror, K::SetOffsets, K::GrantApps] {
        world.go_twice(act, &t, twice).await;
    }
    began.elapsed()
}

async fn turn(world: &mut World, twice: bool) {
    let (s, t) = (world.source.clone(), world.target.clone());
    world.go_twice(K::StopForward, &t, twice).await;
    world.go_twice(K::StartReverse, &s, twice).await;
    world.go(K::Verify, &t).await;
}

/// A group's positions at both sites name the same records.
async fn groups_are_exact(world: &World, lags: &[(&str, i64)]) {
    let (source, target) = (world.given_ends(true), world.given_ends(false));
    for (group, _) in lags {
        let here = committed(world, &world.source, group).await;
        let there = committed(world, &world.target, group).await;
        for (tp, at) in &there {
            let end = |ends: &Ends| ends[&tp.0][&tp.1];
            let left = read(world, &world.source, tp, here[tp], end(&source)).await;
            let on = read(world, &world.target, tp, *at, end(&target)).await;
            let values = |all: &[Read]| all.iter().map(|r| r.value.clone()).collect::<Vec<_>>();
            assert_eq!(values(&left), values(&on), "{group} {tp:?}");
        }
        assert_eq!(here.len(), there.len(), "{group} has a position for each partition");
        let total: i64 = there.iter().map(|(tp, at)| target[&tp.0][&tp.1] - at).sum();
        println!("  group {group}: {} partitions exact, {total} offsets behind", there.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_there_and_back_under_load_and_loses_nothing_and_repeats_nothing() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let load = Load::start(&world);
    load.until_acked(&world, 300).await;
    // More rounds, each act once, show how long a move takes: LIVE_ROUNDS=12.
    let rounds = std::env::var("LIVE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let mut shut = Vec::new();
    for round in 0..rounds {
        let twice = round < 2;
        let lags = [("billing", 40), ("audit", 0)];
        for (group, lag) in lags {
            commit(&world, &world.source, group, lag).await;
        }
        let before = load.acked();
        let outage = over(&mut world, twice).await;
        if !twice {
            shut.push(outage);
        }
        load.until_acked_at(&world, &world.target.clone()).await;
        println!(
            "{} -> {}: {} ms shut{}, {} acknowledged before; writers: {}",
            world.source,
            world.target,
            outage.as_millis(),
            if twice { " (each act twice)" } else { "" },
            before,
            load.gap(&world.target)
        );
        world.print_steps();
        groups_are_exact(&world, &lags).await;
        turn(&mut world, twice).await;
        assert_eq!(world.refused(K::FenceApps, Authority::self_fence(), true).await, "DC-0424");
        world.next_run();
        let more = load.acked();
        load.until_acked(&world, more + 300).await;
    }
    shut.sort();
    println!(
        "  shut, of {} moves: median {:?}, longest {:?}",
        shut.len(),
        shut.get(shut.len() / 2),
        shut.last()
    );
    let acked = load.stop().await;
    world.same_records_at_both_sites(&acked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goes_on_at_the_source_after_an_undo_at_every_fence() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let load = Load::start(&world);
    load.until_acked(&world, 100).await;
    let (s, t) = (world.source.clone(), world.target.clone());
    for depth in 1..=4 {
        let acts = [(K::FenceApps, &s), (K::Drain, &t), (K::FenceMirror, &t), (K::SetOffsets, &t)];
        world.go(K::PrepareReverse, &s).await;
        world.go(K::RecordGrants, &s).await;
        commit(&world, &s, "billing", 10).await;
        for (act, site) in acts.iter().take(depth) {
            world.go(*act, site).await;
        }
        for (act, site) in acts.iter().take(depth).rev() {
            world.undo(*act, site).await;
            assert_eq!(world.undo(*act, site).await.change, Change::Already, "{act:?} undone twice");
        }
        world.undo(K::PrepareReverse, &s).await;
        let more = load.acked();
        load.until_acked_at(&world, &s).await;
        load.until_acked(&world, more + 100).await;
        let found = world.go(K::Preflight, &t).await;
        assert!(blocking(&found).is_empty(), "{:?}", blocking(&found));
        world.next_attempt();
    }
    let acked = load.stop().await;
    world.same_records_at_both_sites(&acked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn returns_to_the_source_between_takeover_and_opened() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let load = Load::start(&world);
    load.until_acked(&world, 100).await;
    let (s, t) = (world.source.clone(), world.target.clone());
    for (act, site) in [
        (K::PrepareReverse, &s),
        (K::RecordGrants, &s),
        (K::FenceApps, &s),
        (K::Drain, &t),
        (K::FenceMirror, &t),
        (K::SetOffsets, &t),
    ] {
        world.go(act, site).await;
    }
    world.direction = Direction::Return;
    world.go_twice(K::GrantApps, &s, true).await;
    world.go_twice(K::StartReverse, &t, true).await;
    world.go(K::Verify, &s).await;
    assert_eq!(world.connectors(&s).await, Vec::<String>::new(), "the way back is deleted");
    load.until_acked_at(&world, &s).await;
    world.next_attempt();
    let acked = load.stop().await;
    world.same_records_at_both_sites(&acked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tells_all_that_forbids_a_move_at_once_and_changes_nothing() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let load = Load::start(&world);
    load.until_acked(&world, 20).await;
    let (s, t) = (world.source.clone(), world.target.clone());
    // The mirror loses its WRITE under load: its task fails.
    world.given.push(Outcome::SourceEnds(Ends::new()));
    assert_eq!(world.refused(K::FenceMirror, Authority::self_fence(), false).await, "DC-0418");
    world.given.clear();
    let foreign = World::topic_grant("User:stranger", "orders", "write");
    world.grant(&s, &foreign, true).await;
    world.grant(&t, &World::topic_grant("User:app", "orders", "read"), true).await;
    world.until_mirror_failed(&t).await;
    let at_target = codes(&world.go(K::Preflight, &t).await);
    assert!(at_target.contains("DC-0408") && at_target.contains("DC-0407"), "{at_target:?}");
    let at_source = codes(&world.go(K::Preflight, &s).await);
    assert!(at_source.contains("DC-0406"), "{at_source:?}");
    let facts = world.plane(&t).observe(Depth::Deep, world::soon()).await.unwrap();
    assert_eq!(facts.role, Some(Role::Closed), "nobody may write there: {facts:?}");
    // Upkeep takes what does not belong there, gives nothing, and starts the failed task again.
    let stood = world.go(K::Stand, &t).await;
    assert_eq!(stood.change, Change::Changed);
    assert!(codes(&stood).contains("DC-0420"), "{stood:?}");
    world.grant(&s, &foreign, false).await;
    world.undo(K::FenceMirror, &t).await;
    world.direction = Direction::Return;
    world.go(K::Verify, &s).await;
    world.direction = Direction::Forward;
    let found = world.go(K::Preflight, &t).await;
    assert!(blocking(&found).is_empty(), "{:?}", blocking(&found));
    assert_eq!(world.go(K::Stand, &t).await.change, Change::Already);
    let acked = load.stop().await;
    world.same_records_at_both_sites(&acked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_does_not_answer_is_a_finding_and_no_error() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let (s, t) = (world.source.clone(), world.target.clone());
    world.break_address(&t);
    let found = world.go(K::Preflight, &s).await;
    assert!(codes(&found).contains("DC-0401"), "{found:?}");
    let down = world.plane(&t).observe(Depth::Shallow, world::soon()).await.unwrap();
    assert_eq!(down.role, Some(Role::Down), "{down:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_leader_is_not_fenced_until_it_denies_the_canary() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    world.hold_at("rome").await;
    let (s, _) = (world.source.clone(), world.target.clone());
    world.go(K::PrepareReverse, &s).await;
    world.go(K::RecordGrants, &s).await;
    let frozen = world.freeze("rome.kafka-2");
    let began = tokio::time::Instant::now();
    let tried = world.try_within(K::FenceApps, &s, Duration::from_secs(3)).await;
    println!("  with a frozen leader after {} ms: {tried:?}", began.elapsed().as_millis());
    assert!(matches!(tried, Err(PlaneError::TimedOut { .. })), "{tried:?}");
    let probed = world.plane(&s).probe(&world.act(K::FenceApps, &s), world::within(1)).await;
    assert!(!matches!(probed, Ok(Progress::Done(_))), "{probed:?}");
    drop(frozen);
    let fenced = world.go(K::FenceApps, &s).await;
    assert!(fenced.seen.contains("canary denied at 2 of 2 leaders"), "{}", fenced.seen);
    println!("  thawed: {}", fenced.seen);
    let undone = world.undo(K::FenceApps, &s).await;
    assert!(undone.seen.contains("accepted at 2 of 2 leaders"), "{}", undone.seen);
    world.undo(K::PrepareReverse, &s).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closes_itself_without_a_record_and_opens_again_only_by_a_reopen() {
    let _alone = world::alone().await;
    let mut world = World::open().await;
    let load = Load::start(&world);
    load.until_acked(&world, 20).await;
    let s = world.source.clone();
    let closing = world.act(K::SelfClose, &s);
    let by = Authority::self_fence();
    for change in [Change::Changed, Change::Already] {
        let closed = world.plane(&s).perform(&closing, &by, world::soon()).await.unwrap();
        assert_eq!(closed.change, change, "{closed:?}");
    }
    let facts = world.plane(&s).observe(Depth::Shallow, world::soon()).await.unwrap();
    assert_eq!(facts.role, Some(Role::Closed));
    load.until_refused(&s).await;
    assert!(world.plane(&s).undo(&closing, &by, world::soon()).await.is_err(), "a self-fence may only close");
    world.restart();
    let by = Authority::reopen(Epoch::default());
    for change in [Change::Changed, Change::Already] {
        let opened = world.plane(&s).undo(&closing, &by, world::soon()).await.unwrap();
        assert_eq!(opened.change, change, "{opened:?}");
    }
    load.until_acked_at(&world, &s).await;
    let held: Vec<Grant> = world.recorded(&s).await;
    assert_eq!(held.iter().filter(|g| g.operation == "write").count(), 2, "{held:?}");
    assert_eq!(world.go(K::Serve, &s).await.change, Change::Already);
    let acked = load.stop().await;
    world.same_records_at_both_sites(&acked).await;
}
