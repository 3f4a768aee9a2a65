//! What a run may come to after something died in it, and what the death met: read from the run as it tells itself.

use std::collections::BTreeSet;

use serde_json::Value;

use super::plan::Stage;

/// Ends that are legal for a run in which something died at a moment, and that nobody ordered back.
///
/// After the takeover there is no way but forward. Before it a run goes on or goes back; while nothing but its
/// preflight has begun, a question without an answer refuses it.
pub fn legal(run: &Value, at_ms: u64, met: &BTreeSet<Stage>) -> Vec<&'static str> {
    if run["takeover_at_ms"].as_u64().is_some_and(|taken| taken <= at_ms) {
        return vec!["done"];
    }
    let mut ends = vec!["done", "rolled_back"];
    ends.extend(met.iter().all(|s| *s == Stage::Preflight).then_some("refused"));
    ends
}

/// The code with which the command line leaves a run that came to this.
pub fn code_of(result: &str) -> Option<i32> {
    match result {
        "done" => Some(0),
        "refused" => Some(5),
        "rolled_back" | "returned" => Some(6),
        "needs_human" => Some(7),
        _ => None,
    }
}

/// What of a run's end its own takeover and opening do not allow.
pub fn contradiction(run: &Value) -> Option<&'static str> {
    let known = |key: &str| !run[key].is_null();
    match run["result"].as_str()? {
        "done" if !known("takeover_at_ms") => Some("done without a takeover"),
        "done" if !known("opened_at_ms") => Some("done, and nothing was opened"),
        "rolled_back" | "refused" if known("takeover_at_ms") => Some("undone after its takeover"),
        "returned" if run["direction"] != "return" => Some("returned, and never turned round"),
        _ => None,
    }
}

/// The stages in which a moment just past fell: those of the steps that were under way or, between two steps, that of
/// the first one that had not ended. Until the promotion begins, a run whose planes are drained is in its takeover.
pub fn stages(run: &Value, at_ms: u64) -> BTreeSet<Stage> {
    let steps = || steps(run).filter(|s| s["past"] != true);
    let met: BTreeSet<Stage> = steps().filter(|s| is_under_way(s, at_ms)).filter_map(stage).collect();
    if !met.is_empty() {
        return met;
    }
    let ended = |s: &&Value| s["at_ms"].as_u64().is_some_and(|at| at <= at_ms);
    let next = steps().filter(|s| !ended(s)).filter_map(stage).min();
    let begun = |s: &Value| s["since_ms"].as_u64().is_some_and(|since| since <= at_ms);
    let between = next == Some(Stage::Promote) && !steps().any(|s| stage(s) == next && begun(s));
    next.map(|next| if between { Stage::Takeover } else { next }).into_iter().collect()
}

/// The steps that were under way at a moment, as `plane.act@site`, as the run tells them.
pub fn under_way(run: &Value, at_ms: u64) -> Vec<String> {
    let shown = |s: &Value| {
        let word = |key: &str| s[key].as_str().unwrap_or("?").to_owned();
        format!("{}.{}@{}", word("plane"), word("act"), word("site"))
    };
    steps(run).filter(|s| is_under_way(s, at_ms)).map(shown).collect()
}

fn steps(run: &Value) -> impl Iterator<Item = &Value> {
    run["steps"].as_array().map_or(&[][..], Vec::as_slice).iter()
}

fn stage(step: &Value) -> Option<Stage> {
    Stage::ALL.into_iter().find(|s| step["stage"] == s.name())
}

fn is_under_way(step: &Value, at_ms: u64) -> bool {
    let until = step["at_ms"].as_u64().unwrap_or(u64::MAX);
    step["since_ms"].as_u64().is_some_and(|since| since <= at_ms) && at_ms <= until
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(takeover: Option<u64>, opened: Option<u64>, result: &str) -> Value {
        json!({"takeover_at_ms": takeover, "opened_at_ms": opened, "result": result, "direction": "forward", "steps": [
            {"stage": "preflight", "plane": "kafka", "act": "preflight", "site": "rome", "since_ms": 1, "at_ms": 9},
            {"stage": "fence", "plane": "kafka", "act": "fence_apps", "site": "rome", "since_ms": 10, "at_ms": 20},
            {"stage": "drain", "plane": "kafka", "act": "drain", "site": "fra", "since_ms": 21, "at_ms": 40},
            {"stage": "takeover", "plane": "quorum", "act": "takeover", "site": "quorum", "since_ms": takeover, "at_ms": takeover},
            {"stage": "promote", "plane": "postgres", "act": "promote", "site": "fra", "since_ms": 55, "at_ms": 80},
            {"stage": "open", "plane": "kafka", "act": "grant_apps", "site": "fra"},
        ]})
    }

    #[test]
    fn allows_nothing_but_done_after_the_takeover() {
        let taken = run(Some(50), None, "running");
        assert_eq!(legal(&taken, 50, &BTreeSet::from([Stage::Promote])), ["done"]);
        assert_eq!(legal(&taken, 49, &BTreeSet::from([Stage::Takeover])), ["done", "rolled_back"]);
    }

    #[test]
    fn allows_a_refusal_only_while_nothing_but_the_preflight_has_begun() {
        let open = run(None, None, "running");
        assert!(legal(&open, 5, &BTreeSet::from([Stage::Preflight])).contains(&"refused"));
        assert!(!legal(&open, 15, &BTreeSet::from([Stage::Prepare])).contains(&"refused"));
    }

    #[test]
    fn finds_ends_that_the_run_itself_contradicts() {
        assert_eq!(contradiction(&run(Some(50), Some(81), "done")), None);
        assert!(contradiction(&run(Some(50), None, "done")).is_some());
        assert!(contradiction(&run(None, None, "done")).is_some());
        assert!(contradiction(&run(Some(50), None, "rolled_back")).is_some());
        assert!(contradiction(&run(Some(50), None, "returned")).is_some());
        assert_eq!(contradiction(&run(None, None, "rolled_back")), None);
    }

    #[test]
    fn names_the_steps_and_the_stage_that_a_kill_met() {
        let run = run(Some(50), None, "running");
        assert_eq!(under_way(&run, 30), ["kafka.drain@fra"]);
        assert!(under_way(&run, 52).is_empty());
        assert_eq!(stages(&run, 30), BTreeSet::from([Stage::Drain]));
        assert_eq!(stages(&run, 45), BTreeSet::from([Stage::Takeover]));
        assert_eq!(stages(&run, 52), BTreeSet::from([Stage::Takeover]), "taken over, nothing promoted");
        assert_eq!(stages(&run, 60), BTreeSet::from([Stage::Promote]));
        assert_eq!(stages(&run, 90), BTreeSet::from([Stage::Open]));
    }
}
