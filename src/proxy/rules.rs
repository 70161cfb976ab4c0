//! The rules that we want, as data. A backend renders them.

use super::{cover::Prefix, udp};
use crate::sorted::{Map, Set};
use crate::{
    config::ProxyConfig,
    table::{
        Table,
        model::{Protocol, Service, ServiceKind, ServicePort},
    },
};
use std::net::{IpAddr, Ipv4Addr};

/// The device that carries our address.
pub const DEVICE: &str = "weft0";

/// Redirected address and port pairs at most: iptables looks through them one by one. Those beyond it are
/// not redirected, and status says how many.
const REDIRECTS_MOST: usize = 10_000;

/// A port of our address that stands for "nobody serves this": what comes to it is refused.
/// IANA: tcpmux (RFC 7805: historic).
pub const REFUSED: u16 = 1;

/// Linux: IFNAMSIZ, less the final zero.
const NAME_MOST: usize = 15;

/// The port of DNS: resolv.conf(5) has no way to say another.
const DNS: u16 = 53;

/// Where our parts listen, on weft0's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// None: the proxy is off.
    pub proxy: Option<u16>,
    /// What clients ask and where the responder listens; None: DNS is off.
    pub dns: Option<(u16, u16)>,
    /// Namespace and name of the Service whose virtual addresses our DNS answers.
    pub take_over: Option<(String, String)>,
}

impl Ports {
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

/// Whether we take connections to this address: never those to ourselves, to nowhere or to many.
fn usable(address: Ipv4Addr, own: Ipv4Addr) -> bool {
    address != own
        && !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast())
}

fn addresses<'s>(
    table: &'s Table,
    service: &'s Service,
    external: bool,
    own: Ipv4Addr,
) -> impl Iterator<Item = Ipv4Addr> + 's {
    let external = if external { &service.external_ips[..] } else { &[] };
    let external = external.iter().filter(|ip| !table.is_guarded(**ip));
    service.vips.iter().chain(external).filter_map(move |ip| match ip {
        IpAddr::V4(v4) if usable(*v4, own) => Some(*v4),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    })
}

/// The Services that are ours to bring to their endpoints.
pub fn proxied(table: &Table) -> impl Iterator<Item = &Service> {
    table.services().filter(|s| !s.not_proxied && s.kind == ServiceKind::ClusterIp)
}

