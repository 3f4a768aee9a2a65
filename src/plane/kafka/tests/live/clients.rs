//! Applications: idempotent writers that keep trying, readers, groups.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dc_core::ids::SiteId;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Message, Offset, TopicPartitionList};

use crate::world::World;

pub type Tp = (String, i32);
pub type Acked = BTreeMap<Tp, Vec<String>>;

pub struct Read {
    pub value: String,
}

fn client(world: &World, site: &SiteId, user: &str) -> ClientConfig {
    client_of(world.bootstrap(site), user, &world.secret(user))
}

fn client_of(bootstrap: &str, user: &str, password: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("security.protocol", "SASL_PLAINTEXT")
        .set("sasl.mechanism", "PLAIN")
        .set("sasl.username", user)
        .set("sasl.password", password);
    config
}

fn partitions(world: &World) -> Vec<Tp> {
    let topics = &world.spec.kafka.as_ref().unwrap().topics;
    topics.iter().flat_map(|t| (0..3).map(move |p| (t.clone(), p))).collect()
}

#[derive(Default)]
struct Told {
    acked: Acked,
    /// Acknowledgements and refusals by site, with their time.
    acks: Vec<(Instant, SiteId)>,
    refusals: Vec<(Instant, SiteId)>,
}

/// A writer per partition, one record at a time, its own sequence, at the site that takes it.
pub struct Load {
    told: Arc<parking_lot::Mutex<Told>>,
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub fn start(world: &World) -> Load {
        let told = Arc::new(parking_lot::Mutex::new(Told::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let password = world.secret("app");
        let sites: Vec<(SiteId, String)> = [&world.source, &world.target]
            .map(|site| (site.clone(), world.bootstrap(site).to_owned()))
            .into();
        let stamp = std::process::id();
        let began = Instant::now();
        let writers = partitions(world).into_iter().map(|tp| {
            let writer = Writer {
                sites: sites.clone(),
                password: password.clone(),
                told: Arc::clone(&told),
                stop: Arc::clone(&stop),
                name: format!("{stamp}-{:?}-{}-{}", began, tp.0, tp.1),
                tp,
            };
            tokio::spawn(writer.run())
        });
        Load { writers: writers.collect(), told, stop }
    }

    pub fn acked(&self) -> usize {
        self.told.lock().acks.len()
    }

    async fn until(&self, what: &str, ready: impl Fn(&Told) -> bool) {
        let began = Instant::now();
        while !ready(&self.told.lock()) {
            assert!(began.elapsed() < Duration::from_mins(1), "no {what} within a minute");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_acked(&self, _world: &World, count: usize) {
        self.until("acknowledgements", |told| told.acks.len() >= count).await;
    }

    pub async fn until_acked_at(&self, _world: &World, site: &SiteId) {
        let now = Instant::now();
        self.until("acknowledgement there", |told| told.acks.iter().any(|(at, s)| s == site && *at > now))
            .await;
    }

    pub async fn until_refused(&self, site: &SiteId) {
        let now = Instant::now();
        self.until("refusal", |told| told.refusals.iter().any(|(at, s)| s == site && *at > now)).await;
    }

    /// The pause between the last acknowledgement elsewhere and the first at `site`, in words.
    pub fn gap(&self, site: &SiteId) -> String {
        let told = self.told.lock();
        let last = told.acks.iter().rev().find(|(_, s)| s != site).map(|(at, _)| *at);
        let first = told.acks.iter().find(|(at, s)| s == site && Some(*at) > last).map(|(at, _)| *at);
        match (last, first) {
            (Some(last), Some(first)) => {
                format!("{} ms without an acknowledgement", (first - last).as_millis())
            }
            _ => "no gap".to_owned(),
        }
    }

    pub async fn stop(self) -> Acked {
        self.stop.store(true, Ordering::SeqCst);
        for writer in self.writers {
            writer.await.unwrap();
        }
        std::mem::take(&mut self.told.lock().acked)
    }
}

struct Writer {
    sites: Vec<(SiteId, String)>,
    password: String,
    told: Arc<parking_lot::Mutex<Told>>,
    stop: Arc<AtomicBool>,
    name: String,
    tp: Tp,
}

impl Writer {
    fn producer(&self, at: usize) -> FutureProducer {
        client_of(&self.sites[at].1, "app", &self.password)
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .create()
            .unwrap()
    }

    /// A refused record goes to the other site, by a producer made anew: an instance must not live across a move.
    async fn run(self) {
        let mut at = 0;
        let mut producer = self.producer(at);
        let mut sequence = 0_u64;
        while !self.stop.load(Ordering::SeqCst) {
            let value = format!("{}-{sequence}", self.name);
            let record =
                FutureRecord::to(&self.tp.0).partition(self.tp.1).key("k").payload(&value).timestamp(stamp());
            let site = self.sites[at].0.clone();
            match producer.send(record, Duration::from_secs(0)).await {
                Ok(_) => {
                    let mut told = self.told.lock();
                    told.acks.push((Instant::now(), site));
                    told.acked.entry(self.tp.clone()).or_default().push(value);
                    sequence += 1;
                }
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::TopicAuthorizationFailed), _)) => {
                    self.told.lock().refusals.push((Instant::now(), site));
                    // As an application would: not at once, and not as fast as it can.
                    tokio::time::sleep(Duration::from_millis(25)).await;
                    at = 1 - at;
                    producer = self.producer(at);
                }
                Err((other, _)) => panic!("{} at {site}: {other}", self.name),
            }
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
    }
}

fn stamp() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

/// Everything readable in a partition from an offset up to an end.
pub async fn read(world: &World, site: &SiteId, tp: &Tp, from: i64, end: i64) -> Vec<Read> {
    let config = client(world, site, "dclab")
        .set("group.id", "live-reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", "10")
        .clone();
    let tp = tp.clone();
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&tp.0, tp.1, Offset::Offset(from)).unwrap();
        consumer.assign(&list).unwrap();
        let mut found = Vec::new();
        loop {
            match consumer.poll(Duration::from_secs(10)).expect("an answer") {
                Err(KafkaError::PartitionEOF(_)) => return found,
                Err(e) => panic!("{e}"),
                Ok(message) if message.offset() >= end => return found,
                Ok(message) => {
                    let value = String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned();
                    found.push(Read { value });
                }
            }
        }
    })
    .await
    .unwrap()
}

