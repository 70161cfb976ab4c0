//! What can happen to nodes and their network, and how a world is given it.

use crate::{
    nat::Kind,
    world::{Cluster, World},
};
use std::{net::SocketAddr, time::Duration};
use weft::tunnel::{
    Link, RelaySpec,
    identity::{Certificate, KeyPair},
};

/// Indices are of hosts.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Nothing passes straight between the two.
    Block(usize, usize),
    Unblock(usize, usize),
    /// Everything to and from it vanishes.
    Cut(usize),
    Mend(usize),
    /// The process stands still.
    Freeze(usize),
    Thaw(usize),
    /// The NAT forgets its mappings; with a new public address or without.
    Rebind {
        host: usize,
        nat: usize,
        moves: bool,
    },
    /// Killed and started again; with what its snapshot held or without.
    Crash {
        host: usize,
        remembers: bool,
    },
    /// Another address on its link.
    Move(usize),
    /// Datagrams of before come once more; from where they came, or from elsewhere.
    Replay {
        most: usize,
        elsewhere: bool,
    },
}

impl Fault {
    /// Does it harm anybody? Replays must not.
    pub fn harms(&self) -> bool {
        !matches!(self, Self::Replay { .. })
    }

    /// Is this what ends that one?
    pub fn ends(&self, other: &Self) -> bool {
        mended(other).as_ref() == Some(self)
    }
}

/// Datagrams that are kept to be replayed; a random one gives way.
const KEPT_MAX: usize = 48;

pub struct Site {
    pub name: String,
    pub host: usize,
    pub kind: Kind,
    pub identity: (KeyPair, Certificate),
    /// The site whose LAN it shares.
    pub lan: usize,
}

pub struct Stage {
    pub world: World,
    pub cluster: Cluster,
    pub sites: Vec<Site>,
    pub relays: Vec<Site>,
    pub specs: Vec<RelaySpec>,
    /// Of hosts.
    pub names: Vec<String>,
    pub rng: fastrand::Rng,
    kept: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    moves: u8,
}

impl Stage {
    pub fn new(seed: u64, relays: usize) -> Self {
        let (cluster, mut world) = (Cluster::seeded(seed), World::new(seed));
        world.lazy = true;
        let mut stage_relays = Vec::new();
        let mut specs = Vec::new();
        for n in 1..=relays {
            let name = format!("relay-{n}");
            let identity = cluster.identity(&name, weft::tunnel::identity::Roles::RELAY, crate::pair::LATER);
            let address = format!("11.0.0.{n}");
            let host = world.add(&format!("{address}:7843"), &cluster, &identity, Vec::new());
            specs.push(RelaySpec { certificate: identity.1.clone(), host: address, port: 7843 });
            stage_relays.push(Site { name, host, kind: Kind::Public, identity, lan: host });
        }
        let names = stage_relays.iter().map(|s| s.name.clone()).collect();
        let rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
        Self { world, cluster, sites: Vec::new(), relays: stage_relays, specs, names, rng, kept: Vec::new(), moves: 0 }
    }

    /// One more node, at a site of its own or on the LAN of another.
    pub fn add(&mut self, kind: Kind, lan: Option<usize>) -> usize {
        let n = self.sites.len() as u8 + 1;
        let name = format!("node-{n}");
        let identity = self.cluster.identity(&name, weft::tunnel::identity::Roles::NONE, crate::pair::LATER);
        let specs = self.specs.clone();
        let host = match lan {
            Some(at) => self.world.add_neighbour(at, n + 10, &self.cluster, &identity, specs),
            None => self.world.add_site(n, kind, &self.cluster, &identity, specs),
        };
        self.names.push(name.clone());
        self.sites.push(Site { name, host, kind, identity, lan: lan.unwrap_or(host) });
        host
    }

    fn site(&self, host: usize) -> &Site {
        self.sites.iter().chain(&self.relays).find(|s| s.host == host).unwrap()
    }

    /// The oracle for a pair of nodes. None where a port must be foretold: others may take it first.
    pub fn direct_possible(&self, a: usize, b: usize) -> Option<bool> {
        let (a, b) = (self.site(a), self.site(b));
        let sure = a.lan == b.lan || a.kind.passes(b.kind);
        (sure || !a.kind.direct_possible(b.kind)).then_some(sure)
    }

