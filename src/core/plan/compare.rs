//! What only both sites' preflights together can tell.

use std::collections::BTreeMap;

use crate::act::{Finding, Outcome};
use crate::codes::Code;
use crate::ids::{PlaneKind, SiteId};
use crate::run::Run;

/// Findings from comparing the two sites of a run.
pub fn compare(run: &Run) -> Vec<Finding> {
    let mut prints: BTreeMap<(PlaneKind, &str), BTreeMap<&SiteId, &str>> = BTreeMap::new();
    for outcome in run.outcomes() {
        if let Outcome::Fingerprint { plane, site, of, digest } = outcome {
            prints.entry((*plane, of)).or_default().insert(site, digest); // the latest counts
        }
    }
    let mut found = Vec::new();
    for ((plane, of), at) in prints {
        let (mine, theirs) = (at.get(&run.source), at.get(&run.target));
        if let (Some(mine), Some(theirs)) = (mine, theirs)
            && mine != theirs
        {
            found.push(Finding {
                code: Code::SITES_DIFFER.as_str().into(),
                plane: Some(plane),
                site: run.target.clone(),
                blocking: true,
                text: format!("{of} is not the same at {} and {}", run.source, run.target),
            });
        }
    }
    found
}
