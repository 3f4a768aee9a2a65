//! The keeper of a lab: one small process that holds the lab's number (a locked file) and runs its delaying links.
//!
//! It lives exactly as long as the lab, also when the command that made the lab has ended.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use tokio::process::Command;

use crate::process;
use crate::proxy;
use crate::world::{DATA_SITES, SITES, Site, World, port};

/// Numbers of labs: N of 127.N.site.1.
const NUMBERS: RangeInclusive<u8> = 1..=250;
/// How often a keeper looks whether its lab is still there.
const LOOK: Duration = Duration::from_secs(2);

/// A lab number with the lock that keeps it.
pub struct Number {
    /// N of 127.N.site.1.
    pub number: u8,
    lock: fs::File,
}

/// Takes a free number, or exactly `wanted`.
///
/// Locks lie where all users of the machine see them, for they all share its loopback addresses.
/// Errors: `wanted` is held by another lab; none is free.
pub fn take_number(wanted: Option<u8>) -> Result<Number> {
    let shared = Path::new("/run/lock");
    let dir = if shared.is_dir() { shared.to_path_buf() } else { std::env::temp_dir() };
    let range = wanted.map_or(NUMBERS, |n| n..=n);
    for number in range {
        let lock = open_lock(&dir.join(format!("dc-lab-{number}.lock")))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            && (wanted.is_some() || ports_free(number))
        {
            return Ok(Number { number, lock });
        }
    }
    match wanted {
        Some(n) => bail!("lab number {n} is held by another lab; `down --purge` this one and start again"),
        None => bail!(
            "no free lab number: all of 127.1 to 127.250 have listeners on the lab's ports or are locked"
        ),
    }
}

/// A lock file that another user may have made: opened first, made only if it is not there.
fn open_lock(path: &Path) -> Result<fs::File> {
    let open = || fs::OpenOptions::new().read(true).open(path);
    if let Ok(file) = open() {
        return Ok(file);
    }
    match fs::OpenOptions::new().create_new(true).write(true).mode(0o644).open(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(e).with_context(|| format!("make {}", path.display()))
        }
        _ => open().with_context(|| format!("open {}", path.display())),
    }
}

/// Is there a number whose addresses are free?
pub fn has_room() -> bool {
    NUMBERS.into_iter().any(ports_free)
}

/// Nobody listens on the ports of a site, at the three sites, nor on those of the links between two.
fn ports_free(number: u8) -> bool {
    let free =
        |site: u8, port: &u16| TcpListener::bind(SocketAddr::from(([127, number, site, 1], *port))).is_ok();
    let [one, other] = DATA_SITES.map(|s| s.index);
    let links = [one * 10 + other, other * 10 + one];
    SITES.iter().all(|site| port::ALL.iter().all(|p| free(site.index, p)))
        && links.iter().all(|link| port::LINKED.iter().all(|p| free(*link, p)))
}

/// Starts the keeper and waits until its links listen. It keeps the lock as its standard input.
pub async fn spawn(world: &World, number: Number) -> Result<()> {
    let exe = world.bin("dc-lab")?;
    let mut cmd = Command::new(exe);
    cmd.arg("keeper").arg(&world.root);
    process::spawn(world, "keeper", &cmd, Some(number.lock))?;
    let limit = Instant::now() + Duration::from_secs(10);
    let probe = SocketAddr::from((
        world.link_ip(&DATA_SITES[1], &DATA_SITES[0]),
        port::LINKED[port::LINKED.len() - 1],
    ));
    while !world.delay.is_zero() && tokio::net::TcpStream::connect(probe).await.is_err() {
        if Instant::now() >= limit || !world.alive("keeper") {
            bail!("links of the lab do not listen, see {}", world.log("keeper").display());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The keeper itself: runs the links of every directed pair of data sites until SIGTERM, or until the lab's files have
/// been removed: then nobody would find it to end it.
pub async fn keep(world: &World) -> Result<()> {
    let pairs: [(Site, Site); 2] = [(DATA_SITES[0], DATA_SITES[1]), (DATA_SITES[1], DATA_SITES[0])];
    if !world.delay.is_zero() {
        for (from, to) in pairs {
            for port in port::LINKED {
                let listen = SocketAddr::from((world.link_ip(&from, &to), port));
                let target: SocketAddr =
                    format!("{}:{port}", world.ip(&to)).parse().context("address of a site")?;
                proxy::listen(listen, target, world.delay).await?;
            }
        }
    }
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let removed = async {
        while world.exists() {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        _ = term.recv() => {}
        () = removed => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_no_number_on_whose_ports_somebody_listens() -> std::io::Result<()> {
        const NUMBER: u8 = 251; // of no lab
        assert!(ports_free(NUMBER));
        for address in [[127, NUMBER, 1, 1], [127, NUMBER, 12, 1], [127, NUMBER, 21, 1]] {
            let held = TcpListener::bind(SocketAddr::from((address, port::LINKED[0])))?;
            assert!(!ports_free(NUMBER), "{address:?}");
            drop(held);
        }
        assert!(ports_free(NUMBER));
        Ok(())
    }
}
