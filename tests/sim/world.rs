//! A small world: nodes, a network with delay, loss and duplication, one virtual clock, one seed.

use crate::{
    line::Line,
    nat::{Kind, Nat},
};
use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{Arc, Mutex, atomic::AtomicU32},
    time::{Duration, Instant},
};
use weft::{
    config::{Congestion, Profile},
    metrics::TunnelCounters,
    table::model::{Protocol, ServiceId},
    tunnel::{
        Key, Link, Open, Progress, Refusal, RelaySpec, Way,
        identity::{Authority, Certificate, KeyPair, Request, Roles, Secret},
        node::{Event, Node, NodeConfig, Output},
        noise::Local,
    },
};

/// 2026-11-21: any time at which the certificates of the test hold.
pub const NOW: u64 = 1_795_000_000;

/// What a cluster hands to its nodes.
pub struct Cluster {
    pub authority: Authority,
    pub psks: Vec<(u8, [u8; 32])>,
    rng: RefCell<fastrand::Rng>,
}

fn secret(rng: &mut fastrand::Rng) -> Secret<[u8; 32]> {
    let mut bytes = [0; 32];
    rng.fill(&mut bytes);
    Secret::new(bytes)
}

impl Cluster {
    /// Like no other.
    pub fn new() -> Self {
        Self::seeded(fastrand::u64(..))
    }

    pub fn seeded(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let authority = Authority::from_seed(secret(&mut rng)).unwrap();
        Self { authority, psks: vec![(1, [9; 32])], rng: RefCell::new(rng) }
    }

    pub fn identity(&self, name: &str, roles: Roles, not_after: u64) -> (KeyPair, Certificate) {
        let pair = KeyPair::from_private(secret(&mut self.rng.borrow_mut())).unwrap();
        let request = Request { name: name.into(), key: pair.public, roles, network: String::new(), not_after };
        let certificate = self.authority.issue(request).unwrap();
        (pair, certificate)
    }
}

pub struct Host {
    pub node: Node,
    pub address: SocketAddr,
    pub count: Rc<TunnelCounters>,
    pub incoming: VecDeque<(u32, String, Open)>,
    /// Streams to look at.
    pub woken: BTreeSet<u32>,
    pub wait: Option<Instant>,
    /// Datagrams to and from it vanish.
    pub cut: bool,
    /// It stands still: what comes is lost, no timer fires.
    pub frozen: bool,
    /// The NATs that it is behind, the inner one first.
    pub nats: Vec<usize>,
}

/// One more address of a host's, and the NATs that it is behind.
pub struct Uplink {
    pub host: usize,
    pub address: SocketAddr,
    pub nats: Vec<usize>,
}

type Flight = Reverse<(Instant, u64, SocketAddr, SocketAddr, Vec<u8>)>;

pub struct World {
    pub now: Instant,
    born: Instant,
    /// Only hosts that were touched are asked what they want to send.
    pub lazy: bool,
    touched: u64,
    pub hosts: Vec<Host>,
    pub rng: fastrand::Rng,
    pub delay: Duration,
    /// Of the delay, either way; what overtakes comes out of order.
    pub jitter: f64,
    pub loss: f64,
    pub duplicate: f64,
    pub congestion: Congestion,
    pub nats: Vec<Nat>,
    /// What the way between two public addresses takes on top of `delay`.
    pub far: Vec<(IpAddr, IpAddr, Duration)>,
    pub uplinks: Vec<Uplink>,
    /// Addresses of hosts by which nothing passes.
    pub down: BTreeSet<IpAddr>,
    /// Pairs of hosts between which nothing passes but by a third.
    pub blocked: Vec<(usize, usize)>,
    /// (from, to): the same, one way.
    pub mute: Vec<(usize, usize)>,
    /// What all datagrams pass, in order; None: each takes its own time.
    pub line: Option<Line>,
    /// Keeps a copy of all datagrams.
    pub record: bool,
    pub recorded: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    /// Bytes that left each host.
    pub sent: BTreeMap<SocketAddr, u64>,
    flying: BinaryHeap<Flight>,
    serial: u64,
}

