//! Nodes without the rest of the agent, on real sockets: what `relay`, `flood` and `many` measure against.
//!
//! usage: bench-nodes frames FOLDER BUNDLE PEER LEN…     by relays alone; writes what goes to the relay, a file for each LEN
//!        bench-nodes knock FOLDER BUNDLE TARGET_BUNDLE ADDRESS     writes an `initial` and a `disco` for that node
//!        bench-nodes many COUNT BUNDLES [TARGET_BUNDLE ADDRESS HOLD]
//!            nodes of BUNDLES/node-0…, each from an address of its own in 11.200.0.0/16; registered, or connected: then
//!            the last HOLD keep the stream that they opened, the others close it
//!
//! Files hold one datagram after its length as u16, big-endian. Runs until it is ended, and says each second how many are
//! registered, have opened a stream, and hold one. PORT: the one to send from; ENDPOINT: what streams are opened to.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic)]

use futures_lite::future::{or, yield_now};
use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{SocketAddr, UdpSocket},
    rc::Rc,
    sync::{Arc, atomic::AtomicU32},
    time::{Duration, Instant, SystemTime},
};
use weft::{
    config::{Congestion, Profile},
    metrics::TunnelCounters,
    reactor::{Async, LocalExecutor, Timer},
    table::model::{Protocol, ServiceId},
    tunnel::{
        Key, Open, Progress, RelaySpec, Remembered,
        identity::{Bundle, Roles},
        node::{Event, Node, NodeConfig, Output},
        noise::Local,
    },
};

/// Of one datagram.
const ROOM: usize = 2048;
/// A frame's header in front of a node's datagram: src/tunnel/frame.rs.
const HEADER: usize = 13;
const RELAY_DATA: u8 = 0x11;
const DISCO: u8 = 0x10;
/// Between two handshakes of `many`: there is a budget for them, a tenth of the time.
const STAGGER: Duration = Duration::from_millis(40);
/// Before a stream is asked for again, which a full target refuses at once.
const PAUSE: Duration = Duration::from_secs(1);
const UNSERVED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 7000);
/// How often a node writes while it looks for datagrams of a length.
const BEAT: Duration = Duration::from_millis(5);

/// What became of the nodes of this process.
#[derive(Default)]
struct Tally {
    registered: Cell<usize>,
    opened: Cell<usize>,
    held: Cell<usize>,
}

/// One node, its socket, and the stream that it asks for.
struct Runner {
    node: Node,
    socket: Async<UdpSocket>,
    relays: Vec<SocketAddr>,
    peer: Option<String>,
    /// Only to the relays; the rest is not sent.
    relayed: bool,
    folder: Option<String>,
    wanted: BTreeSet<usize>,
    stream: Option<u32>,
    /// Whether it keeps the stream, once it is open.
    holds: bool,
    /// When it opens one again, after one that failed.
    again: Option<Instant>,
}

