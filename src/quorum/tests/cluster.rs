//! Voters in one process, talking mutual TLS over loopback: what a site may rely on.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bench;
mod world;

use std::time::Duration;

use dc_core::ids::SiteId;
use dc_quorum::{LogEngine, ProposeError, Standing};
use dc_wire::convert::from_json;
use dc_wire::pb;
use tokio::time::Instant;
use world::{Put, World, soon};

const THREE: [&str; 3] = ["fra", "oslo", "rome"];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn any_voter_may_die_and_comes_back() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    for (n, victim) in THREE.iter().enumerate() {
        world.put(THREE[(n + 1) % 3], &format!("before-{victim}")).await;
        world.down(victim).await;
        world.put(THREE[(n + 1) % 3], &format!("without-{victim}")).await;
        world.put(THREE[(n + 2) % 3], &format!("also-without-{victim}")).await;
        world.up(victim).await;
        world.put(victim, &format!("with-{victim}")).await;
    }
    let states = world.states_after_barrier().await;
    assert_eq!(states[0].rows.len(), 12);
    assert!(states.iter().all(|state| *state == states[0]), "{states:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_site_may_propose_and_tokens_rise_within_a_batch() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    let mut last = 0;
    for site in THREE {
        let batch = (0..3).map(|k| Put(format!("{site}-{k}"))).collect();
        let answers = world.engine(site).propose(batch, soon()).await.unwrap();
        let tokens: Vec<u64> = answers.iter().map(|(token, _)| token.0).collect();
        assert!(tokens[0] > last && tokens[0].is_multiple_of(256), "{tokens:?} after {last}");
        assert_eq!(tokens, [tokens[0], tokens[0] + 1, tokens[0] + 2]);
        last = tokens[2];
    }
    let full = (0..256).map(|k| Put(format!("full-{k}"))).collect();
    assert_eq!(world.engine("rome").propose(full, soon()).await.unwrap().len(), 256);
    let over = (0..257).map(|k| Put(format!("over-{k}"))).collect();
    let refused = world.engine("rome").propose(over, soon()).await.unwrap_err();
    assert!(matches!(refused, ProposeError::TooLarge { commands: 257, .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_read_after_a_barrier_sees_what_was_committed_elsewhere() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    for n in 0..20 {
        let (writer, reader) = (THREE[n % 3], THREE[(n + 1) % 3]);
        world.put(writer, &format!("row-{n}")).await;
        world.engine(reader).barrier(soon()).await.unwrap();
        assert!(world.engine(reader).state().rows.contains_key(&format!("row-{n}")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_request_sent_twice_is_applied_once() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    let leader = world.leader().await;
    let from = THREE.into_iter().find(|site| *site != leader).unwrap();
    let mut client = world.client(from, &leader);
    let call = pb::ProposeRequest {
        route: Some(world.route(from, &leader)),
        life: 50,
        seq: 1,
        commands_json: br#"["twice"]"#.to_vec(),
    };
    let mut answers = Vec::new();
    for _ in 0..3 {
        let reply = client.propose(call.clone()).await.unwrap().into_inner();
        let Some(pb::propose_reply::Outcome::Committed(done)) = reply.outcome else { panic!("{reply:?}") };
        answers.push((done.index, from_json::<Vec<u64>>("answers", &done.answers_json).unwrap()));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    world.engine(&leader).barrier(soon()).await.unwrap();
    assert_eq!(world.engine(&leader).state().rows["twice"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_speaks_for_another_site_on_the_wire() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    let mut client = world.client("fra", "rome");
    let call = pb::ReadIndexRequest { route: Some(world.route("oslo", "rome")) };
    assert_eq!(client.read_index(call).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    let mut strange = world.route("fra", "rome");
    strange.store = "another".into();
    let refused = client.read_index(pb::ReadIndexRequest { route: Some(strange) }).await.unwrap_err();
    assert!(refused.message().contains("DC-0110"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_a_majority_nothing_is_committed_and_it_says_what_is_known() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    world.put("rome", "first").await;
    world.down("fra").await;
    world.down("oslo").await;
    let rome = world.engine("rome");
    let until = Instant::now() + Duration::from_secs(2);
    assert!(rome.propose(vec![Put("lost".into())], until).await.is_err());
    assert!(Instant::now() < until + Duration::from_secs(1), "the deadline holds");
    assert!(rome.barrier(Instant::now() + Duration::from_secs(1)).await.is_err());
    let mut leadership = rome.leadership();
    tokio::time::timeout(Duration::from_secs(10), leadership.wait_for(|now| !now.quorum_ok))
        .await
        .unwrap()
        .unwrap();
    world.up("fra").await;
    world.put("rome", "again").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_voter_that_was_away_for_long_gets_a_snapshot() {
    let mut world = World::new(&THREE, 20).await;
    world.up_all().await;
    world.down("oslo").await;
    for n in 0..120 {
        world.put("rome", &format!("row-{n}")).await;
    }
    world.up("oslo").await;
    world.engine("oslo").barrier(soon()).await.unwrap();
    let oslo = world.engine("oslo");
    assert_eq!(oslo.state().rows.len(), 120);
    let began = Instant::now();
    while oslo.metrics().snapshot == 0 {
        assert!(began.elapsed() < Duration::from_secs(5), "no snapshot: {:?}", oslo.metrics());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // and it stands on it after a restart
    world.down("oslo").await;
    world.up("oslo").await;
    world.engine("oslo").barrier(soon()).await.unwrap();
    assert_eq!(world.engine("oslo").state().rows.len(), 120);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_whole_quorum_restarts_with_what_it_knew() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    for n in 0..10 {
        world.put("fra", &format!("row-{n}")).await;
    }
    for site in THREE {
        world.down(site).await;
    }
    world.up_all().await;
    world.put("oslo", "after").await;
    let states = world.states_after_barrier().await;
    assert!(states.iter().all(|state| state.rows.len() == 11 && *state == states[0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn refuses_a_voter_that_lost_its_data_directory() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    world.put("rome", "kept").await;
    world.down("oslo").await;
    world.lose_disk("oslo");
    world.start("oslo").await;
    let oslo = world.engine("oslo");
    let mut standing = oslo.standing();
    let refused = standing.wait_for(|now| matches!(now, Standing::Refused { .. }));
    tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap().unwrap();
    let answer = oslo.propose(vec![Put("no".into())], soon()).await.unwrap_err();
    assert!(matches!(answer, ProposeError::Refused { .. }), "{answer}");
    assert_eq!(answer.fail("the change").code.as_str(), "DC-0110");
    // it is no vote: with fra gone too there is no majority
    world.put("rome", "two-of-three").await;
    world.down("fra").await;
    let until = Instant::now() + Duration::from_secs(3);
    assert!(world.engine("rome").propose(vec![Put("one-of-three".into())], until).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_voter_waits_until_all_others_have_seen_it() {
    let mut world = World::new(&THREE, 1000).await;
    world.start("fra").await;
    world.start("oslo").await;
    let fra = world.engine("fra");
    let mut standing = fra.standing();
    let waits = standing.wait_for(|now| {
        matches!(now, Standing::Founding { waiting_for } if waiting_for.iter().map(SiteId::as_str).eq(["rome"]))
    });
    tokio::time::timeout(Duration::from_secs(10), waits).await.unwrap().unwrap();
    let refused = fra.propose(vec![Put("early".into())], Instant::now() + Duration::from_secs(1)).await;
    assert!(matches!(refused, Err(ProposeError::NoLeader { .. })), "{refused:?}");
    world.up("rome").await;
    world.put("fra", "founded").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_witness_leaves_the_lead_to_the_others() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    for _ in 0..3 {
        let leader = world.leader().await;
        assert_ne!(leader, "oslo");
        world.down(&leader).await;
        let other = THREE.into_iter().find(|site| *site != leader && *site != "oslo").unwrap();
        world.put(other, "goes-on").await;
        assert_eq!(world.leader().await, other);
        world.up(&leader).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_reaches_one_voter_only_does_not_hold_up_the_others() {
    let five = ["ams", "bru", "fra", "oslo", "rome"];
    let mut world = World::new(&five, 1000).await;
    world.up_all().await;
    let leader = world.leader().await;
    let rest: Vec<&str> = five.into_iter().filter(|site| *site != leader && *site != "oslo").collect();
    let [bridge, left, right] = rest.as_slice() else { panic!("{rest:?}") };
    // the leader keeps the bridge; bridge, left and right keep each other; the witness is alone
    world.cut(&leader, left);
    world.cut(&leader, right);
    for site in five {
        world.cut("oslo", site);
    }
    let began = Instant::now();
    world.put_within(left, "by-the-majority", Duration::from_secs(25)).await;
    println!("half-connected leader of 5 replaced, first commit after {:.2?}", began.elapsed());
    world.put_within(bridge, "by-the-bridge", Duration::from_secs(10)).await;
    world.heal();
    world.put_within(&leader, "healed", Duration::from_secs(10)).await;
}
