//! `global/pg_control`: what an instance last wrote about itself, read without asking it.
//!
//! Reading the file costs microseconds and works on a stopped instance, which is what a stop and its token need.
//! Versions whose layout is not known here are read through `pg_controldata`.

use std::path::Path;
use std::process::Stdio;

use dc_core::position::Lsn;
use dc_plane::{Deadline, PlaneError};
use tokio::process::Command;

/// What the instance was doing when it last wrote the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Created and never started.
    StartingUp,
    /// A primary, stopped cleanly.
    ShutDown,
    /// A standby, stopped cleanly.
    ShutDownInRecovery,
    /// A primary, stopping.
    ShuttingDown,
    /// A primary that came back from a crash, or died doing so.
    InCrashRecovery,
    /// A standby, running or dead.
    InArchiveRecovery,
    /// A primary, running or dead.
    InProduction,
}

impl State {
    /// As `pg_controldata` words it.
    pub fn word(self) -> &'static str {
        match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        }
    }

    const ALL: [Self; 7] = [
        Self::StartingUp,
        Self::ShutDown,
        Self::ShutDownInRecovery,
        Self::ShuttingDown,
        Self::InCrashRecovery,
        Self::InArchiveRecovery,
        Self::InProduction,
    ];

    /// Whether the data directory was last a primary's; only then may it start as one.
    pub fn of_a_primary(self) -> bool {
        !matches!(self, Self::ShutDownInRecovery | Self::InArchiveRecovery)
    }
}

/// The part of the control file that decisions need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// Identity of the database cluster, equal at both sites of a pair.
    pub system_id: u64,
    /// Layout version of the file; names the server's major versions.
    pub version: u32,
    /// What it was doing.
    pub state: State,
    /// Position of the latest checkpoint record.
    pub checkpoint: Lsn,
    /// Timeline of that checkpoint.
    pub timeline: u32,
}

/// Versions whose first fields lie where [`parse`] looks: PostgreSQL 12, and 13 to 16.
const KNOWN: [u32; 2] = [1201, 1300];
/// Length of the checked part, and so place of its checksum, in those versions.
const CHECKED: usize = 288;

/// Reads the control file's bytes.
///
/// Errors: too short, torn (checksum), or of a layout that is not known here.
pub fn parse(raw: &[u8]) -> Result<Control, String> {
    let u32_at =
        |at: usize| -> Option<u32> { Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?)) };
    let u64_at =
        |at: usize| -> Option<u64> { Some(u64::from_le_bytes(raw.get(at..at + 8)?.try_into().ok()?)) };
    let read = || -> Option<(u64, u32, u32, u64, u32, u32)> {
        Some((u64_at(0)?, u32_at(8)?, u32_at(16)?, u64_at(32)?, u32_at(48)?, u32_at(CHECKED)?))
    };
    let Some((system_id, version, state, checkpoint, timeline, checksum)) = read() else {
        return Err(format!("{} bytes are too few", raw.len()));
    };
    if !KNOWN.contains(&version) {
        return Err(format!("layout {version} is not known"));
    }
    let seen = crc32c(raw.get(..CHECKED).unwrap_or_default());
    if seen != checksum {
        return Err(format!("checksum is {seen:08x}, file says {checksum:08x}"));
    }
    let state = usize::try_from(state).ok().and_then(|n| State::ALL.get(n).copied());
    let state = state.ok_or_else(|| "its state is not known".to_owned())?;
    Ok(Control { system_id, version, state, checkpoint: Lsn(checkpoint), timeline })
}

/// CRC-32C (Castagnoli), bit by bit: the input is a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |s, _| if s & 1 == 1 { (s >> 1) ^ 0x82F6_3B78 } else { s >> 1 })
    })
}

/// Reads what `pg_controldata` prints, asked for in English.
fn parse_printed(text: &str) -> Result<Control, String> {
    let field = |name: &str| -> Result<&str, String> {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| format!("pg_controldata prints no {name:?}"))
    };
    let number = |name: &str| -> Result<u64, String> {
        field(name)?.parse().map_err(|_| format!("pg_controldata prints no number as {name:?}"))
    };
    let word = field("Database cluster state")?;
    let state = State::ALL
        .into_iter()
        .find(|s| s.word() == word)
        .ok_or_else(|| format!("state {word:?} is not known"))?;
    let place = field("Latest checkpoint location")?;
    Ok(Control {
        system_id: number("Database system identifier")?,
        version: u32::try_from(number("pg_control version number")?).map_err(|e| e.to_string())?,
        state,
        checkpoint: Lsn::parse(place).ok_or_else(|| format!("{place:?} is no position"))?,
        timeline: u32::try_from(number("Latest checkpoint's TimeLineID")?).map_err(|e| e.to_string())?,
    })
}

/// Reads the control file of a data directory.
///
/// Repeat: safe, reads only. Errors: `Failed` with the reason; a torn read is repeated by the caller's own poll.
pub async fn read(data_dir: &Path, bin_dir: &Path, until: Deadline) -> Result<Control, PlaneError> {
    let path = data_dir.join("global/pg_control");
    let what = format!("read {}", path.display());
    let raw = std::fs::read(&path).map_err(|e| PlaneError::failed(&what, &e))?;
    let why = match parse(&raw) {
        Ok(control) => return Ok(control),
        Err(why) => why,
    };
    if !why.starts_with("layout") {
        return Err(PlaneError::Failed { what, why });
    }
    let mut ask = Command::new(bin_dir.join("pg_controldata"));
    ask.arg("-D").arg(data_dir).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let out = until.bound(&what, ask.output()).await?.map_err(|e| PlaneError::failed(&what, &e))?;
    parse_printed(&String::from_utf8_lossy(&out.stdout)).map_err(|why| PlaneError::Failed { what, why })
}

