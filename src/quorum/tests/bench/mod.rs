//! Figures, printed; bounds are wide, for the machine is shared.

use std::time::Duration;

use dc_core::lease::Profile;
use dc_quorum::LogEngine;
use tokio::time::Instant;

use crate::THREE;
use crate::world::World;

fn percentile(sorted: &[Duration], of: usize) -> Duration {
    sorted[(sorted.len() * of / 100).min(sorted.len() - 1)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_commit_takes_milliseconds() {
    let mut world = World::new(&THREE, 1000).await;
    world.up_all().await;
    let leader = world.leader().await;
    let follower = if leader == "fra" { "rome" } else { "fra" };
    for (word, site) in [("leader", leader.as_str()), ("follower", follower)] {
        for n in 0..300 {
            world.put(site, &format!("{site}-{n}")).await;
        }
        let mut took = world.engine(site).metrics().commits;
        took.sort_unstable();
        println!(
            "commit at a {word}, 3 voters, mutual TLS, loopback: p50 {:.2?} p90 {:.2?} p99 {:.2?}",
            percentile(&took, 50),
            percentile(&took, 90),
            percentile(&took, 99)
        );
        assert!(percentile(&took, 50) < Duration::from_millis(250));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dead_leader_is_replaced() {
    for (word, profile, limit) in [("wan", Profile::WAN, 8), ("metro", Profile::METRO, 8)] {
        let mut world = World::new(&THREE, 1000).await;
        world.profile = profile;
        world.up_all().await;
        let mut took = Vec::new();
        for n in 0..5 {
            let leader = world.leader().await;
            let other = if leader == "fra" { "rome" } else { "fra" };
            world.put(other, &format!("before-{n}")).await;
            world.down(&leader).await;
            let began = Instant::now();
            world.put_within(other, &format!("after-{n}"), Duration::from_secs(limit)).await;
            took.push(began.elapsed());
            world.up(&leader).await;
        }
        took.sort_unstable();
        println!(
            "leader gone -> next commit, {word}: min {:.2?} p50 {:.2?} max {:.2?}",
            took[0], took[2], took[4]
        );
    }
}
