//! When a relay is talked to by TCP, and when by UDP again. Without IO; one for each relay.

use crate::backoff::Backoff;
use std::time::{Duration, Instant};

/// UDP has so long to bring an answer: the first Initial and the next, 1 s later (RFC 9002 section 6.2.2), with a round
/// trip of a second; or, for a relay that has answered, what follows a PING in vain.
const PATIENCE: Duration = Duration::from_millis(2500);
/// The same while streams wait for it: three PINGs in vain were half a second already, and what is opened too soon is
/// only kept ready.
const HURRY: Duration = Duration::from_millis(300);
/// Without an answer by TCP for so long the connection is given up.
const DEAD: Duration = Duration::from_secs(8);
/// Between two questions whether UDP passes again, more and more seldom: who changed over soon may have been wrong.
const PROBE_FIRST: Duration = Duration::from_secs(2);
const PROBE: Duration = Duration::from_secs(30);
/// For so long what the relay still sends by TCP is taken, after the return to UDP.
const LINGER: Duration = Duration::from_secs(5);
/// For so long a connection that was not needed once it stood is there for the next silence.
const READY: Duration = Duration::from_secs(30);
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// What there is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Rest,
    /// Open a connection, by the way of this number.
    Dial(usize),
    /// Ask the relay by UDP.
    Probe,
    /// Close the connection.
    Leave,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Udp {
        retry: Instant,
    },
    Dialing,
    Tcp {
        probe: Instant,
        gap: Duration,
    },
    /// By UDP; the connection is open still.
    Leaving {
        until: Instant,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Fallback {
    mode: Mode,
    /// Since when the relay does not answer, by what is used now.
    silent: Option<Instant>,
    /// The way that is tried next, and how many have failed in a row.
    way: usize,
    failed: usize,
    ways: usize,
    backoff: Backoff,
}

impl Fallback {
    /// `ways`: how many there are to open a connection, the preferred first.
    #[must_use]
    pub fn new(ways: usize, now: Instant) -> Self {
        let backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        Self { mode: Mode::Udp { retry: now }, silent: None, way: 0, failed: 0, ways: ways.max(1), backoff }
    }

    /// Whether datagrams to the relay go by TCP.
    #[must_use]
    pub fn carries(&self) -> bool {
        matches!(self.mode, Mode::Tcp { .. })
    }

    fn by_tcp(now: Instant) -> Mode {
        Mode::Tcp { probe: now + PROBE_FIRST, gap: PROBE_FIRST }
    }

    /// To be called now and then, about twice a second, and more often while it is not `usable`: the relay does not
    /// answer. `live`: streams wait for it.
    pub fn turn(&mut self, now: Instant, usable: bool, live: bool) -> Turn {
        let patience = if live { HURRY } else { PATIENCE };
        self.silent = if usable { None } else { Some(self.silent.unwrap_or(now)) };
        let silent = self.silent.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        match self.mode {
            Mode::Udp { retry } if silent >= patience && now >= retry => {
                self.mode = Mode::Dialing;
                Turn::Dial(self.way)
            }
            Mode::Tcp { .. } if silent >= DEAD => {
                self.mode = Mode::Udp { retry: now };
                self.next_way();
                Turn::Leave
            }
            Mode::Tcp { probe, gap } if now >= probe => {
                let gap = (gap * 2).min(PROBE);
                self.mode = Mode::Tcp { probe: now + gap, gap };
                Turn::Probe
            }
            // UDP has brought one answer and no more, or is dead again.
            Mode::Leaving { .. } if silent >= patience => {
                self.mode = Self::by_tcp(now);
                self.silent = None;
                Turn::Rest
            }
            Mode::Leaving { until } if usable && now >= until => {
                self.mode = Mode::Udp { retry: now };
                Turn::Leave
            }
            Mode::Udp { .. } | Mode::Dialing | Mode::Tcp { .. } | Mode::Leaving { .. } => Turn::Rest,
        }
    }

    fn next_way(&mut self) {
        self.way = (self.way + 1) % self.ways;
        self.failed += 1;
    }

    /// The connection stands.
    pub fn opened(&mut self, now: Instant) {
        let in_vain = self.silent.is_none();
        self.mode = if in_vain { Mode::Leaving { until: now + READY } } else { Self::by_tcp(now) };
        (self.silent, self.failed) = (None, 0);
        self.backoff.reset();
    }

    /// It could not be opened, or has ended. After all ways have failed there is a pause.
    pub fn lost(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        let retry = match self.mode {
            Mode::Dialing => {
                self.next_way();
                if self.failed.is_multiple_of(self.ways) { now + self.backoff.delay(rng) } else { now }
            }
            Mode::Udp { retry } => retry,
            Mode::Tcp { .. } | Mode::Leaving { .. } => now,
        };
        self.mode = Mode::Udp { retry };
    }

    /// The relay has answered by UDP. True where that is news.
    pub fn answered_by_udp(&mut self, now: Instant) -> bool {
        let news = self.carries();
        if news {
            (self.mode, self.silent) = (Mode::Leaving { until: now + LINGER }, None);
        }
        news
    }

    /// Another relay answers by UDP again: so may this one, and one question may be lost.
    pub fn passes_elsewhere(&mut self, now: Instant) {
        if self.carries() {
            self.mode = Mode::Tcp { probe: now, gap: PROBE_FIRST };
        }
    }

    /// Links have changed: what did not pass may pass now.
    pub fn moved(&mut self, now: Instant) {
        self.backoff.reset();
        match &mut self.mode {
            Mode::Udp { retry: at } | Mode::Tcp { probe: at, .. } => *at = now,
            Mode::Dialing | Mode::Leaving { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(500);

    struct Net {
        fallback: Fallback,
        now: Instant,
        start: Instant,
        rng: fastrand::Rng,
        live: bool,
    }

    impl Net {
        fn new(ways: usize) -> Self {
            let now = Instant::now();
            Self { fallback: Fallback::new(ways, now), now, start: now, rng: fastrand::Rng::with_seed(1), live: false }
        }

        fn by_tcp(&mut self) {
            assert_eq!(self.run(4, |_| false).len(), 1);
            self.fallback.opened(self.now);
            assert!(self.fallback.carries());
        }

        /// Turns for so many seconds; gives all that is no rest, with the seconds since the start.
        fn run(&mut self, seconds: u32, usable: impl Fn(&Fallback) -> bool) -> Vec<(f32, Turn)> {
            let mut all = Vec::new();
            for _ in 0..seconds * 2 {
                let usable = usable(&self.fallback);
                match self.fallback.turn(self.now, usable, self.live) {
                    Turn::Rest => {}
                    turn => all.push(((self.now - self.start).as_secs_f32(), turn)),
                }
                self.now += STEP;
            }
            all
        }
    }

    #[test]
    fn three_seconds_without_an_answer_and_tcp_is_tried() {
        let mut net = Net::new(1);
        assert_eq!(net.run(60, |_| true), []);
        assert_eq!(net.run(2, |_| false), []);
        assert_eq!(net.run(1, |_| true), []);
        assert_eq!(net.run(10, |_| false), [(65.5, Turn::Dial(0))]);
        assert!(!net.fallback.carries());
        net.fallback.opened(net.now);
        assert!(net.fallback.carries());
        // Then UDP is asked, at last each half minute, or at once where a link has changed.
        let probes = net.run(95, Fallback::carries);
        assert_eq!(probes, [75.0, 79.0, 87.0, 103.0, 133.0, 163.0].map(|at| (at, Turn::Probe)));
        net.fallback.moved(net.now);
        assert_eq!(net.run(1, |_| true), [(168.0, Turn::Probe)]);
        net.fallback.passes_elsewhere(net.now);
        assert_eq!(net.run(8, |_| true), [169.0, 173.0].map(|at| (at, Turn::Probe)));
    }

    #[test]
    fn back_to_udp_when_it_answers_and_to_tcp_when_that_was_all() {
        let mut net = Net::new(1);
        net.by_tcp();
        assert!(net.fallback.answered_by_udp(net.now) && !net.fallback.carries());
        assert!(!net.fallback.answered_by_udp(net.now), "no news");
        assert_eq!(net.run(9, |_| true), [(9.0, Turn::Leave)]);
        for live in [false, true] {
            net.by_tcp();
            net.fallback.answered_by_udp(net.now);
            net.live = live;
            assert_eq!(net.run(if live { 1 } else { 3 }, |_| false), []);
            assert!(net.fallback.carries(), "the connection is open still");
            (net.live, _) = (false, net.fallback.answered_by_udp(net.now));
            net.run(6, |_| true);
        }
    }

    #[test]
    fn who_has_streams_does_not_wait() {
        let mut net = Net::new(1);
        net.live = true;
        assert_eq!(net.run(2, |_| false), [(0.5, Turn::Dial(0))]);
        // It answers after all: the connection is kept for a while, and taken at the next silence.
        net.run(1, |_| true);
        net.fallback.opened(net.now);
        assert!(!net.fallback.carries());
        assert_eq!(net.run(20, |_| true), []);
        assert_eq!(net.run(1, |_| false), []);
        assert!(net.fallback.carries());
    }

    #[test]
    fn all_ways_in_turn_then_a_pause_and_the_one_that_worked_first() {
        let mut net = Net::new(3);
        let mut dials = Vec::new();
        for _ in 0..200 {
            for (at, turn) in net.run(1, |_| false) {
                let Turn::Dial(way) = turn else { panic!("{turn:?}") };
                dials.push((at, way));
                net.fallback.lost(net.now, &mut net.rng);
            }
        }
        let ways: Vec<usize> = dials.iter().map(|(_, way)| *way).collect();
        assert_eq!(ways[..7], [0, 1, 2, 0, 1, 2, 0]);
        let pauses: Vec<f32> = dials.chunks(3).map(|c| c[0].0).collect();
        assert!(pauses.windows(3).all(|w| w[2] - w[1] >= (w[1] - w[0]) * 0.5), "{pauses:?}");
        assert!((21..=30).contains(&dials.len()), "{dials:?}");

        let mut net = Net::new(3);
        net.run(4, |_| false);
        net.fallback.lost(net.now, &mut net.rng);
        assert_eq!(net.run(1, |_| false)[0].1, Turn::Dial(1));
        net.fallback.opened(net.now);
        net.fallback.lost(net.now, &mut net.rng);
        assert_eq!(net.run(4, |_| false)[0].1, Turn::Dial(1), "it ended, but it had worked");
    }

    #[test]
    fn a_connection_that_brings_no_answers_is_given_up_for_the_next_way() {
        let mut net = Net::new(2);
        net.by_tcp();
        let said = net.run(20, |_| false);
        let said: Vec<_> = said.into_iter().filter(|(_, turn)| *turn != Turn::Probe).collect();
        assert_eq!(said, [(12.0, Turn::Leave), (12.5, Turn::Dial(1))]);
    }

    #[test]
    fn a_connection_that_came_too_late_is_closed() {
        let mut net = Net::new(1);
        net.run(4, |_| false);
        net.run(1, |_| true);
        net.fallback.opened(net.now);
        assert!(!net.fallback.carries());
        assert_eq!(net.run(40, |_| true), [(35.0, Turn::Leave)]);
    }
}
