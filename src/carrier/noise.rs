//! The Noise stream in which datagrams travel over TCP, without IO.
//!
//! ```text
//! C→S  u16 len | epoch u8 | psk, e, es {} | HMAC      S→C  u16 len | e, ee {}      then, both ways, u16 len | sealed datagram
//! ```
//! Who dials shows by the HMAC that it knows the psk and the relay's key, before the relay does any public-key work or
//! says a byte. Who the node is its registration tells, inside. The first byte is 0, which no TLS record begins with.

use crate::tunnel::{Aead, Key, derive, suite};
use ring::hmac;
use std::fmt;

const PATTERN: &str = "Noise_NKpsk0_25519_ChaChaPoly_SHA256";
const PROLOGUE: &[u8] = b"weft tcp 1";
const KEY_LEN: usize = 32;
/// Poly1305's tag, RFC 8439 section 2.8.
const TAG_LEN: usize = 16;
const MAC_LEN: usize = 32;
/// An ephemeral key, and the tag of an empty payload.
const MESSAGE: usize = KEY_LEN + TAG_LEN;
pub const HELLO_LEN: usize = 2 + 1 + MESSAGE + MAC_LEN;
pub const REPLY_LEN: usize = 2 + MESSAGE;
/// The largest datagram: that of an Ethernet, which no path of ours exceeds. A larger one is not taken.
pub const DATAGRAM_MAX: usize = 1500;
/// The length of a record.
pub const PREFIX: usize = 2;
/// With the tag.
pub const OVERHEAD: usize = PREFIX + TAG_LEN;

/// Why a stream is of no use; all of them end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Not of our protocol.
    Malformed,
    /// Another psk epoch than ours.
    Epoch,
    /// Not made with the psk and the relay's key.
    Stranger,
    /// A record that does not open.
    BadTag,
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it does not speak our protocol",
            Self::Epoch => "it has another psk epoch",
            Self::Stranger => "it has not our psk, or the relay's key is another",
            Self::BadTag => "bytes were changed on the way",
        })
    }
}

impl std::error::Error for Reject {}

/// A relay's half of what a handshake needs.
pub struct Identity {
    pub secret: Key,
    pub public: [u8; KEY_LEN],
    /// (epoch, key), the current one first.
    pub psks: Vec<(u8, Key)>,
}

/// A seed makes the ephemeral key predictable: for tests alone.
fn builder<'a>(psk: &'a Key, seed: Option<u64>) -> Result<snow::Builder<'a>, snow::Error> {
    suite::builder(PATTERN, seed)?.psk(0, &psk.0)?.prologue(PROLOGUE)
}

fn mac_key(psk: &Key, relay: &[u8; KEY_LEN]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &derive(psk, b"tcp hello", relay).0)
}

fn prefixed(body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut out = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
    out.extend_from_slice(&body);
    out
}

/// What `len` bytes, said by their first two, hold.
fn unprefixed(bytes: &[u8]) -> Option<&[u8]> {
    let (len, body) = bytes.split_first_chunk()?;
    (usize::from(u16::from_be_bytes(*len)) == body.len()).then_some(body)
}

/// A handshake under way at the node.
pub struct Dialer(Box<snow::HandshakeState>);

impl Dialer {
    /// Also gives the bytes to send.
    ///
    /// # Errors
    /// Where the relay's key is no key.
    pub fn new(relay: &[u8; KEY_LEN], epoch: u8, psk: &Key) -> Result<(Self, Vec<u8>), Reject> {
        Self::seeded(relay, epoch, psk, None)
    }

    pub(super) fn seeded(
        relay: &[u8; KEY_LEN],
        epoch: u8,
        psk: &Key,
        seed: Option<u64>,
    ) -> Result<(Self, Vec<u8>), Reject> {
        let noise = builder(psk, seed).and_then(|b| b.remote_public_key(relay)?.build_initiator());
        let mut noise = noise.map_err(|_| Reject::Malformed)?;
        let mut message = [0; MESSAGE];
        noise.write_message(&[], &mut message).map_err(|_| Reject::Malformed)?;
        let mut mac = hmac::Context::with_key(&mac_key(psk, relay));
        mac.update(&[epoch]);
        mac.update(&message);
        let hello = prefixed(&[&[epoch], &message, mac.sign().as_ref()]);
        Ok((Self(Box::new(noise)), hello))
    }

    /// # Errors
    /// Where the answer is not that of the relay whose key we have.
    pub fn finish(mut self, reply: &[u8]) -> Result<(Sealer, Opener), Reject> {
        let message = unprefixed(reply).filter(|m| m.len() == MESSAGE).ok_or(Reject::Malformed)?;
        self.0.read_message(message, &mut [0; MESSAGE]).map_err(|_| Reject::Stranger)?;
        Ok(split(&mut self.0, true))
    }
}

