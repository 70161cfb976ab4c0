//! Datagrams on their way from one node to another.

use super::{Relay, members::Id};
use crate::{
    metrics::{TunnelCounters, add, bump},
    tunnel::{
        control::Control,
        frame::{parse_data, retag},
        outbox::Outbox,
    },
};
use std::{net::SocketAddr, time::Instant};

/// While no more waits to be sent, relayed packets need not take turns.
const DIRECT_MAX: usize = 128 << 10;

/// Where a frame goes, and who sent it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Way {
    flow: u32,
    near: Id,
    to: SocketAddr,
}

impl Relay {
    /// Forwards a batch of frames of equal size that came from one address; tags are replaced in place.
    pub(in crate::tunnel) fn handle_data(
        &mut self,
        now: Instant,
        from: SocketAddr,
        batch: &mut [u8],
        segment: usize,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) {
        // Runs of frames of one flow leave as one batch.
        let mut run: Option<(usize, Way)> = None;
        let mut start = 0;
        while start < batch.len() {
            let end = (start + segment).min(batch.len());
            let next = self.forward(now, from, &mut batch[start..end], out, count);
            if run.map(|(_, way)| way) != next {
                if let Some((first, way)) = run {
                    self.pass(now, way, &batch[first..start], segment, out, count);
                }
                run = next.map(|way| (start, way));
            }
            start = end;
        }
        if let Some((first, way)) = run {
            self.pass(now, way, &batch[first..], segment, out, count);
        }
    }

    /// Checks and retags one frame.
    fn forward(
        &mut self,
        now: Instant,
        from: SocketAddr,
        frame: &mut [u8],
        out: &mut Outbox,
        count: &TunnelCounters,
    ) -> Option<Way> {
        let Some((flow, tag, datagram)) = parse_data(frame) else {
            bump(&count.relay_rejects);
            return None;
        };
        let signs = |id: Id| self.members.get(id).is_some_and(|n| n.channel.tag_in.tag(flow, datagram) == tag);
        // The sender is whose tag it is; its address says which to try first.
        let guess = self.members.at(from);
        let Some(ends) = self.flows.ends(flow) else {
            let sender = guess.filter(|id| signs(*id));
            return self.unknown_flow(now, sender, from, flow, out, count);
        };
        let first = usize::from(guess == Some(ends[1]));
        let Some(sender) = [first, 1 - first].into_iter().find(|i| signs(ends[*i])) else {
            bump(&count.relay_rejects);
            return None;
        };
        let (near, far) = (ends[sender], ends[1 - sender]);
        let far = self.members.get(far).map(|n| (n.channel.tag_out.tag(flow, datagram), n.address));
        let Some((tag, to)) = far else {
            self.flows.remove(flow);
            return self.unknown_flow(now, Some(near), from, flow, out, count);
        };
        let node = self.members.get_mut(near)?;
        node.heard = now;
        if node.address != from {
            self.challenge(now, near, from, out);
        }
        retag(frame, tag);
        Some(Way { flow, near, to })
    }

    /// Whoever has proved to be a node is told that its flow is none, again and again: the word may be lost.
    fn unknown_flow(
        &mut self,
        now: Instant,
        sender: Option<Id>,
        from: SocketAddr,
        flow: u32,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) -> Option<Way> {
        bump(&count.relay_unknown_flows);
        let sender = sender.filter(|_| self.may_say_gone(now))?;
        self.tell(sender, from, &Control::Gone { flow }, out, count);
        None
    }

    /// Frames that were checked leave at once, or when it is their flow's turn.
    fn pass(
        &mut self,
        now: Instant,
        way: Way,
        frames: &[u8],
        segment: usize,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) {
        let packets = frames.len().div_ceil(segment) as u64;
        if let Some(rate) = self.limits.node {
            let Some(node) = self.members.get_mut(way.near) else { return };
            if !node.data.take(now, rate, frames.len() as u64) {
                return add(&count.relay_over_rate, packets);
            }
        }
        if out.len() < DIRECT_MAX && self.queue.open(now, frames.len()) && out.push_batch(way.to, frames, segment) {
            self.passed(packets, frames.len(), count);
        } else {
            self.queue.push(now, way.flow, way.to, frames, segment);
            self.count_drops(count);
        }
    }

    fn passed(&self, packets: u64, bytes: usize, count: &TunnelCounters) {
        add(&count.relayed_datagrams, packets);
        add(&count.relayed_bytes, bytes as u64);
    }

    fn count_drops(&mut self, count: &TunnelCounters) {
        let dropped = std::mem::take(&mut self.queue.dropped);
        add(&count.relay_drops, dropped.full);
        add(&count.relay_late, dropped.late);
    }

    /// What had to wait: the next packets in `buf`.
    pub(in crate::tunnel) fn pop(
        &mut self,
        now: Instant,
        buf: &mut Vec<u8>,
        count: &TunnelCounters,
    ) -> Option<(SocketAddr, Option<usize>)> {
        let next = self.queue.pop(now, buf);
        self.count_drops(count);
        if let Some((_, segment)) = next {
            self.passed(segment.map_or(1, |s| buf.len().div_ceil(s)) as u64, buf.len(), count);
        }
        next
    }
}
