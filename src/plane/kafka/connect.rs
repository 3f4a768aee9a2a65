//! Connect workers over their REST interface: one mirror's state, settings and positions.
//!
//! The state it shows is what the worker last wrote: after a kill it still says RUNNING, so progress is judged from
//! positions, never from here alone. A refused PATCH of positions answers 500 for bad input: only a rebalance (409) is
//! asked again. A deleted connector leaves its positions behind, so names are never used twice.

use std::collections::BTreeMap;
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_plane::{Deadline, PlaneError, wait_until};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cluster::{Tp, failed};

/// Longest wait for one answer: a PATCH rewrites a topic, a GET of positions reads it whole.
const ANSWER_MAX: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(100);

/// Settings of a connector.
pub type Settings = Map<String, Value>;

/// The workers that write to one site.
pub struct Workers {
    /// Which site.
    pub site: SiteId,
    base: String,
    http: reqwest::Client,
}

/// A connector as its workers show it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The connector itself.
    pub connector: Part,
    /// Its tasks.
    pub tasks: Vec<Part>,
}

/// Connector or task.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Part {
    /// As in RUNNING, STOPPED, FAILED.
    pub state: String,
    /// Stack trace of a failure.
    #[serde(default)]
    pub trace: Option<String>,
}

impl Status {
    /// Connector and at least one task are RUNNING, and no task is in another state.
    pub fn runs(&self) -> bool {
        self.connector.state == "RUNNING"
            && !self.tasks.is_empty()
            && self.tasks.iter().all(|task| task.state == "RUNNING")
    }

    /// Connector or a task has FAILED: it stays so until it is started again.
    pub fn has_failed(&self) -> bool {
        [&self.connector].into_iter().chain(&self.tasks).any(|part| part.state == "FAILED")
    }

    /// STOPPED and without tasks: its positions may be set.
    pub fn is_stopped(&self) -> bool {
        self.connector.state == "STOPPED" && self.tasks.is_empty()
    }

    /// In one line, with the first failure's own words.
    pub fn show(&self) -> String {
        let tasks: Vec<&str> = self.tasks.iter().map(|task| task.state.as_str()).collect();
        let trace = [&self.connector].into_iter().chain(&self.tasks).find_map(|part| part.trace.as_deref());
        let why = trace.and_then(|t| t.lines().next()).map(|line| format!(": {line}")).unwrap_or_default();
        let tasks = if tasks.is_empty() { "none".to_owned() } else { tasks.join(" ") };
        format!("connector {}, tasks {tasks}{why}", self.connector.state)
    }
}

#[derive(Deserialize)]
struct Offsets {
    offsets: Vec<Offset>,
}
#[derive(Deserialize)]
struct Offset {
    partition: Map<String, Value>,
    offset: Option<Map<String, Value>>,
}

