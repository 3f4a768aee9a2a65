//! How a store without history becomes a voter, and how one that lost its history does not.
//!
//! A voter that forgets its vote or its log can break the agreement, and from the inside an
//! empty directory looks the same on the first day and after a disk was lost. So every
//! directory has a name of its own, and an empty one takes no part until **every** other
//! voter has put that name on record for its site. A site that is already on record under
//! another name is refused by all who know it. After that nobody is asked again: a restart
//! needs no one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_wire::pb;
use redb::ReadableTable;
use tokio::time::timeout;

use crate::Machine;
use crate::disk::{DiskError, STORES, change, set_meta};
use crate::engine::Inner;
use crate::types::{Voter, voter_id};

/// Between two rounds of asking.
const ROUND: Duration = Duration::from_millis(250);
/// One answer may take this long.
const ANSWER: Duration = Duration::from_secs(2);

/// Whether this voter takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Its directory is new; these voters have not admitted it yet.
    Founding {
        /// All of them must be reached once.
        waiting_for: Vec<SiteId>,
    },
    /// It takes part.
    Member,
    /// It never will: a voter knows another directory of this site. See DC-0110.
    Refused {
        /// Who knows it.
        by: SiteId,
    },
    /// It was shut down, or died.
    Stopped,
}

/// What one voter said.
enum Said {
    Welcome,
    Known,
    Nothing,
}

impl<M: Machine> Inner<M> {
    /// Puts a caller's store on record, or returns the one that is.
    ///
    /// Repeat: safe. Errors: the disk's; then nothing is on record.
    pub async fn admit(&self, site: &SiteId, shown: &str) -> Result<String, DiskError> {
        if let Some(known) = self.stores.lock().get(site.as_str()) {
            return Ok(known.clone());
        }
        let (name, store) = (site.to_string(), shown.to_owned());
        let recorded = self.disk.run("record a voter", move |database| {
            change(database, |change| {
                let mut table = change.open_table(STORES).map_err(redb::Error::from)?;
                let known =
                    table.get(name.as_str()).map_err(redb::Error::from)?.map(|row| row.value().to_owned());
                if let Some(known) = known {
                    return Ok(known);
                }
                table.insert(name.as_str(), store.as_str()).map_err(redb::Error::from)?;
                Ok(store)
            })
        });
        let recorded = recorded.await?;
        self.stores.lock().insert(site.to_string(), recorded.clone());
        Ok(recorded)
    }

    async fn ask(&self, id: u64) -> Said {
        let Some(peer) = self.peers.get(id) else { return Said::Nothing };
        let call = pb::MeetRequest { route: Some(peer.route.clone()) };
        match timeout(ANSWER, peer.client.clone().meet(call)).await {
            Ok(Ok(reply)) if reply.get_ref().on_record.is_empty() => Said::Welcome,
            Ok(Ok(_)) => Said::Known,
            Ok(Err(why)) => {
                tracing::debug!(peer = %peer.site, %why, "not met yet");
                Said::Nothing
            }
            Err(_) => Said::Nothing,
        }
    }

    async fn found(&self) -> Result<(), DiskError> {
        let mut missing: BTreeMap<u64, SiteId> =
            self.peers.iter().map(|(id, p)| (id, p.site.clone())).collect();
        let mut round = tokio::time::interval(ROUND);
        round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !missing.is_empty() {
            round.tick().await;
            for (id, site) in missing.clone() {
                match self.ask(id).await {
                    Said::Welcome => drop(missing.remove(&id)),
                    Said::Known => {
                        tracing::error!(
                            code = "DC-0110", peer = %site,
                            "this data directory is not the one that the other voters know; it takes no part"
                        );
                        self.standing.send_replace(Standing::Refused { by: site });
                        return Ok(());
                    }
                    Said::Nothing => {}
                }
            }
            let waiting_for = missing.values().cloned().collect();
            self.standing.send_replace(Standing::Founding { waiting_for });
        }
        let admitted = self.disk.run("note its admission", |database| {
            change(database, |change| set_meta(change, "admitted", b"1"))
        });
        admitted.await?;
        self.standing.send_replace(Standing::Member);
        Ok(())
    }

    /// Writes the first entry of the log unless a leader brings it.
    ///
    /// All voters write the same one, so it does not matter how many do; the first by name
    /// goes ahead and the others give it the time of an election, which spares one.
    async fn first_entry(&self, sites: &[SiteId]) {
        let mut mine = sites.first() == Some(&self.site);
        loop {
            match self.raft.is_initialized().await {
                Ok(false) => {}
                Ok(true) | Err(_) => return,
            }
            if mine {
                let members: BTreeMap<u64, Voter> =
                    sites.iter().map(|site| (voter_id(site), Voter { site: site.to_string() })).collect();
                match self.raft.initialize(members).await {
                    Ok(()) => tracing::info!("the quorum was founded"),
                    Err(why) => tracing::info!(%why, "the quorum was founded by another voter"),
                }
                return;
            }
            let mut server = self.raft.server_metrics();
            let brought = server.wait_for(|now| now.current_leader.is_some());
            drop(timeout(self.profile.election_max * 3, brought).await);
            mine = true;
        }
    }
}

/// Joins, and founds the quorum if nobody has.
pub(crate) async fn join<M: Machine>(inner: Arc<Inner<M>>, sites: Vec<SiteId>) {
    if *inner.standing.borrow() != Standing::Member
        && let Err(why) = inner.found().await
    {
        inner.disk.die(&format!("DC-0112: joining the quorum failed: {why}"));
        return;
    }
    if *inner.standing.borrow() == Standing::Member {
        inner.first_entry(&sites).await;
    }
}
