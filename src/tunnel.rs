//! The tunnel's driver: one UDP socket under the sans-IO core; handles and streams for the rest of the process.

pub mod identity;

use crate::table::model::{Protocol, ServiceId};
use futures_lite::io::{AsyncRead, AsyncWrite};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

/// What a stream asks of the far node: one of *its own* endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    pub service: ServiceId,
    /// The Service's port, not the endpoint's.
    pub port: u16,
    pub protocol: Protocol,
    pub endpoint: SocketAddr,
}

/// The far end's answer to an [`Open`], or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The far node's table does not say that the endpoint is its own.
    NotMine,
    /// The far node could not connect to its endpoint.
    ConnectFailed(String),
    /// Too many streams are waiting.
    Busy,
    /// No path to the node, or the connection was lost before an answer; the text says which.
    Unreachable(String),
}

/// Cheap to clone; every part of the process that opens streams has one.
#[derive(Clone, Debug)]
pub struct Handle(());

impl Handle {
    /// Queues an OPEN; data may be written at once and travels right behind it.
    #[must_use]
    pub fn open(&self, node: &str, open: &Open) -> TunnelStream {
        let _ = (node, open);
        TunnelStream(())
    }

    /// The next stream that a peer opened, with the peer's name.
    pub async fn accept(&self) -> (TunnelStream, String, Open) {
        std::future::pending().await
    }
}

/// One end of a stream. `poll_close` sends FIN and leaves the other direction open; drop resets both.
#[derive(Debug)]
pub struct TunnelStream(());

impl TunnelStream {
    /// Waits for the far end's answer to our OPEN.
    ///
    /// # Errors
    /// When the far end refuses or cannot be reached: nothing that was written has reached the endpoint.
    pub async fn opened(&mut self) -> Result<(), Refusal> {
        Err(Refusal::Unreachable("the tunnel is off".into()))
    }

    /// Answers a peer's OPEN.
    pub fn answer(&mut self, answer: Result<(), Refusal>) {
        let _ = answer;
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut [u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What `weft peers` shows of one peer.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub name: String,
    /// "direct", "relay", "none".
    pub path: &'static str,
    /// The address that packets go to: the peer's, or the relay's with its name.
    pub via: String,
    pub rtt_ms: Option<u32>,
    pub since_secs: u64,
    pub streams: usize,
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub note: String,
}

/// What `weft status` shows of one relay that we use.
#[derive(Clone, Debug)]
pub struct RelayView {
    pub name: String,
    pub address: String,
    pub registered: bool,
    pub rtt_ms: Option<u32>,
    pub note: String,
}

impl Handle {
    #[must_use]
    pub fn peers(&self) -> Vec<PeerView> {
        Vec::new()
    }

    #[must_use]
    pub fn relays(&self) -> Vec<RelayView> {
        Vec::new()
    }
}
