//! Brings one move before the oracle: reads both sites' real parts, hands them over with the histories, and fills the
//! move's row of the report.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::history::{Event, Id, Outcome, now_ns};
use crate::load::{Shared, airflow, kafka, postgres, s3};
use crate::oracle::{Findings, Reason, Window, groups, marks, ms_between, writes};
use crate::report::Move;
use crate::world::{DATA_SITES, Plane, Site, World};

/// How long the turned direction may take to carry what was acknowledged.
const CARRY: Duration = Duration::from_mins(1);

/// Evidence that each plane needs in each move.
pub fn least(delay: Duration) -> writes::Least {
    writes::Least { before: 200, refused: 20, after: 200, backlog: usize::from(!delay.is_zero()) }
}

/// Evidence that Airflow needs in each move.
pub fn least_runs(delay: Duration) -> marks::Least {
    marks::Least { runs: 6, backlog: usize::from(!delay.is_zero()) }
}

/// What the oracle remembers from move to move.
#[derive(Debug, Default)]
pub struct Judge {
    known: BTreeMap<Plane, writes::Known>,
    /// Newest DAG release published before the move was asked for.
    pub release: u64,
    /// What the old site's bucket held of DAG releases just before the move was asked for.
    pub dags: BTreeMap<String, s3::Object>,
}

impl Judge {
    /// Judges one move and fills its row. Errors: a site's parts cannot be read.
    pub async fn judge(&mut self, shared: &Shared, w: &Window, row: &mut Move) -> Result<Vec<Reason>> {
        let mut reasons = Vec::new();
        for plane in shared.world.planes.clone() {
            let found = match plane {
                Plane::Postgres => self.postgres(shared, w, row).await,
                Plane::Kafka => self.kafka(shared, w, row).await,
                Plane::S3 => self.s3(shared, w, row).await,
                Plane::Airflow => self.airflow(shared, w, row).await,
            };
            reasons.extend(found.with_context(|| format!("judge {plane}"))?);
        }
        Ok(reasons)
    }

    fn writes(
        &mut self,
        plane: Plane,
        shared: &Shared,
        w: &Window,
        contents: (&writes::Content, &writes::Content),
        row: &mut Move,
    ) -> Result<Vec<Reason>> {
        let events = shared.history(plane)?.events();
        let backlog = writes::fence_seen(&events, w)
            .and_then(|fence| shared.backlog.before(plane, w.source, w.asked, fence));
        let known = self.known.entry(plane).or_default();
        let (seen, reasons) =
            writes::judge(plane, &events, w, contents, backlog, least(shared.world.delay), known);
        let name = plane.name();
        row.acked.insert(name, seen.acked.0 + seen.acked.1);
        row.refused.insert(name, seen.refused);
        row.unknown.insert(name, seen.unknown);
        row.lost.insert(name, seen.lost);
        row.duplicated.insert(name, seen.duplicated);
        row.overlap_ms.insert(name, seen.overlap_ms);
        row.backlog_at_fence.extend(backlog.map(|n| (name, n)));
        row.outage_ms.extend(seen.outage_ms.map(|ms| (name, ms)));
        Ok(reasons)
    }

    async fn postgres(&mut self, shared: &Shared, w: &Window, row: &mut Move) -> Result<Vec<Reason>> {
        let target = postgres::content(&shared.world, w.target).await?;
        let due = due(shared, Plane::Postgres, w, &target)?;
        let source = carried(&due, async || postgres::content(&shared.world, w.source).await).await?;
        self.writes(Plane::Postgres, shared, w, (&target, &source), row)
    }

    async fn kafka(&mut self, shared: &Shared, w: &Window, row: &mut Move) -> Result<Vec<Reason>> {
        let at_target = records(&shared.world, w.target).await?;
        let target = kafka::content(&at_target);
        let due = due(shared, Plane::Kafka, w, &target)?;
        let source =
            carried(&due, async || Ok(kafka::content(&records(&shared.world, w.source).await?))).await?;
        let mut reasons = self.writes(Plane::Kafka, shared, w, (&target, &source), row)?;
        let fixed: Vec<Event> =
            shared.history(Plane::Kafka)?.events().into_iter().filter(|e| e.id.0 % 100 < 90).collect();
        if let (Some(last), Some(first)) = writes::edges(&fixed, w) {
            row.outage_fixed_ms.insert("kafka", ms_between(last, first));
        }
        if !w.moved {
            return Ok(reasons); // groups stayed where they were
        }
        let at_source = records(&shared.world, w.source).await?;
        let positions =
            shared.groups.positions(w.asked, (w.source, &at_source), (w.target, &at_target), &target);
        let (seen, found) = groups::judge(w, &positions);
        row.groups = BTreeMap::from([
            ("positions", seen.positions),
            ("reread", seen.reread),
            ("skipped", seen.skipped),
        ]);
        reasons.extend(found);
        Ok(reasons)
    }

