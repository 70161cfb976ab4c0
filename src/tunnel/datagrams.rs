//! Datagrams beside a stream: QUIC's (RFC 9221), which begin with the stream's ID, and larger ones, see `large`. That stream
//! has opened the session, and its end is theirs.

use super::{
    large::{Beside, place},
    node::{Event, Node},
};
use crate::metrics::bump;
use quinn_proto::VarInt;
use std::{collections::VecDeque, time::Instant};

/// Bytes of one connection that wait to be sent, and that have come and were not taken yet: beyond it the oldest are
/// dropped, as a router would.
pub(super) const BUFFER: usize = 64 << 10;
/// Datagrams that wait at one stream for its reader; one more is dropped.
const WAITING_MAX: usize = 128;
/// Bytes that wait at all streams for their readers: one more datagram is dropped.
pub(super) const WAITING_BYTES: usize = 1 << 20;
/// In front: the stream's ID.
const HEADER: usize = 4;

/// What has come beside one stream.
pub(super) type Arrived = VecDeque<Box<[u8]>>;

impl Node {
    /// Sends a datagram beside a stream whose OPEN was answered.
    pub fn send_datagram(&mut self, now: Instant, key: u32, bytes: &[u8]) -> Beside {
        let Some((index, id)) = self.streams.live(key) else { return Beside::InStream };
        let Some(slot) = self.slots.get_mut(index) else { return Beside::InStream };
        let Ok(session) = u32::try_from(VarInt::from(id).into_inner()) else { return Beside::InStream };
        let mut datagrams = slot.conn.datagrams();
        if datagrams.max_size().is_none_or(|most| HEADER + bytes.len() > most) {
            return self.send_large(now, index, session, bytes);
        }
        let sent = datagrams.send([&session.to_be_bytes(), bytes].concat().into(), true).is_ok();
        self.touch(index);
        if sent { Beside::Sent } else { Beside::InStream }
    }

    /// The next datagram that has come for a stream.
    pub fn datagram(&mut self, key: u32) -> Option<Box<[u8]>> {
        let bytes = self.streams.arrived(key)?.pop_front()?;
        self.streams.arrived_bytes -= bytes.len();
        Some(bytes)
    }

    /// Hands out what a connection has received.
    pub(super) fn datagrams_arrived(&mut self, index: u32) {
        while let Some(whole) = self.slots.get_mut(index).and_then(|s| s.conn.datagrams().recv()) {
            if let Some((session, bytes)) = whole.split_first_chunk() {
                self.arrive(index, u32::from_be_bytes(*session), bytes.into());
            }
        }
    }

    /// A whole datagram for a session's reader; what is for nobody is dropped.
    pub(super) fn arrive(&mut self, index: u32, session: u32, bytes: Box<[u8]>) {
        let key = self.slots.get(index).and_then(|s| s.streams.get(&place(session)?).copied());
        let Some(key) = key else { return };
        let room = self.streams.arrived_bytes + bytes.len() <= WAITING_BYTES;
        match self.streams.arrived(key) {
            Some(arrived) if room && arrived.len() < WAITING_MAX => {
                let len = bytes.len();
                arrived.push_back(bytes);
                self.streams.arrived_bytes += len;
                self.events.push_back(Event::Wake(key));
            }
            Some(_) => bump(&self.count.udp_full),
            None => {}
        }
    }
}
