//! Settings of the mirror: what must be true of them, and those of the way back, made from the way there.
//!
//! The reverse mirror is the forward one with its ends exchanged, so the operator's own choices (logins, converters,
//! number of tasks) hold in both directions, and no password is known here: it stands in the workers' files, named by
//! a placeholder.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::connect::Settings;

const SOURCE: &str = "source.cluster.";
const TARGET: &str = "target.cluster.";
/// What a worker's own clients of a connector use; they belong to the cluster that the worker writes to.
const OVERRIDES: [&str; 3] = ["producer.override.", "consumer.override.", "admin.override."];
const LOGIN: [&str; 3] = ["security.", "sasl.", "ssl."];

/// What both directions need: carried exactly once, under the same names, with grants and settings left to us.
const MUST: [(&str, &str); 7] = [
    ("connector.class", "org.apache.kafka.connect.mirror.MirrorSourceConnector"),
    ("replication.policy.class", "org.apache.kafka.connect.mirror.IdentityReplicationPolicy"),
    ("exactly.once.support", "required"),
    ("source.consumer.isolation.level", "read_committed"),
    ("sync.topic.acls.enabled", "false"),
    ("sync.topic.configs.enabled", "false"),
    // Heartbeats would be carried without being named, and start over each time.
    ("heartbeats.replication.enabled", "false"),
];
/// A worker's open transaction holds up drain and restart for as long as this.
const TRANSACTION: &str = "producer.override.transaction.timeout.ms";
const TRANSACTION_MS: u64 = 5_000;
const TRANSACTION_MS_MAX: u64 = 15_000;

fn get<'a>(settings: &'a Settings, key: &str) -> &'a str {
    settings.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// What the mirror calls the cluster it reads.
pub fn source_alias(settings: &Settings) -> &str {
    get(settings, "source.cluster.alias")
}

/// The names of the topics it carries.
pub fn topics(settings: &Settings) -> BTreeSet<&str> {
    get(settings, "topics").split(',').map(str::trim).filter(|name| !name.is_empty()).collect()
}

/// Everything that is wrong with a mirror of these topics; the second member says what merely costs time.
pub fn faults(settings: &Settings, carried: &BTreeSet<&str>) -> (Vec<String>, Vec<String>) {
    let mut wrong: Vec<String> = MUST
        .iter()
        .filter(|(key, value)| get(settings, key) != *value)
        .map(|(key, value)| {
            let found = settings.get(*key).and_then(Value::as_str).unwrap_or("not set");
            format!("{key} is {found}, must be {value}")
        })
        .collect();
    let named = topics(settings);
    let lacking: Vec<&str> = carried.difference(&named).copied().collect();
    if !lacking.is_empty() {
        wrong.push(format!("topics does not name {}", lacking.join(", ")));
    }
    let beyond: Vec<&str> = named.difference(carried).copied().collect();
    if !beyond.is_empty() {
        wrong.push(format!("topics names {}, which the group does not own", beyond.join(", ")));
    }
    if source_alias(settings).is_empty() {
        wrong.push("source.cluster.alias is not set".to_owned());
    }
    let mut slow = Vec::new();
    let transaction = get(settings, TRANSACTION).parse::<u64>().unwrap_or(60_000);
    if transaction > TRANSACTION_MS_MAX {
        slow.push(format!(
            "{TRANSACTION} is {transaction}, above {TRANSACTION_MS_MAX}: a worker that dies holds up drain and restart that long"
        ));
    }
    (wrong, slow)
}

