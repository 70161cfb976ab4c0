//! Datagrams ready to leave that no QUIC connection owns: control, relayed packets, answers.

use super::path::Way;
use std::collections::VecDeque;

/// Of all datagrams that wait; a newcomer is dropped when full. Relayed traffic has its own congestion
/// control at its ends, to which a drop here is the signal.
const BYTES_MAX: usize = 2 << 20;
/// Emptied buffers that are kept for the next datagrams.
const POOL_MAX: usize = 8;

#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) to: Way,
    pub(super) bytes: Vec<u8>,
    /// Size of each datagram but the last, where `bytes` holds several.
    pub(super) segment: Option<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<Outgoing>,
    held: usize,
    pool: Vec<Vec<u8>>,
}

impl Outbox {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.held
    }

    /// False where the datagram was dropped for want of room.
    #[must_use]
    pub(super) fn push(&mut self, to: impl Into<Way>, bytes: Vec<u8>) -> bool {
        self.enqueue(Outgoing { to: to.into(), bytes, segment: None })
    }

    /// Several datagrams of `segment` bytes (the last may be shorter) to one address.
    #[must_use]
    pub(super) fn push_batch(&mut self, to: impl Into<Way>, batch: &[u8], segment: usize) -> bool {
        if self.held + batch.len() > BYTES_MAX {
            return false;
        }
        let mut bytes = self.pool.pop().unwrap_or_default();
        bytes.extend_from_slice(batch);
        self.enqueue(Outgoing { to: to.into(), bytes, segment: (batch.len() > segment).then_some(segment) })
    }

    fn enqueue(&mut self, out: Outgoing) -> bool {
        if out.bytes.is_empty() || self.held + out.bytes.len() > BYTES_MAX {
            return false;
        }
        self.held += out.bytes.len();
        self.queue.push_back(out);
        true
    }

    /// Swaps the next batch into `buf`; what was there becomes a spare buffer.
    pub(super) fn pop(&mut self, buf: &mut Vec<u8>) -> Option<(Way, Option<usize>)> {
        let mut next = self.queue.pop_front()?;
        self.held -= next.bytes.len();
        std::mem::swap(buf, &mut next.bytes);
        if self.pool.len() < POOL_MAX {
            next.bytes.clear();
            self.pool.push(next.bytes);
        }
        Some((next.to, next.segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_outbox_drops_the_newcomer_and_takes_it_later() {
        let mut out = Outbox::default();
        let to: std::net::SocketAddr = "1.2.3.4:5".parse().unwrap();
        let batch = vec![7; 64 << 10];
        let taken = (0..40).filter(|_| out.push_batch(to, &batch, 1213)).count();
        assert_eq!(taken, BYTES_MAX / batch.len());
        let mut buf = Vec::new();
        assert_eq!(out.pop(&mut buf), Some((to.into(), Some(1213))));
        assert_eq!(buf, batch);
        assert!(out.push(to, vec![1]));
    }
}
