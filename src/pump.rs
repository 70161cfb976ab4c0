//! Two-way copy with half-close: splice(2) between two sockets where there is much to move and a copy where there is
//! little; [`crate::streamed`] is for those with a stream of the tunnel. An idle connection owns neither buffer nor pipe.

use crate::reactor::Async;
use crate::{
    metrics::add,
    sys,
    tcp::{self, Pacing},
};
use futures_lite::future::{poll_fn, try_zip, yield_now};
use rustix::net::{SocketFlags, acceptfrom_with};
use std::{
    cell::{Cell, RefCell},
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

/// What a pipe holds, and one splice asks for. What takes all that has come at once costs a third of the CPU time less
/// than 256 KiB at a time do, and half as much on a line of 1 Gbit/s (measured on veths).
const CHUNK: usize = 1 << 20;

/// While readers stall and all their pipes hold so much, a splice asks for less, at last for [`CHUNK_LEAST`].
const PIPED_ALL: usize = 8 << 20;

/// What the kernel gives a pipe by itself.
const CHUNK_LEAST: usize = 64 * 1024;

/// What one look into a socket on its way to a stream shows at most.
pub(crate) const SCRATCH: usize = 64 * 1024;

/// Bytes that one direction moves before it lets the others run.
pub(crate) const BUDGET: usize = 512 * 1024;

/// Pipes in use at one time. A reader that stalls keeps its pipe; when all are taken the others copy.
/// Two descriptors each.
const PIPES: usize = 32;

/// Pipes kept open for the next who needs one.
const PIPES_IDLE: usize = 8;

/// What a direction without a pipe, or one of the tunnel, takes at a time: the most that one connection holds while its
/// reader stalls. Where there is less a copy costs half of what a pipe's two calls do.
pub(crate) const HELD: usize = 8 * 1024;

/// Out of the tunnel more is taken, up to [`SCRATCH`], for a reader that took all so far: a sixth less CPU time. As long
/// as all together hold less than this.
pub(crate) const HELD_ALL: usize = 1 << 20;

/// Descriptors that are left to all else: DNS, the tunnel, the API; sessions of UDP give way by themselves.
const OTHERS: u64 = 128;

/// Below the 2 h after which many firewalls forget an established connection (RFC 5382, REQ-5), and far
/// above what a battery would notice.
/// With four probes, 30 s apart, a dead peer is found within four minutes.
pub(crate) const KEEPALIVE: (Duration, Duration, u8) = (Duration::from_secs(120), Duration::from_secs(30), 4);

/// A connection of a listener's queue, non-blocking from its first moment.
///
/// # Errors
/// As accept(2).
pub fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (fd, from) = acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    let from = from.and_then(|from| from.try_into().ok()).ok_or(ErrorKind::InvalidData)?;
    Ok((fd.into(), from))
}

/// How many connections the process has descriptors for, two for each, and `wanted` at most; says so where they are less.
pub fn room(wanted: usize) -> usize {
    let Ok(limit) = sys::raise_nofile() else { return wanted };
    let room = usize::try_from(limit.saturating_sub(OTHERS) / 2).unwrap_or(usize::MAX).max(1);
    if room < wanted {
        log::warn!(
            "at most {room} connections at once, not {wanted}: only {limit} open files are allowed (ulimit -Hn)"
        );
    }
    room.min(wanted)
}

#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

/// What all connections share: one scratch buffer, never borrowed across a wait, and a few pipes.
#[derive(Debug)]
pub struct Pool {
    scratch: RefCell<Box<[u8]>>,
    idle: RefCell<Vec<Pipe>>,
    taken: Cell<usize>,
    most: usize,
    /// What has come out of the tunnel and waits for its readers.
    pub(crate) held: Cell<usize>,
    /// What waits in pipes.
    piped: Cell<usize>,
    pub(crate) pacing: Pacing,
}

impl Default for Pool {
    fn default() -> Self {
        Self::with_pipes(PIPES)
    }
}

impl Pool {
    /// A pool of at most `most` pipes.
    #[must_use]
    pub fn with_pipes(most: usize) -> Self {
        let scratch = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
        Self {
            scratch,
            idle: RefCell::default(),
            taken: Cell::new(0),
            most,
            held: Cell::new(0),
            piped: Cell::new(0),
            pacing: Pacing::of_host(),
        }
    }

