//! Finding an agent that answers, and the one that can do what is asked.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dc_core::fail::{Exit, Fail};
use dc_core::ids::SiteId;
use dc_core::view::StatusView;
use dc_wire::convert::{fail_of, from_json};
use dc_wire::identity::Identity;
use dc_wire::link::channel;
use dc_wire::pb;
use dc_wire::pb::control_client::ControlClient;
use dc_wire::tls::{Expected, Tls};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::context::Context;
use super::fails::{of, unexpected};
use super::out::Out;

/// How long an agent may take to be connected to.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long an agent may take to say how things are.
const STATUS_LIMIT: Duration = Duration::from_secs(4);
/// How often an agent may hang up before that is its answer: what it does to strangers.
const HANG_UPS_MAX: u32 = 4;
/// How often a hint to another agent is followed.
const HINTS_MAX: usize = 2;

pub(crate) type Client = ControlClient<Channel>;
type Reply = Result<Response<pb::Report>, Status>;

/// Every agent of a context.
pub(crate) struct Reach {
    /// Its environment, for people.
    pub environment: String,
    /// Who asks.
    pub me: Identity,
    agents: Vec<Agent>,
}

#[derive(Clone)]
struct Agent {
    site: SiteId,
    address: String,
    client: Client,
}

/// An agent that answered, with what it said.
pub(crate) struct Home {
    /// Its site.
    pub site: SiteId,
    /// What it said.
    pub view: StatusView,
    client: Client,
}

impl Home {
    /// Asks it.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whether it sees no quorum, so that all it says is its own view.
    pub(crate) fn local(&self) -> bool {
        !self.view.quorum.answering
    }

    /// Only a quorum changes anything.
    ///
    /// Errors: DC-0006 when the agent sees none.
    pub(crate) fn quorum(&self) -> Result<(), Fail> {
        if self.local() {
            let why =
                format!("{} answered and sees no majority of {} voters", self.site, self.view.quorum.voters);
            return Err(of("DC-0006", Exit::NoQuorum, "there is no quorum; nothing was changed", why)
                .next("dc-switch status"));
        }
        Ok(())
    }
}

impl Reach {
    /// Reads the files of a context; contacts nobody, but says whom it is going to.
    ///
    /// Errors: DC-0101 to DC-0105 about the files; DC-0008 for a certificate that has
    /// expired, since agents could only hang up on it; DC-0106.
    pub(crate) fn new(context: Context, out: &Out) -> Result<Self, Fail> {
        let cert = context.tls.cert.display().to_string();
        let tls = Arc::new(Tls::load(context.tls)?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if tls.expires() <= now {
            let why =
                format!("its life ended {} ago", super::out::span(millis(now.saturating_sub(tls.expires()))));
            return Err(of("DC-0008", Exit::NotAllowed, format!("certificate {cert} has expired"), why)
                .next(format!("dc-switch cert show {cert}")));
        }
        let mut agents = Vec::new();
        for (site, address) in context.agents {
            let expected = Expected::Agent(site.clone());
            let channel = channel(tls.clone(), &address, expected, CONNECT_LIMIT)?;
            agents.push(Agent { site, address, client: ControlClient::new(channel) });
        }
        let reach = Self { environment: context.environment, me: tls.identity(), agents };
        let whom: Vec<_> = reach.agents.iter().map(|a| format!("{} {}", a.site, a.address)).collect();
        out.say(&format!("{}: asking {}", super::out::clean(&reach.environment), whom.join(", ")));
        Ok(reach)
    }

    /// Asks all agents at once how things are and takes the first that sees a quorum, else
    /// the first that answers.
    ///
    /// Errors: none answers, with what each said.
    pub(crate) async fn meet(&self) -> Result<Home, Fail> {
        let mut asked: FuturesUnordered<_> = self.agents.iter().cloned().map(ask).collect();
        let (mut second, mut silent) = (None, Vec::new());
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(home) if !home.local() => return Ok(home),
                Ok(home) => second = second.or(Some(home)),
                Err(status) => silent.push(status),
            }
        }
        silent.sort_by(|a, b| a.0.cmp(&b.0));
        second.ok_or_else(|| no_answer(&silent))
    }

    /// Calls an agent for an order or a view, going on to the one it names.
    ///
    /// Errors: the agent's own refusal; gRPC's own failures in words.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        home: &Home,
        what: &'static str,
        limit: Duration,
        request: impl AsyncFn(Client) -> Reply,
    ) -> Result<T, Fail> {
        let (mut site, mut client) = (home.site.clone(), home.client());
        for _ in 0..HINTS_MAX {
            let status = match timeout(limit, request(client.clone())).await {
                Ok(Ok(reply)) => return read(what, &reply.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {} s", limit.as_secs())),
            };
            let Some((fail, hint)) = fail_of(&status) else { return Err(plainly(&site, what, &status)) };
            let next = hint.and_then(|hint| self.agents.iter().find(|a| a.site.as_str() == hint));
            match next.filter(|agent| agent.site != site) {
                Some(agent) => (site, client) = (agent.site.clone(), agent.client.clone()),
                None => return Err(fail),
            }
        }
        Err(unexpected("no agent did it; nothing was changed", "each names another one; try again"))
    }
}

