//! NATs in RFC 4787's words: a mapping, a filter, an expiry.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// None at all: a stateful firewall in front of an address.
    Same,
    Independent,
    AddressDependent,
    /// Address and port-dependent, the next port for each destination.
    Sequential,
    /// The same with a random port.
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Independent,
    AddressDependent,
    PortDependent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Public,
    FullCone,
    Restricted,
    PortRestricted,
    /// Port-restricted behind port-restricted.
    Double,
    AddressDependent,
    Symmetric,
    SymmetricRandom,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Public,
        Self::FullCone,
        Self::Restricted,
        Self::PortRestricted,
        Self::Double,
        Self::AddressDependent,
        Self::Symmetric,
        Self::SymmetricRandom,
    ];

    /// None: no NAT.
    pub fn behaviour(self) -> Option<(Mapping, Filter)> {
        Some(match self {
            Self::Public => return None,
            Self::FullCone => (Mapping::Independent, Filter::Independent),
            Self::Restricted => (Mapping::Independent, Filter::AddressDependent),
            Self::PortRestricted | Self::Double => (Mapping::Independent, Filter::PortDependent),
            Self::AddressDependent => (Mapping::AddressDependent, Filter::PortDependent),
            Self::Symmetric => (Mapping::Sequential, Filter::PortDependent),
            Self::SymmetricRandom => (Mapping::Random, Filter::PortDependent),
        })
    }

    /// The oracle: can two nodes that know each other's mapping towards a relay, that answer the source
    /// that they observe and foretell the ports of a NAT that gives them in sequence, get a path without the relay?
    pub fn direct_possible(self, other: Self) -> bool {
        let passes = |from: Self, to: Self| {
            let stable = from.behaviour().is_none_or(|(m, _)| m == Mapping::Independent);
            let open = to.behaviour().is_none_or(|(_, f)| f != Filter::PortDependent);
            stable || open
        };
        // A port that comes next is written to before it is used: that opens the other filter.
        let foretold = |sure: Self, next: Self| {
            let stable = sure.behaviour().is_none_or(|(m, _)| m == Mapping::Independent);
            stable && next.behaviour().is_some_and(|(m, _)| m == Mapping::Sequential)
        };
        passes(self, other) && passes(other, self) || foretold(self, other) || foretold(other, self)
    }
}

struct Entry {
    inside: SocketAddr,
    /// The destination that the mapping is for; None: any.
    key: Option<SocketAddr>,
    port: u16,
    /// Who was sent to.
    sent: BTreeSet<SocketAddr>,
    used: Instant,
}

pub struct Nat {
    pub public: IpAddr,
    mapping: Mapping,
    filter: Filter,
    pub hairpin: bool,
    pub expiry: Duration,
    entries: Vec<Entry>,
    next: u16,
}

impl Nat {
    pub fn new(public: IpAddr, (mapping, filter): (Mapping, Filter)) -> Self {
        let expiry = Duration::from_secs(30);
        Self { public, mapping, filter, hairpin: false, expiry, entries: Vec::new(), next: 30_000 }
    }

    /// The source that `to` sees.
    pub fn outbound(
        &mut self,
        now: Instant,
        inside: SocketAddr,
        to: SocketAddr,
        rng: &mut fastrand::Rng,
    ) -> SocketAddr {
        let expiry = self.expiry;
        self.entries.retain(|e| now < e.used + expiry);
        let key = match self.mapping {
            Mapping::Same | Mapping::Independent => None,
            Mapping::AddressDependent => Some(SocketAddr::new(to.ip(), 0)),
            Mapping::Sequential | Mapping::Random => Some(to),
        };
        if let Some(entry) = self.entries.iter_mut().find(|e| e.inside == inside && e.key == key) {
            entry.used = now;
            entry.sent.insert(to);
            return SocketAddr::new(self.public, entry.port);
        }
        let taken = |port| self.entries.iter().any(|e| e.port == port);
        let port = loop {
            let port = match self.mapping {
                Mapping::Same => break inside.port(),
                Mapping::Independent | Mapping::Sequential => {
                    self.next = self.next.wrapping_add(1).max(1024);
                    self.next
                }
                Mapping::AddressDependent | Mapping::Random => rng.u16(1024..),
            };
            if !taken(port) {
                break port;
            }
        };
        self.entries.push(Entry { inside, key, port, sent: [to].into(), used: now });
        SocketAddr::new(self.public, port)
    }

    /// Who inside gets what comes from there to this port; None: it is dropped.
    pub fn inbound(&mut self, now: Instant, from: SocketAddr, port: u16) -> Option<SocketAddr> {
        let (filter, expiry) = (self.filter, self.expiry);
        let entry = self.entries.iter_mut().find(|e| e.port == port && now < e.used + expiry)?;
        let passes = match filter {
            Filter::Independent => true,
            Filter::AddressDependent => entry.sent.iter().any(|a| a.ip() == from.ip()),
            Filter::PortDependent => entry.sent.contains(&from),
        };
        passes.then_some(entry.inside)
    }

    /// Forgets all mappings; new ones get other ports.
    pub fn rebind(&mut self, public: Option<IpAddr>) {
        self.entries.clear();
        self.next = self.next.wrapping_add(1000);
        self.public = public.unwrap_or(self.public);
    }
}
