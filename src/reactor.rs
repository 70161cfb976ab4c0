//! The event loop of a thread: what its descriptors and timers wait for is one epoll(7), asked by the thread itself.
//! There is no other thread, so an event costs no hand-over.
//!
//! Readiness is level-triggered, and stays armed while somebody waits: who reads and waits again before the next look
//! costs no further call. An event that nobody waits for disarms its direction.

use rustix::{
    event::{
        EventfdFlags,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
        eventfd,
    },
    fd::{AsFd, OwnedFd},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use slab::Slab;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::Future,
    io,
    pin::{Pin, pin},
    rc::{Rc, Weak},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

pub use crate::sockets::Async;
pub use async_executor::{LocalExecutor, Task};

/// Events taken at one look; the others come with the next.
const BATCH: usize = 64;
/// Deadlines nearer than this have a timer of the kernel's: epoll_wait(2) itself counts in milliseconds.
const NEAR: Duration = Duration::from_millis(10);
/// The key of the two descriptors that are the loop's own.
const OWN: u64 = u64::MAX;

/// Which way somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl Direction {
    const BOTH: [Self; 2] = [Self::Read, Self::Write];

    fn flag(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::Write => EventFlags::OUT,
        }
    }
}

/// Wakes the loop, from any thread.
struct Alarm {
    rung: AtomicBool,
    /// The loop waits in the kernel, or is about to.
    sleeps: AtomicBool,
    event: OwnedFd,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::SeqCst) && self.sleeps.load(Ordering::SeqCst) {
            // Edge-triggered, hence never read; its counter holds 2^64 wake-ups.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }
}

/// Who waits for one direction of a descriptor.
#[derive(Default)]
struct Side {
    /// Events so far.
    ticks: u32,
    /// The tick at which [`Entry::poll`] began to wait.
    polled: Option<u32>,
    /// At most one of a task.
    waiting: Vec<Waker>,
}

/// A descriptor in the loop of its thread.
pub(crate) struct Entry<T: AsFd + ?Sized> {
    reactor: Rc<Reactor>,
    key: usize,
    sides: RefCell<[Side; 2]>,
    /// Empty: the kernel does not know it.
    armed: Cell<EventFlags>,
    pub(crate) io: T,
}

impl<T: AsFd + ?Sized> Entry<T> {
    fn arm(&self, wanted: EventFlags) -> io::Result<()> {
        let (epoll, data) = (&self.reactor.epoll, EventData::new_u64(self.key as u64));
        match (self.armed.get().is_empty(), wanted.is_empty()) {
            (true, true) => {}
            (true, false) => epoll::add(epoll, &self.io, data, wanted)?,
            (false, true) => epoll::delete(epoll, &self.io)?,
            (false, false) => epoll::modify(epoll, &self.io, data, wanted)?,
        }
        self.armed.set(wanted);
        Ok(())
    }

    fn wait(&self, sides: &mut [Side; 2], direction: Direction, cx: &Context<'_>) -> io::Result<()> {
        let waiting = &mut sides[direction as usize].waiting;
        if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        if self.armed.get().contains(direction.flag()) {
            return Ok(());
        }
        let awaited = Direction::BOTH.into_iter().filter(|&d| !sides[d as usize].waiting.is_empty());
        self.arm(awaited.fold(EventFlags::empty(), |flags, d| flags | d.flag()))
    }

    /// Ready when there has been an event since it said Pending.
    pub(crate) fn poll(&self, direction: Direction, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut sides = self.sides.borrow_mut();
        let side = &mut sides[direction as usize];
        if side.polled.is_some_and(|at| at != side.ticks) {
            side.polled = None;
            return Poll::Ready(Ok(()));
        }
        side.polled = Some(side.ticks);
        match self.wait(&mut sides, direction, cx) {
            Ok(()) => Poll::Pending,
            Err(e) => Poll::Ready(Err(e)),
        }
    }

    /// Waits for an event after the first poll; several may, each for itself.
    pub(crate) fn ready(&self, direction: Direction) -> impl Future<Output = io::Result<()>> {
        let mut since = None;
        std::future::poll_fn(move |cx| {
            let mut sides = self.sides.borrow_mut();
            let ticks = sides[direction as usize].ticks;
            if *since.get_or_insert(ticks) != ticks {
                return Poll::Ready(Ok(()));
            }
            match self.wait(&mut sides, direction, cx) {
                Ok(()) => Poll::Pending,
                Err(e) => Poll::Ready(Err(e)),
            }
        })
    }

    fn happened(&self, flags: EventFlags, woken: &mut Vec<Waker>) {
        // Whatever is waited for ends at once then, with an error or an end.
        let over = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let mut wanted = self.armed.get();
        for (direction, side) in Direction::BOTH.into_iter().zip(self.sides.borrow_mut().iter_mut()) {
            if over || flags.contains(direction.flag()) {
                side.ticks = side.ticks.wrapping_add(1);
                if side.waiting.is_empty() {
                    wanted -= direction.flag();
                }
                woken.append(&mut side.waiting);
            }
        }
        if wanted != self.armed.get()
            && let Err(e) = self.arm(wanted)
        {
            log::warn!("epoll: {e}");
        }
    }
}

