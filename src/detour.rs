//! A node's connections by TCP to relays that do not answer by UDP: opened, left again, UDP asked now and then.

use crate::{
    carrier::{
        Carrier, Line, Socket, Stream, address,
        connect::{HEAD_MAX, Proxy},
        fallback::{Fallback, Turn},
        noise::{Dialer, Opener, REPLY_LEN, Sealer},
        tls::{self, Tls},
    },
    reactor::{LocalExecutor, Timer},
    sys,
};
use anyhow::{Context, bail};
use futures_lite::{
    AsyncReadExt, AsyncWriteExt,
    future::{or, yield_now},
};
use ring::rand::{SecureRandom, SystemRandom};
use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::Duration,
};

/// Between looks at how the relays are, and while one of them does not answer.
const TICK: Duration = Duration::from_millis(500);
const TICK_MISSING: Duration = Duration::from_millis(100);
/// For one way: a name, a connection, a proxy's answer and the relay's. RFC 6298: a lost SYN costs 1 s, two cost 3.
const DIAL: Duration = Duration::from_secs(5);

/// Of each relay of the tunnel's list, by its place there.
#[derive(Default)]
pub(crate) struct Detours {
    list: RefCell<Vec<Rc<Detour>>>,
    /// How many lead by TCP now.
    carried: Cell<usize>,
}

struct Detour {
    fallback: RefCell<Fallback>,
    line: RefCell<Option<Rc<Line>>>,
    /// What was said last of why there is none.
    said: RefCell<String>,
}

/// How a relay is reached by TCP.
#[derive(Clone, Copy, Debug)]
struct Way {
    proxied: bool,
    tls: bool,
}

fn ways(carrier: &Carrier) -> Vec<Way> {
    let both = |proxied| [false, true].map(|tls| Way { proxied, tls });
    let through = carrier.proxy.is_some().then(|| both(true));
    through.into_iter().flatten().chain(both(false)).collect()
}

/// Runs for ever.
pub(crate) async fn run<'t>(carrier: &'t Rc<Carrier>, tasks: &LocalExecutor<'t>) {
    let ways = ways(carrier);
    let mut tick = TICK;
    loop {
        Timer::after(tick).await;
        tick = if look(carrier, tasks, &ways) { TICK_MISSING } else { TICK };
        yield_now().await;
    }
}

/// True where streams wait for one that does not answer.
fn look<'t>(carrier: &'t Rc<Carrier>, tasks: &LocalExecutor<'t>, ways: &[Way]) -> bool {
    let (now, live, mut hurry) = (carrier.clock.now(), carrier.shared.node().is_live(), false);
    for relay in 0.. {
        let Some(at) = carrier.shared.node().relay_at(relay) else { break };
        let Some(address) = at.address else { continue };
        let detour = carrier.detours.of(relay, || Detour {
            fallback: RefCell::new(Fallback::new(ways.len(), now)),
            line: RefCell::default(),
            said: RefCell::default(),
        });
        if let Some(line) = detour.line.borrow().as_ref().filter(|line| line.address != address) {
            line.close(); // its name stands for another address by now
        }
        let live = live && at.answered;
        hurry |= live && at.missing;
        let before = detour.fallback.borrow().carries();
        let turn = detour.fallback.borrow_mut().turn(now, !at.missing, live);
        if !before && detour.fallback.borrow().carries() {
            log::info!(target: "tunnel", "relay {}: by the connection that is open still", at.name);
            detour.follow(carrier);
            carrier.shared.node().relay_way(now, relay, true);
            carrier.shared.bell.ring();
        }
        match turn {
            Turn::Rest => {}
            Turn::Dial(way) => {
                let way = ways.get(way).copied().unwrap_or(Way { proxied: false, tls: false });
                let spec = Spec { relay, way, name: at.name, host: at.host, key: at.key, address };
                tasks.spawn(go(carrier, Rc::clone(&detour), spec)).detach();
            }
            Turn::Probe => {
                let frame = carrier.shared.node().probe_relay(relay);
                if let Some(frame) = frame.filter(|_| !address::is_made_up(address)) {
                    // What UDP does not take now is asked again later.
                    let _ = carrier.udp.send_to(&frame, mapped(carrier, address));
                }
            }
            Turn::Leave => detour.line.borrow().iter().for_each(|line| line.close()),
        }
        detour.follow(carrier);
    }
    hurry
}