impl Workers {
    /// Knows where to ask; connects to nothing yet. No proxy is used, whatever the environment says.
    ///
    /// Errors: `Failed` when no client can be made.
    pub fn new(site: SiteId, base: &str) -> Result<Self, PlaneError> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(3))
            .timeout(ANSWER_MAX)
            .build()
            .map_err(|e| PlaneError::failed("make a client of Connect", &e))?;
        Ok(Self { site, base: base.trim_end_matches('/').to_owned(), http })
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        until: Deadline,
    ) -> Result<(StatusCode, Value), PlaneError> {
        let what = format!("{method} {path} at the workers of {}", self.site);
        wait_until(until, AGAIN, &what, || async {
            let mut request = self.http.request(method.clone(), format!("{}{path}", self.base));
            if let Some(body) = body {
                request = request.json(body);
            }
            let lost = |e: reqwest::Error| PlaneError::unreachable(format!("Connect of {}", self.site), &e);
            let answer = request.send().await.map_err(lost)?;
            let status = answer.status();
            if status == StatusCode::CONFLICT && method != Method::POST {
                return Ok(None);
            }
            let bytes = answer.bytes().await.map_err(lost)?;
            Ok(Some((status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))))
        })
        .await
    }

    async fn good(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        until: Deadline,
    ) -> Result<Value, PlaneError> {
        let what = format!("{method} {path}");
        let (status, value) = self.ask(method, path, body, until).await?;
        if status.is_success() { Ok(value) } else { Err(refusal(&what, status, &value)) }
    }

    /// The state of a connector; none when there is none of that name.
    pub async fn status(&self, name: &str, until: Deadline) -> Result<Option<Status>, PlaneError> {
        let path = format!("/connectors/{name}/status");
        match self.ask(Method::GET, &path, None, until).await? {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, value) if status.is_success() => serde_json::from_value(value)
                .map(Some)
                .map_err(|e| PlaneError::failed(format!("read the state of {name}"), &e)),
            (status, value) => Err(refusal(&path, status, &value)),
        }
    }

    /// Waits until a connector is as wanted.
    ///
    /// Errors: `TimedOut` with the state last seen.
    pub async fn wait(
        &self,
        name: &str,
        wanted: fn(&Status) -> bool,
        word: &str,
        until: Deadline,
    ) -> Result<Status, PlaneError> {
        let last = parking_lot::Mutex::new(String::from("not there"));
        let waiting = wait_until(until, AGAIN, "", || async {
            let status = self.status(name, until).await?;
            *last.lock() = status.as_ref().map_or_else(|| "not there".to_owned(), Status::show);
            Ok(status.filter(wanted))
        });
        waiting.await.map_err(|e| match e {
            PlaneError::TimedOut { waited, .. } => PlaneError::TimedOut {
                what: format!("{name} at {} to be {word}; it is {}", self.site, last.lock()),
                waited,
            },
            other => other,
        })
    }

    /// The settings of a connector; none when there is none of that name.
    pub async fn settings(&self, name: &str, until: Deadline) -> Result<Option<Settings>, PlaneError> {
        let path = format!("/connectors/{name}/config");
        match self.ask(Method::GET, &path, None, until).await? {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, Value::Object(settings)) if status.is_success() => Ok(Some(settings)),
            (status, value) => Err(refusal(&path, status, &value)),
        }
    }

    /// Every connector with its settings.
    pub async fn all(&self, until: Deadline) -> Result<BTreeMap<String, (Status, Settings)>, PlaneError> {
        #[derive(Deserialize)]
        struct One {
            status: Status,
            info: Info,
        }
        #[derive(Deserialize)]
        struct Info {
            config: Settings,
        }
        let value = self.good(Method::GET, "/connectors?expand=status&expand=info", None, until).await?;
        let all: BTreeMap<String, One> = serde_json::from_value(value)
            .map_err(|e| PlaneError::failed("read the list of connectors", &e))?;
        Ok(all.into_iter().map(|(name, one)| (name, (one.status, one.info.config))).collect())
    }

    /// Creates a connector that does nothing yet. Repeat: one of that name is left as it is.
    pub async fn create_stopped(
        &self,
        name: &str,
        settings: &Settings,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let body = json!({ "name": name, "config": settings, "initial_state": "STOPPED" });
        let what = format!("connector {name} at {} to be created", self.site);
        wait_until(until, AGAIN, &what, || async {
            match self.ask(Method::POST, "/connectors", Some(&body), until).await? {
                (status, _) if status.is_success() => Ok(Some(())),
                // 409 stands for a rebalance, and for a name that is there already.
                (StatusCode::CONFLICT, _) => Ok(self.status(name, until).await?.map(|_| ())),
                (status, value) => Err(refusal(&format!("create {name}"), status, &value)),
            }
        })
        .await
    }

    /// Asks a connector to stop; `wait` tells when it has.
    pub async fn stop(&self, name: &str, until: Deadline) -> Result<(), PlaneError> {
        self.good(Method::PUT, &format!("/connectors/{name}/stop"), None, until).await.map(|_| ())
    }

    /// Asks a stopped connector to run.
    pub async fn resume(&self, name: &str, until: Deadline) -> Result<(), PlaneError> {
        self.good(Method::PUT, &format!("/connectors/{name}/resume"), None, until).await.map(|_| ())
    }

    /// Starts again what failed of a connector.
    pub async fn restart_failed(&self, name: &str, until: Deadline) -> Result<(), PlaneError> {
        let path = format!("/connectors/{name}/restart?includeTasks=true&onlyFailed=true");
        self.good(Method::POST, &path, None, until).await.map(|_| ())
    }

    /// Deletes a connector and waits until it is gone. Repeat: safe. Returns whether it was there.
    pub async fn delete(&self, name: &str, until: Deadline) -> Result<bool, PlaneError> {
        let path = format!("/connectors/{name}");
        match self.ask(Method::DELETE, &path, None, until).await? {
            (StatusCode::NOT_FOUND, _) => Ok(false),
            (status, _) if status.is_success() => {
                let what = format!("connector {name} at {} to be gone", self.site);
                wait_until(until, AGAIN, &what, || async {
                    Ok(self.status(name, until).await?.is_none().then_some(true))
                })
                .await
            }
            (status, value) => Err(refusal(&format!("delete {name}"), status, &value)),
        }
    }

    /// Source offset of the last record carried, by partition.
    pub async fn positions(&self, name: &str, until: Deadline) -> Result<BTreeMap<Tp, i64>, PlaneError> {
        let value = self.good(Method::GET, &format!("/connectors/{name}/offsets"), None, until).await?;
        let read: Offsets = serde_json::from_value(value)
            .map_err(|e| PlaneError::failed(format!("read positions of {name}"), &e))?;
        let mut found = BTreeMap::new();
        for one in read.offsets {
            let topic = one.partition.get("topic").and_then(Value::as_str);
            let partition =
                one.partition.get("partition").and_then(Value::as_i64).and_then(|p| i32::try_from(p).ok());
            let offset = one.offset.as_ref().and_then(|o| o.get("offset")).and_then(Value::as_i64);
            if let (Some(topic), Some(partition), Some(offset)) = (topic, partition, offset) {
                found.insert((topic.to_owned(), partition), offset);
            }
        }
        Ok(found)
    }

    /// Sets positions of a stopped connector and reads them back; none means "from the first record".
    ///
    /// `alias` is what the connector calls its source: an unknown one would be taken with 200 and do nothing.
    pub async fn set_positions(
        &self,
        name: &str,
        alias: &str,
        wanted: &BTreeMap<Tp, Option<i64>>,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let rows = wanted.iter().map(|((topic, partition), offset)| {
            json!({
                "partition": { "cluster": alias, "topic": topic, "partition": partition },
                "offset": offset.map(|offset| json!({ "offset": offset })),
            })
        });
        let body = json!({ "offsets": rows.collect::<Vec<_>>() });
        self.good(Method::PATCH, &format!("/connectors/{name}/offsets"), Some(&body), until).await?;
        let found = self.positions(name, until).await?;
        let differs = wanted.iter().find(|(tp, offset)| found.get(*tp) != offset.as_ref());
        match differs {
            None => Ok(()),
            Some((tp, offset)) => Err(failed(
                "set positions of a connector",
                format!("{name} {}/{}: set {offset:?}, read back {:?}", tp.0, tp.1, found.get(tp)),
            )),
        }
    }
}

fn refusal(what: &str, status: StatusCode, value: &Value) -> PlaneError {
    let why = value.get("message").and_then(Value::as_str).unwrap_or("no message");
    let short: String = why.chars().take(300).collect();
    failed(what, format!("Connect answered {status}: {short}"))
}
