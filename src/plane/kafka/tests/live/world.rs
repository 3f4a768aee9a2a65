//! The world as a test sees it: both planes, the given of a run, and hands that no product has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dc_core::act::{Act, ActName, Change, Direction, Evidence, Finding, KafkaAct, Outcome, Progress};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, RunId, SiteId, Token};
use dc_core::plan::Effect;
use dc_core::position::{Ends, Grant};
use dc_core::spec::GroupSpec;
use dc_plane::{Deadline, Depth, Plane, PlaneError, Role, suite};
use dc_plane_kafka::{Config, build, hands};

use crate::clients::{Acked, Tp, read};

/// Tests share one world: one at a time.
pub async fn alone() -> tokio::sync::MutexGuard<'static, ()> {
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ONE.lock().await
}

pub fn within(seconds: u64) -> Deadline {
    Deadline::within(Duration::from_secs(seconds))
}
pub fn soon() -> Deadline {
    within(60)
}

pub struct World {
    pub root: PathBuf,
    pub spec: GroupSpec,
    configs: BTreeMap<SiteId, Config>,
    planes: BTreeMap<SiteId, Arc<dyn Plane>>,
    pub source: SiteId,
    pub target: SiteId,
    pub direction: Direction,
    pub given: Vec<Outcome>,
    mirror: String,
    run: u32,
    stamp: u128,
    steps: Vec<(KafkaAct, u128, String)>,
}

fn site(name: &str) -> SiteId {
    SiteId::new(name).unwrap()
}

fn section(root: &std::path::Path, site: &SiteId) -> Config {
    let text = std::fs::read_to_string(root.join(site.as_str()).join("agent.toml")).unwrap();
    let all: toml::Table = toml::from_str(&text).unwrap();
    all["kafka"].clone().try_into().unwrap()
}

impl World {
    pub async fn open() -> World {
        let root = PathBuf::from(std::env::var_os("DC_LAB_WORLD").expect("DC_LAB_WORLD names no world"));
        let group = std::fs::read_to_string(root.join("group.toml")).unwrap();
        let spec: GroupSpec = toml::from_str(&group).unwrap();
        let configs: BTreeMap<_, _> =
            ["rome", "fra"].map(site).into_iter().map(|s| (s.clone(), section(&root, &s))).collect();
        let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
        let mut world = World {
            root,
            spec,
            configs,
            planes: BTreeMap::new(),
            source: site("rome"),
            target: site("fra"),
            direction: Direction::Forward,
            given: Vec::new(),
            mirror: String::new(),
            run: 0,
            stamp,
            steps: Vec::new(),
        };
        world.restart();
        let facts = world.plane(&world.source).observe(Depth::Deep, soon()).await.unwrap();
        if facts.role != Some(Role::Writable) {
            std::mem::swap(&mut world.source, &mut world.target);
        }
        let holder = world.plane(&world.source).observe(Depth::Deep, soon()).await.unwrap();
        assert_eq!(holder.role, Some(Role::Writable), "no site holds the group: make a fresh world");
        let mirrors = world.connectors(&world.target).await;
        assert_eq!(mirrors.len(), 1, "one mirror at the standby: {mirrors:?}");
        world.mirror.clone_from(&mirrors[0]);
        world
    }

    /// New planes, as after a restart of the agents.
    pub fn restart(&mut self) {
        for (site, config) in &self.configs {
            let dir = self.root.join("live").join(site.as_str());
            let plane = build(config.clone(), &self.spec, site.clone(), dir).unwrap();
            self.planes.insert(site.clone(), plane);
        }
    }

    pub fn plane(&self, site: &SiteId) -> Arc<dyn Plane> {
        Arc::clone(&self.planes[site])
    }

    pub fn bootstrap(&self, site: &SiteId) -> &str {
        &self.configs[site].sites[site].bootstrap
    }

    pub fn secret(&self, user: &str) -> String {
        std::fs::read_to_string(self.root.join("secrets").join(format!("kafka-{user}")))
            .unwrap()
            .trim()
            .into()
    }

    pub fn break_address(&mut self, broken: &SiteId) {
        for config in self.configs.values_mut() {
            let of = config.sites.get_mut(broken).unwrap();
            of.bootstrap = of.bootstrap.replace(":19092", ":1");
        }
        self.restart();
    }

