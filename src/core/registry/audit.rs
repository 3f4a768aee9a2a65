//! The hash-chained record of decisions and acts.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ids::Token;
use crate::time::WallTime;

/// Entries kept in the replicated state; older ones live in the agents' files.
const KEPT: usize = 1000;

/// One line of the audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Place in the log.
    pub at: Token,
    /// For people.
    pub wall: WallTime,
    /// Who.
    pub by: String,
    /// What, in one line.
    pub what: String,
    /// SHA-256 over the hash before and this entry, in hex.
    pub hash: String,
}

/// The chain's newest part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Oldest first.
    pub entries: VecDeque<AuditEntry>,
    /// Hash before the first one kept.
    pub before: String,
}

impl Audit {
    /// Appends a line.
    pub fn note(&mut self, at: Token, wall: WallTime, by: &str, what: String) {
        let hash = link(self.head(), at, wall, by, &what);
        self.entries.push_back(AuditEntry { at, wall, by: by.to_owned(), what, hash });
        if self.entries.len() > KEPT
            && let Some(oldest) = self.entries.pop_front()
        {
            self.before = oldest.hash;
        }
    }

    /// Hash of the newest entry.
    pub fn head(&self) -> &str {
        self.entries.back().map_or(&self.before, |entry| &entry.hash)
    }

    /// Whether no kept entry was changed, dropped or inserted.
    pub fn unbroken(&self) -> bool {
        let mut before = self.before.as_str();
        self.entries.iter().all(|e| {
            let whole = e.hash == link(before, e.at, e.wall, &e.by, &e.what);
            before = &e.hash;
            whole
        })
    }
}

fn link(before: &str, at: Token, wall: WallTime, by: &str, what: &str) -> String {
    let mut hash = Sha256::new();
    for part in [before, &at.to_string(), &wall.0.to_string(), by, what] {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// Bytes as text, two digits each.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |of: u8| char::from_digit(u32::from(of), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_word_breaks_the_chain_even_after_old_entries_left() {
        let mut audit = Audit::default();
        for i in 0..1500 {
            audit.note(Token(i), WallTime(i), "agent/rome", format!("entry {i}"));
        }
        assert!(audit.unbroken() && audit.entries.len() == KEPT);
        audit.entries[7].what.push('!');
        assert!(!audit.unbroken());
    }
}
