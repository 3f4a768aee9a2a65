//! Plain HTTP for probes and scrapers. It reads and never changes anything, and every
//! answer comes from the agent's own knowledge without waiting on anybody.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use dc_agent::control::Control;
use dc_core::ids::GroupName;
use serde::Deserialize;
use serde_json::json;

/// Carries the epoch of each group, as in `orders=1.42`; of one group asked for, the bare epoch.
const EPOCH: HeaderName = HeaderName::from_static("x-dc-epoch");

type Agent = State<Arc<dyn Control>>;

/// The routes of an agent's HTTP address: `/livez /readyz /active /standby /site /metrics`.
///
/// GET and HEAD only; `/active`, `/standby` and `/site` take `?group=NAME`.
pub fn router(control: Arc<dyn Control>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/active", get(active))
        .route("/standby", get(standby))
        .route("/site", get(site))
        .route("/metrics", get(metrics))
        .with_state(control)
}

/// Which group a probe asks for; none for any.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    group: Option<GroupName>,
}

impl Asked {
    fn is_in(&self, groups: &[GroupName]) -> bool {
        self.group.as_ref().map_or(!groups.is_empty(), |group| groups.contains(group))
    }
}

fn verdict(yes: bool, word: &str) -> Response {
    let (status, not) = if yes { (StatusCode::OK, "") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ") };
    (status, format!("{not}{word}\n")).into_response()
}

async fn livez(State(control): Agent) -> Response {
    verdict(control.health().live, "live")
}

async fn readyz(State(control): Agent) -> Response {
    match control.health().ready {
        Ok(()) => verdict(true, "ready"),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")).into_response(),
    }
}

async fn active(State(control): Agent, Query(asked): Query<Asked>) -> Response {
    verdict(asked.is_in(&control.health().active), "active")
}

async fn standby(State(control): Agent, Query(asked): Query<Asked>) -> Response {
    verdict(asked.is_in(&control.health().standby), "standby")
}

async fn site(State(control): Agent, Query(asked): Query<Asked>) -> Response {
    let (view, health) = (control.status(), control.health());
    let groups: Vec<_> =
        view.groups.iter().filter(|g| asked.group.as_ref().is_none_or(|name| g.name == *name)).collect();
    let epochs: Vec<String> = match (&asked.group, groups.as_slice()) {
        (Some(_), [one]) => vec![one.epoch.to_string()],
        _ => groups.iter().map(|g| format!("{}={}", g.name, g.epoch)).collect(),
    };
    let shown: Vec<_> = groups
        .iter()
        .map(|g| {
            let (active, standby) = (health.active.contains(&g.name), health.standby.contains(&g.name));
            json!({"group": g.name, "holder": g.holder, "epoch": g.epoch.to_string(), "opened": g.opened,
                   "active_here": active, "standby_here": standby})
        })
        .collect();
    let body = json!({"schema": "dc-switch/v1", "site": view.asked, "live": health.live,
                      "ready": health.ready.is_ok(), "quorum": view.quorum.answering, "groups": shown});
    ([(EPOCH, epochs.join(", "))], Json(body)).into_response()
}

async fn metrics(State(control): Agent) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], control.health().metrics)
        .into_response()
}
