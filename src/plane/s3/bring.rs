//! A committed DAG release brought to this site: into its bucket, onto its disk, and published where it is active.

use dc_core::act::Act;
use dc_core::ids::Epoch;
use dc_core::position::DagRelease;
use dc_core::time::WallTime;
use dc_plane::releases::Sealing;
use dc_plane::{Deadline, PlaneError};

use crate::driver::Here;
use crate::join::{Below, Lister};
use crate::manifest::Manifest;
use crate::materialise::{Look, places};
use crate::publish::{MANIFEST_BYTES, mirror, point, put_proved, seal};
use crate::store::Store;

/// Older releases that a site catches up on.
const OLDER: usize = 20;

impl Here {
    /// Brings a release here: its objects into this site's bucket, its files onto the shelf.
    ///
    /// Returns what was done, in words; none when all of it stood.
    async fn bring_release(
        &self,
        release: &DagRelease,
        activate: bool,
        until: Deadline,
    ) -> Result<Option<String>, PlaneError> {
        let tree = self.names.tree(&release.root);
        let ours = until.bound("the release's manifest", self.own.get(&tree, MANIFEST_BYTES)).await??;
        let on_disk = self.shelf.whole(release, Look::Sizes).await?;
        let version = release.version();
        if on_disk.is_some() && ours.is_some() {
            if !activate || self.shelf.current().as_deref() == Some(&version) {
                return Ok(None);
            }
            let lock = self.shelf.lock(until).await?;
            self.shelf.activate(&lock, release).await?;
            return Ok(Some(format!("{version} made current")));
        }
        let text = match ours {
            Some(text) => Some(text),
            None => until.bound("the release's manifest", self.peer.get(&tree, MANIFEST_BYTES)).await??,
        };
        let Some(text) = text else {
            let why = format!("release {version}: its manifest {tree} is at neither site");
            return Err(PlaneError::refused("DC-0512", why));
        };
        let manifest = Manifest::parse(&text, &release.root)
            .map_err(|e| PlaneError::refused("DC-0512", format!("release {version}: {e}")))?;
        let lock = self.shelf.lock(until).await?;
        let building = self.shelf.begin(&lock, release).await?;
        let places = places(&manifest);
        let write = |sha: String, body| {
            let (building, places) = (&building, &places);
            async move { building.write(places, &sha, body).await }
        };
        let came = mirror(&self.own, Some(&self.peer), &self.names, &manifest, write);
        let came = until.bound("the release's files", came).await??;
        let files = manifest.files().len();
        self.shelf.finish(&lock, building, manifest).await?;
        if activate {
            self.shelf.activate(&lock, release).await?;
        }
        Ok(Some(format!(
            "{version} materialised: {files} files proved, {came} blobs from {}",
            self.peer.site
        )))
    }

    /// Whether a later serial than this one is already current here: Raft's word as this agent has it is old.
    fn is_old(&self, release: &DagRelease) -> bool {
        let serial = |v: &str| v.strip_prefix('r')?.split('-').next()?.parse::<u64>().ok();
        self.shelf.current().as_deref().and_then(serial).is_some_and(|current| current > release.serial)
    }

    /// The newest release made whole and current, older ones made whole; what was done, in words.
    pub(crate) async fn releases(&self, act: &Act, until: Deadline) -> Result<Option<String>, PlaneError> {
        let Some(newest) = act.release() else { return Ok(None) };
        let done = self.bring_release(newest, !self.is_old(newest), until).await?;
        let holder = self.cfg.site == act.source;
        let from = if holder { &self.own } else { &self.peer };
        if let Err(e) = self.older(from, newest, until).await {
            tracing::warn!(group = %self.group, site = %self.cfg.site, error = %e, "older releases not looked at");
        }
        if holder {
            self.seal_committed(newest, act.epoch, until).await?;
        } else if let Err(e) = self.mirror_sealed(newest, until).await {
            tracing::warn!(group = %self.group, site = %self.cfg.site, error = %e, "published copy not mirrored");
        }
        Ok(done)
    }

    async fn older(&self, from: &Store, newest: &DagRelease, until: Deadline) -> Result<(), PlaneError> {
        let prefix = self.names.releases();
        let mut lister = Lister::new(Below { store: from.clone(), prefix });
        let mut found = Vec::new();
        while let Some(object) = until.bound("the list of releases", lister.next()).await?? {
            found.extend(self.names.named(&object.key).filter(|r| r.serial < newest.serial));
        }
        found.sort_by_key(|r| std::cmp::Reverse(r.serial));
        for release in found.into_iter().take(OLDER) {
            if self.shelf.whole(&release, Look::Sizes).await?.is_none() {
                self.bring_release(&release, false, until).await?;
            }
        }
        Ok(())
    }

    /// Publishes what the quorum committed, should the publisher have died before it could.
    async fn seal_committed(
        &self,
        release: &DagRelease,
        epoch: Epoch,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let key = self.names.release(release);
        if until.bound("the published release", self.own.head(&key)).await??.is_some() {
            return Ok(());
        }
        let sealing = Sealing {
            release: release.clone(),
            epoch,
            parent: None,
            author: "dc-agent".into(),
            created: WallTime::default(),
        };
        until.bound("the published release", seal(&self.own, &self.names, &self.group, &sealing)).await??;
        Ok(())
    }

    /// Copies the manifest that the holder published of a release byte by byte, and then points to it.
    ///
    /// The pointer is never copied: the holder writes it last, and a copy taken before that would stay.
    async fn mirror_sealed(&self, release: &DagRelease, until: Deadline) -> Result<(), PlaneError> {
        let key = self.names.release(release);
        if until.bound("the published release", self.own.head(&key)).await??.is_none() {
            let theirs = until.bound("the published release", self.peer.get(&key, MANIFEST_BYTES)).await??;
            let Some(body) = theirs else { return Ok(()) };
            until.bound("the published release", put_proved(&self.own, &key, body)).await??;
        }
        until.bound("the pointer", point(&self.own, &self.names, release)).await??;
        Ok(())
    }
}
