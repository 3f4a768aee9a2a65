//! The instance's configuration files as text: quoting, our own settings, and replacing a file whole.
//!
//! What we set lies in `postgresql.auto.conf`, where `ALTER SYSTEM` would put it; all else in that file stays.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use dc_plane::PlaneError;

/// Settings that depend on the role of a site. They are written anew before every start, for a rewind or a base
/// backup brings the other site's, a connection string to the instance itself included.
pub(crate) const OWNED: [&str; 14] = [
    "primary_conninfo",
    "primary_slot_name",
    "synchronous_standby_names",
    "default_transaction_read_only",
    "recovery_target_timeline",
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "port",
    "unix_socket_directories",
    "hot_standby",
    "promote_trigger_file",
];

/// A value of a connection string, quoted.
pub(crate) fn conninfo_value(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A value of a configuration file, quoted.
pub(crate) fn setting_value(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// A text literal of SQL, quoted for sessions with standard strings (the default, and fixed in ours).
pub(crate) fn literal(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

/// The auto file with every setting of ours taken out and these put in.
pub(crate) fn rewrite_auto(existing: &str, ours: &[(&str, String)]) -> String {
    let foreign = |line: &&str| {
        let name =
            line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default();
        !OWNED.contains(&name.to_ascii_lowercase().as_str())
    };
    let mut text: String = existing.lines().filter(foreign).flat_map(|line| [line, "\n"]).collect();
    for (name, value) in ours {
        text.extend([name, " = ", &setting_value(value), "\n"]);
    }
    text
}

/// The last value of a setting in the auto file; none when it is not set there.
pub(crate) fn auto_value(auto: &str, name: &str) -> Option<String> {
    let value = auto.lines().rev().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })?;
    let bare = value.strip_prefix('\'').and_then(|v| v.strip_suffix('\'')).unwrap_or(&value);
    Some(bare.replace("''", "'").replace("\\\\", "\\"))
}

/// Reads a text file; a missing one is empty.
pub(crate) fn read(path: &Path) -> Result<String, PlaneError> {
    match fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|e| PlaneError::failed(format!("read {}", path.display()), &e)),
    }
}

/// What the name of a file holds that was being written.
const FRESH: &str = ".dcswitch-";
/// Counts files written, so that no two writers share one.
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Removes what writers that died left in a folder.
pub(crate) fn remove_leftovers(dir: &Path) -> Result<(), PlaneError> {
    let list = fs::read_dir(dir).map_err(|e| PlaneError::failed(format!("list {}", dir.display()), &e))?;
    for entry in list.flatten() {
        if entry.path().is_file() && entry.file_name().to_string_lossy().contains(FRESH) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Replaces a file whole, by rename, keeping its owner and mode: one file of another owner stops `pg_rewind` half-way.
///
/// `durable` waits for the disk. Repeat: safe.
pub(crate) fn replace(path: &Path, text: &[u8], durable: bool) -> Result<(), PlaneError> {
    let fail = |e: std::io::Error| PlaneError::failed(format!("write {}", path.display()), &e);
    let (mode, owner) = match fs::metadata(path) {
        Ok(meta) => (meta.mode() & 0o777, Some((meta.uid(), meta.gid()))),
        Err(_) => (0o600, None),
    };
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{FRESH}{}-{}", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
    let fresh = PathBuf::from(name);
    let mut open = fs::OpenOptions::new();
    let mut file = open.write(true).create(true).truncate(true).mode(mode).open(&fresh).map_err(fail)?;
    file.write_all(text).map_err(fail)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(fail)?;
    if let Some((uid, gid)) = owner {
        let now = file.metadata().map_err(fail)?;
        if (now.uid(), now.gid()) != (uid, gid) {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(fail)?;
        }
    }
    if durable {
        file.sync_all().map_err(fail)?;
    }
    fs::rename(&fresh, path).map_err(fail)?;
    if durable && let Some(parent) = path.parent() {
        fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(fail)?;
    }
    Ok(())
}

/// Removes a file. Repeat: safe.
pub(crate) fn remove(path: &Path) -> Result<(), PlaneError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| PlaneError::failed(format!("remove {}", path.display()), &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_cannot_end_their_own_quotes() {
        assert_eq!(conninfo_value(r"a'b\c d"), r"'a\'b\\c d'");
        assert_eq!(setting_value(r"a'b\c"), r"'a''b\\c'");
        assert_eq!(literal("a'b"), "'a''b'");
    }

    #[test]
    fn the_auto_file_loses_what_a_rewind_left_and_keeps_what_is_not_ours() {
        let left =
            "# Do not edit\nwork_mem = '64MB'\nprimary_conninfo = 'host=itself'\n PORT='1'\nportly = 'x'\n";
        let ours = [("port", "25432".to_owned()), ("synchronous_standby_names", String::new())];
        assert_eq!(
            rewrite_auto(left, &ours),
            "# Do not edit\nwork_mem = '64MB'\nportly = 'x'\nport = '25432'\nsynchronous_standby_names = ''\n"
        );
        assert_eq!(rewrite_auto(&rewrite_auto(left, &ours), &ours), rewrite_auto(left, &ours));
    }

    #[test]
    fn finds_the_value_that_holds() {
        let auto = "a = '1'\nmax_standby_archive_delay = '30s'\nA = 'it''s'\n";
        assert_eq!(auto_value(auto, "a").as_deref(), Some("it's"));
        assert_eq!(auto_value(auto, "max_standby_archive_delay").as_deref(), Some("30s"));
        assert_eq!(auto_value(auto, "port"), None);
    }

    #[test]
    fn a_replaced_file_keeps_its_mode() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pg_hba.conf");
        fs::write(&path, "old")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
        replace(&path, b"new", true)?;
        assert_eq!(fs::read_to_string(&path)?, "new");
        assert_eq!(fs::metadata(&path)?.mode() & 0o777, 0o640);
        remove(&path)?;
        remove(&path)?;
        assert_eq!(read(&path)?, "");
        Ok(())
    }
}
