//! What this site has to do now: a pure function of the applied state and its own lease.
//!
//! Shared by the running agent and the simulation, so that what is attacked there is
//! what runs here.

use std::time::Duration;

use dc_core::act::{Act, ActName, AirflowAct, Direction, KafkaAct, Outcome, PostgresAct, S3Act};
use dc_core::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use dc_core::plan::{Effect, StepId};
use dc_core::registry::{Group, Registry};

/// A committed intent that this site has to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// Of which run.
    pub run: RunId,
    /// Which step.
    pub step: StepId,
    /// Of the intent.
    pub token: Token,
    /// Whether it takes the step back.
    pub undo: bool,
    /// Whether it lets writers in, and so needs the lease.
    pub opens: bool,
    /// The act with all that it is given.
    pub act: Act,
    /// How long one attempt may take.
    pub limit: Duration,
}

/// Every intent of the applied state that is this site's.
pub fn intents(registry: &Registry, me: &SiteId) -> Vec<Intent> {
    let mut found = Vec::new();
    for run in registry.open_runs() {
        let Some(group) = registry.groups.get(&run.group) else { continue };
        for step in run.steps.iter().filter(|s| s.plan.site.as_ref() == Some(me)) {
            let Some((token, undo)) = step.intent() else { continue };
            let Some(act) = run.act(step, group) else { continue };
            // Taking a fence back lets writers in at the source alone; the target never had any.
            let opens = if undo {
                step.plan.effect == Effect::Fences && *me == run.source
            } else {
                step.plan.effect == Effect::Opens
            };
            found.push(Intent {
                run: run.id.clone(),
                step: step.plan.id,
                token,
                undo,
                opens,
                act,
                limit: step.plan.deadline(),
            });
        }
    }
    found
}

/// Whether an opening intent may be performed now: the lease runs and the group is this site's.
pub fn may_open(registry: &Registry, intent: &Intent, me: &SiteId, lease: Option<Duration>) -> bool {
    let Some(group) = registry.groups.get(&intent.act.group) else { return false };
    let epoch =
        registry.runs.get(&intent.run).map(|run| if intent.undo { run.epoch_before } else { run.epoch });
    let opened = group.opened || intent.undo;
    lease.is_some() && group.holder == *me && opened && Some(group.epoch) == epoch
}

/// What upkeep a plane needs between runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upkeep {
    /// Keep it a standby of the holder.
    Stand,
    /// Keep it serving, in this epoch.
    Serve(Epoch),
    /// Close it: the lease ends.
    Close,
    /// Leave it to the run that has it.
    Leave,
}

/// What upkeep a plane of a group needs at this site.
///
/// `lease` is what is left to this process; `closing` whether the site has to close: the lead before the lease's end
/// is reached, also of one that the process before this one had.
pub fn upkeep(
    registry: &Registry,
    name: &GroupName,
    plane: PlaneKind,
    me: &SiteId,
    lease: Option<Duration>,
    closing: bool,
) -> Upkeep {
    let Some(group) = registry.groups.get(name) else { return Upkeep::Leave };
    if group.holder != *me {
        // Until its takeover a run needs the target to keep up; afterwards the old site is in its hands.
        let run = group.run.as_ref().and_then(|id| registry.runs.get(id));
        let going = run.is_none_or(|run| run.taken.is_none() && run.aborting.is_none());
        return if going && untouched(registry, group, plane, me) { Upkeep::Stand } else { Upkeep::Leave };
    }
    if closing {
        return if fenced(registry, group, plane, me) { Upkeep::Leave } else { Upkeep::Close };
    }
    if lease.is_none() {
        // The lease of the process before this one still runs: nothing has to close, nothing may be opened.
        return Upkeep::Leave;
    }
    match registry.may_serve(name, me, plane) {
        Ok(epoch) if group.run.as_ref().is_none_or(|_| untouched(registry, group, plane, me)) => {
            Upkeep::Serve(epoch)
        }
        _ => Upkeep::Leave,
    }
}

/// Whether a run's fence of this plane stands here and was proved: then nothing is left to close.
fn fenced(registry: &Registry, group: &Group, plane: PlaneKind, me: &SiteId) -> bool {
    group.fences.iter().filter(|f| f.plane == plane && f.site == *me).any(|fence| {
        let step = registry.runs.get(&fence.run).and_then(|run| run.step(fence.step));
        step.is_some_and(dc_core::run::Step::done)
    })
}

/// Whether the open run has neither an intent under way nor a fence on this plane here.
fn untouched(registry: &Registry, group: &Group, plane: PlaneKind, me: &SiteId) -> bool {
    let Some(run) = group.run.as_ref().and_then(|id| registry.runs.get(id)) else { return true };
    let fenced = group.fences.iter().any(|f| f.run == run.id && f.plane == plane && f.site == *me);
    !fenced
        && !run.steps.iter().any(|s| {
            s.plan.site.as_ref() == Some(me) && s.plan.act.plane() == Some(plane) && s.intent().is_some()
        })
}

