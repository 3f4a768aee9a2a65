//! The world in a box: three sites, a log, planes, clocks and whatever may go wrong, in one
//! thread, from one seed. Only tests use it.
//!
//! What decides is the product's own: `dc_core`'s registry, plans, runs, leases and
//! invariants, and the agent's duties, leases, clock rule, tokens and what its leader
//! says. What is made here is what it is thrown into:
//! leaders that change, state that lags, proposals lost, late or twice, processes that die
//! between any two effects, disks that are lost or full, hosts that stand still, clocks
//! that jump. It never sleeps and never reads a clock; the same seed gives the same story.

mod agent;
mod dice;
mod host;
mod log;
mod operator;
mod sin;
mod trouble;
mod work;
mod world;

pub use host::TICK_MS;
pub use operator::Order;
pub use sin::Sin;
pub use trouble::{Crash, Fault, Moment, Victim};
pub use world::{Report, World};
