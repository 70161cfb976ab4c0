//! Which port a NAT gives next, where it gives one after the other: one for each new destination.
//!
//! A node numbers the destinations that it writes to. Two of them, relays or peers, that say from which ports
//! they see us show whether ports follow the numbers, and so which port a peer will see.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Ports that are foretold: other hosts behind the NAT use some too.
pub(super) const AHEAD: u16 = 12;
/// Of these, so many lie before the one that is expected: a packet of ours may have been lost before the NAT.
const SLACK: i64 = 3;
/// Destinations and views that are remembered; the oldest is forgotten.
const SENT_MAX: usize = 256;
const SEEN_MAX: usize = 8;
/// RFC 4787 REQ-5: a mapping is not to expire in less.
const EXPIRY: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
pub(super) struct Ports {
    made: i64,
    /// The number of each destination, and when it was last written to.
    sent: BTreeMap<SocketAddr, (i64, Instant)>,
    /// By number: what that destination says that it sees.
    seen: BTreeMap<i64, SocketAddr>,
}

impl Ports {
    /// Something goes to this address through the NAT.
    pub(super) fn sent(&mut self, now: Instant, to: SocketAddr) -> i64 {
        if let Some((number, at)) = self.sent.get_mut(&to).filter(|(_, at)| now < *at + EXPIRY) {
            *at = now;
            return *number;
        }
        if self.sent.len() >= SENT_MAX {
            let oldest = self.sent.iter().min_by_key(|(_, (_, at))| *at).map(|(to, _)| *to);
            oldest.and_then(|to| self.sent.remove(&to));
        }
        self.made += 1;
        self.sent.insert(to, (self.made, now));
        self.made
    }

    /// That destination sees us as `seen`.
    pub(super) fn seen(&mut self, now: Instant, by: SocketAddr, seen: SocketAddr) {
        let mut number = self.sent(now, by);
        if self.seen.get(&number).is_some_and(|old| *old != seen) {
            // The NAT has forgotten the mapping and made another one.
            self.seen.remove(&number);
            self.sent.remove(&by);
            number = self.sent(now, by);
        }
        self.seen.insert(number, seen);
        if self.seen.len() > SEEN_MAX {
            self.seen.pop_first();
        }
    }

    /// The last two views, where ports follow each other; twice the last, where it does not follow the one before.
    fn pair(&self) -> Option<[(i64, SocketAddr); 2]> {
        let all: Vec<(i64, SocketAddr)> = self.seen.iter().map(|(number, at)| (*number, *at)).collect();
        let follows = |w: &[(i64, SocketAddr)]| {
            let (ports, numbers) = (i64::from(w[1].1.port()) - i64::from(w[0].1.port()), w[1].0 - w[0].0);
            w[0].1.ip() == w[1].1.ip() && ports != 0 && ports.abs() <= numbers + i64::from(AHEAD)
        };
        all.windows(2).any(follows).then_some(())?;
        let last = all.windows(2).next_back()?;
        Some(if follows(last) { [last[0], last[1]] } else { [last[1]; 2] })
    }

    pub(super) fn sequential(&self) -> bool {
        self.pair().is_some()
    }

    /// Where a peer that is written to at these addresses will see us; empty where nothing tells.
    pub(super) fn next(&self, now: Instant, peer: &[SocketAddr]) -> Vec<SocketAddr> {
        let Some(pair) = self.pair() else { return Vec::new() };
        let known = peer.iter().filter_map(|a| self.sent.get(a)).filter(|(_, at)| now < *at + EXPIRY);
        let number = known.map(|(number, _)| *number).min().unwrap_or(self.made + 1);
        // The relays may have been written to in another order than they were heard from: the lower counts.
        let expected = pair.iter().map(|(n, at)| i64::from(at.port()) + number - n).min().unwrap_or(0);
        let first = expected - SLACK.min(self.made - pair[1].0);
        let ports = (first..).take(AHEAD.into()).filter_map(|port| u16::try_from(port).ok().filter(|p| *p > 0));
        ports.map(|port| SocketAddr::new(pair[1].1.ip(), port)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A NAT that gives each new destination the next port.
    #[derive(Default)]
    struct Nat(Vec<SocketAddr>);

    impl Nat {
        fn port(&mut self, to: SocketAddr) -> SocketAddr {
            let n = self.0.iter().position(|a| *a == to).unwrap_or_else(|| {
                self.0.push(to);
                self.0.len() - 1
            });
            SocketAddr::new([11, 0, 0, 9].into(), 30_000 + n as u16)
        }
    }

    #[test]
    fn what_a_peer_will_see_is_foretold_after_many_others_and_again_later() {
        for reversed in [false, true] {
            let (mut now, mut nat, mut ports) = (Instant::now(), Nat::default(), Ports::default());
            let mut relays = [at("11.0.0.1:1"), at("11.0.0.2:1")];
            let views = relays.map(|r| (r, nat.port(r)));
            if reversed {
                relays.reverse();
            }
            for relay in relays {
                ports.seen(now, relay, views.iter().find(|(r, _)| *r == relay).unwrap().1);
            }
            assert!(ports.sequential());
            for n in 1..100 {
                let peer = SocketAddr::new([11, 1, 0, n].into(), 7);
                assert!(ports.next(now, &[]).contains(&{
                    ports.sent(now, peer);
                    nat.port(peer)
                }));
                assert_eq!(ports.next(now, &[peer]).len(), usize::from(AHEAD));
                assert!(ports.next(now, &[peer]).contains(&nat.port(peer)), "{n}, once it was written to");
                now += Duration::from_secs(1);
            }
        }
    }

    #[test]
    fn ports_without_order_or_of_one_mapping_foretell_nothing() {
        let now = Instant::now();
        for (one, two) in
            [("11.0.0.9:5000", "11.0.0.9:41000"), ("11.0.0.9:5000", "11.0.0.9:5000"), ("11.0.0.9:5", "11.0.0.8:6")]
        {
            let mut ports = Ports::default();
            ports.seen(now, at("11.0.0.1:1"), at(one));
            assert!(ports.next(now, &[]).is_empty());
            ports.seen(now, at("11.0.0.2:1"), at(two));
            assert!(!ports.sequential() && ports.next(now, &[]).is_empty(), "{one} {two}");
        }
    }

    #[test]
    fn the_end_of_the_range_of_ports_is_no_panic_and_nothing_grows() {
        let now = Instant::now();
        let mut ports = Ports::default();
        ports.seen(now, at("11.0.0.1:1"), at("11.0.0.9:65534"));
        ports.seen(now, at("11.0.0.2:1"), at("11.0.0.9:65535"));
        assert!(ports.next(now, &[]).is_empty());
        for n in 0..2000_u16 {
            ports.seen(now, SocketAddr::new([11, 2, 0, 1].into(), 1 + n), SocketAddr::new([11, 0, 0, 9].into(), 1 + n));
        }
        assert!(ports.sent.len() <= SENT_MAX && ports.seen.len() <= SEEN_MAX);
        assert_eq!(ports.next(now, &[])[0], at("11.0.0.9:2001"));
    }
}
