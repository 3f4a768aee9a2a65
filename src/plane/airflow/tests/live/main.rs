//! The plane against two real Airflow sites of a lab: `DC_LAB_WORLD` names its folder, else every test fails.

mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dc_core::act::{AirflowAct, Change, Outcome};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, SiteId};
use dc_core::position::Position;
use dc_plane::{Deadline, Depth, PlaneError, Role};
use world::{World, blocking, fingerprints, until};

fn soon() -> Deadline {
    Deadline::within(Duration::from_mins(2))
}

fn reopen() -> Authority {
    Authority::reopen(Epoch { incarnation: 0, counter: 1 })
}

fn stamp() -> String {
    format!(
        "{}",
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
    )
}

/// Brings rome up as holder and fra as standby, whatever an earlier test left.
async fn ready(world: &World) -> Result<()> {
    let (rome, fra) = world.pair()?;
    world.publish()?;
    let act = |name, at: &SiteId| world.act(name, at, &rome, &fra, None);
    let standing =
        world.plane(&fra)?.perform(&act(AirflowAct::Stand, &fra), &Authority::self_fence(), soon()).await?;
    let serving = world.plane(&rome)?.perform(&act(AirflowAct::Serve, &rome), &reopen(), soon()).await?;
    println!("ready: {} | {}", serving.seen, standing.seen);
    for dag in ["lab_rerun", "lab_fail", "lab_hold", "dc_switch_canary"] {
        until(&format!("{dag} to be known"), || async { world.paused(&rome, dag).await.is_ok() }).await?;
        world.unpause(&rome, dag).await?;
    }
    Ok(())
}

/// One planned move as the plan orders it, the database moved by hand. Returns seconds from release to own row moved.
async fn moved(world: &World, from: &SiteId, to: &SiteId, run: &str) -> Result<f64> {
    let (source, target) = (world.plane(from)?, world.plane(to)?);
    let act = |name, at: &SiteId| world.act(name, at, from, to, Some(run));
    let at_source = world.twice(&source, &act(AirflowAct::Preflight, from)).await?;
    let at_target = world.twice(&target, &act(AirflowAct::Preflight, to)).await?;
    ensure!(blocking(&at_source).is_empty(), "source: {:?}", blocking(&at_source));
    ensure!(blocking(&at_target).is_empty(), "target: {:?}", blocking(&at_target));
    ensure!(fingerprints(&at_source) == fingerprints(&at_target), "both sites have one set of keys");
    ensure!(fingerprints(&at_source).contains_key("fernet key"));
    world.twice(&target, &act(AirflowAct::WarmApi, to)).await?;
    world.trigger(from, "lab_rerun", &format!("{run}-busy"), 6.0).await?;
    until("a task to run at the fence", || async { world.runs_with(run, "start").len() == 1 }).await?;
    world.twice(&source, &act(AirflowAct::Quiesce, from)).await?;
    ensure!(world.runs_with(run, "end").len() == 1, "the running task was let to its end");
    // accepted while nothing runs any more: it must run at the new site
    world.trigger(from, "lab_rerun", &format!("{run}-waits"), 1.0).await?;
    let gone = world.twice(&source, &act(AirflowAct::ProveGone, from)).await?;
    ensure!(
        gone.outcomes.iter().any(|o| matches!(o, Outcome::Position(Position::Airflow { open_tasks: 0 })))
    );
    world.twice(&source, &act(AirflowAct::UploadTaskLogs, from)).await?;
    world.twice(&source, &act(AirflowAct::CloseApi, from)).await?;
    for (plane, site) in [(&source, from), (&target, to)] {
        let again = world.twice(plane, &act(AirflowAct::Recheck, site)).await?;
        ensure!(blocking(&again).is_empty(), "recheck {site}: {:?}", blocking(&again));
    }
    world.move_database(from, to)?;
    let began = Instant::now();
    world.twice(&target, &act(AirflowAct::OpenApi, to)).await?;
    world.twice(&target, &act(AirflowAct::RerunPolicy, to)).await?;
    let released = Instant::now();
    let started = target.perform(&act(AirflowAct::StartWriters, to), &world.step(run), soon()).await?;
    println!(
        "MEASURED promoted -> own row moved {:.2} s, of it start_writers {:.2} s: {}",
        began.elapsed().as_secs_f64(),
        released.elapsed().as_secs_f64(),
        started.seen
    );
    let took = released.elapsed().as_secs_f64();
    world.twice(&target, &act(AirflowAct::StartWriters, to)).await?;
    world.follow(from, to)?;
    world.twice(&source, &act(AirflowAct::WarmStandby, from)).await?;
    world.twice(&target, &act(AirflowAct::Verify, to)).await?;
    until("the waiting run to end at the new site", || async { world.runs_with(run, "end").len() == 2 })
        .await?;
    let marks = world.marks(&format!("{run}-waits"));
    ensure!(marks.iter().all(|m| m.3 == to.as_str()) && marks.len() == 2, "once, at the new site: {marks:?}");
    let facts = target.observe(Depth::Deep, soon()).await?;
    ensure!(facts.role == Some(Role::Writable), "{facts:?}");
    let facts = source.observe(Depth::Deep, soon()).await?;
    ensure!(facts.role == Some(Role::Following), "{facts:?}");
    Ok(took)
}

