//! Datagrams beside a stream: QUIC's (RFC 9221). Each begins with the stream's ID; that stream has opened the session,
//! and its end is theirs.

use super::node::{Event, Node};
use quinn_proto::{Dir, Side, StreamId, VarInt};
use std::collections::VecDeque;

/// Bytes of one connection that wait to be sent, and that have come and were not taken yet: beyond it the oldest are
/// dropped, as a router would.
pub(super) const BUFFER: usize = 64 << 10;
/// Datagrams that wait at one stream for its reader; one more is dropped.
const WAITING_MAX: usize = 32;
/// In front: the stream's ID.
const HEADER: usize = 4;

/// What has come beside one stream.
pub(super) type Arrived = VecDeque<Box<[u8]>>;

impl Node {
    /// Sends a datagram beside a stream whose OPEN was answered. False where it does not fit into one packet, or the peer
    /// takes none: the stream itself must carry it.
    pub fn send_datagram(&mut self, key: u32, bytes: &[u8]) -> bool {
        let Some((index, id)) = self.streams.live(key) else { return false };
        let Some(slot) = self.slots.get_mut(index) else { return false };
        let Ok(id) = u32::try_from(VarInt::from(id).into_inner()) else { return false };
        let mut datagrams = slot.conn.datagrams();
        if datagrams.max_size().is_none_or(|most| HEADER + bytes.len() > most) {
            return false;
        }
        let sent = datagrams.send([&id.to_be_bytes(), bytes].concat().into(), true).is_ok();
        self.touch(index);
        sent
    }

    /// The next datagram that has come for a stream.
    pub fn datagram(&mut self, key: u32) -> Option<Box<[u8]>> {
        self.streams.arrived(key)?.pop_front()
    }

    /// Hands out what a connection has received; what is for nobody is dropped.
    pub(super) fn datagrams_arrived(&mut self, index: u32) {
        while let Some(whole) = self.slots.get_mut(index).and_then(|s| s.conn.datagrams().recv()) {
            let Some((id, bytes)) = whole.split_first_chunk() else { continue };
            let id = u64::from(u32::from_be_bytes(*id));
            // RFC 9000, 2.1: the two low bits say who opened it, and that it goes both ways.
            let side = if id & 1 == 0 { Side::Client } else { Side::Server };
            if id & 2 != 0 {
                continue;
            }
            let id = StreamId::new(side, Dir::Bi, id >> 2);
            let Some(key) = self.slots.get(index).and_then(|s| s.streams.get(&id).copied()) else { continue };
            if let Some(arrived) = self.streams.arrived(key).filter(|a| a.len() < WAITING_MAX) {
                arrived.push_back(bytes.into());
                self.events.push_back(Event::Wake(key));
            }
        }
    }
}
