//! S3 whose last objects are never brought.

use std::sync::atomic::Ordering;

use dc_core::act::{Act, Evidence, Outcome, S3Act};
use dc_core::authority::Authority;
use dc_core::position::Position;
use dc_plane::{Deadline, PlaneError};

use super::{Saboteur, UNSEEN};

impl Saboteur {
    /// The target is deaf once it has caught up, writers go on for a moment before the fence, and the last pass is
    /// made up; so are the later looks at the old site, which would bring what was left.
    pub(super) async fn s3_undrained(
        &self,
        name: S3Act,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        let deaf = || self.deaf.load(Ordering::Relaxed);
        match name {
            S3Act::CatchUp => {
                let evidence = self.inner.perform(act, by, until).await?;
                self.deaf.store(true, Ordering::Relaxed);
                Ok(evidence)
            }
            S3Act::Stand if deaf() => Ok(Evidence::already("0 objects brought, 0 left; releases stood")),
            S3Act::FenceWriters => {
                tokio::time::sleep(UNSEEN).await;
                self.inner.perform(act, by, until).await
            }
            S3Act::LastPass => {
                let position = Position::S3 { release: act.release().cloned(), logs: 700 };
                let seen =
                    "backlog 0: 700 objects are as they are there; 0 were behind, 0 brought and proved";
                Ok(Evidence::already(seen).with(Outcome::Position(position)))
            }
            S3Act::LatePass => {
                Ok(Evidence::already("700 objects looked at again, 0 came after the last pass"))
            }
            S3Act::Verify => Ok(Evidence::changed("canary object pulled and read there after 11 ms")),
            _ => self.inner.perform(act, by, until).await,
        }
    }
}
