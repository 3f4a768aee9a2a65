//! The highest token seen per group and plane, durable: a lower one is never performed again.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use dc_core::ids::{GroupName, PlaneKind, Token};
use parking_lot::Mutex;

/// Remembered tokens, written before the first act of each.
pub struct Tokens {
    file: PathBuf,
    known: Mutex<BTreeMap<String, Token>>,
}

/// What a token is to what was seen before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// Higher than all before, or the same again after a restart.
    Current,
    /// A higher one was seen.
    Stale(Token),
}

impl Tokens {
    /// Reads what was remembered.
    ///
    /// Errors: when the file is there and cannot be read; then nothing may be performed.
    pub fn load(data_dir: &Path) -> io::Result<Self> {
        let file = data_dir.join("tokens.json");
        let known = match std::fs::read(&file) {
            Ok(body) => serde_json::from_slice(&body).map_err(io::Error::other)?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(cause) => return Err(cause),
        };
        Ok(Self { file, known: Mutex::new(known) })
    }

    /// Raises the memory to a token, on disk before it returns.
    ///
    /// Errors: when the disk refuses; the act must then not be done.
    pub fn raise(&self, group: &GroupName, plane: PlaneKind, token: Token) -> io::Result<Rank> {
        let mut known = self.known.lock();
        let key = format!("{group}/{plane}");
        match known.get(&key) {
            Some(highest) if *highest > token => return Ok(Rank::Stale(*highest)),
            Some(highest) if *highest == token => return Ok(Rank::Current),
            _ => {}
        }
        let mut next = known.clone();
        next.insert(key, token);
        let fresh = self.file.with_extension("new");
        let mut out = std::fs::File::create(&fresh)?;
        out.write_all(&serde_json::to_vec(&next).map_err(io::Error::other)?)?;
        out.sync_all()?;
        std::fs::rename(&fresh, &self.file)?;
        *known = next;
        Ok(Rank::Current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_token_stays_stale_across_a_restart() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let orders = GroupName::new("orders").map_err(io::Error::other)?;
        let first = Tokens::load(dir.path())?;
        assert_eq!(first.raise(&orders, PlaneKind::Kafka, Token(9))?, Rank::Current);
        let again = Tokens::load(dir.path())?;
        assert_eq!(again.raise(&orders, PlaneKind::Kafka, Token(9))?, Rank::Current);
        assert_eq!(again.raise(&orders, PlaneKind::Kafka, Token(8))?, Rank::Stale(Token(9)));
        assert_eq!(again.raise(&orders, PlaneKind::S3, Token(8))?, Rank::Current);
        Ok(())
    }
}
