//! The interner: one allocation for each distinct value.

use std::{collections::HashSet, hash::Hash, rc::Rc};

/// Below this many values a clean-up is not worth its pass.
const CLEAN_FLOOR: usize = 256;

/// Lists that [`Recent`] compares with: a cluster's ports are mostly 80, 443 and the like.
const RECENT: usize = 32;

/// Holds each value once. Bounded by what is in use: whenever it has doubled, the values that nobody else holds are
/// dropped, so it never holds more than twice those in use (or [`CLEAN_FLOOR`]).
#[derive(Debug)]
pub(super) struct Pool<T: ?Sized> {
    held: HashSet<Rc<T>>,
    clean_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { held: HashSet::new(), clean_at: CLEAN_FLOOR }
    }
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    /// The one that is held.
    pub(super) fn get<'v>(&mut self, value: &'v T) -> Rc<T>
    where
        Rc<T>: From<&'v T>,
    {
        if let Some(held) = self.held.get(value) {
            return held.clone();
        }
        self.hold(value.into())
    }

    /// Replaces a value by the one that is held.
    pub(super) fn share(&mut self, value: &mut Rc<T>) {
        *value = match self.held.get(&**value) {
            Some(held) => held.clone(),
            None => self.hold(value.clone()),
        }
    }

    fn hold(&mut self, value: Rc<T>) -> Rc<T> {
        if self.held.len() >= self.clean_at {
            self.clean();
        }
        self.held.insert(value.clone());
        value
    }

    pub(super) fn clean(&mut self) {
        self.held.retain(|value| Rc::strong_count(value) > 1);
        if self.held.capacity() > 4 * self.held.len().max(CLEAN_FLOOR) {
            self.held.shrink_to_fit();
        }
        self.clean_at = (2 * self.held.len()).max(CLEAN_FLOOR);
    }
}

/// Shares lists with those that came last, of which it holds [`RECENT`]; one that is not among them is not shared.
#[derive(Debug)]
pub(super) struct Recent<T> {
    lists: Vec<Rc<[T]>>,
    next: usize,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { lists: Vec::new(), next: 0 }
    }
}

impl<T: PartialEq> Recent<T> {
    pub(super) fn share(&mut self, list: &mut Rc<[T]>) {
        if let Some(held) = self.lists.iter().find(|held| *held == list) {
            *list = held.clone();
        } else if self.lists.len() < RECENT {
            self.lists.push(list.clone());
        } else {
            self.lists[self.next % RECENT] = list.clone();
            self.next = self.next.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_are_one_allocation() {
        let mut names = Pool::<str>::default();
        let first = names.get("shop");
        let mut second: Rc<str> = "shop".into();
        names.share(&mut second);
        assert!(Rc::ptr_eq(&first, &second) && Rc::ptr_eq(&first, &names.get("shop")));
    }

    #[test]
    fn names_that_nobody_holds_do_not_pile_up() {
        let mut names = Pool::<str>::default();
        let kept: Vec<Rc<str>> = (0..100).map(|i| names.get(&format!("kept-{i}"))).collect();
        for i in 0..100_000 {
            names.get(&format!("passing-{i}"));
        }
        assert!(names.held.len() <= CLEAN_FLOOR, "{} names", names.held.len());
        assert!(kept.iter().all(|name| Rc::ptr_eq(name, &names.get(name))));
    }

    #[test]
    fn lists_that_are_often_there_are_shared() {
        let mut recent = Recent::default();
        let mut first: Rc<[u16]> = [80, 443].into();
        recent.share(&mut first);
        for n in 0..100 {
            let mut again: Rc<[u16]> = [80, 443].into();
            recent.share(&mut again);
            assert!(n >= 31 || Rc::ptr_eq(&first, &again), "{n}");
            recent.share(&mut [n].into());
        }
        assert_eq!(recent.lists.len(), RECENT);
    }
}
