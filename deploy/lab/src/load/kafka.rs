//! Producers of Kafka at fixed sites, a probe with a fresh client per try, and what the oracle reads of the topics.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::history::{History, Id, Outcome, now_ns};
use crate::load::{RECENT, Shared, groups};
use crate::oracle::writes::Content;
use crate::world::{DATA_SITES, Plane, Site, World, port};

/// Topics of the group, as in its file.
pub const TOPICS: [&str; 2] = ["orders", "payments"];
/// Writers per site, each with its own producer and key.
const WRITERS: u16 = 4;
/// Pause before a closed site is tried again, with a new client, while a move is asked for.
const OFTEN: Duration = Duration::from_millis(150);
/// Pause between two records of a writer: four make about 300 records a second.
const BETWEEN: Duration = Duration::from_millis(13);
/// Records of a writer under way at once.
const IN_FLIGHT: usize = 20;

/// Settings of any client: `app` is fenced by moves, `dclab` reads for the oracle.
pub fn config(world: &World, site: Site, user: &str) -> Result<ClientConfig> {
    let mut c = ClientConfig::new();
    c.set("bootstrap.servers", format!("{}:{}", world.ip(&site), port::KAFKA));
    c.set("security.protocol", "sasl_plaintext").set("sasl.mechanisms", "PLAIN");
    c.set("sasl.username", user).set("sasl.password", world.secret(&format!("kafka-{user}"))?);
    c.set("reconnect.backoff.max.ms", "500").set("retry.backoff.max.ms", "200");
    c.set_log_level(RDKafkaLogLevel::Emerg); // refusals are the expected answer half of the time
    Ok(c)
}

fn producer(world: &World, site: Site, idempotent: bool, timeout_ms: u32) -> Result<FutureProducer> {
    let mut c = config(world, site, "app")?;
    c.set("enable.idempotence", idempotent.to_string()).set("acks", "all").set("linger.ms", "2");
    c.set("message.timeout.ms", timeout_ms.to_string());
    c.create().context("make a producer")
}

/// Starts writers, probes, tails and consumer groups.
pub fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<()> {
    let history = shared.history(Plane::Kafka)?;
    for site in DATA_SITES {
        for n in 1..=WRITERS {
            tasks.spawn(write(shared.clone(), history.clone(), site, u16::from(site.index) * 100 + n));
        }
        tasks.spawn(probe(shared.clone(), history.clone(), site));
        let (shared, history) = (shared.clone(), history.clone());
        tasks.spawn_blocking(move || while !shared.over() && tail(&shared, &history, site).is_err() {});
    }
    groups::start(shared, tasks);
    Ok(())
}

async fn write(shared: Arc<Shared>, history: Arc<History>, site: Site, writer: u16) {
    let topic = TOPICS[usize::from(writer) % TOPICS.len()];
    let slots = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut seq = shared.base;
    while !shared.over() {
        let generation = shared.generation.load(Ordering::Relaxed);
        let Ok(producer) = producer(&shared.world, site, true, 5_000) else {
            shared.pause(OFTEN).await;
            continue;
        };
        // A refused producer is not used again: when its topic comes back it numbers its records from 0 once more,
        // and the broker takes them for repeats.
        let refused = Arc::new(AtomicBool::new(false));
        while !shared.over()
            && generation == shared.generation.load(Ordering::Relaxed)
            && producer.client().fatal_error().is_none()
            && !refused.load(Ordering::Relaxed)
        {
            seq += 1;
            shared.sleep(BETWEEN).await;
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let (key, value) = (writer.to_string(), format!("{writer} {seq}"));
            let sent = now_ns();
            match producer.send_result(FutureRecord::to(topic).key(&key).payload(&value)) {
                Ok(answer) => {
                    let (history, refused) = (history.clone(), refused.clone());
                    tokio::spawn(async move {
                        let outcome = match answer.await {
                            Ok(Ok(_)) => Outcome::Acked,
                            Ok(Err((e, _))) => told(&e),
                            Err(_) => Outcome::Unknown,
                        };
                        history.add(site, (writer, seq), sent, outcome);
                        refused.fetch_or(outcome != Outcome::Acked, Ordering::Relaxed);
                        drop(slot);
                    });
                }
                Err((e, _)) => {
                    history.add(
                        site,
                        (writer, seq),
                        sent,
                        if e.rdkafka_error_code() == Some(Code::Fatal) { Outcome::Unknown } else { told(&e) },
                    );
                    refused.store(true, Ordering::Relaxed);
                }
            }
        }
        end(producer).await;
        if refused.load(Ordering::Relaxed) {
            shared.pause(OFTEN).await;
        }
    }
}

/// A producer's end may wait for its threads.
async fn end(producer: FutureProducer) {
    let _ = tokio::task::spawn_blocking(move || {
        let _ = producer.flush(Duration::from_secs(1)); // what has no answer then is unknown
        drop(producer);
    })
    .await;
}

/// What an error says about the record: refused by the broker's authorizer, or nothing.
fn told(e: &KafkaError) -> Outcome {
    match e.rdkafka_error_code() {
        Some(
            Code::TopicAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::UnknownTopicOrPartition
            | Code::UnknownTopic,
        ) => Outcome::Refused,
        _ => Outcome::Unknown,
    }
}

