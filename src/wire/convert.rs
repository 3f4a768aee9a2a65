//! Between the messages of the wire and the types of the house; `pb` types stop here.

use std::time::Duration;

use dc_core::act::{Act, Evidence};
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::{GroupName, RunId, Token};
use dc_core::time::millis;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::Status;

use crate::pb;

/// A message from outside that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is not readable: {why}")]
pub struct Unreadable {
    what: &'static str,
    why: String,
}

impl From<Unreadable> for Status {
    fn from(bad: Unreadable) -> Self {
        Status::invalid_argument(bad.to_string())
    }
}

/// Reads a JSON body.
///
/// Errors: `Unreadable` naming `what`.
pub fn from_json<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, Unreadable> {
    serde_json::from_slice(body).map_err(|e| Unreadable { what, why: e.to_string() })
}

/// Writes a JSON body.
///
/// Errors: `Unreadable` naming `what`; only types that JSON cannot carry have one.
pub fn to_json<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, Unreadable> {
    serde_json::to_vec(value).map_err(|e| Unreadable { what, why: e.to_string() })
}

/// The leader's order to a site: one act under one token.
#[derive(Debug, Clone, PartialEq)]
pub struct ActCall {
    /// In which group.
    pub group: GroupName,
    /// By which run; none for upkeep.
    pub run: Option<RunId>,
    /// Log position of the committed intent.
    pub token: Token,
    /// How long it may take, counted from its arrival.
    pub within: Duration,
    /// What.
    pub act: Act,
}

impl TryFrom<pb::ActRequest> for ActCall {
    type Error = Unreadable;
    fn try_from(from: pb::ActRequest) -> Result<Self, Unreadable> {
        let act: Act = from_json("act", &from.act_json)?;
        let group = GroupName::new(&from.group)
            .map_err(|e| Unreadable { what: "group of an act", why: e.to_string() })?;
        let run = (!from.run.is_empty()).then_some(RunId(from.run));
        if act.group != group || act.run != run {
            let why = format!("it is for {group}, its act for {}", act.group);
            return Err(Unreadable { what: "act request", why });
        }
        let within = Duration::from_millis(from.deadline_ms);
        Ok(Self { group, run, token: Token(from.token), within, act })
    }
}

impl TryFrom<&ActCall> for pb::ActRequest {
    type Error = Unreadable;
    fn try_from(from: &ActCall) -> Result<Self, Unreadable> {
        Ok(Self {
            group: from.group.to_string(),
            run: from.run.as_ref().map(ToString::to_string).unwrap_or_default(),
            token: from.token.0,
            deadline_ms: millis(from.within),
            act_json: to_json("act", &from.act)?,
        })
    }
}

/// Why a site did not do an act, for the leader to decide on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The site has seen a higher token of the group.
    Stale,
    /// The site has no memory of tokens yet, or is starting; ask again.
    NotReady,
    /// Its deadline passed.
    TimedOut,
    /// A part did not answer.
    Unreachable,
    /// It must not be done now; nothing was changed.
    Refused,
    /// It was tried and did not succeed; what it left may be probed.
    Failed,
    /// Only the leader can do it.
    NotLeader,
}

impl FaultKind {
    const WORDS: [(Self, &'static str); 7] = [
        (Self::Stale, "stale"),
        (Self::NotReady, "not_ready"),
        (Self::TimedOut, "timed_out"),
        (Self::Unreachable, "unreachable"),
        (Self::Refused, "refused"),
        (Self::Failed, "failed"),
        (Self::NotLeader, "not_leader"),
    ];

    /// The word on the wire.
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(kind, _)| *kind == self).map_or("failed", |(_, word)| word)
    }

    /// The kind of a word; an unknown word, from a newer site, counts as a failure.
    pub fn of(word: &str) -> Self {
        Self::WORDS.iter().find(|(_, known)| *known == word).map_or(Self::Failed, |(kind, _)| *kind)
    }
}

/// What a site answers instead of evidence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code} {text}")]
pub struct ActFault {
    /// What the leader decides on.
    pub kind: FaultKind,
    /// Page of the error catalogue; may be empty.
    pub code: String,
    /// What and why.
    pub text: String,
    /// The highest token seen; set by `Stale`.
    pub token_max: Option<Token>,
}

impl From<ActFault> for pb::Fault {
    fn from(from: ActFault) -> Self {
        Self {
            kind: from.kind.word().to_owned(),
            code: from.code,
            text: from.text,
            token_max: from.token_max.map(|token| token.0),
            ..Self::default()
        }
    }
}

impl From<pb::Fault> for ActFault {
    fn from(from: pb::Fault) -> Self {
        Self {
            kind: FaultKind::of(&from.kind),
            code: from.code,
            text: from.text,
            token_max: from.token_max.map(Token),
        }
    }
}

/// What a site answers to an act: evidence, that the work does not stand (a probe's answer), or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActAnswer {
    /// It stands, and this shows it.
    Done(Evidence),
    /// It has to be done.
    NotYet,
    /// It was not done.
    Fault(ActFault),
}

impl TryFrom<ActAnswer> for pb::ActReply {
    type Error = Unreadable;
    fn try_from(from: ActAnswer) -> Result<Self, Unreadable> {
        use pb::act_reply::Outcome;
        let outcome = match from {
            ActAnswer::Done(evidence) => Outcome::EvidenceJson(to_json("evidence", &evidence)?),
            ActAnswer::NotYet => Outcome::NotYet(pb::NotYet {}),
            ActAnswer::Fault(fault) => Outcome::Fault(fault.into()),
        };
        Ok(Self { outcome: Some(outcome) })
    }
}

