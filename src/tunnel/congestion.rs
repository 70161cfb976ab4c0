//! Which congestion control a connection has, and a bound around quinn's BBR.
//!
//! quinn-proto 0.11's BBR lets its window grow by all that is acknowledged for as long as it is in startup, where it
//! stays while flow control holds it back, and then allows two bandwidth-delay products, which quinn's pacer sends at
//! 2.5 times the rate of the line. Over 20 Mbit/s, 300 ms and a queue of 100 ms a fifth to a third of all packets were
//! lost, and 7 to 15 Mbit/s were left. So a window of [`Bounded`] is no larger than what the path was seen to deliver.
//!
//! After a loss BBR takes what is under way at that moment for its window. Of one who sends in bursts that is next to
//! nothing, and at 1 % loss it never came out of it: 10 Mbit/s, in pieces of 64 kB, took seconds over 100 Mbit/s. So in
//! recovery the window is no smaller than what a round trip has delivered.
//!
//! quinn never forgets the shortest round trip of a path, nor does its BBR: over one that was 1 ms long and is 40 ms now
//! it kept 4 packets under way, 2 of 100 Mbit/s. So [`Bounded`] looks at the round trips of the last seconds itself, and
//! says when these are those of another path.
//!
//! What is sent into the void stays under way for quinn until a later packet is acknowledged, and fills the window: then
//! not even an ACK may go, and two ends in that state wait for each other's. So [`Afloat`] can leave it out.

use super::transport::MTU_MOST;
use crate::config::Congestion;
use quinn_proto::{
    Connection, RttEstimator,
    congestion::{BbrConfig, Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig},
};
use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// For half as long as BBR believes a shortest round trip (10 s, its draft's section 4.1.1.3).
const SPELL: Duration = Duration::from_secs(5);
/// Beyond twice the shortest round trip: queues of others, and radio, come to as much.
const SLOWER: Duration = Duration::from_millis(10);
/// As Chromium does: 32 packets. quinn's own 200 are 0.4 s of 5 Mbit/s, which a small buffer loses.
const BBR_FIRST: u64 = 32 * 1200;
/// Round trips for which a delivery rate counts, as in BBR's own filter.
const ROUNDS: usize = 10;
/// Rounds without a quarter more bandwidth after which the path is full, as in BBR.
const ROUNDS_FULL: u8 = 3;
/// What may be under way beyond the bandwidth-delay product: a quarter, so that more bandwidth is found, and this for
/// acknowledgements that come in bunches.
const BUNCH: Duration = Duration::from_millis(25);

/// Beyond the window, for packets that carry an acknowledgement: four. One is enough where it is not lost.
const OWING: u64 = 4 * MTU_MOST as u64;

/// What a connection's slot and its congestion control tell each other.
#[derive(Default)]
pub(super) struct Hints {
    /// The path is a link of ours; read whenever quinn begins congestion control anew.
    pub(super) on_link: AtomicBool,
    /// No round trip is as short any more as quinn believes: all that it knows of the path is of before.
    pub(super) slower: AtomicBool,
    /// Bytes under way, or more: pure ACKs are counted until the next one comes.
    under_way: AtomicUsize,
    /// Of these, what is not held against the window until something is acknowledged.
    void: AtomicUsize,
    /// Numbers of the packets that were sent last, and acknowledged last; of 64 bits what fits.
    last: AtomicUsize,
    acked: AtomicUsize,
    /// A packet may go although the window is full.
    owing: AtomicBool,
}

impl Hints {
    pub(super) fn new(on_link: bool) -> Self {
        Self { on_link: on_link.into(), ..Self::default() }
    }

    /// A probe for the path's MTU goes, of which quinn does not tell its controller.
    pub(super) fn probed(&self) {
        self.sent(usize::from(MTU_MOST));
    }

    fn sent(&self, bytes: usize) {
        let all = self.under_way.load(Ordering::Relaxed).saturating_add(bytes);
        self.under_way.store(all, Ordering::Relaxed);
    }

    /// The packet that was sent last, for [`Hints::is_acked_since`].
    pub(super) fn last(&self) -> usize {
        self.last.load(Ordering::Relaxed)
    }

    /// Whether something is acknowledged that was sent later than this packet.
    pub(super) fn is_acked_since(&self, last: usize) -> bool {
        self.acked.load(Ordering::Relaxed).wrapping_sub(last).cast_signed() > 0
    }

