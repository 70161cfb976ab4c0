//! Flows: numbers that stand for a pair of nodes.

use super::members::Id;
use lru::LruCache;
use std::{collections::HashMap, num::NonZeroUsize};

/// When full the longest unused one goes; its ends are told when they use it, and ask for a new one.
const FLOWS_MAX: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

pub(super) struct Flows {
    ends: LruCache<u32, [Id; 2]>,
    by_pair: HashMap<[Id; 2], u32>,
}

impl Flows {
    pub(super) fn new() -> Self {
        Self { ends: LruCache::unbounded(), by_pair: HashMap::new() }
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

    /// The flow between two nodes, a new one if need be.
    pub(super) fn between(&mut self, a: Id, b: Id, rng: &mut fastrand::Rng) -> u32 {
        let pair = [a.min(b), a.max(b)];
        if let Some(flow) = self.by_pair.get(&pair).copied() {
            self.ends.promote(&flow);
            return flow;
        }
        let flow = loop {
            let flow = rng.u32(1..);
            if !self.ends.contains(&flow) {
                break flow;
            }
        };
        self.ends.put(flow, pair);
        self.by_pair.insert(pair, flow);
        while self.ends.len() > FLOWS_MAX.get() {
            let Some((_, gone)) = self.ends.pop_lru() else { break };
            self.by_pair.remove(&gone);
        }
        flow
    }

    pub(super) fn remove(&mut self, flow: u32) {
        if let Some(gone) = self.ends.pop(&flow) {
            self.by_pair.remove(&gone);
        }
    }
}
