//! Refusals on real parts: every plane's way to the target is broken at once, and the product must say so of each, at
//! once, and change nothing; then all is mended and the move is made.
//!
//! Broken are what an operator meets: the role that replicates may not log in any more, the mirror was stopped, the
//! target's object store is down. Clients of the active site must notice nothing of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::crashes::bench::{Bench, Help, Row};
use crate::crashes::follow::{self, Answer};
use crate::history::{Outcome, now_ns};
use crate::load::Shared;
use crate::oracle::Verdict;
use crate::parts::{self, GROUP};
use crate::prereq;
use crate::run::{self, Order};
use crate::world::{FRA, Plane, ROME, Site, World};

/// All that is broken is found within this time: a store is asked again and again before it counts as silent.
const FOUND: Duration = Duration::from_mins(1);
/// Clients of the active site go on for this long after the last refusal before they are asked.
const AFTER: Duration = Duration::from_secs(3);
/// The site that serves, and the one that cannot be moved to.
const ACTIVE: Site = ROME;
const TARGET: Site = FRA;

/// What is broken of a plane, and the codes of which one must be told.
struct Broken {
    plane: Plane,
    what: &'static str,
    codes: &'static [&'static str],
}

const ALL: [Broken; 3] = [
    Broken { plane: Plane::Postgres, what: "the replicating role may not log in", codes: &["DC-0305"] },
    Broken { plane: Plane::Kafka, what: "the mirror's connector is stopped", codes: &["DC-0408"] },
    Broken { plane: Plane::S3, what: "the target's object store is down", codes: &["DC-0501"] },
];

impl Broken {
    async fn cause(&self, world: &World) -> Result<()> {
        match self.plane {
            Plane::Postgres => parts::postgres::replication(world, &ACTIVE, false).await,
            Plane::Kafka => parts::kafka::mirror(world, TARGET, "stop").await,
            Plane::S3 => world.stop(&format!("{TARGET}.s3"), Duration::from_secs(5)).await,
            Plane::Airflow => Ok(()),
        }
    }

    async fn mend(&self, world: &World) -> Result<()> {
        match self.plane {
            Plane::Postgres => parts::postgres::replication(world, &ACTIVE, true).await,
            Plane::Kafka => parts::kafka::mirror(world, TARGET, "resume").await,
            Plane::S3 => parts::mend(world, TARGET, Plane::S3).await.map(drop),
            Plane::Airflow => Ok(()),
        }
    }
}

/// Breaks, asks, mends and moves in a world of its own, and prints what was told.
///
/// Errors: the world cannot be built, broken or mended.
pub async fn play(order: &Order) -> Result<Verdict> {
    prereq::check(&order.name, false)?;
    run::inside(order, |verdict| *verdict == Verdict::Pass, async |world| drive(world, order).await).await
}

async fn drive(world: &World, order: &Order) -> Result<Verdict> {
    let under = run::begin(world, order, &mut BTreeMap::new()).await?;
    let mut bench = Bench::new(&under.load.shared, ACTIVE);
    let mut row = Row::default();
    let done = refuse(&mut bench, &under.load.shared, &mut row).await;
    if done.is_ok() {
        moved(&mut bench, &mut row).await.context("the move after all was mended")?;
    }
    under.load.stop().await;
    done?;
    for wrong in &row.wrong {
        println!("WRONG {wrong}");
    }
    let verdict = if row.wrong.is_empty() { Verdict::Pass } else { Verdict::Fail };
    println!(
        "verdict: {}: a move of three broken planes, then one of whole ones: {}",
        verdict.name(),
        row.outcome
    );
    Ok(verdict)
}