    async fn s3(&mut self, shared: &Shared, w: &Window, row: &mut Move) -> Result<Vec<Reason>> {
        let (target, objects) = s3::content(&shared.world, w.target).await?;
        let due = due(shared, Plane::S3, w, &target)?;
        let source = carried(&due, async || Ok(s3::content(&shared.world, w.source).await?.0)).await?;
        let mut reasons = self.writes(Plane::S3, shared, w, (&target, &source), row)?;
        let (_, others) = s3::content(&shared.world, w.source).await?;
        let different = s3::different(&objects, &others);
        let mut found = Findings::new(Plane::S3, w.number);
        found.fail_if(!different.is_empty(), "content", || {
            format!("{} objects differ between the sites, such as {:?}", different.len(), different.first())
        });
        let missing = self.dags_missing(&shared.world, w).await?;
        found.fail_if(!missing.is_empty(), "dags", || {
            format!(
                "{} objects of DAG releases are missing or different at {}, such as {:?}",
                missing.len(),
                w.target,
                missing.first()
            )
        });
        reasons.extend(found.reasons);
        Ok(reasons)
    }

    /// Keys of DAG releases that the old site's bucket held before the move and the new one does not, for some
    /// seconds long: releases go on being published, and what points to the newest one changes at one site first.
    async fn dags_missing(&self, world: &World, w: &Window) -> Result<Vec<String>> {
        let limit = Instant::now() + CARRY;
        loop {
            let there = s3::list(world, w.target, s3::DAGS).await?;
            let left = s3::list(world, w.source, s3::DAGS).await?;
            let held = |(key, object): &(&String, &s3::Object)| {
                there.get(*key).is_some_and(|o| o == *object || left.get(*key) == Some(o))
            };
            let missing: Vec<String> =
                self.dags.iter().filter(|entry| !held(entry)).map(|(key, _)| key.clone()).collect();
            if missing.is_empty() || Instant::now() >= limit {
                return Ok(missing);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn airflow(&mut self, shared: &Shared, w: &Window, row: &mut Move) -> Result<Vec<Reason>> {
        let history = shared.history(Plane::Airflow)?;
        let events = history.events();
        let accepted = airflow::accepted(history, &DATA_SITES, w.to);
        let mut api = airflow::Api::new(&shared.world, w.target)?;
        let limit = Instant::now() + CARRY;
        let runs = loop {
            let runs = api.runs(airflow::DAG).await?;
            let open = |(name, state): &(String, String)| {
                accepted.contains(name) && (state == "queued" || state == "running")
            };
            if !runs.iter().any(open) || Instant::now() >= limit {
                break runs;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        };
        let unfinished = runs
            .iter()
            .filter(|(n, s)| accepted.contains(n) && s != "success")
            .map(|(n, s)| format!("{n} ({s})"))
            .collect();
        let facts = marks::Facts {
            fence: writes::fence_seen(&events, w),
            known: runs.iter().map(|(name, _)| name.clone()).collect(),
            accepted,
            older: airflow::possible(history, w.source, w.to),
            unfinished,
            release: self.release,
        };
        // what the move left open has been run by now, perhaps for the second time
        let whole = Window { to: now_ns(), ..*w };
        let seen_marks = airflow::marks(&shared.world);
        let (seen, reasons) = marks::judge(&seen_marks, &whole, &facts, least_runs(shared.world.delay));
        row.acked.insert("airflow", seen.ended.0 + seen.ended.1);
        let told = |what: Outcome| {
            events.iter().filter(|e| e.done > w.from && e.done <= w.to && e.outcome == what).count()
        };
        row.refused.insert("airflow", told(Outcome::Refused));
        row.unknown.insert("airflow", told(Outcome::Unknown));
        row.lost.insert("airflow", seen.lost);
        row.duplicated.insert("airflow", seen.duplicated);
        row.overlap_ms.insert("airflow", seen.overlap_ms);
        row.backlog_at_fence.insert("airflow", seen.running_at_fence);
        Ok(reasons)
    }
}

/// Reads all topics of a site without holding up the load.
async fn records(world: &World, site: Site) -> Result<kafka::Records> {
    let world = world.clone();
    tokio::task::spawn_blocking(move || kafka::records(&world, site)).await?
}

/// Acknowledged writes that the new site holds and that the old one must have in the end.
fn due(shared: &Shared, plane: Plane, w: &Window, target: &writes::Content) -> Result<BTreeSet<Id>> {
    let held: HashSet<Id> = target.values().flatten().copied().collect();
    let acked =
        shared.history(plane)?.events().into_iter().filter(|e| e.outcome == Outcome::Acked && e.done <= w.to);
    Ok(acked.map(|e| e.id).filter(|id| held.contains(id)).collect())
}

/// Reads a site until it holds all that is due, or the time is over: then what it holds is judged.
async fn carried(
    due: &BTreeSet<Id>,
    read: impl AsyncFn() -> Result<writes::Content>,
) -> Result<writes::Content> {
    let limit = Instant::now() + CARRY;
    loop {
        let last = Instant::now() >= limit;
        match read().await {
            Ok(content) => {
                let held: HashSet<Id> = content.values().flatten().copied().collect();
                if last || due.iter().all(|id| held.contains(id)) {
                    return Ok(content);
                }
            }
            Err(e) if last => return Err(e),
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
