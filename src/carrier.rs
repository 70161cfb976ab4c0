//! Carries the tunnel's datagrams by TCP where UDP is dead: the very same ones, in a Noise stream between a node and a
//! relay. For the tunnel a relay keeps its address, and a node that came by TCP has one that is made up.
//!
//! Here are the open connections; [`crate::detour`] opens them at a node, [`crate::reception`] takes them at a relay.

pub mod address;
pub mod connect;
pub mod fallback;
pub mod noise;
pub mod tls;
#[cfg(test)]
mod vectors;

use crate::{
    clock::Clock,
    config::TunnelConfig,
    detour::Detours,
    metrics::{TunnelCounters, add, bump},
    reactor::{Async, LocalExecutor},
    reception::Reception,
    tcp,
    tunnel::{Lookup, Shared},
};
use connect::Proxy;
use futures_lite::{
    AsyncRead, AsyncWrite,
    future::{poll_fn, zip},
    ready,
};
use noise::{Identity, OVERHEAD, Opener, PREFIX, Sealer};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::{SocketAddr, TcpStream, UdpSocket},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// Of one connection, sealed and not yet in the kernel; a datagram that finds no room is dropped, which tells QUIC's
/// congestion control at its ends. A tenth of a second at 10 Mbit/s.
const QUEUE_MAX: usize = 128 << 10;
/// What the kernel keeps beyond what is on its way: more would only wait there.
const KERNEL_QUEUE: u32 = 32 << 10;
/// Of one write: what the kernel then keeps is not much above [`KERNEL_QUEUE`].
const WRITE_MOST: usize = 16 << 10;
/// An emptied queue that has grown beyond this is given back.
const KEEP: usize = 4 << 10;
/// What one read takes. One buffer serves all connections.
const SCRATCH: usize = 32 << 10;
/// Datagrams of one size that are handed over as one batch, in bytes.
const BATCH: usize = 48 << 10;
/// Reads before the other tasks have their turn.
const BUDGET: usize = 8;
/// A record that says no more than that its sender is there; of no datagram's kind.
const HERE: &[u8] = &[0];
/// A dead far end is found by the tunnel's own PINGs; this is for a host that vanished while nothing else did.
const KEEPALIVE: (Duration, Duration, u8) = (Duration::from_secs(60), Duration::from_secs(10), 3);

/// Any stream of bytes.
pub(crate) trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> Duplex for T {}
pub(crate) type Stream = Pin<Box<dyn Duplex>>;

/// A TCP socket that is written to only when the kernel's own queue is short.
pub(crate) struct Socket(Async<TcpStream>);

impl Socket {
    /// # Errors
    /// Where the event loop does not take it.
    pub(crate) fn new(socket: TcpStream) -> io::Result<Self> {
        // None of these is more than an improvement.
        let _ = tcp::nodelay(&socket);
        let _ = tcp::queue_less(&socket, KERNEL_QUEUE);
        let _ = tcp::keepalive(&socket, KEEPALIVE.0, KEEPALIVE.1, KEEPALIVE.2);
        Async::new(socket).map(Self)
    }

    /// Resolves once [`sys::connect`] has come to an end.
    ///
    /// # Errors
    /// As connect(2).
    pub(crate) async fn connected(&self) -> io::Result<()> {
        self.0.writable().await?;
        self.0.get_ref().take_error()?.map_or(Ok(()), Err)
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.0.poll_writable(cx))?;
        Pin::new(&mut self.0).poll_write(cx, &buf[..buf.len().min(WRITE_MOST)])
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

/// One open connection.
pub(crate) struct Line {
    /// As the tunnel knows the far end.
    pub(crate) address: SocketAddr,
    /// Whether what the tunnel sends there goes this way.
    pub(crate) in_use: Cell<bool>,
    pub(crate) heard: Cell<Instant>,
    /// Dropped at the first record that opens.
    pub(crate) unproven: RefCell<Option<Box<dyn std::any::Any>>>,
    sealer: RefCell<Sealer>,
    queue: RefCell<Queue>,
    waker: RefCell<Option<Waker>>,
    closed: Cell<bool>,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// So many of them have gone.
    gone: usize,
}

impl Queue {
    fn waiting(&self) -> &[u8] {
        &self.bytes[self.gone..]
    }

    fn take(&mut self, count: usize) {
        self.gone += count;
        if self.gone == self.bytes.len() {
            if self.bytes.capacity() > KEEP {
                self.bytes = Vec::new();
            }
            self.bytes.clear();
            self.gone = 0;
        } else if self.gone > QUEUE_MAX / 2 {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
    }
}

impl Line {
    #[must_use]
    pub(crate) fn new(address: SocketAddr, sealer: Sealer, now: Instant) -> Rc<Self> {
        Rc::new(Self {
            address,
            in_use: Cell::new(true),
            heard: Cell::new(now),
            unproven: RefCell::default(),
            sealer: RefCell::new(sealer),
            queue: RefCell::default(),
            waker: RefCell::default(),
            closed: Cell::new(false),
        })
    }

