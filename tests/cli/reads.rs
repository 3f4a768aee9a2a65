//! What only looks, and what is refused before anything is asked.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dc_wire::identity::Role;
use dc_wire::pki::{self, Order};
use dc_wire::tls::TlsFiles;

use crate::fake::{GROUP, World};
use crate::switch;

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_lag_with_unit_and_age_for_each_plane() {
    let (_world, _agents, context) = World::running().await;
    let said = switch(&context, &[]).await.ended(0);
    let said =
        said.has(&["LAB one", "ACTIVE at rome", "+ writable", "+ following", "1.2 kB", "1,204 records"]);
    let said = said.has(&["700 ms", "400 ms ago", "Next: dc-switch plan switchover orders --to fra"]);
    assert!(said.err.contains("asking fra 127.0.0.1:"), "{}", said.err);
    assert!(!said.out.contains('\u{1b}'), "colours without a terminal");
    let body = switch(&context, &["status", "orders", "--output", "json"]).await.ended(0).json();
    assert_eq!(body["schema"], "dc-switch/v1");
    assert_eq!(body["groups"][0]["holder"], "rome");
    assert_eq!(body["local_view"], false);
    switch(&context, &["status", "nothing"]).await.ended(5).has(&["DC-0201", "known: orders"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stale_is_unknown_and_never_green() {
    let (world, _agents, context) = World::running().await;
    world.stale.store(true, Ordering::SeqCst);
    let said = switch(&context, &["--color", "always"]).await.ended(10);
    let said = said.has(&["? not known", "1m00s ago", "was not read lately"]);
    assert!(!said.out.contains("writable") && !said.out.contains("1.2 kB"), "{}", said.out);
    assert!(said.out.contains("\u{1b}["), "colours were asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_from_outside_cannot_steer_the_terminal() {
    let (world, _agents, context) = World::running().await;
    world.summary("a\u{1b}]0;title\u{7}\u{202e}b");
    let said = switch(&context, &[]).await.ended(0);
    assert!(said.out.contains("a?]0;title??b"), "{}", said.out);
    assert!(!said.out.contains('\u{1b}'));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_reads_are_a_local_view_and_orders_are_refused() {
    let (world, _agents, context) = World::running().await;
    world.quorum.store(false, Ordering::SeqCst);
    switch(&context, &["status"]).await.ended(10).has(&["LOCAL VIEW - NO QUORUM"]);
    switch(&context, &["run", "list"]).await.ended(0).has(&["LOCAL VIEW"]);
    let order = ["switchover", "orders", "--to", "fra", "--confirm", "fra"];
    switch(&context, &order).await.ended(3).has(&["DC-0006", "nothing was changed"]);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli");
    switch(&context, &["dags", "publish", folder, "--group", "orders"]).await.ended(3).has(&["DC-0006"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_agent_answers_and_none_is_said_with_each_address() {
    let (world, mut agents, context) = World::running().await;
    agents[0].stop();
    agents[2].stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    switch(&context, &["status"]).await.ended(0).has(&["asked: oslo"]);
    agents[1].stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let said = switch(&context, &["status", "--output", "json"]).await.ended(3);
    let said = said.has(&["DC-0005", "fra:", "oslo:", "rome:"]);
    assert_eq!(said.json()["error"]["code"], "DC-0005");
    drop(world);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority_gets_nowhere() {
    let (world, agents, _) = World::running().await;
    let other = pki::init(&world.folder.path().join("other"), "lab.example", 2).unwrap();
    let order =
        Order { role: Role::Operator, name: "eve".into(), dns: vec![], ips: vec![], days: 1, replace: false };
    let eve = pki::issue(&other, world.folder.path(), &order).unwrap();
    let mine = TlsFiles { ca: other.cert.clone(), cert: eve.cert.clone(), key: eve.key.clone() };
    let context = world.context_with(&agents, &mine, "eve");
    switch(&context, &["status"]).await.ended(4).has(&["DC-0008"]);
    // a bundle trusts both authorities, so only the agents can refuse
    let both = world.folder.path().join("both.pem");
    let theirs = std::fs::read_to_string(world.issue(Role::Viewer, "x").ca).unwrap();
    std::fs::write(&both, std::fs::read_to_string(&other.cert).unwrap() + &theirs).unwrap();
    let context = world.context_with(&agents, &TlsFiles { ca: both, ..mine }, "eve");
    switch(&context, &["status"]).await.ended(4).has(&["DC-0008"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_site_at_the_address_is_not_asked() {
    let (world, agents, _) = World::running().await;
    let tls = world.issue(Role::Operator, "olga");
    let mut context = std::fs::read_to_string(world.context_with(&agents[..1], &tls, "moved")).unwrap();
    context = context.replace("fra = ", "rome = ");
    let path = world.folder.path().join("moved.toml");
    std::fs::write(&path, context).unwrap();
    switch(&path, &["status"]).await.ended(4).has(&["DC-0008", "the agent of rome"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_others_can_read_is_not_used() {
    let (world, agents, _) = World::running().await;
    let tls = world.issue(Role::Operator, "olga");
    std::fs::set_permissions(&tls.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let context = world.context_with(&agents, &tls, "olga");
    switch(&context, &["status"]).await.ended(2).has(&["DC-0102", "0644", "chmod 600"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn contexts_that_cannot_be_used_are_refused_with_their_line() {
    let (world, _agents, context) = World::running().await;
    switch(&world.folder.path().join("none.toml"), &["status"]).await.ended(2).has(&["DC-0004"]);
    switch(&context, &["status", "--context", "prod"]).await.ended(2).has(&["DC-0003", "known: lab"]);
    let text = std::fs::read_to_string(&context).unwrap();
    std::fs::write(&context, text.replace("environment", "enviroment")).unwrap();
    switch(&context, &["status"]).await.ended(2).has(&["DC-0004", ".toml:3: "]);
}

#[tokio::test(flavor = "multi_thread")]
async fn group_files_are_judged_here_and_there() {
    let (world, _agents, context) = World::running().await;
    let file = world.folder.path().join("group.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, GROUP).unwrap();
    switch(&context, &["group", "apply", path]).await.ended(0).has(&["is as the file says already"]);
    switch(&context, &["group", "diff", path]).await.ended(0);
    std::fs::write(&file, GROUP.to_owned() + "[policy]\nstop_limit = \"20s\"\n").unwrap();
    switch(&context, &["group", "diff", path]).await.ended(10).has(&["policy.stop_limit", "\"20s\""]);
    let dry = switch(&context, &["group", "apply", path, "--dry-run"]).await.ended(0);
    dry.has(&["would be changed", "NOTHING HAS BEEN CHANGED", "topic orders", "prefix orders/logs"]);
    assert_eq!(world.state().groups.values().next().map(|g| g.spec_version), Some(1));
    switch(&context, &["group", "apply", path]).await.ended(0).has(&["is changed"]);
    switch(&context, &["group", "show", "orders"]).await.ended(0).has(&["stop_limit = \"20s\"", "version 2"]);
    std::fs::write(&file, GROUP.to_owned() + "[policy]\nlag_byte_max = 1\n").unwrap();
    let bad = switch(&context, &["group", "apply", path]).await.ended(5);
    let bad = bad.has(&["DC-0214", "group.toml:21: ", "lag_byte_max", "nothing was changed"]);
    assert!(!bad.err.contains("asking"), "nobody is asked about a file that cannot be used");
    std::fs::write(&file, GROUP.replace("\"orders\"\nsites", "\"other\"\nsites")).unwrap();
    let overlap = switch(&context, &["group", "apply", path]).await.ended(5);
    overlap.has(&["DC-0206", "group orders claims", "dc-switch group show orders"]);
    switch(&context, &["group", "apply", "/nowhere.toml"]).await.ended(2).has(&["DC-0016"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_made_and_shown_without_any_agent() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pki");
    let (dir, none) = (dir.to_str().unwrap(), folder.path().join("none"));
    switch(&none, &["cert", "init", "--dir", dir, "--name", "lab-one"]).await.ended(0);
    switch(&none, &["cert", "init", "--dir", dir, "--name", "lab-one"]).await.ended(5).has(&["DC-0107"]);
    let issue = ["cert", "issue", "--dir", dir, "--role", "agent", "--name", "rome", "--ip", "127.1.1.1"];
    let made = switch(&none, &issue).await.ended(0);
    made.has(&["agent-rome.pem", "spiffe://lab-one/dc-switch/agent/rome"]);
    switch(&none, &issue).await.ended(5).has(&["DC-0107", "--replace"]);
    let file = format!("{dir}/agent-rome.pem");
    let shown = switch(&none, &["cert", "show", &file, "--output", "json"]).await.ended(0).json();
    assert_eq!((&shown["in_force"], &shown["hosts"][0]), (&true.into(), &"127.1.1.1".into()));
    let bad = ["cert", "issue", "--dir", dir, "--role", "root", "--name", "x"];
    switch(&none, &bad).await.ended(2).has(&["agent, operator, viewer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_explained_and_config_is_checked_offline() {
    let none = std::path::Path::new("/nowhere/config.toml");
    switch(none, &["explain", "dc-0203"]).await.ended(0).has(&["another run holds the group"]);
    switch(none, &["explain", "0203"]).await.ended(0);
    switch(none, &["explain", "DC-9999"]).await.ended(2).has(&["DC-0011"]);
    switch(none, &["explain"]).await.ended(0).has(&["DC-0207:", "DC-0005:"]);
    switch(none, &["version", "--output", "json"]).await.ended(0).has(&["\"version\""]);
    switch(none, &["config", "check", "/nowhere.toml"]).await.ended(2).has(&["error[DC-"]);
    switch(none, &["swithcover"]).await.ended(2);
    switch(none, &["switchover", "orders", "--to", "fra", "--yes"]).await.ended(2);
}
