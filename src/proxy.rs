//! The proxy's driver: takes the connections that the rules redirect, asks the table where each goes, and
//! relays it; [`crate::served`] opens our own endpoints for peers.

pub mod cover;
pub mod flows;
pub(crate) mod head;
pub mod iptables;
pub mod link;
pub mod nft;
pub mod rules;
pub mod udp;

use crate::{
    clock::Clock,
    config::ProxyConfig,
    first::{self, Early, early},
    lease::{Lease, Moved},
    metrics::{ProxyCounters, bump},
    pump::{self, Pool},
    reactor::{Async, LocalExecutor, Timer},
    served,
    shared::{Bell, Reader},
    streamed, sys,
    table::{
        Table,
        balance::{Ask, Balancer, Here, NoTarget, Target},
        model::Protocol,
    },
    tunnel::{self, Open, Refusal, TunnelStream},
    udp::Udp,
};
use anyhow::{Context, Result};
use futures_lite::future::{or, yield_now, zip};
use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

/// How long one endpoint may take to accept: the kernel's first retransmission comes after 1 s, the
/// second 2 s later (RFC 6298).
pub(crate) const CONNECT: Duration = Duration::from_secs(3);
/// How long a far node may take to answer; a first contact makes a path, and the far node dials as above.
const OPEN: Duration = Duration::from_secs(10);
/// A node of which nothing is heard for so long is left for another one's endpoint, if there is any: above what a new path
/// takes after a relay or a link has died.
pub(crate) const SILENT: Duration = Duration::from_secs(3);
const SILENT_LOOK: Duration = Duration::from_secs(1);
/// Endpoints that one connection is tried on at most.
const TRIES: usize = 4;
/// Connections that are accepted before the others may run.
const BATCH: usize = 64;
/// The pause after an accept that failed for want of memory or descriptors: they come back when
/// connections end, and a closer look would spin.
const BREATHER: Duration = Duration::from_millis(100);
/// Lines of one kind in the log: at most one in this time. A peer or client cannot fill a flash with them.
const QUIET: Duration = Duration::from_secs(1);

/// The TCP proxy; see the module.
pub struct Proxy {
    listener: Async<TcpListener>,
    /// None where the kernel has no IPv6.
    listener6: Option<Async<TcpListener>>,
    shared: Rc<Shared>,
    executor: Rc<LocalExecutor<'static>>,
    udp: Rc<Udp>,
}

/// What all sessions share.
pub(crate) struct Shared {
    /// Where we listen; of IPv6 where the kernel has it.
    pub(crate) own: SocketAddr,
    pub(crate) own6: Option<SocketAddr>,
    mark: u32,
    /// Connections and peers' streams at one time; beyond it a new one is refused at once.
    most: usize,
    pub(crate) here: Here,
    pub(crate) balancer: Rc<RefCell<Balancer>>,
    pub(crate) table: Reader<Table>,
    pub(crate) tunnel: Reader<Option<tunnel::Handle>>,
    pub(crate) counters: Rc<ProxyCounters>,
    pub(crate) clock: Clock,
    pub(crate) pool: Pool,
    /// Bytes of datagrams that wait for the tunnel.
    pub(crate) queued: Rc<Cell<usize>>,
    sessions: Cell<usize>,
    leaving: Cell<bool>,
    /// Rings when we are to leave, and when no session is left.
    leave: Bell,
    said: Cell<Option<Instant>>,
    unmarked: Cell<bool>,
}

/// One of the sessions that are counted.
pub(crate) struct Place(pub(crate) Rc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.sessions.set(self.0.sessions.get() - 1);
        if self.0.sessions.get() == 0 {
            self.0.leave.ring();
        }
    }
}

/// How a proxy ends without ending what it relays.
#[derive(Clone)]
pub struct Drain(Rc<Shared>);

impl Drain {
    /// Has it take no more connections: [`Proxy::run`] ends with the last that it has.
    pub fn begin(&self) {
        self.0.leaving.set(true);
        self.0.leave.ring();
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.0.sessions.get() == 0
    }

    /// Resolves when there is no session.
    pub async fn idle(&self) {
        let mut bell = self.0.leave.listen();
        while !self.is_idle() {
            bell.rung().await;
        }
    }

    async fn begun(&self) {
        let mut bell = self.0.leave.listen();
        while !self.0.leaving.get() {
            bell.rung().await;
        }
    }
}

/// How an attempt on one endpoint ended.
enum Attempt {
    /// Bytes may have been relayed: there is no other try.
    Done(io::Result<()>),
    /// Nothing has reached the endpoint.
    Failed(String),
    /// Nor is anything heard of its node; with more patience there may be.
    Silent,
}

