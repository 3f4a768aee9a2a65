//! One site's Kafka as a set of brokers, with warm connections to each.
//!
//! A call takes an idle connection of that broker and user or opens one, and gives it back after the whole answer, so
//! calls side by side never wait for each other. Every request sent from here may be repeated without harm, therefore
//! one that failed on a connection that had been idle is asked once more on a fresh one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_plane::{Deadline, PlaneError};
use futures::future::try_join_all;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{DescribeConfigsRequest, MetadataRequest};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::Login;
use crate::wire::{Api, Conn, WireError, text, words};

/// Longer than any healthy broker takes; a silent one must not eat an act's whole time.
const CALL_MAX: Duration = Duration::from_secs(8);
const IDLE_MAX: usize = 6;

/// A partition of a topic.
pub type Tp = (String, i32);

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Who {
    /// The agent's own principal.
    Agent,
    /// The canary.
    Canary,
}

/// The brokers and leaders of some topics, as one broker told them.
#[derive(Debug, Clone, Default)]
pub struct Map {
    /// Address by broker.
    pub brokers: BTreeMap<i32, String>,
    /// Leader by partition; -1 where there is none.
    pub leaders: BTreeMap<Tp, i32>,
    /// In-sync replicas and all replicas by partition.
    pub replicas: BTreeMap<Tp, (usize, usize)>,
    /// Topics that could not be seen, with the reason.
    pub missing: BTreeMap<String, String>,
}

impl Map {
    /// Partitions of the topics given, by leader.
    ///
    /// Errors: `Failed` when one of them has no leader.
    pub fn by_leader(&self, topics: &BTreeSet<&str>) -> Result<BTreeMap<i32, Vec<Tp>>, PlaneError> {
        let mut found = BTreeMap::<i32, Vec<Tp>>::new();
        for (tp, leader) in self.leaders.iter().filter(|(tp, _)| topics.contains(tp.0.as_str())) {
            if *leader < 0 {
                return Err(failed("find leaders", format!("{}/{} has no leader", tp.0, tp.1)));
            }
            found.entry(*leader).or_default().push(tp.clone());
        }
        Ok(found)
    }
}

/// A failure in words.
pub fn failed(what: &str, why: impl Into<String>) -> PlaneError {
    PlaneError::Failed { what: what.to_owned(), why: why.into() }
}

/// One site's brokers.
pub struct Cluster {
    /// Which site.
    pub site: SiteId,
    bootstrap: Vec<String>,
    logins: [Login; 2],
    tls: Option<Arc<rustls::ClientConfig>>,
    idle: Mutex<HashMap<(String, Who), Vec<Conn>>>,
    map: Mutex<Option<Arc<Map>>>,
}

impl Cluster {
    /// Knows where to ask; connects to nothing yet.
    pub fn new(
        site: SiteId,
        bootstrap: &str,
        agent: Login,
        canary: Login,
        tls: Option<Arc<rustls::ClientConfig>>,
    ) -> Self {
        Self {
            site,
            bootstrap: bootstrap.split(',').map(|one| one.trim().to_owned()).collect(),
            logins: [agent, canary],
            tls,
            idle: Mutex::default(),
            map: Mutex::default(),
        }
    }

    fn login(&self, who: Who) -> &Login {
        match who {
            Who::Agent => &self.logins[0],
            Who::Canary => &self.logins[1],
        }
    }

    async fn conn(&self, address: &str, who: Who, until: Instant) -> Result<(Conn, bool), WireError> {
        let idle = {
            let mut all = self.idle.lock();
            let pool = all.entry((address.to_owned(), who)).or_default();
            pool.retain(Conn::usable);
            pool.pop()
        };
        if let Some(conn) = idle {
            return Ok((conn, true));
        }
        let conn = Conn::open(address, self.login(who), self.tls.as_ref(), until).await?;
        Ok((conn, false))
    }

