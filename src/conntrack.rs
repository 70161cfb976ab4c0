//! Deletes the kernel's memory of flows that would go on to where they went before the rules changed.

use crate::{
    proxy::{
        flows::{self, Ways},
        link::{Answer, messages},
    },
    reactor::{Async, Timer},
    sys,
};
use anyhow::{Context, Result};
use futures_lite::future::{or, yield_now};
use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    os::fd::OwnedFd,
    time::Duration,
};

/// How long the whole list may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// netlink(7): what the kernel sends at a time, at most.
const DATAGRAM: usize = 32 * 1024;
/// Datagrams that are read before the others may run: some 600 entries.
const BATCH: usize = 4;
/// Entries that are deleted in one go; those beyond it expire by themselves when their client pauses.
const DELETES: usize = 10_000;

/// Looks through all entries of the family of `own` and deletes those that lead elsewhere than `ways` say. Returns how
/// many of UDP.
///
/// # Errors
/// Where the kernel does not show its entries (module nf_conntrack_netlink), or not to us.
pub async fn settle(ways: &Ways, own: IpAddr) -> Result<usize> {
    let late = async {
        Timer::after(PATIENCE).await;
        Err(ErrorKind::TimedOut.into())
    };
    or(settled(ways, own), late).await.context("conntrack (module nf_conntrack_netlink)")
}

async fn settled(ways: &Ways, own: IpAddr) -> io::Result<usize> {
    let socket = Async::new(sys::netlink(sys::Family::Netfilter, 0, Duration::ZERO)?)?;
    let family = if own.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    sys::send(&socket, &flows::list(1, family as u8))?;
    let mut stale = Vec::new();
    each(&socket, |body| {
        if stale.len() < DELETES {
            stale.extend(flows::delete_stale(2, body, ways, own));
        }
    })
    .await?;
    let mut deleted = 0;
    for (is_udp, message) in &stale {
        sys::send(&socket, message)?;
        match each(&socket, |_| ()).await {
            Ok(()) => deleted += usize::from(*is_udp),
            // It has expired meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(deleted)
}

/// Hands over what is answered until the end.
async fn each(socket: &Async<OwnedFd>, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        for _ in 0..BATCH {
            let datagram = match sys::receive(socket, &mut buffer, false) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    socket.readable().await?;
                    continue;
                }
                datagram => datagram?,
            };
            for raw in messages(datagram) {
                match raw.end() {
                    Some(Answer::Done) => return Ok(()),
                    Some(Answer::Failed(code)) => return Err(io::Error::from_raw_os_error(code)),
                    Some(_) | None => take(raw.body),
                }
            }
        }
        yield_now().await;
    }
}
