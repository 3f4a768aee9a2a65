//! Writers of log objects, and what the oracle reads of the buckets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::ByteStream;
use tokio::task::JoinSet;

use crate::history::{History, Id, Outcome, now_ns};
use crate::load::Shared;
use crate::oracle::writes::Content;
use crate::world::{DATA_SITES, Plane, Site, World, port};

/// Bucket at both sites, as in the group's file.
const BUCKET: &str = "orders";
/// Below the log prefix of the group's file.
const PREFIX: &str = "logs/dag_id=load/";
/// Where DAG releases lie, as in the group's file.
pub const DAGS: &str = "dags/";
/// Writers per site.
const WRITERS: u16 = 4;
/// Pause of a client before it tries a closed site again, while a move is asked for.
const OFTEN: Duration = Duration::from_millis(100);
/// How far back a sample of the backlog looks, in nanoseconds.
const YOUNG: u64 = 3_000_000_000;
/// Pause of a writer between two objects: four make about 16 a second.
const BETWEEN: Duration = Duration::from_millis(250);

/// A client of one site: `app` is fenced by moves, `root` reads for the oracle. It never tries twice by itself.
pub fn client(world: &World, site: Site, user: &str) -> Result<Client> {
    let secret = world.secret(&format!("s3-{user}"))?;
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(1))
        .operation_timeout(Duration::from_secs(5))
        .build();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(format!("http://{}:{}", world.ip(&site), port::S3))
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new(user, secret, None, None, "lab"))
        .force_path_style(true)
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts);
    Ok(Client::from_conf(config.build()))
}

/// Starts the writers of both sites.
pub fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<()> {
    let history = shared.history(Plane::S3)?;
    for site in DATA_SITES {
        let app = client(&shared.world, site, "app")?;
        for n in 1..=WRITERS {
            let writer = u16::from(site.index) * 100 + n;
            tasks.spawn(write(shared.clone(), history.clone(), app.clone(), site, writer));
        }
        let there = client(&shared.world, site.other(), "root")?;
        tasks.spawn(sample(shared.clone(), history.clone(), there, site));
    }
    Ok(())
}

/// Keys sort by number, so that one listing shows what is new of all writers.
fn key(id: Id) -> String {
    format!("{PREFIX}{:016}-w{}.log", id.1, id.0)
}

fn id_of(key: &str) -> Option<Id> {
    let (seq, writer) = key.strip_prefix(PREFIX)?.strip_suffix(".log")?.split_once("-w")?;
    Some((writer.parse().ok()?, seq.parse().ok()?))
}

/// The content of an object: its own write, some lines long.
fn body(id: Id) -> String {
    format!("{} {} {}\n", id.0, id.1, "task log line ".repeat(20)).repeat(3)
}

async fn write(shared: Arc<Shared>, history: Arc<History>, app: Client, site: Site, writer: u16) {
    let mut seq = shared.base;
    while !shared.over() {
        seq += 1;
        let id = (writer, seq);
        let sent = now_ns();
        let put = app.put_object().bucket(BUCKET).key(key(id)).body(ByteStream::from(body(id).into_bytes()));
        let outcome = match put.send().await {
            Ok(_) => Outcome::Acked,
            Err(e) => match e.raw_response().map(|r| r.status().as_u16()) {
                Some(400..=499) => Outcome::Refused,
                None if is_connect(&e) => Outcome::Refused,
                _ => Outcome::Unknown,
            },
        };
        history.add(site, id, sent, outcome);
        if outcome == Outcome::Acked {
            shared.sleep(BETWEEN).await;
        } else {
            shared.pause(OFTEN).await;
        }
    }
}

/// No connection, so nothing was sent.
fn is_connect<E>(e: &aws_sdk_s3::error::SdkError<E>) -> bool {
    matches!(e, aws_sdk_s3::error::SdkError::DispatchFailure(f) if f.is_io() && f.as_connector_error().is_some_and(|c| format!("{c:?}").contains("ConnectionRefused")))
}

/// One object as a listing tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Bytes.
    pub size: i64,
    /// Hash of the content, as the server says.
    pub etag: String,
}

/// Lists all objects below a prefix of one site.
pub async fn list(world: &World, site: Site, prefix: &str) -> Result<BTreeMap<String, Object>> {
    list_from(&client(world, site, "root")?, prefix, None)
        .await
        .with_context(|| format!("list {prefix} at {site}"))
}

