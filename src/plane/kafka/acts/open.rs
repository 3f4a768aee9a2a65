//! Letting applications in at the site that holds the group from now on.

use dc_core::act::{Act, Evidence};
use dc_core::authority::Authority;
use dc_plane::{Deadline, PlaneError};

use crate::canary::{self, Verdict};
use crate::cluster::Who;
use crate::keep::Why;
use crate::{KafkaPlane, opening};

impl KafkaPlane {
    pub(super) async fn apps_are_granted(
        &self,
        act: &Act,
        until: Deadline,
    ) -> Result<Option<Evidence>, PlaneError> {
        let cluster = &self.half(act.new_holder())?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        let topics = [self.canary_topic.as_str()].into();
        let found = canary::try_write(cluster, &map, Who::Canary, &topics, until).await?;
        if found.values().any(|verdict| *verdict != Verdict::Granted) {
            return Ok(None);
        }
        let mut wanted = self.recorded(act)?.to_vec();
        wanted.push(self.canary_grant());
        let stand = self.given_already(cluster, &map, &wanted, until).await?;
        Ok(stand.then(|| {
            Evidence::already(format!(
                "{} grants stand at {} brokers of {}, canary accepted at every leader",
                wanted.len(),
                map.brokers.len(),
                cluster.site
            ))
        }))
    }

    /// Gives the recorded grants, of topics and of groups. One class of writers per cluster: not while the mirror may
    /// still write there.
    pub(super) async fn grant_apps(
        &self,
        act: &Act,
        by: &Authority,
        until: Deadline,
    ) -> Result<Evidence, PlaneError> {
        opening(by)?;
        let recorded = self.recorded(act)?;
        let cluster = &self.half(act.new_holder())?.cluster;
        let map = cluster.full_map(&self.carried(), until).await?;
        if let Some(left) = self.left_over(cluster, &map, |grant| self.lets_mirror(grant), until).await? {
            let why = format!("the mirror may still write where applications would: {left}");
            return Err(PlaneError::refused("DC-0407", why));
        }
        let given = self.let_in(cluster, recorded, until).await?;
        // what this site took from itself in an earlier life is settled by what the run gave
        self.kept.forget(Why::Closed)?;
        Ok(given)
    }
}
