//! Two-way copy between a socket and a stream of the tunnel: peek and write where much goes in. Nothing is owned while
//! nothing moves.

use crate::{
    metrics::add,
    pump::{
        BUDGET, Burst, HELD, HELD_ALL, Kept, Pool, SCRATCH, Unfinished, finish, readable, would_block, write_now,
        write_rest,
    },
    reactor::Async,
    sys,
};
use futures_lite::{
    future::{poll_fn, try_zip, yield_now},
    io::{AsyncRead, AsyncWrite},
};
use std::{
    cell::{Cell, RefCell},
    io::{self, ErrorKind, Read},
    net::TcpStream,
    pin::Pin,
    task::{Context, Poll, ready},
};

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

/// Writes of these bytes, which are some, what the stream takes; counts it.
fn put<S: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    to: &RefCell<S>,
    bytes: &[u8],
    count: &Cell<u64>,
) -> Poll<io::Result<usize>> {
    let written = ready!(Pin::new(&mut *to.borrow_mut()).poll_write(cx, bytes))?;
    if written == 0 {
        return Poll::Ready(Err(ErrorKind::WriteZero.into()));
    }
    add(count, written as u64);
    Poll::Ready(Ok(written))
}

/// One read and its write; what the stream does not take at once is kept, at most [`HELD`].
async fn handed<S: AsyncWrite + Unpin>(
    pool: &Pool,
    from: &Async<TcpStream>,
    to: &RefCell<S>,
    count: &Cell<u64>,
) -> io::Result<(Burst, usize)> {
    let done = poll_fn(|cx| {
        Poll::Ready(pool.scratch(|scratch| {
            let n = from.get_ref().read(&mut scratch[..HELD])?;
            if n == 0 {
                return Ok((0, Vec::new()));
            }
            let written = match put(cx, to, &scratch[..n], count) {
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
        let written = poll_fn(|cx| put(cx, to, rest, count)).await?;
        rest = &rest[written..];
    }
    Ok(match n {
        0 => (Burst::End, 0),
        HELD => (Burst::Spent, n),
        _ => (Burst::Dry, n),
    })
}

/// One look and its write.
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
            let written = ready!(put(cx, to, waiting, count))?;
            take(from.get_ref(), written)?;
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
    let (mut moved, mut step, mut asked) = (0, HELD, false);
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
        if n >= HELD && !std::mem::replace(&mut asked, true) {
            pool.pacing.much_to(to.get_ref());
        }
        if !rest.is_empty() {
            let _kept = Kept::new(&pool.held, rest.len());
            write_rest(to, &rest, count).await?;
        }
        moved += n;
        if moved >= BUDGET {
            moved = 0;
            yield_now().await;
        }
    }
}
