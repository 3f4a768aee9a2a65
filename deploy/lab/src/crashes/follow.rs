//! Following a run as a script does: the command line's own events, line by line as they come.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::world::World;

/// One order or question takes no longer.
const ANSWER: Duration = Duration::from_mins(1);

/// What the command line says of a run.
#[derive(Debug)]
pub enum Told {
    /// The run of that name begins.
    Begun(String),
    /// A step ended, one way or another.
    Step(Value),
    /// The whole run, as the command leaves it.
    Last(Value),
    /// The command has ended with that code; no more comes.
    Closed(i32, String),
}

/// A command that follows a run.
#[derive(Debug)]
pub struct Follow {
    told: UnboundedReceiver<Told>,
    _tasks: JoinSet<()>,
}

impl Follow {
    /// Starts `dc-switch ARGS --output jsonl`. The command ends with the value.
    pub fn start(world: &World, args: &[&str]) -> Result<Follow> {
        let mut cmd = switch(world, args);
        cmd.args(["--output", "jsonl"]).kill_on_drop(true);
        cmd.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = cmd.spawn().context("start dc-switch")?;
        let out = child.stdout.take().context("its output is ours")?;
        let err = child.stderr.take().context("its words are ours")?;
        let (say, told) = unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut said = String::new();
            tokio::join!(read_events(out, say.clone()), read_words(err, say.clone(), &mut said));
            let code = child.wait().await.ok().and_then(|s| s.code()).unwrap_or(-1);
            let _ = say.send(Told::Closed(code, said));
        });
        Ok(Follow { told, _tasks: tasks })
    }

    /// The next word, as soon as it comes.
    pub async fn next(&mut self) -> Told {
        self.told.recv().await.unwrap_or_else(|| Told::Closed(-1, String::new()))
    }
}

async fn read_events(out: impl AsyncRead + Unpin, say: UnboundedSender<Told>) {
    let mut lines = BufReader::new(out).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(body) = serde_json::from_str::<Value>(&line) else { continue };
        let told = if body["event"] == "step" { Told::Step(body) } else { Told::Last(body) };
        let _ = say.send(told); // nobody listens any more: the child ends by itself
    }
}

async fn read_words(err: impl AsyncRead + Unpin, say: UnboundedSender<Told>, said: &mut String) {
    let mut lines = BufReader::new(err).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(run) = line.strip_prefix("run ").and_then(|l| l.strip_suffix(" begins")) {
            let _ = say.send(Told::Begun(run.to_owned()));
        }
        said.push_str(&line);
        said.push('\n');
    }
}

/// The command line as the lab started with it; a newer build beside the lab is not looked at.
fn switch(world: &World, args: &[&str]) -> Command {
    let mut cmd = Command::new(world.root.join("bin/dc-switch"));
    cmd.args(args).env("DC_SWITCH_CONFIG", world.root.join("context.toml")).env("NO_COLOR", "1");
    world.prepare(&mut cmd);
    cmd
}

/// What a command that ended said.
#[derive(Debug)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// Its JSON; null if it wrote none.
    pub body: Value,
    /// What it wrote for people.
    pub said: String,
}

/// Runs `dc-switch ARGS --output json` to its end.
pub async fn ask(world: &World, args: &[&str]) -> Result<Answer> {
    let mut cmd = switch(world, args);
    cmd.args(["--output", "json"]).stdin(Stdio::null()).kill_on_drop(true);
    let out = tokio::time::timeout(ANSWER, cmd.output())
        .await
        .with_context(|| format!("no end of dc-switch {} within {ANSWER:?}", args.join(" ")))??;
    Ok(Answer {
        code: out.status.code().unwrap_or(-1),
        body: serde_json::from_slice(&out.stdout).unwrap_or_default(),
        said: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}
