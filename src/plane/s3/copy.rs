//! One object from the other site's bucket to ours: streamed within a budget of memory, and verified.

use std::sync::Arc;

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use dc_core::ids::Epoch;
use dc_plane::PlaneError;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::store::{Condition, Listed, Shape, Store, unquoted};

/// Objects up to this size go in one request; larger ones in parts of it. Fixed, so that ETags repeat.
const PART_BYTES: u64 = 8 << 20;
/// All bytes in flight of one plane, in KiB.
const BUDGET_KIB: usize = 64 << 10;

/// Which conditions on a write this store was seen to honour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Conditions {
    /// `If-None-Match: *`.
    pub(crate) absent: bool,
    /// `If-Match` with a quoted ETag.
    pub(crate) is: bool,
}

/// How a copy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Copied {
    /// It is here and verified, under this ETag.
    Here { etag: String },
    /// One side changed meanwhile; the next pass looks again.
    Moved,
}

/// Copies objects from one store to another.
pub(crate) struct Copier {
    pub(crate) theirs: Store,
    pub(crate) ours: Store,
    budget: Arc<Semaphore>,
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Copier {
    pub(crate) fn new(theirs: Store, ours: Store) -> Self {
        Self { theirs, ours, budget: Arc::new(Semaphore::new(BUDGET_KIB)) }
    }

    async fn afford(&self, bytes: u64) -> Result<OwnedSemaphorePermit, PlaneError> {
        let kib = u32::try_from(bytes.min(PART_BYTES) / 1024 + 1).unwrap_or(1);
        let budget = Arc::clone(&self.budget);
        budget.acquire_many_owned(kib).await.map_err(|e| PlaneError::failed("wait for memory", &e))
    }

    /// Brings one object as it was listed, and proves that it arrived whole.
    ///
    /// Repeat: safe. Errors: the stores' own; `Failed` when what arrived is not what was sent.
    pub(crate) async fn bring(
        &self,
        from: &Listed,
        replaces: Option<&Listed>,
        proved: Conditions,
    ) -> Result<Copied, PlaneError> {
        let condition = match replaces {
            None if proved.absent => Condition::Absent,
            Some(old) if proved.is && !old.etag.is_empty() => Condition::Is(old.etag.clone()),
            _ => Condition::Any,
        };
        if from.size > PART_BYTES {
            return self.bring_in_parts(from).await;
        }
        let _held = self.afford(from.size).await?;
        let etag = Some(from.etag.as_str()).filter(|e| !e.is_empty());
        let Some(found) = self.theirs.open(&from.key, etag, None).await? else { return Ok(Copied::Moved) };
        let shape = Shape::of(&found);
        let body = self.theirs.collect(&from.key, found).await?;
        if body.len() as u64 != from.size {
            return Ok(Copied::Moved);
        }
        let sent = hash(&body);
        let Some(written) = self.ours.put(&from.key, body, &condition, &shape).await? else {
            return Ok(Copied::Moved);
        };
        if !from.etag.is_empty() && written == from.etag {
            // the same digest of the bytes, computed by two servers
            return Ok(Copied::Here { etag: written });
        }
        self.read_back(&from.key, written, sent).await
    }

    async fn read_back(&self, key: &str, etag: String, sent: [u8; 32]) -> Result<Copied, PlaneError> {
        match self.digest(&self.ours, key).await? {
            Some((came, _)) if came == sent => Ok(Copied::Here { etag }),
            Some(_) => Err(PlaneError::Failed {
                what: format!("copy {key}"),
                why: format!("what {} gives back is not what was sent (SHA-256 differs)", self.ours.site),
            }),
            None => Ok(Copied::Moved),
        }
    }

    /// SHA-256 and length of an object, streamed.
    pub(crate) async fn digest(&self, at: &Store, key: &str) -> Result<Option<([u8; 32], u64)>, PlaneError> {
        let Some(mut found) = at.open(key, None, None).await? else { return Ok(None) };
        let (mut sum, mut length) = (Sha256::new(), 0_u64);
        while let Some(chunk) = found.body.next().await {
            let chunk = chunk.map_err(|e| PlaneError::failed(format!("read {key} at {}", at.site), &e))?;
            length += chunk.len() as u64;
            sum.update(&chunk);
        }
        Ok(Some((sum.finalize().into(), length)))
    }

    async fn bring_in_parts(&self, from: &Listed) -> Result<Copied, PlaneError> {
        let Some(head) = self.theirs.open(&from.key, Some(&from.etag), Some("bytes=0-0".into())).await?
        else {
            return Ok(Copied::Moved);
        };
        let shape = Shape::of(&head);
        drop(head);
        let what = format!("write {} in parts", from.key);
        let begun = Box::pin(
            self.ours
                .client
                .create_multipart_upload()
                .bucket(&self.ours.bucket)
                .key(&from.key)
                .set_content_type(shape.content_type)
                .set_content_encoding(shape.content_encoding)
                .set_metadata(shape.metadata)
                .send(),
        )
        .await
        .map_err(|e| PlaneError::failed(what.clone(), &e))?;
        let id = begun.upload_id().unwrap_or_default().to_owned();
        let done = self.parts(from, &id).await;
        if !matches!(done, Ok(Copied::Here { .. })) {
            let abort = self.ours.client.abort_multipart_upload();
            if let Err(e) =
                Box::pin(abort.bucket(&self.ours.bucket).key(&from.key).upload_id(&id).send()).await
            {
                tracing::warn!(key = %from.key, error = %dc_plane::chain(&e), "upload in parts left open");
            }
        }
        done
    }

    async fn parts(&self, from: &Listed, id: &str) -> Result<Copied, PlaneError> {
        let what = format!("write {} in parts", from.key);
        let (mut sum, mut done, mut offset, mut number) = (Sha256::new(), Vec::new(), 0_u64, 1_i32);
        while offset < from.size {
            let end = (offset + PART_BYTES).min(from.size);
            let _held = self.afford(end - offset).await?;
            let range = format!("bytes={offset}-{}", end - 1);
            let Some(found) = self.theirs.open(&from.key, Some(&from.etag), Some(range)).await? else {
                return Ok(Copied::Moved);
            };
            let body: Bytes = self.theirs.collect(&from.key, found).await?;
            if body.len() as u64 != end - offset {
                return Ok(Copied::Moved);
            }
            sum.update(&body);
            let part = self.ours.client.upload_part().bucket(&self.ours.bucket).key(&from.key);
            let sent = Box::pin(part.upload_id(id).part_number(number).body(body.into()).send())
                .await
                .map_err(|e| PlaneError::failed(what.clone(), &e))?;
            done.push(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build());
            (offset, number) = (end, number + 1);
        }
        let whole = CompletedMultipartUpload::builder().set_parts(Some(done)).build();
        let ended = self.ours.client.complete_multipart_upload().bucket(&self.ours.bucket).key(&from.key);
        Box::pin(ended.upload_id(id).multipart_upload(whole).send())
            .await
            .map_err(|e| PlaneError::failed(what, &e))?;
        // the answer to a completion has no ETag in some stores: ask the object
        let Some((_, etag)) = self.ours.head(&from.key).await? else { return Ok(Copied::Moved) };
        self.read_back(&from.key, unquoted(Some(&etag)), sum.finalize().into()).await
    }

    /// Whether both sides hold the same bytes under a key, read now.
    pub(crate) async fn same_bytes(&self, key: &str) -> Result<bool, PlaneError> {
        let (theirs, ours) = tokio::join!(self.digest(&self.theirs, key), self.digest(&self.ours, key));
        Ok(matches!((theirs?, ours?), (Some(a), Some(b)) if a == b))
    }

    /// Keeps our object under a name beside it, before it is replaced.
    ///
    /// The name is the key with `.dc-<site>-e<epoch>`; a number follows when that holds something else.
    pub(crate) async fn keep_beside(&self, ours: &Listed, epoch: Epoch) -> Result<String, PlaneError> {
        let kept = self.digest(&self.ours, &ours.key).await?;
        for number in 1..100_u32 {
            let more = if number == 1 { String::new() } else { format!("-{number}") };
            let name = format!("{}.dc-{}-e{epoch}{more}", ours.key, self.ours.site);
            if self.ours.head(&name).await?.is_none() {
                self.ours.duplicate(&ours.key, &name).await?;
            }
            if self.digest(&self.ours, &name).await? == kept {
                return Ok(name);
            }
        }
        Err(PlaneError::Failed {
            what: format!("keep {} beside", ours.key),
            why: "100 diverged copies of it exist in this epoch".into(),
        })
    }
}

/// Tries what conditions on writes this store honours, on a probe object of our own.
///
/// Some stores answer 200 and overwrite, some take a deleted object's marker for the object; what is not seen to
/// be right both ways is not used.
pub(crate) async fn probe_conditions(ours: &Store, key: &str) -> Result<Conditions, PlaneError> {
    let (body, shape) = (Bytes::from_static(b"conditions\n"), Shape::default());
    let put = |condition: Condition| {
        let (body, shape) = (body.clone(), shape.clone());
        async move { ours.put(key, body, &condition, &shape).await }
    };
    put(Condition::Any).await?;
    ours.remove(key).await?;
    let into_nothing = put(Condition::Absent).await?.is_some();
    let Some(etag) = put(Condition::Any).await? else { return Ok(Conditions::default()) };
    let over_one = put(Condition::Absent).await?.is_none();
    let stale = put(Condition::Is("00000000000000000000000000000000".into())).await?.is_none();
    let fresh = put(Condition::Is(etag)).await?.is_some();
    ours.remove(key).await?;
    Ok(Conditions { absent: into_nothing && over_one, is: stale && fresh })
}
