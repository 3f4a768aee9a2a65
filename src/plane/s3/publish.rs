//! Publishing: bytes first, under names that follow from them; then, once the quorum decided, the copies of its word.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use dc_core::act::Evidence;
use dc_core::ids::{GroupName, SiteId};
use dc_core::position::DagRelease;
use dc_core::spec::GroupSpec;
use dc_plane::releases::{Releases, Sealing, Staged};
use dc_plane::{Deadline, PlaneError};
use futures::future::BoxFuture;
use futures::stream::{StreamExt as _, TryStreamExt as _, iter};
use sha2::{Digest as _, Sha256};

use crate::config::{BuildError, Config};
use crate::manifest::{Manifest, SealedManifest};
use crate::store::{Condition, Retries, Shape, Store, http};
use crate::tree::{self, Limits};

/// Requests in flight.
const IN_FLIGHT: usize = 32;
/// Most bytes of a manifest.
pub(crate) const MANIFEST_BYTES: u64 = 16 << 20;

/// Where the things of releases lie in a bucket.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    base: String,
}

impl Names {
    pub(crate) fn new(dag_prefix: &str) -> Self {
        Self { base: format!("{dag_prefix}/dc/v1") }
    }
    pub(crate) fn blob(&self, sha256: &str) -> String {
        format!("{}/blob/{sha256}", self.base)
    }
    pub(crate) fn tree(&self, root: &str) -> String {
        format!("{}/tree/{root}.json", self.base)
    }
    pub(crate) fn releases(&self) -> String {
        format!("{}/release/", self.base)
    }
    pub(crate) fn release(&self, of: &DagRelease) -> String {
        format!("{}{:06}-{}.json", self.releases(), of.serial, of.root)
    }
    pub(crate) fn current(&self) -> String {
        format!("{}/current.json", self.base)
    }
    /// The release that a key below `releases` names.
    pub(crate) fn named(&self, key: &str) -> Option<DagRelease> {
        let (serial, root) = key.strip_prefix(&self.releases())?.strip_suffix(".json")?.split_once('-')?;
        let release = DagRelease { serial: serial.parse().ok()?, root: root.to_owned() };
        (crate::manifest::is_sha256(root) && self.release(&release) == key).then_some(release)
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Writes an object and reads it back: what the store gives must be what it got.
pub(crate) async fn put_proved(store: &Store, key: &str, body: Bytes) -> Result<(), PlaneError> {
    let most = body.len() as u64;
    let shape = Shape::default();
    store.put(key, body.clone(), &Condition::Any, &shape).await?;
    match store.get(key, most).await? {
        Some(found) if found == body => Ok(()),
        _ => Err(PlaneError::Failed {
            what: format!("write {key} at {}", store.site),
            why: "what the store gives back is not what it got".into(),
        }),
    }
}

struct Publisher {
    group: GroupName,
    store: Store,
    names: Names,
    limits: Limits,
}

/// Builds the publisher of a group at this site.
///
/// Errors: as of the plane itself; asks no network.
pub fn publisher(config: Config, spec: &GroupSpec, site: SiteId) -> Result<Arc<dyn Releases>, BuildError> {
    let checked = config.check(spec, site)?;
    let http = http(checked.ca_pem.as_deref()).map_err(|why| BuildError { key: "s3.ca_file".into(), why })?;
    let place = (&checked.site, checked.own_endpoint.as_str());
    let store =
        Store::new(http, place, &checked.spec.bucket, &checked.region, &checked.own_keys, Retries::Some);
    Ok(Arc::new(Publisher {
        group: spec.name.clone(),
        store,
        names: Names::new(&checked.spec.dag_prefix),
        limits: Limits::default(),
    }))
}

fn refused(why: impl std::fmt::Display) -> PlaneError {
    PlaneError::refused("DC-0511", why.to_string())
}

impl Publisher {
    /// Brings one blob, unless the bucket gives back exactly it already. Whether it was uploaded.
    async fn blob(&self, dir: &Path, path: &str, size: u64, wanted: &str) -> Result<bool, PlaneError> {
        let key = self.names.blob(wanted);
        if self.store.head(&key).await?.is_some_and(|(there, _)| there == size)
            && self.store.get(&key, size).await?.is_some_and(|found| sha256(&found) == wanted)
        {
            return Ok(false);
        }
        let at = dir.join(path);
        let body = tokio::fs::read(&at).await.map_err(|e| refused(format!("{path}: {e}")))?;
        if sha256(&body) != wanted {
            return Err(refused(tree::BadTree::Changed));
        }
        put_proved(&self.store, &key, Bytes::from(body)).await?;
        Ok(true)
    }

    async fn stage_now(&self, dir: &Path) -> Result<Staged, PlaneError> {
        let (owned, limits) = (dir.to_path_buf(), self.limits);
        let manifest = tokio::task::spawn_blocking(move || tree::read(&owned, limits))
            .await
            .map_err(|e| PlaneError::failed("read the tree", &e))?
            .map_err(refused)?;
        let blobs: BTreeMap<&str, (&str, u64)> =
            manifest.files().iter().map(|f| (f.sha256.as_str(), (f.path.as_str(), f.size))).collect();
        let uploaded = AtomicU64::new(0);
        let work = blobs.into_iter().map(|(sha, (path, size))| -> BoxFuture<'_, Result<(), PlaneError>> {
            let uploaded = &uploaded;
            Box::pin(async move {
                let came = self.blob(dir, path, size, sha).await?;
                uploaded.fetch_add(u64::from(came), Ordering::Relaxed);
                Ok(())
            })
        });
        let work: Vec<_> = work.collect();
        iter(work).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
        let root = manifest.root();
        // last, so that a tree whose manifest stands is whole
        put_proved(&self.store, &self.names.tree(&root), Bytes::from(manifest.text())).await?;
        Ok(Staged {
            root,
            files: manifest.files().len() as u64,
            bytes: manifest.bytes(),
            uploaded: uploaded.into_inner(),
        })
    }
}

/// Publishes a committed release in one store: its sealed manifest, and the pointer unless a later one is there.
pub(crate) async fn seal(
    store: &Store,
    names: &Names,
    group: &GroupName,
    sealing: &Sealing,
) -> Result<Evidence, PlaneError> {
    let release = &sealing.release;
    let tree = names.tree(&release.root);
    let Some(text) = store.get(&tree, MANIFEST_BYTES).await? else {
        return Err(PlaneError::refused(
            "DC-0512",
            format!("release {} is not staged at {}: {tree} is missing", release.version(), store.site),
        ));
    };
    let manifest =
        Manifest::parse(&text, &release.root).map_err(|e| PlaneError::refused("DC-0512", e.to_string()))?;
    let sealed = manifest.seal(group, &store.site, sealing);
    let body = serde_json::to_vec(&sealed).map_err(|e| PlaneError::failed("write the manifest", &e))?;
    let key = names.release(release);
    let found = store.get(&key, MANIFEST_BYTES).await?;
    let found = found.and_then(|b| serde_json::from_slice::<SealedManifest>(&b).ok());
    let had = found.is_some_and(|s| s.release == *release && s.files == sealed.files);
    if !had {
        put_proved(store, &key, Bytes::from(body)).await?;
    }
    let stood = point(store, names, release).await?;
    let seen = format!("{key} and its pointer stand at {}, read back", store.site);
    Ok(if had && stood { Evidence::already(seen) } else { Evidence::changed(seen) })
}

/// Points to a release in one store, unless it or a later one is pointed to. Whether that stood.
pub(crate) async fn point(store: &Store, names: &Names, release: &DagRelease) -> Result<bool, PlaneError> {
    let current = store.get(&names.current(), MANIFEST_BYTES).await?;
    let pointer = current.and_then(|b| serde_json::from_slice::<DagRelease>(&b).ok());
    let stands = pointer.is_some_and(|p| p == *release || p.serial > release.serial);
    if !stands {
        let body = serde_json::to_vec(release).map_err(|e| PlaneError::failed("write the pointer", &e))?;
        put_proved(store, &names.current(), Bytes::from(body)).await?;
    }
    Ok(stands)
}

#[async_trait]
impl Releases for Publisher {
    async fn stage(&self, dir: &Path, until: Deadline) -> Result<Staged, PlaneError> {
        until.bound("stage the DAG files", self.stage_now(dir)).await?
    }

