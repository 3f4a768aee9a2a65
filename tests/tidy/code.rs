//! Functions, opening words, and the pages of error codes.

use std::collections::BTreeSet;

use super::files::{all, has_end, read, rust};
use super::none;

/// Functions as rustfmt lays them out: from `fn` to the brace at the same depth.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let inner = line.trim_start();
        let depth = line.len() - inner.len();
        let plain = inner
            .trim_start_matches("pub ")
            .trim_start_matches("pub(crate) ")
            .trim_start_matches("pub(super) ")
            .trim_start_matches("const ")
            .trim_start_matches("async ");
        let Some(rest) = plain.strip_prefix("fn ") else { continue };
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let end = format!("{}}}", " ".repeat(depth));
        let closes = |l: &&str| **l == end || l.starts_with(&end) && l.trim_end() == end;
        let opens = lines[at..].iter().take_while(|l| !l.ends_with(';')).position(|l| l.ends_with('{'));
        if let (Some(_), Some(long)) = (opens, lines[at..].iter().position(closes)) {
            found.push((at + 1, name, long + 1));
        }
    }
    found
}

#[test]
fn a_function_fits_on_a_screen() {
    let mut faults = Vec::new();
    for (file, text) in rust() {
        for (line, name, long) in functions(&text) {
            if long > 70 {
                faults.push(format!("{file}:{line}: {name} has {long} lines"));
            }
        }
    }
    none(&faults, "a function has 70 lines at most");
}

#[test]
fn functions_are_measured_from_head_to_brace() {
    let text = "impl A {\n    pub async fn long(\n        &self,\n    ) -> u8 {\n        7\n    }\n\n    fn none(&self);\n}\n";
    assert_eq!(functions(text), [(2, "long".to_owned(), 5)]);
}

#[test]
fn every_room_says_what_it_is_first() {
    let opens =
        |text: &str| text.lines().find(|l| !l.trim().is_empty()).is_some_and(|l| l.starts_with("//!"));
    let mut faults = Vec::new();
    for (name, text) in rust() {
        let tests = name.contains("/tests/") || name.starts_with("tests/") || name.ends_with("/tests.rs");
        if !tests && name != "src/core/build.rs" && !opens(&text) {
            faults.push(name);
        }
    }
    none(&faults, "a module opens with //! saying what it is");
}

fn codes_in(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("DC-") {
        let digits: String = text[at + 3..].chars().take_while(char::is_ascii_digit).collect();
        if digits.len() == 4 {
            found.insert(format!("DC-{digits}"));
        }
    }
    found
}

#[test]
fn every_code_has_its_page_and_every_page_its_code() {
    // The parts of code that only tests run may name codes that nobody emits.
    let body = |text: &str| text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
    let pages: BTreeSet<String> = all()
        .iter()
        .filter_map(|name| name.strip_prefix("src/core/codes/")?.strip_suffix(".md").map(str::to_owned))
        .collect();
    let mut emitted = BTreeSet::new();
    for name in all() {
        let speaks = has_end(&name, &["rs", "py"]);
        if speaks && name.starts_with("src/") && !name.contains("/tests/") {
            emitted.extend(codes_in(&body(&read(&name).unwrap_or_default())));
        }
    }
    let missing = emitted.difference(&pages).map(|code| format!("{code} is emitted and has no page"));
    let unused = pages.difference(&emitted).map(|code| format!("{code} has a page and nobody emits it"));
    none(&missing.chain(unused).collect::<Vec<_>>(), "a page per code in src/core/codes");
}

#[test]
fn a_page_begins_with_its_code_and_says_what_to_do() {
    let mut faults = Vec::new();
    for name in all().iter().filter(|name| name.starts_with("src/core/codes/DC-")) {
        let text = read(name).unwrap();
        let code = name.trim_start_matches("src/core/codes/").trim_end_matches(".md");
        if !text.starts_with(&format!("# {code}: ")) {
            faults.push(format!("{name} does not begin with `# {code}: `"));
        }
        let lines = text.lines().count();
        if !(4..=30).contains(&lines) {
            faults.push(format!("{name} has {lines} lines"));
        }
    }
    none(&faults, "a page of 8 to 20 lines per code");
}

#[test]
fn an_adr_has_its_four_parts() {
    let mut faults = Vec::new();
    for name in all().iter().filter(|name| name.starts_with("src/adr/")) {
        let text = read(name).unwrap().to_lowercase();
        for part in ["context", "decision", "gave up", "wrong"] {
            if !text.contains(part) {
                faults.push(format!("{name} does not say: {part}"));
            }
        }
    }
    none(&faults, "context, decision, what we gave up, how we would notice we were wrong");
}
