//! The root of the tunnel, without IO: datagrams, opens and ticks come in; datagrams and events go out.
//! It owns quinn-proto's endpoint, the connections and, at a relay, the relay.
//!
//! The caller drains `poll_output` after every input until it says Wait.

use super::{
    Open,
    admit::Effort,
    frame::{DATA_HEADER, Kind, classify},
    gate::Gate,
    home::{Action, Homes, RelaySpec},
    keys::{Key, derive},
    lan::Lan,
    large::Totals,
    noise::{Local, PeerIdentity, Purpose},
    outbox::Outbox,
    path::{Path, Way, canonical},
    peer::Peers,
    relay::{Relay, RelayLimits, RelayLoad},
    slot::{Role, Slot, Slots},
    streams::Streams,
    transport::Transport,
    uplinks::{Pilot, Uplinks},
    ways::Reach,
    windows::{Budget, Limits},
};
use crate::{
    config::{Congestion, Profile},
    metrics::{TunnelCounters, add, bump},
};
use bytes::{Buf, BytesMut};
use quinn_proto::{ConnectionHandle, Dir, Endpoint, Event as QuicEvent, StreamEvent};
use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// A connection without streams is closed after this.
const IDLE_CLOSE: Duration = Duration::from_secs(60);
/// Below what the process waits for at its end.
const LINGER: Duration = Duration::from_millis(400);
/// Packets that keep a connection with idle streams alive, well below quinn's idle timeout.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(20);
/// Housekeeping of idle connections.
const SWEEP: Duration = Duration::from_secs(5);
/// QUIC's "no error" of our protocol.
const DONE: quinn_proto::VarInt = quinn_proto::VarInt::from_u32(0);

/// What a node is built from.
pub struct NodeConfig {
    pub local: Local,
    pub name: String,
    pub relays: Vec<RelaySpec>,
    pub profile: Profile,
    pub congestion: Congestion,
    /// Where it is a relay.
    pub relay_limits: RelayLimits,
    /// Beacons on the links.
    pub lan: bool,
    /// Datagrams that one send may carry.
    pub gso: usize,
    /// For simulations: makes quinn's random numbers repeatable.
    pub seed: Option<[u8; 32]>,
}

#[derive(Debug)]
pub enum Event {
    /// Something changed for this stream: look again.
    Wake(u32),
    /// A peer asks for one of our endpoints.
    Incoming { key: u32, peer: String, open: Open },
    /// A relay's host name must be looked up; the answer goes to [`Node::resolved`].
    Resolve { relay: usize, host: String },
    /// These nodes are on a link of ours: all of them, after a change.
    Neighbours(Vec<String>),
}

#[derive(Debug)]
pub enum Output {
    /// `buf` holds one datagram, or several of `segment` bytes of which the last may be shorter.
    Send {
        to: SocketAddr,
        /// The source, where it is not left to the routing table.
        local: Option<IpAddr>,
        segment: Option<usize>,
    },
    /// `buf` holds a beacon for every link.
    Beacon,
    Event(Event),
    Wait(Option<Instant>),
}

/// Where a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Address(Way),
    Relay { relay: usize, flow: u32 },
}

impl Origin {
    pub(super) fn path(self) -> Path {
        match self {
            Self::Address(way) => Path::Direct(way),
            Self::Relay { relay, flow } => Path::Relay { relay, flow },
        }
    }
}

