//! The roof of dc-switch: config, and the one place where the rooms are put together.
//!
//! It decides nothing; see the map in README.md.

pub mod app;
pub mod config;
#[cfg(feature = "sabotage")]
pub mod sabotage;
