//! Shutting the writers out, letting them in, and proving either with a writer's own key.

use std::time::Duration;

use dc_core::act::Evidence;
use dc_core::ids::Epoch;
use dc_plane::{Deadline, PlaneError, wait_until};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::driver::Here;
use crate::policy;
use crate::state::Marks;
use crate::store::Answer;

/// Refusals in a row that make a proof: requests let in just before the policy changed have ended by then.
const REFUSALS: u32 = 3;
/// Between two tries with the writer's key.
const EVERY: Duration = Duration::from_millis(10);
/// A policy has no compare-and-set: changes by this process never run side by side.
static POLICY: Mutex<()> = Mutex::const_new(());

fn bad(cause: &policy::BadPolicy) -> PlaneError {
    PlaneError::refused("DC-0503", cause.to_string())
}

/// Does a change of the policy to its end, also when who asked for it is gone: a request that was broken off would
/// land behind the proof of a later one.
async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, PlaneError>> + Send + 'static,
) -> Result<T, PlaneError> {
    let task = tokio::spawn(async move {
        let _one = POLICY.lock().await;
        change.await
    });
    task.await.map_err(|e| PlaneError::failed("change the bucket policy", &e))?
}

impl Here {
    /// Whether our Deny stands in the bucket's policy.
    pub(crate) async fn fenced(&self) -> Result<bool, PlaneError> {
        let text = self.own.policy().await?;
        policy::is_fenced(text.as_deref(), &self.group, &self.cfg.spec).map_err(|e| bad(&e))
    }

    /// One try to write with a writer's key.
    pub(crate) async fn knock(&self) -> Answer {
        self.canary.knock(&self.probe_key()).await
    }

    /// Puts the Deny in or takes it out, and reads the policy back. Whether anything changed.
    async fn set_fence(&self, closed: bool) -> Result<bool, PlaneError> {
        let (own, group, spec) = (self.own.clone(), self.group.clone(), self.cfg.spec.clone());
        whole(async move {
            let stands =
                |text: Option<String>| policy::is_fenced(text.as_deref(), &group, &spec).map_err(|e| bad(&e));
            let text = own.policy().await?;
            if stands(text.clone())? == closed {
                return Ok(false);
            }
            let next = if closed {
                policy::with_fence(text.as_deref(), &group, &spec).map(Some)
            } else {
                policy::without_fence(text.as_deref(), &group)
            }
            .map_err(|e| bad(&e))?;
            own.set_policy(next.as_deref()).await?;
            if stands(own.policy().await?)? == closed {
                return Ok(true);
            }
            let why =
                format!("{} gives back another policy than it got; does something else manage it?", own.site);
            Err(PlaneError::Failed { what: "change the bucket policy".into(), why })
        })
        .await
    }

    /// Writes the policy again as it stands: proves the right to change it and changes nothing.
    pub(crate) async fn rewrite_policy(&self) -> Result<(), PlaneError> {
        let own = self.own.clone();
        whole(async move {
            match own.policy().await? {
                Some(text) => own.set_policy(Some(&text)).await,
                None => Ok(()),
            }
        })
        .await
    }

    /// Waits until a writer's own PUT is answered as it must be, `times` in a row.
    async fn proved(&self, wanted: &Answer, times: u32, until: Deadline) -> Result<(), PlaneError> {
        let mut last = Answer::Unclear("no answer yet".into());
        let mut row = 0;
        while row < times {
            last = until.bound("a writer's PUT to be answered", self.knock()).await.unwrap_or(last);
            row = if last == *wanted { row + 1 } else { 0 };
            if row < times && until.left() <= EVERY {
                break;
            }
            if row == 0 {
                tokio::time::sleep(EVERY).await;
            }
        }
        if row >= times {
            return Ok(());
        }
        let saw = match last {
            Answer::Accepted => "it was still accepted".to_owned(),
            Answer::Refused => "it was still refused (AccessDenied)".to_owned(),
            Answer::Unclear(why) => why,
        };
        Err(PlaneError::Failed {
            what: format!("prove the fence of writers at {}", self.own.site),
            why: format!(
                "DC-0514: a PUT with the key {} by the deadline: {saw}",
                self.cfg.canary_keys.access
            ),
        })
    }

    /// Shuts the writers out for one more reason, and proves it.
    ///
    /// Repeat: safe. The reason is on disk before the policy changes, so a restart finds who closed.
    pub(crate) async fn close(
        &self,
        reason: impl FnOnce(&mut Marks),
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let began = Instant::now();
        self.mark(reason)?;
        let changed = until.bound("the writers' Deny", self.set_fence(true)).await??;
        self.proved(&Answer::Refused, REFUSALS, until).await?;
        let seen = format!(
            "{} denied below {}/ and {}/ at {}: policy read back, {REFUSALS} PUTs with the key {} refused, {} ms",
            self.cfg.spec.writers.join(" and "),
            self.cfg.spec.dag_prefix,
            self.cfg.spec.log_prefix,
            self.own.site,
            self.cfg.canary_keys.access,
            began.elapsed().as_millis(),
        );
        Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    /// Takes reasons to be closed away; lets the writers in when none is left, and proves it.
    ///
    /// Repeat: safe. The reason goes from disk last, so a death in between leaves it to be taken away again.
    pub(crate) async fn reopen(
        &self,
        reason: impl Fn(&mut Marks),
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let began = Instant::now();
        let mut after = self.state.now();
        reason(&mut after);
        if after.closed() {
            self.mark(reason)?;
            let why = if after.site { "the site closed itself" } else { "it is the standby" };
            return Ok(Evidence::changed(format!("writers stay denied at {}: {why}", self.own.site)));
        }
        let changed = until.bound("the end of the writers' Deny", self.set_fence(false)).await??;
        self.proved(&Answer::Accepted, 1, until).await?;
        self.mark(reason)?;
        let seen = format!(
            "writers let in at {}: Deny gone from the policy, a PUT with the key {} accepted, {} ms",
            self.own.site,
            self.cfg.canary_keys.access,
            began.elapsed().as_millis(),
        );
        Ok(if changed { Evidence::changed(seen) } else { Evidence::already(seen) })
    }

    pub(crate) fn mark(&self, how: impl FnOnce(&mut Marks)) -> Result<(), PlaneError> {
        self.state.change(how).map_err(|e| PlaneError::failed("write the marks of the fence", &e))
    }

    /// Ends pulling here for good in this epoch; nothing of it is in flight afterwards.
    pub(crate) async fn end_puller(&self, epoch: Epoch, until: Deadline) -> Result<(), PlaneError> {
        self.mark(|m| m.opened = m.opened.max(Some(epoch)))?;
        self.stop_pass();
        let ended = wait_until(until, Duration::from_millis(5), "the puller to end", || async {
            Ok(self.puller.try_lock().is_ok().then_some(()))
        });
        ended.await
    }
}
