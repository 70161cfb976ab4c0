//! How a peer is found and reached: questions to the relays, handshakes, and which connection stays.

use super::{
    identity::Certificate,
    node::Node,
    noise::{Dial, Purpose},
    path::Path,
    peer::{ANSWER_WAIT, Peer},
    slot::{LIVE_MAX, Role, Slot},
};
use crate::metrics::bump;
use quinn_proto::ConnectionError;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Two handshakes within this are two dials at the same time and not a restart of the peer.
const SIMULTANEOUS: Duration = Duration::from_secs(10);
/// A client whose Finished is lost a few times sends it again in longer and longer steps.
const HALF_OPEN_WAIT: Duration = Duration::from_secs(15);
/// What "nobody answered" can mean.
const CAUSES: &str = "it is off or cut off, or its psk, CA or key is another than ours says";

impl Slot {
    /// When a handshake has taken too long; None after it.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let patience = match self.role {
            Role::Dialed(_) | Role::Registering(_) => ANSWER_WAIT,
            Role::Accepted | Role::Registered => HALF_OPEN_WAIT,
        };
        (self.peer.is_none() && !self.lost).then(|| self.born + patience)
    }
}

impl Node {
    /// A stream waits for this node.
    pub(super) fn want_stream(&mut self, now: Instant, name: &str, key: u32) {
        if name == self.name {
            return self.kill_streams([key], "that is this node itself");
        }
        let Some(peer) = self.peers.entry(now, name) else {
            return self.kill_streams([key], "too many peers");
        };
        peer.waiting.push_back(key);
        match peer.slot {
            Some(index) => self.open_waiting(index),
            None => self.reach(now, name),
        }
    }

    /// Opens on this connection what waits for its peer, as far as the peer allows.
    pub(super) fn open_waiting(&mut self, index: u32) {
        let Some(name) = self.slots.get(index).and_then(|s| s.peer.clone()) else { return };
        while let Some(key) = self.peers.get_mut(&name).and_then(|p| p.waiting.pop_front()) {
            if !self.try_open(index, key) {
                if let Some(peer) = self.peers.get_mut(&name) {
                    peer.waiting.push_front(key);
                }
                return;
            }
        }
    }

    /// Dials where the way is known, else asks for it.
    pub(super) fn reach(&mut self, now: Instant, name: &str) {
        self.recall(name);
        let relays = self.homes.len();
        let Some(peer) = self.peers.get_mut(name) else { return };
        if peer.dialing.is_some() || peer.want.is_some() {
            return;
        }
        let bare = peer.paths.take_bare();
        let cached = peer.paths.current().is_none();
        let known = peer.paths.current().or(bare).or_else(|| {
            // With a relay at hand the cached address is tried beside it and not instead of it.
            let alone = self.homes.usable().next().is_none();
            peer.paths.last_good().filter(|_| alone).map(Path::to)
        });
        if let (Some(path), Some(certificate)) = (known, peer.certificate.clone()) {
            self.dial(now, name, path, &certificate);
            if cached {
                // The peer may have moved: a beacon or a relay that says so wins.
                if let Some(peer) = self.peers.get_mut(name) {
                    peer.guess = peer.dialing;
                }
                self.lan.ask(now);
                if relays > 0 {
                    self.want_flow(now, name);
                }
            }
            return;
        }
        if relays == 0 && !self.lan.enabled() {
            return self.give_up(name, "no relay is configured");
        }
        self.lan.ask(now);
        self.want_flow(now, name);
    }

    pub(super) fn dial(&mut self, now: Instant, name: &str, path: Path, certificate: &Certificate) {
        let local = Arc::clone(&self.transport.local);
        let dial = Dial { local, peer: certificate.key, name: name.into(), purpose: Purpose::Peer };
        match self.connect_slot(now, dial, Role::Dialed(name.into()), path) {
            Ok(index) => {
                if let Some(peer) = self.peers.get_mut(name) {
                    peer.dialing = Some(index);
                }
            }
            Err(why) => self.give_up(name, &why),
        }
    }

