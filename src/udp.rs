//! UDP Services: a socket for each port, a session with a socket of its own for each client. Through the tunnel a session
//! is a stream, and datagrams go beside it, those that need several packets each by a stream of its own: none is lost for
//! one lost packet of many, and none waits for another. In the session's stream, in frames (length u16, bytes), go only
//! those for a node of an earlier version.

use crate::sorted::Map;
use crate::{
    lease::Lease,
    metrics::{add, bump},
    proxy::{
        SILENT, Shared,
        udp::{self, Key, PortId, Ports, Sessions},
    },
    reactor::{Async, LocalExecutor, Task, Timer},
    shared::{Bell, Reader, Writer},
    sys,
    table::{
        Table,
        balance::{Ask, Target},
        model::{Name, Protocol},
    },
    tunnel::{Beside, Open, Refusal, TunnelStream, gather::DATAGRAM_MAX},
};
use futures_lite::{
    AsyncRead, AsyncWrite,
    future::{or, poll_fn, yield_now},
};
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    num::NonZeroUsize,
    pin::Pin,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

/// Datagrams of one socket before the others may run.
const BATCH: usize = 32;
/// How often silent sessions are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// Endpoints that one datagram is tried on.
const TRIES: usize = 4;
/// How long a far node may take to answer.
const OPEN: Duration = Duration::from_secs(10);
/// How long a peer's session may be silent; our own end sooner.
const FAR_SILENCE: Duration = Duration::from_secs(150);
/// Bytes that wait for one session's stream, and for all of them; a datagram that finds no room is dropped, as a full
/// link would.
const QUEUE_MAX: usize = 512 * 1024;
const QUEUES_MAX: usize = 1024 * 1024;
/// Clients' sessions through the tunnel; they must leave room for connections among the streams that a peer allows (1,024).
/// When full the one that has been silent for longest ends.
const FAR_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(511);

/// That a node was heard is known so exactly.
const HEARD: Duration = Duration::from_secs(1);

/// A session's stream, one end of it, and the datagrams that wait for it.
#[derive(Debug)]
struct Queue {
    /// Once it has been answered.
    stream: RefCell<Option<Rc<RefCell<TunnelStream>>>>,
    /// When the first datagram was sent since the node was heard.
    asked: Cell<Option<Instant>>,
    waiting: RefCell<VecDeque<Box<[u8]>>>,
    bytes: Cell<usize>,
    /// Of all queues.
    total: Rc<Cell<usize>>,
    bell: Bell,
}

impl Queue {
    fn new(total: &Rc<Cell<usize>>) -> Self {
        let (total, stream, asked) = (Rc::clone(total), RefCell::default(), Cell::default());
        Self { stream, asked, waiting: RefCell::default(), bytes: Cell::new(0), total, bell: Bell::default() }
    }

    /// Whether what is sent has gone into the void for some time.
    fn is_lost(&self, now: Instant, node: &str) -> bool {
        let stream = self.stream.borrow();
        let Some(stream) = &*stream else { return false };
        let unheard = |at: &Instant| stream.borrow().is_silent(node, now.saturating_duration_since(*at) + HEARD);
        let asked = self.asked.get().filter(unheard);
        self.asked.set(asked.or(Some(now)));
        asked.is_some_and(|at| now >= at + SILENT)
    }

    /// Sends a datagram, or has it wait; false where there is no room.
    fn push(&self, bytes: &[u8]) -> bool {
        let became = self.stream.borrow().as_ref().map_or(Beside::InStream, |s| s.borrow().send_datagram(bytes));
        if became != Beside::InStream {
            return became == Beside::Sent;
        }
        let room = self.bytes.get() + bytes.len() <= QUEUE_MAX && self.total.get() + bytes.len() <= QUEUES_MAX;
        if room {
            self.bytes.set(self.bytes.get() + bytes.len());
            self.total.set(self.total.get() + bytes.len());
            self.waiting.borrow_mut().push_back(bytes.into());
            self.bell.ring();
        }
        room
    }

    fn pop(&self) -> Option<Box<[u8]>> {
        let next = self.waiting.borrow_mut().pop_front()?;
        self.bytes.set(self.bytes.get() - next.len());
        self.total.set(self.total.get() - next.len());
        Some(next)
    }
}

