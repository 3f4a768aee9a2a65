//! The plan of a planned move, and what follows its takeover in either direction.

use std::time::Duration;

use super::{Effect, Plan, PlannedStep, Stage, StepId};
use crate::act::{ActName, AirflowAct, Direction, KafkaAct, PostgresAct, QuorumAct, S3Act};
use crate::codes::Code;
use crate::fail::Fail;
use crate::ids::{GroupName, PlaneKind, SiteId};
use crate::registry::{Group, Registry};
use crate::spec::GroupSpec;
use crate::time::millis;

const SECOND: Duration = Duration::from_secs(1);

/// Plans the move of a group to another site. Pure: the same registry gives the same plan.
///
/// Errors: a refusal that names its rule, for an unknown group or an impossible target.
pub fn switchover(registry: &Registry, name: &GroupName, to: &SiteId) -> Result<Plan, Fail> {
    let what = || format!("switchover of {name} to {to} refused");
    let Some(group) = registry.groups.get(name) else {
        let known: Vec<_> = registry.groups.keys().map(GroupName::as_str).collect();
        let why = if known.is_empty() {
            "no group was applied yet".into()
        } else {
            format!("known: {}", known.join(", "))
        };
        return Err(Fail::refused(Code::UNKNOWN_GROUP, what(), format!("there is no group {name}; {why}"))
            .next("dc-switch status"));
    };
    if *to == group.holder {
        return Err(Fail::refused(
            Code::BAD_TARGET,
            what(),
            format!("{to} already holds {name} (epoch {})", group.epoch),
        )
        .next("dc-switch status"));
    }
    if !group.spec.sites.contains(to) {
        let sites: Vec<_> = group.spec.sites.iter().map(SiteId::as_str).collect();
        return Err(Fail::refused(
            Code::BAD_TARGET,
            what(),
            format!("{to} is not a site of {name} ({})", sites.join(", ")),
        )
        .next(format!("dc-switch group show {name}")));
    }
    let steps = Draft::new(group, to, Direction::Forward).whole();
    Ok(Plan {
        group: name.clone(),
        source: group.holder.clone(),
        target: to.clone(),
        epoch: group.epoch,
        spec_version: group.spec_version,
        steps,
    })
}

/// The steps from the promotion on, once a run's direction is decided after its takeover.
///
/// `winner` is the site that holds the group by then. Numbers go on from `first`.
pub fn after_takeover(
    group: &Group,
    winner: &SiteId,
    direction: Direction,
    first: StepId,
) -> Vec<PlannedStep> {
    let mut draft = Draft::new(group, winner, direction);
    draft.next = first;
    draft.rest(&[]);
    draft.steps
}

/// A plan in the making.
struct Draft<'a> {
    spec: &'a GroupSpec,
    /// The site that is left.
    from: SiteId,
    /// The site that serves in the end.
    to: SiteId,
    direction: Direction,
    next: StepId,
    steps: Vec<PlannedStep>,
}

type Ids = Vec<StepId>;

impl<'a> Draft<'a> {
    fn new(group: &'a Group, to: &SiteId, direction: Direction) -> Self {
        let from = group.spec.other(to).cloned().unwrap_or_else(|| group.holder.clone());
        Self { spec: &group.spec, from, to: to.clone(), direction, next: 1, steps: Vec::new() }
    }

    fn has(&self, plane: PlaneKind) -> bool {
        self.spec.has(plane)
    }

    /// Adds a step; a plane that the group lacks adds none.
    fn add(&mut self, stage: Stage, act: ActName, site: Option<&SiteId>, after: &[&[StepId]]) -> Ids {
        if act.plane().is_some_and(|plane| !self.has(plane)) {
            return Vec::new();
        }
        let mut needs: Ids = after.iter().flat_map(|ids| ids.iter().copied()).collect();
        needs.sort_unstable();
        needs.dedup();
        let traits = self.traits(act);
        let id = self.next;
        self.next += 1;
        self.steps.push(PlannedStep {
            id,
            act,
            site: site.cloned(),
            after: needs,
            stage,
            effect: traits.effect,
            undo: traits.undo && stage < Stage::Takeover,
            deadline_ms: millis(traits.deadline),
            attempts: if stage >= Stage::Promote { 5 } else { traits.attempts },
        });
        vec![id]
    }

