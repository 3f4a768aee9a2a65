//! What the fakes are made of: writes that were kept, and what lets new ones in.

use std::collections::{BTreeMap, BTreeSet};

use dc_core::act::ActName;
use dc_core::ids::{PlaneKind, SiteId, Token};
use dc_core::position::Grant;

/// A way in which a driver could be wrong, for proofs that the checks would see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sin {
    /// The fence reads the grants that it takes away, and hands them on as the record.
    FenceRecordsGrants,
    /// The drain believes the link instead of comparing.
    DrainWithoutLooking,
}

/// A plane at one site.
#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is one thing that a real plane has or has not")]
pub struct Here {
    /// Its processes run.
    pub running: bool,
    /// It may be written to at all; only PostgreSQL's standby may not.
    pub primary: bool,
    /// Clients come in.
    pub door: bool,
    /// It closed itself because its lease ended.
    pub closed: bool,
    /// The other site's mirror may write here.
    pub fed: bool,
    /// Commits wait for the other site.
    pub sync: bool,
    /// Open tasks were treated by policy.
    pub policy: bool,
    /// Timeline it is on.
    pub timeline: u32,
    /// Fencing acts whose work stands.
    pub shut: BTreeSet<ActName>,
    /// Of the last step begun.
    pub token: Token,
    /// Bindings of applications.
    pub grants: BTreeSet<Grant>,
    /// Connector prepared for the other direction.
    pub reverse: Option<String>,
    /// Writes that are here.
    pub kept: BTreeSet<u64>,
}

impl Here {
    /// Whether a client's write would be acknowledged now.
    pub fn writable(&self) -> bool {
        self.running && self.primary && self.door && !self.closed
    }
}

/// Which way a plane replicates.
#[derive(Debug, Clone)]
pub struct Link {
    /// The site that is followed.
    pub from: SiteId,
    /// The one that follows.
    pub to: SiteId,
    /// Whether the network between them works.
    pub up: bool,
    /// Whether the follower follows: a promoted one does not.
    pub on: bool,
}

/// All planes of one group.
#[derive(Debug, Clone)]
pub struct Group {
    pub(super) planes: BTreeMap<(SiteId, PlaneKind), Here>,
    /// By plane.
    pub links: BTreeMap<PlaneKind, Link>,
    /// What clients were told is kept.
    pub acknowledged: BTreeMap<PlaneKind, BTreeSet<u64>>,
    /// What applications own.
    pub grants: BTreeSet<Grant>,
    /// What is wrong with the drivers; nothing, but for a proof.
    pub sins: Vec<Sin>,
    pub(super) writes: u64,
    none: Here,
}

impl Group {
    /// Planes of a group, held by `holder`; nothing is written yet.
    pub fn founded(planes: &[PlaneKind], holder: &SiteId, standby: &SiteId, grants: BTreeSet<Grant>) -> Self {
        let mut all = BTreeMap::new();
        for plane in planes {
            let kafka = *plane == PlaneKind::Kafka;
            let serving = Here {
                running: true,
                primary: true,
                door: true,
                timeline: 1,
                grants: if kafka { grants.clone() } else { BTreeSet::new() },
                ..Here::default()
            };
            let airflow = *plane == PlaneKind::Airflow;
            let following = Here {
                running: !airflow,
                primary: *plane != PlaneKind::Postgres,
                fed: kafka,
                timeline: 1,
                ..Here::default()
            };
            all.insert((holder.clone(), *plane), serving);
            all.insert((standby.clone(), *plane), following);
        }
        let link = || Link { from: holder.clone(), to: standby.clone(), up: true, on: true };
        let kafka = planes.contains(&PlaneKind::Kafka);
        Self {
            planes: all,
            links: planes.iter().filter(|p| **p != PlaneKind::Airflow).map(|p| (*p, link())).collect(),
            acknowledged: BTreeMap::new(),
            grants: if kafka { grants } else { BTreeSet::new() },
            sins: Vec::new(),
            writes: 0,
            none: Here::default(),
        }
    }

    /// A plane at a site. One that the group lacks is an empty one that nobody keeps.
    pub fn here(&mut self, site: &SiteId, plane: PlaneKind) -> &mut Here {
        self.none = Here::default();
        match self.planes.get_mut(&(site.clone(), plane)) {
            Some(here) => here,
            None => &mut self.none,
        }
    }

    /// Every plane at every site.
    pub fn all(&self) -> impl Iterator<Item = (&SiteId, PlaneKind, &Here)> {
        self.planes.iter().map(|((site, plane), here)| (site, *plane, here))
    }

    /// How many writes the follower lacks; none where nothing follows.
    pub fn lag(&self, plane: PlaneKind) -> Option<usize> {
        let link = self.links.get(&plane).filter(|l| l.on)?;
        let from = self.planes.get(&(link.from.clone(), plane))?;
        let to = self.planes.get(&(link.to.clone(), plane))?;
        Some(from.kept.difference(&to.kept).count())
    }

    /// A client writes. Returns whether it was told that its write is kept.
    ///
    /// A task of Airflow is a write to the database by a role of its own.
    pub fn write(&mut self, site: &SiteId, client: PlaneKind) -> bool {
        self.writes += 1;
        let id = self.writes;
        let plane = if client == PlaneKind::Airflow {
            let here = self.here(site, PlaneKind::Airflow);
            let runs = here.running && !here.closed;
            let base = self.here(site, PlaneKind::Postgres);
            if !(runs && base.running && base.primary && base.shut.is_empty()) {
                return false;
            }
            PlaneKind::Postgres
        } else {
            if !self.here(site, client).writable() {
                return false;
            }
            client
        };
        let sync = self.here(site, plane).sync;
        self.here(site, plane).kept.insert(id);
        if sync {
            let Some(link) = self.links.get(&plane).filter(|l| l.up && l.on && l.from == *site) else {
                return false; // kept here, and the client still waits
            };
            let to = link.to.clone();
            self.here(&to, plane).kept.insert(id);
        }
        self.acknowledged.entry(plane).or_default().insert(id);
        true
    }

    /// The follower of a plane takes up to `many` writes, oldest first.
    pub fn replicate(&mut self, plane: PlaneKind, many: usize) {
        let Some(link) = self.links.get(&plane).filter(|l| l.up && l.on).cloned() else { return };
        let at = |site: &SiteId| self.planes.get(&(site.clone(), plane));
        let (Some(from), Some(to)) = (at(&link.from), at(&link.to)) else { return };
        let refused = plane == PlaneKind::Kafka && !to.fed || plane == PlaneKind::Postgres && to.primary;
        if !from.running || refused {
            return;
        }
        let next: Vec<u64> = from.kept.difference(&to.kept).take(many).copied().collect();
        self.here(&link.to, plane).kept.extend(next);
    }
}
