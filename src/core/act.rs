//! Acts: what is done at a site, as data; and what an act brings back.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId};
use crate::position::{DagRelease, Ends, Grant, Lsn, Position, ShutdownToken, Timelines};

macro_rules! acts {
    ($(#[$doc:meta])* $type:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $type { $($(#[$vdoc])* $variant,)* }

        impl $type {
            /// Every act of this plane.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word people and the log see.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

acts!(
    /// Acts of the quorum itself: entries of the log, executed by the leader.
    QuorumAct {
        /// Sets timeline numbers aside for both ways a run can end.
        ReserveTimelines = "reserve_timelines",
        /// The point of no return: the holder changes.
        Takeover = "takeover",
        /// From here on the new holder may be written to.
        Opened = "opened",
    }
);
acts!(
    /// Acts of the PostgreSQL plane.
    PostgresAct {
        /// Reads both ends of the link and says everything that forbids a move.
        Preflight = "preflight",
        /// CHECKPOINT; at the target also both `max_standby_*_delay` = 0.
        Checkpoint = "checkpoint",
        /// All blocking checks again, replay waiting on nobody included.
        Recheck = "recheck",
        /// Shuts application roles out and proves that none is left.
        FenceClients = "fence_clients",
        /// Makes the target synchronous, as the last act before the fence.
        PreSync = "pre_sync",
        /// Shuts the primary down by its own deadline and reads the token.
        Stop = "stop",
        /// Waits until the target has replayed past the token.
        Replayed = "replayed",
        /// Promotes to the reserved timeline, verifies the switch point, writes the epoch row.
        Promote = "promote",
        /// Lets application roles in.
        Open = "open",
        /// Makes the old primary a standby of the new one, with a rewind where it must.
        Follow = "follow",
        /// A committed canary row, seen at the standby.
        Verify = "verify",
        /// Closes the site because its lease ends; undone by a reopen.
        SelfClose = "self_close",
        /// Upkeep of a standby: running, following the holder.
        Stand = "stand",
        /// Upkeep of the holder: running as primary.
        Serve = "serve",
    }
);
acts!(
    /// Acts of the Kafka plane.
    KafkaAct {
        /// Reads both clusters and the mirror, parity of topics and settings included.
        Preflight = "preflight",
        /// Creates the reverse connector, stopped, under a name never used.
        PrepareReverse = "prepare_reverse",
        /// Reads the grants of applications for the record in Raft.
        RecordGrants = "record_grants",
        /// All blocking checks again.
        Recheck = "recheck",
        /// Takes WRITE and READ on the topics; the canary's denial at every leader is the proof.
        FenceApps = "fence_apps",
        /// Waits until every readable record is at the target.
        Drain = "drain",
        /// Takes the mirror's WRITE at the target.
        FenceMirror = "fence_mirror",
        /// Sets each consumer group to the k-th record from the end.
        SetOffsets = "set_offsets",
        /// Gives the recorded grants at the target.
        GrantApps = "grant_apps",
        /// Stops the forward connector.
        StopForward = "stop_forward",
        /// Starts the reverse connector at exact offsets.
        StartReverse = "start_reverse",
        /// Canaries, old end offsets re-read, mirror progress seen.
        Verify = "verify",
        /// Closes the site because its lease ends; undone by a reopen.
        SelfClose = "self_close",
        /// Upkeep of a standby.
        Stand = "stand",
        /// Upkeep of the holder.
        Serve = "serve",
    }
);
acts!(
    /// Acts of the S3 plane.
    S3Act {
        /// Reads both buckets, policies and releases.
        Preflight = "preflight",
        /// Brings the log backlog down and materialises every release at the target.
        CatchUp = "catch_up",
        /// All blocking checks again.
        Recheck = "recheck",
        /// Denies the writers; a refused PUT with the writer's own key is the proof.
        FenceWriters = "fence_writers",
        /// Pulls until the exact backlog is zero.
        LastPass = "last_pass",
        /// Ends the puller here and lets the writers in.
        OpenWriters = "open_writers",
        /// Brings what a write under way at the fence added behind the last pass, before the old site follows.
        LatePass = "late_pass",
        /// Starts pulling from the new holder.
        PullReverse = "pull_reverse",
        /// A canary object, seen at the other site.
        Verify = "verify",
        /// Closes the site because its lease ends; undone by a reopen.
        SelfClose = "self_close",
        /// Upkeep of a standby: one pull pass, releases materialised.
        Stand = "stand",
        /// Upkeep of the holder: releases materialised.
        Serve = "serve",
    }
);
acts!(
    /// Acts of the Airflow plane.
    AirflowAct {
        /// Versions, keys, schema head, API and DAG releases of both sites.
        Preflight = "preflight",
        /// Starts the API on the replica and warms its execution routes.
        WarmApi = "warm_api",
        /// Ends the scheduler so that no task starts; running ones finish up to a limit.
        Quiesce = "quiesce",
        /// Stops all writers and proves that no process is left.
        ProveGone = "prove_gone",
        /// Uploads the logs of finished tasks that are still on disk.
        UploadTaskLogs = "upload_task_logs",
        /// All blocking checks again.
        Recheck = "recheck",
        /// Stops the API.
        CloseApi = "close_api",
        /// Reruns, fails or holds what was open, before any scheduler starts.
        RerunPolicy = "rerun_policy",
        /// Starts scheduler, dag processor and triggerer; its own row moves.
        StartWriters = "start_writers",
        /// Starts the API on the primary.
        OpenApi = "open_api",
        /// Becomes a warm standby.
        WarmStandby = "warm_standby",
        /// The own scheduler row moves and one canary run ends.
        Verify = "verify",
        /// Closes the site because its lease ends; undone by a reopen.
        SelfClose = "self_close",
        /// Upkeep of a standby.
        Stand = "stand",
        /// Upkeep of the holder.
        Serve = "serve",
    }
);

/// Which act, of which plane; none for the quorum's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActName {
    /// An entry of the log.
    Quorum(QuorumAct),
    /// Of PostgreSQL.
    Postgres(PostgresAct),
    /// Of Kafka.
    Kafka(KafkaAct),
    /// Of S3.
    S3(S3Act),
    /// Of Airflow.
    Airflow(AirflowAct),
}

impl ActName {
    /// The plane that performs it.
    pub fn plane(self) -> Option<PlaneKind> {
        match self {
            Self::Quorum(_) => None,
            Self::Postgres(_) => Some(PlaneKind::Postgres),
            Self::Kafka(_) => Some(PlaneKind::Kafka),
            Self::S3(_) => Some(PlaneKind::S3),
            Self::Airflow(_) => Some(PlaneKind::Airflow),
        }
    }

    /// The act's word without its plane.
    pub fn word(self) -> &'static str {
        match self {
            Self::Quorum(act) => act.word(),
            Self::Postgres(act) => act.word(),
            Self::Kafka(act) => act.word(),
            Self::S3(act) => act.word(),
            Self::Airflow(act) => act.word(),
        }
    }
}

impl fmt::Display for ActName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plane = self.plane().map_or("quorum", PlaneKind::word);
        f.pad(&format!("{plane}.{}", self.word()))
    }
}

