//! Large datagrams that come in pieces, each datagram by a stream of its own: its pieces are put together in any order, so
//! that one that waits for a lost packet holds up no other.
//!
//! Such a stream is `17 | session u32 | datagram`, up to its end.

use crate::sorted::Map;
use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

/// In front of a datagram.
pub const HEAD: usize = 5;
/// IANA's number of UDP, as in an OPEN: streams of other kinds may come one day.
const KIND: u8 = 17;
/// RFC 768: the length field, less the headers of UDP and IPv4.
pub const DATAGRAM_MAX: usize = 65_507;
/// A datagram that takes longer is given up, at either end. Who asked by UDP has asked anew by then: resolvers do after 5 s
/// (resolv.conf(5), timeout), most others sooner.
pub const LIFETIME: Duration = Duration::from_secs(5);
/// Bytes of datagrams of one peer that are not whole, and of all peers: one that goes beyond is dropped. A peer sends no more
/// before we have acknowledged what came, see `large`.
pub const GATHERED_MAX: usize = 512 << 10;
pub const GATHERED_ALL: usize = 1 << 20;

/// Bytes that are held here, and by all.
#[derive(Debug)]
pub(super) struct Held {
    own: usize,
    all: Rc<Cell<usize>>,
}

impl Held {
    pub(super) fn new(all: &Rc<Cell<usize>>) -> Self {
        Self { own: 0, all: Rc::clone(all) }
    }

    /// False where that is more than may be held.
    pub(super) fn take(&mut self, bytes: usize, own: usize, all: usize) -> bool {
        let room = self.own + bytes <= own && self.all.get() + bytes <= all;
        if room {
            self.own += bytes;
            self.all.set(self.all.get() + bytes);
        }
        room
    }

    pub(super) fn give(&mut self, bytes: usize) {
        self.own -= bytes;
        self.all.set(self.all.get() - bytes);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.set(self.all.get() - self.own);
    }
}

/// What goes in front of a session's datagram.
#[must_use]
pub fn head(session: u32) -> [u8; HEAD] {
    let [a, b, c, d] = session.to_be_bytes();
    [KIND, a, b, c, d]
}

/// The session in a stream's first bytes.
#[must_use]
pub fn session(bytes: &[u8]) -> Option<u32> {
    match bytes {
        [KIND, a, b, c, d, ..] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
        _ => None,
    }
}

/// Why a stream is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stray {
    /// It begins with no head, is too long, or is none of those that began.
    Malformed,
    /// There is no room for more bytes.
    Full,
}

#[derive(Debug)]
struct Half {
    until: Instant,
    /// Up to the last byte that came; 0 where there is a gap.
    bytes: Vec<u8>,
}

/// One connection's streams that have not ended.
#[derive(Debug)]
pub struct Gather {
    halves: Map<u64, Half>,
    held: Held,
}

impl Gather {
    /// `all`: what is held for all connections.
    #[must_use]
    pub fn new(all: &Rc<Cell<usize>>) -> Self {
        Self { halves: Map::new(), held: Held::new(all) }
    }

    /// A stream begins. How many there are at once is the transport's bound.
    pub fn begin(&mut self, now: Instant, stream: u64) {
        self.forget(stream);
        self.halves.insert(stream, Half { until: now + LIFETIME, bytes: Vec::new() });
    }

    /// A piece of a stream; tells the session where the piece does.
    ///
    /// # Errors
    /// When the stream is to be stopped, and forgotten.
    pub fn put(&mut self, stream: u64, offset: u64, piece: &[u8]) -> Result<Option<u32>, Stray> {
        let half = self.halves.get_mut(&stream).ok_or(Stray::Malformed)?;
        let start = usize::try_from(offset).ok().filter(|at| *at <= HEAD + DATAGRAM_MAX).ok_or(Stray::Malformed)?;
        let end = start.saturating_add(piece.len());
        if end > HEAD + DATAGRAM_MAX {
            return Err(Stray::Malformed);
        }
        let more = end.saturating_sub(half.bytes.len());
        if !self.held.take(more, GATHERED_MAX, GATHERED_ALL) {
            return Err(Stray::Full);
        }
        if more > 0 {
            half.bytes.resize(end, 0);
        }
        half.bytes[start..end].copy_from_slice(piece);
        if start == 0 && end >= HEAD {
            return session(piece).ok_or(Stray::Malformed).map(Some);
        }
        Ok(None)
    }

    /// All of a stream's bytes have come: its session and datagram. None where it had no whole head.
    pub fn end(&mut self, stream: u64) -> Option<(u32, Box<[u8]>)> {
        let mut bytes = self.forget(stream)?;
        let session = session(&bytes)?;
        bytes.drain(..HEAD);
        Some((session, bytes.into()))
    }

    /// A stream comes to nothing.
    pub fn forget(&mut self, stream: u64) -> Option<Vec<u8>> {
        let bytes = self.halves.remove(&stream)?.bytes;
        self.held.give(bytes.len());
        Some(bytes)
    }

