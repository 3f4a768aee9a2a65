//! The keeper of one unit: starts it, knows every process of its tree, ends it when asked.
//!
//! Invariants: one living keeper per unit (a lock that ends with the process); every process of
//! the unit descends from the keeper (it is the subreaper); `gone` is said only after the
//! kernel said that no child is left. The keeper restarts nothing and decides nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{self, Signal, WaitOptions};

use crate::tree;
use crate::unit::{Fail, MARK, Note, Unit, own_only, read_env};
use crate::wire::{Ended, Misunderstood, Process, REQUEST_MAX, Request, State, Status, Whom};

/// What to keep, as the command line says it.
#[derive(Debug, Clone)]
pub struct Order {
    /// Which unit.
    pub unit: Unit,
    /// Settings of its processes; they inherit nothing else but `PATH`, `HOME` and `LANG`.
    pub env_file: Option<PathBuf>,
    /// Where its output goes; `DIR/UNIT.log` when not said.
    pub log: Option<PathBuf>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// A cgroup v2 directory in which to make a leaf of its own, where that can be written.
    pub cgroup: Option<PathBuf>,
    /// The command and its arguments.
    pub command: Vec<String>,
}

const ANSWERED_AT_ONCE_MAX: usize = 16;
const LINE_LIMIT: Duration = Duration::from_secs(5);
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);
const KILL_AGAIN_AFTER: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Seen {
    ended: Option<Ended>,
    gone: bool,
}

struct Keeper {
    unit: String,
    pid: i32,
    main: Process,
    cgroup: Option<PathBuf>,
    seen: Mutex<Seen>,
    changed: Condvar,
    answering: AtomicUsize,
}

/// Keeps the unit until its tree is empty. Calls `ready` once the unit runs and the socket answers.
///
/// Errors: code 3 while another keeper lives, code 4 while processes of an earlier one do; the
/// unit's own start. Nothing runs after an error.
pub fn keep(order: &Order, ready: impl FnOnce(i32)) -> Result<Option<Ended>, Fail> {
    let _lock = order.unit.lock()?;
    let left = tree::leftovers(&order.unit, order.unit.note().as_ref());
    if !left.is_empty() {
        return Err(Fail::leftovers(format!(
            "processes of an earlier keeper of {} live: {left:?}; run dc-guardian reap first",
            order.unit.mark()
        )));
    }
    become_session()?;
    let settings = order.env_file.as_deref().map(read_env).transpose()?.unwrap_or_default();
    process::set_child_subreaper(Some(process::getpid()))
        .map_err(|e| Fail::plain(format!("become subreaper: {e}")))?;
    let cgroup = order.cgroup.as_ref().and_then(|parent| make_leaf(parent, &order.unit));
    let pid = process::getpid().as_raw_nonzero().get();
    order.unit.write_note(&Note {
        boot: tree::boot_id(),
        keeper: pid,
        started: tree::entry(pid).map_or(0, |at| at.started),
        cgroup: cgroup.clone(),
    })?;
    let socket = bind(&order.unit)?;
    let main = start(order, settings, cgroup.as_ref())?;
    let keeper = Arc::new(Keeper {
        unit: order.unit.name.clone(),
        pid,
        main,
        cgroup,
        seen: Mutex::default(),
        changed: Condvar::new(),
        answering: AtomicUsize::new(0),
    });
    run(&keeper, socket)?;
    ready(pid);
    let ended = keeper.wait_gone();
    keeper.farewell(&order.unit);
    Ok(ended)
}

fn run(keeper: &Arc<Keeper>, socket: UnixListener) -> Result<(), Fail> {
    let thread = |name: &str, work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|e| Fail::plain(format!("start thread {name}: {e}")))
    };
    let reaper = Arc::clone(keeper);
    thread("reap", Box::new(move || reaper.reap()))?;
    let listener = Arc::clone(keeper);
    thread("listen", Box::new(move || listen(&listener, &socket)))?;
    let asked = Arc::clone(keeper);
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])
            .map_err(|e| Fail::plain(format!("watch signals: {e}")))?;
    thread(
        "signals",
        Box::new(move || {
            for _ in signals.forever() {
                asked.signal(Signal::TERM, Whom::Main);
            }
        }),
    )?;
    Ok(())
}

/// A session of its own, so that no terminal and no group signal of the starter reaches the unit.
fn become_session() -> Result<(), Fail> {
    if process::setsid().is_ok() || process::getsid(None).is_ok_and(|sid| sid == process::getpid()) {
        return Ok(());
    }
    Err(Fail::plain("cannot make a session: this process leads a group; start it without --foreground"))
}

