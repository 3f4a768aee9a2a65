//! One run of the lab: parts, agents, load, moves, judgement, report, and everything ended again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::history::now_ns;
use crate::judge::{Judge, least, least_runs};
use crate::load::{Load, Shared, airflow, s3};
use crate::oracle::{self, Reason, Verdict, Window};
use crate::releases::{self, Releases};
use crate::report::{Move, Report, Settings};
use crate::world::{FRA, Plane, ROME, Site, World};
use crate::{agents, parts, prereq, process};

/// How long the processes of a lab that is no longer wanted may end one after another.
const END_SOON: Duration = Duration::from_secs(15);

/// What to run.
#[derive(Debug, Clone)]
pub struct Order {
    /// Name of the lab.
    pub name: String,
    /// Planes that take part.
    pub planes: BTreeSet<Plane>,
    /// How many moves, rome to fra first.
    pub moves: usize,
    /// Delay of replication each way.
    pub delay: Duration,
    /// Where to write the report.
    pub report: Option<PathBuf>,
    /// Leave everything running at the end.
    pub keep: bool,
    /// What the agents are told to do wrong.
    pub sabotage: Option<String>,
    /// The agents' binary, if it is not the one beside the lab.
    pub agent: Option<PathBuf>,
    /// Seconds that the caller spent on building.
    pub build_s: Option<f64>,
}

/// Runs the lab, prints the report and writes it. Whatever happens, nothing of it is left running unless asked for.
///
/// Errors: it could not be carried out; what was judged until then is lost, the files stay.
pub async fn run(order: &Order) -> Result<Verdict> {
    perform(order).await.map(|report| report.verdict)
}

/// As [`run`], returning the report.
pub async fn perform(order: &Order) -> Result<Report> {
    prereq::check(&order.name, order.planes.len() == Plane::ALL.len())?;
    let passed = |report: &Report| report.verdict == Verdict::Pass;
    inside(order, passed, async |world| {
        let report = drive(world, order).await?;
        publish(&report, order)?;
        Ok(report)
    })
    .await
}

/// A fresh lab for some work. It is ended afterwards, whatever comes of the work, unless the order keeps it.
///
/// Errors: the lab cannot be built or taken down; the work's own; a person ended it.
pub async fn inside<T>(
    order: &Order,
    passed: impl Fn(&T) -> bool,
    work: impl AsyncFnOnce(&World) -> Result<T>,
) -> Result<T> {
    let mut wish = Wish::hear()?; // from now on nothing is left behind
    let world = fresh(order).await?;
    let done = tokio::select! {
        done = Box::pin(work(&world)) => Some(done),
        () = wish.told() => None,
    };
    let Some(done) = done else {
        eprintln!("ending lab {}; its files stay in {}", world.name, world.root.display());
        end_soon(&world).await;
        bail!("interrupted");
    };
    let good = done.as_ref().is_ok_and(passed);
    if !good && order.sabotage.is_none() {
        tell_logs(&world);
    }
    if order.keep {
        tell_kept(&world);
        return done;
    }
    let ended = end(&world, good).await;
    let done = done?;
    ended?;
    Ok(done)
}

/// The wish of a person or of a supervisor that the lab end.
struct Wish {
    term: Signal,
    int: Signal,
}

impl Wish {
    fn hear() -> Result<Wish> {
        let hear = |kind| signal(kind).context("hear signals");
        Ok(Wish { term: hear(SignalKind::terminate())?, int: hear(SignalKind::interrupt())? })
    }

