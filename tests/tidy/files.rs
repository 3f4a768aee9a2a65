//! The files of the house as git knows them, and what none of them may hold.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::none;

/// Where the house stands.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file that is, or is about to be, in the repository.
pub fn all() -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    let names = match listed {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        _ => walk(&root(), &root()).join("\n"), // an unpacked archive has no git
    };
    let names = names.lines().filter(|name| root().join(name).is_file());
    names.map(str::to_owned).collect()
}

fn walk(folder: &Path, base: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if path.is_dir() && !["target", ".git", "__pycache__"].contains(&name.as_str()) {
            found.extend(walk(&path, base));
        } else if path.is_file() {
            found.push(path.strip_prefix(base).unwrap().display().to_string());
        }
    }
    found
}

/// Whether a name ends in one of these, after its last dot.
pub fn has_end(name: &str, ends: &[&str]) -> bool {
    Path::new(name).extension().and_then(|e| e.to_str()).is_some_and(|end| ends.contains(&end))
}

/// A file's text; none of one that is no text.
pub fn read(name: &str) -> Option<String> {
    fs::read_to_string(root().join(name)).ok()
}

/// Rust files that people write.
pub fn rust() -> Vec<(String, String)> {
    let written = |name: &String| has_end(name, &["rs"]) && !name.starts_with("src/wire/pb/");
    all().into_iter().filter(written).filter_map(|name| read(&name).map(|text| (name, text))).collect()
}

#[test]
fn the_house_speaks_of_itself_alone() {
    // Put together here, or this file would be the one to name them.
    let words = [
        ["/wo", "rk/"],
        ["/ro", "ot/."],
        ["/home", "/"],
        ["arti", "factory"],
        ["crates", ".io"],
        ["pypi", ".org"],
        ["maven", ".org"],
        ["npm", "js"],
        ["TO", "DO:"],
        ["FIX", "ME"],
        ["@@", "RES"],
    ];
    let words: Vec<String> = words.iter().map(|parts| parts.concat()).collect();
    let mut faults = Vec::new();
    for name in all().into_iter().filter(|name| name != "Cargo.lock") {
        let Some(text) = read(&name) else { continue };
        for (line, said) in text.lines().enumerate() {
            for word in words.iter().filter(|word| said.contains(word.as_str())) {
                faults.push(format!("{name}:{}: {word}", line + 1));
            }
        }
    }
    none(&faults, "no path of one machine, no registry's host, no promise for later");
}

#[test]
fn nothing_that_a_machine_made_is_kept_but_what_must_be() {
    const MADE: [&str; 9] = ["pyc", "class", "o", "so", "jar", "log", "orig", "rej", "swp"];
    let faults: Vec<String> = all().into_iter().filter(|name| has_end(name, &MADE)).collect();
    none(&faults, "made by a machine, made again by any other");
}

#[test]
fn a_file_is_read_in_one_sitting() {
    let (mut long, mut faults) = (Vec::new(), Vec::new());
    for (name, text) in rust() {
        let lines = text.lines().count();
        if lines > 800 {
            faults.push(format!("{name}: {lines} lines"));
        } else if lines > 500 {
            long.push(format!("{name}: {lines} lines"));
        }
    }
    if !long.is_empty() {
        println!("longer than 500 lines, to be split by topic:\n  {}", long.join("\n  "));
    }
    none(&faults, "a file has 500 lines, never more than 800");
}

#[test]
fn scripts_say_what_they_are_and_may_be_run() {
    use std::os::unix::fs::PermissionsExt;
    let mut faults = Vec::new();
    for name in all() {
        let Some(text) = read(&name).filter(|text| text.starts_with("#!/")) else { continue };
        let mode = fs::metadata(root().join(&name)).unwrap().permissions().mode();
        if mode & 0o111 == 0 {
            faults.push(format!("{name} may not be run"));
        }
        if !text.lines().nth(1).is_some_and(|line| line.starts_with('#') || line.starts_with("\"\"\"")) {
            faults.push(format!("{name} does not say what it does in its second line"));
        }
    }
    none(&faults, "scripts");
}