async fn ask(agent: Agent) -> Result<Home, (SiteId, Status)> {
    let mut tries = 1;
    loop {
        match ask_once(&agent).await {
            Ok(view) => return Ok(Home { site: agent.site, view, client: agent.client }),
            // whether the alert is seen before the end of the connection is a matter of luck
            Err(status) if hung_up(&status) && tries < HANG_UPS_MAX => tries += 1,
            Err(status) => return Err((agent.site, status)),
        }
    }
}

async fn ask_once(agent: &Agent) -> Result<StatusView, Status> {
    let mut client = agent.client.clone();
    let asked = timeout(STATUS_LIMIT, client.status(pb::StatusRequest::default())).await;
    let reply = asked.map_err(|_| Status::deadline_exceeded("no answer"))??;
    Ok(from_json("status", &reply.into_inner().body_json)?)
}

/// Accepted the connection and closed it without a word.
fn hung_up(status: &Status) -> bool {
    let why = words(status);
    let ended = ["connection closed", "broken pipe", "reset by peer"].iter().any(|word| why.contains(word));
    ended && !about_certificates(&why)
}

/// Reads a report.
///
/// Errors: DC-0017 when it is not what this version knows.
pub(crate) fn read<T: DeserializeOwned>(what: &'static str, report: &pb::Report) -> Result<T, Fail> {
    from_json(what, &report.body_json).map_err(|e| {
        of("DC-0017", Exit::Unexpected, "the agent's answer cannot be read", e.to_string())
            .next("dc-switch version")
    })
}

fn millis(of: Duration) -> u64 {
    dc_core::time::millis(of)
}

/// gRPC's own failures in words; ours come whole in the details.
pub(crate) fn plainly(site: &SiteId, what: &str, status: &Status) -> Fail {
    let why = words(status);
    match status.code() {
        Code::PermissionDenied => {
            of("DC-0007", Exit::NotAllowed, "not allowed; nothing was changed", status.message())
                .next("dc-switch explain DC-0007")
        }
        Code::Unauthenticated => not_known(format!("{site} does not know the certificate"), why),
        _ if about_certificates(&why) => {
            not_known(format!("{site} and this end do not trust each other"), why)
        }
        Code::Unimplemented | Code::InvalidArgument => {
            of("DC-0017", Exit::Unexpected, format!("{site} does not understand the request for {what}"), why)
                .next("dc-switch version")
        }
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            let what = format!("{site} gave no answer; an order may or may not have been taken");
            of("DC-0005", Exit::NoQuorum, what, why).next("dc-switch run list")
        }
        code => unexpected(&format!("{site} failed with {code:?}"), &why),
    }
}

fn not_known(what: String, why: String) -> Fail {
    of("DC-0008", Exit::NotAllowed, what, why).next("dc-switch explain DC-0008")
}

fn no_answer(silent: &[(SiteId, Status)]) -> Fail {
    if let [(site, first), rest @ ..] = silent {
        let stranger = |s: &Status| {
            let refused = matches!(s.code(), Code::PermissionDenied | Code::Unauthenticated);
            refused || about_certificates(&words(s)) || hung_up(s)
        };
        if stranger(first) && rest.iter().all(|(_, s)| stranger(s)) {
            return match silent.iter().find(|(_, s)| !hung_up(s)) {
                Some((site, status)) => plainly(site, "status", status),
                None => not_known(format!("{site} hung up without a word"), words(first)),
            };
        }
    }
    let each: Vec<_> = silent.iter().map(|(site, status)| format!("{site}: {}", words(status))).collect();
    of("DC-0005", Exit::NoQuorum, "no agent answers", each.join("\n        "))
        .next("dc-switch explain DC-0005")
}

/// Under TLS 1.3 a client learns late, and from an alert only, that it was not let in.
fn about_certificates(why: &str) -> bool {
    why.contains("certificate") || why.contains("fatal alert")
}

/// A status with its causes.
fn words(status: &Status) -> String {
    let mut words = vec![status.message().to_owned()];
    let mut cause = status.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !words.iter().any(|said| said.contains(&text)) {
            words.push(text);
        }
        cause = inner.source();
    }
    words.retain(|w| !w.is_empty() && w != "transport error");
    if words.is_empty() { "the connection was closed without a word".into() } else { words.join(": ") }
}
