//! `dags`: publishes a folder of DAGs as a group's newest release.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::GroupName;
use dc_core::view::PublishView;
use dc_wire::pb;
use dc_wire::pb::dags_chunk::Part;
use futures::StreamExt;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::fails::{bad_name, usage};
use super::out::{Out, bytes, count, envelope};
use super::reach::{Home, Reach};
use crate::grpc::limits::{FILE_BYTES_MAX, FILES_MAX, PIECE_BYTES_MAX, TREE_BYTES_MAX, check_path};

/// Upload, publish and reading back at the holder.
const PUBLISH_LIMIT: Duration = Duration::from_mins(10);
/// Made by tools, changing under them, and never part of a release.
const SKIPPED: [&str; 3] = [".git", "__pycache__", ".mypy_cache"];

/// Of `dags`.
#[derive(Debug, Subcommand)]
pub(crate) enum Dags {
    /// Publishes a folder as the group's newest release
    Publish {
        /// Folder of DAGs
        dir: PathBuf,
        /// Group to publish for; may be left out when there is one only
        #[arg(long)]
        group: Option<String>,
        /// Why, for the log
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
}

/// The command with its folder looked through.
pub(crate) struct Prepared {
    group: Option<GroupName>,
    reason: String,
    files: Vec<Found>,
}

/// A file to send.
#[derive(Clone)]
struct Found {
    path: String,
    at: PathBuf,
    mode: u32,
    size: u64,
}

impl Dags {
    /// Looks through the folder before anybody is contacted.
    pub(crate) fn prepare(self, out: &Out) -> Result<Prepared, Fail> {
        let Self::Publish { dir, group, reason } = self;
        let group = group.as_deref().map(GroupName::new).transpose().map_err(|e| bad_name(&e))?;
        let files = look(&dir)?;
        let size = files.iter().map(|f| f.size).sum();
        out.say(&format!("{}: {} files, {}", dir.display(), count(files.len() as u64), bytes(size)));
        Ok(Prepared { group, reason, files })
    }
}

impl Prepared {
    pub(crate) async fn run(self, reach: &Reach, out: &Out) -> Result<Exit, Fail> {
        let home = reach.meet().await?;
        home.quorum()?;
        let group = match &self.group {
            Some(group) => group.clone(),
            None => only_group(&home)?,
        };
        let request = async |mut client: super::reach::Client| {
            let chunks = send(group.clone(), self.reason.clone(), self.files.clone());
            client.dags_publish(chunks).await
        };
        let view: PublishView = reach.call(&home, "release", PUBLISH_LIMIT, request).await?;
        if out.human() {
            let (files, size) = (count(view.files), bytes(view.bytes));
            out.print(&format!("release {} of {group}: {files} files, {size}", view.release.version()));
        } else {
            out.json(&envelope(json!({
                "group": group, "release": view.release, "version": view.release.version(),
                "files": view.files, "bytes": view.bytes,
            })));
        }
        Ok(Exit::Done)
    }
}

fn only_group(home: &Home) -> Result<GroupName, Fail> {
    match home.view.groups.as_slice() {
        [one] => Ok(one.name.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|g| g.name.to_string()).collect();
            let why = if names.is_empty() {
                "no group was applied yet".into()
            } else {
                format!("there are {}", names.join(", "))
            };
            Err(usage("DC-0019", "it is not clear which group is meant; nothing was changed", why)
                .next("dc-switch dags publish DIR --group GROUP"))
        }
    }
}

/// The chunks of a tree, read as they are sent. A file that cannot be read any more ends
/// the stream short of its size, which the agent refuses.
fn send(
    group: GroupName,
    reason: String,
    files: Vec<Found>,
) -> impl futures::Stream<Item = pb::DagsChunk> + Send + 'static {
    let (into, chunks) = mpsc::channel(8);
    tokio::task::spawn_blocking(move || {
        let head = pb::DagsHead { group: group.to_string(), reason };
        if into.blocking_send(Part::Head(head)).is_err() {
            return;
        }
        for file in files {
            if send_file(&file, &into).is_none() {
                return;
            }
        }
    });
    ReceiverStream::new(chunks).map(|part| pb::DagsChunk { part: Some(part) })
}

