//! Everything that forbids a move, found at once; and what the plane is at this site, for every second.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use dc_core::act::{Act, ActName, Evidence, Finding, Outcome, S3Act};
use dc_core::ids::PlaneKind;
use dc_core::position::{Lag, LagUnit};
use dc_core::time::millis;
use dc_plane::{Deadline, Depth, PlaneError, PlaneFacts, Role};

use crate::copy::probe_conditions;
use crate::driver::Here;
use crate::materialise::Look;
use crate::passes::Mode;
use crate::policy;
use crate::store::{Answer, Store};

/// Milliseconds between a server's time and now; none for a time that lies ahead.
fn age_ms(of: i64) -> Option<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    millis(now).checked_sub(u64::try_from(of).ok()?)
}

impl Here {
    /// Reads both buckets, the policy, releases and backlog, and says everything that forbids a move.
    pub(crate) async fn preflight(
        self: &Arc<Self>,
        act: &Act,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let mut found = Vec::new();
        let own = self.reachable(&self.own, until).await;
        let peer = self.reachable(&self.peer, until).await;
        let (own_up, peer_up) = (own.is_none(), peer.is_none());
        found.extend(own);
        found.extend(peer);
        let mut seen = Vec::new();
        if own_up {
            found.extend(self.fence_works(act, until).await);
            seen.push(self.capabilities(&mut found, until).await);
        }
        found.extend(self.release_here(act, until).await);
        if own_up && peer_up && self.cfg.site != act.source {
            seen.push(self.backlog(act, &mut found, until).await);
        }
        let blocking = found.iter().filter(|f| f.blocking).count();
        seen.insert(0, format!("{} checked: {blocking} findings forbid a move", self.own.site));
        Ok(Evidence::already(seen.join("; ")).with(Outcome::Findings(found)))
    }

    async fn reachable(&self, store: &Store, until: Deadline) -> Option<Finding> {
        let answer = until.bound("the bucket to answer", store.bucket_answers()).await;
        match answer.and_then(|inner| inner) {
            Ok(()) => None,
            Err(e @ (PlaneError::Unreachable { .. } | PlaneError::TimedOut { .. })) => {
                Some(self.finding("DC-0501", true, format!("seen from {}: {e}", self.cfg.site)))
            }
            Err(e) => {
                Some(self.finding("DC-0502", true, format!("bucket {} of {}: {e}", store.bucket, store.site)))
            }
        }
    }

    /// The policy can be read and changed, names nobody who would pass the fence, and writers are where they must be.
    async fn fence_works(&self, act: &Act, until: Deadline) -> Vec<Finding> {
        let mut found = Vec::new();
        let text = match until.bound("the bucket policy", self.own.policy()).await.and_then(|r| r) {
            Ok(text) => text,
            Err(e) => return vec![self.finding("DC-0503", true, format!("the fence cannot work: {e}"))],
        };
        match policy::strangers(text.as_deref(), &self.cfg.spec, &self.cfg.own_keys.access) {
            Err(e) => found.push(self.finding("DC-0503", true, e.to_string())),
            Ok(who) if who.is_empty() => {}
            Ok(who) => found.push(self.finding(
                "DC-0506",
                true,
                format!(
                    "the policy of {} lets {} write below the group's prefixes, and s3.writers does not name them: no fence would stop them",
                    self.own.site,
                    who.join(" and ")
                ),
            )),
        }
        if let Err(e) = until.bound("the bucket policy", self.rewrite_policy()).await.and_then(|r| r) {
            found.push(self.finding("DC-0503", true, format!("the fence cannot work: {e}")));
        }
        let holder = self.cfg.site == act.source;
        let key = &self.cfg.canary_keys.access;
        let answer = match until.bound("a writer's PUT", self.knock()).await {
            Ok(answer) => answer,
            Err(e) => Answer::Unclear(e.to_string()),
        };
        match (holder, answer) {
            (true, Answer::Accepted) | (false, Answer::Refused) => {}
            (true, Answer::Refused) => found.push(self.finding(
                "DC-0504",
                true,
                format!("a PUT with the writer's key {key} is refused at {}, which is active", self.own.site),
            )),
            (false, Answer::Accepted) => found.push(self.finding(
                "DC-0505",
                true,
                format!("a PUT with the writer's key {key} is accepted at {}, the standby", self.own.site),
            )),
            (_, Answer::Unclear(why)) => found.push(self.finding(
                "DC-0504",
                true,
                format!("a PUT with the writer's key {key} at {} proves nothing: {why}", self.own.site),
            )),
        }
        found
    }

