//! Every check before a move, at either site: all findings at once, nothing changed.
//!
//! What is written is one record of the canary to its own topic, for a mirror's progress is judged by what it
//! carries and not by what its worker says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dc_core::act::{Act, Evidence, Finding, KafkaAct, Outcome};
use dc_core::ids::SiteId;
use dc_core::position::Grant;
use dc_plane::{Deadline, PlaneError};

use crate::acl::{self, Binding};
use crate::canary::{self, Verdict};
use crate::cluster::{Cluster, Map, Tp, Who};
use crate::log::{self, End};
use crate::{KafkaPlane, groups, mirror};

/// How long a running mirror may take for one canary record; in a healthy pair it takes a fraction of a second.
const PROGRESS_WITHIN: Duration = Duration::from_secs(8);

/// What was read of a cluster at the start of the checks.
struct View {
    map: Arc<Map>,
    bindings: BTreeSet<Binding>,
}

/// Findings as they are collected.
#[derive(Default)]
struct Found {
    all: parking_lot::Mutex<Vec<Finding>>,
}

impl Found {
    fn add(&self, site: &SiteId, code: &str, blocking: bool, text: impl Into<String>) {
        self.all.lock().push(KafkaPlane::finding(site, code, blocking, text));
    }
    /// A check that could not be made is a finding too.
    fn of<T>(&self, site: &SiteId, code: &str, result: Result<T, PlaneError>) -> Option<T> {
        result.map_err(|e| self.add(site, code, true, e.to_string())).ok()
    }
}

impl KafkaPlane {
    pub(super) async fn check(
        &self,
        name: KafkaAct,
        act: &Act,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let found = Found::default();
        // Checks must answer, with findings, before the act's own deadline takes the word from them.
        let limit = Deadline::within(until.left().saturating_sub(Duration::from_millis(500)));
        let (source, target) = (self.source(act)?, self.target(act)?);
        let (at_source, at_target) =
            tokio::join!(self.view(&source.cluster, limit), self.view(&target.cluster, limit));
        let at_source = found.of(&act.source, "DC-0401", at_source);
        let at_target = found.of(&act.target, "DC-0401", at_target);
        if act.site == act.source {
            if let Some(view) = &at_source {
                self.common(&found, &source.cluster, view, limit).await;
                self.holder_grants(&found, &source.cluster, view, act, limit).await;
            }
            if let (Some(s), Some(t)) = (&at_source, &at_target) {
                self.parity(&found, act, s, t, limit).await;
            }
        } else {
            if let Some(view) = &at_target {
                self.common(&found, &target.cluster, view, limit).await;
                self.standby_grants(&found, &act.target, view);
            }
            if let (Some(s), Some(t)) = (&at_source, &at_target) {
                tokio::join!(self.mirror(&found, act, s, limit), self.group_checks(&found, act, s, t, limit));
            }
        }
        let all = found.all.into_inner();
        let blocking = all.iter().filter(|finding| finding.blocking).count();
        let seen =
            format!("{} at {}: {} findings, {blocking} of them blocking", name.word(), act.site, all.len());
        Ok(Evidence::already(seen).with(Outcome::Findings(all)))
    }

    async fn view(&self, cluster: &Cluster, until: Deadline) -> Result<View, PlaneError> {
        let carried = self.carried();
        let (map, bindings) = futures::try_join!(cluster.map(&carried, until), acl::read(cluster, until))?;
        Ok(View { map, bindings })
    }

