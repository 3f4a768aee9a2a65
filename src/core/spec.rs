//! The group spec: which planes move together, what they claim, under which policy.
//!
//! Equal at all sites by construction: it is applied through the quorum and versioned
//! there. What differs by site (addresses, credentials, paths) is the agent's config.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::{GroupName, PlaneKind, SiteId};

/// A span of time written with its unit, as in `"60s"` or `"5m"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(self.0))
    }
}
impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text).map(Self).map_err(|cause| {
            serde::de::Error::custom(format!(
                "{text:?} is no span of time ({cause}); write it as in \"60s\" or \"5m\""
            ))
        })
    }
}

/// A failover group as its owner describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Unique among groups.
    pub name: GroupName,
    /// The sites that may hold the group. The first one is the founding holder.
    pub sites: Vec<SiteId>,
    /// Databases of the group.
    pub postgres: Option<PostgresSpec>,
    /// Topics and consumer groups.
    pub kafka: Option<KafkaSpec>,
    /// DAG releases and logs.
    pub s3: Option<S3Spec>,
    /// Schedulers and tasks.
    pub airflow: Option<AirflowSpec>,
    /// Limits and choices that bind all planes.
    #[serde(default)]
    pub policy: Policy,
}

/// PostgreSQL of a group: one instance per site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresSpec {
    /// Databases that the instance holds for this group.
    pub databases: Vec<String>,
    /// Roles of applications; they are shut out by a fence.
    pub app_roles: Vec<String>,
}

/// Kafka of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaSpec {
    /// Topics that move; exact names.
    pub topics: Vec<String>,
    /// Principals that write them, as in `app`.
    pub producers: Vec<String>,
    /// Principals that read them.
    pub consumers: Vec<String>,
    /// Consumer groups whose positions move.
    pub groups: Vec<String>,
    /// Name of the MirrorMaker 2 connector that carries the founding holder's topics
    /// to the other site when the group is first applied.
    pub mirror: String,
}

/// Objects of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3Spec {
    /// Bucket, of the same name at every site.
    pub bucket: String,
    /// Prefix of DAG releases in the bucket, without slashes at its ends.
    pub dag_prefix: String,
    /// Prefix of Airflow's remote logs, without slashes at its ends.
    pub log_prefix: String,
    /// Users of the object store that write under these prefixes.
    pub writers: Vec<String>,
}

/// What becomes of a task that was queued or running when its site went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskPolicy {
    /// Run it again at the new site.
    Rerun,
    /// Mark it failed.
    Fail,
    /// Leave it and pause its DAG until a person decides.
    Hold,
}

/// Airflow of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AirflowSpec {
    /// How long running tasks may take to finish before the run is rolled back.
    pub drain_limit: Span,
    /// For DAGs without a tag `dr:rerun`, `dr:fail` or `dr:hold`.
    pub default_policy: TaskPolicy,
}

/// Limits and choices of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// PostgreSQL lag, in bytes of log, above which a switchover is refused.
    pub lag_bytes_max: u64,
    /// Kafka lag, in records, above which a switchover is refused.
    pub lag_records_max: u64,
    /// Log objects not yet pulled above which a switchover is refused.
    pub lag_objects_max: u64,
    /// Deadline of PostgreSQL's own shutdown; past it the source is started again.
    pub stop_limit: Span,
    /// Deadline of each drain.
    pub drain_limit: Span,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            lag_bytes_max: 16 << 20,
            lag_records_max: 50_000,
            lag_objects_max: 1_000,
            stop_limit: Span(Duration::from_secs(10)),
            drain_limit: Span(Duration::from_secs(30)),
        }
    }
}

/// Why a group spec cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct BadSpec {
    /// Which key of the file.
    pub key: String,
    /// What is wrong with it, with the number or word found.
    pub why: String,
}

impl GroupSpec {
    /// Checks everything that one spec alone can get wrong.
    ///
    /// Errors: all faults found, in the order of the file.
    pub fn check(&self) -> Result<(), Vec<BadSpec>> {
        let mut bad = Vec::new();
        let mut fault = |key: &str, why: String| bad.push(BadSpec { key: key.into(), why });
        if self.sites.len() != 2 {
            fault(
                "sites",
                format!("{} given, this version moves groups between exactly 2", self.sites.len()),
            );
        }
        if let Some(twice) = twice(&self.sites) {
            fault("sites", format!("{twice} is named twice"));
        }
        if self.planes().is_empty() {
            fault("name", "the group has no plane; add [postgres], [kafka], [s3] or [airflow]".into());
        }
        if let Some(s3) = &self.s3 {
            for (key, prefix) in [("s3.dag_prefix", &s3.dag_prefix), ("s3.log_prefix", &s3.log_prefix)] {
                if prefix.is_empty() || prefix.starts_with('/') || prefix.ends_with('/') {
                    fault(key, format!("{prefix:?} must not be empty nor start or end with a slash"));
                }
            }
            if contains(&s3.dag_prefix, &s3.log_prefix) || contains(&s3.log_prefix, &s3.dag_prefix) {
                fault(
                    "s3.log_prefix",
                    format!("{:?} and {:?} lie within each other", s3.log_prefix, s3.dag_prefix),
                );
            }
        }
        if let Some(kafka) = &self.kafka {
            for (key, list) in [("kafka.topics", &kafka.topics), ("kafka.groups", &kafka.groups)] {
                if let Some(twice) = twice(list) {
                    fault(key, format!("{twice} is named twice"));
                }
            }
            if kafka.topics.is_empty() {
                fault("kafka.topics", "is empty".into());
            }
        }
        if self.postgres.as_ref().is_some_and(|p| p.databases.is_empty()) {
            fault("postgres.databases", "is empty".into());
        }
        if self.airflow.is_some() && (self.postgres.is_none() || self.s3.is_none()) {
            fault(
                "airflow",
                "needs [postgres] for its metadata and [s3] for its DAGs and logs in the same group".into(),
            );
        }
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }

