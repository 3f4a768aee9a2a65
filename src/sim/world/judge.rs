//! The laws, looked at in each tick and at the end.

use std::collections::BTreeMap;

use dc_core::ids::SiteId;
use dc_core::invariant::{self, Marks, PlaneSight, Sight, SiteSight};
use dc_core::run::Status;

use super::World;

/// Ticks that an agent has to react once it runs again: nothing fences a host that stands
/// still, or whose agent is dead, before the layers that come with the guardian.
const REACTS: u64 = 60;

impl World {
    /// Whether another voter could take a site's groups away by its own clock, while the
    /// site's agent runs: the timer is over, and the renewal it was started by is the newest.
    fn lapsed(&self, site: &SiteId) -> bool {
        let Some(host) = self.hosts.get(site) else { return false };
        let since = self.runs_since.get(site).copied().unwrap_or(0);
        if host.agent.is_none() || host.frozen_until > self.tick || since + REACTS > self.tick {
            return false;
        }
        let newest = self.log.truth.sites.get(site).copied();
        self.hosts.values().filter(|h| h.site != *site && h.frozen_until <= self.tick).any(|voter| {
            let now = voter.now(self.tick);
            let over = voter.agent.as_ref().and_then(|a| a.book.watch().expired(site, now, &self.profile));
            over.is_some() && over == newest
        })
    }

    /// Looks at every law.
    pub(super) fn look(&mut self) {
        self.looked += 1;
        let group = self.fakes.lock();
        let mut sites: BTreeMap<&SiteId, SiteSight<'_>> = BTreeMap::new();
        for (site, plane, here) in group.all() {
            let frozen = self.hosts.get(site).is_some_and(|h| h.frozen_until > self.tick);
            let sight = sites.entry(site).or_insert_with(|| SiteSight {
                site: site.clone(),
                lapsed: self.lapsed(site),
                planes: Vec::new(),
            });
            sight.planes.push(PlaneSight {
                plane,
                writable: here.writable() && !frozen,
                shut: &here.shut,
                token: here.token,
                grants: &here.grants,
                kept: &here.kept,
            });
        }
        let sight = Sight {
            registry: &self.log.truth,
            group: &self.group,
            sites: sites.into_values().collect(),
            acknowledged: &group.acknowledged,
            grants: &group.grants,
        };
        let found = invariant::check(&self.marks, &sight);
        self.marks = Marks::of(&sight);
        self.violations.extend(found.iter().map(|v| format!("tick {}: {v}", self.tick)));
        drop(group);
        self.violations.extend(self.unremembered());
    }

    /// L4: what a plane began stands in its agent's memory on disk, or the disk was lost since.
    fn unremembered(&self) -> Option<String> {
        let group = self.fakes.lock();
        group.all().find_map(|(site, plane, here)| {
            let host = self.hosts.get(site)?;
            let known = host.disk.tokens.get(&plane).copied().unwrap_or_default().max(host.forgot);
            (here.token > known).then(|| {
                format!(
                    "tick {}: tokens_remembered: {plane} at {site} began {}, its agent's disk knows {known}",
                    self.tick, here.token
                )
            })
        })
    }

    /// Everything must have ended, in words or in deed, and the holder must serve.
    pub(super) fn judge_the_end(&mut self) {
        for run in self.log.truth.open_runs() {
            let steps: Vec<String> = run
                .steps
                .iter()
                .filter(|s| !s.done() && s.status != Status::Waiting)
                .map(|s| format!("{} {:?}", s.plan.act, s.status))
                .collect();
            self.violations.push(format!(
                "does_not_end: run {} is open after {} ticks: aborting {:?}, attention {:?}, {steps:?}",
                run.id, self.tick, run.aborting, run.attention
            ));
        }
        if !self.operator.is_done() {
            self.violations.push(format!("does_not_end: {:?} was never begun", self.operator.run()));
        }
        let Some(group) = self.log.truth.groups.get(&self.group) else { return };
        let state = self.fakes.lock();
        for (site, plane, here) in state.all().filter(|(site, ..)| **site == group.holder) {
            if !here.writable() {
                self.violations.push(format!("does_not_serve: {plane} at {site}: {here:?}"));
            }
        }
        if !self.log.truth.audit.unbroken() {
            self.violations.push("the audit's chain is broken".into());
        }
    }
}
