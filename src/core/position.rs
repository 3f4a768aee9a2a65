//! How far a plane got, and the cut: the positions at which a new site takes over.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::PlaneKind;

/// A place in PostgreSQL's write-ahead log: bytes since 0/0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Reads the server's text form, as in `0/3088B68`.
    pub fn parse(text: &str) -> Option<Self> {
        let (high, low) = text.trim().split_once('/')?;
        let high = u32::from_str_radix(high, 16).ok()?;
        let low = u32::from_str_radix(low, 16).ok()?;
        Some(Self(u64::from(high) << 32 | u64::from(low)))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}
impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a cleanly stopped primary left behind: the proof of its last word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShutdownToken {
    /// Of the database cluster, as `pg_controldata` prints it.
    pub system_id: u64,
    /// Timeline that ended here.
    pub timeline: u32,
    /// Of the shutdown checkpoint record.
    pub checkpoint: Lsn,
}

/// Timeline numbers set aside by the quorum, so that no two promotions share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timelines {
    /// For the promotion at the target.
    pub target: u32,
    /// For the source, should the run be returned.
    pub back: u32,
}

/// End offsets by topic, then partition: the offset after the last readable record.
pub type Ends = BTreeMap<String, BTreeMap<i32, i64>>;

/// An ALLOW binding of a Kafka cluster, as recorded before it is taken away.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// As in `User:app`.
    pub principal: String,
    /// Kafka's word: `topic`, `group`, `cluster`, `transactional_id`.
    pub resource: String,
    /// Name of the resource, or its prefix.
    pub name: String,
    /// Whether `name` is a prefix.
    pub prefixed: bool,
    /// Kafka's word: `read`, `write`, `describe`, ...
    pub operation: String,
    /// Client host the binding is limited to; `*` for any.
    pub host: String,
}

/// Name of one immutable set of DAGs: its serial and root hash, decided in Raft.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DagRelease {
    /// Counts from 1 within a group.
    pub serial: u64,
    /// SHA-256 over the manifest's sorted entries, 64 hex digits.
    pub root: String,
}

impl DagRelease {
    /// The name Airflow stores as bundle version, as in `r000123-ab12cd34ef56`.
    pub fn version(&self) -> String {
        let short = self.root.get(..12).unwrap_or(&self.root);
        format!("r{:06}-{short}", self.serial)
    }
}

/// The final position of one plane, with what proves that both sites are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")] // not tagged inside: JSON could not read number keys back
pub enum Position {
    /// The shutdown checkpoint, replayed past at the target.
    Postgres {
        /// Of the stopped source.
        token: ShutdownToken,
        /// Replay position seen at the target, above the token.
        replayed: Lsn,
    },
    /// Every readable record of the source is at the target.
    Kafka {
        /// End offsets at the source, fenced.
        source: Ends,
        /// End offsets at the target when its mirror lost WRITE.
        target: Ends,
    },
    /// Every object that the source shows is at the target.
    S3 {
        /// The release active at both sites; none before the first publish.
        release: Option<DagRelease>,
        /// Log objects compared in the last pass.
        logs: u64,
    },
    /// Nothing of Airflow runs at the source.
    Airflow {
        /// Task instances that were still open when the source was proved empty.
        open_tasks: u64,
    },
}

impl Position {
    /// Which plane this is a position of.
    pub fn plane(&self) -> PlaneKind {
        match self {
            Self::Postgres { .. } => PlaneKind::Postgres,
            Self::Kafka { .. } => PlaneKind::Kafka,
            Self::S3 { .. } => PlaneKind::S3,
            Self::Airflow { .. } => PlaneKind::Airflow,
        }
    }
}

/// The exact positions at which the target takes over, one per plane of the group.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cut(pub Vec<Position>);

impl Cut {
    /// Whether the cut holds a position of that plane.
    pub fn covers(&self, plane: PlaneKind) -> bool {
        self.0.iter().any(|p| p.plane() == plane)
    }
}

/// How far a standby is behind, with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// How many.
    pub amount: u64,
    /// Of what.
    pub unit: LagUnit,
    /// Age of the oldest thing that is missing, in milliseconds; none when unknown.
    pub age_ms: Option<u64>,
}

/// What a lag is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LagUnit {
    /// Of write-ahead log.
    Bytes,
    /// Of Kafka topics.
    Records,
    /// Of buckets.
    Objects,
    /// Of Airflow.
    Tasks,
}

impl LagUnit {
    /// As people and metric names say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Records => "records",
            Self::Objects => "objects",
            Self::Tasks => "tasks",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_reads_what_it_prints() {
        let lsn = Lsn::parse("1A/3088B68");
        assert_eq!(lsn, Some(Lsn(0x1A_0308_8B68)));
        assert_eq!(lsn.map(|l| l.to_string()).as_deref(), Some("1A/3088B68"));
        assert_eq!(Lsn::parse("nonsense"), None);
    }

    #[test]
    fn a_release_names_itself_as_airflow_stores_it() {
        let release = DagRelease { serial: 123, root: "ab12cd34ef56aa".into() };
        assert_eq!(release.version(), "r000123-ab12cd34ef56");
    }
}
