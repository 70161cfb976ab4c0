//! How many bytes each connection may have under way: little at first, more where its path needs it, all out
//! of one budget of the node, and back again when it is quiet.
//!
//! A stream's window is fixed when its connection begins and is large enough for a long fat path; what bounds
//! memory is the connection's window, which is below it at first. It grows where as much was moved in a round trip
//! as it allows, and where the peer is blocked because some stream's reader is slow, lest that one holds up the others.

use crate::config::Profile;
use std::time::{Duration, Instant};

/// Windows stay as they are for so long without a byte moved; then they shrink to those of a newcomer.
const QUIET: Duration = Duration::from_secs(10);
/// Of a round trip, what our own loop and the peer's take at most: queues in the network are no reason to grow.
const SLACK: Duration = Duration::from_millis(1);
/// A newcomer gets at most this part of what is left of the budget, each way.
const SHARE: u64 = 16;

/// The sizes of one profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Of a stream. 20 Mbit/s at 300 ms are 750 kB, and as much again comes before what was lost is sent again. A slow
    /// reader may hold so much.
    pub(super) stream: u32,
    /// What every connection has, also where nothing is left of the budget.
    pub(super) floor: u32,
    /// What a connection begins with while the budget is hardly used.
    pub(super) first: u32,
    /// What a connection may come to.
    pub(super) most: u32,
    /// Of all connections, both ways, above their floors. Where it is used up windows no longer grow, and
    /// transfers over long paths are slower.
    pub(super) budget: u32,
}

impl Limits {
    /// Below 1 GB of RAM, and above.
    pub(super) fn of(profile: Profile) -> Self {
        match profile {
            Profile::Auto | Profile::Router => {
                Self { stream: 2 << 20, floor: 16 << 10, first: 256 << 10, most: 3 << 20, budget: 4 << 20 }
            }
            Profile::Server => {
                Self { stream: 2 << 20, floor: 64 << 10, first: 512 << 10, most: 8 << 20, budget: 64 << 20 }
            }
        }
    }
}

/// What is left for windows above the floors.
pub(super) struct Budget {
    pub(super) limits: Limits,
    left: u32,
}

impl Budget {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, left: limits.budget }
    }

    #[cfg(test)]
    fn used(&self) -> u32 {
        self.limits.budget - self.left
    }

    /// What one who begins now is given.
    fn first(&self) -> u32 {
        let Limits { floor, first, .. } = self.limits;
        floor + (u64::from(self.left) / SHARE).min(u64::from(first - floor)) as u32
    }

    /// As much of the way from one size to another as is left.
    fn grow(&mut self, from: u32, to: u32) -> u32 {
        let granted = to.min(self.limits.most).saturating_sub(from).min(self.left);
        self.left -= granted;
        from + granted
    }

    fn shrink(&mut self, from: u32, to: u32) -> u32 {
        let to = to.min(from);
        self.left += from - to;
        to
    }
}

/// New sizes for quinn, where they have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) receive: Option<u32>,
    pub(super) send: Option<u32>,
}

/// One connection's windows. What they hold of the budget is given back by [`Windows::close`] alone.
pub(super) struct Windows {
    pub(super) receive: u32,
    pub(super) send: u32,
    /// Bytes since `since`.
    read: u64,
    written: u64,
    since: Instant,
    /// The last byte either way.
    used: Instant,
    /// The shortest round trip since the path changed.
    rtt: Option<Duration>,
    /// DATA_BLOCKED frames that were seen, and whether the last one still holds for all we know.
    blocks: u64,
    blocked: bool,
    /// Credit that the peer has from before we shrank: reads pay it back first.
    debt: u64,
}

impl Windows {
    pub(super) fn open(now: Instant, budget: &mut Budget) -> Self {
        let floor = budget.limits.floor;
        let first = budget.first();
        let (receive, send) = (budget.grow(floor, first), budget.grow(floor, first));
        Self {
            receive,
            send,
            read: 0,
            written: 0,
            since: now,
            used: now,
            rtt: None,
            blocks: 0,
            blocked: false,
            debt: 0,
        }
    }