fn send_file(file: &Found, into: &mpsc::Sender<Part>) -> Option<()> {
    let head = pb::DagsFile { path: file.path.clone(), mode: file.mode, size: file.size };
    into.blocking_send(Part::File(head)).ok()?;
    // never more than was said, though the file may grow meanwhile
    let mut from = File::open(&file.at).ok()?.take(file.size);
    loop {
        let mut piece = Vec::new();
        from.by_ref().take(PIECE_BYTES_MAX as u64).read_to_end(&mut piece).ok()?;
        if piece.is_empty() {
            return Some(());
        }
        into.blocking_send(Part::Piece(piece)).ok()?;
    }
}

fn bad(dir: &Path, why: impl Into<String>) -> Fail {
    usage("DC-0014", format!("{} cannot be published; nothing was changed", dir.display()), why)
        .next("dc-switch dags publish DIR")
}

/// Every file below a folder, in the order of their names.
fn look(dir: &Path) -> Result<Vec<Found>, Fail> {
    let root = std::fs::canonicalize(dir).map_err(|e| bad(dir, e.to_string()))?;
    let mut files = Vec::new();
    walk(&root, &root, "", &mut vec![root.clone()], &mut files).map_err(|why| bad(dir, why))?;
    if files.is_empty() {
        return Err(bad(dir, "it holds no files"));
    }
    if files.len() as u64 > FILES_MAX {
        return Err(bad(dir, format!("it has {} files, limit {FILES_MAX}", files.len())));
    }
    let size: u64 = files.iter().map(|f| f.size).sum();
    if size > TREE_BYTES_MAX {
        return Err(bad(dir, format!("it has {size} bytes, limit {TREE_BYTES_MAX}")));
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Links are followed within the folder only; `above` are the folders on the way down.
fn walk(
    root: &Path,
    folder: &Path,
    prefix: &str,
    above: &mut Vec<PathBuf>,
    files: &mut Vec<Found>,
) -> Result<(), String> {
    for item in std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let item = item.map_err(|e| format!("{}: {e}", folder.display()))?;
        let name = item.file_name();
        let name = name.to_str().ok_or_else(|| format!("{} is not UTF-8", name.to_string_lossy()))?;
        let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        let real = std::fs::canonicalize(item.path()).map_err(|e| format!("{path}: {e}"))?;
        if !real.starts_with(root) {
            return Err(format!("{path} is a link to outside of the folder"));
        }
        let facts = std::fs::metadata(&real).map_err(|e| format!("{path}: {e}"))?;
        if facts.is_dir() && SKIPPED.contains(&name) {
            continue;
        }
        check_path(&path)?;
        if facts.is_dir() {
            if above.contains(&real) {
                return Err(format!("{path} is a link to a folder that holds it"));
            }
            above.push(real.clone());
            walk(root, &real, &path, above, files)?;
            above.pop();
        } else if facts.is_file() {
            if facts.len() > FILE_BYTES_MAX {
                return Err(format!("{path} has {} bytes, limit {FILE_BYTES_MAX}", facts.len()));
            }
            files.push(Found { path, at: real, mode: facts.permissions().mode() & 0o777, size: facts.len() });
        } else {
            return Err(format!("{path} is neither a file nor a folder"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> std::io::Result<tempfile::TempDir> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir_all(dir.path().join("team/__pycache__"))?;
        std::fs::write(dir.path().join("team/a.py"), "a")?;
        std::fs::write(dir.path().join("team/__pycache__/a.pyc"), "x")?;
        std::fs::write(dir.path().join(".airflowignore"), "x")?;
        Ok(dir)
    }

    #[test]
    fn sends_every_file_but_what_tools_leave() -> std::io::Result<()> {
        let dir = tree()?;
        symlink(dir.path().join("team/a.py"), dir.path().join("b.py"))?;
        let paths = look(dir.path()).map(|found| found.into_iter().map(|f| f.path).collect::<Vec<_>>());
        assert_eq!(paths.ok(), Some(vec![".airflowignore".into(), "b.py".into(), "team/a.py".into()]));
        Ok(())
    }

    #[test]
    fn refuses_links_that_leave_the_folder_or_never_end() -> std::io::Result<()> {
        for (target, word) in [("/etc/hostname", "outside"), (".", "holds it")] {
            let dir = tree()?;
            symlink(target, dir.path().join("link"))?;
            let why = look(dir.path()).map_or_else(|fail| fail.why, |_| String::new());
            assert!(why.contains(word), "{target}: {why}");
        }
        assert!(look(Path::new("/nowhere/at/all")).is_err());
        assert!(look(tempfile::tempdir()?.path()).is_err());
        Ok(())
    }
}
