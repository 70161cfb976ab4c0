//! Which names are ours, and what a name asks for: syntax only, no table.

use super::wire::{NAME_MAX, encode_name};
use crate::sorted::Set;
use crate::{
    config::{DnsConfig, PodNames},
    table::{balance::Here, model::Protocol, packed::EndpointRef},
};
use anyhow::Context as _;
use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A name of 255 octets has at most 127 labels and the root (RFC 1035 section 2.3.4).
const LABELS_MAX: usize = 128;

/// What the responder is authoritative for.
#[derive(Clone, Debug)]
pub struct Zone {
    /// The cluster's domain in wire form, lower case.
    pub domain: Box<[u8]>,
    /// Reverse zones in wire form.
    pub reverse: Vec<Box<[u8]>>,
    /// Names below these that we do not have are asked of the upstreams.
    pub fallthrough: Vec<Box<[u8]>>,
    pub ttl: u32,
    pub pods: PodNames,
    /// Who we are: the nearest endpoints are told first.
    pub here: Here,
    /// Namespaces that are shown; None: all.
    pub namespaces: Option<Set<String>>,
    /// An endpoint without a hostname is called after its Pod.
    pub pod_names: bool,
    /// A Service with virtual addresses and no ready endpoint does not exist.
    pub empty_is_missing: bool,
    /// Where we are reached: the address of `ns.dns.<domain>`.
    pub address: IpAddr,
    /// Added to the table's version for the SOA's serial, so that it rises over restarts too.
    pub serial: u32,
}

impl Zone {
    /// # Errors
    /// Where the domain cannot be a name.
    pub fn new(cfg: &DnsConfig, serial: u32) -> anyhow::Result<Self> {
        let wire = |name: &str| encode_name(name).with_context(|| format!("{name:?} is not a domain name"));
        let domain = wire(&cfg.domain).context("dns.domain")?;
        anyhow::ensure!(domain.len() > 1, "dns.domain: the root cannot be the cluster's domain");
        let all = |names: &[String]| names.iter().map(|n| wire(n)).collect::<anyhow::Result<Vec<_>>>();
        Ok(Self {
            domain,
            fallthrough: all(&cfg.fallthrough).context("dns.fallthrough")?,
            reverse: all(&cfg.zones).context("dns.zones")?,
            ttl: cfg.ttl,
            pods: cfg.pods,
            here: Here::default(),
            namespaces: (!cfg.namespaces.is_empty()).then(|| cfg.namespaces.iter().cloned().collect()),
            pod_names: cfg.endpoint_pod_names,
            empty_is_missing: cfg.empty_is_missing,
            address: cfg.listen.ip(),
            serial,
        })
    }

    #[must_use]
    pub fn shows(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|n| n.contains(namespace))
    }

    #[must_use]
    pub fn falls_through(&self, name: &Lower) -> bool {
        self.fallthrough.iter().any(|z| name.below(z).is_some())
    }

    /// What a name asks for, and where in the name our zone begins; None: it is not ours.
    #[must_use]
    pub fn asked<'n>(&self, name: &'n Lower) -> Option<(Asked<'n>, usize)> {
        if let Some(own) = name.below(&self.domain) {
            return Some((self.cluster(name, own), name.at(own)));
        }
        let own = self.reverse.iter().filter_map(|z| name.below(z)).min()?;
        Some((if own == 0 { Asked::Apex } else { reverse(name) }, name.at(own)))
    }

    /// `own` labels are left of our domain.
    fn cluster<'n>(&self, name: &'n Lower, own: usize) -> Asked<'n> {
        let label = |i: usize| name.label(i).unwrap_or("");
        let Some(branch) = own.checked_sub(1) else { return Asked::Apex };
        let pods = match self.pods {
            PodNames::Insecure | PodNames::Verified => true,
            PodNames::Disabled => false,
        };
        match (label(branch), own) {
            ("dns-version", 1) => Asked::Version,
            ("svc" | "dns", 1) => Asked::Branch,
            ("dns", 2) if label(0) == "ns" => Asked::Nameserver,
            ("pod", 1) if pods => Asked::Branch,
            ("pod", 2) if pods => Asked::Namespace(label(0)),
            ("pod", 3) if pods => match pod_address(label(0)) {
                Some(address) => Asked::Pod { namespace: label(1), address },
                None => Asked::Nothing,
            },
            ("svc", 2) => Asked::Namespace(label(0)),
            ("svc", 3) => Asked::Service(OfService { namespace: label(1), name: label(0) }),
            ("svc", 4) => {
                let of = OfService { namespace: label(2), name: label(1) };
                match label(0).strip_prefix('_') {
                    Some(p) => protocol(p).map_or(Asked::Nothing, |p| Asked::Protocol(of, p)),
                    None => Asked::Endpoint(of, label(0)),
                }
            }
            ("svc", 5) => {
                let of = OfService { namespace: label(3), name: label(2) };
                match (label(0).strip_prefix('_'), label(1).strip_prefix('_').and_then(protocol)) {
                    (Some(port), Some(protocol)) => Asked::Port(of, port, protocol),
                    _ => Asked::Nothing,
                }
            }
            _ => Asked::Nothing,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfService<'n> {
    pub namespace: &'n str,
    pub name: &'n str,
}

