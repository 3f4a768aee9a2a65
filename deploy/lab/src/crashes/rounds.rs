//! The rounds: an agent dies in a stage; and what else may go wrong on purpose.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::bench::{Bench, Going, Row, kill};
use super::follow::{self, Told};
use super::plan::{Entry, Round, Stage, Victim};
use crate::parts::{self, GROUP};
use crate::world::{Plane, Site, World};

/// Ends that are legal whenever a process dies. A preflight that is not answered refuses, and nothing was changed.
const LEGAL: [&str; 3] = ["done", "rolled_back", "returned"];
/// Tries to stop a run between its takeover and its opening: either may be over before the kill.
const TRIES: usize = 4;

/// One agent dies in one stage of one move.
pub async fn crash(bench: &mut Bench<'_>, round: &Round, row: &mut Row) -> Result<()> {
    let leader = bench.leader().await?;
    let mut going = bench.begin().await?;
    let victim = match round.victim {
        Victim::Leader => leader,
        Victim::Source => going.source,
        Victim::Target => going.target,
    };
    row.victim = victim.to_string();
    let mut entry = Entry::new(round.stage, going.source, &bench.world.planes);
    let early = bench.until(&mut going, |told| entry.by(told)).await?;
    let last = if let Some(last) = early {
        row.wrong.push(format!("left before {}: {last}", round.stage.name()));
        Some(last)
    } else {
        let at = bench.kill_agent(victim).await?;
        let pause = (!round.late).then(|| Instant::now() + round.pause);
        row.met = bench.met(&going, at).await?;
        bench.end(&mut going, pause, row).await?
    };
    let refused = round.stage == Stage::Preflight;
    let legal: Vec<&str> = LEGAL.into_iter().chain(refused.then_some("refused")).collect();
    bench.conclude(&going, last.as_ref(), &legal, row).await
}

/// The target's part of a plane dies while the source is drained: the run goes back, and the next one succeeds.
pub async fn part(bench: &mut Bench<'_>, plane: Plane, row: &mut Row) -> Result<()> {
    let mut going = bench.begin().await?;
    let (source, target) = (going.source, going.target);
    row.victim = format!("{target}'s {plane}");
    let pid = part_of(bench.world, target, plane)?;
    let kafka = bench.world.planes.contains(&Plane::Kafka);
    // Kafka's drain is under way, or where there is none, the last thing before the database's own
    let first = if kafka { "fence_apps" } else { "pre_sync" };
    let drains = |told: &Told| matches!(told, Told::Step(s) if s["act"] == first && s["state"] == "done");
    if let Some(last) = bench.until(&mut going, drains).await? {
        bail!("left before its drain: {last}");
    }
    kill(pid, Signal::KILL)?;
    let at = crate::history::wall_ns() / 1_000_000;
    row.met = bench.met(&going, at).await?;
    let last = bench.end(&mut going, Some(Instant::now()), row).await?;
    if let Some(last) = &last
        && last["result"] == "rolled_back"
        && last["exit"] != 6
    {
        row.wrong.push(format!("rolled back with exit {}, not 6", last["exit"]));
    }
    if plane == Plane::Kafka {
        parts::kafka::start(bench.world).await.context("start the broker again")?;
    } // PostgreSQL is its agent's to start
    bench.conclude(&going, last.as_ref(), &["rolled_back"], row).await?;
    ensure!(bench.active == source, "{source} does not serve after the run went back");
    let mut next = bench.begin().await.context("the next move")?;
    let last = bench.end(&mut next, Some(Instant::now()), row).await?;
    let result = row.outcome.clone();
    bench.conclude(&next, last.as_ref(), &["done"], row).await.context("the next move")?;
    row.outcome = format!("{result}, next {}", row.outcome);
    Ok(())
}

/// The process of a part at a site.
fn part_of(world: &World, site: Site, plane: Plane) -> Result<u32> {
    match plane {
        Plane::Postgres => postmaster(world, site),
        Plane::Kafka => world.pid(&format!("{site}.kafka-1")).context("no broker runs"),
        Plane::S3 | Plane::Airflow => bail!("no round ends the parts of {plane}"),
    }
}

fn postmaster(world: &World, site: Site) -> Result<u32> {
    let file = world.dir(&site).join("postgres/data/postmaster.pid");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    text.lines().next().and_then(|l| l.trim().parse().ok()).context("postmaster.pid begins with a number")
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
    row.met = bench.met(&going, at).await?;
    if answer.code != 0 {
        row.wrong.push(format!("abort ended with {}: {}", answer.code, answer.said.trim()));
    }
    let last = bench.end(&mut going, Some(Instant::now()), row).await?;
    bench.conclude(&going, last.as_ref(), &["rolled_back"], row).await
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
        row.met = bench.met(&going, at).await?;
        if !stays_unopened(bench.world, &going.run).await? {
            let last = bench.end(&mut going, Some(Instant::now()), row).await?;
            bench.conclude(&going, last.as_ref(), &LEGAL, row).await?;
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
        let last = bench.end(&mut going, Some(Instant::now()), row).await?;
        return bench.conclude(&going, last.as_ref(), &["returned"], row).await;
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
