//! The rounds in which a part of a plane dies: a database, a broker, an object store, of either site.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::bench::{Bench, Help, Row, kill};
use super::follow::Told;
use super::law;
use super::plan::Stage;
use super::rounds::TRIES;
use crate::history::wall_ns;
use crate::parts::postgres::postmaster;
use crate::world::{Plane, Site, World};

/// Whose part dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// One part that dies in one stage of one move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// What it is of.
    pub plane: Plane,
    side: Side,
    stage: Stage,
    /// Among the rounds that are played if nobody asks for more.
    pub usual: bool,
}

const fn part(stage: Stage, side: Side, plane: Plane, usual: bool) -> Part {
    Part { plane, side, stage, usual }
}

/// Every round of this kind.
pub const ALL: [Part; 9] = [
    part(Stage::Fence, Side::Source, Plane::Postgres, true),
    part(Stage::Fence, Side::Source, Plane::Kafka, false),
    part(Stage::Drain, Side::Source, Plane::Postgres, false),
    part(Stage::Drain, Side::Source, Plane::Kafka, true),
    part(Stage::Drain, Side::Source, Plane::S3, true),
    part(Stage::Drain, Side::Target, Plane::Postgres, true),
    part(Stage::Drain, Side::Target, Plane::Kafka, false),
    part(Stage::Promote, Side::Target, Plane::Postgres, true),
    part(Stage::Open, Side::Target, Plane::Kafka, true),
];

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.side == Side::Source { "source" } else { "target" };
        write!(f, "{}/{side}-{}-dies", self.stage.name(), self.plane)
    }
}

impl Part {
    fn before_takeover(self) -> bool {
        self.stage < Stage::Takeover
    }

    /// Is it time, from that word on? `source` is the site that is left.
    fn due(self, told: &Told, source: Site, planes: &BTreeSet<Plane>) -> bool {
        let Told::Step(step) = told else { return false };
        if step["state"] != "done" || step["past"] != false {
            return false;
        }
        let kafka = planes.contains(&Plane::Kafka);
        let (act, site) = match (self.stage, self.plane, self.side) {
            (Stage::Fence, ..) => ("fence_clients", Some(source.other())),
            (Stage::Drain, Plane::Postgres, Side::Source) => ("fence_clients", Some(source)),
            (Stage::Drain, Plane::S3, _) => ("fence_writers", None),
            // Kafka's drain is under way, or where there is none, the last thing before the database's own
            (Stage::Drain, ..) => (if kafka { "fence_apps" } else { "pre_sync" }, None),
            (Stage::Promote, ..) => ("takeover", None),
            _ => ("opened", None),
        };
        step["act"] == act && site.is_none_or(|site| step["site"] == site.name)
    }

    /// What the run may come to. A part that dies after the takeover turns nothing round.
    fn legal(self, run: &Value, at_ms: u64) -> Vec<&'static str> {
        law::legal(run, at_ms, &[self.stage].into())
    }
}

/// A part dies in its stage. Before the takeover the run goes back, the old site serves and the next move succeeds;
/// after it the run goes on once the part is there again.
///
/// A run that was past the stage, or done with the part, may be done all the same: then another one is tried.
pub async fn dies(bench: &mut Bench<'_>, part: Part, row: &mut Row) -> Result<()> {
    for attempt in 1..=TRIES {
        if once(bench, part, row).await? || !row.wrong.is_empty() {
            return Ok(());
        }
        row.notes.push(format!("try {attempt} met {:?} and came to {}", row.met, row.outcome));
    }
    row.wrong.push(format!("none of {TRIES} tries met it"));
    Ok(())
}

/// One try. Returns whether the death met what it is about.
async fn once(bench: &mut Bench<'_>, part: Part, row: &mut Row) -> Result<bool> {
    let mut going = bench.begin().await?;
    let (source, target) = (going.source, going.target);
    let site = if part.side == Side::Source { source } else { target };
    row.victim = format!("{site}'s {}", part.plane);
    let pid = process_of(bench.world, site, part.plane)?;
    let planes = bench.world.planes.clone();
    if let Some(last) = bench.until(&mut going, |told| part.due(told, source, &planes)).await? {
        bench.conclude(&mut going, Some(&last), &["done"], row).await?;
        return Ok(false);
    }
    kill(pid, Signal::KILL)?;
    let at = wall_ns() / 1_000_000;
    let met = bench.met(&going, at, row).await?;
    let help = Help { part: Some((site, part.plane)), ..Help::now() };
    let last = bench.end(&mut going, &help, row).await?;
    let legal = last.as_ref().map_or_else(Vec::new, |run| part.legal(run, at));
    bench.conclude(&mut going, last.as_ref(), &legal, row).await?;
    if !part.before_takeover() {
        return Ok(met.contains(&part.stage));
    }
    if row.outcome != "rolled_back" {
        return Ok(false);
    }
    ensure!(bench.active == source, "{source} does not serve after the run went back");
    next(bench, row).await?;
    Ok(true)
}

/// The next move succeeds.
async fn next(bench: &mut Bench<'_>, row: &mut Row) -> Result<()> {
    let (result, seconds) = (row.outcome.clone(), row.seconds);
    let mut going = bench.begin().await.context("the next move")?;
    let last = bench.end(&mut going, &Help::now(), row).await?;
    bench.conclude(&mut going, last.as_ref(), &["done"], row).await.context("the next move")?;
    row.outcome = format!("{result}, next {}", row.outcome);
    row.seconds = seconds;
    Ok(())
}

/// The process of a part at a site.
fn process_of(world: &World, site: Site, plane: Plane) -> Result<u32> {
    match plane {
        Plane::Postgres => postmaster(world, site),
        Plane::Kafka => world.pid(&format!("{site}.kafka-1")).context("no broker runs"),
        Plane::S3 => world.pid(&format!("{site}.s3")).context("no object store runs"),
        Plane::Airflow => bail!("no round ends the parts of {plane}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{FRA, ROME};
    use serde_json::json;

    fn step(act: &str, site: &str) -> Told {
        Told::Step(json!({"act": act, "site": site, "state": "done", "past": false}))
    }

    #[test]
    fn kills_the_database_of_the_source_once_its_clients_are_shut_out() {
        let planes = BTreeSet::from([Plane::Postgres, Plane::Kafka]);
        let fence = part(Stage::Fence, Side::Source, Plane::Postgres, true);
        let drain = part(Stage::Drain, Side::Source, Plane::Postgres, true);
        assert!(fence.due(&step("fence_clients", FRA.name), ROME, &planes));
        assert!(!drain.due(&step("fence_clients", FRA.name), ROME, &planes));
        assert!(drain.due(&step("fence_clients", ROME.name), ROME, &planes));
    }

    #[test]
    fn has_every_name_once() {
        let names: BTreeSet<String> = ALL.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
