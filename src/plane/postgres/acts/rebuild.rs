//! Rewind, or a new base backup where a rewind cannot be: the data directory becomes one that can follow.
//!
//! What diverged is kept first. This site's own configuration files are kept aside and put back, for a rewind brings
//! the other site's. Both survive a crash: a rebuild that began is repeated before the instance may start.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use dc_core::act::{Act, Outcome};
use dc_core::ids::SiteId;
use dc_core::position::Lsn;
use dc_plane::{Deadline, PlaneError, wait_until};
use rustix::fs::{FlockOperation, flock};

use crate::conf;
use crate::db;
use crate::local::{Local, last_words};

/// How often a tool is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// This site's own files within the data directory.
const OWN_FILES: [&str; 4] = ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];
const SEGMENT: u64 = 16 << 20;

impl Local {
    /// Makes the stopped data directory one that can follow the holder. Returns how, in words.
    ///
    /// Repeat: safe, also after a crash half-way. Errors: `Failed` with the tools' last words.
    pub(crate) async fn rebuild(
        &self,
        act: &Act,
        holder: &SiteId,
        timeline: u32,
        until: Deadline,
    ) -> Result<&'static str, PlaneError> {
        self.finish_swap()?;
        drop(self.no_tool(until).await?);
        self.come_down(until).await?;
        if !self.marks.get()?.rebuilding {
            self.quarantine(act)?;
            self.keep_own_files()?;
            self.marks.update(move |m| m.rebuilding = true).await?;
        }
        self.checkpoint_at_holder(timeline, until).await?;
        let how = match self.rewind(holder, until).await {
            Ok(()) => "rewound",
            Err(late @ PlaneError::TimedOut { .. }) => return Err(late),
            Err(why) => {
                tracing::warn!(%why, "the rewind failed; a new base backup is taken");
                self.base_backup(holder, until).await?;
                "copied anew"
            }
        };
        self.put_own_files_back()?;
        self.marks.update(move |m| m.rebuilding = false).await?;
        fs::remove_dir_all(self.kept()).map_err(|e| PlaneError::failed("remove kept files", &e))?;
        Ok(how)
    }

    fn kept(&self) -> PathBuf {
        self.state_dir.join("kept")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.config.data_dir.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    }

    /// Until version 16 a rewind reads the source's timeline from its control file, which only a checkpoint updates:
    /// without this it reports success and has done nothing.
    async fn checkpoint_at_holder(&self, timeline: u32, until: Deadline) -> Result<(), PlaneError> {
        let session = self.other.sibling();
        session.run(until, "checkpoint at the holder", "checkpoint").await?;
        let sql = "select timeline_id as t from pg_control_checkpoint()";
        let now: i32 = db::get(&session.one(until, "read the holder's timeline", sql, &[]).await?, "t")?;
        if now.cast_unsigned() == timeline {
            return Ok(());
        }
        Err(PlaneError::Failed {
            what: "checkpoint at the holder".into(),
            why: format!("its control file names timeline {now}, it writes {timeline}"),
        })
    }

    /// Keeps the log from the switch point on, the histories and the control file. Repeat: safe.
    fn quarantine(&self, act: &Act) -> Result<(), PlaneError> {
        let run = act.run.as_ref().map_or_else(|| "upkeep".to_owned(), ToString::to_string);
        let to = self.state_dir.join("quarantine").join(run);
        let switched = act.given.iter().rev().find_map(|outcome| match outcome {
            Outcome::SwitchPoint(at) => Some(*at),
            _ => None,
        });
        let from = switched.or_else(|| act.shutdown().map(|t| t.checkpoint)).unwrap_or(Lsn(0)).0 / SEGMENT;
        let fail =
            |e: std::io::Error| PlaneError::failed(format!("keep diverged log in {}", to.display()), &e);
        fs::create_dir_all(&to).map_err(fail)?;
        let data = &self.config.data_dir;
        fs::copy(data.join("global/pg_control"), to.join("pg_control")).map_err(fail)?;
        for entry in fs::read_dir(data.join("pg_wal")).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".history") || segment_of(&name).is_some_and(|number| number >= from) {
                fs::copy(entry.path(), to.join(&name)).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn keep_own_files(&self) -> Result<(), PlaneError> {
        let kept = self.kept();
        let fail = |e: std::io::Error| PlaneError::failed(format!("keep files in {}", kept.display()), &e);
        fs::create_dir_all(&kept).map_err(fail)?;
        for name in OWN_FILES {
            match fs::copy(self.config.data_dir.join(name), kept.join(name)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {} // lies outside the data directory
                other => _ = other.map_err(fail)?,
            }
        }
        Ok(())
    }

    fn put_own_files_back(&self) -> Result<(), PlaneError> {
        for name in OWN_FILES {
            let kept = self.kept().join(name);
            let own = self.config.data_dir.join(name);
            if kept.exists() {
                conf::replace(&own, conf::read(&kept)?.as_bytes(), true)?;
            } else {
                conf::remove(&own)?;
            }
        }
        Ok(())
    }

    /// Waits until no tool of an earlier attempt works any more, for killing one half-way ruins what it writes.
    ///
    /// Returns the lock that the next tool inherits: it is held for as long as any of its processes lives, whenever
    /// this agent died.
    async fn no_tool(&self, until: Deadline) -> Result<fs::File, PlaneError> {
        let path = self.state_dir.join("tool.lock");
        wait_until(until, LOOK_EVERY, "an earlier rewind or base backup ends", || async {
            lock(&path).map_err(|e| PlaneError::failed(format!("lock {}", path.display()), &e))
        })
        .await
    }

    async fn rewind(&self, holder: &SiteId, until: Deadline) -> Result<(), PlaneError> {
        let source = self.conninfo(holder, false)?;
        let mut tool = self.tool("pg_rewind");
        tool.arg("--target-pgdata").arg(&self.config.data_dir).arg("--source-server").arg(source);
        self.run_tool(tool, "pg_rewind", until).await
    }

    /// A fresh copy beside the data directory, then swapped in by rename; the old one stays as `.dcswitch-old`.
    async fn base_backup(&self, holder: &SiteId, until: Deadline) -> Result<(), PlaneError> {
        let fresh = self.beside(".dcswitch-new");
        clear_dir(&fresh)?;
        let mut tool = self.tool("pg_basebackup");
        tool.arg("-D").arg(&fresh).arg("-d").arg(self.conninfo(holder, false)?);
        tool.args(["-X", "stream", "-c", "fast", "-w"]);
        self.run_tool(tool, "pg_basebackup", until).await?;
        clear_dir(&self.beside(".dcswitch-old"))?;
        conf::replace(&fresh.join("dcswitch.complete"), b"", true)?;
        self.finish_swap()
    }

    /// Swaps a complete copy in. Repeat: safe at any line.
    fn finish_swap(&self) -> Result<(), PlaneError> {
        let (data, fresh, old) =
            (&self.config.data_dir, self.beside(".dcswitch-new"), self.beside(".dcswitch-old"));
        if !fresh.join("dcswitch.complete").exists() {
            return Ok(());
        }
        let fail = |e: std::io::Error| PlaneError::failed(format!("swap in {}", fresh.display()), &e);
        if data.exists() && !old.exists() {
            fs::rename(data, &old).map_err(fail)?;
        }
        fs::rename(&fresh, data).map_err(fail)?;
        conf::remove(&data.join("dcswitch.complete"))
    }

    async fn run_tool(
        &self,
        mut tool: tokio::process::Command,
        name: &str,
        until: Deadline,
    ) -> Result<(), PlaneError> {
        let log = self.state_dir.join(format!("{name}.log"));
        let fail = |e: std::io::Error| PlaneError::failed(name, &e);
        let out = fs::File::create(&log).map_err(fail)?;
        // its output is a file and it leads its own group, so that it outlives this agent
        tool.stdout(Stdio::from(out.try_clone().map_err(fail)?)).stderr(Stdio::from(out)).process_group(0);
        tool.stdin(Stdio::from(self.no_tool(until).await?));
        let mut child = tool.spawn().map_err(fail)?;
        drop(tool); // and with it our hold on the lock
        let ended = until.bound(&format!("{name} ends"), child.wait()).await?.map_err(fail)?;
        if ended.success() {
            return Ok(());
        }
        Err(PlaneError::Failed { what: name.to_owned(), why: format!("{ended}: {}", last_words(&log)) })
    }
}