    fn run_id(&self) -> RunId {
        RunId(format!("{}x{}", self.stamp, self.run))
    }

    pub fn act(&self, name: KafkaAct, site: &SiteId) -> Act {
        let mut given = vec![Outcome::Mirror(self.mirror.clone())];
        given.extend(self.given.iter().cloned());
        Act {
            name: ActName::Kafka(name),
            site: site.clone(),
            group: self.spec.name.clone(),
            run: Some(self.run_id()),
            source: self.source.clone(),
            target: self.target.clone(),
            epoch: Epoch { incarnation: 1, counter: u64::from(self.run) + 1 },
            direction: self.direction,
            given,
        }
    }

    fn by(&self) -> Authority {
        Authority::step(self.run_id(), Epoch::default(), Token(1))
    }

    pub async fn try_within(
        &self,
        name: KafkaAct,
        site: &SiteId,
        span: Duration,
    ) -> Result<Evidence, PlaneError> {
        self.plane(site).perform(&self.act(name, site), &self.by(), Deadline::within(span)).await
    }

    pub async fn go(&mut self, name: KafkaAct, site: &SiteId) -> Evidence {
        let began = Instant::now();
        let done = self.try_within(name, site, Duration::from_mins(1)).await;
        let done = done.unwrap_or_else(|e| panic!("{name:?} at {site}: {e}"));
        self.steps.push((name, began.elapsed().as_millis(), done.seen.clone()));
        self.given.extend(done.outcomes.iter().filter(|o| !matches!(o, Outcome::Findings(_))).cloned());
        done
    }

    /// Performs; if `twice`, with all that the act promises, and then once more by a new driver, which finds it done.
    pub async fn go_twice(&mut self, name: KafkaAct, site: &SiteId, twice: bool) {
        if !twice {
            self.go(name, site).await;
            return;
        }
        let effect = match name {
            KafkaAct::FenceApps | KafkaAct::FenceMirror => Effect::Fences,
            KafkaAct::GrantApps => Effect::Opens,
            _ => Effect::Neither,
        };
        let (plane, act) = (self.plane(site), self.act(name, site));
        let kept = suite::keeps(plane.as_ref(), &act, &self.by(), effect, Duration::from_mins(1)).await;
        kept.unwrap_or_else(|broken| panic!("{broken}"));
        self.go(name, site).await;
        self.restart();
        let probed = self.plane(site).probe(&self.act(name, site), soon()).await;
        assert!(matches!(probed, Ok(Progress::Done(_))), "{name:?} probed: {probed:?}");
        let again = self.go(name, site).await;
        assert_eq!(again.change, Change::Already, "{name:?}: {again:?}");
    }

    pub async fn undo(&mut self, name: KafkaAct, site: &SiteId) -> Evidence {
        let done = self.plane(site).undo(&self.act(name, site), &self.by(), soon()).await;
        done.unwrap_or_else(|e| panic!("undo {name:?} at {site}: {e}"))
    }

    /// The code by which an act, or its undo, is refused.
    pub async fn refused(&self, name: KafkaAct, by: Authority, undo: bool) -> String {
        let site = if name == KafkaAct::FenceMirror { &self.target } else { &self.source };
        let act = self.act(name, site);
        let done = if undo {
            self.plane(site).undo(&act, &by, soon()).await
        } else {
            self.plane(site).perform(&act, &by, soon()).await
        };
        match done {
            Err(PlaneError::Refused { code, .. }) => code,
            other => panic!("{name:?} was not refused: {other:?}"),
        }
    }

    pub fn print_steps(&mut self) {
        for (name, ms, seen) in self.steps.drain(..) {
            println!("  {:>5} ms {:<16} {seen}", ms, name.word());
        }
    }

    /// The run is done: source and target change places.
    pub fn next_run(&mut self) {
        let mirrors = self.given.iter().rev().find_map(|o| match o {
            Outcome::Mirror(name) => Some(name.clone()),
            _ => None,
        });
        self.mirror = mirrors.unwrap();
        std::mem::swap(&mut self.source, &mut self.target);
        self.next_attempt();
    }

    pub fn next_attempt(&mut self) {
        self.print_steps();
        self.given.clear();
        self.direction = Direction::Forward;
        self.run += 1;
    }

