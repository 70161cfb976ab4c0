//! The path machine of one peer: NONE → RELAY → PROBING → DIRECT → SUSPECT → DIRECT | RELAY.
//!
//! It is told of candidates, pings, pongs and traffic, and says what to send and which path the data takes.
//! Data never waits for it: until a path is proven, the relay carries it.

use super::{
    candidates::Candidates,
    path::{Path, Way},
};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Of a round: both sides send at the same times, so that a lost packet costs 50 ms and not 5 s.
const SCHEDULE: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// After the last PING of a round: time for its PONG.
const ROUND_TAIL: Duration = Duration::from_millis(700);
/// A call that nobody answered is made again after so long: with its one datagram the whole round would be lost.
const CALL_AGAIN: [Duration; 3] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(1000)];
/// Between rounds that found nothing; the last one again and again.
const ROUND_GAPS: [Duration; 5] = [
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
];
/// While bytes flow a NAT or a link may open again at any moment, and nobody says so: at most so long between rounds.
const ROUND_GAP_BUSY: Duration = Duration::from_secs(45);
/// A path that carried bytes in this time is pinged each [`PING_BUSY`], so that a node that only receives
/// learns of a rebinding too.
const BUSY: Duration = Duration::from_secs(10);
const PING_BUSY: Duration = Duration::from_secs(1);
/// A QUIC datagram of at most so many bytes is a keepalive or its ACK, or next to nothing: no path is busy with these.
const QUIET: usize = 48;
/// Below the 30 s for which many home NATs keep an idle UDP mapping, despite RFC 4787 REQ-5's two minutes.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// A peer that was not used for so long may lose its mapping.
const IN_USE: Duration = Duration::from_secs(300);
/// Silence after a send that makes a path suspect.
const SUSPECT_AFTER: Duration = Duration::from_secs(1);
/// Silence that ends it.
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// A send that got no answer yet is followed by a PING so soon: an ACK of QUIC's asks for none.
const NUDGE: Duration = Duration::from_millis(250);
/// PINGs without a PONG that are remembered; the oldest is forgotten.
const PROBES_MAX: usize = 256;
/// A PONG that takes longer proves nothing of use, and its PING is forgotten.
const PONG_WAIT: Duration = Duration::from_secs(5);
/// A path that answers is kept for so long before another, of the same rank, may be faster: each change costs what is known
/// of the path, and where round trips vary two would take turns.
const SETTLE: Duration = Duration::from_secs(10);
/// While a path is in use that is direct and not by the preferred uplink, or not of the best rank that the peer has.
const BY_UPLINK: Duration = Duration::from_secs(30);
const BY_RANK: Duration = Duration::from_secs(300);

/// What the node does for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Do {
    Ping {
        to: Way,
        txid: u64,
    },
    /// By the relay; `asks` for theirs.
    CallMeMaybe {
        asks: bool,
    },
    /// The data takes this path from now on; it is proven.
    Switch(Path),
    /// The last datagrams again by the relay, and all new ones by both paths.
    /// `tell`: the peer too, unless it was the peer who said so.
    Suspect {
        tell: bool,
    },
    /// The direct path has answered a PING again: by it alone.
    Trust,
}

struct Round {
    start: Instant,
    sent: usize,
}

#[derive(Default)]
pub(super) struct Paths {
    current: Option<Path>,
    /// When a direct one was taken last.
    taken: Option<Instant>,
    relay: Option<Path>,
    pub(super) candidates: Candidates,
    probes: VecDeque<(u64, Way, Instant)>,
    round: Option<Round>,
    failed_rounds: usize,
    next_round: Option<Instant>,
    next_ping: Option<Instant>,
    /// Bytes of QUIC's, either way.
    used: Option<Instant>,
    /// When data went either way.
    busy: Option<Instant>,
    /// The first send by the direct path since something last came by it.
    silent_since: Option<Instant>,
    suspect: bool,
    last_good: Option<SocketAddr>,
    called: Option<Instant>,
    /// How often, since the peer last called or another path was taken.
    calls: usize,
}

impl Paths {
    pub(super) fn current(&self) -> Option<Path> {
        self.current
    }

    pub(super) fn last_good(&self) -> Option<SocketAddr> {
        self.last_good
    }

    /// How many addresses of the peer were tried.
    pub(super) fn tried(&self) -> usize {
        self.candidates.len()
    }

    /// PINGs without a PONG that are remembered.
    pub(super) fn unanswered(&self) -> usize {
        self.probes.len()
    }

