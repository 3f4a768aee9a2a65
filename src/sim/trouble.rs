//! What goes wrong, planned or by chance.

use dc_core::ids::{PlaneKind, SiteId};

use crate::dice::Dice;

/// One thing that goes wrong at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The agent's process dies and is started again after so many ticks.
    Kill(SiteId, u64),
    /// The host reboots: its clock begins anew.
    Reboot(SiteId, u64),
    /// The agent dies and its directory is gone.
    LoseDisk(SiteId, u64),
    /// The agent's disk is full for so many ticks: nothing it wants to remember is written,
    /// and it ends once the quorum's store has to grow.
    FillDisk(SiteId, u64),
    /// The site is cut off for so many ticks.
    Cut(SiteId, u64),
    /// The host stands still for so many ticks.
    Freeze(SiteId, u64),
    /// The host's clock jumps ahead by so many milliseconds.
    Jump(SiteId, u64),
    /// Somebody sets the host's wall clock by so many milliseconds.
    SetWall(SiteId, i64),
    /// The host stands still for so many ticks, and its clock with it.
    Pause(SiteId, u64),
    /// The leader loses its office; no other has it for so many ticks.
    Vacancy(u64),
    /// A plane's replication is broken for so many ticks.
    Unlink(PlaneKind, u64),
    /// Acts break half-way for so many ticks.
    Breaks(u64),
}

/// Whose process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// Whoever leads.
    Leader,
    /// The site that is left.
    Source,
    /// The site that shall hold the group.
    Target,
}

impl Victim {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Leader, Self::Source, Self::Target];
}

/// When, relative to a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Its intent is committed.
    Before,
    /// It was performed, and the answer has not left.
    Between,
    /// Its answer is committed.
    After,
}

impl Moment {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Before, Self::Between, Self::After];
}

/// A death at a step of the first run, by its place in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crash {
    /// Whose.
    pub victim: Victim,
    /// At which step, from 0.
    pub step: usize,
    /// When.
    pub moment: Moment,
}

/// Something goes wrong by chance; most ticks nothing does.
pub fn by_chance(dice: &mut Dice, sites: &[SiteId], planes: &[PlaneKind]) -> Option<Fault> {
    if !dice.once_in(60) {
        return None;
    }
    let site = dice.one(sites)?.clone();
    let back = dice.between(10, 200);
    Some(match dice.between(0, 21) {
        0..=4 => Fault::Kill(site, back),
        5 => Fault::Reboot(site, back),
        6 => Fault::LoseDisk(site, back),
        7 => Fault::FillDisk(site, back),
        8..=11 => Fault::Cut(site, dice.between(20, 400)),
        12 => Fault::Freeze(site, dice.between(20, 400)),
        13 => Fault::Jump(site, dice.between(3_000, 20_000)),
        14..=16 => Fault::Vacancy(dice.between(20, 80)),
        17 => Fault::SetWall(site, i64::try_from(dice.between(0, 7_200_000)).unwrap_or(0) - 3_600_000),
        18 => Fault::Pause(site, dice.between(20, 400)),
        19 | 20 => Fault::Unlink(*dice.one(planes)?, dice.between(20, 600)),
        _ => Fault::Breaks(dice.between(20, 100)),
    })
}