    /// What must hold at both sites.
    async fn common(&self, found: &Found, cluster: &Cluster, view: &View, until: Deadline) {
        let site = &cluster.site;
        for (topic, why) in &view.map.missing {
            let code = if *topic == self.canary_topic { "DC-0413" } else { "DC-0403" };
            found.add(site, code, true, format!("topic {topic} cannot be seen at {site}: {why}"));
        }
        self.leaders(found, site, &view.map);
        self.own_grants(found, site, view);
        let seen: BTreeSet<&str> =
            self.topics().into_iter().filter(|topic| !view.map.missing.contains_key(*topic)).collect();
        for (who, user) in [(Who::Agent, &self.config.user), (Who::Canary, &self.config.canary_user)] {
            let tried = canary::try_write(cluster, &view.map, who, &seen, until).await;
            let Some(tried) = found.of(site, "DC-0402", tried) else { continue };
            if let Some((tp, verdict)) = tried.iter().find(|(_, verdict)| **verdict != Verdict::Denied) {
                let text = format!(
                    "{user} tried to write to {}/{} at {site}, which it has no grant for, and was not denied ({verdict:?}): \
                     no authorizer, everyone allowed, or a super user",
                    tp.0, tp.1
                );
                found.add(site, "DC-0402", true, text);
            }
        }
    }

    fn leaders(&self, found: &Found, site: &SiteId, map: &Map) {
        let of_canary = map.leaders.iter().filter(|(tp, _)| tp.0 == self.canary_topic);
        let led: BTreeSet<i32> = of_canary.map(|(_, leader)| *leader).collect();
        let without: Vec<i32> = map.brokers.keys().filter(|broker| !led.contains(broker)).copied().collect();
        if !without.is_empty() && !map.missing.contains_key(&self.canary_topic) {
            let text = format!(
                "{} has no leader on broker {without:?} of {site}; a fence there could not be proved",
                self.canary_topic
            );
            found.add(site, "DC-0413", true, text);
        }
        for (tp, leader) in map.leaders.iter().filter(|(_, leader)| **leader < 0) {
            found.add(site, "DC-0416", true, format!("{}/{} has no leader at {site} ({leader})", tp.0, tp.1));
        }
        let thin = map.replicas.iter().filter(|(_, (in_sync, all))| in_sync < all).count();
        if thin > 0 {
            found.add(
                site,
                "DC-0416",
                false,
                format!("{thin} partitions at {site} have replicas out of sync"),
            );
        }
    }

    /// A missing DESCRIBE or READ of our own is silent where it hurts: rows are not there, without an error.
    fn own_grants(&self, found: &Found, site: &SiteId, view: &View) {
        let own = acl::principal(&self.config.user);
        let has = |resource: &str, name: &str, operation: &str| {
            acl::allowed(&view.bindings)
                .any(|grant| grant.principal == own && acl::covers(grant, resource, name, operation))
        };
        let mut lacking = Vec::new();
        if !has("cluster", "kafka-cluster", "alter") {
            lacking.push("ALTER on the cluster".to_owned());
        }
        let topics = self.carried().into_iter().chain([self.config.offsets_topic.as_str()]);
        lacking.extend(topics.filter(|t| !has("topic", t, "read")).map(|t| format!("READ on topic {t}")));
        let groups = self.spec.groups.iter().filter(|group| !has("group", group, "read"));
        lacking.extend(groups.map(|group| format!("READ on group {group}")));
        if !lacking.is_empty() {
            found.add(
                site,
                "DC-0414",
                true,
                format!("{} lacks at {site}: {}", self.config.user, lacking.join(", ")),
            );
        }
    }

