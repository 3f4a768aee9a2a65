//! The manifest of a DAG release: what it holds, in one canonical form, and the root over it.

use dc_core::ids::{Epoch, GroupName, SiteId};
use dc_core::position::DagRelease;
use dc_core::time::WallTime;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::tree::checked_path;

/// Format word of a manifest; another word is another format.
const FORMAT: &str = "dcswitch/tree/v1";
/// Format word of a sealed manifest.
const SEALED: &str = "dcswitch/release/v1";

/// One file of a release.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Relative, parts joined by `/`, no part `.` or `..`.
    pub path: String,
    /// 420 (0644) or 493 (0755).
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Of the bytes, 64 hex digits.
    pub sha256: String,
}

/// All files of a release, sorted by path. Its root follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    files: Vec<Entry>,
}

/// What is published once the quorum committed a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedManifest {
    /// Format word.
    pub format: String,
    /// Of which group.
    pub group: GroupName,
    /// Serial and root.
    pub release: DagRelease,
    /// The one before it.
    pub parent: Option<DagRelease>,
    /// In which it was committed.
    pub epoch: Epoch,
    /// Where it was published.
    pub site: SiteId,
    /// By whom, for people.
    pub author: String,
    /// When, for people.
    pub created: WallTime,
    /// All files.
    pub files: Vec<Entry>,
}

/// A manifest that must not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the manifest is not valid: {0}")]
pub struct BadManifest(pub(crate) String);

fn bad<T>(why: impl Into<String>) -> Result<T, BadManifest> {
    Err(BadManifest(why.into()))
}

/// Whether a text is a SHA-256 as this room writes it.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl Manifest {
    /// The manifest of these files, in canonical order.
    ///
    /// Errors: as `parse`.
    pub fn new(mut files: Vec<Entry>) -> Result<Self, BadManifest> {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let manifest = Self { format: FORMAT.to_owned(), files };
        manifest.check()?;
        Ok(manifest)
    }

    /// Reads a manifest that came from outside and proves that it is the one with this root.
    ///
    /// Errors: not canonical, a path that leads outside, another root.
    pub fn parse(bytes: &[u8], root: &str) -> Result<Self, BadManifest> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| BadManifest(e.to_string()))?;
        manifest.check()?;
        let found = manifest.root();
        if found != root {
            return bad(format!("its root is {found}, {root} was asked for"));
        }
        Ok(manifest)
    }

    fn check(&self) -> Result<(), BadManifest> {
        if self.format != FORMAT {
            return bad(format!("format {:?}, this version reads {FORMAT:?}", self.format));
        }
        let mut last: Option<&str> = None;
        for file in &self.files {
            checked_path(&file.path).map_err(|e| BadManifest(e.to_string()))?;
            if last.is_some_and(|last| last >= file.path.as_str()) {
                return bad(format!("{:?} is not in order", file.path));
            }
            // sorted, so a file that is also a folder comes before what lies below it, but not always next to it
            if self.files.binary_search_by(|f| f.path.as_str().cmp(parent(&file.path))).is_ok() {
                return bad(format!("{:?} lies below a file", file.path));
            }
            if file.mode != 0o644 && file.mode != 0o755 {
                return bad(format!("{:?} has mode {:o}", file.path, file.mode));
            }
            if !is_sha256(&file.sha256) {
                return bad(format!("{:?} has no SHA-256", file.path));
            }
            last = Some(&file.path);
        }
        Ok(())
    }

    /// SHA-256 over one line per file in order: mode (octal), size, SHA-256, path.
    pub fn root(&self) -> String {
        let mut sum = Sha256::new();
        for file in &self.files {
            sum.update(format!("{:o} {} {} {}\n", file.mode, file.size, file.sha256, file.path));
        }
        hex::encode(sum.finalize())
    }

    /// Its files, sorted by path.
    pub fn files(&self) -> &[Entry] {
        &self.files
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }

    /// The one text form of it.
    pub(crate) fn text(&self) -> Vec<u8> {
        // cannot fail: strings and numbers only
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Sealed with what the quorum decided.
    pub(crate) fn seal(
        &self,
        group: &GroupName,
        site: &SiteId,
        sealing: &dc_plane::releases::Sealing,
    ) -> SealedManifest {
        SealedManifest {
            format: SEALED.to_owned(),
            group: group.clone(),
            release: sealing.release.clone(),
            parent: sealing.parent.clone(),
            epoch: sealing.epoch,
            site: site.clone(),
            author: sealing.author.clone(),
            created: sealing.created,
            files: self.files.clone(),
        }
    }
}

/// The folder of a path, without its last slash; the empty path for none.
fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str) -> Entry {
        Entry { path: path.into(), mode: 0o644, size: 1, sha256: "ab".repeat(32) }
    }

    #[test]
    fn the_order_of_reading_a_folder_does_not_change_the_root() -> Result<(), BadManifest> {
        let one = Manifest::new(vec![entry("b.py"), entry("a/x.py"), entry("a.py")])?;
        let two = Manifest::new(vec![entry("a.py"), entry("b.py"), entry("a/x.py")])?;
        assert_eq!(one.root(), two.root());
        assert_eq!(one.text(), two.text());
        assert_eq!(Manifest::parse(&one.text(), &two.root())?, two);
        // the form is for ever: a changed line here would orphan every release that stands
        assert_eq!(
            Manifest::new(vec![entry("a.py")])?.root(),
            hex::encode(Sha256::digest(format!("644 1 {} a.py\n", "ab".repeat(32))))
        );
        Ok(())
    }

    #[test]
    fn any_change_changes_the_root() -> Result<(), BadManifest> {
        let base = Manifest::new(vec![entry("a.py"), entry("b.py")])?.root();
        let variants = [
            Entry { mode: 0o755, ..entry("a.py") },
            Entry { size: 2, ..entry("a.py") },
            Entry { sha256: "cd".repeat(32), ..entry("a.py") },
            entry("c.py"),
        ];
        for changed in variants {
            assert_ne!(Manifest::new(vec![changed.clone(), entry("b.py")])?.root(), base, "{changed:?}");
        }
        Ok(())
    }

    #[test]
    fn refuses_manifests_that_would_write_elsewhere() {
        for path in ["../x", "/etc/passwd", "a/../b", "a//b", ".", "a/", "", "a\nb", "a\\..\\b/./c"] {
            assert!(Manifest::new(vec![entry(path)]).is_err(), "{path:?}");
        }
        assert!(Manifest::new(vec![entry("a"), entry("a/b")]).is_err());
        assert!(Manifest::new(vec![entry("a"), entry("a")]).is_err());
        assert!(Manifest::new(vec![Entry { mode: 0o4755, ..entry("a") }]).is_err());
        let text = Manifest::new(vec![entry("a")]).map(|m| m.text()).unwrap_or_default();
        assert!(Manifest::parse(&text, &"0".repeat(64)).is_err());
    }
}