    /// Sets what each relayed connection needs; on a listener the accepted ones inherit it.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn prepare(&self, socket: &impl AsFd) -> io::Result<()> {
        self.pacing.begin(socket);
        tcp::nodelay(socket)?;
        let (idle, every, probes) = KEEPALIVE;
        tcp::keepalive(socket, idle, every, probes)
    }

    /// Lends the scratch buffer; `f` cannot wait, so two never hold it.
    pub fn scratch<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        f(&mut self.scratch.borrow_mut())
    }

    /// What the next splice asks for.
    fn share(&self) -> usize {
        (PIPED_ALL.saturating_sub(self.piped.get()) / 2).clamp(CHUNK_LEAST, CHUNK)
    }

    /// None: all are taken, or the process has no descriptors left. The caller copies instead.
    fn take(&self) -> Option<Loan<'_>> {
        if self.taken.get() >= self.most {
            return None;
        }
        let pipe = self
            .idle
            .borrow_mut()
            .pop()
            .or_else(|| sys::pipe(CHUNK as i32).ok().map(|(out, into)| Pipe { out, into }))?;
        self.taken.set(self.taken.get() + 1);
        Some(Loan { pool: self, pipe: Some(pipe) })
    }
}

/// A pipe on loan. Dropped with bytes in it, it is closed: [`Loan::give_back`] is for an empty one.
struct Loan<'p> {
    pool: &'p Pool,
    pipe: Option<Pipe>,
}

impl Loan<'_> {
    fn give_back(mut self) {
        let mut idle = self.pool.idle.borrow_mut();
        if idle.len() < PIPES_IDLE {
            idle.extend(self.pipe.take());
        }
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.pool.taken.set(self.pool.taken.get() - 1);
    }
}

/// Counts what one connection holds, as long as it does.
pub(crate) struct Kept<'p>(&'p Cell<usize>, usize);

impl<'p> Kept<'p> {
    pub(crate) fn new(all: &'p Cell<usize>, len: usize) -> Self {
        all.set(all.get() + len);
        Self(all, len)
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - self.1);
    }
}

/// How one burst ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Burst {
    /// The source has nothing more for now.
    Dry,
    /// The budget is used up.
    Spent,
    /// The source has closed its direction.
    End,
}

pub(crate) fn would_block(e: &io::Error) -> bool {
    e.kind() == ErrorKind::WouldBlock
}

/// As [`Async::readable`] for one who waits alone, without a place in a list for it: half of what an idle connection is.
pub(crate) async fn readable(socket: &Async<TcpStream>) -> io::Result<()> {
    poll_fn(|cx| socket.poll_readable(cx)).await
}

async fn writable(socket: &Async<TcpStream>) -> io::Result<()> {
    poll_fn(|cx| socket.poll_writable(cx)).await
}

/// Closes our direction; a peer that is gone already is no error here, the other direction will tell.
pub(crate) fn finish(to: &TcpStream) -> io::Result<()> {
    match to.shutdown(Shutdown::Write) {
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

/// Its socket closes with a reset: what broke off, or is dropped at our end, must not look as if it had come to its own.
pub(crate) struct Unfinished<'s>(pub(crate) &'s Async<TcpStream>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let _ = sys::reset_on_close(self.0);
    }
}

/// Relays between two sockets until both directions have ended. `up` counts the bytes from `a` to `b`; something may
/// wait in `a` already.
///
/// # Errors
/// When one of them fails: then both are reset, so that neither takes a cut answer for a whole one.
pub async fn sockets(
    pool: &Pool,
    a: Async<TcpStream>,
    b: Async<TcpStream>,
    up: &Cell<u64>,
    down: &Cell<u64>,
) -> io::Result<()> {
    let unfinished = [Unfinished(&a), Unfinished(&b)];
    let last = Cell::new(false);
    let back = async {
        readable(&b).await?;
        one_way(pool, &b, &a, down, &last).await
    };
    try_zip(one_way(pool, &a, &b, up, &last), back).await?;
    unfinished.into_iter().for_each(std::mem::forget);
    // Who has just come goes before what is left to do for these.
    yield_now().await;
    Ok(())
}

/// `last`: whether the other direction has ended. Then so does the connection, and its close says what a shutdown would.
async fn one_way(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &Async<TcpStream>,
    count: &Cell<u64>,
    last: &Cell<bool>,
) -> io::Result<()> {
    // As long as it moves much, no copy is tried.
    let mut much = false;
    let mut asked = false;
    loop {
        let (burst, moved) = match if much { pool.take() } else { None } {
            Some(loan) => spliced(loan, from, to, count).await?,
            None => copied(pool, from, to, count).await?,
        };
        let before = std::mem::replace(&mut much, moved >= HELD);
        if much && !std::mem::replace(&mut asked, true) {
            pool.pacing.much_to(to.get_ref());
        }
        match burst {
            Burst::Dry => readable(from).await?,
            // More than a copy is for: it goes on by a pipe.
            Burst::Spent if !before => {}
            Burst::Spent => yield_now().await,
            Burst::End if last.replace(true) => return Ok(()),
            Burst::End => return finish(to.get_ref()),
        }
    }
}

