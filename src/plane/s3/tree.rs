//! A folder of DAG files on this disk, read into a manifest; what no release may hold is refused by name.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::manifest::{Entry, Manifest};

/// How large a release may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files.
    pub files: usize,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { files: 20_000, file_bytes: 32 << 20, bytes: 512 << 20 }
    }
}

/// Folders that are never part of a release: made by tools, and changing under them.
const SKIPPED: [&str; 3] = [".git", "__pycache__", ".mypy_cache"];

/// Why a folder cannot become a release.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadTree {
    #[error("{path}: {why}")]
    Path { path: String, why: String },
    #[error("{path} cannot be read: {cause}")]
    Io { path: String, cause: std::io::Error },
    #[error("it holds no files")]
    Empty,
    #[error("more than {0} files")]
    TooMany(usize),
    #[error("more than {0} bytes")]
    TooLarge(u64),
    #[error("it changed while it was read; publish from a folder that nobody writes to")]
    Changed,
    #[error(transparent)]
    Manifest(#[from] crate::manifest::BadManifest),
}

fn refuse(path: &str, why: impl Into<String>) -> BadTree {
    BadTree::Path { path: format!("{path:?}"), why: why.into() }
}

/// Checks a path of a release: relative, plain parts, no control characters, at most 512 bytes.
pub(crate) fn checked_path(path: &str) -> Result<(), BadTree> {
    if path.is_empty() || path.len() > 512 {
        return Err(refuse(path, "a path has 1 to 512 bytes"));
    }
    if path.starts_with('/') {
        return Err(refuse(path, "is absolute"));
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return Err(refuse(path, "holds a control character or a backslash"));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(refuse(path, "has a part that is empty, . or .."));
    }
    Ok(())
}

/// A file of the tree and where its bytes are.
struct Found {
    path: String,
    at: PathBuf,
    mode: u32,
}

/// Reads a folder twice; both readings must agree.
///
/// Errors: everything that no release may hold, by its path; `Changed` when the readings differ.
pub(crate) fn read(dir: &Path, limits: Limits) -> Result<Manifest, BadTree> {
    let first = once(dir, limits)?;
    if once(dir, limits)? == first { Ok(first) } else { Err(BadTree::Changed) }
}

fn once(dir: &Path, limits: Limits) -> Result<Manifest, BadTree> {
    let root =
        std::fs::canonicalize(dir).map_err(|cause| BadTree::Io { path: dir.display().to_string(), cause })?;
    let mut found = Vec::new();
    walk(&root, &root, "", limits, &mut Vec::new(), &mut found)?;
    if found.is_empty() {
        return Err(BadTree::Empty);
    }
    let (mut files, mut bytes) = (Vec::with_capacity(found.len()), 0_u64);
    for file in found {
        let (size, sha256) = digest(&file, limits)?;
        bytes += size;
        if bytes > limits.bytes {
            return Err(BadTree::TooLarge(limits.bytes));
        }
        files.push(Entry { path: file.path, mode: file.mode, size, sha256 });
    }
    Ok(Manifest::new(files)?)
}

fn walk(
    root: &Path,
    dir: &Path,
    prefix: &str,
    limits: Limits,
    above: &mut Vec<PathBuf>,
    found: &mut Vec<Found>,
) -> Result<(), BadTree> {
    let io = |path: &Path, cause| BadTree::Io { path: path.display().to_string(), cause };
    let real = std::fs::canonicalize(dir).map_err(|e| io(dir, e))?;
    if above.contains(&real) {
        return Err(refuse(prefix, "is a link to a folder that holds it"));
    }
    above.push(real);
    for item in std::fs::read_dir(dir).map_err(|e| io(dir, e))? {
        let item = item.map_err(|e| io(dir, e))?;
        let name = item.file_name();
        let name = name.to_str().ok_or_else(|| refuse(&name.to_string_lossy(), "is not UTF-8"))?;
        let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        let at = item.path();
        if at.is_dir() && SKIPPED.contains(&name) {
            continue;
        }
        checked_path(&path)?;
        if item.file_type().map_err(|e| io(&at, e))?.is_symlink() {
            let target =
                std::fs::canonicalize(&at).map_err(|e| refuse(&path, format!("leads nowhere: {e}")))?;
            if !target.starts_with(root) {
                return Err(refuse(&path, "is a link that leads out of the tree"));
            }
        }
        let meta = std::fs::metadata(&at).map_err(|e| io(&at, e))?;
        if meta.is_dir() {
            walk(root, &at, &path, limits, above, found)?;
        } else if meta.is_file() {
            let mode = if meta.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
            found.push(Found { path, at, mode });
            if found.len() > limits.files {
                return Err(BadTree::TooMany(limits.files));
            }
        } else {
            return Err(refuse(&path, "is neither a file nor a folder"));
        }
    }
    above.pop();
    Ok(())
}