async fn list_from(client: &Client, prefix: &str, after: Option<String>) -> Result<BTreeMap<String, Object>> {
    let mut pages =
        client.list_objects_v2().bucket(BUCKET).prefix(prefix).set_start_after(after).into_paginator().send();
    let mut objects = BTreeMap::new();
    while let Some(page) = pages.next().await {
        for o in page?.contents() {
            let object = Object {
                size: o.size().unwrap_or(-1),
                etag: o.e_tag().unwrap_or_default().trim_matches('"').to_string(),
            };
            objects.insert(o.key().unwrap_or_default().to_string(), object);
        }
    }
    Ok(objects)
}

/// What a site's bucket holds of published DAG releases: their manifests, and the files that these name.
///
/// A file that no manifest names was staged by a publisher that did not get to its end, and was told so.
pub async fn releases(world: &World, site: Site) -> Result<BTreeMap<String, Object>> {
    let client = client(world, site, "root")?;
    let mut objects =
        list_from(&client, DAGS, None).await.with_context(|| format!("list {DAGS} at {site}"))?;
    let mut manifests = String::new();
    for key in objects.keys().filter(|key| file_of(key).is_none()) {
        let got = client.get_object().bucket(BUCKET).key(key).send().await;
        let body = got.with_context(|| format!("read {key} at {site}"))?.body.collect().await?.into_bytes();
        manifests.push_str(&String::from_utf8_lossy(&body));
    }
    published(&mut objects, &manifests);
    Ok(objects)
}

/// The name, which is the hash, of a file of DAG releases.
fn file_of(key: &str) -> Option<&str> {
    key.split_once("/blob/").map(|(_, name)| name)
}

fn published(objects: &mut BTreeMap<String, Object>, manifests: &str) {
    objects.retain(|key, _| file_of(key).is_none_or(|name| manifests.contains(name)));
}

/// The load's objects at one site. An object whose size is not that of what was written does not count as held.
pub async fn content(world: &World, site: Site) -> Result<(Content, BTreeMap<String, Object>)> {
    let objects = list(world, site, PREFIX).await?;
    let whole =
        |(key, o): (&String, &Object)| id_of(key).filter(|id| usize::try_from(o.size) == Ok(body(*id).len()));
    let ids = objects.iter().filter_map(whole).collect();
    Ok((Content::from([(BUCKET.to_string(), ids)]), objects))
}

/// Objects that both sites have under one key with different content.
pub fn different(a: &BTreeMap<String, Object>, b: &BTreeMap<String, Object>) -> Vec<String> {
    a.iter()
        .filter(|(key, object)| b.get(*key).is_some_and(|other| other != *object))
        .map(|(key, _)| key.clone())
        .collect()
}

/// Objects acknowledged by `source` and not yet listed at the other site, twice a second until the load ends.
///
/// Only what is some seconds old at most is asked for: listing all would cost more than the load itself.
async fn sample(shared: Arc<Shared>, history: Arc<History>, there: Client, source: Site) {
    while !shared.over() {
        let at = now_ns();
        let acked = history.acked_ids(source, at.saturating_sub(YOUNG), at);
        if let Some(oldest) = acked.iter().map(|id| id.1).min() {
            let listed = list_from(&there, PREFIX, Some(key((0, oldest.saturating_sub(1))))).await;
            if let Ok(objects) = listed {
                let found: BTreeSet<Id> = objects.keys().filter_map(|k| id_of(k)).collect();
                shared.backlog.note(
                    Plane::S3,
                    source,
                    at,
                    acked.iter().filter(|id| !found.contains(id)).count(),
                );
            }
        }
        shared.sleep(Duration::from_millis(500)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_write() {
        assert_eq!(id_of(&key((201, 17))), Some((201, 17)));
        assert_eq!(id_of("logs/dag_id=load/other"), None);
    }

    #[test]
    fn a_file_counts_only_if_a_manifest_names_it() {
        let object = Object { size: 1, etag: String::new() };
        let keys = ["dags/dc/v1/blob/aa", "dags/dc/v1/blob/bb", "dags/dc/v1/release/000001-cc.json"];
        let mut objects: BTreeMap<_, _> = keys.map(|key| (key.to_string(), object.clone())).into();
        published(&mut objects, r#"{"files":[{"path":"a.py","sha256":"bb"}]}"#);
        assert_eq!(objects.into_keys().collect::<Vec<_>>(), keys[1..]);
    }

    #[test]
    fn two_contents_under_one_key_are_different() {
        let one = |etag: &str| BTreeMap::from([("k".to_string(), Object { size: 1, etag: etag.into() })]);
        assert_eq!(different(&one("a"), &one("b")), ["k"]);
        assert!(different(&one("a"), &one("a")).is_empty());
        assert!(different(&one("a"), &BTreeMap::new()).is_empty());
    }
}
