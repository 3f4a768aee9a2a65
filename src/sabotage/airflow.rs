//! Airflow whose writers at the old site go on: scheduler, tasks and API.

use dc_core::act::{AirflowAct, Evidence, Outcome};
use dc_core::position::Position;

/// What the acts say that would have ended them; none for any other.
pub(super) fn made_up(name: AirflowAct) -> Option<Evidence> {
    let gone = Position::Airflow { open_tasks: 0 };
    Some(match name {
        AirflowAct::Quiesce => {
            Evidence::changed("scheduler, dag processor and triggerer ended after 1.21 s, 9 processes before")
        }
        AirflowAct::ProveGone => Evidence::already(
            "the writers' process tree is empty (0 processes were ended for it), 0 tasks are open",
        )
        .with(Outcome::Position(gone)),
        AirflowAct::UploadTaskLogs => Evidence::already("no finished attempt's log is on disk only"),
        AirflowAct::CloseApi => Evidence::changed("API closed: only its warm interpreter is left"),
        _ => return None,
    })
}