pub struct Node {
    pub(super) name: String,
    pub(super) transport: Transport,
    pub(super) endpoint: Endpoint,
    pub(super) gate: Gate,
    pub(super) slots: Slots,
    pub(super) by_handle: HashMap<ConnectionHandle, u32>,
    pub(super) peers: Peers,
    pub(super) streams: Streams,
    pub(super) homes: Homes,
    pub(super) relay: Option<Relay>,
    pub(super) outbox: Outbox,
    pub(super) events: VecDeque<Event>,
    pub(super) dirty: VecDeque<u32>,
    /// The earliest timer, as of the last Wait.
    pub(super) due: Option<Instant>,
    pub(super) next_sweep: Instant,
    pub(super) scratch: Vec<u8>,
    pub(super) gso: usize,
    pub(super) rng: fastrand::Rng,
    /// Where we may be reached by ourselves: the interfaces' addresses with our port.
    pub(super) local: Vec<SocketAddr>,
    pub(super) lan: Lan,
    pub(super) uplinks: Rc<Uplinks>,
    pub(super) pilot: Pilot,
    pub(super) reach: Reach,
    pub(super) budget: Budget,
    pub(super) larges: Totals,
    pub(super) effort: Effort,
    /// When public-key work began that was not accounted for yet.
    pub(super) working_since: Option<Instant>,
    pub(super) count: Rc<TunnelCounters>,
}

impl Node {
    #[must_use]
    pub fn new(config: NodeConfig, now: Instant, mut rng: fastrand::Rng, count: Rc<TunnelCounters>) -> Self {
        let root = derive(&config.local.secret, b"weft relay", b"");
        let psk = config.local.psks.first().filter(|_| config.lan).map(|(_, psk)| psk.clone());
        let relay = config.local.is_relay.then(|| Relay::new(&root, config.relay_limits, now, rng.fork()));
        let limits = Limits::of(config.profile);
        let transport = Transport::new(Arc::new(config.local), limits.stream, config.congestion, rng.fork());
        let endpoint =
            Endpoint::new(Arc::new(transport.endpoint(&mut rng, config.seed)), Some(transport.server()), true, None);
        let serial = transport.local.unix.load(Ordering::Relaxed).into();
        let homes = Homes::new(config.relays, transport.local.public, serial, now, rng.fork());
        Self {
            name: config.name,
            gate: Gate::new(transport.cids.clone(), &transport.local.public),
            transport,
            endpoint,
            slots: Slots::default(),
            by_handle: HashMap::new(),
            peers: Peers::default(),
            streams: Streams::default(),
            homes,
            relay,
            outbox: Outbox::new(config.gso),
            events: VecDeque::new(),
            dirty: VecDeque::new(),
            due: Some(now),
            next_sweep: now + SWEEP,
            scratch: Vec::new(),
            gso: config.gso.max(1),
            rng,
            local: Vec::new(),
            lan: Lan::new(psk.as_ref(), now),
            uplinks: Rc::default(),
            pilot: Pilot::default(),
            reach: Reach::default(),
            budget: Budget::new(limits),
            larges: Totals::default(),
            effort: Effort::new(now),
            working_since: None,
            count,
        }
    }

    /// The clock that certificates are held against.
    pub fn set_unix(&mut self, unix: u64) {
        let unix = u32::try_from(unix).unwrap_or(u32::MAX);
        self.transport.local.unix.store(unix, Ordering::Relaxed);
    }

    pub(super) fn unix(&self) -> u64 {
        self.transport.local.unix.load(Ordering::Relaxed).into()
    }

    /// Segmentation offload was found not to work.
    pub fn set_gso(&mut self, gso: usize) {
        self.gso = gso.max(1);
        self.outbox.gso = self.gso;
    }

    /// The port of a relay of our list.
    #[must_use]
    pub fn relay_port(&self, relay: usize) -> u16 {
        self.homes.get(relay).map_or(0, |h| h.port)
    }

    #[must_use]
    pub fn relay_load(&self) -> Option<RelayLoad> {
        self.relay.as_ref().map(|relay| relay.load(&self.count))
    }

    pub fn handle_tick(&mut self, now: Instant) {
        self.step(now);
    }

    /// Datagrams of `segment` bytes each (the last may be shorter) from one address to one of ours.
    pub fn handle_datagrams(&mut self, now: Instant, from: impl Into<Way>, batch: &mut [u8], segment: usize) {
        self.take_datagrams(now, from.into(), batch, segment);
    }

