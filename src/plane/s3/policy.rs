//! The bucket policy as a document: our one Deny is put in and taken out, all else stays as it was.

use dc_core::ids::GroupName;
use dc_core::spec::S3Spec;
use serde_json::{Map, Value, json};

/// What writers are denied: every way an object can come, change or go.
const DENIED: [&str; 5] =
    ["s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectTagging", "s3:PutObjectAcl"];

/// A policy that is not what the language of policies allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the bucket policy cannot be understood: {0}")]
pub(crate) struct BadPolicy(String);

/// Our statement's name: groups that share a bucket never touch each other's.
pub(crate) fn sid(group: &GroupName) -> String {
    // a statement's name has letters and digits only; a group's name has no capitals, so Z can stand for '-'
    format!("DcSwitchFence{}", group.as_str().replace('-', "Z"))
}

/// The statement that shuts the group's writers out of its prefixes.
pub(crate) fn fence(group: &GroupName, spec: &S3Spec) -> Value {
    let below = |prefix: &str| format!("arn:aws:s3:::{}/{prefix}/*", spec.bucket);
    json!({
        "Sid": sid(group),
        "Effect": "Deny",
        "Principal": { "AWS": spec.writers },
        "Action": DENIED,
        "Resource": [below(&spec.dag_prefix), below(&spec.log_prefix)],
    })
}

fn parse(text: Option<&str>) -> Result<Map<String, Value>, BadPolicy> {
    let Some(text) = text.filter(|t| !t.trim().is_empty()) else {
        return Ok(Map::from_iter([("Version".to_owned(), json!("2012-10-17"))]));
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(BadPolicy("it is no object".into())),
        Err(cause) => Err(BadPolicy(cause.to_string())),
    }
}

fn statements(policy: &Map<String, Value>) -> Result<Vec<Value>, BadPolicy> {
    match policy.get("Statement") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list.clone()),
        Some(one @ Value::Object(_)) => Ok(vec![one.clone()]),
        Some(_) => Err(BadPolicy("Statement is neither an object nor a list".into())),
    }
}

fn is_ours(statement: &Value, sid: &str) -> bool {
    statement.get("Sid").and_then(Value::as_str) == Some(sid)
}

/// Whether our Deny stands in the policy, exactly as it must.
pub(crate) fn is_fenced(text: Option<&str>, group: &GroupName, spec: &S3Spec) -> Result<bool, BadPolicy> {
    let wanted = fence(group, spec);
    Ok(statements(&parse(text)?)?.iter().any(|s| same(s, &wanted)))
}

/// Equal but for the order of lists and a list of one written as its element.
fn same(a: &Value, b: &Value) -> bool {
    fn set(of: Option<&Value>) -> Vec<String> {
        let mut words: Vec<String> = match of {
            Some(Value::Array(list)) => list.iter().map(ToString::to_string).collect(),
            Some(one) => vec![one.to_string()],
            None => Vec::new(),
        };
        words.sort();
        words
    }
    let principal = |v: &Value| set(v.get("Principal").map(|p| p.get("AWS").unwrap_or(p)));
    a.get("Sid") == b.get("Sid")
        && a.get("Effect") == b.get("Effect")
        && a.get("Condition").is_none()
        && principal(a) == principal(b)
        && ["Action", "Resource"].iter().all(|key| set(a.get(key)) == set(b.get(key)))
}

/// The policy with our Deny in it.
pub(crate) fn with_fence(text: Option<&str>, group: &GroupName, spec: &S3Spec) -> Result<String, BadPolicy> {
    let mut policy = parse(text)?;
    let mut list = statements(&policy)?;
    let sid = sid(group);
    list.retain(|s| !is_ours(s, &sid));
    list.push(fence(group, spec));
    policy.insert("Statement".into(), Value::Array(list));
    Ok(Value::Object(policy).to_string())
}

/// The policy without our Deny; none when nothing is left of it.
pub(crate) fn without_fence(text: Option<&str>, group: &GroupName) -> Result<Option<String>, BadPolicy> {
    let mut policy = parse(text)?;
    let mut list = statements(&policy)?;
    let sid = sid(group);
    list.retain(|s| !is_ours(s, &sid));
    if list.is_empty() {
        return Ok(None);
    }
    policy.insert("Statement".into(), Value::Array(list));
    Ok(Some(Value::Object(policy).to_string()))
}

fn words(of: Option<&Value>) -> Vec<String> {
    match of {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(Value::Object(map)) => map.values().flat_map(|v| words(Some(v))).collect(),
        _ => Vec::new(),
    }
}

/// Whether a pattern with `*` and `?` can name something that starts with `prefix`.
fn reaches(pattern: &str, prefix: &str) -> bool {
    let plain = pattern.split(['*', '?']).next().unwrap_or_default();
    if plain.len() == pattern.len() {
        plain.starts_with(prefix)
    } else {
        plain.starts_with(prefix) || prefix.starts_with(plain)
    }
}

