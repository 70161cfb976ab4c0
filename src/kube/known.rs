//! What is remembered of each object of KubeEdge's metaServer, which repeats, reorders and resurrects events, and whose
//! answers do not tell whether they come from the cloud or from its own store.
//!
//! A list is taken for the cloud's when its resourceVersion is higher than that of the list before it: a cluster's rises
//! all the time (every lease counts), that of the store on the node stands still while the link is down. Only such a
//! list deletes, and only such a list brings back what was deleted before.

use super::loading::OBJECTS_MAX;
use std::collections::HashMap;

/// Deleted objects that are remembered, so that a replay of the store does not bring them back; beyond that any of them
/// are forgotten.
const GONE_MAX: usize = 4_096;

#[derive(Clone, Copy, Debug)]
struct Object {
    uid: u64,
    version: u64,
    gone: bool,
    /// The list that named it last.
    listed: u32,
}

/// What a list that has come to its end is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Of the cloud: what it does not name is gone.
    Cloud,
    /// Perhaps of the store on the node.
    Perhaps,
    /// Of the cloud, and it named some that were thought to be gone: ask once more, to get them.
    Again,
}

/// Keys are hashes of the objects' ids, uids are hashes too.
#[derive(Debug, Default)]
pub(super) struct Known {
    of: HashMap<u64, Object>,
    list: u32,
    list_version: u64,
    back: bool,
}

impl Known {
    pub(super) fn begin(&mut self) {
        self.list = self.list.wrapping_add(1);
        self.back = false;
    }

    /// Whether an object of a list is to be used. Versions may go back here: after a restore they do.
    pub(super) fn listed(&mut self, id: u64, uid: u64, version: u64) -> bool {
        if let Some(old) = self.of.get_mut(&id)
            && old.gone
            && old.uid == uid
        {
            (old.listed, self.back) = (self.list, true);
            return false;
        }
        self.put(id, Object { uid, version, gone: false, listed: self.list });
        true
    }

    /// Ends a list.
    pub(super) fn end(&mut self, version: u64) -> Verdict {
        let before = std::mem::replace(&mut self.list_version, version);
        if before == 0 || version <= before {
            return Verdict::Perhaps;
        }
        let list = self.list;
        self.of.retain(|_, o| !(o.gone && o.listed == list));
        self.of.values_mut().for_each(|o| o.gone |= o.listed != list);
        if self.back { Verdict::Again } else { Verdict::Cloud }
    }

    /// Whether an ADDED or MODIFIED is news.
    pub(super) fn event(&mut self, id: u64, uid: u64, version: u64) -> bool {
        let news = match self.of.get(&id) {
            // A version that is no number is believed.
            _ if version == 0 => true,
            Some(old) if old.uid == uid => version > old.version,
            Some(old) if !old.gone => version > old.version,
            // A ghost: the list before this would have named it.
            Some(_) | None => version > self.list_version,
        };
        if news {
            self.put(id, Object { uid, version, gone: false, listed: self.list });
        }
        news
    }

    /// Whether a DELETED is news.
    pub(super) fn deleted(&mut self, id: u64, uid: u64, version: u64) -> bool {
        let stale = self.of.get(&id).is_some_and(|old| version != 0 && version < old.version);
        if !stale {
            self.put(id, Object { uid, version, gone: true, listed: self.list });
        }
        !stale
    }

    fn put(&mut self, id: u64, object: Object) {
        if self.of.len() >= OBJECTS_MAX + GONE_MAX {
            let mut gone = 0;
            self.of.retain(|_, o| {
                gone += usize::from(o.gone);
                !o.gone || gone <= GONE_MAX / 2
            });
        }
        if self.of.len() < OBJECTS_MAX + GONE_MAX || self.of.contains_key(&id) {
            self.of.insert(id, object);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ghost_comes_back_by_the_cloud_alone() {
        let mut known = Known::default();
        known.begin();
        assert!(known.listed(1, 10, 5) && known.listed(2, 20, 6));
        assert_eq!(known.end(100), Verdict::Perhaps, "the first list can be of either");
        known.begin();
        assert!(known.listed(1, 10, 5));
        assert_eq!(known.end(110), Verdict::Cloud);
        assert!(!known.event(2, 20, 6), "swept, and older than the list");
        assert!(known.event(2, 21, 111), "made again");
        assert!(known.deleted(2, 21, 112) && !known.event(2, 21, 111));
        assert!(!known.event(3, 30, 7), "the list would have named it");
        for version in [109, 109] {
            known.begin();
            assert!(known.listed(1, 10, 5) && !known.listed(2, 21, 111));
            assert_eq!(known.end(version), Verdict::Perhaps);
        }
        known.begin();
        assert!(!known.listed(2, 21, 111));
        assert_eq!(known.end(120), Verdict::Again, "the cloud has it after all");
        known.begin();
        assert!(known.listed(2, 21, 111));
    }

    #[test]
    fn events_out_of_order_are_dropped() {
        let mut known = Known::default();
        known.begin();
        known.end(1);
        assert!(known.event(1, 10, 5) && !known.event(1, 10, 5) && !known.event(1, 10, 4));
        assert!(known.event(1, 10, 7) && !known.deleted(1, 10, 6) && known.deleted(1, 10, 8));
        assert!(known.event(1, 10, 0), "not a number");
    }
}