    /// Its connection ends.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.wake();
    }

    /// Shows that the hello was no copy, where nothing else is to be said yet.
    pub(crate) fn show(&self) {
        self.send(HERE, HERE.len());
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Never waits: gives how many datagrams found no room.
    fn send(&self, batch: &[u8], segment: usize) -> u64 {
        let mut queue = self.queue.borrow_mut();
        let mut dropped = 0;
        for datagram in batch.chunks(segment.max(1)) {
            let room = queue.waiting().len() + datagram.len() + OVERHEAD <= QUEUE_MAX;
            dropped += u64::from(!room || !self.sealer.borrow_mut().seal(datagram, &mut queue.bytes));
        }
        drop(queue);
        self.wake();
        dropped
    }
}

/// Datagrams of one size on their way to the tunnel.
struct Batch {
    bytes: Vec<u8>,
    segment: usize,
}

impl Batch {
    /// False where it must be handed over before this datagram.
    fn takes(&self, datagram: &[u8]) -> bool {
        self.bytes.is_empty()
            || datagram.len() <= self.segment
                && self.bytes.len().is_multiple_of(self.segment)
                && self.bytes.len() + datagram.len() <= BATCH
    }

    fn put(&mut self, datagram: &[u8]) {
        if self.bytes.is_empty() {
            self.segment = datagram.len();
        }
        self.bytes.extend_from_slice(datagram);
    }
}

/// See the module.
pub(crate) struct Carrier {
    pub(crate) shared: Rc<Shared>,
    pub(crate) identity: Identity,
    pub(crate) clock: Clock,
    pub(crate) count: Rc<TunnelCounters>,
    pub(crate) lookup: Lookup,
    pub(crate) mark: u32,
    /// Of all relays; 0: there is no TCP.
    pub(crate) port: u16,
    pub(crate) proxy: Option<Proxy>,
    /// The tunnel's own socket.
    pub(crate) udp: UdpSocket,
    pub(crate) v6: bool,
    pub(crate) detours: Detours,
    lines: RefCell<HashMap<SocketAddr, Rc<Line>>>,
    scratch: RefCell<Vec<u8>>,
    batch: RefCell<Batch>,
    reception: Option<Reception>,
}

/// What a [`Carrier`] needs beside the `[tunnel]` section.
pub(crate) struct Setup {
    pub(crate) shared: Rc<Shared>,
    pub(crate) identity: Identity,
    pub(crate) clock: Clock,
    pub(crate) count: Rc<TunnelCounters>,
    pub(crate) lookup: Lookup,
    pub(crate) mark: u32,
    pub(crate) udp: UdpSocket,
    pub(crate) v6: bool,
    pub(crate) is_relay: bool,
}

impl Carrier {
    /// Listens where this is a relay. That it cannot is said and no error: UDP is enough for most.
    pub(crate) fn new(config: &TunnelConfig, setup: Setup) -> Rc<Self> {
        let Setup { shared, identity, clock, count, lookup, mark, udp, v6, is_relay } = setup;
        let port = config.tcp_fallback;
        let reception =
            (is_relay && port != 0).then(|| Reception::bind(config.listen.ip(), port, &identity, clock.now()));
        let reception = reception.and_then(|r| r.map_err(|e| log::warn!(target: "relay", "{e:#}")).ok());
        Rc::new(Self {
            shared,
            identity,
            clock,
            count,
            lookup,
            mark,
            port,
            proxy: config.proxy.clone(),
            udp,
            v6,
            detours: Detours::default(),
            lines: RefCell::default(),
            scratch: RefCell::default(),
            batch: RefCell::new(Batch { bytes: Vec::new(), segment: 0 }),
            reception,
        })
    }

    /// Runs for ever.
    pub(crate) async fn run(self: Rc<Self>) {
        if self.port == 0 {
            return std::future::pending().await;
        }
        let tasks = LocalExecutor::new();
        let relay = async {
            match &self.reception {
                Some(reception) => reception.run(&self, &tasks).await,
                None => std::future::pending().await,
            }
        };
        tasks.run(zip(crate::detour::run(&self, &tasks), relay)).await;
    }

    /// True where the datagrams are taken, or go nowhere; false: UDP is theirs.
    pub(crate) fn send(&self, to: SocketAddr, bytes: &[u8], segment: Option<usize>) -> bool {
        let lines = self.lines.borrow();
        match lines.get(&to).filter(|line| line.in_use.get()) {
            Some(line) => {
                add(&self.count.tcp_drops, line.send(bytes, segment.unwrap_or(bytes.len())));
                true
            }
            None => address::is_made_up(to),
        }
    }