    fn put_back(&self, address: &str, who: Who, conn: Conn) {
        let mut all = self.idle.lock();
        let pool = all.entry((address.to_owned(), who)).or_default();
        if conn.usable() && pool.len() < IDLE_MAX {
            pool.push(conn);
        }
    }

    async fn ask<R: Api>(
        &self,
        address: &str,
        who: Who,
        request: &R,
        until: Deadline,
    ) -> Result<R::Answer, PlaneError> {
        let limit = until.0.min(Instant::now() + CALL_MAX);
        let wrong = |cause: &WireError| match cause {
            WireError::Silent { what, waited } => PlaneError::TimedOut {
                what: format!("{what} at {} broker {address}", self.site),
                waited: *waited,
            },
            WireError::Io(_) | WireError::Login { .. } => {
                PlaneError::unreachable(format!("{} broker {address}", self.site), cause)
            }
            WireError::Garbled { .. } => {
                PlaneError::failed(format!("ask {} broker {address}", self.site), cause)
            }
        };
        loop {
            let (mut conn, was_idle) = self.conn(address, who, limit).await.map_err(|e| wrong(&e))?;
            match conn.call(request, limit).await {
                Ok(answer) => {
                    self.put_back(address, who, conn);
                    return Ok(answer);
                }
                // All idle ones may have been closed meanwhile: each failure uses one up, a fresh one ends the loop.
                Err(e) if was_idle && e.is_broken_pipe() => {}
                Err(e) => return Err(wrong(&e)),
            }
        }
    }

    /// Asks one broker.
    ///
    /// Errors: `Unreachable`, `TimedOut`, or `Failed` for an answer that is none.
    pub async fn at<R: Api>(
        &self,
        map: &Map,
        broker: i32,
        who: Who,
        request: &R,
        until: Deadline,
    ) -> Result<R::Answer, PlaneError> {
        let address = map
            .brokers
            .get(&broker)
            .ok_or_else(|| failed("find broker", format!("{} has no broker {broker} now", self.site)))?;
        self.ask(address, who, request, until).await
    }

    /// Asks every broker, side by side.
    ///
    /// Errors: the first one's; all must answer.
    pub async fn everywhere<R: Api>(
        &self,
        map: &Map,
        who: Who,
        request: &R,
        until: Deadline,
    ) -> Result<BTreeMap<i32, R::Answer>, PlaneError> {
        let each = map.brokers.iter().map(|(broker, address)| async move {
            self.ask(address, who, request, until).await.map(|answer| (*broker, answer))
        });
        Ok(try_join_all(each).await?.into_iter().collect())
    }