/// Upkeep as an act.
pub fn upkeep_act(
    group: &Group,
    name: &GroupName,
    plane: PlaneKind,
    me: &SiteId,
    upkeep: Upkeep,
) -> Option<Act> {
    let act = match upkeep {
        Upkeep::Leave => return None,
        Upkeep::Stand => match plane {
            PlaneKind::Postgres => ActName::Postgres(PostgresAct::Stand),
            PlaneKind::Kafka => ActName::Kafka(KafkaAct::Stand),
            PlaneKind::S3 => ActName::S3(S3Act::Stand),
            PlaneKind::Airflow => ActName::Airflow(AirflowAct::Stand),
        },
        Upkeep::Serve(_) => match plane {
            PlaneKind::Postgres => ActName::Postgres(PostgresAct::Serve),
            PlaneKind::Kafka => ActName::Kafka(KafkaAct::Serve),
            PlaneKind::S3 => ActName::S3(S3Act::Serve),
            PlaneKind::Airflow => ActName::Airflow(AirflowAct::Serve),
        },
        Upkeep::Close => match plane {
            PlaneKind::Postgres => ActName::Postgres(PostgresAct::SelfClose),
            PlaneKind::Kafka => ActName::Kafka(KafkaAct::SelfClose),
            PlaneKind::S3 => ActName::S3(S3Act::SelfClose),
            PlaneKind::Airflow => ActName::Airflow(AirflowAct::SelfClose),
        },
    };
    let mut given = Vec::new();
    given.extend(group.mirror.clone().map(Outcome::Mirror));
    given.extend(group.release.clone().map(Outcome::Release));
    given.extend(group.grants.as_ref().filter(|g| !g.settled).map(|g| Outcome::Grants(g.grants.clone())));
    let standby = group.spec.other(&group.holder).cloned().unwrap_or_else(|| group.holder.clone());
    Some(Act {
        name: act,
        site: me.clone(),
        group: name.clone(),
        run: None,
        source: group.holder.clone(),
        target: standby,
        epoch: group.epoch,
        direction: Direction::Forward,
        given,
    })
}

/// The preflight of a plane outside any run: what a plan shows before anything is begun.
pub fn preflight_act(
    registry: &Registry,
    group: &GroupName,
    to: &SiteId,
    site: &SiteId,
    plane: PlaneKind,
) -> Option<Act> {
    let known = registry.groups.get(group)?;
    let mut act = upkeep_act(known, group, plane, site, Upkeep::Stand)?;
    act.name = match plane {
        PlaneKind::Postgres => ActName::Postgres(PostgresAct::Preflight),
        PlaneKind::Kafka => ActName::Kafka(KafkaAct::Preflight),
        PlaneKind::S3 => ActName::S3(S3Act::Preflight),
        PlaneKind::Airflow => ActName::Airflow(AirflowAct::Preflight),
    };
    act.target = to.clone();
    act.epoch = known.epoch.next();
    Some(act)
}

/// Whether an act only reads, so that anyone may ask for it outside a run.
pub fn only_reads(act: ActName) -> bool {
    matches!(
        act,
        ActName::Postgres(PostgresAct::Preflight)
            | ActName::Kafka(KafkaAct::Preflight)
            | ActName::S3(S3Act::Preflight)
            | ActName::Airflow(AirflowAct::Preflight)
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

    use dc_core::ids::Token;
    use dc_core::registry::{Command, Entry};
    use dc_core::spec::GroupSpec;
    use dc_core::time::WallTime;

    use super::*;

    const LEFT: Option<Duration> = Some(Duration::from_secs(8));

    /// What rome, the founding holder, has to do for its database.
    fn rome(lease: Option<Duration>, closing: bool) -> Upkeep {
        let spec: GroupSpec = serde_json::from_value(serde_json::json!({
            "name": "orders", "sites": ["rome", "fra"],
            "postgres": {"databases": ["app"], "app_roles": ["app"]},
        }))
        .unwrap();
        let name = spec.name.clone();
        let mut registry = Registry::default();
        let entry = Entry::ApplyGroup { spec: Box::new(spec), over: 0 };
        let command = Command { by: "operator/a".into(), wall: WallTime(0), entry };
        let _ = registry.apply(Token(1), &command);
        let site = SiteId::new("rome").unwrap();
        upkeep(&registry, &name, PlaneKind::Postgres, &site, lease, closing)
    }

    #[test]
    fn closes_nothing_while_the_lease_of_the_process_before_runs_on() {
        assert_eq!(rome(None, false), Upkeep::Leave, "it may not open yet, and need not close");
    }

    #[test]
    fn serves_with_a_lease_and_closes_before_its_end() {
        assert!(matches!(rome(LEFT, false), Upkeep::Serve(_)));
        assert_eq!(rome(LEFT, true), Upkeep::Close);
        assert_eq!(rome(None, true), Upkeep::Close);
    }
}