impl TryFrom<pb::ActReply> for ActAnswer {
    type Error = Unreadable;
    fn try_from(from: pb::ActReply) -> Result<Self, Unreadable> {
        use pb::act_reply::Outcome;
        match from.outcome {
            Some(Outcome::EvidenceJson(body)) => Ok(Self::Done(from_json("evidence", &body)?)),
            Some(Outcome::NotYet(_)) => Ok(Self::NotYet),
            Some(Outcome::Fault(fault)) => Ok(Self::Fault(fault.into())),
            None => Err(Unreadable { what: "answer to an act", why: "it is empty".into() }),
        }
    }
}

/// A failure as a gRPC status, whole in its details. `leader` is where to ask instead.
pub fn status_of(fail: &Fail, leader: Option<&str>) -> Status {
    let fault = pb::Fault {
        kind: if leader.is_some() { FaultKind::NotLeader.word() } else { word_of(fail.exit) }.to_owned(),
        code: fail.code.to_string(),
        text: fail.what.clone(),
        why: fail.why.clone(),
        next: fail.next.clone(),
        token_max: None,
        leader: leader.unwrap_or_default().to_owned(),
        findings_json: serde_json::to_vec(&fail.findings).unwrap_or_default(),
    };
    let code = match fail.exit {
        _ if leader.is_some() => tonic::Code::Unavailable,
        Exit::Usage => tonic::Code::InvalidArgument,
        Exit::NoQuorum => tonic::Code::Unavailable,
        Exit::NotAllowed => tonic::Code::NotFound,
        Exit::Refused | Exit::NotConfirmed | Exit::Findings => tonic::Code::FailedPrecondition,
        _ => tonic::Code::Aborted,
    };
    Status::with_details(code, fail.to_string(), fault.encode_to_vec().into())
}

/// The failure in a gRPC status, with the site to ask instead; none when the status is
/// gRPC's own and not ours.
pub fn fail_of(status: &Status) -> Option<(Fail, Option<String>)> {
    if status.details().is_empty() {
        return None;
    }
    let fault = pb::Fault::decode(status.details()).ok()?;
    let findings = from_json("findings", &fault.findings_json).unwrap_or_default();
    let exit = exit_of(&fault.kind);
    let fail =
        Fail::new(Code::from_text(&fault.code), exit, fault.text, fault.why).next(fault.next).with(findings);
    Some((fail, (!fault.leader.is_empty()).then_some(fault.leader)))
}

const EXITS: [(Exit, &str); 12] = [
    (Exit::Done, "done"),
    (Exit::Unexpected, "unexpected"),
    (Exit::Usage, "usage"),
    (Exit::NoQuorum, "no_quorum"),
    (Exit::NotAllowed, "not_allowed"),
    (Exit::Refused, "refused"),
    (Exit::RolledBack, "rolled_back"),
    (Exit::NeedsHuman, "needs_human"),
    (Exit::StillRunning, "still_running"),
    (Exit::NotConfirmed, "not_confirmed"),
    (Exit::Findings, "findings"),
    (Exit::Detached, "detached"),
];

fn word_of(exit: Exit) -> &'static str {
    EXITS.iter().find(|(known, _)| *known == exit).map_or("unexpected", |(_, word)| word)
}

fn exit_of(word: &str) -> Exit {
    let exit = EXITS.iter().find(|(_, known)| *known == word).map(|(exit, _)| *exit);
    exit.unwrap_or(if word == "not_leader" { Exit::NoQuorum } else { Exit::Unexpected })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use dc_core::act::Outcome;
    use dc_core::position::{Ends, Position};

    use super::*;

    #[test]
    fn a_failure_crosses_the_wire_whole() {
        let fail =
            Fail::refused(Code::LAG_ABOVE_LIMIT, "switchover refused", "18 MB, limit 1 MB").next("wait");
        let crossed = fail_of(&status_of(&fail, None));
        assert_eq!(crossed, Some((fail.clone(), None)));
        let hinted = fail_of(&status_of(&fail, Some("fra")));
        assert_eq!(hinted.and_then(|(_, leader)| leader).as_deref(), Some("fra"));
        assert_eq!(fail_of(&Status::unavailable("transport")), None);
    }

    #[test]
    fn a_stale_token_says_the_maximum() {
        let fault = ActFault {
            kind: FaultKind::Stale,
            code: "DC-0218".into(),
            text: "token 5 is stale".into(),
            token_max: Some(Token(9)),
        };
        let reply = pb::ActReply::try_from(ActAnswer::Fault(fault.clone()));
        assert_eq!(reply.and_then(ActAnswer::try_from), Ok(ActAnswer::Fault(fault)));
    }

    #[test]
    fn the_cut_of_a_kafka_plane_survives_json() {
        let ends = Ends::from([("orders".to_owned(), BTreeMap::from([(0, 7), (11, 9)]))]);
        let position = Position::Kafka { source: ends.clone(), target: ends };
        let evidence = Evidence::changed("drained").with(Outcome::Position(position));
        let body = to_json("evidence", &evidence).unwrap_or_default();
        assert_eq!(from_json("evidence", &body), Ok(evidence));
    }

    #[test]
    fn an_unknown_kind_of_a_newer_site_counts_as_a_failure() {
        assert_eq!(FaultKind::of("melted"), FaultKind::Failed);
    }
}
