//! One connection to an API server: TCP that notices a dead peer, and TLS where it is wanted.

use crate::{
    carrier::connect::{HEAD_MAX, Proxy},
    kube::tls,
    reactor::{Async, Timer},
    sys, tcp,
};
use futures_lite::future::or;
use rustls::ClientConnection;
use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

/// To connect, and for the handshake.
const PATIENCE: Duration = Duration::from_secs(10);

/// A watch is silent for minutes, and a NAT on the way forgets: a probe after 30 s, then each 15 s, four times.
const KEEPALIVE: (Duration, Duration, u8) = (Duration::from_secs(30), Duration::from_secs(15), 4);

/// What was sent and not acknowledged for so long ends the connection.
const USER_TIMEOUT_MS: u32 = 60_000;

/// Why there is no connection.
#[derive(Debug)]
pub(crate) struct Failure {
    /// In words that name the remedy.
    pub(crate) words: String,
    /// A clock that is put right would mend it.
    pub(crate) is_about_time: bool,
}

impl Failure {
    pub(crate) fn new(words: impl Into<String>) -> Self {
        Self { words: words.into(), is_about_time: false }
    }

    fn tls(error: &rustls::Error) -> Self {
        Self { words: tls::words(error), is_about_time: tls::is_about_time(error) }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let words = match error.kind() {
            ErrorKind::ConnectionRefused => "nobody listens there: is it running?".into(),
            ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                "it closes the connection: does it speak TLS, and is that what is configured?".into()
            }
            _ => error.to_string(),
        };
        Self::new(words)
    }
}

pub(crate) struct Conn {
    tcp: Async<TcpStream>,
    tls: Option<Box<ClientConnection>>,
}

/// A proxy, and how it is asked for the way.
type Through<'p> = Option<(&'p Proxy, String)>;

impl Conn {
    /// To an API server, or to the proxy that leads to it.
    pub(crate) async fn open(
        to: SocketAddr,
        mark: u32,
        through: Through<'_>,
        tls: Option<ClientConnection>,
    ) -> Result<Self, Failure> {
        let late = async {
            Timer::after(PATIENCE).await;
            Err(Failure::new("no answer: is it on, and does a firewall let us through?"))
        };
        or(Self::dial(to, mark, through, tls), late).await
    }

    async fn dial(
        to: SocketAddr,
        mark: u32,
        through: Through<'_>,
        tls: Option<ClientConnection>,
    ) -> Result<Self, Failure> {
        let socket = sys::tcp_socket(&to)?;
        // So that our own rules never catch it. Without the right to mark there are no rules of ours either.
        let _ = sys::set_mark(&socket, mark);
        let (idle, every, count) = KEEPALIVE;
        tcp::keepalive(&socket, idle, every, count)?;
        tcp::nodelay(&socket)?;
        rustix::net::sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MS).map_err(io::Error::from)?;
        let tcp = Async::connect_by(socket, &to).await?;
        let mut conn = Self { tcp, tls: None };
        if let Some((proxy, request)) = through {
            conn.send(request.as_bytes()).await?;
            conn.led_on(proxy).await?;
        }
        conn.tls = tls.map(Box::new);
        conn.handshake().await?;
        Ok(conn)
    }

    /// The proxy has made the way. The server behind says nothing before we do.
    async fn led_on(&mut self, proxy: &Proxy) -> Result<(), Failure> {
        let mut answer = vec![0; HEAD_MAX];
        let mut length = 0;
        loop {
            self.readable().await?;
            match self.read(&mut answer[length..])? {
                None => continue,
                Some(0) => return Err(Failure::new("the proxy hung up")),
                Some(count) => length += count,
            }
            if proxy.judge(&answer[..length]).map_err(Failure::new)? {
                return Ok(());
            }
        }
    }

    async fn handshake(&mut self) -> Result<(), Failure> {
        loop {
            self.flush().await?;
            let Some(tls) = self.tls.as_mut().filter(|tls| tls.is_handshaking()) else { return Ok(()) };
            self.tcp.readable().await?;
            match tls.read_tls(&mut self.tcp.get_ref()) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            if let Err(error) = tls.process_new_packets() {
                // The peer is told why, as far as that goes.
                let _ = tls.write_tls(&mut self.tcp.get_ref());
                return Err(Failure::tls(&error));
            }
        }
    }

    /// Sends what TLS has to send.
    async fn flush(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            match tls.write_tls(&mut self.tcp.get_ref()) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.tcp.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub(crate) async fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.writer().write_all(bytes)?;
            return self.flush().await;
        }
        while !bytes.is_empty() {
            match self.tcp.get_ref().write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.tcp.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Until there may be something to read. Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.tcp.readable().await
    }

    /// What is there: None for nothing yet, 0 bytes for the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Failure> {
        let Some(tls) = &mut self.tls else {
            return match self.tcp.get_ref().read(buffer) {
                Ok(n) => Ok(Some(n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
                Err(_) => Ok(Some(0)),
            };
        };
        loop {
            match tls.reader().read(buffer) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // Closed without a word: what was under way is cut, which the reader of it notices.
                Err(_) => return Ok(Some(0)),
            }
            match tls.read_tls(&mut self.tcp.get_ref()) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Ok(Some(0)),
            }
            tls.process_new_packets().map_err(|error| Failure::tls(&error))?;
            if tls.wants_write() {
                // A key update's answer; what does not fit goes with the next request.
                let _ = tls.write_tls(&mut self.tcp.get_ref());
            }
        }
    }

    /// Whether this machine has still the address that the connection is from.
    pub(crate) fn is_at_home(&self) -> bool {
        let Ok(local) = self.tcp.get_ref().local_addr() else { return false };
        let gone = |ip: IpAddr| matches!(UdpSocket::bind((ip, 0)), Err(e) if e.kind() == ErrorKind::AddrNotAvailable);
        // A link-local address needs its scope to be bound.
        matches!(local.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local()) || !gone(local.ip())
    }
}
