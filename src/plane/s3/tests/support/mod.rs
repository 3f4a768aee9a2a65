//! The two sites of a lab as the tests of this plane see them: planes, writers, and a root key for the judge.
//!
//! Tests share one pair of servers, so they run one after another and each begins with empty prefixes.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, RequestChecksumCalculation};
use aws_sdk_s3::primitives::ByteStream;
use dc_core::act::{Act, ActName, Direction, Evidence, Finding, Outcome, S3Act};
use dc_core::authority::Authority;
use dc_core::ids::{Epoch, RunId, SiteId, Token};
use dc_core::plan::Effect;
use dc_core::position::DagRelease;
use dc_core::spec::GroupSpec;
use dc_core::time::WallTime;
use dc_plane::releases::{Releases, Sealing};
use dc_plane::{Deadline, Plane, PlaneError, suite};
use dc_plane_s3::{Config, build, publisher};
use serde::Deserialize;
use tokio::sync::{Mutex, MutexGuard};

pub type Res<T> = Result<T, Box<dyn Error + Send + Sync>>;

static ONE: Mutex<()> = Mutex::const_new(());

/// One site: its plane with folders of its own, and clients of its server.
pub struct Side {
    pub site: SiteId,
    pub config: Config,
    pub plane: Arc<dyn Plane>,
    pub releases: Arc<dyn Releases>,
    pub root: Client,
    pub app: Client,
    pub dir: PathBuf,
}

/// Both sites, the founding direction, nothing below the prefixes.
pub struct Lab {
    pub rome: Side,
    pub fra: Side,
    pub spec: GroupSpec,
    pub release: Option<DagRelease>,
    pub epoch: Epoch,
    _dir: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

#[derive(Deserialize)]
struct AgentFile {
    s3: Config,
}

pub fn world() -> Res<PathBuf> {
    let root = std::env::var_os("DC_LAB_WORLD").ok_or("DC_LAB_WORLD does not name the folder of a lab")?;
    Ok(PathBuf::from(root))
}

fn client(world: &Path, endpoint: &str, user: &str) -> Res<Client> {
    let secret = std::fs::read_to_string(world.join("secrets").join(format!("s3-{user}")))?;
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(endpoint)
        .region(Region::new("us-east-1"))
        .force_path_style(true)
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .retry_config(RetryConfig::disabled())
        .credentials_provider(Credentials::new(user, secret.trim(), None, None, "test"))
        .build();
    Ok(Client::from_conf(config))
}

pub fn side(name: &str, spec: &GroupSpec, dir: &Path) -> Res<Side> {
    let world = world()?;
    let file: AgentFile = toml::from_str(&std::fs::read_to_string(world.join(name).join("agent.toml"))?)?;
    let site = SiteId::new(name)?;
    let dir = dir.join(name);
    let config = Config { releases_dir: dir.join("releases"), ..file.s3 };
    let endpoint = config.sites.get(&site).ok_or("no endpoint")?.endpoint.clone();
    Ok(Side {
        plane: build(config.clone(), spec, site.clone(), dir.join("agent"))?,
        releases: publisher(config.clone(), spec, site.clone())?,
        root: client(&world, &endpoint, "root")?,
        app: client(&world, &endpoint, "app")?,
        site,
        config,
        dir,
    })
}

pub fn spec() -> Res<GroupSpec> {
    Ok(toml::from_str(&std::fs::read_to_string(world()?.join("group.toml"))?)?)
}

const LIMIT: Duration = Duration::from_secs(30);

pub fn soon() -> Deadline {
    Deadline::within(LIMIT)
}

pub fn step(epoch: Epoch) -> Authority {
    Authority::step(RunId("01TESTRUN".into()), epoch, Token(1))
}

impl Side {
    pub async fn list(&self) -> Res<BTreeMap<String, String>> {
        let mut pages = self.root.list_objects_v2().bucket("orders").into_paginator().send();
        let mut found = BTreeMap::new();
        while let Some(page) = pages.next().await {
            for object in page?.contents() {
                let etag = object.e_tag().unwrap_or_default().to_owned();
                found.insert(object.key().unwrap_or_default().to_owned(), etag);
            }
        }
        Ok(found)
    }

    /// Log objects that are not the plane's own.
    pub async fn logs(&self) -> Res<BTreeMap<String, String>> {
        let mut found = self.list().await?;
        found.retain(|key, _| key.starts_with("logs/") && !key.starts_with("logs/.dc/"));
        Ok(found)
    }

    pub async fn put(&self, key: &str, text: impl Into<Vec<u8>>) -> Res<()> {
        let body = ByteStream::from(text.into());
        self.root.put_object().bucket("orders").key(key).body(body).send().await?;
        Ok(())
    }