/// The lock of a file, if nobody holds it. It goes with the last process that has it open.
fn lock(path: &Path) -> io::Result<Option<fs::File>> {
    let file = fs::File::options().create(true).truncate(false).write(true).read(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

/// The number of a log segment within its timeline, by its file name.
fn segment_of(name: &str) -> Option<u64> {
    let plain = name.len() == 24 && name.chars().all(|c| c.is_ascii_hexdigit());
    let high = u64::from_str_radix(name.get(8..16)?, 16).ok()?;
    let low = u64::from_str_radix(name.get(16..24)?, 16).ok()?;
    plain.then_some(high * (0x1_0000_0000 / SEGMENT) + low)
}

/// Removes a folder that only this driver makes. Repeat: safe.
fn clear_dir(path: &Path) -> Result<(), PlaneError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| PlaneError::failed(format!("remove {}", path.display()), &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_holds_its_lock_beyond_the_agent_that_started_it() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("tool.lock");
        let held = lock(&path)?.ok_or(io::ErrorKind::WouldBlock)?;
        let mut tool = std::process::Command::new("sleep").arg("60").stdin(Stdio::from(held)).spawn()?;
        assert!(lock(&path)?.is_none(), "a second tool would start beside it");
        tool.kill()?;
        tool.wait()?;
        assert!(lock(&path)?.is_some());
        Ok(())
    }

    #[test]
    fn a_segments_name_tells_its_place() {
        assert_eq!(segment_of("000000020000000000000003"), Some(3));
        assert_eq!(segment_of("000000020000000100000003"), Some(0x103));
        assert_eq!(segment_of("00000002.history"), None);
        assert_eq!(segment_of("000000020000000000000003.partial"), None);
    }
}
