//! A reverse index of counted pairs (key, slot). Keys are 32 bits, so that 20,000 endpoints cost some 400 kB and not a
//! megabyte: distinct addresses or names may share a key, and the reader checks what it finds.

use siphasher::sip::SipHasher13;
use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::IpAddr,
};

#[derive(Debug, Default)]
pub(super) struct Index(BTreeMap<(u32, u32), u32>);

impl Index {
    pub(super) fn add(&mut self, key: u32, slot: u32) {
        *self.0.entry((key, slot)).or_default() += 1;
    }

    pub(super) fn remove(&mut self, key: u32, slot: u32) {
        let Some(count) = self.0.get_mut(&(key, slot)) else { return };
        *count -= 1;
        if *count == 0 {
            self.0.remove(&(key, slot));
        }
    }

    /// How often the pair was added and not removed.
    pub(super) fn count(&self, key: u32, slot: u32) -> u32 {
        self.0.get(&(key, slot)).copied().unwrap_or(0)
    }

    pub(super) fn slots(&self, key: u32) -> impl Iterator<Item = u32> + '_ {
        self.0.range((key, 0)..=(key, u32::MAX)).map(|((_, slot), _)| *slot)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// An IPv4 address is its own key.
pub(super) fn of_address(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => v4.to_bits(),
        IpAddr::V6(v6) => hash(&v6.octets()),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "any 32 bits of the hash are as good as any others")]
pub(super) fn hash(value: &impl Hash) -> u32 {
    let mut hasher = SipHasher13::new();
    value.hash(&mut hasher);
    hasher.finish() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted() {
        let mut index = Index::default();
        let key = of_address("10.0.0.1".parse().unwrap());
        index.add(key, 7);
        index.add(key, 7);
        index.add(key, 9);
        index.remove(key, 7);
        index.remove(key, 8);
        assert_eq!(index.slots(key).collect::<Vec<_>>(), [7, 9]);
        assert_eq!((index.count(key, 7), index.count(key, 8)), (1, 0));
        index.remove(key, 7);
        index.remove(key, 9);
        assert_eq!(index.len(), 0);
    }
}
