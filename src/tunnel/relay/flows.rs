//! Flows: numbers that stand for a pair of nodes.

use super::{limits::FLOWS_EACH, members::Id};
use lru::LruCache;
use std::{collections::HashMap, num::NonZeroUsize};

/// When full the longest unused one goes; its ends are told when they use it, and ask for a new one.
const FLOWS_MAX: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

pub(super) struct Flows {
    ends: LruCache<u32, [Id; 2]>,
    by_pair: HashMap<[Id; 2], u32>,
    /// How many flows each node has.
    held: HashMap<Id, u16>,
}

impl Flows {
    pub(super) fn new() -> Self {
        Self { ends: LruCache::unbounded(), by_pair: HashMap::new(), held: HashMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The ends of a flow that is being used.
    pub(super) fn ends(&mut self, flow: u32) -> Option<[Id; 2]> {
        self.ends.get(&flow).copied()
    }

    /// The other end of a flow of this node.
    pub(super) fn far(&self, flow: u32, near: Id) -> Option<Id> {
        match *self.ends.peek(&flow)? {
            [a, b] if a == near => Some(b),
            [a, b] if b == near => Some(a),
            [_, _] => None,
        }
    }

    /// The flow between two nodes, a new one if need be, for which `a` asks.
    pub(super) fn between(&mut self, a: Id, b: Id, rng: &mut fastrand::Rng) -> u32 {
        let pair = [a.min(b), a.max(b)];
        if let Some(flow) = self.by_pair.get(&pair).copied() {
            self.ends.promote(&flow);
            return flow;
        }
        if self.held.get(&a).is_some_and(|held| *held >= FLOWS_EACH) {
            let oldest = self.ends.iter().rev().find(|(_, ends)| ends.contains(&a)).map(|(flow, _)| *flow);
            oldest.into_iter().for_each(|flow| self.remove(flow));
        }
        let flow = loop {
            let flow = rng.u32(1..);
            if !self.ends.contains(&flow) {
                break flow;
            }
        };
        self.ends.put(flow, pair);
        self.by_pair.insert(pair, flow);
        pair.into_iter().for_each(|end| *self.held.entry(end).or_default() += 1);
        while self.ends.len() > FLOWS_MAX.get() {
            let Some(oldest) = self.ends.peek_lru().map(|(flow, _)| *flow) else { break };
            self.remove(oldest);
        }
        flow
    }

    pub(super) fn remove(&mut self, flow: u32) {
        let Some(gone) = self.ends.pop(&flow) else { return };
        self.by_pair.remove(&gone);
        for end in gone {
            match self.held.get_mut(&end) {
                Some(held) if *held > 1 => *held -= 1,
                Some(_) => drop(self.held.remove(&end)),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flow_for_a_pair_and_the_longest_unused_goes_when_a_node_has_too_many() {
        let (mut flows, mut rng) = (Flows::new(), fastrand::Rng::with_seed(1));
        let first = flows.between(1, 2, &mut rng);
        assert_eq!(flows.between(2, 1, &mut rng), first);
        assert_eq!((flows.far(first, 1), flows.far(first, 2), flows.far(first, 3)), (Some(2), Some(1), None));
        let other = flows.between(8, 9, &mut rng);
        let second = flows.between(1, 3, &mut rng);
        flows.ends(first);
        for n in 0..u32::from(FLOWS_EACH) - 1 {
            flows.between(1, 100 + n, &mut rng);
        }
        assert_eq!((flows.ends(second), flows.ends(first)), (None, Some([1, 2])));
        assert_eq!((flows.len(), flows.ends(other)), (usize::from(FLOWS_EACH) + 1, Some([8, 9])));
        // Whoever is asked for is not bound by it.
        for n in 0..u32::from(FLOWS_EACH) {
            flows.between(5000 + n, 1, &mut rng);
        }
        assert_eq!(flows.len(), 2 * usize::from(FLOWS_EACH) + 1);
    }

    #[test]
    fn all_together_are_bounded_and_nothing_of_the_old_stays() {
        let (mut flows, mut rng) = (Flows::new(), fastrand::Rng::with_seed(1));
        for n in 0..20_000 {
            flows.between(n, n + 1, &mut rng);
        }
        assert_eq!((flows.len(), flows.by_pair.len()), (FLOWS_MAX.get(), FLOWS_MAX.get()));
        let all: Vec<u32> = flows.by_pair.values().copied().collect();
        all.into_iter().for_each(|flow| flows.remove(flow));
        assert_eq!((flows.len(), flows.by_pair.len(), flows.held.len()), (0, 0, 0));
    }
}
