//! What a pass remembers of each pair of objects: the ETag at either side when both were known to be the same.
//!
//! ETags compare only between objects that were written the same way, so each side is compared with its own
//! remembered one. Losing the memory costs reading, never an object: what is not remembered is compared by content.

use std::path::{Path, PathBuf};

use dc_plane::PlaneError;
use redb::{
    Database, DatabaseError, ReadOnlyTable, ReadableDatabase as _, StorageError, TableDefinition, TableError,
};

const PAIRS: TableDefinition<'static, &str, &str> = TableDefinition::new("pairs");

/// One object that both sides are known to have, or have had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    /// ETag at the other site; empty when only our own is known.
    pub(crate) theirs: String,
    /// ETag at this site.
    pub(crate) ours: String,
    /// Bytes.
    pub(crate) size: u64,
}

impl Row {
    fn text(&self) -> String {
        format!("{}|{}|{}", self.size, self.theirs, self.ours)
    }
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '|');
        let size = parts.next()?.parse().ok()?;
        Some(Self { size, theirs: parts.next()?.to_owned(), ours: parts.next()?.to_owned() })
    }
}

/// The open memory of one group at one site. Open it for a pass and drop it after.
pub(crate) struct Memory {
    db: Database,
    table: Option<ReadOnlyTable<&'static str, &'static str>>,
}

fn failed(cause: &dyn std::error::Error) -> PlaneError {
    PlaneError::failed("use the memory of passes", cause)
}

/// Path of the memory of a group.
pub(crate) fn path(data_dir: &Path, group: &str) -> PathBuf {
    data_dir.join(format!("s3-{group}.redb"))
}

impl Memory {
    /// Opens the memory; a damaged one is set aside and begun anew.
    ///
    /// Errors: `Failed` when the disk refuses, or another pass holds it.
    pub(crate) fn open(path: &Path) -> Result<Self, PlaneError> {
        let db = match Database::create(path) {
            Err(DatabaseError::Storage(StorageError::Corrupted(why))) => {
                tracing::warn!(%why, path = %path.display(), "memory of passes is damaged and begun anew");
                std::fs::rename(path, path.with_extension("damaged")).map_err(|e| failed(&e))?;
                Database::create(path)
            }
            other => other,
        }
        .map_err(|e| failed(&e))?;
        let read = db.begin_read().map_err(|e| failed(&e))?;
        let table = match read.open_table(PAIRS) {
            Ok(table) => Some(table),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(e) => return Err(failed(&e)),
        };
        Ok(Self { db, table })
    }

    /// What was remembered of a key when the memory was opened.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Row>, PlaneError> {
        let Some(table) = &self.table else { return Ok(None) };
        let found = table.get(key).map_err(|e| failed(&e))?;
        Ok(found.and_then(|row| Row::parse(row.value())))
    }

    /// Remembers rows; on disk when it returns.
    pub(crate) fn learn(&self, rows: &[(String, Row)]) -> Result<(), PlaneError> {
        if rows.is_empty() {
            return Ok(());
        }
        let write = self.db.begin_write().map_err(|e| failed(&e))?;
        {
            let mut table = write.open_table(PAIRS).map_err(|e| failed(&e))?;
            for (key, row) in rows {
                table.insert(key.as_str(), row.text().as_str()).map_err(|e| failed(&e))?;
            }
        }
        write.commit().map_err(|e| failed(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_there_after_opening_again() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = path(dir.path(), "orders");
        let row = Row { theirs: "a-2".into(), ours: String::new(), size: 7 };
        Memory::open(&path)?.learn(&[("logs/x".into(), row.clone())])?;
        assert_eq!(Memory::open(&path)?.get("logs/x")?, Some(row));
        assert_eq!(Memory::open(&path)?.get("logs/y")?, None);
        Ok(())
    }
}
