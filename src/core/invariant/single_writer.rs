//! L1: no two sites acknowledge writes of one plane at one instant.

use super::Sight;
use crate::ids::PlaneKind;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let writable = |plane| now.planes().filter(move |(_, p)| p.plane == plane && p.writable);
    PlaneKind::ALL
        .into_iter()
        .filter(|plane| writable(*plane).count() > 1)
        .map(|plane| {
            let sites: Vec<_> = writable(plane).map(|(site, _)| site.as_str()).collect();
            format!("{plane} takes writes at {}", sites.join(" and "))
        })
        .collect()
}