impl Proxy {
    /// Listens on a free port of `listen`, which need not be on a device yet.
    ///
    /// # Errors
    /// When the kernel gives no such socket.
    #[allow(clippy::too_many_arguments)]
    pub fn bind(
        cfg: &ProxyConfig,
        listen: IpAddr,
        here: Here,
        balancer: Rc<RefCell<Balancer>>,
        table: Reader<Table>,
        tunnel: Reader<Option<tunnel::Handle>>,
        counters: Rc<ProxyCounters>,
        clock: Clock,
    ) -> Result<Self> {
        let wanted = SocketAddr::new(listen, 0);
        let listener = sys::tcp_listener(&wanted).with_context(|| format!("cannot listen on {listen}"))?;
        // Inherited by what is accepted.
        let pool = Pool::default();
        pool.prepare(&listener)?;
        let listener6 = sys::tcp_listener(&SocketAddr::new(rules::ADDRESS6.into(), 0))
            .and_then(|listener6| pool.prepare(&listener6).map(|()| listener6))
            .map_err(|e| log::info!("Services have no IPv6 here: {e}"))
            .ok();
        let shared = Shared {
            own: listener.local_addr()?,
            own6: listener6.as_ref().map(TcpListener::local_addr).transpose()?,
            mark: cfg.mark,
            most: pump::room(cfg.max_connections),
            here,
            balancer,
            table,
            tunnel,
            counters,
            clock,
            pool,
            queued: Rc::default(),
            sessions: Cell::new(0),
            leaving: Cell::new(false),
            leave: Bell::default(),
            said: Cell::new(None),
            unmarked: Cell::new(false),
        };
        let (shared, executor) = (Rc::new(shared), Rc::new(LocalExecutor::new()));
        let udp = Udp::new(Rc::clone(&shared), Rc::downgrade(&executor));
        let listener6 = listener6.map(Async::new_nonblocking).transpose()?;
        Ok(Self { listener: Async::new_nonblocking(listener)?, listener6, shared, executor, udp })
    }

    /// Where the rules send datagrams of UDP Services to.
    #[must_use]
    pub fn udp_ports(&self) -> Reader<udp::Ports> {
        self.udp.ports()
    }

    /// Where the rules send connections to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.shared.own.port()
    }

    /// The same for IPv6; None: the kernel has none.
    #[must_use]
    pub fn port6(&self) -> Option<u16> {
        self.shared.own6.map(|own| own.port())
    }

    #[must_use]
    pub fn drain(&self) -> Drain {
        Drain(Rc::clone(&self.shared))
    }

    /// Relays until it is dropped, which ends all connections, or until [`Drain::begin`] and the last of them.
    ///
    /// # Errors
    /// When the event loop no longer knows the listener.
    pub async fn run(self) -> Result<()> {
        let Self { listener, listener6, shared, executor, udp } = self;
        let drain = Drain(Rc::clone(&shared));
        let tcp = async {
            let begun = async {
                drain.begun().await;
                Ok(())
            };
            let sixth = async {
                match &listener6 {
                    Some(listener) => accept(listener, &shared, &executor).await,
                    None => std::future::pending().await,
                }
            };
            or(or(accept(&listener, &shared, &executor), sixth), begun).await.context("listener")?;
            drop((listener, listener6));
            drain.idle().await;
            Ok(())
        };
        let others = async {
            zip(or(served::peers(&shared, &executor), drain.begun()), udp.run()).await;
            std::future::pending().await
        };
        executor.run(or(tcp, others)).await
    }
}

/// Accepts what is redirected; returns only when the listener itself is broken.
async fn accept<'x>(
    listener: &Async<TcpListener>,
    shared: &Rc<Shared>,
    sessions: &LocalExecutor<'x>,
) -> io::Result<()> {
    // Given up to accept one more when there are no descriptors: a client must be refused, not left hanging.
    let mut spare = File::open("/dev/null").ok();
    loop {
        listener.readable().await?;
        for _ in 0..BATCH {
            match pump::accept(listener.get_ref()) {
                Ok((client, from)) => match Shared::place(shared) {
                    Some(place) => sessions.spawn(async move { place.0.client(client, from.ip()).await }).detach(),
                    None => shared.full(&client),
                },
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    drop(spare.take());
                    if let Ok((client, _)) = listener.get_ref().accept() {
                        shared.full(&client);
                    }
                    spare = File::open("/dev/null").ok();
                    shared.say(|| format!("connections are refused: {e}"));
                    Timer::after(BREATHER).await;
                    break;
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => {
                    shared.say(|| format!("accept: {e}"));
                    Timer::after(BREATHER).await;
                    break;
                }
                // accept(2): on Linux these are errors of the new connection, or of the network it came over.
                Err(e) => log::debug!("accept: {e}"),
            }
        }
        yield_now().await;
    }
}