/// The psk that a hello was made with: so much costs two hashes. `hello` has [`HELLO_LEN`] bytes.
///
/// # Errors
/// Where it is of a stranger.
pub fn recognise<'i>(identity: &'i Identity, hello: &[u8]) -> Result<&'i Key, Reject> {
    let body = unprefixed(hello).ok_or(Reject::Malformed)?;
    let (epoch, _) = body.split_first().ok_or(Reject::Malformed)?;
    let (signed, mac) = body.split_at_checked(1 + MESSAGE).ok_or(Reject::Malformed)?;
    let psk = identity.psks.iter().find(|(e, _)| e == epoch).map(|(_, psk)| psk).ok_or(Reject::Epoch)?;
    hmac::verify(&mac_key(psk, &identity.public), signed, mac).map_err(|_| Reject::Stranger)?;
    Ok(psk)
}

/// The relay's answer to a hello that was recognised: the bytes to send, and what comes then.
///
/// # Errors
/// Where the handshake does not open.
pub fn answer(identity: &Identity, psk: &Key, hello: &[u8]) -> Result<(Vec<u8>, Sealer, Opener), Reject> {
    answer_seeded(identity, psk, hello, None)
}

pub(super) fn answer_seeded(
    identity: &Identity,
    psk: &Key,
    hello: &[u8],
    seed: Option<u64>,
) -> Result<(Vec<u8>, Sealer, Opener), Reject> {
    let message = hello.get(3..3 + MESSAGE).ok_or(Reject::Malformed)?;
    let noise = builder(psk, seed).and_then(|b| b.local_private_key(&identity.secret.0)?.build_responder());
    let mut noise = noise.map_err(|_| Reject::Malformed)?;
    noise.read_message(message, &mut [0; MESSAGE]).map_err(|_| Reject::Stranger)?;
    let mut reply = [0; MESSAGE];
    noise.write_message(&[], &mut reply).map_err(|_| Reject::Malformed)?;
    let (sealer, opener) = split(&mut noise, false);
    Ok((prefixed(&[&reply]), sealer, opener))
}

fn split(noise: &mut snow::HandshakeState, is_dialer: bool) -> (Sealer, Opener) {
    let (up, down) = noise.dangerously_get_raw_split();
    let (up, down) = (Key(up), Key(down));
    let hash = noise.get_handshake_hash();
    let (mine, theirs) = if is_dialer { (&up, &down) } else { (&down, &up) };
    let aead = |key| Aead::new(&derive(key, b"tcp", hash));
    (Sealer { aead: aead(mine), sent: 0 }, Opener { aead: aead(theirs), got: 0 })
}

fn nonce(counter: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[4..].copy_from_slice(&counter.to_be_bytes());
    out
}

/// Our direction of a stream.
pub struct Sealer {
    aead: Aead,
    sent: u64,
}

impl Sealer {
    /// Appends a record; false for a datagram that is empty or over [`DATAGRAM_MAX`].
    pub fn seal(&mut self, datagram: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(len) = u16::try_from(datagram.len() + TAG_LEN).ok().map(u16::to_be_bytes) else { return false };
        if datagram.is_empty() || datagram.len() > DATAGRAM_MAX {
            return false;
        }
        let start = out.len();
        out.extend_from_slice(&len);
        out.extend_from_slice(datagram);
        match self.aead.seal(nonce(self.sent), &len, &mut out[start + 2..]) {
            Ok(tag) => out.extend_from_slice(&tag),
            // What could not be sealed must not leave in the clear.
            Err(_) => out.truncate(start),
        }
        self.sent += 1;
        out.len() > start
    }
}

/// Their direction.
pub struct Opener {
    aead: Aead,
    got: u64,
}

