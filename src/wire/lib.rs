//! What crosses machines: the messages, who sent them, and the certificates that prove it.
//!
//! This room carries and authenticates; it never decides what is done. Messages are
//! generated from `proto/` and committed (`pb`), so that nobody needs a protoc; they stop in
//! `convert`, where they become types of the house.
//!
//! Invariants: TLS 1.3, mutual, one crypto provider (ring); a peer is the one URI in its
//! certificate; a method without a row in `access` is called by nobody; a key that others
//! can read is not used.

pub mod access;
pub mod convert;
pub mod identity;
pub mod link;
pub mod pki;
pub mod tls;

/// Generated from `proto/` by `cargo run -p dc-wire --example generate`; never written by hand.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod pb {
    include!("pb/dcswitch.v1.rs");
}