fn unix() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn bundle(path: &str) -> Bundle {
    Bundle::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn save(folder: &str, name: &str, datagram: &[u8]) {
    let mut bytes = u16::try_from(datagram.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(datagram);
    let path = format!("{folder}/{name}");
    std::fs::write(format!("{path}.new"), bytes).unwrap();
    std::fs::rename(format!("{path}.new"), path).unwrap();
}

impl Runner {
    fn new(bundle: &Bundle, from: SocketAddr) -> Self {
        let pair = weft::tunnel::identity::KeyPair::from_private(bundle.key.clone().unwrap()).unwrap();
        let local = Local {
            secret: Key(*pair.private.expose()),
            public: pair.public,
            certificate: bundle.certificate.encode(),
            ca: bundle.ca,
            psks: bundle.psks.iter().map(|p| (p.epoch, Key(*p.key.expose()))).collect(),
            unix: Arc::new(AtomicU32::new(u32::try_from(unix()).unwrap())),
            entropy: None,
            is_relay: bundle.certificate.roles.contains(Roles::RELAY),
            has_aes: false,
        };
        let address = |r: &weft::tunnel::identity::BundleRelay| format!("{}:{}", r.at.host, r.at.port).parse().unwrap();
        let specs = bundle.relays.iter().map(|r| RelaySpec {
            certificate: r.certificate.clone(),
            host: r.at.host.clone(),
            port: r.at.port,
        });
        let config = NodeConfig {
            local,
            name: bundle.certificate.name.clone(),
            relays: specs.collect(),
            profile: Profile::Router,
            congestion: Congestion::Auto,
            relay_limits: Default::default(),
            lan: false,
            gso: 1,
            seed: None,
        };
        let node = Node::new(config, Instant::now(), fastrand::Rng::new(), Rc::new(TunnelCounters::default()));
        Self {
            node,
            socket: Async::new_nonblocking(bind(from)).unwrap(),
            relays: bundle.relays.iter().map(address).collect(),
            peer: None,
            relayed: false,
            folder: None,
            wanted: BTreeSet::new(),
            stream: None,
            holds: true,
            again: None,
        }
    }

    fn open(&mut self) {
        let open = Open {
            service: ServiceId { namespace: "shop".into(), name: "far".into() },
            port: 7000,
            protocol: Protocol::Tcp,
            endpoint: std::env::var("ENDPOINT").map_or(UNSERVED, |e| e.parse().unwrap()),
        };
        if let Some(peer) = &self.peer {
            self.stream = self.node.open(Instant::now(), peer, &open);
        }
    }

    fn out(&mut self, to: SocketAddr, datagram: &[u8]) {
        if let Some(folder) = &self.folder {
            match datagram[0] {
                RELAY_DATA if self.wanted.remove(&(datagram.len() - HEADER)) => {
                    save(folder, &(datagram.len() - HEADER).to_string(), datagram);
                }
                DISCO => save(folder, "disco", datagram),
                0xc0..=0xcf if !self.relays.contains(&to) => save(folder, "initial", datagram),
                _ => {}
            }
        }
        if !self.relayed || self.relays.contains(&to) {
            let _ = self.socket.get_ref().send_to(datagram, to);
        }
    }

    /// Says all that the node has to say; when it wants to be woken.
    fn drain(&mut self) -> Instant {
        let mut buf = Vec::new();
        loop {
            let now = Instant::now();
            match self.node.poll_output(now, &mut buf) {
                Output::Send { to, .. } => self.out(to, &buf),
                Output::Event(Event::Resolve { relay, host }) => {
                    let found = self.relays.iter().find(|a| a.ip().to_string() == host).copied();
                    self.node.resolved(now, relay, found.ok_or_else(|| host.clone()));
                }
                Output::Event(Event::Incoming { key, .. }) => {
                    self.node.answer(key, &Ok(()));
                    self.stream = Some(key);
                }
                Output::Event(Event::Wake(_) | Event::Neighbours(_)) | Output::Beacon => {}
                Output::Wait(at) => return at.unwrap_or(now + Duration::from_secs(1)),
            }
        }
    }

    /// Writes so that datagrams of every length come about, and reads what comes.
    fn chatter(&mut self, turn: usize) {
        let Some(key) = self.stream else { return };
        let mut room = [0; ROOM];
        while let Progress::Bytes(_) = self.node.read(key, &mut room) {}
        if let Some(most) = self.wanted.iter().next_back() {
            let len = most.saturating_sub(80 - turn % 64).clamp(1, 1000);
            let _ = self.node.write(key, &room[..len]);
        }
    }

    async fn run(mut self, tally: Rc<Tally>) {
        let mut buf = vec![0; ROOM];
        let (mut was_up, mut was_held) = (false, false);
        for turn in 0.. {
            let up = self.node.relay_views().iter().any(|r| r.registered);
            let open = self.stream.and_then(|key| self.node.opened(key));
            let held = self.holds && matches!(open, Some(Ok(())));
            if let (false, Some(Ok(())), Some(key)) = (self.holds, &open, self.stream) {
                tally.opened.set(tally.opened.get() + 1);
                self.node.drop_stream(Instant::now(), key);
                self.stream = None;
            } else if let (Some(Err(_)), Some(key)) = (open, self.stream) {
                self.node.drop_stream(Instant::now(), key);
                self.stream = None;
                self.again = Some(Instant::now() + PAUSE);
            } else if self.again.is_some_and(|at| at <= Instant::now()) {
                self.again = None;
                self.open();
            }
            for (now, was, cell) in [(up, &mut was_up, &tally.registered), (held, &mut was_held, &tally.held)] {
                cell.set(cell.get() + usize::from(now && !*was) - usize::from(*was && !now));
                *was = now;
            }
            let chatty = !self.wanted.is_empty();
            if chatty {
                self.chatter(turn);
            }
            let mut wake = self.drain();
            wake = wake.min(self.again.unwrap_or(wake));
            if chatty {
                wake = wake.min(Instant::now() + BEAT);
            }
            let _ = or(self.socket.readable(), async {
                Timer::at(wake).await;
                Ok(())
            })
            .await;
            self.node.set_unix(unix());
            while let Ok((len, from)) = self.socket.get_ref().recv_from(&mut buf) {
                self.node.handle_datagrams(Instant::now(), from, &mut buf[..len], len);
            }
            self.node.account(Instant::now);
            self.node.handle_tick(Instant::now());
            yield_now().await;
        }
    }
}

fn bind(from: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(from).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// The target, as a node that talked to it before a restart remembers it.
fn remember(runner: &mut Runner, target: &str, address: &str) {
    let certificate = bundle(target).certificate;
    runner.peer = Some(certificate.name.clone());
    runner.node.remember(vec![Remembered { certificate, address: address.parse().unwrap() }]);
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (executor, tally) = (Rc::new(LocalExecutor::new()), Rc::new(Tally::default()));
    let spawn = |runner: Runner| executor.spawn(runner.run(Rc::clone(&tally))).detach();
    let here = SocketAddr::from(([0; 4], std::env::var("PORT").map_or(0, |p| p.parse().unwrap())));
    weft::reactor::block_on(executor.run(async {
        match words[..] {
            ["frames", folder, own, peer, ref lens @ ..] => {
                let mut runner = Runner::new(&bundle(own), here);
                runner.folder = Some(folder.into());
                runner.wanted = lens.iter().map(|l| l.parse().unwrap()).collect();
                runner.relayed = true;
                if peer != "-" {
                    runner.peer = Some(peer.into());
                    runner.open();
                }
                spawn(runner);
            }
            ["knock", folder, own, target, address] => {
                let mut runner = Runner::new(&bundle(own), here);
                runner.folder = Some(folder.into());
                remember(&mut runner, target, address);
                runner.open();
                spawn(runner);
            }
            ["many", count, folder, ref target @ ..] => {
                let count: u16 = count.parse().unwrap();
                for i in 0..count {
                    let from = SocketAddr::from(([11, 200, (i / 250) as u8, (1 + i % 250) as u8], 7843));
                    let mut runner = Runner::new(&bundle(&format!("{folder}/node-{i}.bundle")), from);
                    if let [target, address, hold] = *target {
                        runner.holds = i + hold.parse::<u16>().unwrap() >= count;
                        remember(&mut runner, target, address);
                        runner.open();
                    }
                    spawn(runner);
                    Timer::after(STAGGER).await;
                }
            }
            _ => panic!("usage: see the file's head"),
        }
        loop {
            Timer::after(Duration::from_secs(1)).await;
            println!("registered {} opened {} held {}", tally.registered.get(), tally.opened.get(), tally.held.get());
        }
    }));
}
