//! DAG releases as folders on this disk: built aside, proved, renamed; the link `current` swapped by rename.
//!
//! A folder under its final name is whole. What is unknown or half-built is never under a name that a reader uses.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use dc_core::position::DagRelease;
use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use sha2::{Digest as _, Sha256};

use crate::manifest::Manifest;

/// The folder of all releases of a group at this site.
#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    dir: PathBuf,
}

/// How closely a release on disk is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Every file is there with its size.
    Sizes,
    /// Every file's SHA-256 is as in the manifest.
    Bytes,
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> PlaneError {
    let what = what.into();
    move |e| PlaneError::failed(what, &e)
}

/// Work on files, off the threads that serve the network.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PlaneError> + Send + 'static,
) -> Result<T, PlaneError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| PlaneError::failed("work on release files", &e))?
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

/// Held while the shelf is changed; ends with the process.
pub(crate) struct Lock(#[allow(dead_code)] std::fs::File);

impl Shelf {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    fn manifest_path(&self, version: &str) -> PathBuf {
        self.dir.join(".manifest").join(format!("{version}.json"))
    }

    /// The release that readers see; none before the first.
    pub(crate) fn current(&self) -> Option<String> {
        let target = std::fs::read_link(self.dir.join("current")).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// Takes the shelf for one change. Another process that holds it is waited for.
    pub(crate) async fn lock(&self, until: Deadline) -> Result<Lock, PlaneError> {
        std::fs::create_dir_all(self.dir.join(".manifest")).map_err(io("make the folder of releases"))?;
        let path = self.dir.join(".lock");
        wait_until(until, Duration::from_millis(50), "the lock on the folder of releases", || async {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(io("open the lock of releases"))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Some(Lock(file))),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
                Err(e) => Err(PlaneError::failed("lock the folder of releases", &e)),
            }
        })
        .await
    }

    /// The manifest of a release that is whole on disk; none if it is not.
    pub(crate) async fn whole(
        &self,
        release: &DagRelease,
        look: Look,
    ) -> Result<Option<Manifest>, PlaneError> {
        let version = release.version();
        let (dir, path, root) = (self.dir.join(&version), self.manifest_path(&version), release.root.clone());
        blocking(move || {
            let Ok(text) = std::fs::read(path) else { return Ok(None) };
            let Ok(manifest) = Manifest::parse(&text, &root) else { return Ok(None) };
            Ok(stands(&dir, &manifest, look).then_some(manifest))
        })
        .await
    }

    /// A folder aside for building a release. What earlier deaths left is removed.
    pub(crate) async fn begin(&self, _lock: &Lock, release: &DagRelease) -> Result<Building, PlaneError> {
        let (dir, version) = (self.dir.clone(), release.version());
        blocking(move || {
            for item in std::fs::read_dir(&dir).map_err(io("read the folder of releases"))?.flatten() {
                if item.file_name().to_string_lossy().starts_with(".tmp-") {
                    std::fs::remove_dir_all(item.path()).map_err(io("remove a half-built release"))?;
                }
            }
            let at = dir.join(format!(".tmp-{version}"));
            std::fs::create_dir(&at).map_err(io("make a folder for the release"))?;
            std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o755))
                .map_err(io("make a folder for the release"))?;
            Ok(Building { at, version })
        })
        .await
    }

    /// Puts a built release under its final name, after proving every file of it.
    pub(crate) async fn finish(
        &self,
        _lock: &Lock,
        built: Building,
        manifest: Manifest,
    ) -> Result<(), PlaneError> {
        let (dir, record) = (self.dir.clone(), self.manifest_path(&built.version));
        blocking(move || {
            if !stands(&built.at, &manifest, Look::Bytes) {
                return Err(PlaneError::Failed {
                    what: format!("materialise {}", built.version),
                    why: "a file on disk is not what the manifest says".into(),
                });
            }
            sync_folders(&built.at, &manifest).map_err(io("sync the release"))?;
            let last = dir.join(&built.version);
            if last.exists() {
                // it is damaged, or we would not be here: exchanged in one step, so that a reader always finds one
                renameat_with(CWD, &built.at, CWD, &last, RenameFlags::EXCHANGE)
                    .map_err(|e| PlaneError::failed("exchange a damaged release", &e))?;
                std::fs::remove_dir_all(&built.at).map_err(io("remove a damaged release"))?;
            } else {
                std::fs::rename(&built.at, &last).map_err(io("name the release"))?;
            }
            sync_dir(&dir).map_err(io("sync the folder of releases"))?;
            crate::state::write_whole(&record, &manifest.text()).map_err(io("write the release's manifest"))
        })
        .await
    }

    /// Makes a whole release the one that readers see. Whether that changed anything.
    pub(crate) async fn activate(&self, _lock: &Lock, release: &DagRelease) -> Result<bool, PlaneError> {
        let version = release.version();
        if self.current().as_deref() == Some(&version) {
            return Ok(false);
        }
        let dir = self.dir.clone();
        blocking(move || {
            let fresh = dir.join(".current.new");
            match std::fs::remove_file(&fresh) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(PlaneError::failed("remove an old link", &e));
                }
                _ => {}
            }
            symlink(&version, &fresh).map_err(io("link the release"))?;
            std::fs::rename(&fresh, dir.join("current")).map_err(io("swap the current release"))?;
            sync_dir(&dir).map_err(io("sync the folder of releases"))
        })
        .await?;
        Ok(true)
    }
}