    fn whole(mut self) -> Vec<PlannedStep> {
        let read = self.preflight();
        let ready = self.prepare(&read);
        let drained = self.fence_and_drain(&ready);
        let taken = self.add(Stage::Takeover, ActName::Quorum(QuorumAct::Takeover), None, &[&drained]);
        self.rest(&taken);
        self.steps
    }

    fn preflight(&mut self) -> Ids {
        let (from, to) = (self.from.clone(), self.to.clone());
        let mut read = Ids::new();
        for act in [
            ActName::Postgres(PostgresAct::Preflight),
            ActName::Kafka(KafkaAct::Preflight),
            ActName::S3(S3Act::Preflight),
            ActName::Airflow(AirflowAct::Preflight),
        ] {
            for site in [&from, &to] {
                read.extend(self.add(Stage::Preflight, act, Some(site), &[]));
            }
        }
        if self.has(PlaneKind::Postgres) {
            let all = read.clone();
            read = self.add(Stage::Preflight, ActName::Quorum(QuorumAct::ReserveTimelines), None, &[&all]);
        }
        read
    }

    /// Everything that is slow and can be done while writers live; Airflow is gone at its end.
    fn prepare(&mut self, read: &Ids) -> Ids {
        use Stage::Prepare;
        let (from, to) = (self.from.clone(), self.to.clone());
        let (s, t) = (Some(&from), Some(&to));
        let mut slow = self.add(Prepare, ActName::Postgres(PostgresAct::Checkpoint), s, &[read]);
        slow.extend(self.add(Prepare, ActName::Postgres(PostgresAct::Checkpoint), t, &[read]));
        let reverse = self.add(Prepare, ActName::Kafka(KafkaAct::PrepareReverse), s, &[read]);
        slow.extend(self.add(Prepare, ActName::Kafka(KafkaAct::RecordGrants), s, &[read, &reverse]));
        slow.extend(self.add(Prepare, ActName::S3(S3Act::CatchUp), t, &[read]));
        slow.extend(self.add(Prepare, ActName::Airflow(AirflowAct::WarmApi), t, &[read]));
        let quiet = self.add(Prepare, ActName::Airflow(AirflowAct::Quiesce), s, &[read, &slow]);
        let gone = self.add(Prepare, ActName::Airflow(AirflowAct::ProveGone), s, &[&quiet]);
        let logs = self.add(Prepare, ActName::Airflow(AirflowAct::UploadTaskLogs), s, &[&gone]);
        let closed = self.add(Prepare, ActName::Airflow(AirflowAct::CloseApi), s, &[&logs]);
        let mut again = Ids::new();
        for act in [
            ActName::Postgres(PostgresAct::Recheck),
            ActName::Kafka(KafkaAct::Recheck),
            ActName::S3(S3Act::Recheck),
            ActName::Airflow(AirflowAct::Recheck),
        ] {
            for site in [&from, &to] {
                again.extend(self.add(Prepare, act, Some(site), &[&slow, &closed]));
            }
        }
        again
    }

