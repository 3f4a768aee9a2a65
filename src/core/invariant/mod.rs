//! The laws as checks: what must be true of the world at every instant, a file per law.
//!
//! Pure functions over what an onlooker sees who knows every committed entry and looks at
//! every plane at once. Nobody in the product can; the simulation, the model and drills
//! can, and use these unchanged. The lab's oracle is written apart from them on purpose.

mod epochs_rise;
mod fences_hold;
mod grants_exist;
mod lease_covers_writers;
mod nothing_lost;
mod opened_before_writable;
mod rolled_back_is_restored;
mod single_writer;
mod tokens_rise;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::act::ActName;
use crate::ids::{Epoch, GroupName, PlaneKind, RunId, SiteId, Token};
use crate::plan::StepId;
use crate::position::Grant;
use crate::registry::{Group, Registry};

/// One group's world at one instant.
#[derive(Debug, Clone)]
pub struct Sight<'a> {
    /// With every committed entry applied.
    pub registry: &'a Registry,
    /// Which group is looked at.
    pub group: &'a GroupName,
    /// Both sites of the group.
    pub sites: Vec<SiteSight<'a>>,
    /// Writes that clients were told are kept, by plane, as numbers of the writers' own.
    pub acknowledged: &'a BTreeMap<PlaneKind, BTreeSet<u64>>,
    /// Bindings that the applications own.
    pub grants: &'a BTreeSet<Grant>,
}

/// One site.
#[derive(Debug, Clone)]
pub struct SiteSight<'a> {
    /// Which.
    pub site: SiteId,
    /// Whether some voter's clock says that its lease is over, while its agent runs.
    pub lapsed: bool,
    /// Its planes.
    pub planes: Vec<PlaneSight<'a>>,
}

/// One plane at one site.
#[derive(Debug, Clone)]
pub struct PlaneSight<'a> {
    /// Which.
    pub plane: PlaneKind,
    /// Whether a client's write would be acknowledged now.
    pub writable: bool,
    /// Fencing acts whose work stands.
    pub shut: &'a BTreeSet<ActName>,
    /// Highest token of a step begun here.
    pub token: Token,
    /// Bindings of applications that exist here.
    pub grants: &'a BTreeSet<Grant>,
    /// Writes that are kept here.
    pub kept: &'a BTreeSet<u64>,
}

/// What must be remembered of an instant to judge the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    activation: Option<(Epoch, SiteId)>,
    steps: BTreeMap<(RunId, StepId), Token>,
    planes: BTreeMap<(SiteId, PlaneKind), Token>,
}

/// A law that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Name of the invariant.
    pub law: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.law, self.seen)
    }
}

type Check = fn(&Marks, &Sight<'_>) -> Vec<String>;

/// Every invariant by its name.
const ALL: &[(&str, Check)] = &[
    ("single_writer", |_, now| single_writer::check(now)),
    ("opened_before_writable", |_, now| opened_before_writable::check(now)),
    ("fences_hold", |_, now| fences_hold::check(now)),
    ("tokens_rise", tokens_rise::check),
    ("epochs_rise", epochs_rise::check),
    ("grants_exist", |_, now| grants_exist::check(now)),
    ("rolled_back_is_restored", |_, now| rolled_back_is_restored::check(now)),
    ("nothing_lost", |_, now| nothing_lost::check(now)),
    ("lease_covers_writers", |_, now| lease_covers_writers::check(now)),
];

/// Everything that is wrong now; nothing is what must come back.
pub fn check(before: &Marks, now: &Sight<'_>) -> Vec<Violation> {
    ALL.iter()
        .flat_map(|(law, check)| {
            check(before, now).into_iter().map(|seen| Violation { law, seen }).collect::<Vec<_>>()
        })
        .collect()
}

impl Marks {
    /// What the next instant is judged by.
    pub fn of(sight: &Sight<'_>) -> Self {
        Self {
            activation: sight.known().map(|group| (group.epoch, group.holder.clone())),
            steps: sight.steps().collect(),
            planes: sight.planes().map(|(site, p)| ((site.clone(), p.plane), p.token)).collect(),
        }
    }
}

impl Sight<'_> {
    fn known(&self) -> Option<&Group> {
        self.registry.groups.get(self.group)
    }

    fn planes(&self) -> impl Iterator<Item = (&SiteId, &PlaneSight<'_>)> {
        self.sites.iter().flat_map(|s| s.planes.iter().map(move |p| (&s.site, p)))
    }

    fn plane(&self, site: &SiteId, plane: PlaneKind) -> Option<&PlaneSight<'_>> {
        self.planes().find(|(at, p)| *at == site && p.plane == plane).map(|(_, p)| p)
    }

    /// Tokens of the steps of open runs.
    fn steps(&self) -> impl Iterator<Item = ((RunId, StepId), Token)> {
        self.registry.open_runs().filter(|run| run.group == *self.group).flat_map(|run| {
            run.steps.iter().filter_map(|s| Some(((run.id.clone(), s.plan.id), s.intent()?.0)))
        })
    }
}