    /// Who may write at the holder: producers by grants of their own, and nobody else.
    async fn holder_grants(&self, found: &Found, cluster: &Cluster, view: &View, act: &Act, until: Deadline) {
        let site = &cluster.site;
        let canary = self.canary_grant();
        if !acl::allowed(&view.bindings).any(|grant| *grant == canary) {
            found.add(
                site,
                "DC-0413",
                true,
                format!("{} is missing at {site}, the holder", acl::show(&canary)),
            );
        }
        let every = if acl::allowed(&view.bindings).any(|grant| self.moves(grant) && grant.prefixed) {
            found.of(site, "DC-0405", cluster.topic_names(until).await).unwrap_or_default()
        } else {
            BTreeSet::new()
        };
        for grant in acl::allowed(&view.bindings) {
            let shown = acl::show(grant);
            if self.lets_mirror(grant) {
                let text = format!("the mirror may write at {site}, the holder: {shown}");
                found.add(site, "DC-0407", true, text);
            } else if self.moves(grant) && grant.resource == "topic" {
                self.width(found, site, grant, &every);
            } else if self.reaches(grant, "write") {
                let text =
                    format!("{shown}: not a producer of {}, and its writes would not be fenced", self.group);
                found.add(site, "DC-0406", true, text);
            } else if self.is_producer(grant) && grant.resource == "topic" && grant.operation == "write" {
                found.add(
                    site,
                    "DC-0417",
                    false,
                    format!("{shown}: outside {}, not fenced with it", self.group),
                );
            }
        }
        for user in &self.spec.producers {
            let who = acl::principal(user);
            let idempotent = acl::allowed(&view.bindings).any(|grant| {
                grant.principal == who && acl::covers(grant, "cluster", "kafka-cluster", "idempotent_write")
            });
            if !idempotent {
                let text =
                    format!("{user} has no IDEMPOTENT_WRITE at {site}: a producer started in the fence dies");
                found.add(site, "DC-0417", false, text);
            }
        }
        self.record_agrees(found, site, view, act);
    }

    fn is_producer(&self, grant: &Grant) -> bool {
        self.spec.producers.iter().any(|user| acl::principal(user) == grant.principal)
    }

    fn width(&self, found: &Found, site: &SiteId, grant: &Grant, every: &BTreeSet<String>) {
        let own = self.topics();
        let beyond = every
            .iter()
            .find(|name| grant.prefixed && name.starts_with(&grant.name) && !own.contains(name.as_str()));
        if grant.name == "*" && !grant.prefixed {
            found.add(site, "DC-0405", true, format!("{} reaches every topic of {site}", acl::show(grant)));
        } else if let Some(beyond) = beyond {
            let text =
                format!("{} reaches {beyond} too, which {} does not own", acl::show(grant), self.group);
            found.add(site, "DC-0405", true, text);
        }
    }

    /// What a run has recorded must still be all there is.
    fn record_agrees(&self, found: &Found, site: &SiteId, view: &View, act: &Act) {
        let now: Vec<&Grant> = acl::allowed(&view.bindings).filter(|grant| self.moves(grant)).collect();
        let Some(recorded) = act.grants() else {
            if !self.spec.producers.is_empty() && !now.iter().any(|grant| self.reaches(grant, "write")) {
                let text = format!("no producer of {} has a grant to write at {site}", self.group);
                found.add(site, "DC-0415", true, text);
            }
            return;
        };
        for grant in now.into_iter().filter(|grant| !recorded.contains(grant)) {
            let text = format!("{} at {site} is not among the recorded grants", acl::show(grant));
            found.add(site, "DC-0415", true, text);
        }
        for grant in
            recorded.iter().filter(|grant| !acl::allowed(&view.bindings).any(|known| known == *grant))
        {
            let text =
                format!("{} is recorded and missing at {site}; it will be given again", acl::show(grant));
            found.add(site, "DC-0415", false, text);
        }
    }

    /// Who may write at the standby: the mirror, and nobody else; no application reads there.
    fn standby_grants(&self, found: &Found, site: &SiteId, view: &View) {
        let wanted = self.mirror_grants();
        for grant in &wanted {
            if !acl::allowed(&view.bindings).any(|known| known == grant) {
                found.add(
                    site,
                    "DC-0408",
                    true,
                    format!("{} is missing at {site}, the standby", acl::show(grant)),
                );
            }
        }
        for grant in acl::allowed(&view.bindings) {
            let shown = acl::show(grant);
            if self.lets_mirror(grant) {
                if !wanted.contains(grant) {
                    let text =
                        format!("{shown} at {site} reaches further than a fence of the mirror would take");
                    found.add(site, "DC-0405", true, text);
                }
            } else if *grant == self.canary_grant() || self.reaches(grant, "write") || self.moves(grant) {
                found.add(site, "DC-0407", true, format!("{shown} at {site}, the standby"));
            }
        }
    }

