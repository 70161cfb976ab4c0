//! The interner: one allocation per distinct name.

use super::model::Name;
use std::{collections::HashSet, rc::Rc};

/// Below this many names a clean-up is not worth its pass.
const CLEAN_FLOOR: usize = 256;

/// Holds each name once. Bounded by what is in use: whenever it has doubled, the names that nobody else holds are
/// dropped, so it never holds more than twice the names in use (or [`CLEAN_FLOOR`]).
#[derive(Debug)]
pub(super) struct Names {
    held: HashSet<Name>,
    clean_at: usize,
}

impl Default for Names {
    fn default() -> Self {
        Self { held: HashSet::new(), clean_at: CLEAN_FLOOR }
    }
}

impl Names {
    pub(super) fn get(&mut self, name: &str) -> Name {
        if let Some(held) = self.held.get(name) {
            return held.clone();
        }
        self.hold(name.into())
    }

    /// Replaces a name by the one that is held.
    pub(super) fn share(&mut self, name: &mut Name) {
        *name = match self.held.get(name) {
            Some(held) => held.clone(),
            None => self.hold(name.clone()),
        }
    }

    fn hold(&mut self, name: Name) -> Name {
        if self.held.len() >= self.clean_at {
            self.clean();
        }
        self.held.insert(name.clone());
        name
    }

    pub(super) fn clean(&mut self) {
        self.held.retain(|name| Rc::strong_count(name) > 1);
        if self.held.capacity() > 4 * self.held.len().max(CLEAN_FLOOR) {
            self.held.shrink_to_fit();
        }
        self.clean_at = (2 * self.held.len()).max(CLEAN_FLOOR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_are_one_allocation() {
        let mut names = Names::default();
        let first = names.get("shop");
        let mut second: Name = "shop".into();
        names.share(&mut second);
        assert!(Rc::ptr_eq(&first, &second) && Rc::ptr_eq(&first, &names.get("shop")));
    }

    #[test]
    fn names_that_nobody_holds_do_not_pile_up() {
        let mut names = Names::default();
        let kept: Vec<Name> = (0..100).map(|i| names.get(&format!("kept-{i}"))).collect();
        for i in 0..100_000 {
            names.get(&format!("passing-{i}"));
        }
        assert!(names.held.len() <= CLEAN_FLOOR, "{} names", names.held.len());
        assert!(kept.iter().all(|name| Rc::ptr_eq(name, &names.get(name))));
    }
}
