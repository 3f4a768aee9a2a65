//! Connections: accepting them with the peer known to every handler, and dialling them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, server};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Server};

use crate::access::AccessLayer;
use crate::identity::Identity;
use crate::tls::{Expected, Tls, expiry};

/// How long a stranger may take to show a certificate.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Connections at a time, handshakes included; bounds file descriptors.
const CONNECTIONS_MAX: usize = 512;
/// After this a connection is ended politely and the peer shows its certificate again.
const CONNECTION_AGE_MAX: Duration = Duration::from_hours(1);
/// A silent connection is probed after this, and given up after as much again.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// Who is on the other end; an extension of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// From its certificate.
    pub identity: Arc<Identity>,
    /// Where it dialled from; proves nothing.
    pub address: SocketAddr,
    /// When its certificate runs out, as time since 1970 UTC.
    pub expires: Duration,
}

impl Peer {
    /// Whether its certificate has run out since it connected.
    pub fn expired(&self) -> bool {
        SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now > self.expires)
    }
}

/// An accepted connection.
pub struct Link {
    stream: server::TlsStream<TcpStream>,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

impl Connected for Link {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Serves `routes` on `listener` behind mutual TLS and the access table, until `stop` is over.
///
/// Handlers find the caller as a [`Peer`] in the request's extensions.
/// Errors: the server's own, once it cannot go on.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<Tls>,
    routes: Routes,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (into, incoming) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(listener, tls, into));
    let served = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_connection_age(CONNECTION_AGE_MAX)
        .max_connection_age_grace(Duration::from_mins(1))
        .layer(AccessLayer)
        .add_routes(routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop)
        .await;
    accepting.abort();
    served
}

async fn accept(listener: TcpListener, tls: Arc<Tls>, into: mpsc::Sender<io::Result<Link>>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, address) = tokio::select! {
            () = into.closed() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(why) => {
                    tracing::error!(%why, "connection not accepted");
                    // out of file descriptors: nothing tells when there are some again
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (tls, into) = (tls.clone(), into.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE_LIMIT, shake(stream, address, &tls, place)).await {
                Ok(Ok(link)) => drop(into.send(Ok(link)).await),
                Ok(Err(why)) => tracing::warn!(%address, %why, "handshake refused"),
                Err(_) => tracing::warn!(%address, limit = ?HANDSHAKE_LIMIT, "handshake timed out"),
            }
        });
    }
}

async fn shake(
    stream: TcpStream,
    address: SocketAddr,
    tls: &Tls,
    place: OwnedSemaphorePermit,
) -> io::Result<Link> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(tls.server_config()).accept(stream).await?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let leaf = leaf.ok_or_else(|| io::Error::other("no certificate"))?;
    let identity = Identity::of_certificate(leaf).map_err(io::Error::other)?;
    if identity.trust_domain() != tls.identity().trust_domain() {
        return Err(io::Error::other(format!("{identity} is of another trust domain")));
    }
    let expires = expiry(leaf).map_err(io::Error::other)?;
    Ok(Link { peer: Peer { identity: Arc::new(identity), address, expires }, stream, _place: place })
}

/// A connection did not come about, so nothing was sent on it.
#[derive(Debug, thiserror::Error)]
#[error("no connection to {address}: {why}")]
pub struct NotConnected {
    /// Where to.
    pub address: String,
    /// The cause in words.
    pub why: String,
}

/// Whether a call failed before anything of it was sent; false when that is not known.
pub fn never_sent(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<NotConnected>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A channel to an agent: connects when it is first used, and again whenever it has broken.
///
/// `address` is `host:port` and is resolved at every connect; `connect_limit` bounds one
/// connect with its handshake. Every call should bring its own deadline.
/// Errors: DC-0106 when the address is not one.
pub fn channel(
    tls: Arc<Tls>,
    address: &str,
    expected: Expected,
    connect_limit: Duration,
) -> Result<Channel, Fail> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|e| {
        let what = format!("{address:?} is no address of an agent");
        let next = "write it as host:port, as in \"127.1.1.1:7400\"";
        Fail::new(Code::from_text("DC-0106"), Exit::Usage, what, e.to_string()).next(next)
    })?;
    let address = address.to_owned();
    let dial = tower::service_fn(move |_| {
        let (tls, address, expected) = (tls.clone(), address.clone(), expected.clone());
        async move {
            let dialled = timeout(connect_limit, dial(&tls, &address, expected)).await;
            let why = match dialled {
                Ok(Ok(stream)) => return Ok(TokioIo::new(stream)),
                Ok(Err(why)) => why.to_string(),
                Err(_) => format!("no answer within {connect_limit:?}"),
            };
            Err(NotConnected { address, why })
        }
    });
    Ok(endpoint
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(dial))
}

async fn dial(
    tls: &Tls,
    address: &str,
    expected: Expected,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let config = tls.client_config(expected).map_err(io::Error::other)?;
    // the verifier goes by the certificate's URI; this name is never compared
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    TlsConnector::from(config).connect(name, stream).await
}