    /// The planes of the group, in reading order.
    pub fn planes(&self) -> Vec<PlaneKind> {
        PlaneKind::ALL.into_iter().filter(|plane| self.has(*plane)).collect()
    }

    /// Whether the group has that plane.
    pub fn has(&self, plane: PlaneKind) -> bool {
        match plane {
            PlaneKind::Postgres => self.postgres.is_some(),
            PlaneKind::Kafka => self.kafka.is_some(),
            PlaneKind::S3 => self.s3.is_some(),
            PlaneKind::Airflow => self.airflow.is_some(),
        }
    }

    /// The other site of the pair.
    pub fn other(&self, site: &SiteId) -> Option<&SiteId> {
        self.sites.iter().find(|s| *s != site)
    }

    /// What the group owns alone.
    pub fn claims(&self) -> BTreeSet<Claim> {
        let mut claims = BTreeSet::new();
        if let Some(postgres) = &self.postgres {
            claims.insert(Claim::PostgresInstance(self.sites.clone()));
            claims.extend(postgres.databases.iter().cloned().map(Claim::Database));
        }
        if let Some(kafka) = &self.kafka {
            claims.extend(kafka.topics.iter().cloned().map(Claim::Topic));
            claims.extend(kafka.groups.iter().cloned().map(Claim::ConsumerGroup));
            claims.insert(Claim::Mirror(kafka.mirror.clone()));
        }
        if let Some(s3) = &self.s3 {
            for prefix in [&s3.dag_prefix, &s3.log_prefix] {
                claims.insert(Claim::Prefix { bucket: s3.bucket.clone(), prefix: prefix.clone() });
            }
        }
        if self.airflow.is_some() {
            claims.insert(Claim::Airflow(self.sites.clone()));
        }
        claims
    }
}

/// What a group owns exclusively.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// The database instance of these sites: it can stop for one group only.
    PostgresInstance(Vec<SiteId>),
    /// A database by name.
    Database(String),
    /// A topic by exact name.
    Topic(String),
    /// A consumer group by exact name.
    ConsumerGroup(String),
    /// A connector by name.
    Mirror(String),
    /// Everything below a prefix of a bucket.
    Prefix {
        /// Bucket name.
        bucket: String,
        /// Without slashes at its ends.
        prefix: String,
    },
    /// The Airflow of these sites.
    Airflow(Vec<SiteId>),
}

impl Claim {
    /// Whether two claims want the same thing, one prefix within the other included.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Prefix { bucket: a, prefix: p }, Self::Prefix { bucket: b, prefix: q }) => {
                a == b && (contains(p, q) || contains(q, p))
            }
            (Self::PostgresInstance(a), Self::PostgresInstance(b)) | (Self::Airflow(a), Self::Airflow(b)) => {
                a.iter().any(|site| b.contains(site))
            }
            (a, b) => a == b,
        }
    }
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PostgresInstance(sites) => write!(f, "the PostgreSQL instance of {}", words(sites)),
            Self::Database(name) => write!(f, "database {name}"),
            Self::Topic(name) => write!(f, "topic {name}"),
            Self::ConsumerGroup(name) => write!(f, "consumer group {name}"),
            Self::Mirror(name) => write!(f, "connector {name}"),
            Self::Prefix { bucket, prefix } => write!(f, "prefix {bucket}/{prefix}"),
            Self::Airflow(sites) => write!(f, "the Airflow of {}", words(sites)),
        }
    }
}

fn words(sites: &[SiteId]) -> String {
    sites.iter().map(SiteId::as_str).collect::<Vec<_>>().join(" and ")
}

/// Whether `inner` is `outer` or lies below it.
fn contains(outer: &str, inner: &str) -> bool {
    inner == outer || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'))
}

fn twice<T: Ord>(list: &[T]) -> Option<&T> {
    let mut seen = BTreeSet::new();
    list.iter().find(|item| !seen.insert(*item))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(prefix: &str) -> Claim {
        Claim::Prefix { bucket: "b".into(), prefix: prefix.into() }
    }

    #[test]
    fn prefixes_overlap_by_containment_and_not_by_spelling() {
        assert!(prefix("logs").overlaps(&prefix("logs/orders")));
        assert!(prefix("logs/orders").overlaps(&prefix("logs")));
        assert!(!prefix("logs").overlaps(&prefix("logs-2")));
    }

    #[test]
    fn a_span_without_a_unit_is_refused_with_the_way_to_write_it() {
        let refused = toml_like("60").map_err(|e| e.to_string());
        assert!(refused.is_err_and(|text| text.contains("60s")));
        assert_eq!(toml_like("90s").ok(), Some(Span(Duration::from_secs(90))));
    }

    fn toml_like(text: &str) -> Result<Span, serde::de::value::Error> {
        use serde::de::IntoDeserializer;
        Span::deserialize(text.into_deserializer())
    }
}
