//! Wall clocks for people: local time with its offset on screens, UTC in data.

use dc_core::time::WallTime;
use jiff::Timestamp;
use jiff::tz::TimeZone;

fn stamp(at: WallTime) -> Option<Timestamp> {
    Timestamp::from_millisecond(i64::try_from(at.0).ok()?).ok()
}

/// As in `2026-11-21 03:12:07 +03:00`.
pub(crate) fn moment(at: WallTime) -> String {
    let zoned = stamp(at).map(|s| s.to_zoned(TimeZone::system()));
    zoned.map_or_else(|| "?".into(), |z| z.strftime("%Y-%m-%d %H:%M:%S %:z").to_string())
}

/// As in `03:12:07 +03:00`.
pub(crate) fn clock(at: WallTime) -> String {
    let zoned = stamp(at).map(|s| s.to_zoned(TimeZone::system()));
    zoned.map_or_else(|| "?".into(), |z| z.strftime("%H:%M:%S %:z").to_string())
}

/// As in `2026-11-21T00:12:07.123Z`; nothing when it is no moment.
pub(crate) fn utc(at: WallTime) -> Option<String> {
    stamp(at).map(|s| s.to_string())
}
