//! The PostgreSQL plane: one streaming pair, moved without losing an acknowledged write, or not at all.
//!
//! The driver `local` stands on the instance's host and runs as its system user: it writes the instance's files,
//! signals its processes and asks it through a role of its own. Nothing else may start the instance; that is the boot
//! gate. It never decides where the group is, never promotes without a token that was replayed past, and never lifts
//! the fence of another run.
//!
//! # What it expects of an instance
//!
//! - PostgreSQL 13 to 18 (the parameter grants below need 15), `wal_log_hints = on` or data checksums,
//!   `full_page_writes = on`, log segments of 16 MB, `pg_hba.conf` inside the data directory, the unix socket outside.
//! - In `pg_hba.conf` and `postgresql.auto.conf` the driver owns what it marks as its own: a block at the head of the
//!   first (it lets our two roles in; shut, it rejects everybody else), and in the second the settings of the role,
//!   `port` and `unix_socket_directories` included, written anew before every start. The site's own rules below the
//!   block decide who comes in while the door is open.
//! - A standby streams under the name `dcswitch_SITE` (dashes as underscores), from a slot of that name.
//!
//! # Grants
//!
//! ```sql
//! create role dcswitch login replication password '...';     -- the agent; no superuser
//! grant pg_monitor, pg_checkpoint to dcswitch;
//! grant execute on function pg_promote(boolean, integer) to dcswitch;
//! grant alter system on parameter synchronous_standby_names, max_standby_streaming_delay,
//!       max_standby_archive_delay to dcswitch;
//! grant create on database postgres to dcswitch;              -- our schema: epoch rows and canaries
//! create role dcrepl login replication password '...';       -- streams and rewinds
//! grant execute on function pg_ls_dir(text, boolean, boolean), pg_stat_file(text, boolean),
//!       pg_read_binary_file(text), pg_read_binary_file(text, bigint, bigint, boolean) to dcrepl;
//! ```
//!
//! Sessions are ended and settings reloaded by signals to the instance's processes, which need no grant but the same
//! system user.

mod acts;
mod conf;
mod config;
mod control;
mod db;
mod door;
mod instance;
mod local;
mod marks;
mod observe;
mod plane;
mod procs;

use std::path::PathBuf;
use std::sync::Arc;

use dc_core::ids::SiteId;
use dc_core::spec::GroupSpec;
use dc_plane::Plane;

pub use config::{Address, BuildError, Config, Driver};

/// Builds the plane of one group at one site, checking all that needs no network.
///
/// `data_dir` is the agent's own; what must outlive the instance's data directory is kept in its folder `postgres`.
/// Errors: the first fault, by its key. Repeat: safe.
#[allow(clippy::needless_pass_by_value)] // the same signature for every plane
pub fn build(
    config: Config,
    spec: &GroupSpec,
    site: SiteId,
    data_dir: PathBuf,
) -> Result<Arc<dyn Plane>, BuildError> {
    let local = local::Local::new(config, spec, site, &data_dir)?;
    Ok(Arc::new(plane::Postgres(Arc::new(local))))
}
