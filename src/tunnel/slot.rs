//! Connections: one slot each, with a virtual address for quinn and a path below it.

use super::{congestion::OnLink, path::Path, windows::Windows};
use quinn_proto::{Connection, ConnectionHandle, StreamId};
use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv6Addr, SocketAddr},
    sync::atomic::Ordering,
    time::Instant,
};

/// Datagrams of no slot; never a connection.
pub(super) const STRANGER: u32 = 0;
/// Live connections and handshakes; more are not accepted, and dials fail. 14–20 kB each.
pub(super) const SLOTS_MAX: usize = 320;
/// Datagrams that are sent again by the relay when a direct path falls silent: one congestion window or so.
const RECENT_MAX: usize = 32;
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
    /// When the last stream ended.
    pub(super) idle_since: Instant,
    pub(super) next_keepalive: Instant,
    pub(super) lost: bool,
    /// Our key of each stream.
    pub(super) streams: BTreeMap<StreamId, u32>,
    pub(super) timeout: Option<Instant>,
    pub(super) dirty: bool,
    pub(super) tx_bytes: u64,
    pub(super) rx_bytes: u64,
    /// All that is sent by the direct path goes this way too, while that one is suspect.
    pub(super) also: Option<Path>,
    /// The last datagrams that went by the direct path; at most [`RECENT_MAX`].
    pub(super) recent: VecDeque<Vec<u8>>,
    pub(super) windows: Windows,
    pub(super) on_link: OnLink,
}

impl Slot {
    /// The new path is proven: congestion control, RTT and MTU of the old one are of no use any more.
    pub(super) fn move_to(&mut self, now: Instant, path: Path, on_link: bool) {
        (self.path, self.also) = (path, None);
        self.on_link.store(on_link, Ordering::Relaxed);
        self.windows.path_changed();
        self.conn.path_changed(now);
        self.conn.ping();
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

/// A small slab: indices are stable and start behind [`STRANGER`].
#[derive(Default)]
pub(super) struct Slots {
    list: Vec<Option<Box<Slot>>>,
    live: usize,
}

impl Slots {
    /// The index that [`Slots::insert`] will use; None when full.
    pub(super) fn vacant(&self) -> Option<u32> {
        if self.live >= SLOTS_MAX {
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
        self.live += 1;
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<Box<Slot>> {
        let slot = self.list.get_mut((index as usize).checked_sub(1)?)?.take();
        self.live -= usize::from(slot.is_some());
        slot
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
