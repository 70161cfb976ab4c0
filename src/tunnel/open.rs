//! The first bytes of a stream: what is asked of the far node, and its answer.
//!
//! OPEN: `u16 length | version 1 | protocol | port u16 | endpoint | namespace | name`. Answer: `0`, or
//! `code | u16 length | text`. Data may follow the OPEN at once.

use super::{
    Open, Refusal,
    frame::{Cursor, put_address, put_text},
};
use crate::table::model::{Protocol, ServiceId};

const VERSION: u8 = 1;
/// Namespace and name are DNS labels or subdomains of at most 253 bytes.
pub(super) const OPEN_MAX: usize = 1024;
/// Of the text of a refusal.
pub(super) const REASON_MAX: usize = 512;

pub(super) fn encode(open: &Open) -> Vec<u8> {
    let mut out = vec![0, 0, VERSION];
    out.push(match open.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    });
    out.extend_from_slice(&open.port.to_be_bytes());
    put_address(&mut out, open.endpoint);
    put_text(&mut out, &open.service.namespace);
    put_text(&mut out, &open.service.name);
    let len = u16::try_from(out.len() - 2).unwrap_or(u16::MAX);
    out[..2].copy_from_slice(&len.to_be_bytes());
    out
}

/// Of the bytes behind the length. Protocol numbers are IANA's.
pub(super) fn decode(body: &[u8]) -> Option<Open> {
    let mut c = Cursor(body);
    (c.u8()? == VERSION).then_some(())?;
    let protocol = match c.u8()? {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => return None,
    };
    let (port, endpoint) = (c.u16()?, c.address()?);
    let service = ServiceId { namespace: c.text()?.into(), name: c.text()?.into() };
    c.0.is_empty().then_some(Open { service, port, protocol, endpoint })
}

pub(super) fn encode_answer(answer: &Result<(), Refusal>) -> Vec<u8> {
    let (code, text) = match answer {
        Ok(()) => return vec![0],
        Err(Refusal::NotMine) => (1, ""),
        Err(Refusal::ConnectFailed(text)) => (2, text.as_str()),
        Err(Refusal::Busy) => (3, ""),
        Err(Refusal::Unreachable(text)) => (4, text.as_str()),
    };
    let mut len = text.len().min(REASON_MAX);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    let mut out = vec![code];
    out.extend_from_slice(&u16::try_from(len).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(&text.as_bytes()[..len]);
    out
}

/// The answer in a stream's first bytes, and how many they are; None while it is not whole.
pub(super) fn decode_answer(bytes: &[u8]) -> Option<(Result<(), Refusal>, usize)> {
    let mut c = Cursor(bytes);
    let code = c.u8()?;
    if code == 0 {
        return Some((Ok(()), 1));
    }
    let len = usize::from(c.u16()?).min(REASON_MAX);
    let text = String::from_utf8_lossy(c.take(len)?).into_owned();
    let refusal = match code {
        1 => Refusal::NotMine,
        2 => Refusal::ConnectFailed(text),
        3 => Refusal::Busy,
        _ => Refusal::Unreachable(text),
    };
    Some((Err(refusal), 3 + len))
}

/// How many more bytes the answer needs at least, so that none of the data behind it is taken.
pub(super) fn answer_needs(bytes: &[u8]) -> usize {
    match bytes {
        [] => 1,
        [0, ..] => 0,
        [_, high, low, rest @ ..] => {
            usize::from(u16::from_be_bytes([*high, *low])).min(REASON_MAX).saturating_sub(rest.len())
        }
        [_, rest @ ..] => 2 - rest.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Open {
        Open {
            service: ServiceId { namespace: "shop".into(), name: "web".into() },
            port: 80,
            protocol: Protocol::Tcp,
            endpoint: "10.1.2.3:8080".parse().unwrap(),
        }
    }

    #[test]
    fn open_round_trip_and_every_cut() {
        let bytes = encode(&sample());
        assert_eq!(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])), bytes.len() - 2);
        assert_eq!(decode(&bytes[2..]), Some(sample()));
        assert!((2..bytes.len()).all(|end| decode(&bytes[2..end]).is_none()));
    }

    #[test]
    fn answers_round_trip_byte_by_byte() {
        for answer in [
            Ok(()),
            Err(Refusal::NotMine),
            Err(Refusal::ConnectFailed("connection refused".into())),
            Err(Refusal::Busy),
            Err(Refusal::Unreachable("é".repeat(400))),
        ] {
            let bytes = encode_answer(&answer);
            let mut got = Vec::new();
            while answer_needs(&got) > 0 {
                assert!(decode_answer(&got).is_none());
                got.push(bytes[got.len()]);
            }
            assert_eq!(got, bytes);
            let (decoded, used) = decode_answer(&got).unwrap();
            assert_eq!(used, bytes.len());
            match (&decoded, &answer) {
                (Err(Refusal::Unreachable(short)), Err(Refusal::Unreachable(long))) => assert!(long.starts_with(short)),
                _ => assert_eq!(decoded, answer),
            }
        }
    }
}
