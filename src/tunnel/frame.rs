//! What travels on the one UDP port, told apart by its first byte, and the layout of relay data.
//!
//! | byte | what |
//! |---|---|
//! | 0x40–0x7f, 0xc0–0xff | QUIC (the fixed bit, RFC 9000 section 17) |
//! | 0x00, 0x01 with the cookie | STUN (RFC 8489 section 5) |
//! | 0x10 | disco |
//! | 0x11 | relay data: flow u32, tag u64, datagram |
//! | 0x12 | relay control, sealed: see `control` |
//! | 0x13 | LAN beacon |

use super::keys::{Key, derive};
use siphasher::sip::SipHasher24;
use std::hash::Hasher;

pub(super) const RELAY_DATA: u8 = 0x11;
pub(super) const RELAY_CONTROL: u8 = 0x12;
/// Of a relay data frame, before the datagram.
pub(super) const DATA_HEADER: usize = 13;
/// Bytes of the datagram that the tag covers. Those of a QUIC packet hold its connection ID and protected
/// packet number, so no two differ in nothing else; the rest is authenticated from end to end.
const TAGGED: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Quic,
    Stun,
    Disco,
    RelayData,
    RelayControl,
    Beacon,
    Unknown,
}

pub(super) fn classify(datagram: &[u8]) -> Kind {
    match datagram.first() {
        Some(0x40..=0x7f | 0xc0..=0xff) => Kind::Quic,
        Some(0x00 | 0x01) if datagram.len() >= 20 && datagram[4..8] == [0x21, 0x12, 0xa4, 0x42] => Kind::Stun,
        Some(0x10) => Kind::Disco,
        Some(&RELAY_DATA) => Kind::RelayData,
        Some(&RELAY_CONTROL) => Kind::RelayControl,
        Some(0x13) => Kind::Beacon,
        Some(_) | None => Kind::Unknown,
    }
}

/// Authenticates relay data in one direction between a node and its relay: SipHash-2-4 over the flow, the
/// datagram's length and its first 16 bytes.
#[derive(Clone)]
pub(super) struct TagKey([u8; 16]);

impl TagKey {
    pub(super) fn new(secret: &Key, label: &[u8]) -> Self {
        let mut out = [0; 16];
        out.copy_from_slice(&derive(secret, label, b"").0[..16]);
        Self(out)
    }

    pub(super) fn tag(&self, flow: u32, datagram: &[u8]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.0);
        hasher.write(&flow.to_be_bytes());
        hasher.write(&u32::try_from(datagram.len()).unwrap_or(u32::MAX).to_be_bytes());
        hasher.write(&datagram[..datagram.len().min(TAGGED)]);
        hasher.finish()
    }

    /// Appends a whole frame.
    pub(super) fn frame(&self, flow: u32, datagram: &[u8], out: &mut Vec<u8>) {
        out.push(RELAY_DATA);
        out.extend_from_slice(&flow.to_be_bytes());
        out.extend_from_slice(&self.tag(flow, datagram).to_be_bytes());
        out.extend_from_slice(datagram);
    }
}

/// (flow, tag, datagram) of a relay data frame.
pub(super) fn parse_data(frame: &[u8]) -> Option<(u32, u64, &[u8])> {
    let (_, rest) = frame.split_first()?;
    let (flow, rest) = rest.split_first_chunk()?;
    let (tag, datagram) = rest.split_first_chunk()?;
    Some((u32::from_be_bytes(*flow), u64::from_be_bytes(*tag), datagram))
}

/// Writes another tag into a relay data frame, for the next hop.
pub(super) fn retag(frame: &mut [u8], tag: u64) {
    if let Some(place) = frame.get_mut(5..DATA_HEADER) {
        place.copy_from_slice(&tag.to_be_bytes());
    }
}

/// A cursor over bytes that come from outside: every take may fail, none panics.
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// u8 length, then UTF-8.
    pub(super) fn text(&mut self) -> Option<&'a str> {
        let len = self.u8()?;
        std::str::from_utf8(self.take(len.into())?).ok()
    }

    /// Family byte (4 or 6), address, port.
    pub(super) fn address(&mut self) -> Option<std::net::SocketAddr> {
        let ip: std::net::IpAddr = match self.u8()? {
            4 => self.array::<4>()?.into(),
            6 => self.array::<16>()?.into(),
            _ => return None,
        };
        Some(std::net::SocketAddr::new(ip, self.u16()?))
    }
}

pub(super) fn put_address(out: &mut Vec<u8>, address: std::net::SocketAddr) {
    match address.ip() {
        std::net::IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
        std::net::IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
    out.extend_from_slice(&address.port().to_be_bytes());
}

/// At most 255 bytes; longer text is cut at a character's edge.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut len = text.len().min(255);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out.push(u8::try_from(len).unwrap_or(0));
    out.extend_from_slice(&text.as_bytes()[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        let mut stun = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
        stun.resize(20, 0);
        for (datagram, kind) in [
            (&[0x40][..], Kind::Quic),
            (&[0xc3], Kind::Quic),
            (&[0xff], Kind::Quic),
            (&stun, Kind::Stun),
            (&stun[..19], Kind::Unknown),
            (&[0x00], Kind::Unknown),
            (&[0x10], Kind::Disco),
            (&[0x11], Kind::RelayData),
            (&[0x12], Kind::RelayControl),
            (&[0x13], Kind::Beacon),
            (&[0x80], Kind::Unknown),
            (&[], Kind::Unknown),
        ] {
            assert_eq!(classify(datagram), kind, "{datagram:02x?}");
        }
    }

    #[test]
    fn tags_bind_flow_length_and_head() {
        let key = TagKey::new(&Key([3; 32]), b"up");
        let datagram = [9; 40];
        let mut frame = Vec::new();
        key.frame(7, &datagram, &mut frame);
        let (flow, tag, inner) = parse_data(&frame).unwrap();
        assert_eq!((flow, inner), (7, &datagram[..]));
        assert_eq!(tag, key.tag(7, inner));
        assert_ne!(tag, key.tag(8, inner));
        assert_ne!(tag, key.tag(7, &inner[..39]));
        assert_ne!(tag, TagKey::new(&Key([3; 32]), b"down").tag(7, inner));
        retag(&mut frame, 1);
        assert_eq!(parse_data(&frame).unwrap().1, 1);
        assert!((0..DATA_HEADER).all(|n| parse_data(&frame[..n]).is_none()));
    }
}