/// Bytes of a log page, and what its header takes on the first and on other pages of a segment.
const PAGE: u64 = 8192;
const PAGE_HEADER: u64 = 24;
const SEGMENT_HEADER: u64 = 40;
const SEGMENT: u64 = 16 << 20;
/// A shutdown checkpoint record before padding: record header 24, data header 2, checkpoint 88.
const SHUTDOWN_RECORD: u64 = 114;

/// Where the log ends after a shutdown checkpoint that begins at `checkpoint`: the only legal switch point.
///
/// Source: measured as +120 on PostgreSQL 15 within a page; a page's header is added where the record crosses one.
/// Only for layouts 13 to 16 and segments of 16 MB, the default.
pub fn end_of_shutdown_record(checkpoint: Lsn) -> Lsn {
    let room = PAGE - checkpoint.0 % PAGE;
    let end = if SHUTDOWN_RECORD <= room {
        checkpoint.0 + SHUTDOWN_RECORD
    } else {
        let next = checkpoint.0 + room;
        let header = if next.is_multiple_of(SEGMENT) { SEGMENT_HEADER } else { PAGE_HEADER };
        next + header + (SHUTDOWN_RECORD - room)
    };
    Lsn(end.next_multiple_of(8))
}

/// The switch point that a timeline's history file names last: where it left its parent.
pub fn switch_point(history: &str) -> Option<(u32, Lsn)> {
    let last = history.lines().map(str::trim).rfind(|l| !l.is_empty() && !l.starts_with('#'))?;
    let mut words = last.split_whitespace();
    let parent = words.next()?.parse().ok()?;
    Some((parent, Lsn::parse(words.next()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(state: u32) -> Vec<u8> {
        let mut raw = vec![0_u8; 8192];
        raw[0..8].copy_from_slice(&7_345_678_901_234_567_890_u64.to_le_bytes());
        raw[8..12].copy_from_slice(&1300_u32.to_le_bytes());
        raw[16..20].copy_from_slice(&state.to_le_bytes());
        raw[32..40].copy_from_slice(&0x0300_0028_u64.to_le_bytes());
        raw[48..52].copy_from_slice(&7_u32.to_le_bytes());
        let sum = crc32c(&raw[..CHECKED]);
        raw[CHECKED..CHECKED + 4].copy_from_slice(&sum.to_le_bytes());
        raw
    }

    #[test]
    fn reads_a_stopped_primary() {
        let want = Control {
            system_id: 7_345_678_901_234_567_890,
            version: 1300,
            state: State::ShutDown,
            checkpoint: Lsn(0x0300_0028),
            timeline: 7,
        };
        assert_eq!(parse(&sealed(1)), Ok(want));
    }

    #[test]
    fn refuses_a_torn_or_foreign_file() {
        let mut torn = sealed(1);
        torn[33] ^= 1;
        assert!(parse(&torn).is_err_and(|why| why.contains("checksum")));
        assert!(parse(&torn[..100]).is_err());
        let mut newer = sealed(1);
        newer[8..12].copy_from_slice(&1700_u32.to_le_bytes());
        assert!(parse(&newer).is_err_and(|why| why.starts_with("layout")));
        assert!(parse(&sealed(99)).is_err());
    }

    #[test]
    fn crc_gives_the_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn reads_what_pg_controldata_prints() {
        let text = "pg_control version number:            1700\n\
                    Database system identifier:           7345678901234567890\n\
                    Database cluster state:               shut down in recovery\n\
                    Latest checkpoint location:           1A/3088B68\n\
                    Latest checkpoint's REDO location:    1A/3088B30\n\
                    Latest checkpoint's TimeLineID:       12\n";
        let read = parse_printed(text);
        assert!(read.as_ref().is_ok_and(|c| c.state == State::ShutDownInRecovery && c.timeline == 12));
        assert!(read.is_ok_and(|c| c.checkpoint == Lsn(0x1A_0308_8B68) && !c.state.of_a_primary()));
        assert!(parse_printed("nothing").is_err());
    }

    #[test]
    fn the_record_ends_120_bytes_on_or_past_the_page_header_it_crosses() {
        assert_eq!(end_of_shutdown_record(Lsn(0x0300_0028)), Lsn(0x0300_0028 + 120));
        // 112 bytes left on the page: 2 more after the next page's header of 24
        assert_eq!(end_of_shutdown_record(Lsn(0x0300_2000 - 112)), Lsn(0x0300_2000 + 32));
        // the same at the end of a segment, whose first page has a header of 40
        assert_eq!(end_of_shutdown_record(Lsn(0x0400_0000 - 112)), Lsn(0x0400_0000 + 48));
        assert_eq!(end_of_shutdown_record(Lsn(0x0300_2000 - 120)), Lsn(0x0300_2000));
    }

    #[test]
    fn the_last_line_of_a_history_is_the_switch_point() {
        let text =
            "1\t0/40000A0\tno recovery target specified\n\n4\t0/5000110\tno recovery target specified\n";
        assert_eq!(switch_point(text), Some((4, Lsn(0x0500_0110))));
        assert_eq!(switch_point("# reserved\n"), None);
    }
}