/// Whether a run goes to its target or back to where it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From source to target.
    Forward,
    /// Back to the source before `Opened`: the same run, `source` and `target` unchanged.
    Return,
}

/// One act at one site, with all it needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Act {
    /// What.
    pub name: ActName,
    /// Where.
    pub site: SiteId,
    /// In which group.
    pub group: GroupName,
    /// By which run; none for upkeep and self-fences.
    pub run: Option<RunId>,
    /// The site that held the group when the run was planned. For upkeep: the holder.
    pub source: SiteId,
    /// The site that shall hold it. For upkeep: the standby.
    pub target: SiteId,
    /// The epoch the run creates. For upkeep: the group's epoch.
    pub epoch: Epoch,
    /// Which way the run goes.
    pub direction: Direction,
    /// What earlier steps of the run, and the group's own record, brought.
    pub given: Vec<Outcome>,
}

macro_rules! given {
    ($(#[$doc:meta])* $name:ident, $variant:ident -> $type:ty) => {
        $(#[$doc])*
        pub fn $name(&self) -> Option<&$type> {
            self.given.iter().rev().find_map(|outcome| match outcome {
                Outcome::$variant(found) => Some(found),
                _ => None,
            })
        }
    };
}

impl Act {
    given!(
        /// The timelines set aside for this run.
        timelines, Timelines -> Timelines
    );
    given!(
        /// The last word of the stopped primary.
        shutdown, Shutdown -> ShutdownToken
    );
    given!(
        /// The grants as recorded in Raft.
        grants, Grants -> Vec<Grant>
    );
    given!(
        /// The newest release committed for the group.
        release, Release -> DagRelease
    );
    given!(
        /// Name of the connector that carries the current holder's topics.
        mirror, Mirror -> String
    );
    given!(
        /// Name of the stopped connector prepared for the way back.
        reverse, Reverse -> String
    );
    given!(
        /// End offsets of the fenced source.
        source_ends, SourceEnds -> Ends
    );
    given!(
        /// End offsets of the target once its mirror lost WRITE.
        target_ends, TargetEnds -> Ends
    );

    /// The site that writes once the act's run is over: the one to follow.
    pub fn new_holder(&self) -> &SiteId {
        match self.direction {
            Direction::Forward => &self.target,
            Direction::Return => &self.source,
        }
    }
}

/// A typed thing that a step found or made, kept in Raft for the steps after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The timeline a PostgreSQL instance is on.
    Timeline(u32),
    /// Set aside by the quorum.
    Timelines(Timelines),
    /// Of the stopped primary.
    Shutdown(ShutdownToken),
    /// Where the new timeline began, in the old one's positions.
    SwitchPoint(Lsn),
    /// Owned by the group from then on, until proved restored or granted at the new holder.
    Grants(Vec<Grant>),
    /// Connector that carries the holder's topics.
    Mirror(String),
    /// Connector prepared for the other direction.
    Reverse(String),
    /// Final end offsets at the source.
    SourceEnds(Ends),
    /// Final end offsets at the target.
    TargetEnds(Ends),
    /// Newest committed release.
    Release(DagRelease),
    /// A plane's final position: its part of the cut.
    Position(Position),
    /// Digest of something that must be equal at both sites; compared once both preflights answered.
    Fingerprint {
        /// Of which plane.
        plane: PlaneKind,
        /// Where it was taken.
        site: SiteId,
        /// Of what, as in `fernet key`.
        of: String,
        /// Tells equal from unequal and nothing more; never the secret itself.
        digest: String,
    },
    /// What was found wrong, or merely worth saying.
    Findings(Vec<Finding>),
}

/// A named diagnosis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Page of the error catalogue, as in `DC-0207`.
    pub code: String,
    /// Of which plane; none for the site or the quorum.
    pub plane: Option<PlaneKind>,
    /// Where.
    pub site: SiteId,
    /// Whether it forbids a move.
    pub blocking: bool,
    /// What and why, with number and limit.
    pub text: String,
}