/// While a move is asked for: one record per fresh client, because a client that asked too early remembers the refusal.
async fn probe(shared: Arc<Shared>, history: Arc<History>, site: Site) {
    let writer = u16::from(site.index) * 100 + 90;
    let mut seq = shared.base;
    while !shared.over() {
        if !shared.moving.load(Ordering::Relaxed) {
            shared.sleep(Duration::from_millis(100)).await;
            continue;
        }
        seq += 1;
        let sent = now_ns();
        let mut outcome = Outcome::Unknown;
        if let Ok(producer) = producer(&shared.world, site, false, 1_500) {
            let (key, value) = (writer.to_string(), format!("{writer} {seq}"));
            let record = FutureRecord::to(TOPICS[0]).key(&key).payload(&value);
            outcome = match producer.send(record, Duration::ZERO).await {
                Ok(_) => Outcome::Acked,
                Err((e, _)) => told(&e),
            };
            history.add(site, (writer, seq), sent, outcome);
            end(producer).await;
        }
        let pause = if outcome == Outcome::Acked { 200 } else { 30 };
        shared.sleep(Duration::from_millis(pause)).await;
    }
}

fn reader(world: &World, site: Site) -> Result<BaseConsumer> {
    let mut c = config(world, site, "dclab")?;
    c.set("group.id", "dclab-oracle")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed");
    c.set("enable.partition.eof", "true").set("fetch.wait.max.ms", "50").set("auto.offset.reset", "earliest");
    c.create().context("make a reader")
}

fn assign(reader: &BaseConsumer, at: Offset) -> Result<usize> {
    let metadata = reader.fetch_metadata(None, Duration::from_secs(10)).context("read metadata")?;
    let mut list = TopicPartitionList::new();
    for topic in metadata.topics().iter().filter(|t| TOPICS.contains(&t.name())) {
        for p in topic.partitions() {
            list.add_partition_offset(topic.name(), p.id(), at)?;
        }
    }
    if list.count() == 0 {
        bail!("topics {TOPICS:?} are not there");
    }
    reader.assign(&list)?;
    Ok(list.count())
}

/// The write that a record carries.
pub fn parse(message: &impl Message) -> Option<Id> {
    let text = std::str::from_utf8(message.payload()?).ok()?;
    let (writer, seq) = text.split_once(' ')?;
    Some((writer.parse().ok()?, seq.parse().ok()?))
}

/// Name of a partition in contents and reports.
pub fn place(topic: &str, partition: i32) -> String {
    format!("{topic}-{partition}")
}

/// Records of every partition with their offsets, in stored order.
pub type Records = BTreeMap<String, Vec<(i64, Id)>>;

/// Reads all topics of one site from their begin to their end as of now.
///
/// Errors: the end is not reached within 60 s. Records that no writer of the lab wrote are left out.
pub fn records(world: &World, site: Site) -> Result<Records> {
    let reader = reader(world, site)?;
    let mut open = assign(&reader, Offset::Beginning)?;
    let mut records = Records::new();
    let limit = Instant::now() + Duration::from_mins(1);
    while open > 0 {
        match reader.poll(Duration::from_millis(200)) {
            Some(Ok(m)) => {
                if let Some(id) = parse(&m) {
                    records.entry(place(m.topic(), m.partition())).or_default().push((m.offset(), id));
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(e)) if Instant::now() >= limit => {
                return Err(e).with_context(|| format!("read the topics of {site}"));
            }
            _ if Instant::now() >= limit => {
                bail!("{open} partitions of {site} were not read to their end within 60 s")
            }
            _ => {}
        }
    }
    Ok(records)
}

/// Records without their offsets.
pub fn content(records: &Records) -> Content {
    records.iter().map(|(place, of)| (place.clone(), of.iter().map(|(_, id)| *id).collect())).collect()
}

/// Follows the topics of the site opposite to `source` and notes what `source` acknowledged and it cannot read yet.
fn tail(shared: &Shared, history: &History, source: Site) -> Result<()> {
    let waited = reader(&shared.world, source.other()).and_then(|r| assign(&r, Offset::End).map(|_| r));
    let Ok(reader) = waited else {
        std::thread::sleep(Duration::from_millis(500));
        bail!("not reachable yet");
    };
    let mut there: HashMap<u16, u64> = HashMap::new();
    let mut next = now_ns();
    while !shared.over() {
        if let Some(Ok(m)) = reader.poll(Duration::from_millis(10))
            && let Some((writer, seq)) = parse(&m)
        {
            let max = there.entry(writer).or_default();
            *max = seq.max(*max);
        }
        let at = now_ns();
        if at >= next {
            let acked = history.acked_ids(source, at.saturating_sub(RECENT), at);
            let waiting =
                acked.iter().filter(|(w, s)| w % 100 < 90 && there.get(w).is_none_or(|max| s > max)).count();
            shared.backlog.note(Plane::Kafka, source, at, waiting);
            next = at + 50_000_000;
        }
    }
    Ok(())
}
