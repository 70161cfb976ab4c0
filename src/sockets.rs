//! Descriptors that do not block, in the loop of their thread.

use crate::{
    reactor::{Direction, Entry},
    sys,
};
use futures_lite::io::{AsyncRead, AsyncWrite};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::{
    future::Future,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket},
    os::unix::net::{UnixListener, UnixStream},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

/// A socket, pipe or the like; of the thread that made it.
pub struct Async<T: AsFd>(Rc<Entry<T>>);

impl<T: AsFd + 'static> Async<T> {
    /// # Errors
    /// When the kernel does not know the descriptor.
    pub fn new(io: T) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&io, true)?;
        Self::new_nonblocking(io)
    }

    /// One that does not block already.
    ///
    /// # Errors
    /// None today.
    #[allow(clippy::unnecessary_wraps)]
    pub fn new_nonblocking(io: T) -> io::Result<Self> {
        Ok(Self(Entry::new(io)))
    }
}

impl<T: AsFd> Async<T> {
    #[must_use]
    pub fn get_ref(&self) -> &T {
        &self.0.io
    }

    /// Until there may be something to read, an end or an error.
    pub fn readable(&self) -> impl Future<Output = io::Result<()>> {
        self.0.ready(Direction::Read)
    }

    /// Until something may be written, or an error be had.
    pub fn writable(&self) -> impl Future<Output = io::Result<()>> {
        self.0.ready(Direction::Write)
    }

    /// As [`Self::readable`], of one task.
    ///
    /// # Errors
    /// When the kernel's loop does not take the descriptor.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll(Direction::Read, cx)
    }

    /// As [`Self::writable`], of one task.
    ///
    /// # Errors
    /// When the kernel's loop does not take the descriptor.
    pub fn poll_writable(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll(Direction::Write, cx)
    }

    async fn when<R>(&self, direction: Direction, mut tried: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        loop {
            match tried(&self.0.io) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.0.ready(direction).await?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    fn poll_with(
        &self,
        direction: Direction,
        cx: &Context<'_>,
        mut tried: impl FnMut(&T) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match tried(&self.0.io) {
                Err(rustix::io::Errno::WOULDBLOCK) => ready!(self.0.poll(direction, cx))?,
                Err(rustix::io::Errno::INTR) => {}
                done => return Poll::Ready(done.map_err(Into::into)),
            }
        }
    }
}

impl<T: AsFd> std::fmt::Debug for Async<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.io.as_fd().fmt(f)
    }
}

impl<T: AsFd> AsFd for Async<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.io.as_fd()
    }
}

impl<T: AsFd> AsRawFd for Async<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.io.as_fd().as_raw_fd()
    }
}

impl<T: AsFd> AsyncRead for &Async<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll_with(Direction::Read, cx, |io| rustix::io::read(io, &mut *buf))
    }
}

impl<T: AsFd> AsyncWrite for &Async<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(Direction::Write, cx, |io| rustix::io::write(io, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends our direction of a socket; does nothing to what has none, and to one that is over.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match rustix::net::shutdown(&self.0.io, rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTSOCK | rustix::io::Errno::NOTCONN) => Ok(()),
            Err(e) => Err(e.into()),
        })
    }
}

impl<T: AsFd> AsyncRead for Async<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_read(cx, buf)
    }
}

impl<T: AsFd> AsyncWrite for Async<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_close(cx)
    }
}

impl Async<UdpSocket> {
    /// # Errors
    /// As bind(2).
    pub fn bind(at: impl Into<SocketAddr>) -> io::Result<Self> {
        Self::new(UdpSocket::bind(at.into())?)
    }

    /// # Errors
    /// As send(2).
    pub async fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.when(Direction::Write, |s| s.send(bytes)).await
    }

    /// # Errors
    /// As recv(2).
    pub async fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.when(Direction::Read, |s| s.recv(buf)).await
    }

    /// # Errors
    /// As sendto(2).
    pub async fn send_to(&self, bytes: &[u8], to: impl Into<SocketAddr>) -> io::Result<usize> {
        let to = to.into();
        self.when(Direction::Write, |s| s.send_to(bytes, to)).await
    }

    /// # Errors
    /// As recvfrom(2).
    pub async fn recv_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.when(Direction::Read, |s| s.recv_from(buf)).await
    }
}

impl Async<TcpListener> {
    /// # Errors
    /// As bind(2) and listen(2).
    pub fn bind(at: impl ToSocketAddrs) -> io::Result<Self> {
        Self::new(TcpListener::bind(at)?)
    }

    /// # Errors
    /// As accept(2).
    pub async fn accept(&self) -> io::Result<(Async<TcpStream>, SocketAddr)> {
        let (stream, from) = self.when(Direction::Read, TcpListener::accept).await?;
        Ok((Async::new(stream)?, from))
    }
}

impl Async<TcpStream> {
    /// # Errors
    /// As connect(2).
    pub async fn connect(to: impl Into<SocketAddr>) -> io::Result<Self> {
        let to = to.into();
        Self::connect_by(sys::tcp_socket(&to)?, &to).await
    }

    /// Connects a socket of [`sys::tcp_socket`] that the caller has prepared.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect_by(socket: TcpStream, to: &SocketAddr) -> io::Result<Self> {
        sys::connect(&socket, to)?;
        // On this machine it is connected as soon as it is asked for.
        let done = socket.peer_addr().is_ok();
        let stream = Self::new_nonblocking(socket)?;
        if done {
            return Ok(stream);
        }
        stream.writable().await?;
        stream.get_ref().take_error()?.map_or(Ok(stream), Err)
    }
}

impl Async<UnixListener> {
    /// # Errors
    /// As accept(2).
    pub async fn accept(&self) -> io::Result<(Async<UnixStream>, std::os::unix::net::SocketAddr)> {
        let (stream, from) = self.when(Direction::Read, UnixListener::accept).await?;
        Ok((Async::new(stream)?, from))
    }
}
