//! Connections: one slot each, with a virtual address for quinn and a path below it.

use super::{
    congestion::Hints,
    large::Large,
    node::KEEPALIVE,
    path::Path,
    peer::ANSWER_WAIT,
    transport::{IDLE, RTT_FIRST},
    windows::Windows,
};
use crate::sorted::Map;
use quinn_proto::{Connection, ConnectionEvent, ConnectionHandle, StreamId, Transmit};
use std::{
    collections::{BTreeSet, VecDeque},
    net::{Ipv6Addr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Datagrams of no slot; never a connection.
pub(super) const STRANGER: u32 = 0;
/// Live connections, handshakes and what is closing; more are not accepted, and dials fail. 14–20 kB each.
pub(super) const SLOTS_MAX: usize = 320;
/// Live connections with peers; the one that was of no use for longest makes room for another.
pub(super) const LIVE_MAX: usize = 256;
/// Datagrams that are sent again by the relay when a direct path falls silent: one congestion window or so.
const RECENT_MAX: usize = 32;
/// Between looks at whether a connection's packets open.
const PULSE: Duration = Duration::from_secs(1);
/// Of a connection without a sign of life for some round trips, within these bounds, probes come as seldom. What is begun
/// anew while a relay is given up, which takes up to two seconds, waits for longer than what is let be.
const SILENCE: Duration = Duration::from_secs(2);
const SILENCE_MOST: Duration = Duration::from_secs(4);
const SILENCE_RTTS: u32 = 6;
/// A connection that was begun anew, and had no answer, is so again, so often.
const REVIVE_AGAIN: Duration = Duration::from_millis(500);
const REVIVALS: u32 = 8;
/// RFC 9000 section 13.2.2: an ACK at the latest after so many packets that want one.
const ACK_EACH: u32 = 2;
/// Whoever takes longer is not waited for in a handshake either.
const RTT_MOST: Duration = ANSWER_WAIT;
/// RFC 4193: a random prefix, never on any wire.
const VIRTUAL: [u16; 3] = [0xfd77, 0x6566, 0x7400];
/// Any port but 0, which quinn refuses.
const VIRTUAL_PORT: u16 = 7843;

/// The address under which quinn knows a peer that we dial.
pub(super) fn virtual_address(slot: u32) -> SocketAddr {
    let [a, b, c] = VIRTUAL;
    let [high, low] = [(slot >> 16) as u16, slot as u16];
    SocketAddr::new(Ipv6Addr::new(a, b, c, 0, 0, 0, high, low).into(), VIRTUAL_PORT)
}

/// Why a connection exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// We dialled the node of this name.
    Dialed(String),
    /// We register at this relay of our list.
    Registering(usize),
    /// Somebody dialled us.
    Accepted,
    /// A node registered here: the connection has done its work.
    Registered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outage {
    No,
    /// The path is suspect: when something comes again, what was under way will be lost.
    Doubted,
    /// Nothing has come since [`Slot::alive`], though something was to be acknowledged.
    CutOff,
    Revived(Revival),
}

/// It was begun anew, the last time `at`, when this packet had been sent last: until a later one is acknowledged, that may
/// have gone into the void as well, by the path of then, or to a relay that did not know the other end yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Revival {
    at: Instant,
    sent: usize,
    times: u32,
}

impl Revival {
    /// When to begin anew once more; after the last time the sweep sees to it.
    fn next(self) -> Option<Instant> {
        (self.times < REVIVALS).then(|| self.at + REVIVE_AGAIN)
    }
}

/// What we have to acknowledge.
#[derive(Default)]
struct Debt {
    /// Datagrams that came since the last look.
    heard: u32,
    /// Frames that want an ACK, and ACKs that were sent, when there was a new one last.
    got: u64,
    acks: u64,
}

pub(super) struct Slot {
    pub(super) handle: ConnectionHandle,
    pub(super) conn: Connection,
    /// Under which quinn knows the peer, whatever its path.
    pub(super) remote: SocketAddr,
    pub(super) role: Role,
    pub(super) path: Path,
    /// The DCID of the Initial that we accepted: the client's first flight may come again.
    pub(super) first_dcid: Vec<u8>,
    /// Known once the handshake is confirmed.
    pub(super) peer: Option<String>,
    pub(super) born: Instant,
    /// When a packet of the peer's last opened, at the latest; up to [`PULSE`] later in truth.
    pub(super) alive: Instant,
    outage: Outage,
    /// We want to know whether anybody is there, and nothing has come since.
    pub(super) asked: bool,
    /// It is not known yet by what we would recognize that the peer was restarted.
    unguarded: bool,
    debt: Debt,
    /// There is no path at all: its timers stand still, or each probe would wait twice as long as the one before.
    pub(super) stranded: bool,
    /// When the last stream ended.
    pub(super) idle_since: Instant,
    pub(super) next_keepalive: Instant,
    pub(super) lost: bool,
    /// Our key of each stream.
    pub(super) streams: Map<StreamId, u32>,
    /// For when it is on the list of timers; that may be too early, never too late.
    timer: Option<Instant>,
    pub(super) dirty: bool,
    pub(super) tx_bytes: u64,
    pub(super) rx_bytes: u64,
    /// All that is sent by the direct path goes this way too, while that one is suspect.
    pub(super) also: Option<Path>,
    /// The last datagrams that went by the direct path; at most [`RECENT_MAX`].
    pub(super) recent: VecDeque<Vec<u8>>,
    /// Once there were any.
    pub(super) large: Option<Box<Large>>,
    pub(super) windows: Windows,
    pub(super) hints: Arc<Hints>,
}

impl Slot {
    pub(super) fn new(now: Instant, begin: Begin) -> Self {
        let Begin { made: (handle, conn), remote, role, path, first_dcid, terms: (windows, hints) } = begin;
        Self {
            unguarded: role == Role::Accepted,
            handle,
            conn,
            remote,
            role,
            path,
            first_dcid,
            peer: None,
            born: now,
            alive: now,
            outage: Outage::No,
            asked: false,
            debt: Debt::default(),
            stranded: false,
            idle_since: now,
            next_keepalive: now + KEEPALIVE,
            lost: false,
            streams: Map::new(),
            timer: None,
            dirty: false,
            tx_bytes: 0,
            rx_bytes: 0,
            also: None,
            recent: VecDeque::new(),
            large: None,
            windows,
            hints,
        }
    }

    /// When its timers are next of use.
    pub(super) fn timeout(&mut self) -> Option<Instant> {
        let end = self.alive + IDLE;
        let timeout = self.conn.poll_timeout().map(|at| if self.stranded { at.max(end) } else { at });
        let again = self.revival().filter(|_| !self.stranded).and_then(Revival::next);
        timeout.into_iter().chain(again).min()
    }

    fn revival(&self) -> Option<Revival> {
        match self.outage {
            Outage::Revived(revival) if !self.lost => Some(revival),
            Outage::Revived(_) | Outage::CutOff | Outage::Doubted | Outage::No => None,
        }
    }

    fn is_answered(&self, revival: Revival) -> bool {
        self.hints.is_acked_since(revival.sent)
    }

    pub(super) fn expire(&mut self, now: Instant) {
        if !self.stranded || now >= self.alive + IDLE {
            // Only a probe comes so late: pacing and ACKs are a matter of milliseconds.
            let late = now >= self.alive + (self.conn.rtt() * SILENCE_RTTS).clamp(SILENCE, SILENCE_MOST);
            if late && self.conn.poll_timeout().is_some_and(|at| at <= now) {
                self.outage = Outage::CutOff;
            }
            self.conn.handle_timeout(now);
        }
        match self.revival() {
            Some(revival) if self.is_answered(revival) => self.outage = Outage::No,
            Some(revival) if !self.stranded && revival.next().is_some_and(|at| now >= at) => self.revive(now),
            Some(_) | None => {}
        }
    }

    /// A datagram for this connection. It alone proves nothing: it may be a copy of an old one.
    pub(super) fn deliver(&mut self, now: Instant, event: ConnectionEvent) {
        let due = self.asked || now >= self.alive + PULSE;
        let opened = |conn: &Connection| {
            let frames = conn.stats().frame_rx;
            frames.acks + frames.stream + frames.ping
        };
        let before = due.then(|| opened(&self.conn));
        let rtt = self.conn.rtt();
        self.debt.heard = self.debt.heard.saturating_add(1);
        self.conn.handle_event(event);
        // A client's first ID comes without a token for a stateless reset (RFC 9000 section 18.2), its others with one.
        if self.unguarded && self.conn.stats().frame_rx.new_connection_id > 0 {
            self.unguarded = false;
            self.conn.local_address_changed();
        }
        // The ACK of a packet of before a silence measures the silence, and quinn would then wait as long for each next.
        // It need not come in the first packet; but a first sample is no jump.
        let spans = (due || rtt != RTT_FIRST) && self.conn.rtt() > rtt * 2 + PULSE / 4;
        if spans || self.conn.rtt() > RTT_MOST {
            self.conn.path_changed(now);
            self.hints.probed();
        }
        if before.is_some_and(|before| opened(&self.conn) > before) {
            (self.alive, self.asked) = (now, false);
            match self.outage {
                Outage::CutOff => self.revive(now),
                Outage::Doubted => {
                    self.void(now, 0);
                    self.conn.ping();
                }
                Outage::Revived(revival) if self.is_answered(revival) => self.outage = Outage::No,
                Outage::Revived(revival) if now >= revival.at + SILENCE => self.revive(now),
                Outage::Revived(_) | Outage::No => {}
            }
        }
    }

    /// quinn holds an ACK against the window where data waits too: two ends that have filled theirs would wait for each
    /// other until one sends a probe. RFC 9002 section 7 does not count ACKs; so then a packet may go beyond the window.
    pub(super) fn poll_transmit(&mut self, now: Instant, most: usize, buf: &mut Vec<u8>) -> Option<Transmit> {
        let sent = self.conn.poll_transmit(now, most, buf);
        if sent.is_some() || self.debt.heard < ACK_EACH {
            return sent;
        }
        let stats = self.conn.stats();
        let (frames, acks) = (stats.frame_rx, stats.frame_tx.acks);
        let got = frames.stream + frames.datagram + frames.ping;
        if acks != self.debt.acks {
            self.debt = Debt { heard: 0, got, acks };
            return None;
        }
        if got < self.debt.got + u64::from(ACK_EACH) {
            self.debt.heard = 0;
            return None;
        }
        self.hints.owes(true);
        let sent = self.conn.poll_transmit(now, 1, buf);
        self.hints.owes(false);
        sent
    }

    /// The new path is proven: congestion control, RTT and MTU of the old one are of no use any more. Nor does what is
    /// under way there count (RFC 9000 section 9.4): of a path that fell silent it would fill the window, and keep back
    /// whatever tells that it is lost.
    pub(super) fn move_to(&mut self, now: Instant, path: Path, on_link: bool) {
        (self.path, self.also) = (path, None);
        self.hints.on_link.store(on_link, Ordering::Relaxed);
        match self.outage {
            Outage::CutOff => self.revive(now),
            Outage::No | Outage::Doubted | Outage::Revived(_) => self.void(now, 0),
        }
        self.ask(now);
    }

    /// The path is suspect: all goes this way too from now on.
    pub(super) fn doubt(&mut self, relay: Path) {
        self.also = Some(relay);
        if self.outage == Outage::No {
            self.outage = Outage::Doubted;
        }
    }

    /// The path has answered.
    pub(super) fn trust(&mut self) {
        self.also = None;
        if self.outage == Outage::Doubted {
            self.outage = Outage::No;
        }
    }

    /// True once where the path was found to be slower than all that quinn knows of it: what it knows is forgotten.
    pub(super) fn slowed(&mut self, now: Instant) -> bool {
        let slowed = self.hints.slower.swap(false, Ordering::Relaxed);
        if slowed {
            self.begin_anew(now);
        }
        slowed
    }

    /// What was measured so far is of another path.
    fn begin_anew(&mut self, now: Instant) {
        self.windows.path_changed();
        self.conn.path_changed(now);
        self.hints.probed();
    }

    /// On another path, or one that passes again: says to the other end where we are.
    pub(super) fn prod(&mut self, now: Instant) {
        match self.outage {
            Outage::No => {}
            Outage::Doubted => self.void(now, 0),
            Outage::CutOff | Outage::Revived(_) => self.revive(now),
        }
        self.ask(now);
    }

    fn ask(&mut self, now: Instant) {
        self.asked = true;
        self.conn.ping();
        if std::mem::take(&mut self.stranded) {
            self.conn.handle_timeout(now); // its timers stood still: a probe is due
        }
    }

    /// Is anybody there? What fills the window keeps back a PING, but not the probe for a larger MTU that a path begins
    /// with.
    pub(super) fn demand(&mut self, now: Instant) {
        if now >= self.alive + PULSE || self.conn.poll_timeout().is_none_or(|at| at > now + PULSE) {
            self.begin_anew(now);
        }
        self.asked = true;
        self.conn.ping();
    }

    /// After an outage the connection tries at once. By itself quinn would wait: what was sent into the void fills its
    /// window, which keeps back ACKs too, and each probe waits twice as long as the one before.
    fn revive(&mut self, now: Instant) {
        if self.lost {
            return;
        }
        let times = self.revival().map_or(0, |r| r.times + 1);
        if times == 0 {
            // The next probe ahead of time, but never the end of an idle connection: that is one idle time behind a sign
            // of life. Once: the one after it waits twice as long.
            self.conn.handle_timeout(now.max(self.alive + IDLE - SILENCE));
        }
        self.void(now, times);
        self.conn.ping();
    }

    /// What is under way is lost. Until something is acknowledged it is asked for again: quinn's own next probe may be
    /// many seconds away.
    fn void(&mut self, now: Instant, times: u32) {
        self.outage = Outage::Revived(Revival { at: now, sent: self.hints.last(), times });
        self.begin_anew(now);
        self.hints.voided();
    }

    pub(super) fn remember(&mut self, datagrams: &[u8], segment: usize) {
        let skip = datagrams.len().div_ceil(segment).saturating_sub(RECENT_MAX);
        for datagram in datagrams.chunks(segment).skip(skip) {
            let mut buffer =
                if self.recent.len() >= RECENT_MAX { self.recent.pop_front() } else { None }.unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(datagram);
            self.recent.push_back(buffer);
        }
    }
}

/// What a new connection is made of.
pub(super) struct Begin {
    pub(super) made: (ConnectionHandle, Connection),
    pub(super) remote: SocketAddr,
    pub(super) role: Role,
    pub(super) path: Path,
    /// Of the Initial that we accept.
    pub(super) first_dcid: Vec<u8>,
    pub(super) terms: (Windows, Arc<Hints>),
}

/// A small slab: indices are stable and start behind [`STRANGER`].
#[derive(Default)]
pub(super) struct Slots {
    list: Vec<Option<Box<Slot>>>,
    taken: usize,
    timers: BTreeSet<(Instant, u32)>,
}

impl Slots {
    /// The index that [`Slots::insert`] will use; None when full.
    pub(super) fn vacant(&self) -> Option<u32> {
        if self.taken >= SLOTS_MAX {
            return None;
        }
        let at = self.list.iter().position(Option::is_none).unwrap_or(self.list.len());
        u32::try_from(at + 1).ok()
    }

    pub(super) fn insert(&mut self, index: u32, slot: Slot) {
        let at = index as usize - 1;
        if at >= self.list.len() {
            self.list.resize_with(at + 1, || None);
        }
        self.list[at] = Some(Box::new(slot));
        self.taken += 1;
    }

    /// There is something to do for this connection at that time, at the latest.
    pub(super) fn wake(&mut self, index: u32, at: Option<Instant>) {
        let (Some(slot), Some(at)) = (self.list.get_mut(index as usize - 1).and_then(|s| s.as_deref_mut()), at) else {
            return;
        };
        if slot.timer.is_none_or(|old| at < old) {
            if let Some(old) = slot.timer.replace(at) {
                self.timers.remove(&(old, index));
            }
            self.timers.insert((at, index));
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Those that are due, and maybe some that are not any more; they need to be woken again.
    pub(super) fn due(&mut self, now: Instant) -> Vec<u32> {
        let mut due = Vec::new();
        while self.poll_timeout().is_some_and(|at| at <= now) {
            let Some((_, index)) = self.timers.pop_first() else { break };
            if let Some(slot) = self.get_mut(index) {
                slot.timer = None;
            }
            due.push(index);
        }
        due
    }

    /// Connections with peers, but those that are closing.
    pub(super) fn live(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.iter().filter(|(_, s)| s.peer.is_some() && !s.lost)
    }

    /// Of those that have said that they are closed, the one that is over first.
    pub(super) fn closed(&self) -> Option<u32> {
        let closed = self.iter().filter(|(_, s)| s.lost && !s.dirty);
        closed.min_by_key(|(_, s)| s.timer).map(|(index, _)| index)
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<Box<Slot>> {
        let slot = self.list.get_mut((index as usize).checked_sub(1)?)?.take();
        let slot = slot?;
        self.taken -= 1;
        if let Some(at) = slot.timer {
            self.timers.remove(&(at, index));
        }
        Some(slot)
    }

    pub(super) fn get(&self, index: u32) -> Option<&Slot> {
        self.list.get((index as usize).checked_sub(1)?)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut Slot> {
        self.list.get_mut((index as usize).checked_sub(1)?)?.as_deref_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.list.iter().enumerate().filter_map(|(at, slot)| Some((at as u32 + 1, slot.as_deref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Slot)> {
        self.list.iter_mut().enumerate().filter_map(|(at, slot)| Some((at as u32 + 1, slot.as_deref_mut()?)))
    }

    /// Connections of others whose handshake is not confirmed.
    pub(super) fn half_open(&self) -> impl Iterator<Item = &Slot> {
        self.iter().map(|(_, s)| s).filter(|s| s.role == Role::Accepted && s.conn.is_handshaking())
    }
}
