//! The door of the instance: a block at the head of `pg_hba.conf`, written by us alone.
//!
//! The block lets our two roles in. While the door is shut it also rejects everybody else; while it is open the
//! site's own rules below the block decide. The block is written shut before every start.
//!
//! The proof that the server has loaded what was written is a login: the block holds a role name that was never used
//! before and does not exist, and only a server that has loaded this very block asks it for a password. A bad line
//! anywhere leaves the *old* rules in force, and a server forks logins by them until it has read the new ones.

use std::path::Path;
use std::time::Duration;

use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::process::Signal;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::conf;
use crate::config::Address;
use crate::procs::{self, Child, Process};

const BEGIN: &str = "# BEGIN dc-switch: written by the agent before every start; edits are lost";
const END: &str = "# END dc-switch";
/// How often a probe is repeated. A login costs the server a fork.
const PROBE_EVERY: Duration = Duration::from_millis(3);
/// How often the process table is read while clients are being ended.
const SWEEP_EVERY: Duration = Duration::from_millis(2);
/// Pause between two looks that found no client: a zombie or two may still be reaped.
const SETTLE: Duration = Duration::from_micros(500);

/// What the block says.
#[derive(Debug, Clone)]
pub(crate) struct Block<'a> {
    /// The agent's role.
    pub agent: &'a str,
    /// The role by which the other site follows and rewinds.
    pub sender: &'a str,
    /// The database a rewind connects to.
    pub database: &'a str,
    /// A role name never used before.
    pub nonce: &'a str,
    /// Whether everybody else is rejected.
    pub shut: bool,
}

impl Block<'_> {
    fn text(&self) -> String {
        let Self { agent, sender, database, nonce, shut } = self;
        let mut text = format!(
            "{BEGIN}\n\
             local  all            \"{nonce}\"         password\n\
             local  all            \"{agent}\"         scram-sha-256\n\
             host   all            \"{agent}\"    all  scram-sha-256\n\
             host   replication    \"{sender}\"   all  scram-sha-256\n\
             host   \"{database}\" \"{sender}\"   all  scram-sha-256\n"
        );
        if *shut {
            text.push_str(
                "local  all            all           reject\n\
                 local  replication    all           reject\n\
                 host   all            all      all  reject\n\
                 host   replication    all      all  reject\n",
            );
        }
        text + END + "\n"
    }

    /// The rules file with this block at its head, in place of any older one.
    ///
    /// Errors: an older block that has no end; what lies below it may be anybody's.
    pub fn put_into(&self, existing: &str) -> Result<String, String> {
        let mut text = self.text();
        let mut inside = false;
        for line in existing.lines() {
            match line.trim_end() {
                l if l == BEGIN && inside => return Err("two blocks of dc-switch begin and none ends".into()),
                l if l == BEGIN => inside = true,
                l if l == END => inside = false,
                l if !inside => {
                    text.push_str(l);
                    text.push('\n');
                }
                _ => {}
            }
        }
        if inside { Err("the block of dc-switch begins and does not end".into()) } else { Ok(text) }
    }
}

/// Whether the rules file holds a block of ours that is shut; none without any block.
pub(crate) fn is_shut(rules: &str) -> Option<bool> {
    let block = rules.split_once(BEGIN)?.1.split_once(END)?.0;
    Some(block.lines().any(|line| line.trim_end().ends_with("reject")))
}

/// The probe role that the written block names.
pub(crate) fn nonce_of(rules: &str) -> Option<String> {
    let block = rules.split_once(BEGIN)?.1.split_once(END)?.0;
    Some(block.split('"').nth(1)?.to_owned())
}

/// A role name that no earlier block held.
pub(crate) fn fresh_nonce() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("dcswitch_probe_{:x}_{:x}", now.as_nanos(), std::process::id())
}

