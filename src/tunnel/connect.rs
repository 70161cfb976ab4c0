//! Where connections begin: which one a QUIC datagram belongs to, handshakes of others, dials of ours.

use super::{
    admit,
    congestion::Hints,
    gate,
    node::{Node, Origin},
    noise::Dial,
    path::Path,
    slot::{Begin, Role, STRANGER, Slot, virtual_address},
    windows::Windows,
};
use crate::metrics::bump;
use bytes::BytesMut;
use quinn_proto::{ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent, EndpointEvent, Incoming};
use std::{net::SocketAddr, sync::Arc, time::Instant};

impl Node {
    pub(super) fn handle_quic(&mut self, now: Instant, origin: Origin, datagram: BytesMut) {
        let slots = &self.slots;
        let live = |slot| slots.get(slot).is_some();
        let begun = |dcid: &[u8]| {
            let same = |s: &Slot| s.role == Role::Accepted && s.first_dcid == dcid;
            slots.iter().find(|(_, s)| same(s)).map(|(index, _)| index)
        };
        let verdict = self.gate.judge(&datagram, &self.transport.respond, live, begun, &self.count);
        let dcid = first_dcid(&datagram).to_vec();
        let index = match verdict {
            gate::Verdict::Drop => return,
            // A slot that is gone: quinn answers with a stateless reset, to where this came from.
            gate::Verdict::Ours(slot) => Some(slot).filter(|slot| live(*slot)),
            gate::Verdict::Reset => return self.handle_reset(now, origin, &datagram),
            gate::Verdict::Again(slot) => Some(slot),
            gate::Verdict::First => None,
        };
        let remote = index.and_then(|i| slots.get(i)).map_or_else(|| admit::remote(origin), |s| s.remote);
        if let Some(index) = index {
            self.heard(now, index, origin, datagram.len() as u64);
        }
        // Should quinn want a connection ID in here, for a Retry say, it is one that names no connection: what comes
        // back with it has to open like any first Initial.
        self.transport.serve(STRANGER);
        // quinn answers what it has no connection for. Behind an ID of a connection of ours that may be anybody who
        // has seen it, in the long headers of before our last restart for example.
        let may_answer = verdict == gate::Verdict::First || dcid.is_empty();
        let mut reply = Vec::new();
        match self.endpoint.handle(now, remote, None, None, datagram, &mut reply) {
            None => {}
            Some(DatagramEvent::ConnectionEvent(handle, event)) => self.deliver(now, handle, event),
            Some(DatagramEvent::NewConnection(incoming)) if may_answer => self.accept(now, origin, incoming, dcid),
            Some(DatagramEvent::NewConnection(incoming)) => {
                bump(&self.count.stray_long_header);
                self.endpoint.ignore(incoming);
            }
            Some(DatagramEvent::Response(transmit)) if may_answer => {
                reply.truncate(transmit.size);
                self.send_raw(now, origin.path(), &reply);
            }
            Some(DatagramEvent::Response(_)) => bump(&self.count.stray_long_header),
        }
    }

    /// Maybe a stateless reset of any connection that goes this way: after a restart of the peer the dead one and the
    /// new one do. quinn tells by the token, and whatever else it is gets no answer.
    fn handle_reset(&mut self, now: Instant, origin: Origin, datagram: &BytesMut) {
        let on_path = self.slots.iter().filter(|(_, s)| s.path == origin.path());
        let remotes: Vec<SocketAddr> = on_path.map(|(_, s)| s.remote).collect();
        for remote in remotes {
            let handled = self.endpoint.handle(now, remote, None, None, datagram.clone(), &mut Vec::new());
            if let Some(DatagramEvent::ConnectionEvent(handle, event)) = handled {
                return self.deliver(now, handle, event);
            }
        }
        bump(&self.count.stray_short_header);
    }

    fn deliver(&mut self, now: Instant, handle: ConnectionHandle, event: ConnectionEvent) {
        let Some(index) = self.by_handle.get(&handle).copied() else { return };
        if let Some(slot) = self.slots.get_mut(index) {
            slot.deliver(now, event);
            self.touch(index);
        }
    }

