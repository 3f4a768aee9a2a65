//! A site whose agent runs takes no writes once a voter may count its lease as over.

use super::Sight;

pub(super) fn check(now: &Sight<'_>) -> Vec<String> {
    now.sites
        .iter()
        .filter(|s| s.lapsed)
        .flat_map(|s| s.planes.iter().filter(|p| p.writable).map(move |p| (&s.site, p.plane)))
        .map(|(site, plane)| format!("{plane} takes writes at {site} after its lease"))
        .collect()
}
