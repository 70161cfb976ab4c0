//! Which endpoint a connection goes to: nearness, policy, affinity.

use super::{
    Table,
    model::{Affinity, Name, Protocol, Service, ServiceId, ServicePort},
    packed::{About, EndpointRef},
};
use crate::config::Policy;
use crate::sorted::Set;
use lru::LruCache;
use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Clients whose endpoint is remembered; when full the one that was seen longest ago may get another endpoint.
const AFFINITIES_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Service ports whose turn is remembered; when full the one that was asked longest ago starts anew anywhere.
const CURSORS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// For the policy `sticky` where the Service itself asks for no affinity (the default of Kubernetes' ClientIPConfig).
const STICKY_TIMEOUT: Duration = Duration::from_secs(10_800);

/// Who we are, for nearness and for what is ours.
#[derive(Clone, Debug, Default)]
pub struct Here {
    pub node: Name,
    /// Names of the peers of our own `[node] network` are dialled directly; empty: none.
    pub network: Name,
    /// Empty: that of our Node object.
    pub zone: Name,
    /// The other nodes of our own, not empty network: dialled from here and not through the tunnel.
    pub neighbours: Set<Name>,
}

/// A kind of nearness, for `[balancer] prefer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// On this node.
    Node,
    /// In our zone, or on a node of our network.
    Zone,
    /// Wherever it is.
    Any,
}

/// One connection that wants an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The original destination: VIP and port.
    pub destination: SocketAddr,
    pub protocol: Protocol,
    pub client: IpAddr,
    /// Endpoints that this connection has tried in vain.
    pub tried: &'a [SocketAddr],
}

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Dialled from here: our own endpoint, one of our network, or one without a node.
    Local(SocketAddr),
    /// Through the tunnel: the far node connects to its own endpoint.
    Remote { node: Name, service: ServiceId, port: u16, address: SocketAddr },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTarget {
    /// No Service has this address and port.
    NotAService,
    /// It has no endpoint that serves (or all were tried).
    NoEndpoint,
}

type PortId = (ServiceId, u16, Protocol);

#[derive(Debug)]
struct Stuck {
    address: SocketAddr,
    used: Instant,
}

/// The balancer's own state: cursors and affinities. Owned by the proxy.
#[derive(Debug)]
pub struct Balancer {
    pub policy: Policy,
    /// The nearest kind that has an endpoint is used; `Any` is always the last. Only `[Any]` is the even spread over
    /// all endpoints that kube-proxy does.
    pub prefer: Vec<Nearness>,
    rng: fastrand::Rng,
    cursors: LruCache<PortId, usize>,
    affinities: LruCache<(IpAddr, PortId), Stuck>,
}

impl Balancer {
    #[must_use]
    pub fn new(policy: Policy, rng: fastrand::Rng) -> Self {
        Self {
            policy,
            prefer: vec![Nearness::Node, Nearness::Zone, Nearness::Any],
            rng,
            cursors: LruCache::sparse(CURSORS_MAX),
            affinities: LruCache::sparse(AFFINITIES_MAX),
        }
    }

    /// The next in turn of `n` for a Service's port. The first is any, lest all nodes begin with the same endpoint.
    fn turn(&mut self, port: &PortId, n: usize) -> usize {
        let Self { policy, rng, cursors, .. } = self;
        match policy {
            Policy::Random => rng.usize(..n),
            Policy::RoundRobin | Policy::Sticky => match cursors.get_mut(port) {
                Some(cursor) => {
                    *cursor = cursor.wrapping_add(1);
                    *cursor % n
                }
                None => {
                    let first = rng.usize(..n);
                    cursors.put(port.clone(), first);
                    first
                }
            },
        }
    }

    fn timeout(&self, service: &Service) -> Option<Duration> {
        match (service.affinity, self.policy) {
            (Affinity::ClientIp { timeout }, _) => Some(timeout),
            (Affinity::None, Policy::Sticky) => Some(STICKY_TIMEOUT),
            (Affinity::None, Policy::RoundRobin | Policy::Random) => None,
        }
    }
}

/// Where an endpoint is, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'t> {
    Here,
    /// Elsewhere, but dialled from here.
    Direct,
    Far(&'t Name),
}

#[derive(Clone, Copy, Debug)]
struct Candidate<'t> {
    address: SocketAddr,
    /// Terminating and still serving: used only where there is none that is ready.
    last_resort: bool,
    /// Smaller is nearer: the place in `prefer`.
    distance: usize,
    place: Place<'t>,
}

impl Table {
    /// Picks an endpoint for a connection.
    ///
    /// # Errors
    /// When no Service has the address, or none of its endpoints is left.
    pub fn route(&self, here: &Here, ask: Ask<'_>, balancer: &mut Balancer, now: Instant) -> Result<Target, NoTarget> {
        let (service, port) = self.asked(&ask).ok_or(NoTarget::NotAService)?;
        let mut candidates = self.candidates(here, &ask, service, port, &balancer.prefer);
        let last_resort = candidates.iter().all(|c| c.last_resort);
        candidates.retain(|c| c.last_resort == last_resort);
        let id = (service.id.clone(), port.number, port.protocol);
        let timeout = balancer.timeout(service);
        let key = (ask.client, id);
        let stuck = timeout.and_then(|timeout| {
            let stuck = balancer.affinities.get(&key).filter(|s| now.saturating_duration_since(s.used) <= timeout)?;
            candidates.iter().find(|c| c.address == stuck.address).copied()
        });
        let picked = match stuck {
            Some(stuck) => stuck,
            None => {
                let nearest = candidates.iter().map(|c| c.distance).min().ok_or(NoTarget::NoEndpoint)?;
                candidates.retain(|c| c.distance == nearest);
                candidates.sort_unstable_by_key(|c| c.address);
                candidates.dedup_by_key(|c| c.address);
                candidates[balancer.turn(&key.1, candidates.len())]
            }
        };
        if timeout.is_some() {
            balancer.affinities.put(key, Stuck { address: picked.address, used: now });
        }
        let Candidate { address, place, .. } = picked;
        Ok(match place {
            Place::Here | Place::Direct => Target::Local(address),
            Place::Far(node) => {
                Target::Remote { node: node.clone(), service: service.id.clone(), port: port.number, address }
            }
        })
    }