async fn there_and_back() -> Result<()> {
    let world = World::open()?;
    ready(&world).await?;
    let (rome, fra) = world.pair()?;
    let stamp = stamp();
    let there = moved(&world, &rome, &fra, &format!("a{stamp}")).await?;
    let back = moved(&world, &fra, &rome, &format!("b{stamp}")).await?;
    println!("MEASURED start_writers {there:.2} s there, {back:.2} s back");
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for prefix in ["a", "b"] {
        for mark in world.marks(&format!("{prefix}{stamp}")).into_iter().filter(|m| m.2 == "end") {
            *ends.entry(mark.1).or_default() += 1;
        }
    }
    ensure!(ends.len() == 4 && ends.values().all(|n| *n == 1), "each of four runs ended once: {ends:?}");
    ensure!(
        there < 15.0 && back < 15.0,
        "the own row moves within 15 s of the release, on a machine that others load too"
    );
    Ok(())
}

/// A quiesce that runs into its limit is taken back; what it had to end is decided by the DAGs' tags.
async fn taken_back() -> Result<()> {
    let world = World::open()?;
    ready(&world).await?;
    let (rome, fra) = world.pair()?;
    let run = format!("u{}", stamp());
    for (dag, seconds) in [("lab_rerun", 8.0), ("lab_fail", 60.0), ("lab_hold", 60.0)] {
        world.trigger(&rome, dag, &format!("{run}-{dag}"), seconds).await?;
    }
    until("three tasks to run", || async { world.runs_with(&run, "start").len() == 3 }).await?;
    let plane = world.plane_with(&rome, world.config(&rome)?, Some(Duration::from_secs(2)))?;
    let act = |name| world.act(name, &rome, &rome, &fra, Some(&run));
    let refused = plane.perform(&act(AirflowAct::Quiesce), &world.step(&run), soon()).await;
    let words = refused.err().context("tasks run longer than the limit")?.to_string();
    println!("{words}");
    ensure!(words.contains("3 tasks still run") && words.contains("limit 2.0 s"), "{words}");
    world.twice(&plane, &act(AirflowAct::CloseApi)).await?;
    world.undo_twice(&plane, &act(AirflowAct::CloseApi)).await?;
    let undone = world.undo_twice(&plane, &act(AirflowAct::Quiesce)).await?;
    ensure!(undone.seen.contains("1 failed, 1 held"), "{}", undone.seen);
    ensure!(world.paused(&rome, "lab_hold").await?, "a person decides about lab_hold");
    until("lab_rerun to run again and end", || async { world.runs_with(&run, "end").len() == 1 }).await?;
    let (failed, tries) = world.task(&rome, "lab_fail", &format!("{run}-lab_fail")).await?;
    ensure!((failed.as_str(), tries) == ("failed", 1), "{failed} at try {tries}");
    let starts =
        |dag: &str| world.marks(&format!("{run}-{dag}")).into_iter().filter(|m| m.2 == "start").count();
    ensure!(
        starts("lab_rerun") == 2 && starts("lab_fail") == 1 && starts("lab_hold") == 1,
        "{:?}",
        world.marks(&run)
    );
    world.give_up(&rome, "lab_hold", &format!("{run}-lab_hold")).await
}

/// A keeper that is killed, a site that closes itself, doors that stay shut.
async fn hard_times() -> Result<()> {
    let world = World::open()?;
    ready(&world).await?;
    let (rome, fra) = world.pair()?;
    let (holder, standby) = (world.plane(&rome)?, world.plane(&fra)?);
    let act = |name, at: &SiteId| world.act(name, at, &rome, &fra, Some("h"));
    let shut = standby.perform(&act(AirflowAct::StartWriters, &fra), &world.step("h"), soon()).await;
    ensure!(
        matches!(&shut, Err(PlaneError::Refused { code, .. }) if code == "DC-0604"),
        "on a replica: {shut:?}"
    );
    let closed = holder
        .perform(
            &act(AirflowAct::SelfClose, &rome),
            &Authority::self_fence(),
            Deadline::within(Duration::from_secs(9)),
        )
        .await?;
    println!("{}", closed.seen);
    ensure!(holder.observe(Depth::Deep, soon()).await?.role != Some(Role::Writable));
    let fenced = holder.perform(&act(AirflowAct::Serve, &rome), &Authority::self_fence(), soon()).await;
    ensure!(matches!(&fenced, Err(PlaneError::Refused { code, .. }) if code == "DC-0620"), "{fenced:?}");
    let served = holder.perform(&act(AirflowAct::Serve, &rome), &reopen(), soon()).await?;
    println!("{}", served.seen);
    let run_dir = world.config(&rome)?.run_dir.context("run_dir")?;
    let note: serde_json::Value = serde_json::from_slice(&std::fs::read(run_dir.join("writers.kept"))?)?;
    let keeper = rustix::process::Pid::from_raw(i32::try_from(note["keeper"].as_i64().context("keeper")?)?);
    rustix::process::kill_process(keeper.context("pid")?, rustix::process::Signal::KILL)?;
    let gone = holder.perform(&act(AirflowAct::ProveGone, &rome), &world.step("h"), soon()).await?;
    world.twice(&holder, &act(AirflowAct::ProveGone, &rome)).await?;
    ensure!(gone.seen.contains("is empty (") && !gone.seen.contains("(0 "), "{}", gone.seen);
    left_over_log(&world, &rome).await?;
    world.undo_twice(&holder, &act(AirflowAct::ProveGone, &rome)).await?;
    let early = holder.perform(&act(AirflowAct::UploadTaskLogs, &rome), &world.step("h"), soon()).await;
    ensure!(matches!(&early, Err(PlaneError::Refused { code, .. }) if code == "DC-0622"), "{early:?}");
    Ok(())
}

