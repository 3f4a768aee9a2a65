//! What this site must remember about its fences and half-done work, outside the data directory.
//!
//! A rewind and a base backup carry files of the data directory from site to site; a mark there would become the
//! other site's. Marks are durable before what they announce is begun.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use dc_core::ids::{Epoch, RunId, Token};
use dc_plane::PlaneError;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::conf;

/// A fence that a run holds here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FenceMark {
    /// Which run.
    pub run: RunId,
    /// The epoch that the run creates.
    pub epoch: Epoch,
    /// Log index of the intent that set it.
    pub token: Token,
}

/// Replay delays of a standby as they were in the auto file before a run set them to 0; none for not set there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Delays {
    /// `max_standby_streaming_delay`.
    pub streaming: Option<String>,
    /// `max_standby_archive_delay`.
    pub archive: Option<String>,
}

/// Everything remembered.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Marks {
    /// The fence of a run, in force until its own undo, or until a later epoch opened or followed here.
    pub fence: Option<FenceMark>,
    /// A run made its target synchronous; upkeep leaves that alone until the run takes it back.
    pub pre_sync: Option<RunId>,
    /// Closed because the lease ended; a reopen may take it away.
    pub self_closed: bool,
    /// Replay delays to give back.
    pub delays: Option<Delays>,
    /// A rewind or base backup under way: this site's own configuration files are kept aside.
    pub rebuilding: bool,
}

/// The marks of one site, on disk. Nothing is cached: what a dropped act wrote counts.
#[derive(Debug)]
pub(crate) struct MarkStore {
    path: PathBuf,
}

/// One writer at a time in this process, whichever driver it belongs to.
static WRITING: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

impl MarkStore {
    /// Opens the marks; a missing file means none.
    ///
    /// Errors: unreadable or not understood. Nobody may then guess that no fence stands.
    pub fn open(dir: &Path) -> Result<Self, String> {
        let store = Self { path: dir.join("marks.json") };
        store.get().map_err(|e| e.to_string())?;
        Ok(store)
    }

    /// The marks as they stand.
    ///
    /// Errors: unreadable or not understood.
    pub fn get(&self) -> Result<Marks, PlaneError> {
        read(&self.path)
    }

    /// Changes the marks and returns once the change is on disk. An unchanged value costs nothing.
    ///
    /// A caller that is dropped leaves either the old marks or the new ones, and nobody writes in between.
    pub async fn update(&self, change: impl FnOnce(&mut Marks) + Send + 'static) -> Result<(), PlaneError> {
        let guard = Arc::clone(&WRITING).lock_owned().await;
        let path = self.path.clone();
        let write = tokio::task::spawn_blocking(move || {
            let _one = guard;
            let now = read(&path)?;
            let mut next = now.clone();
            change(&mut next);
            if next == now {
                return Ok(());
            }
            let text = serde_json::to_vec_pretty(&next).map_err(|e| PlaneError::failed("write marks", &e))?;
            conf::replace(&path, &text, true)
        });
        write.await.map_err(|e| PlaneError::failed("write marks", &e))?
    }
}

fn read(path: &Path) -> Result<Marks, PlaneError> {
    let text = conf::read(path)?;
    if text.is_empty() && !path.exists() {
        return Ok(Marks::default());
    }
    serde_json::from_str(&text).map_err(|e| PlaneError::failed(format!("read {}", path.display()), &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_fence_is_remembered_by_the_next_process() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let store = MarkStore::open(dir.path()).map_err(anyhow::Error::msg)?;
        assert_eq!(store.get()?, Marks::default());
        let mark = FenceMark { run: RunId("01A".into()), epoch: Epoch::default(), token: Token(7) };
        let set = mark.clone();
        store.update(|m| m.fence = Some(set)).await?;
        let again = MarkStore::open(dir.path()).map_err(anyhow::Error::msg)?;
        assert_eq!(again.get()?.fence, Some(mark));
        Ok(())
    }

    #[test]
    fn damaged_marks_are_refused_and_not_taken_for_none() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("marks.json"), "{\"fen")?;
        assert!(MarkStore::open(dir.path()).is_err());
        Ok(())
    }
}