/// Commits positions of a group, `lag` offsets before the end of every partition, as the application.
pub async fn commit(world: &World, site: &SiteId, group: &str, lag: i64) {
    let config = client(world, site, "app").set("group.id", group).set("enable.auto.commit", "false").clone();
    let all = partitions(world);
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        for (topic, partition) in &all {
            let (_, end) = consumer.fetch_watermarks(topic, *partition, Duration::from_secs(10)).unwrap();
            list.add_partition_offset(
                topic,
                *partition,
                Offset::Offset((end - lag * i64::from(partition + 1)).max(0)),
            )
            .unwrap();
        }
        consumer.commit(&list, CommitMode::Sync).unwrap();
    })
    .await
    .unwrap();
}

/// Positions of a group, read as the lab's own user.
pub async fn committed(world: &World, site: &SiteId, group: &str) -> BTreeMap<Tp, i64> {
    let config = client(world, site, "dclab").set("group.id", group).clone();
    let all = partitions(world);
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        for (topic, partition) in &all {
            list.add_partition(topic, *partition);
        }
        let found = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
        let rows = found.elements().into_iter().filter_map(|e| match e.offset() {
            Offset::Offset(at) => Some(((e.topic().to_owned(), e.partition()), at)),
            _ => None,
        });
        rows.collect()
    })
    .await
    .unwrap()
}
