//! Words that the house says are true: every code has its page, every command exists.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::ErrorKind;
use dc_core::codes::Code;
use dc_surface::cli::Cli;

/// Every source file below `src/`, and every page.
fn files(ends: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for item in std::fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| ends.contains(&e)) {
                found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

fn codes(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("DC-").filter_map(|(at, _)| {
        let code = text.get(at..at + 7)?;
        let digits = code[3..].bytes().all(|b| b.is_ascii_digit());
        let ends = !text[at + 7..].starts_with(|c: char| c.is_ascii_alphanumeric());
        (digits && ends).then_some(code)
    })
}

/// Code that ships: no tests beside or within it.
fn shipped(path: &Path, text: &str) -> Option<String> {
    let apart = path.components().any(|part| part.as_os_str() == "tests")
        || path.file_stem().is_some_and(|stem| stem == "tests");
    (!apart).then(|| text.split("#[cfg(test)]").next().unwrap_or_default().to_owned())
}

#[test]
fn every_code_that_is_said_has_a_page() {
    let known: BTreeSet<&str> = Code::all().collect();
    let mut missing = BTreeSet::new();
    for (path, text) in files(&["rs"]) {
        let Some(text) = shipped(&path, &text) else { continue };
        let said = codes(&text).filter(|code| !known.contains(code));
        missing.extend(said.map(|code| format!("{code} in {}", path.display())));
    }
    assert!(missing.is_empty(), "no page in src/core/codes for {missing:#?}");
}

#[test]
fn every_page_names_its_code_in_its_title_and_says_what_to_do() {
    for code in Code::all() {
        let page = Code::from_text(code).page().unwrap();
        assert!(page.starts_with(&format!("# {code}: ")), "{code} begins with {:?}", page.lines().next());
        assert!(page.lines().count() >= 5, "{code} says too little");
    }
}

/// Words behind the name in plain sentences of the source: names and remarks, no commands.
const PROSE: [&str; 6] = ["after", "authority", "begin", "begins", "probes", "voter"];

/// The commands in a text: what follows `dc-switch ` until something ends it.
fn commands(text: &str) -> Vec<String> {
    let ends = |c: char| matches!(c, '`' | '"' | '\n' | ',' | ';' | ')' | '(' | '\\' | '\'' | '|');
    text.match_indices("dc-switch ")
        .filter(|(at, _)| !text[..*at].ends_with(['/', '-', '_', '.']))
        .map(|(at, found)| {
            let rest = &text[at + found.len()..];
            rest.split(ends).next().unwrap_or_default().trim().to_owned()
        })
        .filter(|command| command.starts_with(|c: char| c.is_ascii_lowercase() || c == '-'))
        .filter(|command| !PROSE.iter().any(|word| command.split(' ').next() == Some(word)))
        .collect()
}

/// Whether the command line knows such a command. Placeholders stand for themselves; what
/// an example leaves out is no fault of it.
fn exists(command: &str) -> Result<(), String> {
    // two blanks set an explanation apart from the command before it
    let command = command.split("  ").next().unwrap_or_default();
    let words = command.split_whitespace().map(|word| if word.contains('{') { "orders" } else { word });
    let words = words.map(|word| word.trim_end_matches(['.', ':'])).filter(|word| !word.is_empty());
    match Cli::try_parse_from(std::iter::once("dc-switch").chain(words)) {
        Ok(_) => Ok(()),
        Err(e) => match e.kind() {
            ErrorKind::MissingRequiredArgument
            | ErrorKind::MissingSubcommand
            | ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Ok(()),
            _ => Err(e.to_string().lines().next().unwrap_or_default().to_owned()),
        },
    }
}

#[test]
fn every_command_that_is_advised_exists() {
    let mut wrong = BTreeSet::new();
    for (path, text) in files(&["rs", "md"]) {
        let markdown = path.extension().is_some_and(|e| e == "md");
        let text = if markdown { text } else { shipped(&path, &text).unwrap_or_default() };
        let advice: Vec<&str> = if markdown {
            // in prose only what is set as code is a command
            text.split('`').skip(1).step_by(2).collect()
        } else {
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect()
        };
        for command in advice.into_iter().flat_map(commands) {
            if let Err(why) = exists(&command) {
                wrong.insert(format!("{}: dc-switch {command}: {why}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_check_of_commands_can_fail() {
    assert!(exists("run attach {run}").is_ok() && exists("cert issue").is_ok());
    assert!(exists("lag orders --watch").is_err() && exists("switchover orders --to fra --yes").is_err());
}
