//! What TCP connections are set to: no delay, probes of silent peers, and no pacing towards those who are near.

use crate::sys;
use libc::c_int;
use rustix::net::sockopt;
use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

/// A shorter round trip is one on this machine or its LAN.
const NEAR: Duration = Duration::from_millis(1);

/// linux/tcp.h.
const TCP_NOTSENT_LOWAT: c_int = 25;

/// RFC 5681's congestion control: each kernel has it, and lets everybody use it.
const UNPACED: &str = "reno";

/// Sends at once what is written; a listener's accepted sockets inherit it.
///
/// # Errors
/// As setsockopt(2).
pub fn nodelay(socket: &impl AsFd) -> io::Result<()> {
    Ok(sockopt::set_tcp_nodelay(socket, true)?)
}

/// Has the kernel probe a silent peer after `idle`, then each `every`, and give up after `count` probes.
///
/// # Errors
/// As setsockopt(2).
pub fn keepalive(socket: &impl AsFd, idle: Duration, every: Duration, count: u8) -> io::Result<()> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, idle)?;
    sockopt::set_tcp_keepintvl(socket, every)?;
    Ok(sockopt::set_tcp_keepcnt(socket, count.into())?)
}

/// Has a socket count as writable only while less than this has not been sent (tcp(7): TCP_NOTSENT_LOWAT).
///
/// # Errors
/// As setsockopt(2).
pub fn queue_less(fd: &impl AsFd, bytes: u32) -> io::Result<()> {
    sys::set_option(fd, libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, bytes)
}

/// The name of a socket's congestion control: shorter than 16 bytes (linux/tcp.h: TCP_CA_NAME_MAX).
fn congestion(fd: &impl AsFd) -> io::Result<String> {
    let mut name = [0_u8; 16];
    let len = sys::get_option(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name)? as usize;
    let known = name.iter().take(len).copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8(known).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The smoothed round trip of a connection; zero as long as none was measured. It is tcpi_rtt, the last of the first
/// 18 words of `tcp_info` (linux/tcp.h).
fn round_trip(socket: &TcpStream) -> io::Result<Duration> {
    let mut info = [0_u32; 18];
    sys::get_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(Duration::from_micros(info[17].into()))
}

/// The host's congestion control where that paces what it sends, as BBR does: a timer for each few packets, which
/// towards a near one is a third of all CPU time and gains nothing (tests/bench/README.md).
///
/// A socket that has paced once does so for good (Linux: sk_pacing_status is never taken back), so all begin without.
#[derive(Debug, Default)]
pub struct Pacing(Option<Box<str>>);

impl Pacing {
    /// As the host has it now. Where it does not say, nothing is changed.
    #[must_use]
    pub fn of_host() -> Self {
        let name = sys::tcp_socket(&SocketAddr::from(([127, 0, 0, 1], 0))).and_then(|s| congestion(&s));
        Self(name.ok().filter(|name| name.starts_with("bbr")).map(Into::into))
    }

    /// Before a socket connects or listens; what is accepted inherits it.
    pub fn begin(&self, socket: &impl AsFd) {
        if self.0.is_some() {
            let _ = sockopt::set_tcp_congestion(socket, UNPACED);
        }
    }

    /// Much goes to this one: where it is far the host's own choice is the better one.
    pub fn much_to(&self, socket: &TcpStream) {
        if let Some(name) = &self.0
            && !round_trip(socket).is_ok_and(|took| !took.is_zero() && took < NEAR)
        {
            let _ = sockopt::set_tcp_congestion(socket, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, net::TcpListener};

    fn pair(pacing: &Pacing) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        pacing.begin(&listener);
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"x").unwrap();
        (client, listener.accept().unwrap().0)
    }

    /// None under qemu-user, which hands on four bytes of each option.
    fn named(socket: &TcpStream) -> Option<String> {
        let (name, took) = (congestion(socket).unwrap(), round_trip(socket).unwrap());
        if cfg!(not(target_arch = "x86_64")) && took.is_zero() {
            return None;
        }
        assert!(took > Duration::ZERO && took < Duration::from_secs(1), "{took:?}");
        Some(name)
    }

    #[test]
    fn a_host_that_paces_does_not_towards_the_near() {
        let (client, server) = pair(&Pacing(Some("bbr".into())));
        let Some(theirs) = named(&client) else { return };
        assert_eq!(named(&server).unwrap(), UNPACED);
        let took = round_trip(&server).unwrap();
        Pacing(Some(theirs.clone().into())).much_to(&server);
        assert_eq!(named(&server).unwrap(), if took < NEAR { UNPACED } else { &theirs });
    }

    #[test]
    fn a_host_that_does_not_pace_is_left_as_it_is() {
        let (client, server) = pair(&Pacing::default());
        Pacing::default().much_to(&server);
        let Some(theirs) = named(&client) else { return };
        assert_eq!(named(&server).unwrap(), theirs);
        assert!(Pacing::of_host().0.is_none_or(|name| *name == *theirs));
    }
}