    /// Writers are shut out plane by plane, so that each is out for as short as can be.
    ///
    /// PostgreSQL comes last: nothing but its own stop, replay and promotion lies in its
    /// outage. The standby's own sessions end before anybody waits.
    fn fence_and_drain(&mut self, ready: &Ids) -> Ids {
        use Stage::{Drain, Fence};
        let (from, to) = (self.from.clone(), self.to.clone());
        let (s, t) = (Some(&from), Some(&to));
        let shut = self.add(Fence, ActName::Postgres(PostgresAct::FenceClients), t, &[ready]);
        let first = if shut.is_empty() { ready.clone() } else { shut };
        let denied = self.add(Fence, ActName::S3(S3Act::FenceWriters), s, &[&first]);
        let pulled = self.add(Drain, ActName::S3(S3Act::LastPass), t, &[&denied, &first]);
        let fenced = self.add(Fence, ActName::Kafka(KafkaAct::FenceApps), s, &[&first]);
        let mirrored = self.add(Drain, ActName::Kafka(KafkaAct::Drain), t, &[&fenced, &first]);
        let mirror = self.add(Drain, ActName::Kafka(KafkaAct::FenceMirror), t, &[&mirrored]);
        let set = self.add(Drain, ActName::Kafka(KafkaAct::SetOffsets), t, &[&mirror]);
        let sync = self.add(Fence, ActName::Postgres(PostgresAct::PreSync), s, &[&first]);
        let out =
            self.add(Fence, ActName::Postgres(PostgresAct::FenceClients), s, &[&sync, &mirrored, &denied]);
        let stopped = self.add(Drain, ActName::Postgres(PostgresAct::Stop), s, &[&out]);
        let replayed = self.add(Drain, ActName::Postgres(PostgresAct::Replayed), t, &[&stopped, &first]);
        let mut drained = ready.clone();
        for ids in [pulled, set, replayed] {
            drained.extend(ids);
        }
        drained
    }

    /// From the promotion on: the same for a move, and for its return.
    fn rest(&mut self, taken: &[StepId]) {
        use Stage::{Open, Promote};
        let to = self.to.clone();
        let t = Some(&to);
        let promoted = self.add(Promote, ActName::Postgres(PostgresAct::Promote), t, &[taken]);
        let opened = self.add(Promote, ActName::Quorum(QuorumAct::Opened), None, &[taken, &promoted]);
        let postgres = self.add(Open, ActName::Postgres(PostgresAct::Open), t, &[&opened]);
        let kafka = self.add(Open, ActName::Kafka(KafkaAct::GrantApps), t, &[&opened]);
        let objects = self.add(Open, ActName::S3(S3Act::OpenWriters), t, &[&opened]);
        let api = self.add(Open, ActName::Airflow(AirflowAct::OpenApi), t, &[&postgres, &objects]);
        let policy = self.add(Open, ActName::Airflow(AirflowAct::RerunPolicy), t, &[&api]);
        let airflow = self.add(Open, ActName::Airflow(AirflowAct::StartWriters), t, &[&policy]);
        self.reverse(&postgres, &kafka, &objects, &airflow);
    }

    /// The site that was left becomes the standby, while the new one already serves.
    fn reverse(&mut self, postgres: &Ids, kafka: &Ids, objects: &Ids, airflow: &Ids) {
        use Stage::{Reverse, Verify};
        let (from, to) = (self.from.clone(), self.to.clone());
        let (s, t) = (Some(&from), Some(&to));
        let follows = self.add(Reverse, ActName::Postgres(PostgresAct::Follow), s, &[postgres]);
        // On a return the forward connector simply goes on: start_reverse restores its grant.
        let stopped = match self.direction {
            Direction::Forward => self.add(Reverse, ActName::Kafka(KafkaAct::StopForward), t, &[kafka]),
            Direction::Return => kafka.clone(),
        };
        let mirrors = self.add(Reverse, ActName::Kafka(KafkaAct::StartReverse), s, &[kafka, &stopped]);
        let late = self.add(Reverse, ActName::S3(S3Act::LatePass), t, &[objects]);
        let pulls = self.add(Reverse, ActName::S3(S3Act::PullReverse), s, &[&late]);
        self.add(Reverse, ActName::Airflow(AirflowAct::WarmStandby), s, &[&follows, &pulls, airflow]);
        self.add(Verify, ActName::Postgres(PostgresAct::Verify), t, &[&follows, postgres]);
        self.add(Verify, ActName::Kafka(KafkaAct::Verify), t, &[&mirrors, &stopped]);
        self.add(Verify, ActName::S3(S3Act::Verify), t, &[&pulls]);
        self.add(Verify, ActName::Airflow(AirflowAct::Verify), t, &[airflow]);
    }

