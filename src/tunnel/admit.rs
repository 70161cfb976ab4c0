//! Which handshakes of others are worth our public-key work. What comes here has opened under the psk, so its sender
//! is a node of ours, or somebody who sends again what one has sent.

use super::{node::Origin, slot::Slots};
use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Half-open handshakes before newcomers must show by a Retry that they receive.
const HALF_OPEN_RETRY: usize = 50;
/// Half-open handshakes; no more begin, and who dials sends again. With them [`super::slot::SLOTS_MAX`] leaves room
/// for all live connections.
const HALF_OPEN_MAX: usize = 64;
/// Of these, from one address or relayed flow: as above. A site behind one address may have many nodes.
const SOURCE_RETRY: usize = 8;
const SOURCE_MAX: usize = 16;
/// Of each [`SPAN`], what public-key work may take; what is not used does not add up.
const EFFORT: Duration = Duration::from_millis(10);
const SPAN: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    /// First it must show that it receives where it says it is.
    Retry,
    Drop,
}

/// Time for public-key work.
pub(crate) struct Effort {
    /// Below 0 after work that took longer than there was time for.
    left: i64,
    at: Instant,
}

impl Effort {
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: micros(EFFORT), at: now }
    }

    pub(crate) fn any_left(&mut self, now: Instant) -> bool {
        let earned = micros(now.saturating_duration_since(self.at)) * micros(EFFORT) / micros(SPAN);
        self.left = (self.left + earned).min(micros(EFFORT));
        // What is too short to earn a microsecond counts next time.
        self.at += Duration::from_micros(earned.unsigned_abs()) * (SPAN.as_millis() / EFFORT.as_millis()) as u32;
        self.left > 0
    }

    pub(crate) fn spend(&mut self, took: Duration) {
        self.left -= micros(took);
    }
}

/// Enough for an hour of work in one piece.
fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX).min(3_600_000_000)
}

/// `proven`: it has answered a Retry.
pub(super) fn judge(slots: &Slots, effort: &mut Effort, now: Instant, from: SocketAddr, proven: bool) -> Verdict {
    let (mut all, mut same) = (0, 0);
    for slot in slots.half_open() {
        all += 1;
        same += usize::from(slot.remote.ip() == from.ip());
    }
    let worked = !effort.any_left(now);
    match (all >= HALF_OPEN_MAX || same >= SOURCE_MAX, proven) {
        (true, _) => Verdict::Drop,
        (false, true) if worked => Verdict::Drop,
        (false, true) => Verdict::Accept,
        (false, false) if worked || all >= HALF_OPEN_RETRY || same >= SOURCE_RETRY => Verdict::Retry,
        (false, false) => Verdict::Accept,
    }
}

/// RFC 4193: another random prefix than that of [`super::slot::virtual_address`], and never on any wire either.
const RELAYED: [u16; 3] = [0xfd77, 0x6566, 0x7401];

/// Under which quinn knows somebody who dials: what a Retry's token holds for, so it must be the same when the token
/// comes back, and another for everybody else.
pub(super) fn remote(origin: Origin) -> SocketAddr {
    match origin {
        Origin::Address(way) => way.remote,
        Origin::Relay { relay, flow } => {
            let [a, b, c] = RELAYED;
            let [high, low] = [(flow >> 16) as u16, flow as u16];
            SocketAddr::new(IpAddr::V6(Ipv6Addr::new(a, b, c, 0, 0, relay as u16, high, low)), 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_the_time_is_for_public_keys_and_it_does_not_add_up() {
        let start = Instant::now();
        for cost in [Duration::from_micros(700), Duration::from_millis(3), Duration::from_millis(60)] {
            let (mut effort, mut spent) = (Effort::new(start), Duration::ZERO);
            // Far more asked for than can be done, for 10 s; a minute of peace before.
            for ms in 60_000..70_000 {
                let now = start + Duration::from_millis(ms);
                while effort.any_left(now) {
                    effort.spend(cost);
                    spent += cost;
                }
            }
            let most = Duration::from_secs(1) + EFFORT + cost;
            assert!(spent <= most && spent * 10 >= most * 9, "{cost:?}: {spent:?}");
        }
    }

    #[test]
    fn small_steps_of_the_clock_are_not_lost() {
        let start = Instant::now();
        let mut effort = Effort::new(start);
        effort.spend(EFFORT);
        for step in 0..1000 {
            effort.any_left(start + Duration::from_micros(3 * step));
        }
        assert_eq!(effort.left, 300 - 1, "a tenth of 3 ms");
    }

    #[test]
    fn every_source_has_an_address_of_its_own() {
        let flow = |relay, flow| remote(Origin::Relay { relay, flow });
        assert_ne!(flow(0, 1), flow(1, 0));
        assert_ne!(flow(0, 1), flow(0, 1 << 16));
        let address: SocketAddr = "192.0.2.1:5".parse().unwrap();
        assert_eq!(remote(Origin::Address(address.into())), address);
    }
}
