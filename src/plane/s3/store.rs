//! One bucket at one site, spoken to with one key: the few calls this room needs, with errors in the house's words.

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedHttpClient,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use bytes::Bytes;
use dc_core::ids::SiteId;
use dc_plane::{PlaneError, chain};

use crate::config::Keys;

/// The HTTP client that all stores of a plane share. Certificates: the given ones, else the system's.
pub(crate) fn http(ca_pem: Option<&[u8]>) -> Result<SharedHttpClient, String> {
    let builder = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let Some(pem) = ca_pem else { return Ok(builder.build_https()) };
    let trust = TrustStore::empty().with_pem_certificate(pem);
    let context = TlsContext::builder().with_trust_store(trust).build().map_err(|e| chain(&e))?;
    Ok(builder.tls_context(context).build_https())
}

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: String,
    pub(crate) size: u64,
    /// Without quotes; empty when the server gave none.
    pub(crate) etag: String,
    /// Wall-clock milliseconds by the server's clock.
    pub(crate) modified: Option<i64>,
}

/// One page of a listing.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) objects: Vec<Listed>,
    /// Where the next page starts; none at the end.
    pub(crate) next: Option<String>,
}

/// What a write demands of the object it replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Nothing.
    Any,
    /// That there is none.
    Absent,
    /// That it has this ETag.
    Is(String),
}

/// How a write with a writer's key ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted,
    /// The server says that this key may not.
    Refused,
    /// Neither: it proves nothing.
    Unclear(String),
}

/// A bucket at one site under one key.
#[derive(Clone)]
pub(crate) struct Store {
    pub(crate) client: Client,
    pub(crate) bucket: String,
    pub(crate) site: SiteId,
    pub(crate) endpoint: String,
}

/// Which calls are tried again by the client itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retries {
    /// Three attempts: for work.
    Some,
    /// One: for probes, whose every answer counts.
    None,
}

pub(crate) fn unquoted(etag: Option<&str>) -> String {
    etag.unwrap_or_default().trim_matches('"').to_owned()
}

fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}

