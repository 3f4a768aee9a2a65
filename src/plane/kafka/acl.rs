//! Grants: which bindings let whom write or read the group's topics, and how they are taken and given.
//!
//! A `None` in a filter of `DeleteAcls` means "any" and would take foreign grants; every filter made here is exact in
//! all its seven parts. DENY bindings are read and shown, never made.

use std::collections::{BTreeMap, BTreeSet};

use dc_core::position::Grant;
use dc_plane::{Deadline, PlaneError};
use kafka_protocol::messages::create_acls_request::AclCreation;
use kafka_protocol::messages::delete_acls_request::DeleteAclsFilter;
use kafka_protocol::messages::{
    CreateAclsRequest, DeleteAclsRequest, DescribeAclsRequest, DescribeAclsResponse,
};

use crate::cluster::{Cluster, Map, Who, failed};
use crate::wire::{text, words};

const ANY: i8 = 1;
const LITERAL: i8 = 3;
const PREFIXED: i8 = 4;
const DENY: i8 = 2;
const ALLOW: i8 = 3;

const RESOURCES: [(i8, &str); 6] = [
    (2, "topic"),
    (3, "group"),
    (4, "cluster"),
    (5, "transactional_id"),
    (6, "delegation_token"),
    (7, "user"),
];
const OPERATIONS: [(i8, &str); 14] = [
    (2, "all"),
    (3, "read"),
    (4, "write"),
    (5, "create"),
    (6, "delete"),
    (7, "alter"),
    (8, "describe"),
    (9, "cluster_action"),
    (10, "describe_configs"),
    (11, "alter_configs"),
    (12, "idempotent_write"),
    (13, "create_tokens"),
    (14, "describe_tokens"),
    (15, "two_phase_commit"),
];

fn word(table: &[(i8, &str)], code: i8) -> String {
    table.iter().find(|(c, _)| *c == code).map_or_else(|| format!("code-{code}"), |(_, w)| (*w).to_owned())
}
fn code(table: &[(i8, &str)], word: &str) -> Result<i8, PlaneError> {
    let found = table.iter().find(|(_, w)| *w == word).map(|(c, _)| *c);
    found.ok_or_else(|| failed("read a grant", format!("{word:?} is no word of Kafka's")))
}

/// A binding as it stands in a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Binding {
    /// What it says.
    pub grant: Grant,
    /// DENY instead of ALLOW.
    pub deny: bool,
}

/// `User:NAME`.
pub fn principal(user: &str) -> String {
    format!("User:{user}")
}

/// A literal grant on a topic for any host.
pub fn on_topic(user: &str, topic: &str, operation: &str) -> Grant {
    Grant {
        principal: principal(user),
        resource: "topic".to_owned(),
        name: topic.to_owned(),
        prefixed: false,
        operation: operation.to_owned(),
        host: "*".to_owned(),
    }
}

/// Whether a grant lets its principal do `operation` on that thing; ALL counts as every operation.
pub fn covers(grant: &Grant, resource: &str, name: &str, operation: &str) -> bool {
    let fits =
        if grant.prefixed { name.starts_with(&grant.name) } else { grant.name == name || grant.name == "*" };
    fits && grant.resource == resource && (grant.operation == operation || grant.operation == "all")
}

/// Whether it reaches things beyond one name.
pub fn is_wide(grant: &Grant) -> bool {
    grant.prefixed || grant.name == "*"
}

/// A grant in words.
pub fn show(grant: &Grant) -> String {
    let star = if grant.prefixed { "*" } else { "" };
    let host = if grant.host == "*" { String::new() } else { format!(" from {}", grant.host) };
    format!("{} {} {} {}{star}{host}", grant.principal, grant.operation, grant.resource, grant.name)
}

fn everything() -> DescribeAclsRequest {
    // The struct's defaults are wrong for "all": type UNKNOWN, an empty name, LITERAL.
    DescribeAclsRequest::default()
        .with_resource_type_filter(ANY)
        .with_resource_name_filter(None)
        .with_pattern_type_filter(ANY)
        .with_principal_filter(None)
        .with_host_filter(None)
        .with_operation(ANY)
        .with_permission_type(ANY)
}

fn bindings(answer: &DescribeAclsResponse) -> Result<BTreeSet<Binding>, PlaneError> {
    if answer.error_code != 0 {
        return Err(failed("read grants", words(answer.error_code)));
    }
    let mut found = BTreeSet::new();
    for resource in &answer.resources {
        for acl in &resource.acls {
            found.insert(Binding {
                grant: Grant {
                    principal: acl.principal.to_string(),
                    resource: word(&RESOURCES, resource.resource_type),
                    name: resource.resource_name.to_string(),
                    prefixed: resource.pattern_type == PREFIXED,
                    operation: word(&OPERATIONS, acl.operation),
                    host: acl.host.to_string(),
                },
                deny: acl.permission_type == DENY,
            });
        }
    }
    Ok(found)
}

/// Every binding of the cluster, as one broker sees them.
pub async fn read(cluster: &Cluster, until: Deadline) -> Result<BTreeSet<Binding>, PlaneError> {
    bindings(&cluster.anywhere(Who::Agent, &everything(), until).await?)
}

/// Every binding as *each* broker enforces it: a broker answers from what its own authorizer has applied.
pub async fn read_everywhere(
    cluster: &Cluster,
    map: &Map,
    until: Deadline,
) -> Result<BTreeMap<i32, BTreeSet<Binding>>, PlaneError> {
    let answers = cluster.everywhere(map, Who::Agent, &everything(), until).await?;
    answers.iter().map(|(broker, answer)| Ok((*broker, bindings(answer)?))).collect()
}