/// Breaks everything, asks for a plan and for a move, and mends everything.
async fn refuse(bench: &mut Bench<'_>, shared: &Shared, row: &mut Row) -> Result<()> {
    let world = bench.world;
    ensure!(bench.written(ACTIVE, 0).await, "{ACTIVE} acknowledges too few writes");
    let broken: Vec<&Broken> = ALL.iter().filter(|b| world.planes.contains(&b.plane)).collect();
    let (before, from) = (standing(world).await?, now_ns());
    for one in &broken {
        eprintln!("  {}: {}", one.plane, one.what);
        one.cause(world).await.with_context(|| format!("break {}", one.plane))?;
    }
    let begun = Instant::now();
    let plan = loop {
        let plan = follow::ask(world, &["plan", "switchover", GROUP, "--to", TARGET.name]).await?;
        if broken.iter().all(|one| told(one, &plan.body)) || begun.elapsed() > FOUND {
            break plan;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let order = ["switchover", GROUP, "--to", TARGET.name, "--confirm", TARGET.name];
    let asked = follow::ask(world, &order).await?;
    table(&broken, &plan, &asked, begun.elapsed());
    for (name, answer) in [("plan switchover", &plan), ("switchover", &asked)] {
        row.wrong.extend(refused(name, answer, &broken));
    }
    tokio::time::sleep(AFTER).await;
    let after = standing(world).await?;
    if after != before {
        row.wrong.push(format!("holder and epoch were {before}, and are {after}"));
    }
    row.wrong.extend(noticed(shared, from));
    for one in &broken {
        one.mend(world).await.with_context(|| format!("mend {}", one.plane))?;
    }
    Ok(())
}

/// Once all is mended, the move is made, and judged.
async fn moved(bench: &mut Bench<'_>, row: &mut Row) -> Result<()> {
    let mut going = bench.begin().await?;
    let last = bench.end(&mut going, &Help::now(), row).await?;
    bench.conclude(&mut going, last.as_ref(), &["done"], row).await?;
    println!("all mended: {ACTIVE} -> {TARGET} {} in {:.1} s", row.outcome, row.seconds);
    Ok(())
}

/// Holder, epoch and open run of the group.
async fn standing(world: &World) -> Result<String> {
    let status = follow::ask(world, &["status"]).await?;
    let groups = status.body["groups"].as_array().map_or(&[][..], Vec::as_slice);
    let Some(group) = groups.iter().find(|g| g["name"] == GROUP) else {
        bail!("status tells of no group {GROUP}: {}", status.said.trim());
    };
    Ok(format!("{} in epoch {}, run {}", group["holder"], group["epoch"], group["run"]))
}

/// Codes of what blocks a plane.
fn codes(body: &Value, plane: Plane) -> BTreeSet<&str> {
    let found = body["findings"].as_array().map_or(&[][..], Vec::as_slice);
    let of = |f: &&Value| f["blocking"] == true && f["plane"] == plane.name();
    found.iter().filter(of).filter_map(|f| f["code"].as_str()).collect()
}

fn told(broken: &Broken, body: &Value) -> bool {
    let told = codes(body, broken.plane);
    broken.codes.iter().all(|code| told.contains(code))
}

/// What is wrong with a refusal: another exit code, or a broken plane that it does not name.
fn refused(name: &str, answer: &Answer, broken: &[&Broken]) -> Vec<String> {
    let mut wrong = Vec::new();
    if answer.code != 5 {
        wrong.push(format!("{name} ended with {}, not 5: {}", answer.code, answer.said.trim()));
    }
    for one in broken.iter().filter(|one| !told(one, &answer.body)) {
        let found = codes(&answer.body, one.plane);
        wrong.push(format!("{name} tells {found:?} of {}, not {:?}", one.plane, one.codes));
    }
    wrong
}

/// Writers of the active site that were not served since a time.
fn noticed(shared: &Shared, from: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    for (plane, history) in &shared.histories {
        let told = |outcome| history.count(|e| e.site == ACTIVE && e.sent >= from && e.outcome == outcome);
        let (acked, refused, unknown) =
            (told(Outcome::Acked), told(Outcome::Refused), told(Outcome::Unknown));
        println!(
            "{plane}: {acked} writes acknowledged at {ACTIVE} meanwhile, {refused} refused, {unknown} unknown"
        );
        if acked == 0 || refused + unknown > 0 {
            wrong.push(format!("{plane}: clients of {ACTIVE} noticed that {TARGET} was broken"));
        }
    }
    wrong
}

fn table(broken: &[&Broken], plan: &Answer, asked: &Answer, took: Duration) {
    println!("\n{:<10}{:<38}{:<10}{:<28}switchover tells", "plane", "broken", "wanted", "plan tells");
    for one in broken {
        let told = |answer: &Answer| codes(&answer.body, one.plane).into_iter().collect::<Vec<_>>().join(" ");
        println!(
            "{:<10}{:<38}{:<10}{:<28}{}",
            one.plane.name(),
            one.what,
            one.codes.join(" "),
            told(plan),
            told(asked)
        );
    }
    println!(
        "exit       {:<38}{:<10}{:<28}{}   (after {:.1} s)",
        "",
        5,
        plan.code,
        asked.code,
        took.as_secs_f64()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(code: i32, codes: &[(&str, &str, bool)]) -> Answer {
        let finding = |(plane, code, blocking): &(&str, &str, bool)| json!({"plane": plane, "code": code, "blocking": blocking});
        let findings: Vec<Value> = codes.iter().map(finding).collect();
        Answer { code, body: json!({ "findings": findings }), said: String::new() }
    }

    #[test]
    fn wants_every_broken_plane_named_at_once() {
        let broken: Vec<&Broken> = ALL.iter().collect();
        let all = [("postgres", "DC-0305", true), ("kafka", "DC-0408", true), ("s3", "DC-0501", true)];
        assert!(refused("plan", &answer(5, &all), &broken).is_empty());
        assert_eq!(refused("plan", &answer(5, &all[..2]), &broken).len(), 1);
        assert_eq!(refused("plan", &answer(0, &all), &broken).len(), 1, "another exit code");
        let mild = [all[0], all[1], ("s3", "DC-0501", false)];
        assert_eq!(refused("plan", &answer(5, &mild), &broken).len(), 1, "a finding that blocks nothing");
        let elsewhere = [all[0], all[1], ("kafka", "DC-0501", true)];
        assert_eq!(refused("plan", &answer(5, &elsewhere), &broken).len(), 1, "told of another plane");
    }
}