fn make_leaf(parent: &std::path::Path, unit: &Unit) -> Option<PathBuf> {
    let leaf = parent.join(format!("dc-{}-{}", unit.name, std::process::id()));
    match fs::create_dir(&leaf) {
        Ok(()) => Some(leaf),
        Err(cause) => {
            eprintln!("no cgroup at {} ({cause}); the subreaper alone proves the end", leaf.display());
            None
        }
    }
}

fn bind(unit: &Unit) -> Result<UnixListener, Fail> {
    let path = unit.path("sock");
    match fs::remove_file(&path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            return Err(Fail::io("remove old socket", &path, &cause));
        }
        _ => {}
    }
    let socket = UnixListener::bind(&path).map_err(|e| Fail::io("bind", &path, &e))?;
    own_only(&path)?;
    Ok(socket)
}

fn start(order: &Order, settings: Vec<(String, String)>, leaf: Option<&PathBuf>) -> Result<Process, Fail> {
    let (first, rest) = order.command.split_first().ok_or_else(|| Fail::usage("no command after --"))?;
    let mut command = if let Some(leaf) = leaf {
        let own = std::env::current_exe().map_err(|e| Fail::plain(format!("find own binary: {e}")))?;
        let mut command = Command::new(own);
        command.arg("enter").arg(leaf).arg("--").arg(first);
        command
    } else {
        Command::new(first)
    };
    let log = order.unit.log(order.log.as_deref())?;
    let second = log.try_clone().map_err(|e| Fail::plain(format!("share log: {e}")))?;
    command.args(rest).env_clear().stdin(Stdio::null()).stdout(log).stderr(second);
    for key in ["PATH", "HOME", "LANG"] {
        if let Some(value) = std::env::var_os(key) {
            command.env(key, value);
        }
    }
    command.envs(settings).env(MARK, order.unit.mark());
    if let Some(cwd) = &order.cwd {
        command.current_dir(cwd);
    }
    let child = command.spawn().map_err(|e| Fail::plain(format!("start {first}: {e}")))?;
    let pid = i32::try_from(child.id()).map_err(|_| Fail::plain("process id out of range"))?;
    // not waited for by `Child`: the reaper waits for everything
    Ok(Process { pid, started: tree::entry(pid).map_or(0, |at| at.started) })
}

impl Keeper {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        // the guarded value is two plain fields, each set at once: a poisoned lock hides nothing
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for every child there ever is. No child left = no process of the unit left.
    fn reap(&self) {
        loop {
            match process::wait(WaitOptions::empty()) {
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == self.main.pid => {
                    let code = status.exit_status().map(Ended::Code);
                    let ended = code.or_else(|| status.terminating_signal().map(Ended::Signal));
                    self.seen().ended = ended.or(Some(Ended::Code(0)));
                    self.changed.notify_all();
                }
                Err(Errno::CHILD) => break,
                Ok(_) | Err(_) => {}
            }
        }
        self.seen().gone = true;
        self.changed.notify_all();
    }

    fn wait_gone(&self) -> Option<Ended> {
        let mut seen = self.seen();
        while !seen.gone {
            seen = self.changed.wait(seen).unwrap_or_else(PoisonError::into_inner);
        }
        seen.ended
    }

