//! One registration at a relay, from our side: is it still there?

use crate::carrier::address::is_client;
use crate::tunnel::{
    control::{Channel, Control},
    keys::Key,
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Below the 30 s for which many home NATs keep an idle UDP mapping, despite RFC 4787 REQ-5's two minutes.
const PING_IDLE: Duration = Duration::from_secs(25);
/// While a path through the relay is in use…
const PING_BUSY: Duration = Duration::from_secs(1);
/// …which it is for so long after its last datagram.
const BUSY: Duration = Duration::from_secs(10);
/// While connections are kept open by it: they say something each 20 s.
const PING_HELD: Duration = Duration::from_secs(5);
const HELD: Duration = Duration::from_secs(60);
/// Of a relay that holds our entry and nothing else: it is to know soon that we are still there.
const PING_LISTED: Duration = Duration::from_secs(60);
/// After a PING without a PONG, or half as long again as a round trip where that is longer.
const PING_AGAIN: Duration = Duration::from_millis(250);
/// Without any word for so long, or three round trips, after a PING: other ways are taken.
const SUSPECT_AFTER: Duration = Duration::from_secs(1);
/// Without a PONG for so long, or six round trips: the registration counts as ended.
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// Right after the handshake, before the first PONG: the relay may not have seen our Finished yet.
const FIRST_PINGS: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// A registration that fell silent is asked after, more and more seldom: the relay, back again, knows it still or
/// says that it does not, and either is sooner than the next handshake would be.
const GHOST_PINGS: [(Duration, Duration); 3] = [
    (Duration::from_secs(60), Duration::from_secs(1)),
    (Duration::from_secs(600), Duration::from_millis(2500)),
    (Duration::MAX, Duration::from_secs(5)),
];

/// The nonce of a PING that says nothing of the registration: it goes by another uplink.
pub(super) const BESIDE: u32 = 0;
/// PINGs without a PONG after which another uplink may do better.
const LATE: usize = 3;

/// What a turn of the timer comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// A frame for the relay.
    Ping(Vec<u8>),
    /// The same, and from now on other ways are to be taken.
    Suspect(Vec<u8>),
    Dead,
}

pub(super) struct Up {
    pub(super) channel: Channel,
    pub(super) since: Instant,
    pub(super) observed: Option<SocketAddr>,
    pub(super) rtt: Option<Duration>,
    /// For how many nodes it is the first relay.
    pub(super) load: u16,
    /// A NAT's mapping to it is kept open, so that where it sees us is where we are.
    pub(super) kept: bool,
    /// It has said nothing though it was asked.
    pub(super) suspect: bool,
    pub(super) next_ping: Instant,
    used: Option<Instant>,
    /// Anything under the registration's keys.
    heard: Instant,
    /// (nonce, when) of the last PING.
    last_ping: Option<(u32, Instant)>,
    /// The first PING since the last PONG.
    asked: Option<Instant>,
    unanswered: usize,
}

impl Up {
    pub(super) fn new(secret: &Key, now: Instant) -> Self {
        Self {
            channel: Channel::new(secret, false, 0),
            since: now,
            observed: None,
            rtt: None,
            load: 0,
            kept: false,
            suspect: false,
            next_ping: now,
            used: None,
            heard: now,
            last_ping: None,
            asked: None,
            unanswered: 0,
        }
    }

    /// Answered at least once, and not silent now.
    pub(super) fn usable(&self) -> bool {
        self.rtt.is_some() && !self.suspect
    }

