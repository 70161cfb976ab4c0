//! Two-way copy with half-close: splice(2) between two sockets where there is much to move and a copy where there is
//! little, peek and write between a socket and a tunnel stream. An idle connection owns neither buffer nor pipe.

use crate::reactor::Async;
use crate::{metrics::add, sys};
use futures_lite::{
    future::{poll_fn, try_zip, yield_now},
    io::{AsyncRead, AsyncWrite},
};
use rustix::net::{SocketFlags, acceptfrom_with};
use std::{
    cell::{Cell, RefCell},
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

/// What a pipe holds, and one splice asks for. Four times the kernel's default saves a quarter of the CPU
/// time of bulk transfers (measured over loopback).
const CHUNK: usize = 256 * 1024;

/// What one look into a socket on its way to a stream shows at most.
const SCRATCH: usize = 64 * 1024;

/// Bytes that one direction moves before it lets the others run.
const BUDGET: usize = 512 * 1024;

/// Pipes in use at one time. A reader that stalls keeps its pipe; when all are taken the others copy.
/// Two descriptors and at most [`CHUNK`] of kernel memory each.
const PIPES: usize = 32;

/// Pipes kept open for the next who needs one.
const PIPES_IDLE: usize = 8;

/// What a direction without a pipe, or one of the tunnel, takes at a time: the most that one connection holds while its
/// reader stalls. Where there is less a copy costs half of what a pipe's two calls do.
const HELD: usize = 8 * 1024;

/// Out of the tunnel more is taken, up to [`SCRATCH`], for a reader that took all so far: a sixth less CPU time. As long
/// as all together hold less than this.
const HELD_ALL: usize = 1 << 20;

/// Descriptors that are left to all else: DNS, the tunnel, the API; sessions of UDP give way by themselves.
const OTHERS: u64 = 128;

/// Below the 2 h after which many firewalls forget an established connection (RFC 5382, REQ-5), and far
/// above what a battery would notice.
/// With four probes, 30 s apart, a dead peer is found within four minutes.
pub(crate) const KEEPALIVE: (Duration, Duration, u8) = (Duration::from_secs(120), Duration::from_secs(30), 4);

/// Sets what each relayed connection needs; on a listener the accepted ones inherit it.
///
/// # Errors
/// As setsockopt(2).
pub fn prepare(socket: &impl std::os::fd::AsFd) -> io::Result<()> {
    sys::nodelay(socket)?;
    let (idle, every, probes) = KEEPALIVE;
    sys::keepalive(socket, idle, every, probes)
}

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
    held: Cell<usize>,
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
        Self { scratch, idle: RefCell::default(), taken: Cell::new(0), most, held: Cell::new(0) }
    }

    /// Lends the scratch buffer; `f` cannot wait, so two never hold it.
    pub fn scratch<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        f(&mut self.scratch.borrow_mut())
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

/// Counts what one connection holds.
struct Kept<'p>(&'p Pool, usize);

impl<'p> Kept<'p> {
    fn new(pool: &'p Pool, len: usize) -> Self {
        pool.held.set(pool.held.get() + len);
        Self(pool, len)
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - self.1);
    }
}

/// How one burst ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Burst {
    /// The source has nothing more for now.
    Dry,
    /// The budget is used up.
    Spent,
    /// The source has closed its direction.
    End,
}

fn would_block(e: &io::Error) -> bool {
    e.kind() == ErrorKind::WouldBlock
}

/// As [`Async::readable`] for one who waits alone, without a place in a list for it: half of what an idle connection is.
async fn readable(socket: &Async<TcpStream>) -> io::Result<()> {
    poll_fn(|cx| socket.poll_readable(cx)).await
}

async fn writable(socket: &Async<TcpStream>) -> io::Result<()> {
    poll_fn(|cx| socket.poll_writable(cx)).await
}

