//! Exponential back-off with full jitter, as a pure value.

use std::time::Duration;

/// Delays that double from `first` to `most`; each is drawn evenly from its upper half, so that a
/// thousand gateways that lost the same server do not come back in step.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    #[must_use]
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The delay before the next try.
    pub fn delay(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let whole = self.next;
        self.next = whole.saturating_mul(2).min(self.most);
        whole.mul_f64(0.5 + rng.f64() / 2.0)
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_bound_and_resets() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut b = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for most in [1, 2, 4, 5, 5] {
            let d = b.delay(&mut rng);
            assert!(d <= Duration::from_secs(most) && d >= Duration::from_secs(most) / 2, "{d:?} of {most}");
        }
        b.reset();
        assert!(b.delay(&mut rng) <= Duration::from_secs(1));
    }
}