    fn accept(&mut self, now: Instant, origin: Origin, incoming: Incoming, dcid: Vec<u8>) {
        let remote = incoming.remote_address();
        let proven = !incoming.may_retry();
        let verdict = admit::judge(&self.slots, &mut self.effort, now, remote, proven);
        let index = match verdict {
            admit::Verdict::Accept => self.place(),
            admit::Verdict::Retry => return self.retry(now, origin, incoming),
            admit::Verdict::Drop => None,
        };
        let Some(index) = index else {
            bump(&self.count.budget_exceeded);
            return self.endpoint.ignore(incoming);
        };
        self.working_since = Some(now);
        self.transport.serve(index);
        let mut reply = Vec::new();
        let (windows, hints) = self.terms(now, origin.path());
        let config = self.transport.accepting(&windows, &hints);
        match self.endpoint.accept(incoming, now, &mut reply, Some(config)) {
            Ok(made) => {
                let (role, path, terms) = (Role::Accepted, origin.path(), (windows, hints));
                self.insert_slot(now, index, Begin { made, remote, role, path, first_dcid: dcid, terms });
            }
            Err(error) => {
                windows.close(&mut self.budget);
                self.refused(&error.cause, origin.path());
                if let Some(transmit) = error.response {
                    reply.truncate(transmit.size);
                    self.send_raw(now, origin.path(), &reply);
                }
            }
        }
    }

    /// For one more. Where all places are taken, one that is closing ends before its time, which is three PTOs: a minute
    /// where the handshake was slow. What still comes for it gets a stateless reset (RFC 9000 section 10.2).
    fn place(&mut self) -> Option<u32> {
        if let (None, Some(index)) = (self.slots.vacant(), self.slots.closed()) {
            let handle = self.slots.get(index)?.handle;
            self.endpoint.handle_event(handle, EndpointEvent::drained());
            self.forget(index);
        }
        self.slots.vacant()
    }

    fn retry(&mut self, now: Instant, origin: Origin, incoming: Incoming) {
        bump(&self.count.retries_sent);
        let mut reply = Vec::new();
        if let Ok(transmit) = self.endpoint.retry(incoming, &mut reply) {
            reply.truncate(transmit.size);
            self.send_raw(now, origin.path(), &reply);
        }
    }

    /// Takes note of the time that public-key work took, where there was any since the last call: without it the
    /// budget for such work is never used up.
    pub fn account(&mut self, clock: impl FnOnce() -> Instant) {
        if let Some(since) = self.working_since.take() {
            self.effort.spend(clock().saturating_duration_since(since));
        }
    }

    /// We refused a handshake: one line that says why.
    fn refused(&self, cause: &ConnectionError, path: Path) {
        bump(&self.count.handshake_failures);
        if let ConnectionError::TransportError(error) = cause {
            bump(&self.count.bad_certificate);
            let from = self.describe(path);
            log::warn!(target: "tunnel", "handshake from {from} refused: {}", error.reason);
        }
    }

    fn insert_slot(&mut self, now: Instant, index: u32, begin: Begin) {
        self.by_handle.insert(begin.made.0, index);
        self.slots.insert(index, Slot::new(now, begin));
        self.touch(index);
    }

    pub(super) fn connect_slot(&mut self, now: Instant, dial: Dial, role: Role, path: Path) -> Result<u32, String> {
        let index = self.place().ok_or("too many connections")?;
        self.transport.serve(index);
        let (windows, hints) = self.terms(now, path);
        let config = self.transport.client(dial, &windows, &hints).ok_or_else(|| "the bundle has no psk".to_owned());
        let remote = virtual_address(index);
        match config.and_then(|c| self.endpoint.connect(now, c, remote, "weft").map_err(|e| e.to_string())) {
            Ok(made) => {
                let terms = (windows, hints);
                self.insert_slot(now, index, Begin { made, remote, role, path, first_dcid: Vec::new(), terms });
                Ok(index)
            }
            Err(why) => {
                windows.close(&mut self.budget);
                Err(why)
            }
        }
    }

    /// Whether packets on this path cross no router.
    pub(super) fn on_link(&self, path: Path) -> bool {
        match path {
            Path::Direct(way) => self.lan.holds(way.remote.ip()),
            Path::Relay { .. } => false,
        }
    }

    /// What a new connection begins with.
    fn terms(&mut self, now: Instant, path: Path) -> (Windows, Arc<Hints>) {
        let hints = Hints::new(self.on_link(path));
        (Windows::open(now, &mut self.budget), Arc::new(hints))
    }
}

/// Of a long header, RFC 8999 section 5.1; empty for a short one.
fn first_dcid(datagram: &[u8]) -> &[u8] {
    let long = datagram.first().is_some_and(|b| b & 0x80 != 0);
    let len = datagram.get(5).map_or(0, |l| usize::from(*l));
    datagram.get(6..6 + len).filter(|_| long).unwrap_or_default()
}
