//! What only both sites' preflights together can tell.

use crate::act::{Finding, Outcome};
use crate::codes::Code;
use crate::run::Run;

/// Findings from comparing the two sites of a run.
pub fn compare(run: &Run) -> Vec<Finding> {
    let prints: Vec<_> = run
        .outcomes()
        .filter_map(|o| match o {
            Outcome::Fingerprint { plane, site, of, digest } => Some((plane, site, of, digest)),
            _ => None,
        })
        .collect();
    let mut found = Vec::new();
    for (i, (plane, site, of, digest)) in prints.iter().enumerate() {
        for (other_plane, other_site, other_of, other) in &prints[i + 1..] {
            if (plane, of) == (other_plane, other_of) && site != other_site && digest != other {
                found.push(Finding {
                    code: Code::SITES_DIFFER.as_str().into(),
                    plane: Some(**plane),
                    site: (*other_site).clone(),
                    blocking: true,
                    text: format!("{of} is not the same at {site} and {other_site}"),
                });
            }
        }
    }
    found
}
