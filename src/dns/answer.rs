//! (query, table, zone) -> what to do with it, with the reply in a buffer. No IO, no clock.

use super::{
    wire::{self, HEADER, Query, Reject, Reply, Section, class, flag, kind, rcode},
    zone::{Asked, Lower, OfService, Zone, endpoint_label, pod_address},
};
use crate::{
    config::PodNames,
    table::{
        Table,
        balance::Nearness,
        model::{Protocol, Service, ServiceKind},
        packed::{EndpointRef, StoredSlice},
    },
};
use std::net::IpAddr;

/// CNAMEs followed inside the cluster before the last one is given as it is; dnsmasq and BIND stop at 10 and 16.
const CHAIN_MAX: usize = 8;
/// Names told for one address (PTR). More than one Service seldom has the same endpoint; the rest is left out.
const NAMES_MAX: usize = 32;
/// Kubernetes DNS specification 1.1.0, section 2.2.
const VERSION: &[u8] = b"\x051.1.0";
/// Endpoints of one Service for which room is kept between queries.
const SCRATCH_MAX: usize = 256;
/// RFC 1035 section 3.3.13, the values that CoreDNS gives: nobody transfers the zone.
const SOA_TIMES: [u32; 3] = [7200, 1800, 86_400];
/// RFC 1035 section 4.2.2.
pub const TCP_MAX: usize = 65_535;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Udp,
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `out` holds the reply.
    Reply,
    /// The name is not ours: ask an upstream.
    Forward,
    /// `out` holds the reply up to a CNAME whose target is not ours, without OPT: ask an upstream for the target, and
    /// go on with [`super::foreign::join`].
    Chase(Box<[u8]>),
    /// `out` holds a reply to something that is no query we can read.
    Reject,
    /// No reply at all.
    Drop,
}

/// Bytes that the reply to a query may have.
#[must_use]
pub fn limit(query: &Query<'_>, via: Via) -> usize {
    match via {
        Via::Udp => query.udp_limit(),
        Via::Tcp => TCP_MAX,
    }
}

/// Answers queries from the table. Holds nothing but scratch, so that a query costs no allocation.
#[derive(Debug)]
pub struct Answerer {
    zone: Zone,
    /// Of the endpoints of the Service at hand; empty between queries.
    addresses: Vec<(Nearness, IpAddr)>,
    targets: Vec<Target>,
    /// Where the next list of endpoints begins: clients take the first.
    turn: usize,
}

impl Answerer {
    #[must_use]
    pub fn new(zone: Zone) -> Self {
        Self { zone, addresses: Vec::new(), targets: Vec::new(), turn: 0 }
    }

    /// Answers one message; `out` is overwritten.
    pub fn reply(&mut self, message: &[u8], via: Via, table: &Table, out: &mut Vec<u8>) -> Outcome {
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Reject::Drop) => return Outcome::Drop,
            Err(Reject::Code(code)) => {
                wire::reject(message, code, out);
                return Outcome::Reject;
            }
        };
        let limit = limit(&query, via);
        if query.edns.is_some_and(|e| e.version != 0) {
            Reply::new(&query, limit, out).finish(rcode::BADVERS);
            return Outcome::Reply;
        }
        if query.class != class::IN || matches!(query.kind, kind::AXFR | kind::IXFR) {
            Reply::new(&query, limit, out).finish(rcode::REFUSED);
            return Outcome::Reply;
        }
        let name = Lower::new(query.name);
        if self.zone.asked(&name).is_none() {
            return Outcome::Forward;
        }
        self.turn = self.turn.wrapping_add(1);
        let mut writer = Writer {
            zone: &self.zone,
            table,
            kind: query.kind,
            addresses: &mut self.addresses,
            targets: &mut self.targets,
            turn: self.turn,
            owner: HEADER,
            reply: Reply::new(&query, limit, out),
        };
        let end = writer.walk(&name);
        let mut reply = writer.reply;
        match end {
            End::Code(code) => {
                if code != rcode::SERVFAIL {
                    reply.set(flag::AA);
                }
                reply.finish(code);
                Outcome::Reply
            }
            End::Miss => Outcome::Forward,
            End::Chase(target) => {
                reply.set(flag::AA);
                reply.pause();
                Outcome::Chase(target)
            }
        }
    }
}