    /// What waits for this peer fails; the next open tries anew.
    pub(super) fn give_up(&mut self, name: &str, why: &str) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let waiting = std::mem::take(&mut peer.waiting);
        peer.want = None;
        if !waiting.is_empty() || peer.note != why {
            log::warn!(target: "tunnel", "{name}: {why}");
        }
        peer.note = why.into();
        self.kill_streams(waiting, why);
    }

    /// Of these connections some are due.
    pub(super) fn drive_dials(&mut self, now: Instant, slots: &[u32]) {
        for index in slots {
            if self.slots.get(*index).and_then(Slot::deadline).is_some_and(|at| at <= now) {
                self.nobody_answered(now, *index);
            }
        }
    }

    fn nobody_answered(&mut self, now: Instant, index: u32) {
        if self.slots.get(index).is_some_and(|slot| slot.role != Role::Registered) {
            bump(&self.count.handshake_failures);
        }
        let why = format!("nobody answered for {} s: {CAUSES}", ANSWER_WAIT.as_secs());
        self.close_as(now, index, "no answer", &why);
    }

    /// A confirmed connection with a node: which of its connections carries new streams?
    pub(super) fn bind(&mut self, now: Instant, index: u32, certificate: &Certificate) {
        let name = certificate.name.clone();
        let Some((born, dialed, path)) = self.slots.get(index).map(|s| (s.born, s.role != Role::Accepted, s.path))
        else {
            return;
        };
        let old = self.peers.get(&name).and_then(|p| p.slot).filter(|old| *old != index);
        let old =
            old.and_then(|old| self.slots.get(old)).filter(|s| !s.lost).map(|s| (s.born, s.role != Role::Accepted));
        let keep_old = old.is_some_and(|(old_born, old_dialed)| {
            let both = old_dialed != dialed && born.saturating_duration_since(old_born) < SIMULTANEOUS;
            // Of two dials at once the one of the lower public key stays, at both ends.
            let ours_is_lower = self.transport.local.public < certificate.key;
            both && old_dialed == ours_is_lower
        });
        if self.peers.entry(now, &name).is_none() {
            return self.close(now, index, "too many peers");
        }
        if let Some(slot) = self.slots.get_mut(index) {
            slot.peer = Some(name.clone());
            slot.idle_since = now;
        }
        log::info!(target: "tunnel", "{name}: connected by {}", self.describe(path));
        self.know(&name, certificate);
        // Without a relay to fall back on, the connection would end with its path.
        let bare = |p: &Peer| !path.is_relay() && p.paths.relay().is_none();
        let bare = self.homes.len() > 0 && self.peers.get(&name).is_some_and(bare);
        if let Some(peer) = self.peers.get_mut(&name) {
            peer.note.clear();
            peer.want = peer.want.take().filter(|_| bare);
            if peer.dialing == Some(index) {
                peer.dialing = None;
            }
            if !keep_old {
                peer.slot = Some(index);
                peer.paths.confirmed(now, path);
                peer.path_since = now;
            }
        }
        if let Path::Relay { relay, flow } = path {
            self.peers.bind_flow(relay, flow, &name);
        }
        self.follow(now, &name);
        if path.is_relay() {
            self.seek(now, &name);
        } else if bare && self.peers.get(&name).is_some_and(|p| p.want.is_none()) {
            self.want_flow(now, &name);
        }
        if let Some(slot) = self.peers.get(&name).and_then(|p| p.slot) {
            self.open_waiting(slot);
        }
        self.accept_streams(index);
        if !dialed {
            self.outdate(now, &name, born);
        }
        self.make_room(now, index);
    }

    /// The peer has dialled, which it does not while it has a connection: those that it dialled before are of before
    /// its restart, or it has given them up, and so are ours that it had when it dialled. Of a client's first moments no
    /// stateless reset would ever tell us, and what has been silent for a while may not ask again for a minute.
    fn outdate(&mut self, now: Instant, name: &str, born: Instant) {
        let known = |s: &Slot| s.role == Role::Accepted && s.born < born || s.born + SIMULTANEOUS < born;
        let mut old = self.slots_of(name);
        old.retain(|at| self.slots.get(*at).is_some_and(known));
        old.into_iter().for_each(|at| self.close(now, at, "the peer has dialled anew"));
        self.ask_all(now, name);
    }

    /// It was restarted. What we have with it may have fallen silent long ago, and its next probe be far off.
    fn ask_all(&mut self, now: Instant, name: &str) {
        for at in self.slots_of(name) {
            if let Some(slot) = self.slots.get_mut(at) {
                slot.demand(now);
                self.touch(at);
            }
        }
    }

    /// The connection that was of no use for longest makes room for this one; where all carry streams, there is none.
    fn make_room(&mut self, now: Instant, index: u32) {
        if self.slots.live().count() <= LIVE_MAX {
            return;
        }
        let idle = self.slots.live().filter(|(at, s)| *at != index && s.streams.is_empty());
        let idle = idle.min_by_key(|(_, s)| s.idle_since).map(|(at, _)| at);
        bump(&self.count.connections_displaced);
        match idle {
            Some(at) => self.close(now, at, "another connection needs its place"),
            None => self.close(now, index, "too many connections are in use"),
        }
    }

    pub(super) fn connection_lost(&mut self, now: Instant, index: u32, reason: &ConnectionError) {
        let Some(slot) = self.slots.get(index) else { return };
        let why = match reason {
            ConnectionError::ConnectionClosed(close) if !close.reason.is_empty() => {
                format!("it refused us: {}", String::from_utf8_lossy(&close.reason))
            }
            ConnectionError::TransportError(error) if !error.reason.is_empty() => error.reason.clone(),
            ConnectionError::ApplicationClosed(close) => {
                format!("it closed: {}", String::from_utf8_lossy(&close.reason))
            }
            other => other.to_string(),
        };
        if slot.peer.is_none() {
            match &slot.role {
                Role::Accepted => {
                    bump(&self.count.handshake_failures);
                    log::warn!(target: "tunnel", "handshake from {}: {why}", self.describe(slot.path));
                }
                Role::Dialed(_) | Role::Registering(_) => {
                    bump(&self.count.handshake_failures);
                    if matches!(reason, ConnectionError::TransportError(_)) {
                        bump(&self.count.bad_certificate);
                    }
                }
                Role::Registered => {}
            }
        }
        let name = slot.peer.clone().filter(|_| matches!(reason, ConnectionError::Reset));
        self.lose(now, index, &why);
        if let Some(name) = name {
            self.ask_all(now, &name);
        }
    }

    /// This connection is of no more use, whoever ended it.
    pub(super) fn lose(&mut self, now: Instant, index: u32, why: &str) {
        let Some(slot) = self.slots.get_mut(index).filter(|s| !s.lost) else { return };
        slot.lost = true;
        slot.recent = std::collections::VecDeque::new();
        let (tx, rx) = (slot.tx_bytes, slot.rx_bytes);
        if let Some(peer) = slot.peer.as_ref().and_then(|name| self.peers.get_mut(name)) {
            peer.tx_bytes += tx;
            peer.rx_bytes += rx;
        }
        let streams = std::mem::take(&mut slot.streams);
        let (role, name) = (slot.role.clone(), slot.peer.clone());
        self.kill_streams(streams.into_values(), why);
        match (role, name) {
            (Role::Registering(relay), _) => self.homes.dial_failed(relay, now, why),
            (Role::Dialed(name), None) => {
                if let Some(peer) = self.peers.get_mut(&name).filter(|p| p.dialing == Some(index)) {
                    peer.dialing = None;
                    // Else a connection of theirs may live by these paths.
                    if peer.slot.is_none() {
                        peer.paths.forget(); // ask the relays again next time
                        self.give_up(&name, why);
                    }
                }
            }
            (Role::Dialed(_) | Role::Accepted | Role::Registered, Some(name)) => {
                log::info!(target: "tunnel", "{name}: connection ended: {why}");
                let another =
                    self.slots.iter().find(|(_, s)| s.peer.as_ref() == Some(&name) && !s.lost).map(|(i, _)| i);
                if let Some(peer) = self.peers.get_mut(&name).filter(|p| p.slot == Some(index)) {
                    peer.slot = another;
                    if another.is_none() {
                        peer.want = None;
                        if !peer.waiting.is_empty() {
                            self.reach(now, &name);
                        }
                    }
                }
            }
            (Role::Accepted | Role::Registered, None) => {}
        }
    }
}
