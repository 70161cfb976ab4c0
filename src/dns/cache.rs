//! Answers of upstreams, kept for their TTL, and beyond it for when nobody answers (RFC 8767).

use super::wire::{Header, flag};
use lru::LruCache;
use std::{
    rc::Rc,
    time::{Duration, Instant},
};

/// RFC 8767 section 5: a stale answer is given for one to three days.
const STALE_MAX: Duration = Duration::from_secs(86_400);
/// RFC 8767 section 4: no TTL above 604,800 s is believed; a day is enough for an edge.
pub const TTL_MAX: u32 = 86_400;
/// A larger answer is not kept.
const MESSAGE_MAX: usize = 4096;
/// Bytes for each entry that the user allows, on average; the least recently used go when they are used up.
const BYTES_PER_ENTRY: usize = 512;
/// What an entry costs beside key and message (the table's slot, two allocations).
const OVERHEAD: usize = 128;
/// An answer that was given this often and is in the last tenth of its life is asked for anew…
const HOT: u8 = 3;
/// …unless it lives for less than this: that would be asking without end.
const PREFETCH_MIN: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Entry {
    /// None: only a failure is known.
    message: Option<Rc<[u8]>>,
    stored: Instant,
    lifetime: Duration,
    /// How often it was given while it was fresh.
    given: u8,
    failed: Option<(Instant, u16)>,
}

/// What is known of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hit {
    Fresh {
        message: Rc<[u8]>,
        age: u32,
        /// It is asked often and is about to be stale.
        ends: bool,
    },
    /// Older than its TTL. `failing`: the upstreams have just been asked in vain.
    Stale { message: Rc<[u8]>, failing: bool },
    /// Nothing but that the upstreams have just failed.
    Failed(u16),
}

/// Bounded in entries and in bytes; the least recently used go first.
#[derive(Debug)]
pub struct Cache {
    entries: LruCache<Box<[u8]>, Entry>,
    capacity: usize,
    bytes: usize,
    cap: u32,
}

impl Cache {
    /// `capacity` in entries, 0: nothing is kept; `cap` in seconds bounds every TTL.
    #[must_use]
    pub fn new(capacity: usize, cap: u32) -> Self {
        Self { entries: LruCache::unbounded(), capacity, bytes: 0, cap }
    }

    #[must_use]
    pub fn cap(&self) -> u32 {
        self.cap
    }

    pub fn get(&mut self, now: Instant, key: &[u8]) -> Option<Hit> {
        let entry = self.entries.get_mut(key)?;
        let age = now.saturating_duration_since(entry.stored);
        let failing = entry.failed.filter(|(until, _)| now < *until);
        match (&entry.message, failing) {
            (Some(message), _) if age < entry.lifetime => {
                entry.given = entry.given.saturating_add(1);
                let ends = entry.given > HOT
                    && failing.is_none()
                    && entry.lifetime >= PREFETCH_MIN
                    && age >= entry.lifetime - entry.lifetime / 10;
                Some(Hit::Fresh { message: Rc::clone(message), age: age.as_secs() as u32, ends })
            }
            (Some(message), _) if age < entry.lifetime + STALE_MAX => {
                Some(Hit::Stale { message: Rc::clone(message), failing: failing.is_some() })
            }
            (_, Some((_, code))) => Some(Hit::Failed(code)),
            (_, None) => None,
        }
    }

    pub fn put(&mut self, now: Instant, key: &[u8], message: Rc<[u8]>, seconds: u32) {
        if message.len() > MESSAGE_MAX {
            return;
        }
        let lifetime = Duration::from_secs(seconds.min(self.cap).into());
        self.insert(key, Entry { message: Some(message), stored: now, lifetime, given: 0, failed: None });
    }

    /// Notes that a question was asked in vain; a stale answer stays.
    pub fn fail(&mut self, now: Instant, key: &[u8], code: u16, lasting: Duration) {
        let failed = Some((now + lasting, code));
        match self.entries.get_mut(key) {
            Some(entry) => entry.failed = failed,
            None => self.insert(key, Entry { message: None, stored: now, lifetime: Duration::ZERO, given: 0, failed }),
        }
    }

