//! Raft's calls to the other voters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dc_core::fail::Fail;
use dc_core::ids::SiteId;
use dc_wire::convert::to_json;
use dc_wire::link::channel;
use dc_wire::pb;
use dc_wire::pb::quorum_client::QuorumClient;
use dc_wire::tls::{Expected, Tls};
use openraft::error::{
    Fatal, InstallSnapshotError, RPCError, RaftError, RemoteError, ReplicationClosed, StreamingError,
    Timeout, Unreachable,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{AnyError, OptionalSend, RPCTypes, RaftNetwork, RaftNetworkFactory, Snapshot, Vote};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::Machine;
use crate::types::{Types, Voter, voter_id};

/// Largest message between voters: a full round of replication.
pub(crate) const MESSAGE_MAX: usize = 64 * 1024 * 1024;
/// Size of one part of a snapshot on the wire.
const PART: usize = 256 * 1024;

/// One other voter, as this site reaches it.
#[derive(Clone)]
pub(crate) struct Peer {
    pub site: SiteId,
    pub client: QuorumClient<Channel>,
    pub route: pb::Route,
}

/// The other voters by their number.
#[derive(Clone)]
pub(crate) struct Peers {
    all: Arc<BTreeMap<u64, Peer>>,
    me: u64,
    pause: Duration,
}

impl Peers {
    /// Prepares a channel to each address; none is dialled yet.
    ///
    /// Errors: DC-0106 for what is no address.
    pub fn new(
        me: &SiteId,
        store: &str,
        addresses: &BTreeMap<SiteId, String>,
        tls: &Arc<Tls>,
        heartbeat: Duration,
    ) -> Result<Self, Fail> {
        let mut all = BTreeMap::new();
        for (site, address) in addresses.iter().filter(|(site, _)| *site != me) {
            let limit = (heartbeat * 4).max(Duration::from_millis(500));
            let dialled = channel(tls.clone(), address, Expected::Agent(site.clone()), limit)?;
            let client = QuorumClient::new(dialled)
                .max_decoding_message_size(MESSAGE_MAX)
                .max_encoding_message_size(MESSAGE_MAX);
            let route = pb::Route {
                from: me.to_string(),
                to: site.to_string(),
                via: String::new(),
                store: store.to_owned(),
            };
            all.insert(voter_id(site), Peer { site: site.clone(), client, route });
        }
        Ok(Self { all: Arc::new(all), me: voter_id(me), pause: heartbeat })
    }

    pub fn get(&self, id: u64) -> Option<&Peer> {
        self.all.get(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Peer)> {
        self.all.iter().map(|(id, peer)| (*id, peer))
    }

    /// The site of a number, this one excepted.
    pub fn site(&self, id: u64) -> Option<&SiteId> {
        self.all.get(&id).map(|peer| &peer.site)
    }
}

impl<M: Machine> RaftNetworkFactory<Types<M>> for Peers {
    type Network = Wire;

    async fn new_client(&mut self, target: u64, voter: &Voter) -> Wire {
        let peer = self.get(target).cloned();
        Wire { me: self.me, target, name: voter.site.clone(), peer, pause: self.pause }
    }
}

/// The engine's way to one voter.
pub(crate) struct Wire {
    me: u64,
    target: u64,
    name: String,
    peer: Option<Peer>,
    pause: Duration,
}

#[derive(Debug, thiserror::Error)]
enum WireError {
    #[error("{0} is not in [peers]")]
    Unknown(String),
    #[error("{site}: {status}")]
    Call { site: String, status: Status },
    #[error("a message could not be read or written: {0}")]
    Content(String),
}

impl WireError {
    fn unreachable(&self) -> Unreachable {
        Unreachable::from(AnyError::new(self))
    }
}

type Rpc<T, E> = Result<T, RPCError<u64, Voter, RaftError<u64, E>>>;

impl Wire {
    fn peer(&self) -> Result<Peer, WireError> {
        self.peer.clone().ok_or_else(|| WireError::Unknown(self.name.clone()))
    }

    fn late(&self, action: RPCTypes, after: Duration) -> Timeout<u64> {
        Timeout { action, id: self.me, target: self.target, timeout: after }
    }

    fn read<T, E>(&self, reply: Result<Response<pb::RaftReply>, Status>) -> Rpc<T, E>
    where
        T: DeserializeOwned,
        E: DeserializeOwned + std::error::Error,
        RaftError<u64, E>: DeserializeOwned,
    {
        let reply =
            reply.map_err(|status| WireError::Call { site: self.name.clone(), status }.unreachable())?;
        let reply = reply.into_inner();
        let content = |e: serde_json::Error| WireError::Content(e.to_string()).unreachable();
        if reply.error_json.is_empty() {
            Ok(serde_json::from_slice(&reply.body_json).map_err(content)?)
        } else {
            let error: RaftError<u64, E> = serde_json::from_slice(&reply.error_json).map_err(content)?;
            Err(RemoteError::new(self.target, error).into())
        }
    }

    fn message<B: Serialize>(peer: &Peer, body: &B) -> Result<pb::RaftMessage, WireError> {
        let body_json = to_json("raft message", body).map_err(|e| WireError::Content(e.to_string()))?;
        Ok(pb::RaftMessage { route: Some(peer.route.clone()), body_json })
    }
}

impl<M: Machine> RaftNetwork<Types<M>> for Wire {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types<M>>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<u64>, openraft::error::Infallible> {
        let mut peer = self.peer().map_err(|e| e.unreachable())?;
        let message = Self::message(&peer, &rpc).map_err(|e| e.unreachable())?;
        let call = timeout(option.hard_ttl(), peer.client.append(message)).await;
        self.read(call.map_err(|_| self.late(RPCTypes::AppendEntries, option.hard_ttl()))?)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<u64>, openraft::error::Infallible> {
        let mut peer = self.peer().map_err(|e| e.unreachable())?;
        let message = Self::message(&peer, &rpc).map_err(|e| e.unreachable())?;
        let call = timeout(option.hard_ttl(), peer.client.vote(message)).await;
        self.read(call.map_err(|_| self.late(RPCTypes::Vote, option.hard_ttl()))?)
    }

    /// Never called: snapshots travel whole, by `full_snapshot`.
    async fn install_snapshot(
        &mut self,
        _rpc: InstallSnapshotRequest<Types<M>>,
        _option: RPCOption,
    ) -> Rpc<InstallSnapshotResponse<u64>, InstallSnapshotError> {
        Err(WireError::Content("snapshots are not sent in chunks".into()).unreachable().into())
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types<M>>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types<M>, Fatal<u64>>> {
        let mut peer = self.peer().map_err(|e| e.unreachable())?;
        let content = |e: serde_json::Error| WireError::Content(e.to_string()).unreachable();
        let data = snapshot.snapshot.into_inner();
        let header = pb::SnapshotHeader {
            route: Some(peer.route.clone()),
            vote_json: serde_json::to_vec(&vote).map_err(content)?,
            meta_json: serde_json::to_vec(&snapshot.meta).map_err(content)?,
            size: data.len() as u64,
        };
        let mut parts = vec![pb::SnapshotPart { header: Some(header), data: Vec::new() }];
        parts.extend(data.chunks(PART).map(|bytes| pb::SnapshotPart { header: None, data: bytes.to_vec() }));
        let call = peer.client.install_snapshot(Request::new(tokio_stream::iter(parts)));
        let reply = tokio::select! {
            closed = cancel => return Err(closed.into()),
            reply = timeout(option.hard_ttl(), call) => reply,
        };
        let reply = reply.map_err(|_| self.late(RPCTypes::InstallSnapshot, option.hard_ttl()))?;
        let reply =
            reply.map_err(|status| WireError::Call { site: self.name.clone(), status }.unreachable())?;
        let reply = reply.into_inner();
        if reply.error_json.is_empty() {
            Ok(serde_json::from_slice(&reply.body_json).map_err(content)?)
        } else {
            let fatal: Fatal<u64> = serde_json::from_slice(&reply.error_json).map_err(content)?;
            Err(RemoteError::new(self.target, fatal).into())
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(self.pause))
    }
}
