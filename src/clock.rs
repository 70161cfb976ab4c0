//! The one clock. Cores take `now` as a parameter; only drivers hold a [`Clock`].

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2026-11-01. It has passed wherever this runs: the floor of a clock that boots in 1970. Raised with each release.
pub const BUILT: u64 = 1_793_491_200;

/// Monotonic time since the process started, and the wall clock with a floor.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    floor: u64,
    remembered: u64,
}

impl Clock {
    /// `floor` is a Unix time in seconds that is known to have passed (build time, newest signed list):
    /// routers boot in 1970, and certificates must still be checked.
    #[must_use]
    pub fn new(floor: u64) -> Self {
        Self { start: Instant::now(), floor, remembered: 0 }
    }

    /// With a time that this machine's clock once showed. It counts only while the clock is not set, which is to say
    /// before the floor: a clock that once ran ahead must not shut out all peers after it was put right.
    #[must_use]
    pub fn remembering(self, unix: u64) -> Self {
        Self { remembered: unix, ..self }
    }

    #[must_use]
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Time since the process started.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.now().saturating_duration_since(self.start)
    }

    /// Unix time in seconds, never before the floor.
    #[must_use]
    pub fn unix(&self) -> u64 {
        let system = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.settle(system, self.uptime())
    }

    fn settle(&self, system: u64, uptime: Duration) -> u64 {
        if system >= self.floor { system } else { self.floor.max(self.remembered).saturating_add(uptime.as_secs()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_1970_goes_on_from_the_newest_time_that_is_known() {
        let (minute, clock) = (Duration::from_secs(60), Clock::new(BUILT));
        assert_eq!(clock.settle(60, minute), BUILT + 60);
        let clock = clock.remembering(BUILT + 1_000);
        assert_eq!(clock.settle(60, minute), BUILT + 1_060);
        assert_eq!(clock.settle(BUILT + 5, minute), BUILT + 5, "a clock that is set is believed");
        assert_eq!(clock.remembering(7).settle(60, minute), BUILT + 60);
        assert_eq!(clock.remembering(u64::MAX).settle(60, minute), u64::MAX);
    }
}
