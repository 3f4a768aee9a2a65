//! The REST API of this site's Airflow, version 2, as far as the plane needs it.

use std::time::Duration;

use dc_plane::{Deadline, PlaneError, chain};
use parking_lot::Mutex;
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::Checked;

/// A task instance that a scheduler or a worker holds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Instance {
    pub(crate) dag_id: String,
    pub(crate) dag_run_id: String,
    pub(crate) task_id: String,
    pub(crate) map_index: i64,
    pub(crate) state: Option<String>,
    pub(crate) try_number: i64,
}

impl Instance {
    /// As people read it.
    pub(crate) fn shown(&self) -> String {
        let map = if self.map_index < 0 { String::new() } else { format!("[{}]", self.map_index) };
        format!("{}/{}/{}{map}", self.dag_id, self.dag_run_id, self.task_id)
    }
}

#[derive(Debug, Deserialize)]
struct Tasks {
    task_instances: Vec<Instance>,
    total_entries: usize,
}

/// A DAG, as far as a policy needs it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Dag {
    pub(crate) is_paused: bool,
    pub(crate) tags: Vec<Tag>,
}

/// A tag of a DAG.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Tag {
    pub(crate) name: String,
}

/// This site's API server.
pub(crate) struct Api {
    base: String,
    user: String,
    password: String,
    http: reqwest::Client,
    token: Mutex<Option<String>>,
}

const PAGE: usize = 100;
const PAGES_MAX: usize = 1_000;
const TRY_WITHIN: Duration = Duration::from_secs(10);

