//! Kubernetes' objects -> the table's.

use super::types;
use crate::table::model::{
    Addresses, Affinity, Endpoint, Hints, Name, NodeInfo, Pod, PodId, Protocol, Service, ServiceId, ServiceKind,
    ServicePort, Slice, SliceId, SlicePort,
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    rc::Rc,
    time::Duration,
};

/// ClientIPConfig.timeoutSeconds of Kubernetes' API: the default and the most.
const AFFINITY_SECONDS: (u64, i64) = (10_800, 86_400);

/// Subsets of one Endpoints object; one with more is refused. Its controllers make one for each set of ports.
pub const SUBSETS_MAX: usize = 64;

/// A field that cannot be read as what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    pub field: String,
    pub why: String,
}

impl Bad {
    fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

/// Gives the shared allocation of a name.
pub type Intern<'a> = &'a mut dyn FnMut(&str) -> Name;

/// Addresses that were left out, while the rest of the object is used.
#[derive(Debug, Default)]
pub struct Dropped {
    first: Option<Bad>,
    count: usize,
}

impl Dropped {
    fn note(&mut self, bad: Bad) {
        self.first.get_or_insert(bad);
        self.count += 1;
    }

    fn keep(&mut self, address: Result<IpAddr, Bad>) -> Option<IpAddr> {
        address.map_err(|bad| self.note(bad)).ok()
    }

    #[must_use]
    pub fn summary(self) -> Option<Bad> {
        let more = self.count.saturating_sub(1);
        self.first.map(|Bad { field, why }| Bad {
            field,
            why: if more == 0 { format!("{why}: left out") } else { format!("{why}: left out, and {more} more") },
        })
    }
}

/// A name as Kubernetes allows it (RFC 1123): lower case, digits, '-', and '.' where it is not one label.
pub fn check_name(field: &str, name: &str, one_label: bool) -> Result<(), Bad> {
    let length = if one_label { 1..=63 } else { 1..=253 };
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (b == b'.' && !one_label);
    if length.contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(Bad::new(field, format!("{} is no name of Kubernetes", quote(name))))
}

/// What a file says, made safe for a terminal and short.
fn quote(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    format!("\"{shown}\"")
}

/// Zeros in front of a decimal part are skipped, as Kubernetes does (its ParseIPSloppy), and IPv4-mapped addresses are
/// IPv4.
fn parse_address(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse::<Ipv6Addr>().ok().map(|a| IpAddr::V6(a).to_canonical());
    }
    let mut bytes = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut bytes {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *byte = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| Ipv4Addr::from(bytes).into())
}

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Clients connect to it, and the proxy takes the connection.
    Virtual,
    /// A connection is sent to it on behalf of others.
    Target,
}

/// Hands out a machine's credentials in most clouds.
const METADATA: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));

/// An address of one machine in the network: none that is special on this machine itself, as in Kubernetes' own checks.
/// Only as a target an IPv4 link-local one is allowed, for KubeEdge's metaServer offers itself on one.
fn address(of: Use, field: impl FnOnce() -> String, text: &str) -> Result<IpAddr, Bad> {
    let Some(address) = parse_address(text) else {
        return Err(Bad::new(field(), format!("{} is not an IP address", quote(text))));
    };
    let special = address.is_unspecified() || address.is_loopback() || address.is_multicast() || address == METADATA;
    let local = match address {
        IpAddr::V4(v4) => v4.is_broadcast() || (v4.is_link_local() && of == Use::Virtual),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if special || local {
        return Err(Bad::new(field(), format!("{address} is not the address of one machine in the network")));
    }
    Ok(address)
}

fn protocol(field: impl FnOnce() -> String, text: Option<&str>) -> Result<Protocol, Bad> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(Bad::new(field(), format!("{} is not TCP, UDP or SCTP", quote(other)))),
    }
}

fn port_number(field: impl FnOnce() -> String, number: Option<types::Int>) -> Result<u16, Bad> {
    let Some(types::Int(number)) = number else { return Err(Bad::new(field(), "is missing")) };
    let port = u16::try_from(number).ok().filter(|n| *n > 0);
    port.ok_or_else(|| Bad::new(field(), format!("{number} is not in 1..=65535")))
}

/// Port names are labels; anything printable without blanks is let through.
fn port_name(field: impl FnOnce() -> String, name: Option<&str>, names: Intern<'_>) -> Result<Name, Bad> {
    let name = name.unwrap_or("");
    if name.len() > 63 || !name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Bad::new(field(), format!("{} is no name of a port", quote(name))));
    }
    Ok(names(name))
}

