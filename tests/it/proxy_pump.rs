//! The pump between real sockets and in-memory streams.

use futures_lite::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt,
    future::{or, yield_now},
};
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    io::{self, ErrorKind, Read},
    net::{TcpListener, TcpStream},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};
use weft::{
    pump::{Pool, sockets},
    reactor::{Async, LocalExecutor, Timer},
    streamed::stream,
    sys,
};

const BIG: usize = 200_000;

/// One direction of an in-memory stream with a small window.
#[derive(Default)]
struct Lane {
    bytes: VecDeque<u8>,
    most: usize,
    end: bool,
    cut: bool,
    wakers: Vec<Waker>,
}

/// One end of an in-memory stream; dropped before it was closed, it resets the other.
struct Memory {
    reads: Rc<RefCell<Lane>>,
    writes: Rc<RefCell<Lane>>,
}

const WINDOW: usize = 5_000;

fn memory() -> (Memory, Memory) {
    let lane = || Rc::new(RefCell::new(Lane { most: WINDOW, ..Lane::default() }));
    let (a, b) = (lane(), lane());
    (Memory { reads: a.clone(), writes: b.clone() }, Memory { reads: b, writes: a })
}

fn wake(lane: &mut Lane) {
    lane.wakers.drain(..).for_each(Waker::wake);
}

impl AsyncRead for Memory {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut lane = self.reads.borrow_mut();
        if lane.cut {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        if lane.bytes.is_empty() && !lane.end {
            lane.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        let n = lane.bytes.read(buffer)?;
        wake(&mut lane);
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for Memory {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut lane = self.writes.borrow_mut();
        if lane.cut {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        let room = (lane.most - lane.bytes.len()).min(bytes.len());
        if room == 0 {
            lane.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        lane.bytes.extend(&bytes[..room]);
        wake(&mut lane);
        Poll::Ready(Ok(room))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut lane = self.writes.borrow_mut();
        lane.end = true;
        wake(&mut lane);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for lane in [&self.reads, &self.writes] {
            let mut lane = lane.borrow_mut();
            lane.cut = lane.cut || !lane.end;
            wake(&mut lane);
        }
    }
}

fn pair() -> (Async<TcpStream>, Async<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (Async::new(client).unwrap(), Async::new(listener.accept().unwrap().0).unwrap())
}

/// A hang is a failure, not a pause.
fn run(ex: &LocalExecutor<'_>, test: impl Future<Output = ()>) {
    weft::reactor::block_on(or(ex.run(test), async {
        Timer::after(Duration::from_secs(60)).await;
        panic!("it hangs");
    }));
}

fn noise(seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..BIG).map(|_| rng.u8(..)).collect()
}

/// A client that sends and shuts down, a server that reads to the end and only then answers.
async fn ask(mut client: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Vec<u8> {
    client.write_all(bytes).await.unwrap();
    client.close().await.unwrap();
    let mut back = Vec::new();
    client.read_to_end(&mut back).await.unwrap();
    back
}

async fn answer(mut server: impl AsyncRead + AsyncWrite + Unpin) {
    let mut got = Vec::new();
    server.read_to_end(&mut got).await.unwrap();
    got.reverse();
    server.write_all(&got).await.unwrap();
    server.close().await.unwrap();
}

fn whole_between_sockets(pipes: usize) {
    let ex = LocalExecutor::new();
    run(&ex, async {
        let pool = Rc::new(Pool::with_pipes(pipes));
        let counts = Rc::new((Cell::new(0), Cell::new(0)));
        let ((client, a), (b, server)) = (pair(), pair());
        let relay = ex.spawn({
            let (pool, counts) = (pool.clone(), counts.clone());
            async move { sockets(&pool, a, b, &counts.0, &counts.1).await }
        });
        let served = ex.spawn(answer(server));
        let sent = noise(1);
        let mut back = ask(client, &sent).await;
        back.reverse();
        assert!(back == sent);
        served.await;
        relay.await.unwrap();
        assert_eq!((counts.0.get(), counts.1.get()), (BIG as u64, BIG as u64));
    });
}

#[test]
fn half_close_comes_through_whole_with_and_without_a_pipe() {
    whole_between_sockets(4);
    whole_between_sockets(0);
}

#[test]
fn half_close_comes_through_a_stream_with_a_small_window() {
    let ex = LocalExecutor::new();
    run(&ex, async {
        let pool = Rc::new(Pool::default());
        let ((client, a), (near, far)) = (pair(), memory());
        let ((b, server), other) = (pair(), pool.clone());
        let up = ex.spawn(async move { stream(&pool, a, near, &Cell::new(0), &Cell::new(0)).await });
        let down = ex.spawn(async move { stream(&other, b, far, &Cell::new(0), &Cell::new(0)).await });
        let served = ex.spawn(answer(server));
        let sent = noise(2);
        let mut back = ask(client, &sent).await;
        back.reverse();
        assert!(back == sent);
        served.await;
        up.await.unwrap();
        down.await.unwrap();
    });
}

#[test]
fn a_reset_goes_through_in_both_directions() {
    let ex = LocalExecutor::new();
    run(&ex, async {
        let pool = Rc::new(Pool::default());
        let ((mut client, a), (b, server)) = (pair(), pair());
        let other = pool.clone();
        let relay = ex.spawn(async move { sockets(&other, a, b, &Cell::new(0), &Cell::new(0)).await });
        client.write_all(b"x").await.unwrap();
        sys::reset_on_close(&server).unwrap();
        drop(server);
        assert_eq!(client.read(&mut [0; 9]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        relay.await.unwrap_err();

        let ((client, a), (near, mut far)) = (pair(), memory());
        let relay = ex.spawn(async move { stream(&pool, a, near, &Cell::new(0), &Cell::new(0)).await });
        sys::reset_on_close(&client).unwrap();
        drop(client);
        assert_eq!(far.read(&mut [0; 9]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        relay.await.unwrap_err();
    });
}

#[test]
fn what_a_stalled_stream_does_not_take_stays_in_the_socket() {
    let ex = LocalExecutor::new();
    run(&ex, async {
        let pool = Rc::new(Pool::default());
        let ((mut client, a), (near, mut far)) = (pair(), memory());
        let taken = Rc::new(Cell::new(0));
        let count = taken.clone();
        let relay = ex.spawn(async move { stream(&pool, a, near, &count, &Cell::new(0)).await });
        client.write_all(&noise(3)[..60_000]).await.unwrap();
        while taken.get() < WINDOW as u64 {
            yield_now().await;
        }
        for _ in 0..1_000 {
            yield_now().await;
        }
        assert_eq!(taken.get(), WINDOW as u64);
        let mut first = vec![0; 60_000];
        far.read_exact(&mut first).await.unwrap();
        assert!(first == noise(3)[..60_000]);
        drop(relay);
    });
}