/// Writes the block.
pub(crate) fn write(rules: &Path, block: &Block<'_>) -> Result<(), PlaneError> {
    let existing = conf::read(rules)?;
    let text = block.put_into(&existing).map_err(|why| PlaneError::Failed {
        what: format!("rewrite {}", rules.display()),
        why: format!("{why}; repair the file by hand"),
    })?;
    conf::replace(rules, text.as_bytes(), false)
}

/// How the server answers the first message of a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It wants a proof of who this is: the rules let the role knock.
    Asked,
    /// It said no, with this SQLSTATE.
    Refused(String),
    /// It closed the connection without a word: the login's process was ended.
    Silent,
}

impl Answer {
    /// Whether rules refused it, and not a server that is starting or full.
    pub fn by_rule(&self) -> bool {
        matches!(self, Self::Refused(code) if code == "28000")
    }
}

/// Where to knock.
#[derive(Debug, Clone)]
pub(crate) enum Knock<'a> {
    /// At the unix socket.
    Socket(&'a Path, u16),
    /// At the TCP port.
    Tcp(&'a Address),
}

/// Says a name at the door and reads the first answer. Sends no password.
///
/// Errors: `Unreachable` when nobody listens.
pub(crate) async fn probe(
    at: &Knock<'_>,
    role: &str,
    database: &str,
    until: Deadline,
) -> Result<Answer, PlaneError> {
    let what = format!("probe login of {role}");
    let gone = |e: std::io::Error| PlaneError::unreachable(&what, &e);
    until
        .bound(&what, async {
            match at {
                Knock::Socket(dir, port) => {
                    let path = dir.join(format!(".s.PGSQL.{port}"));
                    knock(UnixStream::connect(path).await.map_err(gone)?, role, database).await
                }
                Knock::Tcp(to) => {
                    let stream = TcpStream::connect((to.host.as_str(), to.port)).await.map_err(gone)?;
                    knock(stream, role, database).await
                }
            }
            .map_err(gone)
        })
        .await?
}

async fn knock<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    role: &str,
    database: &str,
) -> std::io::Result<Answer> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match greet(&mut stream, role, database).await {
        Err(e) if [BrokenPipe, ConnectionReset, UnexpectedEof].contains(&e.kind()) => Ok(Answer::Silent),
        other => other,
    }
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    role: &str,
    database: &str,
) -> std::io::Result<Answer> {
    let mut body = 196_608_u32.to_be_bytes().to_vec(); // protocol 3.0
    for word in ["user", role, "database", database] {
        body.extend_from_slice(word.as_bytes());
        body.push(0);
    }
    body.push(0);
    let length = u32::try_from(body.len() + 4).map_err(std::io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(&body).await?;
    let mut head = [0_u8; 5];
    stream.read_exact(&mut head).await?;
    if head[0] == b'R' {
        return Ok(Answer::Asked);
    }
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]).clamp(4, 65_536) - 4;
    let mut fields = vec![0_u8; length as usize];
    stream.read_exact(&mut fields).await?;
    Ok(Answer::Refused(sqlstate(&fields)))
}

/// The code among an error's fields: each is a letter and a text ended by zero.
fn sqlstate(fields: &[u8]) -> String {
    fields
        .split(|b| *b == 0)
        .find_map(|field| field.strip_prefix(b"C"))
        .map_or_else(|| "?".to_owned(), |code| String::from_utf8_lossy(code).into_owned())
}

/// Makes the server read its files again and waits until a login proves that it has.
pub(crate) async fn load(
    postmaster: Process,
    socket: &Knock<'_>,
    nonce: &str,
    database: &str,
    until: Deadline,
) -> Result<(), PlaneError> {
    postmaster.signal(Signal::HUP)?;
    wait_until(until, PROBE_EVERY, "the server loads the new pg_hba.conf", || async {
        Ok((probe(socket, nonce, database, until).await? == Answer::Asked).then_some(()))
    })
    .await
}

/// What ending all clients took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Swept {
    /// Processes that were told to end.
    pub ended: usize,
    /// Times the process table was read.
    pub rounds: u32,
}