/// Closes with a reset, which a client cannot take for an empty answer.
fn reset(client: &TcpStream) {
    let _ = sys::reset_on_close(client);
}

impl Shared {
    pub(crate) fn place(shared: &Rc<Self>) -> Option<Place> {
        let taken = shared.sessions.get();
        (taken < shared.most).then(|| {
            shared.sessions.set(taken + 1);
            Place(Rc::clone(shared))
        })
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        ip == self.own.ip() || ip == rules::ADDRESS6
    }

    fn full(&self, client: &TcpStream) {
        bump(&self.counters.refused_full);
        reset(client);
    }

    /// Warns, unless it has just done so.
    pub(crate) fn say(&self, line: impl FnOnce() -> String) {
        let now = self.clock.now();
        if self.said.get().is_none_or(|then| now.saturating_duration_since(then) >= QUIET) {
            self.said.set(Some(now));
            log::warn!("{}", line());
        }
    }

    /// One connection of a client, from its accept to its end.
    async fn client(&self, client: TcpStream, from: IpAddr) {
        bump(&self.counters.accepted);
        let destination = match sys::original_dst(&client) {
            Ok(to) if !self.is_own(to.ip()) => to,
            Ok(_) | Err(_) => {
                bump(&self.counters.refused_surface);
                return reset(&client);
            }
        };
        let mut client = match Async::new_nonblocking(client) {
            Ok(client) => client,
            Err(e) => return self.say(|| format!("{e}")),
        };
        let mut tried: Vec<SocketAddr> = Vec::new();
        // A node that is silent is left for another one soon; where all are, it may be our own link.
        let (mut is_hasty, mut silent) = (true, false);
        let first = Ask { destination, protocol: Protocol::Tcp, client: from, tried: &[] };
        let key = match self.table.read(|t| t.wants_header(&first)) {
            Some(name) => first::key(&self.pool, &client, &name).await,
            None => None,
        };
        loop {
            let ask = Ask { tried: &tried, ..first };
            let picked = if tried.len() < TRIES { Lease::take(self, ask, key) } else { Err(NoTarget::NoEndpoint) };
            let (target, to) = match picked {
                Ok(picked) => picked,
                Err(NoTarget::NotAService) => {
                    bump(&self.counters.refused_surface);
                    return reset(client.get_ref());
                }
                Err(NoTarget::Full) => return self.full(client.get_ref()),
                Err(NoTarget::NoEndpoint) if is_hasty && silent => {
                    tried.clear();
                    is_hasty = false;
                    continue;
                }
                Err(NoTarget::NoEndpoint) => break,
            };
            let address = to.address;
            if !tried.is_empty() {
                bump(&self.counters.retries);
            }
            let (attempt, back) = match target {
                Target::Remote { node, service, port, address } => {
                    let open = Open { service, port, protocol: Protocol::Tcp, endpoint: address };
                    self.remote(client, &node, &open, &to, is_hasty && to.has_others).await
                }
                Target::Local(_) => self.local(client, &to).await,
            };
            match (attempt, back) {
                (Attempt::Failed(why), Some(back)) => {
                    log::debug!("{destination}: {address}: {why}");
                    client = back;
                    tried.push(address);
                }
                (Attempt::Silent, Some(back)) => {
                    (client, silent) = (back, true);
                    tried.push(address);
                }
                (Attempt::Silent, None) => return,
                (Attempt::Failed(why), None) => return log::debug!("{destination}: {why}"),
                (Attempt::Done(end), _) => return log::debug!("{destination} by {address}: {end:?}"),
            }
        }
        if tried.is_empty() {
            bump(&self.counters.no_endpoint);
        } else {
            bump(&self.counters.failed);
            self.say(|| format!("no endpoint of {destination} can be reached; tried {tried:?}"));
        }
        reset(client.get_ref());
    }

    async fn local(&self, client: Async<TcpStream>, to: &Lease<&Self>) -> (Attempt, Option<Async<TcpStream>>) {
        let connect = to.patience().unwrap_or(CONNECT);
        match self.dial(&to.address, connect).await {
            Err(e) => {
                to.failed();
                (Attempt::Failed(e.to_string()), Some(client))
            }
            Ok(server) => {
                to.worked();
                to.prepare(&server);
                let own = Moved::default();
                let [up, down] = to.counts(&own);
                let done = to.limited(pin!(pump::sockets(&self.pool, client, server, up, down)), &own).await;
                (Attempt::Done(done), None)
            }
        }
    }