    /// All that is under way is lost.
    pub(super) fn voided(&self) {
        self.void.store(self.under_way.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// As long as an acknowledgement is due, [`OWING`] more may be under way.
    pub(super) fn owes(&self, owing: bool) {
        self.owing.store(owing, Ordering::Relaxed);
    }

    fn acknowledged(&self, under_way: u64) {
        self.under_way.store(usize::try_from(under_way).unwrap_or(usize::MAX), Ordering::Relaxed);
        self.void.store(0, Ordering::Relaxed);
    }
}

/// Loss on a link is congestion, and Cubic shares it with its like; on long paths and radio it is mostly not, and there
/// BBR is worth a factor of 27 at 1 % loss.
pub(super) struct Control {
    pub(super) choice: Congestion,
    pub(super) hints: Arc<Hints>,
}

impl ControllerFactory for Control {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let cubic = match self.choice {
            Congestion::Auto => self.hints.on_link.load(Ordering::Relaxed),
            Congestion::Bbr => false,
            Congestion::Cubic => true,
        };
        let hints = Arc::clone(&self.hints);
        let inner = if cubic {
            Arc::new(CubicConfig::default()).build(now, mtu)
        } else {
            let mut config = BbrConfig::default();
            config.initial_window(BBR_FIRST);
            self.hints.slower.store(false, Ordering::Relaxed);
            Box::new(Bounded::new(Arc::new(config).build(now, mtu), Arc::clone(&hints)))
        };
        Box::new(Afloat { inner, hints })
    }
}

/// What controls a connection's congestion now.
pub(super) fn controller(conn: &Connection) -> &'static str {
    if conn.congestion_state().clone_box().into_any().is::<Cubic>() { "cubic" } else { "bbr" }
}

struct Afloat {
    inner: Box<dyn Controller>,
    hints: Arc<Hints>,
}

impl Controller for Afloat {
    fn on_sent(&mut self, now: Instant, bytes: u64, packet: u64) {
        self.hints.sent(usize::try_from(bytes).unwrap_or(usize::MAX));
        self.hints.last.store(packet as usize, Ordering::Relaxed);
        self.inner.on_sent(now, bytes, packet);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.hints.acknowledged(in_flight);
        if let Some(largest) = largest {
            self.hints.acked.store(largest as usize, Ordering::Relaxed);
        }
        self.inner.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        self.inner.on_congestion_event(now, sent, persistent, lost);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.inner.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        let owing = if self.hints.owing.load(Ordering::Relaxed) { OWING } else { 0 };
        self.inner.window().saturating_add(self.hints.void.load(Ordering::Relaxed) as u64 + owing)
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone_box(), hints: Arc::clone(&self.hints) })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self.inner.into_any()
    }
}

/// quinn's BBR has no shortest round trip of its own at first, and looks for one as soon as it is busy: for 200 ms its window
/// is three quarters of what little it has seen delivered. Meanwhile ours grows as in its start.
#[derive(Clone, Copy)]
enum Opening {
    Ahead,
    Under { since: Instant, window: u64 },
    Over,
}

/// What quinn's BBR takes for that, and when we leave all to it in any case.
const OPENING: Duration = Duration::from_millis(200);
const OPENING_MOST: Duration = Duration::from_secs(1);

struct Bounded {
    inner: Box<dyn Controller>,
    opening: Opening,
    /// Bytes per second of the last rounds; 0: none yet.
    rates: [u64; ROUNDS],
    at: usize,
    /// Of the current round: bytes, its begin, and the packet whose acknowledgement ends it.
    acked: u64,
    since: Option<Instant>,
    ends: u64,
    sent: u64,
    rtt: Duration,
    /// The rate that a quarter more is asked of, and for how many rounds it was not found.
    known: u64,
    rounds: u8,
    /// Something was lost, and of what was sent later than this packet nothing is acknowledged yet.
    recovers: Option<u64>,
    spells: Spells,
    hints: Arc<Hints>,
}

/// The shortest round trips of this spell and of the last one.
#[derive(Clone, Copy, Default)]
struct Spells {
    since: Option<Instant>,
    now: Option<Duration>,
    last: Option<Duration>,
}

impl Spells {
    /// A packet was acknowledged after so long. Gives the shortest of the last spells, once in a spell.
    fn take(&mut self, now: Instant, rtt: Duration) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        if now >= since + SPELL * 2 {
            *self = Self { since: Some(now), now: Some(rtt), last: None }; // of before a rest
            return None;
        }
        self.now = Some(self.now.map_or(rtt, |least| least.min(rtt)));
        if now < since + SPELL {
            return None;
        }
        let least = self.last.zip(self.now).map(|(last, now)| last.min(now));
        (self.since, self.last, self.now) = (Some(now), self.now, None);
        least
    }
}

impl Bounded {
    fn new(inner: Box<dyn Controller>, hints: Arc<Hints>) -> Self {
        Self {
            inner,
            opening: Opening::Ahead,
            rates: [0; ROUNDS],
            at: 0,
            acked: 0,
            since: None,
            ends: 0,
            sent: 0,
            rtt: Duration::ZERO,
            known: 0,
            rounds: 0,
            recovers: None,
            spells: Spells::default(),
            hints,
        }
    }