/// As the tunnel's socket writes it.
fn mapped(carrier: &Carrier, to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) if carrier.v6 => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        IpAddr::V4(_) | IpAddr::V6(_) => to,
    }
}

impl Detours {
    fn of(&self, relay: usize, new: impl Fn() -> Detour) -> Rc<Detour> {
        let mut list = self.list.borrow_mut();
        let len = list.len().max(relay + 1);
        list.resize_with(len, || Rc::new(new()));
        Rc::clone(&list[relay])
    }

    /// A UDP datagram came from there: if it proves that the relay answers by UDP again, TCP is left.
    pub(crate) fn heard_by_udp(&self, carrier: &Carrier, from: SocketAddr) {
        if self.carried.get() == 0 {
            return;
        }
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let (now, mut news) = (carrier.clock.now(), false);
        for (relay, detour) in self.list.borrow().iter().enumerate() {
            let at = carrier.shared.node().relay_at(relay);
            let proven = at.filter(|at| at.address == Some(from) && at.by_udp);
            if let Some(at) = proven.filter(|_| detour.fallback.borrow_mut().answered_by_udp(now)) {
                log::info!(target: "tunnel", "relay {}: by UDP again", at.name);
                detour.follow(carrier);
                carrier.shared.node().relay_way(now, relay, false);
                news = true;
            }
        }
        if news {
            self.list.borrow().iter().for_each(|detour| detour.fallback.borrow_mut().passes_elsewhere(now));
        }
    }

    /// Links have changed.
    pub(crate) fn moved(&self, carrier: &Carrier) {
        let now = carrier.clock.now();
        self.list.borrow().iter().for_each(|detour| detour.fallback.borrow_mut().moved(now));
    }
}

impl Detour {
    /// What the tunnel sends takes the way that was decided on.
    fn follow(&self, carrier: &Carrier) {
        if let Some(line) = &*self.line.borrow() {
            line.in_use.set(self.fallback.borrow().carries());
        }
        let carried = carrier.detours.list.borrow().iter().filter(|d| d.fallback.borrow().carries()).count();
        carrier.detours.carried.set(carried);
    }
}

/// A relay, and how to reach it.
struct Spec {
    relay: usize,
    way: Way,
    name: String,
    host: String,
    key: [u8; 32],
    address: SocketAddr,
}

/// One connection, from its beginning to its end.
async fn go(carrier: &Rc<Carrier>, detour: Rc<Detour>, spec: Spec) {
    let late = async {
        Timer::after(DIAL).await;
        bail!("no answer for {} s", DIAL.as_secs())
    };
    let Spec { relay, way, name, address, .. } = &spec;
    let mut shown = format!("{} port {}", if way.tls { "TLS" } else { "TCP" }, carrier.port);
    if let Some(proxy) = carrier.proxy.as_ref().filter(|_| way.proxied) {
        shown.push_str(" through the proxy ");
        shown.push_str(&proxy.shown());
    }
    let opened = or(dial(carrier, &spec), late).await;
    let now = carrier.clock.now();
    let mut rng = fastrand::Rng::new();
    let (stream, sealer, opener) = match opened {
        Ok(opened) => opened,
        Err(why) => {
            detour.fallback.borrow_mut().lost(now, &mut rng);
            let why = format!("relay {name} by {shown}: {why:#}");
            // Both ways fail in turn as long as the relay is off: each is said once.
            if !detour.said.borrow().contains(&why) {
                log::warn!(target: "tunnel", "{why}");
                detour.said.borrow_mut().push_str(&why);
            }
            return;
        }
    };
    detour.said.borrow_mut().clear();
    let line = Line::new(*address, sealer, now);
    detour.fallback.borrow_mut().opened(now);
    if detour.fallback.borrow().carries() {
        log::info!(target: "tunnel", "relay {name} does not answer by UDP: by {shown} now");
    } else {
        line.show();
    }
    *detour.line.borrow_mut() = Some(Rc::clone(&line));
    let carrying = carrier.carry(line, stream, opener);
    let begin = async {
        detour.follow(carrier);
        carrier.shared.node().relay_way(now, *relay, detour.fallback.borrow().carries());
        carrier.shared.bell.ring();
        std::future::pending().await
    };
    let why = or(carrying, begin).await;
    let now = carrier.clock.now();
    log::info!(target: "tunnel", "relay {name}: the TCP connection ended: {why}");
    let carried = detour.fallback.borrow().carries();
    *detour.line.borrow_mut() = None;
    detour.fallback.borrow_mut().lost(now, &mut rng);
    detour.follow(carrier);
    if carried {
        carrier.shared.node().relay_way(now, *relay, false);
        carrier.shared.bell.ring();
    }
}

