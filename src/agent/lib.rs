//! The one loop of a site: it observes its planes, keeps its lease, performs what the
//! applied state says is its own, and proposes what only a leader can.
//!
//! It never decides by itself who holds a group; all it may do without the quorum is close.

pub mod control;
