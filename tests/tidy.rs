//! What cargo cannot hold: arrows, sizes, words, and a page for every error code.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may stop at the first surprise

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const FUNCTION_MAX: usize = 70;
const FILE_MAX: usize = 800;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `dir` whose name ends so, built and generated ones left out.
fn files(dir: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                let left_out =
                    ["target", ".git", "pb", "__pycache__", "node_modules"].contains(&name.as_str());
                if !left_out {
                    open.push(path);
                }
            } else if endings.iter().any(|e| name.ends_with(e)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(PathBuf, String)> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path.strip_prefix(root()).unwrap().to_owned(), text)
    };
    files(&root(), &[".rs"]).into_iter().map(read).collect()
}

/// Names of the house's own crates that a manifest depends on, tests aside.
fn arrows(manifest: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(manifest)).unwrap();
    let part = text.split("\n[dependencies]").nth(1).unwrap_or("").split("\n[").next().unwrap_or("");
    let names = part.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| name.starts_with("dc-")).map(str::to_owned).collect()
}

#[test]
fn arrows_run_down_only() {
    let floors: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("src/core", &[][..]),
        ("src/wire", &["dc-core"]),
        ("src/quorum", &["dc-core", "dc-wire"]),
        ("src/plane", &["dc-core"]),
        ("src/plane/postgres", &["dc-core", "dc-plane"]),
        ("src/plane/kafka", &["dc-core", "dc-plane"]),
        ("src/plane/s3", &["dc-core", "dc-plane"]),
        ("src/plane/airflow", &["dc-core", "dc-plane"]),
        ("src/agent", &["dc-core", "dc-plane", "dc-quorum", "dc-wire"]),
        ("src/surface", &["dc-core", "dc-wire", "dc-agent"]),
        ("src/sim", &["dc-core", "dc-plane", "dc-agent", "dc-quorum"]),
        ("src/guardian", &[]),
        ("deploy/lab", &[]),
    ]);
    let mut wrong = Vec::new();
    for (room, below) in floors {
        for arrow in arrows(&Path::new(room).join("Cargo.toml")) {
            if !below.contains(&arrow.as_str()) {
                wrong.push(format!("{room} -> {arrow}"));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows that run up or across: {wrong:?}");
}

#[test]
fn the_law_depends_on_nothing_that_could_do_io() {
    let allowed = ["serde", "serde_json", "sha2", "humantime", "thiserror"];
    let text = fs::read_to_string(root().join("src/core/Cargo.toml")).unwrap();
    let part = text.split("\n[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    for line in part.lines().filter(|line| !line.trim().is_empty()) {
        let name = line.split(['.', ' ', '=']).next().unwrap();
        assert!(allowed.contains(&name), "core may not depend on {name}");
    }
}

#[test]
fn only_the_roof_names_drivers() {
    let drivers = ["dc_plane_postgres", "dc_plane_kafka", "dc_plane_s3", "dc_plane_airflow"];
    for (path, text) in sources() {
        let here = path.to_string_lossy();
        let own = here.starts_with("src/plane/") || here.starts_with("tests/");
        if own || ["src/app.rs", "src/config.rs"].contains(&here.as_ref()) {
            continue;
        }
        for driver in drivers {
            assert!(!text.contains(driver), "{here} names {driver}");
        }
    }
}

#[test]
fn only_the_hands_and_a_look_perform_acts() {
    for (path, text) in sources().into_iter().filter(|(path, _)| path.starts_with("src/agent")) {
        let here = path.to_string_lossy();
        let may = ["src/agent/execute.rs", "src/agent/peer.rs"].contains(&here.as_ref());
        let calls =
            text.contains(".perform(act") || text.contains(".perform(&act") || text.contains(".undo(&");
        assert!(may || !calls, "{here} changes a plane");
    }
}

#[test]
fn files_and_functions_stay_small() {
    let mut long = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > FILE_MAX {
            long.push(format!("{}: {} lines, at most {FILE_MAX}", path.display(), lines.len()));
        }
        for (at, line) in lines.iter().enumerate() {
            let body = line.trim_start();
            let words: Vec<&str> = body.split(' ').collect();
            let opens =
                words.iter().take(5).any(|w| *w == "fn") && !body.starts_with("//") && !body.ends_with(';');
            if !opens {
                continue;
            }
            let indent = line.len() - body.len();
            let close = format!("{}}}", " ".repeat(indent));
            let length = lines[at..].iter().position(|l| *l == close).map_or(0, |n| n + 1);
            if length > FUNCTION_MAX {
                long.push(format!("{}:{}: {length} lines, at most {FUNCTION_MAX}", path.display(), at + 1));
            }
        }
    }
    assert!(long.is_empty(), "too long:\n{}", long.join("\n"));
}

#[test]
fn every_room_says_what_it_is() {
    for (path, text) in sources() {
        let name = path.file_name().unwrap().to_string_lossy();
        if ["lib.rs", "main.rs", "mod.rs"].contains(&name.as_ref())
            && !path.to_string_lossy().contains("tests")
        {
            assert!(text.starts_with("//!"), "{} does not open with what it is", path.display());
        }
    }
}

/// Codes as they stand in a text: `DC-` and four digits.
fn codes(text: &str) -> BTreeSet<String> {
    let parts = text.split("DC-").skip(1);
    let four = parts.filter_map(|rest| rest.get(..4)).filter(|four| four.bytes().all(|b| b.is_ascii_digit()));
    four.map(|four| format!("DC-{four}")).collect()
}

#[test]
fn every_code_has_a_page_and_every_page_a_code() {
    let emitted: BTreeSet<String> = sources()
        .into_iter()
        .filter(|(path, _)| path.starts_with("src") && !path.to_string_lossy().contains("test"))
        .flat_map(|(_, text)| codes(&text))
        .collect();
    let pages: BTreeSet<String> = files(&root().join("src/core/codes"), &[".md"])
        .iter()
        .map(|page| page.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let without: Vec<_> = emitted.difference(&pages).collect();
    let unused: Vec<_> = pages.difference(&emitted).collect();
    assert!(without.is_empty(), "codes without a page: {without:?}");
    assert!(unused.is_empty(), "pages that nothing emits: {unused:?}");
    for page in files(&root().join("src/core/codes"), &[".md"]) {
        let text = fs::read_to_string(&page).unwrap();
        let code = page.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(text.starts_with(&format!("# {code}: ")), "{code} does not open with its title");
    }
}

#[test]
fn the_project_speaks_of_itself_alone() {
    let words = [
        concat!("/wo", "rk/"),
        concat!("crates", ".io"),
        concat!("pypi", ".org"),
        concat!("maven", ".org"),
        concat!("npm", "js"),
    ];
    let kinds = [".rs", ".md", ".toml", ".py", ".xml", ".sh", "run", ".proto", ".properties"];
    for path in files(&root(), &kinds) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for word in words {
            assert!(!text.contains(word), "{} has {word:?}", path.display());
        }
    }
}
