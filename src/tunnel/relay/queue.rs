//! What a relay cannot send at once: a line for each flow, which take turns (deficit round robin, as in RFC 8290
//! section 4.1), and CoDel (RFC 8289) in each of them.

use super::limits::{Bucket, RelayLimits};
use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Bytes that wait in all lines; when full the oldest packets of the longest line go.
const HELD_MAX: usize = 2 << 20;
/// Bytes that a line may send in its turn: a few packets, which leave by one call.
const QUANTUM: usize = 6 << 10;
/// RFC 8289 section 4.2: the standing delay that is taken for good, and for how long more may be.
const TARGET: Duration = Duration::from_millis(5);
const INTERVAL: Duration = Duration::from_millis(100);
/// A line with less has no standing queue (RFC 8289 section 4.2).
const LEAST: usize = 1514;

struct Batch {
    to: SocketAddr,
    bytes: Vec<u8>,
    /// Sent or dropped already.
    start: usize,
    segment: usize,
    at: Instant,
}

/// RFC 8289 section 5.
#[derive(Default)]
struct Codel {
    above_until: Option<Instant>,
    drop_next: Option<Instant>,
    count: u32,
    last_count: u32,
}

#[derive(Default)]
struct Line {
    batches: VecDeque<Batch>,
    bytes: usize,
    deficit: usize,
    codel: Codel,
}

/// Packets that were dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) full: u64,
    pub(super) late: u64,
}

pub(super) struct Queue {
    lines: HashMap<u32, Line>,
    /// The flows that have something, in the order of their turns.
    turns: VecDeque<u32>,
    held: usize,
    limits: RelayLimits,
    sent: Option<Bucket>,
    pub(super) dropped: Dropped,
}

impl Codel {
    /// Whether the packet that waited since `at` is to be dropped; `bytes` are in its line.
    fn drops(&mut self, now: Instant, at: Instant, bytes: usize) -> bool {
        let late = now.saturating_duration_since(at) >= TARGET && bytes > LEAST;
        if !late {
            self.above_until = None;
            self.drop_next = None;
            return false;
        }
        let standing = now >= *self.above_until.get_or_insert(now + INTERVAL);
        if !standing {
            return false;
        }
        match self.drop_next {
            None => {
                // Where it began again soon, it goes on with the rate that it had.
                let delta = self.count.saturating_sub(self.last_count);
                self.count = if delta > 1 { delta } else { 1 };
                self.last_count = self.count;
            }
            Some(next) if now < next => return false,
            Some(_) => self.count += 1,
        }
        let gap = INTERVAL.div_f64(f64::from(self.count).sqrt());
        self.drop_next = Some(self.drop_next.map_or(now, |next| next.max(now)) + gap);
        true
    }
}

impl Line {
    /// The first packet goes; its bytes.
    fn shift(&mut self) -> usize {
        let Some(batch) = self.batches.front_mut() else { return 0 };
        let len = batch.segment.min(batch.bytes.len() - batch.start);
        batch.start += len;
        if batch.start >= batch.bytes.len() {
            self.batches.pop_front();
        }
        self.bytes -= len;
        len
    }
}

impl Queue {
    pub(super) fn new(limits: RelayLimits, now: Instant) -> Self {
        Self {
            lines: HashMap::new(),
            turns: VecDeque::new(),
            held: 0,
            limits,
            sent: limits.all.map(|rate| Bucket::new(rate, now)),
            dropped: Dropped::default(),
        }
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.held
    }

    /// Whether so many bytes may leave without waiting.
    pub(super) fn open(&mut self, now: Instant, bytes: usize) -> bool {
        self.held == 0 && self.spend(now, bytes)
    }

    fn spend(&mut self, now: Instant, bytes: usize) -> bool {
        match (&mut self.sent, self.limits.all) {
            (Some(bucket), Some(rate)) => bucket.take(now, rate, bytes as u64),
            _ => true,
        }
    }

