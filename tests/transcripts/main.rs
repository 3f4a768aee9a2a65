//! Stories: what happens is told above the line, what follows from it below.
//!
//! They run the planner and the registry with scripted hands. After a change that is meant,
//! `TRANSCRIPTS=write cargo test --test transcripts` writes what is told now.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on must say so")]

mod stage;

use std::fs;
use std::path::Path;

const LINE: &str = "----";

#[test]
fn every_story_ends_as_it_is_told() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(files.len() >= 6, "{} stories", files.len());
    let rewrite = std::env::var("TRANSCRIPTS").is_ok_and(|said| said == "write");
    let mut wrong = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let (told, wanted) = text.split_once(&format!("{LINE}\n")).unwrap_or((&text, ""));
        let found = stage::play(told);
        if rewrite {
            fs::write(&path, format!("{told}{LINE}\n{found}")).unwrap();
        } else if found != wanted {
            wrong.push(format!("{}\n--- is told\n{wanted}--- happens\n{found}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
