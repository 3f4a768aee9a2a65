//! The bench of the crashes: one world under load, in which moves are begun, broken and brought before the oracle.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::follow::{self, Follow, Told};
use super::law;
use super::plan::Stage;
use crate::agents;
use crate::history::{now_ns, wall_ns};
use crate::judge::Judge;
use crate::load::{Shared, s3};
use crate::oracle::{Verdict, Window};
use crate::parts::{self, GROUP};
use crate::report::Move;
use crate::world::{Plane, Site, World};

/// From the last thing that was done to it until a run has ended.
const END: Duration = Duration::from_mins(2);
/// A run that tells nothing for so long stands still.
const QUIET: Duration = Duration::from_secs(20);
/// Writers are let in, or a target is ready for a move, within this time.
const READY: Duration = Duration::from_mins(1);
/// A command that has told its last word ends within this time.
const ANSWER: Duration = Duration::from_secs(10);
/// Acknowledged writes per plane, before a move and after it.
const ENOUGH: usize = 60;

/// How a round went.
#[derive(Debug, Default)]
pub struct Row {
    /// What was broken, and when.
    pub name: String,
    /// The site whose process it was.
    pub victim: String,
    /// Steps that were under way at that moment.
    pub met: Vec<String>,
    /// How the run ended.
    pub outcome: String,
    /// From the order to the run's end.
    pub seconds: f64,
    /// What breaks a law or the order.
    pub wrong: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// What is done for a run that something died in.
#[derive(Debug, Default)]
pub struct Help {
    /// When its agents are started again; not before it needs them if there is no such time.
    pub wake: Option<Instant>,
    /// The part that died, and is started again once the run asks for a human or has ended.
    pub part: Option<(Site, Plane)>,
}

impl Help {
    /// The agents at once.
    pub fn now() -> Help {
        Help { wake: Some(Instant::now()), part: None }
    }
}

/// A run under way, as the bench knows it.
#[derive(Debug)]
pub struct Going {
    /// Site that is left.
    pub source: Site,
    /// Site that is asked for.
    pub target: Site,
    /// When it was asked for.
    pub asked: u64,
    /// When it was asked for, to measure by.
    pub begun: Instant,
    /// Its name, once told.
    pub run: String,
    /// What its command says.
    pub follow: Follow,
}

/// One world, moved back and forth.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The world.
    pub world: &'a World,
    shared: &'a Shared,
    judge: Judge,
    /// The site that serves.
    pub active: Site,
    from: u64,
    number: usize,
}

