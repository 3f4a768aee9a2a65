//! Grants taken without a record in Raft, kept on disk before they are taken: by a self-fence, which must not wait
//! for the quorum, and by the audit of a standby.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dc_core::ids::GroupName;
use dc_core::position::Grant;
use dc_plane::PlaneError;

/// Two files in the agent's folder, mode 0600.
pub struct Kept {
    dir: PathBuf,
    group: GroupName,
}

/// Why grants were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The site closed itself; a reopen gives them back.
    Closed,
    /// They had no business at a standby; a person decides.
    Audited,
}

impl Kept {
    /// Keeps the grants of a group in that folder.
    pub fn new(dir: PathBuf, group: &GroupName) -> Self {
        Self { dir, group: group.clone() }
    }

    /// The file.
    pub fn path(&self, why: Why) -> PathBuf {
        let word = match why {
            Why::Closed => "closed",
            Why::Audited => "removed",
        };
        self.dir.join(format!("kafka-{word}-{}.json", self.group))
    }

    /// What is kept; none when nothing is.
    ///
    /// Errors: a file that cannot be read or is no list of grants. It is never taken for an empty one.
    pub fn read(&self, why: Why) -> Result<Option<BTreeSet<Grant>>, PlaneError> {
        let path = self.path(why);
        let wrong = |e: &dyn std::error::Error| PlaneError::failed(format!("read {}", path.display()), e);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| wrong(&e)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(wrong(&e)),
        }
    }

    /// Adds grants to what is kept; on disk, folder included, when this returns. Repeat: safe.
    pub fn add(
        &self,
        why: Why,
        grants: impl IntoIterator<Item = Grant>,
    ) -> Result<BTreeSet<Grant>, PlaneError> {
        let known = self.read(why)?;
        let mut all = known.clone().unwrap_or_default();
        all.extend(grants);
        if known.as_ref() == Some(&all) {
            return Ok(all);
        }
        let path = self.path(why);
        self.write(&path, &all).map_err(|e| PlaneError::failed(format!("write {}", path.display()), &e))?;
        Ok(all)
    }

    fn write(&self, path: &Path, all: &BTreeSet<Grant>) -> std::io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let fresh = path.with_extension("new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(all)?)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        fs::File::open(&self.dir)?.sync_all()
    }

    /// Forgets what is kept, once it was given back. Repeat: safe.
    pub fn forget(&self, why: Why) -> Result<(), PlaneError> {
        let path = self.path(why);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(PlaneError::failed(format!("remove {}", path.display()), &e))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::acl::on_topic;

    #[test]
    fn what_is_kept_survives_grows_and_is_nobody_elses_to_read() {
        let (Ok(dir), Ok(group)) = (tempfile::tempdir(), GroupName::new("orders")) else { panic!("set up") };
        let kept = Kept::new(dir.path().join("agent"), &group);
        assert_eq!(kept.read(Why::Closed), Ok(None));
        assert!(kept.add(Why::Closed, [on_topic("app", "t", "write")]).is_ok());
        assert!(kept.add(Why::Closed, [on_topic("app", "t", "read")]).is_ok_and(|all| all.len() == 2));
        let again = Kept::new(dir.path().join("agent"), &group);
        assert!(again.read(Why::Closed).is_ok_and(|found| found.is_some_and(|all| all.len() == 2)));
        assert_eq!(again.read(Why::Audited), Ok(None));
        let mode = fs::metadata(kept.path(Why::Closed)).map(|m| m.permissions().mode() & 0o777);
        assert!(mode.is_ok_and(|mode| mode == 0o600));
        assert_eq!((kept.forget(Why::Closed), kept.forget(Why::Closed)), (Ok(()), Ok(())));
        assert_eq!(kept.read(Why::Closed), Ok(None));
    }

    #[test]
    fn a_spoiled_file_is_an_error_and_not_an_empty_list() {
        let (Ok(dir), Ok(group)) = (tempfile::tempdir(), GroupName::new("orders")) else { panic!("set up") };
        let kept = Kept::new(dir.path().to_path_buf(), &group);
        assert!(fs::write(kept.path(Why::Closed), "[{").is_ok());
        assert!(kept.read(Why::Closed).is_err());
        assert!(kept.add(Why::Closed, []).is_err());
    }
}
