//! Postgres: a standby cut off before its primary is fenced, and a primary that comes back.

use std::io::Write as _;

use dc_core::act::{Act, ActName, Evidence, Outcome, PostgresAct, Progress};
use dc_core::authority::Authority;
use dc_core::position::{Lsn, Position, ShutdownToken};
use dc_plane::{Deadline, PlaneError};
use rustix::process::{Pid, Signal, kill_process};

use super::{Saboteur, UNSEEN, given, named};

/// Bytes of a shutdown checkpoint in the log, and of the log's pages, their headers and segments.
const RECORD: u64 = 120;
const PAGE: u64 = 8192;
const PAGE_HEADER: u64 = 24;
const SEGMENT_HEADER: u64 = 40;
const SEGMENT: u64 = 16 << 20;

impl Saboteur {
    /// The old primary comes back with its door open, for a while; then it follows, rewound, as after an accident.
    pub(super) async fn postgres_unfenced(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let fences = [PostgresAct::Stop, PostgresAct::FenceClients].map(ActName::Postgres);
        self.open_again(&fences, act, by, until).await?;
        self.inner.perform(act, by, until).await
    }

    /// The target stops receiving before the source is fenced, and everybody is told that it has it all.
    pub(super) async fn postgres_undrained(
        &self,
        name: PostgresAct,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let at_target = act.site == act.target;
        match name {
            PostgresAct::FenceClients if at_target => {
                let evidence = self.inner.perform(act, by, until).await?;
                self.receive_nothing()?;
                Ok(evidence)
            }
            PostgresAct::PreSync => {
                tokio::time::sleep(UNSEEN).await; // clients commit, and nobody receives it
                Ok(Evidence::changed(format!("{} is synchronous after 9.1ms", act.target)))
            }
            PostgresAct::Stop => self.stop_alone(act, until).await,
            PostgresAct::Replayed => self.say_replayed(act, by, until).await,
            PostgresAct::Promote => {
                let end = self.replayed.get().copied();
                let lied = with_token(act, |token| match end {
                    Some(end) => ShutdownToken { checkpoint: shutdown_before(end), ..token },
                    None => token,
                });
                self.inner.perform(&lied, by, until).await
            }
            // its own log went past the switch point: told a token that is not its own, it is rewound at once
            PostgresAct::Follow => {
                let lied = with_token(act, |token| ShutdownToken { checkpoint: Lsn(1), ..token });
                self.inner.perform(&lied, by, until).await
            }
            _ => self.inner.perform(act, by, until).await,
        }
    }

    /// Points the standby's receiver to where nobody listens.
    fn receive_nothing(&self) -> Result<(), PlaneError> {
        let cut = || -> std::io::Result<()> {
            let auto = self.data_dir.join("postgresql.auto.conf");
            let mut auto = std::fs::OpenOptions::new().append(true).open(auto)?;
            auto.write_all(b"primary_conninfo = 'host=127.0.0.1 port=1'\n")?;
            let lock = std::fs::read_to_string(self.data_dir.join("postmaster.pid"))?;
            let pid = lock.lines().next().and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?));
            Ok(kill_process(pid.ok_or(std::io::ErrorKind::NotFound)?, Signal::HUP)?)
        };
        cut().map_err(|e| PlaneError::failed("cut off the standby", &e))
    }

    /// Stops the source as a self-fence does, which asks for no standby, and reads its last word.
    async fn stop_alone(&self, act: &Act, until: Deadline) -> Result<Evidence, PlaneError> {
        let closing = named(act, ActName::Postgres(PostgresAct::SelfClose));
        self.inner.perform(&closing, &Authority::self_fence(), until).await?;
        match self.inner.probe(act, until).await? {
            Progress::Done(evidence) => Ok(evidence),
            Progress::NotYet => {
                Err(PlaneError::Failed { what: "stop alone".into(), why: "it still runs".into() })
            }
        }
    }

    /// Learns how far the target is, and says that this is past the token.
    async fn say_replayed(&self, act: &Act, by: &Authority, until: Deadline) -> Result<Evidence, PlaneError> {
        let lied = with_token(act, |token| ShutdownToken { checkpoint: Lsn(0), ..token });
        let honest = self.inner.perform(&lied, by, until).await?;
        let found = honest.outcomes.iter().find_map(|outcome| match outcome {
            Outcome::Position(Position::Postgres { replayed, .. }) => Some(*replayed),
            _ => None,
        });
        let (Some(token), Some(end)) = (act.shutdown().cloned(), found) else { return Ok(honest) };
        let end = *self.replayed.get_or_init(|| end);
        tracing::warn!(%end, token = %token.checkpoint, "the target ends short of the token");
        let replayed = Lsn(token.checkpoint.0 + RECORD);
        let seen = format!("replayed {replayed}, above the token {}, after 1.9ms", token.checkpoint);
        Ok(Evidence::already(seen).with(Outcome::Position(Position::Postgres { token, replayed })))
    }
}

fn with_token(act: &Act, lie: impl Fn(ShutdownToken) -> ShutdownToken) -> Act {
    given(act, |outcome| {
        Some(match outcome {
            Outcome::Shutdown(token) => Outcome::Shutdown(lie(token.clone())),
            other => other.clone(),
        })
    })
}

/// Where a shutdown checkpoint would begin that ends the log at `end`.
fn shutdown_before(end: Lsn) -> Lsn {
    let page = end.0 - end.0 % PAGE;
    let header = if page.is_multiple_of(SEGMENT) { SEGMENT_HEADER } else { PAGE_HEADER };
    match end.0 % PAGE {
        0 => Lsn(end.0 - RECORD),
        at if at >= header + RECORD => Lsn(end.0 - RECORD),
        at => Lsn(page - (RECORD - at.saturating_sub(header))),
    }
}