    /// Topics are at both sites, with as many partitions and equal settings.
    async fn parity(&self, found: &Found, act: &Act, at_source: &View, at_target: &View, until: Deadline) {
        let count = |view: &View, topic: &str| view.map.leaders.keys().filter(|tp| tp.0 == topic).count();
        let mut both = BTreeSet::new();
        for topic in self.carried() {
            let (here, there) = (count(at_source, topic), count(at_target, topic));
            if here > 0 && there > 0 {
                both.insert(topic);
            }
            if here != there {
                let text = format!(
                    "topic {topic} has {here} partitions at {}, {there} at {}",
                    act.source, act.target
                );
                found.add(&act.source, "DC-0403", true, text);
            }
        }
        let (Ok(source), Ok(target)) = (self.source(act), self.target(act)) else { return };
        let read = futures::try_join!(
            source.cluster.topic_settings(&both, until),
            target.cluster.topic_settings(&both, until)
        );
        let Some((here, there)) = found.of(&act.source, "DC-0404", read) else { return };
        for topic in both {
            let empty = BTreeMap::new();
            let (a, b) = (here.get(topic).unwrap_or(&empty), there.get(topic).unwrap_or(&empty));
            for (key, blocking) in crate::cluster::SETTINGS {
                let (x, y) = (a.get(key), b.get(key));
                if x != y {
                    let text = format!("{topic}: {key} is {x:?} at {}, {y:?} at {}", act.source, act.target);
                    found.add(&act.source, "DC-0404", blocking, text);
                }
            }
            if a.get("cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
                let text = format!(
                    "{topic} is compacted: a group far behind may not be translated, which refuses the move"
                );
                found.add(&act.source, "DC-0404", false, text);
            }
            if [a, b].iter().any(|s| s.get("message.timestamp.type").is_some_and(|t| t == "LogAppendTime")) {
                let text = format!(
                    "{topic}: message.timestamp.type LogAppendTime makes records of the two sites differ"
                );
                found.add(&act.source, "DC-0404", true, text);
            }
        }
    }

    /// The mirror that carries the holder's topics: its settings, its state, its progress, its lag.
    async fn mirror(&self, found: &Found, act: &Act, s: &View, until: Deadline) {
        let (Ok(source), Ok(target)) = (self.source(act), self.target(act)) else { return };
        let name = act.mirror().unwrap_or(&self.spec.mirror);
        let site = &act.target;
        let read =
            futures::try_join!(target.workers.status(name, until), target.workers.settings(name, until));
        match found.of(site, "DC-0423", read) {
            None => return,
            Some((Some(status), Some(settings))) => {
                let (wrong, slow) = mirror::faults(&settings, &self.carried());
                for (texts, blocking) in [(wrong, true), (slow, false)] {
                    for text in texts {
                        found.add(site, "DC-0408", blocking, format!("mirror {name}: {text}"));
                    }
                }
                if !status.runs() {
                    found.add(
                        site,
                        "DC-0408",
                        true,
                        format!("mirror {name} does not run: {}", status.show()),
                    );
                    return;
                }
            }
            Some(_) => {
                found.add(
                    site,
                    "DC-0408",
                    true,
                    format!("there is no connector {name} at the workers of {site}"),
                );
                return;
            }
        }
        if let Some(lag) = found.of(site, "DC-0409", self.lag(source, target, name, until).await) {
            let limit = self.policy.lag_records_max;
            if lag > limit {
                let text =
                    format!("kafka lags at most {lag} records, limit {limit} (policy.lag_records_max)");
                found.add(site, "DC-0207", true, text);
            }
        }
        if s.map.missing.contains_key(&self.canary_topic) {
            return;
        }
        let soon = Deadline::within(PROGRESS_WITHIN.min(until.left()));
        if let Err(e) = self.carry_canary(&source.cluster, &target.cluster, soon).await {
            let text = format!("mirror {name} says it runs and did not carry a canary record: {e}");
            found.add(site, "DC-0409", true, text);
        }
    }

