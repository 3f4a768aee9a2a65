//! A TCP link that delays every byte by a fixed time, each way, and does not limit the rate.
//!
//! A reader stamps each piece with the time it is due and queues it, a writer sends it then: the delay is latency,
//! not bandwidth. A closed or reset side closes the other after the same delay.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Pieces under way per direction: at 64 KiB each, 64 MiB; past it the reader waits, as a full pipe would.
const PIECES: usize = 1024;

/// Listens and carries every connection to `target`, in the background.
pub async fn listen(at: SocketAddr, target: SocketAddr, delay: Duration) -> Result<()> {
    let listener = TcpListener::bind(at).await.with_context(|| format!("listen on {at}"))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(carry(client, target, delay))),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await, // out of descriptors: try again
            }
        }
    });
    Ok(())
}

async fn carry(client: TcpStream, target: SocketAddr, delay: Duration) {
    tokio::time::sleep(delay).await; // the way of the SYN; the answer's way is paid by the first bytes
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::join!(one_way(client_read, server_write, delay), one_way(server_read, client_write, delay));
}

async fn one_way(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let (send, mut queue) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let reader = async move {
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let n = from.read(&mut buffer).await.unwrap_or(0);
            let due = Instant::now() + delay;
            if send.send((due, buffer[..n].to_vec())).await.is_err() || n == 0 {
                break;
            }
        }
    };
    let writer = async move {
        while let Some((due, piece)) = queue.recv().await {
            tokio::time::sleep_until(due).await;
            if piece.is_empty() || to.write_all(&piece).await.is_err() {
                break;
            }
        }
        queue.close();
        let _ = to.shutdown().await; // the other side may be gone already
    };
    tokio::join!(reader, writer);
}
