//! The first bytes of a client's connection, which stay in its socket: so they can be sent to another endpoint still.

use crate::{
    proxy::head::{self, HEAD_MAX, Look},
    pump::Pool,
    reactor::{Async, Timer},
};
use futures_lite::{
    AsyncWrite,
    future::{or, poll_fn},
};
use std::{io::ErrorKind, net::TcpStream, pin::Pin, task::Poll, time::Duration};

/// Bytes of a client that travel right behind an OPEN, before the far end has answered.
const EARLY: usize = 16 * 1024;
/// For the head of the first request, where the rule chooses by a header. A client that says nothing for so long, as one
/// whose server speaks first, gets an endpoint in turn.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at a head of which only a part has come.
const HEAD_EVERY: Duration = Duration::from_millis(10);

/// What became of the client's first bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Early {
    Sent(usize),
    Nothing,
    /// The client has ended or failed, or the stream takes nothing: the pump will see to it.
    Never,
}

/// Writes to the stream what waits in the socket, and leaves it there.
pub(crate) async fn early(pool: &Pool, client: &TcpStream, stream: &mut (impl AsyncWrite + Unpin)) -> Early {
    poll_fn(|cx| {
        Poll::Ready(pool.scratch(|scratch| {
            let waiting = match client.peek(&mut scratch[..EARLY]) {
                Ok(0) => return Early::Never,
                Ok(n) => &scratch[..n],
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Early::Nothing,
                Err(_) => return Early::Never,
            };
            match Pin::new(&mut *stream).poll_write(cx, waiting) {
                Poll::Ready(Ok(n)) => Early::Sent(n),
                Poll::Ready(Err(_)) | Poll::Pending => Early::Never,
            }
        }))
    })
    .await
}

/// The hash of a header of a connection's first request, which stays in the socket. None where it does not come in time
/// or is not there.
pub(crate) async fn key(pool: &Pool, client: &Async<TcpStream>, name: &str) -> Option<u64> {
    let late = async {
        Timer::after(HEAD_PATIENCE).await;
        None
    };
    let read = async {
        loop {
            client.readable().await.ok()?;
            let look = pool.scratch(|scratch| match client.get_ref().peek(&mut scratch[..HEAD_MAX]) {
                Ok(0) => Look::Absent,
                Ok(n) => match head::look(&scratch[..n], name) {
                    Look::More if n == HEAD_MAX => Look::Absent,
                    look => look,
                },
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Look::More,
                Err(_) => Look::Absent,
            });
            match look {
                Look::Found(key) => return Some(key),
                Look::Absent => return None,
                // What has come makes the socket readable: there is nothing to wait for.
                Look::More => Timer::after(HEAD_EVERY).await,
            };
        }
    };
    or(read, late).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::block_on;
    use crate::streamed;
    use std::{
        io::{Read, Write},
        net::TcpListener,
    };

    #[test]
    fn early_bytes_are_sent_on_and_stay_in_the_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut socket = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        let (pool, mut stream) = (Pool::default(), Vec::new());
        assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Nothing);
        client.write_all(b"GET /").unwrap();
        while block_on(early(&pool, &socket, &mut stream)) == Early::Nothing {}
        assert_eq!(stream, b"GET /");
        assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Sent(5));
        client.write_all(b" HTTP").unwrap();
        drop(client);
        streamed::take(&socket, 5).unwrap();
        socket.set_nonblocking(false).unwrap();
        let mut rest = String::new();
        socket.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " HTTP");
        assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Never);
    }
}