/// A release being built aside.
pub(crate) struct Building {
    at: PathBuf,
    version: String,
}

impl Building {
    /// Writes one blob to every path of the manifest that holds it; on disk when it returns.
    pub(crate) async fn write(
        &self,
        places: &BTreeMap<String, Vec<(String, u32)>>,
        sha: &str,
        body: Bytes,
    ) -> Result<(), PlaneError> {
        let at = self.at.clone();
        let paths = places.get(sha).cloned().unwrap_or_default();
        blocking(move || {
            for (path, mode) in paths {
                let to = at.join(&path);
                if let Some(folder) = to.parent() {
                    std::fs::create_dir_all(folder).map_err(io(format!("make the folder of {path}")))?;
                }
                write_synced(&to, &body, mode).map_err(io(format!("write {path}")))?;
            }
            Ok(())
        })
        .await
    }
}

fn write_synced(to: &Path, body: &[u8], mode: u32) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(to)?;
    file.write_all(body)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.sync_all()
}

/// Paths and modes by the blob they hold.
pub(crate) fn places(manifest: &Manifest) -> BTreeMap<String, Vec<(String, u32)>> {
    let mut places: BTreeMap<String, Vec<(String, u32)>> = BTreeMap::new();
    for file in manifest.files() {
        places.entry(file.sha256.clone()).or_default().push((file.path.clone(), file.mode));
    }
    places
}

fn sync_folders(at: &Path, manifest: &Manifest) -> std::io::Result<()> {
    let mut folders: Vec<PathBuf> = manifest
        .files()
        .iter()
        .flat_map(|f| Path::new(&f.path).ancestors().skip(1).map(|p| at.join(p)).collect::<Vec<_>>())
        .collect();
    folders.sort();
    folders.dedup();
    folders.iter().rev().try_for_each(|folder| sync_dir(folder))
}

/// Whether every file of the manifest is there. More files may be: interpreters leave their own.
fn stands(dir: &Path, manifest: &Manifest, look: Look) -> bool {
    manifest.files().iter().all(|file| {
        let path = dir.join(&file.path);
        let Ok(meta) = std::fs::symlink_metadata(&path) else { return false };
        if !meta.is_file() || meta.len() != file.size {
            return false;
        }
        look == Look::Sizes || digest(&path).is_ok_and(|sum| sum == file.sha256)
    })
}

