//! Which endpoint a connection goes to: nearness, policy, affinity.

pub mod probe;
mod state;

use super::{
    Table,
    model::{Affinity, Name, Protocol, Service, ServiceId, ServiceKind, ServicePort},
    packed::{About, EndpointRef},
    rule::{Choice, Number, Traffic},
};
use crate::sorted::Set;
pub use state::{Balancer, Fared, OUTLIER};
use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::Instant,
};

/// Who we are, for nearness and for what is ours.
#[derive(Clone, Debug, Default)]
pub struct Here {
    pub node: Name,
    /// Names of the peers of our own `[node] network` are dialled directly; empty: none.
    pub network: Name,
    /// Empty: that of our Node object.
    pub zone: Name,
    /// The other nodes of our own, not empty network: dialled from here and not through the tunnel.
    pub neighbours: Nodes,
    /// As near as those of our zone.
    pub on_link: OnLink,
    /// Whether we open the neighbours' endpoints for peers.
    pub is_egress: bool,
    /// Nodes whose endpoints another one opens.
    pub egress: Vec<(Nodes, Name)>,
}

/// Nodes by their names; a name that ends with `*` stands for all that begin so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes(Vec<Name>);

impl<S: Into<Name>> FromIterator<S> for Nodes {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self(names.into_iter().map(Into::into).collect())
    }
}

impl Nodes {
    #[must_use]
    pub fn has(&self, node: &str) -> bool {
        self.0.iter().any(|name| match name.strip_suffix('*') {
            Some(front) => node.starts_with(front),
            None => **name == *node,
        })
    }
}

/// Nodes on a LAN of ours, as the tunnel finds them; all clones show the same.
#[derive(Clone, Debug, Default)]
pub struct OnLink(Rc<RefCell<Set<Name>>>);

impl OnLink {
    pub fn set(&self, names: &[String]) {
        *self.0.borrow_mut() = names.iter().map(|name| name.as_str().into()).collect();
    }

    #[must_use]
    pub fn has(&self, node: &str) -> bool {
        self.0.borrow().contains(node)
    }
}

/// A kind of nearness, for `[balancer] prefer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// On this node.
    Node,
    /// On a node of our network, or here.
    Network,
    /// In our zone, or on a node of our network or our LAN.
    Zone,
    /// Wherever it is.
    Any,
}

/// The order that is usual.
pub const PREFER: [Nearness; 3] = [Nearness::Node, Nearness::Zone, Nearness::Any];

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

impl Target {
    /// The endpoint's.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let (Self::Local(address) | Self::Remote { address, .. }) = self;
        *address
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTarget {
    /// No Service has this address and port.
    NotAService,
    /// It has no endpoint that serves (or all were tried).
    NoEndpoint,
    /// It has as many connections as its rule allows.
    Full,
}

/// A Service and its port.
pub type PortId = (ServiceId, u16, Protocol);

/// An endpoint that was picked, and what its Service's rule says of the connection.
#[derive(Clone, Debug)]
pub struct Pick {
    pub target: Target,
    pub port: PortId,
    pub traffic: Option<Rc<Traffic>>,
    /// There are others that have not been tried.
    pub has_others: bool,
}

/// Where an endpoint is, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'t> {
    Here,
    /// Elsewhere, but dialled from here.
    Direct,
    Far(&'t Name),
}

/// Smaller is better: whether it is left out for its failures; whether it is terminating, and so a last resort; whether
/// hints mean others; and its place in `prefer`.
type Rank = (bool, bool, bool, usize);

#[derive(Clone, Copy, Debug)]
struct Candidate<'t> {
    address: SocketAddr,
    rank: Rank,
    /// Connections that it has from here.
    live: u32,
    place: Place<'t>,
}

