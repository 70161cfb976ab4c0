//! The rules that we want, as data. A backend renders them.

use super::{cover::Net, udp};
use crate::sorted::{Map, Set};
use crate::{
    config::ProxyConfig,
    table::{
        Table,
        balance::{Here, Nearness},
        model::{Protocol, Service, ServiceKind, ServicePort},
        packed::{EndpointRef, StoredSlice},
    },
};
use std::net::{IpAddr, Ipv6Addr};

/// The device that carries our address.
pub const DEVICE: &str = "weft0";

/// Our address of IPv6, in RFC 4193's fd00::/8: the 40 bits of the network are the letters of weft0. The same on each
/// node and of meaning there alone, as 169.254.96.16 is.
pub const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0x6566, 0x7430, 0, 0, 0, 0, 0x16);

/// Redirected address and port pairs at most: iptables looks through them one by one. Those beyond it are
/// not redirected, and status says how many.
const REDIRECTS_MOST: usize = 10_000;

/// Address and NodePort pairs at most; those beyond it are not served.
const NODE_PORTS_MOST: usize = 10_000;

/// A port of our address that stands for "nobody serves this": what comes to it is refused.
/// IANA: tcpmux (RFC 7805: historic).
pub const REFUSED: u16 = 1;

/// A port of our address that stands for "not for you, here": what comes to it is dropped. RFC 863.
pub const DISCARD: u16 = 9;

/// Linux: IFNAMSIZ, less the final zero.
const NAME_MOST: usize = 15;

/// The port of DNS: resolv.conf(5) has no way to say another.
const DNS: u16 = 53;

/// Where our parts listen, on weft0's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// None: the proxy is off.
    pub proxy: Option<u16>,
    /// On the address of IPv6; None: the proxy is off, or the kernel has no IPv6.
    pub proxy6: Option<u16>,
    /// What clients ask and where the responder listens; None: DNS is off.
    pub dns: Option<(u16, u16)>,
    /// Namespace and name of the Service whose virtual addresses our DNS answers.
    pub take_over: Option<(String, String)>,
}

impl Ports {
    /// Those of one family. Our responder of the DNS has an address of IPv4 alone.
    fn of(&self, own: IpAddr) -> Self {
        if own.is_ipv4() { self.clone() } else { Self { proxy: self.proxy6, ..Self::default() } }
    }

    fn taken<'t>(&self, table: &'t Table) -> Option<&'t Service> {
        let (namespace, name) = self.take_over.as_ref().filter(|_| self.dns.is_some())?;
        table.service(namespace, name)
    }
}

/// Whose packets are caught on their way in; the host's own always are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Catch {
    Only(Vec<String>),
    AllBut(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To this port of weft0's address.
    Redirect(u16),
    /// Nobody serves it: the client is to be told at once.
    Refuse,
    /// Others may serve it elsewhere: the client hears nothing.
    Drop,
}

impl Action {
    /// The port of weft0's address that stands for it.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Redirect(port) => port,
            Self::Refuse => REFUSED,
            Self::Drop => DISCARD,
        }
    }
}

/// One address and port that clients use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub address: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    pub action: Action,
}

/// All that netfilter is to do for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    pub address: IpAddr,
    pub mark: u32,
    pub catch: Catch,
    /// In the order of their addresses.
    pub rules: Vec<Rule>,
    /// For who comes from elsewhere, by whichever interface: addresses of this host, with NodePorts. In their order.
    pub outside: Vec<Rule>,
    /// Address and port pairs beyond the bound.
    pub left_out: usize,
}

/// Whether a name can stand in a rule as it is: a config or a device name must not become an option.
fn plain(name: &str) -> bool {
    (1..=NAME_MOST).contains(&name.len())
        && name
            .bytes()
            .enumerate()
            .all(|(at, b)| b.is_ascii_alphanumeric() || b == b'_' || at > 0 && matches!(b, b'-' | b'.' | b'@' | b'+'))
}

