//! From a site that wants something to the leader that can have it committed.
//!
//! A request keeps its id through every attempt, so that sending it again is always safe.
//! "Not known" is said whenever an attempt may have reached a log.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dc_core::ids::Token;
use dc_wire::convert::{from_json, to_json};
use dc_wire::link::never_sent;
use dc_wire::pb;
use openraft::ServerState;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::{Code, Status};

use crate::engine::Inner;
use crate::founding::Standing;
use crate::network::Peer;
use crate::replica::token;
use crate::types::{Outcome, Request};
use crate::{BATCH_BYTES_MAX, BATCH_MAX, BarrierError, Machine, ProposeError};

/// Between two looks for a leader, when nothing tells of one.
const LOOK: Duration = Duration::from_millis(25);

/// What one attempt came to.
enum Attempt<T> {
    Done(T),
    /// Certainly not taken; perhaps that voter leads.
    Elsewhere(Option<u64>),
    /// Taken or not, nobody said.
    NoAnswer,
    /// Outside the memory of requests.
    Forgotten,
    /// The engine here has stopped.
    Dead,
}

type Committed<M> = (u64, Vec<<M as Machine>::Answer>);

/// Whom to try next.
struct Search {
    hint: Option<u64>,
    avoid: Option<u64>,
    turn: usize,
}

impl<M: Machine> Inner<M> {
    pub async fn propose(
        &self,
        commands: Vec<M::Command>,
        until: Instant,
    ) -> Result<Vec<(Token, M::Answer)>, ProposeError> {
        let began = Instant::now();
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let body =
            to_json("commands", &commands).map_err(|e| ProposeError::Stopped { why: e.to_string() })?;
        if commands.len() > BATCH_MAX || body.len() > BATCH_BYTES_MAX {
            return Err(ProposeError::TooLarge { commands: commands.len(), bytes: body.len() });
        }
        match &*self.standing.borrow() {
            Standing::Refused { by } => return Err(ProposeError::Refused { by: by.clone() }),
            Standing::Stopped => return Err(ProposeError::Stopped { why: "it has stopped".into() }),
            Standing::Member | Standing::Founding { .. } => {}
        }
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let request = Request { proposer: self.id, life: self.facts.life, seq, commands };
        let mut search = Search { hint: None, avoid: None, turn: 0 };
        let mut sent = false;
        while Instant::now() < until {
            let target = self.next(&mut search);
            let attempt = match target.and_then(|id| self.peers.get(id)) {
                _ if target == Some(self.id) => self.here(&request, until).await,
                Some(peer) => self.there(peer, seq, &body, until).await,
                None => Attempt::Elsewhere(None),
            };
            match attempt {
                Attempt::Done((index, answers)) => {
                    self.record_commit(began.elapsed());
                    return Ok((0..).zip(answers).map(|(k, answer)| (token(index, k), answer)).collect());
                }
                Attempt::Elsewhere(Some(id)) if Some(id) != target => search.hint = Some(id),
                Attempt::Elsewhere(_) => {
                    search.avoid = target;
                    self.look(until).await;
                }
                Attempt::NoAnswer => {
                    sent = true;
                    search.avoid = target;
                    self.look(until).await;
                }
                Attempt::Forgotten => return Err(ProposeError::Unknown { waited: began.elapsed() }),
                Attempt::Dead if sent => return Err(ProposeError::Unknown { waited: began.elapsed() }),
                Attempt::Dead => return Err(ProposeError::Stopped { why: "it has stopped".into() }),
            }
        }
        let waited = began.elapsed();
        Err(if sent { ProposeError::Unknown { waited } } else { ProposeError::NoLeader { waited } })
    }

