//! One connection to one broker as one user: framing, versions, log-in.
//!
//! Strictly one question, then its answer: a broker serves one request per connection at a time. A connection counts
//! as dead from before a question is sent until its whole answer has been read, so a call that was given up can never
//! leave half an answer for the next.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::{
    ApiKey, ApiVersionsRequest, ApiVersionsResponse, ConsumerGroupDescribeRequest,
    ConsumerGroupDescribeResponse, CreateAclsRequest, CreateAclsResponse, DeleteAclsRequest,
    DeleteAclsResponse, DescribeAclsRequest, DescribeAclsResponse, DescribeConfigsRequest,
    DescribeConfigsResponse, DescribeGroupsRequest, DescribeGroupsResponse, FetchRequest, FetchResponse,
    FindCoordinatorRequest, FindCoordinatorResponse, ListOffsetsRequest, ListOffsetsResponse,
    MetadataRequest, MetadataResponse, OffsetCommitRequest, OffsetCommitResponse, OffsetFetchRequest,
    OffsetFetchResponse, ProduceRequest, ProduceResponse, RequestHeader, ResponseHeader,
    SaslAuthenticateRequest, SaslAuthenticateResponse, SaslHandshakeRequest, SaslHandshakeResponse,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Message, StrBytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::Login;

/// A frame above this is no answer to us: something else listens there.
const FRAME_MAX: usize = 64 << 20;
const CLIENT: &str = "dc-switch";

/// A request with its answer and the newest version this program was written and tested for.
pub trait Api: Message + Encodable + HeaderVersion + Send + Sync {
    /// Kafka's number of it.
    const KEY: ApiKey;
    /// Never asked in a newer version: Produce, Fetch and the group calls turn to topic ids above.
    const CAP: i16;
    /// What comes back.
    type Answer: Message + Decodable + HeaderVersion + Send;
}

macro_rules! apis {
    ($($key:ident $ask:ident $answer:ident $cap:literal;)*) => { $(
        impl Api for $ask {
            const KEY: ApiKey = ApiKey::$key;
            const CAP: i16 = $cap;
            type Answer = $answer;
        }
    )* };
}
apis! {
    ApiVersions ApiVersionsRequest ApiVersionsResponse 3;
    SaslHandshake SaslHandshakeRequest SaslHandshakeResponse 1;
    SaslAuthenticate SaslAuthenticateRequest SaslAuthenticateResponse 2;
    Metadata MetadataRequest MetadataResponse 12;
    DescribeAcls DescribeAclsRequest DescribeAclsResponse 3;
    CreateAcls CreateAclsRequest CreateAclsResponse 3;
    DeleteAcls DeleteAclsRequest DeleteAclsResponse 3;
    DescribeConfigs DescribeConfigsRequest DescribeConfigsResponse 4;
    Produce ProduceRequest ProduceResponse 11;
    Fetch FetchRequest FetchResponse 12;
    ListOffsets ListOffsetsRequest ListOffsetsResponse 7;
    FindCoordinator FindCoordinatorRequest FindCoordinatorResponse 4;
    OffsetFetch OffsetFetchRequest OffsetFetchResponse 8;
    OffsetCommit OffsetCommitRequest OffsetCommitResponse 8;
    DescribeGroups DescribeGroupsRequest DescribeGroupsResponse 5;
    ConsumerGroupDescribe ConsumerGroupDescribeRequest ConsumerGroupDescribeResponse 1;
}

/// Why a connection gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// It broke, or could not be made.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// No answer by the deadline.
    #[error("no answer to {what} within {waited:.1?}")]
    Silent {
        /// The request.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The broker does not let the user in.
    #[error("log in as {user}: {why}")]
    Login {
        /// Which principal.
        user: String,
        /// The broker's reason.
        why: String,
    },
    /// What came back is no answer of Kafka, or to another question.
    #[error("{what}: {why}")]
    Garbled {
        /// The request.
        what: String,
        /// What is wrong with the bytes.
        why: String,
    },
}

impl WireError {
    /// Whether a fresh connection may do better: the old one was closed under us.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io(_))
    }
}

