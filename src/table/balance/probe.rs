//! Which of this node's endpoints is to be tried next, and what came of it: for the time in which nobody else says how they
//! are.

use crate::sorted::Set;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Endpoints that are tried; of more those with the highest addresses are not. A node has some 110 Pods (kubelet's
/// maxPods).
pub const ENDPOINTS_MAX: usize = 1024;

/// Tries under way at once; at that many the next one waits until one of them is over.
pub const FLYING_MAX: usize = 16;

/// Tries in vain, one after the other, after which an endpoint is left out (Kubernetes API: failureThreshold of Probe).
const FAILURES: u8 = 3;

#[derive(Debug)]
struct Known {
    address: SocketAddr,
    failures: u8,
    is_flying: bool,
}

/// Without IO: the caller makes the tries that [`Probes::poll`] asks for, and tells each one's end.
#[derive(Debug)]
pub struct Probes {
    /// Each endpoint is tried once in so long.
    period: Duration,
    /// By their addresses.
    known: Vec<Known>,
    /// The next one's place.
    at: usize,
    due: Option<Instant>,
    /// Tries under way, also of endpoints that are gone.
    flying: usize,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Try(SocketAddr),
    /// None: until something else happens.
    Wait(Option<Instant>),
}

impl Probes {
    #[must_use]
    pub fn new(period: Duration) -> Self {
        Self { period, known: Vec::new(), at: 0, due: None, flying: 0 }
    }

    /// The endpoints that there are now; what is known of those that stay is kept, and of the others forgotten.
    pub fn watch(&mut self, endpoints: &Set<SocketAddr>, now: Instant) {
        let mut known = Vec::new();
        for address in endpoints.iter().take(ENDPOINTS_MAX) {
            let before = self.known.iter().position(|k| k.address == *address).map(|at| self.known.swap_remove(at));
            known.push(before.unwrap_or(Known { address: *address, failures: 0, is_flying: false }));
        }
        self.known = known;
        self.at = self.at.min(self.known.len());
        let gap = self.gap();
        self.due = (!self.known.is_empty()).then(|| self.due.map_or(now, |due| due.min(now + gap)));
    }

    /// Nobody is to be tried, and nobody is left out.
    pub fn rest(&mut self) {
        (self.known, self.due) = (Vec::new(), None);
    }

    /// Between two tries, so that all are tried in a period.
    fn gap(&self) -> Duration {
        self.period / u32::try_from(self.known.len().max(1)).unwrap_or(u32::MAX)
    }

    /// The next try that is due. To be asked again after each one, and after each end of one.
    pub fn poll(&mut self, now: Instant) -> Next {
        let Some(due) = self.due else { return Next::Wait(None) };
        if self.flying >= FLYING_MAX {
            return Next::Wait(None);
        }
        if due > now {
            return Next::Wait(Some(due));
        }
        // What was late is not made up for: the tries stay spread.
        self.due = Some((due + self.gap()).max(now));
        for _ in 0..self.known.len() {
            self.at = if self.at < self.known.len() { self.at } else { 0 };
            let one = &mut self.known[self.at];
            self.at += 1;
            if !std::mem::replace(&mut one.is_flying, true) {
                self.flying += 1;
                return Next::Try(one.address);
            }
        }
        // All are under way.
        self.due = Some(now + self.gap());
        Next::Wait(self.due)
    }

    /// A try is over; `good`: whether the endpoint took the connection; None: it was not for its sake that it failed.
    /// True where the endpoint is left out from now on, or is no longer.
    pub fn over(&mut self, address: SocketAddr, good: Option<bool>) -> bool {
        self.flying = self.flying.saturating_sub(1);
        let Ok(at) = self.known.binary_search_by_key(&address, |k| k.address) else { return false };
        let one = &mut self.known[at];
        one.is_flying = false;
        let was_out = one.failures >= FAILURES;
        match good {
            Some(true) => one.failures = 0,
            Some(false) => one.failures = one.failures.saturating_add(1).min(FAILURES),
            None => {}
        }
        was_out != (one.failures >= FAILURES)
    }

    /// The endpoints that are left out.
    #[must_use]
    pub fn out(&self) -> Set<SocketAddr> {
        self.known.iter().filter(|k| k.failures >= FAILURES).map(|k| k.address).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const PERIOD: Duration = Duration::from_secs(10);

    fn address(n: u16) -> SocketAddr {
        ([10, 0, 0, 1], n).into()
    }

    fn addresses(count: u16) -> Set<SocketAddr> {
        (1..=count).map(address).collect()
    }

    /// A node's endpoints, each of which answers or not, after some time.
    struct World {
        probes: Probes,
        now: Instant,
        end: Instant,
        bad: Set<SocketAddr>,
        takes: Duration,
        flying: Vec<(Instant, SocketAddr)>,
        /// When each was tried.
        tried: BTreeMap<SocketAddr, Vec<Instant>>,
        most: usize,
    }

    impl World {
        fn new(count: u16) -> Self {
            let now = Instant::now();
            let mut probes = Probes::new(PERIOD);
            probes.watch(&addresses(count), now);
            let (bad, takes) = (Set::new(), Duration::from_millis(5));
            Self { probes, now, end: now, bad, takes, flying: Vec::new(), tried: BTreeMap::new(), most: 0 }
        }

        fn run(&mut self, secs: u64) {
            self.end += Duration::from_secs(secs);
            while self.now < self.end {
                let wake = loop {
                    match self.probes.poll(self.now) {
                        Next::Try(who) => {
                            self.tried.entry(who).or_default().push(self.now);
                            self.flying.push((self.now + self.takes, who));
                            self.most = self.most.max(self.flying.len());
                        }
                        Next::Wait(at) => break at.unwrap_or(self.end),
                    }
                };
                let over = self.flying.iter().map(|(at, _)| *at).min().unwrap_or(self.end);
                self.now = wake.min(over).min(self.end);
                for (_, who) in self.flying.extract_if(.., |(at, _)| *at <= self.now) {
                    self.probes.over(who, Some(!self.bad.contains(&who)));
                }
            }
        }

        fn out(&self) -> Vec<u16> {
            self.probes.out().iter().map(SocketAddr::port).collect()
        }
    }

    #[test]
    fn each_has_its_turn_and_they_are_spread_over_the_period() {
        let mut world = World::new(20);
        world.run(100);
        let mut all: Vec<Instant> = Vec::new();
        for (who, times) in &world.tried {
            assert!((9..=11).contains(&times.len()), "{who}: {} tries in 10 periods", times.len());
            all.extend(times);
        }
        assert_eq!((world.tried.len(), world.out()), (20, vec![]));
        all.sort();
        let gaps = all.windows(2).map(|w| w[1] - w[0]);
        assert!(gaps.clone().all(|gap| gap >= PERIOD / 21), "{:?}", gaps.min());
        assert_eq!(world.most, 1);
    }

    #[test]
    fn three_failures_put_one_out_and_one_success_back() {
        let mut world = World::new(3);
        world.bad = [address(2)].into();
        world.run(24);
        let begun = world.tried[&address(2)].len();
        assert_eq!((begun, world.out()), (3, vec![2]));
        world.run(100);
        assert_eq!(world.out(), [2], "it is tried all the while, and stays out");
        assert!(world.tried[&address(2)].len() >= begun + 9);
        world.bad = Set::new();
        world.run(10);
        assert_eq!(world.out(), [] as [u16; 0]);
        // Two failures, then a success: nothing.
        world.bad = [address(1)].into();
        world.run(20);
        world.bad = Set::new();
        world.run(10);
        world.bad = [address(1)].into();
        world.run(20);
        assert_eq!(world.out(), [] as [u16; 0]);
    }

    #[test]
    fn what_is_not_the_endpoints_fault_says_nothing() {
        let now = Instant::now();
        let mut probes = Probes::new(PERIOD);
        probes.watch(&addresses(1), now);
        for n in 0..10 {
            assert_eq!(probes.poll(now + n * PERIOD), Next::Try(address(1)));
            let good = if n < 3 { Some(false) } else { None };
            assert_eq!(probes.over(address(1), good), n == 2);
        }
        assert_eq!(probes.out().len(), 1);
        assert_eq!(probes.poll(now + 20 * PERIOD), Next::Try(address(1)));
        assert!(probes.over(address(1), Some(true)));
    }

    #[test]
    fn many_that_are_silent_hold_no_more_than_the_bound() {
        let mut world = World::new(500);
        world.takes = Duration::from_secs(1);
        world.bad = addresses(500);
        world.run(200);
        assert_eq!(world.most, FLYING_MAX);
        assert_eq!(world.out().len(), 500, "slower, but all have their turn");
        let mut world = World::new(2);
        world.takes = 3 * PERIOD;
        world.run(120);
        assert_eq!(world.most, 2, "none is tried twice at once");
        let mut probes = Probes::new(PERIOD);
        probes.watch(&addresses(5000), world.now);
        assert_eq!(probes.known.len(), ENDPOINTS_MAX);
    }

    #[test]
    fn endpoints_come_and_go() {
        let mut world = World::new(4);
        world.bad = [address(2), address(4)].into();
        world.run(40);
        assert_eq!(world.out(), [2, 4]);
        // The kept one stays out, and one under way that is gone is no other's business.
        let Next::Try(gone) = world.probes.poll(world.now + PERIOD) else { panic!("one is due") };
        world.probes.watch(&[address(2), address(9)].into(), world.now);
        assert_eq!(world.out(), [2]);
        world.probes.over(gone, Some(false));
        world.run(30);
        assert_eq!(world.out(), [2]);
        assert!(world.tried.contains_key(&address(9)));
        // Somebody tells how they are: all are forgotten, and begin anew.
        world.probes.rest();
        let before = world.tried.values().map(Vec::len).sum::<usize>();
        world.run(60);
        assert_eq!((world.out(), world.tried.values().map(Vec::len).sum::<usize>()), (vec![], before));
        world.probes.watch(&addresses(2), world.now);
        world.run(5);
        assert_eq!(world.out(), [] as [u16; 0]);
        world.run(25);
        assert_eq!(world.out(), [2]);
        // A table that changes all the time starves nobody.
        let mut world = World::new(10);
        for n in 0..200 {
            world.probes.watch(&addresses(10 + n % 2), world.now);
            world.run(1);
        }
        assert!((1..=10).all(|n| world.tried[&address(n)].len() >= 15), "{:?}", world.tried);
    }
}
