//! Table and peers -> bytes.

use super::{
    HEADER, MAGIC, Meta, NODE, PEERS_MAX, POD, RULE, SERVICE, SLICE, SNAPSHOT_MAX, SOURCES, VERSION, checksum,
    source_byte,
};
use crate::{
    table::{
        Record, Table,
        model::{Affinity, Name, NodeInfo, Pod, Protocol, Service, ServiceId, ServiceKind, Source},
        packed::{EndpointRef, StoredSlice},
        rule::{Choice, Rule, Traffic},
    },
    tunnel::Remembered,
};
use std::net::{IpAddr, SocketAddr};

/// Records that one step takes: well under a millisecond.
const STEP: usize = 256;

/// Writes a table in steps, between which it may change: what it misses by that comes with the next snapshot, and
/// a Service and its slices are of one moment.
#[derive(Debug)]
pub struct Encoder {
    out: Vec<u8>,
    /// Where the bits of the complete sources are, and the number of objects.
    complete_at: usize,
    count_at: usize,
    objects: u32,
    left_out: usize,
    next: usize,
}

/// The part of the body that tells of peers; equal peers give equal bytes.
#[must_use]
pub fn encode_peers(peers: &[Remembered]) -> Vec<u8> {
    let peers = &peers[..peers.len().min(PEERS_MAX)];
    let mut out = Vec::new();
    put_len(&mut out, peers.len());
    for peer in peers {
        let certificate = peer.certificate.encode();
        put_len(&mut out, certificate.len());
        out.extend_from_slice(&certificate);
        put_socket(&mut out, peer.address);
    }
    out
}

impl Encoder {
    /// `peers` as of [`encode_peers`].
    #[must_use]
    pub fn new(meta: &Meta, peers: &[u8], table: &Table) -> Self {
        let mut out = Vec::with_capacity(4 << 10);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.resize(HEADER, 0);
        out.extend_from_slice(&meta.unix.to_be_bytes());
        put_text(&mut out, &meta.node);
        match &meta.cluster {
            None => out.push(0),
            Some(ca) => {
                out.push(1);
                out.extend_from_slice(ca);
            }
        }
        let complete = |source| table.lists.get(&source).is_some_and(super::super::reduce::List::complete);
        let complete_at = out.len();
        out.push(SOURCES.iter().filter(|(source, _)| complete(*source)).fold(0, |bits, (_, byte)| bits | byte));
        out.extend_from_slice(peers);
        let count_at = out.len();
        out.extend_from_slice(&[0; 4]);
        Self { out, complete_at, count_at, objects: 0, left_out: 0, next: 0 }
    }

    /// True once everything is in.
    pub fn step(&mut self, table: &Table) -> bool {
        let until = table.records.len().min(self.next + STEP);
        let from = std::mem::replace(&mut self.next, until);
        table.records.get(from..until).unwrap_or_default().iter().for_each(|record| self.record(record));
        if until < table.records.len() {
            return self.out.len() > SNAPSHOT_MAX;
        }
        for entry in table.nodes.values().flatten() {
            self.object(NODE, entry.source, |out| put_node(out, &entry.value));
        }
        for entry in table.pods.entries() {
            self.object(POD, entry.source, |out| put_pod(out, &entry.value));
        }
        for entry in table.rules.versions().flatten() {
            self.object(RULE, entry.source, |out| put_rule(out, &entry.value));
        }
        true
    }

    fn record(&mut self, record: &Record) {
        for entry in &record.services {
            self.object(SERVICE, entry.source, |out| put_service(out, &entry.value));
        }
        for entry in &record.slices {
            self.object(SLICE, entry.source, |out| put_slice(out, &record.id, &entry.value));
        }
    }

    fn object(&mut self, kind: u8, source: Source, put: impl FnOnce(&mut Vec<u8>) -> bool) {
        let Some(source) = source_byte(source) else { return };
        let start = self.out.len();
        self.out.extend_from_slice(&[kind, source]);
        if put(&mut self.out) {
            self.objects += 1;
        } else {
            self.out.truncate(start);
            self.left_out += 1;
        }
    }

    /// The objects that are in, and those that are not: for a text beyond 255 bytes or a list beyond 65,535, or all of
    /// them where they are beyond [`SNAPSHOT_MAX`].
    #[must_use]
    pub fn counts(&self) -> (u32, usize) {
        if self.out.len() > SNAPSHOT_MAX {
            (0, self.objects as usize + self.left_out)
        } else {
            (self.objects, self.left_out)
        }
    }

    /// What [`seal`] makes a snapshot of.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        let (objects, _) = self.counts();
        if self.out.len() > SNAPSHOT_MAX {
            self.out.truncate(self.count_at + 4);
            // Or the absent names would be said not to exist.
            self.out[self.complete_at] = 0;
        }
        self.out[self.count_at..self.count_at + 4].copy_from_slice(&objects.to_be_bytes());
        self.out
    }
}

/// Fills in length and sum: apart, since a slow CPU takes its time for them.
pub fn seal(snapshot: &mut [u8]) {
    let Some((header, body)) = snapshot.split_at_mut_checked(HEADER) else { return };
    header[10..14].copy_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
    header[14..].copy_from_slice(&checksum(body).to_be_bytes());
}

