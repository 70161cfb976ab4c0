//! Datagrams of UDP Services that do not fit into one packet: each travels as a unidirectional stream of its own. So it comes
//! whole though a packet is lost, and holds up neither the next ones nor the small ones, which go beside all streams.
//!
//! How the two ends agree: whoever knows such streams allows some from the beginning, in its transport parameters. A node of
//! an earlier version allows none; then the session's own stream carries them, as it always did, and is read by us too.

use super::{
    gather::{GATHERED_MAX, Gather, HEAD, Held, LIFETIME, Stray, head},
    node::Node,
    streams::ABANDONED,
};
use crate::metrics::bump;
use bytes::Bytes;
use quinn_proto::{Connection, Dir, ReadError, StreamId, VarInt, WriteError};
use std::{cell::Cell, collections::VecDeque, rc::Rc, slice, time::Instant};

/// Unidirectional streams that a peer may have open, first and once it has had one: 256 of little more than one packet are
/// 100 Mbit/s at 30 ms, and cost quinn 10 kB. So each connection begins with few. The next one waits at the peer.
pub(super) const STREAMS_FIRST: u32 = 24;
pub(super) const STREAMS_MOST: u32 = 256;
/// Bytes to one peer that are not acknowledged, beside what connections may have under way; a peer gathers no more. What is
/// beyond it waits, and so does what is beyond twice the congestion window: streams take turns, each with a packet, so that
/// of many none would soon be whole. Twice, for those that wait for a packet that was lost. One datagram is always let go.
const FLYING_MAX: usize = GATHERED_MAX;
const FLYING_WINDOWS: u64 = 2;
/// Bytes to one peer that are not acknowledged or wait, and to all: one more datagram is dropped, as a full link would.
const LEAVING_MAX: usize = 768 << 10;
const LEAVING_ALL: usize = 1 << 20;

/// What became of a datagram beside a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// It is on its way.
    Sent,
    /// There was no room for it.
    Dropped,
    /// The stream itself must carry it: it was not answered yet, or the peer knows no other way.
    InStream,
}

struct Leaving {
    until: Instant,
    size: usize,
    /// Once it has a stream.
    id: Option<StreamId>,
    /// What the transport has not taken yet.
    rest: Bytes,
}

/// One connection's large datagrams, both ways.
pub(super) struct Large {
    /// Not yet acknowledged, in the order in which they came.
    leaving: VecDeque<Leaving>,
    held: Held,
    /// Bytes of those that have a stream.
    flying: usize,
    /// The peer allows such streams.
    allowed: bool,
    gather: Gather,
}

/// Bytes of the large datagrams of all connections.
#[derive(Default)]
pub(super) struct Totals {
    leaving: Rc<Cell<usize>>,
    gathered: Rc<Cell<usize>>,
}

impl Large {
    fn new(all: &Totals) -> Box<Self> {
        let (leaving, held) = (VecDeque::new(), Held::new(&all.leaving));
        Box::new(Self { leaving, held, flying: 0, allowed: false, gather: Gather::new(&all.gathered) })
    }

    fn push(&mut self, now: Instant, conn: &mut Connection, session: u32, bytes: &[u8]) -> Beside {
        let size = HEAD + bytes.len();
        if !self.held.take(size, LEAVING_MAX, LEAVING_ALL) {
            return Beside::Dropped;
        }
        let mut id = None;
        if !self.allowed {
            id = conn.streams().open(Dir::Uni);
            self.allowed = id.is_some();
            if !self.allowed {
                self.held.give(size);
                return Beside::InStream;
            }
        }
        let rest = [&head(session), bytes].concat().into();
        self.flying += id.map_or(0, |_| size);
        self.leaving.push_back(Leaving { until: now + LIFETIME, size, id, rest });
        Beside::Sent
    }

    /// Hands over what the transport takes now. `window`: what all other streams may have under way.
    fn pump(&mut self, conn: &mut Connection, window: u32) {
        let send_window = |flying| u64::from(window) + flying as u64;
        conn.set_send_window(send_window(self.flying));
        let most = FLYING_MAX as u64;
        let most = most.min(conn.congestion_state().window() * FLYING_WINDOWS) as usize;
        for one in &mut self.leaving {
            if one.id.is_none() && (self.flying == 0 || self.flying + one.size <= most) {
                one.id = conn.streams().open(Dir::Uni);
                self.flying += one.id.map_or(0, |_| one.size);
            }
            let Some(id) = one.id else { return };
            if one.rest.is_empty() {
                continue;
            }
            conn.set_send_window(send_window(self.flying));
            let mut stream = conn.send_stream(id);
            // A stream that takes a part only says once that it takes more when it is asked again.
            while !one.rest.is_empty() {
                match stream.write_chunks(slice::from_mut(&mut one.rest)) {
                    Ok(_) => {}
                    Err(WriteError::Blocked) => return,
                    // Stopped: the event says so too.
                    Err(WriteError::Stopped(_) | WriteError::ClosedStream) => one.rest.clear(),
                }
            }
            let _ = stream.finish();
        }
    }

    fn remove(&mut self, at: usize) -> Option<StreamId> {
        let one = self.leaving.remove(at)?;
        self.held.give(one.size);
        self.flying -= one.id.map_or(0, |_| one.size);
        one.id
    }