    fn take_datagrams(&mut self, now: Instant, from: Way, batch: &mut [u8], segment: usize) {
        self.step(now);
        if batch.is_empty() || segment == 0 {
            return;
        }
        let from = self.uplinks.way_of(canonical(from.remote), from.local.map(|ip| ip.to_canonical()));
        add(&self.count.rx_datagrams, batch.len().div_ceil(segment) as u64);
        add(&self.count.rx_bytes, batch.len() as u64);
        // A batch is one flow of the kernel's, but may still hold frames of several kinds.
        let mut start = 0;
        while start < batch.len() {
            let kind = classify(&batch[start..]);
            let mut end = (start + segment).min(batch.len());
            while end < batch.len() && classify(&batch[end..]) == kind {
                end = (end + segment).min(batch.len());
            }
            self.handle_run(now, from, kind, &mut batch[start..end], segment);
            start = end;
        }
    }

    fn handle_run(&mut self, now: Instant, way: Way, kind: Kind, run: &mut [u8], segment: usize) {
        let from = way.remote;
        match kind {
            Kind::Quic => {
                let mut bytes = BytesMut::from(&*run);
                while !bytes.is_empty() {
                    let datagram = bytes.split_to(segment.min(bytes.len()));
                    self.handle_quic(now, Origin::Address(way), datagram);
                }
            }
            Kind::RelayData => match self.homes.at(from) {
                Some(relay) => self.handle_relayed(now, relay, run, segment),
                None => match &mut self.relay {
                    Some(relay) => relay.handle_data(now, from, run, segment, &mut self.outbox, &self.count),
                    None => bump(&self.count.relay_rejects),
                },
            },
            Kind::RelayControl => run.chunks(segment).for_each(|frame| self.handle_control(now, way, frame)),
            Kind::Disco => run.chunks(segment).for_each(|f| self.handle_disco(now, Origin::Address(way), f)),
            Kind::Beacon => run.chunks(segment).for_each(|frame| self.handle_beacon(now, from, frame)),
            Kind::Stun | Kind::Unknown => {
                add(&self.count.unknown_first_byte, run.len().div_ceil(segment) as u64);
            }
        }
    }

    fn handle_control(&mut self, now: Instant, way: Way, frame: &[u8]) {
        let from = way.remote;
        let mut actions = Vec::new();
        let known = self.homes.at(from);
        let before = known.map(|relay| self.seen_by(relay));
        let taken = match known {
            Some(relay) => self.homes.handle_control(relay, now, frame, &mut self.outbox, &mut actions),
            None => false,
        };
        match &mut self.relay {
            _ if taken => {
                self.uplink_works(now, way);
                if let Some(Action::Tried(seen)) = actions.first() {
                    self.uplink_seen(now, way, *seen);
                }
                if before != known.map(|relay| self.seen_by(relay)) {
                    self.tell_all(now); // where we are now, and behind what
                }
                self.act(now, actions);
            }
            Some(relay) => relay.handle_control(now, from, frame, &mut self.outbox, &self.count),
            None => bump(&self.count.control_rejects),
        }
    }

    fn handle_relayed(&mut self, now: Instant, relay: usize, run: &[u8], segment: usize) {
        let mut bytes = BytesMut::from(run);
        while !bytes.is_empty() {
            let mut frame = bytes.split_to(segment.min(bytes.len()));
            let Some((flow, datagram)) = self.homes.unwrap(relay, now, &frame) else {
                bump(&self.count.relay_rejects);
                continue;
            };
            let (kind, origin) = (classify(datagram), Origin::Relay { relay, flow });
            frame.advance(DATA_HEADER);
            match kind {
                Kind::Quic => self.handle_quic(now, origin, frame),
                Kind::Disco => self.handle_disco(now, origin, &frame),
                Kind::Stun | Kind::RelayData | Kind::RelayControl | Kind::Beacon | Kind::Unknown => {
                    bump(&self.count.unknown_first_byte);
                }
            }
        }
    }