impl<T: AsFd + 'static> Entry<T> {
    pub(crate) fn new(io: T) -> Rc<Self> {
        let reactor = reactor();
        Rc::new_cyclic(|this: &Weak<Self>| {
            let key = reactor.entries.borrow_mut().insert(this.clone());
            Self { reactor, key, sides: RefCell::default(), armed: Cell::new(EventFlags::empty()), io }
        })
    }
}

impl<T: AsFd + ?Sized> Drop for Entry<T> {
    fn drop(&mut self) {
        let _ = self.arm(EventFlags::empty());
        self.reactor.entries.borrow_mut().remove(self.key);
    }
}

struct Reactor {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// What `timer` was last set to.
    set: Cell<Option<Instant>>,
    alarm: Arc<Alarm>,
    entries: RefCell<Slab<Weak<Entry<dyn AsFd>>>>,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    serial: Cell<u64>,
}

thread_local! {
    static REACTOR: RefCell<Weak<Reactor>> = const { RefCell::new(Weak::new()) };
}

/// The loop of this thread, which lives as long as something is in it.
fn reactor() -> Rc<Reactor> {
    REACTOR.with_borrow_mut(|here| {
        here.upgrade().unwrap_or_else(|| {
            // It is the first thing that a process asks for; what gets no epoll could do nothing at all.
            #[allow(clippy::expect_used)]
            let made = Rc::new(Reactor::new().expect("the kernel gives an epoll instance"));
            *here = Rc::downgrade(&made);
            made
        })
    })
}

impl Reactor {
    fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        for fd in [&event, &timer] {
            epoll::add(&epoll, fd, EventData::new_u64(OWN), EventFlags::IN | EventFlags::ET)?;
        }
        let alarm = Arc::new(Alarm { rung: AtomicBool::new(false), sleeps: AtomicBool::new(false), event });
        let (entries, timers) = Default::default();
        Ok(Self { epoll, timer, set: Cell::new(None), alarm, entries, timers, serial: Cell::new(0) })
    }

    /// Takes what has happened; waits for something unless the loop is awake.
    fn turn(&self) {
        self.alarm.sleeps.store(true, Ordering::SeqCst);
        let timeout =
            if self.alarm.rung.load(Ordering::SeqCst) { Some(Timespec::default()) } else { self.until_timer() };
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(OWN) }; BATCH];
        let taken = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref());
        self.alarm.sleeps.store(false, Ordering::SeqCst);
        let mut woken = Vec::new();
        for event in &events[..taken.unwrap_or(0)] {
            if event.data.u64() == OWN {
                // Where the timer rang early, as it does under qemu's emulation of MIPS, it is to be set again.
                self.set.set(None);
            }
            let key = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            let entry = self.entries.borrow().get(key).and_then(Weak::upgrade);
            if let Some(entry) = entry {
                entry.happened(event.flags, &mut woken);
            }
        }
        let mut timers = self.timers.borrow_mut();
        if !timers.is_empty() {
            let now = Instant::now();
            while let Some(first) = timers.first_entry().filter(|first| first.key().0 <= now) {
                woken.push(first.remove());
            }
        }
        drop(timers);
        woken.into_iter().for_each(Waker::wake);
    }

    fn until_timer(&self) -> Option<Timespec> {
        let (at, _) = *self.timers.borrow().first_key_value()?.0;
        let rest = at.saturating_duration_since(Instant::now());
        // epoll_wait(2) takes an int of milliseconds, 24 days.
        let rest = rest.min(Duration::from_millis(i32::MAX as u64));
        let rest = Timespec::try_from(rest).unwrap_or_default();
        let near = rest < Timespec::try_from(NEAR).unwrap_or_default() && rest != Timespec::default();
        if near && self.set.get() != Some(at) {
            let once = Itimerspec { it_interval: Timespec::default(), it_value: rest };
            let taken = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
            self.set.set(taken.then_some(at));
        }
        // Behind the timer too, which emulators of 32-bit kernels do not always ring: then it is late by a millisecond.
        Some(rest)
    }
}

/// Runs a future on this thread, and all that it waits for.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let reactor = reactor();
    let waker = Waker::from(Arc::clone(&reactor.alarm));
    let mut future = pin!(future);
    loop {
        // Not a plain store: what others did before they rang must be seen by the poll.
        reactor.alarm.rung.swap(false, Ordering::SeqCst);
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            // Somebody's whose poll we are in has not been asked since.
            reactor.alarm.rung.store(true, Ordering::SeqCst);
            return done;
        }
        reactor.turn();
        while !reactor.alarm.rung.load(Ordering::SeqCst) {
            reactor.turn();
        }
    }
}

/// Ready from its time on; its output is that time.
pub struct Timer {
    at: Option<Instant>,
    /// Where it is in the loop's timers.
    waits: Option<(Rc<Reactor>, u64)>,
}