pub fn service(id: ServiceId, raw: types::Service, dropped: &mut Dropped, names: Intern<'_>) -> Result<Service, Bad> {
    let labels = raw.metadata.and_then(|m| m.labels).unwrap_or_default();
    let spec = raw.spec.ok_or_else(|| Bad::new("spec", "is missing"))?;
    let (kind, vips) = kind_and_vips(&spec, names)?;
    let mut ports = Vec::new();
    for (at, port) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{at}].{name}");
        ports.push(ServicePort {
            name: port_name(|| field("name"), port.name.as_deref(), names)?,
            number: port_number(|| field("port"), port.port)?,
            protocol: protocol(|| field("protocol"), port.protocol.as_deref())?,
            node_port: match port.node_port {
                None | Some(types::Int(0)) => 0,
                some => port_number(|| field("nodePort"), some)?,
            },
        });
    }
    let mut external_ips = Vec::new();
    for (at, text) in spec.external_ips.iter().flatten().enumerate() {
        external_ips.extend(dropped.keep(address(Use::Virtual, || format!("spec.externalIPs[{at}]"), text)));
    }
    let ingress = raw.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress).unwrap_or_default();
    for (at, ingress) in ingress.iter().enumerate() {
        // With the mode Proxy the load balancer must see the connection itself.
        let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        if ingress.ip_mode.as_deref() != Some("Proxy") {
            external_ips.extend(dropped.keep(address(
                Use::Virtual,
                || format!("status.loadBalancer.ingress[{at}].ip"),
                ip,
            )));
        }
    }
    external_ips.sort_unstable();
    external_ips.dedup();
    Ok(Service {
        id,
        kind,
        vips,
        external_ips: external_ips.into(),
        ports: ports.into(),
        affinity: affinity(&spec)?,
        local_only: is_local("spec.internalTrafficPolicy", spec.internal_policy.as_deref())?,
        external_local: is_local("spec.externalTrafficPolicy", spec.external_policy.as_deref())?,
        not_proxied: labels.proxy_name.is_some() || labels.edgemesh_proxy.is_some() || labels.headless.is_some(),
    })
}

fn is_local(field: &str, policy: Option<&str>) -> Result<bool, Bad> {
    match policy {
        None | Some("" | "Cluster") => Ok(false),
        Some("Local") => Ok(true),
        Some(other) => Err(Bad::new(field, format!("{} is not Cluster or Local", quote(other)))),
    }
}

fn kind_and_vips(spec: &types::ServiceSpec, names: Intern<'_>) -> Result<(ServiceKind, Addresses), Bad> {
    match spec.kind.as_deref() {
        Some("ExternalName") => {
            // It is answered as it stands: upper case and underscores are legal in the DNS, a dot may end it.
            let name = spec.external_name.as_deref().unwrap_or("");
            let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
            if name.is_empty() || name.len() > 254 || !name.bytes().all(legal) {
                return Err(Bad::new("spec.externalName", format!("{} is no name of the DNS", quote(name))));
            }
            return Ok((ServiceKind::External(names(name)), Vec::new().into()));
        }
        None | Some("" | "ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => return Err(Bad::new("spec.type", format!("{} is not known", quote(other)))),
    }
    let several = spec.cluster_ips.as_deref().filter(|ips| !ips.is_empty());
    let one = spec.cluster_ip.as_slice();
    let (ips, plural) = several.map_or((one, false), |ips| (ips, true));
    if ips.iter().any(|ip| ip == "None") {
        return Ok((ServiceKind::Headless, Vec::new().into()));
    }
    let field = |at| if plural { format!("spec.clusterIPs[{at}]") } else { "spec.clusterIP".into() };
    let allocated = ips.iter().enumerate().filter(|(_, ip)| !ip.is_empty());
    let vips = allocated.map(|(at, ip)| address(Use::Virtual, || field(at), ip)).collect::<Result<_, _>>()?;
    Ok((ServiceKind::ClusterIp, vips))
}

fn affinity(spec: &types::ServiceSpec) -> Result<Affinity, Bad> {
    match spec.affinity.as_deref() {
        None | Some("" | "None") => Ok(Affinity::None),
        Some("ClientIP") => {
            let (usual, most) = AFFINITY_SECONDS;
            let asked = spec.affinity_config.as_ref().and_then(|c| c.client_ip.as_ref()?.timeout);
            let seconds =
                asked.map_or(Some(usual), |types::Int(n)| u64::try_from(n).ok().filter(|_| (1..=most).contains(&n)));
            let seconds = seconds.ok_or_else(|| {
                let why = format!("{} is not in 1..={most}", asked.map_or(0, |n| n.0));
                Bad::new("spec.sessionAffinityConfig.clientIP.timeoutSeconds", why)
            })?;
            Ok(Affinity::ClientIp { timeout: Duration::from_secs(seconds) })
        }
        Some(other) => Err(Bad::new("spec.sessionAffinity", format!("{} is not None or ClientIP", quote(other)))),
    }
}

/// A port without a number means all ports, which needs no proxy: it is ignored.
fn slice_ports(field: &str, raw: &[types::EndpointPort], names: Intern<'_>) -> Result<Vec<SlicePort>, Bad> {
    let mut ports = Vec::new();
    for (at, port) in raw.iter().enumerate().filter(|(_, p)| p.port.is_some()) {
        let field = |name: &str| format!("{field}[{at}].{name}");
        ports.push(SlicePort {
            name: port_name(|| field("name"), port.name.as_deref(), names)?,
            number: port_number(|| field("port"), port.port)?,
            protocol: protocol(|| field("protocol"), port.protocol.as_deref())?,
        });
    }
    Ok(ports)
}

/// Names beside an address, left out where they are none.
struct Beside<'a> {
    hostname: Option<&'a str>,
    node: Option<&'a str>,
    zone: Option<&'a str>,
    target: Option<&'a types::TargetRef>,
    hints: Option<&'a types::Hints>,
}