    fn rate(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// Bytes of a round trip.
    fn product(&self) -> u64 {
        moved(self.rate(), self.rtt)
    }

    /// Gives what BBR is told to be under way: nothing, once, so that it does not wait for less before it counts its time.
    fn open(&mut self, now: Instant, in_flight: u64, app_limited: bool) -> u64 {
        match self.opening {
            Opening::Ahead if !app_limited => {
                self.opening = Opening::Under { since: now, window: BBR_FIRST };
                return 0;
            }
            Opening::Under { since, .. } => {
                let done = now >= since + OPENING && self.inner.window() >= self.product();
                if done || now >= since + OPENING_MOST {
                    self.opening = Opening::Over;
                }
            }
            Opening::Ahead | Opening::Over => {}
        }
        in_flight
    }

    /// A round that was held back by the application tells nothing, unless it was the fastest.
    fn round(&mut self, took: Duration, app_limited: bool) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = self.acked.saturating_mul(1_000_000) / micros;
        if app_limited && rate < self.rate() {
            return;
        }
        self.rates[self.at] = rate;
        self.at = (self.at + 1) % ROUNDS;
        if rate >= self.known.saturating_add(self.known / 4) {
            (self.known, self.rounds) = (rate, 0);
        } else if !app_limited {
            self.rounds = self.rounds.saturating_add(1);
        }
    }
}

fn moved(rate: u64, time: Duration) -> u64 {
    rate.saturating_mul(u64::try_from(time.as_micros()).unwrap_or(u64::MAX)) / 1_000_000
}

impl Controller for Bounded {
    fn on_sent(&mut self, now: Instant, bytes: u64, packet: u64) {
        self.sent = packet;
        self.since.get_or_insert(now);
        self.inner.on_sent(now, bytes, packet);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.acked += bytes;
        if let Opening::Under { window, .. } = &mut self.opening {
            *window += bytes;
        }
        self.rtt = rtt.min();
        // Of a lone packet the acknowledgement is late.
        let took = now.saturating_duration_since(sent);
        let spell = if app_limited { None } else { self.spells.take(now, took) };
        if spell.is_some_and(|least| least > self.rtt * 2 + SLOWER) {
            self.hints.slower.store(true, Ordering::Relaxed);
        }
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        if let Some(since) = self.since.filter(|_| largest.is_some_and(|packet| packet >= self.ends)) {
            self.round(now.saturating_duration_since(since), app_limited);
            // What comes after a rest begins with its first packet.
            (self.acked, self.since, self.ends) = (0, (in_flight > 0).then_some(now), self.sent + 1);
        }
        self.recovers = self.recovers.filter(|last| largest.is_none_or(|packet| packet <= *last));
        let told = self.open(now, in_flight, app_limited);
        self.inner.on_end_acks(now, told, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        if persistent {
            self.opening = Opening::Over;
        }
        self.recovers = (!persistent).then_some(self.sent);
        self.inner.on_congestion_event(now, sent, persistent, lost);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.inner.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        let opening = match self.opening {
            Opening::Under { window, .. } => window,
            Opening::Ahead | Opening::Over => 0,
        };
        let inner = self.inner.window().max(opening);
        match self.rate() {
            0 => inner,
            rate => {
                let product = self.product();
                let more = if self.rounds < ROUNDS_FULL { 2 * product } else { product / 4 };
                let least = if self.recovers.is_some() { product } else { 0 };
                inner.max(least).min((product + more + moved(rate, BUNCH)).max(BBR_FIRST))
            }
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone_box(), hints: Arc::clone(&self.hints), ..*self })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_kept_and_auto_goes_by_the_link() {
        for (choice, on_link, cubic) in [
            (Congestion::Auto, false, false),
            (Congestion::Auto, true, true),
            (Congestion::Bbr, true, false),
            (Congestion::Cubic, false, true),
        ] {
            let hints = Arc::new(Hints::new(on_link));
            let control = Arc::new(Control { choice, hints });
            let built = control.build(Instant::now(), 1200);
            assert_eq!(built.clone_box().into_any().is::<Cubic>(), cubic, "{choice:?} {on_link}");
            assert_eq!(built.into_any().is::<Bounded>(), !cubic);
        }
    }

    #[test]
    fn what_went_into_the_void_leaves_the_window_to_others_until_the_next_ack() {
        let (now, hints) = (Instant::now(), Arc::new(Hints::new(true)));
        let control = Arc::new(Control { choice: Congestion::Auto, hints: Arc::clone(&hints) });
        let mut first = Arc::clone(&control).build(now, 1200);
        let window = first.window();
        (1..=8).for_each(|packet| first.on_sent(now, 1200, packet));
        assert_eq!(first.window(), window);
        hints.voided();
        let mut second = control.build(now, 1200);
        assert_eq!(second.window(), window + 8 * 1200, "it outlives a change of path");
        second.on_sent(now, 1200, 9);
        assert_eq!(second.window(), window + 8 * 1200, "what is sent from now on counts");
        second.on_end_acks(now, 8 * 1200, false, Some(9));
        assert_eq!(second.window(), window);
        hints.probed();
        hints.voided();
        assert_eq!(second.window(), window + 8 * 1200 + u64::from(MTU_MOST));
        assert_eq!((hints.last(), hints.is_acked_since(8), hints.is_acked_since(9)), (9, true, false));
    }

    #[test]
    fn a_window_is_what_was_delivered_in_a_round_trip_and_a_quarter() {
        let mut b = Bounded::new(Arc::new(BbrConfig::default()).build(Instant::now(), 1200), Arc::default());
        let loose = b.window();
        b.rtt = Duration::from_millis(100);
        for (round, bytes) in [50_000, 100_000, 100_000, 100_000].into_iter().enumerate() {
            b.acked = bytes;
            b.round(b.rtt, false);
            assert!(b.window() <= loose);
            assert_eq!(b.rounds, [0, 0, 1, 2][round]);
        }
        // A slow round that the application held back says nothing of the path.
        b.acked = 10;
        b.round(b.rtt, true);
        b.acked = 100_000;
        b.round(b.rtt, false);
        assert_eq!((b.rate(), b.rounds), (1_000_000, ROUNDS_FULL));
        assert_eq!(b.window(), 100_000 + 25_000 + 25_000);
        for _ in 0..ROUNDS {
            b.acked = 20_000;
            b.round(b.rtt, false);
        }
        assert_eq!((b.rate(), b.window()), (200_000, BBR_FIRST), "what was found once does not last");
    }

    /// As BBR is when it has lost something of a burst.
    #[derive(Clone)]
    struct Four;

    impl Controller for Four {
        fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}
        fn on_mtu_update(&mut self, _: u16) {}
        fn window(&self) -> u64 {
            4 * 1200
        }
        fn clone_box(&self) -> Box<dyn Controller> {
            Box::new(self.clone())
        }
        fn initial_window(&self) -> u64 {
            self.window()
        }
        fn into_any(self: Box<Self>) -> Box<dyn Any> {
            self
        }
    }

