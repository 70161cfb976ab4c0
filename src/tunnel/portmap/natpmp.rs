//! NAT-PMP for one UDP port, RFC 6886: requests are made, answers are read.

use super::super::frame::Cursor;
use std::net::Ipv4Addr;

const VERSION: u8 = 0;
const ADDRESS: u8 = 0;
const MAP_UDP: u8 = 1;
const ANSWER: u8 = 128;

/// Section 3.2: which address has the gateway outside?
pub(super) fn ask_address(out: &mut Vec<u8>) {
    out.extend_from_slice(&[VERSION, ADDRESS]);
}

/// Section 3.3. A lifetime of 0 deletes, and then the suggested port is 0 too (section 3.4).
pub(super) fn ask_port(port: u16, suggested: u16, lifetime: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&[VERSION, MAP_UDP, 0, 0]);
    out.extend_from_slice(&port.to_be_bytes());
    out.extend_from_slice(&suggested.to_be_bytes());
    out.extend_from_slice(&lifetime.to_be_bytes());
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Address {
        ip: Ipv4Addr,
        epoch: u32,
    },
    Port {
        port: u16,
        lifetime: u32,
        epoch: u32,
    },
    /// Section 3.5's code.
    Refused {
        code: u16,
    },
}

/// None for what is no answer to a request of ours for this port.
pub(super) fn parse(bytes: &[u8], port: u16) -> Option<Answer> {
    let mut c = Cursor(bytes);
    let (version, opcode, code) = (c.u8()?, c.u8()?, c.u16()?);
    if version != VERSION || opcode & ANSWER == 0 {
        return None;
    }
    if code != 0 {
        // Section 3.5: unsupported versions and opcodes are answered with the request's own bytes; 8 are the least.
        return (bytes.len() >= 8).then_some(Answer::Refused { code });
    }
    let epoch = c.u32()?;
    let answer = match opcode & !ANSWER {
        ADDRESS => Answer::Address { ip: c.array::<4>()?.into(), epoch },
        MAP_UDP => {
            let (inside, outside, lifetime) = (c.u16()?, c.u16()?, c.u32()?);
            if inside != port {
                return None;
            }
            Answer::Port { port: outside, lifetime, epoch }
        }
        _ => return None,
    };
    c.0.is_empty().then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_requests() {
        let mut out = Vec::new();
        ask_address(&mut out);
        assert_eq!(out, [0, 0]);
        out.clear();
        ask_port(7843, 40_000, 3600, &mut out);
        assert_eq!(out, [0, 1, 0, 0, 0x1e, 0xa3, 0x9c, 0x40, 0, 0, 0x0e, 0x10]);
    }

    #[test]
    fn answers_are_read_whole_and_only_for_our_port() {
        let address = [0, 128, 0, 0, 0, 0, 0, 9, 11, 0, 0, 9];
        assert_eq!(parse(&address, 7843), Some(Answer::Address { ip: [11, 0, 0, 9].into(), epoch: 9 }));
        let port = [0, 129, 0, 0, 0, 0, 0, 9, 0x1e, 0xa3, 0x9c, 0x40, 0, 0, 0x0e, 0x10];
        assert_eq!(parse(&port, 7843), Some(Answer::Port { port: 40_000, lifetime: 3600, epoch: 9 }));
        assert_eq!(parse(&port, 7844), None);
        for whole in [&address[..], &port] {
            assert!((0..whole.len()).all(|len| parse(&whole[..len], 7843).is_none()), "cut");
            assert_eq!(parse(&[whole, &[0]].concat(), 7843), None, "too long");
        }
        assert_eq!(parse(&[0, 1, 0, 0, 0, 0, 0, 9, 11, 0, 0, 9], 7843), None, "a request");
        assert_eq!(parse(&[0, 130, 0, 0, 0, 0, 0, 9, 11, 0, 0, 9], 7843), None, "TCP");
        assert_eq!(parse(&[2, 128, 0, 0, 0, 0, 0, 9, 11, 0, 0, 9], 7843), None, "another version");
        assert_eq!(parse(&[0, 129, 0, 2, 0, 0, 0, 9], 7843), Some(Answer::Refused { code: 2 }));
        assert_eq!(parse(&[0, 129, 0, 2], 7843), None);
    }
}
