//! Named tasks of the one executor; the first that ends ends the process.

use crate::reactor::{LocalExecutor, Task};
use futures_lite::FutureExt;
use std::{future::poll_fn, rc::Rc, task::Poll};

/// Dropping it cancels them all.
pub struct Tasks {
    executor: Rc<LocalExecutor<'static>>,
    running: Vec<(&'static str, Task<anyhow::Result<()>>)>,
}

impl Tasks {
    #[must_use]
    pub fn new(executor: Rc<LocalExecutor<'static>>) -> Self {
        Self { executor, running: Vec::new() }
    }

    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + 'static) {
        self.running.push((name, self.executor.spawn(task)));
    }

    /// The next task that ends, and why. Cancel-safe.
    pub async fn ended(&mut self) -> (&'static str, anyhow::Error) {
        poll_fn(|cx| {
            for at in 0..self.running.len() {
                let (name, task) = &mut self.running[at];
                if let Poll::Ready(result) = task.poll(cx) {
                    let name = *name;
                    drop(self.running.swap_remove(at));
                    let why = result.err().unwrap_or_else(|| anyhow::anyhow!("it should run for ever"));
                    return Poll::Ready((name, why));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Takes a task out of those whose end counts.
    pub fn take(&mut self, name: &str) -> Option<Task<anyhow::Result<()>>> {
        let at = self.running.iter().position(|(n, _)| *n == name)?;
        Some(self.running.swap_remove(at).1)
    }

    /// Puts one back that [`Self::take`] gave.
    pub fn put(&mut self, name: &'static str, task: Task<anyhow::Result<()>>) {
        self.running.push((name, task));
    }

    /// Has a task end by itself, which `gently` asks it to; when that is over it is cancelled.
    pub fn retire(&self, task: Task<anyhow::Result<()>>, gently: impl Future<Output = ()> + 'static) {
        let end = async move {
            gently.await;
            task.cancel().await;
        };
        self.executor.spawn(end).detach();
    }

    /// Cancels all others, the last first, and waits until each has let go of what it held.
    pub async fn stop_all_but(&mut self, kept: &[&str]) {
        let (kept, stopped): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.running).into_iter().partition(|(name, _)| kept.contains(name));
        self.running = kept;
        for (_, task) in stopped.into_iter().rev() {
            task.cancel().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, pending, poll_once, yield_now};
    use std::cell::RefCell;

    struct Held(&'static str, Rc<RefCell<Vec<&'static str>>>);

    impl Drop for Held {
        fn drop(&mut self) {
            self.1.borrow_mut().push(self.0);
        }
    }

    #[test]
    fn the_first_that_ends_is_named_and_the_others_let_go() {
        let executor = Rc::new(LocalExecutor::new());
        let dropped = Rc::new(RefCell::new(Vec::new()));
        let mut tasks = Tasks::new(Rc::clone(&executor));
        for name in ["a", "b"] {
            let held = Held(name, Rc::clone(&dropped));
            tasks.spawn(name, async move {
                let _held = held;
                pending().await
            });
        }
        block_on(executor.run(async {
            assert!(poll_once(tasks.ended()).await.is_none());
            tasks.spawn("c", async { anyhow::bail!("lost") });
            tasks.spawn("d", async { Ok(()) });
            yield_now().await;
            let (name, why) = tasks.ended().await;
            assert_eq!((name, why.to_string()), ("c", "lost".into()));
            let (name, why) = tasks.ended().await;
            assert_eq!((name, why.to_string()), ("d", "it should run for ever".into()));
            tasks.stop_all_but(&["a"]).await;
            assert_eq!(*dropped.borrow(), ["b"]);
            tasks.stop_all_but(&[]).await;
            assert_eq!(*dropped.borrow(), ["b", "a"]);
        }));
    }
}
