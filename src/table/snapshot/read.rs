//! Bytes -> table and peers. Nothing is used of a file that is not whole and right to its last byte.

use super::{
    HEADER, MAGIC, Meta, NODE, PEERS_MAX, POD, RULE, SERVICE, SLICE, SNAPSHOT_MAX, SOURCES, VERSION, checksum,
};
use crate::{
    table::{
        Table,
        model::*,
        rule::{Choice, NUMBERS, Rule, Traffic},
    },
    tunnel::{Remembered, identity::Certificate},
};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

/// Why a file gives nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    TooLong,
    Foreign,
    /// The one that it has.
    Version(u16),
    /// It has, or says, other than this many bytes.
    Length(usize),
    Checksum,
    /// What is wrong behind a good sum.
    Content(&'static str),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "it is longer than {} MiB", SNAPSHOT_MAX >> 20),
            Self::Foreign => f.write_str("it is no snapshot"),
            Self::Version(v) => write!(f, "it has version {v}, and this weft reads version {VERSION}"),
            Self::Length(says) => write!(f, "it is cut or something follows it: it should have {says} bytes"),
            Self::Checksum => f.write_str("it is damaged: its checksum is wrong"),
            Self::Content(what) => write!(f, "{what}"),
        }
    }
}

impl std::error::Error for Unusable {}

/// A snapshot that is whole and right.
#[derive(Debug)]
pub struct Saved {
    pub meta: Meta,
    pub peers: Vec<Remembered>,
    /// How many objects there are, of all sources.
    pub objects: u32,
    complete: u8,
    bytes: Vec<u8>,
    /// Where the first object is.
    at: usize,
}

/// # Errors
/// The first thing that is wrong, to the last byte.
pub fn open(bytes: Vec<u8>) -> Result<Saved, Unusable> {
    if bytes.len() > SNAPSHOT_MAX {
        return Err(Unusable::TooLong);
    }
    let mut r = Reader(&bytes);
    if r.take(MAGIC.len()) != Some(MAGIC) {
        return Err(Unusable::Foreign);
    }
    let version = r.u16().ok_or(Unusable::Length(HEADER))?;
    if version != VERSION {
        return Err(Unusable::Version(version));
    }
    let (len, sum) = r.u32().zip(r.u64()).ok_or(Unusable::Length(HEADER))?;
    if r.0.len() as u64 != u64::from(len) {
        return Err(Unusable::Length((len as usize).saturating_add(HEADER)));
    }
    if checksum(r.0) != sum {
        return Err(Unusable::Checksum);
    }
    let (meta, complete, peers, objects) = r.head().ok_or(Unusable::Content("its head cannot be read"))?;
    let at = bytes.len() - r.0.len();
    for _ in 0..objects {
        r.object().ok_or(Unusable::Content("an object of it cannot be read"))?;
    }
    if r.0.is_empty() {
        Ok(Saved { meta, peers, objects, complete, bytes, at })
    } else {
        Err(Unusable::Content("something follows its objects"))
    }
}

impl Saved {
    /// Puts the objects of these sources into the table, as complete lists where they were such; the next complete
    /// list of each source replaces them. How many there were.
    pub fn restore(&self, table: &mut Table, sources: &[Source]) -> usize {
        let mut rest = Reader(self.bytes.get(self.at..).unwrap_or_default());
        let objects = (0..self.objects).map_while(|_| rest.object());
        let wanted = objects.filter(|(source, _)| sources.contains(source));
        let count = wanted.map(|(source, object)| table.apply(Change::Apply(source, object))).count();
        for (source, bit) in SOURCES {
            if sources.contains(&source) && self.complete & bit != 0 {
                table.apply(Change::Complete(source));
            }
        }
        count
    }
}

struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, len: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[b]| b)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Option<&'b str> {
        let len = self.u8()?;
        std::str::from_utf8(self.take(len.into())?).ok()
    }

    fn name(&mut self) -> Option<Name> {
        self.text().map(Into::into)
    }

    fn maybe(&mut self) -> Option<Option<Name>> {
        self.text().map(|text| (!text.is_empty()).then(|| text.into()))
    }

    fn address(&mut self) -> Option<IpAddr> {
        match self.u8()? {
            4 => self.array::<4>().map(|b| Ipv4Addr::from(b).into()),
            6 => self.array::<16>().map(|b| Ipv6Addr::from(b).into()),
            _ => None,
        }
    }

    /// Memory follows what is there and not what the length promises.
    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        (0..self.u16()?).map(|_| item(self)).collect()
    }

    fn head(&mut self) -> Option<(Meta, u8, Vec<Remembered>, u32)> {
        let (unix, node) = (self.u64()?, self.text()?.to_owned());
        let cluster = match self.u8()? {
            0 => None,
            1 => Some(self.array()?),
            _ => return None,
        };
        let complete = self.u8()?;
        let peers = self.list(Self::peer).filter(|peers| peers.len() <= PEERS_MAX)?;
        Some((Meta { unix, node, cluster }, complete, peers, self.u32()?))
    }

    fn peer(&mut self) -> Option<Remembered> {
        let len = self.u16()?;
        let certificate = Certificate::decode(self.take(len.into())?).ok()?;
        let address = SocketAddr::new(self.address()?, self.u16()?);
        Some(Remembered { certificate, address })
    }

    fn object(&mut self) -> Option<(Source, Object)> {
        let (kind, source) = (self.u8()?, self.u8()?);
        let (source, _) = SOURCES.into_iter().find(|(_, byte)| *byte == source)?;
        let object = match kind {
            SERVICE => Object::Service(self.service()?),
            SLICE => Object::Slice(self.slice()?),
            NODE => {
                let (name, zone) = (self.name()?, self.maybe()?);
                Object::Node(NodeInfo { name, zone, addresses: self.list(Self::address)? })
            }
            POD => {
                let id = PodId { namespace: self.name()?, name: self.name()? };
                Object::Pod(Pod { id, addresses: self.list(Self::address)? })
            }
            RULE => Object::Rule(self.rule()?),
            _ => return None,
        };
        Some((source, object))
    }

    fn protocol(&mut self) -> Option<Protocol> {
        match self.u8()? {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            132 => Some(Protocol::Sctp),
            _ => None,
        }
    }

    fn service(&mut self) -> Option<Service> {
        let (kind, flags, sticky) = (self.u8()?, self.u8()?, self.u32()?);
        let id = ServiceId { namespace: self.name()?, name: self.name()? };
        let target = self.name()?;
        let kind = match kind {
            0 => ServiceKind::ClusterIp,
            1 => ServiceKind::Headless,
            2 => ServiceKind::External(target),
            _ => return None,
        };
        let affinity = match sticky {
            0 => Affinity::None,
            seconds => Affinity::ClientIp { timeout: Duration::from_secs(seconds.into()) },
        };
        Some(Service {
            id,
            kind,
            vips: self.list(Self::address)?.into(),
            external_ips: self.list(Self::address)?.into(),
            ports: self
                .list(|r| {
                    let (protocol, number, node_port) = (r.protocol()?, r.u16()?, r.u16()?);
                    Some(ServicePort { name: r.name()?, number, protocol, node_port })
                })?
                .into(),
            affinity,
            local_only: flags & 1 != 0,
            external_local: flags & 4 != 0,
            not_proxied: flags & 2 != 0,
        })
    }

    fn slice(&mut self) -> Option<Slice> {
        Some(Slice {
            id: SliceId { namespace: self.name()?, name: self.name()? },
            service: self.name()?,
            ports: self
                .list(|r| {
                    let (protocol, number) = (r.protocol()?, r.u16()?);
                    Some(SlicePort { name: r.name()?, number, protocol })
                })?
                .into(),
            endpoints: self.list(Self::endpoint)?,
        })
    }

    fn endpoint(&mut self) -> Option<Endpoint> {
        let (address, flags) = (self.address()?, self.u8()?);
        let [hostname, node, zone, pod] = [self.maybe()?, self.maybe()?, self.maybe()?, self.maybe()?];
        let (ready, serving, terminating) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        let hints = match flags & 8 {
            0 => None,
            _ => Some(Hints { zones: self.list(Self::name)?.into(), nodes: self.list(Self::name)?.into() }.into()),
        };
        Some(Endpoint { address, hostname, node, zone, pod, hints, ready, serving, terminating })
    }

    fn id(&mut self) -> Option<ServiceId> {
        Some(ServiceId { namespace: self.name()?, name: self.name()? })
    }

    fn rule(&mut self) -> Option<Rule> {
        let flags = self.u8()?;
        Some(Rule {
            id: self.id()?,
            host: if flags & 2 != 0 { Some(self.id()?) } else { None },
            created: self.name()?,
            private: flags & 1 != 0,
            not_done: self.name()?,
            traffic: self.traffic()?,
            ports: self.list(|r| Some((r.u16()?, r.traffic()?)))?.into(),
        })
    }

    fn traffic(&mut self) -> Option<Rc<Traffic>> {
        let (choice, mut numbers) = (self.u8()?, [0; NUMBERS]);
        for number in &mut numbers {
            *number = self.u32()?;
        }
        let name = self.name()?;
        let choice = match choice {
            0 => None,
            1 => Some(Choice::RoundRobin),
            2 => Some(Choice::Random),
            3 => Some(Choice::LeastRequest),
            4 => Some(Choice::SourceIp),
            5 => Some(Choice::Header(name)),
            _ => return None,
        };
        Some(Traffic { choice, numbers }.into())
    }
}
