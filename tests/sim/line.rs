//! A line with a rate, a queue and an MTU, the same each way and for each pair of addresses.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// IPv4 and UDP.
const HEADERS: usize = 28;

pub struct Line {
    /// Bytes per second; 0: no limit.
    pub rate: u64,
    /// What may wait, as time; what comes beyond it is dropped.
    pub queue: Duration,
    /// Of IP packets; larger ones vanish.
    pub mtu: usize,
    /// When the last datagram has left, for each pair.
    busy: BTreeMap<(SocketAddr, SocketAddr), Instant>,
}

impl Line {
    pub fn new(rate: u64, queue: Duration, mtu: usize) -> Self {
        Self { rate, queue, mtu, busy: BTreeMap::new() }
    }

    /// How long a datagram waits and takes to leave; None where it is dropped.
    pub fn carry(&mut self, now: Instant, from: SocketAddr, to: SocketAddr, len: usize) -> Option<Duration> {
        let len = len + HEADERS;
        if len > self.mtu {
            return None;
        }
        if self.rate == 0 {
            return Some(Duration::ZERO);
        }
        let busy = self.busy.entry((from, to)).or_insert(now);
        let start = (*busy).max(now);
        if start - now > self.queue {
            return None;
        }
        *busy = start + Duration::from_secs_f64(len as f64 / self.rate as f64);
        Some(*busy - now)
    }
}