    pub async fn barrier(&self, until: Instant) -> Result<u64, BarrierError> {
        let began = Instant::now();
        match &*self.standing.borrow() {
            Standing::Refused { by } => return Err(BarrierError::Refused { by: by.clone() }),
            Standing::Stopped => return Err(BarrierError::Stopped),
            Standing::Member | Standing::Founding { .. } => {}
        }
        let index = self.read_index(began, until).await?;
        let mut applied = self.replica.watch();
        let reached = timeout_at(until, applied.wait_for(|applied| applied.index >= index)).await;
        match reached {
            Ok(Ok(_)) => Ok(index),
            Ok(Err(_)) => Err(BarrierError::Stopped),
            Err(_) => {
                let applied = self.replica.watch().borrow().index;
                Err(BarrierError::Behind { index, applied, waited: began.elapsed() })
            }
        }
    }

    async fn read_index(&self, began: Instant, until: Instant) -> Result<u64, BarrierError> {
        let mut search = Search { hint: None, avoid: None, turn: 0 };
        while Instant::now() < until {
            let target = self.next(&mut search);
            let attempt = match target.and_then(|id| self.peers.get(id)) {
                _ if target == Some(self.id) => self.read_here(until).await,
                Some(peer) => self.read_there(peer, until).await,
                None => Attempt::Elsewhere(None),
            };
            match attempt {
                Attempt::Done(index) => return Ok(index),
                Attempt::Elsewhere(Some(id)) if Some(id) != target => search.hint = Some(id),
                Attempt::Elsewhere(_) | Attempt::Forgotten | Attempt::NoAnswer => {
                    search.avoid = target;
                    self.look(until).await;
                }
                Attempt::Dead => return Err(BarrierError::Stopped),
            }
        }
        Err(BarrierError::NoQuorum { waited: began.elapsed() })
    }

    /// A hint, else the leader as known here unless it just did not answer, else each in turn.
    fn next(&self, search: &mut Search) -> Option<u64> {
        if let Some(hint) = search.hint.take() {
            return Some(hint);
        }
        let leader = self.leader_id();
        if leader.is_some() && leader != search.avoid.take() {
            return leader;
        }
        let others: Vec<u64> = self.peers.iter().map(|(id, _)| id).collect();
        search.turn += 1;
        others.get(search.turn % others.len().max(1)).copied()
    }

    /// Waits a little for word of another leader.
    async fn look(&self, until: Instant) {
        let mut server = self.raft.server_metrics();
        server.mark_unchanged();
        let soon = until.min(Instant::now() + LOOK);
        if timeout_at(soon, server.changed()).await.is_ok_and(|changed| changed.is_err()) {
            sleep_until(soon).await; // the engine has stopped: nothing will change
        }
    }

    async fn here(&self, request: &Request<M::Command>, until: Instant) -> Attempt<Committed<M>> {
        let mut server = self.raft.server_metrics();
        let lost = server.wait_for(|now| now.state != ServerState::Leader);
        tokio::select! {
            biased;
            outcome = self.write(request.clone()) => outcome,
            lost = lost => if lost.is_ok() { Attempt::NoAnswer } else { Attempt::Dead },
            () = sleep_until(until) => Attempt::NoAnswer,
        }
    }

    /// Appends at this leader and waits for the commit.
    async fn write(&self, request: Request<M::Command>) -> Attempt<Committed<M>> {
        match self.raft.client_write(request).await {
            Ok(written) => match written.data {
                Outcome::Applied { index, answers } => Attempt::Done((index, answers)),
                Outcome::Forgotten | Outcome::Own => Attempt::Forgotten,
            },
            Err(why) if why.fatal().is_some() => Attempt::Dead,
            // a leader that steps down says the same of an entry that it already sent
            Err(_) => Attempt::NoAnswer,
        }
    }

    /// Serves a proposal that another site sent here.
    ///
    /// Errors: as a gRPC status, when whether it was taken is not known.
    pub async fn propose_for(
        &self,
        request: Request<M::Command>,
    ) -> Result<pb::propose_reply::Outcome, Status> {
        if self.raft.server_metrics().borrow().state != ServerState::Leader {
            return Ok(pb::propose_reply::Outcome::NotLeader(pb::NotLeader { leader: self.leader_word() }));
        }
        match self.write(request).await {
            Attempt::Done((index, answers)) => {
                let answers_json = to_json("answers", &answers)?;
                Ok(pb::propose_reply::Outcome::Committed(pb::Committed { index, answers_json }))
            }
            Attempt::Forgotten => Ok(pb::propose_reply::Outcome::Forgotten(pb::Forgotten {})),
            _ => Err(Status::aborted("the leader changed; whether it was taken is not known")),
        }
    }