    async fn seal(&self, sealing: &Sealing, until: Deadline) -> Result<Evidence, PlaneError> {
        until.bound("publish the release", seal(&self.store, &self.names, &self.group, sealing)).await?
    }
}

/// Brings every blob of a manifest and the manifest itself into `ours`, from `theirs` where missing.
///
/// Returns the bytes by way of `take`, one blob at a time in any order.
pub(crate) async fn mirror<F, Fut>(
    ours: &Store,
    theirs: Option<&Store>,
    names: &Names,
    manifest: &Manifest,
    take: F,
) -> Result<u64, PlaneError>
where
    F: Fn(String, Bytes) -> Fut + Sync,
    Fut: Future<Output = Result<(), PlaneError>> + Send,
{
    let blobs: BTreeMap<&str, u64> = manifest.files().iter().map(|f| (f.sha256.as_str(), f.size)).collect();
    let brought = AtomicU64::new(0);
    // boxed one by one: the compiler cannot prove a stream of borrowed futures fit to cross threads
    let work = blobs.into_iter().map(|(sha, size)| -> BoxFuture<'_, Result<(), PlaneError>> {
        let (take, brought) = (&take, &brought);
        Box::pin(async move {
            let (body, came) = blob(ours, theirs, names, sha, size).await?;
            brought.fetch_add(u64::from(came), Ordering::Relaxed);
            take(sha.to_owned(), body).await
        })
    });
    let work: Vec<_> = work.collect();
    iter(work).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
    let (key, text) = (names.tree(&manifest.root()), Bytes::from(manifest.text()));
    if ours.get(&key, MANIFEST_BYTES).await?.is_none_or(|found| found != text) {
        put_proved(ours, &key, text).await?;
    }
    Ok(brought.into_inner())
}

