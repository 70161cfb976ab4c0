//! The DNS responder's driver: UDP and TCP at weft0's address. Cluster names are answered from the table between one
//! recv and its send; all others go to the forwarder ([`crate::resolver`]).

pub mod answer;
pub mod cache;
pub mod foreign;
pub mod forward;
pub mod fuzz;
pub mod upstreams;
pub mod wire;
pub mod zone;

pub use crate::resolver::{Forwarder, Resolver, Setup};

use crate::{
    clock::Clock,
    config::DnsConfig,
    holder,
    links::Seen,
    metrics::{DnsCounters, bump},
    reactor::{Async, LocalExecutor, Task, Timer},
    resolver::{Sink, To},
    shared::{Bell, Reader},
    sys,
    table::{Table, balance::Here},
};
use answer::{Answerer, Outcome, Via};
use anyhow::{Context as _, bail};
use foreign::Head;
use futures_lite::future::{or, pending, yield_now};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    pin::Pin,
    rc::{Rc, Weak},
    task::Poll,
    time::{Duration, Instant},
};
use wire::Query;
use zone::Zone;

/// Batches of datagrams that are answered without a yield: an always-ready socket would own the only thread.
const BATCHES: u32 = 4;
/// The same for what is done on one connection.
const BUDGET: u32 = 64;
/// A query is a name of 255 bytes and options; a longer one closes a TCP connection.
const QUERY_MAX: usize = 4096;
/// TCP connections. When full, the one that was idle the longest is closed for a new one.
const CONNECTIONS_MAX: usize = 64;
/// Without a whole query or a written answer for this long a connection is closed (RFC 7766 section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Queries of one connection that wait for an upstream; it is not read while there are as many.
const PIPELINE_MAX: usize = 16;
/// Less of its answers taken in [`IDLE`] is too slow.
const SLOWEST: usize = 1024;
/// Bytes of answers that a client has not read yet; above it no more queries are read.
const BACKLOG_MAX: usize = 64 * 1024;
/// Tries to find a port that is free for UDP and TCP.
const PORTS_MAX: usize = 64;
/// After an accept failed (no descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The responder. Answers only from sockets that are bound to one address each.
pub struct Server {
    state: State,
    /// The first is on `[dns] listen`'s address.
    sockets: Vec<(Async<UdpSocket>, Async<TcpListener>)>,
    forwarder: Forwarder,
    port: u16,
}

/// A TCP connection and the task that serves it.
type Open = (Rc<Connection>, Task<()>);

struct State {
    answerer: RefCell<Answerer>,
    table: Reader<Table>,
    counters: Rc<DnsCounters>,
    clock: Clock,
    resolver: Resolver,
    seen: Reader<Seen>,
    scratch: RefCell<Vec<u8>>,
}

