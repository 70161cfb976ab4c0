//! A relay's TCP port: who shows the psk becomes one more node; everybody else gets no byte and no place for long.

use crate::{
    carrier::{
        Carrier, Line, Socket, Stream, address,
        noise::{self, HELLO_LEN, Identity},
        tls::{FIRST_BYTE, Greeting, Server, Tls},
    },
    metrics::bump,
    reactor::{Async, LocalExecutor, Task, Timer},
    sys,
    tunnel::Effort,
};
use anyhow::Context;
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWriteExt, future::or};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    rc::Rc,
    time::{Duration, Instant},
};

/// Nodes that come by TCP; one more is turned away. Each costs a descriptor and about 1 kB.
const CLIENTS_MAX: usize = 1024;
/// Connections that have shown nothing yet; of more, the oldest goes.
const WAITING_MAX: usize = 128;
/// Of these, from one address: of more, its own oldest goes. A site behind one address may have many nodes.
const SOURCE_MAX: usize = 32;
/// Within this a node has sent its hello, and then its first datagram. RFC 6298: two lost packets and their timers.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A node has the relay's word each 25 s, and a listed one each 60 s.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// Between looks for silent ones.
const SWEEP: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors or memory.
const BREATHER: Duration = Duration::from_millis(100);
/// Before public-key work is tried again when its share of time is used up.
const PAUSE: Duration = Duration::from_millis(20);
/// Connections that are accepted before the others may run.
const BATCH: usize = 32;

/// See the module.
pub(crate) struct Reception {
    listener: Async<TcpListener>,
    waiting: Rc<RefCell<Waiting>>,
    tls: Server,
    effort: RefCell<Effort>,
    next: Cell<u32>,
}

/// Those who have shown nothing yet, by number: the oldest first. A task that is dropped closes its connection.
type Waiting = BTreeMap<u32, (IpAddr, Task<()>)>;

/// Out of the waiting when dropped.
struct Place {
    waiting: Rc<RefCell<Waiting>>,
    number: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        // None: it is the waiting's own end that drops us.
        if let Some((_, task)) = self.waiting.try_borrow_mut().ok().and_then(|mut w| w.remove(&self.number)) {
            task.detach();
        }
    }
}

impl Reception {
    /// Both families where the kernel has IPv6.
    ///
    /// # Errors
    /// When the port is taken, or not for us.
    pub(crate) fn bind(ip: IpAddr, port: u16, identity: &Identity, now: Instant) -> anyhow::Result<Self> {
        let wanted = SocketAddr::new(ip, port);
        let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        let listener = match sys::tcp_listener(&wanted) {
            Err(e) if ip.is_unspecified() && ip.is_ipv6() && e.kind() != io::ErrorKind::AddrInUse => {
                sys::tcp_listener(&v4)
            }
            other => other,
        };
        let listener = listener.with_context(|| {
            format!("tunnel.tcp_fallback: no TCP on port {port}: nodes that have no UDP cannot come here")
        })?;
        log::info!(target: "relay", "for nodes without UDP: TCP {}", listener.local_addr()?);
        Ok(Self {
            listener: Async::new_nonblocking(listener)?,
            waiting: Rc::default(),
            tls: Server::new(&identity.public, &identity.psks)?,
            effort: RefCell::new(Effort::new(now)),
            next: Cell::new(0),
        })
    }

