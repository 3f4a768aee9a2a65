//! The highest token seen per group and plane, durable: a lower one is never performed again.

use std::collections::BTreeMap;
use std::fs::File;
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
    /// Higher than all before: it must be on disk before its act begins.
    Higher,
    /// The same again, as after a restart.
    Same,
    /// A higher one was seen.
    Stale(Token),
}

/// Ranks a token by the highest one remembered. Pure; the simulation asks it too.
pub fn rank(highest: Option<Token>, token: Token) -> Rank {
    match highest {
        Some(highest) if highest > token => Rank::Stale(highest),
        Some(highest) if highest == token => Rank::Same,
        _ => Rank::Higher,
    }
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
    /// Errors: when the disk refuses; the act must then not be done, and nothing is remembered.
    pub fn raise(&self, group: &GroupName, plane: PlaneKind, token: Token) -> io::Result<Rank> {
        let mut known = self.known.lock();
        let key = format!("{group}/{plane}");
        let rank = rank(known.get(&key).copied(), token);
        if rank == Rank::Higher {
            let mut next = known.clone();
            next.insert(key, token);
            self.write(&next)?;
            *known = next;
        }
        Ok(rank)
    }

    fn write(&self, next: &BTreeMap<String, Token>) -> io::Result<()> {
        let fresh = self.file.with_extension("new");
        let mut out = File::create(&fresh)?;
        out.write_all(&serde_json::to_vec(next).map_err(io::Error::other)?)?;
        out.sync_all()?;
        std::fs::rename(&fresh, &self.file)?;
        // The name is the folder's: without this a power loss may bring back the file before.
        self.file.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> io::Result<GroupName> {
        GroupName::new("orders").map_err(io::Error::other)
    }

    #[test]
    fn a_lower_token_stays_stale_across_a_restart() -> io::Result<()> {
        let (dir, orders) = (tempfile::tempdir()?, orders()?);
        let first = Tokens::load(dir.path())?;
        assert_eq!(first.raise(&orders, PlaneKind::Kafka, Token(9))?, Rank::Higher);
        let again = Tokens::load(dir.path())?;
        assert_eq!(again.raise(&orders, PlaneKind::Kafka, Token(9))?, Rank::Same);
        assert_eq!(again.raise(&orders, PlaneKind::Kafka, Token(8))?, Rank::Stale(Token(9)));
        assert_eq!(again.raise(&orders, PlaneKind::S3, Token(8))?, Rank::Higher);
        Ok(())
    }

    #[test]
    fn a_full_disk_raises_nothing_and_forgets_nothing() -> io::Result<()> {
        let (dir, orders) = (tempfile::tempdir()?, orders()?);
        let tokens = Tokens::load(dir.path())?;
        assert_eq!(tokens.raise(&orders, PlaneKind::Kafka, Token(5))?, Rank::Higher);
        // Not by mode: tests may run as root, who writes anywhere.
        std::os::unix::fs::symlink("/dev/full", dir.path().join("tokens.new"))?;
        let full = tokens.raise(&orders, PlaneKind::Kafka, Token(9)).map_err(|cause| cause.kind());
        assert_eq!(full, Err(io::ErrorKind::StorageFull));
        assert_eq!(tokens.raise(&orders, PlaneKind::Kafka, Token(5))?, Rank::Same, "it is on disk already");
        assert_eq!(tokens.raise(&orders, PlaneKind::Kafka, Token(4))?, Rank::Stale(Token(5)));
        std::fs::remove_file(dir.path().join("tokens.new"))?;
        assert_eq!(tokens.raise(&orders, PlaneKind::Kafka, Token(9))?, Rank::Higher, "tried anew");
        let again = Tokens::load(dir.path())?;
        assert_eq!(again.raise(&orders, PlaneKind::Kafka, Token(8))?, Rank::Stale(Token(9)));
        Ok(())
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_no_memory_of_nothing() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("tokens.json"), b"{\"orders/kafka\": ")?;
        assert!(Tokens::load(dir.path()).is_err(), "half a file");
        std::fs::remove_file(dir.path().join("tokens.json"))?;
        std::fs::create_dir(dir.path().join("tokens.json"))?;
        assert!(Tokens::load(dir.path()).is_err(), "no file at all");
        Ok(())
    }
}
