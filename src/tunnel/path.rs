//! Where a peer's datagrams go.

use std::net::SocketAddr;

/// One way to a peer. Rank: LAN, IPv6, IPv4, relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Path {
    /// Straight to this address.
    Direct(SocketAddr),
    /// In frames of this flow, through the relay of this index in our list.
    Relay { relay: usize, flow: u32 },
}

impl Path {
    pub(super) fn is_relay(self) -> bool {
        matches!(self, Self::Relay { .. })
    }
}
