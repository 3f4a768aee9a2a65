//! Site to site: what each one saw, told every second; and a look at a plane for a plan.
//!
//! Nothing is ordered here: acts are ordered by the log alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dc_core::act::{Act, Evidence};
use dc_core::authority::Authority;
use dc_core::ids::{SiteId, Token};
use dc_plane::Deadline;
use dc_wire::convert::{ActAnswer, ActCall, ActFault, FaultKind, from_json, to_json};
use dc_wire::link::{Peer, channel};
use dc_wire::pb;
use dc_wire::pb::agent_client::AgentClient;
use dc_wire::tls::{Expected, Tls};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::duty::only_reads;
use crate::shelf::{Shelf, Told};

/// Between two digests.
const PERIOD: Duration = Duration::from_secs(1);
/// Of one connect with its handshake.
const CONNECT: Duration = Duration::from_secs(1);

/// What a site tells the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Digest {
    version: String,
    planes: Vec<Told>,
}

/// What is known of another site's agent.
#[derive(Debug, Clone)]
pub struct Heard {
    /// When it was last heard, by this host's clock.
    pub at: Instant,
    /// Of its agent.
    pub version: String,
}

/// The other agents.
pub struct Peers {
    me: SiteId,
    shelf: Arc<Shelf>,
    channels: BTreeMap<SiteId, Channel>,
    heard: Mutex<BTreeMap<SiteId, Heard>>,
}

impl Peers {
    /// Dials lazily; a site that is down costs nothing but its own calls.
    ///
    /// Errors: when an address is none.
    pub fn new(
        me: SiteId,
        voters: &BTreeMap<SiteId, String>,
        tls: &Arc<Tls>,
        shelf: Arc<Shelf>,
    ) -> Result<Self, dc_core::fail::Fail> {
        let mut channels = BTreeMap::new();
        for (site, address) in voters.iter().filter(|(site, _)| **site != me) {
            let expected = Expected::Agent(site.clone());
            channels.insert(site.clone(), channel(tls.clone(), address, expected, CONNECT)?);
        }
        Ok(Self { me, shelf, channels, heard: Mutex::default() })
    }

    /// When each other site was last heard.
    pub fn heard(&self, site: &SiteId) -> Option<Heard> {
        self.heard.lock().get(site).cloned()
    }

    /// Tells one site what was seen here every second, and takes in what it answers, for ever.
    pub async fn exchange(self: Arc<Self>, site: SiteId) {
        let Some(channel) = self.channels.get(&site).cloned() else { return };
        let mut client = AgentClient::new(channel);
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 1.. {
            tick.tick().await;
            let Ok(mine) = self.digest(number) else { continue };
            let mut request = Request::new(mine);
            request.set_timeout(PERIOD);
            if let Ok(theirs) = client.exchange(request).await {
                self.take(&site, &theirs.into_inner());
            }
        }
    }

    fn digest(&self, number: u64) -> Result<pb::Digest, dc_wire::convert::Unreadable> {
        let body = Digest { version: env!("CARGO_PKG_VERSION").into(), planes: self.shelf.told() };
        Ok(pb::Digest { site: self.me.to_string(), number, body_json: to_json("digest", &body)? })
    }

    fn take(&self, site: &SiteId, digest: &pb::Digest) {
        let Ok(body) = from_json::<Digest>("digest", &digest.body_json) else { return };
        self.shelf.heard(site, body.planes);
        self.heard.lock().insert(site.clone(), Heard { at: Instant::now(), version: body.version });
    }

    /// Has another site look at one of its planes, for a plan. Changes nothing there.
    ///
    /// Errors: in words, for the plan's findings.
    pub async fn check(&self, act: &Act, within: Duration) -> Result<Evidence, String> {
        let channel =
            self.channels.get(&act.site).cloned().ok_or_else(|| format!("{} is no voter", act.site))?;
        let call = ActCall { group: act.group.clone(), run: None, token: Token(0), within, act: act.clone() };
        let mut request = Request::new(pb::ActRequest::try_from(&call).map_err(|e| e.to_string())?);
        request.set_timeout(within + CONNECT);
        let reply = AgentClient::new(channel).probe(request).await;
        let reply = reply
            .map_err(|status| format!("the agent of {} does not answer: {}", act.site, status.message()))?;
        match ActAnswer::try_from(reply.into_inner()).map_err(|e| e.to_string())? {
            ActAnswer::Done(evidence) => Ok(evidence),
            ActAnswer::NotYet => Err("it answered nothing".into()),
            ActAnswer::Fault(fault) => Err(fault.text),
        }
    }
}

/// Looks at a plane of this site: a preflight, which only reads.
///
/// Errors: in words.
pub async fn look(shelf: &Shelf, act: &Act, within: Duration) -> Result<Evidence, String> {
    let kind = act.name.plane().filter(|_| only_reads(act.name)).ok_or("only preflights are looked at")?;
    let plane = shelf.plane(&act.group, kind)?;
    let until = Deadline::within(within);
    let looked = until.bound("preflight", plane.perform(act, &Authority::self_fence(), until)).await;
    looked.and_then(|inner| inner).map_err(|e| e.to_string())
}

/// The server's side.
pub struct PeerService(pub Arc<Peers>);

#[tonic::async_trait]
impl pb::agent_server::Agent for PeerService {
    async fn probe(&self, request: Request<pb::ActRequest>) -> Result<Response<pb::ActReply>, Status> {
        let call = ActCall::try_from(request.into_inner())?;
        if call.act.site != self.0.me {
            return Err(Status::invalid_argument(format!("this is {}, not {}", self.0.me, call.act.site)));
        }
        let within = call.within.min(Duration::from_mins(1));
        let answer = match look(&self.0.shelf, &call.act, within).await {
            Ok(evidence) => ActAnswer::Done(evidence),
            Err(text) => ActAnswer::Fault(ActFault {
                kind: FaultKind::Failed,
                code: "DC-0222".into(),
                text,
                token_max: None,
            }),
        };
        Ok(Response::new(pb::ActReply::try_from(answer)?))
    }

    async fn exchange(&self, request: Request<pb::Digest>) -> Result<Response<pb::Digest>, Status> {
        let caller = request.extensions().get::<Peer>().map(|peer| peer.identity.name().to_owned());
        let digest = request.into_inner();
        // A site speaks for itself alone, whatever its message says.
        let known = self.0.channels.keys().find(|site| Some(site.as_str()) == caller.as_deref()).cloned();
        let Some(site) = known.filter(|site| site.as_str() == digest.site) else {
            return Err(Status::permission_denied(format!("{caller:?} may not speak for {:?}", digest.site)));
        };
        self.0.take(&site, &digest);
        Ok(Response::new(self.0.digest(digest.number)?))
    }
}