impl Beside<'_> {
    fn endpoint(&self, address: IpAddr, state: &types::Conditions, names: Intern<'_>) -> Endpoint {
        fn valid(name: Option<&str>, one_label: bool) -> Option<&str> {
            name.filter(|n| check_name("", n, one_label).is_ok())
        }
        let pod = self.target.filter(|t| t.kind.as_deref() == Some("Pod")).and_then(|t| t.name.as_deref());
        // A zone is a label's value: free text, compared and nothing else.
        let zone = self.zone.filter(|z| !z.is_empty());
        let ready = state.ready.unwrap_or(true);
        Endpoint {
            address,
            hostname: valid(self.hostname, true).map(Into::into),
            node: valid(self.node, false).map(&mut *names),
            zone: zone.map(&mut *names),
            pod: valid(pod, false).map(Into::into),
            hints: self.hints.and_then(|hints| hinted(hints, names)),
            ready,
            serving: state.serving.unwrap_or(ready),
            terminating: state.terminating.unwrap_or(false),
        }
    }
}

/// Of each kind the first few; the API allows 8.
fn hinted(raw: &types::Hints, names: Intern<'_>) -> Option<Rc<Hints>> {
    let mut list = |raw: &Option<Vec<types::Named>>| -> Box<[Name]> {
        let all = raw.iter().flatten().filter_map(|n| n.name.as_deref());
        all.filter(|n| !n.is_empty()).take(8).map(&mut *names).collect()
    };
    let (zones, nodes) = (list(&raw.zones), list(&raw.nodes));
    (zones.len() + nodes.len() > 0).then(|| Hints { zones, nodes }.into())
}

