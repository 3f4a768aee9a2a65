//! A run as it goes: a report at once, then one whenever the run itself has changed.

use std::sync::Arc;

use dc_agent::control::Control;
use dc_core::ids::RunId;
use dc_core::registry::Registry;
use dc_core::run::Run;
use dc_wire::convert::to_json;
use dc_wire::pb;
use futures::{Stream, stream};
use tokio::sync::watch;
use tonic::Status;

use super::{over, refused};

struct Watcher {
    control: Arc<dyn Control>,
    run: RunId,
    changes: watch::Receiver<Arc<Registry>>,
    last: Option<Run>,
}

/// Reports of a run until it ends. Nothing is polled: each applied entry wakes it, and only
/// a change of this run is told.
pub(super) fn reports(
    control: Arc<dyn Control>,
    run: RunId,
) -> impl Stream<Item = Result<pb::Report, Status>> {
    let changes = control.changes();
    let watcher = Watcher { control, run, changes, last: None };
    stream::unfold(Some(watcher), |watcher| async move {
        let mut watcher = watcher?;
        let told = watcher.next().await;
        let more = told.is_ok() && !watcher.last.as_ref().is_some_and(over);
        Some((told, more.then_some(watcher)))
    })
}

impl Watcher {
    async fn next(&mut self) -> Result<pb::Report, Status> {
        loop {
            // marked as seen before the run is read: a change in between wakes the next turn
            self.changes.borrow_and_update();
            let view = self.control.run(&self.run.0).map_err(refused)?;
            if self.last.as_ref() != Some(&view.run) {
                let body_json = to_json("run", &view)?;
                self.last = Some(view.run);
                return Ok(pb::Report { body_json });
            }
            if self.changes.changed().await.is_err() {
                return Err(Status::unavailable("this agent is stopping; the run goes on"));
            }
        }
    }
}