impl Table {
    /// Picks an endpoint for a connection or a UDP session; `key` is a hash of the header that [`Table::wants_header`]
    /// names. Who makes the connection tells the balancer how it goes.
    ///
    /// # Errors
    /// When no Service has the address, none of its endpoints is left, or its rule allows no more TCP connections.
    pub fn pick(
        &self,
        here: &Here,
        ask: Ask<'_>,
        key: Option<u64>,
        balancer: &mut Balancer,
        now: Instant,
    ) -> Result<Pick, NoTarget> {
        let (service, port) = self.asked(&ask).ok_or(NoTarget::NotAService)?;
        let candidates = self.candidates(here, &ask, service, port, &balancer.prefer);
        let id = (service.id.clone(), port.number, port.protocol);
        let traffic = self.traffic(&service.id, port);
        let counts = ask.protocol == Protocol::Tcp && ask.tried.is_empty();
        if counts && balancer.is_full(&id, traffic.and_then(|t| t.number(Number::Connections))) {
            return Err(NoTarget::Full);
        }
        let rule = traffic.map(Rc::as_ref);
        let first = candidates.iter().map(|c| c.address).find(|a| !ask.tried.contains(a));
        let has_others = candidates.iter().any(|c| Some(c.address) != first && !ask.tried.contains(&c.address));
        let picked = balancer.choose(service, &id, (rule, key), &ask, candidates, now).ok_or(NoTarget::NoEndpoint)?;
        let Candidate { address, place, .. } = picked;
        let target = match place {
            Place::Here | Place::Direct => Target::Local(address),
            Place::Far(node) => {
                Target::Remote { node: node.clone(), service: service.id.clone(), port: port.number, address }
            }
        };
        Ok(Pick { target, port: id, traffic: traffic.cloned(), has_others })
    }

    /// The header by which the rule of what is asked for chooses; the Service's own affinity has precedence.
    #[must_use]
    pub fn wants_header(&self, ask: &Ask<'_>) -> Option<Name> {
        let (service, port) = self.asked(ask).filter(|(s, _)| s.affinity == Affinity::None)?;
        match &self.traffic(&service.id, port)?.choice {
            Some(Choice::Header(name)) => Some(name.clone()),
            Some(Choice::RoundRobin | Choice::Random | Choice::LeastRequest | Choice::SourceIp) | None => None,
        }
    }

    /// The far end's check of a peer's wish: the endpoint belongs to that port of the Service and is on this node, or
    /// it has no node and its address is one of this node's; an egress opens those of its neighbours too. A peer is not
    /// an open proxy.
    #[must_use]
    pub fn owns(&self, here: &Here, id: &ServiceId, port: u16, protocol: Protocol, endpoint: SocketAddr) -> bool {
        let Some(service) = self.service_by_id(id).filter(|s| !s.not_proxied) else { return false };
        let Some(port) = service.ports.iter().find(|p| p.number == port && p.protocol == protocol) else {
            return false;
        };
        self.endpoints(id).any(|(slice, e)| {
            e.address == endpoint.ip()
                && Self::target_port(slice, &port.name, protocol) == Some(endpoint.port())
                && match self.place(here, e) {
                    Place::Here => true,
                    Place::Direct => here.is_egress && e.about().node.is_some(),
                    Place::Far(_) => false,
                }
        })
    }