/// Carries both ways what belongs to a session, until its stream ends.
async fn carry(queue: &Queue, stream: TunnelStream, take: impl Fn(&[u8])) -> io::Result<()> {
    let stream = Rc::new(RefCell::new(stream));
    queue.stream.replace(Some(Rc::clone(&stream)));
    let there = async {
        let mut bell = queue.bell.listen();
        loop {
            while let Some(bytes) = queue.pop() {
                // One that is dropped is counted there.
                let became = stream.borrow().send_datagram(&bytes);
                if became == Beside::InStream {
                    write_frame(&stream, &bytes).await?;
                }
            }
            bell.rung().await;
        }
    };
    let beside = async {
        loop {
            let bytes = poll_fn(|cx| stream.borrow().poll_datagram(cx)).await;
            take(&bytes);
        }
    };
    or(there, or(read_frames(&stream, &take), beside)).await
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.total.set(self.total.get() - self.bytes.get());
    }
}

/// A session's claim on its endpoint.
type Claim = Rc<Lease<Rc<Shared>>>;

/// From a client's session to its endpoint.
struct Leg {
    way: Way,
    claim: Claim,
}

/// The task brings the answers back; dropped, it ends.
enum Way {
    Near(Rc<Async<UdpSocket>>, #[allow(dead_code)] Task<()>),
    Far(Rc<Queue>, Name, #[allow(dead_code)] Task<()>),
}

/// One port's sockets, one for each family that its Service has, with their tasks.
struct Bound {
    number: u16,
    families: [bool; 2],
    _tasks: Vec<Task<()>>,
}

/// See the module.
pub(crate) struct Udp {
    shared: Rc<Shared>,
    /// Not kept alive by its own tasks.
    executor: Weak<LocalExecutor<'static>>,
    /// Whose endpoint is here, and elsewhere.
    near: RefCell<Sessions<Leg>>,
    far: RefCell<Sessions<Leg>>,
    ports: Writer<Ports>,
}

/// What a port's task needs.
struct Port {
    udp: Rc<Udp>,
    id: PortId,
    number: u16,
    socket: Async<UdpSocket>,
}

impl Udp {
    pub(crate) fn new(shared: Rc<Shared>, executor: Weak<LocalExecutor<'static>>) -> Rc<Self> {
        let (near, far) = (RefCell::default(), RefCell::new(Sessions::with_room(FAR_MAX)));
        Rc::new(Self { shared, executor, near, far, ports: Writer::new(Ports::new()) })
    }

    /// Where each port is served.
    pub(crate) fn ports(&self) -> Reader<Ports> {
        self.ports.reader()
    }

    /// Keeps sockets and sessions as the table wants them, for ever.
    pub(crate) async fn run(self: Rc<Self>) {
        let mut bound: Map<PortId, Bound> = Map::new();
        let mut bell = self.shared.table.listen();
        loop {
            if self.shared.table.read(Table::synced) {
                self.bind(&mut bound);
            }
            self.sweep(&bound);
            let sweep = async {
                Timer::after(SWEEP).await;
            };
            or(bell.rung(), sweep).await;
        }
    }

    fn bind(self: &Rc<Self>, bound: &mut Map<PortId, Bound>) {
        let own = [Some(self.shared.own), self.shared.own6].map(|own| own.map(|own| own.ip()));
        let wanted = self.shared.table.read(|t| {
            let families = |id: PortId| {
                let vips = t.service_by_id(&id.0).map_or(&[][..], |s| &s.vips);
                let has = |v4| vips.iter().any(|ip| ip.is_ipv4() == v4);
                (id, [has(true), has(false) && own[1].is_some()])
            };
            udp::wanted(t).into_iter().map(families).collect::<Map<_, _>>()
        });
        bound.retain(|id, b| wanted.get(id) == Some(&b.families));
        for (id, families) in wanted {
            if bound.contains_key(&id) {
                continue;
            }
            let taken = |number| bound.values().any(|b| b.number == number);
            let wanted = own.iter().zip(families).filter_map(|(own, wanted)| own.filter(|_| wanted));
            let mut found = Err(ErrorKind::AddrInUse.into());
            for number in udp::places(&id).filter(|n| !taken(*n)) {
                let sockets = wanted
                    .clone()
                    .map(|own| sys::udp_socket(&SocketAddr::new(own, number)).and_then(Async::new_nonblocking));
                found = sockets.collect::<io::Result<Vec<_>>>().map(|sockets| (number, sockets));
                if !matches!(&found, Err(e) if e.kind() == ErrorKind::AddrInUse) {
                    break;
                }
            }
            match found {
                Ok((number, sockets)) => {
                    let Some(executor) = self.executor.upgrade() else { return };
                    let run = |socket| {
                        let port = Port { udp: Rc::clone(self), id: id.clone(), number, socket };
                        executor.spawn(Rc::new(port).run())
                    };
                    let tasks = sockets.into_iter().map(run).collect();
                    bound.insert(id, Bound { number, families, _tasks: tasks });
                }
                Err(e) => self.shared.say(|| format!("no UDP socket for {}/{}: {e}", id.0.namespace, id.0.name)),
            }
        }
        let now: Ports = bound.iter().map(|(id, b)| (id.clone(), b.number)).collect();
        if self.ports.update(|ports| (*ports != now).then(|| *ports = now).is_some()) {
            self.ports.ring();
        }
    }

    fn sweep(&self, bound: &Map<PortId, Bound>) {
        let ids: Map<u16, &PortId> = bound.iter().map(|(id, b)| (b.number, id)).collect();
        let now = self.shared.clock.now();
        for sessions in [&self.near, &self.far] {
            let gone = self.shared.table.read(|t| {
                let stays = |port, endpoint| ids.get(&port).is_some_and(|id| udp::serves(t, id, endpoint));
                sessions.borrow_mut().sweep(now, stays)
            });
            drop(gone);
        }
    }

    fn close(&self, key: &Key, id: Option<u32>) {
        for sessions in [&self.near, &self.far] {
            let closed = sessions.borrow_mut().close(key, id);
            drop(closed);
        }
    }

    /// The way of a client's session, which is used by this: what `send` says of it, with its endpoint.
    fn of<R>(&self, key: &Key, send: impl Fn(&Leg) -> R) -> Option<(SocketAddr, R)> {
        let now = self.shared.clock.now();
        [&self.near, &self.far].into_iter().find_map(|sessions| {
            let mut sessions = sessions.borrow_mut();
            sessions.of(now, key).map(|(endpoint, leg)| (endpoint, send(leg)))
        })
    }
}

impl Port {
    async fn run(self: Rc<Self>) {
        loop {
            if self.socket.readable().await.is_err() {
                return;
            }
            for _ in 0..BATCH {
                let more = self.udp.shared.pool.scratch(|scratch| match self.socket.get_ref().recv_from(scratch) {
                    Ok((n, from)) => {
                        self.datagram(from, &scratch[..n]);
                        true
                    }
                    Err(e) => e.kind() == ErrorKind::Interrupted,
                });
                if !more {
                    break;
                }
            }
            yield_now().await;
        }
    }

    /// Brings one datagram of a client to its endpoint, or drops it.
    fn datagram(self: &Rc<Self>, from: SocketAddr, bytes: &[u8]) {
        let shared = &self.udp.shared;
        let key = (self.number, from);
        let mut tried = Vec::new();
        while tried.len() < TRIES {
            let sent = self.udp.of(&key, |leg| match &leg.way {
                Way::Near(socket, _) => socket.get_ref().send(bytes).map(|_| true),
                Way::Far(queue, node, _) if leg.claim.has_others && queue.is_lost(shared.clock.now(), node) => {
                    Err(ErrorKind::TimedOut.into())
                }
                Way::Far(queue, ..) => Ok(queue.push(bytes)),
            });
            match sent {
                None => match self.open(key, &tried) {
                    Ok(()) => {}
                    Err(Some(endpoint)) => tried.push(endpoint),
                    Err(None) => {
                        bump(if tried.is_empty() { &shared.counters.no_endpoint } else { &shared.counters.failed });
                        return;
                    }
                },
                Some((_, Ok(true))) => return add(&shared.counters.bytes_up, bytes.len() as u64),
                Some((_, Ok(false))) => return bump(&shared.counters.udp_drops),
                Some((_, Err(e))) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::OutOfMemory) => {
                    return bump(&shared.counters.udp_drops);
                }
                // EMSGSIZE: no other endpoint would take it either.
                Some((_, Err(e))) if e.raw_os_error() == Some(libc::EMSGSIZE) => {
                    return bump(&shared.counters.udp_drops);
                }
                // An answer of ICMP to what went before, or none at all: this datagram has not been sent.
                Some((endpoint, Err(e))) => {
                    bump(&shared.counters.retries);
                    let is_silent = e.kind() == ErrorKind::TimedOut;
                    self.udp.of(&key, |leg| if is_silent { leg.claim.gone() } else { leg.claim.failed() });
                    self.udp.close(&key, None);
                    tried.push(endpoint);
                }
            }
        }
        bump(&shared.counters.failed);
    }

    /// Opens a session; the error is the endpoint that could not be had, or that there is none.
    fn open(self: &Rc<Self>, key: Key, tried: &[SocketAddr]) -> Result<(), Option<SocketAddr>> {
        let shared = &self.udp.shared;
        let (service, port) = &self.id;
        let vip = shared.table.read(|t| {
            let same = |ip: &&IpAddr| ip.is_ipv4() == key.1.is_ipv4();
            t.service_by_id(service).and_then(|s| s.vips.iter().chain(&s.external_ips).find(same).copied())
        });
        let destination = SocketAddr::new(vip.ok_or(None)?, *port);
        let ask = Ask { destination, protocol: Protocol::Udp, client: key.1.ip(), tried };
        let (target, claim) = Lease::take(Rc::clone(shared), ask, None).map_err(|_| None)?;
        let (claim, endpoint) = (Rc::new(claim), target.address());
        let id = self.udp.near.borrow_mut().number();
        let (sessions, way) = match target {
            Target::Local(_) => (&self.udp.near, self.near(key, id, &claim)),
            Target::Remote { node, service, port, address } => {
                let open = Open { service, port, protocol: Protocol::Udp, endpoint: address };
                (&self.udp.far, self.far(key, id, node, open, &claim))
            }
        };
        let leg = Leg { way: way.ok_or(Some(endpoint))?, claim };
        bump(&shared.counters.udp_sessions);
        // One that is over may be left.
        self.udp.close(&key, None);
        let evicted = sessions.borrow_mut().open(shared.clock.now(), key, id, endpoint, leg);
        drop(evicted);
        Ok(())
    }

    fn near(self: &Rc<Self>, key: Key, id: u32, claim: &Claim) -> Option<Way> {
        let (shared, to) = (&self.udp.shared, claim.address);
        let socket = match shared.dial_udp(&to) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                let oldest = self.udp.near.borrow_mut().close_oldest();
                drop(oldest);
                shared.dial_udp(&to)
            }
            socket => socket,
        };
        let socket = Rc::new(socket.map_err(|e| shared.say(|| format!("UDP to {to}: {e}"))).ok()?);
        let (port, answers, claim) = (Rc::clone(self), Rc::clone(&socket), Rc::clone(claim));
        let task = self.udp.executor.upgrade()?.spawn(async move {
            loop {
                if answers.readable().await.is_err() {
                    return;
                }
                for _ in 0..BATCH {
                    let got = port.udp.shared.pool.scratch(|scratch| {
                        let n = answers.get_ref().recv(scratch)?;
                        port.answer(key, id, &claim, &scratch[..n]);
                        io::Result::Ok(())
                    });
                    match got {
                        Ok(()) => {}
                        Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                        // ICMP's answer to a datagram: the next one goes elsewhere.
                        Err(_) => {
                            claim.failed();
                            return port.udp.close(&key, Some(id));
                        }
                    }
                }
                yield_now().await;
            }
        });
        Some(Way::Near(socket, task))
    }

    /// Brings an answer back; conntrack makes it come from where the client sent to.
    fn answer(&self, key: Key, id: u32, claim: &Claim, bytes: &[u8]) {
        let shared = &self.udp.shared;
        for sessions in [&self.udp.near, &self.udp.far] {
            let is_first = sessions.borrow_mut().answered(shared.clock.now(), &key, id);
            if is_first {
                claim.worked();
            }
        }
        match self.socket.get_ref().send_to(bytes, key.1) {
            Ok(n) => add(&shared.counters.bytes_down, n as u64),
            Err(_) => bump(&shared.counters.udp_drops),
        }
    }

    fn far(self: &Rc<Self>, key: Key, id: u32, node: Name, open: Open, claim: &Claim) -> Option<Way> {
        let tunnel = self.udp.shared.tunnel.read(Clone::clone)?;
        let queue = Rc::new(Queue::new(&self.udp.shared.queued));
        let (port, waiting, claim, name) = (Rc::clone(self), Rc::clone(&queue), Rc::clone(claim), Rc::clone(&node));
        let task = self.udp.executor.upgrade()?.spawn(async move {
            let answered = Cell::new(false);
            let take = |bytes: &[u8]| {
                answered.set(true);
                port.answer(key, id, &claim, bytes);
            };
            let far = (&*node, claim.has_others);
            let done = travel(tunnel.open(&node, &open), far, &waiting, take).await;
            if let Err(e) = &done {
                port.udp.shared.say(|| format!("UDP to {} on {node}: {e}", open.endpoint));
            }
            match done {
                Err(Refusal::Unreachable(_)) => claim.gone(),
                // The other end says in no other way that its endpoint refused.
                _ if !answered.get() => claim.failed(),
                _ => {}
            }
            port.udp.close(&key, Some(id));
        });
        Some(Way::Far(queue, name, task))
    }
}

