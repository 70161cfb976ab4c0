//! Disco (0x10): small sealed messages by which two nodes find a path between them.
//!
//! `0x10 | key id u64 | nonce 24 | XChaCha20-Poly1305(message)`. The keys come from both static keys and the
//! psk, one for each direction; the id says whose they are, so that an unknown one costs no cryptography.

use super::{
    frame::{Cursor, put_address},
    keys::{KEY_LEN, Key, TAG_LEN, derive, extract},
};
use chacha20poly1305::{AeadInPlace, KeyInit, XChaCha20Poly1305, XNonce};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use std::net::SocketAddr;

pub(super) const DISCO: u8 = 0x10;
const NONCE: usize = 24;
const HEADER: usize = 1 + 8 + NONCE;
/// Candidates in one CALL_ME_MAYBE: interfaces, mappings and predicted ports of one node.
pub(super) const CANDIDATES_MAX: usize = 32;
/// 32 IPv6 candidates and the rest.
const MESSAGE_MAX: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Does this path carry? And how many of our uplinks are preferred to the one by which it came.
    Ping { txid: u64, preference: u8 },
    /// It does, and you come from this address.
    Pong { txid: u64, observed: SocketAddr },
    /// Here I may be reached: send PINGs there now, as I do to yours. `asks`: send yours back.
    CallMeMaybe { asks: bool, mapping: Mapping, candidates: Vec<SocketAddr> },
    /// What you send by the direct path does not arrive.
    PathDown,
}

/// A NAT's mapping behaviour in RFC 4787's words (section 4.1), as far as two relays can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mapping {
    #[default]
    Unknown,
    /// No NAT: a relay sees an address of ours.
    None,
    EndpointIndependent,
    /// Address-dependent, or address and port-dependent.
    Dependent,
    /// The same, and the ports come one after the other (section 4.2.1).
    Sequential,
}

impl std::fmt::Display for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown mapping",
            Self::None => "no NAT",
            Self::EndpointIndependent => "endpoint-independent mapping",
            Self::Dependent => "address-dependent mapping",
            Self::Sequential => "address-dependent mapping with sequential ports",
        })
    }
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Ping { txid, preference } => {
                out.push(1);
                out.extend_from_slice(&txid.to_be_bytes());
                out.push(*preference);
            }
            Self::Pong { txid, observed } => {
                out.push(2);
                out.extend_from_slice(&txid.to_be_bytes());
                put_address(&mut out, *observed);
            }
            Self::CallMeMaybe { asks, mapping, candidates } => {
                out.extend_from_slice(&[3, u8::from(*asks)]);
                out.push(match mapping {
                    Mapping::Unknown => 0,
                    Mapping::None => 1,
                    Mapping::EndpointIndependent => 2,
                    Mapping::Dependent => 3,
                    Mapping::Sequential => 4,
                });
                out.push(candidates.len().min(CANDIDATES_MAX) as u8);
                candidates.iter().take(CANDIDATES_MAX).for_each(|c| put_address(&mut out, *c));
            }
            Self::PathDown => out.push(4),
        }
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut c = Cursor(bytes);
        let message = match c.u8()? {
            1 => Self::Ping { txid: c.u64()?, preference: c.u8()? },
            2 => Self::Pong { txid: c.u64()?, observed: c.address()? },
            3 => {
                let asks = c.u8()? != 0;
                let mapping = match c.u8()? {
                    0 => Mapping::Unknown,
                    1 => Mapping::None,
                    2 => Mapping::EndpointIndependent,
                    3 => Mapping::Dependent,
                    4 => Mapping::Sequential,
                    _ => return None,
                };
                let count = usize::from(c.u8()?);
                if count > CANDIDATES_MAX {
                    return None;
                }
                let candidates = (0..count).map(|_| c.address()).collect::<Option<_>>()?;
                Self::CallMeMaybe { asks, mapping, candidates }
            }
            4 => Self::PathDown,
            _ => return None,
        };
        c.0.is_empty().then_some(message)
    }
}

/// The keys of one pair of nodes.
pub(super) struct DiscoKeys {
    out_id: u64,
    /// How the other end names its keys to us.
    pub(super) in_id: u64,
    seal: XChaCha20Poly1305,
    open: XChaCha20Poly1305,
}