    /// Waits until the tree is empty, no longer than `limit`.
    fn gone_within(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut seen = self.seen();
        while !seen.gone {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            seen = self.changed.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn tree(&self) -> (tree::Table, BTreeSet<i32>) {
        let table = tree::table();
        let below = tree::below(&table, &BTreeSet::from([self.pid]));
        (table, below)
    }

    fn status(&self) -> Status {
        let (_, pids) = self.tree();
        let seen = self.seen();
        let state = match (seen.gone, seen.ended) {
            (true, _) => State::Gone,
            (false, Some(_)) => State::Orphaned,
            (false, None) => State::Running,
        };
        Status {
            unit: self.unit.clone(),
            state,
            keeper: self.pid,
            main: self.main,
            ended: seen.ended,
            pids: if seen.gone { Vec::new() } else { pids.into_iter().collect() },
        }
    }

    fn signal(&self, with: Signal, to: Whom) {
        let main_lives = self.seen().ended.is_none();
        if main_lives && to == Whom::Main {
            tree::signal(self.main.pid, self.main.started, with);
        } else {
            let (table, pids) = self.tree();
            tree::signal_all(&table, &pids, with);
        }
    }

    fn kill(&self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            if let Some(leaf) = &self.cgroup {
                // the tree walk below does the same, only slower
                let _ = fs::write(leaf.join("cgroup.kill"), "1");
            }
            let (table, pids) = self.tree();
            tree::signal_all(&table, &pids, Signal::KILL);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.gone_within(left.min(KILL_AGAIN_AFTER)) {
                return;
            }
        }
    }

    /// Lets those who asked read their answer, then tidies what the keeper made.
    fn farewell(&self, unit: &Unit) {
        let until = Instant::now() + FAREWELL_LIMIT;
        let mut seen = self.seen();
        while self.answering.load(Ordering::SeqCst) > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            seen = self.changed.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(seen);
        // both are found and put right by the next start, so a failure here changes nothing
        let _ = fs::remove_file(unit.path("sock"));
        if let Some(leaf) = &self.cgroup {
            let _ = fs::remove_dir(leaf);
        }
    }
}

fn listen(keeper: &Arc<Keeper>, socket: &UnixListener) {
    for stream in socket.incoming() {
        let Ok(stream) = stream else {
            // out of descriptors: pause rather than spin, somebody will close one
            thread::park_timeout(Duration::from_millis(50));
            continue;
        };
        if keeper.answering.fetch_add(1, Ordering::SeqCst) >= ANSWERED_AT_ONCE_MAX {
            keeper.answering.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let own = Arc::clone(keeper);
        let answer = move || {
            serve(&own, &stream);
            let seen = own.seen();
            own.answering.fetch_sub(1, Ordering::SeqCst);
            own.changed.notify_all();
            drop(seen);
        };
        if thread::Builder::new().name("answer".to_owned()).spawn(answer).is_err() {
            keeper.answering.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn serve(keeper: &Keeper, stream: &UnixStream) {
    let answer = match read_request(stream) {
        Ok(request) => answer(keeper, &request),
        Err(error) => Err(error),
    };
    let text = match answer {
        Ok(status) => serde_json::to_string(&status),
        Err(error) => serde_json::to_string(&Misunderstood { error }),
    };
    if let Ok(text) = text {
        // who asked may be gone; then nobody needs the answer
        let _ = writeln!(&mut &*stream, "{text}");
    }
}

fn read_request(stream: &UnixStream) -> Result<Request, String> {
    stream.set_read_timeout(Some(LINE_LIMIT)).map_err(|e| e.to_string())?;
    stream.set_write_timeout(Some(LINE_LIMIT)).map_err(|e| e.to_string())?;
    let mut line = String::new();
    BufReader::new(stream.take(REQUEST_MAX)).read_line(&mut line).map_err(|e| e.to_string())?;
    serde_json::from_str(&line).map_err(|e| format!("not a request: {e}"))
}

fn answer(keeper: &Keeper, request: &Request) -> Result<Status, String> {
    match request {
        Request::Status {} => {}
        Request::Stop { signal, to, grace_ms } => {
            let with = named(signal).ok_or_else(|| format!("no signal {signal:?} for stop"))?;
            keeper.signal(with, *to);
            keeper.gone_within(Duration::from_millis(*grace_ms));
        }
        Request::Kill { grace_ms } => keeper.kill(Duration::from_millis(*grace_ms)),
    }
    Ok(keeper.status())
}

fn named(signal: &str) -> Option<Signal> {
    Some(match signal {
        "TERM" => Signal::TERM,
        "INT" => Signal::INT,
        "HUP" => Signal::HUP,
        "QUIT" => Signal::QUIT,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        _ => return None,
    })
}

/// Puts this process into a cgroup leaf and becomes the command.
///
/// Errors: the leaf's; the command's start. It does not return otherwise.
pub fn enter(leaf: &std::path::Path, command: &[String]) -> Result<(), Fail> {
    let procs = leaf.join("cgroup.procs");
    fs::write(&procs, std::process::id().to_string()).map_err(|e| Fail::io("enter", &procs, &e))?;
    let (first, rest) = command.split_first().ok_or_else(|| Fail::usage("no command after --"))?;
    let cause = Command::new(first).args(rest).exec();
    Err(Fail::plain(format!("start {first}: {cause}")))
}

/// Starts a keeper in the background and waits until its unit runs.
///
/// The keeper is a process of its own that nobody waits for: it outlives its starter.
/// Errors: the keeper's own, with its code.
pub fn detach(order: &Order, args: &[String]) -> Result<String, Fail> {
    let own = std::env::current_exe().map_err(|e| Fail::plain(format!("find own binary: {e}")))?;
    let errors: File = order.unit.log(order.log.as_deref())?;
    let mut child = Command::new(own)
        .arg("keep")
        .arg("--inside")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .map_err(|e| Fail::plain(format!("start keeper: {e}")))?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line).map_err(|e| Fail::plain(format!("hear keeper: {e}")))?;
    }
    let line = line.trim();
    if let Some(pid) = line.strip_prefix("ready ") {
        return Ok(pid.to_owned());
    }
    let ended = child.wait().map_err(|e| Fail::plain(format!("wait for keeper: {e}")))?;
    let code = ended.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code > 0).unwrap_or(1);
    let text = line.strip_prefix("fail ").unwrap_or("the keeper ended without a word; see its log");
    Err(Fail { text: text.to_owned(), code })
}
