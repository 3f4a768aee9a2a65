//! What goes on outside of runs: closing with the lease, keeping a standby a standby, looking at the holder.

use dc_core::act::{Act, Evidence, Outcome};
use dc_core::authority::Authority;
use dc_core::position::Grant;
use dc_plane::{Deadline, PlaneError};

use crate::connect::Status;
use crate::keep::Why;
use crate::{KafkaPlane, acl, opening};

impl KafkaPlane {
    /// Closes this site by itself: grants are on disk before they are taken, and the canary proves that they are.
    pub(super) async fn self_close(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let cluster = &self.half(&act.site)?.cluster;
        let bindings = acl::read(cluster, until).await?;
        let found = acl::allowed(&bindings).filter(|grant| self.moves(grant) && grant.resource == "topic");
        let recorded = act.grants().into_iter().flatten().filter(|grant| grant.resource == "topic");
        let all: Vec<Grant> =
            self.kept.add(Why::Closed, found.chain(recorded).cloned())?.into_iter().collect();
        self.shut(cluster, &all, until).await
    }

    /// Gives back what a self-fence took. Repeat: safe; without a self-fence there is nothing to give.
    pub(super) async fn reopen(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        let Some(kept) = self.kept.read(Why::Closed)? else {
            return Ok(Evidence::already(format!("{} did not close itself", act.site)));
        };
        let cluster = &self.half(&act.site)?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        if let Some(left) = self.left_over(cluster, &map, |grant| self.lets_mirror(grant), until).await? {
            let why = format!("the mirror may write where applications would: {left}");
            return Err(PlaneError::refused("DC-0407", why));
        }
        let grants: Vec<Grant> = kept.into_iter().collect();
        let evidence = self.let_in(cluster, &grants, until).await?;
        self.kept.forget(Why::Closed)?;
        Ok(evidence)
    }

    /// Keeps a standby one: a foreign WRITE, or an application's READ, is kept on disk, taken and told; a failed task
    /// of the mirror is started again. Never gives anything.
    pub(super) async fn stand(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let half = self.half(&act.site)?;
        let bindings = acl::read(&half.cluster, until).await?;
        let mut findings = Vec::new();
        let mut taken = Vec::new();
        for grant in acl::allowed(&bindings).filter(|grant| !self.lets_mirror(grant)) {
            let app = grant.resource == "topic" && self.moves(grant);
            if !app && !self.reaches(grant, "write") && *grant != self.canary_grant() {
                continue;
            }
            let shown = acl::show(grant);
            if grant.resource == "topic" && grant.name != "*" {
                let text = format!("{shown} at {}, the standby: taken", act.site);
                findings.push(Self::finding(&act.site, "DC-0420", false, text));
                taken.push(grant.clone());
            } else {
                let text = format!("{shown} at {}, the standby: too wide to take, a person must", act.site);
                findings.push(Self::finding(&act.site, "DC-0420", true, text));
            }
        }
        if !taken.is_empty() {
            self.kept.add(Why::Audited, taken.iter().cloned())?;
            acl::take(&half.cluster, &taken, until).await?;
        }
        let missing =
            self.mirror_grants().into_iter().filter(|g| !acl::allowed(&bindings).any(|known| known == g));
        for grant in missing {
            let text = format!("{} is missing at {}: the mirror cannot write", acl::show(&grant), act.site);
            findings.push(Self::finding(&act.site, "DC-0408", true, text));
        }
        let name = act.mirror().unwrap_or(&self.spec.mirror);
        let (restarted, shown) = self.keep_running(act, name, &mut findings, until).await?;
        let seen = format!("{} foreign grants taken; {name}: {shown}", taken.len());
        let changed = restarted || !taken.is_empty();
        let evidence = if changed { Evidence::changed(seen) } else { Evidence::already(seen) };
        Ok(if findings.is_empty() { evidence } else { evidence.with(Outcome::Findings(findings)) })
    }

    async fn keep_running(
        &self,
        act: &Act,
        name: &str,
        findings: &mut Vec<dc_core::act::Finding>,
        until: Deadline,
    ) -> Result<(bool, String), PlaneError> {
        let workers = &self.half(&act.site)?.workers;
        let Some(status) = workers.status(name, until).await? else {
            let text = format!("there is no connector {name} at the workers of {}", act.site);
            findings.push(Self::finding(&act.site, "DC-0408", true, text.clone()));
            return Ok((false, text));
        };
        let failed = status.has_failed();
        if failed {
            workers.restart_failed(name, until).await?;
            let text = format!("mirror {name} had failed and is started again: {}", status.show());
            findings.push(Self::finding(&act.site, "DC-0408", false, text));
        } else if !Status::runs(&status) {
            let text = format!("mirror {name} does not run: {}", status.show());
            findings.push(Self::finding(&act.site, "DC-0408", true, text));
        }
        Ok((failed, status.show()))
    }

    /// Looks at the holder: the mirror must not write there, or it would loop. Never gives anything.
    pub(super) async fn serve(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let cluster = &self.half(&act.site)?.cluster;
        let bindings = acl::read(cluster, until).await?;
        let writers = acl::allowed(&bindings).filter(|g| self.moves(g) && self.reaches(g, "write")).count();
        let wrong: Vec<Grant> =
            acl::allowed(&bindings).filter(|g| self.lets_mirror(g) && !acl::is_wide(g)).cloned().collect();
        let seen = format!("{writers} grants to write stand at {}", act.site);
        if wrong.is_empty() {
            return Ok(Evidence::already(seen));
        }
        self.kept.add(Why::Audited, wrong.iter().cloned())?;
        acl::take(cluster, &wrong, until).await?;
        let told = wrong.iter().map(|grant| {
            let text = format!("{} at {}, the holder: taken", acl::show(grant), act.site);
            Self::finding(&act.site, "DC-0420", false, text)
        });
        let findings = told.collect();
        Ok(Evidence::changed(format!("{seen}; {} of the mirror taken", wrong.len()))
            .with(Outcome::Findings(findings)))
    }
}
