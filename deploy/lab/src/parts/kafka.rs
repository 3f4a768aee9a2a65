//! Real parts of the kafka plane: per site a KRaft broker with its authorizer on and a Connect worker that writes to
//! it, and one MirrorMaker 2 connector from rome to fra.
//!
//! The mirror reads the other site through a listener of its own that advertises the delaying link. Grants and the
//! founding mirror are made once, when the lab is founded: a later start finds them as the last move left them.
//! `DC_LAB_KAFKA_BROKERS=2` gives rome a second broker, for tests of the plane that need two leaders.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tokio::process::Command;

use crate::process;
use crate::world::{DATA_SITES, FRA, ROME, Site, World, port};

mod admin;

use admin::{Admin, Grant, May, On};

const KAFKA: &str = "4.3.1";
const LOG4J: &str = "2.25.3";
const POM: &str = include_str!("../../parts-data/kafka/pom.xml");
const PINS: &str = include_str!("../../parts-data/kafka/libs.sha256");
const SERVER: &str = include_str!("../../parts-data/kafka/server.properties");
const WORKER: &str = include_str!("../../parts-data/kafka/worker.properties");
const LOGGING: &str = include_str!("../../parts-data/kafka/log4j2.properties");
/// Small heaps, one collector thread, no optimising compiler: four JVMs start together on two cores.
const JVM: [&str; 4] = ["-Xmx320m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"];

const TOPICS: [&str; 2] = ["orders", "payments"];
const GROUPS: [&str; 2] = ["billing", "audit"];
const CANARY: &str = "dc-canary";
const MIRROR: &str = "orders-rome-fra-0";
/// Principals with a password, `broker` and `admin` being super users.
const USERS: [&str; 8] = ["broker", "admin", "dcagent", "dccanary", "dcmirror", "dcconnect", "app", "dclab"];
const READY_WITHIN: Duration = Duration::from_secs(90);

fn home(world: &World) -> PathBuf {
    world.parts_dir.join(format!("kafka-{KAFKA}"))
}

fn password(world: &World, user: &str) -> Result<String> {
    world.secret(&format!("kafka-{user}"))
}

fn canary_topic() -> String {
    format!("{CANARY}-{}", super::GROUP)
}

/// Brokers of a site: two only where a test of the plane asks for it.
fn brokers(site: Site) -> u16 {
    let two = std::env::var("DC_LAB_KAFKA_BROKERS").is_ok_and(|n| n == "2");
    if two && site == ROME { 2 } else { 1 }
}

/// Installs Java and Maven where they are missing, and the pinned jars. Repeat: safe.
pub async fn install(world: &World) -> Result<()> {
    let home = home(world);
    let pins = home.join("libs.sha256");
    need("java", "openjdk-17-jre-headless").await?;
    if std::fs::read_to_string(&pins).is_ok_and(|stood| stood == PINS) {
        return Ok(());
    }
    need("mvn", "maven").await?;
    eprintln!("  kafka {KAFKA}: fetching {} jars", PINS.lines().count());
    let fresh = world.parts_dir.join(format!("kafka-{KAFKA}.{}", std::process::id()));
    world.mkdir(&fresh)?;
    world.write(&fresh.join("pom.xml"), POM, 0o644)?;
    let mut fetch = Command::new("mvn");
    fetch.args(["-B", "-q", "-f"]).arg(fresh.join("pom.xml"));
    fetch.arg(format!("-Dmaven.repo.local={}", fresh.join("m2").display()));
    fetch.args(["dependency:copy-dependencies", "-DincludeScope=runtime"]);
    fetch.arg(format!("-DoutputDirectory={}", fresh.join("libs").display()));
    process::run(&mut fetch, Duration::from_mins(10)).await.context("fetch the jars")?;
    world.write(&fresh.join("libs.sha256"), PINS, 0o644)?;
    let mut check = Command::new("sha256sum");
    check.args(["-c", "--strict", "--quiet", "../libs.sha256"]).current_dir(fresh.join("libs"));
    process::run(&mut check, Duration::from_mins(1)).await.context("check the jars against their pins")?;
    let found = std::fs::read_dir(fresh.join("libs"))?.count();
    ensure!(found == PINS.lines().count(), "{found} jars came, {} are pinned", PINS.lines().count());
    std::fs::remove_dir_all(fresh.join("m2"))?;
    match std::fs::rename(&fresh, &home) {
        Err(_) if pins.exists() => {
            std::fs::remove_dir_all(&fresh).context("remove a second copy of the jars")
        }
        done => done.with_context(|| format!("put the jars into {}", home.display())),
    }
}