    fn traits(&self, act: ActName) -> Traits {
        let limit = self.spec.policy.drain_limit.0;
        let tasks = self.spec.airflow.as_ref().map_or(Duration::ZERO, |a| a.drain_limit.0);
        match act {
            ActName::Quorum(_) => Traits::reads(10 * SECOND),
            ActName::Postgres(act) => postgres(act, limit, self.spec.policy.stop_limit.0),
            ActName::Kafka(act) => kafka(act, limit),
            ActName::S3(act) => s3(act, limit),
            ActName::Airflow(act) => airflow(act, tasks),
        }
    }
}

/// What is true of an act wherever it stands in a plan.
struct Traits {
    effect: Effect,
    undo: bool,
    deadline: Duration,
    attempts: u32,
}

impl Traits {
    fn reads(deadline: Duration) -> Self {
        Self { effect: Effect::Neither, undo: false, deadline, attempts: 1 }
    }
    fn fences(deadline: Duration) -> Self {
        Self { effect: Effect::Fences, undo: true, deadline, attempts: 1 }
    }
    fn opens(deadline: Duration) -> Self {
        Self { effect: Effect::Opens, undo: false, deadline, attempts: 5 }
    }
    fn tried(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }
    fn undone(mut self) -> Self {
        self.undo = true;
        self
    }
}

fn postgres(act: PostgresAct, limit: Duration, stop: Duration) -> Traits {
    match act {
        PostgresAct::Checkpoint => Traits::reads(120 * SECOND).undone(),
        PostgresAct::FenceClients => Traits::fences(10 * SECOND),
        PostgresAct::PreSync => Traits::reads(10 * SECOND).undone(),
        PostgresAct::Stop => Traits::fences(stop + 2 * SECOND),
        PostgresAct::Replayed => Traits::reads(limit),
        PostgresAct::Promote => Traits::reads(20 * SECOND),
        PostgresAct::Open => Traits::opens(10 * SECOND),
        PostgresAct::Follow => Traits::reads(180 * SECOND),
        PostgresAct::Verify => Traits::reads(60 * SECOND),
        _ => Traits::reads(15 * SECOND),
    }
}

fn kafka(act: KafkaAct, limit: Duration) -> Traits {
    match act {
        KafkaAct::PrepareReverse => Traits::reads(60 * SECOND).undone().tried(2),
        KafkaAct::FenceApps | KafkaAct::FenceMirror => Traits::fences(10 * SECOND),
        KafkaAct::Drain | KafkaAct::SetOffsets => Traits::reads(limit),
        KafkaAct::GrantApps => Traits::opens(10 * SECOND),
        KafkaAct::StopForward | KafkaAct::StartReverse | KafkaAct::Verify => Traits::reads(90 * SECOND),
        _ => Traits::reads(20 * SECOND),
    }
}

fn s3(act: S3Act, limit: Duration) -> Traits {
    match act {
        S3Act::CatchUp => Traits::reads(300 * SECOND).tried(2),
        S3Act::FenceWriters => Traits::fences(10 * SECOND),
        S3Act::LastPass => Traits::reads(limit),
        S3Act::OpenWriters => Traits::opens(10 * SECOND),
        S3Act::LatePass | S3Act::PullReverse | S3Act::Verify => Traits::reads(120 * SECOND),
        _ => Traits::reads(20 * SECOND),
    }
}

fn airflow(act: AirflowAct, tasks: Duration) -> Traits {
    match act {
        AirflowAct::WarmApi | AirflowAct::WarmStandby => Traits::reads(120 * SECOND).tried(2),
        AirflowAct::Quiesce => Traits::fences(tasks + 15 * SECOND),
        AirflowAct::UploadTaskLogs => Traits::reads(120 * SECOND),
        AirflowAct::ProveGone | AirflowAct::CloseApi => Traits::fences(30 * SECOND),
        AirflowAct::StartWriters => Traits::opens(90 * SECOND),
        AirflowAct::OpenApi => Traits::opens(60 * SECOND),
        AirflowAct::RerunPolicy => Traits::reads(60 * SECOND),
        AirflowAct::Verify => Traits::reads(180 * SECOND),
        _ => Traits::reads(30 * SECOND),
    }
}