    /// A cached address, of the snapshot or of a beacon.
    pub(super) fn remember(&mut self, address: SocketAddr) {
        self.last_good = Some(address);
        self.candidates.learn_address(address);
    }

    /// The relay path, or that there is none any more. True where data has a path now that had none.
    pub(super) fn set_relay(&mut self, path: Option<Path>) -> bool {
        self.relay = path;
        if self.current.is_none_or(Path::is_relay) {
            self.current = path;
            return path.is_some();
        }
        false
    }

    /// A handshake was confirmed by this path. A new connection that came by the relay says that what we
    /// held for direct is of the time before the peer's restart.
    pub(super) fn confirmed(&mut self, now: Instant, path: Path) {
        match path {
            Path::Direct(way) => {
                self.candidates.prove(now, way, None);
                if self.current.is_none_or(Path::is_relay) {
                    self.current = Some(path);
                    self.last_good = Some(way.remote);
                    self.next_ping = Some(now + PING_BUSY);
                }
            }
            Path::Relay { .. } => {
                (self.relay, self.current) = (Some(path), Some(path));
            }
        }
        (self.suspect, self.silent_since) = (false, None);
    }

    /// Nobody answered by any of these paths.
    pub(super) fn forget(&mut self) {
        (self.relay, self.current, self.last_good) = (None, None, None);
        (self.suspect, self.silent_since) = (false, None);
    }

    pub(super) fn relay(&self) -> Option<Path> {
        self.relay
    }

    /// A direct path with no relay beside it, while there is no connection: it may have died unseen, since nobody could
    /// ask the peer to open its NAT. From now on it is a guess.
    pub(super) fn take_bare(&mut self) -> Option<Path> {
        if self.relay.is_some() {
            return None;
        }
        (self.suspect, self.silent_since) = (false, None);
        self.current.take()
    }

    /// The data takes the relay's way, or that as well.
    pub(super) fn is_doubtful(&self) -> bool {
        self.suspect || self.current.is_none_or(Path::is_relay)
    }

