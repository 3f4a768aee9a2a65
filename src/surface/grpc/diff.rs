//! What a spec would change of the one that is applied, key by key.

use std::collections::BTreeMap;

use dc_core::spec::GroupSpec;
use dc_core::view::{DiffView, KeyChange};
use serde_json::Value;

/// Compares two specs; none known means everything is new.
pub(super) fn diff(known: Option<&GroupSpec>, wanted: &GroupSpec) -> DiffView {
    let is = known.map(flat).unwrap_or_default();
    let becomes = flat(wanted);
    let mut keys: Vec<&String> = is.keys().chain(becomes.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let changes = keys
        .into_iter()
        .filter(|key| is.get(*key) != becomes.get(*key))
        .map(|key| KeyChange {
            key: key.clone(),
            is: is.get(key).cloned(),
            becomes: becomes.get(key).cloned(),
        })
        .collect();
    DiffView { group: wanted.name.clone(), known: known.is_some(), changes }
}

fn flat(spec: &GroupSpec) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    // plain data with text keys: nothing in it that JSON cannot carry
    walk("", &serde_json::to_value(spec).unwrap_or_default(), &mut keys);
    keys
}

fn walk(path: &str, value: &Value, keys: &mut BTreeMap<String, String>) {
    match value {
        Value::Null => {}
        Value::Object(table) => {
            for (name, inner) in table {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                walk(&path, inner, keys);
            }
        }
        other => {
            keys.insert(path.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Option<GroupSpec> {
        crate::spec_file::parse("g", text).ok()
    }

    #[test]
    fn names_each_key_that_changes_and_no_other() {
        let base = "name = \"orders\"\nsites = [\"rome\", \"fra\"]\n[postgres]\ndatabases = [\"app\"]\napp_roles = []\n";
        let more = base.replace("[\"app\"]", "[\"app\", \"crm\"]") + "[policy]\nstop_limit = \"20s\"\n";
        let (old, new) = (spec(base), spec(&more));
        let found = new.as_ref().map(|new| diff(old.as_ref(), new));
        let keys: Vec<_> =
            found.iter().flat_map(|d| &d.changes).map(|c| (c.key.as_str(), c.becomes.as_deref())).collect();
        assert_eq!(
            keys,
            [("policy.stop_limit", Some("\"20s\"")), ("postgres.databases", Some("[\"app\",\"crm\"]"))]
        );
        assert!(new.is_some_and(|new| diff(Some(&new), &new).changes.is_empty()));
    }
}