/// Makes sure that a program is there, by Debian's package where it is not.
async fn need(program: &str, package: &str) -> Result<()> {
    if std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|d| d.join(program).is_file())
    {
        return Ok(());
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "{program} is missing; install it with: sudo apt-get install {package}"
    );
    eprintln!("  installing Debian package {package}");
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "--no-install-recommends", package]).env("DEBIAN_FRONTEND", "noninteractive");
    process::run(&mut apt, Duration::from_mins(10)).await.map(|_| ())
}

/// Starts brokers and workers of both sites side by side; makes grants and the mirror when the lab is founded.
pub async fn start(world: &World) -> Result<()> {
    let mirror = password(world, "dcmirror")?;
    // Workers read it by path: no password stands in a connector's configuration.
    world.write(&mirror_file(world), &format!("password={mirror}\n"), 0o600)?;
    world.write(&world.root.join("kafka/log4j2.properties"), LOGGING, 0o644)?;
    world.write(&hosts_file(world), &hosts(world), 0o644)?;
    let (rome, fra) = tokio::join!(start_site(world, ROME), start_site(world, FRA));
    rome.context("rome")?;
    fra.context("fra")?;
    let founded = world.root.join("kafka/founded");
    if !founded.exists() {
        found(world).await?;
        world.write(&founded, "", 0o644)?;
    }
    Ok(())
}

async fn start_site(world: &World, site: Site) -> Result<()> {
    let begun = Instant::now();
    for node in 1..=brokers(site) {
        start_broker(world, site, node).await?;
    }
    let mut admin = ready(world, site).await?;
    let dir = world.dir(&site).join("kafka");
    if !dir.join("granted").exists() {
        // Twice as many partitions as brokers: the canary needs a leader on each.
        let partitions = i32::from(brokers(ROME)) * 2;
        admin.topic(&canary_topic(), partitions, &[("retention.ms", "3600000")]).await?;
        for topic in TOPICS {
            admin.topic(topic, 3, &[]).await?;
        }
        admin.grant(&standing_grants()).await?;
        admin.grant(&if site == ROME { holder_grants() } else { standby_grants() }).await?;
        world.write(&dir.join("granted"), "", 0o644)?;
    }
    eprintln!("  {site}: broker answers ({:.1} s)", begun.elapsed().as_secs_f64());
    start_worker(world, site)?;
    wait_worker(world, site).await?;
    eprintln!("  {site}: worker answers ({:.1} s)", begun.elapsed().as_secs_f64());
    Ok(())
}

fn fill(template: &str, words: &[(&str, String)]) -> String {
    let mut text = template.to_owned();
    for (word, value) in words {
        text = text.replace(&format!("@{word}@"), value);
    }
    text
}

fn jaas(user: &str, password: &str, rest: &str) -> String {
    format!(
        "org.apache.kafka.common.security.plain.PlainLoginModule required username=\"{user}\" \
         password=\"{password}\"{rest};"
    )
}

fn hosts_file(world: &World) -> PathBuf {
    world.root.join("kafka/hosts")
}

/// Names of this machine and of the sites, the only ones that the parts know.
///
/// A broker asks for the name of its own address at every log-in, in the thread that serves connections: an answer
/// that a resolver loses costs five seconds of everybody's time.
fn hosts(world: &World) -> String {
    let name = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let mut text = format!("127.0.0.1 localhost {}\n", name.trim());
    for site in DATA_SITES {
        let link = world.link_ip(&site.other(), &site);
        let _ = write!(text, "{} {site}\n{link} to-{site}\n", world.ip(&site));
    }
    text
}

/// Java with the pinned jars; the main class and its arguments follow.
fn java(world: &World) -> Command {
    let mut cmd = Command::new("java");
    cmd.args(JVM);
    let logging = world.root.join("kafka/log4j2.properties");
    cmd.arg(format!("-Dlog4j2.configurationFile=file:{}", logging.display()));
    cmd.arg(format!("-Djdk.net.hosts.file={}", hosts_file(world).display()));
    cmd.arg("-cp").arg(format!("{}/libs/*", home(world).display()));
    cmd
}

