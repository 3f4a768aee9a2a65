//! A tree of DAGs on its way in: written into a folder of its own, within limits, below it only.

use std::path::Path;
use std::time::Duration;

use dc_agent::control::Control;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::view::PublishView;
use dc_wire::convert::status_of;
use dc_wire::pb;
use dc_wire::pb::dags_chunk::Part;
use tempfile::TempDir;
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::{group_name, refused};

/// Files of a tree.
pub(crate) const FILES_MAX: u64 = 20_000;
/// Bytes of one file.
pub(crate) const FILE_BYTES_MAX: u64 = 32 << 20;
/// Bytes of a tree.
pub(crate) const TREE_BYTES_MAX: u64 = 512 << 20;
/// Bytes of a path.
pub(crate) const PATH_BYTES_MAX: usize = 512;
/// Bytes of one piece.
pub(crate) const PIECE_BYTES_MAX: usize = 1 << 20;
/// How long a sender may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Lets one tree in at a time: each may need as much disk as the largest tree.
pub(super) struct OneAtATime(Semaphore);

impl Default for OneAtATime {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

fn bad(why: impl Into<String>) -> Status {
    let fail = Fail::refused(Code::from_text("DC-0014"), "the tree of DAGs was not accepted", why);
    refused(fail.next("dc-switch dags publish DIR"))
}

fn broken(what: &str, cause: &std::io::Error) -> Status {
    let what = format!("the tree of DAGs was not accepted: {what} failed; nothing was changed");
    let fail = Fail::new(Code::from_text("DC-0014"), Exit::Unexpected, what, cause.to_string());
    refused(fail.next("dc-switch dags publish DIR"))
}

/// Receives a tree and publishes it. Whatever happens, the folder is gone afterwards.
///
/// Errors: another site holds the group (named); DC-0014 for what no tree may hold or a
/// limit that is exceeded, with both numbers; the agent's own refusal.
pub(super) async fn receive(
    control: &dyn Control,
    turn: &OneAtATime,
    by: &str,
    mut chunks: Streaming<pb::DagsChunk>,
) -> Result<PublishView, Status> {
    let Some(Part::Head(head)) = next(&mut chunks).await? else {
        return Err(bad("the first chunk does not say which group it is for"));
    };
    let group = group_name(&head.group)?;
    let (here, holder) = (control.status().asked, control.group(&group).map_err(refused)?.holder);
    if here != holder {
        let what = format!("no release of {group} is published at {here}; nothing was changed");
        let fail =
            Fail::new(Code::from_text("DC-0010"), Exit::Refused, what, format!("{holder} holds {group}"));
        return Err(status_of(&fail.next("dc-switch dags publish DIR"), Some(holder.as_str())));
    }
    let _turn = turn.0.try_acquire().map_err(|_| bad("another tree is on its way in; try again after it"))?;
    tracing::info!(%group, by, reason = head.reason, "receiving a tree of dags");
    let mut tree = Tree::new()?;
    while let Some(part) = next(&mut chunks).await? {
        match part {
            Part::File(file) => tree.file(&file).await?,
            Part::Piece(bytes) => tree.piece(&bytes).await?,
            Part::Head(_) => return Err(bad("a second head came within the tree")),
        }
    }
    tree.end().await?;
    control.publish(by, &group, tree.dir.path()).await.map_err(refused)
}

async fn next(chunks: &mut Streaming<pb::DagsChunk>) -> Result<Option<Part>, Status> {
    let chunk = timeout(SILENCE_MAX, chunks.message())
        .await
        .map_err(|_| bad(format!("nothing came for {} s", SILENCE_MAX.as_secs())))??;
    match chunk {
        None => Ok(None),
        Some(pb::DagsChunk { part: None }) => Err(bad("a chunk is empty")),
        Some(pb::DagsChunk { part }) => Ok(part),
    }
}

/// A tree as far as it has come.
struct Tree {
    dir: TempDir,
    files: u64,
    bytes: u64,
    open: Option<Incoming>,
}

/// The file named last.
struct Incoming {
    path: String,
    left: u64,
    to: File,
}

impl Tree {
    fn new() -> Result<Self, Status> {
        let dir = tempfile::Builder::new()
            .prefix("dc-dags-")
            .tempdir()
            .map_err(|e| broken("making a folder", &e))?;
        Ok(Self { dir, files: 0, bytes: 0, open: None })
    }

