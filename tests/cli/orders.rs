//! What changes something: who may, what it takes to be sure, and how each end is told.

use std::process::Stdio;
use std::time::Duration;

use dc_core::act::Finding;
use dc_core::ids::PlaneKind;
use dc_wire::identity::Role;
use serde_json::Value;

use crate::fake::{World, site};
use crate::{command, switch};

const MOVE: [&str; 6] = ["switchover", "orders", "--to", "fra", "--confirm", "fra"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    MOVE.iter().chain(more).copied().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_ends_as_one_object_for_scripts() {
    let (world, _agents, context) = World::running().await;
    let said = switch(&context, &with(&["--reason", "a drill", "--output", "json"])).await.ended(0);
    let body = said.json();
    assert_eq!(
        (&body["schema"], &body["result"], &body["exit"]),
        (&"dc-switch/v1".into(), &"done".into(), &0.into())
    );
    let run = body["run"].as_str().unwrap();
    let steps = body["steps"].as_array().unwrap();
    let promote = steps.iter().find(|s| s["act"] == "promote").unwrap();
    assert_eq!(
        (&promote["stage"], &promote["plane"], &promote["site"], &promote["ms"]),
        (&"promote".into(), &"postgres".into(), &"fra".into(), &12.into())
    );
    assert!(steps.iter().all(|s| s["state"] == "done" && s["ms"].is_u64()), "{steps:?}");
    let shown = switch(&context, &["run", "show", run, "--output", "json"]).await.ended(0).json();
    assert_eq!(shown["steps"], body["steps"]);
    for key in ["started_at_ms", "takeover_at_ms", "opened_at_ms", "ended_at_ms"] {
        assert!(shown[key].is_u64(), "{key}: {}", shown[key]);
    }
    assert!(promote["since_ms"].as_u64() < promote["at_ms"].as_u64(), "{promote}");
    let state = world.state();
    let kept = state.runs.values().next().unwrap();
    assert_eq!((kept.by.as_str(), kept.reason.as_str()), ("operator/olga", "a drill"));
    switch(&context, &["run", "list"]).await.ended(0).has(&[run, "rome -> fra", "done", "operator/olga"]);
    switch(&context, &["run", "attach", run]).await.ended(0).has(&["DONE", "fra holds orders"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_one_per_line_and_the_last_one_is_the_end() {
    let (_world, _agents, context) = World::running().await;
    let said = switch(&context, &with(&["--output", "jsonl"])).await.ended(0);
    let events: Vec<Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|e| e["schema"] == "dc-switch/v1"));
    let takeover = events.iter().position(|e| e["act"] == "takeover").unwrap();
    let promote = events.iter().position(|e| e["act"] == "promote").unwrap();
    assert!(takeover < promote, "events come as they happen");
    assert_eq!(events.last().map(|e| (&e["event"], &e["result"])), Some((&"ended".into(), &"done".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn people_read_a_line_per_step_and_what_each_stage_took() {
    let (_world, _agents, context) = World::running().await;
    let said = switch(&context, &MOVE).await.ended(0);
    assert!(said.err.contains("postgres.promote") && said.err.contains("seen by the fake's hands"));
    said.has(&["DONE", "fra holds orders in epoch", "STAGE", "takeover at", "Next: dc-switch status orders"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_operator_orders() {
    let (world, agents, _) = World::running().await;
    let context = world.context(&agents, Role::Viewer, "vic");
    switch(&context, &["status"]).await.ended(0);
    switch(&context, &["plan", "switchover", "orders", "--to", "fra"]).await.ended(0);
    switch(&context, &MOVE).await.ended(4).has(&["DC-0007", "viewer vic", "nothing was changed"]);
    switch(&context, &["dags", "publish", &format!("{}/tests/cli", env!("CARGO_MANIFEST_DIR"))])
        .await
        .ended(4);
    assert!(world.state().runs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_moves_are_refused_and_change_nothing() {
    let (world, _agents, context) = World::running().await;
    let to = |group: &'static str, to: &'static str| ["switchover", group, "--to", to, "--confirm", to];
    switch(&context, &to("orders", "rome")).await.ended(5).has(&["DC-0202", "rome already holds orders"]);
    switch(&context, &to("orders", "oslo")).await.ended(5).has(&["DC-0202", "oslo is not a site"]);
    switch(&context, &to("nothing", "fra")).await.ended(5).has(&["DC-0201", "known: orders"]);
    switch(&context, &to("Orders", "fra")).await.ended(2).has(&["DC-0200"]);
    let stale = with(&["--plan", "deadbeef"]);
    switch(&context, &stale).await.ended(5).has(&["DC-0204", "dc-switch plan switchover orders --to fra"]);
    assert!(world.state().runs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_begins_without_the_site_being_named() {
    let (world, _agents, context) = World::running().await;
    let missing = switch(&context, &["switchover", "orders", "--to", "fra"]).await.ended(9);
    missing.has(&["DC-0009", "dc-switch switchover orders --to fra --confirm fra"]);
    let wrong = switch(&context, &["switchover", "orders", "--to", "fra", "--confirm", "rome"]).await;
    wrong.ended(9).has(&["\"rome\" was typed"]);
    assert!(world.state().runs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn all_findings_of_a_refused_run_are_shown() {
    let (world, _agents, context) = World::running().await;
    let found = |code: &str, plane, text: &str| Finding {
        code: code.into(),
        plane: Some(plane),
        site: site("fra"),
        blocking: true,
        text: text.into(),
    };
    let both =
        vec![found("DC-0207", PlaneKind::Kafka, "lags 9"), found("DC-0219", PlaneKind::Postgres, "differs")];
    world.script(|script| script.findings = both);
    let words = ["DC-0207", "kafka at fra: lags 9", "DC-0219", "postgres at fra: differs"];
    switch(&context, &["plan", "switchover", "orders", "--to", "fra"]).await.ended(5).has(&words);
    let said = switch(&context, &MOVE).await.ended(5);
    said.has(&words).has(&["REFUSED", "nothing was changed", "rome serves orders as before"]);
    let body = switch(&context, &with(&["--output", "json"])).await.ended(5).json();
    assert_eq!(body["result"], "refused");
    assert!(body["findings"].as_array().is_some_and(|f| f.len() >= 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_before_the_takeover_says_that_the_old_site_serves() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.failing.insert("kafka.fence_apps".into(), 1));
    let said = switch(&context, &MOVE).await.ended(6);
    said.has(&["ROLLED BACK", "kafka.fence_apps was told to fail", "rome serves orders as before", "exit 6"]);
    world.script(|script| script.failing.insert("kafka.fence_apps".into(), 1));
    let body = switch(&context, &with(&["--output", "json"])).await.ended(6).json();
    assert_eq!((&body["result"], &body["exit"]), (&"rolled_back".into(), &6.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_after_the_takeover_waits_for_a_human_and_a_retry_ends_it() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.failing.insert("postgres.promote".into(), 5));
    let said = switch(&context, &MOVE).await.ended(7);
    let said =
        said.has(&["A HUMAN MUST ACT", "NOBODY accepts writes since", "dc-switch run return", "exit 7"]);
    let run = world.state().runs.keys().next().unwrap().to_string();
    assert!(said.out.contains(&format!("dc-switch run retry {run}")));
    let body = switch(&context, &["run", "show", &run, "--output", "json"]).await.ended(0).json();
    assert_eq!((&body["result"], &body["exit"]), (&"needs_human".into(), &7.into()));
    switch(&context, &["run", "abort", &run]).await.ended(5).has(&["DC-0209"]);
    switch(&context, &["run", "retry", &run]).await.ended(0).has(&["DONE"]);
    switch(&context, &["run", "retry", &run]).await.ended(5).has(&["DC-0208", "dc-switch run list"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_after_opened_goes_forward_only() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.failing.insert("kafka.grant_apps".into(), 5));
    let said = switch(&context, &MOVE).await.ended(7);
    let run = world.state().runs.keys().next().unwrap().to_string();
    let said = said.has(&["A HUMAN MUST ACT", "kafka.grant_apps was told to fail", "exit 7"]);
    assert!(said.out.contains(&format!("dc-switch run retry {run}")));
    assert!(!said.out.contains("run return"), "{}", said.out);
    let before = world.state();
    switch(&context, &["run", "return", &run]).await.ended(5).has(&["nothing was changed"]);
    switch(&context, &["run", "abort", &run]).await.ended(5).has(&["nothing was changed"]);
    assert_eq!(world.state().runs, before.runs);
    switch(&context, &["run", "retry", &run]).await.ended(0).has(&["DONE"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_turned_round_before_it_opened() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.failing.insert("postgres.promote".into(), 5));
    switch(&context, &MOVE).await.ended(7);
    let run = world.state().runs.keys().next().unwrap().to_string();
    let said = switch(&context, &["run", "return", &run]).await.ended(0);
    said.has(&["RETURNED", "rome serves orders; nothing was lost"]);
    switch(&context, &["run", "attach", &run]).await.ended(6);
    let shown = switch(&context, &["run", "show", &run, "--output", "json"]).await.ended(0).json();
    assert_eq!(shown["result"], "returned");
    assert!(shown["steps"].as_array().is_some_and(|s| s.iter().any(|s| s["past"] == true)));
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_a_run_stops_nothing_and_the_same_command_follows_it_again() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.held = Some("kafka.drain".into()));
    let said = switch(&context, &with(&["--timeout", "500ms"])).await.ended(8);
    let run = world.state().runs.keys().next().unwrap().to_string();
    said.has(&[&format!("dc-switch run attach {run}")]);
    let left = switch(&context, &with(&["--timeout", "300ms"])).await.ended(8);
    left.has(&["already goes there"]);
    let mut child = command(&context, &MOVE).stderr(Stdio::null()).spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
    assert_eq!(world.state().runs.len(), 1);
    let back = ["switchover", "orders", "--to", "rome", "--confirm", "rome"];
    switch(&context, &back).await.ended(5);
    world.script(|script| script.held = None);
    switch(&context, &["run", "attach", &run[..26]]).await.ended(0).has(&["DONE"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_before_the_takeover_is_followed_to_its_end() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.held = Some("kafka.drain".into()));
    let begun = switch(&context, &with(&["--no-wait", "--output", "json"])).await.ended(0).json();
    let run = begun["run"].as_str().unwrap().to_owned();
    let said = switch(&context, &["run", "abort", &run, "--reason", "not today"]).await.ended(0);
    said.has(&["ROLLED BACK", "not today"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_that_is_asked_may_die_on_the_way() {
    let (world, mut agents, context) = World::running().await;
    world.script(|script| script.held = Some("kafka.drain".into()));
    let one = world.context(&agents, Role::Operator, "olga");
    let child = command(&one, &with(&["--output", "json"])).spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    agents[0].stop();
    agents[1].stop();
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.script(|script| script.held = None);
    let output = tokio::time::timeout(crate::LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    drop(context);
}

#[tokio::test(flavor = "multi_thread")]
async fn dags_are_published_at_the_holder_wherever_one_asks() {
    let world = World::new();
    let spec = toml::from_str(crate::fake::GROUP).unwrap();
    world.apply("operator/x", dc_core::registry::Entry::ApplyGroup { spec: Box::new(spec), over: 0 });
    let agents = [
        world.serve("fra", Duration::ZERO).await,
        world.serve("rome", Duration::from_millis(400)).await, // answers later than fra, and holds the group
    ];
    let context = world.context(&agents, Role::Operator, "olga");
    let tree = tempfile::tempdir().unwrap();
    std::fs::create_dir(tree.path().join("team")).unwrap();
    std::fs::write(tree.path().join("team/big.py"), vec![b'x'; 3 << 20]).unwrap();
    std::fs::write(tree.path().join("empty.py"), "").unwrap();
    let dir = tree.path().to_str().unwrap();
    let said = switch(&context, &["dags", "publish", dir]).await.ended(0);
    said.has(&["2 files", "release r000001-abababababab of orders"]);
    let mut seen = world.published.lock().unwrap().clone();
    seen.sort();
    let by = "rome operator/olga".to_owned();
    assert_eq!(seen, [(by.clone(), "empty.py".into(), 0), (by, "team/big.py".into(), 3 << 20)]);
    std::os::unix::fs::symlink("/etc/hostname", tree.path().join("out.py")).unwrap();
    switch(&context, &["dags", "publish", dir]).await.ended(2).has(&["DC-0014", "out.py"]);
}