    /// This connection has something to do.
    pub(super) fn touch(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index).filter(|s| !s.dirty) {
            slot.dirty = true;
            self.dirty.push_back(index);
        }
    }

    /// A datagram outside any connection's flow control; dropped where its path is down.
    pub(super) fn send_raw(&mut self, now: Instant, path: Path, datagram: &[u8]) {
        let mut frame = Vec::with_capacity(datagram.len() + DATA_HEADER);
        let to = match path {
            Path::Direct(way) => {
                frame.extend_from_slice(datagram);
                Some(way)
            }
            Path::Relay { relay, flow } => {
                let up = self.homes.wrap(relay, now, flow, datagram, &mut frame);
                self.homes.get(relay).and_then(|h| h.address).filter(|_| up).map(Way::from)
            }
        };
        if let Some(to) = to {
            let _ = self.outbox.push(to, frame);
        }
    }

    /// Timers of everything; cheap while nothing is due.
    fn step(&mut self, now: Instant) {
        if self.due.is_none_or(|due| now < due) {
            return;
        }
        self.due = None;
        let (slots, peers) = (self.slots.due(now), self.peers.due(now));
        for index in &slots {
            if let Some(slot) = self.slots.get_mut(*index) {
                slot.expire(now);
                self.touch(*index);
            }
            self.large_late(now, *index);
        }
        let mut actions = Vec::new();
        self.homes.handle_timeout(now, &mut self.outbox, &mut actions);
        self.act(now, actions);
        if let Some(relay) = &mut self.relay {
            relay.handle_timeout(now);
        }
        self.drive_wants(now, &peers);
        self.drive_dials(now, &slots);
        self.drive_paths(now, &peers);
        self.drive_uplinks(now);
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.sweep(now);
            self.look_around(now);
        }
    }

    fn sweep(&mut self, now: Instant) {
        for (_, slot) in self.slots.iter_mut() {
            if !slot.streams.is_empty() && now >= slot.next_keepalive {
                // Where the peer has just asked, our ACK has kept all alive.
                let asked = slot.alive + SWEEP > now;
                slot.next_keepalive = if asked { slot.alive } else { now } + KEEPALIVE;
                if !asked {
                    slot.conn.ping();
                }
            }
        }
        // A probe that was lost is followed by one twice as late, up to most of a minute.
        let unanswered = |s: &Slot| s.asked && !s.lost && s.peer.is_some() && !s.stranded && now >= s.alive + SWEEP;
        self.slots.iter_mut().filter(|(_, s)| unanswered(s)).for_each(|(_, s)| s.demand(now));
        let idle = |s: &Slot| s.streams.is_empty() && s.peer.is_some() && now >= s.idle_since + IDLE_CLOSE;
        let idle: Vec<u32> = self.slots.iter().filter(|(_, s)| idle(s)).map(|(i, _)| i).collect();
        for index in idle {
            self.close(now, index, "idle");
        }
        let all: Vec<u32> = self.slots.iter().map(|(i, _)| i).collect();
        for index in all {
            if let Some(slot) = self.slots.get_mut(index) {
                let change = slot.windows.settle(now, &mut self.budget);
                if slot.windows.quiet(now) {
                    slot.recent = VecDeque::new();
                }
                self.resize(index, change);
            }
            self.touch(index);
        }
    }

    pub(super) fn close(&mut self, now: Instant, index: u32, why: &'static str) {
        self.close_as(now, index, why, &format!("closed: {why}"));
    }

    /// `told`: what the other end hears of it.
    pub(super) fn close_as(&mut self, now: Instant, index: u32, told: &'static str, why: &str) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.conn.close(now, DONE, told.into());
            self.touch(index);
            self.lose(now, index, why);
        }
    }

    /// Ends all connections and registrations politely; drain `poll_output` once more.
    pub fn shutdown(&mut self, now: Instant) {
        let all: Vec<u32> = self.slots.iter().map(|(i, _)| i).collect();
        all.into_iter().for_each(|index| self.close(now, index, "the node stops"));
        self.homes.bye(&mut self.outbox);
        if let Some(relay) = &mut self.relay {
            relay.say_restarting(&mut self.outbox);
        }
    }

    /// For how long after [`Node::shutdown`] a relay goes on: its nodes are taking other ways.
    #[must_use]
    pub fn linger(&self) -> Duration {
        self.relay.as_ref().filter(|relay| !relay.is_idle()).map_or(Duration::ZERO, |_| LINGER)
    }

    pub(super) fn handle_event(&mut self, now: Instant, index: u32, event: QuicEvent) {
        match event {
            QuicEvent::Connected => self.connected(now, index),
            QuicEvent::ConnectionLost { reason } => self.connection_lost(now, index, &reason),
            QuicEvent::Stream(event) => self.handle_stream(now, index, event),
            QuicEvent::HandshakeDataReady | QuicEvent::DatagramsUnblocked => {}
            QuicEvent::DatagramReceived => self.datagrams_arrived(index),
        }
    }

    fn handle_stream(&mut self, now: Instant, index: u32, event: StreamEvent) {
        match event {
            StreamEvent::Opened { dir: Dir::Bi } => self.accept_streams(index),
            StreamEvent::Opened { dir: Dir::Uni } => self.large_opened(now, index),
            StreamEvent::Available { dir: Dir::Bi } => self.open_waiting(index),
            StreamEvent::Available { dir: Dir::Uni } => self.large_room(index),
            StreamEvent::Readable { id } if id.dir() == Dir::Uni => self.large_readable(index, id),
            StreamEvent::Readable { id } => self.readable(index, id),
            StreamEvent::Writable { id } if id.dir() == Dir::Uni => self.large_room(index),
            StreamEvent::Stopped { id, .. } if id.dir() == Dir::Uni => self.large_gone(index, id, true),
            StreamEvent::Writable { id } | StreamEvent::Stopped { id, .. } => self.writable(index, id),
            StreamEvent::Finished { id } if id.dir() == Dir::Uni => self.large_gone(index, id, false),
            StreamEvent::Finished { .. } => {}
        }
    }

    fn connected(&mut self, now: Instant, index: u32) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        bump(&self.count.handshakes);
        let session = slot.conn.crypto_session();
        let identity = session.peer_identity().and_then(|i| i.downcast::<PeerIdentity>().ok());
        let Some(PeerIdentity { certificate, purpose }) = identity.map(|b| *b) else {
            return self.close(now, index, "no identity");
        };
        let mut secret = Key([0; 32]);
        let exported = session.export_keying_material(&mut secret.0, b"relay", b"").is_ok();
        let (role, path) = (slot.role.clone(), slot.path);
        match (role, purpose) {
            (Role::Registering(relay), _) if exported => {
                self.homes.established(relay, now, &secret);
                self.due = Some(now);
            }
            (Role::Accepted, Purpose::Register) if exported => match (&mut self.relay, path) {
                (Some(relay), Path::Direct(from)) => {
                    slot.role = Role::Registered;
                    if !relay.register(now, certificate, &secret, from.remote, &self.count) {
                        self.close(now, index, "it registers too often");
                    }
                }
                // A node cannot register through another relay: its address would not be its own.
                _ => self.close(now, index, "this node is not a relay"),
            },
            (Role::Dialed(_) | Role::Accepted, Purpose::Peer) => self.bind(now, index, &certificate),
            (Role::Registering(_) | Role::Dialed(_) | Role::Accepted | Role::Registered, _) => {
                self.close(now, index, "no keys");
            }
        }
    }

    pub(super) fn act(&mut self, now: Instant, actions: Vec<Action>) {
        for action in actions {
            self.act_on(now, action);
        }
    }
}