/// Until the stream ends, which is not worth a word: the client's next datagram begins another session. It does sooner
/// where the node is silent and there are other endpoints.
async fn travel(
    mut stream: TunnelStream,
    (node, has_others): (&str, bool),
    queue: &Queue,
    take: impl Fn(&[u8]),
) -> Result<(), Refusal> {
    let soon = async {
        Timer::after(SILENT).await;
        None
    };
    match or(async { Some(stream.opened().await) }, soon).await {
        Some(answer) => answer?,
        None if has_others && stream.is_silent(node, SILENT) => {
            return Err(Refusal::Unreachable(format!("nothing is heard of it for {} s", SILENT.as_secs())));
        }
        None => {
            let late = async {
                Timer::after(OPEN - SILENT).await;
                Err(Refusal::Unreachable(format!("no answer within {} s", OPEN.as_secs())))
            };
            or(stream.opened(), late).await?;
        }
    }
    let _: io::Result<()> = carry(queue, stream, take).await;
    Ok(())
}

/// Serves a peer's session: its frames go to the socket of an endpoint of ours, and answers come back.
pub(crate) async fn serve(shared: &Shared, socket: Async<UdpSocket>, stream: TunnelStream) {
    let queue = Queue::new(&shared.queued);
    let last = Cell::new(shared.clock.now());
    let there = carry(&queue, stream, |bytes| {
        last.set(shared.clock.now());
        match socket.get_ref().send(bytes) {
            Ok(n) => add(&shared.counters.bytes_down, n as u64),
            Err(_) => bump(&shared.counters.udp_drops),
        }
    });
    let back = async {
        loop {
            socket.readable().await?;
            for _ in 0..BATCH {
                let got = shared.pool.scratch(|scratch| {
                    let n = socket.get_ref().recv(scratch)?;
                    last.set(shared.clock.now());
                    match queue.push(&scratch[..n]) {
                        true => add(&shared.counters.bytes_up, n as u64),
                        false => bump(&shared.counters.udp_drops),
                    }
                    io::Result::Ok(())
                });
                match got {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    // ICMP's answer: the peer is told by the end of the stream.
                    Err(e) => return Err(e),
                }
            }
            yield_now().await;
        }
    };
    let silence = async {
        loop {
            let at = last.get() + FAR_SILENCE;
            if at <= shared.clock.now() {
                return Ok(());
            }
            Timer::at(at).await;
        }
    };
    let _: io::Result<()> = or(or(there, back), silence).await;
}