impl<'a> Bench<'a> {
    /// Of a world whose load runs, and where `active` serves.
    pub fn new(shared: &'a Shared, active: Site) -> Bench<'a> {
        let judge = Judge::default();
        Bench { world: &shared.world, shared, judge, active, from: now_ns(), number: 0 }
    }

    /// Waits until the next move has something to lose and nothing forbids it, and begins it.
    pub async fn begin(&mut self) -> Result<Going> {
        let (source, target) = (self.active, self.active.other());
        self.number += 1;
        ensure!(self.written(source, self.from).await, "{source} acknowledges too few writes");
        let limit = Instant::now() + READY;
        loop {
            let plan = follow::ask(self.world, &["plan", "switchover", GROUP, "--to", target.name]).await?;
            if plan.code == 0 {
                break;
            }
            if Instant::now() >= limit {
                let found = plan.body["findings"].as_array().cloned().unwrap_or_default();
                let blocking: Vec<&Value> = found.iter().filter(|f| f["blocking"] == true).collect();
                bail!("no move to {target} is possible after {READY:?}: {blocking:?} {}", plan.said.trim());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        if self.world.planes.contains(&Plane::S3) {
            self.judge.dags = s3::releases(self.world, source).await?;
        }
        self.shared.moving.store(true, Ordering::Relaxed);
        let asked = now_ns();
        let follow =
            Follow::start(self.world, &["switchover", GROUP, "--to", target.name, "--confirm", target.name])?;
        Ok(Going { source, target, asked, begun: Instant::now(), run: String::new(), follow })
    }

    /// Reads on until a word fits. Returns the last word if the run leaves before.
    pub async fn until(
        &self,
        going: &mut Going,
        mut fits: impl FnMut(&Told) -> bool,
    ) -> Result<Option<Value>> {
        let limit = tokio::time::Instant::now() + END;
        loop {
            let Ok(told) = tokio::time::timeout_at(limit, going.follow.next()).await else {
                bail!("run {} neither went on nor ended within {END:?}", going.run);
            };
            if let Told::Begun(run) = &told {
                going.run.clone_from(run);
            }
            if fits(&told) {
                return Ok(None);
            }
            match told {
                Told::Last(body) => return Ok(Some(body)),
                Told::Closed(code, said) => bail!("dc-switch ended with {code}: {}", said.trim()),
                Told::Begun(_) | Told::Step(_) => {}
            }
        }
    }

    /// Kills an agent, and nothing but the agent, and sees it gone. Returns the wall clock's milliseconds.
    pub async fn kill_agent(&self, site: Site) -> Result<u64> {
        let name = agents::name(site);
        let pid = self.world.pid(&name).with_context(|| format!("{name} does not run"))?;
        kill(pid, Signal::KILL)?;
        let at = wall_ns() / 1_000_000;
        while self.world.alive(&name) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(at)
    }

    /// Asks those who live which steps were under way at a moment just past, and notes them. Returns their stages.
    pub async fn met(&self, going: &Going, at_ms: u64, row: &mut Row) -> Result<BTreeSet<Stage>> {
        let shown = follow::ask(self.world, &["run", "show", &going.run]).await?;
        row.met = law::under_way(&shown.body, at_ms);
        Ok(law::stages(&shown.body, at_ms))
    }

    /// Starts every agent that does not run, as it was started first, and waits until all are ready.
    pub async fn wake(&self) -> Result<()> {
        agents::start(self.world, Some(&self.world.root.join("bin/dc-agent")), None).await
    }

    /// The site that leads the quorum, as whoever answers says.
    pub async fn leader(&self) -> Result<Site> {
        let status = follow::ask(self.world, &["status"]).await?;
        let name = status.body["quorum"]["leader"].as_str().context("nobody leads the quorum")?;
        Site::named(name).with_context(|| format!("there is no site {name}"))
    }

    /// Brings a run to its legal end: starts the agents again, at `help.wake` or, without it, once the run has
    /// ended, asks for a human or stands still; does what a human is asked to do. Returns the run's last word.
    pub async fn end(&self, going: &mut Going, help: &Help, row: &mut Row) -> Result<Option<Value>> {
        let (mut woken, mut asked) = (false, 0);
        let mut limit = tokio::time::Instant::now() + END;
        let mut wake_at = help.wake.unwrap_or_else(|| Instant::now() + QUIET).into();
        let last = loop {
            let told = tokio::select! {
                told = going.follow.next() => told,
                () = tokio::time::sleep_until(wake_at), if !woken => {
                    if help.wake.is_none() {
                        row.notes.push("stood still without its agent".to_owned());
                    }
                    self.wake().await?;
                    woken = true;
                    limit = tokio::time::Instant::now() + END;
                    continue;
                }
                () = tokio::time::sleep_until(limit) => break None,
            };
            match told {
                Told::Begun(run) => going.run = run,
                Told::Step(_) if help.wake.is_none() => wake_at = tokio::time::Instant::now() + QUIET,
                Told::Step(_) => {}
                Told::Last(body) if body["result"] == "needs_human" => {
                    asked += 1;
                    human(&body, asked, row);
                    closed(going, &body, row).await;
                    self.help(help, row).await?;
                    if !woken {
                        woken = true;
                        limit = tokio::time::Instant::now() + END;
                    }
                    self.retry(going, row).await?;
                }
                Told::Last(body) if body["result"] == "running" => {} // the stream broke off; it is opened again
                Told::Last(body) => break Some(body),
                Told::Closed(..) if going.run.is_empty() => bail!("no run began"),
                Told::Closed(..) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    going.follow = Follow::start(self.world, &["run", "attach", &going.run])?;
                }
            }
        };
        row.seconds = going.begun.elapsed().as_secs_f64();
        self.help(help, row).await?;
        Ok(last)
    }

    /// What a human mends: agents run again, and the part that died.
    async fn help(&self, help: &Help, row: &mut Row) -> Result<()> {
        self.wake().await?;
        if let Some((site, plane)) = help.part
            && parts::mend(self.world, site, plane).await.with_context(|| format!("start {plane} again"))?
        {
            row.notes.push(format!("{plane} of {site} was started by the lab"));
        }
        Ok(())
    }

    async fn retry(&self, going: &mut Going, row: &mut Row) -> Result<()> {
        let again = follow::ask(self.world, &["run", "retry", &going.run, "--no-wait"]).await?;
        if ![0, 5].contains(&again.code) {
            row.notes.push(format!("retry: exit {}: {}", again.code, again.said.trim()));
        }
        going.follow = Follow::start(self.world, &["run", "attach", &going.run])?;
        Ok(())
    }

    /// Judges what came of a run, from what clients were told and what both sites hold.
    pub async fn conclude(
        &mut self,
        going: &mut Going,
        last: Option<&Value>,
        legal: &[&str],
        row: &mut Row,
    ) -> Result<()> {
        self.shared.moving.store(false, Ordering::Relaxed);
        let ended = now_ns();
        let Some(last) = last else {
            "no end".clone_into(&mut row.outcome);
            row.wrong.push(format!("run {} has no end after {END:?}", going.run));
            bail!("run {} has no end after {END:?}", going.run);
        };
        last["result"].as_str().unwrap_or("?").clone_into(&mut row.outcome);
        if !legal.contains(&row.outcome.as_str()) {
            row.wrong.push(format!("ended {}, one of {legal:?} is legal: {}", row.outcome, why(last)));
        }
        row.wrong.extend(law::contradiction(last).map(str::to_owned));
        closed(going, last, row).await;
        if row.outcome != "done" {
            row.notes.push(why(last));
        }
        let moved = row.outcome == "done";
        let target = if moved { going.target } else { going.source };
        if !self.written(target, ended).await {
            row.wrong.push(format!("{target} serves and acknowledges too few writes after the run"));
        }
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
        let source = target.other();
        let (from, asked) = (self.from, going.asked);
        let w = Window { number: self.number, from, asked, to: now_ns(), source, target, moved };
        for plane in self.world.planes.iter().filter(|p| !moved && **p != Plane::Airflow) {
            let there = self.shared.history(*plane)?.acked(source, from);
            if there > 0 {
                row.wrong.push(format!(
                    "{plane}: {source} acknowledged {there} writes of a move that was not made"
                ));
            }
        }
        let mut judged = Move::default();
        for reason in self.judge.judge(self.shared, &w, &mut judged).await? {
            match reason.verdict {
                Verdict::Fail => row.wrong.push(reason.to_string()),
                // the move is broken on purpose: how much of it was seen is not asked for
                Verdict::Invalid | Verdict::Pass => {}
            }
        }
        (self.active, self.from) = (target, w.to);
        Ok(())
    }

    /// Waits until every plane has been written at a site since a time. Airflow is not asked: its runs are slow.
    pub async fn written(&self, site: Site, since: u64) -> bool {
        let limit = Instant::now() + READY;
        let enough = |plane: &Plane| {
            *plane == Plane::Airflow
                || self.shared.history(*plane).is_ok_and(|h| h.acked(site, since) >= ENOUGH)
        };
        while !self.world.planes.iter().all(enough) {
            if Instant::now() >= limit {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        true
    }
}

/// Sends a signal to one process of the lab.
pub fn kill(pid: u32, what: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process has a number")?;
    rustix::process::kill_process(pid, what).with_context(|| format!("signal process {pid:?}"))
}

/// The command leaves a run with the code of what it came to, in its last word and as a process.
async fn closed(going: &mut Going, last: &Value, row: &mut Row) {
    let code = loop {
        match tokio::time::timeout(ANSWER, going.follow.next()).await {
            Ok(Told::Closed(code, _)) => break Some(code),
            Ok(_) => {}
            Err(_) => break None,
        }
    };
    let result = last["result"].as_str().unwrap_or("?");
    let wanted = law::code_of(result);
    if code != wanted || last["exit"].as_i64() != wanted.map(i64::from) {
        row.wrong
            .push(format!("{result} with exit {code:?} and {} in its words, not {wanted:?}", last["exit"]));
    }
}

/// A run that calls for a human says why.
fn human(body: &Value, asked: u32, row: &mut Row) {
    let text = body["attention"]["text"].as_str().unwrap_or_default();
    if text.is_empty() {
        row.wrong.push("asks for a human without a word why".to_owned());
    }
    if asked == 1 {
        row.notes.push(format!("asked for a human: {text}"));
    }
}

/// Why a run did not go where it was asked to.
fn why(body: &Value) -> String {
    let found = body["findings"].as_array().map_or(&[][..], Vec::as_slice);
    let blocking = found.iter().filter(|f| f["blocking"] == true).filter_map(|f| f["text"].as_str());
    let mut words: Vec<&str> = blocking.collect();
    words.extend(["aborting", "attention"].iter().filter_map(|key| body[*key]["text"].as_str()));
    words.join("; ")
}