    /// Runs for ever.
    pub(crate) async fn run<'t>(&'t self, carrier: &Rc<Carrier>, tasks: &LocalExecutor<'t>) {
        let sweep = async {
            loop {
                Timer::after(SWEEP).await;
                carrier.close_silent(SILENCE_MAX);
            }
        };
        or(sweep, self.accept(carrier, tasks)).await;
    }

    async fn accept<'t>(&'t self, carrier: &Rc<Carrier>, tasks: &LocalExecutor<'t>) {
        loop {
            if let Err(e) = self.listener.readable().await {
                log::error!(target: "relay", "the TCP port can no longer be waited for: {e}");
                return std::future::pending().await;
            }
            for _ in 0..BATCH {
                match self.listener.get_ref().accept() {
                    Ok((socket, from)) => self.newcomer(carrier, tasks, socket, from),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => {
                        log::debug!(target: "relay", "accept: {e}");
                        Timer::after(BREATHER).await;
                        break;
                    }
                }
            }
            futures_lite::future::yield_now().await;
        }
    }

    fn newcomer<'t>(&'t self, carrier: &Rc<Carrier>, tasks: &LocalExecutor<'t>, socket: TcpStream, from: SocketAddr) {
        let ip = from.ip().to_canonical();
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        let of_same = |w: &Waiting| w.values().filter(|(i, _)| *i == ip).count() >= SOURCE_MAX;
        let oldest = {
            let waiting = self.waiting.borrow();
            let crowded = of_same(&waiting);
            let full = waiting.len() >= WAITING_MAX;
            waiting.iter().find(|(_, (i, _))| if crowded { *i == ip } else { full }).map(|(n, _)| *n)
        };
        if let Some(oldest) = oldest {
            // Dropped outside the borrow: its own end looks for its place.
            let gone = self.waiting.borrow_mut().remove(&oldest);
            carrier.refused(&"it has shown nothing, and others are waiting", from);
            drop(gone);
        }
        let place = Place { waiting: Rc::clone(&self.waiting), number };
        let carrier = Rc::clone(carrier);
        let task = tasks.spawn(async move {
            if let Err(why) = self.serve(&carrier, socket, from, place).await {
                carrier.refused(&why, from);
            }
        });
        self.waiting.borrow_mut().insert(number, (ip, task));
    }

    /// Until there is time for public-key work.
    async fn may_work(&self, carrier: &Carrier) {
        while !self.effort.borrow_mut().any_left(carrier.clock.now()) {
            bump(&carrier.count.budget_exceeded);
            Timer::after(PAUSE).await;
        }
    }

    /// Reads the hello, inside TLS where it begins so. Wrong bytes end it before the rest is there.
    async fn greet(
        &self,
        carrier: &Carrier,
        mut socket: Socket,
        hello: &mut [u8; HELLO_LEN],
    ) -> Result<Stream, String> {
        let mut have = read(&mut socket, hello).await?;
        let mut stream: Stream = if hello[0] == FIRST_BYTE {
            let mut greeting = Greeting::default();
            self.may_work(carrier).await;
            loop {
                let begin = carrier.clock.now();
                let greeted = greeting.read(&hello[..have], &self.tls)?;
                if let Some(connection) = greeted {
                    self.effort.borrow_mut().spend(carrier.clock.now().saturating_duration_since(begin));
                    have = 0;
                    break Box::pin(Tls::new(socket, connection));
                }
                have = read(&mut socket, hello).await?;
            }
        } else {
            Box::pin(socket)
        };
        loop {
            if have > 0 && hello[0] != 0 {
                return Err("it does not speak our protocol".into());
            }
            if have == HELLO_LEN {
                return Ok(stream);
            }
            have += read(&mut stream, &mut hello[have..]).await?;
        }
    }

    async fn serve(
        &self,
        carrier: &Rc<Carrier>,
        socket: TcpStream,
        from: SocketAddr,
        place: Place,
    ) -> Result<(), String> {
        let number = place.number;
        let begun = carrier.clock.now();
        let socket = Socket::new(socket).map_err(|e| e.to_string())?;
        let mut hello = [0; HELLO_LEN];
        let mut stream = in_time(begun, self.greet(carrier, socket, &mut hello)).await?;
        let psk = noise::recognise(&carrier.identity, &hello).map_err(|e| e.to_string())?;
        self.may_work(carrier).await;
        let begin = carrier.clock.now();
        let answer = noise::answer(&carrier.identity, psk, &hello);
        self.effort.borrow_mut().spend(carrier.clock.now().saturating_duration_since(begin));
        let (reply, sealer, opener) = answer.map_err(|e| e.to_string())?;
        if carrier.clients() >= CLIENTS_MAX {
            bump(&carrier.count.tcp_full);
            return Ok(());
        }
        let written = async {
            stream.write_all(&reply).await.map_err(|e| e.to_string())?;
            stream.flush().await.map_err(|e| e.to_string())
        };
        in_time(begun, written).await?;
        // Whoever has heard a hello can say it again, but no record after it.
        let line = Line::new(address::client(number), sealer, carrier.clock.now());
        *line.unproven.borrow_mut() = Some(Box::new(place));
        let unproven = async {
            Timer::at(begun + HANDSHAKE).await;
            if line.unproven.borrow().is_none() {
                std::future::pending::<()>().await;
            }
            line.close();
            std::future::pending().await
        };
        log::info!(target: "relay", "TCP from {from}: known here as {}", line.address);
        let why = or(carrier.carry(Rc::clone(&line), stream, opener), unproven).await;
        if line.unproven.borrow().is_some() {
            return Err("no datagram after the handshake".into());
        }
        log::info!(target: "relay", "TCP from {from} ended: {why}");
        Ok(())
    }
}

async fn in_time<T>(begun: Instant, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let late = async {
        Timer::at(begun + HANDSHAKE).await;
        Err("no word that we know, in time".to_owned())
    };
    or(work, late).await
}

async fn read(stream: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> Result<usize, String> {
    match stream.read(buffer).await {
        Ok(0) => Err("it closed without a word that we know".into()),
        Ok(count) => Ok(count),
        Err(e) => Err(e.to_string()),
    }
}