    pub(super) fn close(self, budget: &mut Budget) {
        let floor = budget.limits.floor;
        budget.shrink(self.receive, floor);
        budget.shrink(self.send, floor);
    }

    /// The application has taken bytes.
    pub(super) fn read(&mut self, bytes: usize) {
        self.read += bytes as u64;
    }

    /// The application has handed over bytes.
    pub(super) fn written(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    pub(super) fn path_changed(&mut self) {
        self.rtt = None;
    }

    /// Whether [`Windows::measure`] is of use: at most once in a round trip.
    pub(super) fn due(&self, now: Instant) -> bool {
        now >= self.since + self.rtt.unwrap_or_default() + SLACK
    }

    /// `rtt` was measured on the path; `blocks` counts the peer's DATA_BLOCKED frames; so many streams are open.
    pub(super) fn measure(
        &mut self,
        now: Instant,
        rtt: Duration,
        blocks: u64,
        streams: usize,
        budget: &mut Budget,
    ) -> Change {
        let least = self.rtt.map_or(rtt, |least| least.min(rtt));
        self.rtt = Some(least);
        let span = now.saturating_duration_since(self.since).max(Duration::from_micros(1));
        let rtt = rtt.min(least + SLACK);
        let per_rtt = |moved: u64| (moved as f64 * rtt.as_secs_f64() / span.as_secs_f64()) as u64;
        let mut change = Change::default();
        let grown = |size: u32, moved: u64| {
            let wanted = 2 * per_rtt(moved);
            // Less than a quarter more is not worth a frame.
            (wanted >= u64::from(size) / 4 * 5).then(|| u32::try_from(wanted).unwrap_or(u32::MAX))
        };
        let mut receive = grown(self.receive, self.read);
        self.blocked |= blocks > self.blocks;
        self.blocks = blocks;
        if self.read > self.debt + u64::from(self.receive) / 4 {
            self.blocked = false; // so much credit has gone out
        } else if self.blocked && receive.is_none() {
            // Readers are slow: their streams may fill up, and there is room for others beside them.
            let Limits { stream, first, .. } = budget.limits;
            let full = u64::from(stream) * streams as u64 + u64::from(first);
            let wanted = full.min(u64::from(self.receive) + u64::from(first));
            receive = u32::try_from(wanted).ok().filter(|wanted| *wanted > self.receive);
        }
        if let Some(wanted) = receive {
            let size = budget.grow(self.receive, wanted);
            if size > self.receive {
                (self.receive, self.blocked) = (size, false);
                change.receive = Some(size);
            }
        }
        if let Some(wanted) = grown(self.send, self.written) {
            let size = budget.grow(self.send, wanted);
            if size > self.send {
                self.send = size;
                change.send = Some(size);
            }
        }
        if self.read + self.written > 0 {
            self.used = now;
        }
        self.debt = self.debt.saturating_sub(self.read);
        (self.read, self.written, self.since) = (0, 0, now);
        change
    }

    /// Nothing was read or written for a while.
    pub(super) fn quiet(&self, now: Instant) -> bool {
        self.read + self.written == 0 && now >= self.used + QUIET
    }

    /// Gives back what a quiet connection does not need. What the peer may send by old credit is not counted
    /// any more: its next reads pay for it.
    pub(super) fn settle(&mut self, now: Instant, budget: &mut Budget) -> Change {
        let mut change = Change::default();
        if self.blocked || !self.quiet(now) {
            return change;
        }
        let first = budget.first();
        if first < self.receive {
            self.debt += u64::from(self.receive - first);
            self.receive = budget.shrink(self.receive, first);
            change.receive = Some(self.receive);
        }
        if first < self.send {
            self.send = budget.shrink(self.send, first);
            change.send = Some(self.send);
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(300);

    fn router() -> Budget {
        Budget::new(Limits::of(Profile::Router))
    }

    /// Moves all that the window allows in each of so many round trips.
    fn fill(w: &mut Windows, now: &mut Instant, trips: usize, budget: &mut Budget) {
        for _ in 0..trips {
            *now += RTT;
            w.read(w.receive as usize);
            w.measure(*now, RTT, 0, 1, budget);
        }
    }

    #[test]
    fn a_long_path_gets_its_bandwidth_delay_product_and_gives_it_back() {
        let (mut budget, mut now) = (router(), Instant::now());
        let mut w = Windows::open(now, &mut budget);
        assert_eq!((w.receive, w.send), (256 << 10, 256 << 10));
        fill(&mut w, &mut now, 2, &mut budget);
        assert!(w.receive >= 1 << 20, "{}", w.receive);
        let used = budget.used();
        assert_eq!(w.settle(now + QUIET / 2, &mut budget), Change::default(), "it was used just now");
        let change = w.settle(now + QUIET, &mut budget);
        assert_eq!(change.receive, Some(w.receive));
        assert!(w.receive <= 256 << 10 && budget.used() < used);
        w.close(&mut budget);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_fast_link_of_a_short_round_trip_needs_no_more() {
        let (mut budget, mut now) = (router(), Instant::now());
        let mut w = Windows::open(now, &mut budget);
        for _ in 0..100 {
            now += Duration::from_millis(10);
            w.read(1 << 20); // 100 MB/s; the queue makes 20 ms of 1
            let rtt = Duration::from_millis(20);
            w.rtt = Some(Duration::from_millis(1) / 2);
            assert_eq!(w.measure(now, rtt, 0, 1, &mut budget).receive, None);
        }
    }

    #[test]
    fn the_budget_holds_for_any_number_of_connections_and_all_keep_their_floor() {
        let mut rng = fastrand::Rng::with_seed(11);
        let (mut budget, mut now) = (router(), Instant::now());
        let Limits { floor, budget: most, .. } = budget.limits;
        let mut open: Vec<Windows> = Vec::new();
        for step in 0..20_000 {
            now += Duration::from_millis(rng.u64(0..50));
            match rng.u8(0..10) {
                0 if open.len() < 320 => open.push(Windows::open(now, &mut budget)),
                1 if !open.is_empty() => open.swap_remove(rng.usize(..open.len())).close(&mut budget),
                2 => open.iter_mut().for_each(|w| {
                    w.settle(now, &mut budget);
                }),
                _ => {
                    let Some(at) = (!open.is_empty()).then(|| rng.usize(..open.len())) else { continue };
                    let w = &mut open[at];
                    w.read(rng.usize(..1 << 21));
                    w.written(rng.usize(..1 << 21));
                    let blocks = w.blocks + rng.u64(0..2);
                    w.measure(now, Duration::from_millis(rng.u64(1..400)), blocks, rng.usize(..9), &mut budget);
                }
            }
            let sum: u64 = open.iter().map(|w| u64::from(w.receive - floor) + u64::from(w.send - floor)).sum();
            assert_eq!(sum, budget.used().into(), "step {step}");
            assert!(sum <= most.into() && open.iter().all(|w| w.receive >= floor && w.send >= floor), "step {step}");
        }
        open.into_iter().for_each(|w| w.close(&mut budget));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_slow_reader_does_not_hold_up_the_others_of_its_connection() {
        let (mut budget, mut now) = (router(), Instant::now());
        let Limits { stream, first, .. } = budget.limits;
        let mut w = Windows::open(now, &mut budget);
        // Nothing is read; the peer says with each new limit that it is blocked.
        for blocks in 1..20 {
            now += RTT;
            w.measure(now, RTT, blocks, 1, &mut budget);
        }
        assert_eq!(w.receive, stream + first, "its window and room for others, not more");
    }

    #[test]
    fn credit_of_before_a_shrink_is_no_sign_that_the_peer_is_free() {
        let (mut budget, mut now) = (router(), Instant::now());
        let mut w = Windows::open(now, &mut budget);
        fill(&mut w, &mut now, 3, &mut budget);
        now += QUIET;
        w.settle(now, &mut budget);
        let (small, debt) = (w.receive, w.debt);
        assert!(debt > 0);
        w.blocked = true;
        w.read(debt as usize / 2);
        now += 100 * RTT;
        w.measure(now, RTT, 0, 1, &mut budget);
        assert!(w.receive > small, "no credit has gone out, so the peer is still blocked");
    }
}