async fn spliced(
    loan: Loan<'_>,
    from: &Async<TcpStream>,
    to: &Async<TcpStream>,
    count: &Cell<u64>,
) -> io::Result<(Burst, usize)> {
    let Some(pipe) = &loan.pipe else { return Ok((Burst::Spent, 0)) };
    let mut moved = 0;
    let burst = loop {
        let mut full = match sys::splice(from, &pipe.into, loan.pool.share()) {
            Ok(0) => break Burst::End,
            Ok(n) => n,
            Err(e) if would_block(&e) => break Burst::Dry,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        moved += full;
        while full > 0 {
            match sys::splice(&pipe.out, to, full) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    full -= n;
                    add(count, n as u64);
                }
                Err(e) if would_block(&e) => {
                    let _kept = Kept::new(&loan.pool.piped, full);
                    writable(to).await?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if moved >= BUDGET {
            break Burst::Spent;
        }
    };
    loan.give_back();
    Ok((burst, moved))
}

/// One read into the scratch buffer and its write; only what would not write is kept. Where it did not fill the buffer
/// there is hardly more: the next look is epoll's.
async fn copied(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &Async<TcpStream>,
    count: &Cell<u64>,
) -> io::Result<(Burst, usize)> {
    let rest = pool.scratch(|scratch| {
        let n = from.get_ref().read(&mut scratch[..HELD])?;
        write_now(to.get_ref(), &scratch[..n], count).map(|rest| (n, rest.to_vec()))
    });
    match rest {
        Ok((0, _)) => Ok((Burst::End, 0)),
        Ok((n, rest)) => {
            write_rest(to, &rest, count).await?;
            Ok((if n < HELD { Burst::Dry } else { Burst::Spent }, n))
        }
        Err(e) if would_block(&e) => Ok((Burst::Dry, 0)),
        Err(e) if e.kind() == ErrorKind::Interrupted => Ok((Burst::Spent, 0)),
        Err(e) => Err(e),
    }
}

/// Writes what can be written at once; returns the rest.
pub(crate) fn write_now<'b>(mut to: &TcpStream, mut bytes: &'b [u8], count: &Cell<u64>) -> io::Result<&'b [u8]> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                add(count, n as u64);
            }
            Err(e) if would_block(&e) => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}

pub(crate) async fn write_rest(to: &Async<TcpStream>, mut bytes: &[u8], count: &Cell<u64>) -> io::Result<()> {
    while !bytes.is_empty() {
        writable(to).await?;
        bytes = write_now(to.get_ref(), bytes, count)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::LocalExecutor;
    use futures_lite::{AsyncReadExt, AsyncWriteExt};
    use std::rc::Rc;

    fn pair() -> (Async<TcpStream>, Async<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Async::new(client).unwrap(), Async::new(listener.accept().unwrap().0).unwrap())
    }

    #[test]
    fn an_idle_connection_owns_no_pipe_and_a_finished_one_none_either() {
        let ex = LocalExecutor::new();
        crate::reactor::block_on(ex.run(async {
            let pool = Rc::new(Pool::default());
            let ((mut client, a), (b, mut server)) = (pair(), pair());
            let other = pool.clone();
            let relay = ex.spawn(async move { sockets(&other, a, b, &Cell::new(0), &Cell::new(0)).await });
            let much = [7; 4 * HELD];
            for (bytes, pipes) in [(&much[..4], 0), (&much[..], 1)] {
                client.write_all(bytes).await.unwrap();
                server.read_exact(&mut vec![0; bytes.len()]).await.unwrap();
                while pool.taken.get() > 0 {
                    yield_now().await;
                }
                assert_eq!(pool.idle.borrow().len(), pipes, "{} bytes", bytes.len());
            }
            drop((client, server));
            relay.await.unwrap();
            assert_eq!((pool.taken.get(), pool.idle.borrow().len()), (0, 1));
        }));
    }

    #[test]
    fn a_pipe_that_still_holds_bytes_is_never_lent_again() {
        let pool = Pool::default();
        let loan = pool.take().unwrap();
        assert_eq!(pool.taken.get(), 1);
        drop(loan);
        assert_eq!((pool.taken.get(), pool.idle.borrow().len()), (0, 0));
        pool.take().unwrap().give_back();
        assert_eq!((pool.taken.get(), pool.idle.borrow().len()), (0, 1));
        assert!(Pool::with_pipes(0).take().is_none());
    }

    #[test]
    fn readers_that_stall_leave_the_others_less_and_never_nothing() {
        let pool = Pool::default();
        assert_eq!(pool.share(), CHUNK);
        let mut kept = Vec::new();
        for _ in 0..PIPES {
            let len = pool.share();
            assert!(len >= CHUNK_LEAST);
            kept.push(Kept::new(&pool.piped, len));
        }
        assert!(pool.piped.get() <= PIPED_ALL + PIPES * CHUNK_LEAST, "{}", pool.piped.get());
        drop(kept);
        assert_eq!((pool.piped.get(), pool.share()), (0, CHUNK));
    }
}