async fn start_broker(world: &World, site: Site, node: u16) -> Result<()> {
    let ip = world.ip(&site);
    let (client, mirror) = if node == 1 {
        (port::KAFKA, port::KAFKA_MIRROR)
    } else {
        (port::KAFKA_SECOND, port::KAFKA_SECOND_MIRROR)
    };
    let (link, link_port) = world.link(&site.other(), &site, mirror);
    let mut listeners = format!("CLIENT://{ip}:{client},MIRROR://{ip}:{mirror}");
    if node == 1 {
        let _ = write!(listeners, ",CONTROLLER://{ip}:{}", port::KAFKA_CONTROLLER);
    }
    let mut users = String::new();
    for user in USERS {
        let _ = write!(users, " user_{user}=\"{}\"", password(world, user)?);
    }
    let dir = world.dir(&site).join(format!("kafka/broker-{node}"));
    world.mkdir(&dir)?;
    let words = [
        ("ROLES", if node == 1 { "broker,controller" } else { "broker" }.to_owned()),
        ("NODE", node.to_string()),
        ("IP", ip),
        ("CONTROLLER_PORT", port::KAFKA_CONTROLLER.to_string()),
        ("CLIENT_PORT", client.to_string()),
        ("LISTENERS", listeners),
        ("MIRROR_ADVERTISED", format!("{link}:{link_port}")),
        ("JAAS", jaas("broker", &password(world, "broker")?, &users)),
        ("DATA", dir.join("data").display().to_string()),
    ];
    let config = dir.join("server.properties");
    world.write(&config, &fill(SERVER, &words), 0o600)?;
    if !dir.join("data/meta.properties").exists() {
        let mut format = java(world);
        format
            .args(["kafka.tools.StorageTool", "format", "-t", &cluster_id(world, site)?, "-c"])
            .arg(&config);
        world.run(&mut format).await.context("format the broker's storage")?;
    }
    world.spawn(&format!("{site}.kafka-{node}"), java(world).arg("kafka.Kafka").arg(&config))?;
    Ok(())
}

/// 16 random bytes in Kafka's spelling, made once per site.
fn cluster_id(world: &World, site: Site) -> Result<String> {
    // 22 of base64's letters are 16 bytes when the last letter ends in four zero bits, as `A` does.
    let random = world.secret(&format!("kafka-cluster-{site}"))?;
    Ok(format!("{}A", random.get(..21).context("a secret has 32 digits")?))
}

