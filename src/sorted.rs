//! Map and set over a sorted vector, with the part of BTreeMap's interface that is used here. An insertion moves what
//! lies behind it: for hundreds of entries, or thousands that come in order. Of BTreeMap each pair of types costs up to
//! 5 kB of the executable, and of these a tenth.

use std::{borrow::Borrow, fmt};

/// Keys are unique and ascend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Map<K, V>(Vec<(K, V)>);

impl<K, V> Default for Map<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Map<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K, V> Map<K, V> {
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> + ExactSizeIterator + Clone {
        self.0.iter().map(|(k, v)| (k, v))
    }

    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = (&K, &mut V)> {
        self.0.iter_mut().map(|(k, v)| (&*k, v))
    }

    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + ExactSizeIterator + Clone {
        self.0.iter().map(|(k, _)| k)
    }

    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> + ExactSizeIterator + Clone {
        self.0.iter().map(|(_, v)| v)
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.0.iter_mut().map(|(_, v)| v)
    }

    pub fn into_values(self) -> impl Iterator<Item = V> {
        self.0.into_iter().map(|(_, v)| v)
    }

    pub fn pop_first(&mut self) -> Option<(K, V)> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.0.retain_mut(|(k, v)| keep(k, v));
    }
}

impl<K: Ord, V> Map<K, V> {
    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> Result<usize, usize>
    where
        K: Borrow<Q>,
    {
        self.0.binary_search_by(|(k, _)| k.borrow().cmp(key))
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.find(key).ok().map(|at| &self.0[at].1)
    }

    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.find(key).ok().map(|at| &mut self.0[at].1)
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.find(key).is_ok()
    }

    /// What was there under an equal key.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self.find(&key) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at].1, value)),
            Err(at) => {
                self.0.insert(at, (key, value));
                None
            }
        }
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.find(key).ok().map(|at| self.0.remove(at).1)
    }

    /// Takes out those from this key on.
    pub fn split_off<Q: Ord + ?Sized>(&mut self, key: &Q) -> Self
    where
        K: Borrow<Q>,
    {
        let at = self.find(key).unwrap_or_else(|at| at);
        Self(self.0.split_off(at))
    }

    pub fn or_insert_with(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        let at = self.find(&key).unwrap_or_else(|at| {
            self.0.insert(at, (key, value()));
            at
        });
        &mut self.0[at].1
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for Map<K, V> {
    /// Of equal keys the last one's value stays.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(items: I) -> Self {
        let mut all: Vec<(K, V)> = items.into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        Self(all)
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for Map<K, V> {
    fn from(items: [(K, V); N]) -> Self {
        items.into_iter().collect()
    }
}

impl<K: Ord, V> Extend<(K, V)> for Map<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, items: I) {
        for (key, value) in items {
            self.insert(key, value);
        }
    }
}

impl<K, V> IntoIterator for Map<K, V> {
    type Item = (K, V);
    type IntoIter = std::vec::IntoIter<(K, V)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'m, K, V> IntoIterator for &'m Map<K, V> {
    type Item = (&'m K, &'m V);
    type IntoIter = std::iter::Map<std::slice::Iter<'m, (K, V)>, fn(&'m (K, V)) -> (&'m K, &'m V)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().map(|(k, v)| (k, v))
    }
}

/// For tests alone: the product asks with `get`.
#[cfg(test)]
impl<K: Ord + Borrow<Q>, Q: Ord + ?Sized, V> std::ops::Index<&Q> for Map<K, V> {
    type Output = V;

    /// # Panics
    /// Where there is none.
    fn index(&self, key: &Q) -> &V {
        match self.find(key) {
            Ok(at) | Err(at) => &self.0[at].1,
        }
    }
}

/// Items are unique and ascend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Set<T>(Vec<T>);

impl<T> Default for Set<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: fmt::Debug> fmt::Debug for Set<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.0).finish()
    }
}

impl<T> Set<T> {
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }

    pub fn first(&self) -> Option<&T> {
        self.0.first()
    }
}

impl<T: Ord> Set<T> {
    pub fn contains<Q: Ord + ?Sized>(&self, item: &Q) -> bool
    where
        T: Borrow<Q>,
    {
        self.0.binary_search_by(|t| t.borrow().cmp(item)).is_ok()
    }