    /// Drops what says that something is not there, and that the upstreams have failed.
    pub fn forget_negative(&mut self) {
        let negative = |e: &Entry| e.message.as_ref().is_none_or(|m| is_negative(m));
        let gone: Vec<Box<[u8]>> =
            self.entries.iter().filter(|(_, e)| negative(e)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(old) = self.entries.pop(&key) {
                self.bytes -= size(&key, &old);
            }
        }
        self.entries.iter_mut().for_each(|(_, e)| e.failed = None);
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn insert(&mut self, key: &[u8], entry: Entry) {
        if self.capacity == 0 {
            return;
        }
        self.bytes += size(key, &entry);
        if let Some((key, old)) = self.entries.push(key.into(), entry) {
            self.bytes -= size(&key, &old);
        }
        while self.entries.len() > self.capacity || self.bytes > self.capacity.saturating_mul(BYTES_PER_ENTRY) {
            let Some((key, old)) = self.entries.pop_lru() else { break };
            self.bytes -= size(&key, &old);
        }
    }
}

/// NXDOMAIN, or no answer at all.
fn is_negative(message: &[u8]) -> bool {
    Header::parse(message).is_none_or(|h| h.flags & flag::RCODE != 0 || h.counts[1] == 0)
}

fn size(key: &[u8], entry: &Entry) -> usize {
    OVERHEAD + key.len() + entry.message.as_ref().map_or(0, |m| m.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[test]
    fn fresh_then_stale_then_gone() {
        let now = Clock::new(0).now();
        let at = |s| now + Duration::from_secs(s);
        let mut cache = Cache::new(4, 100);
        let message: Rc<[u8]> = Rc::from(&b"x"[..]);
        cache.put(now, b"k", Rc::clone(&message), 1000);
        assert_eq!(
            cache.get(at(99), b"k"),
            Some(Hit::Fresh { message: Rc::clone(&message), age: 99, ends: false }),
            "capped"
        );
        assert_eq!(cache.get(at(100), b"k"), Some(Hit::Stale { message: Rc::clone(&message), failing: false }));
        cache.fail(at(101), b"k", 2, Duration::from_secs(5));
        assert_eq!(cache.get(at(105), b"k"), Some(Hit::Stale { message: Rc::clone(&message), failing: true }));
        assert_eq!(cache.get(at(106), b"k"), Some(Hit::Stale { message, failing: false }));
        assert_eq!(cache.get(at(100 + 86_400), b"k"), None);
    }

    #[test]
    fn a_failure_is_known_for_a_while() {
        let now = Clock::new(0).now();
        let mut cache = Cache::new(4, 100);
        cache.fail(now, b"k", 2, Duration::from_secs(5));
        assert_eq!(cache.get(now, b"k"), Some(Hit::Failed(2)));
        assert_eq!(cache.get(now + Duration::from_secs(5), b"k"), None);
    }

    #[test]
    fn what_is_asked_often_is_asked_for_anew_before_it_ends() {
        let now = Clock::new(0).now();
        let at = |s| now + Duration::from_secs(s);
        let mut cache = Cache::new(4, 100);
        let ends = |cache: &mut Cache, s, key: &[u8]| match cache.get(at(s), key) {
            Some(Hit::Fresh { ends, .. }) => ends,
            other => panic!("{other:?}"),
        };
        cache.put(now, b"hot", Rc::from(&b"x"[..]), 100);
        cache.put(now, b"cold", Rc::from(&b"x"[..]), 100);
        cache.put(now, b"short", Rc::from(&b"x"[..]), 9);
        for _ in 0..HOT {
            assert!(!ends(&mut cache, 80, b"hot") && !ends(&mut cache, 8, b"short"));
        }
        assert!(!ends(&mut cache, 89, b"hot") && ends(&mut cache, 90, b"hot"));
        assert!(!ends(&mut cache, 95, b"cold") && !ends(&mut cache, 8, b"short"));
        cache.fail(at(90), b"hot", 2, Duration::from_secs(5));
        assert!(!ends(&mut cache, 91, b"hot") && ends(&mut cache, 95, b"hot"), "after a failure not at once");
    }

    #[test]
    fn negative_answers_and_failures_are_forgotten_and_nothing_else() {
        let now = Clock::new(0).now();
        let mut cache = Cache::new(8, 100);
        let message = |code: u8, answers: u8| Rc::from([0, 1, 0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
        cache.put(now, b"good", message(0, 1), 60);
        cache.put(now, b"nodata", message(0, 0), 60);
        cache.put(now, b"nxdomain", message(3, 0), 60);
        cache.put(now, b"cname to nowhere", message(3, 1), 60);
        cache.fail(now, b"failed", 2, Duration::from_secs(5));
        cache.fail(now, b"good", 2, Duration::from_secs(5));
        cache.forget_negative();
        assert_eq!(cache.len(), 1);
        let stale = cache.get(now + Duration::from_secs(60), b"good");
        assert!(matches!(stale, Some(Hit::Stale { failing: false, .. })), "{stale:?}");
        let real: usize = cache.entries.iter().map(|(k, e)| size(k, e)).sum();
        assert_eq!(real, cache.bytes);
    }

    #[test]
    fn bounded_in_entries_and_bytes() {
        let now = Clock::new(0).now();
        let mut cache = Cache::new(8, 100);
        let mut rng = fastrand::Rng::with_seed(7);
        for i in 0..1000_u32 {
            let message: Rc<[u8]> = vec![0; rng.usize(..3000)].into();
            cache.put(now, &rng.u32(..20).to_be_bytes(), message, 60);
            let real: usize = cache.entries.iter().map(|(k, e)| size(k, e)).sum();
            assert!(cache.len() <= 8 && real <= 8 * BYTES_PER_ENTRY && real == cache.bytes, "step {i}");
        }
        cache.put(now, b"big", vec![0; MESSAGE_MAX + 1].into(), 60);
        assert_eq!(cache.get(now, b"big"), None);
        let mut none = Cache::new(0, 100);
        none.put(now, b"k", vec![0].into(), 60);
        assert!(none.is_empty());
    }
}