    /// What was sent directly had no answer at all for a while.
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        self.silent_since.is_some_and(|at| now >= at + NUDGE)
    }

    /// The way that the data takes now, where it takes no relay's.
    fn direct(&self) -> Option<Way> {
        match self.current {
            Some(Path::Direct(way)) => Some(way),
            Some(Path::Relay { .. }) | None => None,
        }
    }

    /// The peer's own list, by CALL_ME_MAYBE: replaces what was never proven.
    pub(super) fn called(&mut self, now: Instant, asks: bool, list: &[SocketAddr], out: &mut Vec<Do>) {
        if self.candidates.called(list, self.direct(), self.last_good) > 0 {
            self.failed_rounds = 0;
        }
        self.calls = 0;
        if asks {
            out.push(Do::CallMeMaybe { asks: false });
        }
        self.start_round(now);
    }

    /// Our uplinks are others now: what went by one that is gone goes by the relay too until another is proven.
    pub(super) fn relinked(&mut self, now: Instant, out: &mut Vec<Do>) {
        self.candidates.relink();
        let gone = self.direct().is_some_and(|way| !self.candidates.uplinks.has(way));
        if gone && !self.suspect {
            self.doubt(now, true, out);
        }
    }

    /// From here on only a new PONG proves the path, and the relay carries what it carries.
    fn doubt(&mut self, now: Instant, tell: bool, out: &mut Vec<Do>) {
        if let Some(way) = self.direct() {
            self.candidates.disprove(way);
        }
        self.suspect = true;
        self.silent_since.get_or_insert(now);
        self.next_ping = Some(now);
        if self.relay.is_some() {
            out.push(Do::Suspect { tell });
        }
    }

    /// Something changed at our end, or the peer is needed: look for a path now.
    pub(super) fn seek(&mut self, now: Instant, out: &mut Vec<Do>) {
        self.failed_rounds = 0;
        if self.called.is_none_or(|at| now >= at + SCHEDULE[3]) {
            self.calls = 0;
            self.call(now, out);
        }
        self.start_round(now);
    }

    fn call(&mut self, now: Instant, out: &mut Vec<Do>) {
        self.called = Some(now);
        self.calls += 1;
        out.push(Do::CallMeMaybe { asks: true });
    }

    /// When the last call is to be made again.
    fn next_call(&self) -> Option<Instant> {
        Some(self.called? + *CALL_AGAIN.get(self.calls.checked_sub(1)?)?)
    }

    /// Bytes of QUIC's went either way.
    fn use_now(&mut self, now: Instant, len: usize) {
        self.used = Some(now);
        if len > QUIET {
            self.busy = Some(now);
        }
        let soon = now + ROUND_GAP_BUSY;
        self.next_round = self.next_round.map(|at| at.min(soon));
    }

    /// What was called last does not hold any more.
    pub(super) fn tell_again(&mut self) {
        self.called = None;
    }

    fn start_round(&mut self, now: Instant) {
        // A round that has just begun serves as well.
        if self.round.as_ref().is_none_or(|r| now >= r.start + SCHEDULE[2]) {
            self.round = Some(Round { start: now, sent: 0 });
        }
        self.next_round = None;
    }

    fn ping(&mut self, now: Instant, to: Way, rng: &mut fastrand::Rng, out: &mut Vec<Do>) {
        let txid = rng.u64(..);
        if self.probes.len() >= PROBES_MAX {
            self.probes.pop_front();
        }
        self.probes.push_back((txid, to, now));
        out.push(Do::Ping { to, txid });
    }

    /// A QUIC datagram, or a PING, came from this address.
    pub(super) fn came_from(&mut self, now: Instant, from: Way, rng: &mut fastrand::Rng, out: &mut Vec<Do>) {
        if self.current == Some(Path::Direct(from)) {
            // A path that is suspect may be dead in the other direction alone: only a PONG speaks for both.
            if !self.suspect {
                self.silent_since = None;
                // What is answered keeps both NATs open.
                let busy = self.busy.is_some_and(|at| now < at + BUSY);
                self.next_ping = self.next_ping.map(|at| if busy { at } else { at.max(now + KEEPALIVE) });
            }
            return;
        }
        self.candidates.learn(from, self.direct());
        let asked = |p: &(u64, Way, Instant)| p.1 == from && now < p.2 + SCHEDULE[1];
        if !self.probes.iter().any(asked) && !self.candidates.proven_since(now, from, SUSPECT_AFTER) {
            self.ping(now, from, rng, out);
        }
    }

    fn alive(&mut self, out: &mut Vec<Do>) {
        self.silent_since = None;
        if std::mem::take(&mut self.suspect) {
            out.push(Do::Trust);
        }
    }

    /// The transaction ID cannot be guessed: the path is proven.
    pub(super) fn ponged(&mut self, now: Instant, txid: u64, out: &mut Vec<Do>) -> Option<Way> {
        let at = self.probes.iter().position(|p| p.0 == txid)?;
        let (_, way, sent) = self.probes.remove(at)?;
        self.candidates.prove(now, way, Some(now.saturating_duration_since(sent)));
        if self.current == Some(Path::Direct(way)) {
            self.alive(out);
            self.last_good = Some(way.remote);
            self.failed_rounds = 0;
        }
        self.choose(now, out);
        Some(way)
    }

    fn choose(&mut self, now: Instant, out: &mut Vec<Do>) {
        let dead = self.direct().filter(|_| self.suspect);
        let Some(best) = self.candidates.best(now, dead) else { return };
        let settled = self.taken.is_none_or(|at| now >= at + SETTLE);
        let better = match self.direct() {
            Some(way) => way != best && (self.suspect || self.candidates.beats(now, best, way, settled)),
            None => true,
        };
        if better {
            (self.current, self.taken) = (Some(Path::Direct(best)), Some(now));
            (self.suspect, self.silent_since) = (false, None);
            (self.last_good, self.failed_rounds, self.calls) = (Some(best.remote), 0, 0);
            self.next_ping = Some(now + PING_BUSY);
            out.push(Do::Switch(Path::Direct(best)));
        }
    }

    /// So many bytes of QUIC's were sent to the peer.
    pub(super) fn sent(&mut self, now: Instant, len: usize) {
        self.use_now(now, len);
        if matches!(self.current, Some(Path::Direct(_))) && self.silent_since.is_none() {
            self.silent_since = Some(now);
            let nudge = now + NUDGE;
            self.next_ping = Some(self.next_ping.map_or(nudge, |at| at.min(nudge)));
        }
    }

    /// So many bytes of QUIC's came from the peer, by whatever path.
    pub(super) fn received(&mut self, now: Instant, len: usize) {
        self.use_now(now, len);
        let soon = now + PING_BUSY;
        self.next_ping = Some(self.next_ping.map_or(soon, |at| if len > QUIET { at.min(soon) } else { at }));
    }

    /// The peer says that what we send directly does not arrive.
    pub(super) fn path_down(&mut self, now: Instant, out: &mut Vec<Do>) {
        if matches!(self.current, Some(Path::Direct(_))) && !self.suspect && self.relay.is_some() {
            self.doubt(now, false, out);
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let round = self.round.as_ref().map(|r| match SCHEDULE.get(r.sent) {
            Some(gap) => r.start + *gap,
            None => r.start + SCHEDULE[SCHEDULE.len() - 1] + ROUND_TAIL,
        });
        let silence = self.silent_since.map(|at| at + if self.suspect { DEAD_AFTER } else { SUSPECT_AFTER });
        let ping = self.next_ping.filter(|_| matches!(self.current, Some(Path::Direct(_))));
        let stale = self.probes.back().map(|(_, _, sent)| *sent + PONG_WAIT);
        [round, silence, ping, stale, self.next_round, self.next_call()].into_iter().flatten().min()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant, rng: &mut fastrand::Rng, out: &mut Vec<Do>) {
        while self.probes.front().is_some_and(|(_, _, sent)| now >= *sent + PONG_WAIT) {
            self.probes.pop_front();
        }
        if self.probes.is_empty() {
            self.probes = VecDeque::new(); // a thousand idle peers keep no buffers
        }
        self.watch_silence(now, out);
        if self.next_call().is_some_and(|at| at <= now) {
            self.call(now, out);
        }
        self.run_round(now, rng, out);
        self.keep_alive(now, rng, out);
        if self.next_round.is_some_and(|at| at <= now) {
            self.next_round = None;
            if self.used.is_some_and(|at| now < at + IN_USE) {
                let failed = self.failed_rounds;
                self.seek(now, out);
                self.failed_rounds = failed;
                self.run_round(now, rng, out);
            }
        }
    }

    fn watch_silence(&mut self, now: Instant, out: &mut Vec<Do>) {
        let Some(since) = self.silent_since.filter(|_| matches!(self.current, Some(Path::Direct(_)))) else {
            self.silent_since = None;
            return;
        };
        if now >= since + DEAD_AFTER {
            (self.suspect, self.silent_since) = (false, None);
            if let Some(relay) = self.relay {
                self.current = Some(relay);
                out.push(Do::Switch(relay));
            }
            self.seek(now, out);
        } else if now >= since + SUSPECT_AFTER && !self.suspect {
            self.doubt(now, true, out);
            self.seek(now, out);
        }
    }

    fn run_round(&mut self, now: Instant, rng: &mut fastrand::Rng, out: &mut Vec<Do>) {
        let Some(round) = &self.round else { return };
        let start = round.start;
        let mut sent = round.sent;
        if SCHEDULE.get(sent).is_some_and(|gap| start + *gap <= now) {
            while SCHEDULE.get(sent).is_some_and(|gap| start + *gap <= now) {
                sent += 1;
            }
            self.candidates.ways().into_iter().for_each(|to| self.ping(now, to, rng, out));
            self.round = Some(Round { start, sent });
        }
        if now >= start + SCHEDULE[SCHEDULE.len() - 1] + ROUND_TAIL {
            self.round = None;
            self.next_round = match self.direct().map(|way| self.candidates.above(way)) {
                None => {
                    self.failed_rounds += 1;
                    Some(now + ROUND_GAPS[self.failed_rounds.min(ROUND_GAPS.len()) - 1])
                }
                Some((_, true)) => Some(now + BY_UPLINK),
                Some((true, false)) => Some(now + BY_RANK),
                Some((false, false)) => None,
            };
        }
    }

    fn keep_alive(&mut self, now: Instant, rng: &mut fastrand::Rng, out: &mut Vec<Do>) {
        let (Some(Path::Direct(to)), Some(at)) = (self.current, self.next_ping) else { return };
        if at > now {
            return;
        }
        let since = |at: Option<Instant>| at.map_or(IN_USE, |at| now.saturating_duration_since(at));
        self.next_ping = if self.silent_since.is_some() {
            Some(now + NUDGE)
        } else if since(self.busy) < BUSY {
            Some(now + PING_BUSY)
        } else if since(self.used) < IN_USE {
            Some(now + KEEPALIVE)
        } else {
            None
        };
        if self.next_ping.is_some() {
            self.silent_since.get_or_insert(now);
            self.ping(now, to, rng, out);
        } else {
            // From now on nobody knows whether the mapping still holds: who comes back begins on the relay, or asks.
            self.current = self.relay;
        }
    }
}

#[cfg(test)]
mod tests;