fn digest(path: &Path) -> std::io::Result<String> {
    let (mut file, mut sum) = (std::fs::File::open(path)?, Sha256::new());
    let mut buffer = vec![0_u8; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(sum.finalize())),
            n => sum.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Entry;
    use crate::publish::sha256;

    type Anyhow = Result<(), Box<dyn std::error::Error>>;

    fn release(files: &[(&str, &str)]) -> Result<(Manifest, DagRelease), Box<dyn std::error::Error>> {
        let entries = files.iter().map(|(path, text)| Entry {
            path: (*path).into(),
            mode: 0o644,
            size: text.len() as u64,
            sha256: sha256(text.as_bytes()),
        });
        let manifest = Manifest::new(entries.collect())?;
        let release = DagRelease { serial: 1, root: manifest.root() };
        Ok((manifest, release))
    }

    async fn build(
        shelf: &Shelf,
        files: &[(&str, &str)],
        end: bool,
    ) -> Result<DagRelease, Box<dyn std::error::Error>> {
        let (manifest, release) = release(files)?;
        let lock = shelf.lock(Deadline::within(Duration::from_secs(5))).await?;
        let building = shelf.begin(&lock, &release).await?;
        for (_, text) in files {
            let body = Bytes::copy_from_slice(text.as_bytes());
            building.write(&places(&manifest), &sha256(text.as_bytes()), body).await?;
        }
        if end {
            shelf.finish(&lock, building, manifest).await?;
            shelf.activate(&lock, &release).await?;
        }
        Ok(release)
    }

    #[tokio::test]
    async fn what_a_death_left_half_built_is_never_seen_and_goes_with_the_next() -> Anyhow {
        let dir = tempfile::tempdir()?;
        let shelf = Shelf::new(dir.path());
        let files = [("a.py", "one"), ("sub/b.py", "two")];
        let release = build(&shelf, &files, false).await?;
        assert_eq!(shelf.current(), None);
        assert!(shelf.whole(&release, Look::Sizes).await?.is_none());
        assert!(!dir.path().join(release.version()).exists());
        build(&shelf, &files, true).await?;
        assert_eq!(shelf.current(), Some(release.version()));
        assert!(shelf.whole(&release, Look::Bytes).await?.is_some());
        let left = std::fs::read_dir(dir.path())?.flatten();
        assert_eq!(left.filter(|i| i.file_name().to_string_lossy().starts_with(".tmp-")).count(), 0);
        Ok(())
    }

    #[tokio::test]
    async fn a_damaged_release_is_not_whole_and_is_built_again_in_place() -> Anyhow {
        let dir = tempfile::tempdir()?;
        let shelf = Shelf::new(dir.path());
        let files = [("a.py", "one")];
        let release = build(&shelf, &files, true).await?;
        let file = dir.path().join("current/a.py");
        std::fs::write(&file, "eno")?;
        assert!(shelf.whole(&release, Look::Sizes).await?.is_some());
        assert!(shelf.whole(&release, Look::Bytes).await?.is_none());
        std::fs::remove_file(&file)?;
        assert!(shelf.whole(&release, Look::Sizes).await?.is_none());
        build(&shelf, &files, true).await?;
        assert_eq!(std::fs::read_to_string(&file)?, "one");
        Ok(())
    }

    #[tokio::test]
    async fn bytes_that_differ_from_the_manifest_never_get_the_final_name() -> Anyhow {
        let dir = tempfile::tempdir()?;
        let shelf = Shelf::new(dir.path());
        let (manifest, release) = release(&[("a.py", "one")])?;
        let lock = shelf.lock(Deadline::within(Duration::from_secs(5))).await?;
        let building = shelf.begin(&lock, &release).await?;
        building.write(&places(&manifest), &sha256(b"one"), Bytes::from_static(b"two")).await?;
        assert!(shelf.finish(&lock, building, manifest).await.is_err());
        assert!(!dir.path().join(release.version()).exists());
        Ok(())
    }
}