    /// How many of the open connections are of nodes that came here.
    pub(crate) fn clients(&self) -> usize {
        self.lines.borrow().keys().filter(|a| address::is_client(**a)).count()
    }

    /// Ends the connections that brought nothing for so long.
    pub(crate) fn close_silent(&self, patience: Duration) {
        let now = self.clock.now();
        let silent = |l: &&Rc<Line>| address::is_client(l.address) && now >= l.heard.get() + patience;
        self.lines.borrow().values().filter(silent).for_each(|line| line.close());
    }

    /// Carries datagrams both ways until the connection ends; says why it did.
    pub(crate) async fn carry(&self, line: Rc<Line>, mut stream: Stream, mut opener: Opener) -> String {
        if let Some(old) = self.lines.borrow_mut().insert(line.address, Rc::clone(&line)) {
            old.close();
        }
        let mut rest = Vec::new();
        let why = poll_fn(|cx| {
            *line.waker.borrow_mut() = Some(cx.waker().clone());
            if line.closed.get() {
                return Poll::Ready("closed".to_owned());
            }
            let read = self.poll_read(cx, &line, stream.as_mut(), &mut opener, &mut rest);
            if read.is_ready() {
                return read;
            }
            poll_write(cx, &line, stream.as_mut()).map(|why| why.to_string())
        })
        .await;
        let mut lines = self.lines.borrow_mut();
        if lines.get(&line.address).is_some_and(|l| Rc::ptr_eq(l, &line)) {
            lines.remove(&line.address);
        }
        why
    }

    fn poll_read(
        &self,
        cx: &mut Context<'_>,
        line: &Line,
        mut stream: Pin<&mut dyn Duplex>,
        opener: &mut Opener,
        rest: &mut Vec<u8>,
    ) -> Poll<String> {
        let mut scratch = self.scratch.borrow_mut();
        scratch.resize(SCRATCH, 0);
        for _ in 0..BUDGET {
            let held = rest.len();
            let count = match stream.as_mut().poll_read(cx, &mut scratch[held..]) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => return Poll::Ready("the far end closed it".into()),
                Poll::Ready(Ok(count)) => count,
                Poll::Ready(Err(error)) => return Poll::Ready(error.to_string()),
            };
            scratch[..held].copy_from_slice(rest);
            let bytes = &mut scratch[..held + count];
            let mut at = 0;
            let broken = loop {
                match opener.open(&mut bytes[at..]) {
                    Ok(Some(len)) => {
                        self.deliver(line, &bytes[at + PREFIX..at + PREFIX + len]);
                        at += len + OVERHEAD;
                    }
                    Ok(None) => break None,
                    Err(why) => break Some(why),
                }
            };
            self.flush(line);
            if let Some(why) = broken {
                return Poll::Ready(why.to_string());
            }
            rest.clear();
            rest.extend_from_slice(&bytes[at..]);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn deliver(&self, line: &Line, datagram: &[u8]) {
        if datagram == HERE {
            line.unproven.take();
            return line.heard.set(self.clock.now());
        }
        if !self.batch.borrow().takes(datagram) {
            self.flush(line);
        }
        self.batch.borrow_mut().put(datagram);
    }

    fn flush(&self, line: &Line) {
        let mut batch = self.batch.borrow_mut();
        if batch.bytes.is_empty() {
            return;
        }
        let (now, segment) = (self.clock.now(), batch.segment);
        line.unproven.take();
        line.heard.set(now);
        let mut node = self.shared.node();
        node.handle_datagrams(now, line.address, &mut batch.bytes, segment);
        node.account(|| self.clock.now());
        batch.bytes.clear();
        self.shared.bell.ring();
    }

    /// Why there is no TCP to somebody, for those who did not expect it.
    pub(crate) fn refused(&self, why: &dyn std::fmt::Display, from: SocketAddr) {
        bump(&self.count.tcp_strangers);
        log::debug!(target: "relay", "TCP from {from}: {why}");
    }
}

/// Ready when the connection cannot be written to any more.
fn poll_write(cx: &mut Context<'_>, line: &Line, mut stream: Pin<&mut dyn Duplex>) -> Poll<io::Error> {
    let mut queue = line.queue.borrow_mut();
    while !queue.waiting().is_empty() {
        match ready!(stream.as_mut().poll_write(cx, queue.waiting())) {
            Ok(0) => return Poll::Ready(io::ErrorKind::WriteZero.into()),
            Ok(count) => queue.take(count),
            Err(error) => return Poll::Ready(error),
        }
    }
    match stream.poll_flush(cx) {
        Poll::Ready(Err(error)) => Poll::Ready(error),
        Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
    }
}
