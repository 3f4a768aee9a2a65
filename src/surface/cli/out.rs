//! Where words go and how they look: data to stdout, talk to stderr.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use console::{Style, Term};
use serde_json::{Value, json};

/// What stdout carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Words and tables
    Human,
    /// One object
    Json,
    /// One object per line, as things happen
    Jsonl,
}

/// Whether words are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// How this command speaks.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // each asks its own stream
pub(crate) struct Out {
    format: Format,
    color: bool,
    color_err: bool,
    asks: bool,
    live: bool,
}

impl Out {
    pub(crate) fn new(format: Format, color: Color, no_input: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let wanted = |tty: bool| match color {
            Color::Auto => tty && !plain,
            Color::Always => true,
            Color::Never => false,
        };
        let (stdout, stderr) = (std::io::stdout().is_terminal(), std::io::stderr().is_terminal());
        let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Self {
            format,
            color: wanted(stdout && !dumb),
            color_err: wanted(stderr && !dumb),
            asks: !no_input && stderr && std::io::stdin().is_terminal(),
            live: stderr && !dumb && format == Format::Human,
        }
    }

    /// Whether stdout is for people.
    pub(crate) fn human(&self) -> bool {
        self.format == Format::Human
    }
    /// Whether stdout carries each event.
    pub(crate) fn stream(&self) -> bool {
        self.format == Format::Jsonl
    }
    /// Whether a person can be asked.
    pub(crate) fn asks(&self) -> bool {
        self.asks
    }
    /// Whether the screen may be redrawn.
    pub(crate) fn live(&self) -> bool {
        self.live
    }

    /// Lines of data that line up.
    pub(crate) fn table(&self, indent: &str, rows: &[Vec<String>]) {
        for line in super::table::lines(indent, rows) {
            self.print(&line);
        }
    }
    /// One line of data. A reader that has gone away is no failure of the command.
    #[allow(clippy::unused_self)] // who prints says through what
    pub(crate) fn print(&self, line: &str) {
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
    /// One line of talk.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn say(&self, line: &str) {
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
    /// One object of data: over several lines for `json`, on one for `jsonl`.
    pub(crate) fn json(&self, value: &Value) {
        let text = if self.format == Format::Json { format!("{value:#}") } else { value.to_string() };
        self.print(&text);
    }

    pub(crate) fn green(&self, text: &str) -> String {
        paint(self.color, Style::new().green(), text)
    }
    pub(crate) fn yellow(&self, text: &str) -> String {
        paint(self.color, Style::new().yellow(), text)
    }
    pub(crate) fn red(&self, text: &str) -> String {
        paint(self.color, Style::new().red(), text)
    }
    pub(crate) fn bold(&self, text: &str) -> String {
        paint(self.color, Style::new().bold(), text)
    }
    pub(crate) fn red_err(&self, text: &str) -> String {
        paint(self.color_err, Style::new().red().bold(), text)
    }
    /// The same for talk.
    pub(crate) fn for_talk(&self) -> Self {
        Self { color: self.color_err, ..self.clone() }
    }
}

fn paint(on: bool, style: Style, text: &str) -> String {
    style.force_styling(on).apply_to(text).to_string()
}

/// Columns of the terminal that talk goes to.
pub(crate) fn columns() -> usize {
    usize::from(Term::stderr().size_checked().map_or(100, |(_, columns)| columns))
}

/// Text from outside, unable to steer a terminal or to turn the direction of writing.
pub(crate) fn clean(text: &str) -> String {
    let harmless = |c: char| match c {
        '\n' => c,
        c if c.is_control() => '?',
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '?',
        c => c,
    };
    text.chars().map(harmless).collect()
}

/// A body as scripts know it.
pub(crate) fn envelope(mut body: Value) -> Value {
    if let Value::Object(fields) = &mut body {
        fields.insert("schema".into(), json!("dc-switch/v1"));
        body
    } else {
        json!({"schema": "dc-switch/v1", "items": body})
    }
}

/// A span of milliseconds, short.
pub(crate) fn span(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{}m{:02}s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{}h{:02}m", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// A count with its thousands set apart.
pub(crate) fn count(of: u64) -> String {
    let digits = of.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes as people read them.
pub(crate) fn bytes(of: u64) -> String {
    match of {
        0..1_000 => format!("{of} B"),
        1_000..1_000_000 => format!("{}.{} kB", of / 1_000, of % 1_000 / 100),
        1_000_000..1_000_000_000 => format!("{}.{} MB", of / 1_000_000, of % 1_000_000 / 100_000),
        _ => format!("{}.{} GB", of / 1_000_000_000, of % 1_000_000_000 / 100_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_text_cannot_steer_a_terminal() {
        assert_eq!(clean("a\u{1b}[31mb\r\u{202e}c\u{9b}d\ne"), "a?[31mb??c?d\ne");
    }

    #[test]
    fn figures_carry_their_unit() {
        assert_eq!(
            (span(940), span(71_500), span(7_380_000)),
            ("940 ms".into(), "1m11s".into(), "2h03m".into())
        );
        assert_eq!(
            (count(1_204), count(999), count(1_000_000)),
            ("1,204".into(), "999".into(), "1,000,000".into())
        );
        assert_eq!((bytes(999), bytes(18_432_000)), ("999 B".into(), "18.4 MB".into()));
    }
}
