//! Measures moves under load for a while: every step, the quorum's commits, renewals, and what an election takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::agents;
use crate::oracle::{self, Verdict};
use crate::report::Move;
use crate::run::{self, Order};
use crate::world::{SITES, Site, World, port};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Name, planes, delay, and where to write the table.
    pub order: Order,
    /// How long moves are made one after another.
    pub lasts: Duration,
    /// How often the leading agent is killed after them.
    pub elections: usize,
}

/// A dead leader is replaced within this time, or the bench gives up.
const ELECTED: Duration = Duration::from_secs(30);

/// Moves there and back under load until the time is over, kills leaders, and prints the table.
///
/// Errors: the lab cannot be built, no leader is found. Verdict: the oracle's over all moves.
pub async fn switchover(asked: &Asked) -> Result<Verdict> {
    run::inside(
        &asked.order,
        |verdict| *verdict == Verdict::Pass,
        async |world| {
            let under = run::begin(world, &asked.order, &mut BTreeMap::new()).await?;
            let limit = Instant::now() + asked.lasts;
            let moved = run::moves(&under, |_| Instant::now() < limit).await;
            let quorum = Quorum::read(world).await;
            let mut elections = Vec::new();
            for _ in 0..asked.elections {
                elections.push(election(world).await?);
            }
            under.load.stop().await;
            let (rows, reasons) = moved?;
            let text = table(asked, &rows, &quorum?, &elections);
            print!("{text}");
            for reason in &reasons {
                println!("{reason}");
            }
            if let Some(path) = &asked.order.report {
                std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
            }
            Ok(oracle::verdict(&reasons))
        },
    )
    .await
}

/// What an agent says of itself on `/metrics`: name and labels as it writes them, without its own site.
async fn scrape(world: &World, site: Site) -> Result<BTreeMap<String, f64>> {
    let url = format!("http://{}:{}/metrics", world.ip(&site), port::AGENT_HTTP);
    let text = reqwest::get(&url).await?.text().await?;
    let own = format!("site=\"{site}\"");
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        let name = name.replace(&format!("{own},"), "").replace(&format!("{{{own}}}"), "");
        Some((name, value.parse().ok()?))
    };
    Ok(text.lines().filter(|l| !l.starts_with('#')).filter_map(sample).collect())
}

/// The quorum as its three agents saw it.
struct Quorum {
    /// Per site: commits proposed there, their median and 99th percentile in ms, renewals sent and missed.
    sites: Vec<(Site, [f64; 5])>,
}

impl Quorum {
    async fn read(world: &World) -> Result<Quorum> {
        let mut sites = Vec::new();
        for site in SITES {
            let told = scrape(world, site).await.with_context(|| format!("read the metrics of {site}"))?;
            let of = |name: &str| told.get(&format!("dcswitch_{name}")).copied().unwrap_or(f64::NAN);
            let row = [
                of("quorum_commits_total"),
                of("quorum_commit_seconds{quantile=\"0.5\"}") * 1_000.0,
                of("quorum_commit_seconds{quantile=\"0.99\"}") * 1_000.0,
                of("lease_renewals_total"),
                of("lease_renewals_missed_total"),
            ];
            sites.push((site, row));
        }
        Ok(Quorum { sites })
    }
}

/// Kills the leading agent. From then until another one leads with a majority behind it; the dead one is started again.
async fn election(world: &World) -> Result<Duration> {
    let old = leader(world, None).await?;
    let pid = world.pid(&agents::name(old)).with_context(|| format!("no agent runs at {old}"))?;
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process has a number")?;
    kill_process(pid, Signal::KILL).with_context(|| format!("kill the agent of {old}"))?;
    let begun = Instant::now();
    leader(world, Some(old)).await?;
    let took = begun.elapsed();
    agents::start(world, None, None).await?;
    Ok(took)
}

/// The site that leads with a majority behind it, other than one.
async fn leader(world: &World, but: Option<Site>) -> Result<Site> {
    let limit = Instant::now() + ELECTED;
    while Instant::now() < limit {
        for site in SITES.into_iter().filter(|s| Some(*s) != but) {
            let Ok(told) = scrape(world, site).await else { continue };
            let yes = |name: &str| told.get(name).is_some_and(|v| *v > 0.0);
            if yes("dcswitch_quorum_is_leader") && yes("dcswitch_quorum_answering") {
                return Ok(site);
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bail!("nobody leads the quorum after {ELECTED:?}")
}

fn table(asked: &Asked, moves: &[Move], quorum: &Quorum, elections: &[Duration]) -> String {
    let mut t = String::new();
    let _ = writeln!(
        t,
        "\n{} moves in {} min, replication delayed by {} ms each way; milliseconds",
        moves.len(),
        asked.lasts.as_secs() / 60,
        asked.order.delay.as_millis()
    );
    let _ = writeln!(t, "{:<12}{:<34}{:>8}{:>8}{:>6}", "stage", "step", "p50", "max", "n");
    let mut steps: Vec<((String, String), Vec<f64>)> = Vec::new();
    for (step, at) in moves.iter().flat_map(|m| m.steps.iter().map(move |s| (s, m))) {
        let word = |key: &str| step[key].as_str().unwrap_or("?").to_owned();
        let side = match step["site"].as_str() {
            Some(site) if site == at.from => "source",
            Some(site) if site == at.to => "target",
            _ => "quorum",
        };
        let key = (word("stage"), format!("{}.{} {side}", word("plane"), word("act")));
        let Some(ms) = step["ms"].as_f64() else { continue };
        match steps.iter_mut().find(|(k, _)| *k == key) {
            Some((_, all)) => all.push(ms),
            None => steps.push((key, vec![ms])),
        }
    }
    for ((stage, name), all) in &steps {
        line(&mut t, stage, name, all);
    }
    for plane in ["postgres", "kafka", "s3"] {
        let all: Vec<f64> = moves.iter().filter_map(|m| m.outage_ms.get(plane)).copied().collect();
        line(&mut t, "outage", plane, &all);
    }
    let slowest = |m: &Move| m.outage_ms.values().copied().max_by(f64::total_cmp);
    line(&mut t, "outage", "slowest plane", &moves.iter().filter_map(slowest).collect::<Vec<_>>());
    let live: Vec<f64> = moves.iter().filter_map(|m| m.scheduler_live_ms).collect();
    line(&mut t, "takeover", "scheduler live after it", &live);
    let took: Vec<f64> = elections.iter().map(|d| d.as_secs_f64() * 1_000.0).collect();
    line(&mut t, "quorum", "leader killed -> next one leads", &took);
    let _ = writeln!(
        t,
        "\n{:<8}{:>9}{:>12}{:>12}{:>10}{:>8}",
        "agent", "commits", "p50 ms", "p99 ms", "renewals", "missed"
    );
    for (site, [commits, p50, p99, renewals, missed]) in &quorum.sites {
        let _ = writeln!(t, "{:<8}{commits:>9}{p50:>12.1}{p99:>12.1}{renewals:>10}{missed:>8}", site.name);
    }
    t
}

fn line(t: &mut String, stage: &str, name: &str, all: &[f64]) {
    let mut sorted = all.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(median), Some(max)) = (sorted.get(sorted.len() / 2), sorted.last()) else { return };
    let _ = writeln!(t, "{stage:<12}{name:<34}{median:>8.0}{max:>8.0}{:>6}", sorted.len());
}
