//! What this site must remember of its own acts across a death: who closed the writers, and the last epoch it opened.

use std::path::{Path, PathBuf};

use dc_core::ids::{Epoch, RunId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Reasons for which this site's writers are shut out. They are let in when none is left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marks {
    /// A run fenced them.
    pub(crate) run: Option<RunId>,
    /// The site closed itself.
    pub(crate) site: bool,
    /// The site is the standby.
    pub(crate) standby: bool,
    /// The last epoch in which this site let its writers in.
    pub(crate) opened: Option<Epoch>,
    /// The epoch in which it last turned to pulling.
    pub(crate) pulls: Option<Epoch>,
}

impl Marks {
    /// Whether any reason to be closed is left.
    pub(crate) fn closed(&self) -> bool {
        self.run.is_some() || self.site || self.standby
    }
}

/// The marks on disk, with a copy in memory.
pub(crate) struct State {
    path: PathBuf,
    marks: Mutex<Marks>,
}

impl State {
    /// Reads the marks of a group, none if there is no file yet.
    pub(crate) fn open(path: PathBuf) -> Result<Self, String> {
        let marks = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Marks::default(),
            Err(e) => return Err(format!("{}: {e}", path.display())),
        };
        Ok(Self { path, marks: Mutex::new(marks) })
    }

    pub(crate) fn now(&self) -> Marks {
        self.marks.lock().clone()
    }

    /// Changes the marks; they are on disk before this returns.
    pub(crate) fn change(&self, how: impl FnOnce(&mut Marks)) -> std::io::Result<()> {
        let mut held = self.marks.lock();
        let mut next = held.clone();
        how(&mut next);
        if next != *held {
            let text = serde_json::to_vec_pretty(&next)?;
            write_whole(&self.path, &text)?;
            *held = next;
        }
        Ok(())
    }
}

/// Replaces a file so that after any death it is the old one or the new one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    let dir = path.parent().unwrap_or(Path::new("."));
    let fresh = path.with_extension("new");
    let mut file = std::fs::File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    std::fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_outlive_the_process_that_made_them() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("s3-orders.json");
        let state = State::open(path.clone())?;
        state.change(|m| m.run = Some(RunId("01A".into())))?;
        drop(state);
        let again = State::open(path.clone())?;
        assert!(again.now().closed() && again.now().run == Some(RunId("01A".into())));
        std::fs::write(&path, "half a fi")?;
        assert!(State::open(path).is_err());
        Ok(())
    }
}
