//! What is seen of a plane at a site: facts, never wishes.

use serde::{Deserialize, Serialize};

use crate::act::Finding;
use crate::ids::PlaneKind;
use crate::position::Lag;

/// What a plane is at this site, as seen and not as wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Takes writes of applications.
    Writable,
    /// Follows the other site.
    Following,
    /// Runs, and neither takes writes nor follows.
    Closed,
    /// Does not run.
    Down,
}

/// One reading of a plane at this site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaneFacts {
    /// Which plane.
    pub plane: PlaneKind,
    /// What it is here; none when it could not be seen.
    pub role: Option<Role>,
    /// How far this site is behind the one it follows; none when it follows none or it is unknown.
    pub lag: Option<Lag>,
    /// One line for people, as in `streaming from rome, timeline 3`.
    pub summary: String,
    /// What is wrong, or merely worth saying.
    pub findings: Vec<Finding>,
}