    /// Records that the mirror has not carried yet, at most: markers and aborted data count too.
    pub(super) async fn lag(
        &self,
        source: &crate::Half,
        target: &crate::Half,
        mirror: &str,
        until: Deadline,
    ) -> Result<u64, PlaneError> {
        let topics = self.topics();
        let map = source.cluster.full_map(&topics, until).await?;
        let (ends, starts, carried) = futures::try_join!(
            log::ends(&source.cluster, &map, &topics, End::Stable, until),
            log::ends(&source.cluster, &map, &topics, End::Start, until),
            target.tail.positions(&target.cluster, &self.config.offsets_topic, mirror, until)
        )?;
        Ok(behind(&ends, &starts, &carried))
    }

    /// Groups: nobody in them at the target, near enough to their end, and nothing known there that is not here.
    async fn group_checks(&self, found: &Found, act: &Act, s: &View, t: &View, until: Deadline) {
        let (Ok(source), Ok(target)) = (self.source(act), self.target(act)) else { return };
        let (groups, topics) = (&self.spec.groups, self.topics());
        let read = futures::try_join!(
            groups::active(&target.cluster, &t.map, groups, until),
            groups::positions(&source.cluster, &s.map, groups, until),
            groups::positions(&target.cluster, &t.map, groups, until),
            log::ends(&source.cluster, &s.map, &topics, End::Stable, until),
            log::ends(&source.cluster, &s.map, &topics, End::Start, until)
        );
        let Some((active, here, there, ends, starts)) = found.of(&act.target, "DC-0412", read) else {
            return;
        };
        for (group, state) in active {
            let text = format!("group {group} is active at {}, the standby ({state})", act.target);
            found.add(&act.target, "DC-0411", true, text);
        }
        for group in groups {
            let none = BTreeMap::new();
            let (here, there) = (here.get(group).unwrap_or(&none), there.get(group).unwrap_or(&none));
            let own = |tp: &Tp| self.spec.topics.contains(&tp.0);
            if !here.keys().any(own) {
                let text = format!("group {group} has no position at {}", act.source);
                found.add(&act.target, "DC-0412", false, text);
            }
            for (tp, at) in there.iter().filter(|(tp, _)| own(tp) && !here.contains_key(*tp)) {
                let text = format!(
                    "group {group} stands at {at} of {}/{} at {}, and has no position at {}: it would go on from there",
                    tp.0, tp.1, act.target, act.source
                );
                found.add(&act.target, "DC-0412", true, text);
            }
            for (tp, at) in here.iter().filter(|(tp, _)| own(tp)) {
                let first = starts.get(tp).copied().unwrap_or(0);
                let left = ends.get(tp).copied().unwrap_or(0) - (*at).max(first);
                if usize::try_from(left).is_ok_and(|left| left > super::offsets::LEFT_MAX) {
                    let text = format!(
                        "group {group} is {left} offsets behind in {}/{}, more than {} cannot be translated within an outage",
                        tp.0,
                        tp.1,
                        super::offsets::LEFT_MAX
                    );
                    found.add(&act.target, "DC-0412", true, text);
                }
            }
        }
    }
}

/// Offsets between what was carried and the end, summed.
fn behind(ends: &BTreeMap<Tp, i64>, starts: &BTreeMap<Tp, i64>, carried: &BTreeMap<Tp, i64>) -> u64 {
    let of = |(tp, end): (&Tp, &i64)| {
        let first = starts.get(tp).copied().unwrap_or(0);
        let next = carried.get(tp).map_or(first, |at| (at + 1).max(first));
        u64::try_from(end - next).unwrap_or(0)
    };
    ends.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_counts_from_what_was_carried_or_from_where_the_log_begins() {
        let tp = |p: i32| ("t".to_owned(), p);
        let ends = BTreeMap::from([(tp(0), 10), (tp(1), 10), (tp(2), 10)]);
        let starts = BTreeMap::from([(tp(0), 0), (tp(1), 4), (tp(2), 8)]);
        let carried = BTreeMap::from([(tp(0), 9), (tp(2), 3)]);
        assert_eq!(behind(&ends, &starts, &carried), 6 + 2);
    }
}
