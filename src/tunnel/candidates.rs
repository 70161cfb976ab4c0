//! The ways that may lead to a peer, and which of them is the best.

use super::{path::Way, uplinks::Uplinks};
use std::{
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

/// Ways to one peer: what it lists by each of our uplinks, and where it was heard from. The least useful goes.
const WAYS_MAX: usize = 64;
/// How long a PONG proves its way.
const PROOF: Duration = Duration::from_secs(5);
/// An RTT must be better by this, or by a tenth, to be worth a switch among equals.
const BETTER: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Candidate {
    way: Way,
    rtt: Option<Duration>,
    proven: Option<Instant>,
    /// The peer says itself that it may be reached there.
    listed: bool,
    /// How many of its own uplinks the peer prefers to this one, as its PINGs say.
    theirs: u8,
}

#[derive(Debug, Default)]
pub(super) struct Candidates {
    list: Vec<Candidate>,
    /// Ours; the node lends them before each step.
    pub(super) uplinks: Rc<Uplinks>,
}

/// Lower is better: rank, our uplinks in their order, the peer's in its.
type Grade = (u8, usize, u8);

impl Candidates {
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn ways(&self) -> Vec<Way> {
        self.list.iter().map(|c| c.way).collect()
    }

    /// What the peer says of itself, once each.
    pub(super) fn listed(&self) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> = self.list.iter().filter(|c| c.listed).map(|c| c.way.remote).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether there is one without a NAT between, as far as an address of IPv6 can say that.
    pub(super) fn have_ipv6(&self) -> bool {
        self.list.iter().any(|c| c.listed && c.way.remote.is_ipv6() && !c.way.is_lan())
    }

    /// All ways to an address of the peer's.
    pub(super) fn learn_address(&mut self, address: SocketAddr) {
        for way in self.uplinks.ways(address) {
            self.learn(way, None);
        }
    }

    /// True for one that was not known. `keep` is never pushed out.
    pub(super) fn learn(&mut self, way: Way, keep: Option<Way>) -> bool {
        if self.list.iter().any(|c| c.way == way) {
            return false;
        }
        if self.list.len() >= WAYS_MAX {
            let worst = self.list.iter().enumerate().filter(|(_, c)| keep != Some(c.way));
            if let Some((at, _)) = worst.min_by_key(|(_, c)| (c.proven, c.listed)) {
                self.list.swap_remove(at);
            }
        }
        self.list.push(Candidate { way, rtt: None, proven: None, listed: false, theirs: 0 });
        true
    }

    /// The peer's own list: replaces what was never proven but `keep`. How many are new.
    pub(super) fn called(&mut self, list: &[SocketAddr], current: Option<Way>, keep: Option<SocketAddr>) -> usize {
        let kept = |c: &Candidate| current == Some(c.way) || keep == Some(c.way.remote) || c.proven.is_some();
        self.list.retain(|c| list.contains(&c.way.remote) || kept(c));
        let mut fresh = 0;
        for address in list {
            for way in self.uplinks.ways(*address) {
                fresh += usize::from(self.learn(way, current));
            }
        }
        self.list.iter_mut().for_each(|c| c.listed = list.contains(&c.way.remote));
        fresh
    }

    /// Our uplinks are others now.
    pub(super) fn relink(&mut self) {
        let known: Vec<(SocketAddr, bool)> = self.list.iter().map(|c| (c.way.remote, c.listed)).collect();
        let uplinks = Rc::clone(&self.uplinks);
        self.list.retain(|c| uplinks.ways(c.way.remote).contains(&c.way));
        for (remote, listed) in known {
            self.learn_address(remote);
            self.list.iter_mut().filter(|c| c.way.remote == remote).for_each(|c| c.listed = listed);
        }
    }

    pub(super) fn prove(&mut self, now: Instant, way: Way, rtt: Option<Duration>) {
        self.learn(way, None);
        if let Some(c) = self.list.iter_mut().find(|c| c.way == way) {
            c.proven = Some(now);
            if let Some(rtt) = rtt {
                c.rtt = Some(c.rtt.map_or(rtt, |old| if rtt < old { rtt } else { (old * 7 + rtt) / 8 }));
            }
        }
    }

    /// The peer has come by this way, which it prefers so much.
    pub(super) fn prefer(&mut self, way: Way, theirs: u8) {
        self.list.iter_mut().filter(|c| c.way == way).for_each(|c| c.theirs = theirs);
    }

    /// Nothing comes by this one any more.
    pub(super) fn disprove(&mut self, way: Way) {
        self.list.iter_mut().filter(|c| c.way == way).for_each(|c| c.proven = None);
    }

    pub(super) fn proven_since(&self, now: Instant, way: Way, most: Duration) -> bool {
        self.list.iter().any(|c| c.way == way && c.proven.is_some_and(|at| now < at + most))
    }

    fn grade(&self, c: &Candidate) -> Grade {
        (c.way.rank(), self.uplinks.preference(c.way), c.theirs)
    }

    fn proven(&self, now: Instant) -> impl Iterator<Item = &Candidate> {
        self.list.iter().filter(move |c| c.proven.is_some_and(|at| now < at + PROOF))
    }

    /// The best of those that are proven now, but for `dead`.
    pub(super) fn best(&self, now: Instant, dead: Option<Way>) -> Option<Way> {
        let key = |c: &&Candidate| (self.grade(c), c.rtt.unwrap_or(PROOF));
        self.proven(now).filter(|c| dead != Some(c.way)).min_by_key(key).map(|c| c.way)
    }

    /// Whether `one`, which is proven, is worth to give up `other` for; `settled`: so it is for being faster alone. Of two
    /// ports of one host neither is faster: their round trips differ by the queue of the moment.
    pub(super) fn beats(&self, now: Instant, one: Way, other: Way, settled: bool) -> bool {
        let is_same = (one.remote.ip(), one.local) == (other.remote.ip(), other.local);
        let find = |way: Way| self.list.iter().find(move |c| c.way == way);
        let (Some(one), Some(old)) = (find(one), find(other)) else { return true };
        let rtt = old.rtt.filter(|_| old.proven.is_some_and(|at| now < at + PROOF));
        let may = settled && !is_same;
        let faster = rtt.is_none_or(|rtt| may && one.rtt.unwrap_or(PROOF) + BETTER.max(rtt / 10) < rtt);
        self.grade(one) < self.grade(old) || self.grade(one) == self.grade(old) && faster
    }

    /// (whether one of a better rank, whether one by a preferred uplink) may be there beside this one.
    pub(super) fn above(&self, way: Way) -> (bool, bool) {
        let mine = (way.rank(), self.uplinks.preference(way));
        let of = |c: &Candidate| (c.way.rank(), self.uplinks.preference(c.way));
        let ranked = self.list.iter().any(|c| of(c).0 < mine.0);
        (ranked, self.list.iter().any(|c| of(c).0 == mine.0 && of(c).1 < mine.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn ms(n: u64) -> Option<Duration> {
        Some(Duration::from_millis(n))
    }

    #[test]
    fn rank_comes_before_our_uplink_before_the_peers_before_the_rtt() {
        let now = Instant::now();
        let mut c = Candidates::default();
        let mut uplinks = Uplinks::default();
        uplinks.set(["10.1.0.2", "10.2.0.2", "2a0f::2"].map(|a| a.parse().unwrap()).to_vec(), Vec::new(), false);
        c.uplinks = Rc::new(uplinks);
        let (listed, heard, v6) = (address("11.0.0.1:5"), address("11.0.0.2:5"), address("[2a0f::9]:5"));
        assert_eq!(c.called(&[listed, v6], None, None), 3);
        c.learn_address(heard);
        c.ways().into_iter().filter(|w| w.remote == heard).for_each(|w| c.prefer(w, 1));
        let worst_first = [
            Way { remote: heard, local: Some("10.2.0.2".parse().unwrap()) },
            Way { remote: listed, local: Some("10.2.0.2".parse().unwrap()) },
            Way { remote: heard, local: Some("10.1.0.2".parse().unwrap()) },
            Way { remote: listed, local: Some("10.1.0.2".parse().unwrap()) },
            v6.into(),
        ];
        for (i, way) in worst_first.into_iter().enumerate() {
            c.prove(now, way, ms(10 * (i as u64 + 1)));
            assert_eq!(c.best(now, None), Some(way));
            assert!(
                i == 0 || c.beats(now, way, worst_first[i - 1], true) && !c.beats(now, worst_first[i - 1], way, true)
            );
        }
        assert_eq!(c.above(worst_first[1]), (true, true));
        assert_eq!(c.above(worst_first[3]), (true, false));
        assert_eq!(c.above(worst_first[4]), (false, false));
        assert_eq!(c.best(now, Some(v6.into())), Some(worst_first[3]), "the dead one does not count");
        assert_eq!(c.best(now + PROOF, None), None);
    }

    #[test]
    fn among_equals_only_a_clearly_lower_rtt_counts() {
        let now = Instant::now();
        let mut c = Candidates::default();
        let [one, other, port] = [address("11.0.0.1:5"), address("11.0.0.2:5"), address("11.0.0.1:6")];
        c.called(&[one, other, port], None, None);
        c.prove(now, one.into(), ms(20));
        c.prove(now, port.into(), ms(1));
        assert!(!c.beats(now, port.into(), one.into(), true), "the same host");
        assert!(c.beats(now + PROOF, port.into(), one.into(), true), "but it is not known to be there any more");
        c.prove(now, other.into(), ms(16));
        assert!(!c.beats(now, other.into(), one.into(), true));
        c.prove(now, other.into(), ms(14));
        assert!(c.beats(now, other.into(), one.into(), true));
        assert!(!c.beats(now, other.into(), one.into(), false), "one was chosen just now");
    }

    #[test]
    fn a_new_list_replaces_what_never_answered_and_a_lost_uplink_its_ways() {
        let now = Instant::now();
        let mut c = Candidates::default();
        let mut uplinks = Uplinks::default();
        let both = ["10.1.0.2", "10.2.0.2"].map(|a| a.parse().unwrap()).to_vec();
        uplinks.set(both.clone(), Vec::new(), false);
        c.uplinks = Rc::new(uplinks.clone());
        let [one, two, three] = [address("11.0.0.1:5"), address("11.0.0.2:5"), address("11.0.0.3:5")];
        c.called(&[one, two], None, None);
        c.prove(now, Way { remote: one, local: Some(both[1]) }, ms(5));
        assert_eq!(c.called(&[three], None, None), 2);
        assert_eq!(c.len(), 3, "{c:?}");

        uplinks.set(both[1..].to_vec(), Vec::new(), false);
        c.uplinks = Rc::new(uplinks);
        c.relink();
        assert!(c.ways().iter().all(|w| w.local == Some(both[1])), "{c:?}");
        assert_eq!(c.best(now, None), Some(Way { remote: one, local: Some(both[1]) }));
    }

    #[test]
    fn a_flood_of_sources_pushes_out_none_that_is_in_use() {
        let mut c = Candidates::default();
        let mine: Way = address("11.0.0.1:5").into();
        c.learn(mine, None);
        for port in 1..1000 {
            c.learn(SocketAddr::new("11.0.0.2".parse().unwrap(), port).into(), Some(mine));
        }
        assert_eq!(c.len(), WAYS_MAX);
        assert!(c.ways().contains(&mine));
    }
}
