//! This host's clocks, read here and nowhere else in the room.

use std::time::{SystemTime, UNIX_EPOCH};

use dc_core::time::{Time, WallTime};

/// CLOCK_BOOTTIME: goes on while the host sleeps, is never set.
pub fn now() -> Time {
    let read = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(read.tv_sec).unwrap_or(0);
    let millis = u64::try_from(read.tv_nsec / 1_000_000).unwrap_or(0);
    Time(seconds * 1000 + millis)
}

/// The wall clock, for people.
pub fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Names this boot of the host: readings of `now` compare only within one.
pub fn boot_id() -> String {
    // Without it no reading survives a restart of the agent, which is the safe side.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Notices that the host stood still, or that somebody set its clock.
///
/// Either way nobody can say how long the lease still runs: close first, ask after.
#[derive(Debug)]
pub struct Gaps {
    last: Time,
    wall: WallTime,
}

impl Gaps {
    /// Largest gap between two ticks that is no reason to close, in milliseconds.
    pub const GAP_MS: u64 = 2_000;
    /// Largest disagreement of wall and boot clock between two ticks, in milliseconds.
    pub const JUMP_MS: u64 = 500;

    /// Starts watching.
    pub fn new(last: Time, wall: WallTime) -> Self {
        Self { last, wall }
    }

    /// Tells what happened since the last tick, if it was out of the ordinary.
    pub fn tick(&mut self, now: Time, wall: WallTime) -> Option<String> {
        let passed = now.0.saturating_sub(self.last.0);
        let off = off((self.last, self.wall), (now, wall));
        self.last = now;
        self.wall = wall;
        if passed > Self::GAP_MS {
            return Some(format!("the host stood still for {passed} ms"));
        }
        (off > Self::JUMP_MS).then(|| format!("wall clock and boot clock went apart by {off} ms"))
    }
}

/// By how many milliseconds wall clock and boot clock went apart between two looks at both.
pub fn off(from: (Time, WallTime), to: (Time, WallTime)) -> u64 {
    let passed = i128::from(to.0.0) - i128::from(from.0.0);
    let shown = i128::from(to.1.0) - i128::from(from.1.0);
    u64::try_from((shown - passed).unsigned_abs()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_pause_and_a_jump_from_ordinary_ticks() {
        let mut gaps = Gaps::new(Time(0), WallTime(10_000));
        assert_eq!(gaps.tick(Time(100), WallTime(10_100)), None);
        assert!(gaps.tick(Time(3_000), WallTime(13_000)).is_some_and(|t| t.contains("stood still")));
        assert!(gaps.tick(Time(3_100), WallTime(9_000)).is_some_and(|t| t.contains("apart")));
        assert_eq!(gaps.tick(Time(3_200), WallTime(9_100)), None);
        assert!(
            gaps.tick(Time(3_300), WallTime(19_200)).is_some(),
            "set ahead, or the boot clock stood still"
        );
        assert!(gaps.tick(Time(1_000), WallTime(19_300)).is_some(), "the boot clock was set back");
    }
}
