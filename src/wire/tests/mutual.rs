//! Two ends of a connection: who gets in, who is refused, and when the files change.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dc_core::ids::SiteId;
use dc_wire::identity::Role;
use dc_wire::link::{Peer, channel, never_sent, serve};
use dc_wire::pb;
use dc_wire::pb::quorum_client::QuorumClient;
use dc_wire::pb::quorum_server::{Quorum, QuorumServer};
use dc_wire::pki::{self, CaFiles, Order};
use dc_wire::tls::{Expected, Tls, TlsFiles};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Request, Response, Status, Streaming};

const LIMIT: Duration = Duration::from_secs(5);

/// Answers `Meet` with the caller's identity as the server saw it.
struct Mirror;

#[tonic::async_trait]
impl Quorum for Mirror {
    async fn meet(&self, call: Request<pb::MeetRequest>) -> Result<Response<pb::MeetReply>, Status> {
        let peer = call.extensions().get::<Peer>().map(|peer| peer.identity.to_string());
        Ok(Response::new(pb::MeetReply { store: peer.unwrap_or_default(), on_record: String::new() }))
    }
    async fn append(&self, _: Request<pb::RaftMessage>) -> Result<Response<pb::RaftReply>, Status> {
        Err(Status::aborted("handler reached"))
    }
    async fn vote(&self, _: Request<pb::RaftMessage>) -> Result<Response<pb::RaftReply>, Status> {
        Err(Status::aborted("handler reached"))
    }
    async fn install_snapshot(
        &self,
        _: Request<Streaming<pb::SnapshotPart>>,
    ) -> Result<Response<pb::RaftReply>, Status> {
        Err(Status::aborted("handler reached"))
    }
    async fn propose(&self, _: Request<pb::ProposeRequest>) -> Result<Response<pb::ProposeReply>, Status> {
        Err(Status::aborted("handler reached"))
    }
    async fn read_index(
        &self,
        _: Request<pb::ReadIndexRequest>,
    ) -> Result<Response<pb::ReadIndexReply>, Status> {
        Err(Status::aborted("handler reached"))
    }
}

fn order(role: Role, name: &str) -> Order {
    Order { role, name: name.into(), dns: vec![], ips: vec![], days: 1, replace: false }
}

fn issue(ca: &CaFiles, folder: &Path, role: Role, name: &str) -> TlsFiles {
    let issued = pki::issue(ca, folder, &order(role, name)).unwrap();
    TlsFiles { ca: ca.cert.clone(), cert: issued.cert, key: issued.key }
}

async fn mirror(files: TlsFiles) -> (String, Arc<Tls>) {
    let tls = Arc::new(Tls::load(files).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let routes = tonic::service::Routes::new(QuorumServer::new(Mirror));
    tokio::spawn(serve(listener, tls.clone(), routes, std::future::pending()));
    (address, tls)
}

async fn meet(address: &str, files: TlsFiles, expected: Expected) -> Result<String, Status> {
    let tls = Arc::new(Tls::load(files).unwrap());
    let mut client = QuorumClient::new(channel(tls, address, expected, LIMIT).unwrap());
    let reply = tokio::time::timeout(LIMIT, client.meet(pb::MeetRequest::default())).await.unwrap();
    reply.map(|reply| reply.into_inner().store)
}

fn site(name: &str) -> Expected {
    Expected::Agent(SiteId::new(name).unwrap())
}

#[tokio::test]
async fn an_agent_gets_in_and_the_handler_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab.example", 2).unwrap();
    let (address, _) = mirror(issue(&ca, folder.path(), Role::Agent, "rome")).await;
    let fra = issue(&ca, folder.path(), Role::Agent, "fra");
    let seen = meet(&address, fra.clone(), site("rome")).await.unwrap();
    assert_eq!(seen, "spiffe://lab.example/dc-switch/agent/fra");
    assert!(meet(&address, fra, Expected::AnyAgent).await.is_ok());
}

#[tokio::test]
async fn a_client_refuses_a_peer_that_is_not_the_agent_it_wants() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let (address, _) = mirror(issue(&ca, folder.path(), Role::Agent, "rome")).await;
    let fra = issue(&ca, folder.path(), Role::Agent, "fra");
    let refused = meet(&address, fra, site("oslo")).await.unwrap_err();
    assert!(never_sent(&refused), "{refused:?}");
}

#[tokio::test]
async fn roles_without_the_right_are_refused_before_the_handler() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let (address, _) = mirror(issue(&ca, folder.path(), Role::Agent, "rome")).await;
    for role in [Role::Operator, Role::Viewer] {
        let files = issue(&ca, folder.path(), role, "ann");
        let refused = meet(&address, files, Expected::AnyAgent).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("ann") && !never_sent(&refused), "{refused}");
    }
}

#[tokio::test]
async fn strangers_of_another_authority_or_trust_domain_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let (address, _) = mirror(issue(&ca, folder.path(), Role::Agent, "rome")).await;
    let other = pki::init(&folder.path().join("other"), "lab", 2).unwrap();
    let mut forged = issue(&other, &folder.path().join("forged"), Role::Agent, "fra");
    assert!(meet(&address, forged.clone(), site("rome")).await.is_err(), "the client must not trust rome");
    // even a client that trusts rome's authority is not trusted by it
    let both = folder.path().join("both.pem");
    let text = fs::read_to_string(&ca.cert).unwrap() + &fs::read_to_string(&other.cert).unwrap();
    fs::write(&both, text).unwrap();
    forged.ca = both;
    assert!(meet(&address, forged, site("rome")).await.is_err());
}

