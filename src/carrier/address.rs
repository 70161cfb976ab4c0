//! Addresses that are on no wire: under them the tunnel knows who has none of UDP's.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// RFC 4193, a random prefix: what a relay calls a node that came by TCP.
const CLIENT: [u16; 3] = [0xfd77, 0x6566, 0x7402];
/// Another: what a node calls a relay whose name only a proxy can look up.
const UNKNOWN: [u16; 3] = [0xfd77, 0x6566, 0x7403];

fn address([a, b, c]: [u16; 3], number: u32, port: u16) -> SocketAddr {
    let [high, low] = [(number >> 16) as u16, number as u16];
    SocketAddr::new(Ipv6Addr::new(a, b, c, 0, 0, 0, high, low).into(), port)
}

fn is_of(prefix: [u16; 3], address: SocketAddr) -> bool {
    matches!(address.ip(), IpAddr::V6(ip) if ip.segments()[..3] == prefix)
}

/// Each connection has a number of its own.
#[must_use]
pub fn client(number: u32) -> SocketAddr {
    address(CLIENT, number, 1)
}

#[must_use]
pub fn is_client(address: SocketAddr) -> bool {
    is_of(CLIENT, address)
}

/// The relay of this place in the list.
#[must_use]
pub fn unknown(relay: usize, port: u16) -> SocketAddr {
    address(UNKNOWN, relay as u32, port)
}

#[must_use]
pub fn is_unknown(address: SocketAddr) -> bool {
    is_of(UNKNOWN, address)
}

/// No datagram is sent there, and none that says so came from there.
#[must_use]
pub fn is_made_up(address: SocketAddr) -> bool {
    is_client(address) || is_unknown(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_addresses_are_told_from_real_ones() {
        assert_ne!(client(1), client(1 << 16));
        assert!(is_client(client(u32::MAX)) && !is_unknown(client(7)));
        assert!(is_unknown(unknown(3, 443)) && !is_client(unknown(3, 443)));
        for real in ["192.0.2.1:5", "[fd77:6566:7400::1]:5", "[fd77:6566:7401::1]:5", "[2001:db8::1]:5"] {
            assert!(!is_made_up(real.parse().unwrap()), "{real}");
        }
    }
}