    /// A stream of ours is over.
    fn gone(&mut self, id: StreamId) {
        if let Some(at) = self.leaving.iter().position(|one| one.id == Some(id)) {
            self.remove(at);
        }
    }

    /// What these datagrams add to what may be under way.
    pub(super) fn flying(&self) -> u64 {
        self.flying as u64
    }

    /// When the oldest is given up.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let leaving = self.leaving.front().map(|one| one.until);
        leaving.into_iter().chain(self.gather.poll_timeout()).min()
    }
}

impl Node {
    /// Sends a datagram that does not fit into one packet, for the session with this number.
    pub(super) fn send_large(&mut self, now: Instant, index: u32, session: u32, bytes: &[u8]) -> Beside {
        let Some(slot) = self.slots.get_mut(index) else { return Beside::InStream };
        let large = slot.large.get_or_insert_with(|| Large::new(&self.larges));
        let became = large.push(now, &mut slot.conn, session, bytes);
        match became {
            Beside::Sent => {
                bump(&self.count.udp_streams);
                self.large_room(index);
            }
            Beside::Dropped => bump(&self.count.udp_full),
            Beside::InStream => {}
        }
        became
    }

    /// The transport may take more.
    pub(super) fn large_room(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(large) = &mut slot.large else { return };
        large.pump(&mut slot.conn, slot.windows.send);
        self.touch(index);
    }

    /// The peer has all of a stream, or wants no more of it.
    pub(super) fn large_gone(&mut self, index: u32, id: StreamId, stopped: bool) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        if stopped {
            let _ = slot.conn.send_stream(id).reset(ABANDONED);
        }
        if let Some(large) = &mut slot.large {
            large.gone(id);
        }
        self.large_room(index);
    }

    /// New streams of a peer.
    pub(super) fn large_opened(&mut self, now: Instant, index: u32) {
        while let Some(slot) = self.slots.get_mut(index) {
            let Some(id) = slot.conn.streams().accept(Dir::Uni) else {
                return;
            };
            if slot.conn.max_concurrent_streams(Dir::Uni) < STREAMS_MOST.into() {
                slot.conn.set_max_concurrent_streams(Dir::Uni, STREAMS_MOST.into());
            }
            slot.large.get_or_insert_with(|| Large::new(&self.larges)).gather.begin(now, id.index());
            self.large_readable(index, id);
        }
    }

    /// Takes what has come of a stream; the session's reader gets the datagram once it is whole.
    pub(super) fn large_readable(&mut self, index: u32, id: StreamId) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(large) = &mut slot.large else { return };
        let mut recv = slot.conn.recv_stream(id);
        let Ok(mut chunks) = recv.read(false) else { return };
        let mut read = 0;
        let over = loop {
            match chunks.next(usize::MAX) {
                Ok(Some(chunk)) => {
                    read += chunk.bytes.len();
                    match large.gather.put(id.index(), chunk.offset, &chunk.bytes) {
                        Ok(None) => {}
                        Ok(Some(session)) if place(session).is_some_and(|id| slot.streams.contains_key(&id)) => {}
                        Ok(Some(_)) => break Some(Err(Stray::Malformed)),
                        Err(stray) => break Some(Err(stray)),
                    }
                }
                Ok(None) => break Some(large.gather.end(id.index()).ok_or(Stray::Malformed)),
                Err(ReadError::Blocked) => break None,
                // It is late, and counted there.
                Err(ReadError::Reset(_)) => {
                    large.gather.forget(id.index());
                    break None;
                }
            }
        };
        let credit = chunks.finalize().should_transmit();
        slot.windows.read(read);
        let stray = match over {
            None => None,
            Some(Ok((session, bytes))) => {
                self.arrive(index, session, bytes);
                None
            }
            Some(Err(stray)) => {
                large.gather.forget(id.index());
                let _ = slot.conn.recv_stream(id).stop(ABANDONED);
                Some(stray)
            }
        };
        match stray {
            None => {}
            Some(Stray::Malformed) => bump(&self.count.udp_strays),
            Some(Stray::Full) => bump(&self.count.udp_full),
        }
        if credit || stray.is_some() {
            self.touch(index);
        }
    }

    /// Gives up what was not whole in time.
    pub(super) fn large_late(&mut self, now: Instant, index: u32) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(large) = &mut slot.large else { return };
        while let Some(id) = large.gather.late(now) {
            bump(&self.count.udp_late);
            let id = StreamId::new(!slot.conn.side(), Dir::Uni, id);
            let _ = slot.conn.recv_stream(id).stop(ABANDONED);
        }
        while large.leaving.front().is_some_and(|one| one.until <= now) {
            bump(&self.count.udp_late);
            if let Some(id) = large.remove(0) {
                let _ = slot.conn.send_stream(id).reset(ABANDONED);
            }
        }
        self.large_room(index);
    }
}

/// The stream that a session's number names.
pub(super) fn place(session: u32) -> Option<StreamId> {
    // RFC 9000, 2.1: the two low bits say who opened it, and that it goes both ways.
    (session & 2 == 0).then(|| StreamId::from(VarInt::from_u32(session)))
}
