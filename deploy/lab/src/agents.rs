//! Our own processes, run as an operator would run them: certificates, three agents, the group, and moves by the
//! command line. Everything the lab knows of the product goes through its binaries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::process::Command;

use crate::parts::{self, GROUP};
use crate::process;
use crate::world::{SITES, Site, World, port};

/// A move that has not ended by then is left to a human.
const MOVE: Duration = Duration::from_mins(5);
/// Agents answer within this time after their start.
const READY: Duration = Duration::from_mins(1);

/// What the command line said of a move.
#[derive(Debug)]
pub struct Moved {
    /// Name of the run, empty if none began.
    pub run: String,
    /// `done`, `rolled_back`, `returned` or `needs_human`; `refused` if nothing was changed.
    pub result: String,
    /// Exit code.
    pub code: i32,
    /// What it wrote, for people.
    pub said: String,
}

/// Makes certificates for all agents and one operator, and the files of agents, group and context.
pub async fn prepare(world: &World) -> Result<()> {
    let pki = world.root.join("pki");
    if !pki.join("ca.pem").exists() {
        let dir = pki.to_string_lossy().into_owned();
        switch(world, &["cert", "init", "--dir", &dir, "--name", &format!("lab-{}", world.name)]).await?;
        for site in SITES {
            let ip = world.ip(&site);
            switch(
                world,
                &["cert", "issue", "--dir", &dir, "--role", "agent", "--name", site.name, "--ip", &ip],
            )
            .await?;
        }
        switch(world, &["cert", "issue", "--dir", &dir, "--role", "operator", "--name", "lab"]).await?;
    }
    for site in SITES {
        let tls = world.dir(&site).join("tls");
        copy(world, &pki.join("ca.pem"), &tls.join("ca.pem"), 0o644)?;
        copy(world, &pki.join(format!("agent-{site}.pem")), &tls.join("agent.pem"), 0o644)?;
        copy(world, &pki.join(format!("agent-{site}.key")), &tls.join("agent.key"), 0o600)?;
    }
    parts::write_files(world)?;
    world.write(&context_file(world), &context(world), 0o644)
}

fn copy(world: &World, from: &Path, to: &Path, mode: u32) -> Result<()> {
    let text = std::fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
    world.write(to, &text, mode)
}

fn context_file(world: &World) -> PathBuf {
    world.root.join("context.toml")
}

fn context(world: &World) -> String {
    let pki = world.root.join("pki");
    let pki = pki.display();
    let agents: Vec<String> =
        SITES.iter().map(|s| format!("{s} = \"{}:{}\"", world.ip(s), port::AGENT_GRPC)).collect();
    format!(
        "current = \"lab\"\n\n[contexts.lab]\nenvironment = \"LAB {}\"\nca = \"{pki}/ca.pem\"\ncert = \"{pki}/operator-lab.pem\"\n\
         key = \"{pki}/operator-lab.key\"\n\n[contexts.lab.agents]\n{}\n",
        world.name,
        agents.join("\n"),
    )
}

/// Starts the agents and waits until each is ready.
pub async fn start(world: &World, binary: Option<&Path>, sabotage: Option<&str>) -> Result<()> {
    let agent = match binary {
        Some(from) => world.install(from, "dc-agent")?,
        None => world.bin("dc-agent")?,
    };
    world.bin("dc-guardian")?;
    for site in SITES {
        let mut cmd = Command::new(&agent);
        cmd.arg(world.dir(&site).join("agent.toml")).env("NO_COLOR", "1");
        if let Some(what) = sabotage {
            cmd.env("DC_SABOTAGE", what);
        }
        world.spawn(&name(site), &cmd)?;
    }
    for site in SITES {
        ready(world, site).await?;
    }
    Ok(())
}

/// Name of a site's agent among the lab's processes.
pub fn name(site: Site) -> String {
    format!("{site}.agent")
}

