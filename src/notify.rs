//! What a service manager is told, and how it sees that the loop still turns (sd_notify(3)): a datagram each.

use crate::reactor::Timer;
use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

/// The way to the service manager; without one nothing is said.
#[derive(Debug)]
pub struct Notify {
    way: Option<(UnixDatagram, SocketAddr)>,
    /// It kills a process that it has not heard of for this long.
    patience: Option<Duration>,
}

impl Notify {
    /// By `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    #[must_use]
    pub fn from_env() -> Self {
        let var = |name| env::var(name).ok();
        let way = var("NOTIFY_SOCKET").and_then(|at| {
            open(&at).map_err(|why| log::warn!("the service manager at {at:?} cannot be told anything: {why}")).ok()
        });
        let ours = var("WATCHDOG_PID").is_none_or(|pid| pid == std::process::id().to_string());
        let patience = var("WATCHDOG_USEC").filter(|_| ours && way.is_some()).and_then(|usec| usec.parse().ok());
        Self { way, patience: patience.map(Duration::from_micros).filter(|p| !p.is_zero()) }
    }

    /// Lines such as `READY=1`.
    pub fn tell(&self, lines: &str) {
        if let Some((socket, to)) = &self.way
            && let Err(why) = socket.send_to_addr(lines.as_bytes(), to)
        {
            log::debug!("the service manager was not told {lines:?}: {why}");
        }
    }

    /// Shows signs of life for ever, twice in the time that the manager waits.
    pub async fn live(&self) {
        let Some(patience) = self.patience else { return std::future::pending().await };
        loop {
            self.tell("WATCHDOG=1");
            Timer::after(patience / 2).await;
        }
    }
}

/// A path, or the name of an abstract socket behind an @.
fn open(at: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
    let to = match at.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(at)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::block_on;
    use futures_lite::future::or;

    #[test]
    fn words_and_signs_of_life_arrive() {
        let name = format!("weft-notify-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let notify = Notify { way: open(&format!("@{name}")).ok(), patience: Some(Duration::from_millis(2)) };
        notify.tell("READY=1\nSTATUS=x");
        let twice = async {
            Timer::after(Duration::from_millis(200)).await;
        };
        block_on(or(notify.live(), twice));
        let got = || {
            let mut buffer = [0; 64];
            let n = manager.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        };
        assert_eq!([got(), got(), got()], ["READY=1\nSTATUS=x", "WATCHDOG=1", "WATCHDOG=1"]);
    }

    #[test]
    fn without_a_manager_nothing_is_said() {
        let notify = Notify { way: None, patience: None };
        notify.tell("READY=1");
        assert!(block_on(futures_lite::future::poll_once(notify.live())).is_none());
        assert!(open("@").is_ok() && open(&"x".repeat(200)).is_err());
    }
}
