//! The oracle: judges each move from what clients were told and from what both sites hold, and from nothing else.
//!
//! It knows the product neither by code nor by log. Every check is a pure function over histories and contents, so
//! that a hand-made history can show each of them failing. A verdict is `invalid` when the evidence is too thin to
//! fail: a run nobody wrote in proves nothing.

pub mod groups;
pub mod marks;
pub mod writes;

use std::fmt;

use serde::{Serialize, Serializer};

use crate::world::{Plane, Site};

/// One move as the oracle sees it: from the end of the last judgement to the begin of this one.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Number of the move, from 1.
    pub number: usize,
    /// Where the window begins.
    pub from: u64,
    /// When the move was asked for.
    pub asked: u64,
    /// Where it ends: nothing acknowledged later is judged yet.
    pub to: u64,
    /// The site that was left, or that was not moved to.
    pub source: Site,
    /// The site that serves after it, as the operator was told.
    pub target: Site,
    /// The operator was told that it moved. If not, what only a move can show is not asked for.
    pub moved: bool,
}

/// What a finding of the oracle does to the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing found, enough seen.
    Pass,
    /// Too little was seen to say.
    Invalid,
    /// A law was broken.
    Fail,
}

impl Verdict {
    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Invalid => "invalid",
            Verdict::Fail => "fail",
        }
    }

    /// Exit code of the lab.
    pub fn code(self) -> u8 {
        match self {
            Verdict::Pass => 0,
            Verdict::Fail => 1,
            Verdict::Invalid => 2,
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// One finding of the oracle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What it does to the verdict.
    pub verdict: Verdict,
    /// Name of the check, stable.
    pub check: &'static str,
    /// The plane it is about, if one.
    pub plane: Option<Plane>,
    /// Number of the move, 0 for the whole run.
    pub number: usize,
    /// What was seen.
    pub text: String,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verdict.name(), self.check)?;
        if self.number > 0 {
            write!(f, " move {}", self.number)?;
        }
        if let Some(plane) = self.plane {
            write!(f, " {plane}")?;
        }
        write!(f, ": {}", self.text)
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// The worst of all reasons.
pub fn verdict(reasons: &[Reason]) -> Verdict {
    reasons.iter().map(|r| r.verdict).max().unwrap_or(Verdict::Pass)
}

/// Collects the reasons of one plane in one move.
#[derive(Debug)]
pub struct Findings {
    plane: Plane,
    number: usize,
    /// What was found so far.
    pub reasons: Vec<Reason>,
}

impl Findings {
    /// Nothing found yet.
    pub fn new(plane: Plane, number: usize) -> Findings {
        Findings { plane, number, reasons: Vec::new() }
    }

    /// A law is broken if `broken`.
    pub fn fail_if(&mut self, broken: bool, check: &'static str, text: impl FnOnce() -> String) {
        self.add(broken, Verdict::Fail, check, text);
    }

    /// The evidence is too thin if `thin`.
    pub fn invalid_if(&mut self, thin: bool, check: &'static str, text: impl FnOnce() -> String) {
        self.add(thin, Verdict::Invalid, check, text);
    }

    fn add(&mut self, found: bool, verdict: Verdict, check: &'static str, text: impl FnOnce() -> String) {
        if found {
            let (plane, number) = (Some(self.plane), self.number);
            self.reasons.push(Reason { verdict, check, plane, number, text: text() });
        }
    }
}

/// Milliseconds between two stamps, with a fraction; 0 if they are the other way round.
pub fn ms_between(from: u64, to: u64) -> f64 {
    let micros = to.saturating_sub(from).div_ceil(1_000); // up: no overlap is rounded away
    f64::from(u32::try_from(micros).unwrap_or(u32::MAX)) / 1_000.0
}