/// A log that its task could not upload is found and brought to the bucket.
async fn left_over_log(world: &World, site: &SiteId) -> Result<()> {
    let (rome, fra) = world.pair()?;
    let plane = world.plane(site)?;
    let log = world.config(site)?.home.join("logs/dag_id=d/run_id=r/task_id=t/attempt=1.log");
    std::fs::create_dir_all(log.parent().context("folder")?)?;
    std::fs::write(&log, "{\"event\":\"it ended\"}\n")?;
    let act = world.act(AirflowAct::UploadTaskLogs, site, &rome, &fra, Some("l"));
    let first = plane.perform(&act, &world.step("l"), soon()).await?;
    world.twice(&plane, &act).await?;
    ensure!(first.change == Change::Changed, "{}", first.seen);
    ensure!(std::fs::metadata(&log)?.len() == 0, "what was uploaded is no longer on disk");
    Ok(())
}

/// A key that differs, and a database that is not there, are all said at once and nothing is changed.
async fn bad_standby() -> Result<()> {
    let world = World::open()?;
    ready(&world).await?;
    let (rome, fra) = world.pair()?;
    let mut config = world.config(&fra)?;
    let text = std::fs::read_to_string(&config.env_file)?;
    let changed = text
        .lines()
        .map(|line| match line.split_once('=') {
            Some(("AIRFLOW__CORE__FERNET_KEY", _)) => {
                "AIRFLOW__CORE__FERNET_KEY=YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXphYmNkZWY=".to_owned()
            }
            Some(("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", url)) => {
                format!("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN={}", url.replace(":25432", ":1"))
            }
            Some(("AIRFLOW__API_AUTH__JWT_SECRET", _)) => "AIRFLOW__API_AUTH__JWT_SECRET=".to_owned(),
            _ => line.to_owned(),
        })
        .collect::<Vec<_>>()
        .join("\n");
    config.env_file = config.home.join("other.env");
    // no interpreter runs there, so a new one is asked
    config.run_dir = Some(config.home.join("other-run"));
    std::fs::copy(&world.config(&fra)?.env_file, &config.env_file)?;
    std::fs::write(&config.env_file, changed)?;
    let preflight = |at: &SiteId| world.act(AirflowAct::Preflight, at, &rome, &fra, Some("p"));
    let good = world.plane(&fra)?.perform(&preflight(&fra), &world.step("p"), soon()).await?;
    let holder = world.plane(&rome)?.perform(&preflight(&rome), &world.step("p"), soon()).await?;
    let bad =
        world.plane_with(&fra, config, None)?.perform(&preflight(&fra), &world.step("p"), soon()).await?;
    ensure!(fingerprints(&good) == fingerprints(&holder));
    ensure!(fingerprints(&bad).get("fernet key") != fingerprints(&holder).get("fernet key"));
    let codes: Vec<String> = blocking(&bad).into_iter().map(|f| f.code).collect();
    ensure!(codes == ["DC-0607", "DC-0604"], "both at once: {codes:?}");
    let told = format!("{bad:?}");
    ensure!(!told.contains("YWJjZGVm"), "a key is never told");
    Ok(())
}

async fn story() -> Result<()> {
    World::open()?.open_buckets()?;
    bad_standby().await.context("bad standby")?;
    there_and_back().await.context("there and back")?;
    taken_back().await.context("taken back")?;
    hard_times().await.context("hard times")
}

#[test]
fn two_real_sites_move_there_and_back_take_back_and_stand_hard_times() -> Result<()> {
    if world::done_as_owner("two_real_sites_move_there_and_back_take_back_and_stand_hard_times")? {
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(story())
}