/// How a walk along the CNAMEs of the cluster ended.
enum End {
    Code(u16),
    /// Not here, but below a zone that falls through.
    Miss,
    Chase(Box<[u8]>),
}

/// What one step wrote.
enum Step<'t> {
    /// Records, or none of this type: the name exists.
    Done,
    NoData,
    Missing,
    Cname(&'t str),
}

struct Writer<'a, 't> {
    zone: &'a Zone,
    table: &'t Table,
    kind: u16,
    addresses: &'a mut Vec<(Nearness, IpAddr)>,
    targets: &'a mut Vec<Target>,
    turn: usize,
    /// Where the name of the records at hand stands in the reply: the question's, or a CNAME's target.
    owner: usize,
    reply: Reply<'a>,
}

/// What one SRV record of a headless Service points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    label: [u8; 63],
    length: u8,
    port: u16,
    address: IpAddr,
    /// Where its name stands in the reply; 0: not written.
    at: usize,
}

impl Target {
    fn new(endpoint: EndpointRef<'_>, pod_names: bool, port: u16) -> Self {
        let mut room = [0; 48];
        let name = endpoint_label(&endpoint, pod_names, &mut room).as_bytes();
        let mut it = Self { label: [0; 63], length: name.len().min(63) as u8, port, address: endpoint.address, at: 0 };
        it.label.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        it
    }

    fn name(&self) -> &str {
        std::str::from_utf8(&self.label[..self.length.into()]).unwrap_or("")
    }
}

/// RFC 1035 section 4.1.4: 14 bits.
const POINTER_MAX: usize = 0x3fff;

/// Compression pointer to an offset up to [`POINTER_MAX`].
fn pointer(at: usize) -> impl FnOnce(&mut Vec<u8>) {
    move |out| out.extend_from_slice(&(0xc000 | at as u16).to_be_bytes())
}

fn label(out: &mut Vec<u8>, text: &str) {
    let text = &text.as_bytes()[..text.len().min(63)];
    out.push(text.len() as u8);
    out.extend_from_slice(text);
}