    /// Packets of `segment` bytes (the last may be shorter) to one address wait for their flow's turn.
    pub(super) fn push(&mut self, now: Instant, flow: u32, to: SocketAddr, batch: &[u8], segment: usize) {
        let line = self.lines.entry(flow).or_default();
        if line.batches.is_empty() {
            line.deficit = QUANTUM;
            self.turns.push_back(flow);
        }
        line.batches.push_back(Batch { to, bytes: batch.to_vec(), start: 0, segment: segment.max(1), at: now });
        line.bytes += batch.len();
        self.held += batch.len();
        while self.held > HELD_MAX {
            let Some(longest) = self.lines.iter().max_by_key(|(_, l)| l.bytes).map(|(flow, _)| *flow) else { return };
            let Some(line) = self.lines.get_mut(&longest) else { return };
            // Some more at once: the next ones need not look for the longest again.
            for _ in 0..32 {
                let len = line.shift();
                self.held -= len;
                self.dropped.full += u64::from(len > 0);
            }
            self.forget_if_empty(longest);
        }
    }

    fn forget_if_empty(&mut self, flow: u32) {
        if self.lines.get(&flow).is_some_and(|l| l.batches.is_empty()) {
            self.lines.remove(&flow);
            self.turns.retain(|f| *f != flow);
        }
    }