impl Opener {
    /// Opens the record that `bytes` begins with, in place: the datagram's length. It lies behind the first [`PREFIX`]
    /// bytes; the next record begins [`OVERHEAD`] bytes and a datagram further on. None: it is not all there yet.
    ///
    /// # Errors
    /// Where the stream is not what was sealed.
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Option<usize>, Reject> {
        let Some((len, rest)) = bytes.split_first_chunk_mut::<PREFIX>() else { return Ok(None) };
        let size = usize::from(u16::from_be_bytes(*len));
        if !(TAG_LEN + 1..=TAG_LEN + DATAGRAM_MAX).contains(&size) {
            return Err(Reject::Malformed);
        }
        let Some(sealed) = rest.get_mut(..size) else { return Ok(None) };
        let len = self.aead.open(nonce(self.got), len, sealed).map_err(|_| Reject::BadTag)?;
        self.got += 1;
        Ok(Some(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let pair = builder(&Key([0; 32]), None).unwrap().generate_keypair().unwrap();
        let mut secret = Key([0; 32]);
        secret.0.copy_from_slice(&pair.private);
        let public = pair.public.try_into().unwrap();
        Identity { secret, public, psks: vec![(2, Key([2; 32])), (1, Key([1; 32]))] }
    }

    struct Ends {
        node: (Sealer, Opener),
        relay: (Sealer, Opener),
    }

    fn connected() -> Ends {
        let relay = identity();
        let (dialer, hello) = Dialer::new(&relay.public, 1, &relay.psks[1].1).unwrap();
        assert_eq!((hello.len(), hello[0]), (HELLO_LEN, 0));
        let psk = recognise(&relay, &hello).unwrap();
        let (reply, sealer, opener) = answer(&relay, psk, &hello).unwrap();
        assert_eq!(reply.len(), REPLY_LEN);
        Ends { node: dialer.finish(&reply).unwrap(), relay: (sealer, opener) }
    }

    #[test]
    fn datagrams_come_out_as_they_went_in_wherever_the_stream_is_cut() {
        let mut ends = connected();
        let sent: Vec<Vec<u8>> = [1, 40, DATAGRAM_MAX, 2].map(|n| vec![n as u8; n]).to_vec();
        let mut stream = Vec::new();
        assert!(sent.iter().all(|d| ends.node.0.seal(d, &mut stream)));
        assert_eq!(stream.len(), sent.iter().map(|d| d.len() + OVERHEAD).sum::<usize>());
        for cut in 0..=stream.len() {
            let mut opener = Opener { aead: Aead::new(&Key([0; 32])), got: 0 };
            std::mem::swap(&mut opener, &mut ends.relay.1);
            let (mut held, mut got) = (Vec::new(), Vec::new());
            for piece in [&stream[..cut], &stream[cut..]] {
                held.extend_from_slice(piece);
                while let Some(len) = opener.open(&mut held).unwrap() {
                    got.push(held[PREFIX..PREFIX + len].to_vec());
                    held.drain(..len + OVERHEAD);
                }
            }
            assert_eq!((got, held.len()), (sent.clone(), 0), "cut at {cut}");
            opener.got = 0;
            ends.relay.1 = opener;
        }
    }

    #[test]
    fn changed_cut_swapped_or_reflected_records_end_the_stream() {
        let mut ends = connected();
        let mut record = Vec::new();
        ends.node.0.seal(&[7; 30], &mut record);
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 0x40;
            assert!(!matches!(ends.relay.1.open(&mut changed), Ok(Some(_))), "byte {at}");
        }
        for len in 0..record.len() {
            assert_eq!(ends.relay.1.open(&mut record[..len].to_vec()), Ok(None), "{len}");
        }
        assert_eq!(ends.node.1.open(&mut record.clone()), Err(Reject::BadTag), "reflected");
        let mut second = Vec::new();
        ends.node.0.seal(&[8; 30], &mut second);
        assert_eq!(ends.relay.1.open(&mut second), Err(Reject::BadTag), "out of order");
        assert!(ends.relay.1.open(&mut record.clone()).unwrap().is_some());
        assert_eq!(ends.relay.1.open(&mut record), Err(Reject::BadTag), "again");
        for size in [0, TAG_LEN as u16, (TAG_LEN + DATAGRAM_MAX + 1) as u16, u16::MAX] {
            assert_eq!(ends.relay.1.open(&mut size.to_be_bytes()), Err(Reject::Malformed), "{size}");
        }
        assert!(!ends.node.0.seal(&[], &mut record) && !ends.node.0.seal(&[0; DATAGRAM_MAX + 1], &mut record));
    }

    #[test]
    fn strangers_are_known_before_any_public_key_work() {
        let relay = identity();
        let (_, hello) = Dialer::new(&relay.public, 2, &relay.psks[0].1).unwrap();
        assert!(recognise(&relay, &hello).is_ok());
        for at in 0..hello.len() {
            let mut changed = hello.clone();
            changed[at] ^= 1;
            assert!(recognise(&relay, &changed).is_err(), "byte {at}");
        }
        for len in 0..hello.len() {
            assert!(recognise(&relay, &hello[..len]).is_err(), "{len}");
        }
        let (_, wrong) = Dialer::new(&relay.public, 2, &Key([9; 32])).unwrap();
        assert_eq!(recognise(&relay, &wrong), Err(Reject::Stranger));
        let (_, wrong) = Dialer::new(&identity().public, 2, &relay.psks[0].1).unwrap();
        assert_eq!(recognise(&relay, &wrong), Err(Reject::Stranger));
        let (_, old) = Dialer::new(&relay.public, 3, &relay.psks[0].1).unwrap();
        assert_eq!(recognise(&relay, &old), Err(Reject::Epoch));
    }

    #[test]
    fn a_node_takes_no_other_answer() {
        let relay = identity();
        let psk = &relay.psks[0].1;
        let start = || Dialer::new(&relay.public, 2, psk).unwrap();
        let (_, hello) = start();
        let (reply, ..) = answer(&relay, psk, &hello).unwrap();
        assert_eq!(start().0.finish(&reply).err(), Some(Reject::Stranger), "of another handshake");
        for len in 0..reply.len() {
            assert_eq!(start().0.finish(&reply[..len]).err(), Some(Reject::Malformed));
        }
        let other = Identity { psks: vec![(2, psk.clone())], ..identity() };
        assert!(answer(&other, psk, &hello).is_err(), "for another relay");
    }
}
