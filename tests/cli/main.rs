//! The built command line against agents in this process, over mutual TLS on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::return_self_not_must_use, missing_docs)]

mod codes;

mod fake;
mod http;
mod orders;
mod reads;
mod terminal;

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// No command of these tests takes longer.
const LIMIT: Duration = Duration::from_mins(1);

/// What a command left behind.
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// Its one object.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {} {}", self.out, self.err))
    }
    /// Fails the test with everything it said, unless it ended so.
    #[track_caller]
    pub fn ended(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }
    /// Fails the test unless either stream holds each of these.
    #[track_caller]
    pub fn has(self, words: &[&str]) -> Self {
        for word in words {
            let said = self.out.contains(word) || self.err.contains(word);
            assert!(said, "{word:?} is missing\nstdout:\n{}\nstderr:\n{}", self.out, self.err);
        }
        self
    }
}

pub fn command(context: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dc-switch"));
    command.args(words).env("DC_SWITCH_CONFIG", context).env("TZ", "UTC").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

pub async fn switch(context: &Path, words: &[&str]) -> Said {
    let output =
        tokio::time::timeout(LIMIT, command(context, words).output()).await.expect("it ends").unwrap();
    said(&output)
}

fn said(output: &Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
