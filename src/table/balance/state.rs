//! What the balancer remembers: turns, affinities, live connections, and endpoints that fail.

use super::{Ask, Candidate, Nearness, PortId};
use crate::table::{
    model::{Affinity, Protocol, Service},
    rule::{Choice, Outlier, Traffic, bytes_of, hash},
};
use crate::{config::Policy, sorted::Set};
use lru::LruCache;
use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Clients whose endpoint is remembered; when full the one that was seen longest ago may get another endpoint.
pub(super) const AFFINITIES_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Service ports that are remembered; when full the one that was asked longest ago starts anew anywhere.
const PORTS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Endpoints of all ports that are remembered; when full the port that was asked longest ago is forgotten.
const ENDPOINTS_MAX: usize = 8_192;

/// For the policy `sticky` where the Service itself asks for no affinity (the default of Kubernetes' ClientIPConfig).
const STICKY_TIMEOUT: Duration = Duration::from_secs(10_800);

/// The longest that an endpoint is left out, and the time after which its earlier failures are forgotten.
const EJECTED_MAX: Duration = Duration::from_secs(300);

/// For the one connection that tries an endpoint whose time is over: the others stay away meanwhile.
const TRIAL: Duration = Duration::from_secs(10);

/// Of endpoints that no rule speaks of: an edge's endpoints fail for long, and nobody may be there to take them out.
pub const OUTLIER: Outlier = Outlier { failures: 3, base: Duration::from_secs(10), percent: 50 };

#[derive(Debug)]
pub(super) struct Stuck {
    address: SocketAddr,
    used: Instant,
}

/// One endpoint, as one Service's port has fared with it.
#[derive(Clone, Debug)]
struct Endpoint {
    address: SocketAddr,
    live: u32,
    connections: u32,
    failed: u32,
    /// In a row.
    failures: u32,
    ejections: u32,
    /// Left out until then, or when its last time was over.
    until: Option<Instant>,
    is_out: bool,
    /// Out, and tried again.
    on_trial: bool,
}

#[derive(Debug, Default)]
struct Port {
    cursor: usize,
    /// How many endpoints there were to choose from.
    of: usize,
    live: u32,
    /// By their addresses.
    endpoints: Vec<Endpoint>,
}

impl Port {
    fn find(&self, address: SocketAddr) -> Result<usize, usize> {
        self.endpoints.binary_search_by_key(&address, |e| e.address)
    }
}

/// How an endpoint has fared, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fared {
    pub live: u32,
    pub connections: u32,
    pub failed: u32,
    /// Left out for so long still.
    pub ejected: Option<Duration>,
    /// Left out since it takes no probes.
    pub is_silent: bool,
}

/// The balancer's own state. Owned by the proxy.
#[derive(Debug)]
pub struct Balancer {
    pub policy: Policy,
    /// The nearest kind that has an endpoint is used; `Any` is always the last. Only `[Any]` is the even spread over
    /// all endpoints that kube-proxy does.
    pub prefer: Vec<Nearness>,
    /// Where no rule speaks of it.
    pub outlier: Outlier,
    /// Endpoints that take no probes: the last to be chosen, for any port.
    pub silent: Set<SocketAddr>,
    rng: fastrand::Rng,
    ports: LruCache<PortId, Port>,
    /// In all ports.
    endpoints: usize,
    pub(super) affinities: LruCache<(IpAddr, PortId), Stuck>,
}

impl Balancer {
    #[must_use]
    pub fn new(policy: Policy, rng: fastrand::Rng) -> Self {
        Self {
            policy,
            prefer: super::PREFER.into(),
            outlier: OUTLIER,
            silent: Set::new(),
            rng,
            ports: LruCache::sparse(PORTS_MAX),
            endpoints: 0,
            affinities: LruCache::sparse(AFFINITIES_MAX),
        }
    }

    fn timeout(&self, service: &Service, traffic: Option<&Traffic>) -> Option<Duration> {
        match (service.affinity, traffic.and_then(|t| t.choice.as_ref()), self.policy) {
            (Affinity::ClientIp { timeout }, _, _) => Some(timeout),
            (Affinity::None, None, Policy::Sticky) => Some(STICKY_TIMEOUT),
            (Affinity::None, _, _) => None,
        }
    }

    fn port(&mut self, id: &PortId) -> &mut Port {
        if !self.ports.contains(id) {
            // The first turn is anybody's, lest all nodes begin with the same endpoint.
            let port = Port { cursor: self.rng.usize(..), ..Port::default() };
            let gone = self.ports.push(id.clone(), port);
            self.endpoints = self.endpoints.saturating_sub(gone.map_or(0, |(_, port)| port.endpoints.len()));
        }
        self.ports.get_or_insert_mut(id.clone(), Port::default)
    }

