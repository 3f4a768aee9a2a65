//! A unit's place on disk: its names, its lock, what a keeper notes about itself, its environment.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name of the environment variable by which a process tells whose it is.
pub const MARK: &str = "DC_UNIT";

/// Why the guardian could not do what it was asked. The number is the exit code.
#[derive(Debug)]
pub struct Fail {
    /// What and why, in one line.
    pub text: String,
    /// As in the table of `main.rs`.
    pub code: u8,
}

impl Fail {
    /// A failure without a meaning of its own for scripts.
    pub fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 1 }
    }
    /// The command line cannot be understood.
    pub fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 2 }
    }
    /// A keeper of this unit lives.
    pub fn kept(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 3 }
    }
    /// Processes of an earlier keeper live, or may live.
    pub fn leftovers(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 4 }
    }
    /// A failed system call, with what it was for.
    pub fn io(what: &str, path: &Path, cause: &io::Error) -> Self {
        Self::plain(format!("{what} {}: {cause}", path.display()))
    }
}

/// One unit: a directory and a name in it.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Absolute and without links, so that two spellings of one place are one unit.
    pub dir: PathBuf,
    /// 1 to 40 of a-z, 0-9 and '-'.
    pub name: String,
}

impl Unit {
    /// Checks the name, makes the directory (0700) when it is missing.
    ///
    /// Errors: a name that could leave the directory; a directory that cannot be made.
    pub fn open(dir: &Path, name: &str) -> Result<Self, Fail> {
        let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if name.is_empty() || name.len() > 40 || !plain {
            return Err(Fail::usage(format!("unit name {name:?} is not 1 to 40 of a-z, 0-9 and '-'")));
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Fail::io("make directory", dir, &e))?;
        let dir = dir.canonicalize().map_err(|e| Fail::io("resolve", dir, &e))?;
        Ok(Self { dir, name: name.to_owned() })
    }

    /// A file of this unit.
    pub fn path(&self, ending: &str) -> PathBuf {
        self.dir.join(format!("{}.{ending}", self.name))
    }

    /// The value of `DC_UNIT` in every process of this unit.
    pub fn mark(&self) -> String {
        self.dir.join(&self.name).display().to_string()
    }

    /// Takes the unit's lock; it is held as long as the file is, and ends with the process.
    ///
    /// Errors: code 3 when a keeper holds it.
    pub fn lock(&self) -> Result<File, Fail> {
        let path = self.path("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Fail::io("open", &path, &e))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                let by = self.note().map_or_else(String::new, |note| format!(" by keeper {}", note.keeper));
                Err(Fail::kept(format!("unit {} is kept{by}", self.mark())))
            }
            Err(TryLockError::Error(e)) => Err(Fail::io("lock", &path, &e)),
        }
    }

    /// What the last keeper noted about itself; none when there was none or it is unreadable.
    pub fn note(&self) -> Option<Note> {
        let text = fs::read_to_string(self.path("kept")).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Notes the keeper before its first child exists.
    ///
    /// Errors: the disk's.
    pub fn write_note(&self, note: &Note) -> Result<(), Fail> {
        let (path, fresh) = (self.path("kept"), self.path("kept.new"));
        let text = serde_json::to_string(note).map_err(|e| Fail::plain(format!("write note: {e}")))?;
        let write = || -> io::Result<()> {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|e| Fail::io("write", &path, &e))
    }

    /// Opens the unit's log for appending (0600).
    ///
    /// Errors: the disk's.
    pub fn log(&self, path: Option<&Path>) -> Result<File, Fail> {
        let path = path.map_or_else(|| self.path("log"), Path::to_path_buf);
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Fail::io("open log", &path, &e))
    }
}

/// What a keeper leaves so that its processes are found without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Of this boot of the machine; pids of another one say nothing.
    pub boot: String,
    /// Process id of the keeper, and the session of its unit.
    pub keeper: i32,
    /// When the keeper started: ticks since boot, as in `/proc/PID/stat`.
    pub started: u64,
    /// The unit's own cgroup v2 leaf, where it has one.
    pub cgroup: Option<PathBuf>,
}

/// Reads `KEY=value` lines: no quotes, no expansion; `#` starts a comment line; a leading
/// `export ` is allowed.
///
/// Errors: a file that others may read, a line that is no setting (named by number, never shown).
pub fn read_env(path: &Path) -> Result<Vec<(String, String)>, Fail> {
    let mut file = File::open(path).map_err(|e| Fail::io("open", path, &e))?;
    let mode = file.metadata().map_err(|e| Fail::io("stat", path, &e))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Fail::plain(format!(
            "{} has mode {:03o}: it holds secrets, make it 0600",
            path.display(),
            mode & 0o777
        )));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|e| Fail::io("read", path, &e))?;
    parse_env(&text).map_err(|line| Fail::plain(format!("{}: line {line} is not KEY=value", path.display())))
}

fn parse_env(text: &str) -> Result<Vec<(String, String)>, usize> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (key, value) = line.split_once('=').ok_or(at + 1)?;
        let plain = key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if key.is_empty() || !plain || value.contains('\0') {
            return Err(at + 1);
        }
        found.push((key.to_owned(), value.to_owned()));
    }
    Ok(found)
}

/// Makes a file readable by its owner only.
///
/// Errors: the disk's.
pub fn own_only(path: &Path) -> Result<(), Fail> {
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(|e| Fail::io("chmod", path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_keeps_every_sign_after_the_first_equals() {
        let read = parse_env("# note\n\nA=b=c d\nexport B=\n");
        assert_eq!(read, Ok(vec![("A".into(), "b=c d".into()), ("B".into(), String::new())]));
        assert_eq!(parse_env("A=1\nsecret without a name"), Err(2));
        assert_eq!(parse_env("A B=1"), Err(1));
    }

    #[test]
    fn a_unit_name_cannot_leave_its_directory() {
        for bad in ["", "../x", "A", "a b", "a/b", &"x".repeat(41)] {
            assert!(Unit::open(Path::new("/nonexistent"), bad).is_err_and(|f| f.code == 2), "{bad:?}");
        }
    }
}
