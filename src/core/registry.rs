//! What Raft replicates, and the one function that changes it.

use serde::{Deserialize, Serialize};

use crate::ids::Token;

/// The replicated state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {}

/// A proposed change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {}

/// What applying a command answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// It was applied.
    Done,
}

impl Registry {
    /// Applies one command. Pure and total: the same state and command give the same answer everywhere.
    pub fn apply(&mut self, _at: Token, command: &Command) -> Answer {
        match *command {}
    }
}
