//! PCP's MAP for one UDP port, RFC 6887: requests are made, answers are read.

use super::super::frame::Cursor;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const VERSION: u8 = 2;
const MAP: u8 = 1;
const ANSWER: u8 = 0x80;
/// IANA's number of UDP.
const UDP: u8 = 17;
pub(super) const NONCE: usize = 12;
/// Section 7: no message is longer.
pub(super) const LONGEST: usize = 1100;

/// Section 11.1. A lifetime of 0 deletes.
pub(super) struct Request {
    pub(super) client: Ipv4Addr,
    pub(super) nonce: [u8; NONCE],
    pub(super) port: u16,
    pub(super) lifetime: u32,
    /// What we had before, or would like.
    pub(super) suggested: Option<(Ipv4Addr, u16)>,
}

impl Request {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let (ip, port) = self.suggested.unwrap_or((Ipv4Addr::UNSPECIFIED, 0));
        out.extend_from_slice(&[VERSION, MAP, 0, 0]);
        out.extend_from_slice(&self.lifetime.to_be_bytes());
        out.extend_from_slice(&self.client.to_ipv6_mapped().octets());
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&[UDP, 0, 0, 0]);
        out.extend_from_slice(&self.port.to_be_bytes());
        out.extend_from_slice(&port.to_be_bytes());
        out.extend_from_slice(&ip.to_ipv6_mapped().octets());
    }
}

/// What the gateway says to a [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Mapped {
        external: IpAddr,
        port: u16,
        lifetime: u32,
        epoch: u32,
    },
    /// Section 7.4's code, and how long it will hold.
    Refused {
        code: u8,
        lifetime: u32,
    },
}

/// None for what is no answer to exactly this request: section 11.4 asks for the same nonce, protocol and port.
pub(super) fn parse(bytes: &[u8], nonce: &[u8; NONCE], port: u16) -> Option<Answer> {
    if bytes.len() > LONGEST || !bytes.len().is_multiple_of(4) {
        return None;
    }
    let mut c = Cursor(bytes);
    let (version, opcode) = (c.u8()?, c.u8()?);
    let (_, code, lifetime, epoch) = (c.u8()?, c.u8()?, c.u32()?, c.u32()?);
    let _reserved = c.take(12)?;
    let same = c.array::<NONCE>()? == *nonce && c.u8()? == UDP && c.take(3).is_some() && c.u16()? == port;
    let (external_port, external) = (c.u16()?, Ipv6Addr::from(c.array::<16>()?));
    if version != VERSION || opcode != MAP | ANSWER || !same {
        return None;
    }
    Some(match code {
        0 => Answer::Mapped { external: external.to_canonical(), port: external_port, lifetime, epoch },
        code => Answer::Refused { code, lifetime },
    })
}

/// A gateway that speaks NAT-PMP alone answers in its words that it does not know this version (RFC 6886, 9.3), and
/// one that speaks another version of PCP in PCP's (section 9).
pub(super) fn unknown_version(bytes: &[u8]) -> bool {
    matches!(bytes, [0, opcode, 0, 1, ..] if bytes.len() >= 8 && opcode & ANSWER != 0)
        || matches!(bytes, [version, opcode, _, 1, ..] if bytes.len() >= 24 && *version > 0 && opcode & ANSWER != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(nonce: [u8; NONCE]) -> Vec<u8> {
        let mut out = vec![2, 0x81, 0, 0];
        out.extend_from_slice(&3600_u32.to_be_bytes());
        out.extend_from_slice(&77_u32.to_be_bytes());
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&[17, 0, 0, 0, 0x1e, 0xa3, 0x9c, 0x40]);
        out.extend_from_slice(&Ipv4Addr::new(11, 0, 0, 9).to_ipv6_mapped().octets());
        out
    }

    #[test]
    fn golden_request() {
        let request = Request {
            client: [192, 168, 1, 2].into(),
            nonce: *b"abcdefghijkl",
            port: 7843,
            lifetime: 3600,
            suggested: Some(([11, 0, 0, 9].into(), 40_000)),
        };
        let mut out = Vec::new();
        request.encode(&mut out);
        let mut want = vec![2, 1, 0, 0, 0, 0, 0x0e, 0x10];
        want.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 168, 1, 2]);
        want.extend(b"abcdefghijkl");
        want.extend([17, 0, 0, 0, 0x1e, 0xa3, 0x9c, 0x40]);
        want.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 11, 0, 0, 9]);
        assert_eq!(out, want);
        assert_eq!(out.len(), 60);
    }

    #[test]
    fn an_answer_is_read_whole_and_only_for_its_request() {
        let nonce = *b"abcdefghijkl";
        let whole = answer(nonce);
        let external = IpAddr::from([11, 0, 0, 9]);
        let want = Answer::Mapped { external, port: 40_000, lifetime: 3600, epoch: 77 };
        assert_eq!(parse(&whole, &nonce, 7843), Some(want));
        assert!((0..whole.len()).all(|len| parse(&whole[..len], &nonce, 7843).is_none()), "cut");
        // Version, opcode, nonce, protocol and port are what an answer is known by.
        for at in [0, 1, 24, 35, 36, 40, 41] {
            let mut forged = whole.clone();
            forged[at] ^= 0x40;
            assert_eq!(parse(&forged, &nonce, 7843), None, "byte {at}");
        }
        assert_eq!(parse(&whole, &nonce, 7844), None);
        let mut refused = whole.clone();
        refused[3] = 2;
        assert_eq!(parse(&refused, &nonce, 7843), Some(Answer::Refused { code: 2, lifetime: 3600 }));
        // Options behind it are none of ours; more than the RFC allows is nobody's.
        assert!(parse(&[whole.clone(), vec![0; 8]].concat(), &nonce, 7843).is_some());
        assert_eq!(parse(&[whole, vec![0; LONGEST]].concat(), &nonce, 7843), None);
    }

    #[test]
    fn other_versions_say_so() {
        assert!(unknown_version(&[0, 0x81, 0, 1, 0, 0, 0, 5]));
        assert!(!unknown_version(&[0, 0x81, 0, 0, 0, 0, 0, 5]) && !unknown_version(&[0, 0x81, 0, 1]));
        let mut pcp = answer([0; NONCE]);
        (pcp[0], pcp[3]) = (1, 1);
        assert!(unknown_version(&pcp));
        assert!(!unknown_version(&answer([0; NONCE])));
    }
}