    /// When the oldest is given up.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.halves.values().next().map(|half| half.until)
    }

    /// A stream that is given up, one for each call; streams begin in the order of their numbers.
    pub fn late(&mut self, now: Instant) -> Option<u64> {
        let (stream, _) = self.halves.iter().next().filter(|(_, half)| half.until <= now)?;
        let stream = *stream;
        self.forget(stream);
        Some(stream)
    }

    /// Bytes that are held now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(session: u32, len: usize) -> Vec<u8> {
        head(session).into_iter().chain((0..len).map(|i| (i * 7 + i / 251) as u8)).collect()
    }

    #[test]
    fn pieces_of_many_streams_in_any_order_become_the_datagrams() {
        for seed in crate::seeds(50) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (all, now) = (Rc::default(), Instant::now());
            let mut gather = Gather::new(&all);
            let streams: Vec<Vec<u8>> = (0..6).map(|n| stream(n * 4, rng.usize(0..=DATAGRAM_MAX))).collect();
            let mut pieces = Vec::new();
            for (n, whole) in streams.iter().enumerate() {
                gather.begin(now, n as u64);
                let mut at = 0;
                while at < whole.len() {
                    let end = (at + rng.usize(1..3000)).min(whole.len());
                    pieces.push((n, at, end));
                    at = end;
                }
            }
            rng.shuffle(&mut pieces);
            for (n, at, end) in pieces {
                let told = gather.put(n as u64, at as u64, &streams[n][at..end]);
                assert_eq!(told, Ok((at == 0 && end >= HEAD).then_some(n as u32 * 4)), "seed {seed}");
            }
            assert_eq!((gather.held(), all.get()), (streams.iter().map(Vec::len).sum(), gather.held()));
            for (n, whole) in streams.iter().enumerate() {
                assert_eq!(gather.end(n as u64), Some((n as u32 * 4, whole[HEAD..].into())), "seed {seed}");
            }
            assert_eq!((gather.held(), all.get(), gather.poll_timeout()), (0, 0, None));
        }
    }

    #[test]
    fn what_is_no_datagram_is_refused() {
        let mut gather = Gather::new(&Rc::default());
        let now = Instant::now();
        (0..4).for_each(|n| gather.begin(now, n));
        assert_eq!(gather.put(0, 0, &[18, 0, 0, 0, 4, 1]), Err(Stray::Malformed));
        assert_eq!(gather.put(9, 0, &stream(4, 1)), Err(Stray::Malformed));
        assert_eq!(gather.put(1, 0, &stream(4, DATAGRAM_MAX + 1)), Err(Stray::Malformed));
        for offset in [u64::MAX, u64::MAX - 1, 1 << 32, (HEAD + DATAGRAM_MAX) as u64] {
            assert_eq!(gather.put(1, offset, &[1]), Err(Stray::Malformed), "{offset}");
        }
        for cut in 0..HEAD {
            gather.begin(now, 2);
            assert_eq!(gather.put(2, 0, &stream(4, 0)[..cut]), Ok(None));
            assert_eq!(gather.end(2), None, "{cut}");
        }
        assert_eq!((gather.end(7), gather.forget(7)), (None, None));
        gather.begin(now, 3);
        assert_eq!(gather.put(3, 0, &stream(4, 0)), Ok(Some(4)));
        assert_eq!(gather.end(3), Some((4, Box::default())), "an empty one is one");
    }

    #[test]
    fn a_gap_counts_as_much_as_what_fills_it() {
        let all = Rc::new(Cell::new(0));
        let (mut gather, now) = (Gather::new(&all), Instant::now());
        let last = (HEAD + DATAGRAM_MAX - 1) as u64;
        let fits = GATHERED_MAX / (HEAD + DATAGRAM_MAX);
        let refused = |gather: &mut Gather, n| {
            gather.begin(now, n);
            let full = gather.put(n, last, &[1]) == Err(Stray::Full);
            full.then(|| gather.forget(n)).is_some()
        };
        assert_eq!((0..100).position(|n| refused(&mut gather, n)), Some(fits));
        assert!(gather.held() <= GATHERED_MAX && gather.held() == all.get());
        // Others have the rest, and all when it goes.
        let mut others: Vec<Gather> = (0..4).map(|_| Gather::new(&all)).collect();
        for other in &mut others {
            while !refused(other, 100 + other.held() as u64) {}
        }
        assert!(all.get() <= GATHERED_ALL && others.iter().any(|o| o.held() == 0));
        drop(others);
        assert_eq!(all.get(), gather.held());
        drop(gather);
        assert_eq!(all.get(), 0);
    }

    #[test]
    fn what_is_late_is_given_up_in_turn() {
        let all = Rc::default();
        let (mut gather, begin) = (Gather::new(&all), Instant::now());
        for n in 0..3 {
            gather.begin(begin + Duration::from_secs(n), n);
            gather.put(n, 0, &stream(4, 1000)).unwrap();
        }
        assert_eq!(gather.poll_timeout(), Some(begin + LIFETIME));
        assert_eq!(gather.late(begin + LIFETIME - Duration::from_millis(1)), None);
        let later = begin + LIFETIME + Duration::from_secs(1);
        assert_eq!([(); 3].map(|()| gather.late(later)), [Some(0), Some(1), None]);
        assert_eq!(gather.put(1, 1005, &[1]), Err(Stray::Malformed));
        assert_eq!((gather.held(), all.get()), (1005, 1005));
    }
}