/// None where it belongs to no Service, or holds names instead of addresses.
pub fn slice(
    id: SliceId,
    raw: types::EndpointSlice,
    dropped: &mut Dropped,
    names: Intern<'_>,
) -> Result<Option<Slice>, Bad> {
    let label = raw.metadata.and_then(|m| m.labels).and_then(|l| l.service_name);
    let Some(service) = label.filter(|name| !name.is_empty()) else { return Ok(None) };
    check_name("metadata.labels[kubernetes.io/service-name]", &service, true)?;
    let is_ipv4 = match raw.address_type.as_deref() {
        Some("IPv4") => Some(true),
        Some("IPv6") => Some(false),
        // Not legal, but an address says of which family it is.
        None | Some("") => None,
        Some("FQDN") => return Ok(None),
        Some(other) => return Err(Bad::new("addressType", format!("{} is not IPv4, IPv6 or FQDN", quote(other)))),
    };
    let mut endpoints = Vec::new();
    for (at, endpoint) in raw.endpoints.iter().flatten().enumerate() {
        let state = endpoint.conditions.as_ref().unwrap_or(&types::Conditions {
            ready: None,
            serving: None,
            terminating: None,
        });
        let beside = Beside {
            hostname: endpoint.hostname.as_deref(),
            node: endpoint.node.as_deref(),
            zone: endpoint.zone.as_deref(),
            target: endpoint.target.as_ref(),
            hints: endpoint.hints.as_ref(),
        };
        for (index, text) in endpoint.addresses.iter().flatten().enumerate() {
            let field = || format!("endpoints[{at}].addresses[{index}]");
            let Some(address) = dropped.keep(address(Use::Target, field, text)) else { continue };
            if is_ipv4.is_some_and(|v4| v4 != address.is_ipv4()) {
                dropped.note(Bad::new(field(), format!("{address} is not of the slice's addressType")));
                continue;
            }
            endpoints.push(beside.endpoint(address, state, names));
        }
    }
    let ports = slice_ports("ports", raw.ports.as_deref().unwrap_or_default(), names)?;
    Ok(Some(Slice { id, service: names(&service), ports: ports.into(), endpoints }))
}

/// A slice for each subset.
pub fn subsets(
    id: &ServiceId,
    raw: types::Endpoints,
    dropped: &mut Dropped,
    names: Intern<'_>,
) -> Result<Vec<Slice>, Bad> {
    let subsets = raw.subsets.unwrap_or_default();
    if subsets.len() > SUBSETS_MAX {
        return Err(Bad::new("subsets", format!("has more than {SUBSETS_MAX} elements")));
    }
    let mut slices = Vec::new();
    for (index, subset) in subsets.into_iter().enumerate() {
        let mut endpoints = Vec::new();
        for (list, ready, addresses) in
            [("addresses", true, &subset.addresses), ("notReadyAddresses", false, &subset.not_ready)]
        {
            let state = types::Conditions { ready: Some(ready), serving: None, terminating: None };
            for (at, raw) in addresses.iter().flatten().enumerate() {
                let field = || format!("subsets[{index}].{list}[{at}].ip");
                let ip = raw.ip.as_deref().unwrap_or("");
                let Some(address) = dropped.keep(address(Use::Target, field, ip)) else { continue };
                let beside = Beside {
                    hostname: raw.hostname.as_deref(),
                    node: raw.node.as_deref(),
                    zone: None,
                    target: raw.target.as_ref(),
                    hints: None,
                };
                endpoints.push(beside.endpoint(address, &state, names));
            }
        }
        let ports =
            slice_ports(&format!("subsets[{index}].ports"), subset.ports.as_deref().unwrap_or_default(), names)?;
        let slice_id = SliceId::of_subset(id.namespace.clone(), &id.name, index);
        slices.push(Slice { id: slice_id, service: id.name.clone(), ports: ports.into(), endpoints });
    }
    Ok(slices)
}

/// One that has ended or is being deleted keeps its name and has no address.
pub fn pod(id: PodId, raw: types::Pod, dropped: &mut Dropped) -> Pod {
    let status = raw.status.unwrap_or_default();
    let ended = raw.metadata.is_some_and(|m| m.deleted.is_some())
        || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let mut addresses = Vec::new();
    let all = status.ips.unwrap_or_default().into_iter().map(|ip| ip.ip).chain([status.ip]);
    for text in all.flatten().filter(|text| !ended && !text.is_empty()) {
        addresses.extend(dropped.keep(address(Use::Target, || "status.podIPs".into(), &text)));
    }
    Pod { id, addresses }
}

/// Host names among the addresses are not errors.
pub fn node(name: Name, raw: types::Node, dropped: &mut Dropped, names: Intern<'_>) -> NodeInfo {
    let labels = raw.metadata.and_then(|m| m.labels).unwrap_or_default();
    let mut addresses = Vec::new();
    for (at, raw) in raw.status.and_then(|s| s.addresses).unwrap_or_default().iter().enumerate() {
        if let (Some("InternalIP" | "ExternalIP"), Some(text)) = (raw.kind.as_deref(), raw.address.as_deref()) {
            addresses.extend(dropped.keep(address(Use::Target, || format!("status.addresses[{at}].address"), text)));
        }
    }
    addresses.dedup();
    NodeInfo { name, addresses, zone: labels.zone.filter(|z| !z.is_empty()).map(|z| names(&z)) }
}