    pub async fn get(&self, key: &str) -> Res<Vec<u8>> {
        let found = self.root.get_object().bucket("orders").key(key).send().await?;
        Ok(found.body.collect().await?.to_vec())
    }

    pub async fn empty(&self) -> Res<()> {
        for key in self.list().await?.into_keys() {
            self.root.delete_object().bucket("orders").key(key).send().await?;
        }
        Ok(())
    }

    /// One PUT with the writer's key: accepted or not.
    pub async fn may_write(&self, key: &str) -> bool {
        let body = ByteStream::from_static(b"x");
        self.app.put_object().bucket("orders").key(key).body(body).send().await.is_ok()
    }

    pub fn current(&self) -> Option<String> {
        let link = std::fs::read_link(self.config.releases_dir.join("current")).ok()?;
        Some(link.to_string_lossy().into_owned())
    }
}

/// A move as the engine runs it.
#[derive(Clone, Copy)]
pub struct Move<'a> {
    pub from: &'a Side,
    pub to: &'a Side,
    pub epoch: Epoch,
    pub direction: Direction,
}

impl Lab {
    pub async fn fresh() -> Res<Self> {
        let one = ONE.lock().await;
        let dir = tempfile::tempdir()?;
        let spec = spec()?;
        let (rome, fra) = (side("rome", &spec, dir.path())?, side("fra", &spec, dir.path())?);
        rome.empty().await?;
        fra.empty().await?;
        let epoch = Epoch { incarnation: 1, counter: 1 };
        let lab = Self { rome, fra, spec, release: None, epoch, _dir: dir, _one: one };
        let founding = Move { from: &lab.fra, to: &lab.rome, epoch, direction: Direction::Forward };
        lab.act(S3Act::OpenWriters, &lab.rome, founding).await?;
        lab.stand(&lab.fra, &lab.rome).await?;
        Ok(lab)
    }

    pub fn make(&self, name: S3Act, at: &Side, way: Move<'_>) -> Act {
        let upkeep = matches!(name, S3Act::Stand | S3Act::Serve | S3Act::SelfClose);
        Act {
            name: ActName::S3(name),
            site: at.site.clone(),
            group: self.spec.name.clone(),
            run: (!upkeep).then(|| RunId("01TESTRUN".into())),
            source: way.from.site.clone(),
            target: way.to.site.clone(),
            epoch: way.epoch,
            direction: way.direction,
            given: self.release.clone().map(Outcome::Release).into_iter().collect(),
        }
    }

    /// Performs an act twice: the second must end well too.
    /// An act with all that it promises; performed twice.
    pub async fn twice(&self, name: S3Act, at: &Side, way: Move<'_>) -> Res<Evidence> {
        let effect = match name {
            S3Act::FenceWriters => Effect::Fences,
            S3Act::OpenWriters => Effect::Opens,
            _ => Effect::Neither,
        };
        let act = self.make(name, at, way);
        Ok(suite::keeps(at.plane.as_ref(), &act, &step(way.epoch), effect, LIMIT).await?)
    }

    pub async fn act(&self, name: S3Act, at: &Side, way: Move<'_>) -> Result<Evidence, PlaneError> {
        let act = self.make(name, at, way);
        at.plane.perform(&act, &step(way.epoch), soon()).await
    }

    pub async fn stand(&self, at: &Side, holder: &Side) -> Result<Evidence, PlaneError> {
        let way = Move { from: holder, to: at, epoch: self.epoch, direction: Direction::Forward };
        let act = self.make(S3Act::Stand, at, way);
        at.plane.perform(&act, &Authority::self_fence(), soon()).await
    }

    /// Publishes a folder at the holder, as the quorum would have decided.
    pub async fn publish(&mut self, files: &[(&str, &str)]) -> Res<DagRelease> {
        let dir = tempfile::tempdir()?;
        for (path, text) in files {
            let at = dir.path().join(path);
            std::fs::create_dir_all(at.parent().unwrap_or(dir.path()))?;
            std::fs::write(at, text)?;
        }
        let holder = if self.epoch.counter % 2 == 1 { &self.rome } else { &self.fra };
        let staged = holder.releases.stage(dir.path(), soon()).await?;
        let serial = self.release.as_ref().map_or(1, |r| r.serial + 1);
        let release = DagRelease { serial, root: staged.root };
        let sealing = Sealing {
            release: release.clone(),
            epoch: self.epoch,
            parent: self.release.clone(),
            author: "tests".into(),
            created: WallTime(1),
        };
        holder.releases.seal(&sealing, soon()).await?;
        holder.releases.seal(&sealing, soon()).await?;
        self.release = Some(release.clone());
        Ok(release)
    }
}

pub fn findings(evidence: &Evidence) -> Vec<&Finding> {
    let mut all = Vec::new();
    for outcome in &evidence.outcomes {
        if let Outcome::Findings(found) = outcome {
            all.extend(found);
        }
    }
    all
}
