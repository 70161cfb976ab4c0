//! The driver of the DNS forwarder: sockets to the upstreams, resolv.conf, and look-ups for the rest of the process
//! (getaddrinfo would block the only thread).

use crate::{
    clock::Clock,
    config::{DnsConfig, Upstream},
    dns::{
        answer::TCP_MAX,
        cache::Cache,
        foreign::{self, Head},
        forward::{Forward, Output, Transport},
        upstreams::{self, OPENWRT, RESOLVED},
        wire::{self, flag, kind},
    },
    links::{self, Links, Seen},
    metrics::DnsCounters,
    reactor::{Async, LocalExecutor, Timer},
    shared::{Bell, Listener, Reader},
    sys,
};
use anyhow::{Context as _, bail};
use futures_lite::{
    AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _,
    future::{or, pending, yield_now, zip},
};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

/// resolv.conf is looked at again after this, when somebody asks: nothing wakes an idle process.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// Files larger than this are not configuration.
const FILE_MAX: u64 = 256 * 1024;
/// An upstream's datagram; we ask for 1,232 bytes.
const DATAGRAM_MAX: usize = 4096;
/// Datagrams of one exchange that are read without a yield.
const BUDGET: u32 = 64;
/// A look-up's limit (RFC 1035 resolvers ask for 5 s).
const LOOKUP_MAX: Duration = Duration::from_secs(5);
/// Once one family has answered, the other gets this much longer (RFC 8305 section 3 allows 50 ms; we do not hurry).
const GRACE: Duration = Duration::from_millis(500);
/// Ids drawn at once from the system.
const IDS: usize = 32;

/// Who gets a reply.
pub(crate) trait Sink {
    fn give(&self, to: Option<SocketAddr>, reply: &[u8]);
}

/// One who waits for a reply.
pub(crate) struct To {
    pub(crate) sink: Rc<dyn Sink>,
    pub(crate) from: Option<SocketAddr>,
}

impl PartialEq for To {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::addr_eq(Rc::as_ptr(&self.sink), Rc::as_ptr(&other.sink)) && self.from == other.from
    }
}

/// Asks the upstreams; cheap to clone. Works while a [`Forwarder`] (or a [`crate::dns::Server`]) runs.
#[derive(Clone)]
pub struct Resolver(Rc<Hub>);

/// Runs the exchanges with the upstreams.
pub struct Forwarder {
    hub: Rc<Hub>,
    links: Links,
}

/// What a forwarder needs beside `[dns]`.
#[derive(Clone, Debug)]
pub struct Setup {
    pub counters: Rc<DnsCounters>,
    pub clock: Clock,
    /// The mark of the sockets to the upstreams.
    pub mark: u32,
    /// As `[proxy] interfaces` has them: whose clients are served.
    pub interfaces: Vec<String>,
}

struct Hub {
    core: RefCell<Forward<To>>,
    bell: Bell,
    clock: Clock,
    mark: u32,
    sources: RefCell<Sources>,
    seen: Reader<Seen>,
    scratch: RefCell<Vec<u8>>,
    /// Said once: every socket would say the same.
    mark_refused: Cell<bool>,
}

impl Forwarder {
    #[must_use]
    pub fn new(cfg: &DnsConfig, setup: &Setup) -> Self {
        let cache = Cache::new(cfg.cache, cfg.cache_ttl);
        let mut core = Forward::new(cache, random_ids(), Rc::clone(&setup.counters));
        let sources = Sources::new(cfg);
        for (domain, servers) in &cfg.stub {
            let others: Vec<SocketAddr> = servers.iter().filter(|s| !sources.own.contains(s)).copied().collect();
            core.set_stub(&wire::encode_name(domain).unwrap_or_default(), &others);
        }
        let links = Links::new(&setup.interfaces);
        let hub = Rc::new(Hub {
            core: RefCell::new(core),
            bell: Bell::default(),
            clock: setup.clock,
            mark: setup.mark,
            sources: RefCell::new(sources),
            seen: links.seen(),
            scratch: RefCell::new(vec![0; DATAGRAM_MAX]),
            mark_refused: Cell::new(false),
        });
        Self { hub, links }
    }

    /// The links as they are.
    pub(crate) fn seen(&self) -> Reader<Seen> {
        self.hub.seen.clone()
    }

