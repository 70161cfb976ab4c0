//! What one node may ask of a relay, and how that is counted.

use std::time::{Duration, Instant};

/// Flows that one node may have asked for; for one more its longest unused one goes.
pub(super) const FLOWS_EACH: u16 = 1024;
/// Questions for flows: all peers of a node at once after a registration, and then so many in a second. More are
/// not answered, and asked again later.
pub(super) const OPENS: Rate = Rate { each_second: 32, burst: 1024 };
/// Registrations, in sixtieths: eight at once, and one each two seconds. What is more is closed.
pub(super) const REGISTRATIONS: Rate = Rate { each_second: 30, burst: 8 * REGISTRATION };
pub(super) const REGISTRATION: u64 = 60;

/// Limits of a relay that its user may set; None: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayLimits {
    /// Of all that it sends; what is more waits its turn.
    pub all: Option<Rate>,
    /// Of what one node sends through it; what is more is dropped.
    pub node: Option<Rate>,
}

/// In bytes, or whatever is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub each_second: u64,
    /// What may come at once after a pause.
    pub burst: u64,
}

/// What is left of a rate. It may be overdrawn by one piece, and is then in debt for a while.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    /// In millionths.
    level: i128,
    at: Instant,
}

const PARTS: i128 = 1_000_000;

impl Bucket {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { level: i128::from(rate.burst) * PARTS, at: now }
    }

    fn fill(&mut self, now: Instant, rate: Rate) {
        let micros = now.saturating_duration_since(self.at).as_micros() as i128;
        self.at = self.at.max(now);
        let most = i128::from(rate.burst) * PARTS;
        self.level = (self.level + micros * i128::from(rate.each_second)).min(most);
    }

    /// False, and nothing taken, where it is in debt.
    pub(super) fn take(&mut self, now: Instant, rate: Rate, amount: u64) -> bool {
        self.fill(now, rate);
        if self.level <= 0 {
            return false;
        }
        self.level -= i128::from(amount) * PARTS;
        true
    }

    /// When there is something to take again.
    pub(super) fn ready(&self, rate: Rate) -> Instant {
        let micros = (1 - self.level).max(0) / i128::from(rate.each_second.max(1)) + 1;
        let wait = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        if self.level > 0 { self.at } else { self.at + wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let (rate, start) = (Rate { each_second: 1_000_000, burst: 50_000 }, Instant::now());
        let mut bucket = Bucket::new(rate, start);
        let mut given = 0;
        for micros in (0..2_000_000).step_by(100) {
            let now = start + Duration::from_micros(micros);
            while bucket.take(now, rate, 1_200) {
                given += 1_200;
            }
        }
        assert!((2_050_000..=2_052_000).contains(&given), "{given}");
    }

    #[test]
    fn a_bucket_in_debt_says_when_it_is_out_of_it() {
        let (rate, now) = (Rate { each_second: 1_000, burst: 100 }, Instant::now());
        let mut bucket = Bucket::new(rate, now);
        assert_eq!(bucket.ready(rate), now);
        assert!(bucket.take(now, rate, 600) && !bucket.take(now, rate, 1));
        let ready = bucket.ready(rate);
        assert!((500..=502).contains(&(ready - now).as_millis()), "{:?}", ready - now);
        assert!(bucket.take(ready, rate, 1));
        assert!(bucket.take(now, rate, 1) || !bucket.take(now, rate, 1), "time that goes back does no harm");
    }
}