    /// Asks whichever broker answers first in line: those known, then those of the configuration.
    ///
    /// Errors: the last broker's, once none has answered.
    pub async fn anywhere<R: Api>(
        &self,
        who: Who,
        request: &R,
        until: Deadline,
    ) -> Result<R::Answer, PlaneError> {
        let known = self.map.lock().clone();
        let mut line: Vec<String> = known.iter().flat_map(|map| map.brokers.values().cloned()).collect();
        line.extend(self.bootstrap.iter().filter(|one| !line.contains(one)).cloned().collect::<Vec<_>>());
        let mut last = failed("ask", format!("{} has no address", self.site));
        for address in line {
            match self.ask(&address, who, request, until).await {
                Ok(answer) => return Ok(answer),
                Err(e @ (PlaneError::Unreachable { .. } | PlaneError::TimedOut { .. }))
                    if !until.passed() =>
                {
                    last = e;
                }
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }

    /// Reads brokers and leaders of the topics given; also what later calls find brokers by.
    pub async fn map(&self, topics: &BTreeSet<&str>, until: Deadline) -> Result<Arc<Map>, PlaneError> {
        let named =
            topics.iter().map(|name| MetadataRequestTopic::default().with_name(Some(text(*name).into())));
        let ask = MetadataRequest::default()
            .with_topics(Some(named.collect()))
            .with_allow_auto_topic_creation(false);
        let answer = self.anywhere(Who::Agent, &ask, until).await?;
        let mut map = Map::default();
        for broker in &answer.brokers {
            map.brokers.insert(broker.node_id.0, format!("{}:{}", broker.host.as_str(), broker.port));
        }
        for topic in &answer.topics {
            let name = topic.name.as_ref().map(|n| n.0.to_string()).unwrap_or_default();
            if topic.error_code != 0 {
                map.missing.insert(name, words(topic.error_code));
                continue;
            }
            for part in &topic.partitions {
                let tp = (name.clone(), part.partition_index);
                map.leaders.insert(tp.clone(), part.leader_id.0);
                map.replicas.insert(tp, (part.isr_nodes.len(), part.replica_nodes.len()));
            }
        }
        let map = Arc::new(map);
        *self.map.lock() = Some(Arc::clone(&map));
        Ok(map)
    }

    /// As `map`, and every topic must be seen.
    ///
    /// Errors: `Failed` naming the topics that are missing.
    pub async fn full_map(&self, topics: &BTreeSet<&str>, until: Deadline) -> Result<Arc<Map>, PlaneError> {
        let map = self.map(topics, until).await?;
        if map.missing.is_empty() {
            return Ok(map);
        }
        let told: Vec<String> = map.missing.iter().map(|(topic, why)| format!("{topic} ({why})")).collect();
        Err(failed("find topics", format!("at {}: {}", self.site, told.join(", "))))
    }
}

/// Partitions by topic, as requests want them.
pub fn by_topic(tps: &[Tp]) -> BTreeMap<&str, Vec<i32>> {
    let mut found = BTreeMap::<&str, Vec<i32>>::new();
    for (topic, partition) in tps {
        found.entry(topic).or_default().push(*partition);
    }
    found
}

/// Settings of a topic that are compared between sites, and whether a difference forbids a move.
pub const SETTINGS: [(&str, bool); 8] = [
    ("cleanup.policy", true),
    ("max.message.bytes", true),
    ("message.timestamp.type", true),
    ("retention.ms", true),
    ("retention.bytes", true),
    ("compression.type", false),
    ("min.insync.replicas", false),
    ("segment.bytes", false),
];

impl Cluster {
    /// Names of all topics that the agent may see.
    pub async fn topic_names(&self, until: Deadline) -> Result<BTreeSet<String>, PlaneError> {
        let ask = MetadataRequest::default().with_topics(None).with_allow_auto_topic_creation(false);
        let answer = self.anywhere(Who::Agent, &ask, until).await?;
        Ok(answer.topics.iter().filter_map(|t| t.name.as_ref().map(|n| n.0.to_string())).collect())
    }

    /// The settings of topics that are compared between sites.
    ///
    /// Errors: `Failed` naming a topic whose settings the agent may not read.
    pub async fn topic_settings(
        &self,
        topics: &BTreeSet<&str>,
        until: Deadline,
    ) -> Result<BTreeMap<String, BTreeMap<String, String>>, PlaneError> {
        const TOPIC: i8 = 2;
        let keys: Vec<_> = SETTINGS.iter().map(|(key, _)| text(*key)).collect();
        let named = topics.iter().map(|topic| {
            DescribeConfigsResource::default()
                .with_resource_type(TOPIC)
                .with_resource_name(text(*topic))
                .with_configuration_keys(Some(keys.clone()))
        });
        let ask = DescribeConfigsRequest::default().with_resources(named.collect());
        let answer = self.anywhere(Who::Agent, &ask, until).await?;
        let mut found = BTreeMap::<String, BTreeMap<String, String>>::new();
        for topic in &answer.results {
            let name = topic.resource_name.to_string();
            if topic.error_code != 0 {
                let why = format!("{name} at {}: {}", self.site, words(topic.error_code));
                return Err(failed("read settings of a topic", why));
            }
            let set = topic.configs.iter();
            let set = set
                .map(|c| (c.name.to_string(), c.value.as_ref().map(ToString::to_string).unwrap_or_default()));
            found.entry(name).or_default().extend(set);
        }
        Ok(found)
    }
}