    #[must_use]
    pub fn resolver(&self) -> Resolver {
        Resolver(Rc::clone(&self.hub))
    }

    /// Never ends.
    ///
    /// # Errors
    /// None so far: what fails is one exchange.
    pub async fn run(self) -> anyhow::Result<()> {
        let tasks = LocalExecutor::new();
        let listener = self.hub.bell.listen();
        let links = tasks.spawn(self.links.run());
        let driven = tasks.run(self.hub.drive(&tasks, listener)).await;
        drop(links);
        driven
    }
}

impl Resolver {
    /// The addresses of a host: itself where it is one, those of /etc/hosts, else A and AAAA of the upstreams.
    ///
    /// # Errors
    /// Where it has none, or nobody answered within 5 s.
    pub async fn lookup(&self, host: &str) -> anyhow::Result<Vec<IpAddr>> {
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            return Ok(vec![address]);
        }
        let name = wire::encode_name(host).with_context(|| format!("{host:?} is not a host name"))?;
        let local = read(Path::new("/etc/hosts")).map_or_else(Vec::new, |text| upstreams::hosts(&text, host));
        if !local.is_empty() {
            return Ok(local);
        }
        let first = Bell::default();
        let family = async |kind: u16| {
            let slot = Rc::new(Slot::default());
            let (mut listener, mut other) = (slot.bell.listen(), first.listen());
            let question = [&name[..], &kind.to_be_bytes(), &wire::class::IN.to_be_bytes()].concat().into();
            let head = Head { id: 0, flags: flag::RD, question, edns: None, limit: TCP_MAX, prefix: None };
            self.ask(head, None, To { sink: Rc::clone(&slot) as Rc<dyn Sink>, from: None });
            let grace = async {
                other.rung().await;
                Timer::after(GRACE).await;
            };
            or(listener.rung(), grace).await;
            let got = slot.got.take();
            if !got.is_empty() {
                first.ring();
            }
            got
        };
        let both = async { Some(zip(family(kind::A), family(kind::AAAA)).await) };
        let late = async {
            Timer::after(LOOKUP_MAX).await;
            None
        };
        let Some((mut all, more)) = both.or(late).await else { bail!("{host}: no name server answered") };
        all.extend(more);
        anyhow::ensure!(!all.is_empty(), "{host}: no address found");
        Ok(all)
    }

    pub(crate) fn ask(&self, head: Head, target: Option<&[u8]>, to: To) {
        self.0.refresh();
        self.0.core.borrow_mut().ask(self.0.clock.now(), head, target, to);
        self.0.bell.ring();
    }

    /// Tells a server's own port, so that it is never asked as an upstream.
    pub(crate) fn is_at(&self, own: SocketAddr) {
        self.0.sources.borrow_mut().own.push(own);
    }
}

/// What a look-up waits for.
#[derive(Default)]
struct Slot {
    got: RefCell<Vec<IpAddr>>,
    bell: Bell,
}

impl Sink for Slot {
    fn give(&self, _: Option<SocketAddr>, reply: &[u8]) {
        *self.got.borrow_mut() = foreign::addresses(reply);
        self.bell.ring();
    }
}

impl Hub {
    async fn drive(self: &Rc<Self>, tasks: &LocalExecutor<'static>, mut listener: Listener) -> anyhow::Result<()> {
        let mut sockets = HashMap::new();
        let (mut changes, mut uplinks) = (self.seen.listen(), self.seen.read(|s| s.uplinks.clone()));
        let mut buf = Vec::new();
        loop {
            let wake = loop {
                let output = self.core.borrow_mut().poll_output(&mut buf);
                match output {
                    Output::Ask { exchange, upstream, transport } => {
                        let task = Rc::clone(self).exchange(exchange, upstream, transport, buf.clone());
                        sockets.insert(exchange, tasks.spawn(task));
                    }
                    Output::Close(exchange) => drop(sockets.remove(&exchange)),
                    Output::Reply(to) => to.sink.give(to.from, &buf),
                    Output::Wait(at) => break at,
                }
            };
            let timer = async {
                match wake {
                    Some(at) => drop(Timer::at(at).await),
                    None => pending().await,
                }
            };
            or(listener.rung(), or(changes.rung(), timer)).await;
            let now = self.clock.now();
            let old = std::mem::replace(&mut uplinks, self.seen.read(|s| s.uplinks.clone()));
            if old == uplinks {
                self.core.borrow_mut().handle_timeout(now);
            } else {
                log::info!("dns: the way out is now by {uplinks:?}");
                self.sources.borrow_mut().checked = None;
                self.core.borrow_mut().handle_link_change(now);
            }
        }
    }