    pub fn path(&self, host: usize, peer: usize) -> &'static str {
        let name = &self.names[peer];
        let views = self.world.hosts[host].node.peer_views(self.world.now);
        views.into_iter().find(|v| v.name == *name).map_or("none", |v| v.path)
    }

    fn links(&mut self, host: usize) {
        let (local, now) = (self.world.hosts[host].address, self.world.now);
        let link = Link { address: local.ip(), prefix: 24 };
        self.world.hosts[host].node.set_links(now, vec![link], local.port());
    }

    pub fn apply(&mut self, fault: &Fault) {
        (0..self.world.hosts.len()).for_each(|host| self.world.touch(host));
        match *fault {
            Fault::Block(a, b) => self.world.blocked.push((a.min(b), a.max(b))),
            Fault::Unblock(a, b) => {
                let at = self.world.blocked.iter().position(|p| *p == (a.min(b), a.max(b)));
                at.map(|at| self.world.blocked.swap_remove(at));
            }
            Fault::Cut(host) => self.world.hosts[host].cut = true,
            Fault::Mend(host) => self.world.hosts[host].cut = false,
            Fault::Freeze(host) => self.world.hosts[host].frozen = true,
            Fault::Thaw(host) => self.world.hosts[host].frozen = false,
            Fault::Rebind { nat, moves, .. } => {
                self.moves += 1;
                let nat = &mut self.world.nats[nat];
                let std::net::IpAddr::V4(ip) = nat.public else { return };
                let [a, b, c, _] = ip.octets();
                nat.rebind(moves.then(|| [a, b, c, 100 + self.moves].into()));
            }
            Fault::Crash { host, remembers } => self.crash(host, remembers),
            Fault::Move(host) => {
                self.moves += 1;
                let SocketAddr::V4(at) = self.world.hosts[host].address else { return };
                let [a, b, c, _] = at.ip().octets();
                self.world.hosts[host].address = SocketAddr::new([a, b, c, 50 + self.moves].into(), at.port());
                self.links(host);
            }
            Fault::Replay { most, elsewhere } => {
                for _ in 0..most.min(self.kept.len()) {
                    let (from, to, bytes) = self.kept[self.rng.usize(..self.kept.len())].clone();
                    let from = if elsewhere { "11.66.0.66:6666".parse().unwrap() } else { from };
                    self.world.inject(from, to, bytes);
                }
            }
        }
    }

    fn crash(&mut self, host: usize, remembers: bool) {
        let site = self.site(host);
        let is_relay = self.relays.iter().any(|r| r.host == host);
        let (identity, specs) = (site.identity.clone(), if is_relay { Vec::new() } else { self.specs.clone() });
        let known = self.world.hosts[host].node.remembered();
        let (node, count) = self.world.node(&self.cluster, &identity, specs);
        let at = &mut self.world.hosts[host];
        (at.node, at.count, at.wait) = (node, count, Some(self.world.now));
        at.woken.clear();
        at.incoming.clear();
        if !is_relay {
            self.links(host);
        }
        if remembers {
            self.world.hosts[host].node.remember(known);
        }
    }

    /// Keeps some of what has passed; most of it long headers, with which connections begin.
    pub fn keep(&mut self) {
        for datagram in std::mem::take(&mut self.world.recorded) {
            let long = datagram.2.first().is_some_and(|b| b & 0xc0 == 0xc0);
            if !long && self.rng.u8(..10) > 0 {
                continue;
            }
            if self.kept.len() < KEPT_MAX {
                self.kept.push(datagram);
            } else {
                let at = self.rng.usize(..KEPT_MAX);
                self.kept[at] = datagram;
            }
        }
    }
}

/// What ends a fault, for those that last.
fn mended(fault: &Fault) -> Option<Fault> {
    match *fault {
        Fault::Block(a, b) => Some(Fault::Unblock(a, b)),
        Fault::Cut(host) => Some(Fault::Mend(host)),
        Fault::Freeze(host) => Some(Fault::Thaw(host)),
        Fault::Unblock(..)
        | Fault::Mend(_)
        | Fault::Thaw(_)
        | Fault::Rebind { .. }
        | Fault::Crash { .. }
        | Fault::Move(_)
        | Fault::Replay { .. } => None,
    }
}

/// A fault by lot, and what ends it, each with its time from now.
pub fn draw(stage: &Stage, rng: &mut fastrand::Rng) -> Vec<(Duration, Fault)> {
    let node = |rng: &mut fastrand::Rng| stage.sites[rng.usize(..stage.sites.len())].host;
    let relay = |rng: &mut fastrand::Rng| stage.relays[rng.usize(..stage.relays.len())].host;
    let (a, b) = (node(rng), node(rng));
    let fault = match rng.u8(..14) {
        0..=2 if a != b => Fault::Block(a, b),
        0..=2 => Fault::Block(a, relay(rng)),
        3 => Fault::Cut(a),
        4 => Fault::Cut(relay(rng)),
        5 => Fault::Freeze(a),
        6 | 7 => match stage.world.hosts[a].nats[..] {
            [] => Fault::Move(a),
            ref nats => Fault::Rebind { host: a, nat: nats[rng.usize(..nats.len())], moves: rng.bool() },
        },
        8 | 9 => Fault::Crash { host: a, remembers: rng.bool() },
        10 => Fault::Crash { host: relay(rng), remembers: false },
        11 => Fault::Move(a),
        _ => Fault::Replay { most: rng.usize(1..24), elsewhere: rng.bool() },
    };
    let lasts = match rng.u8(..10) {
        0..=5 => rng.u64(100..4000),
        6..=8 => rng.u64(4000..20_000),
        _ => rng.u64(20_000..120_000),
    };
    let end = mended(&fault).map(|end| (Duration::from_millis(lasts), end));
    [(Duration::ZERO, fault)].into_iter().chain(end).collect()
}
