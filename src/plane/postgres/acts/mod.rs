//! What the driver does, an act at a time; who calls what stands in `plane.rs`.

mod fence;
mod follow;
mod preflight;
mod prepare;
mod promote;
mod rebuild;
mod upkeep;

pub(crate) use upkeep::reopen as upkeep_reopen;

use dc_core::act::Act;
use dc_core::authority::{Authority, Origin};
use dc_core::position::{Lsn, ShutdownToken};
use dc_plane::PlaneError;

use crate::local::Local;
use crate::marks::{FenceMark, Marks};

/// Fence mark that a step sets. Only a step of a run has one to set.
pub(crate) fn mark_of(by: &Authority) -> Result<FenceMark, PlaneError> {
    match by.origin() {
        Origin::Step { run, epoch, token } => {
            Ok(FenceMark { run: run.clone(), epoch: *epoch, token: *token })
        }
        Origin::SelfFence | Origin::Reopen { .. } => {
            Err(PlaneError::refused("DC-0330", "this act is a step of a run; the authority given is none"))
        }
    }
}

/// Refuses what would let writers in without the right to.
pub(crate) fn must_open(by: &Authority) -> Result<(), PlaneError> {
    if by.may_open() {
        return Ok(());
    }
    Err(PlaneError::refused("DC-0330", "a self-fence may close and may never open"))
}

/// Why a fence that stands here forbids this step to lift it; none when it does not.
pub(crate) fn foreign_fence(marks: &Marks, mine: &FenceMark) -> Option<PlaneError> {
    let held = marks.fence.as_ref().filter(|held| held.run != mine.run && held.token > mine.token)?;
    let why = format!("run {} holds a fence here with token {}, above {}", held.run, held.token, mine.token);
    Some(PlaneError::refused("DC-0331", why))
}

/// The token of the stopped source, which this act must have been given.
pub(crate) fn token_of(act: &Act) -> Result<&ShutdownToken, PlaneError> {
    act.shutdown()
        .ok_or_else(|| PlaneError::refused("DC-0325", "the act came without the stopped source's token"))
}

/// Whether the act's site is the one that held the group when the run was planned.
pub(crate) fn at_source(act: &Act) -> bool {
    act.site == act.source
}

impl Local {
    /// Refuses an act of another group or for another site: the caller's table is wrong.
    pub(crate) fn check_addressee(&self, act: &Act) -> Result<(), PlaneError> {
        let known = |site: &dc_core::ids::SiteId| *site == self.site || *site == self.peer;
        if act.site == self.site && act.group == self.group && known(&act.source) && known(&act.target) {
            return Ok(());
        }
        let why = format!(
            "{} is for {} of group {}; this is {} of group {}",
            act.name, act.site, act.group, self.site, self.group
        );
        Err(PlaneError::refused("DC-0332", why))
    }
}

/// Text of a position that may be unknown.
pub(crate) fn shown(lsn: Option<Lsn>) -> String {
    lsn.map_or_else(|| "unknown".to_owned(), |l| l.to_string())
}
