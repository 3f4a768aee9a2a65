//! What only both sites' preflights together can tell.

use std::collections::BTreeMap;

use crate::act::{Finding, Outcome};
use crate::codes::Code;
use crate::ids::{PlaneKind, SiteId};

/// Findings from comparing what the acts at the two sites of a move told.
pub fn compare<'a>(
    told: impl IntoIterator<Item = &'a Outcome>,
    source: &SiteId,
    target: &SiteId,
) -> Vec<Finding> {
    let mut prints: BTreeMap<(PlaneKind, &str), BTreeMap<&SiteId, &str>> = BTreeMap::new();
    for outcome in told {
        if let Outcome::Fingerprint { plane, site, of, digest } = outcome {
            prints.entry((*plane, of)).or_default().insert(site, digest); // the latest counts
        }
    }
    let mut found = Vec::new();
    for ((plane, of), at) in prints {
        let (mine, theirs) = (at.get(source), at.get(target));
        if let (Some(mine), Some(theirs)) = (mine, theirs)
            && mine != theirs
        {
            found.push(Finding {
                code: Code::SITES_DIFFER.as_str().into(),
                plane: Some(plane),
                site: target.clone(),
                blocking: true,
                text: format!("{of} is not the same at {source} and {target}"),
            });
        }
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends at its first surprise")]
mod tests {
    use super::*;

    fn told(site: &SiteId, of: &str, digest: &str) -> Outcome {
        let (of, digest) = (of.to_owned(), digest.to_owned());
        Outcome::Fingerprint { plane: PlaneKind::Airflow, site: site.clone(), of, digest }
    }

    #[test]
    fn names_what_differs_and_shows_no_digest() {
        let [rome, fra] = ["rome", "fra"].map(|s| SiteId::new(s).unwrap());
        let all = [
            told(&rome, "airflow version", "3.3.1"),
            told(&fra, "airflow version", "3.3.2"),
            told(&rome, "fernet key", "aa"),
            told(&fra, "fernet key", "aa"),
            told(&rome, "only here", "x"),
        ];
        let found = compare(&all, &rome, &fra);
        assert_eq!(found.len(), 1);
        assert!(found[0].blocking && found[0].site == fra);
        assert_eq!(found[0].text, "airflow version is not the same at rome and fra");
        assert!(compare(&all[2..], &rome, &fra).is_empty());
    }
}