impl Store {
    pub(crate) fn new(
        http: SharedHttpClient,
        place: (&SiteId, &str),
        bucket: &str,
        region: &str,
        keys: &Keys,
        retries: Retries,
    ) -> Self {
        let (site, endpoint) = place;
        let retry = match retries {
            Retries::Some => RetryConfig::standard()
                .with_max_attempts(3)
                .with_initial_backoff(Duration::from_millis(100))
                .with_max_backoff(Duration::from_secs(2)),
            Retries::None => RetryConfig::disabled(),
        };
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(3))
            .read_timeout(Duration::from_secs(10))
            .operation_attempt_timeout(Duration::from_mins(1))
            .build();
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .http_client(http)
            .endpoint_url(endpoint)
            .region(Region::new(region.to_owned()))
            .force_path_style(true)
            .credentials_provider(Credentials::new(&keys.access, &keys.secret, None, None, "agent.toml"))
            // several stores refuse the checksum headers that the client sends by default; the room has its own
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .retry_config(retry)
            .timeout_config(timeouts)
            .build();
        Self {
            client: Client::from_conf(config),
            bucket: bucket.to_owned(),
            site: site.clone(),
            endpoint: endpoint.to_owned(),
        }
    }

    fn told<E, R>(&self, what: &str, error: &SdkError<E, R>) -> PlaneError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
        R: std::fmt::Debug,
    {
        let place = format!("object store of {} at {}", self.site, self.endpoint);
        match error {
            SdkError::ServiceError(service) => {
                let inner = service.err();
                let code = inner.code().unwrap_or("no code");
                let why = inner.message().unwrap_or("no message");
                PlaneError::Failed { what: format!("{what} at {}", self.site), why: format!("{code}: {why}") }
            }
            SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) => {
                PlaneError::Unreachable { what: place, why: format!("{what}: {}", chain(error)) }
            }
            other => PlaneError::Failed { what: format!("{what} at {}", self.site), why: chain(other) },
        }
    }

    /// One page of the objects below a prefix, from where the last page ended.
    pub(crate) async fn page(&self, prefix: &str, from: Option<&str>) -> Result<Page, PlaneError> {
        let what = format!("list {}/{prefix}", self.bucket);
        let answer = Box::pin(
            self.client
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(prefix)
                .set_continuation_token(from.map(str::to_owned))
                .send(),
        )
        .await
        .map_err(|e| self.told(&what, &e))?;
        let next = match (answer.is_truncated(), answer.next_continuation_token()) {
            (Some(true), Some(token)) if Some(token) != from => Some(token.to_owned()),
            (Some(true), _) => return Err(self.untrusted("a page says more follows and does not say where")),
            _ => None,
        };
        let mut objects = Vec::with_capacity(answer.contents().len());
        for object in answer.contents() {
            let key = object.key().ok_or_else(|| self.untrusted("an object has no key"))?;
            if !key.starts_with(prefix) {
                return Err(self.untrusted(&format!("{key:?} does not lie below {prefix:?}")));
            }
            objects.push(Listed {
                key: key.to_owned(),
                size: object.size().and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
                etag: unquoted(object.e_tag()),
                modified: object.last_modified().and_then(|t| t.to_millis().ok()),
            });
        }
        Ok(Page { objects, next })
    }

    /// A listing that must not be believed.
    pub(crate) fn untrusted(&self, why: &str) -> PlaneError {
        PlaneError::refused("DC-0510", format!("the listing of {} is not to be trusted: {why}", self.site))
    }

    /// Opens an object, if it is there and, where asked, still has that ETag.
    pub(crate) async fn open(
        &self,
        key: &str,
        etag: Option<&str>,
        range: Option<String>,
    ) -> Result<Option<GetObjectOutput>, PlaneError> {
        let sent = Box::pin(
            self.client
                .get_object()
                .bucket(&self.bucket)
                .key(key)
                .set_if_match(etag.map(quoted))
                .set_range(range)
                .send(),
        )
        .await;
        match sent {
            Ok(found) if etag.is_none_or(|e| unquoted(found.e_tag()) == e) => Ok(Some(found)),
            Ok(_) => Ok(None),
            Err(e) if matches!(status(&e), Some(404 | 412)) => Ok(None),
            Err(e) => Err(self.told(&format!("read {key}"), &e)),
        }
    }

    /// Reads an object whole, at most `most` bytes of it.
    ///
    /// Errors: `Failed` when it is larger or ends early.
    pub(crate) async fn get(&self, key: &str, most: u64) -> Result<Option<Bytes>, PlaneError> {
        let Some(found) = self.open(key, None, None).await? else { return Ok(None) };
        let size = found.content_length().and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        if size > most {
            return Err(PlaneError::Failed {
                what: format!("read {key} at {}", self.site),
                why: format!("it has {size} bytes, at most {most} are expected"),
            });
        }
        self.collect(key, found).await.map(Some)
    }

    /// The whole body, of the length that was announced.
    pub(crate) async fn collect(&self, key: &str, found: GetObjectOutput) -> Result<Bytes, PlaneError> {
        let announced = found.content_length().and_then(|n| u64::try_from(n).ok());
        let what = format!("read {key} at {}", self.site);
        let body = found.body.collect().await.map_err(|e| PlaneError::failed(what.clone(), &e))?.into_bytes();
        let length = body.len() as u64;
        match announced {
            Some(announced) if announced != length => Err(PlaneError::Failed {
                what,
                why: format!("{length} bytes came, {announced} were announced"),
            }),
            _ => Ok(body),
        }
    }

    /// Size and ETag of an object, if it is there.
    pub(crate) async fn head(&self, key: &str) -> Result<Option<(u64, String)>, PlaneError> {
        match Box::pin(self.client.head_object().bucket(&self.bucket).key(key).send()).await {
            Ok(found) => {
                let size = found.content_length().and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
                Ok(Some((size, unquoted(found.e_tag()))))
            }
            Err(e) if status(&e) == Some(404) => Ok(None),
            Err(e) => Err(self.told(&format!("look at {key}"), &e)),
        }
    }

    /// Writes an object; its ETag, or none when the condition did not hold.
    pub(crate) async fn put(
        &self,
        key: &str,
        body: Bytes,
        condition: &Condition,
        shape: &Shape,
    ) -> Result<Option<String>, PlaneError> {
        let call = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .set_content_type(shape.content_type.clone())
            .set_content_encoding(shape.content_encoding.clone())
            .set_metadata(shape.metadata.clone())
            .body(ByteStream::from(body));
        let call = match condition {
            Condition::Any => call,
            Condition::Absent => call.if_none_match("*"),
            Condition::Is(etag) => call.if_match(quoted(etag)),
        };
        match Box::pin(call.send()).await {
            Ok(done) => Ok(Some(unquoted(done.e_tag()))),
            Err(e) if *condition != Condition::Any && matches!(status(&e), Some(404 | 409 | 412)) => Ok(None),
            Err(e) => Err(self.told(&format!("write {key}"), &e)),
        }
    }

    /// Removes one of our own probe objects. Absent is as good.
    pub(crate) async fn remove(&self, key: &str) -> Result<(), PlaneError> {
        match Box::pin(self.client.delete_object().bucket(&self.bucket).key(key).send()).await {
            Ok(_) => Ok(()),
            Err(e) if status(&e) == Some(404) => Ok(()),
            Err(e) => Err(self.told(&format!("remove {key}"), &e)),
        }
    }

    /// Copies an object within the bucket.
    pub(crate) async fn duplicate(&self, from: &str, to: &str) -> Result<(), PlaneError> {
        let source = format!("{}/{}", self.bucket, percent(from));
        Box::pin(self.client.copy_object().bucket(&self.bucket).key(to).copy_source(source).send())
            .await
            .map(drop)
            .map_err(|e| self.told(&format!("copy {from} to {to}"), &e))
    }

    /// Tries a write whose only purpose is its answer.
    pub(crate) async fn knock(&self, key: &str) -> Answer {
        let body = ByteStream::from_static(b"dc-switch probes here whether writers may write\n");
        match Box::pin(self.client.put_object().bucket(&self.bucket).key(key).body(body).send()).await {
            Ok(_) => Answer::Accepted,
            Err(e) => match e.as_service_error().and_then(ProvideErrorMetadata::code) {
                // only this code is about the right to write; a wrong key is refused too, and proves nothing
                Some("AccessDenied") => Answer::Refused,
                _ => Answer::Unclear(self.told("write a probe", &e).to_string()),
            },
        }
    }

    /// Whether the bucket is there and may be read.
    pub(crate) async fn bucket_answers(&self) -> Result<(), PlaneError> {
        Box::pin(self.client.list_objects_v2().bucket(&self.bucket).max_keys(1).send())
            .await
            .map(drop)
            .map_err(|e| self.told(&format!("list bucket {}", self.bucket), &e))
    }

    /// The bucket's policy as text; none when it has none.
    pub(crate) async fn policy(&self) -> Result<Option<String>, PlaneError> {
        match Box::pin(self.client.get_bucket_policy().bucket(&self.bucket).send()).await {
            Ok(found) => Ok(found.policy().map(str::to_owned)),
            Err(e)
                if e.as_service_error().and_then(ProvideErrorMetadata::code)
                    == Some("NoSuchBucketPolicy") =>
            {
                Ok(None)
            }
            Err(e) => Err(self.told("read the bucket policy", &e)),
        }
    }

    /// Replaces the bucket's policy; none removes it.
    pub(crate) async fn set_policy(&self, text: Option<&str>) -> Result<(), PlaneError> {
        match text {
            Some(text) => Box::pin(self.client.put_bucket_policy().bucket(&self.bucket).policy(text).send())
                .await
                .map(drop)
                .map_err(|e| self.told("write the bucket policy", &e)),
            None => Box::pin(self.client.delete_bucket_policy().bucket(&self.bucket).send())
                .await
                .map(drop)
                .map_err(|e| self.told("remove the bucket policy", &e)),
        }
    }
}

/// What an object carries besides its bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shape {
    pub(crate) content_type: Option<String>,
    pub(crate) content_encoding: Option<String>,
    pub(crate) metadata: Option<std::collections::HashMap<String, String>>,
}

impl Shape {
    pub(crate) fn of(found: &GetObjectOutput) -> Self {
        Self {
            content_type: found.content_type().map(str::to_owned),
            content_encoding: found.content_encoding().filter(|e| !e.is_empty()).map(str::to_owned),
            metadata: found.metadata().filter(|m| !m.is_empty()).cloned(),
        }
    }
}

fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|r| r.status().as_u16())
}

/// A key as it stands in the header that names the source of a copy.
pub(crate) fn percent(key: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(key.len());
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_signs_survives_the_copy_header() {
        assert_eq!(percent("logs/run_id=a:b+c/é.log"), "logs/run_id%3Da%3Ab%2Bc/%C3%A9.log");
    }
}