impl Desired {
    #[must_use]
    pub fn new(
        table: &Table,
        cfg: &ProxyConfig,
        address: Ipv4Addr,
        ports: &Ports,
        udp: &udp::Ports,
        catch: Catch,
    ) -> Self {
        let mut rules: Map<(IpAddr, u16, Protocol), Action> = Map::new();
        if let (Some(service), Some((_, listening))) = (ports.taken(table), ports.dns) {
            let asked = |p: &&ServicePort| p.number == DNS && p.protocol != Protocol::Sctp;
            for port in service.ports.iter().filter(asked) {
                for ip in addresses(table, service, false, address) {
                    rules.insert((ip.into(), port.number, port.protocol), Action::Redirect(listening));
                }
            }
        }
        if let Some(proxy) = ports.proxy {
            for service in proxied(table) {
                for port in &*service.ports {
                    let served = udp::served(table, &service.id, &port.name, port.protocol);
                    // An SCTP port, and an UDP port that has no socket yet, are left to whoever else does them.
                    let action = match (port.protocol, served) {
                        (Protocol::Tcp, true) => Action::Redirect(proxy),
                        (Protocol::Tcp | Protocol::Udp, false) => Action::Refuse,
                        (Protocol::Udp, true) => match udp.get(&(service.id.clone(), port.number)) {
                            Some(socket) => Action::Redirect(*socket),
                            None => continue,
                        },
                        (Protocol::Sctp, _) => continue,
                    };
                    for ip in addresses(table, service, cfg.external_ips, address) {
                        rules.or_insert_with((ip.into(), port.number, port.protocol), || action);
                    }
                }
            }
        }
        let left_out = rules.len().saturating_sub(REDIRECTS_MOST);
        let mut all = Vec::with_capacity(rules.len().min(REDIRECTS_MOST) + 2);
        if let Some((asked, listening)) = ports.dns {
            all.extend([Protocol::Udp, Protocol::Tcp].map(|protocol| Rule {
                address: address.into(),
                protocol,
                port: asked,
                action: Action::Redirect(listening),
            }));
        }
        all.extend(rules.into_iter().take(REDIRECTS_MOST).map(|((address, port, protocol), action)| Rule {
            address,
            protocol,
            port,
            action,
        }));
        Self { address: address.into(), mark: cfg.mark, catch, rules: all, left_out }
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

/// The addresses that need a route, and those of the cluster that our routes must keep clear of.
#[must_use]
pub fn addresses_of(table: &Table, cfg: &ProxyConfig, own: Ipv4Addr, ports: &Ports) -> (Set<Ipv4Addr>, Vec<Prefix>) {
    let proxied = proxied(table).filter(|_| ports.proxy.is_some());
    let mut vips: Set<_> = proxied.flat_map(|s| addresses(table, s, cfg.external_ips, own)).collect();
    vips.extend(ports.taken(table).into_iter().flat_map(|s| addresses(table, s, false, own)));
    let nodes = table.nodes().flat_map(|n| n.addresses.iter().copied());
    let endpoints = table.services().flat_map(|s| table.endpoints(&s.id)).map(|(_, e)| e.address);
    let taken = nodes.chain(endpoints).filter_map(|ip| match ip {
        IpAddr::V4(v4) => Some(Prefix::host(v4)),
        IpAddr::V6(_) => None,
    });
    let avoid = taken.filter(|p| !vips.contains(&p.address())).collect();
    (vips, avoid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Backend,
        table::model::{
            Affinity, Change, Endpoint, NodeInfo, Object, ServiceId, ServicePort, Slice, SliceId, SlicePort, Source,
        },
    };

    const OWN: Ipv4Addr = Ipv4Addr::new(169, 254, 96, 16);
    const PORTS: Ports = Ports { proxy: Some(4000), dns: Some((53, 5300)), take_over: None };

    fn cfg() -> ProxyConfig {
        ProxyConfig {
            enable: true,
            backend: Backend::Auto,
            interfaces: vec![],
            external_ips: false,
            mark: 1,
            max_connections: 10,
            drain: 0,
        }
    }

    fn endpoint(ready: bool) -> Endpoint {
        Endpoint {
            address: "10.1.0.9".parse().unwrap(),
            hostname: None,
            node: None,
            zone: None,
            pod: None,
            hints: None,
            ready,
            serving: ready,
            terminating: false,
        }
    }

    fn add(table: &mut Table, name: &str, vip: &str, protocol: Protocol, ready: bool, edit: impl FnOnce(&mut Service)) {
        let id = ServiceId { namespace: "default".into(), name: name.into() };
        let mut service = Service {
            id: id.clone(),
            kind: ServiceKind::ClusterIp,
            vips: vec![vip.parse().unwrap()].into(),
            external_ips: ["203.0.113.7".parse().unwrap()].into(),
            ports: [ServicePort { name: "".into(), number: 80, protocol, node_port: 0 }].into(),
            affinity: Affinity::None,
            local_only: false,
            not_proxied: false,
        };
        edit(&mut service);
        table.apply(Change::Apply(Source::Config, Object::Service(service)));
        let slice = Slice {
            id: SliceId { namespace: "default".into(), name: name.into() },
            service: name.into(),
            ports: [SlicePort { name: "".into(), number: 8080, protocol }].into(),
            endpoints: vec![endpoint(ready)],
        };
        table.apply(Change::Apply(Source::Config, Object::Slice(slice)));
    }

    fn rules(table: &Table, cfg: &ProxyConfig) -> Vec<(String, u16, Protocol, Action)> {
        rules_with(table, cfg, &PORTS)
    }

    fn rules_with(table: &Table, cfg: &ProxyConfig, ports: &Ports) -> Vec<(String, u16, Protocol, Action)> {
        let id = ServiceId { namespace: "default".into(), name: "udp".into() };
        let desired = Desired::new(table, cfg, OWN, ports, &[((id, 80), 10_007)].into(), Catch::AllBut(vec![]));
        desired.rules.iter().map(|r| (r.address.to_string(), r.port, r.protocol, r.action)).collect()
    }

    fn dns() -> Vec<(String, u16, Protocol, Action)> {
        [Protocol::Udp, Protocol::Tcp].map(|p| (OWN.to_string(), 53, p, Action::Redirect(5300))).to_vec()
    }

    #[test]
    fn served_ports_are_redirected_and_others_refused() {
        let mut table = Table::default();
        add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
        add(&mut table, "dead", "10.96.0.1", Protocol::Tcp, false, |_| ());
        add(&mut table, "udp", "10.96.0.3", Protocol::Udp, true, |_| ());
        add(&mut table, "udp-without-socket", "10.96.0.8", Protocol::Udp, true, |_| ());
        add(&mut table, "udp-dead", "10.96.0.4", Protocol::Udp, false, |_| ());
        add(&mut table, "sctp", "10.96.0.5", Protocol::Sctp, false, |_| ());
        add(&mut table, "other", "10.96.0.6", Protocol::Tcp, true, |s| s.not_proxied = true);
        add(&mut table, "headless", "10.96.0.7", Protocol::Tcp, true, |s| s.kind = ServiceKind::Headless);
        let mut want = dns();
        want.extend([
            ("10.96.0.1".into(), 80, Protocol::Tcp, Action::Refuse),
            ("10.96.0.2".into(), 80, Protocol::Tcp, Action::Redirect(4000)),
            ("10.96.0.3".into(), 80, Protocol::Udp, Action::Redirect(10_007)),
            ("10.96.0.4".into(), 80, Protocol::Udp, Action::Refuse),
        ]);
        assert_eq!(rules(&table, &cfg()), want);
        let (vips, avoid) = addresses_of(&table, &cfg(), OWN, &PORTS);
        assert_eq!(vips.len(), 6);
        assert!(avoid.contains(&Prefix::host("10.1.0.9".parse().unwrap())));
    }

    #[test]
    fn addresses_that_a_service_may_not_take_are_left_alone() {
        for bad in ["169.254.96.16", "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fd00::1"] {
            let mut table = Table::default();
            add(&mut table, "evil", bad, Protocol::Tcp, true, |_| ());
            assert_eq!(rules(&table, &cfg()), dns(), "{bad}");
        }
    }

    #[test]
    fn the_address_of_a_dns_that_is_taken_over_is_answered_here_whoever_serves_it() {
        let port = |number, protocol| ServicePort { name: "".into(), number, protocol, node_port: 0 };
        for (ready, other) in [(true, Action::Redirect(4000)), (false, Action::Refuse)] {
            let mut table = Table::default();
            add(&mut table, "kube-dns", "10.96.0.10", Protocol::Tcp, ready, |s| {
                s.ports = [port(53, Protocol::Udp), port(53, Protocol::Tcp), port(9153, Protocol::Tcp)].into();
            });
            let mut ports = Ports { take_over: Some(("default".into(), "kube-dns".into())), ..PORTS };
            let ours = |protocol| ("10.96.0.10".into(), 53, protocol, Action::Redirect(5300));
            let mut want = dns();
            want.extend([ours(Protocol::Tcp), ours(Protocol::Udp), ("10.96.0.10".into(), 9153, Protocol::Tcp, other)]);
            assert_eq!(rules_with(&table, &cfg(), &ports), want);
            ports.proxy = None;
            want.pop();
            assert_eq!(rules_with(&table, &cfg(), &ports), want);
            let vip = "10.96.0.10".parse().unwrap();
            assert_eq!(addresses_of(&table, &cfg(), OWN, &ports).0, Set::from([vip]));
            ports.dns = None;
            assert!(rules_with(&table, &cfg(), &ports).is_empty());
        }
    }

    #[test]
    fn external_addresses_only_when_asked() {
        let mut table = Table::default();
        add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
        assert_eq!(rules(&table, &cfg()).len(), 3);
        let asked = ProxyConfig { external_ips: true, ..cfg() };
        assert_eq!(rules(&table, &asked)[3].0, "203.0.113.7");
    }

    #[test]
    fn external_addresses_of_nodes_and_api_servers_are_not_taken() {
        let asked = ProxyConfig { external_ips: true, ..cfg() };
        let node = || NodeInfo { name: "n".into(), addresses: vec!["203.0.113.7".parse().unwrap()], zone: None };
        let guards: [fn(&mut Table, NodeInfo); 3] = [
            |table, _| assert!(table.guard("203.0.113.7".parse().unwrap())),
            |table, node| assert!(table.apply(Change::Apply(Source::Config, Object::Node(node)))),
            |table, _| {
                add(table, "kubernetes", "10.96.0.9", Protocol::Tcp, true, |s| s.external_ips = [].into());
                let (id, slice) = (SliceId { namespace: "default".into(), name: "k".into() }, "203.0.113.7");
                let endpoint = Endpoint { address: slice.parse().unwrap(), ..endpoint(true) };
                let (service, ports) = ("kubernetes".into(), [].into());
                let slice = Slice { id, service, ports, endpoints: vec![endpoint] };
                table.apply(Change::Apply(Source::Config, Object::Slice(slice)));
            },
        ];
        for guard in guards {
            let mut table = Table::default();
            add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
            assert_eq!(guarded(&table, &asked), None);
            guard(&mut table, node());
            assert!(rules(&table, &asked).iter().all(|(ip, ..)| ip != "203.0.113.7"));
            assert!(!addresses_of(&table, &asked, OWN, &PORTS).0.contains(&"203.0.113.7".parse().unwrap()));
            let said = guarded(&table, &asked).unwrap();
            assert!(said.starts_with("203.0.113.7, an external address of default/web, "), "{said}");
            assert_eq!(guarded(&table, &cfg()), None, "nobody asked for it");
        }
    }

    #[test]
    fn interface_names_cannot_smuggle_options() {
        let none = Set::new();
        assert_eq!(Catch::new(&[], &Set::from(["wan".into()])).unwrap(), Catch::AllBut(vec!["wan".into()]));
        assert_eq!(Catch::new(&["br-lan.2".into()], &none).unwrap(), Catch::Only(vec!["br-lan.2".into()]));
        for bad in ["", "a b", "-j", "x\nCOMMIT", "\"", "much-too-long-name"] {
            assert!(Catch::new(&[bad.into()], &none).is_err(), "{bad:?}");
        }
    }
}