/// False where it has no room; what was written then is of no use.
fn put_text(out: &mut Vec<u8>, text: &str) -> bool {
    let Ok(len) = u8::try_from(text.len()) else { return false };
    out.push(len);
    out.extend_from_slice(text.as_bytes());
    true
}

fn put_len(out: &mut Vec<u8>, len: usize) -> bool {
    let Ok(len) = u16::try_from(len) else { return false };
    out.extend_from_slice(&len.to_be_bytes());
    true
}

/// Empty: none. No name is.
fn put_maybe(out: &mut Vec<u8>, text: Option<&str>) -> bool {
    put_text(out, text.unwrap_or_default())
}

fn put_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
}

fn put_socket(out: &mut Vec<u8>, address: SocketAddr) {
    put_address(out, address.ip());
    out.extend_from_slice(&address.port().to_be_bytes());
}

fn put_list<T>(out: &mut Vec<u8>, list: &[T], mut put: impl FnMut(&mut Vec<u8>, &T) -> bool) -> bool {
    put_len(out, list.len()) && list.iter().all(|item| put(out, item))
}

fn put_addresses(out: &mut Vec<u8>, list: &[IpAddr]) -> bool {
    put_list(out, list, |out, ip| {
        put_address(out, *ip);
        true
    })
}

fn put_port(out: &mut Vec<u8>, name: &str, protocol: Protocol, numbers: &[u16]) -> bool {
    out.push(match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    });
    numbers.iter().for_each(|n| out.extend_from_slice(&n.to_be_bytes()));
    put_text(out, name)
}

fn put_service(out: &mut Vec<u8>, s: &Service) -> bool {
    let (kind, target) = match &s.kind {
        ServiceKind::ClusterIp => (0, ""),
        ServiceKind::Headless => (1, ""),
        ServiceKind::External(target) => (2, &**target),
    };
    // 0: no affinity; the API allows 1 to 86,400 s.
    let sticky = match s.affinity {
        Affinity::None => 0,
        Affinity::ClientIp { timeout } => u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1),
    };
    let flags = u8::from(s.local_only) | u8::from(s.not_proxied) << 1 | u8::from(s.external_local) << 2;
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&sticky.to_be_bytes());
    put_text(out, &s.id.namespace)
        && put_text(out, &s.id.name)
        && put_text(out, target)
        && put_addresses(out, &s.vips)
        && put_addresses(out, &s.external_ips)
        && put_list(out, &s.ports, |out, p| put_port(out, &p.name, p.protocol, &[p.number, p.node_port]))
}

fn put_slice(out: &mut Vec<u8>, of: &ServiceId, s: &StoredSlice) -> bool {
    put_text(out, &of.namespace)
        && put_text(out, &s.name)
        && put_text(out, &of.name)
        && put_list(out, &s.ports, |out, p| put_port(out, &p.name, p.protocol, &[p.number]))
        && put_len(out, s.len())
        && s.endpoints().all(|e| put_endpoint(out, e))
}

fn put_endpoint(out: &mut Vec<u8>, e: EndpointRef<'_>) -> bool {
    put_address(out, e.address);
    let hints = u8::from(e.hints.is_some()) << 3;
    out.push(u8::from(e.ready) | u8::from(e.serving) << 1 | u8::from(e.terminating) << 2 | hints);
    let name = |out: &mut Vec<u8>, name: &Name| put_text(out, name);
    [&e.hostname, &e.node, &e.zone, &e.pod].into_iter().all(|name| put_maybe(out, name.as_deref()))
        && e.hints.as_ref().is_none_or(|h| put_list(out, &h.zones, name) && put_list(out, &h.nodes, name))
}

fn put_id(out: &mut Vec<u8>, id: &ServiceId) -> bool {
    put_text(out, &id.namespace) && put_text(out, &id.name)
}

fn put_rule(out: &mut Vec<u8>, r: &Rule) -> bool {
    out.push(u8::from(r.private) | u8::from(r.host.is_some()) << 1);
    put_id(out, &r.id)
        && r.host.as_ref().is_none_or(|host| put_id(out, host))
        && put_text(out, &r.created)
        && put_text(out, &r.not_done)
        && put_traffic(out, &r.traffic)
        && put_list(out, &r.ports, |out, (port, traffic)| {
            out.extend_from_slice(&port.to_be_bytes());
            put_traffic(out, traffic)
        })
}

fn put_traffic(out: &mut Vec<u8>, t: &Traffic) -> bool {
    let (choice, name) = match &t.choice {
        None => (0, ""),
        Some(Choice::RoundRobin) => (1, ""),
        Some(Choice::Random) => (2, ""),
        Some(Choice::LeastRequest) => (3, ""),
        Some(Choice::SourceIp) => (4, ""),
        Some(Choice::Header(name)) => (5, &**name),
    };
    out.push(choice);
    t.numbers.iter().for_each(|n| out.extend_from_slice(&n.to_be_bytes()));
    put_text(out, name)
}

fn put_node(out: &mut Vec<u8>, n: &NodeInfo) -> bool {
    put_text(out, &n.name) && put_maybe(out, n.zone.as_deref()) && put_addresses(out, &n.addresses)
}

fn put_pod(out: &mut Vec<u8>, p: &Pod) -> bool {
    put_text(out, &p.id.namespace) && put_text(out, &p.id.name) && put_addresses(out, &p.addresses)
}