    async fn there(&self, peer: &Peer, seq: u64, body: &[u8], until: Instant) -> Attempt<Committed<M>> {
        let call = pb::ProposeRequest {
            route: Some(peer.route.clone()),
            life: self.facts.life,
            seq,
            commands_json: body.to_vec(),
        };
        let mut client = peer.client.clone();
        let reply = match timeout_at(self.attempt_end(until), client.propose(call)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(status)) if turned_away(&status) => return Attempt::Elsewhere(None),
            Ok(Err(_)) | Err(_) => return Attempt::NoAnswer,
        };
        match reply.into_inner().outcome {
            Some(pb::propose_reply::Outcome::Committed(done)) => {
                match from_json("answers", &done.answers_json) {
                    Ok(answers) => Attempt::Done((done.index, answers)),
                    Err(why) => {
                        tracing::error!(%why, peer = %peer.site, "committed, but its answers are not readable");
                        Attempt::Forgotten
                    }
                }
            }
            Some(pb::propose_reply::Outcome::NotLeader(hint)) => Attempt::Elsewhere(self.id_of(&hint.leader)),
            Some(pb::propose_reply::Outcome::Forgotten(_)) => Attempt::Forgotten,
            None => Attempt::NoAnswer,
        }
    }

    async fn read_here(&self, until: Instant) -> Attempt<u64> {
        match timeout_at(until, self.raft.get_read_log_id()).await {
            Ok(Ok((index, _))) => Attempt::Done(index.map_or(0, |id| id.index)),
            Ok(Err(why)) if why.fatal().is_some() => Attempt::Dead,
            Ok(Err(_)) | Err(_) => Attempt::Elsewhere(None),
        }
    }

    /// Serves another site's wish to read.
    pub async fn read_index_for(&self) -> pb::read_index_reply::Outcome {
        match self.raft.get_read_log_id().await {
            Ok((index, _)) => pb::read_index_reply::Outcome::Index(index.map_or(0, |id| id.index)),
            Err(_) => pb::read_index_reply::Outcome::NotLeader(pb::NotLeader { leader: self.leader_word() }),
        }
    }

    async fn read_there(&self, peer: &Peer, until: Instant) -> Attempt<u64> {
        let call = pb::ReadIndexRequest { route: Some(peer.route.clone()) };
        let mut client = peer.client.clone();
        let Ok(Ok(reply)) = timeout_at(self.attempt_end(until), client.read_index(call)).await else {
            return Attempt::NoAnswer;
        };
        match reply.into_inner().outcome {
            Some(pb::read_index_reply::Outcome::Index(index)) => Attempt::Done(index),
            Some(pb::read_index_reply::Outcome::NotLeader(hint)) => {
                Attempt::Elsewhere(self.id_of(&hint.leader))
            }
            None => Attempt::NoAnswer,
        }
    }

    /// An attempt at another site gets two commits' time and no less than 250 ms: a proposal
    /// sent right after its receiver died is lost without a word.
    fn attempt_end(&self, until: Instant) -> Instant {
        let span = (self.profile.round_trip * 4 + Duration::from_millis(100)).max(Duration::from_millis(250));
        until.min(Instant::now() + span)
    }
}

/// Whether a call certainly proposed nothing: it was refused first, or never left.
fn turned_away(status: &Status) -> bool {
    let first = [
        Code::PermissionDenied,
        Code::FailedPrecondition,
        Code::Unauthenticated,
        Code::Unimplemented,
        Code::InvalidArgument,
    ];
    first.contains(&status.code()) || never_sent(status)
}
