//! The few administrative calls that make topics and grants, as the cluster's super user.
//!
//! One short-lived connection per broker, one request at a time, SASL PLAIN. Only for the lab: it shares no line
//! with the product, so that a fault of one cannot hide in the other.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::create_acls_request::AclCreation;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::{
    ApiKey, CreateAclsRequest, CreateAclsResponse, CreateTopicsRequest, CreateTopicsResponse,
    MetadataRequest, MetadataResponse, RequestHeader, ResponseHeader, SaslAuthenticateRequest,
    SaslAuthenticateResponse, SaslHandshakeRequest, SaslHandshakeResponse,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, StrBytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const ANSWER_WITHIN: Duration = Duration::from_secs(20);
const FRAME_MAX: usize = 4 << 20;

/// What a principal may do: `("app", Topic, "orders", Write)`; a name ending in `*` after other letters is a prefix.
#[derive(Debug, Clone)]
pub struct Grant {
    /// Without `User:`.
    pub who: &'static str,
    /// Kind of thing.
    pub on: On,
    /// Its name; `*` for all.
    pub name: String,
    /// What is allowed.
    pub may: &'static [May],
}

/// Kinds of things, with Kafka's codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum On {
    Topic = 2,
    Group = 3,
    Cluster = 4,
    TransactionalId = 5,
}

/// Operations, with Kafka's codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum May {
    All = 2,
    Read = 3,
    Write = 4,
    Create = 5,
    Alter = 7,
    Describe = 8,
    DescribeConfigs = 10,
    IdempotentWrite = 12,
}

/// A connection as one user.
pub struct Admin {
    tcp: TcpStream,
    sent: i32,
}

fn text(from: impl Into<String>) -> StrBytes {
    StrBytes::from_string(from.into())
}

fn good(code: i16) -> Result<()> {
    match ResponseError::try_from_code(code) {
        None => Ok(()),
        Some(error) => bail!("{error}"),
    }
}

impl Admin {
    /// Connects and logs in.
    pub async fn connect(address: &str, user: &str, password: &str) -> Result<Admin> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let mut admin = Admin { tcp, sent: 0 };
        let hello = SaslHandshakeRequest::default().with_mechanism(text("PLAIN"));
        let answer: SaslHandshakeResponse = admin.ask(ApiKey::SaslHandshake, 1, &hello).await?;
        good(answer.error_code)?;
        let proof = Bytes::from(format!("\0{user}\0{password}"));
        let login = SaslAuthenticateRequest::default().with_auth_bytes(proof);
        let answer: SaslAuthenticateResponse = admin.ask(ApiKey::SaslAuthenticate, 2, &login).await?;
        good(answer.error_code).with_context(|| format!("log in as {user}"))?;
        Ok(admin)
    }

    async fn ask<Q, A>(&mut self, key: ApiKey, version: i16, question: &Q) -> Result<A>
    where
        Q: Encodable + HeaderVersion,
        A: Decodable + HeaderVersion,
    {
        self.sent += 1;
        let head = RequestHeader::default()
            .with_request_api_key(key as i16)
            .with_request_api_version(version)
            .with_correlation_id(self.sent)
            .with_client_id(Some(text("dc-lab")));
        let mut body = BytesMut::new();
        head.encode(&mut body, Q::header_version(version))?;
        question.encode(&mut body, version)?;
        let mut frame = BytesMut::with_capacity(body.len() + 4);
        frame.put_i32(i32::try_from(body.len())?);
        frame.extend_from_slice(&body);
        let exchange = async {
            self.tcp.write_all(&frame).await?;
            let size = usize::try_from(self.tcp.read_i32().await?)?;
            ensure!(size <= FRAME_MAX, "an answer of {size} bytes");
            let mut answer = vec![0; size];
            self.tcp.read_exact(&mut answer).await?;
            Ok(Bytes::from(answer))
        };
        let mut answer = tokio::time::timeout(ANSWER_WITHIN, exchange)
            .await
            .with_context(|| format!("{key:?} was not answered within {ANSWER_WITHIN:?}"))??;
        ResponseHeader::decode(&mut answer, A::header_version(version))?;
        let decoded = A::decode(&mut answer, version)?;
        ensure!(!answer.has_remaining(), "{key:?}: bytes left over");
        Ok(decoded)
    }

    /// How many brokers the cluster has now.
    pub async fn brokers(&mut self) -> Result<usize> {
        let ask =
            MetadataRequest::default().with_topics(Some(Vec::new())).with_allow_auto_topic_creation(false);
        let answer: MetadataResponse = self.ask(ApiKey::Metadata, 12, &ask).await?;
        Ok(answer.brokers.len())
    }

    /// Makes a topic. Repeat: safe.
    pub async fn topic(&mut self, name: &str, partitions: i32, configs: &[(&str, &str)]) -> Result<()> {
        let set = configs.iter().map(|(key, value)| {
            CreatableTopicConfig::default().with_name(text(*key)).with_value(Some(text(*value)))
        });
        let topic = CreatableTopic::default()
            .with_name(text(name).into())
            .with_num_partitions(partitions)
            .with_replication_factor(1)
            .with_configs(set.collect());
        let ask = CreateTopicsRequest::default().with_topics(vec![topic]).with_timeout_ms(15_000);
        let answer: CreateTopicsResponse = self.ask(ApiKey::CreateTopics, 7, &ask).await?;
        for made in &answer.topics {
            if made.error_code != ResponseError::TopicAlreadyExists.code() {
                good(made.error_code).with_context(|| format!("make topic {name}"))?;
            }
        }
        Ok(())
    }

    /// Gives grants. Repeat: safe.
    pub async fn grant(&mut self, grants: &[Grant]) -> Result<()> {
        let each = grants.iter().flat_map(|g| g.may.iter().map(move |may| (g, *may)));
        let bindings: Vec<AclCreation> = each
            .map(|(g, may)| {
                let prefix = g.name.strip_suffix('*').filter(|p| !p.is_empty());
                AclCreation::default()
                    .with_resource_type(g.on as i8)
                    .with_resource_name(text(prefix.unwrap_or(&g.name)))
                    .with_resource_pattern_type(if prefix.is_some() { 4 } else { 3 })
                    .with_principal(text(format!("User:{}", g.who)))
                    .with_host(text("*"))
                    .with_operation(may as i8)
                    .with_permission_type(3)
            })
            .collect();
        let ask = CreateAclsRequest::default().with_creations(bindings);
        let answer: CreateAclsResponse = self.ask(ApiKey::CreateAcls, 3, &ask).await?;
        for made in &answer.results {
            good(made.error_code).context("give a grant")?;
        }
        Ok(())
    }
}
