//! Where nodes are to be found: what each has said of its own relays. The relays in it are few and kept once each.

use crate::tunnel::control::{Entry, RelayAt};
use std::rc::Rc;

/// Relays that are kept once for all entries; further ones are kept in each entry by themselves.
const SHARED_MAX: usize = 64;

/// A node's entry, as it is kept.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) serial: u64,
    relays: Vec<Rc<RelayAt>>,
}

impl Kept {
    /// None where the node has not said where it is.
    pub(super) fn entry(&self) -> Option<Box<Entry>> {
        let relays = self.relays.iter().map(|r| RelayAt::clone(r)).collect();
        (!self.relays.is_empty()).then(|| Box::new(Entry { serial: self.serial, relays }))
    }
}

#[derive(Default)]
pub(super) struct Directory {
    shared: Vec<Rc<RelayAt>>,
}

impl Directory {
    /// Takes over a newer entry; an older one has come late and counts for nothing.
    pub(super) fn keep(&mut self, kept: &mut Kept, entry: Entry) {
        if entry.serial > kept.serial {
            kept.serial = entry.serial;
            kept.relays = entry.relays.into_iter().map(|at| self.share(at)).collect();
        }
    }

    fn share(&mut self, at: RelayAt) -> Rc<RelayAt> {
        if let Some(same) = self.shared.iter().find(|r| ***r == at) {
            return Rc::clone(same);
        }
        let at = Rc::new(at);
        if self.shared.len() >= SHARED_MAX {
            self.shared.retain(|r| Rc::strong_count(r) > 1);
        }
        if self.shared.len() < SHARED_MAX {
            self.shared.push(Rc::clone(&at));
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::identity::{Authority, Request, Roles, Secret};

    fn at(port: u16) -> RelayAt {
        let authority = Authority::from_seed(Secret::new([1; 32])).unwrap();
        let (name, network) = ("relay-1".into(), String::new());
        let request = Request { name, key: [7; 32], roles: Roles::RELAY, network, not_after: 9 };
        RelayAt { address: ([1, 2, 3, 4], port).into(), certificate: authority.issue(request).unwrap() }
    }

    #[test]
    fn the_newest_serial_wins() {
        let (mut directory, mut kept) = (Directory::default(), Kept::default());
        assert_eq!(kept.entry(), None);
        for (serial, port, wanted) in [(5, 1, 1), (4, 2, 1), (5, 3, 1), (6, 4, 4)] {
            directory.keep(&mut kept, Entry { serial, relays: vec![at(port)] });
            assert_eq!(kept.entry().map(|e| e.relays[0].address.port()), Some(wanted));
        }
        directory.keep(&mut kept, Entry { serial: 7, relays: Vec::new() });
        assert_eq!(kept.entry(), None, "it has no relay any more");
    }

    #[test]
    fn relays_are_kept_once_and_forgotten_with_their_last_entry() {
        let mut directory = Directory::default();
        let mut all: Vec<Kept> = (0..100).map(|_| Kept::default()).collect();
        for (n, kept) in all.iter_mut().enumerate() {
            directory.keep(kept, Entry { serial: 1, relays: vec![at(n as u16 % 2), at(2)] });
        }
        assert_eq!(directory.shared.len(), 3);
        drop(all);
        let mut kept: Vec<Kept> = (0..200).map(|_| Kept::default()).collect();
        for (n, kept) in kept.iter_mut().enumerate() {
            directory.keep(kept, Entry { serial: 1, relays: vec![at(100 + n as u16)] });
        }
        assert_eq!(directory.shared.len(), SHARED_MAX);
        assert!(kept.iter().all(|k| k.entry().is_some()));
    }
}
