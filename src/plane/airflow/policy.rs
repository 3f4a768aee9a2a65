//! What becomes of tasks that were held when their scheduler went, decided before the next one starts.
//!
//! A scheduler that starts resets every task of a dead one and runs it again, unasked, even with
//! no retries. So each is looked at first: a DAG's tag `dr:rerun`, `dr:fail` or `dr:hold` wins
//! over the group's default.

use std::collections::{BTreeMap, BTreeSet};

use dc_core::spec::TaskPolicy;
use dc_plane::{Deadline, PlaneError};
use serde::{Deserialize, Serialize};

use crate::rest::{Api, Dag, Instance};

/// What is to be done with what is held.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Verdict {
    /// The scheduler will run these again.
    pub(crate) rerun: Vec<Instance>,
    /// To be marked failed.
    pub(crate) fail: Vec<Instance>,
    /// These wait for a person.
    pub(crate) held: Vec<Instance>,
    /// DAGs to be paused for it.
    pub(crate) pause: BTreeSet<String>,
}

/// What was done, kept on disk: by it a repeated act knows that a scheduler may have run since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Done {
    /// One line with numbers.
    pub(crate) seen: String,
}

/// The policy of a DAG.
fn of(dag: Option<&Dag>, default: TaskPolicy) -> TaskPolicy {
    let named = |tag: &str| match tag {
        "dr:rerun" => Some(TaskPolicy::Rerun),
        "dr:fail" => Some(TaskPolicy::Fail),
        "dr:hold" => Some(TaskPolicy::Hold),
        _ => None,
    };
    let mut said: Vec<TaskPolicy> =
        dag.iter().flat_map(|dag| &dag.tags).filter_map(|tag| named(&tag.name)).collect();
    // of two tags that contradict each other, the one that runs less
    said.sort_by_key(|policy| match policy {
        TaskPolicy::Hold => 0,
        TaskPolicy::Fail => 1,
        TaskPolicy::Rerun => 2,
    });
    said.first().copied().unwrap_or(default)
}

/// Decides. A queued task has not begun, as everything its site committed is here: it simply runs.
pub(crate) fn decide(tasks: Vec<Instance>, dags: &BTreeMap<String, Dag>, default: TaskPolicy) -> Verdict {
    let mut verdict = Verdict::default();
    for task in tasks {
        let began = task.state.as_deref() != Some("queued");
        match of(dags.get(&task.dag_id), default) {
            TaskPolicy::Fail if began => verdict.fail.push(task),
            TaskPolicy::Hold if began => {
                verdict.pause.insert(task.dag_id.clone());
                verdict.held.push(task);
            }
            _ => verdict.rerun.push(task),
        }
    }
    verdict
}

async fn look(
    api: &Api,
    default: TaskPolicy,
    until: Deadline,
) -> Result<(Verdict, BTreeMap<String, Dag>), PlaneError> {
    let tasks = api.held(until).await?;
    let mut dags = BTreeMap::new();
    for id in tasks.iter().map(|task| &task.dag_id).collect::<BTreeSet<_>>() {
        if let Some(dag) = api.dag(id, until).await? {
            dags.insert(id.clone(), dag);
        }
    }
    Ok((decide(tasks, &dags, default), dags))
}

/// Applies the policy through the API and looks again.
///
/// Repeat: safe as long as no scheduler runs. Errors: `Failed` when a task to be failed is still held afterwards.
pub(crate) async fn apply(api: &Api, default: TaskPolicy, until: Deadline) -> Result<Done, PlaneError> {
    let (verdict, dags) = look(api, default, until).await?;
    // pausing first: a DAG that waits for a person must not be found running by anybody
    for dag in verdict.pause.iter().filter(|id| dags.get(*id).is_some_and(|dag| !dag.is_paused)) {
        api.pause(dag, until).await?;
    }
    for task in &verdict.fail {
        api.fail(task, "was running when its scheduler went; failed by policy dr:fail", until).await?;
    }
    let (after, dags) = look(api, default, until).await?;
    let awake = after.pause.iter().find(|id| dags.get(*id).is_some_and(|dag| !dag.is_paused));
    if let Some(task) = after.fail.first() {
        return Err(PlaneError::Failed {
            what: "fail tasks by policy".into(),
            why: format!("{} is still held", task.shown()),
        });
    }
    if let Some(dag) = awake {
        return Err(PlaneError::Failed {
            what: "hold tasks by policy".into(),
            why: format!("{dag} is not paused"),
        });
    }
    Ok(Done { seen: told(&verdict) })
}

fn told(verdict: &Verdict) -> String {
    let count = verdict.rerun.len() + verdict.fail.len() + verdict.held.len();
    let mut text = format!(
        "{count} tasks were open: {} to run, {} failed, {} held",
        verdict.rerun.len(),
        verdict.fail.len(),
        verdict.held.len()
    );
    let named: Vec<String> = verdict.fail.iter().chain(&verdict.held).take(5).map(Instance::shown).collect();
    if !named.is_empty() {
        text.push_str(" (");
        text.push_str(&named.join(", "));
        text.push(')');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::Tag;

    fn task(dag: &str, state: &str) -> Instance {
        Instance {
            dag_id: dag.into(),
            dag_run_id: "r".into(),
            task_id: "t".into(),
            map_index: -1,
            state: Some(state.into()),
            try_number: 1,
        }
    }

    fn tagged(tags: &[&str]) -> Dag {
        Dag { is_paused: false, tags: tags.iter().map(|name| Tag { name: (*name).to_owned() }).collect() }
    }

    #[test]
    fn the_tag_wins_over_the_default_and_the_careful_tag_over_the_other() {
        let dags = BTreeMap::from([
            ("a".to_owned(), tagged(&["dr:fail"])),
            ("b".to_owned(), tagged(&["team:x", "dr:hold"])),
            ("c".to_owned(), tagged(&["dr:rerun", "dr:hold"])),
            ("d".to_owned(), tagged(&[])),
        ]);
        let tasks = ["a", "b", "c", "d", "unknown"].map(|dag| task(dag, "running")).to_vec();
        let verdict = decide(tasks, &dags, TaskPolicy::Rerun);
        assert_eq!(verdict.fail, [task("a", "running")]);
        assert_eq!(verdict.held, [task("b", "running"), task("c", "running")]);
        assert_eq!(verdict.rerun, [task("d", "running"), task("unknown", "running")]);
        assert_eq!(verdict.pause, BTreeSet::from(["b".to_owned(), "c".to_owned()]));
    }

    #[test]
    fn a_task_that_never_began_runs_whatever_its_policy() {
        let dags = BTreeMap::from([("a".to_owned(), tagged(&["dr:fail"]))]);
        let verdict = decide(vec![task("a", "queued"), task("b", "queued")], &dags, TaskPolicy::Hold);
        assert_eq!((verdict.rerun.len(), verdict.fail.len(), verdict.held.len()), (2, 0, 0));
    }

    #[test]
    fn the_default_holds_for_dags_that_say_nothing() {
        let verdict = decide(vec![task("a", "restarting")], &BTreeMap::new(), TaskPolicy::Fail);
        assert_eq!(verdict.fail.len(), 1);
    }
}
