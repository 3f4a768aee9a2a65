//! The rounds: an agent dies in a stage; an operator gives a second order, takes a run back, turns it round.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::bench::{Bench, Going, Help, Row, kill};
use super::follow::{self, Told};
use super::law;
use super::plan::{Entry, Round, Stage, Victim};
use crate::parts::GROUP;
use crate::parts::postgres::postmaster;
use crate::world::{Site, World};

/// Tries to kill in a stage, or to stop a run between its takeover and its opening: either may be over before.
pub const TRIES: usize = 4;

/// One agent dies in one stage of one move. A kill that came too early or too late is made again in another move.
pub async fn crash(bench: &mut Bench<'_>, round: &Round, row: &mut Row) -> Result<()> {
    for attempt in 1..=TRIES {
        if crash_once(bench, round, row).await? || !row.wrong.is_empty() {
            return Ok(());
        }
        row.notes.push(format!("try {attempt} met {:?}", row.met));
    }
    row.wrong.push(format!("no kill in {TRIES} tries met the stage {}", round.stage.name()));
    Ok(())
}

/// One try. Returns whether the kill fell into its stage.
async fn crash_once(bench: &mut Bench<'_>, round: &Round, row: &mut Row) -> Result<bool> {
    let leader = bench.leader().await?;
    let mut going = bench.begin().await?;
    let victim = match round.victim {
        Victim::Leader => leader,
        Victim::Source => going.source,
        Victim::Target => going.target,
    };
    row.victim = victim.to_string();
    let mut entry = Entry::new(round.stage, going.source, &bench.world.planes);
    if let Some(last) = bench.until(&mut going, |told| entry.by(told)).await? {
        bench.conclude(&mut going, Some(&last), &["done"], row).await?; // nothing was broken as yet
        return Ok(false);
    }
    let at = bench.kill_agent(victim).await?;
    let wake = (!round.late).then(|| Instant::now() + round.pause);
    let met = bench.met(&going, at, row).await?;
    let last = bench.end(&mut going, &Help { wake, part: None }, row).await?;
    let legal = last.as_ref().map_or_else(Vec::new, |run| law::legal(run, at, &met));
    bench.conclude(&mut going, last.as_ref(), &legal, row).await?;
    Ok(met.contains(&round.stage))
}

/// A second order while a run fences: to the same site it follows the run, to the other it is refused; then the run
/// is aborted and the old site serves. The run is held in its fence by a frozen stream at the target.
pub async fn abort(bench: &mut Bench<'_>, row: &mut Row) -> Result<()> {
    let mut going = bench.begin().await?;
    let stream = walreceiver(bench.world, going.target)?;
    let recheck = |told: &Told| matches!(told, Told::Step(s) if s["act"] == "recheck");
    if let Some(last) = bench.until(&mut going, recheck).await? {
        bail!("left before its recheck: {last}");
    }
    kill(stream, Signal::STOP)?;
    let thaw = Thaw(stream);
    let mut entry = Entry::new(Stage::Fence, going.source, &bench.world.planes);
    if let Some(last) = bench.until(&mut going, |told| entry.by(told)).await? {
        bail!("left before its fence: {last}");
    }
    "-".clone_into(&mut row.victim);
    second_orders(bench, &going, row).await?;
    let reason = ["run", "abort", &going.run, "--reason", "the lab wants it back", "--no-wait"];
    let at = crate::history::wall_ns() / 1_000_000;
    let answer = follow::ask(bench.world, &reason).await?;
    drop(thaw);
    bench.met(&going, at, row).await?;
    if answer.code != 0 {
        row.wrong.push(format!("abort ended with {}: {}", answer.code, answer.said.trim()));
    }
    let last = bench.end(&mut going, &Help::now(), row).await?;
    bench.conclude(&mut going, last.as_ref(), &["rolled_back"], row).await
}