impl Timer {
    /// Never, where the clock does not reach so far.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self { at: Instant::now().checked_add(time), waits: None }
    }

    #[must_use]
    pub fn at(at: Instant) -> Self {
        Self { at: Some(at), waits: None }
    }
}

impl Future for Timer {
    type Output = Instant;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Instant> {
        let Some(at) = self.at else { return Poll::Pending };
        if let Some((reactor, id)) = &self.waits {
            if let Some(waker) = reactor.timers.borrow_mut().get_mut(&(at, *id)) {
                waker.clone_from(cx.waker());
                return Poll::Pending;
            }
            self.waits = None;
            return Poll::Ready(at);
        }
        if Instant::now() >= at {
            return Poll::Ready(at);
        }
        let reactor = reactor();
        let id = reactor.serial.replace(reactor.serial.get() + 1);
        reactor.timers.borrow_mut().insert((at, id), cx.waker().clone());
        self.waits = Some((reactor, id));
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let (Some((reactor, id)), Some(at)) = (&self.waits, self.at) {
            reactor.timers.borrow_mut().remove(&(at, *id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::{
        AsyncReadExt, AsyncWriteExt,
        future::{or, poll_once, yield_now, zip},
    };
    use std::{io::Write, os::unix::net::UnixStream, thread};

    fn pair() -> (Async<UnixStream>, Async<UnixStream>) {
        let (a, b) = UnixStream::pair().unwrap();
        (Async::new(a).unwrap(), Async::new(b).unwrap())
    }

    #[test]
    fn bytes_go_both_ways_and_the_end_is_seen() {
        block_on(async {
            let (mut a, mut b) = pair();
            let big = vec![7; 1 << 20];
            let (sent, mut got) = (big.clone(), Vec::new());
            let send = async move {
                a.write_all(&sent).await.unwrap();
                drop(a);
            };
            zip(send, async { b.read_to_end(&mut got).await.unwrap() }).await;
            assert_eq!(got, big);
        });
    }

    #[test]
    fn timers_come_in_order_also_near_ones_and_dropped_ones_never() {
        let begin = Instant::now();
        let order = RefCell::new(Vec::new());
        let wait = |us: u64| {
            let (order, timer) = (&order, Timer::at(begin + Duration::from_micros(us)));
            async move {
                timer.await;
                order.borrow_mut().push(us);
            }
        };
        block_on(async {
            let dropped = wait(1);
            zip(zip(wait(90), wait(700)), zip(wait(12_000), wait(30_000))).await;
            assert!(poll_once(Timer::after(Duration::MAX)).await.is_none());
            drop(dropped);
        });
        assert_eq!(order.into_inner(), [90, 700, 12_000, 30_000]);
        assert!(begin + Duration::from_millis(30) <= Instant::now());
        assert!(reactor().timers.borrow().is_empty());
    }

    #[test]
    fn another_thread_wakes_the_loop() {
        let (send, receive) = async_channel::bounded(1);
        let other = thread::spawn(move || (0..1000).for_each(|n| send.send_blocking(n).unwrap()));
        let got = block_on(async {
            let mut got = Vec::new();
            while let Ok(n) = receive.recv().await {
                got.push(n);
            }
            got
        });
        other.join().unwrap();
        assert_eq!(got, Vec::from_iter(0..1000));
    }

    #[test]
    fn nobody_who_waits_means_no_more_events() {
        block_on(async {
            let (a, b) = pair();
            a.get_ref().write_all(b"x").unwrap();
            b.readable().await.unwrap();
            let reactor = reactor();
            let armed = || {
                reactor
                    .entries
                    .borrow()
                    .iter()
                    .filter_map(|(_, e)| e.upgrade())
                    .map(|e| e.armed.get())
                    .collect::<Vec<_>>()
            };
            assert!(armed().contains(&EventFlags::IN));
            while armed().contains(&EventFlags::IN) {
                yield_now().await;
            }
            // And the same after the other end has gone, which is an event of its own kind.
            drop(a);
            or(async { b.readable().await.unwrap() }, async { b.writable().await.unwrap() }).await;
            while armed().iter().any(|flags| !flags.is_empty()) {
                yield_now().await;
            }
            drop(b);
            assert!(reactor.entries.borrow().is_empty());
        });
    }

    #[test]
    fn several_tasks_wait_for_one_descriptor() {
        let executor = LocalExecutor::new();
        block_on(executor.run(async {
            let (a, b) = pair();
            let b = Rc::new(b);
            let waiting: Vec<_> = (0..3)
                .map(|_| {
                    let b = Rc::clone(&b);
                    executor.spawn(async move { b.readable().await })
                })
                .collect();
            yield_now().await;
            a.get_ref().write_all(b"x").unwrap();
            for task in waiting {
                task.await.unwrap();
            }
        }));
    }

    #[test]
    fn a_loop_within_a_loop_loses_no_wake_up() {
        let (a, b) = pair();
        let outer = async {
            block_on(async { Timer::after(Duration::from_millis(1)).await });
            a.get_ref().write_all(b"x").unwrap();
            std::future::pending::<()>().await;
        };
        block_on(or(outer, async { b.readable().await.unwrap() }));
    }
}