impl Api {
    pub(crate) fn new(checked: &Checked) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .timeout(TRY_WITHIN)
            .build()?;
        Ok(Self {
            base: checked.api.clone(),
            user: checked.user.clone(),
            password: checked.password.clone(),
            http,
            token: Mutex::new(None),
        })
    }

    fn unreachable(&self, cause: &reqwest::Error) -> PlaneError {
        PlaneError::Unreachable { what: format!("Airflow API at {}", self.base), why: chain(cause) }
    }

    /// Whether the routes answer that tasks report to; the first request builds them when nothing has.
    ///
    /// Errors: `Unreachable`, or `Failed` with the status.
    pub(crate) async fn execution_health(&self, until: Deadline) -> Result<(), PlaneError> {
        let url = format!("{}/execution/health", self.base);
        let sent = until.bound("ask /execution/health", self.http.get(url).send()).await?;
        let got = sent.map_err(|e| self.unreachable(&e))?;
        if got.status().is_success() {
            return Ok(());
        }
        Err(PlaneError::Failed {
            what: "ask /execution/health".into(),
            why: format!("it answered {}", got.status()),
        })
    }

    async fn log_in(&self, until: Deadline) -> Result<String, PlaneError> {
        let words = json!({"username": self.user, "password": self.password});
        let sent = self.http.post(format!("{}/auth/token", self.base)).json(&words).send();
        let got = until.bound("log in to Airflow", sent).await?.map_err(|e| self.unreachable(&e))?;
        let status = got.status();
        let body: Value = got.json().await.unwrap_or_default();
        let token = body.get("access_token").and_then(Value::as_str).ok_or_else(|| PlaneError::Failed {
            what: format!("log in to Airflow as {}", self.user),
            why: format!("it answered {status} without a token"),
        })?;
        *self.token.lock() = Some(token.to_owned());
        Ok(token.to_owned())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        until: Deadline,
    ) -> Result<(StatusCode, Value), PlaneError> {
        let known = self.token.lock().clone();
        let mut token = match known {
            Some(token) => token,
            None => self.log_in(until).await?,
        };
        for again in [true, false] {
            let mut request =
                self.http.request(method.clone(), format!("{}{path}", self.base)).bearer_auth(&token);
            if let Some(body) = body {
                request = request.json(body);
            }
            let got = until.bound(path, request.send()).await?.map_err(|e| self.unreachable(&e))?;
            let status = got.status();
            if status == StatusCode::UNAUTHORIZED && again {
                token = self.log_in(until).await?;
                continue;
            }
            let body = until.bound(path, got.json()).await?.unwrap_or(Value::Null);
            return Ok((status, body));
        }
        Err(PlaneError::Failed { what: format!("{method} {path}"), why: "a fresh token was refused".into() })
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        until: Deadline,
    ) -> Result<Value, PlaneError> {
        let (status, answer) = self.send(method.clone(), path, body, until).await?;
        if status.is_success() {
            return Ok(answer);
        }
        Err(refused(&format!("{method} {path}"), status, &answer))
    }

    /// Whether a token is given: the API reads its database.
    pub(crate) async fn answers(&self, until: Deadline) -> Result<(), PlaneError> {
        self.ask(Method::GET, "/api/v2/dags?limit=1", None, until).await.map(|_| ())
    }

    /// Every task instance that is running, queued or restarting.
    pub(crate) async fn held(&self, until: Deadline) -> Result<Vec<Instance>, PlaneError> {
        let mut all: Vec<Instance> = Vec::new();
        for _ in 0..PAGES_MAX {
            let path = format!(
                "/api/v2/dags/~/dagRuns/~/taskInstances?state=running&state=queued&state=restarting\
                 &order_by=id&limit={PAGE}&offset={}",
                all.len()
            );
            let answer = self.ask(Method::GET, &path, None, until).await?;
            let page: Tasks =
                serde_json::from_value(answer).map_err(|e| PlaneError::failed("read task instances", &e))?;
            let last = page.task_instances.is_empty();
            all.extend(page.task_instances);
            if last || all.len() >= page.total_entries {
                return Ok(all);
            }
        }
        Err(PlaneError::Failed {
            what: "list task instances".into(),
            why: format!("more than {} are open", all.len()),
        })
    }

    /// One DAG; none when the database does not know it.
    pub(crate) async fn dag(&self, id: &str, until: Deadline) -> Result<Option<Dag>, PlaneError> {
        let path = format!("/api/v2/dags/{}", quoted(id));
        let (status, answer) = self.send(Method::GET, &path, None, until).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(refused(&format!("GET {path}"), status, &answer));
        }
        serde_json::from_value(answer).map(Some).map_err(|e| PlaneError::failed("read a DAG", &e))
    }

    /// Pauses one DAG.
    pub(crate) async fn pause(&self, id: &str, until: Deadline) -> Result<(), PlaneError> {
        let path = format!("/api/v2/dags/{}?update_mask=is_paused", quoted(id));
        self.ask(Method::PATCH, &path, Some(&json!({"is_paused": true})), until).await.map(|_| ())
    }

    /// Marks one task instance failed, with a note.
    pub(crate) async fn fail(&self, task: &Instance, note: &str, until: Deadline) -> Result<(), PlaneError> {
        let map = if task.map_index < 0 { String::new() } else { format!("/{}", task.map_index) };
        let path = format!(
            "/api/v2/dags/{}/dagRuns/{}/taskInstances/{}{map}",
            quoted(&task.dag_id),
            quoted(&task.dag_run_id),
            quoted(&task.task_id)
        );
        self.ask(Method::PATCH, &path, Some(&json!({"new_state": "failed", "note": note})), until)
            .await
            .map(|_| ())
    }

    /// Writes one variable.
    pub(crate) async fn set_variable(
        &self,
        key: &str,
        value: &str,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let body = json!({"key": key, "value": value, "description": "written by dc-switch after a move"});
        let path = format!("/api/v2/variables/{}", quoted(key));
        let (status, answer) = self.send(Method::PATCH, &path, Some(&body), until).await?;
        if status == StatusCode::NOT_FOUND {
            let (status, answer) = self.send(Method::POST, "/api/v2/variables", Some(&body), until).await?;
            // another caller made it meanwhile
            if status.is_success() || status == StatusCode::CONFLICT {
                return Ok(());
            }
            return Err(refused("POST /api/v2/variables", status, &answer));
        }
        if status.is_success() { Ok(()) } else { Err(refused(&format!("PATCH {path}"), status, &answer)) }
    }

    /// Asks for one run by name. A run of that name is as good.
    pub(crate) async fn trigger(&self, dag: &str, run: &str, until: Deadline) -> Result<(), PlaneError> {
        let path = format!("/api/v2/dags/{}/dagRuns", quoted(dag));
        let body =
            json!({"dag_run_id": run, "logical_date": null, "note": "asked for by dc-switch after a move"});
        let (status, answer) = self.send(Method::POST, &path, Some(&body), until).await?;
        if status.is_success() || status == StatusCode::CONFLICT {
            return Ok(());
        }
        Err(refused(&format!("POST {path}"), status, &answer))
    }

    /// The state of one run; none when there is no such run.
    pub(crate) async fn run_state(
        &self,
        dag: &str,
        run: &str,
        until: Deadline,
    ) -> Result<Option<String>, PlaneError> {
        let path = format!("/api/v2/dags/{}/dagRuns/{}", quoted(dag), quoted(run));
        let (status, answer) = self.send(Method::GET, &path, None, until).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(refused(&format!("GET {path}"), status, &answer));
        }
        Ok(answer.get("state").and_then(Value::as_str).map(str::to_owned))
    }
}

fn refused(what: &str, status: StatusCode, answer: &Value) -> PlaneError {
    let detail = answer.get("detail").map(ToString::to_string).unwrap_or_default();
    let detail: String = detail.chars().take(200).collect();
    PlaneError::Failed { what: what.to_owned(), why: format!("it answered {status} {detail}") }
}

/// A path segment with every byte escaped that could end it.
fn quoted(segment: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // writing to a String cannot fail
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_id_with_a_slash_and_a_plus_stays_one_segment() {
        assert_eq!(
            quoted("manual__2026-11-21T10:00:00+00:00/x"),
            "manual__2026-11-21T10%3A00%3A00%2B00%3A00%2Fx"
        );
    }
}