    async fn exchange(self: Rc<Self>, exchange: u32, upstream: SocketAddr, transport: Transport, query: Vec<u8>) {
        let done = match transport {
            Transport::Udp => self.by_udp(exchange, upstream, &query).await,
            Transport::Tcp => self.by_tcp(exchange, upstream, &query).await,
        };
        if let Err(why) = done {
            log::debug!("dns: upstream {upstream} by {transport:?}: {why}");
            self.core.borrow_mut().handle_failure(self.clock.now(), exchange);
        }
        self.bell.ring();
    }

    /// A socket of its own for each query: the kernel draws the port, and lets through only what the upstream sends.
    async fn by_udp(&self, exchange: u32, upstream: SocketAddr, query: &[u8]) -> io::Result<()> {
        let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        self.set_mark(&socket);
        socket.connect(upstream)?;
        let socket = Async::new(socket)?;
        socket.send(query).await?;
        for turn in 1_u32.. {
            let got = socket.get_ref().recv(&mut self.scratch.borrow_mut());
            match got {
                Ok(n) => {
                    let scratch = self.scratch.borrow();
                    if self.core.borrow_mut().handle_answer(self.clock.now(), exchange, &scratch[..n]) {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.readable().await?,
                Err(e) => return Err(e),
            }
            if turn.is_multiple_of(BUDGET) {
                yield_now().await;
            }
        }
        Ok(())
    }

    async fn by_tcp(&self, exchange: u32, upstream: SocketAddr, query: &[u8]) -> io::Result<()> {
        let mut stream = self.connect(upstream).await?;
        let length = u16::try_from(query.len()).unwrap_or(u16::MAX).to_be_bytes();
        stream.write_all(&[&length[..], query].concat()).await?;
        let mut length = [0; 2];
        stream.read_exact(&mut length).await?;
        let mut message = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut message).await?;
        self.core.borrow_mut().handle_answer(self.clock.now(), exchange, &message);
        Ok(())
    }

    /// std cannot mark a stream before it connects.
    async fn connect(&self, upstream: SocketAddr) -> io::Result<Async<TcpStream>> {
        let family = if upstream.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        self.set_mark(&socket);
        match rustix::net::connect(&socket, &upstream) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(e) => return Err(e.into()),
        }
        let stream = Async::new_nonblocking(TcpStream::from(socket))?;
        stream.writable().await?;
        match stream.get_ref().take_error()? {
            Some(e) => Err(e),
            None => Ok(stream),
        }
    }

    /// Without the right to mark there are no rules of ours either that could catch the socket.
    fn set_mark(&self, socket: &impl AsFd) {
        if let Err(why) = sys::set_mark(socket, self.mark)
            && !self.mark_refused.replace(true)
        {
            log::warn!("dns: sockets to the upstreams cannot be marked: {why}");
        }
    }

    /// Looks at resolv.conf again when it is time.
    fn refresh(&self) {
        let now = self.clock.now();
        if let Some((servers, configured)) = self.sources.borrow_mut().refresh(now) {
            log::info!("dns: upstreams {servers:?}");
            self.core.borrow_mut().set_upstreams(&servers, configured);
        }
    }
}

/// What tells one version of a file from the next.
type Stamp = Option<(SystemTime, u64, u64)>;

/// Where the upstreams come from.
struct Sources {
    upstream: Vec<Upstream>,
    own: Vec<SocketAddr>,
    stamps: Vec<Stamp>,
    checked: Option<Instant>,
    servers: Option<Vec<SocketAddr>>,
}

impl Sources {
    fn new(cfg: &DnsConfig) -> Self {
        let own = [&[cfg.listen], &cfg.listen_also[..]].concat();
        Self { upstream: cfg.upstream.clone(), own, stamps: Vec::new(), checked: None, servers: None }
    }