    /// False: an equal one is there already.
    pub fn insert(&mut self, item: T) -> bool {
        let found = self.0.binary_search(&item);
        if let Err(at) = found {
            self.0.insert(at, item);
        }
        found.is_err()
    }

    /// Whether it was there.
    pub fn remove<Q: Ord + ?Sized>(&mut self, item: &Q) -> bool
    where
        T: Borrow<Q>,
    {
        let found = self.0.binary_search_by(|t| t.borrow().cmp(item));
        if let Ok(at) = found {
            self.0.remove(at);
        }
        found.is_ok()
    }

    /// Those that `other` has not.
    pub fn difference(&self, other: &Self) -> impl Iterator<Item = &T> {
        self.0.iter().filter(|item| !other.contains(*item))
    }
}

impl<T: Ord> FromIterator<T> for Set<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut all: Vec<T> = items.into_iter().collect();
        all.sort();
        all.dedup();
        Self(all)
    }
}

impl<T: Ord, const N: usize> From<[T; N]> for Set<T> {
    fn from(items: [T; N]) -> Self {
        items.into_iter().collect()
    }
}

impl<T: Ord> Extend<T> for Set<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        for item in items {
            self.insert(item);
        }
    }
}

impl<T> IntoIterator for Set<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'s, T> IntoIterator for &'s Set<T> {
    type Item = &'s T;
    type IntoIter = std::slice::Iter<'s, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// Whatever is done to it, std's map says the same.
    #[test]
    fn a_map_is_as_stds() {
        for seed in crate::seeds(100) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut ours, mut stds) = (Map::new(), BTreeMap::new());
            for step in 0..300 {
                let key = rng.u8(..40);
                match rng.u8(..9) {
                    0..=2 => assert_eq!(ours.insert(key, step), stds.insert(key, step), "seed {seed}"),
                    3 => assert_eq!(ours.remove(&key), stds.remove(&key), "seed {seed}"),
                    4 => {
                        assert_eq!(
                            ours.or_insert_with(key, || step),
                            stds.entry(key).or_insert_with(|| step),
                            "seed {seed}"
                        );
                    }
                    5 => assert_eq!(ours.pop_first(), stds.pop_first(), "seed {seed}"),
                    6 => {
                        assert!(ours.split_off(&key).into_iter().eq(stds.split_off(&key)), "seed {seed}");
                    }
                    7 => {
                        ours.retain(|k, _| k % 7 != key % 7);
                        stds.retain(|k, _| k % 7 != key % 7);
                    }
                    _ => {
                        let more = [(key, step), (rng.u8(..40), step), (key, step + 1)];
                        ours.extend(more);
                        stds.extend(more);
                    }
                }
                assert!(ours.iter().eq(&stds) && ours.len() == stds.len(), "seed {seed}: {ours:?}, {stds:?}");
                assert_eq!(ours.get(&key), stds.get(&key), "seed {seed}");
                assert_eq!(ours.contains_key(&key), stds.contains_key(&key), "seed {seed}");
            }
            let pairs: Vec<(u8, u32)> = (0..60).map(|i| (rng.u8(..40), i)).collect();
            let (ours, stds): (Map<_, _>, BTreeMap<_, _>) =
                (pairs.iter().copied().collect(), pairs.iter().copied().collect());
            assert!(ours.into_iter().eq(stds), "seed {seed}: of equal keys the last one's value stays");
        }
    }

    #[test]
    fn a_set_is_as_stds() {
        for seed in crate::seeds(100) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut ours, mut stds) = (Set::new(), BTreeSet::new());
            for _ in 0..300 {
                let item = rng.u8(..40);
                if rng.bool() {
                    assert_eq!(ours.insert(item), stds.insert(item), "seed {seed}");
                } else {
                    assert_eq!(ours.remove(&item), stds.remove(&item), "seed {seed}");
                }
                assert_eq!(ours.contains(&item), stds.contains(&item), "seed {seed}");
                assert!(ours.iter().eq(&stds) && ours.len() == stds.len(), "seed {seed}: {ours:?}, {stds:?}");
            }
            let other: Vec<u8> = std::iter::repeat_with(|| rng.u8(..40)).take(30).collect();
            let (a, b): (Set<u8>, BTreeSet<u8>) = (other.iter().copied().collect(), other.into_iter().collect());
            assert!(ours.difference(&a).eq(stds.difference(&b)), "seed {seed}");
        }
    }
}
