//! The pure law of the house: what is known, what follows from it, who may act.
//!
//! This room never touches a clock, a socket, a file, a thread or randomness; time and
//! facts come in as arguments, and decisions leave as data. Everything here gives the
//! same answer to the same question at every site, which is what lets Raft replicate it.
//!
//! Invariants: an epoch never falls; a token never falls for a group; only one run is
//! open for a group; nothing opens at a site before `Opened` of its own epoch is applied.

pub mod act;
pub mod authority;
pub mod codes;
pub mod fail;
pub mod ids;
pub mod invariant;
pub mod lease;
pub mod observe;
pub mod plan;
pub mod position;
pub mod registry;
pub mod run;
pub mod script;
pub mod spec;
pub mod time;
pub mod view;
