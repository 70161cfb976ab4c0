//! One writer, many readers, and a bell. Single-threaded: plain cells, no locks.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
};

/// Wakes every listener; a ring is never lost, but many rings before a look count as one.
#[derive(Clone, Debug, Default)]
pub struct Bell(Rc<BellState>);

#[derive(Debug, Default)]
struct BellState {
    version: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Bell {
    pub fn ring(&self) {
        self.0.version.set(self.0.version.get().wrapping_add(1));
        let waiting = std::mem::take(&mut *self.0.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    #[must_use]
    pub fn listen(&self) -> Listener {
        Listener { bell: self.clone(), seen: self.0.version.get() }
    }
}

/// One listener of a [`Bell`]. Cancel-safe: dropping the future of [`Listener::rung`] loses no ring.
#[derive(Debug)]
pub struct Listener {
    bell: Bell,
    seen: u64,
}

impl Listener {
    /// Resolves once the bell has rung since the last time that this resolved.
    pub async fn rung(&mut self) {
        poll_fn(|cx| {
            let state = &self.bell.0;
            if state.version.get() != self.seen {
                self.seen = state.version.get();
                return Poll::Ready(());
            }
            let mut waiting = state.waiting.borrow_mut();
            if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

#[derive(Debug)]
struct Shared<T> {
    value: RefCell<T>,
    bell: Bell,
}

/// The only way to change a shared value.
#[derive(Debug)]
pub struct Writer<T>(Rc<Shared<T>>);

/// A view of a value that somebody else writes.
#[derive(Debug)]
pub struct Reader<T>(Rc<Shared<T>>);

impl<T> Clone for Reader<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Writer<T> {
    pub fn new(value: T) -> Self {
        Self(Rc::new(Shared { value: RefCell::new(value), bell: Bell::default() }))
    }

    #[must_use]
    pub fn reader(&self) -> Reader<T> {
        Reader(Rc::clone(&self.0))
    }

    /// Changes the value in place; rings nobody.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.0.value.borrow_mut())
    }

    /// Tells the listeners that the value has changed; the caller coalesces.
    pub fn ring(&self) {
        self.0.bell.ring();
    }
}

impl<T> Reader<T> {
    /// A closure, so that no borrow can reach an `.await`.
    pub fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.0.value.borrow())
    }

    #[must_use]
    pub fn listen(&self) -> Listener {
        self.0.bell.listen()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    #[test]
    fn a_ring_before_the_wait_is_not_lost_and_counts_once() {
        let writer = Writer::new(1);
        let reader = writer.reader();
        let mut listener = reader.listen();
        writer.update(|v| *v = 2);
        writer.ring();
        writer.ring();
        block_on(listener.rung());
        assert_eq!(reader.read(|v| *v), 2);
        assert!(block_on(poll_once(listener.rung())).is_none());
    }
}