async fn second_orders(bench: &Bench<'_>, going: &Going, row: &mut Row) -> Result<()> {
    let to = |site: Site| ["switchover", GROUP, "--to", site.name, "--confirm", site.name, "--no-wait"];
    let same = follow::ask(bench.world, &to(going.target)).await?;
    if same.code != 0 || same.body["run"] != going.run.as_str() {
        row.wrong.push(format!(
            "a second order ended with {}: {} {}",
            same.code,
            same.body,
            same.said.trim()
        ));
    }
    let other = follow::ask(bench.world, &to(going.source)).await?;
    if other.code != 5 {
        row.wrong.push(format!(
            "an order to the other site ended with {}: {}",
            other.code,
            other.said.trim()
        ));
    }
    Ok(())
}

/// Lets a frozen process go on, whatever happens.
struct Thaw(u32);

impl Drop for Thaw {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::CONT); // ended meanwhile: nothing is left frozen
    }
}

/// The process that receives the source's log at a standby.
fn walreceiver(world: &World, site: Site) -> Result<u32> {
    let parent = postmaster(world, site)?;
    let processes = std::fs::read_dir("/proc").context("read /proc")?;
    let pids = processes.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is = |pid: &u32| {
        let of = Path::new("/proc").join(pid.to_string());
        let told = std::fs::read_to_string(of.join("status")).unwrap_or_default();
        let line = std::fs::read(of.join("cmdline")).unwrap_or_default();
        told.lines().any(|l| l.strip_prefix("PPid:").is_some_and(|p| p.trim() == parent.to_string()))
            && String::from_utf8_lossy(&line).contains("walreceiver")
    };
    pids.into_iter().find(is).with_context(|| format!("no stream is received at {site}"))
}

/// The target's agent dies at the takeover, so that the run stays before its opening; the operator returns it.
pub async fn turn(bench: &mut Bench<'_>, row: &mut Row) -> Result<()> {
    for attempt in 1..=TRIES {
        let mut going = bench.begin().await?;
        let (source, target) = (going.source, going.target);
        row.victim = target.to_string();
        let mut entry = Entry::new(Stage::Promote, source, &bench.world.planes);
        let early = bench.until(&mut going, |told| entry.by(told)).await?;
        ensure!(early.is_none(), "left before its takeover");
        let at = bench.kill_agent(target).await?;
        let met = bench.met(&going, at, row).await?;
        if !stays_unopened(bench.world, &going.run).await? {
            let last = bench.end(&mut going, &Help::now(), row).await?;
            let legal = last.as_ref().map_or_else(Vec::new, |run| law::legal(run, at, &met));
            bench.conclude(&mut going, last.as_ref(), &legal, row).await?;
            row.notes.push(format!("try {attempt} came too early or too late: {}", row.outcome));
            continue;
        }
        let answer = follow::ask(bench.world, &["run", "return", &going.run, "--no-wait"]).await?;
        if answer.code != 0 {
            row.wrong.push(format!("return ended with {}: {}", answer.code, answer.said.trim()));
        }
        let returned = crate::history::now_ns();
        if !bench.written(source, returned).await {
            row.wrong.push(format!("{source} does not serve while {target}'s agent is away"));
        }
        let last = bench.end(&mut going, &Help::now(), row).await?;
        return bench.conclude(&mut going, last.as_ref(), &["returned"], row).await;
    }
    bail!("no run could be stopped between its takeover and its opening in {TRIES} tries")
}

/// Waits for the takeover of a run. Tells whether it is there and nothing was opened.
async fn stays_unopened(world: &World, run: &str) -> Result<bool> {
    let limit = Instant::now() + Duration::from_secs(30);
    while Instant::now() < limit {
        let shown = follow::ask(world, &["run", "show", run]).await?.body;
        let known = |key: &str| !shown[key].is_null();
        if known("ended_at_ms") || known("opened_at_ms") || !shown["aborting"].is_null() {
            return Ok(false);
        }
        if known("takeover_at_ms") {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(false)
}