    /// What this store honours, tried on a probe object.
    async fn capabilities(&self, found: &mut Vec<Finding>, until: Deadline) -> String {
        let key = format!("{}-conditions", self.probe_key());
        let tried = until.bound("a probe of conditional writes", probe_conditions(&self.own, &key)).await;
        match tried.and_then(|inner| inner) {
            Ok(proved) => {
                *self.proved.lock() = Some(proved);
                let word = |yes: bool| if yes { "honoured" } else { "ignored" };
                let seen = format!(
                    "If-None-Match {}, If-Match {}, versioning {}",
                    word(proved.absent),
                    word(proved.is),
                    self.versioning(until).await
                );
                if !(proved.absent && proved.is) {
                    let text = format!("{}: {seen}; conditions are not used as a second lock", self.own.site);
                    found.push(self.finding("DC-0509", false, text));
                }
                seen
            }
            Err(e) => {
                found.push(self.finding(
                    "DC-0502",
                    true,
                    format!(
                        "the agent's key cannot write to bucket {} of {}: {e}",
                        self.own.bucket, self.own.site
                    ),
                ));
                "conditions unknown".into()
            }
        }
    }

    async fn versioning(&self, until: Deadline) -> String {
        let call = Box::pin(self.own.client.get_bucket_versioning().bucket(&self.own.bucket).send());
        match until.bound("the bucket's versioning", call).await {
            Ok(Ok(answer)) => answer.status().map_or("off".into(), |s| s.as_str().to_lowercase()),
            _ => "unknown".into(),
        }
    }

    async fn release_here(&self, act: &Act, _until: Deadline) -> Option<Finding> {
        let release = act.release()?;
        let whole = match self.shelf.whole(release, Look::Bytes).await {
            Ok(whole) => whole.is_some(),
            Err(e) => return Some(self.finding("DC-0507", true, e.to_string())),
        };
        let current = self.shelf.current();
        if whole && current.as_deref() == Some(&release.version()) {
            return None;
        }
        let text = format!(
            "DAG release {} is the newest and is {} at {}; current is {}",
            release.version(),
            if whole { "not active" } else { "not whole on disk" },
            self.cfg.site,
            current.as_deref().unwrap_or("none")
        );
        // catch_up brings it to the target before anything is closed, and the recheck after that insists
        let comes = act.name == ActName::S3(S3Act::Preflight) && self.cfg.site != act.source;
        Some(self.finding("DC-0507", !comes, text))
    }

    /// Logs that the other site shows and this one lacks, counted and not brought.
    async fn backlog(self: &Arc<Self>, act: &Act, found: &mut Vec<Finding>, until: Deadline) -> String {
        match self.pass(Mode::Count, act.epoch, until).await {
            Err(e) => {
                let code = if matches!(&e, PlaneError::Refused { .. }) { "DC-0510" } else { "DC-0516" };
                found.push(self.finding(code, true, format!("the backlog cannot be counted: {e}")));
                "backlog unknown".into()
            }
            Ok(report) => {
                let oldest =
                    report.oldest.and_then(age_ms).map_or(String::new(), |ms| format!(", oldest {ms} ms"));
                let seen = format!(
                    "backlog {} of {} objects, {} bytes{oldest}",
                    report.pending, report.compared, report.pending_bytes
                );
                if report.pending > self.cfg.lag_objects_max {
                    let limit = self.cfg.lag_objects_max;
                    found.push(self.finding(
                        "DC-0508",
                        true,
                        format!("{seen}; limit {limit} objects (policy.lag_objects_max)"),
                    ));
                }
                seen
            }
        }
    }

    /// What the plane is here. Asks for the policy; the backlog is what the last pass found.
    pub(crate) async fn facts(&self, depth: Depth, until: Deadline) -> Result<PlaneFacts, PlaneError> {
        let fenced = until.bound("the bucket policy", self.fenced()).await.and_then(|inner| inner);
        let release = self.shelf.current().unwrap_or_else(|| "no release".into());
        let mut findings = Vec::new();
        let fenced = match fenced {
            Ok(fenced) => fenced,
            Err(e) => {
                findings.push(self.finding("DC-0501", true, e.to_string()));
                let summary = format!("not seen; {release}");
                return Ok(PlaneFacts { plane: PlaneKind::S3, role: None, lag: None, summary, findings });
            }
        };
        if depth == Depth::Deep {
            findings
                .extend(self.reachable(&self.peer, until).await.map(|f| Finding { blocking: false, ..f }));
        }
        let last = self.last.lock().clone();
        let (role, lag, summary) = if fenced {
            let lag = last.level.map(|level| Lag {
                amount: last.left,
                unit: LagUnit::Objects,
                age_ms: Some(millis(level.elapsed())),
            });
            let role = if last.pulling { Role::Following } else { Role::Closed };
            let what = match lag {
                Some(lag) => format!("pulling from {}, {} objects behind", self.peer.site, lag.amount),
                None if last.pulling => format!("pulling from {}, not level yet", self.peer.site),
                None => "writers denied, not pulling".to_owned(),
            };
            (role, lag, what)
        } else {
            (Role::Writable, None, "takes writes".to_owned())
        };
        if let (true, Some(why)) = (fenced, last.failed) {
            findings.push(self.finding("DC-0516", false, format!("the last pull pass failed: {why}")));
        }
        let summary = format!("{summary}; {release}");
        Ok(PlaneFacts { plane: PlaneKind::S3, role: Some(role), lag, summary, findings })
    }
}