#[tokio::test]
async fn plain_bytes_and_clients_without_a_certificate_reach_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let (address, _) = mirror(issue(&ca, folder.path(), Role::Agent, "rome")).await;
    let mut plain = TcpStream::connect(&address).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(LIMIT, plain.read_to_end(&mut answer)).await.unwrap();
    assert!(read.is_err() || answer.len() < 16, "{answer:?}");
}

#[tokio::test]
async fn new_files_are_used_without_a_restart_and_bad_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let rome = issue(&ca, folder.path(), Role::Agent, "rome");
    let fra = issue(&ca, folder.path(), Role::Agent, "fra");
    let (address, tls) = mirror(rome.clone()).await;

    let good = fs::read(&rome.cert).unwrap();
    fs::copy(&fra.cert, &rome.cert).unwrap();
    let refused = tls.reload().unwrap_err();
    assert_eq!(refused.code.as_str(), "DC-0104", "{refused}");
    assert!(meet(&address, fra.clone(), site("rome")).await.is_ok(), "the old pair must stay in use");

    fs::write(&rome.cert, good).unwrap();
    let before = tls.expires();
    let longer = Order { days: 2, replace: true, ..order(Role::Agent, "rome") };
    pki::issue(&ca, folder.path(), &longer).unwrap();
    tls.reload().unwrap();
    assert!(tls.expires() > before);
    assert!(meet(&address, fra, site("rome")).await.is_ok());
}

#[test]
fn key_files_that_are_missing_or_open_to_others_are_refused_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let files = issue(&ca, folder.path(), Role::Agent, "rome");
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&files.key, fs::Permissions::from_mode(mode)).unwrap();
        let refused = Tls::load(files.clone()).unwrap_err();
        assert_eq!(refused.code.as_str(), "DC-0102");
        assert!(refused.why.contains(&format!("{mode:04o}")) && refused.next.starts_with("chmod 600"));
    }
    fs::remove_file(&files.key).unwrap();
    let refused = Tls::load(files.clone()).unwrap_err();
    assert_eq!(refused.code.as_str(), "DC-0101");
    assert!(refused.what.contains("agent-rome.key"), "{refused}");
}

#[test]
fn pairs_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(&folder.path().join("ca"), "lab", 2).unwrap();
    let other = pki::init(&folder.path().join("other"), "lab", 2).unwrap();
    let rome = issue(&ca, folder.path(), Role::Agent, "rome");
    let fra = issue(&ca, folder.path(), Role::Agent, "fra");
    let code = |files: TlsFiles| Tls::load(files).unwrap_err().code.to_string();
    assert_eq!(code(TlsFiles { key: fra.key, ..rome.clone() }), "DC-0104");
    assert_eq!(code(TlsFiles { ca: other.cert, ..rome.clone() }), "DC-0104");
    assert_eq!(code(TlsFiles { cert: rome.key.clone(), ..rome.clone() }), "DC-0103");
    assert_eq!(code(TlsFiles { cert: ca.cert.clone(), key: ca.key.clone(), ca: ca.cert }), "DC-0105");
}

#[test]
fn an_authority_is_never_overwritten_and_neither_is_a_pair() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(folder.path(), "lab", 2).unwrap();
    let before = fs::read(&ca.cert).unwrap();
    assert_eq!(pki::init(folder.path(), "lab", 2).unwrap_err().code.as_str(), "DC-0107");
    assert_eq!(fs::read(&ca.cert).unwrap(), before);
    issue(&ca, folder.path(), Role::Viewer, "bob");
    let again = pki::issue(&ca, folder.path(), &order(Role::Viewer, "bob")).unwrap_err();
    assert_eq!(again.code.as_str(), "DC-0107");
}

#[test]
fn keys_are_made_for_their_owner_alone_and_uses_follow_the_role() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(folder.path(), "lab", 2).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&ca.key), 0o600);
    let with_hosts = Order {
        dns: vec!["rome.example".into()],
        ips: vec!["127.1.1.1".parse().unwrap()],
        ..order(Role::Agent, "rome")
    };
    let agent = pki::issue(&ca, folder.path(), &with_hosts).unwrap();
    let operator = pki::issue(&ca, folder.path(), &order(Role::Operator, "ann")).unwrap();
    assert_eq!(mode(&agent.key), 0o600);
    let shown = pki::show(&agent.cert).unwrap();
    assert_eq!(shown.uses, ["server", "client"]);
    assert_eq!(shown.uris, ["spiffe://lab/dc-switch/agent/rome"]);
    assert_eq!(shown.hosts, ["rome.example", "127.1.1.1"]);
    assert!(shown.in_force && !shown.authority);
    assert_eq!(pki::show(&operator.cert).unwrap().uses, ["client"]);
    assert!(pki::show(&ca.cert).unwrap().authority);
}

#[test]
fn names_and_lives_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ca = pki::init(folder.path(), "lab", 2).unwrap();
    for bad in ["", "../rome", "Rome", "a/b", "1st"] {
        assert!(pki::issue(&ca, folder.path(), &order(Role::Agent, bad)).is_err(), "{bad:?}");
    }
    let eternal = Order { days: 99_999, ..order(Role::Operator, "ann") };
    assert_eq!(pki::issue(&ca, folder.path(), &eternal).unwrap_err().code.as_str(), "DC-0108");
    assert!(pki::init(&folder.path().join("x"), "Not A Domain", 2).is_err());
}