    /// The next packets in `buf`, to one address; None where nothing waits or may be sent now.
    pub(super) fn pop(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<(SocketAddr, Option<usize>)> {
        loop {
            let flow = *self.turns.front()?;
            let line = self.lines.get_mut(&flow)?;
            if let Some(batch) = line.batches.front()
                && line.codel.drops(now, batch.at, line.bytes)
            {
                self.held -= line.shift();
                self.dropped.late += 1;
                self.forget_if_empty(flow);
                continue;
            }
            let Some(batch) = line.batches.front() else {
                self.forget_if_empty(flow);
                continue;
            };
            let left = batch.bytes.len() - batch.start;
            let whole = line.deficit.min(left) / batch.segment * batch.segment;
            let len = if line.deficit >= left { left } else { whole };
            if len == 0 {
                line.deficit += QUANTUM;
                self.turns.rotate_left(1);
                continue;
            }
            let (to, segment) = (batch.to, batch.segment);
            if !self.spend(now, len) {
                return None;
            }
            let line = self.lines.get_mut(&flow)?;
            let batch = line.batches.front_mut()?;
            buf.clear();
            buf.extend_from_slice(&batch.bytes[batch.start..batch.start + len]);
            batch.start += len;
            if batch.start >= batch.bytes.len() {
                line.batches.pop_front();
            }
            (line.bytes, line.deficit) = (line.bytes - len, line.deficit - len);
            self.held -= len;
            self.forget_if_empty(flow);
            return Some((to, (len > segment).then_some(segment)));
        }
    }

    /// When `pop` is next of use, where something waits.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let (bucket, rate) = (self.sent.as_ref()?, self.limits.all?);
        (self.held > 0).then(|| bucket.ready(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::limits::Rate, *};

    const MS: Duration = Duration::from_millis(1);

    fn to(port: u16) -> SocketAddr {
        ([1, 2, 3, 4], port).into()
    }

    fn shaped(mbit: u64) -> (Queue, Instant) {
        let (now, rate) = (Instant::now(), Rate { each_second: mbit * 125_000, burst: mbit * 250 });
        (Queue::new(RelayLimits { all: Some(rate), node: None }, now), now)
    }

    /// Each flow offers so many packets of its size each ms for so long; the bytes that came out, and the worst wait
    /// of the last half.
    fn run(queue: &mut Queue, start: Instant, flows: &[(usize, usize)], ms: u32) -> (Vec<usize>, Duration) {
        let (mut out, mut worst, mut buf) = (vec![0; flows.len()], Duration::ZERO, Vec::new());
        for tick in 0..ms {
            let now = start + MS * tick;
            for (flow, (packets, size)) in flows.iter().enumerate() {
                let mut batch = vec![0; packets * size];
                batch.chunks_mut((*size).max(8)).for_each(|p| p[..4].copy_from_slice(&tick.to_be_bytes()));
                if !batch.is_empty() {
                    queue.push(now, flow as u32 + 1, to(flow as u16), &batch, *size);
                }
            }
            while let Some((to, segment)) = queue.pop(now, &mut buf) {
                out[to.port() as usize] += buf.len();
                assert!(buf.len() <= QUANTUM * 2, "{}", buf.len());
                for packet in buf.chunks(segment.unwrap_or(buf.len())) {
                    let sent = u32::from_be_bytes(packet[..4].try_into().unwrap());
                    worst = worst.max(if tick > ms / 2 { MS * (tick - sent) } else { Duration::ZERO });
                }
            }
        }
        (out, worst)
    }

    #[test]
    fn flows_that_want_more_than_there_is_share_it_whatever_their_packets() {
        let (mut queue, start) = shaped(100);
        let (out, _) = run(&mut queue, start, &[(30, 1200), (30, 200), (12, 1400)], 2000);
        let total: usize = out.iter().sum();
        assert!((24_500_000..=25_100_000).contains(&total), "{total}");
        // The second one offers 48 Mbit/s.
        assert!(out.iter().all(|n| n * 3 > total * 9 / 10 && n * 3 < total * 11 / 10), "{out:?}");
    }

    #[test]
    fn a_thin_flow_waits_for_nobody() {
        let (mut queue, start) = shaped(100);
        let (now, mut buf) = (start + MS, Vec::new());
        queue.push(start, 1, to(1), &vec![0; 64_000], 1280);
        queue.pop(start, &mut buf).unwrap();
        queue.push(now, 2, to(2), &[0; 100], 100);
        let order: Vec<u16> = (0..3).filter_map(|n| Some(queue.pop(start + MS * 2 * n, &mut buf)?.0.port())).collect();
        assert!(order.contains(&2), "{order:?}");
    }

    #[test]
    fn a_standing_queue_is_dropped_from_until_it_stands_no_more() {
        let (mut queue, start) = shaped(18);
        // 7 % more than goes through: CoDel's rate of drops comes up to it in time.
        let (out, worst) = run(&mut queue, start, &[(2, 1200)], 20_000);
        assert!(out[0] > 18 * 125_000 * 19, "{out:?}");
        assert!(queue.dropped.late > 100 && queue.dropped.full == 0, "{:?}", queue.dropped);
        assert!(worst < MS * 300, "{worst:?}");
    }

    #[test]
    fn a_burst_that_drains_in_time_loses_nothing() {
        let (mut queue, start) = shaped(100);
        let mut buf = Vec::new();
        queue.push(start, 1, to(1), &vec![0; 600_000], 1200);
        let (mut tick, mut got) = (0, 0);
        while queue.len() > 0 {
            while queue.pop(start + MS * tick, &mut buf).is_some() {
                got += buf.len();
            }
            tick += 1;
        }
        assert_eq!((got, queue.dropped), (600_000, Dropped::default()));
    }

    #[test]
    fn a_full_queue_drops_the_oldest_of_the_longest_line() {
        let (mut queue, now) = shaped(1);
        queue.push(now, 1, to(1), &[1; 1000], 1000);
        for _ in 0..60 {
            queue.push(now, 2, to(2), &vec![2; 60_000], 1200);
            assert!(queue.len() <= HELD_MAX);
        }
        assert!(queue.dropped.full >= 60 * 50 - HELD_MAX as u64 / 1200, "{:?}", queue.dropped);
        assert!(queue.lines[&1].bytes == 1000 && queue.turns.len() == 2);
    }
}
