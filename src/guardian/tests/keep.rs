//! The keeper on real processes.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test says what it expects")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const BIN: &str = env!("CARGO_BIN_EXE_dc-guardian");

fn guardian(args: &[&str]) -> Output {
    Command::new(BIN).args(args).output().expect("dc-guardian runs")
}

fn keep(dir: &Path, unit: &str, script: &str) -> Output {
    guardian(&["keep", unit, "--dir", &dir.display().to_string(), "--", "sh", "-c", script])
}

fn ask(dir: &Path, unit: &str, request: &str) -> serde_json::Value {
    let out = guardian(&["ask", unit, "--dir", &dir.display().to_string(), request]);
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

fn reap(dir: &Path, unit: &str) -> Output {
    guardian(&["reap", unit, "--dir", &dir.display().to_string()])
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < limit, "still not so after 10 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn code(out: &Output) -> Option<i32> {
    out.status.code()
}

fn lives(pid: i64) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat[stat.rfind(')').unwrap_or(0)..].starts_with(") Z"))
}

/// A main process, a child, and a grandchild in a session of its own whose parent has died.
const FAMILY: &str = "sleep 600 & (setsid sleep 600 &) ; sleep 600 & wait";

fn family(dir: &Path, unit: &str) -> Vec<i64> {
    let out = keep(dir, unit, FAMILY);
    assert_eq!(code(&out), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let mut pids = Vec::new();
    until("four processes", || {
        let seen = ask(dir, unit, r#"{"do":"status"}"#);
        pids = seen["pids"].as_array().unwrap().iter().filter_map(serde_json::Value::as_i64).collect();
        pids.len() == 4
    });
    pids
}

#[test]
fn says_gone_only_when_double_forked_children_are_gone_too() {
    let dir = tempfile::tempdir().unwrap();
    let pids = family(dir.path(), "one");
    let seen = ask(dir.path(), "one", r#"{"do":"stop","signal":"TERM","grace_ms":300}"#);
    assert_eq!(seen["state"], "orphaned", "the main process ended, its children did not: {seen}");
    assert_eq!(seen["ended"]["signal"], 15);
    assert_eq!(seen["pids"].as_array().unwrap().len(), 3);
    let seen = ask(dir.path(), "one", r#"{"do":"kill","grace_ms":5000}"#);
    assert_eq!(seen["state"], "gone");
    assert!(!pids.into_iter().any(lives));
    until("the keeper left", || !dir.path().join("one.sock").exists());
    let again = reap(dir.path(), "one");
    assert_eq!(String::from_utf8_lossy(&again.stdout).trim(), r#"{"state":"gone","killed":0}"#);
}

#[test]
fn a_second_stop_reaches_what_the_main_process_left() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), "one");
    ask(dir.path(), "one", r#"{"do":"stop","signal":"TERM","grace_ms":0}"#);
    until("the main process ended", || ask(dir.path(), "one", r#"{"do":"status"}"#)["state"] == "orphaned");
    let seen = ask(dir.path(), "one", r#"{"do":"stop","signal":"TERM","grace_ms":5000}"#);
    assert_eq!(seen["state"], "gone");
}

#[test]
fn a_second_keeper_of_a_unit_refuses_while_the_first_lives() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), "one");
    let second = keep(dir.path(), "one", "sleep 600");
    assert_eq!(code(&second), Some(3), "{}", String::from_utf8_lossy(&second.stderr));
    assert_eq!(code(&reap(dir.path(), "one")), Some(3), "nor is a kept unit reaped");
    assert_eq!(code(&keep(dir.path(), "two", "sleep 600")), Some(0), "another unit is another matter");
    for unit in ["one", "two"] {
        assert_eq!(ask(dir.path(), unit, r#"{"do":"kill","grace_ms":5000}"#)["state"], "gone");
    }
    until("both left", || {
        reap(dir.path(), "one").status.success() && reap(dir.path(), "two").status.success()
    });
    assert_eq!(code(&keep(dir.path(), "one", "true")), Some(0), "once gone it may be kept again");
}

#[test]
fn what_a_killed_keeper_left_is_found_and_blocks_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let pids = family(dir.path(), "one");
    let keeper = ask(dir.path(), "one", r#"{"do":"status"}"#)["keeper"].as_i64().unwrap();
    let killed = Command::new("kill").args(["-9", &keeper.to_string()]).status().unwrap();
    assert!(killed.success());
    until("the keeper is dead", || !lives(keeper));
    assert!(pids.iter().all(|pid| lives(*pid)), "the unit outlives its keeper");
    let second = keep(dir.path(), "one", "sleep 600");
    assert_eq!(code(&second), Some(4), "{}", String::from_utf8_lossy(&second.stderr));
    let reaped = reap(dir.path(), "one");
    assert_eq!(String::from_utf8_lossy(&reaped.stdout).trim(), r#"{"state":"gone","killed":4}"#);
    assert!(!pids.into_iter().any(lives));
}

#[test]
fn a_process_that_hid_its_environment_is_still_found_by_its_session() {
    let dir = tempfile::tempdir().unwrap();
    let hidden = "env -i sleep 600 & env -i sleep 600 & wait";
    assert_eq!(code(&keep(dir.path(), "one", hidden)), Some(0));
    let mut keeper = 0;
    until("three processes", || {
        let seen = ask(dir.path(), "one", r#"{"do":"status"}"#);
        keeper = seen["keeper"].as_i64().unwrap();
        seen["pids"].as_array().unwrap().len() == 3
    });
    assert!(Command::new("kill").args(["-9", &keeper.to_string()]).status().unwrap().success());
    until("the keeper is dead", || !lives(keeper));
    let reaped = reap(dir.path(), "one");
    assert_eq!(String::from_utf8_lossy(&reaped.stdout).trim(), r#"{"state":"gone","killed":3}"#);
}

#[test]
fn a_unit_gets_its_settings_from_a_private_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (env, out) = (dir.path().join("env"), dir.path().join("out"));
    fs::write(&env, format!("COLOUR=deep blue\nOUT={}\n", out.display())).unwrap();
    let run = |mode| {
        fs::set_permissions(&env, fs::Permissions::from_mode(mode)).unwrap();
        Command::new(BIN)
            .env("STRAY", "1")
            .args(["keep", "one", "--dir", &dir.path().display().to_string()])
            .args(["--env-file", &env.display().to_string(), "--foreground", "--", "sh", "-c"])
            .arg("echo \"$COLOUR|$STRAY|$DC_UNIT\" > \"$OUT\"; exit 7")
            .output()
            .unwrap()
    };
    let refused = run(0o640);
    assert_eq!(code(&refused), Some(1));
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(words.contains("make it 0600") && !words.contains("blue"), "{words}");
    assert_eq!(code(&run(0o600)), Some(7), "in the foreground its code is the unit's");
    let mark = dir.path().canonicalize().unwrap().join("one");
    assert_eq!(fs::read_to_string(out).unwrap(), format!("deep blue||{}\n", mark.display()));
}

#[test]
fn bad_requests_and_commands_get_words_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let missing = guardian(&["keep", "one", "--dir", &dir.path().display().to_string(), "--", "/no/such"]);
    assert_eq!(code(&missing), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("start /no/such"));
    assert_eq!(code(&guardian(&["keep", "one"])), Some(2));
    assert_eq!(code(&guardian(&["fly"])), Some(2));
    family(dir.path(), "one");
    for bad in ["{}", r#"{"do":"stop","signal":"KILL","grace_ms":0}"#, r#"{"do":"status","x":1}"#, "hm"] {
        assert!(ask(dir.path(), "one", bad)["error"].is_string(), "{bad}");
    }
    assert_eq!(ask(dir.path(), "one", r#"{"do":"status"}"#)["pids"].as_array().unwrap().len(), 4);
    assert_eq!(ask(dir.path(), "one", r#"{"do":"kill","grace_ms":5000}"#)["state"], "gone");
}
