//! Datagrams ready to leave that no QUIC connection owns: control, relayed packets, answers.

use super::path::Way;
use std::collections::VecDeque;

/// Of all datagrams that wait; a newcomer is dropped when full. Relayed traffic has its own congestion
/// control at its ends, to which a drop here is the signal.
const BYTES_MAX: usize = 2 << 20;
/// Emptied buffers that are kept for the next datagrams.
const POOL_MAX: usize = 8;
/// Bytes that leave by one call: an IPv4 packet's most, before the kernel cuts it up.
const JOINED_MAX: usize = 60 << 10;

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
    /// Datagrams that one send may carry; 0 and 1: each leaves by itself.
    pub(super) gso: usize,
}

impl Outgoing {
    /// Takes in more datagrams where all but the last are still of one size.
    fn join(&mut self, to: Way, batch: &[u8], segment: usize, gso: usize) -> bool {
        let size = self.segment.unwrap_or(self.bytes.len());
        let len = self.bytes.len() + batch.len();
        let alike = segment == size || (batch.len() <= segment && segment < size);
        let fits = self.to == to && alike && self.bytes.len().is_multiple_of(size) && len <= JOINED_MAX.min(gso * size);
        if fits {
            self.bytes.extend_from_slice(batch);
            self.segment = Some(size);
        }
        fits
    }
}

impl Outbox {
    pub(super) fn new(gso: usize) -> Self {
        Self { gso, ..Self::default() }
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.held
    }

    /// False where the datagram was dropped for want of room.
    #[must_use]
    pub(super) fn push(&mut self, to: impl Into<Way>, bytes: Vec<u8>) -> bool {
        self.enqueue(Outgoing { to: to.into(), bytes, segment: None })
    }

    /// Several datagrams of `segment` bytes (the last may be shorter) to one address; they leave together with those
    /// that were put in just before.
    #[must_use]
    pub(super) fn push_batch(&mut self, to: impl Into<Way>, batch: &[u8], segment: usize) -> bool {
        if self.held + batch.len() > BYTES_MAX {
            return false;
        }
        let (to, segment) = (to.into(), segment.min(batch.len()));
        if self.queue.back_mut().is_some_and(|last| last.join(to, batch, segment, self.gso)) {
            self.held += batch.len();
            return true;
        }
        let mut bytes = self.pool.pop().unwrap_or_default();
        bytes.extend_from_slice(batch);
        self.enqueue(Outgoing { to, bytes, segment: (batch.len() > segment).then_some(segment) })
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

    #[test]
    fn datagrams_of_one_size_to_one_address_leave_together() {
        let (here, there): (std::net::SocketAddr, _) = ("1.2.3.4:5".parse().unwrap(), "1.2.3.4:6".parse().unwrap());
        let mut out = Outbox::new(4);
        // (address, bytes, size): five alike; another address; a shorter last one; longer ones; a batch with its own last.
        for (to, len, size) in [(here, 9, 9); 5] {
            assert!(out.push_batch(to, &vec![1; len], size));
        }
        for (to, len, size) in [(there, 9, 9), (there, 5, 5), (there, 5, 5), (here, 8, 8), (here, 9, 9), (here, 15, 9)]
        {
            assert!(out.push_batch(to, &vec![2; len], size));
        }
        assert!(out.push(here, vec![3; 9]));
        let (mut buf, mut left) = (Vec::new(), Vec::new());
        while let Some((to, segment)) = out.pop(&mut buf) {
            left.push((to.remote.port(), buf.len(), segment));
        }
        let wanted = [
            (5, 36, Some(9)),
            (5, 9, None),
            (6, 14, Some(9)),
            (6, 5, None),
            (5, 8, None),
            (5, 24, Some(9)),
            (5, 9, None),
        ];
        assert_eq!(left, wanted);
        assert_eq!(out.len(), 0);
    }
}