/// Who else may write below the group's prefixes: principals that no fence of ours would stop.
pub(crate) fn strangers(text: Option<&str>, spec: &S3Spec, agent: &str) -> Result<Vec<String>, BadPolicy> {
    let prefixes =
        [&spec.dag_prefix, &spec.log_prefix].map(|prefix| format!("arn:aws:s3:::{}/{prefix}/", spec.bucket));
    let mut found = Vec::new();
    for statement in statements(&parse(text)?)? {
        let allows = statement.get("Effect").and_then(Value::as_str) == Some("Allow");
        let writes = words(statement.get("Action")).iter().any(|action| {
            ["s3:Put", "s3:Delete"].iter().any(|verb| reaches(&action.to_lowercase(), &verb.to_lowercase()))
        }) || statement.get("NotAction").is_some();
        let here = words(statement.get("Resource"))
            .iter()
            .any(|resource| prefixes.iter().any(|prefix| reaches(resource, prefix)))
            || statement.get("NotResource").is_some();
        if !(allows && writes && here) {
            continue;
        }
        if statement.get("NotPrincipal").is_some() {
            found.push("everyone but some (NotPrincipal)".to_owned());
        }
        for who in words(statement.get("Principal")) {
            if who != agent && !spec.writers.contains(&who) && !found.contains(&who) {
                found.push(who);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Result<(GroupName, S3Spec), Box<dyn std::error::Error>> {
        let spec = S3Spec {
            bucket: "b".into(),
            dag_prefix: "dags".into(),
            log_prefix: "logs".into(),
            writers: vec!["app".into(), "airflow".into()],
        };
        Ok((GroupName::new("my-orders")?, spec))
    }

    const OTHERS: &str = r#"{"Version":"2012-10-17","Id":"kept","Statement":[
        {"Sid":"Theirs","Effect":"Allow","Principal":{"AWS":["app"]},"Action":"s3:*","Resource":"arn:aws:s3:::b/*"}]}"#;

    #[test]
    fn a_fence_is_put_in_and_out_and_leaves_the_rest_as_it_was() -> Result<(), Box<dyn std::error::Error>> {
        let (group, spec) = parts()?;
        let fenced = with_fence(Some(OTHERS), &group, &spec)?;
        assert!(is_fenced(Some(&fenced), &group, &spec)? && !is_fenced(Some(OTHERS), &group, &spec)?);
        assert_eq!(with_fence(Some(&fenced), &group, &spec)?, fenced);
        let opened: Value = serde_json::from_str(&without_fence(Some(&fenced), &group)?.unwrap_or_default())?;
        assert_eq!(opened, serde_json::from_str::<Value>(OTHERS)?);
        Ok(())
    }

    #[test]
    fn a_policy_of_nothing_but_the_fence_goes_whole() -> Result<(), Box<dyn std::error::Error>> {
        let (group, spec) = parts()?;
        let fenced = with_fence(None, &group, &spec)?;
        assert_eq!(without_fence(Some(&fenced), &group)?, None);
        Ok(())
    }

    #[test]
    fn a_weakened_fence_is_no_fence() -> Result<(), Box<dyn std::error::Error>> {
        let (group, spec) = parts()?;
        let fenced = with_fence(None, &group, &spec)?;
        for (from, to) in [
            ("\"airflow\"", "\"nobody\""),
            ("s3:PutObject\"", "s3:GetObject\""),
            ("b/logs/*", "b/else/*"),
            ("\"Deny\"", "\"Allow\""),
        ] {
            let weaker = fenced.replacen(from, to, 1);
            assert_ne!(weaker, fenced, "{from}");
            assert!(!is_fenced(Some(&weaker), &group, &spec)?, "{from} to {to}");
        }
        Ok(())
    }

    #[test]
    fn names_those_whom_no_fence_would_stop() -> Result<(), Box<dyn std::error::Error>> {
        let (_, spec) = parts()?;
        let policy = r#"{"Statement":[
            {"Effect":"Allow","Principal":"*","Action":"s3:Get*","Resource":"arn:aws:s3:::b/*"},
            {"Effect":"Allow","Principal":{"AWS":["app","backup"]},"Action":["s3:P*"],"Resource":"arn:aws:s3:::b/*"},
            {"Effect":"Allow","Principal":{"AWS":"other"},"Action":"s3:*","Resource":"arn:aws:s3:::b/elsewhere/*"},
            {"Effect":"Allow","Principal":{"AWS":"dcagent"},"Action":"s3:*","Resource":"arn:aws:s3:::b/logs/x/*"}]}"#;
        assert_eq!(strangers(Some(policy), &spec, "dcagent")?, vec!["backup".to_owned()]);
        Ok(())
    }

    #[test]
    fn a_policy_that_is_no_policy_is_refused() -> Result<(), Box<dyn std::error::Error>> {
        let (group, spec) = parts()?;
        for bad in ["[]", "nonsense", r#"{"Statement":"x"}"#] {
            assert!(with_fence(Some(bad), &group, &spec).is_err(), "{bad}");
        }
        Ok(())
    }
}
