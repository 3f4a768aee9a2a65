//! What the agent shows of itself: status, health, metrics; each figure with its age.

use std::fmt::Write;
use std::time::Duration;

use dc_core::ids::{GroupName, PlaneKind, SiteId};
use dc_core::observe::Role;
use dc_core::registry::Registry;
use dc_core::time::millis;
use dc_core::view::{GroupView, PlaneView, QuorumView, SiteView, StatusView};

use crate::clock::wall;
use crate::control::Health;
use crate::{Agent, PERIOD};

/// A reading older than this is not called fresh.
const FRESH: Duration = Duration::from_secs(3);

impl Agent {
    pub(crate) fn look_around(&self) -> StatusView {
        let state = self.engine.state();
        let leadership = self.engine.leadership().borrow().clone();
        let quorum = QuorumView {
            voters: self.voters.len(),
            leader: leadership.leader,
            term: leadership.term,
            answering: leadership.quorum_ok,
        };
        StatusView {
            environment: self.environment.clone(),
            asked: self.me.clone(),
            wall: wall(),
            quorum,
            sites: self.voters.keys().map(|site| self.site_view(&state, site)).collect(),
            groups: state.groups.keys().filter_map(|name| self.group_view(&state, name)).collect(),
        }
    }

    fn site_view(&self, state: &Registry, site: &SiteId) -> SiteView {
        let mine = *site == self.me;
        let heard = self.peers.heard(site);
        let witness = !state.groups.is_empty() && state.groups.values().all(|g| !g.spec.sites.contains(site));
        SiteView {
            site: site.clone(),
            witness,
            heard_ms: if mine { Some(0) } else { heard.as_ref().map(|h| millis(h.at.elapsed())) },
            lease_ms: if mine { self.lease.left().map(millis) } else { None },
            version: if mine { Some(env!("CARGO_PKG_VERSION").into()) } else { heard.map(|h| h.version) },
        }
    }

    fn group_view(&self, state: &Registry, name: &GroupName) -> Option<GroupView> {
        let group = state.groups.get(name)?;
        let run = group.run.as_ref().and_then(|id| state.runs.get(id));
        let mut planes = Vec::new();
        for plane in group.spec.planes() {
            planes.extend(group.spec.sites.iter().map(|site| self.plane_view(site, name, plane)));
        }
        Some(GroupView {
            name: name.clone(),
            holder: group.holder.clone(),
            epoch: group.epoch,
            opened: group.opened,
            sites: group.spec.sites.clone(),
            release: group.release.clone(),
            run: group.run.clone(),
            attention: run.and_then(|r| r.attention.as_ref()).map(|t| format!("[{}] {}", t.code, t.text)),
            planes,
        })
    }

    fn plane_view(&self, site: &SiteId, group: &GroupName, plane: PlaneKind) -> PlaneView {
        let reading = self.shelf.reading(site, group, plane);
        PlaneView {
            plane,
            site: site.clone(),
            age_ms: reading.as_ref().map(|r| millis(r.at.elapsed())),
            facts: reading.map(|r| r.facts),
        }
    }

    pub(crate) fn health_now(&self) -> Health {
        let state = self.engine.state();
        let leader = self.engine.leadership().borrow().leader.clone();
        let ready = match leader {
            None => Err("no leader is known".into()),
            Some(_) => self.shelf.all_read(),
        };
        let holds = |name: &&GroupName| {
            state.groups.get(*name).is_some_and(|g| g.holder == self.me && g.opened) && !self.lease.closing()
        };
        let stands = |name: &&GroupName| {
            let Some(group) = state.groups.get(*name) else { return false };
            let here = group.spec.sites.contains(&self.me) && group.holder != self.me;
            here && group.spec.planes().into_iter().all(|plane| self.follows(name, plane))
        };
        Health {
            live: self.ticked.lock().elapsed() < PERIOD * 2,
            ready,
            active: state.groups.keys().filter(holds).cloned().collect(),
            standby: state.groups.keys().filter(stands).cloned().collect(),
            metrics: self.metrics(&state),
        }
    }

    fn follows(&self, group: &GroupName, plane: PlaneKind) -> bool {
        let reading = self.shelf.reading(&self.me, group, plane);
        reading.is_some_and(|r| r.at.elapsed() < FRESH && r.facts.role == Some(Role::Following))
    }

    /// Read at scrape time, so that what is gone disappears instead of freezing.
    fn metrics(&self, state: &Registry) -> String {
        let mut text = String::new();
        let site = &self.me;
        let leadership = self.engine.leadership().borrow().clone();
        let mut gauge = |name: &str, labels: &str, value: f64| {
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "dcswitch_{name}{{site=\"{site}\"{labels}}} {value}");
        };
        let yes = |it: bool| if it { 1.0 } else { 0.0 };
        gauge("quorum_is_leader", "", yes(leadership.me));
        gauge("quorum_answering", "", yes(leadership.quorum_ok));
        let quorum = self.engine.metrics();
        let mut commits = quorum.commits;
        commits.sort_unstable();
        for (quantile, at) in [("0.5", commits.len() / 2), ("0.99", commits.len() * 99 / 100)] {
            let Some(took) = commits.get(at) else { continue };
            gauge("quorum_commit_seconds", &format!(",quantile=\"{quantile}\""), took.as_secs_f64());
        }
        let (renewals, missed) = self.lease.renewals();
        #[allow(clippy::cast_precision_loss)] // a sample is a float by definition
        for (name, count) in [
            ("quorum_commits_total", quorum.commits_total),
            ("quorum_term", quorum.term),
            ("lease_renewals_total", renewals),
            ("lease_renewals_missed_total", missed),
        ] {
            gauge(name, "", count as f64);
        }
        gauge("lease_remaining_seconds", "", self.lease.left().map_or(0.0, |left| left.as_secs_f64()));
        for (name, group) in &state.groups {
            let label = format!(",group=\"{name}\"");
            gauge("group_is_holder", &label, yes(group.holder == self.me));
            gauge("group_is_opened", &label, yes(group.opened));
            gauge("group_run_open", &label, yes(group.run.is_some()));
            for plane in group.spec.planes() {
                let Some(reading) = self.shelf.reading(&self.me, name, plane) else { continue };
                let label = format!(",group=\"{name}\",plane=\"{plane}\"");
                gauge("plane_reading_age_seconds", &label, reading.at.elapsed().as_secs_f64());
                if let Some(lag) = reading.facts.lag {
                    #[allow(clippy::cast_precision_loss)] // a gauge is a float by definition
                    gauge(&format!("plane_lag_{}", lag.unit.word()), &label, lag.amount as f64);
                }
            }
        }
        text
    }
}
