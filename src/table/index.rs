//! A reverse index of counted pairs (key, slot). Keys are 32 bits and the pairs stand in sorted runs, so that 20,000
//! endpoints cost 200 kB and not a megabyte: distinct addresses or names may share a key, and the reader checks what it
//! finds.

use super::model::Protocol;
use siphasher::sip::SipHasher13;
use std::{
    hash::{Hash, Hasher},
    net::IpAddr,
};

/// Pairs of a run; a longer one is cut in two.
const RUN_MAX: usize = 512;

type Pair = (u32, u32);

#[derive(Debug, Default)]
pub(super) struct Index {
    /// Each sorted, and all of them in order; none is empty. A pair stands as often as it was added.
    runs: Vec<Vec<Pair>>,
    distinct: usize,
}

impl Index {
    /// The run and the place in it where a pair is, or would be: before all that are not less.
    fn place(&self, pair: Pair) -> (usize, usize) {
        let run = self.runs.partition_point(|run| run.last().is_some_and(|last| *last < pair));
        (run, self.runs.get(run).map_or(0, |run| run.partition_point(|p| *p < pair)))
    }

    /// All pairs that are not less.
    fn from(&self, pair: Pair) -> impl Iterator<Item = Pair> + '_ {
        let (run, at) = self.place(pair);
        let first = self.runs.get(run).map_or(&[][..], |run| &run[at..]);
        first.iter().chain(self.runs.iter().skip(run + 1).flatten()).copied()
    }

    fn has(&self, pair: Pair) -> bool {
        self.from(pair).next() == Some(pair)
    }

    pub(super) fn add(&mut self, key: u32, slot: u32) {
        let pair = (key, slot);
        self.distinct += usize::from(!self.has(pair));
        let (at_run, at) = self.place(pair);
        if at_run == self.runs.len() {
            match self.runs.last_mut() {
                Some(last) => last.push(pair),
                None => self.runs.push(vec![pair]),
            }
        } else {
            self.runs[at_run].insert(at, pair);
        }
        let at_run = at_run.min(self.runs.len() - 1);
        let run = &mut self.runs[at_run];
        if run.len() > RUN_MAX {
            let rest = run.split_off(RUN_MAX / 2);
            run.shrink_to_fit();
            self.runs.insert(at_run + 1, rest);
        }
    }

    pub(super) fn remove(&mut self, key: u32, slot: u32) {
        let pair = (key, slot);
        let (at_run, at) = self.place(pair);
        let Some(run) = self.runs.get_mut(at_run).filter(|run| run.get(at) == Some(&pair)) else { return };
        run.remove(at);
        if run.is_empty() {
            self.runs.remove(at_run);
        }
        self.distinct -= usize::from(!self.has(pair));
    }

    /// How often the pair was added and not removed.
    pub(super) fn count(&self, key: u32, slot: u32) -> usize {
        self.from((key, slot)).take_while(|pair| *pair == (key, slot)).count()
    }

    /// Each once.
    pub(super) fn slots(&self, key: u32) -> impl Iterator<Item = u32> + '_ {
        let mut last = None;
        let of_key = self.from((key, 0)).take_while(move |(of, _)| *of == key).map(|(_, slot)| slot);
        of_key.filter(move |slot| last.replace(*slot) != Some(*slot))
    }

    /// Distinct pairs.
    pub(super) fn len(&self) -> usize {
        self.distinct
    }
}

/// An IPv4 address is its own key.
pub(super) fn of_address(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => v4.to_bits(),
        IpAddr::V6(v6) => hash(&v6.octets()),
    }
}

/// In 0.0.0.0/8, which is nobody's address.
pub(super) fn of_node_port(number: u16, protocol: Protocol) -> u32 {
    (protocol as u32) << 16 | u32::from(number)
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

    #[test]
    fn runs_are_what_a_sorted_list_would_be() {
        for seed in crate::seeds(20) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut index, mut model) = (Index::default(), Vec::new());
            // Ascending, as lists are, or in any order; growing at first.
            let ascending = rng.bool();
            for step in 0..4_000_u32 {
                let pair = if ascending { (step / 3, rng.u32(..2)) } else { (rng.u32(..900), rng.u32(..3)) };
                if step < 2_000 || rng.bool() {
                    index.add(pair.0, pair.1);
                    model.push(pair);
                } else {
                    let pair =
                        if rng.u8(..4) > 0 && !model.is_empty() { model[rng.usize(..model.len())] } else { pair };
                    index.remove(pair.0, pair.1);
                    if let Some(at) = model.iter().position(|p| *p == pair) {
                        model.swap_remove(at);
                    }
                }
            }
            model.sort_unstable();
            assert_eq!(index.runs.concat(), model, "seed {seed}");
            assert!(index.runs.iter().all(|run| !run.is_empty() && run.len() <= RUN_MAX), "seed {seed}");
            let key = model[model.len() / 2].0;
            let mut slots: Vec<u32> = model.iter().filter(|p| p.0 == key).map(|p| p.1).collect();
            assert_eq!(index.count(key, slots[0]), slots.iter().filter(|s| **s == slots[0]).count(), "seed {seed}");
            slots.dedup();
            assert_eq!(index.slots(key).collect::<Vec<_>>(), slots, "seed {seed}");
            model.dedup();
            assert_eq!(index.len(), model.len(), "seed {seed}");
            model.iter().for_each(|(key, slot)| (0..9).for_each(|_| index.remove(*key, *slot)));
            assert!(index.runs.is_empty() && index.len() == 0, "seed {seed}");
        }
    }
}
