//! What is said over a unit's socket: one JSON object on one line each way, then the socket
//! is closed.
//!
//! ```text
//! DIR/UNIT.sock, mode 0600, SOCK_STREAM
//! > {"do":"status"}
//! > {"do":"stop","signal":"TERM","to":"main","grace_ms":60000}
//! > {"do":"kill","grace_ms":5000}
//! < {"unit":"writers","state":"running","keeper":71,"main":{"pid":72,"started":99120},
//!    "ended":null,"pids":[72,73]}
//! < {"error":"no such request"}
//! ```
//!
//! `status` answers at once. `stop` sends the signal (`TERM`, `INT`, `HUP`, `QUIT`, `USR1`,
//! `USR2`) to the main process, or to `all`, and answers once the tree is empty or `grace_ms`
//! has passed, whichever comes first; it never kills. Once the main process has ended, `stop`
//! goes to all that is left. `kill` ends every process of the tree, again and again, until it is
//! empty or `grace_ms` has passed. Both may be repeated.
//!
//! `state` is `running` (the main process lives), `orphaned` (it ended, others of its tree
//! live), or `gone`: the kernel said that the keeper has no child left, and as the keeper is
//! their subreaper, no process of the unit exists. After `gone` the keeper leaves; the socket is
//! removed. A missing or refusing socket proves nothing: ask `dc-guardian reap`.
//!
//! `pids` lists the living processes of the tree. `started` is in ticks since boot, as in
//! `/proc/PID/stat`: with the pid it names one process for as long as the machine is up.

use serde::{Deserialize, Serialize};

/// Bytes of the longest request.
pub const REQUEST_MAX: u64 = 4096;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// What is there.
    Status {},
    /// Ask processes to end.
    Stop {
        /// Without its `SIG`.
        signal: String,
        /// Whom.
        #[serde(default)]
        to: Whom,
        /// How long to wait for the empty tree before answering.
        grace_ms: u64,
    },
    /// End the whole tree.
    Kill {
        /// How long to wait for the empty tree before answering.
        grace_ms: u64,
    },
}

/// Whom a signal goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Whom {
    /// The process that the keeper started.
    #[default]
    Main,
    /// Every process of the tree.
    All,
}

/// The state of a unit's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The main process lives.
    Running,
    /// The main process ended, others of its tree live.
    Orphaned,
    /// No process is left.
    Gone,
}

/// One process for as long as the machine is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Ticks since boot.
    pub started: u64,
}

/// How the main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// The answer to every request that was understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name.
    pub unit: String,
    /// Of the tree.
    pub state: State,
    /// Process id of the keeper.
    pub keeper: i32,
    /// The process that the keeper started.
    pub main: Process,
    /// How it ended; none while it lives.
    pub ended: Option<Ended>,
    /// Living processes.
    pub pids: Vec<i32>,
}

/// The answer to a request that was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misunderstood {
    /// What is wrong with it.
    pub error: String,
}
