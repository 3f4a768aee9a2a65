//! L2: every acknowledged write is kept at the site that holds the group.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let Some(group) = now.known() else { return Vec::new() };
    let mut lost = Vec::new();
    for (plane, acknowledged) in now.acknowledged {
        let Some(at) = now.plane(&group.holder, *plane) else { continue };
        let missing: Vec<_> = acknowledged.difference(at.kept).take(3).collect();
        if !missing.is_empty() {
            let many = acknowledged.difference(at.kept).count();
            lost.push(format!("{many} writes of {plane} are not at {}: {missing:?}", group.holder));
        }
    }
    lost
}
