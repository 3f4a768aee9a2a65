//! What probes read.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fake::World;

async fn ask(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_holder_is_active_and_only_for_its_group() {
    let (_world, agents, _) = World::running().await;
    let [fra, oslo, rome] = [agents[0].http, agents[1].http, agents[2].http];
    for (address, path, wanted) in [
        (rome, "/active", 200),
        (rome, "/active?group=orders", 200),
        (rome, "/active?group=other", 503),
        (rome, "/active?groups=orders", 400),
        (rome, "/standby", 503),
        (fra, "/active", 503),
        (fra, "/standby", 200),
        (oslo, "/active", 503),
        (oslo, "/standby", 503),
        (fra, "/livez", 200),
        (fra, "/readyz", 200),
        (fra, "/metrics", 200),
        (fra, "/nothing", 404),
        (fra, "/../etc/passwd", 404),
    ] {
        let answer = ask(address, "GET", path).await;
        assert_eq!(status(&answer), wanted, "{path}: {answer}");
    }
    assert_eq!(status(&ask(rome, "HEAD", "/active").await), 200);
    for method in ["POST", "PUT", "DELETE"] {
        assert_eq!(status(&ask(rome, method, "/active").await), 405);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_says_what_is_missing_and_the_site_tells_its_epoch() {
    let (world, agents, _) = World::running().await;
    let rome = agents[2].http;
    let all = ask(rome, "GET", "/site").await;
    assert!(
        all.contains("x-dc-epoch: orders=0.1\r\n") || all.contains("x-dc-epoch: orders=1.1\r\n"),
        "{all}"
    );
    let one = ask(rome, "GET", "/site?group=orders").await;
    assert!(one.contains("x-dc-epoch: 0.1\r\n") || one.contains("x-dc-epoch: 1.1\r\n"), "{one}");
    assert!(one.contains("\"holder\":\"rome\""));
    world.quorum.store(false, Ordering::SeqCst);
    let missing = ask(rome, "GET", "/readyz").await;
    assert!(status(&missing) == 503 && missing.contains("no quorum"), "{missing}");
}
