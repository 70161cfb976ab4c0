//! Where a peer's datagrams go.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// An address of a peer's, and from which of ours it is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Way {
    pub remote: SocketAddr,
    /// Ours, where several uplinks lead there. None: as the routing table says.
    pub local: Option<IpAddr>,
}

impl From<SocketAddr> for Way {
    fn from(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.local {
            None => write!(f, "{}", self.remote),
            Some(local) => write!(f, "{} from {local}", self.remote),
        }
    }
}

impl Way {
    /// LAN, IPv6, IPv4; lower is better. An address that only the link knows comes behind the LAN's others.
    pub(super) fn rank(self) -> u8 {
        match self.remote.ip() {
            IpAddr::V4(ip) if ip.is_private() || ip.is_link_local() => 0,
            IpAddr::V6(ip) if ip.is_unique_local() => 0,
            IpAddr::V6(ip) if ip.is_unicast_link_local() => 1,
            IpAddr::V6(_) => 2,
            IpAddr::V4(_) => 3,
        }
    }

    /// The peer may be on a link of ours, where no NAT is between.
    pub(super) fn is_lan(self) -> bool {
        self.rank() < 2
    }
}

/// As the wire and the kernel give it: IPv4 as IPv4, and a scope where only a link knows the address.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(mut v6) if v6.ip().is_unicast_link_local() => {
            v6.set_flowinfo(0);
            v6.into()
        }
        _ => SocketAddr::new(address.ip().to_canonical(), address.port()),
    }
}

/// One way to a peer. Rank: LAN, IPv6, IPv4, relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Path {
    /// Straight to this address.
    Direct(Way),
    /// In frames of this flow, through the relay of this index in our list.
    Relay { relay: usize, flow: u32 },
}

impl Path {
    pub(super) fn is_relay(self) -> bool {
        matches!(self, Self::Relay { .. })
    }

    pub(super) fn to(address: SocketAddr) -> Self {
        Self::Direct(address.into())
    }
}