/// Settings of the mirror that carries the same topics the other way.
///
/// `source` and `target` are the brokers of the new source as the workers of the new target reach them, and the new
/// target's own.
pub fn reversed(forward: &Settings, carried: &BTreeSet<&str>, source: &str, target: &str) -> Settings {
    let mut made = Settings::new();
    let is_login = |key: &str| LOGIN.iter().any(|login| key.starts_with(login));
    for (key, value) in forward {
        if let Some(rest) = key.strip_prefix(SOURCE) {
            made.insert(format!("{TARGET}{rest}"), value.clone());
        } else if let Some(rest) = key.strip_prefix(TARGET) {
            made.insert(format!("{SOURCE}{rest}"), value.clone());
        } else if key != "name" {
            let over = OVERRIDES.iter().find_map(|prefix| key.strip_prefix(prefix));
            if !over.is_some_and(|rest| is_login(rest) || rest == "bootstrap.servers") {
                made.insert(key.clone(), value.clone());
            }
        }
    }
    let logins: Vec<(String, Value)> = made
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(TARGET)?.to_owned(), value.clone())))
        .filter(|(rest, _)| is_login(rest))
        .collect();
    for prefix in OVERRIDES {
        for (rest, value) in &logins {
            made.insert(format!("{prefix}{rest}"), value.clone());
        }
    }
    for (key, value) in MUST {
        made.insert(key.to_owned(), value.into());
    }
    let names: Vec<&str> = carried.iter().copied().collect();
    made.insert("topics".to_owned(), names.join(",").into());
    made.insert(format!("{SOURCE}bootstrap.servers"), source.into());
    made.insert(format!("{TARGET}bootstrap.servers"), target.into());
    if get(&made, TRANSACTION).parse::<u64>().is_ok_and(|ms| ms <= TRANSACTION_MS_MAX) {
        return made;
    }
    made.insert(TRANSACTION.to_owned(), TRANSACTION_MS.to_string().into());
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward() -> Settings {
        let mut settings = Settings::new();
        for (key, value) in MUST.into_iter().chain([
            ("name", "m0"),
            ("topics", "a, b"),
            ("source.cluster.alias", "rome"),
            ("target.cluster.alias", "fra"),
            ("source.cluster.bootstrap.servers", "r:1"),
            ("target.cluster.bootstrap.servers", "f:1"),
            ("source.cluster.sasl.jaas.config", "at rome"),
            ("target.cluster.sasl.jaas.config", "at fra"),
            ("producer.override.sasl.jaas.config", "at fra"),
            ("producer.override.bootstrap.servers", "f:1"),
            ("producer.override.transaction.timeout.ms", "5000"),
            ("producer.override.linger.ms", "7"),
            ("tasks.max", "3"),
        ]) {
            settings.insert(key.into(), value.into());
        }
        settings
    }

    #[test]
    fn the_way_back_exchanges_ends_and_logins_and_keeps_the_rest() {
        let back = reversed(&forward(), &BTreeSet::from(["a", "b"]), "f:9", "r:9");
        let expected = [
            ("source.cluster.alias", "fra"),
            ("target.cluster.alias", "rome"),
            ("source.cluster.bootstrap.servers", "f:9"),
            ("target.cluster.bootstrap.servers", "r:9"),
            ("source.cluster.sasl.jaas.config", "at fra"),
            ("target.cluster.sasl.jaas.config", "at rome"),
            ("producer.override.sasl.jaas.config", "at rome"),
            ("admin.override.sasl.jaas.config", "at rome"),
            ("producer.override.linger.ms", "7"),
            ("tasks.max", "3"),
            ("topics", "a,b"),
        ];
        for (key, value) in expected {
            assert_eq!(get(&back, key), value, "{key}");
        }
        assert!(!back.contains_key("name") && !back.contains_key("producer.override.bootstrap.servers"));
        assert_eq!(faults(&back, &BTreeSet::from(["a", "b"])), (vec![], vec![]));
        let there = reversed(&back, &BTreeSet::from(["a", "b"]), "r:1", "f:1");
        assert_eq!(source_alias(&there), "rome");
    }

    #[test]
    fn names_every_fault_of_a_mirror_at_once() {
        let mut settings = forward();
        settings.insert("sync.topic.acls.enabled".into(), "true".into());
        settings.remove("exactly.once.support");
        settings.insert("topics".into(), "a,z".into());
        settings.remove(TRANSACTION);
        let (wrong, slow) = faults(&settings, &BTreeSet::from(["a", "b"]));
        assert_eq!((wrong.len(), slow.len()), (4, 1), "{wrong:?}");
        assert!(wrong.iter().any(|w| w.contains("exactly.once.support is not set")));
        assert!(wrong.iter().any(|w| w.contains("does not name b")));
    }
}