impl Server {
    /// Binds a port that is free for UDP and TCP on the address of `cfg.listen`, to which the rules bring its port; and
    /// `cfg.listen_also` as they are.
    ///
    /// # Errors
    /// Where the domain is none, or a port cannot be bound; the text names who has it.
    pub fn bind(cfg: &DnsConfig, table: Reader<Table>, here: Here, setup: &Setup) -> anyhow::Result<Self> {
        let mut zone = Zone::new(cfg, setup.clock.unix() as u32)?;
        zone.here = here;
        let ip = cfg.listen.ip();
        let first = (0..PORTS_MAX)
            .find_map(|_| bind_both(ip).transpose())
            .context("no port is free for both UDP and TCP")?
            .with_context(|| format!("dns: cannot bind {ip}"))?;
        let at = first.0.get_ref().local_addr().context("dns: socket")?;
        let mut sockets = vec![first];
        for also in &cfg.listen_also {
            sockets.push(bind_at(*also)?);
        }
        for (udp, listener) in &sockets {
            let is_v4 = listener.get_ref().local_addr().context("dns: socket")?.is_ipv4();
            let told = sys::tell_interfaces(udp, is_v4).and_then(|()| sys::tell_interfaces(listener, is_v4));
            told.context("dns: sockets cannot tell by which interface a query comes")?;
        }
        let forwarder = Forwarder::new(cfg, setup);
        let resolver = forwarder.resolver();
        resolver.is_at(at);
        let state = State {
            answerer: RefCell::new(Answerer::new(zone)),
            table,
            counters: Rc::clone(&setup.counters),
            clock: setup.clock,
            resolver,
            seen: forwarder.seen(),
            scratch: RefCell::new(vec![0; QUERY_MAX]),
        };
        Ok(Self { state, sockets, forwarder, port: at.port() })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Look-ups through the same upstreams and cache.
    #[must_use]
    pub fn resolver(&self) -> Resolver {
        self.state.resolver.clone()
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// Where the UDP socket is lost.
    pub async fn run(self) -> anyhow::Result<()> {
        let state = Rc::new(self.state);
        let tasks = Rc::new(LocalExecutor::new());
        let open = Rc::new(RefCell::new(Vec::new()));
        // Each a task, so that what wakes one costs no look at the sockets of another.
        let mut parts = vec![tasks.spawn(self.forwarder.run())];
        for (udp, listener) in self.sockets {
            parts.push(tasks.spawn(datagrams(Rc::clone(&state), Rc::new(Datagrams(udp)))));
            parts.push(tasks.spawn(accept(Rc::clone(&state), listener, Rc::downgrade(&tasks), Rc::clone(&open))));
        }
        // None of them ends while all is well.
        let first = poll_fn(|cx| {
            let ended = parts.iter_mut().find_map(|part| match Pin::new(part).poll(cx) {
                Poll::Ready(end) => Some(end),
                Poll::Pending => None,
            });
            ended.map_or(Poll::Pending, Poll::Ready)
        });
        tasks.run(first).await
    }
}

/// None where the port that UDP got is taken for TCP.
fn bind_both(ip: IpAddr) -> io::Result<Option<(Async<UdpSocket>, Async<TcpListener>)>> {
    let udp = Async::<UdpSocket>::bind((ip, 0))?;
    let at = udp.get_ref().local_addr()?;
    match Async::<TcpListener>::bind(at) {
        Ok(tcp) => Ok(Some((udp, tcp))),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(e) => Err(e),
    }
}

/// Both transports at an address that need not exist yet.
fn bind_at(at: SocketAddr) -> anyhow::Result<(Async<UdpSocket>, Async<TcpListener>)> {
    let (mut udp, mut tcp) = (sys::udp_socket(&at), sys::tcp_listener(&at));
    for (is_tcp, error) in [(false, udp.as_mut().err()), (true, tcp.as_mut().err())] {
        if error.is_some_and(|e| e.kind() == io::ErrorKind::AddrInUse) {
            let (transport, holder) = (if is_tcp { "TCP" } else { "UDP" }, holder::of(at, is_tcp));
            let holder = holder.unwrap_or_else(|| "another process".into());
            bail!("dns.listen_also: {at} ({transport}) is taken by {holder}");
        }
    }
    let context = || format!("dns.listen_also: cannot bind {at}");
    Ok((Async::new(udp.with_context(context)?)?, Async::new(tcp.with_context(context)?)?))
}

impl State {
    /// We answer those whom we redirect, and nobody outside.
    /// `own`: the source is the very address that is asked, and so this host, whatever interface has the address.
    fn serves(&self, interface: u32, own: bool) -> bool {
        let served = own || self.seen.read(|s| s.serves(interface));
        if !served {
            bump(&self.counters.refused);
        }
        served
    }

    /// Answers a message into `out`, or passes it on; true: send `out` now.
    fn serve(&self, message: &[u8], via: Via, to: impl FnOnce() -> To, out: &mut Vec<u8>) -> bool {
        bump(&self.counters.queries);
        let outcome = self.table.read(|t| self.answerer.borrow_mut().reply(message, via, t, out));
        let target = match outcome {
            Outcome::Reply => {
                bump(&self.counters.answered);
                return true;
            }
            Outcome::Reject => {
                bump(&self.counters.malformed);
                return true;
            }
            Outcome::Drop => {
                bump(&self.counters.malformed);
                return false;
            }
            Outcome::Forward => None,
            Outcome::Chase(target) => Some(target),
        };
        let Ok(query) = Query::parse(message) else { return false };
        let mut head = Head::new(&query, answer::limit(&query, via));
        head.prefix = target.is_some().then(|| out.as_slice().into());
        self.resolver.ask(head, target.as_deref(), to());
        false
    }
}

/// The UDP socket, for answers that come later.
struct Datagrams(Async<UdpSocket>);

impl Sink for Datagrams {
    fn give(&self, to: Option<SocketAddr>, reply: &[u8]) {
        let Some(to) = to else { return };
        // one that the kernel does not take is lost as on the wire; the client asks again
        if let Err(why) = self.0.get_ref().send_to(reply, to) {
            log::debug!("dns: reply to {to}: {why}");
        }
    }
}

async fn datagrams(state: Rc<State>, udp: Rc<Datagrams>) -> anyhow::Result<()> {
    let mut batch = sys::Batch::default();
    let at = udp.0.get_ref().local_addr().context("dns: socket")?.ip();
    for turn in 1_u32.. {
        match batch.receive(udp.0.get_ref()) {
            Ok(received) => {
                batch.each(|message, from, interface, out| {
                    let to = || To { sink: Rc::clone(&udp) as Rc<dyn Sink>, from: Some(from) };
                    state.serves(interface, from.ip() == at) && state.serve(message, Via::Udp, to, out)
                });
                // one that the kernel does not take is lost as on the wire; the client asks again
                if let Err(why) = batch.send(udp.0.get_ref()) {
                    log::debug!("dns: replies: {why}");
                }
                // after a single one there is seldom another
                if received == 1 {
                    udp.0.readable().await.context("dns: UDP")?;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => udp.0.readable().await.context("dns: UDP")?,
            // an ICMP error of an earlier reply
            Err(e) => log::debug!("dns: receive: {e}"),
        }
        if turn.is_multiple_of(BATCHES) {
            yield_now().await;
        }
    }
    Ok(())
}

/// What a TCP connection shares with the forwarder, which answers later.
struct Connection {
    /// Length-prefixed answers that are not written yet.
    out: RefCell<Vec<u8>>,
    /// Queries at the forwarder.
    waiting: Cell<usize>,
    /// Bytes written since it was used last.
    taken: Cell<usize>,
    used: Cell<Instant>,
    bell: Bell,
}

impl Connection {
    fn push(&self, reply: &[u8]) {
        if let Ok(length) = u16::try_from(reply.len()) {
            let mut out = self.out.borrow_mut();
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(reply);
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.get() < PIPELINE_MAX && self.out.borrow().len() < BACKLOG_MAX
    }
}

impl Sink for Connection {
    fn give(&self, _: Option<SocketAddr>, reply: &[u8]) {
        self.waiting.set(self.waiting.get().saturating_sub(1));
        self.push(reply);
        self.bell.ring();
    }
}

async fn accept(
    state: Rc<State>,
    listener: Async<TcpListener>,
    tasks: Weak<LocalExecutor<'static>>,
    open: Rc<RefCell<Vec<Open>>>,
) -> anyhow::Result<()> {
    let at = listener.get_ref().local_addr().context("dns: socket")?.ip();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(why) => {
                log::debug!("dns: accept: {why}");
                Timer::after(ACCEPT_AGAIN).await;
                continue;
            }
        };
        if !sys::interface_of(stream.get_ref()).is_ok_and(|i| state.serves(i, from.ip() == at)) {
            continue;
        }
        let Some(tasks) = tasks.upgrade() else { return Ok(()) };
        admit(&state, stream, &tasks, &mut open.borrow_mut());
        drop(tasks);
        yield_now().await;
    }
}

/// Serves a connection beside the others; when there are too many the most idle one goes.
fn admit(state: &Rc<State>, stream: Async<TcpStream>, tasks: &LocalExecutor<'static>, open: &mut Vec<Open>) {
    open.retain(|(_, task)| !task.is_finished());
    if open.len() >= CONNECTIONS_MAX
        && let Some(idle) = (0..open.len()).min_by_key(|i| open[*i].0.used.get())
    {
        drop(open.swap_remove(idle));
    }
    let connection = Rc::new(Connection {
        out: RefCell::default(),
        waiting: Cell::new(0),
        taken: Cell::new(0),
        used: Cell::new(state.clock.now()),
        bell: Bell::default(),
    });
    let (state, its) = (Rc::clone(state), Rc::clone(&connection));
    let task = tasks.spawn(async move {
        if let Err(why) = serve_stream(&state, &stream, &its).await {
            log::debug!("dns: connection: {why}");
        }
    });
    open.push((connection, task));
}

/// Serves one connection until its client has closed it and has its answers, or is idle.
async fn serve_stream(state: &State, stream: &Async<TcpStream>, connection: &Rc<Connection>) -> io::Result<()> {
    let mut bell = connection.bell.listen();
    let mut partial = Vec::new();
    let mut reply = Vec::new();
    let mut ended = false;
    for turn in 1_u32.. {
        let wrote = write_some(stream, connection)?;
        let took = take_query(state, connection, &mut partial, &mut reply)?;
        if took || connection.taken.get() >= SLOWEST || wrote && connection.out.borrow().is_empty() {
            connection.taken.set(0);
            connection.used.set(state.clock.now());
        }
        let reads = !ended && connection.has_room() && partial.len() <= QUERY_MAX;
        let mut got = 0;
        if reads && !took {
            let mut scratch = state.scratch.borrow_mut();
            match stream.get_ref().read(&mut scratch) {
                Ok(0) => ended = true,
                Ok(n) => {
                    partial.extend_from_slice(&scratch[..n]);
                    got = n;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        let writes = !connection.out.borrow().is_empty();
        if ended && !took && !writes && connection.waiting.get() == 0 {
            return Ok(());
        }
        if wrote || took || got > 0 {
            if turn.is_multiple_of(BUDGET) {
                yield_now().await;
            }
            continue;
        }
        let readable = async { if reads && !ended { stream.readable().await } else { pending().await } };
        let writable = async { if writes { stream.writable().await } else { pending().await } };
        let rung = async {
            bell.rung().await;
            Ok(())
        };
        let idle = async {
            Timer::at(connection.used.get() + IDLE).await;
            Err(io::ErrorKind::TimedOut.into())
        };
        or(or(readable, writable), or(rung, idle)).await?;
    }
    Ok(())
}

/// True where bytes went out.
fn write_some(stream: &Async<TcpStream>, connection: &Connection) -> io::Result<bool> {
    let mut out = connection.out.borrow_mut();
    if out.is_empty() {
        return Ok(false);
    }
    match stream.get_ref().write(&out) {
        Ok(n) => {
            connection.taken.set(connection.taken.get() + n);
            out.drain(..n);
            if out.is_empty() {
                *out = Vec::new(); // an idle connection owns no buffer
            }
            Ok(n > 0)
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Serves the first whole query of what was read; true where there was one.
fn take_query(
    state: &State,
    connection: &Rc<Connection>,
    partial: &mut Vec<u8>,
    reply: &mut Vec<u8>,
) -> io::Result<bool> {
    let Some(length) = wire::u16_at(partial, 0).map(usize::from) else { return Ok(false) };
    if length > QUERY_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if partial.len() < 2 + length || !connection.has_room() {
        return Ok(false);
    }
    let to = || {
        connection.waiting.set(connection.waiting.get() + 1);
        To { sink: Rc::clone(connection) as Rc<dyn Sink>, from: None }
    };
    if state.serve(&partial[2..2 + length], Via::Tcp, to, reply) {
        connection.push(reply);
    }
    partial.drain(..2 + length);
    if partial.is_empty() {
        *partial = Vec::new();
    }
    Ok(true)
}