/// Closes our direction; a peer that is gone already is no error here, the other direction will tell.
fn finish(to: &TcpStream) -> io::Result<()> {
    match to.shutdown(Shutdown::Write) {
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

/// Its socket closes with a reset: what broke off, or is dropped at our end, must not look as if it had come to its own.
struct Unfinished<'s>(&'s Async<TcpStream>);

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
    loop {
        let (burst, moved) = match if much { pool.take() } else { None } {
            Some(loan) => spliced(loan, from, to, count).await?,
            None => copied(pool, from, to, count).await?,
        };
        let before = std::mem::replace(&mut much, moved >= HELD);
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
        let mut full = match sys::splice(from, &pipe.into, CHUNK) {
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
                Err(e) if would_block(&e) => writable(to).await?,
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
fn write_now<'b>(mut to: &TcpStream, mut bytes: &'b [u8], count: &Cell<u64>) -> io::Result<&'b [u8]> {
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

async fn write_rest(to: &Async<TcpStream>, mut bytes: &[u8], count: &Cell<u64>) -> io::Result<()> {
    while !bytes.is_empty() {
        writable(to).await?;
        bytes = write_now(to.get_ref(), bytes, count)?;
    }
    Ok(())
}

/// Relays between a socket and a stream until both directions have ended. `up` counts the bytes from the
/// socket to the stream.
///
/// # Errors
/// When one of them fails: the socket is reset, and the stream is dropped, which resets it.
pub async fn stream<S: AsyncRead + AsyncWrite + Unpin>(
    pool: &Pool,
    socket: Async<TcpStream>,
    stream: S,
    up: &Cell<u64>,
    down: &Cell<u64>,
) -> io::Result<()> {
    let stream = RefCell::new(stream);
    let unfinished = Unfinished(&socket);
    try_zip(into_stream(pool, &socket, &stream, up), out_of_stream(pool, &stream, &socket, down)).await?;
    std::mem::forget(unfinished);
    Ok(())
}

/// Little is read and written. Of much it writes to the stream what waits in the socket, and takes from the socket what
/// was written: nothing is held here, and the socket's window is the back-pressure.
async fn into_stream<S: AsyncWrite + Unpin>(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &RefCell<S>,
    count: &Cell<u64>,
) -> io::Result<()> {
    let (mut moved, mut much) = (0, false);
    loop {
        let (step, n) = if much { shown(pool, from, to, count).await } else { handed(pool, from, to, count).await }?;
        moved += n;
        much = match step {
            Burst::Dry => {
                poll_fn(|cx| Pin::new(&mut *to.borrow_mut()).poll_flush(cx)).await?;
                readable(from).await?;
                false
            }
            Burst::Spent if moved >= BUDGET => {
                moved = 0;
                yield_now().await;
                true
            }
            Burst::Spent => true,
            Burst::End => return poll_fn(|cx| Pin::new(&mut *to.borrow_mut()).poll_close(cx)).await,
        };
    }
}

/// One read and its write; what the stream does not take at once is kept, at most [`HELD`].
async fn handed<S: AsyncWrite + Unpin>(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &RefCell<S>,
    count: &Cell<u64>,
) -> io::Result<(Burst, usize)> {
    let write = |cx: &mut Context<'_>, bytes: &[u8]| match Pin::new(&mut *to.borrow_mut()).poll_write(cx, bytes) {
        Poll::Ready(Ok(0)) => Poll::Ready(Err(ErrorKind::WriteZero.into())),
        Poll::Ready(Ok(n)) => {
            add(count, n as u64);
            Poll::Ready(Ok(n))
        }
        other => other,
    };
    let done = poll_fn(|cx| {
        Poll::Ready(pool.scratch(|scratch| {
            let n = from.get_ref().read(&mut scratch[..HELD])?;
            let written = if n == 0 { Poll::Pending } else { write(cx, &scratch[..n]) };
            let written = match written {
                Poll::Ready(done) => done?,
                Poll::Pending => 0,
            };
            io::Result::Ok((n, scratch[written..n].to_vec()))
        }))
    })
    .await;
    let (n, rest) = match done {
        Err(e) if would_block(&e) => return Ok((Burst::Dry, 0)),
        Err(e) if e.kind() == ErrorKind::Interrupted => return Ok((Burst::Spent, 0)),
        done => done?,
    };
    let mut rest = &rest[..];
    while !rest.is_empty() {
        let written = poll_fn(|cx| write(cx, rest)).await?;
        rest = &rest[written..];
    }
    Ok(match n {
        0 => (Burst::End, 0),
        HELD => (Burst::Spent, n),
        _ => (Burst::Dry, n),
    })
}

async fn shown<S: AsyncWrite + Unpin>(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &RefCell<S>,
    count: &Cell<u64>,
) -> io::Result<(Burst, usize)> {
    poll_fn(|cx| {
        pool.scratch(|scratch| {
            let waiting = match from.get_ref().peek(scratch) {
                Ok(0) => return Poll::Ready(Ok((Burst::End, 0))),
                Ok(n) => &scratch[..n],
                Err(e) if would_block(&e) => return Poll::Ready(Ok((Burst::Dry, 0))),
                Err(e) if e.kind() == ErrorKind::Interrupted => return Poll::Ready(Ok((Burst::Spent, 0))),
                Err(e) => return Poll::Ready(Err(e)),
            };
            let written = ready!(Pin::new(&mut *to.borrow_mut()).poll_write(cx, waiting))?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            take(from.get_ref(), written)?;
            add(count, written as u64);
            let all = written == waiting.len() && written < SCRATCH;
            Poll::Ready(Ok((if all { Burst::Dry } else { Burst::Spent }, written)))
        })
    })
    .await
}

/// Removes bytes that were peeked at, and so are there.
///
/// # Errors
/// When the connection fails; `UnexpectedEof` where the bytes are not there.
pub fn take(from: &TcpStream, mut len: usize) -> io::Result<()> {
    while len > 0 {
        match sys::discard(from, len) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => len -= n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

async fn out_of_stream<S: AsyncRead + Unpin>(
    pool: &Pool,
    from: &RefCell<S>,
    to: &Async<TcpStream>,
    count: &Cell<u64>,
) -> io::Result<()> {
    let (mut moved, mut step) = (0, HELD);
    loop {
        let (n, rest) = poll_fn(|cx| {
            pool.scratch(|scratch| {
                let n = ready!(Pin::new(&mut *from.borrow_mut()).poll_read(cx, &mut scratch[..step]))?;
                let rest = write_now(to.get_ref(), &scratch[..n], count)?;
                Poll::Ready(io::Result::Ok((n, rest.to_vec())))
            })
        })
        .await?;
        if n == 0 {
            return finish(to.get_ref());
        }
        let more = rest.is_empty() && n == step && pool.held.get() < HELD_ALL;
        step = if more { SCRATCH.min(step * 2) } else { HELD };
        if !rest.is_empty() {
            let _kept = Kept::new(pool, rest.len());
            write_rest(to, &rest, count).await?;
        }
        moved += n;
        if moved >= BUDGET {
            moved = 0;
            yield_now().await;
        }
    }
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
}
