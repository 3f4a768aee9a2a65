//! The answering side: Raft calls, proposals and reads of other voters.
//!
//! A caller is believed only what its certificate says, and only as the store that it showed
//! when it was admitted. It is mounted by the agent.

use std::io::Cursor;
use std::sync::Arc;

use dc_core::ids::SiteId;
use dc_wire::convert::from_json;
use dc_wire::identity::Role;
use dc_wire::link::Peer;
use dc_wire::pb;
use dc_wire::pb::quorum_server::{Quorum, QuorumServer};
use openraft::{Snapshot, SnapshotMeta, Vote};
use serde::Serialize;
use tokio_stream::StreamExt;
use tonic::{Request as Call, Response, Status, Streaming};

use crate::Machine;
use crate::engine::Inner;
use crate::founding::Standing;
use crate::network::MESSAGE_MAX;
use crate::types::{Request, Types, Voter, voter_id};

/// Answers for the voter of this site.
pub struct QuorumService<M: Machine> {
    inner: Arc<Inner<M>>,
}

impl<M: Machine> QuorumService<M> {
    pub(crate) fn server(inner: Arc<Inner<M>>) -> QuorumServer<Self> {
        QuorumServer::new(Self { inner })
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }

    /// The site that really calls, once everything it claims was checked but its store.
    fn caller<T>(&self, call: &Call<T>, route: Option<&pb::Route>) -> Result<SiteId, Status> {
        let peer =
            call.extensions().get::<Peer>().ok_or_else(|| Status::unauthenticated("no certificate"))?;
        named(&peer.identity, route, &self.inner.site)?;
        let from = route.map(|route| route.from.as_str()).unwrap_or_default();
        let site = SiteId::new(from).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if self.inner.peers.get(voter_id(&site)).is_none() {
            return Err(Status::permission_denied(format!("{site} is no voter of this quorum")));
        }
        Ok(site)
    }

    /// The caller as a voter that both sides have admitted.
    fn voter<T>(&self, call: &Call<T>, route: Option<&pb::Route>) -> Result<SiteId, Status> {
        let site = self.caller(call, route)?;
        if *self.inner.standing.borrow() != Standing::Member {
            return Err(Status::failed_precondition(format!("{} takes no part yet", self.inner.site)));
        }
        let shown = route.map(|route| route.store.as_str()).unwrap_or_default();
        match self.inner.stores.lock().get(site.as_str()) {
            Some(known) if known == shown => Ok(site),
            _ => Err(Status::permission_denied(format!(
                "DC-0110: {site} speaks from a data directory that is not the one {} knows",
                self.inner.site
            ))),
        }
    }
}

/// Whether a message's claims are its sender's own.
fn named(
    identity: &dc_wire::identity::Identity,
    route: Option<&pb::Route>,
    me: &SiteId,
) -> Result<(), Status> {
    let route = route.ok_or_else(|| Status::invalid_argument("no route"))?;
    if identity.role() != Role::Agent || identity.name() != route.from {
        return Err(Status::permission_denied(format!("{identity} may not speak as {}", route.from)));
    }
    if !route.via.is_empty() {
        return Err(Status::unimplemented("forwarded messages are not accepted"));
    }
    if route.to != me.as_str() {
        return Err(Status::failed_precondition(format!("this is {me}, the message is for {}", route.to)));
    }
    Ok(())
}

fn reply<T: Serialize, E: Serialize>(result: Result<T, E>) -> Result<Response<pb::RaftReply>, Status> {
    let body = |e: serde_json::Error| Status::internal(e.to_string());
    let reply = match result {
        Ok(value) => {
            pb::RaftReply { body_json: serde_json::to_vec(&value).map_err(body)?, error_json: vec![] }
        }
        Err(error) => {
            pb::RaftReply { body_json: vec![], error_json: serde_json::to_vec(&error).map_err(body)? }
        }
    };
    Ok(Response::new(reply))
}

#[tonic::async_trait]
impl<M: Machine> Quorum for QuorumService<M> {
    async fn meet(&self, call: Call<pb::MeetRequest>) -> Result<Response<pb::MeetReply>, Status> {
        let route = call.get_ref().route.clone();
        let site = self.caller(&call, route.as_ref())?;
        let shown = route.map(|route| route.store).unwrap_or_default();
        let known = self.inner.admit(&site, &shown).await.map_err(|e| Status::unavailable(e.to_string()))?;
        let on_record = if known == shown { String::new() } else { known };
        Ok(Response::new(pb::MeetReply { store: self.inner.facts.store.clone(), on_record }))
    }

