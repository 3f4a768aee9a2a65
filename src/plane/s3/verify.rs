//! After a move: a canary that crosses, and the old site looked at once more for what came after its last pass.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dc_core::act::{Act, Evidence, Finding, Outcome};
use dc_core::ids::PlaneKind;
use dc_plane::{Deadline, PlaneError, wait_until};

use crate::driver::Here;
use crate::passes::Mode;
use crate::publish::put_proved;
use crate::pull::Report;

/// Most bytes of a canary.
const MOST: u64 = 4096;

impl Here {
    fn canary_key(&self, site: &dc_core::ids::SiteId) -> String {
        format!("{}/.dc/canary/{site}", self.cfg.spec.log_prefix)
    }

    /// At the holder: late objects saved, a canary written and seen at the other site. At the standby: one pass
    /// and the canary here.
    pub(crate) async fn verify(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if self.cfg.site != *act.new_holder() {
            return self.verify_following(act, until).await;
        }
        let late = self.pass(Mode::Stray, act.epoch, until).await?;
        let run = act.run.as_ref().map_or("upkeep", |r| r.0.as_str());
        let text = format!("canary of {} in epoch {}, run {run}\n", self.group, act.epoch);
        let (key, body) = (self.canary_key(&self.cfg.site), Bytes::from(text));
        if self.own.get(&key, MOST).await?.is_none_or(|found| found != body) {
            until.bound("the canary to be written", put_proved(&self.own, &key, body.clone())).await??;
        }
        let began = tokio::time::Instant::now();
        let what = format!("the canary of {} to be seen at {}", self.own.site, self.peer.site);
        wait_until(until, Duration::from_millis(50), &what, || async {
            Ok(self.peer.get(&key, MOST).await?.filter(|found| *found == body).map(drop))
        })
        .await?;
        let seen = format!(
            "canary object pulled by {} and read there after {} ms; {} objects of {} looked at again, {} came after the last pass",
            self.peer.site,
            began.elapsed().as_millis(),
            late.compared,
            self.peer.site,
            late.pending,
        );
        Ok(self.with_late(Evidence::changed(seen), &late))
    }

    /// What a write that was under way at the old site's fence added there behind the last pass, brought here before
    /// that site follows this one.
    ///
    /// Errors: this site is not open in the act's epoch, or something is still missing here.
    pub(crate) async fn late_pass(
        self: &Arc<Self>,
        act: &Act,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let opened = self.state.now().opened;
        if self.cfg.site != *act.new_holder() || opened != Some(act.epoch) {
            let why = format!("{} was opened in epoch {opened:?}, not in {}", self.cfg.site, act.epoch);
            return Err(PlaneError::refused("DC-0513", why));
        }
        let late = self.pass(Mode::Late, act.epoch, until).await?;
        self.must_be_level(&late)?;
        let seen = format!(
            "{} objects of {} looked at again, {} came after the last pass",
            late.compared, self.peer.site, late.pending
        );
        let evidence = if late.brought == 0 { Evidence::already(seen) } else { Evidence::changed(seen) };
        Ok(self.with_late(evidence, &late))
    }

    fn with_late(&self, evidence: Evidence, late: &Report) -> Evidence {
        if late.pending == 0 {
            return evidence;
        }
        let text = format!(
            "{} objects were written at {} after its fence was proved; {} of them were brought here, {} are left",
            late.pending, self.peer.site, late.brought, late.left
        );
        evidence.with(Outcome::Findings(vec![self.finding("DC-0515", false, text)]))
    }

    /// At the standby: one pass without a failure, after which the holder's canary is here as it is there.
    async fn verify_following(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let report = self.pass(Mode::Bring, act.epoch, until).await?;
        if let Some(why) = report.why_left {
            return Err(why);
        }
        let key = self.canary_key(&self.peer.site);
        let (theirs, ours) = tokio::join!(self.peer.get(&key, MOST), self.own.get(&key, MOST));
        if theirs? != ours? {
            let why = format!("{key} is not here as it is at {}", self.peer.site);
            return Err(PlaneError::Failed { what: "see the canary".into(), why });
        }
        Ok(Evidence::already(format!(
            "{} objects of {} compared, {} being rewritten there, its canary is here",
            report.compared, self.peer.site, report.left
        )))
    }

    pub(crate) fn finding(&self, code: &str, blocking: bool, text: impl Into<String>) -> Finding {
        Finding {
            code: code.to_owned(),
            plane: Some(PlaneKind::S3),
            site: self.cfg.site.clone(),
            blocking,
            text: text.into(),
        }
    }
}