/// Waits until every broker of the site has joined, and logs in as its super user.
async fn ready(world: &World, site: Site) -> Result<Admin> {
    let address = format!("{}:{}", world.ip(&site), port::KAFKA);
    let password = password(world, "admin")?;
    let wanted = usize::from(brokers(site));
    let begun = Instant::now();
    loop {
        let problem = match Admin::connect(&address, "admin", &password).await {
            Ok(mut admin) => match admin.brokers().await {
                Ok(seen) if seen >= wanted => return Ok(admin),
                Ok(seen) => format!("{seen} of {wanted} brokers have joined"),
                Err(e) => format!("{e:#}"),
            },
            Err(e) => format!("{e:#}"),
        };
        for node in 1..=brokers(site) {
            died(world, &format!("{site}.kafka-{node}"))?;
        }
        ensure!(begun.elapsed() < READY_WITHIN, "no broker at {address} after {READY_WITHIN:?}: {problem}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn died(world: &World, name: &str) -> Result<()> {
    if world.alive(name) {
        return Ok(());
    }
    let log = world.log(name);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    bail!("{name} ended; {} says:\n{}", log.display(), process::last_lines(&text, 12))
}

fn mirror_file(world: &World) -> PathBuf {
    world.root.join("kafka/secrets/mirror.properties")
}

fn start_worker(world: &World, site: Site) -> Result<()> {
    let words = [
        ("IP", world.ip(&site)),
        ("CLIENT_PORT", port::KAFKA.to_string()),
        ("REST_PORT", port::CONNECT.to_string()),
        ("SITE", site.name.to_owned()),
        ("SECRETS", world.root.join("kafka/secrets").display().to_string()),
        ("JAAS", jaas("dcconnect", &password(world, "dcconnect")?, "")),
    ];
    let config = world.dir(&site).join("kafka/worker.properties");
    world.write(&config, &fill(WORKER, &words), 0o600)?;
    let main = "org.apache.kafka.connect.cli.ConnectDistributed";
    world.spawn(&format!("{site}.connect"), java(world).arg(main).arg(&config))?;
    Ok(())
}

fn rest(world: &World, site: Site) -> String {
    format!("http://{}:{}", world.ip(&site), port::CONNECT)
}

async fn wait_worker(world: &World, site: Site) -> Result<()> {
    let url = format!("{}/connectors", rest(world, site));
    let begun = Instant::now();
    loop {
        let asked = reqwest::Client::new().get(&url).timeout(Duration::from_secs(5)).send().await;
        if asked.is_ok_and(|answer| answer.status().is_success()) {
            return Ok(());
        }
        died(world, &format!("{site}.connect"))?;
        ensure!(begun.elapsed() < READY_WITHIN, "no worker at {url} after {READY_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn on(who: &'static str, on: On, name: &str, may: &'static [May]) -> Grant {
    Grant { who, on, name: name.to_owned(), may }
}

/// What stands at both sites at all times.
fn standing_grants() -> Vec<Grant> {
    const CLUSTER: &str = "kafka-cluster";
    let canary = canary_topic();
    let mut grants = vec![
        on("dcagent", On::Cluster, CLUSTER, &[May::Alter, May::DescribeConfigs]),
        on("dcagent", On::Topic, "*", &[May::Describe]),
        on("dcagent", On::Topic, &canary, &[May::Read, May::DescribeConfigs]),
        on("dcagent", On::Topic, "connect-offsets", &[May::Read]),
        on("dclab", On::Topic, "*", &[May::Read]),
        on("dclab", On::Group, "*", &[May::Read]),
        on("app", On::Cluster, CLUSTER, &[May::IdempotentWrite]),
        on("app", On::TransactionalId, "app*", &[May::Write, May::Describe]),
        on("dcmirror", On::Topic, "*", &[May::Read, May::DescribeConfigs]),
        on("dcmirror", On::Cluster, CLUSTER, &[May::Describe, May::Create, May::DescribeConfigs]),
        on("dcmirror", On::Group, "*", &[May::Read]),
        on("dcmirror", On::Topic, "mm2-*", &[May::Write, May::Create]),
        on("dcmirror", On::Topic, "connect-*", &[May::Write]),
        on("dcmirror", On::TransactionalId, "connect-*", &[May::Write, May::Describe]),
        on("dcconnect", On::Topic, "connect-*", &[May::All]),
        on("dcconnect", On::Group, "connect-*", &[May::All]),
        on("dcconnect", On::TransactionalId, "connect-*", &[May::All]),
        on("dcconnect", On::Cluster, CLUSTER, &[May::Describe, May::Create]),
    ];
    for topic in TOPICS {
        grants.push(on("dcagent", On::Topic, topic, &[May::Read, May::DescribeConfigs]));
        grants.push(on("app", On::Topic, topic, &[May::Describe]));
    }
    for group in GROUPS {
        grants.push(on("dcagent", On::Group, group, &[May::Read]));
        grants.push(on("app", On::Group, group, &[May::Describe]));
    }
    grants
}

/// What the holder has: applications write and read.
fn holder_grants() -> Vec<Grant> {
    let mut grants = vec![on("dccanary", On::Topic, &canary_topic(), &[May::Write])];
    grants.extend(TOPICS.map(|topic| on("app", On::Topic, topic, &[May::Write, May::Read])));
    grants.extend(GROUPS.map(|group| on("app", On::Group, group, &[May::Read])));
    grants
}

/// What the standby has: the mirror writes.
fn standby_grants() -> Vec<Grant> {
    let mut grants = vec![on("dcmirror", On::Topic, &canary_topic(), &[May::Write])];
    grants.extend(TOPICS.map(|topic| on("dcmirror", On::Topic, topic, &[May::Write])));
    grants
}

/// Creates the founding mirror, rome to fra, and waits until its task runs.
async fn found(world: &World) -> Result<()> {
    let begun = Instant::now();
    let (rome, rome_port) = world.link(&FRA, &ROME, port::KAFKA_MIRROR);
    let login = jaas("dcmirror", &format!("${{file:{}:password}}", mirror_file(world).display()), "");
    let mut config = json!({
        "connector.class": "org.apache.kafka.connect.mirror.MirrorSourceConnector",
        "tasks.max": "1",
        "source.cluster.alias": "rome",
        "target.cluster.alias": "fra",
        "source.cluster.bootstrap.servers": format!("{rome}:{rome_port}"),
        "target.cluster.bootstrap.servers": format!("{}:{}", world.ip(&FRA), port::KAFKA),
        "topics": format!("{},{}", TOPICS.join(","), canary_topic()),
        "replication.policy.class": "org.apache.kafka.connect.mirror.IdentityReplicationPolicy",
        "replication.factor": "1",
        "exactly.once.support": "required",
        "source.consumer.isolation.level": "read_committed",
        "consumer.poll.timeout.ms": "100",
        "producer.override.transaction.timeout.ms": "5000",
        "sync.topic.acls.enabled": "false",
        "sync.topic.configs.enabled": "false",
        "emit.offset-syncs.enabled": "false",
        "heartbeats.replication.enabled": "false",
        "refresh.topics.interval.seconds": "60",
    });
    for kind in ["key", "value", "header"] {
        let class = "org.apache.kafka.connect.converters.ByteArrayConverter";
        config[format!("{kind}.converter")] = class.into();
    }
    for prefix in
        ["source.cluster", "target.cluster", "producer.override", "consumer.override", "admin.override"]
    {
        config[format!("{prefix}.security.protocol")] = "SASL_PLAINTEXT".into();
        config[format!("{prefix}.sasl.mechanism")] = "PLAIN".into();
        config[format!("{prefix}.sasl.jaas.config")] = login.clone().into();
    }
    let base = format!("{}/connectors", rest(world, FRA));
    let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build()?;
    let ask = client.post(&base).json(&json!({ "name": MIRROR, "config": config }));
    let answer = ask.send().await?;
    let status = answer.status();
    if !status.is_success() && status != reqwest::StatusCode::CONFLICT {
        bail!("connector {MIRROR} was refused with {status}: {}", answer.text().await?);
    }
    loop {
        let answer = client.get(format!("{base}/{MIRROR}/status")).send().await?;
        let status: serde_json::Value = answer.json().await?;
        let tasks = status["tasks"].as_array().map_or(&[] as &[_], Vec::as_slice);
        if !tasks.is_empty() && tasks.iter().all(|task| task["state"] == "RUNNING") {
            eprintln!("  mirror {MIRROR} runs ({:.1} s)", begun.elapsed().as_secs_f64());
            return Ok(());
        }
        ensure!(begun.elapsed() < READY_WITHIN, "the task of {MIRROR} does not run: {status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Tells the founding mirror at a site's worker to `stop` or to `resume`, as an operator would.
pub async fn mirror(world: &World, site: Site, order: &str) -> Result<()> {
    let url = format!("{}/connectors/{MIRROR}/{order}", rest(world, site));
    let answer = reqwest::Client::new().put(url).timeout(Duration::from_secs(30)).send().await?;
    ensure!(answer.status().is_success(), "{order} of {MIRROR} was refused with {}", answer.status());
    Ok(())
}

/// Stops workers, then brokers, the sites side by side. Repeat: safe.
pub async fn stop(world: &World) -> Result<()> {
    let each = DATA_SITES.map(|site| async move {
        let grace = Duration::from_secs(15);
        world.stop(&format!("{site}.connect"), grace).await?;
        for node in [2, 1] {
            world.stop(&format!("{site}.kafka-{node}"), grace).await?;
        }
        anyhow::Ok(())
    });
    futures::future::join_all(each).await.into_iter().collect()
}

/// The section of agent.toml.
pub fn agent_toml(world: &World, _site: &Site) -> String {
    let secret = |user: &str| world.secret_path(&format!("kafka-{user}")).display().to_string();
    let mut text = format!(
        "[kafka]\nuser = \"dcagent\"\npassword_file = \"{}\"\ncanary_user = \"dccanary\"\n\
         canary_password_file = \"{}\"\nmirror_user = \"dcmirror\"\ncanary_topic = \"{CANARY}\"\n",
        secret("dcagent"),
        secret("dccanary"),
    );
    for site in DATA_SITES {
        let (link, link_port) = world.link(&site.other(), &site, port::KAFKA_MIRROR);
        let _ = write!(
            text,
            "[kafka.sites.{site}]\nbootstrap = \"{}:{}\"\nconnect = \"{}\"\nmirror_bootstrap = \"{link}:{link_port}\"\n",
            world.ip(&site),
            port::KAFKA,
            rest(world, site),
        );
    }
    text
}

/// The section of group.toml.
pub fn group_toml(_world: &World) -> String {
    format!(
        "[kafka]\ntopics = {TOPICS:?}\nproducers = [\"app\"]\nconsumers = [\"app\"]\ngroups = {GROUPS:?}\n\
         mirror = \"{MIRROR}\"\n"
    )
}

/// Versions of the parts.
pub fn versions(_world: &World) -> BTreeMap<String, String> {
    [("kafka", KAFKA), ("connect", KAFKA), ("mirrormaker", KAFKA), ("log4j", LOG4J)]
        .map(|(part, version)| (part.to_owned(), version.to_owned()))
        .into()
}
