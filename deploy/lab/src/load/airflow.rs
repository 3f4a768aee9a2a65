//! A client per site that asks Airflow to start runs, and what the oracle reads of Airflow and of the tasks' marks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::history::{History, Outcome, now_ns, wall_ns};
use crate::load::{Shared, postgres};
use crate::oracle::marks::{Mark, parse};
use crate::world::{DATA_SITES, Plane, Site, World, port};

/// The DAG whose runs are asked for: one task of some seconds, rerun allowed.
pub const DAG: &str = "lab_rerun";
/// Seconds that the runs take, in turn: at any moment a task runs, some of them over the pause between requests.
pub type Lengths = [u64; 3];
/// As users' tasks are: most are short, and a drain waits for some.
pub const MIXED: Lengths = [3, 3, 8];
/// Where nobody ends the tasks of the old site: two run at any moment, and end before their scheduler, without its
/// database, is given up and takes them along.
pub const EVEN: Lengths = [4, 4, 4];
/// Pause between two accepted requests.
const BETWEEN: Duration = Duration::from_secs(2);

/// Starts one client per site.
pub fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<()> {
    let history = shared.history(Plane::Airflow)?;
    for site in DATA_SITES {
        tasks.spawn(ask(shared.clone(), history.clone(), Api::new(&shared.world, site)?));
    }
    Ok(())
}

/// One site's REST API.
#[derive(Debug, Clone)]
pub struct Api {
    site: Site,
    base: String,
    password: String,
    http: reqwest::Client,
    token: Option<String>,
}

/// Why a request did not succeed.
#[derive(Debug)]
enum Failed {
    /// Nothing was done.
    Refused,
    /// It may have been done.
    Unknown,
}

impl Api {
    /// A client of one site.
    pub fn new(world: &World, site: Site) -> Result<Api> {
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(1))
            .timeout(Duration::from_secs(10))
            .build()?;
        let base = format!("http://{}:{}", world.ip(&site), port::AIRFLOW_API);
        Ok(Api { site, base, password: world.secret("airflow-admin")?, http, token: None })
    }

    async fn log_in(&mut self) -> Result<(), Failed> {
        let words = json!({"username": "admin", "password": self.password});
        let sent = self.http.post(format!("{}/auth/token", self.base)).json(&words).send().await;
        let body: Value = sent.map_err(|_| Failed::Refused)?.json().await.map_err(|_| Failed::Refused)?;
        self.token = body["access_token"].as_str().map(String::from);
        if self.token.is_some() { Ok(()) } else { Err(Failed::Refused) }
    }

    /// Asks for one run of a DAG, whose task shall take `seconds`.
    async fn trigger(&mut self, dag: &str, run: &str, seconds: u64) -> Result<(), Failed> {
        if self.token.is_none() {
            self.log_in().await?;
        }
        let body = json!({"dag_run_id": run, "logical_date": null, "conf": {"seconds": seconds}});
        let url = format!("{}/api/v2/dags/{dag}/dagRuns", self.base);
        let sent = self
            .http
            .post(url)
            .bearer_auth(self.token.as_deref().unwrap_or_default())
            .json(&body)
            .send()
            .await;
        match sent {
            Ok(r) if r.status().is_success() => Ok(()),
            Ok(r) => {
                if r.status() == reqwest::StatusCode::UNAUTHORIZED {
                    self.token = None;
                }
                Err(if r.status().is_client_error() { Failed::Refused } else { Failed::Unknown })
            }
            Err(e) if e.is_connect() => Err(Failed::Refused),
            Err(_) => Err(Failed::Unknown),
        }
    }

    /// All runs of a DAG that this site's Airflow knows, with their states.
    pub async fn runs(&mut self, dag: &str) -> Result<Vec<(String, String)>> {
        let mut runs = Vec::new();
        loop {
            if self.token.is_none() && self.log_in().await.is_err() {
                bail!("log in to Airflow of {}", self.site);
            }
            let url = format!("{}/api/v2/dags/{dag}/dagRuns?limit=100&offset={}", self.base, runs.len());
            let sent =
                self.http.get(url).bearer_auth(self.token.as_deref().unwrap_or_default()).send().await?;
            let body: Value = sent.error_for_status().context("list runs")?.json().await?;
            let page = body["dag_runs"].as_array().context("answer has no runs")?;
            let text = |r: &Value, key: &str| r[key].as_str().unwrap_or_default().to_string();
            runs.extend(page.iter().map(|r| (text(r, "dag_run_id"), text(r, "state"))));
            if page.len() < 100 {
                return Ok(runs);
            }
        }
    }
}

/// Name of the run that a write of this plane is.
pub fn run_name(id: (u16, u64)) -> String {
    format!("lab-{}-{}", id.0, id.1)
}

async fn ask(shared: Arc<Shared>, history: Arc<History>, mut api: Api) {
    let writer = u16::from(api.site.index) * 100 + 1;
    let mut seq = shared.base;
    let mut lengths = shared.lengths.into_iter().cycle();
    while !shared.over() {
        seq += 1;
        let sent = now_ns();
        let seconds = lengths.next().unwrap_or_default();
        let outcome = match api.trigger(DAG, &run_name((writer, seq)), seconds).await {
            Ok(()) => Outcome::Acked,
            Err(Failed::Refused) => Outcome::Refused,
            Err(Failed::Unknown) => Outcome::Unknown,
        };
        history.add(api.site, (writer, seq), sent, outcome);
        let often = shared.moving.load(Ordering::Relaxed);
        shared
            .sleep(if outcome == Outcome::Acked {
                BETWEEN
            } else {
                Duration::from_millis(if often { 250 } else { 1_000 })
            })
            .await;
    }
}

/// Runs that were accepted by one of these sites up to a time.
pub fn accepted(history: &History, sites: &[Site], to: u64) -> BTreeSet<String> {
    sites.iter().flat_map(|s| history.acked_ids(*s, 0, to)).map(run_name).collect()
}

/// Runs that a site may have accepted up to a time: those too whose answer was lost.
pub fn possible(history: &History, site: Site, to: u64) -> BTreeSet<String> {
    history.possible_ids(site, to).into_iter().map(run_name).collect()
}

/// Takeover to the first scheduler that put its own row into the new site's database.
///
/// Errors: the database cannot be read. `None`: there is no such row.
pub async fn scheduler_live_ms(world: &World, site: Site, takeover_ms: u64) -> Result<Option<f64>> {
    let client = postgres::connect_to(world, site, "dclab", "airflow").await?;
    let first = "select (extract(epoch from min(start_date)) * 1000)::float8 from job \
                 where job_type = 'SchedulerJob' and extract(epoch from start_date) * 1000 > $1::float8";
    let takeover = f64::from(u32::try_from(takeover_ms / 1000)?) * 1000.0
        + f64::from(u32::try_from(takeover_ms % 1000)?);
    let row = client.query_one(first, &[&takeover]).await.context("read Airflow's scheduler rows")?;
    Ok(row.get::<_, Option<f64>>(0).map(|at| at - takeover))
}

/// All marks that tasks left so far. None yet: no marks.
pub fn marks(world: &World) -> Vec<Mark> {
    let text = std::fs::read_to_string(world.root.join("marks/marks.tsv")).unwrap_or_default();
    parse(&text, wall_ns().saturating_sub(now_ns()))
}