/// The children that count, and the living clients among them.
pub(crate) fn look(
    postmaster: Process,
    born_by: u64,
    is_client: impl Fn(&str) -> bool,
) -> (Vec<procs::Seen>, Vec<Process>) {
    let children = procs::children(postmaster, born_by);
    let clients = children
        .iter()
        .filter(|(pid, _)| procs::title(*pid).is_some_and(|title| is_client(&title)))
        .filter_map(|(pid, _)| Process::of(*pid))
        .collect();
    (children, clients)
}

/// Ends every child of the postmaster that is a client, a login under way included, until none is left.
///
/// Only children born by `born_by` count: a moment at which the shut door was proved loaded. Whoever was born later
/// has the new rules and is refused; a storm of such logins does not hold up the proof.
/// Done = two looks in a row with the very same children and no client among them.
/// Errors: `Refused` naming how many survive.
pub(crate) async fn sweep(
    postmaster: Process,
    born_by: u64,
    is_client: impl Fn(&str) -> bool,
    until: Deadline,
) -> Result<Swept, PlaneError> {
    let mut done = Swept::default();
    let mut before = None;
    let mut told = std::collections::BTreeSet::new();
    loop {
        let (children, clients) = look(postmaster, born_by, &is_client);
        done.rounds += 1;
        if clients.is_empty() && before.as_ref() == Some(&children) {
            return Ok(Swept { ended: told.len(), ..done });
        }
        before = Some(children);
        for client in &clients {
            client.signal(Signal::TERM)?;
            told.insert((client.pid, client.start));
        }
        if until.left() <= SWEEP_EVERY {
            let what = format!("{} client processes outlive SIGTERM", clients.len());
            return Err(PlaneError::refused("DC-0323", what));
        }
        tokio::time::sleep(if clients.is_empty() { SETTLE } else { SWEEP_EVERY }).await;
    }
}

/// Whether a title is a client's to a fence that excepts nobody but us.
pub(crate) fn is_client(title: &str, cluster: &str, agent: &str, sender: &str) -> bool {
    procs::classify(title, cluster, agent, sender) == Child::Client
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(nonce: &'static str, shut: bool) -> Block<'static> {
        Block { agent: "dcswitch", sender: "dcrepl", database: "postgres", nonce, shut }
    }

    #[test]
    fn the_block_replaces_its_older_self_and_keeps_the_sites_own_rules() {
        let own = "# site rules\nhost all app all scram-sha-256\n";
        let shut = block("n1", true).put_into(own).unwrap_or_default();
        assert_eq!(is_shut(&shut), Some(true));
        assert!(shut.ends_with(own) && shut.starts_with(BEGIN));
        let open = block("n2", false).put_into(&shut).unwrap_or_default();
        assert_eq!(is_shut(&open), Some(false));
        assert_eq!(open.matches(BEGIN).count(), 1);
        assert!(open.ends_with(own));
        assert_eq!(nonce_of(&open).as_deref(), Some("n2"));
        assert_eq!(is_shut(own), None);
    }

    #[test]
    fn a_block_without_an_end_is_not_guessed_about() {
        let cut = format!("{BEGIN}\nlocal all all reject\nhost all app all trust\n");
        assert!(block("n", true).put_into(&cut).is_err());
    }

    #[test]
    fn a_shut_block_rejects_replication_of_others_too() {
        let text = block("n", true).text();
        assert!(text.lines().any(|l| l.starts_with("host   replication    all") && l.ends_with("reject")));
        assert!(text.lines().any(|l| l.starts_with("local  replication    all") && l.ends_with("reject")));
    }

    #[test]
    fn finds_the_code_among_an_errors_fields() {
        let fields = b"SFATAL\0VFATAL\0C28000\0Mpg_hba.conf rejects\0\0";
        assert_eq!(sqlstate(fields), "28000");
        assert_eq!(sqlstate(b""), "?");
    }

    #[test]
    fn no_two_nonces_are_alike() {
        assert_ne!(fresh_nonce(), fresh_nonce());
    }
}