/// One blob, from our bucket or, proved and kept in ours, from the other site's. Whether it came from there.
async fn blob(
    ours: &Store,
    theirs: Option<&Store>,
    names: &Names,
    sha: &str,
    size: u64,
) -> Result<(Bytes, bool), PlaneError> {
    let key = names.blob(sha);
    match ours.get(&key, size).await {
        Ok(Some(body)) if sha256(&body) == sha => return Ok((body, false)),
        Err(e @ (PlaneError::Unreachable { .. } | PlaneError::TimedOut { .. })) => return Err(e),
        // missing, damaged or of another length: replaced from the other site
        _ => {}
    }
    let missing = || {
        PlaneError::refused(
            "DC-0512",
            format!("blob {sha} is missing or damaged at {} and has no other source", ours.site),
        )
    };
    let Some(theirs) = theirs else { return Err(missing()) };
    let Some(body) = theirs.get(&key, size).await? else { return Err(missing()) };
    if sha256(&body) != sha {
        let why = format!("blob {sha} is damaged at {}: its bytes have another SHA-256", theirs.site);
        return Err(PlaneError::refused("DC-0512", why));
    }
    put_proved(ours, &key, body.clone()).await?;
    Ok((body, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_found_again_by_its_key_and_by_nothing_else() {
        let names = Names::new("dags");
        let release = DagRelease { serial: 7, root: "ab".repeat(32) };
        let key = names.release(&release);
        assert_eq!(names.named(&key), Some(release));
        for wrong in [key.replace("000007", "7"), key.replace(".json", ""), key.replacen("ab", "AB", 1)] {
            assert_eq!(names.named(&wrong), None, "{wrong}");
        }
    }
}
