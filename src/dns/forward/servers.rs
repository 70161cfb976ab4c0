//! The upstreams: which of them a name is asked of, in what order, and how they fare.

use crate::dns::zone::Lower;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Upstreams used of one domain; resolv.conf(5) itself allows three.
pub const UPSTREAMS_MAX: usize = 8;
/// How long an upstream that failed is asked last; doubles with each failure up to 64 s.
const DOWN_FOR: Duration = Duration::from_secs(1);
/// How long one that changed a question's letters is asked without that check.
const FOLDS_FOR: Duration = Duration::from_secs(600);
/// How long one that has asked ourselves is not asked.
const LOOPED_FOR: Duration = Duration::from_secs(300);
/// A silent upstream is tried for a loop once in this time.
const PROBE_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Upstream {
    address: SocketAddr,
    failures: u32,
    down_until: Option<Instant>,
    folds_until: Option<Instant>,
    looped_until: Option<Instant>,
    probed: Option<Instant>,
    /// The name, in wire form, that nobody but the upstream has heard from us.
    probe: Option<Box<[u8]>>,
}

impl Upstream {
    fn new(address: SocketAddr) -> Self {
        let none = None;
        Self {
            address,
            failures: 0,
            down_until: none,
            folds_until: none,
            looped_until: none,
            probed: none,
            probe: None,
        }
    }
}

fn lasts(until: Option<Instant>, now: Instant) -> bool {
    until.is_some_and(|t| now < t)
}

/// The servers of the names below a domain.
#[derive(Debug)]
struct Group {
    /// Wire form, lower case.
    domain: Box<[u8]>,
    servers: Vec<SocketAddr>,
    /// The user named some, so that having none is a failure and not a refusal.
    configured: bool,
}

/// Bounded by what the configuration may name.
#[derive(Debug, Default)]
pub(super) struct Servers {
    /// The longest domains first.
    groups: Vec<Group>,
    known: Vec<Upstream>,
}

impl Servers {
    /// Those for a domain from now on, best first; what is known of them stays known.
    pub(super) fn set(&mut self, domain: &[u8], addresses: &[SocketAddr], configured: bool) {
        let mut servers: Vec<SocketAddr> = Vec::new();
        for address in addresses {
            if !servers.contains(address) && servers.len() < UPSTREAMS_MAX {
                servers.push(*address);
            }
        }
        self.groups.retain(|g| *g.domain != *domain);
        self.groups.push(Group { domain: domain.into(), servers, configured });
        self.groups.sort_by_key(|g| std::cmp::Reverse(g.domain.len()));
        let used = |a: &SocketAddr| self.groups.iter().any(|g| g.servers.contains(a));
        self.known.retain(|u| used(&u.address));
        for address in self.groups.iter().flat_map(|g| &g.servers) {
            if !self.known.iter().any(|u| u.address == *address) {
                self.known.push(Upstream::new(*address));
            }
        }
    }

    fn group(&self, name: &[u8]) -> Option<&Group> {
        if let [all] = &self.groups[..]
            && all.domain.len() == 1
        {
            return Some(all);
        }
        let name = Lower::new(name);
        self.groups.iter().find(|g| name.below(&g.domain).is_some())
    }

    /// Those to ask for a name: working ones first, each half in the user's order; none that asks us back.
    pub(super) fn order(&self, now: Instant, name: &[u8]) -> Vec<SocketAddr> {
        let servers = self.group(name).map_or(&[][..], |g| &g.servers);
        let state = |a: &SocketAddr| self.known.iter().find(|u| u.address == *a);
        let usable = || servers.iter().filter(|a| !state(a).is_some_and(|u| lasts(u.looped_until, now)));
        let down = |a: &&SocketAddr| state(a).is_some_and(|u| lasts(u.down_until, now));
        usable().filter(|a| !down(a)).chain(usable().filter(down)).copied().collect()
    }

    /// Whether the user named servers for a name.
    pub(super) fn configured(&self, name: &[u8]) -> bool {
        self.group(name).is_some_and(|g| g.configured)
    }