async fn ready(world: &World, site: Site) -> Result<()> {
    let url = format!("http://{}:{}/readyz", world.ip(&site), port::AGENT_HTTP);
    let limit = Instant::now() + READY;
    loop {
        let answer = reqwest::get(&url).await;
        let said = match &answer {
            Ok(r) if r.status().is_success() => return Ok(()),
            Ok(r) => format!("{}", r.status()),
            Err(e) => format!("{e}"),
        };
        if !world.alive(&name(site)) {
            bail!("agent of {site} ended, see {}", world.log(&name(site)).display());
        }
        if Instant::now() >= limit {
            bail!(
                "agent of {site} is not ready after {READY:?}: {said}; see {}",
                world.log(&name(site)).display()
            );
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Applies the group. The first site of its file serves from then on.
pub async fn apply(world: &World) -> Result<()> {
    let file = world.root.join("group.toml").to_string_lossy().into_owned();
    switch(world, &["group", "apply", &file]).await.map(|_| ())
}

/// Stops the agents.
pub async fn stop(world: &World) -> Result<()> {
    let mut result = Ok(());
    for site in SITES {
        result = result.and(world.stop(&name(site), Duration::from_secs(20)).await);
    }
    result
}

fn command(world: &World, args: &[&str]) -> Result<Command> {
    let mut cmd = Command::new(world.bin("dc-switch")?);
    cmd.args(args).env("DC_SWITCH_CONFIG", context_file(world)).env("NO_COLOR", "1");
    Ok(cmd)
}

/// Runs the command line to success and returns what it wrote.
pub async fn switch(world: &World, args: &[&str]) -> Result<String> {
    let out = world
        .run(&mut command(world, args)?)
        .await
        .with_context(|| format!("dc-switch {}", args.join(" ")))?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The words to try in a lab that was left running.
pub fn example(world: &World) -> String {
    let file = context_file(world);
    let bin = world.root.join("bin/dc-switch");
    format!("DC_SWITCH_CONFIG={} {} status", file.display(), bin.display())
}

/// Moves the group and waits for the run's end.
pub async fn switchover(world: &World, to: Site) -> Result<Moved> {
    let mut cmd =
        command(world, &["switchover", GROUP, "--to", to.name, "--confirm", to.name, "--output", "json"])?;
    world.prepare(&mut cmd);
    cmd.stdin(std::process::Stdio::null()).kill_on_drop(true);
    let out = tokio::time::timeout(MOVE, cmd.output())
        .await
        .with_context(|| format!("no end of the move after {MOVE:?}"))??;
    let code = out.status.code().unwrap_or(-1);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let body: Value = text
        .lines()
        .rev()
        .find_map(|l| serde_json::from_str(l).ok())
        .or_else(|| serde_json::from_str(&text).ok())
        .unwrap_or_default();
    let result = match code {
        0 => "done",
        5 => "refused",
        6 => "rolled_back",
        _ => "needs_human",
    };
    let told = body["result"].as_str().unwrap_or(result);
    let findings = body["findings"].as_array().map_or(&[][..], Vec::as_slice);
    let mut why: Vec<String> =
        findings.iter().filter(|f| f["blocking"] == true).map(Value::to_string).collect();
    why.extend(
        ["trouble", "attention", "aborting"].iter().filter_map(|k| body[*k].as_str()).map(String::from),
    );
    let troubles = body["steps"].as_array().into_iter().flatten().filter(|s| !s["trouble"].is_null());
    why.extend(troubles.map(|s| format!("{}.{} at {}: {}", s["plane"], s["act"], s["site"], s["trouble"])));
    if why.is_empty() {
        why.push(process::last_lines(&said, 6));
    }
    let run = body["run"].as_str().unwrap_or_default().to_string();
    Ok(Moved { run, result: told.to_string(), code, said: why.join("; ") })
}

/// A run as the product tells it.
#[derive(Debug, Default)]
pub struct Told {
    /// Its steps in order.
    pub steps: Vec<Value>,
    /// When the holder changed, in milliseconds since 1970.
    pub takeover_ms: Option<u64>,
}

/// Asks for a run that has ended or stopped.
pub async fn run_told(world: &World, run: &str) -> Result<Told> {
    let mut cmd = command(world, &["run", "show", run, "--output", "json"])?;
    world.prepare(&mut cmd);
    let out = tokio::time::timeout(READY, cmd.output()).await.context("no answer to `run show`")??;
    let body: Value = serde_json::from_slice(&out.stdout).context("read the run's steps")?; // its code is the run's
    let steps = body["steps"].as_array().context("the answer has no steps")?;
    Ok(Told { steps: steps.iter().map(short).collect(), takeover_ms: body["takeover_at_ms"].as_u64() })
}

/// What the report keeps of a step.
fn short(step: &Value) -> Value {
    let keys = ["stage", "plane", "act", "site", "ms", "state", "at_ms"];
    keys.iter().map(|key| ((*key).to_string(), step[*key].clone())).collect::<serde_json::Map<_, _>>().into()
}

/// Publishes a folder of DAGs as the group's newest release.
pub async fn publish(world: &World, dir: &Path) -> Result<String> {
    switch(world, &["dags", "publish", &dir.to_string_lossy(), "--output", "json"]).await
}

/// Peak resident memory of our own processes in MiB: by program, then by site.
pub fn memory(world: &World) -> BTreeMap<&'static str, BTreeMap<&'static str, u64>> {
    let mut found: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    let living = process::living(&world.root, world.owner);
    for site in SITES {
        let agent = world.pid(&name(site)).and_then(|pid| process::rss_kib(pid, true));
        let dir = world.dir(&site).display().to_string();
        let guardians = living.iter().filter(|l| l.contains("dc-guardian") && l.contains(&dir));
        let pids = guardians.filter_map(|l| l.split(' ').next()?.parse().ok());
        let guardian = pids.filter_map(|pid| process::rss_kib(pid, true)).max();
        for (program, kib) in [("dc-agent", agent), ("dc-guardian", guardian)] {
            if let Some(kib) = kib {
                found.entry(program).or_default().insert(site.name, kib.div_ceil(1024));
            }
        }
    }
    found
}
