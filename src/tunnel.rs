//! The tunnel's driver: one UDP socket under the sans-IO [`node::Node`], and the handles and streams by which
//! the rest of the process uses it.

mod admit;
mod candidates;
mod carry;
mod cid;
mod congestion;
mod connect;
mod control;
mod datagrams;
mod dial;
mod disco;
mod drive;
mod frame;
mod gate;
pub mod gather;
mod home;
pub mod identity;
mod keys;
mod lan;
mod large;
pub mod node;
pub mod noise;
mod open;
mod outbox;
mod path;
mod peer;
pub mod portmap;
mod predict;
mod punch;
mod recall;
mod relay;
mod slot;
mod stream;
mod streams;
pub(crate) mod suite;
pub mod survey;
mod transport;
mod uplinks;
#[cfg(test)]
mod vectors;
mod view;
mod ways;
mod windows;

pub(crate) use admit::Effort;
pub use home::RelaySpec;
pub use keys::Key;
pub(crate) use keys::{Aead, derive};
pub use lan::Link;
pub use large::Beside;
pub use path::Way;
pub use recall::Remembered;
pub use relay::{Rate, RelayLimits, RelayLoad};
pub(crate) use stream::Shared;
pub use stream::{Handle, Open, PeerView, Refusal, RelayView, TunnelStream};
pub use streams::Progress;
pub use view::{BY_TCP, Sizes};

use crate::{
    carrier::{self, Carrier, address, noise::Identity},
    clock::Clock,
    config::{Profile, TunnelConfig},
    metrics::{TunnelCounters, bump},
    portmap::Mapper,
    reactor::{Async, Timer},
    shared::Listener,
    table::balance::OnLink,
    uplinks::Links,
};
use anyhow::{Context as _, bail};
use futures_lite::{
    FutureExt as _,
    future::{or, poll_fn, yield_now},
    ready,
};
use identity::{Bundle, KeyPair, Secret};
use node::{Event, Node, NodeConfig, Output};
use noise::Local;
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use std::{
    collections::VecDeque,
    future::Future,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    pin::{Pin, pin},
    rc::Rc,
    sync::{Arc, atomic::AtomicU32},
    task::Poll,
    time::{Duration, Instant},
};

/// Datagrams, or batches of them, that one receive call takes. More of them are no faster: without GRO it is the kernel's
/// work for each datagram that counts, with it their buffers are 64 kB each.
const RX_BATCH: usize = 2;
/// The largest batch that the kernel hands over by GRO.
const RX_BUFFER: usize = 64 << 10;
/// Receive calls, or sends, before the other tasks have their turn.
const BUDGET: usize = 16;
/// Segments of one send: above this the gain is small and the burst is long.
const GSO_MOST: usize = 32;
/// What the kernel keeps for us while other tasks run; it may grant less.
const SOCKET_BUFFER: usize = 1 << 20;
/// Before a proxy is left to look up a relay's name.
const PROXIED_LOOKUP: Duration = Duration::from_secs(1);
/// Relays' names that wait to be looked up; there are at most 8 relays.
const LOOKUPS_MAX: usize = 16;

/// Looks up a host name, for relays that are given by name.
pub type Lookup = Rc<dyn Fn(String) -> Pin<Box<dyn Future<Output = anyhow::Result<Vec<IpAddr>>>>>>;

type Resolving = Pin<Box<dyn Future<Output = (usize, Result<SocketAddr, String>)>>>;

/// See the module.
pub struct Driver {
    socket: Async<UdpSocket>,
    udp: UdpSocketState,
    shared: Rc<Shared>,
    lookup: Lookup,
    clock: Clock,
    count: Rc<TunnelCounters>,
    lookups: VecDeque<(usize, u16, String)>,
    resolving: Option<Resolving>,
    v6: bool,
    port: u16,
    /// How often each relay's name was looked up: another of its addresses each time.
    tries: Vec<usize>,
    links: Links,
    mapper: Mapper,
    on_link: OnLink,
    /// For relays, or nodes, that have no UDP.
    carrier: Rc<Carrier>,
    /// It rings at this time or, where that was put off since, too early: a timer made anew costs five system calls.
    alarm: Option<(Instant, Timer)>,
}

/// Why the driver is awake.
enum Woke {
    Ready,
    /// There is something to send, or to tell.
    Rung,
    /// The gateway has answered.
    Gateway,
    /// Devices, addresses or routes have changed.
    Links,
    Resolved(usize, Result<SocketAddr, String>),
}