    async fn told(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// Ends all of a lab that is no longer wanted: in order while there is time, then whatever is left.
async fn end_soon(world: &World) {
    match tokio::time::timeout(END_SOON, end(world, false)).await {
        Ok(Ok(())) => return,
        Ok(Err(e)) => eprintln!("  {e:#}"),
        Err(_) => eprintln!("  its parts have not ended within {END_SOON:?}"),
    }
    for line in world.sweep().await {
        eprintln!("  ended a process that was left: {line}");
    }
}

/// An empty lab of that name. One that is running is not touched.
async fn fresh(order: &Order) -> Result<World> {
    if let Ok(old) = World::load(&order.name) {
        if old.alive("keeper") {
            bail!(
                "lab {} is running: end it with `down --name {}`, or take another --name",
                order.name,
                order.name
            );
        }
        old.sweep().await;
        std::fs::remove_dir_all(&old.root).with_context(|| format!("remove {}", old.root.display()))?;
    }
    let world = World::create(&order.name, order.planes.clone(), order.delay).await?;
    let n = world.number;
    eprintln!(
        "lab {} (number {n}): rome 127.{n}.1.1, fra 127.{n}.2.1, oslo 127.{n}.3.1; files in {}",
        world.name,
        world.root.display()
    );
    Ok(world)
}

async fn drive(world: &World, order: &Order) -> Result<Report> {
    let mut wall = BTreeMap::new();
    wall.extend(order.build_s.map(|s| ("build", s)));
    let under = begin(world, order, &mut wall).await?;
    let moved = timed("moving", &mut wall, "moves", moves(&under, |made| made < order.moves)).await;
    let rss_mib = agents::memory(world);
    under.load.stop().await;
    let (rows, mut reasons) = moved?;
    reasons.sort_by_key(|r| std::cmp::Reverse(r.verdict));
    Ok(Report {
        schema: "dc-lab/report/v1",
        verdict: oracle::verdict(&reasons),
        reasons,
        partial: order.planes.len() < Plane::ALL.len(),
        settings: settings(order),
        parts: parts::versions(world),
        moves: rows,
        rss_mib,
        wall_s: wall,
    })
}

/// A lab whose parts and agents run and whose writers write.
pub struct Under {
    /// Clients, and what they were told.
    pub load: Load,
    releases: Arc<Releases>,
}

/// Starts everything: parts, agents, the group, load.
pub async fn begin(world: &World, order: &Order, wall: &mut BTreeMap<&'static str, f64>) -> Result<Under> {
    timed("installing what is missing", wall, "install", parts::install(world)).await?;
    timed("starting the parts of both sites", wall, "start", async {
        parts::start(world).await?;
        agents::prepare(world).await?;
        agents::start(world, order.agent.as_deref(), order.sabotage.as_deref()).await?;
        eprintln!("  three agents are ready");
        agents::apply(world).await
    })
    .await?;
    let unended = order.sabotage.as_deref().is_some_and(|name| name.starts_with(Plane::Airflow.name()));
    let lengths = if unended { airflow::EVEN } else { airflow::MIXED };
    let mut load = Load::start(world, ROME, lengths).await?;
    let releases = Arc::new(Releases::default());
    if world.planes.contains(&Plane::S3) {
        releases.publish(world).await.context("publish the first DAG release")?;
        load.also(releases::keep(load.shared.clone(), releases.clone()));
    }
    Ok(Under { load, releases })
}

async fn timed<T>(
    what: &str,
    wall: &mut BTreeMap<&'static str, f64>,
    key: &'static str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    eprintln!("{what}");
    let begun = Instant::now();
    let done = work.await.with_context(|| what.to_string());
    wall.insert(key, begun.elapsed().as_secs_f64());
    done
}

fn settings(order: &Order) -> Settings {
    let load = [
        (Plane::Postgres, "8 committing clients at each site, about 300 commits a second"),
        (
            Plane::Kafka,
            "4 idempotent producers at each site, about 300 records a second; groups billing and audit",
        ),
        (Plane::S3, "4 writers at each site, about 16 objects a second"),
        (Plane::Airflow, "a run every 2 s"),
    ];
    Settings {
        profile: "wan",
        sabotage: order.sabotage.clone(),
        delay_ms: u64::try_from(order.delay.as_millis()).unwrap_or(u64::MAX),
        timing: order.delay.is_zero(),
        load: load
            .into_iter()
            .filter(|(p, _)| order.planes.contains(p))
            .map(|(p, t)| (p.name(), t))
            .collect(),
    }
}

/// Moves there and back as long as more are wanted, and none went wrong.
pub async fn moves(under: &Under, mut more: impl FnMut(usize) -> bool) -> Result<(Vec<Move>, Vec<Reason>)> {
    let (shared, releases) = (&under.load.shared, &under.releases);
    let (mut rows, mut reasons) = (Vec::new(), Vec::new());
    let mut judge = Judge::default();
    let (mut active, mut from) = (ROME, now_ns());
    while more(rows.len()) {
        let number = rows.len() + 1;
        let wanted = if active == ROME { FRA } else { ROME };
        eprintln!("  move {number}: {active} -> {wanted}, load is warming up");
        warm(shared, active, from).await;
        if shared.world.planes.contains(&Plane::S3) {
            judge.dags = s3::releases(&shared.world, active).await?;
        }
        judge.release = releases.newest(now_ns());
        let (row, found, window) = one_move(shared, &mut judge, number, from, active, wanted).await?;
        eprintln!("  move {number}: {} ({})", row.result, outages(&row));
        for reason in &found {
            eprintln!("    {reason}");
        }
        let broken = row.result != "done";
        rows.push(row);
        reasons.extend(found);
        (active, from) = (window.target, window.to);
        if broken {
            break; // what the next move would meet is for a human to see
        }
    }
    Ok((rows, reasons))
}

fn outages(row: &Move) -> String {
    let shown: Vec<String> = row.outage_ms.iter().map(|(plane, ms)| format!("{plane} {ms:.0} ms")).collect();
    shown.join(", ")
}

async fn one_move(
    shared: &Shared,
    judge: &mut Judge,
    number: usize,
    from: u64,
    active: Site,
    wanted: Site,
) -> Result<(Move, Vec<Reason>, Window)> {
    let world = &shared.world;
    shared.moving.store(true, Ordering::Relaxed);
    let asked = now_ns();
    let moved = agents::switchover(world, wanted).await?;
    let target = if moved.result == "done" { wanted } else { active };
    shared.moving.store(false, Ordering::Relaxed);
    settle(shared, target, asked).await;
    shared.generation.fetch_add(1, Ordering::Relaxed);
    let window =
        Window { number, from, asked, to: now_ns(), source: target.other(), target, moved: target == wanted };
    let mut row = Move {
        from: active.to_string(),
        to: wanted.to_string(),
        run: moved.run.clone(),
        result: moved.result.clone(),
        ..Move::default()
    };
    let mut reasons = Vec::new();
    if moved.result != "done" || moved.code != 0 {
        let text =
            format!("dc-switch ended with code {}: {}", moved.code, process::last_lines(&moved.said, 6));
        reasons.push(Reason { verdict: Verdict::Fail, check: "not_done", plane: None, number, text });
    }
    if !moved.run.is_empty() {
        let told = agents::run_told(world, &moved.run).await?;
        row.drain_ms.extend(airflow_drain_ms(&told.steps).map(|ms| ("airflow", ms)));
        if let (Some(takeover), true) = (told.takeover_ms, world.planes.contains(&Plane::Airflow)) {
            row.scheduler_live_ms = airflow::scheduler_live_ms(world, target, takeover).await?;
        }
        row.steps = told.steps;
    }
    reasons.extend(judge.judge(shared, &window, &mut row).await?);
    Ok((row, reasons, window))
}

/// How long Airflow's writers took to end their tasks and be gone, as the product tells it.
fn airflow_drain_ms(steps: &[serde_json::Value]) -> Option<f64> {
    let drains = |s: &&serde_json::Value| {
        s["plane"] == "airflow" && (s["act"] == "quiesce" || s["act"] == "prove_gone")
    };
    steps.iter().filter(drains).filter_map(|s| s["ms"].as_f64()).reduce(|a, b| a + b)
}

/// Waits until every plane has been written enough at the active site, or two minutes are over: then the oracle says so.
async fn warm(shared: &Shared, active: Site, from: u64) {
    let limit = Instant::now() + Duration::from_mins(2);
    while Instant::now() < limit && !enough(shared, active, from, now_ns()) {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until every plane has been written enough at the new site, or two minutes are over: less when nobody at all
/// is let in, which the oracle then says.
async fn settle(shared: &Shared, target: Site, asked: u64) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_mins(2) && !enough(shared, target, asked, now_ns()) {
        if begun.elapsed() > SHUT && shut(shared, target, asked) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// How long after a move a plane may let nobody in before it is not waited for.
const SHUT: Duration = Duration::from_secs(20);

fn shut(shared: &Shared, site: Site, from: u64) -> bool {
    let written = shared.histories.iter().filter(|(plane, _)| **plane != Plane::Airflow);
    written.into_iter().any(|(_, history)| history.acked(site, from) == 0)
}

fn enough(shared: &Shared, site: Site, from: u64, to: u64) -> bool {
    let writes = least(shared.world.delay);
    let runs = least_runs(shared.world.delay).runs;
    let of = |plane: &Plane| match plane {
        Plane::Airflow => {
            let ended = |m: &oracle::marks::Mark| {
                m.site == site && m.phase == oracle::marks::Phase::End && m.at > from && m.at <= to
            };
            airflow::marks(&shared.world).iter().filter(|m| ended(m)).count() >= runs
        }
        plane => {
            let groups = *plane != Plane::Kafka || shared.groups.committed(site, from);
            groups
                && shared
                    .history(*plane)
                    .is_ok_and(|h| h.acked(site, from) >= writes.after.max(writes.before))
        }
    };
    shared.world.planes.iter().all(of)
}

/// Runs the load without agents or moves for some seconds and judges what applies: nothing lost, nothing twice, the
/// founding direction carries.
pub async fn still(world: &World, seconds: u64) -> Result<Verdict> {
    let load = Load::start(world, ROME, airflow::MIXED).await?;
    let from = now_ns();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let window =
        Window { number: 0, from, asked: from, to: now_ns(), source: FRA, target: ROME, moved: false };
    let mut row = Move { from: "-".into(), to: ROME.to_string(), result: "still".into(), ..Move::default() };
    let reasons = Judge::default().judge(&load.shared, &window, &mut row).await;
    for plane in &world.planes {
        let waiting = load.shared.backlog.before(*plane, ROME, from, window.to);
        row.backlog_at_fence.extend(waiting.map(|n| (plane.name(), n)));
    }
    load.stop().await;
    let reasons = reasons?;
    let report = Report {
        verdict: oracle::verdict(&reasons),
        reasons,
        parts: parts::versions(world),
        moves: vec![row],
        ..Report::empty()
    };
    eprint!("{}", report.text());
    Ok(report.verdict)
}

fn publish(report: &Report, order: &Order) -> Result<()> {
    print!("{}", report.text());
    if let Some(path) = &order.report {
        std::fs::write(path, serde_json::to_string_pretty(report)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Ends all processes of a lab, and removes its files if asked to.
pub async fn end(world: &World, purge: bool) -> Result<()> {
    let agents = agents::stop(world).await;
    let parts = parts::stop(world).await;
    for name in process::names(world).into_iter().filter(|n| n != "keeper") {
        world.stop(&name, Duration::from_secs(10)).await?;
    }
    world.stop("keeper", Duration::from_secs(2)).await?;
    for line in world.sweep().await {
        eprintln!("  ended a process that was left: {line}");
    }
    if purge {
        std::fs::remove_dir_all(&world.root).with_context(|| format!("remove {}", world.root.display()))?;
    }
    agents.and(parts)
}

/// On failure: where the logs are, and the last lines of those that matter most.
fn tell_logs(world: &World) {
    let Ok(dir) = std::fs::read_dir(world.root.join("log")) else { return };
    let mut logs: Vec<PathBuf> = dir.filter_map(|e| Some(e.ok()?.path())).collect();
    logs.sort();
    eprintln!("logs:");
    for log in logs {
        eprintln!("  {}", log.display());
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let bad = |l: &&str| ["ERROR", "FATAL", "PANIC", "panicked"].iter().any(|w| l.contains(w));
        let shown: Vec<&str> = if log.to_string_lossy().contains(".agent.") {
            text.lines().collect()
        } else {
            text.lines().filter(bad).collect()
        };
        for line in shown.iter().rev().take(5).rev() {
            eprintln!("      {}", line.chars().take(300).collect::<String>());
        }
    }
}

fn tell_kept(world: &World) {
    println!(
        "the lab is still running; try\n  {}\nand end it with\n  {} down --name {} --purge",
        agents::example(world),
        world.root.join("bin/dc-lab").display(),
        world.name
    );
}
