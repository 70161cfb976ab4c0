//! Asks the gateway for a port: the socket under the sans-IO [`Portmap`].

use crate::reactor::Async;
use crate::tunnel::{
    portmap::{Output, PORT, Portmap},
    survey::Gateway,
};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Instant,
};

/// Answers that are read in one turn; more wait for the next.
const BUDGET: usize = 16;
/// RFC 6887 section 7: no message is longer, and one that was cut is none.
const LONGEST: usize = 1101;

/// See the module. The owner waits for `readable` and the time that `turn` gives, and calls `turn` then.
pub struct Mapper {
    core: Portmap,
    /// Connected to the gateway: nobody else's datagrams come in.
    socket: Option<Async<UdpSocket>>,
    gateway: Option<Gateway>,
    enabled: bool,
    /// When `turn` is next of use.
    pub wake: Option<Instant>,
}

impl Mapper {
    /// For the tunnel's UDP port.
    #[must_use]
    pub fn new(port: u16, enabled: bool) -> Self {
        let core = Portmap::new(port, fastrand::Rng::new());
        Self { core, socket: None, gateway: None, enabled, wake: None }
    }

    /// Whom to ask from now on.
    pub fn set_gateway(&mut self, now: Instant, gateway: Option<Gateway>) {
        if gateway == self.gateway || !self.enabled {
            return;
        }
        self.socket = gateway.and_then(|g| {
            let socket = open(g.local, g.address);
            socket.map_err(|e| log::debug!(target: "tunnel", "no socket for the gateway {}: {e}", g.address)).ok()
        });
        self.gateway = gateway.filter(|_| self.socket.is_some());
        self.core.set_gateway(now, self.gateway);
        self.wake = Some(now);
    }

    /// # Errors
    /// When the socket cannot be waited for.
    pub async fn readable(&self) -> io::Result<()> {
        match &self.socket {
            Some(socket) => futures_lite::future::poll_fn(|cx| socket.poll_readable(cx)).await,
            None => std::future::pending().await,
        }
    }

    /// Reads, sends, and tells where the gateway lets us be reached, where that has changed.
    pub fn turn(&mut self, now: Instant) -> Option<Option<SocketAddr>> {
        if let (Some(socket), Some(gateway)) = (&self.socket, self.gateway) {
            let mut buffer = [0; LONGEST];
            for _ in 0..BUDGET {
                match socket.get_ref().recv(&mut buffer) {
                    Ok(len) => {
                        let from = SocketAddr::new(gateway.address.into(), PORT);
                        self.core.handle_datagram(now, from, &buffer[..len]);
                    }
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => self.core.handle_refused(now),
                    Err(_) => break,
                }
            }
        }
        let (mut buffer, mut told) = (Vec::new(), None);
        loop {
            match self.core.poll_output(now, &mut buffer) {
                Output::Send(_) => self.send(&buffer),
                Output::Mapped(mapped) => told = Some(mapped),
                Output::Wait(at) => {
                    self.wake = at;
                    return told;
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) {
        if let Some(Err(error)) = self.socket.as_ref().map(|s| s.get_ref().send(bytes)) {
            log::debug!(target: "tunnel", "to the gateway: {error}");
        }
    }

    /// Gives the port back.
    pub fn bye(&mut self) {
        if let Some((_, bytes)) = self.core.bye() {
            self.send(&bytes);
        }
    }
}

fn open(local: Ipv4Addr, gateway: Ipv4Addr) -> io::Result<Async<UdpSocket>> {
    let socket = Async::<UdpSocket>::bind((local, 0))?;
    socket.get_ref().connect((gateway, PORT))?;
    Ok(socket)
}