    pub fn given_ends(&self, source: bool) -> Ends {
        let act = self.act(KafkaAct::Verify, &self.target);
        let found = if source { act.source_ends() } else { act.target_ends() };
        found.unwrap().clone()
    }

    pub async fn connectors(&self, site: &SiteId) -> Vec<String> {
        let base = &self.configs[site].sites[site].connect;
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        client.get(format!("{base}/connectors")).send().await.unwrap().json().await.unwrap()
    }

    pub async fn until_mirror_failed(&self, site: &SiteId) {
        let base = &self.configs[site].sites[site].connect;
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let began = Instant::now();
        loop {
            let url = format!("{base}/connectors/{}/status", self.mirror);
            let text = client.get(url).send().await.unwrap().text().await.unwrap();
            if text.contains("FAILED") {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "the task never failed: {text}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub fn topic_grant(principal: &str, topic: &str, operation: &str) -> Grant {
        Grant {
            principal: principal.into(),
            resource: "topic".into(),
            name: topic.into(),
            prefixed: false,
            operation: operation.into(),
            host: "*".into(),
        }
    }

    pub async fn grant(&self, site: &SiteId, grant: &Grant, give: bool) {
        let password = self.secret("admin");
        let login = ("admin", password.as_str());
        hands::change(site, self.bootstrap(site), login, std::slice::from_ref(grant), give, soon())
            .await
            .unwrap();
    }

    pub async fn recorded(&self, site: &SiteId) -> Vec<Grant> {
        let mut act = self.act(KafkaAct::RecordGrants, site);
        act.given.clear();
        let found = self.plane(site).perform(&act, &self.by(), soon()).await.unwrap();
        found
            .outcomes
            .into_iter()
            .find_map(|o| match o {
                Outcome::Grants(grants) => Some(grants),
                _ => None,
            })
            .unwrap()
    }

    /// Moves the group to that site if it is not there.
    pub async fn hold_at(&mut self, name: &str) {
        if self.source.as_str() != name {
            crate::over(self, false).await;
            crate::turn(self, false).await;
            self.next_run();
        }
    }

    /// Stops a process of the lab for as long as the answer lives.
    pub fn freeze(&self, process: &str) -> Frozen {
        let path = self.root.join("run").join(format!("{process}.json"));
        let text = std::fs::read_to_string(&path).expect("a lab with two brokers at rome");
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        let frozen = Frozen(record["pid"].as_u64().unwrap().to_string());
        frozen.signal("-STOP");
        frozen
    }

    /// Every acknowledged record once at each site, and the same records in the same order at both.
    pub async fn same_records_at_both_sites(&self, acked: &Acked) {
        let began = Instant::now();
        loop {
            let mut sums = (0, 0);
            let mut same = true;
            for (tp, values) in acked {
                let here = self.values(&self.source, tp).await;
                let there = self.values(&self.target, tp).await;
                same &= here == there;
                sums = (sums.0 + here.len(), sums.1 + values.len());
                if !same {
                    continue;
                }
                let distinct: BTreeSet<&String> = here.iter().collect();
                assert_eq!(distinct.len(), here.len(), "{tp:?} holds a record twice");
                let lost: Vec<_> = values.iter().filter(|v| !distinct.contains(v)).collect();
                assert!(lost.is_empty(), "{tp:?} lost {lost:?}");
            }
            if same {
                println!("  {} records acknowledged, {} at each site: 0 lost, 0 twice", sums.1, sums.0);
                return;
            }
            assert!(began.elapsed() < Duration::from_mins(1), "the sites stay different");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn values(&self, site: &SiteId, tp: &Tp) -> Vec<String> {
        read(self, site, tp, 0, i64::MAX).await.into_iter().map(|r| r.value).collect()
    }
}

pub struct Frozen(String);

impl Frozen {
    fn signal(&self, signal: &str) {
        assert!(std::process::Command::new("kill").args([signal, &self.0]).status().unwrap().success());
    }
}
impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

pub fn blocking(evidence: &Evidence) -> Vec<&Finding> {
    evidence.blocking().collect()
}

pub fn codes(evidence: &Evidence) -> BTreeSet<String> {
    evidence
        .outcomes
        .iter()
        .flat_map(|o| match o {
            Outcome::Findings(all) => all.as_slice(),
            _ => &[],
        })
        .map(|f| f.code.clone())
        .collect()
}