impl<'t> Writer<'_, 't> {
    fn walk(&mut self, asked: &Lower) -> End {
        let mut name = asked.clone();
        let mut seen: Vec<Box<[u8]>> = Vec::new();
        loop {
            let Some((what, zone_at)) = self.zone.asked(&name) else { return End::Chase(name.wire().into()) };
            let apex = &name.wire()[zone_at..];
            let target = match self.step(what, apex) {
                Step::Done => return End::Code(rcode::NOERROR),
                Step::NoData => {
                    self.soa(Section::Authority, zone_at);
                    return End::Code(rcode::NOERROR);
                }
                Step::Missing if self.zone.falls_through(&name) => {
                    // behind a CNAME there is a reply already, and the upstreams do not have what is ours
                    return if seen.is_empty() { End::Miss } else { End::Code(rcode::NXDOMAIN) };
                }
                Step::Missing if !self.table.synced() => return End::Code(rcode::SERVFAIL),
                Step::Missing => {
                    self.soa(Section::Authority, zone_at);
                    return End::Code(rcode::NXDOMAIN);
                }
                Step::Cname(target) => target,
            };
            let Some(target) = wire::encode_name(target) else { return End::Code(rcode::SERVFAIL) };
            let data_at = self.reply.position() + 2 + 10;
            if !self.record(Section::Answer, kind::CNAME, |out| out.extend_from_slice(&target)) {
                return End::Code(rcode::NOERROR);
            }
            let looped = target[..] == *asked.wire() || seen.contains(&target);
            if !matches!(self.kind, kind::A | kind::AAAA) || looped || seen.len() == CHAIN_MAX {
                return End::Code(rcode::NOERROR);
            }
            name = Lower::new(&target);
            self.owner = data_at;
            seen.push(target);
        }
    }

    fn step(&mut self, asked: Asked<'_>, apex: &[u8]) -> Step<'t> {
        match asked {
            Asked::Nothing => Step::Missing,
            Asked::Branch => Step::NoData,
            Asked::Apex if *apex != *self.zone.domain && self.zone.fallthrough.iter().any(|z| **z == *apex) => {
                Step::Missing
            }
            Asked::Apex => self.apex(apex),
            Asked::Version => {
                if self.kind == kind::TXT {
                    self.record(Section::Answer, kind::TXT, |out| out.extend_from_slice(VERSION));
                    return Step::Done;
                }
                Step::NoData
            }
            Asked::Nameserver => self.some_addresses([self.zone.address].into_iter()),
            Asked::Namespace(namespace) if self.exists(namespace) => Step::NoData,
            Asked::Pod { namespace, address } if self.has_pod(namespace, address) => {
                self.some_addresses([address].into_iter())
            }
            Asked::Namespace(_) | Asked::Pod { .. } => Step::Missing,
            Asked::Address(address) => self.names(address),
            Asked::Service(of) => self.find(of).map_or(Step::Missing, |s| self.service(s)),
            Asked::Endpoint(of, label) => self.find(of).map_or(Step::Missing, |s| self.endpoint(s, label)),
            Asked::Port(of, port, protocol) => {
                self.find(of).map_or(Step::Missing, |s| self.port(s, Some(port), protocol))
            }
            Asked::Protocol(of, protocol) => self.find(of).map_or(Step::Missing, |s| self.port(s, None, protocol)),
        }
    }

    fn exists(&self, namespace: &str) -> bool {
        self.zone.shows(namespace) && self.table.has_namespace(namespace)
    }

    fn has_pod(&self, namespace: &str, address: IpAddr) -> bool {
        let verified = self.zone.pods != PodNames::Verified || self.table.has_pod(namespace, address);
        verified && self.exists(namespace)
    }

    fn find(&self, of: OfService<'_>) -> Option<&'t Service> {
        self.table.service(of.namespace, of.name).filter(|_| self.zone.shows(of.namespace))
    }

    /// One record of the name at hand.
    fn record(&mut self, section: Section, kind: u16, data: impl FnOnce(&mut Vec<u8>)) -> bool {
        let fits = self.reply.record(section, pointer(self.owner), kind, self.zone.ttl, data);
        if !fits && section != Section::Additional {
            self.reply.set(flag::TC);
        }
        fits
    }

    /// The SOA of a zone whose name begins at an offset in the name at hand (RFC 2308 section 3).
    fn soa(&mut self, section: Section, zone_at: usize) {
        let serial = self.zone.serial.wrapping_add(self.table.version() as u32);
        let [refresh, retry, expire] = SOA_TIMES;
        let zone_at = self.owner + zone_at;
        let ttl = self.zone.ttl;
        let fits = self.reply.record(section, pointer(zone_at), kind::SOA, ttl, |out| {
            label(out, "ns");
            label(out, "dns");
            pointer(zone_at)(out);
            label(out, "hostmaster");
            pointer(zone_at)(out);
            for number in [serial, refresh, retry, expire, ttl] {
                out.extend_from_slice(&number.to_be_bytes());
            }
        });
        if !fits {
            self.reply.set(flag::TC);
        }
    }

    fn apex(&mut self, apex: &[u8]) -> Step<'t> {
        match self.kind {
            kind::SOA => {
                self.soa(Section::Answer, 0);
                Step::Done
            }
            kind::NS => {
                let owner = self.owner;
                let target_at = self.reply.position() + 2 + 10;
                self.record(Section::Answer, kind::NS, |out| {
                    label(out, "ns");
                    label(out, "dns");
                    pointer(owner)(out);
                });
                if *apex == *self.zone.domain {
                    self.glue(target_at, self.zone.address);
                }
                Step::Done
            }
            _ => Step::NoData,
        }
    }

    /// An address of a target whose name stands at an offset; left out where no pointer reaches.
    fn glue(&mut self, owner: usize, address: IpAddr) {
        if owner > POINTER_MAX {
            return;
        }
        let (kind, ttl) = (kind_of(address), self.zone.ttl);
        self.reply.record(Section::Additional, pointer(owner), kind, ttl, |out| octets(out, address));
    }

    /// Address records of those of the type asked for.
    fn some_addresses(&mut self, addresses: impl Iterator<Item = IpAddr>) -> Step<'t> {
        let (kind, mut some) = (self.kind, false);
        for address in addresses.filter(|a| kind_of(*a) == kind) {
            some = true;
            if !self.record(Section::Answer, kind_of(address), |out| octets(out, address)) {
                break;
            }
        }
        if some { Step::Done } else { Step::NoData }
    }

    /// Address records of the endpoints that are ready and have the name, each once and the nearest first; missing
    /// where there are none.
    fn endpoint_addresses(&mut self, service: &Service, name: Option<&str>) -> Step<'t> {
        let mut addresses = std::mem::take(self.addresses);
        let address = name.and_then(pod_address);
        let named = self.ready(service).map(|(_, e)| e).filter(|e| name.is_none_or(|n| self.called(*e, n, address)));
        addresses.extend(named.map(|e| (self.table.nearness(&self.zone.here, e), e.address)));
        addresses.sort_unstable_by_key(|(near, address)| (*address, *near));
        addresses.dedup_by_key(|(_, address)| *address);
        addresses.sort_unstable();
        for equal in addresses.chunk_by_mut(|a, b| a.0 == b.0) {
            equal.rotate_left(self.turn % equal.len());
        }
        let step = if addresses.is_empty() {
            Step::Missing
        } else {
            self.some_addresses(addresses.iter().map(|(_, address)| *address))
        };
        addresses.clear();
        addresses.shrink_to(SCRATCH_MAX);
        *self.addresses = addresses;
        step
    }

    fn ready(&self, service: &Service) -> impl Iterator<Item = (&'t StoredSlice, EndpointRef<'t>)> + use<'t> {
        self.table.endpoints(&service.id).filter(|(_, e)| e.ready)
    }

    /// `address` is the one that the name spells: an address is compared sooner than written.
    fn called(&self, endpoint: EndpointRef<'_>, name: &str, address: Option<IpAddr>) -> bool {
        let by_name = endpoint.hostname.is_some() || self.zone.pod_names && endpoint.pod.is_some();
        let plain = endpoint.address.to_canonical() == endpoint.address;
        if !by_name && plain && address != Some(endpoint.address) {
            return false;
        }
        endpoint_label(&endpoint, self.zone.pod_names, &mut [0; 48]).eq_ignore_ascii_case(name)
    }

    fn service(&mut self, service: &'t Service) -> Step<'t> {
        match &service.kind {
            ServiceKind::External(target) => Step::Cname(target),
            ServiceKind::Headless => self.endpoint_addresses(service, None),
            ServiceKind::ClusterIp => {
                if self.zone.empty_is_missing && self.ready(service).next().is_none() {
                    return Step::Missing;
                }
                self.some_addresses(service.vips.iter().copied())
            }
        }
    }

    fn endpoint(&mut self, service: &'t Service, name: &str) -> Step<'t> {
        match &service.kind {
            ServiceKind::External(_) => Step::Missing,
            ServiceKind::Headless | ServiceKind::ClusterIp => self.endpoint_addresses(service, Some(name)),
        }
    }

    /// SRV of a named port; without a port, whether there is one of that protocol.
    fn port(&mut self, service: &'t Service, port: Option<&str>, protocol: Protocol) -> Step<'t> {
        let matches = |name: &str, of: Protocol| {
            of == protocol && !name.is_empty() && port.is_none_or(|p| p.eq_ignore_ascii_case(name))
        };
        let found = match &service.kind {
            ServiceKind::External(_) => return Step::Missing,
            ServiceKind::ClusterIp => service.ports.iter().any(|p| matches(&p.name, p.protocol)),
            ServiceKind::Headless => {
                self.ready(service).any(|(s, _)| s.ports.iter().any(|p| matches(&p.name, p.protocol)))
            }
        };
        if !found {
            return Step::Missing;
        }
        if port.is_none() || self.kind != kind::SRV {
            return Step::NoData;
        }
        match &service.kind {
            ServiceKind::External(_) => {}
            ServiceKind::ClusterIp => {
                let ports = service.ports.iter().filter(|p| matches(&p.name, p.protocol));
                for port in ports {
                    if let Some(at) = self.srv(service, None, port.number, 1) {
                        service.vips.iter().for_each(|vip| self.glue(at, *vip));
                    }
                }
            }
            ServiceKind::Headless => self.headless_srv(service, matches),
        }
        Step::Done
    }

    /// One SRV for each pair of endpoint name and port, then the addresses.
    fn headless_srv(&mut self, service: &'t Service, matches: impl Fn(&str, Protocol) -> bool) {
        let mut targets = std::mem::take(self.targets);
        for (slice, endpoint) in self.ready(service) {
            let named = slice.ports.iter().filter(|p| matches(&p.name, p.protocol));
            targets.extend(named.map(|p| Target::new(endpoint, self.zone.pod_names, p.number)));
        }
        targets.sort_unstable();
        targets.dedup();
        let same = |a: &Target, b: &Target| (a.name(), a.port) == (b.name(), b.port);
        let count = targets.chunk_by(same).count();
        for group in targets.chunk_by_mut(same) {
            let Some(at) = self.srv(service, Some(group[0].name()), group[0].port, count) else { break };
            group.iter_mut().for_each(|t| (t.port, t.at) = (0, at));
        }
        targets.retain(|t| t.at > 0);
        targets.sort_unstable();
        targets.dedup_by(|a, b| (a.name(), a.address) == (b.name(), b.address));
        targets.iter().for_each(|t| self.glue(t.at, t.address));
        targets.clear();
        targets.shrink_to(SCRATCH_MAX);
        *self.targets = targets;
    }

    /// Writes one SRV record and says where its target's name stands. The target is not compressed (RFC 2782).
    fn srv(&mut self, service: &Service, endpoint: Option<&str>, port: u16, of: usize) -> Option<usize> {
        let target_at = self.reply.position() + 2 + 10 + 6;
        let weight = (100 / of.max(1)).max(1) as u16;
        let zone = self.zone;
        self.record(Section::Answer, kind::SRV, |out| {
            for number in [0, weight, port] {
                out.extend_from_slice(&number.to_be_bytes());
            }
            service_name(out, service, endpoint, zone);
        })
        .then_some(target_at)
    }

    /// PTR records: the Service whose virtual address it is, else the endpoints that have it.
    fn names(&mut self, address: IpAddr) -> Step<'t> {
        let zone = self.zone;
        let mut some = false;
        let of_vip = self.table.by_vip(address).filter(|s| s.vips.contains(&address) && zone.shows(&s.id.namespace));
        if let Some(service) = of_vip {
            if self.kind != kind::PTR {
                return Step::NoData;
            }
            self.record(Section::Answer, kind::PTR, |out| service_name(out, service, None, zone));
            return Step::Done;
        }
        let table = self.table;
        let told = |(s, e): &(&Service, EndpointRef<'_>)| e.ready && zone.shows(&s.id.namespace);
        let all = || table.by_endpoint(address).filter(told).take(NAMES_MAX);
        for (i, (service, endpoint)) in all().enumerate() {
            if all().take(i).any(|(s, e)| s.id == service.id && e.hostname == endpoint.hostname) {
                continue;
            }
            some = true;
            if self.kind != kind::PTR {
                break;
            }
            let mut room = [0; 48];
            let name = endpoint_label(&endpoint, zone.pod_names, &mut room);
            self.record(Section::Answer, kind::PTR, |out| service_name(out, service, Some(name), zone));
        }
        match (some, self.kind) {
            (false, _) => Step::Missing,
            (true, kind::PTR) => Step::Done,
            (true, _) => Step::NoData,
        }
    }
}

/// `[endpoint.]service.namespace.svc.<domain>`, uncompressed.
fn service_name(out: &mut Vec<u8>, service: &Service, endpoint: Option<&str>, zone: &Zone) {
    if let Some(endpoint) = endpoint {
        label(out, endpoint);
    }
    label(out, &service.id.name);
    label(out, &service.id.namespace);
    label(out, "svc");
    out.extend_from_slice(&zone.domain);
}

fn kind_of(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(_) => kind::A,
        IpAddr::V6(_) => kind::AAAA,
    }
}

fn octets(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => out.extend_from_slice(&v4.octets()),
        IpAddr::V6(v6) => out.extend_from_slice(&v6.octets()),
    }
}

#[cfg(test)]
mod tests;