impl Catch {
    /// By the config, else all but the interfaces of default routes.
    ///
    /// # Errors
    /// The name that is no plain interface name.
    pub fn new(configured: &[String], of_default_routes: &Set<String>) -> Result<Self, String> {
        let names: Vec<String> =
            if configured.is_empty() { of_default_routes.iter().cloned().collect() } else { configured.to_vec() };
        if let Some(odd) = names.iter().find(|n| !plain(n)) {
            return Err(format!("{odd:?} cannot be used as the name of an interface in a rule"));
        }
        Ok(if configured.is_empty() { Self::AllBut(names) } else { Self::Only(names) })
    }
}

/// Whether we take connections to this address: of our own family, and never those to ourselves, to nowhere, to many
/// or to the link.
fn usable(address: IpAddr, own: IpAddr) -> bool {
    let odd = match address {
        IpAddr::V4(v4) => v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    let same = address.is_ipv4() == own.is_ipv4() && address != own;
    same && !(odd || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

fn addresses<'s>(
    table: &'s Table,
    service: &'s Service,
    external: bool,
    own: IpAddr,
) -> impl Iterator<Item = IpAddr> + 's {
    let external = if external { &service.external_ips[..] } else { &[] };
    let external = external.iter().filter(|ip| !table.is_guarded(**ip));
    service.vips.iter().chain(external).copied().filter(move |ip| usable(*ip, own))
}

/// The Services that are ours to bring to their endpoints.
pub fn proxied(table: &Table) -> impl Iterator<Item = &Service> {
    table.services().filter(|s| !s.not_proxied && s.kind == ServiceKind::ClusterIp)
}

/// What rules are made from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'s> {
    pub table: &'s Table,
    pub cfg: &'s ProxyConfig,
    pub ports: &'s Ports,
    pub udp: &'s udp::Ports,
    pub here: &'s Here,
    /// All addresses of this host but weft0's.
    pub addresses: &'s [IpAddr],
}

type Found = Map<(IpAddr, u16, Protocol), Action>;

fn listed(found: Found, most: usize) -> impl Iterator<Item = Rule> {
    found.into_iter().take(most).map(|((address, port, protocol), action)| Rule { address, protocol, port, action })
}

impl Sources<'_> {
    /// Of a port that is not left to whoever else does it: SCTP, and UDP that has no socket yet.
    fn action(&self, proxy: u16, service: &Service, port: &ServicePort, own: IpAddr) -> Option<Action> {
        let served = udp::served(self.table, &service.id, &port.name, port.protocol, Some(own.is_ipv4()));
        match (port.protocol, served) {
            (Protocol::Tcp, true) => Some(Action::Redirect(proxy)),
            (Protocol::Tcp | Protocol::Udp, false) => Some(Action::Refuse),
            (Protocol::Udp, true) => self.udp.get(&(service.id.clone(), port.number)).copied().map(Action::Redirect),
            (Protocol::Sctp, _) => None,
        }
    }

    /// Whether nobody who comes from elsewhere is served here: what serves the port is on other nodes.
    fn turns_away(&self, service: &Service, port: &ServicePort, own: IpAddr) -> bool {
        let here = |(slice, e): (&StoredSlice, EndpointRef<'_>)| {
            (e.ready || e.serving)
                && e.address.is_ipv4() == own.is_ipv4()
                && Table::target_port(slice, &port.name, port.protocol).is_some()
                && self.table.nearness(self.here, e) == Nearness::Node
        };
        service.external_local && !self.table.endpoints(&service.id).any(here)
    }

    fn services(&self, proxy: u16, own: IpAddr, rules: &mut Found, outside: &mut Found) {
        let serves = |net: &Net, ip: IpAddr| net.contains(ip) && usable(ip, own);
        let nodes = self.addresses.iter().copied().filter(|ip| self.cfg.node_ports.iter().any(|net| serves(net, *ip)));
        let nodes: Vec<IpAddr> = nodes.collect();
        let left = |s: &&Service| self.cfg.beside_kube_proxy && !self.table.needs_tunnel(self.here, &s.id);
        for service in proxied(self.table).filter(|s| !left(s)) {
            let mut vips = addresses(self.table, service, false, own).peekable();
            // The families of a Service are those of its own addresses.
            let nodes = if vips.peek().is_some() { &nodes[..] } else { &[] };
            for port in &*service.ports {
                let Some(action) = self.action(proxy, service, port, own) else { continue };
                for ip in addresses(self.table, service, self.cfg.external_ips, own) {
                    rules.or_insert_with((ip, port.number, port.protocol), || action);
                }
                if port.node_port == 0 || nodes.is_empty() {
                    continue;
                }
                let turned_away = action != Action::Refuse && self.turns_away(service, port, own);
                for ip in nodes {
                    let key = (*ip, port.node_port, port.protocol);
                    rules.or_insert_with(key, || action);
                    outside.or_insert_with(key, || if turned_away { Action::Drop } else { action });
                }
            }
        }
    }
}

