//! The S3 plane: DAG releases and Airflow's remote logs of a group, between two object stores.
//!
//! Pull, never push: an agent writes only its own site's bucket and reads the other's, so a site that was left
//! behind can damage nobody. Serial, root and epoch of a DAG release are decided in the quorum; objects are
//! published copies, found by content. Logs are not immutable, so a pass compares key, size and ETag of both
//! sides.
//!
//! This room never deletes an object because it is missing elsewhere, never overwrites one it does not know
//! without keeping it beside, never takes a conditional write for an authority, and never takes an answer for a
//! proof: a fence is proved by a refused PUT with a writer's own key.
//!
//! Layout: `<dag_prefix>/dc/v1/{blob/<sha256>, tree/<root>.json, release/<serial>-<root>.json, current.json}` and
//! `<log_prefix>/.dc/{probe,canary}/<site>`.

mod bring;
mod checks;
mod config;
mod copy;
mod driver;
mod fence;
mod join;
mod manifest;
mod materialise;
mod memory;
mod passes;
mod policy;
mod publish;
mod pull;
mod state;
mod store;
mod tree;
mod verify;

pub use config::{BuildError, Config, SiteConfig};
pub use driver::build;
pub use manifest::{Entry, Manifest, SealedManifest};
pub use publish::publisher;
pub use tree::Limits;