/// What a name of ours asks for (Kubernetes DNS specification 1.1.0, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'n> {
    Apex,
    Version,
    Nameserver,
    /// There is something below it, but nothing at it (RFC 8020).
    Branch,
    Namespace(&'n str),
    Service(OfService<'n>),
    /// `_tcp.<service>…`: there where a port is.
    Protocol(OfService<'n>, Protocol),
    Port(OfService<'n>, &'n str, Protocol),
    Endpoint(OfService<'n>, &'n str),
    Pod {
        namespace: &'n str,
        address: IpAddr,
    },
    Address(IpAddr),
    Nothing,
}

fn protocol(label: &str) -> Option<Protocol> {
    match label {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        "sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// `10-244-3-5` or `fd00-244--3-5`.
pub fn pod_address(label: &str) -> Option<IpAddr> {
    let mut text = [0; 63];
    let text = text.get_mut(..label.len())?;
    for (to, from) in text.iter_mut().zip(label.bytes()) {
        *to = if from == b'-' { b'.' } else { from };
    }
    if let Some(v4) = std::str::from_utf8(text).ok()?.parse::<Ipv4Addr>().ok().filter(|_| !label.contains('.')) {
        return Some(v4.into());
    }
    text.iter_mut().filter(|b| **b == b'.').for_each(|b| *b = b':');
    Some(std::str::from_utf8(text).ok()?.parse::<Ipv6Addr>().ok()?.into())
}

/// The address of a whole reverse name; [`Asked::Branch`] where it is only part of one.
fn reverse(name: &Lower) -> Asked<'_> {
    let Some(count) = name.labels().checked_sub(2) else { return Asked::Nothing };
    match (name.label(count), count) {
        (Some("in-addr"), 1..=4) => {
            let mut octets = [0; 4];
            for i in 0..count {
                let Some(octet) = name.label(i).and_then(decimal) else { return Asked::Nothing };
                octets[count - 1 - i] = octet;
            }
            if count == 4 { Asked::Address(octets.into()) } else { Asked::Branch }
        }
        (Some("ip6"), 1..=32) => {
            let mut bits = 0_u128;
            for i in (0..count).rev() {
                let nibble = name.label(i).filter(|l| l.len() == 1).and_then(|l| u8::from_str_radix(l, 16).ok());
                let Some(nibble) = nibble else { return Asked::Nothing };
                bits = bits << 4 | u128::from(nibble);
            }
            if count == 32 { Asked::Address(Ipv6Addr::from_bits(bits).into()) } else { Asked::Branch }
        }
        _ => Asked::Nothing,
    }
}

/// 0–255 without leading zeros or sign.
fn decimal(label: &str) -> Option<u8> {
    let plain = label.bytes().all(|b| b.is_ascii_digit()) && (label.len() == 1 || !label.starts_with('0'));
    if plain { label.parse().ok() } else { None }
}

/// A name in lower case with the places of its labels, on the stack.
#[derive(Clone, Debug)]
pub struct Lower {
    bytes: [u8; NAME_MAX],
    len: usize,
    starts: [u8; LABELS_MAX],
    labels: usize,
}

impl Lower {
    /// `wire` is an uncompressed name within RFC 1035's limits; what is beyond them is cut off.
    #[must_use]
    pub fn new(wire: &[u8]) -> Self {
        let mut it = Self { bytes: [0; NAME_MAX], len: wire.len().min(NAME_MAX), starts: [0; LABELS_MAX], labels: 0 };
        for (to, from) in it.bytes.iter_mut().zip(wire) {
            *to = from.to_ascii_lowercase(); // a length byte is below 64 and thus no letter
        }
        let mut at = 0;
        while at < it.len && it.bytes[at] != 0 && it.labels < LABELS_MAX {
            it.starts[it.labels] = at as u8;
            it.labels += 1;
            at += 1 + usize::from(it.bytes[at]);
        }
        it
    }

    #[must_use]
    pub fn wire(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Without the root.
    #[must_use]
    pub fn labels(&self) -> usize {
        self.labels
    }

    /// Counted from the left; None where there is none or where it is not UTF-8, as no name of ours is.
    #[must_use]
    pub fn label(&self, i: usize) -> Option<&str> {
        let start = usize::from(*self.starts[..self.labels].get(i)?);
        let length = usize::from(self.bytes[start]);
        std::str::from_utf8(self.bytes.get(start + 1..start + 1 + length)?).ok()
    }

    /// Offset of a label, or of the root.
    #[must_use]
    pub fn at(&self, label: usize) -> usize {
        let root = self.len.saturating_sub(1);
        self.starts[..self.labels].get(label).map_or(root, |s| usize::from(*s))
    }

    /// How many labels are left of a zone that this name is in; whole labels are compared.
    #[must_use]
    pub fn below(&self, zone: &[u8]) -> Option<usize> {
        let start = self.len.checked_sub(zone.len())?;
        let label = (0..=self.labels).find(|&i| self.at(i) == start)?;
        (&self.bytes[start..self.len] == zone).then_some(label)
    }
}

/// The name of an endpoint below its Service: its hostname, its Pod's name where that is wanted and is a label, else
/// its address with dashes. Written into `room`.
pub fn endpoint_label<'r>(endpoint: &'r EndpointRef<'_>, pod_names: bool, room: &'r mut [u8; 48]) -> &'r str {
    if let Some(hostname) = &endpoint.hostname {
        return hostname;
    }
    if let Some(pod) = endpoint.pod.as_ref().filter(|p| pod_names && p.len() <= 63) {
        return pod;
    }
    let mut left = &mut room[..];
    let written = write!(left, "{}", endpoint.address);
    debug_assert!(written.is_ok(), "48 bytes hold any address");
    let mut length = 48 - left.len();
    if room[..length].ends_with(b":") {
        room[length] = b'0'; // a label that ends in a dash would be no host name
        length += 1;
    }
    room[..length].iter_mut().filter(|b| matches!(b, b'.' | b':')).for_each(|b| *b = b'-');
    std::str::from_utf8(&room[..length]).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::packed::About;

    fn zone() -> Zone {
        Zone::new(&DnsConfig::default(), 0).unwrap()
    }

    fn lower(name: &str) -> Lower {
        Lower::new(&encode_name(name).unwrap())
    }

    #[test]
    fn names_are_compared_by_whole_labels() {
        assert_eq!(lower("web.cluster.local").below(&zone().domain), Some(1));
        assert_eq!(lower("cluster.local").below(&zone().domain), Some(0));
        assert_eq!(lower("xcluster.local").below(&zone().domain), None);
        assert_eq!(lower("local").below(&zone().domain), None);
        assert_eq!(lower("a.b").below(&[0]), Some(2));
        // the octets of "cluster.local" inside one label
        let tricky = Lower::new(b"\x0fx\x07cluster\x05local\0");
        assert_eq!(tricky.below(&zone().domain), None);
    }

    #[test]
    fn what_names_ask_for() {
        let zone = zone();
        let of = OfService { namespace: "shop", name: "web" };
        for (name, want) in [
            ("web.shop.svc.cluster.local", Some(Asked::Service(of))),
            ("a.web.shop.svc.cluster.local", Some(Asked::Endpoint(of, "a"))),
            ("_tcp.web.shop.svc.cluster.local", Some(Asked::Protocol(of, Protocol::Tcp))),
            ("_http._udp.web.shop.svc.cluster.local", Some(Asked::Port(of, "http", Protocol::Udp))),
            ("_http._x.web.shop.svc.cluster.local", Some(Asked::Nothing)),
            ("a.b.c.web.shop.svc.cluster.local", Some(Asked::Nothing)),
            ("svc.cluster.local", Some(Asked::Branch)),
            ("example.com", None),
            ("1-2-3-4.shop.pod.cluster.local", Some(Asked::Pod { namespace: "shop", address: [1, 2, 3, 4].into() })),
            ("1-2-3-256.shop.pod.cluster.local", Some(Asked::Nothing)),
            ("01-2-3-4.shop.pod.cluster.local", Some(Asked::Nothing)),
            ("4.3.2.1.in-addr.arpa", Some(Asked::Address([1, 2, 3, 4].into()))),
            ("04.3.2.1.in-addr.arpa", Some(Asked::Nothing)),
            ("2.1.in-addr.arpa", Some(Asked::Branch)),
            ("9.4.3.2.1.in-addr.arpa", Some(Asked::Nothing)),
            ("in-addr.arpa", Some(Asked::Apex)),
        ] {
            assert_eq!(zone.asked(&lower(name)).map(|(a, _)| a), want, "{name}");
        }
    }

    #[test]
    fn addresses_with_dashes() {
        for (text, want) in [
            ("10.244.2.21", "10-244-2-21"),
            ("fd00:244::31", "fd00-244--31"),
            ("fd00:244:0:0:1::", "fd00-244-0-0-1--0"),
            ("fd00:1:2:3:4:5:6:0", "fd00-1-2-3-4-5-6-0"),
        ] {
            let about = About {
                hostname: None,
                node: None,
                zone: None,
                pod: None,
                hints: None,
                ready: true,
                serving: true,
                terminating: false,
            };
            let endpoint = EndpointRef::new(text.parse().unwrap(), &about);
            assert_eq!(endpoint_label(&endpoint, false, &mut [0; 48]), want);
        }
    }
}