    async fn remote(
        &self,
        client: Async<TcpStream>,
        node: &str,
        open: &Open,
        to: &Lease<&Self>,
        is_hasty: bool,
    ) -> (Attempt, Option<Async<TcpStream>>) {
        let Some(tunnel) = self.tunnel.read(Clone::clone) else {
            return (Attempt::Failed(format!("it is on {node}, and the tunnel is off")), Some(client));
        };
        let mut stream = tunnel.open(node, open);
        let sent = match self.opened(&client, &mut stream, Some(node).filter(|_| is_hasty)).await {
            Ok(sent) => sent,
            Err(Some(refusal)) => {
                self.say(|| format!("{node} refused {}: {refusal}", open.endpoint));
                if matches!(refusal, Refusal::Unreachable(_)) {
                    to.gone()
                } else {
                    to.failed()
                }
                return (Attempt::Failed(refusal.to_string()), Some(client));
            }
            Err(None) => {
                self.say(|| format!("nothing is heard of {node}: {} is left for another endpoint", open.endpoint));
                to.gone();
                return (Attempt::Silent, Some(client));
            }
        };
        to.worked();
        if let Err(e) = streamed::take(client.get_ref(), sent) {
            return (Attempt::Done(Err(e)), None);
        }
        crate::metrics::add(&self.counters.bytes_up, sent as u64);
        let own = Moved::default();
        let [up, down] = to.counts(&own);
        let done = to.limited(pin!(streamed::stream(&self.pool, client, stream, up, down)), &own).await;
        (Attempt::Done(done), None)
    }

    /// Waits for the far end's answer. What the client has sent by then, and what it sends meanwhile if that
    /// was nothing, goes behind the OPEN; it is only looked at, so that another endpoint can still get it.
    /// Returns how many bytes that was. The client's silence holds nothing up: the server may speak first. None as error:
    /// nothing is heard of the node, where one is named.
    async fn opened(
        &self,
        client: &Async<TcpStream>,
        stream: &mut TunnelStream,
        node: Option<&str>,
    ) -> Result<usize, Option<Refusal>> {
        let slow = || Refusal::Unreachable(format!("no answer within {} s", OPEN.as_secs()));
        let mut late = Timer::after(OPEN);
        let mut look = true;
        let mut sent = 0;
        let mut doubt = self.clock.now() + SILENT;
        loop {
            if self.clock.now() >= doubt {
                if node.is_some_and(|node| stream.is_silent(node, SILENT)) {
                    return Err(None);
                }
                doubt = self.clock.now() + SILENT_LOOK;
            }
            if look {
                match early(&self.pool, client.get_ref(), stream).await {
                    Early::Sent(n) => (sent, look) = (n, false),
                    Early::Nothing => {}
                    Early::Never => look = false,
                }
            }
            let answer = async { Some(stream.opened().await) };
            let bytes = async {
                if !look || client.readable().await.is_err() {
                    std::future::pending::<()>().await;
                }
                None
            };
            let timeout = async {
                (&mut late).await;
                Some(Err(slow()))
            };
            let doubted = async {
                Timer::at(doubt).await;
                None
            };
            if let Some(answer) = or(answer, or(bytes, or(timeout, doubted))).await {
                return answer.map(|()| sent).map_err(Some);
            }
        }
    }

    /// Puts our mark on a socket, so that the rules leave it alone.
    fn prepare(&self, socket: &impl AsFd, to: &SocketAddr) -> io::Result<()> {
        if self.is_own(to.ip()) {
            return Err(io::Error::other("this is our own address"));
        }
        if let Err(e) = sys::set_mark(socket, self.mark) {
            // Then the rules would bring it back to us, if it went to a virtual address.
            if self.table.read(|t| t.by_vip(to.ip()).is_some()) {
                return Err(e);
            }
            if !self.unmarked.replace(true) {
                log::warn!("own connections are not marked (needs CAP_NET_ADMIN): {e}");
            }
        }
        Ok(())
    }

    /// A UDP socket for one endpoint.
    pub(crate) fn dial_udp(&self, to: &SocketAddr) -> io::Result<Async<UdpSocket>> {
        let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = sys::udp_socket(&SocketAddr::new(any, 0))?;
        self.prepare(&socket, to)?;
        socket.connect(to)?;
        Async::new_nonblocking(socket)
    }

    /// Connects with our mark.
    pub(crate) async fn dial(&self, to: &SocketAddr, patience: Duration) -> io::Result<Async<TcpStream>> {
        let socket = sys::tcp_socket(to)?;
        self.prepare(&socket, to)?;
        self.pool.prepare(&socket)?;
        let timeout = async {
            Timer::after(patience).await;
            Err(ErrorKind::TimedOut.into())
        };
        or(Async::connect_by(socket, to), timeout).await
    }
}
