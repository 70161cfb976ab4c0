//! What the rest of the process holds of the tunnel: handles that open and accept streams, and the
//! streams, which borrow the node inside a poll only.

use super::{
    Beside, RelayLoad, Remembered,
    node::Node,
    streams::{Progress, STREAMS_MAX},
};
use crate::{
    clock::Clock,
    shared::Bell,
    table::model::{Protocol, ServiceId},
};
use futures_lite::io::{AsyncRead, AsyncWrite};
use std::{
    cell::{Cell, RefCell, RefMut},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Streams of peers that wait to be served; one more is reset.
const INCOMING_MAX: usize = 256;

/// What a stream asks of the far node: one of *its own* endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    pub service: ServiceId,
    /// The Service's port, not the endpoint's.
    pub port: u16,
    pub protocol: Protocol,
    pub endpoint: SocketAddr,
}

/// The far end's answer to an [`Open`], or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The far node's table does not say that the endpoint is its own.
    NotMine,
    /// The far node could not connect to its endpoint.
    ConnectFailed(String),
    /// Too many streams are waiting.
    Busy,
    /// No path to the node, or the connection was lost before an answer; the text says which.
    Unreachable(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMine => f.write_str("the far node says that the endpoint is not its own"),
            Self::ConnectFailed(why) => write!(f, "the far node could not connect: {why}"),
            Self::Busy => f.write_str("too many streams"),
            Self::Unreachable(why) => f.write_str(why),
        }
    }
}

#[derive(Default)]
struct Waiting {
    read: Option<Waker>,
    write: Option<Waker>,
}

/// The node and those who wait for it; shared by the driver, the handles and the streams.
pub(crate) struct Shared {
    node: RefCell<Node>,
    /// By the stream's key.
    waiting: RefCell<Vec<Waiting>>,
    incoming: RefCell<VecDeque<(u32, String, Open)>>,
    arrived: Bell,
    /// Wakes the driver.
    pub(crate) bell: Bell,
    pub(super) closing: Cell<bool>,
    pub(super) closed: Bell,
    clock: Clock,
}

impl Shared {
    pub(super) fn new(node: Node, clock: Clock) -> Rc<Self> {
        Rc::new(Self {
            node: RefCell::new(node),
            waiting: RefCell::default(),
            incoming: RefCell::default(),
            arrived: Bell::default(),
            bell: Bell::default(),
            closing: Cell::new(false),
            closed: Bell::default(),
            clock,
        })
    }

    /// Never held over an await.
    pub(crate) fn node(&self) -> RefMut<'_, Node> {
        self.node.borrow_mut()
    }

    pub(super) fn wake(&self, key: u32) {
        let woken = self.waiting.borrow_mut().get_mut(key as usize).map(std::mem::take);
        if let Some(Waiting { read, write }) = woken {
            read.into_iter().chain(write).for_each(Waker::wake);
        }
    }

    fn wait(&self, key: u32, cx: &Context<'_>, side: impl Fn(&mut Waiting) -> &mut Option<Waker>) {
        let mut waiting = self.waiting.borrow_mut();
        let at = key as usize;
        if at >= waiting.len() && at < STREAMS_MAX {
            waiting.resize_with(at + 1, Waiting::default);
        }
        if let Some(entry) = waiting.get_mut(at) {
            *side(entry) = Some(cx.waker().clone());
        }
    }

    pub(super) fn incoming(&self, key: u32, peer: String, open: Open) {
        if self.incoming.borrow().len() >= INCOMING_MAX {
            let mut node = self.node();
            node.answer(key, &Err(Refusal::Busy));
            node.drop_stream(self.clock.now(), key);
        } else {
            self.incoming.borrow_mut().push_back((key, peer, open));
            self.arrived.ring();
        }
    }
}

/// Cheap to clone; every part of the process that opens streams has one.
#[derive(Clone)]
pub struct Handle(Rc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}

impl Handle {
    pub(super) fn new(shared: &Rc<Shared>) -> Self {
        Self(Rc::clone(shared))
    }

    /// Queues an OPEN; data may be written at once and travels right behind it.
    #[must_use]
    pub fn open(&self, node: &str, open: &Open) -> TunnelStream {
        let key = self.0.node().open(self.0.clock.now(), node, open);
        self.0.bell.ring();
        TunnelStream { shared: Rc::clone(&self.0), key }
    }

    /// The next stream that a peer opened, with the peer's name.
    pub async fn accept(&self) -> (TunnelStream, String, Open) {
        let mut arrived = self.0.arrived.listen();
        loop {
            let next = self.0.incoming.borrow_mut().pop_front();
            if let Some((key, peer, open)) = next {
                return (TunnelStream { shared: Rc::clone(&self.0), key: Some(key) }, peer, open);
            }
            arrived.rung().await;
        }
    }

    /// Says goodbye to peers and relays; resolves once that has been sent.
    pub async fn close(&self) {
        let mut closed = self.0.closed.listen();
        self.0.node().shutdown(self.0.clock.now());
        self.0.closing.set(true);
        self.0.bell.ring();
        closed.rung().await;
    }