    /// Picks one of the candidates, which are of one Service's port. What the rule says comes
    /// with the hash of what it wants hashed.
    pub(super) fn choose<'t>(
        &mut self,
        service: &Service,
        id: &PortId,
        (traffic, key): (Option<&Traffic>, Option<u64>),
        ask: &Ask<'_>,
        mut candidates: Vec<Candidate<'t>>,
        now: Instant,
    ) -> Option<Candidate<'t>> {
        candidates.sort_unstable_by_key(|c| (c.address, c.rank));
        candidates.dedup_by_key(|c| c.address);
        let timeout = self.timeout(service, traffic);
        let choice = match traffic.and_then(|t| t.choice.clone()) {
            Some(choice) => choice,
            None => match self.policy {
                Policy::RoundRobin | Policy::Sticky => Choice::RoundRobin,
                Policy::Random => Choice::Random,
                Policy::LeastRequest => Choice::LeastRequest,
            },
        };
        for candidate in &mut candidates {
            candidate.rank.0 = self.silent.contains(&candidate.address);
        }
        let port = self.port(id);
        port.of = candidates.len();
        for candidate in &mut candidates {
            let known = port.find(candidate.address).ok().map(|at| &port.endpoints[at]);
            candidate.rank.0 |= known.is_some_and(|e| e.is_out && e.until.is_some_and(|until| until > now));
            candidate.live = known.map_or(0, |e| e.live);
        }
        candidates.retain(|c| !ask.tried.contains(&c.address));
        let best = candidates.iter().map(|c| c.rank).min()?;
        let stuck_key = (ask.client, id.clone());
        let stuck = timeout.and_then(|timeout| {
            let stuck = self.affinities.get(&stuck_key).filter(|s| now.saturating_duration_since(s.used) <= timeout)?;
            let same = |c: &&Candidate<'_>| c.address == stuck.address && (c.rank.0, c.rank.1) == (best.0, best.1);
            candidates.iter().find(same).copied()
        });
        let picked = match stuck {
            Some(stuck) => stuck,
            None => {
                candidates.retain(|c| c.rank == best);
                let n = candidates.len();
                let hashed = match choice {
                    Choice::SourceIp => Some(hash(&bytes_of(ask.client))),
                    Choice::Header(_) => key,
                    Choice::RoundRobin | Choice::Random | Choice::LeastRequest => None,
                };
                let at = match (hashed, choice) {
                    (Some(key), _) => (0..n).max_by_key(|at| weight(key, candidates[*at].address))?,
                    (None, Choice::Random) => self.rng.usize(..n),
                    (None, Choice::LeastRequest) => {
                        // Mitzenmacher: the power of two choices.
                        let one = self.rng.usize(..n);
                        let other = if n > 1 { (one + self.rng.usize(1..n)) % n } else { one };
                        if candidates[other].live < candidates[one].live { other } else { one }
                    }
                    (None, Choice::RoundRobin | Choice::SourceIp | Choice::Header(_)) => {
                        let port = self.port(id);
                        port.cursor = port.cursor.wrapping_add(1);
                        port.cursor % n
                    }
                };
                candidates[at]
            }
        };
        if timeout.is_some() {
            self.affinities.put(stuck_key, Stuck { address: picked.address, used: now });
        }
        Some(picked)
    }

    /// Whether a port has as many connections as its rule allows.
    pub(super) fn is_full(&mut self, id: &PortId, most: Option<u32>) -> bool {
        most.is_some_and(|most| self.port(id).live >= most)
    }

    /// A connection is about to be made.
    pub fn begin(&mut self, id: &PortId, address: SocketAddr, now: Instant) {
        let port = self.port(id);
        port.live = port.live.saturating_add(1);
        let before = port.endpoints.len();
        let at = port.find(address).unwrap_or_else(|_| {
            if before > 2 * port.of + 16 {
                port.endpoints.retain(|e| e.live > 0 || e.is_out);
            }
            let at = port.find(address).unwrap_or_else(|at| at);
            let new = Endpoint {
                address,
                live: 0,
                connections: 0,
                failed: 0,
                failures: 0,
                ejections: 0,
                until: None,
                is_out: false,
                on_trial: false,
            };
            port.endpoints.insert(at, new);
            at
        });
        let endpoint = &mut port.endpoints[at];
        endpoint.live = endpoint.live.saturating_add(1);
        endpoint.connections = endpoint.connections.wrapping_add(1);
        if endpoint.is_out && endpoint.until.is_none_or(|until| until <= now) {
            (endpoint.until, endpoint.on_trial) = (Some(now + TRIAL), true);
        }
        let after = port.endpoints.len();
        self.endpoints = (self.endpoints + after).saturating_sub(before);
        while self.endpoints > ENDPOINTS_MAX && self.ports.len() > 1 {
            let gone = self.ports.pop_lru();
            self.endpoints = self.endpoints.saturating_sub(gone.map_or(0, |(_, port)| port.endpoints.len()));
        }
    }

    /// The connection has ended, however it did.
    pub fn over(&mut self, id: &PortId, address: SocketAddr) {
        let Some(port) = self.ports.peek_mut(id) else { return };
        port.live = port.live.saturating_sub(1);
        if let Ok(at) = port.find(address) {
            port.endpoints[at].live = port.endpoints[at].live.saturating_sub(1);
        }
    }

    /// The endpoint has taken the connection.
    pub fn worked(&mut self, id: &PortId, address: SocketAddr) {
        let Some(port) = self.ports.peek_mut(id) else { return };
        if let Ok(at) = port.find(address) {
            let endpoint = &mut port.endpoints[at];
            (endpoint.failures, endpoint.is_out, endpoint.on_trial) = (0, false, false);
        }
    }

    /// The endpoint has not taken the connection. True where it is left out for that: after several in a row, or at once
    /// where its whole node `is_gone`, which each further try takes seconds to find out.
    pub fn failed(
        &mut self,
        id: &PortId,
        address: SocketAddr,
        traffic: Option<&Traffic>,
        is_gone: bool,
        now: Instant,
    ) -> bool {
        let Outlier { failures, base, percent } = traffic.and_then(Traffic::outlier).unwrap_or(self.outlier);
        let Some(port) = self.ports.peek_mut(id) else { return false };
        let Ok(at) = port.find(address) else { return false };
        let is_out = |e: &Endpoint| e.is_out && e.until.is_some_and(|until| until > now);
        let others = port.endpoints.iter().filter(|e| e.address != address && is_out(e)).count();
        let share = (port.of * percent as usize / 100).max(1).min(port.of.saturating_sub(1));
        let endpoint = &mut port.endpoints[at];
        endpoint.failures = endpoint.failures.saturating_add(1);
        endpoint.failed = endpoint.failed.wrapping_add(1);
        let on_trial = std::mem::take(&mut endpoint.on_trial);
        if endpoint.is_out && !on_trial {
            // Begun before it was left out.
            return false;
        }
        let enough = failures > 0 && (on_trial || is_gone || endpoint.failures >= failures);
        if !enough || others >= share {
            endpoint.is_out = false;
            return false;
        }
        if endpoint.until.is_some_and(|until| now.saturating_duration_since(until) > EJECTED_MAX) {
            endpoint.ejections = 0;
        }
        endpoint.ejections = endpoint.ejections.saturating_add(1);
        endpoint.is_out = true;
        endpoint.until = Some(now + (base * endpoint.ejections).min(EJECTED_MAX.max(base)));
        true
    }

    /// How an endpoint has fared; None: nobody has been sent to it, and no probe says it is silent.
    #[must_use]
    pub fn fared(&self, id: &PortId, address: SocketAddr, now: Instant) -> Option<Fared> {
        let is_silent = self.silent.contains(&address) && id.2 == Protocol::Tcp;
        let known = self.ports.peek(id).and_then(|p| Some(&p.endpoints[p.find(address).ok()?]));
        let Some(Endpoint { live, connections, failed, until, is_out, .. }) = known.cloned() else {
            return is_silent.then(|| Fared { is_silent, ..Fared::default() });
        };
        let left = until.filter(|_| is_out).map(|until| until.saturating_duration_since(now));
        Some(Fared { live, connections, failed, ejected: left.filter(|left| !left.is_zero()), is_silent })
    }
}

#[cfg(test)]
impl Balancer {
    /// Ports, and the endpoints of all of them: as counted along, and as they are.
    pub(super) fn held(&self) -> (usize, (usize, usize)) {
        (self.ports.len(), (self.endpoints, self.ports.iter().map(|(_, p)| p.endpoints.len()).sum()))
    }
}

/// Rendezvous hashing (Thaler and Ravishankar): the endpoint with the highest weight has the key, so that one that goes
/// moves its own keys alone, and every node comes to the same endpoint.
fn weight(key: u64, address: SocketAddr) -> u64 {
    let mut bytes = [0; 26];
    bytes[..8].copy_from_slice(&key.to_be_bytes());
    bytes[8..24].copy_from_slice(&bytes_of(address.ip()));
    bytes[24..].copy_from_slice(&address.port().to_be_bytes());
    hash(&bytes)
}