/// The ALLOW grants among bindings.
pub fn allowed(bindings: &BTreeSet<Binding>) -> impl Iterator<Item = &Grant> {
    bindings.iter().filter(|b| !b.deny).map(|b| &b.grant)
}

/// Takes grants, in the order given. Returns how many were there. Repeat: safe, takes nothing more.
///
/// Errors: `Failed` naming the first one that was not taken; those before it may be gone.
pub async fn take(cluster: &Cluster, grants: &[Grant], until: Deadline) -> Result<usize, PlaneError> {
    if grants.is_empty() {
        return Ok(0);
    }
    let ask = DeleteAclsRequest::default().with_filters(grants.iter().map(exact).collect::<Result<_, _>>()?);
    let answer = cluster.anywhere(Who::Agent, &ask, until).await?;
    if answer.filter_results.len() != grants.len() {
        return Err(failed("take grants", format!("{} answers", answer.filter_results.len())));
    }
    let mut taken = 0;
    for (grant, result) in grants.iter().zip(&answer.filter_results) {
        let wrong =
            result.matching_acls.iter().map(|m| m.error_code).chain([result.error_code]).find(|c| *c != 0);
        if let Some(wrong) = wrong {
            return Err(failed("take a grant", format!("{}: {}", show(grant), words(wrong))));
        }
        taken += result.matching_acls.len();
    }
    Ok(taken)
}

/// Gives grants. Repeat: safe.
///
/// Errors: `Failed` naming the first one that was refused.
pub async fn give(cluster: &Cluster, grants: &[Grant], until: Deadline) -> Result<(), PlaneError> {
    if grants.is_empty() {
        return Ok(());
    }
    let made = grants.iter().map(creation).collect::<Result<_, _>>()?;
    let answer =
        cluster.anywhere(Who::Agent, &CreateAclsRequest::default().with_creations(made), until).await?;
    if answer.results.len() != grants.len() {
        return Err(failed("give grants", format!("{} answers", answer.results.len())));
    }
    match grants.iter().zip(&answer.results).find(|(_, result)| result.error_code != 0) {
        Some((grant, result)) => {
            Err(failed("give a grant", format!("{}: {}", show(grant), words(result.error_code))))
        }
        None => Ok(()),
    }
}

fn pattern(grant: &Grant) -> i8 {
    if grant.prefixed { PREFIXED } else { LITERAL }
}

fn exact(grant: &Grant) -> Result<DeleteAclsFilter, PlaneError> {
    Ok(DeleteAclsFilter::default()
        .with_resource_type_filter(code(&RESOURCES, &grant.resource)?)
        .with_resource_name_filter(Some(text(&grant.name)))
        .with_pattern_type_filter(pattern(grant))
        .with_principal_filter(Some(text(&grant.principal)))
        .with_host_filter(Some(text(&grant.host)))
        .with_operation(code(&OPERATIONS, &grant.operation)?)
        .with_permission_type(ALLOW))
}

fn creation(grant: &Grant) -> Result<AclCreation, PlaneError> {
    Ok(AclCreation::default()
        .with_resource_type(code(&RESOURCES, &grant.resource)?)
        .with_resource_name(text(&grant.name))
        .with_resource_pattern_type(pattern(grant))
        .with_principal(text(&grant.principal))
        .with_host(text(&grant.host))
        .with_operation(code(&OPERATIONS, &grant.operation)?)
        .with_permission_type(ALLOW))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_exact_in_all_seven_parts() {
        let grant = on_topic("app", "orders", "write");
        let Ok(filter) = exact(&grant) else { panic!("a good grant") };
        assert_eq!((filter.resource_type_filter, filter.pattern_type_filter), (2, LITERAL));
        assert_eq!((filter.operation, filter.permission_type), (4, ALLOW));
        assert_eq!(filter.resource_name_filter.as_deref(), Some("orders"));
        assert_eq!(filter.principal_filter.as_deref(), Some("User:app"));
        assert_eq!(filter.host_filter.as_deref(), Some("*"));
    }

    #[test]
    fn refuses_a_grant_in_words_that_kafka_does_not_have_rather_than_meaning_any() {
        let mut grant = on_topic("app", "orders", "any");
        assert!(exact(&grant).is_err() && creation(&grant).is_err());
        grant.operation = "write".into();
        grant.resource = String::new();
        assert!(exact(&grant).is_err());
    }

    #[test]
    fn all_and_prefixes_and_the_star_cover_a_write() {
        let mut grant = on_topic("app", "ord", "write");
        assert!(!covers(&grant, "topic", "orders", "write"));
        grant.prefixed = true;
        assert!(covers(&grant, "topic", "orders", "write") && is_wide(&grant));
        grant.prefixed = false;
        grant.name = "*".into();
        assert!(covers(&grant, "topic", "orders", "write"));
        grant.operation = "all".into();
        assert!(covers(&grant, "topic", "orders", "write") && covers(&grant, "topic", "orders", "read"));
        assert!(!covers(&grant, "group", "orders", "read"));
        grant.operation = "describe".into();
        assert!(!covers(&grant, "topic", "orders", "write"));
    }

    #[test]
    fn every_word_has_one_code_and_every_code_one_word() {
        for (table, len) in [(&RESOURCES[..], 6), (&OPERATIONS[..], 14)] {
            let codes: BTreeSet<i8> = table.iter().map(|(c, _)| *c).collect();
            let words: BTreeSet<&str> = table.iter().map(|(_, w)| *w).collect();
            assert_eq!((codes.len(), words.len()), (len, len));
            assert!(table.iter().all(|(c, w)| code(table, w) == Ok(*c) && word(table, *c) == *w));
        }
    }
}