    #[test]
    fn a_burst_that_lost_something_is_followed_by_one_as_large() {
        let (ms, mut now, mut packet) = (Duration::from_millis, Instant::now(), 0);
        let mut b = Bounded::new(Box::new(Four), Arc::default());
        (b.rtt, b.opening) = (ms(20), Opening::Over);
        for _ in 0..4 {
            for _ in 0..50 {
                packet += 1;
                b.on_sent(now, 1200, packet);
            }
            b.acked = 50 * 1200;
            b.on_end_acks(now + ms(20), 0, false, Some(packet));
            assert_eq!(b.window(), 4 * 1200);
            now += ms(50);
        }
        assert_eq!(b.rate(), 50 * 1200 * 50, "the rest between two bursts does not count");
        b.on_sent(now, 1200, packet + 1);
        b.on_congestion_event(now, now, false, 1200);
        assert_eq!(b.window(), 50 * 1200);
        b.on_end_acks(now + ms(20), 0, true, Some(packet + 1));
        assert_eq!(b.window(), 50 * 1200, "sent before the loss was seen");
        b.on_sent(now + ms(20), 1200, packet + 2);
        b.on_end_acks(now + ms(40), 0, true, Some(packet + 2));
        assert_eq!(b.window(), 4 * 1200, "it is over");
        b.on_congestion_event(now, now, true, 1200);
        assert_eq!(b.window(), 4 * 1200, "nothing comes through any more");
    }

    #[test]
    fn two_spells_without_a_short_round_trip_tell_another_path() {
        let (mut spells, start, ms) = (Spells::default(), Instant::now(), Duration::from_millis);
        let mut told = Vec::new();
        for at in (0..36_000).step_by(100) {
            // Queues make it slower; one packet of 24 s is as fast as ever.
            let rtt = if at < 7000 || at == 24_000 { 1 } else { 40 + at % 300 };
            told.extend(spells.take(start + ms(at), ms(rtt)).map(|least| (at / 1000, least)));
        }
        assert_eq!(told, [(10, 1), (15, 1), (20, 40), (25, 1), (30, 1), (35, 40)].map(|(at, least)| (at, ms(least))));
        // After a rest there is nothing to compare.
        let after = [90_000, 96_000, 101_000].map(|at| spells.take(start + ms(at), ms(50)));
        assert_eq!(after, [None, None, Some(ms(50))]);
    }
}