    async fn file(&mut self, file: &pb::DagsFile) -> Result<(), Status> {
        self.end().await?;
        check_path(&file.path).map_err(bad)?;
        let path = &file.path;
        if file.size > FILE_BYTES_MAX {
            return Err(bad(format!("{path:?} has {} bytes, limit {FILE_BYTES_MAX}", file.size)));
        }
        (self.files, self.bytes) = (self.files + 1, self.bytes + file.size);
        if self.files > FILES_MAX {
            return Err(bad(format!("it has more than {FILES_MAX} files")));
        }
        if self.bytes > TREE_BYTES_MAX {
            return Err(bad(format!("it has more than {TREE_BYTES_MAX} bytes")));
        }
        let to = self.dir.path().join(path);
        let mode = if file.mode & 0o100 == 0 { 0o644 } else { 0o755 };
        let to = create(&to, mode).await.map_err(|e| broken(&format!("writing {path:?}"), &e))?;
        self.open = Some(Incoming { path: path.clone(), left: file.size, to });
        Ok(())
    }

    async fn piece(&mut self, bytes: &[u8]) -> Result<(), Status> {
        let Some(open) = &mut self.open else { return Err(bad("bytes came before the name of a file")) };
        let more = bytes.len() as u64;
        if bytes.len() > PIECE_BYTES_MAX || more > open.left {
            let why = format!("{:?}: a piece of {more} bytes, {} are left of the file", open.path, open.left);
            return Err(bad(why));
        }
        open.left -= more;
        open.to.write_all(bytes).await.map_err(|e| broken(&format!("writing {:?}", open.path), &e))
    }

    /// Ends the file named last.
    async fn end(&mut self) -> Result<(), Status> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if open.left > 0 {
            return Err(bad(format!("{:?} ended {} bytes before its size", open.path, open.left)));
        }
        open.to.flush().await.map_err(|e| broken(&format!("writing {:?}", open.path), &e))
    }
}

/// No link is ever made in the folder and no name is used twice, so a checked path stays in it.
async fn create(to: &Path, mode: u32) -> std::io::Result<File> {
    if let Some(folder) = to.parent() {
        tokio::fs::create_dir_all(folder).await?;
    }
    OpenOptions::new().write(true).create_new(true).mode(mode).open(to).await
}

/// Whether a path stays below its folder whoever reads it.
///
/// Errors: what is wrong with it.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return Err(format!("a path has {} bytes, 1 to {PATH_BYTES_MAX} are allowed", path.len()));
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return Err(format!("{path:?} holds a control character or a backslash"));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("{path:?} is absolute or has a part that is empty, . or .."));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_paths_that_could_leave_the_folder() {
        for bad in
            ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", &"x".repeat(513)]
        {
            assert!(check_path(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(check_path("team/orders.py").is_ok() && check_path(".airflowignore").is_ok());
    }

    #[tokio::test]
    async fn a_file_named_twice_or_shorter_than_said_is_refused() -> Result<(), Status> {
        let file = |path: &str, size| pb::DagsFile { path: path.into(), mode: 0o644, size };
        let mut tree = Tree::new()?;
        tree.file(&file("a.py", 2)).await?;
        tree.piece(b"x").await?;
        assert!(tree.file(&file("b.py", 0)).await.is_err(), "one byte of a.py is missing");
        let mut tree = Tree::new()?;
        tree.file(&file("a.py", 0)).await?;
        assert!(tree.file(&file("a.py", 0)).await.is_err());
        assert!(tree.file(&file("a.py/b", 0)).await.is_err());
        assert!(tree.piece(b"x").await.is_err());
        assert!(tree.file(&file("big", FILE_BYTES_MAX + 1)).await.is_err());
        Ok(())
    }
}