async fn write_frame<S: AsyncWrite + Unpin>(stream: &RefCell<S>, bytes: &[u8]) -> io::Result<()> {
    let len = u16::try_from(bytes.len()).map_err(|_| ErrorKind::InvalidInput)?.to_be_bytes();
    for mut part in [&len[..], bytes] {
        while !part.is_empty() {
            let n = poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_write(cx, part)).await?;
            if n == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            part = &part[n..];
        }
    }
    Ok(())
}

/// Hands over each frame until the stream ends.
async fn read_frames<S: AsyncRead + Unpin>(stream: &RefCell<S>, take: impl Fn(&[u8])) -> io::Result<()> {
    // As large as the largest frame so far: most sessions are DNS and the like.
    let mut frame = Vec::new();
    loop {
        let mut len = [0; 2];
        if !fill(stream, &mut len).await? {
            return Ok(());
        }
        let len = usize::from(u16::from_be_bytes(len));
        if len > DATAGRAM_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        frame.resize(len, 0);
        if !fill(stream, &mut frame).await? && len > 0 {
            return Ok(());
        }
        take(&frame);
    }
}

/// Fills a buffer; false where the stream has ended before.
async fn fill<S: AsyncRead + Unpin>(stream: &RefCell<S>, buffer: &mut [u8]) -> io::Result<bool> {
    let mut at = 0;
    while at < buffer.len() {
        let n = poll_fn(|cx| Pin::new(&mut *stream.borrow_mut()).poll_read(cx, &mut buffer[at..])).await?;
        if n == 0 {
            return Ok(false);
        }
        at += n;
    }
    Ok(at > 0)
}
