//! What a node sends, and when it wants to be woken: one connection after the other, a turn each.

use super::{
    frame::DATA_HEADER,
    node::{Node, Output},
    path::{Path, Way},
    relay::Relay,
    transport::RTT_FIRST,
    windows::Change,
};
use crate::metrics::add;
use std::time::Instant;

/// Transmissions that may be lost on a dead path before the next connection has its turn.
const TURNS: usize = 4;

impl Node {
    /// What to do next; `buf` is overwritten where it says Send.
    #[must_use]
    pub fn poll_output(&mut self, now: Instant, buf: &mut Vec<u8>) -> Output {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Output::Event(event);
            }
            if let Some((to, segment)) = self.outbox.pop(buf) {
                return self.sent(to, segment, buf.len());
            }
            let waiting = self.relay.as_mut().and_then(|relay| relay.pop(now, buf, &self.count));
            if let Some((to, segment)) = waiting {
                return self.sent(to.into(), segment, buf.len());
            }
            if let Some(output) = self.beacon(now, buf) {
                return output;
            }
            let Some(index) = self.dirty.pop_front() else { break };
            if let Some(output) = self.drive(now, index, buf) {
                return output;
            }
        }
        let all = [
            self.slots.poll_timeout(),
            self.peers.poll_timeout(),
            self.homes.poll_timeout(),
            self.relay.as_ref().and_then(Relay::poll_timeout),
            self.lan.poll_timeout(),
            self.pilot.poll_timeout(),
            Some(self.next_sweep),
        ];
        let due = all.into_iter().flatten().min();
        self.due = due;
        Output::Wait(due)
    }

    fn sent(&self, to: Way, segment: Option<usize>, len: usize) -> Output {
        add(&self.count.tx_datagrams, segment.map_or(1, |s| len.div_ceil(s)) as u64);
        add(&self.count.tx_bytes, len as u64);
        let local = to.local.or_else(|| self.uplinks.source(to.remote.ip()));
        Output::Send { to: to.remote, local, segment }
    }

    /// One turn of a connection: its events, then one transmission.
    fn drive(&mut self, now: Instant, index: u32, buf: &mut Vec<u8>) -> Option<Output> {
        self.slots.get_mut(index)?.dirty = false;
        for _ in 0..TURNS {
            while let Some(event) = self.slots.get_mut(index).and_then(|s| s.conn.poll()) {
                self.handle_event(now, index, event);
            }
            self.endpoint_events(index)?;
            let Some((to, segment)) = self.transmit(now, index, buf) else { break };
            if let Some(to) = to {
                self.touch(index);
                return Some(self.sent(to, segment, buf.len()));
            }
        }
        self.measure(now, index);
        let slot = self.slots.get_mut(index)?;
        let large = slot.large.as_ref().and_then(|large| large.poll_timeout());
        let at = slot.timeout().into_iter().chain(slot.deadline()).chain(large).min();
        self.slots.wake(index, at);
        None
    }

    /// The connection's windows follow what its path needs.
    fn measure(&mut self, now: Instant, index: u32) {
        let Some(slot) = self.slots.get_mut(index).filter(|s| s.peer.is_some() && s.windows.due(now)) else { return };
        let slowed = slot.slowed(now);
        let rtt = slot.conn.rtt();
        if !slowed && rtt != RTT_FIRST {
            let blocks = slot.conn.stats().frame_rx.data_blocked;
            let change = slot.windows.measure(now, rtt, blocks, slot.streams.len(), &mut self.budget);
            self.resize(index, change);
        }
    }

    pub(super) fn resize(&mut self, index: u32, change: Change) {
        let Some(slot) = self.slots.get_mut(index).filter(|_| change != Change::default()) else { return };
        if let Some(size) = change.receive {
            slot.conn.set_receive_window(size.into());
        }
        if let Some(size) = change.send {
            let beside = slot.large.as_ref().map_or(0, |large| large.flying());
            slot.conn.set_send_window(u64::from(size) + beside);
        }
        self.touch(index);
    }

    /// None where the slot is gone.
    fn endpoint_events(&mut self, index: u32) -> Option<()> {
        self.transport.serve(index);
        loop {
            let slot = self.slots.get_mut(index)?;
            let Some(event) = slot.conn.poll_endpoint_events() else { return Some(()) };
            let drained = event.is_drained();
            if let Some(back) = self.endpoint.handle_event(slot.handle, event) {
                slot.conn.handle_event(back);
            }
            if drained {
                self.forget(index);
                return None;
            }
        }
    }

    /// Of this connection quinn knows nothing any more.
    pub(super) fn forget(&mut self, index: u32) {
        let Some(slot) = self.slots.remove(index) else { return };
        self.by_handle.remove(&slot.handle);
        slot.windows.close(&mut self.budget);
        self.kill_streams(slot.streams.into_values(), "the connection was lost");
    }

    /// None: nothing to send. (None, _) inside: it was dropped, its path is down.
    fn transmit(&mut self, now: Instant, index: u32, buf: &mut Vec<u8>) -> Option<(Option<Way>, Option<usize>)> {
        let slot = self.slots.get_mut(index).filter(|s| !s.stranded)?;
        buf.clear();
        let (to, segment) = match slot.path {
            Path::Direct(address) => {
                let transmit = slot.poll_transmit(now, self.gso, buf)?;
                buf.truncate(transmit.size);
                self.shadow(now, index, buf, transmit.segment_size);
                (Some(address), transmit.segment_size)
            }
            Path::Relay { relay, flow } => {
                self.scratch.clear();
                let transmit = slot.poll_transmit(now, self.gso, &mut self.scratch)?;
                let whole = self.scratch.get(..transmit.size).unwrap_or(&self.scratch);
                let size = transmit.segment_size.unwrap_or(transmit.size).max(1);
                if slot.peer.is_some() {
                    slot.remember(whole, size); // should the relay fall silent
                }
                let up = whole.chunks(size).all(|datagram| self.homes.wrap(relay, now, flow, datagram, buf));
                let address = self.homes.get(relay).and_then(|h| h.address).filter(|_| up);
                (address.map(Way::from), transmit.segment_size.map(|s| s + DATA_HEADER))
            }
        };
        if let Some(slot) = self.slots.get_mut(index) {
            slot.tx_bytes += buf.len() as u64;
        }
        self.path_sent(now, index, buf.len());
        Some((to, segment))
    }

    /// What went by the direct path is kept for a while, and goes by the relay too while that path is suspect.
    fn shadow(&mut self, now: Instant, index: u32, datagrams: &[u8], segment: Option<usize>) {
        let size = segment.unwrap_or(datagrams.len()).max(1);
        let Some(slot) = self.slots.get_mut(index) else { return };
        if slot.peer.is_none() {
            return;
        }
        slot.remember(datagrams, size);
        if let Some(path) = slot.also {
            datagrams.chunks(size).for_each(|datagram| self.send_raw(now, path, datagram));
        }
    }
}