    /// This node's endpoints of TCP that clients are sent to.
    #[must_use]
    pub fn own_endpoints(&self, here: &Here) -> Set<SocketAddr> {
        let mut own = Vec::new();
        for service in self.services().filter(|s| s.kind == ServiceKind::ClusterIp && !s.not_proxied) {
            for (slice, e) in self.endpoints(&service.id).filter(|(_, e)| e.ready || (e.serving && e.terminating)) {
                if self.place(here, e) == Place::Here {
                    let ports = service.ports.iter().filter(|p| p.protocol == Protocol::Tcp);
                    let numbers = ports.filter_map(|p| Self::target_port(slice, &p.name, p.protocol));
                    own.extend(numbers.map(|number| SocketAddr::new(e.address, number)));
                }
            }
        }
        own.into_iter().collect()
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
        here: &'t Here,
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
                Nearness::Network => place == Place::Here || (place == Place::Direct && endpoint.node.is_some()),
                Nearness::Zone => self.is_zonal(here, zone, endpoint, place),
                Nearness::Any => true,
            };
            prefer.iter().position(near).unwrap_or(prefer.len())
        };
        let of_family = self.endpoints(&service.id).filter(|(_, e)| e.address.is_ipv4() == ask.destination.is_ipv4());
        let serving = of_family.filter(|(_, e)| e.ready || (e.serving && e.terminating));
        let mut found = Vec::new();
        let (mut by_node, mut by_zone) = ((true, false), (true, false));
        for (slice, e) in serving {
            let Some(number) = Self::target_port(slice, &port.name, port.protocol) else { continue };
            let place = self.place(here, e);
            if local_only && place != Place::Here {
                continue;
            }
            let has = |names: &[Name], own: &str| names.iter().any(|n| **n == *own);
            let (nodes, zones) = e.about().hints.as_ref().map_or((&[][..], &[][..]), |h| (&*h.nodes, &*h.zones));
            let ours = (has(nodes, &here.node), zone.is_some_and(|zone| has(zones, zone)));
            if e.ready {
                by_node = (by_node.0 && !nodes.is_empty(), by_node.1 || ours.0);
                by_zone = (by_zone.0 && !zones.is_empty(), by_zone.1 || ours.1);
            }
            found.push((SocketAddr::new(e.address, number), !e.ready, ours, distance(e, place), place));
        }
        // As kube-proxy: hints count where every ready endpoint has one and one is for us.
        let (by_node, by_zone) = (by_node == (true, true) && !local_only, by_zone == (true, true) && !local_only);
        let candidate = |(address, last_resort, ours, distance, place): (_, _, (bool, bool), _, _)| {
            let for_others = if by_node { !ours.0 } else { by_zone && !ours.1 };
            Candidate { address, rank: (false, last_resort, for_others, distance), live: 0, place }
        };
        found.into_iter().map(candidate).collect()
    }

    /// Sites behind NATs often have the same private addresses, so an endpoint without a node is another node's only
    /// where exactly one node has its address.
    fn place<'t>(&'t self, here: &'t Here, endpoint: EndpointRef<'t>) -> Place<'t> {
        let node = match (&endpoint.about().node, self.nodes_with(endpoint.address)) {
            (Some(node), _) | (None, [node]) => node,
            (None, several) if several.contains(&here.node) => return Place::Here,
            (None, _) => return Place::Direct,
        };
        if *node == here.node {
            Place::Here
        } else if !here.network.is_empty() && here.neighbours.has(node) {
            Place::Direct
        } else {
            Place::Far(here.egress.iter().find(|(of, _)| of.has(node)).map_or(node, |(_, by)| by))
        }
    }

    /// Whether an endpoint of the Service is behind the tunnel.
    #[must_use]
    pub fn needs_tunnel(&self, here: &Here, id: &ServiceId) -> bool {
        self.endpoints(id).any(|(_, e)| (e.ready || e.serving) && matches!(self.place(here, e), Place::Far(_)))
    }

    /// How near an endpoint is, for the order of DNS answers.
    #[must_use]
    pub fn nearness(&self, here: &Here, endpoint: EndpointRef<'_>) -> Nearness {
        match self.place(here, endpoint) {
            Place::Here => Nearness::Node,
            place if self.is_zonal(here, self.own_zone(here), endpoint, place) => Nearness::Zone,
            Place::Direct | Place::Far(_) => Nearness::Any,
        }
    }

    /// The same in a word, with the reason.
    #[must_use]
    pub fn how_near(&self, here: &Here, endpoint: EndpointRef<'_>) -> &'static str {
        match self.place(here, endpoint) {
            Place::Here => "here",
            Place::Direct if endpoint.node.is_some() => "network",
            Place::Far(node) if here.on_link.has(node) => "LAN",
            place if self.is_zonal(here, self.own_zone(here), endpoint, place) => "zone",
            Place::Direct | Place::Far(_) => "",
        }
    }

    /// Whether it counts as of our zone.
    fn is_zonal(&self, here: &Here, zone: Option<&str>, endpoint: EndpointRef<'_>, place: Place<'_>) -> bool {
        match place {
            Place::Here => true,
            Place::Direct if endpoint.node.is_some() => true,
            Place::Far(node) if here.on_link.has(node) => true,
            Place::Direct | Place::Far(_) => zone.is_some() && self.zone_of(endpoint.about()) == zone,
        }
    }

    fn own_zone<'t>(&'t self, here: &'t Here) -> Option<&'t str> {
        match &*here.zone {
            "" => self.node(&here.node).and_then(|n| n.zone.as_deref()),
            zone => Some(zone),
        }
    }

    /// That of the slice, else of its node.
    #[must_use]
    pub fn zone_of<'t>(&'t self, endpoint: &'t About) -> Option<&'t str> {
        let of_node = || self.node(endpoint.node.as_ref()?)?.zone.as_deref();
        endpoint.zone.as_deref().or_else(of_node)
    }
}

#[cfg(test)]
mod tests;