/// What the driver needs beside the `[tunnel]` section.
pub struct Setup {
    pub name: String,
    pub bundle: Bundle,
    /// The node's own key, where the bundle has none.
    pub key: Option<Secret<[u8; 32]>>,
    pub is_relay: bool,
    pub relay_limits: RelayLimits,
    pub mark: u32,
    pub lookup: Lookup,
    pub clock: Clock,
    pub counters: Rc<TunnelCounters>,
    /// Peers of before a restart.
    pub remembered: Vec<Remembered>,
    /// Told who is on a link of ours.
    pub on_link: OnLink,
}

impl Driver {
    /// # Errors
    /// When the port is taken, or the bundle has no key, or a relay of the config has no certificate.
    pub fn bind(config: &TunnelConfig, setup: Setup) -> anyhow::Result<(Self, Handle)> {
        let Setup { name, bundle, key, is_relay, relay_limits, mark, lookup, clock, counters, remembered, on_link } =
            setup;
        let secret =
            key.or_else(|| bundle.key.clone()).context("the bundle has no key and the node has none either")?;
        let pair = KeyPair::from_private(secret)?;
        if pair.public != bundle.certificate.key {
            bail!("the certificate of {} is not for this node's key", bundle.certificate.name);
        }
        let unix = u32::try_from(clock.unix()).unwrap_or(u32::MAX);
        let mut relays: Vec<RelaySpec> = Vec::new();
        for wanted in &config.relays {
            let known = bundle.relays.iter().find(|r| r.at.name == wanted.name);
            let known = known.with_context(|| {
                format!(
                    "tunnel.relays: the bundle holds no certificate of {:?}: issue it again with --relay",
                    wanted.name
                )
            })?;
            relays.push(RelaySpec {
                certificate: known.certificate.clone(),
                host: wanted.host.clone(),
                port: wanted.port,
            });
        }
        for known in &bundle.relays {
            if !relays.iter().any(|r| r.certificate.name == known.at.name) {
                let (host, port) = (known.at.host.clone(), known.at.port);
                relays.push(RelaySpec { certificate: known.certificate.clone(), host, port });
            }
        }
        relays.retain(|r| r.certificate.name != name);
        let identity = Identity {
            secret: keys::Key(*pair.private.expose()),
            public: pair.public,
            psks: bundle.psks.iter().map(|p| (p.epoch, keys::Key(*p.key.expose()))).collect(),
        };
        let local = Local {
            secret: keys::Key(*pair.private.expose()),
            public: pair.public,
            certificate: bundle.certificate.encode(),
            ca: bundle.ca,
            psks: bundle.psks.iter().map(|p| (p.epoch, keys::Key(*p.key.expose()))).collect(),
            unix: Arc::new(AtomicU32::new(unix)),
            entropy: None,
            is_relay,
            has_aes: suite::has_aes(),
        };
        let (socket, v6) = bind(config.listen)?;
        if let Err(error) = crate::sys::set_mark(&socket, mark) {
            log::warn!(target: "tunnel", "the UDP socket has no mark ({error}): our own rules may catch its packets");
        }
        let port = socket.get_ref().local_addr()?.port();
        let udp = UdpSocketState::new(UdpSockRef::from(socket.get_ref()))?;
        // Beyond what the system allows everybody where we may: a relay's bursts are lost else.
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket.get_ref(), SOCKET_BUFFER).is_err() {
            let _ = udp.set_recv_buffer_size(UdpSockRef::from(socket.get_ref()), SOCKET_BUFFER);
        }
        let _ = udp.set_send_buffer_size(UdpSockRef::from(socket.get_ref()), SOCKET_BUFFER);
        let node = NodeConfig {
            local,
            name,
            relays,
            profile: profile(config.profile),
            congestion: config.congestion,
            relay_limits,
            lan: config.lan,
            gso: 1,
            seed: None,
        };
        let mut node = Node::new(node, clock.now(), fastrand::Rng::new(), Rc::clone(&counters));
        node.remember(remembered);
        let shared = Shared::new(node, clock);
        let handle = Handle::new(&shared);
        let carrier = carrier::Setup {
            shared: Rc::clone(&shared),
            identity,
            clock,
            count: Rc::clone(&counters),
            lookup: Rc::clone(&lookup),
            mark,
            udp: socket.get_ref().try_clone()?,
            v6,
            is_relay,
        };
        let carrier = Carrier::new(config, carrier);
        let links = Links::new(config, &socket, v6, port);
        let driver = Self {
            socket,
            udp,
            shared,
            lookup,
            clock,
            count: counters,
            lookups: VecDeque::new(),
            resolving: None,
            v6,
            port,
            tries: Vec::new(),
            links,
            mapper: Mapper::new(port, config.port_mapping),
            on_link,
            carrier,
            alarm: None,
        };
        Ok((driver, handle))
    }

    /// The UDP port that peers reach us on.
    ///
    /// # Errors
    /// Never for a bound socket.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.get_ref().local_addr()
    }

    /// Runs until [`Handle::close`].
    ///
    /// # Errors
    /// When the socket can no longer be waited for.
    pub async fn run(self) -> anyhow::Result<()> {
        let carrier = Rc::clone(&self.carrier);
        let carried = async {
            carrier.run().await;
            Ok(())
        };
        or(self.drive(), carried).await
    }

    async fn drive(mut self) -> anyhow::Result<()> {
        let most = self.udp.max_gso_segments().min(GSO_MOST);
        let gso = if most > 1 && probe_gso().await { most } else { 1 };
        log::debug!(target: "tunnel", "segments per send: {gso}, per receive: {}", self.udp.gro_segments());
        self.shared.node().set_gso(gso);
        let mut rx = vec![0; RX_BUFFER * RX_BATCH];
        let mut tx = Vec::new();
        let mut bell = self.shared.bell.listen();
        self.look();
        let mut linger = None;
        loop {
            let mut wake = self.drain(&mut tx, &mut rx).await;
            if self.shared.closing.get() {
                let now = self.clock.now();
                let until = *linger.get_or_insert_with(|| now + self.shared.node().linger());
                if now >= until {
                    self.mapper.bye();
                    self.shared.closed.ring();
                    return Ok(());
                }
                wake = wake.into_iter().chain([until]).min();
            }
            let wake = [wake, self.mapper.wake].into_iter().flatten().min();
            let woke = self.wait(&mut bell, wake).await.context("waiting for the UDP socket")?;
            self.shared.node().set_unix(self.clock.unix());
            let (rung, answered) = (matches!(woke, Woke::Rung), matches!(woke, Woke::Gateway));
            match woke {
                Woke::Ready | Woke::Rung | Woke::Gateway => {}
                Woke::Links => self.look(),
                Woke::Resolved(relay, address) => {
                    self.resolving = None;
                    self.shared.node().resolved(self.clock.now(), relay, address);
                }
            }
            if !rung && !answered {
                self.receive(&mut rx);
            }
            let now = self.clock.now();
            if (answered || self.mapper.wake.is_some_and(|at| at <= now))
                && let Some(mapped) = self.mapper.turn(now)
            {
                self.shared.node().set_mapped(now, mapped);
            }
            self.shared.node().handle_tick(now);
            self.next_lookup();
        }
    }

    /// Only readiness, bells and timers are raced: nothing is lost when one wins.
    async fn wait(&mut self, bell: &mut Listener, wake: Option<Instant>) -> io::Result<Woke> {
        if let Some(at) = wake
            && self.alarm.as_ref().is_none_or(|(set, _)| at < *set)
        {
            self.alarm = Some((at, Timer::at(at)));
        }
        let alarm = &mut self.alarm;
        let timer = poll_fn(|cx| {
            let Some((_, timer)) = alarm else { return Poll::Pending };
            ready!(Pin::new(timer).poll(cx));
            *alarm = None;
            Poll::Ready(Ok(Woke::Ready))
        });
        let resolving = &mut self.resolving;
        let resolved = async {
            match resolving {
                Some(future) => {
                    let (relay, address) = future.await;
                    Ok(Woke::Resolved(relay, address))
                }
                None => std::future::pending().await,
            }
        };
        let links = async { self.links.changed().await.map(|()| Woke::Links) };
        let gateway = async { self.mapper.readable().await.map(|()| Woke::Gateway) };
        // Both are asked each time: neither starves the other.
        let own = poll_fn(|cx| {
            let rung = pin!(bell.rung()).poll(cx).map(|()| Ok(Woke::Rung));
            // Unlike readable(), this stays registered with the kernel from turn to turn.
            match self.socket.poll_readable(cx) {
                Poll::Ready(done) => Poll::Ready(done.map(|()| Woke::Ready)),
                Poll::Pending => rung,
            }
        });
        or(own, or(links, or(timer, or(resolved, gateway)))).await
    }

    /// Sends and tells until the node has nothing left; gives its next timer.
    async fn drain(&mut self, tx: &mut Vec<u8>, rx: &mut [u8]) -> Option<Instant> {
        for turn in 1.. {
            let now = self.clock.now();
            let output = self.shared.node().poll_output(now, tx);
            match output {
                Output::Send { to, local, segment } => self.send(Way { remote: to, local }, tx, segment, rx).await,
                Output::Beacon => self.links.beacon(&self.socket, &self.udp, tx),
                Output::Event(Event::Resolve { relay, host }) => {
                    let port = self.shared.node().relay_port(relay);
                    if self.lookups.len() < LOOKUPS_MAX {
                        self.lookups.push_back((relay, port, host));
                    }
                    self.next_lookup();
                }
                Output::Event(Event::Neighbours(names)) => self.on_link.set(&names),
                Output::Event(Event::Wake(key)) => self.shared.wake(key),
                Output::Event(Event::Incoming { key, peer, open }) => self.shared.incoming(key, peer, open),
                Output::Wait(at) => return at,
            }
            if turn % BUDGET == 0 {
                yield_now().await;
            }
        }
        None
    }

    fn next_lookup(&mut self) {
        if self.resolving.is_some() {
            return;
        }
        let Some((relay, port, host)) = self.lookups.pop_front() else { return };
        let found = (self.lookup)(host.clone());
        let v6 = self.v6;
        let unknown = self.carrier.proxy.as_ref().map(|_| address::unknown(relay, port));
        // Two views of IPv4 tell what a NAT does, so IPv4 goes first where there is any.
        let v4_first = self.links.survey.uplinks.iter().any(|u| u.address.is_ipv4());
        self.tries.resize(self.tries.len().max(relay + 1), 0);
        let turn = self.tries[relay];
        self.tries[relay] = turn.wrapping_add(1);
        self.resolving = Some(
            async move {
                // A proxy may know a name that we cannot look up, and where one is needed our servers may be cut off.
                let found = async {
                    match unknown {
                        Some(_) => {
                            or(found, async {
                                Timer::after(PROXIED_LOOKUP).await;
                                bail!("no answer")
                            })
                            .await
                        }
                        None => found.await,
                    }
                };
                let address = match found.await {
                    Ok(mut list) => {
                        list.retain(|ip| ip.is_ipv4() || v6);
                        list.sort_by_key(|ip| ip.is_ipv4() != v4_first);
                        let nth = list.get(turn % list.len().max(1)).map(|ip| SocketAddr::new(*ip, port));
                        nth.ok_or_else(|| format!("{host} has no address that we can reach"))
                    }
                    Err(error) => Err(format!("{host} was not found: {error}")),
                };
                (relay, address.or_else(|why| unknown.ok_or(why)))
            }
            .boxed_local(),
        );
    }

    async fn send(&self, way: Way, bytes: &[u8], segment: Option<usize>, rx: &mut [u8]) {
        let (to, src_ip) = (way.remote, way.local);
        if self.carrier.send(to, bytes, segment) {
            return;
        }
        let destination = self.links.destination(to);
        self.links.leave_by(&self.socket, to, src_ip);
        let transmit = Transmit { destination, ecn: None, contents: bytes, segment_size: segment, src_ip };
        loop {
            match self.udp.try_send(UdpSockRef::from(self.socket.get_ref()), &transmit) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // What comes meanwhile is taken: which of it has to wait, or to go, is not the kernel's to say.
                    let writable = async { self.socket.writable().await.map(|()| true) };
                    let readable = async { self.socket.readable().await.map(|()| false) };
                    match or(writable, readable).await {
                        Ok(true) => {}
                        Ok(false) => self.receive(rx),
                        Err(_) => return,
                    }
                }
                Err(error) => {
                    // Links flap; what was lost is sent again by whoever needs it.
                    bump(&self.count.send_errors);
                    log::debug!(target: "tunnel", "send to {to}: {error}");
                    self.shared.node().set_gso(self.udp.max_gso_segments().min(GSO_MOST));
                    return;
                }
            }
        }
    }

    /// The node hears where the host is now.
    fn look(&mut self) {
        let now = self.clock.now();
        if self.links.look(now, &self.socket) {
            let survey = &self.links.survey;
            let uplinks = survey.uplinks.iter().map(|u| u.address).collect();
            let mut node = self.shared.node();
            node.set_uplinks(now, uplinks, survey.near.clone(), self.links.named());
            node.set_links(now, survey.links.clone(), self.port);
            self.mapper.set_gateway(now, survey.gateway);
            drop(node);
            self.carrier.detours.moved(&self.carrier);
        }
    }

    fn receive(&self, rx: &mut [u8]) {
        for _ in 0..BUDGET {
            let mut meta = [RecvMeta::default(); RX_BATCH];
            let mut chunks = rx.chunks_exact_mut(RX_BUFFER).map(IoSliceMut::new);
            let mut buffers: [IoSliceMut<'_>; RX_BATCH] =
                std::array::from_fn(|_| chunks.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
            let received = self.udp.recv(UdpSockRef::from(self.socket.get_ref()), &mut buffers, &mut meta);
            // Errors other than WouldBlock are ICMP's answers to earlier sends.
            let Ok(count) = received else { return };
            let now = self.clock.now();
            for (meta, chunk) in meta[..count].iter().zip(rx.chunks_exact_mut(RX_BUFFER)) {
                if address::is_made_up(meta.addr) {
                    continue;
                }
                let way = Way { remote: meta.addr, local: meta.dst_ip };
                let mut node = self.shared.node();
                node.handle_datagrams(now, way, &mut chunk[..meta.len], meta.stride);
                node.account(|| self.clock.now());
                drop(node);
                self.carrier.detours.heard_by_udp(&self.carrier, meta.addr);
            }
            if count < RX_BATCH {
                return;
            }
        }
    }
}

/// Below 1 GB of RAM, the container's or the machine's, a node is a router.
fn profile(wanted: Profile) -> Profile {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let kib = |meminfo: &str| meminfo.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok();
    let limit = read("/sys/fs/cgroup/memory.max").trim().parse::<u64>().map_or(u64::MAX, |bytes| bytes >> 10);
    match wanted {
        Profile::Auto if kib(&read("/proc/meminfo")).unwrap_or(0).min(limit) >= 1 << 20 => Profile::Server,
        Profile::Auto | Profile::Router => Profile::Router,
        Profile::Server => Profile::Server,
    }
}

/// Binds both families where the kernel has IPv6, else IPv4 alone; says whether the socket is IPv6's.
fn bind(listen: SocketAddr) -> anyhow::Result<(Async<UdpSocket>, bool)> {
    let bound = Async::<UdpSocket>::bind(listen).map(|s| (s, listen.is_ipv6()));
    match bound {
        Err(error) if listen.ip().is_unspecified() && listen.is_ipv6() && error.kind() != io::ErrorKind::AddrInUse => {
            let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listen.port());
            Async::<UdpSocket>::bind(v4).map(|s| (s, false)).with_context(|| format!("tunnel.listen: UDP {v4}"))
        }
        other => other.with_context(|| format!("tunnel.listen: UDP {listen}")),
    }
}

/// Whether two segments of one send arrive as two datagrams: some kernels and emulators take the option
/// and then lose the packets.
async fn probe_gso() -> bool {
    const LEN: usize = 64;
    let probe = async {
        let socket = Async::<UdpSocket>::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let udp = UdpSocketState::new(UdpSockRef::from(socket.get_ref())).ok()?;
        let destination = socket.get_ref().local_addr().ok()?;
        let contents = [7; 2 * LEN];
        let transmit = Transmit { destination, ecn: None, contents: &contents, segment_size: Some(LEN), src_ip: None };
        udp.try_send(UdpSockRef::from(socket.get_ref()), &transmit).ok()?;
        let mut got = 0;
        while got < contents.len() {
            let mut buffer = [0; 1024];
            let mut meta = [RecvMeta::default()];
            socket.readable().await.ok()?;
            let mut buffers = [IoSliceMut::new(&mut buffer)];
            match udp.recv(UdpSockRef::from(socket.get_ref()), &mut buffers, &mut meta) {
                Ok(_) if meta[0].stride == LEN => got += meta[0].len,
                Ok(_) => return None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
        Some(())
    };
    let late = async {
        Timer::after(Duration::from_millis(200)).await;
        None
    };
    or(probe, late).await.is_some()
}
