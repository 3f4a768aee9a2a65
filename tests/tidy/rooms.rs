//! The floor plan: which room may know which.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::files::{all, read, rust};
use super::none;

/// Every room with the rooms below it that it may name. Arrows run down only.
const PLAN: &[(&str, &[&str])] = &[
    ("dc-core", &[]),
    ("dc-wire", &["dc-core"]),
    ("dc-quorum", &["dc-core", "dc-wire"]),
    ("dc-plane", &["dc-core"]),
    ("dc-plane-postgres", &["dc-core", "dc-plane"]),
    ("dc-plane-kafka", &["dc-core", "dc-plane"]),
    ("dc-plane-s3", &["dc-core", "dc-plane"]),
    ("dc-plane-airflow", &["dc-core", "dc-plane"]),
    ("dc-agent", &["dc-core", "dc-wire", "dc-quorum", "dc-plane"]),
    ("dc-surface", &["dc-core", "dc-wire", "dc-agent"]),
    ("dc-sim", &["dc-core", "dc-plane", "dc-agent"]),
    ("dc-guardian", &[]),
    ("dc-lab", &[]),
];

/// What core may know of the world outside.
const CORE: &[&str] = &["humantime", "serde", "serde_json", "sha2", "thiserror"];

fn manifests() -> Vec<(String, Table)> {
    let names = all().into_iter().filter(|name| name.ends_with("Cargo.toml"));
    names.map(|name| (name.clone(), read(&name).unwrap().parse().unwrap())).collect()
}

fn package(manifest: &Table) -> Option<&str> {
    manifest.get("package")?.get("name")?.as_str()
}

fn names(manifest: &Table, section: &str) -> BTreeSet<String> {
    manifest.get(section).and_then(Value::as_table).map(|t| t.keys().cloned().collect()).unwrap_or_default()
}

#[test]
fn arrows_run_down_only() {
    let plan: BTreeMap<_, _> = PLAN.iter().copied().collect();
    let mut faults = Vec::new();
    let mut seen = BTreeSet::new();
    for (file, manifest) in manifests() {
        let Some(name) = package(&manifest).filter(|name| *name != "dc-switch") else { continue };
        seen.insert(name.to_owned());
        let Some(may) = plan.get(name) else {
            faults.push(format!("{file}: {name} is not on the plan"));
            continue;
        };
        for known in names(&manifest, "dependencies") {
            if known.starts_with("dc-") && !may.contains(&known.as_str()) {
                faults.push(format!("{file}: {name} must not know {known}"));
            }
        }
    }
    faults.extend(plan.keys().filter(|room| !seen.contains(**room)).map(|room| format!("{room} is gone")));
    none(&faults, "roof -> surface -> agent -> plane, quorum -> wire -> core");
}

#[test]
fn the_simulation_and_the_lab_never_ship() {
    let (_, roof) = manifests().into_iter().find(|(file, _)| file == "Cargo.toml").unwrap();
    let known = names(&roof, "dependencies");
    for stays in ["dc-sim", "dc-lab"] {
        assert!(!known.contains(stays), "the roof knows {stays}");
    }
    let mut faults = Vec::new();
    for (name, text) in rust() {
        let may = name.starts_with("src/core/") || name.starts_with("src/sim/") || name.contains("tests/");
        let stands =
            ["dc_core::script", "dc_plane::fake", "dc_plane::suite"].iter().find(|s| text.contains(*s));
        if let (false, Some(stands)) = (may, stands) {
            faults.push(format!("{name} stands on {stands}"));
        }
    }
    none(&faults, "what tests stand on is for tests");
}

#[test]
fn core_knows_almost_nothing() {
    let (_, core) = manifests().into_iter().find(|(file, _)| file == "src/core/Cargo.toml").unwrap();
    let known = names(&core, "dependencies");
    let wanted: BTreeSet<String> = CORE.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(known, wanted, "each more is one more thing the law depends on");
}

#[test]
fn planes_never_meet() {
    let planes = ["postgres", "kafka", "s3", "airflow"];
    let mut faults = Vec::new();
    for (name, text) in rust() {
        let Some(own) = planes.iter().find(|p| name.starts_with(&format!("src/plane/{p}/"))) else {
            continue;
        };
        for other in planes.iter().filter(|p| p != &own) {
            if text.contains(&format!("dc_plane_{other}")) {
                faults.push(format!("{name} names dc_plane_{other}"));
            }
        }
        if text.contains("dc_quorum") || text.contains("dc_agent") {
            faults.push(format!("{name} names a room above it"));
        }
    }
    none(&faults, "a plane knows neither another nor the quorum");
}

#[test]
fn only_the_roof_names_drivers() {
    let mut faults = Vec::new();
    for (name, text) in rust() {
        let may = ["src/app.rs", "src/config.rs"].contains(&name.as_str())
            || name.starts_with("src/app/")
            || name.starts_with("src/plane/")
            || name.starts_with("tests/");
        let driver =
            ["postgres", "kafka", "s3", "airflow"].iter().find(|p| text.contains(&format!("dc_plane_{p}")));
        if let (false, Some(driver)) = (may, driver) {
            faults.push(format!("{name} names dc_plane_{driver}"));
        }
    }
    none(&faults, "a new plane is one folder and one line under the roof");
}

#[test]
fn generated_types_stop_at_the_door() {
    let mut faults = Vec::new();
    for (name, text) in rust() {
        let behind = ["src/core/", "src/plane/", "src/guardian/", "src/sim/", "deploy/"];
        if behind.iter().any(|room| name.starts_with(room)) && text.contains("dc_wire::pb") {
            faults.push(format!("{name} uses generated types"));
        }
    }
    none(&faults, "types of the wire are for those who speak on it");
}

#[test]
fn only_the_hands_change_a_plane() {
    let mut faults = Vec::new();
    for (name, text) in rust() {
        // A peer may ask for a look, which is a preflight and reads.
        let hands = ["src/agent/execute.rs", "src/agent/peer.rs"].contains(&name.as_str());
        let may = hands || !name.starts_with("src/agent/");
        for call in [".perform(&", ".perform(act", ".undo(&", ".undo(act"] {
            if !may && text.contains(call) {
                faults.push(format!("{name} calls {call}"));
            }
        }
    }
    none(&faults, "agent/execute.rs alone calls what changes a plane");
}

/// What `deny.toml` says of crates, also where cargo-deny is not installed.
#[test]
fn one_crypto_provider_and_one_source_of_crates() {
    let lock: Table = read("Cargo.lock").unwrap().parse().unwrap();
    let packages: Vec<&Table> =
        lock["package"].as_array().unwrap().iter().filter_map(Value::as_table).collect();
    let name = |p: &Table| p["name"].as_str().unwrap_or_default().to_owned();
    let mut faults = Vec::new();
    for package in &packages {
        if name(package).starts_with("aws-lc") || name(package) == "native-tls" {
            faults.push(format!("{}: a second provider", name(package)));
        }
        if package.get("source").and_then(Value::as_str).is_some_and(|s| !s.starts_with("registry+")) {
            faults.push(format!("{}: not from the registry", name(package)));
        }
        let needs = package.get("dependencies").and_then(Value::as_array).into_iter().flatten();
        let openssl = needs.filter_map(Value::as_str).any(|d| d == "openssl-sys");
        if openssl && name(package) != "rdkafka-sys" {
            faults.push(format!("{}: names openssl-sys, which librdkafka alone may", name(package)));
        }
    }
    none(&faults, "one crypto provider, ring; every crate from the registry");
}