/// The end of one host's stream.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub host: usize,
    pub key: u32,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            now,
            born: now,
            lazy: false,
            touched: 0,
            hosts: Vec::new(),
            rng: fastrand::Rng::with_seed(seed),
            delay: Duration::from_millis(10),
            jitter: 0.1,
            loss: 0.0,
            duplicate: 0.0,
            congestion: Congestion::Auto,
            nats: Vec::new(),
            far: Vec::new(),
            uplinks: Vec::new(),
            down: BTreeSet::new(),
            blocked: Vec::new(),
            mute: Vec::new(),
            line: None,
            record: false,
            recorded: Vec::new(),
            sent: BTreeMap::new(),
            flying: BinaryHeap::new(),
            serial: 0,
        }
    }

    /// A node from its identity; the same identity again is the node after a reboot.
    pub fn node(
        &mut self,
        cluster: &Cluster,
        identity: &(KeyPair, Certificate),
        relays: Vec<RelaySpec>,
    ) -> (Node, Rc<TunnelCounters>) {
        let (pair, certificate) = identity;
        let local = Local {
            secret: Key(*pair.private.expose()),
            public: pair.public,
            certificate: certificate.encode(),
            ca: cluster.authority.public(),
            psks: cluster.psks.iter().map(|(e, k)| (*e, Key(*k))).collect(),
            unix: Arc::new(AtomicU32::new(u32::try_from(NOW).unwrap())),
            entropy: Some(Mutex::new(self.rng.fork())),
            is_relay: certificate.roles.contains(Roles::RELAY),
            has_aes: pair.public[0].is_multiple_of(2),
        };
        let mut seed = [0; 32];
        self.rng.fill(&mut seed);
        let config = NodeConfig {
            local,
            name: certificate.name.clone(),
            relays,
            profile: Profile::Router,
            congestion: self.congestion,
            relay_limits: Default::default(),
            lan: true,
            gso: 10,
            seed: Some(seed),
        };
        let count = Rc::new(TunnelCounters::default());
        (Node::new(config, self.now, self.rng.fork(), Rc::clone(&count)), count)
    }

    pub fn add(
        &mut self,
        address: &str,
        cluster: &Cluster,
        identity: &(KeyPair, Certificate),
        relays: Vec<RelaySpec>,
    ) -> usize {
        let (node, count) = self.node(cluster, identity, relays);
        let address = address.parse().unwrap();
        let wait = Some(self.now);
        self.hosts.push(Host {
            node,
            address,
            count,
            incoming: VecDeque::new(),
            woken: BTreeSet::new(),
            wait,
            cut: false,
            frozen: false,
            nats: Vec::new(),
        });
        self.hosts.len() - 1
    }

    /// A node behind NATs of a kind, at site `n`.
    pub fn add_site(
        &mut self,
        n: u8,
        kind: Kind,
        cluster: &Cluster,
        identity: &(KeyPair, Certificate),
        relays: Vec<RelaySpec>,
    ) -> usize {
        let address = match kind {
            Kind::Public => format!("11.{n}.0.1:7843"),
            _ => format!("192.168.{n}.2:7843"),
        };
        let host = self.add(&address, cluster, identity, relays);
        if let Some(behaviour) = kind.behaviour() {
            let mut nats = vec![format!("11.{n}.0.1")];
            if kind == Kind::Double {
                nats.insert(0, format!("100.64.{n}.1"));
            }
            for public in nats {
                self.nats.push(Nat::new(public.parse().unwrap(), behaviour));
                self.hosts[host].nats.push(self.nats.len() - 1);
            }
        }
        let local = self.hosts[host].address;
        let link = Link { address: local.ip(), prefix: 24 };
        self.hosts[host].node.set_links(self.now, vec![link], local.port());
        host
    }

    /// One more node on the LAN of another.
    pub fn add_neighbour(
        &mut self,
        host: usize,
        number: u8,
        cluster: &Cluster,
        identity: &(KeyPair, Certificate),
        relays: Vec<RelaySpec>,
    ) -> usize {
        let SocketAddr::V4(near) = self.hosts[host].address else { panic!("IPv4") };
        let [a, b, c, _] = near.ip().octets();
        let at = self.add(&format!("{a}.{b}.{c}.{number}:7843"), cluster, identity, relays);
        self.hosts[at].nats = self.hosts[host].nats.clone();
        let local = self.hosts[at].address;
        let link = Link { address: local.ip(), prefix: 24 };
        self.hosts[at].node.set_links(self.now, vec![link], local.port());
        at
    }

    /// Out through the sender's NATs: the source that the internet sees. None: it cannot leave.
    fn leave(&mut self, host: usize, to: SocketAddr, local: Option<IpAddr>) -> Option<SocketAddr> {
        let first = (self.hosts[host].address, self.hosts[host].nats.clone());
        let more = self.uplinks.iter().filter(|u| u.host == host).map(|u| (u.address, u.nats.clone()));
        let fits = |a: SocketAddr| local.map_or_else(|| a.is_ipv6() == to.is_ipv6(), |ip| ip == a.ip());
        let (mut source, chain) = std::iter::once(first).chain(more).find(|(a, _)| fits(*a))?;
        if self.down.contains(&source.ip()) {
            return None;
        }
        let private =
            |a: SocketAddr| matches!(a.ip(), IpAddr::V4(ip) if matches!(ip.octets(), [192, 168, ..] | [100, 64, ..]));
        for nat in chain {
            if self.nats[nat].public == to.ip() && !self.nats[nat].hairpin {
                return None;
            }
            source = self.nats[nat].outbound(self.now, source, to, &mut self.rng);
        }
        (!private(to) && !private(source)).then_some(source)
    }

    /// In through the receiver's NATs: the host, and which of its addresses.
    fn arrive(&mut self, from: SocketAddr, mut to: SocketAddr) -> Option<(usize, IpAddr)> {
        let now = self.now;
        while let Some(nat) = self.nats.iter_mut().find(|n| n.public == to.ip()) {
            let inside = nat.inbound(now, from, to.port())?;
            let firewall = inside.ip() == to.ip();
            to = inside;
            if firewall {
                break;
            }
        }
        let first = self.hosts.iter().position(|h| h.address == to);
        let host = first.or_else(|| self.uplinks.iter().find(|u| u.address == to).map(|u| u.host));
        host.map(|host| (host, to.ip())).filter(|(_, ip)| !self.down.contains(ip))
    }

    fn launch(&mut self, host: usize, to: SocketAddr, local: Option<IpAddr>, bytes: Vec<u8>) {
        let from = self.hosts[host].address;
        // On one LAN there is no NAT between.
        let same = |h: &Host| h.address == to && h.nats == self.hosts[host].nats;
        let source = if self.hosts.iter().any(same) { Some(from) } else { self.leave(host, to, local) };
        if let Some(source) = source {
            self.inject(source, to, bytes);
        }
    }

    pub fn inject(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        if self.record {
            self.recorded.push((from, to, bytes.clone()));
        }
        if self.rng.f64() < self.loss {
            return;
        }
        if let Some(line) = &mut self.line {
            if let Some(queued) = line.carry(self.now, from, to, bytes.len()) {
                self.serial += 1;
                self.flying.push(Reverse((self.now + queued + self.delay, self.serial, from, to, bytes)));
            }
            return;
        }
        let between = |(a, b, _): &&(IpAddr, IpAddr, Duration)| [(*a, *b), (*b, *a)].contains(&(from.ip(), to.ip()));
        let delay = self.delay + self.far.iter().find(between).map_or(Duration::ZERO, |(_, _, more)| *more);
        let copies = 1 + usize::from(self.rng.f64() < self.duplicate);
        for _ in 0..copies {
            self.serial += 1;
            let at = self.now + delay.mul_f64(1.0 + (self.rng.f64() * 2.0 - 1.0) * self.jitter);
            self.flying.push(Reverse((at, self.serial, from, to, bytes.clone())));
        }
    }

    /// Takes all that a host has to say.
    pub fn drain(&mut self, at: usize) {
        let mut buf = Vec::new();
        crate::turn(Some(at), self.now - self.born);
        loop {
            let host = &mut self.hosts[at];
            match host.node.poll_output(self.now, &mut buf) {
                Output::Send { to, local, segment } => {
                    let (from, cut) = (host.address, host.cut);
                    *self.sent.entry(from).or_default() += buf.len() as u64;
                    for datagram in buf.chunks(segment.unwrap_or(buf.len())) {
                        if !cut {
                            self.launch(at, to, local, datagram.to_vec());
                        }
                    }
                }
                Output::Beacon => {
                    let (from, nats) = (host.address, host.nats.clone());
                    let near = |h: &&Host| h.nats == nats && !nats.is_empty() && h.address != from;
                    let to: Vec<SocketAddr> = self.hosts.iter().filter(near).map(|h| h.address).collect();
                    to.into_iter().for_each(|to| self.inject(from, to, buf.clone()));
                }
                Output::Event(Event::Wake(key)) => host.woken.extend([key]),
                Output::Event(Event::Incoming { key, peer, open }) => host.incoming.push_back((key, peer, open)),
                Output::Event(Event::Resolve { .. } | Event::Neighbours(_)) => {}
                Output::Wait(at_time) => {
                    host.wait = at_time;
                    return;
                }
            }
        }
    }

    /// The host that sends from this public source.
    fn owner(&self, source: SocketAddr) -> Option<usize> {
        self.hosts
            .iter()
            .position(|h| h.address == source || h.nats.iter().any(|n| self.nats[*n].public == source.ip()))
            .or_else(|| {
                let of =
                    |u: &&Uplink| u.address == source || u.nats.iter().any(|n| self.nats[*n].public == source.ip());
                self.uplinks.iter().find(of).map(|u| u.host)
            })
    }

    /// Lets go of what only the world itself holds.
    pub fn tidy(&mut self) {
        self.sent.clear();
        self.recorded = Vec::new();
        self.flying.shrink_to_fit();
        for host in &mut self.hosts {
            host.woken.clear();
        }
    }

    /// This host's node was asked for something.
    pub fn touch(&mut self, host: usize) {
        self.touched |= 1 << host;
    }

    /// The next datagram or timer; false where nothing is left before `until`.
    fn step(&mut self, until: Instant) -> bool {
        for at in 0..self.hosts.len() {
            if !self.hosts[at].frozen && (!self.lazy || self.touched & 1 << at != 0) {
                self.drain(at);
            }
        }
        self.touched = 0;
        let timer = self.hosts.iter().filter(|h| !h.frozen).filter_map(|h| h.wait).min();
        let flight = self.flying.peek().map(|Reverse((at, ..))| *at);
        let Some(next) = timer.into_iter().chain(flight).min().filter(|at| *at <= until) else {
            self.now = until;
            return false;
        };
        self.now = self.now.max(next);
        if flight == Some(next) {
            let Reverse((_, _, from, to, mut bytes)) = self.flying.pop().unwrap();
            let sender = self.owner(from);
            let stands = |h: &Host| h.cut || h.frozen;
            if let Some((at, local)) = self.arrive(from, to).filter(|(at, _)| !stands(&self.hosts[*at])) {
                let passes =
                    |s: usize| !self.blocked.contains(&(s.min(at), s.max(at))) && !self.mute.contains(&(s, at));
                let len = bytes.len();
                if sender.is_none_or(passes) {
                    crate::turn(Some(at), self.now - self.born);
                    log::trace!("{from} → {to}: {len} bytes, {:02x}", bytes[0]);
                    let way = Way { remote: from, local: Some(local) };
                    self.hosts[at].node.handle_datagrams(self.now, way, &mut bytes, len);
                    self.touch(at);
                }
            }
        } else {
            let now = self.now;
            for at in 0..self.hosts.len() {
                let host = &mut self.hosts[at];
                if !host.frozen && host.wait.is_some_and(|w| w <= now) {
                    crate::turn(Some(at), now - self.born);
                    host.node.handle_tick(now);
                    self.touch(at);
                }
            }
        }
        true
    }

    /// Runs until `done` or for so long; says whether it was done.
    pub fn run(&mut self, most: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let until = self.now + most;
        loop {
            if done(self) {
                return true;
            }
            let more = self.step(until);
            crate::turn(None, self.now - self.born);
            if !more {
                return done(self);
            }
        }
    }

    pub fn open(&mut self, host: usize, node: &str) -> End {
        let open = Open {
            service: ServiceId { namespace: "shop".into(), name: "web".into() },
            port: 80,
            protocol: Protocol::Tcp,
            endpoint: "10.0.0.1:8080".parse().unwrap(),
        };
        End { host, key: self.hosts[host].node.open(self.now, node, &open).unwrap() }
    }

    pub fn answer_of(&mut self, end: End) -> Option<Result<(), Refusal>> {
        self.hosts[end.host].node.opened(end.key)
    }

    /// Sends `bytes` from one end and collects what comes out at the other until FIN; false where it stalls.
    pub fn transfer(&mut self, from: End, to: End, bytes: &[u8], most: Duration) -> Result<Vec<u8>, String> {
        let (mut sent, mut finished, mut got, mut broken) = (0, false, Vec::new(), None);
        let done = self.run(most, |world| {
            while sent < bytes.len() {
                match world.hosts[from.host].node.write(from.key, &bytes[sent..]) {
                    Progress::Bytes(n) => sent += n,
                    Progress::Broken(why) => {
                        broken = Some(format!("write: {why}"));
                        return true;
                    }
                    Progress::Pending | Progress::End => break,
                }
            }
            if sent == bytes.len() && !finished {
                finished = world.hosts[from.host].node.finish(from.key) == Progress::End;
            }
            let mut buf = [0; 4096];
            loop {
                match world.hosts[to.host].node.read(to.key, &mut buf) {
                    Progress::Bytes(n) => got.extend_from_slice(&buf[..n]),
                    Progress::End => return true,
                    Progress::Pending => return false,
                    Progress::Broken(why) => {
                        broken = Some(format!("read: {why}"));
                        return true;
                    }
                }
            }
        });
        match broken {
            Some(why) => Err(why),
            None if done => Ok(got),
            None => Err(format!("stalled after {} of {} bytes", got.len(), bytes.len())),
        }
    }
}