impl Desired {
    /// For the family of `address`, which is weft0's.
    #[must_use]
    pub fn new(from: &Sources<'_>, address: IpAddr, catch: Catch) -> Self {
        let Sources { table, cfg, ports, .. } = from;
        let ports = &ports.of(address);
        let (mut rules, mut outside) = (Found::new(), Found::new());
        if let (Some(service), Some((_, listening))) = (ports.taken(table), ports.dns) {
            let asked = |p: &&ServicePort| p.number == DNS && p.protocol != Protocol::Sctp;
            for port in service.ports.iter().filter(asked) {
                for ip in addresses(table, service, false, address) {
                    rules.insert((ip, port.number, port.protocol), Action::Redirect(listening));
                }
            }
        }
        if let Some(proxy) = ports.proxy {
            from.services(proxy, address, &mut rules, &mut outside);
        }
        let left_out = rules.len().saturating_sub(REDIRECTS_MOST) + outside.len().saturating_sub(NODE_PORTS_MOST);
        let mut all = Vec::with_capacity(rules.len().min(REDIRECTS_MOST) + 2);
        if let Some((asked, listening)) = ports.dns {
            let action = Action::Redirect(listening);
            all.extend([Protocol::Udp, Protocol::Tcp].map(|protocol| Rule { address, protocol, port: asked, action }));
        }
        all.extend(listed(rules, REDIRECTS_MOST));
        let outside = listed(outside, NODE_PORTS_MOST).collect();
        Self { address, mark: cfg.mark, catch, rules: all, outside, left_out }
    }
}

/// What is not taken of the Services' external addresses, since it would cut machines off from their API server.
#[must_use]
pub fn guarded(table: &Table, cfg: &ProxyConfig) -> Option<String> {
    let external =
        proxied(table).filter(|_| cfg.external_ips).flat_map(|s| s.external_ips.iter().map(move |ip| (ip, s)));
    let mut guarded = external.filter(|(ip, _)| table.is_guarded(**ip));
    let (ip, Service { id, .. }) = guarded.next()?;
    let more = guarded.count();
    Some(format!(
        "{ip}, an external address of {}/{}, is a node's or the API server's own: it is not taken, nor {more} others",
        id.namespace, id.name
    ))
}

/// The addresses that need a route, of the family of `own`, and those of the cluster that our routes must keep clear of.
#[must_use]
pub fn addresses_of(table: &Table, cfg: &ProxyConfig, own: IpAddr, ports: &Ports) -> (Set<IpAddr>, Vec<Net>) {
    let ports = &ports.of(own);
    let proxied = proxied(table).filter(|_| ports.proxy.is_some());
    let mut vips: Set<_> = proxied.flat_map(|s| addresses(table, s, cfg.external_ips, own)).collect();
    vips.extend(ports.taken(table).into_iter().flat_map(|s| addresses(table, s, false, own)));
    let nodes = table.nodes().flat_map(|n| n.addresses.iter().copied());
    let endpoints = table.services().flat_map(|s| table.endpoints(&s.id)).map(|(_, e)| e.address);
    let taken = nodes.chain(endpoints).filter(|ip| ip.is_ipv4() == own.is_ipv4() && !vips.contains(ip));
    let avoid = taken.map(Net::host).collect();
    (vips, avoid)
}

#[cfg(test)]
mod tests;