fn digest(file: &Found, limits: Limits) -> Result<(u64, String), BadTree> {
    let io = |cause| BadTree::Io { path: file.at.display().to_string(), cause };
    let mut open = std::fs::File::open(&file.at).map_err(io)?.take(limits.file_bytes + 1);
    let (mut sum, mut size, mut buffer) = (Sha256::new(), 0_u64, vec![0_u8; 64 << 10]);
    loop {
        let n = open.read(&mut buffer).map_err(io)?;
        if n == 0 {
            break;
        }
        size += n as u64;
        if size > limits.file_bytes {
            return Err(refuse(&file.path, format!("has more than {} bytes", limits.file_bytes)));
        }
        sum.update(&buffer[..n]);
    }
    Ok((size, hex::encode(sum.finalize())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    type Anyhow = Result<(), Box<dyn std::error::Error>>;

    fn folder(files: &[(&str, &str)]) -> std::io::Result<tempfile::TempDir> {
        let dir = tempfile::tempdir()?;
        for (path, text) in files {
            let at = dir.path().join(path);
            std::fs::create_dir_all(at.parent().unwrap_or(dir.path()))?;
            std::fs::write(at, text)?;
        }
        Ok(dir)
    }

    fn refusal(dir: &Path, limits: Limits) -> String {
        read(dir, limits).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn reads_plain_files_and_leaves_tools_folders_out() -> Anyhow {
        let dir = folder(&[
            ("a.py", "one"),
            ("sub/b.py", "two"),
            (".git/config", "x"),
            ("sub/__pycache__/b.pyc", "x"),
        ])?;
        std::fs::set_permissions(dir.path().join("sub/b.py"), std::fs::Permissions::from_mode(0o750))?;
        let manifest = read(dir.path(), Limits::default())?;
        let seen: Vec<_> = manifest.files().iter().map(|f| (f.path.as_str(), f.mode, f.size)).collect();
        assert_eq!(seen, vec![("a.py", 0o644, 3), ("sub/b.py", 0o755, 3)]);
        Ok(())
    }

    #[test]
    fn refuses_links_that_lead_out_and_follows_those_that_stay() -> Anyhow {
        let dir = folder(&[("a.py", "one")])?;
        symlink(dir.path().join("a.py"), dir.path().join("b.py"))?;
        assert_eq!(read(dir.path(), Limits::default())?.files().len(), 2);
        symlink("/etc/passwd", dir.path().join("c.py"))?;
        assert!(refusal(dir.path(), Limits::default()).contains("leads out of the tree"));
        std::fs::remove_file(dir.path().join("c.py"))?;
        symlink("nowhere", dir.path().join("d.py"))?;
        assert!(refusal(dir.path(), Limits::default()).contains("leads nowhere"));
        std::fs::remove_file(dir.path().join("d.py"))?;
        symlink(dir.path(), dir.path().join("loop"))?;
        assert!(refusal(dir.path(), Limits::default()).contains("holds it"));
        Ok(())
    }

    #[test]
    fn refuses_devices_sockets_and_names_that_hide() -> Anyhow {
        let dir = folder(&[("a.py", "one")])?;
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s"))?;
        assert!(refusal(dir.path(), Limits::default()).contains("neither a file nor a folder"));
        std::fs::remove_file(dir.path().join("s"))?;
        std::fs::write(dir.path().join("a\nb.py"), "x")?;
        assert!(refusal(dir.path(), Limits::default()).contains("control character"));
        Ok(())
    }

    #[test]
    fn refuses_what_is_too_much() -> Anyhow {
        let dir = folder(&[("a.py", "one"), ("b.py", "two")])?;
        let limits = Limits::default();
        assert!(refusal(dir.path(), Limits { files: 1, ..limits }).contains("more than 1 files"));
        assert!(refusal(dir.path(), Limits { file_bytes: 2, ..limits }).contains("more than 2 bytes"));
        assert!(refusal(dir.path(), Limits { bytes: 5, ..limits }).contains("more than 5 bytes"));
        assert!(refusal(&dir.path().join("none"), limits).contains("cannot be read"));
        assert!(refusal(folder(&[])?.path(), limits).contains("no files"));
        Ok(())
    }
}
