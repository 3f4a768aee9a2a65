//! Who may call what: one row per method, and nothing that has no row.

use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;
use tower::{Layer, Service};

use crate::identity::Role;
use crate::link::Peer;

/// The roles that may call one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// As gRPC spells it, as in `/dcswitch.v1.Control/Status`.
    pub path: &'static str,
    /// Agents of the other sites.
    pub agent: bool,
    /// Operators.
    pub operator: bool,
    /// Viewers.
    pub viewer: bool,
}

const YES: bool = true;
const NO: bool = false;

const fn row(path: &'static str, agent: bool, operator: bool, viewer: bool) -> Row {
    Row { path, agent, operator, viewer }
}

/// The whole table. A method that is not in it is called by nobody.
pub const METHODS: &[Row] = &[
    //                                             agent operator viewer
    row("/dcswitch.v1.Quorum/Meet", YES, NO, NO),
    row("/dcswitch.v1.Quorum/Append", YES, NO, NO),
    row("/dcswitch.v1.Quorum/Vote", YES, NO, NO),
    row("/dcswitch.v1.Quorum/InstallSnapshot", YES, NO, NO),
    row("/dcswitch.v1.Quorum/Propose", YES, NO, NO),
    row("/dcswitch.v1.Quorum/ReadIndex", YES, NO, NO),
    row("/dcswitch.v1.Agent/Probe", YES, NO, NO),
    row("/dcswitch.v1.Agent/Exchange", YES, NO, NO),
    row("/dcswitch.v1.Control/Status", YES, YES, YES),
    row("/dcswitch.v1.Control/Plan", NO, YES, YES),
    row("/dcswitch.v1.Control/Switchover", NO, YES, NO),
    row("/dcswitch.v1.Control/RunList", YES, YES, YES),
    row("/dcswitch.v1.Control/RunShow", YES, YES, YES),
    row("/dcswitch.v1.Control/RunWatch", YES, YES, YES),
    row("/dcswitch.v1.Control/RunAbort", NO, YES, NO),
    row("/dcswitch.v1.Control/RunRetry", NO, YES, NO),
    row("/dcswitch.v1.Control/RunReturn", NO, YES, NO),
    row("/dcswitch.v1.Control/GroupApply", NO, YES, NO),
    row("/dcswitch.v1.Control/GroupShow", YES, YES, YES),
    row("/dcswitch.v1.Control/GroupDiff", NO, YES, YES),
    row("/dcswitch.v1.Control/DagsPublish", NO, YES, NO),
];

/// Whether a role may call a method.
pub fn allowed(path: &str, role: Role) -> bool {
    METHODS.iter().find(|row| row.path == path).is_some_and(|row| match role {
        Role::Agent => row.agent,
        Role::Operator => row.operator,
        Role::Viewer => row.viewer,
    })
}

/// Judges one call.
///
/// Errors: `unauthenticated` without a peer or with one whose certificate has run out since
/// it connected; `permission_denied` with the role and method named.
pub fn judge(path: &str, peer: Option<&Peer>) -> Result<(), Status> {
    let peer = peer.ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    if peer.expired() {
        return Err(Status::unauthenticated(format!("the certificate of {} has expired", peer.identity)));
    }
    if allowed(path, peer.identity.role()) {
        Ok(())
    } else {
        let (role, name) = (peer.identity.role(), peer.identity.name());
        Err(Status::permission_denied(format!("{role} {name} may not call {path}")))
    }
}

/// Puts the table before every handler.
#[derive(Debug, Clone, Copy, Default)]
pub struct AccessLayer;

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;
    fn layer(&self, inner: S) -> Access<S> {
        Access { inner }
    }
}

/// A service behind the table.
#[derive(Debug, Clone)]
pub struct Access<S> {
    inner: S,
}

type Answer<E> = std::pin::Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

impl<S> Service<http::Request<Body>> for Access<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Send,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match judge(request.uri().path(), request.extensions().get::<Peer>()) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(status) => {
                tracing::warn!(path = request.uri().path(), why = status.message(), "call refused");
                Box::pin(std::future::ready(Ok(status.into_http())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_without_a_row_is_called_by_nobody() {
        for role in Role::ALL {
            assert!(!allowed("/dcswitch.v1.Control/Format", role));
            assert!(!allowed("/dcswitch.v1.Control/status", role));
        }
    }

    #[test]
    fn only_agents_speak_raft_and_perform_acts_and_only_operators_order() {
        for row in METHODS {
            let between_agents = row.path.contains(".Quorum/") || row.path.contains(".Agent/");
            if between_agents {
                assert!(row.agent && !row.operator && !row.viewer, "{}", row.path);
            } else {
                assert!(row.operator, "{}", row.path);
                assert!(!row.viewer || !orders(row.path), "a viewer may call {}", row.path);
                assert!(!row.agent || !orders(row.path), "an agent may call {}", row.path);
            }
        }
    }

    fn orders(path: &str) -> bool {
        ["Switchover", "RunAbort", "RunRetry", "RunReturn", "GroupApply", "DagsPublish"]
            .iter()
            .any(|word| path.ends_with(word))
    }

    #[test]
    fn a_call_without_a_certificate_is_refused() {
        let refused = judge("/dcswitch.v1.Control/Status", None);
        assert_eq!(refused.map_err(|s| s.code()), Err(tonic::Code::Unauthenticated));
    }
}
