//! A bench for tests: a registry, a log that counts, and hands that answer every intent.
//!
//! It proposes what a leader would and performs nothing. Tests, transcripts and the
//! simulation stand on it; the product never does. No feature hides it, for a feature
//! would have every room built twice.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::act::{
    Act, ActName, AirflowAct, Evidence, Finding, KafkaAct, Outcome, PostgresAct, QuorumAct, S3Act,
};
use crate::ids::{BadName, Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use crate::plan::{self, Plan, StepId};
use crate::position::{Ends, Grant, Lsn, Position, ShutdownToken};
use crate::registry::{Answer, Command, Entry, Group, Registry};
use crate::run::{Run, Step, Trouble};
use crate::spec::{AirflowSpec, GroupSpec, KafkaSpec, Policy, PostgresSpec, S3Spec, Span, TaskPolicy};
use crate::time::WallTime;

/// A spec of the group with the planes given, at rome (the founder) and fra.
///
/// Errors: a name that is not valid.
pub fn spec(name: &str, planes: &[PlaneKind]) -> Result<GroupSpec, BadName> {
    let has = |plane| planes.contains(&plane);
    Ok(GroupSpec {
        name: GroupName::new(name)?,
        sites: vec![SiteId::new("rome")?, SiteId::new("fra")?],
        postgres: has(PlaneKind::Postgres)
            .then(|| PostgresSpec { databases: vec![format!("{name}-app")], app_roles: vec!["app".into()] }),
        kafka: has(PlaneKind::Kafka).then(|| KafkaSpec {
            topics: vec![name.to_owned()],
            producers: vec!["app".into()],
            consumers: vec!["app".into()],
            groups: vec![format!("{name}-billing")],
            mirror: format!("{name}-rome-fra-0"),
        }),
        s3: has(PlaneKind::S3).then(|| S3Spec {
            bucket: name.to_owned(),
            dag_prefix: "dags".into(),
            log_prefix: "logs".into(),
            writers: vec!["app".into()],
        }),
        airflow: has(PlaneKind::Airflow).then_some(AirflowSpec {
            drain_limit: Span(Duration::from_mins(1)),
            default_policy: TaskPolicy::Rerun,
        }),
        policy: Policy::default(),
    })
}

/// The grant that the application has on a topic, before and after a move.
pub fn grant(topic: &str) -> Grant {
    Grant {
        principal: "User:app".into(),
        resource: "topic".into(),
        name: topic.into(),
        prefixed: false,
        operation: "write".into(),
        host: "*".into(),
    }
}

/// Evidence as a healthy plane would bring it for an act.
pub fn evidence(act: &Act) -> Evidence {
    let done = Evidence::changed(format!("scripted {} at {}", act.name, act.site));
    let token = ShutdownToken { system_id: 7, timeline: 1, checkpoint: Lsn(0x1000) };
    let ends: Ends = BTreeMap::from([(act.group.to_string(), BTreeMap::from([(0, 41)]))]);
    match act.name {
        ActName::Postgres(PostgresAct::Preflight) => done.with(Outcome::Timeline(1)),
        ActName::Postgres(PostgresAct::Stop) => done.with(Outcome::Shutdown(token)),
        ActName::Postgres(PostgresAct::Replayed) => {
            let token = act.shutdown().cloned().unwrap_or(token);
            let replayed = Lsn(token.checkpoint.0 + 0x70);
            done.with(Outcome::Position(Position::Postgres { token, replayed }))
        }
        ActName::Kafka(KafkaAct::PrepareReverse) => {
            let run = act.run.as_ref().map(ToString::to_string).unwrap_or_default();
            done.with(Outcome::Reverse(format!("{}-{run}", act.group)))
        }
        ActName::Kafka(KafkaAct::RecordGrants) => done.with(Outcome::Grants(vec![grant(act.group.as_str())])),
        ActName::Kafka(KafkaAct::Drain) => done.with(Outcome::SourceEnds(ends)),
        ActName::Kafka(KafkaAct::FenceMirror) => done.with(Outcome::TargetEnds(ends)),
        ActName::Kafka(KafkaAct::SetOffsets) => {
            let (source, target) = (act.source_ends().cloned(), act.target_ends().cloned());
            done.with(Outcome::Position(Position::Kafka {
                source: source.unwrap_or_default(),
                target: target.unwrap_or_default(),
            }))
        }
        ActName::Kafka(KafkaAct::StartReverse) => {
            let next = act.reverse().or(act.mirror()).cloned().unwrap_or_default();
            done.with(Outcome::Mirror(next))
        }
        ActName::S3(S3Act::LastPass) => {
            done.with(Outcome::Position(Position::S3 { release: act.release().cloned(), logs: 12 }))
        }
        ActName::Airflow(AirflowAct::CloseApi) => {
            done.with(Outcome::Position(Position::Airflow { open_tasks: 0 }))
        }
        _ => done,
    }
}

/// An intent that waits for its site.
#[derive(Debug, Clone)]
pub struct Intent {
    /// Of which run.
    pub run: RunId,
    /// Which step.
    pub step: StepId,
    /// Its token.
    pub token: Token,
    /// Whether it takes the act back.
    pub undo: bool,
    /// What is asked.
    pub act: Act,
}

/// What the hands answer instead of success, once each.
#[derive(Debug, Clone)]
pub enum Scripted {
    /// The act fails.
    Fails(Trouble),
    /// The act succeeds and finds this.
    Finds(Vec<Finding>),
    /// No answer ever comes; the intent stays until it is overdue.
    Silent,
}

/// A registry with scripted hands.
#[derive(Debug, Clone, Default)]
pub struct Bench {
    /// The replicated state.
    pub registry: Registry,
    /// Index of the last entry.
    pub at: u64,
    script: BTreeMap<(String, bool), VecDeque<Scripted>>,
    silent: Vec<Token>,
    runs: u64,
}

impl Bench {
    /// A bench with one group of those planes applied, held by rome.
    ///
    /// Errors: a name that is not valid.
    pub fn with(name: &str, planes: &[PlaneKind]) -> Result<Self, BadName> {
        let mut bench = Self::default();
        let spec = spec(name, planes)?;
        bench.propose(Entry::ApplyGroup { spec: Box::new(spec), over: 0 });
        Ok(bench)
    }

    /// Appends an entry and applies it.
    pub fn propose(&mut self, entry: Entry) -> Answer {
        self.at += 1;
        let command = Command { by: "operator/olga".into(), wall: WallTime(self.at * 100), entry };
        self.registry.apply(Token(self.at), &command)
    }

    /// Lets one act answer otherwise, once; `act` is as in `fra kafka.drain`.
    pub fn script(&mut self, act: &str, undo: bool, says: Scripted) {
        self.script.entry((act.to_owned(), undo)).or_default().push_back(says);
    }

    /// The group of that name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.registry.groups.iter().find(|(known, _)| known.as_str() == name).map(|(_, group)| group)
    }

    /// The run of that name.
    pub fn run(&self, id: &RunId) -> Option<&Run> {
        self.registry.runs.get(id)
    }

    /// Plans the move of a group and starts the run; its name, and what the registry said.
    ///
    /// Errors: a name that is not valid.
    pub fn start(&mut self, group: &str, to: &str) -> Result<(RunId, Answer), BadName> {
        let plan = self.plan(group, to)?;
        let hash = plan.map(|plan| plan.hash()).unwrap_or_default();
        self.start_planned(group, to, &hash)
    }

    /// The plan of a move; none where the planner refuses.
    ///
    /// Errors: a name that is not valid.
    pub fn plan(&self, group: &str, to: &str) -> Result<Option<Plan>, BadName> {
        Ok(plan::switchover(&self.registry, &GroupName::new(group)?, &SiteId::new(to)?).ok())
    }

    /// Starts a run by the hash of a plan that was shown earlier.
    ///
    /// Errors: a name that is not valid.
    pub fn start_planned(&mut self, group: &str, to: &str, hash: &str) -> Result<(RunId, Answer), BadName> {
        self.runs += 1;
        let run = RunId(format!("RUN{:04}", self.runs));
        let answer = self.propose(Entry::Start {
            run: run.clone(),
            group: GroupName::new(group)?,
            to: SiteId::new(to)?,
            plan_hash: hash.to_owned(),
            reason: "test".into(),
        });
        Ok((run, answer))
    }

    /// Intents that nobody has answered, in the order of their steps.
    pub fn intents(&self) -> Vec<Intent> {
        let mut found = Vec::new();
        for run in self.registry.open_runs() {
            let Some(group) = self.registry.groups.get(&run.group) else { continue };
            for step in &run.steps {
                if let (Some((token, undo)), Some(act)) = (step.intent(), run.act(step, group)) {
                    found.push(Intent { run: run.id.clone(), step: step.plan.id, token, undo, act });
                }
            }
        }
        found
    }

    /// Answers an intent.
    pub fn answer(&mut self, intent: &Intent, result: Result<Evidence, Trouble>) -> Answer {
        self.propose(Entry::Finish {
            run: intent.run.clone(),
            step: intent.step,
            token: intent.token,
            took_ms: 10,
            result,
        })
    }

    /// One thing happens: an intent is answered as scripted, or the leader proposes what is due.
    ///
    /// Returns whether anything was left to do.
    pub fn step(&mut self) -> bool {
        let waiting = self.intents().into_iter().find(|i| !self.silent.contains(&i.token));
        if let Some(intent) = waiting {
            let key = (format!("{} {}", intent.act.site, intent.act.name), intent.undo);
            let says = self.script.get_mut(&key).and_then(VecDeque::pop_front);
            match says {
                None => self.answer(&intent, Ok(evidence(&intent.act))),
                Some(Scripted::Fails(trouble)) => self.answer(&intent, Err(trouble)),
                Some(Scripted::Finds(found)) => {
                    let found = evidence(&intent.act).with(Outcome::Findings(found));
                    self.answer(&intent, Ok(found))
                }
                Some(Scripted::Silent) => {
                    self.silent.push(intent.token);
                    Answer::Done
                }
            };
            return true;
        }
        match self.due() {
            Some(entry) => self.propose(entry) == Answer::Done,
            None => false,
        }
    }

    /// What a leader would propose now.
    pub fn due(&self) -> Option<Entry> {
        let found = self.registry.open_runs().find_map(|run| Some((run, run.due()?)))?;
        let (run, due) = found;
        let before: Epoch = self.registry.groups.get(&run.group)?.epoch;
        match due {
            QuorumAct::Takeover => {
                Some(Entry::Takeover { run: run.id.clone(), epoch: before.next(), cut: run.cut() })
            }
            QuorumAct::Opened => Some(Entry::Opened { run: run.id.clone(), epoch: before }),
            QuorumAct::ReserveTimelines => None,
        }
    }

    /// Says that no answer came to every intent whose site is silent.
    pub fn overdue(&mut self) {
        for intent in self.intents() {
            if self.silent.contains(&intent.token) {
                self.propose(Entry::Overdue { run: intent.run, step: intent.step, token: intent.token });
            }
        }
    }

    /// Goes on until nothing is left to do, or `enough` says so.
    pub fn until(&mut self, mut enough: impl FnMut(&Self) -> bool) {
        while !enough(self) && self.step() {}
    }

    /// Goes on until nothing is left to do.
    pub fn finish(&mut self) {
        self.until(|_| false);
    }

    /// The step of a run that performs an act, as in `fra kafka.drain`; `quorum.opened` for entries.
    pub fn find<'a>(&self, run: &'a Run, act: &str) -> Option<&'a Step> {
        run.steps.iter().find(|s| {
            let site = s.plan.site.as_ref().map(|site| format!("{site} ")).unwrap_or_default();
            format!("{site}{}", s.plan.act) == act
        })
    }
}