    /// The far end's check of a peer's wish: the endpoint belongs to that port of the Service and is on this node, or
    /// it has no node and its address is one of this node's. A peer is not an open proxy.
    #[must_use]
    pub fn owns(&self, here: &Here, id: &ServiceId, port: u16, protocol: Protocol, endpoint: SocketAddr) -> bool {
        let Some(service) = self.service_by_id(id).filter(|s| !s.not_proxied) else { return false };
        let Some(port) = service.ports.iter().find(|p| p.number == port && p.protocol == protocol) else {
            return false;
        };
        self.endpoints(id).any(|(slice, e)| {
            e.address == endpoint.ip()
                && Self::target_port(slice, &port.name, protocol) == Some(endpoint.port())
                && self.place(here, e) == Place::Here
        })
    }

    /// External addresses may be shared by Services with different ports; what is no Service's is a node's.
    fn asked(&self, ask: &Ask<'_>) -> Option<(&Service, &ServicePort)> {
        let address = ask.destination.ip();
        if self.by_vip(address).is_none() {
            return self.by_node_port(ask.destination.port(), ask.protocol);
        }
        self.all_by_vip(address)
            .filter(|s| !s.not_proxied)
            .filter_map(|s| {
                let wanted = |p: &&ServicePort| p.number == ask.destination.port() && p.protocol == ask.protocol;
                Some((s, s.ports.iter().find(wanted)?))
            })
            .min_by_key(|(s, _)| (!s.vips.contains(&address), &s.id))
    }

    fn candidates<'t>(
        &'t self,
        here: &Here,
        ask: &Ask<'_>,
        service: &'t Service,
        port: &ServicePort,
        prefer: &[Nearness],
    ) -> Vec<Candidate<'t>> {
        let zone = self.own_zone(here);
        // internalTrafficPolicy is about the virtual addresses, the external one about the others, and about who asks
        // from elsewhere: this host is its own client at an address of its own.
        let to = ask.destination.ip();
        let external = || service.external_local && ask.client != to;
        let local_only = if service.vips.contains(&to) { service.local_only } else { external() };
        let distance = |endpoint: EndpointRef<'_>, place| {
            let near = |nearness: &Nearness| match nearness {
                Nearness::Node => place == Place::Here,
                Nearness::Zone => match place {
                    Place::Here => true,
                    Place::Direct if endpoint.node.is_some() => true,
                    Place::Direct | Place::Far(_) => zone.is_some() && self.zone_of(endpoint.about()) == zone,
                },
                Nearness::Any => true,
            };
            prefer.iter().position(near).unwrap_or(prefer.len())
        };
        self.endpoints(&service.id)
            .filter(|(_, e)| e.ready || (e.serving && e.terminating))
            .filter(|(_, e)| e.address.is_ipv4() == ask.destination.is_ipv4())
            .filter_map(|(slice, e)| {
                let number = Self::target_port(slice, &port.name, port.protocol)?;
                let place = self.place(here, e);
                Some(Candidate {
                    address: SocketAddr::new(e.address, number),
                    last_resort: !e.ready,
                    distance: distance(e, place),
                    place,
                })
            })
            .filter(|c| !ask.tried.contains(&c.address) && (!local_only || c.place == Place::Here))
            .collect()
    }

    /// Sites behind NATs often have the same private addresses, so an endpoint without a node is another node's only
    /// where exactly one node has its address.
    fn place<'t>(&'t self, here: &Here, endpoint: EndpointRef<'t>) -> Place<'t> {
        let node = match (&endpoint.about().node, self.nodes_with(endpoint.address)) {
            (Some(node), _) | (None, [node]) => node,
            (None, several) if several.contains(&here.node) => return Place::Here,
            (None, _) => return Place::Direct,
        };
        if *node == here.node {
            Place::Here
        } else if !here.network.is_empty() && here.neighbours.contains(node) {
            Place::Direct
        } else {
            Place::Far(node)
        }
    }

    /// How near an endpoint is, for the order of DNS answers.
    #[must_use]
    pub fn nearness(&self, here: &Here, endpoint: EndpointRef<'_>) -> Nearness {
        match self.place(here, endpoint) {
            Place::Here => Nearness::Node,
            Place::Direct if endpoint.node.is_some() => Nearness::Zone,
            Place::Direct | Place::Far(_) => match self.own_zone(here) {
                Some(zone) if self.zone_of(endpoint.about()) == Some(zone) => Nearness::Zone,
                Some(_) | None => Nearness::Any,
            },
        }
    }

    fn own_zone<'t>(&'t self, here: &'t Here) -> Option<&'t str> {
        match &*here.zone {
            "" => self.node(&here.node).and_then(|n| n.zone.as_deref()),
            zone => Some(zone),
        }
    }

    fn zone_of<'t>(&'t self, endpoint: &'t About) -> Option<&'t str> {
        let of_node = || self.node(endpoint.node.as_ref()?)?.zone.as_deref();
        endpoint.zone.as_deref().or_else(of_node)
    }
}

#[cfg(test)]
mod tests;
