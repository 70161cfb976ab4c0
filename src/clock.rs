//! The one clock. Cores take `now` as a parameter; only drivers hold a [`Clock`].

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2026-11-01. It has passed wherever this runs: the floor of a clock that boots in 1970. Raised with each release.
pub const BUILT: u64 = 1_793_491_200;

/// Monotonic time since the process started, and the wall clock with a floor.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    floor: u64,
}

impl Clock {
    /// `floor` is a Unix time in seconds that is known to have passed (build time, newest signed list):
    /// routers boot in 1970, and certificates must still be checked.
    #[must_use]
    pub fn new(floor: u64) -> Self {
        Self { start: Instant::now(), floor }
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
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()).max(self.floor)
    }
}