    /// Whether nobody of these is known to work.
    pub(super) fn all_down(&self, now: Instant, servers: &[SocketAddr]) -> bool {
        let down = |a: &SocketAddr| self.known.iter().any(|u| u.address == *a && lasts(u.down_until, now));
        servers.iter().all(down)
    }

    fn find(&mut self, address: SocketAddr) -> Option<&mut Upstream> {
        self.known.iter_mut().find(|u| u.address == address)
    }

    pub(super) fn works(&mut self, address: SocketAddr) {
        if let Some(upstream) = self.find(address) {
            (upstream.failures, upstream.down_until) = (0, None);
        }
    }

    pub(super) fn fails(&mut self, now: Instant, address: SocketAddr) {
        if let Some(upstream) = self.find(address) {
            upstream.down_until = Some(now + DOWN_FOR * (1 << upstream.failures.min(6)));
            upstream.failures = upstream.failures.saturating_add(1);
        }
    }

    /// After a change of the links nobody's failures say anything.
    pub(super) fn forgive(&mut self) {
        for upstream in &mut self.known {
            (upstream.failures, upstream.down_until) = (0, None);
        }
    }

    /// It answered with the question's letters in another case.
    pub(super) fn folded(&mut self, now: Instant, address: SocketAddr) {
        if let Some(upstream) = self.find(address) {
            upstream.folds_until = Some(now + FOLDS_FOR);
        }
    }

    pub(super) fn folds(&self, now: Instant, address: SocketAddr) -> bool {
        self.known.iter().any(|u| u.address == address && lasts(u.folds_until, now))
    }

    /// Whether a silent upstream is to be tried for a loop.
    pub(super) fn probe_is_due(&mut self, now: Instant, address: SocketAddr) -> bool {
        let Some(upstream) = self.find(address) else { return false };
        let due = upstream.probed.is_none_or(|then| now.saturating_duration_since(then) >= PROBE_EVERY);
        if due {
            upstream.probed = Some(now);
        }
        due
    }

    pub(super) fn probe(&mut self, address: SocketAddr, name: &[u8]) {
        if let Some(upstream) = self.find(address) {
            upstream.probe = Some(name.into());
        }
    }

    /// The upstream that was asked for a name, in lower case, as a probe: then whoever asks us asks on its behalf.
    pub(super) fn loops(&mut self, now: Instant, name: &[u8]) -> Option<SocketAddr> {
        let upstream = self.known.iter_mut().find(|u| u.probe.as_deref() == Some(name))?;
        upstream.probe = None;
        upstream.looped_until = Some(now + LOOPED_FOR);
        Some(upstream.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::Clock, dns::wire::encode_name};

    #[test]
    fn the_longest_domain_decides() {
        let at = |n: u8| SocketAddr::from(([192, 0, 2, n], 53));
        let name = |text: &str| encode_name(text).unwrap();
        let now = Clock::new(0).now();
        let mut servers = Servers::default();
        servers.set(&name("corp.example"), &[at(2)], true);
        let order = |s: &Servers, n: &str| s.order(now, &name(n));
        assert_eq!((order(&servers, "a.example"), order(&servers, "a.corp.example")), (vec![], vec![at(2)]));
        servers.set(&[0], &[at(1), at(1), at(4)], false);
        servers.set(&name("lab.corp.example"), &[at(3), at(2)], true);
        for (asked, want) in [
            ("a.example", vec![at(1), at(4)]),
            ("corp.example", vec![at(2)]),
            ("xcorp.example", vec![at(1), at(4)]),
            ("a.b.corp.example", vec![at(2)]),
            ("a.lab.corp.example", vec![at(3), at(2)]),
        ] {
            assert_eq!(order(&servers, asked), want, "{asked}");
        }
        assert!(servers.configured(&name("a.corp.example")) && !servers.configured(&name("a.example")));
        servers.fails(now, at(3));
        assert_eq!(order(&servers, "lab.corp.example"), [at(2), at(3)], "what is down is asked last");
        servers.set(&[0], &[at(4)], true);
        assert_eq!(order(&servers, "lab.corp.example"), [at(2), at(3)], "and stays so");
        servers.forgive();
        assert_eq!(order(&servers, "lab.corp.example"), [at(3), at(2)]);
    }
}
