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

impl Here {
    fn canary_key(&self, site: &dc_core::ids::SiteId) -> String {
        format!("{}/.dc/canary/{site}", self.cfg.spec.log_prefix)
    }

    /// At the holder: late objects saved, a canary written and seen at the other site. At the standby: one pass
    /// that leaves nothing.
    pub(crate) async fn verify(self: &Arc<Self>, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        if self.cfg.site != *act.new_holder() {
            let report = self.pass(Mode::Bring, act.epoch, until).await?;
            return self.must_be_level(&report).map(|()| {
                Evidence::already(format!(
                    "{} objects of {} compared, none missing or different here",
                    report.compared, self.peer.site
                ))
            });
        }
        let late = self.pass(Mode::Late, act.epoch, until).await?;
        let run = act.run.as_ref().map_or("upkeep", |r| r.0.as_str());
        let text = format!("canary of {} in epoch {}, run {run}\n", self.group, act.epoch);
        let (key, body) = (self.canary_key(&self.cfg.site), Bytes::from(text));
        let most = 4096;
        if self.own.get(&key, most).await?.is_none_or(|found| found != body) {
            until.bound("the canary to be written", put_proved(&self.own, &key, body.clone())).await??;
        }
        let began = tokio::time::Instant::now();
        let what = format!("the canary of {} to be seen at {}", self.own.site, self.peer.site);
        wait_until(until, Duration::from_millis(50), &what, || async {
            Ok(self.peer.get(&key, most).await?.filter(|found| *found == body).map(drop))
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
        let evidence = Evidence::changed(seen);
        if late.pending == 0 {
            return Ok(evidence);
        }
        let text = format!(
            "{} objects were written at {} after its fence was proved; {} of them were brought here, {} are left",
            late.pending, self.peer.site, late.brought, late.left
        );
        Ok(evidence.with(Outcome::Findings(vec![self.finding("DC-0515", false, text)])))
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