    async fn append(&self, call: Call<pb::RaftMessage>) -> Result<Response<pb::RaftReply>, Status> {
        self.voter(&call, call.get_ref().route.as_ref())?;
        let body = from_json("append", &call.get_ref().body_json)?;
        let result = self.inner.raft.append_entries(body).await;
        if result
            .as_ref()
            .is_ok_and(|answer| !matches!(answer, openraft::raft::AppendEntriesResponse::HigherVote(_)))
        {
            self.inner.heard();
        }
        reply(result)
    }

    async fn vote(&self, call: Call<pb::RaftMessage>) -> Result<Response<pb::RaftReply>, Status> {
        self.voter(&call, call.get_ref().route.as_ref())?;
        let body = from_json("vote", &call.get_ref().body_json)?;
        reply(self.inner.raft.vote(body).await)
    }

    async fn install_snapshot(
        &self,
        mut call: Call<Streaming<pb::SnapshotPart>>,
    ) -> Result<Response<pb::RaftReply>, Status> {
        let first = call.get_mut().message().await?.and_then(|part| part.header);
        let header = first.ok_or_else(|| Status::invalid_argument("a snapshot starts with its header"))?;
        self.voter(&call, header.route.as_ref())?;
        let vote: Vote<u64> = from_json("vote", &header.vote_json)?;
        let meta: SnapshotMeta<u64, Voter> = from_json("snapshot meta", &header.meta_json)?;
        let size = usize::try_from(header.size).ok().filter(|size| *size <= MESSAGE_MAX);
        let size =
            size.ok_or_else(|| Status::resource_exhausted(format!("a snapshot of {} bytes", header.size)))?;
        let mut data = Vec::with_capacity(size);
        while let Some(part) = call.get_mut().next().await {
            data.extend_from_slice(&part?.data);
            if data.len() > size {
                return Err(Status::invalid_argument("a snapshot is longer than its header says"));
            }
        }
        if data.len() != size {
            return Err(Status::invalid_argument(format!(
                "a snapshot of {size} bytes ended at {}",
                data.len()
            )));
        }
        let snapshot = Snapshot::<Types<M>> { meta, snapshot: Box::new(Cursor::new(data)) };
        let result = self.inner.raft.install_full_snapshot(vote, snapshot).await;
        self.inner.heard();
        reply(result)
    }

    async fn propose(&self, call: Call<pb::ProposeRequest>) -> Result<Response<pb::ProposeReply>, Status> {
        let site = self.voter(&call, call.get_ref().route.as_ref())?;
        let call = call.into_inner();
        let commands: Vec<M::Command> = from_json("commands", &call.commands_json)?;
        if commands.is_empty() || commands.len() > crate::BATCH_MAX {
            return Err(Status::invalid_argument(format!("{} commands in one entry", commands.len())));
        }
        let request = Request { proposer: voter_id(&site), life: call.life, seq: call.seq, commands };
        let outcome = self.inner.propose_for(request).await?;
        Ok(Response::new(pb::ProposeReply { outcome: Some(outcome) }))
    }

    async fn read_index(
        &self,
        call: Call<pb::ReadIndexRequest>,
    ) -> Result<Response<pb::ReadIndexReply>, Status> {
        self.voter(&call, call.get_ref().route.as_ref())?;
        let outcome = self.inner.read_index_for().await;
        Ok(Response::new(pb::ReadIndexReply { outcome: Some(outcome) }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use dc_wire::identity::Identity;
    use tonic::Code;

    use super::*;

    fn route(from: &str, to: &str, via: &str) -> pb::Route {
        pb::Route { from: from.into(), to: to.into(), via: via.into(), store: String::new() }
    }

    #[test]
    fn nobody_speaks_for_another_site_or_to_one_that_is_not_meant() {
        let fra = SiteId::new("fra").unwrap();
        let rome = Identity::new("lab", Role::Agent, "rome").unwrap();
        let operator = Identity::new("lab", Role::Operator, "rome").unwrap();
        let code = |who, route: &pb::Route| named(who, Some(route), &fra).map_err(|s| s.code());
        assert_eq!(code(&rome, &route("rome", "fra", "")), Ok(()));
        assert_eq!(code(&rome, &route("oslo", "fra", "")), Err(Code::PermissionDenied));
        assert_eq!(code(&operator, &route("rome", "fra", "")), Err(Code::PermissionDenied));
        assert_eq!(code(&rome, &route("rome", "oslo", "")), Err(Code::FailedPrecondition));
        assert_eq!(code(&rome, &route("rome", "fra", "oslo")), Err(Code::Unimplemented));
        assert!(named(&rome, None, &fra).is_err());
    }
}
