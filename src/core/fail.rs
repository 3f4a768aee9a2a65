//! What an operator is told when something is not done.

use serde::{Deserialize, Serialize};

use crate::act::Finding;
use crate::codes::Code;

/// What a command ends with: the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// Done as asked.
    Done = 0,
    /// Something unexpected.
    Unexpected = 1,
    /// The command was not understood.
    Usage = 2,
    /// No agent or no quorum answers.
    NoQuorum = 3,
    /// Not known, or not allowed.
    NotAllowed = 4,
    /// Refused by a rule; nothing was changed.
    Refused = 5,
    /// Failed and rolled back; the old site serves.
    RolledBack = 6,
    /// Stopped half-way; a human must act.
    NeedsHuman = 7,
    /// The wait timed out; the run goes on.
    StillRunning = 8,
    /// Confirmation is missing.
    NotConfirmed = 9,
    /// Works, but a check found something.
    Findings = 10,
    /// Detached; the run goes on.
    Detached = 130,
}

/// Why something was not done, in the four lines that help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fail {
    /// Page of the catalogue.
    pub code: Code,
    /// What failed, and whether anything was changed.
    pub what: String,
    /// Why, with number and limit.
    pub why: String,
    /// Every finding, when there are several.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// The next command to type.
    pub next: String,
    /// What the process ends with.
    pub exit: Exit,
}

impl Fail {
    /// A refusal: a rule forbids it and nothing was changed.
    pub fn refused(code: Code, what: impl Into<String>, why: impl Into<String>) -> Self {
        let what = format!("{}; nothing was changed", what.into());
        Self { code, what, why: why.into(), findings: Vec::new(), next: String::new(), exit: Exit::Refused }
    }

    /// A failure of another kind.
    pub fn new(code: Code, exit: Exit, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { code, what: what.into(), why: why.into(), findings: Vec::new(), next: String::new(), exit }
    }

    /// The same with the command to type next.
    #[must_use]
    pub fn next(mut self, command: impl Into<String>) -> Self {
        self.next = command.into();
        self
    }

    /// The same with all findings.
    #[must_use]
    pub fn with(mut self, findings: Vec<Finding>) -> Self {
        self.findings = findings;
        self
    }
}

impl std::fmt::Display for Fail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "error[{}]: {}: {}", self.code, self.what, self.why)
    }
}
impl std::error::Error for Fail {}