/// Anything that carries bytes both ways.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One broker, one user.
pub struct Conn {
    stream: Box<dyn Stream>,
    sent: i32,
    dead: bool,
    versions: HashMap<i16, (i16, i16)>,
    expires: Option<Instant>,
}

/// A text as the codec wants it.
pub fn text(from: impl Into<String>) -> StrBytes {
    StrBytes::from_string(from.into())
}

/// The words for one of Kafka's error codes.
pub fn words(code: i16) -> String {
    ResponseError::try_from_code(code).map_or_else(|| "no error".to_owned(), |e| format!("{e:?}"))
}

impl Conn {
    /// Connects and logs in.
    ///
    /// Errors: any of `WireError`, never later than `until`.
    pub async fn open(
        address: &str,
        login: &Login,
        tls: Option<&Arc<rustls::ClientConfig>>,
        until: Instant,
    ) -> Result<Self, WireError> {
        let began = Instant::now();
        let silent = |_| WireError::Silent { what: "connect".to_owned(), waited: began.elapsed() };
        let tcp = tokio::time::timeout_at(until, TcpStream::connect(address)).await.map_err(silent)??;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(tcp),
            Some(config) => {
                let host = address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned();
                let name = rustls::pki_types::ServerName::try_from(host)
                    .map_err(|e| WireError::Garbled { what: "server name".to_owned(), why: e.to_string() })?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                Box::new(tokio::time::timeout_at(until, connector.connect(name, tcp)).await.map_err(silent)??)
            }
        };
        let mut conn = Self { stream, sent: 0, dead: false, versions: HashMap::new(), expires: None };
        conn.learn_versions(until).await?;
        conn.log_in(login, until).await?;
        Ok(conn)
    }

    /// Whether it may be asked again.
    pub fn usable(&self) -> bool {
        !self.dead && self.expires.is_none_or(|at| Instant::now() < at)
    }

    /// A broker that does not know our version of this one request answers in version 0: its first two bytes tell.
    async fn learn_versions(&mut self, until: Instant) -> Result<(), WireError> {
        const UNSUPPORTED: i16 = 35;
        let ask = ApiVersionsRequest::default()
            .with_client_software_name(text(CLIENT))
            .with_client_software_version(text(env!("CARGO_PKG_VERSION")));
        let mut body = self.exchange(&ask, 3, until).await?;
        let garbled = |why: String| WireError::Garbled { what: "ApiVersions".to_owned(), why };
        ResponseHeader::decode(&mut body, 0).map_err(|e| garbled(e.to_string()))?;
        let old = body.len() >= 2 && i16::from_be_bytes([body[0], body[1]]) == UNSUPPORTED;
        let mut answer = ApiVersionsResponse::decode(&mut body, if old { 0 } else { 3 })
            .map_err(|e| garbled(e.to_string()))?;
        if old {
            let mut body = self.exchange(&ApiVersionsRequest::default(), 0, until).await?;
            ResponseHeader::decode(&mut body, 0).map_err(|e| garbled(e.to_string()))?;
            answer = ApiVersionsResponse::decode(&mut body, 0).map_err(|e| garbled(e.to_string()))?;
        }
        if answer.error_code != 0 {
            return Err(garbled(words(answer.error_code)));
        }
        self.versions = answer.api_keys.iter().map(|k| (k.api_key, (k.min_version, k.max_version))).collect();
        Ok(())
    }

    async fn log_in(&mut self, login: &Login, until: Instant) -> Result<(), WireError> {
        let refused = |why: String| WireError::Login { user: login.user.clone(), why };
        let hello = SaslHandshakeRequest::default().with_mechanism(text("PLAIN"));
        let answer = self.call(&hello, until).await?;
        if answer.error_code != 0 {
            let offered: Vec<&str> = answer.mechanisms.iter().map(StrBytes::as_str).collect();
            return Err(refused(format!(
                "{}, the broker offers {}",
                words(answer.error_code),
                offered.join(" ")
            )));
        }
        let proof = Bytes::from(format!("\0{}\0{}", login.user, login.password));
        let answer = self.call(&SaslAuthenticateRequest::default().with_auth_bytes(proof), until).await?;
        if answer.error_code != 0 {
            return Err(refused(words(answer.error_code)));
        }
        if let Ok(life @ 1..) = u64::try_from(answer.session_lifetime_ms) {
            // Four fifths: the broker closes at the end, and a call must not start just before it.
            self.expires = Some(Instant::now() + Duration::from_millis(life / 5 * 4));
        }
        Ok(())
    }

    fn version<R: Api>(&self) -> Result<i16, WireError> {
        if R::KEY as i16 == ApiKey::ApiVersions as i16 {
            return Ok(R::CAP);
        }
        let (low, high) = self.versions.get(&(R::KEY as i16)).copied().unwrap_or((0, -1));
        let version = high.min(R::CAP).min(R::VERSIONS.max).min(R::Answer::VERSIONS.max);
        if version < low.max(R::VERSIONS.min) {
            return Err(WireError::Garbled {
                what: format!("{:?}", R::KEY),
                why: format!("no common version, the broker knows {low} to {high}"),
            });
        }
        Ok(version)
    }

    /// Asks and reads the whole answer.
    ///
    /// Errors: any of `WireError`, never later than `until`; the connection is dead after one.
    pub async fn call<R: Api>(&mut self, ask: &R, until: Instant) -> Result<R::Answer, WireError> {
        let version = self.version::<R>()?;
        let mut body = self.exchange(ask, version, until).await?;
        let garbled = |why: String| WireError::Garbled { what: format!("{:?}", R::KEY), why };
        ResponseHeader::decode(&mut body, R::Answer::header_version(version))
            .map_err(|e| garbled(e.to_string()))?;
        let answer = R::Answer::decode(&mut body, version).map_err(|e| garbled(e.to_string()))?;
        if body.has_remaining() {
            return Err(garbled(format!("{} bytes left over", body.remaining())));
        }
        Ok(answer)
    }

    async fn exchange<R: Api>(&mut self, ask: &R, version: i16, until: Instant) -> Result<Bytes, WireError> {
        let garbled = |why: String| WireError::Garbled { what: format!("{:?}", R::KEY), why };
        if self.dead {
            return Err(garbled("the connection is dead".to_owned()));
        }
        self.sent = self.sent.wrapping_add(1);
        let head = RequestHeader::default()
            .with_request_api_key(R::KEY as i16)
            .with_request_api_version(version)
            .with_correlation_id(self.sent)
            .with_client_id(Some(StrBytes::from_static_str(CLIENT)));
        let mut frame = BytesMut::with_capacity(512);
        frame.put_i32(0);
        head.encode(&mut frame, R::header_version(version)).map_err(|e| garbled(e.to_string()))?;
        ask.encode(&mut frame, version).map_err(|e| garbled(format!("encode version {version}: {e}")))?;
        let size = i32::try_from(frame.len() - 4).map_err(|e| garbled(e.to_string()))?;
        frame[..4].copy_from_slice(&size.to_be_bytes());
        self.dead = true;
        let began = Instant::now();
        let body = tokio::time::timeout_at(until, self.transfer(&frame))
            .await
            .map_err(|_| WireError::Silent { what: format!("{:?}", R::KEY), waited: began.elapsed() })??;
        let got = i32::from_be_bytes([body[0], body[1], body[2], body[3]]);
        if got != self.sent {
            return Err(garbled(format!("an answer to question {got}, not {}", self.sent)));
        }
        self.dead = false;
        Ok(body)
    }

    async fn transfer(&mut self, frame: &[u8]) -> Result<Bytes, WireError> {
        self.stream.write_all(frame).await?;
        self.stream.flush().await?;
        let size = self.stream.read_i32().await?;
        match usize::try_from(size) {
            Ok(size @ 4..=FRAME_MAX) => {
                let mut body = vec![0; size];
                self.stream.read_exact(&mut body).await?;
                Ok(Bytes::from(body))
            }
            _ => Err(WireError::Garbled {
                what: "frame".to_owned(),
                why: format!(
                    "{size} bytes announced; does something other than Kafka, or TLS, listen there?"
                ),
            }),
        }
    }
}