/// X25519 by snow's own resolver; None for a point that gives no secret.
fn shared_secret(secret: &Key, peer: &[u8; KEY_LEN]) -> Option<Key> {
    let mut dh = DefaultResolver.resolve_dh(&snow::params::DHChoice::Curve25519)?;
    dh.set(&secret.0);
    let mut out = Key([0; KEY_LEN]);
    dh.dh(peer, &mut out.0).ok()?;
    (out.0 != [0; KEY_LEN]).then_some(out)
}

impl DiscoKeys {
    pub(super) fn new(secret: &Key, public: &[u8; KEY_LEN], peer: &[u8; KEY_LEN], psk: &Key) -> Option<Self> {
        let shared = shared_secret(secret, peer)?;
        let root = extract(&psk.0, &[&shared.0], b"weft disco");
        let (out, inn) = (derive(&root, b"to", peer), derive(&root, b"to", public));
        let id = |key: &Key| {
            let mut id = [0; 8];
            id.copy_from_slice(&derive(key, b"id", b"").0[..8]);
            u64::from_be_bytes(id)
        };
        let aead = |key: &Key| XChaCha20Poly1305::new(&derive(key, b"seal", b"").0.into());
        Some(Self { out_id: id(&out), in_id: id(&inn), seal: aead(&out), open: aead(&inn) })
    }

    /// A whole frame; the nonce has 192 random bits and so never comes twice.
    pub(super) fn seal(&self, message: &Message, rng: &mut fastrand::Rng) -> Vec<u8> {
        let mut out = vec![DISCO];
        out.extend_from_slice(&self.out_id.to_be_bytes());
        let mut nonce = [0; NONCE];
        rng.fill(&mut nonce);
        out.extend_from_slice(&nonce);
        let mut body = message.encode();
        match self.seal.encrypt_in_place_detached(XNonce::from_slice(&nonce), &out[..9], &mut body) {
            Ok(tag) => {
                out.extend_from_slice(&body);
                out.extend_from_slice(&tag);
            }
            Err(_) => out.clear(),
        }
        out
    }

    /// None where it does not open or is no message that we know.
    pub(super) fn open(&self, frame: &[u8]) -> Option<Message> {
        let nonce = frame.get(9..HEADER)?;
        let body = frame.get(HEADER..).filter(|b| (TAG_LEN..=MESSAGE_MAX + TAG_LEN).contains(&b.len()))?;
        let (body, tag) = body.split_at(body.len() - TAG_LEN);
        let mut body = body.to_vec();
        let nonce = XNonce::from_slice(nonce);
        self.open.decrypt_in_place_detached(nonce, &frame[..9], &mut body, tag.into()).ok()?;
        Message::decode(&body)
    }
}

/// Whose keys a frame names.
pub(super) fn key_id(frame: &[u8]) -> Option<u64> {
    frame.get(1..9)?.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (DiscoKeys, DiscoKeys) {
        let generate = || {
            let mut dh = DefaultResolver.resolve_dh(&snow::params::DHChoice::Curve25519).unwrap();
            dh.generate(&mut *DefaultResolver.resolve_rng().unwrap()).unwrap();
            (Key(dh.privkey().try_into().unwrap()), dh.pubkey().try_into().unwrap())
        };
        let ((a, a_public), (b, b_public)) = (generate(), generate());
        let psk = Key([3; 32]);
        (
            DiscoKeys::new(&a, &a_public, &b_public, &psk).unwrap(),
            DiscoKeys::new(&b, &b_public, &a_public, &psk).unwrap(),
        )
    }

    #[test]
    fn messages_open_at_the_other_end_alone_and_uncut() {
        let (a, b) = pair();
        let mut rng = fastrand::Rng::with_seed(1);
        let v6 = "[fd00::1]:9".parse().unwrap();
        for message in [
            Message::Ping { txid: 7, preference: 1 },
            Message::Pong { txid: 7, observed: "1.2.3.4:5".parse().unwrap() },
            Message::CallMeMaybe { asks: true, mapping: Mapping::Dependent, candidates: vec![v6; CANDIDATES_MAX] },
            Message::PathDown,
        ] {
            let frame = a.seal(&message, &mut rng);
            assert_eq!(key_id(&frame), Some(b.in_id));
            assert_eq!(b.open(&frame), Some(message));
            assert_eq!(a.open(&frame), None, "reflected");
            assert!((0..frame.len()).all(|len| b.open(&frame[..len]).is_none()));
        }
    }

    #[test]
    fn a_point_of_small_order_is_refused() {
        assert!(DiscoKeys::new(&Key([1; 32]), &[2; 32], &[0; 32], &Key([3; 32])).is_none());
    }
}
