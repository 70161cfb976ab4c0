//! What may reach quinn-proto. By itself it answers strangers: Version Negotiation to a foreign version, a
//! close to a short DCID, Retry before any AEAD check. So no long header comes through before it has
//! proved that its sender knows our key and the psk.

use super::{
    cid::{CID_LEN, CidKey, HINT_LEN, hint},
    frame::Cursor,
    keys::TAG_LEN,
    noise::Respond,
};
use crate::metrics::{TunnelCounters, bump};
use bytes::BytesMut;

/// RFC 9000 section 17.2.
const CID_MAX: usize = 20;
/// RFC 9000 section 7.2.
const FIRST_DCID_MIN: usize = 8;
/// RFC 9000 section 14.1: a datagram with a client's Initial has at least this size.
const INITIAL_DATAGRAM_MIN: usize = 1200;

/// What a QUIC datagram is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Carries a connection ID of ours that names this slot.
    Ours(u32),
    /// A short header with a foreign ID: at most a stateless reset.
    Reset,
    /// The first flight of a handshake under way in this slot, again: its connection has the keys, and tells.
    Again(u32),
    /// A client's first Initial; it opens.
    First,
    /// Nothing of ours: dropped and counted.
    Drop,
}

pub(super) struct Gate {
    cids: CidKey,
    hint: [u8; HINT_LEN],
}

/// The start of a long header, RFC 9000 section 17.2.
struct Long<'a> {
    kind: u8,
    version: u32,
    dcid: &'a [u8],
    /// Of an Initial: where its packet number begins, and where the packet ends.
    number: Option<(usize, usize)>,
}

/// RFC 9000 section 16.
pub(super) fn varint(c: &mut Cursor<'_>) -> Option<u64> {
    let first = c.u8()?;
    let rest = c.take((1 << (first >> 6)) - 1)?;
    Some(rest.iter().fold(u64::from(first & 0x3f), |n, b| n << 8 | u64::from(*b)))
}

/// The first bytes alone: those that every version has (RFC 8999 section 5.1).
fn invariant(datagram: &[u8]) -> Option<(u32, &[u8])> {
    let mut c = Cursor(datagram.get(1..)?);
    let version = c.u32()?;
    let len = c.u8()?;
    Some((version, c.take(len.into())?))
}

fn parse_long(datagram: &[u8]) -> Option<Long<'_>> {
    let mut c = Cursor(datagram);
    let kind = c.u8()? >> 4 & 3;
    let version = c.u32()?;
    let len = usize::from(c.u8()?);
    let dcid = c.take(len).filter(|_| len <= CID_MAX)?;
    let len = usize::from(c.u8()?);
    c.take(len).filter(|_| len <= CID_MAX)?;
    if kind != 0 {
        return Some(Long { kind, version, dcid, number: None });
    }
    let token = varint(&mut c)?;
    c.take(usize::try_from(token).ok()?)?;
    let len = usize::try_from(varint(&mut c)?).ok()?;
    let at = datagram.len() - c.0.len();
    c.take(len)?;
    Some(Long { kind, version, dcid, number: Some((at, at + len)) })
}

impl Gate {
    pub(super) fn new(cids: CidKey, public: &[u8; 32]) -> Self {
        Self { cids, hint: hint(public) }
    }

    /// `live` says whether a slot holds a connection, `begun` which one holds that of a client's first DCID.
    pub(super) fn judge(
        &self,
        datagram: &[u8],
        respond: &Respond,
        live: impl Fn(u32) -> bool,
        begun: impl Fn(&[u8]) -> Option<u32>,
        count: &TunnelCounters,
    ) -> Verdict {
        if datagram.first().is_none_or(|b| b & 0x80 == 0) {
            return match datagram.get(1..=CID_LEN).and_then(|cid| self.cids.open(cid)) {
                Some(slot) => Verdict::Ours(slot),
                None => Verdict::Reset,
            };
        }
        let Some((version, _)) = invariant(datagram) else {
            bump(&count.stray_long_header);
            return Verdict::Drop;
        };
        if !respond.speaks(version) {
            bump(&count.foreign_version);
            return Verdict::Drop;
        }
        let Some(long) = parse_long(datagram) else {
            bump(&count.stray_long_header);
            return Verdict::Drop;
        };
        let own = self.cids.open(long.dcid);
        if let Some(slot) = own.filter(|slot| live(*slot)) {
            return Verdict::Ours(slot);
        }
        if long.kind != 0 {
            bump(&count.stray_long_header);
            return Verdict::Drop;
        }
        // After a Retry the DCID is one of ours; before, it is the client's and names our key.
        if own.is_none() && (long.dcid.len() < FIRST_DCID_MIN || !long.dcid.starts_with(&self.hint)) {
            bump(&count.foreign_dcid);
            return Verdict::Drop;
        }
        if let Some(slot) = begun(long.dcid) {
            return Verdict::Again(slot);
        }
        if datagram.len() < INITIAL_DATAGRAM_MIN || opens(datagram, &long, respond).is_none() {
            bump(&count.initial_undecryptable);
            return Verdict::Drop;
        }
        Verdict::First
    }
}

/// Opens a copy of the Initial.
fn opens(datagram: &[u8], long: &Long<'_>, respond: &Respond) -> Option<()> {
    let (at, end) = long.number?;
    let mut packet = BytesMut::from(datagram.get(..end)?);
    // Room for the packet number and the sample behind it (RFC 9001 section 5.4.2).
    (end >= at + 4 + TAG_LEN).then_some(())?;
    respond.admits(long.version, long.dcid, |keys| {
        keys.header.remote.decrypt(at, &mut packet);
        let number_len = usize::from(packet[0] & 3) + 1;
        let number = packet[at..at + number_len].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let mut payload = packet.split_off(at + number_len);
        keys.packet.remote.decrypt(number, &packet, &mut payload).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::{super::noise, *};

    #[test]
    fn varints_of_rfc_9000_appendix_a() {
        for (bytes, value) in [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c][..], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ] {
            assert_eq!(varint(&mut Cursor(bytes)), Some(value));
            assert_eq!(varint(&mut Cursor(&bytes[..bytes.len() - 1])), None);
        }
    }

    #[test]
    fn long_headers_are_bounded_by_their_datagram() {
        let mut packet = vec![0xc0, 0x77, 0x65, 0x66, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x41, 0x00];
        let header = packet.len();
        packet.resize(header + 256, 0);
        let long = parse_long(&packet).unwrap();
        assert_eq!((long.version, long.dcid.len(), long.number), (noise::version(1), 8, Some((header, header + 256))));
        for len in 0..packet.len() {
            assert!(parse_long(&packet[..len]).is_none(), "{len}");
        }
    }
}
