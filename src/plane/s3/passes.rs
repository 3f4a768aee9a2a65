//! Passes of this site, one at a time: by whom they are asked for, how they end, what the last one found.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dc_core::ids::Epoch;
use dc_plane::{Deadline, PlaneError};
use tokio::time::Instant;

use crate::copy::{Conditions, probe_conditions};
use crate::driver::Here;
use crate::join::{Below, Lister};
use crate::memory::{self, Memory, Row};
use crate::pull::{self, Order, Report, Take};

/// How long a site that turned to pulling goes on by itself, until its upkeep takes over.
const FOLLOW: Duration = Duration::from_mins(2);
/// Between two passes of such a site.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// What the last passes found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Last {
    /// A pass ended since this agent started, and the site has not been opened since.
    pub(crate) pulling: bool,
    /// When the listings of the last pass that left nothing began.
    pub(crate) level: Option<Instant>,
    /// Objects that the last pass left missing or different.
    pub(crate) left: u64,
    /// Why the last pass failed, if it did.
    pub(crate) failed: Option<String>,
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Bring what is missing or different.
    Bring,
    /// Count it.
    Count,
    /// Bring what came after the last pass, before the other site follows this one: what this site does not know, and
    /// what is here as it was then.
    Late,
    /// Bring only what neither this site nor its memory knows.
    Stray,
}

/// Ends a pass when who asked for it is gone.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Here {
    /// Ends the pass that runs, after what is in flight.
    pub(crate) fn stop_pass(&self) {
        if let Some(task) = self.followers.lock().take() {
            task.abort();
        }
        if let Some(stop) = self.running.lock().as_ref() {
            stop.store(true, Ordering::SeqCst);
        }
        *self.last.lock() = Last::default();
    }

    async fn conditions(&self) -> Result<Conditions, PlaneError> {
        let known = *self.proved.lock();
        if let Some(known) = known {
            return Ok(known);
        }
        let proved = probe_conditions(&self.own, &format!("{}-conditions", self.probe_key())).await?;
        *self.proved.lock() = Some(proved);
        Ok(proved)
    }

    /// One pass over the logs, one at a time; it ends by itself when the caller goes.
    ///
    /// Errors: as of the pass; `TimedOut`, after which what is in flight still ends.
    pub(crate) async fn pass(
        self: &Arc<Self>,
        mode: Mode,
        epoch: Epoch,
        until: Deadline,
    ) -> Result<Report, PlaneError> {
        let lock = until.bound("the pass that runs", Arc::clone(&self.puller).lock_owned()).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let _ends = StopOnDrop(Arc::clone(&stop));
        *self.running.lock() = Some(Arc::clone(&stop));
        let proved = until.bound("a probe of conditional writes", self.conditions()).await??;
        let memory = Memory::open(&memory::path(&self.data_dir, self.group.as_str()))?;
        let order = Order {
            copier: Arc::clone(&self.copier),
            prefix: format!("{}/", self.cfg.spec.log_prefix),
            except: format!("{}/.dc/probe/", self.cfg.spec.log_prefix),
            take: match mode {
                Mode::Bring => Take::All,
                Mode::Count => Take::Nothing,
                Mode::Late => Take::Late,
                Mode::Stray => Take::Unknown,
            },
            proved,
            epoch,
            stop,
        };
        let task = tokio::spawn(async move {
            let _lock = lock;
            pull::pass(order, memory).await
        });
        let done = until.bound("a pull pass", task).await;
        let done = done.and_then(|d| d.map_err(|e| PlaneError::failed("pull", &e))).and_then(|r| r);
        if mode == Mode::Bring {
            self.note(&done);
        }
        done
    }

    fn note(&self, done: &Result<Report, PlaneError>) {
        let mut last = self.last.lock();
        match done {
            Ok(report) => {
                last.pulling = true;
                last.left = report.left;
                last.failed = report.why_left.as_ref().map(ToString::to_string);
                if report.left == 0 {
                    last.level = Some(report.began);
                }
            }
            Err(e) => last.failed = Some(e.to_string()),
        }
    }

    /// An error unless a pass left nothing missing or different.
    pub(crate) fn must_be_level(&self, report: &Report) -> Result<(), PlaneError> {
        if report.left == 0 {
            return Ok(());
        }
        let why = report.why_left.as_ref().map_or("they changed meanwhile".into(), ToString::to_string);
        Err(PlaneError::Failed {
            what: format!("pull the logs of {}", self.peer.site),
            why: format!(
                "{} of {} objects are still missing or different: {why}",
                report.left, report.compared
            ),
        })
    }

    /// Remembers every log object of this site as it is now: what it looks like before its writers are shut out.
    ///
    /// Whatever is unchanged later was seen by the other site's last pass; whatever is not, was written after this.
    pub(crate) async fn remember_own(&self, until: Deadline) -> Result<u64, PlaneError> {
        let _one = until.bound("the pass that runs", self.puller.lock()).await?;
        let memory = Memory::open(&memory::path(&self.data_dir, self.group.as_str()))?;
        let prefix = format!("{}/", self.cfg.spec.log_prefix);
        let mut lister = Lister::new(Below { store: self.own.clone(), prefix });
        let (mut rows, mut count) = (Vec::new(), 0);
        while let Some(object) = until.bound("the list of this site's logs", lister.next()).await?? {
            count += 1;
            if memory.get(&object.key)?.is_none_or(|row| row.ours != object.etag || row.size != object.size) {
                rows.push((object.key, Row { theirs: String::new(), ours: object.etag, size: object.size }));
            }
        }
        memory.learn(&rows)?;
        Ok(count)
    }

    /// Goes on pulling until upkeep takes over, so that what the new holder verifies is seen here.
    pub(crate) fn follow(self: &Arc<Self>, epoch: Epoch) {
        let here = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            let until = Deadline::within(FOLLOW);
            while !until.passed() {
                tokio::time::sleep(FOLLOW_EVERY).await;
                let Some(here) = here.upgrade() else { return };
                if here.state.now().pulls != Some(epoch) {
                    return;
                }
                if let Err(e) = here.pass(Mode::Bring, epoch, until).await {
                    tracing::debug!(group = %here.group, error = %e, "a pass failed and is tried again");
                }
            }
        });
        if let Some(old) = self.followers.lock().replace(task.abort_handle()) {
            old.abort();
        }
    }
}