async fn dial(carrier: &Carrier, spec: &Spec) -> anyhow::Result<(Stream, Sealer, Opener)> {
    let socket = match carrier.proxy.as_ref().filter(|_| spec.way.proxied) {
        Some(proxy) => through(carrier, proxy, &spec.host).await?,
        None if address::is_made_up(spec.address) => bail!("its name cannot be looked up"),
        None => connect(carrier, SocketAddr::new(spec.address.ip(), carrier.port)).await?,
    };
    let (epoch, psk) = carrier.identity.psks.first().context("there is no psk")?;
    let mut stream: Stream = if spec.way.tls {
        let mut nonce = [0; 16];
        SystemRandom::new().fill(&mut nonce).map_err(|_| anyhow::Error::msg("no random numbers"))?;
        Box::pin(Tls::new(socket, tls::client(&spec.key, psk, &spec.host, nonce)?))
    } else {
        Box::pin(socket)
    };
    let (dialer, hello) = Dialer::new(&spec.key, *epoch, psk)?;
    stream.write_all(&hello).await?;
    stream.flush().await?;
    let mut reply = [0; REPLY_LEN];
    let read = stream.read_exact(&mut reply).await;
    read.context("it hung up: it is no relay of ours, or its psk or key is another than we know")?;
    let (sealer, opener) = dialer.finish(&reply)?;
    Ok((stream, sealer, opener))
}

async fn connect(carrier: &Carrier, to: SocketAddr) -> anyhow::Result<Socket> {
    let socket = sys::tcp_socket(&to)?;
    if let Err(error) = sys::set_mark(&socket, carrier.mark) {
        log::debug!(target: "tunnel", "TCP to {to} has no mark: {error}");
    }
    sys::connect(&socket, &to)?;
    let socket = Socket::new(socket)?;
    socket.connected().await?;
    Ok(socket)
}

async fn through(carrier: &Carrier, proxy: &Proxy, host: &str) -> anyhow::Result<Socket> {
    let ip = match proxy.host.parse() {
        Ok(ip) => ip,
        Err(_) => {
            let found = (carrier.lookup)(proxy.host.clone()).await.context("the proxy was not found")?;
            *found.iter().find(|ip| ip.is_ipv4() || carrier.v6).context("the proxy has no address")?
        }
    };
    let mut stream = connect(carrier, SocketAddr::new(ip, proxy.port)).await.context("the proxy cannot be reached")?;
    stream.write_all(proxy.request(host, carrier.port).as_bytes()).await?;
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    while answer.len() < HEAD_MAX {
        let count = stream.read(&mut piece).await?;
        answer.extend_from_slice(&piece[..count]);
        if count == 0 {
            bail!("the proxy hung up");
        }
        if proxy.judge(&answer).map_err(anyhow::Error::msg)? {
            return Ok(stream);
        }
    }
    bail!("the proxy's answer has no end")
}