    #[must_use]
    pub fn peers(&self) -> Vec<PeerView> {
        self.0.node().peer_views(self.0.clock.now())
    }

    #[must_use]
    pub fn relays(&self) -> Vec<RelayView> {
        self.0.node().relay_views()
    }

    /// What kind of NAT is between us and the relays, in RFC 4787's words.
    #[must_use]
    pub fn nat(&self) -> String {
        self.0.node().mapping().to_string()
    }

    /// What is worth knowing of peers after a restart; at most 1,000.
    #[must_use]
    pub fn remembered(&self) -> Vec<Remembered> {
        self.0.node().remembered()
    }

    /// Of a relay: how much it carries.
    #[must_use]
    pub fn relay_load(&self) -> Option<RelayLoad> {
        self.0.node().relay_load()
    }
}

/// One end of a stream. `poll_close` sends FIN and leaves the other direction open; drop resets both.
pub struct TunnelStream {
    shared: Rc<Shared>,
    /// None where there were too many streams already.
    key: Option<u32>,
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TunnelStream({:?})", self.key)
    }
}

fn broken(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, why)
}

impl TunnelStream {
    /// Waits for the far end's answer to our OPEN.
    ///
    /// # Errors
    /// When the far end refuses or cannot be reached: nothing that was written has reached the endpoint.
    pub async fn opened(&mut self) -> Result<(), Refusal> {
        let Some(key) = self.key else { return Err(Refusal::Busy) };
        poll_fn(|cx| match self.shared.node().opened(key) {
            Some(answer) => Poll::Ready(answer),
            None => {
                self.shared.wait(key, cx, |w| &mut w.read);
                Poll::Pending
            }
        })
        .await
    }

    /// Whether nothing has come from its node for so long.
    #[must_use]
    pub fn is_silent(&self, node: &str, long: Duration) -> bool {
        self.shared.node().is_silent(self.shared.clock.now(), node, long)
    }

    /// Answers a peer's OPEN.
    pub fn answer(&mut self, answer: &Result<(), Refusal>) {
        if let Some(key) = self.key {
            self.shared.node().answer(key, answer);
            self.shared.bell.ring();
        }
    }

    /// Sends a datagram beside the stream, once its OPEN was answered.
    #[must_use]
    pub fn send_datagram(&self, bytes: &[u8]) -> Beside {
        let Some(key) = self.key else { return Beside::InStream };
        let became = self.shared.node().send_datagram(self.shared.clock.now(), key, bytes);
        self.shared.bell.ring();
        became
    }

    /// The next datagram that comes beside the stream. Its end is told by reads alone.
    pub fn poll_datagram(&self, cx: &Context<'_>) -> Poll<Box<[u8]>> {
        let Some(key) = self.key else { return Poll::Pending };
        let next = self.shared.node().datagram(key);
        if next.is_none() {
            self.shared.wait(key, cx, |w| &mut w.read);
        }
        next.map_or(Poll::Pending, Poll::Ready)
    }

    /// Runs one operation of the node; registers for a wake where it is not ready.
    fn poll(
        &self,
        cx: &Context<'_>,
        operation: impl FnOnce(&mut Node, u32) -> Progress,
        side: impl Fn(&mut Waiting) -> &mut Option<Waker>,
    ) -> Poll<io::Result<usize>> {
        let Some(key) = self.key else { return Poll::Ready(Err(broken(Refusal::Busy.to_string()))) };
        let progress = operation(&mut self.shared.node(), key);
        match progress {
            Progress::Bytes(len) => Poll::Ready(Ok(len)),
            Progress::End => Poll::Ready(Ok(0)),
            Progress::Broken(why) => Poll::Ready(Err(broken(why))),
            Progress::Pending => {
                self.shared.wait(key, cx, side);
                Poll::Pending
            }
        }
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = self.poll(cx, |node, key| node.read(key, buf), |w| &mut w.read);
        if read.is_ready() {
            self.shared.bell.ring(); // flow control may have to be told
        }
        read
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.poll(cx, |node, key| node.write(key, buf), |w| &mut w.write);
        self.shared.bell.ring();
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let finished = self.poll(cx, Node::finish, |w| &mut w.write);
        self.shared.bell.ring();
        finished.map_ok(|_| ())
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.node().drop_stream(self.shared.clock.now(), key);
            self.shared.bell.ring();
        }
    }
}

/// What `weft peers` shows of one peer.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub name: String,
    /// "direct", "relay", "none".
    pub path: &'static str,
    /// The address that packets go to, or the relay's name.
    pub via: String,
    pub rtt_ms: Option<u32>,
    /// "bbr", "cubic", or "" without a connection.
    pub congestion: &'static str,
    /// UDP payload that the path carries, as far as it is known; 0 without a connection.
    pub mtu: u16,
    pub since_secs: u64,
    pub streams: usize,
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub note: String,
}

/// What `weft status` shows of one relay that we use.
#[derive(Clone, Debug)]
pub struct RelayView {
    pub name: String,
    pub address: String,
    pub registered: bool,
    pub rtt_ms: Option<u32>,
    pub note: String,
}
