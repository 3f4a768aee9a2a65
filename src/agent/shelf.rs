//! The planes of this site: built from config and spec, read every second, kept by group.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dc_core::ids::{GroupName, PlaneKind, SiteId};
use dc_core::observe::PlaneFacts;
use dc_core::registry::Registry;
use dc_core::spec::GroupSpec;
use dc_plane::releases::Releases;
use dc_plane::{Deadline, Depth, Plane};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{info, warn};

/// Makes the drivers of a site; the roof knows which there are.
pub trait Drivers: Send + Sync {
    /// The planes that this site has for a group.
    ///
    /// Errors: everything that config and spec alone can tell, in words.
    fn planes(&self, spec: &GroupSpec, data_dir: &Path) -> Result<Vec<Arc<dyn Plane>>, String>;

    /// Where the group's DAG releases are published; none without an S3 plane here.
    ///
    /// Errors: as `planes`.
    fn releases(&self, spec: &GroupSpec) -> Result<Option<Arc<dyn Releases>>, String>;
}

/// A reading and when it was taken, by this host's clock.
#[derive(Debug, Clone)]
pub struct Reading {
    /// What was seen.
    pub facts: PlaneFacts,
    /// When, so that an age can be told.
    pub at: Instant,
}

/// A reading as it travels: ages cross machines, clock readings do not.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    /// Of which group.
    pub group: GroupName,
    /// What was seen.
    pub facts: PlaneFacts,
    /// How old it was when it was sent.
    pub age_ms: u64,
}

struct Loaded {
    version: u64,
    planes: BTreeMap<PlaneKind, Arc<dyn Plane>>,
    releases: Option<Arc<dyn Releases>>,
    problem: Option<String>,
}

type Key = (SiteId, GroupName, PlaneKind);

/// The planes of this site and the newest reading of every site's.
pub struct Shelf {
    me: SiteId,
    data_dir: std::path::PathBuf,
    drivers: Arc<dyn Drivers>,
    groups: Mutex<BTreeMap<GroupName, Loaded>>,
    readings: Mutex<BTreeMap<Key, Reading>>,
}

impl Shelf {
    /// Starts empty.
    pub fn new(me: SiteId, data_dir: &Path, drivers: Arc<dyn Drivers>) -> Self {
        Self {
            me,
            data_dir: data_dir.to_owned(),
            drivers,
            groups: Mutex::new(BTreeMap::new()),
            readings: Mutex::new(BTreeMap::new()),
        }
    }

    /// Builds what the applied state asks for here. Returns the planes that are new.
    pub fn refresh(&self, registry: &Registry) -> Vec<(GroupName, PlaneKind)> {
        let mut fresh = Vec::new();
        let mut groups = self.groups.lock();
        for (name, group) in &registry.groups {
            let here = group.spec.sites.contains(&self.me);
            if !here || groups.get(name).is_some_and(|known| known.version == group.spec_version) {
                continue;
            }
            let loaded = self.load(&group.spec, group.spec_version);
            fresh.extend(loaded.planes.keys().map(|plane| (name.clone(), *plane)));
            groups.insert(name.clone(), loaded);
        }
        fresh
    }

    fn load(&self, spec: &GroupSpec, version: u64) -> Loaded {
        let folder = self.data_dir.join("groups").join(spec.name.as_str());
        let made = std::fs::create_dir_all(&folder).map_err(|e| format!("create {}: {e}", folder.display()));
        let built = made.and_then(|()| self.drivers.planes(spec, &folder));
        let releases = self.drivers.releases(spec);
        let problem = built.as_ref().err().or(releases.as_ref().err()).cloned();
        if let Some(why) = &problem {
            warn!(group = %spec.name, why, "planes not built");
        } else {
            info!(group = %spec.name, version, "planes built");
        }
        let planes = built.unwrap_or_default().into_iter().map(|p| (p.kind(), p)).collect();
        Loaded { version, planes, releases: releases.ok().flatten(), problem }
    }

    /// One plane of a group.
    ///
    /// Errors: why this site has none, in words.
    pub fn plane(&self, group: &GroupName, kind: PlaneKind) -> Result<Arc<dyn Plane>, String> {
        let groups = self.groups.lock();
        let loaded = groups.get(group).ok_or_else(|| format!("{} has no planes of {group}", self.me))?;
        if let Some(plane) = loaded.planes.get(&kind) {
            return Ok(plane.clone());
        }
        Err(loaded
            .problem
            .clone()
            .unwrap_or_else(|| format!("no [{kind}] section in the config of {}", self.me)))
    }

    /// Where a group's releases are published.
    pub fn releases(&self, group: &GroupName) -> Option<Arc<dyn Releases>> {
        self.groups.lock().get(group).and_then(|loaded| loaded.releases.clone())
    }

    /// Reads one plane and keeps what was seen; a plane that cannot be read keeps its old reading, which ages.
    pub async fn read(&self, group: &GroupName, kind: PlaneKind, depth: Depth, limit: Duration) {
        let Ok(plane) = self.plane(group, kind) else { return };
        match plane.observe(depth, Deadline::within(limit)).await {
            Ok(facts) => {
                let key = (self.me.clone(), group.clone(), kind);
                self.readings.lock().insert(key, Reading { facts, at: Instant::now() });
            }
            Err(cause) => warn!(%group, plane = %kind, %cause, "plane not read"),
        }
    }

    /// What this site tells the others.
    pub fn told(&self) -> Vec<Told> {
        let readings = self.readings.lock();
        readings
            .iter()
            .filter(|((site, ..), _)| *site == self.me)
            .map(|((_, group, _), reading)| Told {
                group: group.clone(),
                facts: reading.facts.clone(),
                age_ms: dc_core::time::millis(reading.at.elapsed()),
            })
            .collect()
    }

    /// Takes in what another site told.
    pub fn heard(&self, site: &SiteId, told: Vec<Told>) {
        let mut readings = self.readings.lock();
        for one in told {
            let Some(at) = Instant::now().checked_sub(Duration::from_millis(one.age_ms)) else { continue };
            readings.insert((site.clone(), one.group, one.facts.plane), Reading { facts: one.facts, at });
        }
    }

    /// The newest reading of a plane at a site.
    pub fn reading(&self, site: &SiteId, group: &GroupName, kind: PlaneKind) -> Option<Reading> {
        self.readings.lock().get(&(site.clone(), group.clone(), kind)).cloned()
    }

    /// Groups whose every plane here was read at least once.
    pub fn all_read(&self) -> Result<(), String> {
        let groups = self.groups.lock();
        let readings = self.readings.lock();
        for (name, loaded) in groups.iter() {
            if let Some(why) = &loaded.problem {
                return Err(format!("group {name}: {why}"));
            }
            for kind in loaded.planes.keys() {
                if !readings.contains_key(&(self.me.clone(), name.clone(), *kind)) {
                    return Err(format!("{kind} of {name} was not read yet"));
                }
            }
        }
        Ok(())
    }
}