    /// The servers, where they are others than the last time.
    fn refresh(&mut self, now: Instant) -> Option<(Vec<SocketAddr>, bool)> {
        if self.checked.is_some_and(|at| now.saturating_duration_since(at) < CHECK_EVERY) {
            return None;
        }
        self.checked = Some(now);
        let files: Vec<PathBuf> = self
            .upstream
            .iter()
            .filter_map(|u| match u {
                Upstream::ResolvConf(path) => Some(path.clone()),
                Upstream::Server(_) => None,
            })
            .collect();
        let behind = [RESOLVED, OPENWRT].map(PathBuf::from);
        let watched = files.iter().chain(behind.iter().filter(|_| !files.is_empty()));
        let stamps: Vec<Stamp> = watched.map(|path| stamp(path)).collect();
        if self.servers.is_some() && stamps == self.stamps {
            return None;
        }
        self.stamps = stamps;
        let mut servers: Vec<SocketAddr> = Vec::new();
        for upstream in &self.upstream {
            match upstream {
                Upstream::Server(address) => servers.push(*address),
                Upstream::ResolvConf(path) => {
                    let read = |path: &Path| read(path).map(|text| upstreams::servers(&text, links::index));
                    servers.extend(upstreams::behind_stubs(path, read));
                }
            }
        }
        servers.retain(|s| !self.own.contains(s));
        let mut seen = Vec::new();
        servers.retain(|s| !seen.contains(s) && (seen.push(*s), true).1);
        if self.servers.as_ref() == Some(&servers) {
            return None;
        }
        self.servers = Some(servers.clone());
        Some((servers, !self.upstream.is_empty()))
    }
}

fn stamp(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

/// A small text file; None where it is absent, too large or no text.
fn read(path: &Path) -> Option<String> {
    let small = fs::metadata(path).ok().filter(|m| m.is_file() && m.len() <= FILE_MAX);
    small.and_then(|_| fs::read_to_string(path).ok())
}

/// Ids from the system's generator, some at a time: with the port, all that keeps forged answers out.
fn random_ids() -> Box<dyn FnMut() -> u16> {
    let system = SystemRandom::new();
    let mut drawn = Vec::new();
    Box::new(move || {
        if drawn.is_empty() {
            let mut bytes = [0; IDS * 2];
            if system.fill(&mut bytes).is_err() {
                fastrand::fill(&mut bytes); // a kernel without getrandom and without /dev/urandom
            }
            drawn.extend(bytes.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])));
        }
        drawn.pop().unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_again_when_it_changes_and_we_are_never_our_own_upstream() {
        let path = std::env::temp_dir().join(format!("weft-resolv-{}-{:x}", std::process::id(), fastrand::u64(..)));
        let write = |text: &str| fs::write(&path, text).unwrap();
        let listen: SocketAddr = "169.254.96.16:53".parse().unwrap();
        let mut sources = Sources {
            upstream: vec![Upstream::ResolvConf(path.clone()), Upstream::Server("192.0.2.9:5353".parse().unwrap())],
            own: vec![listen],
            stamps: Vec::new(),
            checked: None,
            servers: None,
        };
        let now = Clock::new(0).now();
        let list = |all: &[&str]| Some((all.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>(), true));
        assert_eq!(sources.refresh(now), list(&["192.0.2.9:5353"]), "no file yet");
        write("nameserver 169.254.96.16\nnameserver 192.0.2.1\n");
        assert_eq!(sources.refresh(now + CHECK_EVERY / 2), None, "not yet time");
        assert_eq!(sources.refresh(now + CHECK_EVERY), list(&["192.0.2.1:53", "192.0.2.9:5353"]));
        assert_eq!(sources.refresh(now + CHECK_EVERY * 2), None, "nothing new");
        write("nameserver 192.0.2.22\n");
        assert_eq!(sources.refresh(now + CHECK_EVERY * 3), list(&["192.0.2.22:53", "192.0.2.9:5353"]));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn ids_differ() {
        let mut ids = random_ids();
        let mut drawn: Vec<u16> = (0..1000).map(|_| ids()).collect();
        drawn.sort_unstable();
        drawn.dedup();
        assert!(drawn.len() > 950);
    }
}