    /// For how long nothing went through it.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.used.unwrap_or(self.since))
    }

    fn pace(&self, now: Instant, chosen: bool) -> Duration {
        match self.used.map(|used| now.saturating_duration_since(used)) {
            Some(ago) if ago < BUSY => PING_BUSY,
            Some(ago) if ago < HELD => PING_HELD,
            Some(_) | None if chosen => PING_IDLE,
            Some(_) | None => PING_LISTED,
        }
    }

    fn ping(&mut self, now: Instant, rng: &mut fastrand::Rng) -> Vec<u8> {
        let nonce = rng.u32(BESIDE + 1..);
        self.last_ping = Some((nonce, now));
        self.asked.get_or_insert(now);
        self.unanswered += 1;
        self.channel.seal(&Control::Ping { nonce })
    }

    pub(super) fn ping_beside(&mut self) -> Vec<u8> {
        self.channel.seal(&Control::Ping { nonce: BESIDE })
    }

    /// What was asked from another address of ours does not count.
    pub(super) fn relocated(&mut self, now: Instant) {
        if self.rtt.is_some() {
            (self.next_ping, self.asked, self.unanswered) = (now, None, 0);
        }
    }

    pub(super) fn hurry(&mut self, now: Instant) {
        if self.unanswered == 0 {
            self.next_ping = now;
        }
    }

    pub(super) fn doubt(&mut self, now: Instant) {
        if now >= self.heard + PING_AGAIN {
            self.hurry(now);
        }
    }

    /// (it does not answer, when it last did).
    pub(super) fn pulse(&self) -> (bool, Option<Instant>) {
        (self.rtt.is_some() && self.unanswered >= LATE, self.rtt.map(|_| self.heard))
    }

    /// At `next_ping`.
    pub(super) fn turn(&mut self, now: Instant, rng: &mut fastrand::Rng) -> Turn {
        let Some(rtt) = self.rtt else {
            if self.unanswered >= FIRST_PINGS.len() {
                return Turn::Dead;
            }
            let frame = self.ping(now, rng);
            self.next_ping = now + FIRST_PINGS.get(self.unanswered).copied().unwrap_or(SUSPECT_AFTER);
            return Turn::Ping(frame);
        };
        if self.asked.is_some_and(|at| now >= at + DEAD_AFTER.max(rtt * 6)) {
            return Turn::Dead;
        }
        let silent = self.asked.is_some_and(|at| now >= at.max(self.heard) + SUSPECT_AFTER.max(rtt * 3));
        self.next_ping = now + PING_AGAIN.max(rtt * 3 / 2);
        let frame = self.ping(now, rng);
        if silent && !self.suspect {
            self.suspect = true;
            return Turn::Suspect(frame);
        }
        Turn::Ping(frame)
    }

    /// Of a registration that is held for ended.
    pub(super) fn ghost_turn(&mut self, now: Instant, rng: &mut fastrand::Rng) -> Vec<u8> {
        let silent = now.saturating_duration_since(self.heard);
        let gap = GHOST_PINGS.iter().find(|(until, _)| silent < *until).map_or(PING_HELD, |(_, gap)| *gap);
        self.next_ping = now + gap;
        self.ping(now, rng)
    }

    /// Data went through the relay, or came.
    pub(super) fn used(&mut self, now: Instant) {
        // What is sent and brings nothing back for a while may go nowhere.
        if self.asked.is_none() && self.rtt.is_some_and(|rtt| now >= self.heard + PING_AGAIN.max(rtt * 3 / 2)) {
            self.next_ping = self.next_ping.min(now);
        }
        if self.used.is_none_or(|used| now >= used + PING_BUSY) {
            // One that was left alone is asked at once: it may have been restarted long ago.
            if self.asked.is_none() {
                let soon = if now < self.heard + PING_BUSY { PING_BUSY } else { Duration::ZERO };
                self.next_ping = self.next_ping.min(now + soon);
            }
            self.used = Some(now);
        }
    }

    /// Something came under the registration's keys.
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.suspect = false;
    }

    /// True for the first one. `chosen`: the relay is to carry data.
    pub(super) fn pong(&mut self, now: Instant, nonce: u32, observed: SocketAddr, load: u16, chosen: bool) -> bool {
        let first = self.rtt.is_none();
        if let Some((_, at)) = self.last_ping.filter(|(n, _)| *n == nonce) {
            let rtt = now.saturating_duration_since(at);
            self.rtt = Some(self.rtt.map_or(rtt, |old| (old * 7 + rtt) / 8));
        } else if first {
            self.rtt = Some(FIRST_PINGS[1]); // the PONG of an earlier PING: at least so old
        }
        (self.asked, self.unanswered) = (None, 0);
        self.next_ping = now + self.pace(now, chosen);
        self.kept = self.next_ping < now + PING_LISTED;
        (self.observed, self.load) = (Some(observed).filter(|at| !is_client(*at)), load);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SEC: Duration = Duration::from_secs(1);

    struct Link {
        up: Up,
        now: Instant,
        rng: fastrand::Rng,
        rtt: Duration,
        chosen: bool,
    }

    impl Link {
        fn new(rtt: Duration) -> Self {
            let now = Instant::now();
            let mut link =
                Self { up: Up::new(&Key([1; 32]), now), now, rng: fastrand::Rng::with_seed(1), rtt, chosen: true };
            link.run(SEC, true);
            link
        }

        /// The turns of so long, with the time since the start; each PING is answered, or none.
        fn run(&mut self, most: Duration, answers: bool) -> Vec<(Duration, &'static str)> {
            let (start, until) = (self.now, self.now + most);
            let mut said = Vec::new();
            while self.up.next_ping <= until {
                self.now = self.now.max(self.up.next_ping);
                said.push((
                    self.now - start,
                    match self.up.turn(self.now, &mut self.rng) {
                        Turn::Ping(_) => "ping",
                        Turn::Suspect(_) => "suspect",
                        Turn::Dead => "dead",
                    },
                ));
                if said.last().is_some_and(|(_, what)| *what == "dead") {
                    break;
                }
                if answers {
                    let (nonce, sent) = self.up.last_ping.unwrap();
                    self.now = self.now.max(sent + self.rtt);
                    self.up.heard(self.now);
                    self.up.pong(self.now, nonce, "1.2.3.4:5".parse().unwrap(), 0, self.chosen);
                }
            }
            self.now = until;
            said
        }
    }

    #[test]
    fn pings_are_as_frequent_as_the_use() {
        let mut link = Link::new(20 * MS);
        assert!((3..=4).contains(&link.run(100 * SEC, true).len()), "idle");
        link.up.used(link.now);
        assert!((8..=11).contains(&link.run(10 * SEC, true).len()), "busy");
        assert!((9..=11).contains(&link.run(50 * SEC, true).len()), "held");
        link.chosen = false;
        link.run(60 * SEC, true);
        assert_eq!(link.run(600 * SEC, true).len(), 10, "listed");
        assert!(!link.up.kept);
    }

    #[test]
    fn silence_is_suspect_after_a_second_and_the_end_after_three() {
        for (rtt, suspect, dead) in [(20, 1000, 3000), (600, 1800, 3600)] {
            let mut link = Link::new(rtt * MS);
            link.up.used(link.now);
            let said = link.run(10 * SEC, false);
            let first = said[0].0;
            assert!(first <= SEC + MS, "{said:?}");
            let when = |what| said.iter().find(|(_, w)| *w == what).unwrap().0 - first;
            let slack = 1000 * MS;
            assert!(when("suspect") >= suspect * MS && when("suspect") < suspect * MS + slack, "{said:?}");
            assert!(when("dead") >= dead * MS && when("dead") < dead * MS + slack, "{said:?}");
        }
    }

    #[test]
    fn an_idle_one_is_asked_at_once_when_it_is_used() {
        let mut link = Link::new(20 * MS);
        link.run(40 * SEC, true);
        link.up.used(link.now);
        assert_eq!(link.run(10 * MS, false).len(), 1);
    }

    #[test]
    fn data_from_the_relay_keeps_suspicion_away_and_not_the_end() {
        let mut link = Link::new(20 * MS);
        link.up.used(link.now);
        let mut said = Vec::new();
        for _ in 0..50 {
            link.up.heard(link.now);
            said.extend(link.run(100 * MS, false).into_iter().map(|(_, what)| what));
            if said.contains(&"dead") {
                break;
            }
        }
        assert!(!said.contains(&"suspect") && said.contains(&"dead"), "{said:?}");
    }

    #[test]
    fn what_never_answers_is_given_up_in_two_seconds() {
        let now = Instant::now();
        let rtt = SEC;
        let mut link =
            Link { up: Up::new(&Key([1; 32]), now), now, rng: fastrand::Rng::with_seed(1), rtt, chosen: true };
        let said = link.run(10 * SEC, false);
        assert_eq!(said.last().unwrap().1, "dead");
        assert!(said.last().unwrap().0 < 3 * SEC && said.len() == FIRST_PINGS.len() + 1, "{said:?}");
        assert!(!link.up.usable());
    }

    #[test]
    fn a_ghost_is_asked_after_more_and_more_seldom() {
        let mut link = Link::new(20 * MS);
        let start = link.now;
        let mut asked = Vec::new();
        link.up.next_ping = link.now;
        while link.up.next_ping < start + 700 * SEC {
            link.now = link.up.next_ping;
            link.up.ghost_turn(link.now, &mut link.rng);
            asked.push(link.now - start);
        }
        let within = |a: u32, b: u32| asked.iter().filter(|at| (SEC * a..SEC * b).contains(*at)).count();
        assert_eq!((within(0, 50), within(100, 200), within(650, 700)), (50, 40, 10));
    }
}