/// Whether an act found its work already done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Nothing had to be done.
    Already,
    /// It was done now.
    Changed,
}

/// What an act did and what was seen afterwards; never merely that a call returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Already or changed.
    pub change: Change,
    /// One line for people and the audit: what proves it, with numbers. No secrets.
    pub seen: String,
    /// Typed things for later steps.
    pub outcomes: Vec<Outcome>,
}

impl Evidence {
    /// Evidence of work done now.
    pub fn changed(seen: impl Into<String>) -> Self {
        Self { change: Change::Changed, seen: seen.into(), outcomes: Vec::new() }
    }
    /// Evidence of work found done.
    pub fn already(seen: impl Into<String>) -> Self {
        Self { change: Change::Already, seen: seen.into(), outcomes: Vec::new() }
    }
    /// The same evidence carrying one more outcome.
    #[must_use]
    pub fn with(mut self, outcome: Outcome) -> Self {
        self.outcomes.push(outcome);
        self
    }
    /// Findings that forbid a move.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.outcomes
            .iter()
            .flat_map(|o| match o {
                Outcome::Findings(found) => found.as_slice(),
                _ => &[],
            })
            .filter(|f| f.blocking)
    }
}

/// Whether an act's work stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It has to be done.
    NotYet,
    /// It stands, and this shows it.
    Done(Evidence),
}
