//! Nothing takes writes at a site that is not the holder of an opened epoch.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    let Some(group) = now.known() else { return Vec::new() };
    now.planes()
        .filter(|(site, p)| p.writable && !(group.opened && group.holder == **site))
        .map(|(site, p)| {
            let opened = if group.opened { "opened" } else { "not opened" };
            format!(
                "{} takes writes at {site}; {} holds epoch {}, {opened}",
                p.plane, group.holder, group.epoch
            )
        })
        .collect()
}
