//! Connection IDs of our own: they name the connection's slot and can be told from foreign ones, also
//! after a reboot, since their keys come from the static key. Nobody else can link two of one connection.
//!
//! 12 bytes: nonce u32 | slot u32 xor PRF(nonce) | PRF(nonce, masked slot) u32. The PRF is SipHash-2-4 under two keys.

use super::keys::{KEY_LEN, Key, derive};
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use siphasher::sip::SipHasher24;
use std::{
    hash::Hasher,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

pub(super) const CID_LEN: usize = 12;
/// Of a client's first DCID: bytes that name the responder's key.
pub(super) const HINT_LEN: usize = 4;

/// Seals and opens connection IDs.
#[derive(Clone)]
pub(super) struct CidKey {
    mask: [u8; 16],
    tag: [u8; 16],
}

fn prf(key: &[u8; 16], parts: &[&[u8]]) -> u32 {
    let mut hasher = SipHasher24::new_with_key(key);
    parts.iter().for_each(|p| hasher.write(p));
    let [a, b, c, d, ..] = hasher.finish().to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

impl CidKey {
    pub(super) fn new(root: &Key) -> Self {
        let half = |label: &[u8]| {
            let mut out = [0; 16];
            out.copy_from_slice(&derive(root, label, b"").0[..16]);
            out
        };
        Self { mask: half(b"cid mask"), tag: half(b"cid tag") }
    }

    pub(super) fn seal(&self, slot: u32, nonce: u32) -> ConnectionId {
        let nonce = nonce.to_be_bytes();
        let masked = (slot ^ prf(&self.mask, &[&nonce])).to_be_bytes();
        let tag = prf(&self.tag, &[&nonce, &masked]).to_be_bytes();
        let mut cid = [0; CID_LEN];
        for (to, from) in cid.chunks_exact_mut(4).zip([nonce, masked, tag]) {
            to.copy_from_slice(&from);
        }
        ConnectionId::new(&cid)
    }

    /// The slot that a connection ID of ours names; None for any other.
    pub(super) fn open(&self, cid: &[u8]) -> Option<u32> {
        let (nonce, rest) = cid.split_first_chunk::<4>()?;
        let (masked, tag) = rest.split_first_chunk::<4>()?;
        let ours = tag == &prf(&self.tag, &[nonce, masked]).to_be_bytes()[..];
        ours.then(|| u32::from_be_bytes(*masked) ^ prf(&self.mask, &[nonce]))
    }
}

/// quinn asks for a connection ID without saying for whom: the node stores the slot in `current` before
/// each call that can lead here.
pub(super) struct Generator {
    pub(super) key: CidKey,
    pub(super) current: Arc<AtomicU32>,
    pub(super) rng: fastrand::Rng,
}

impl ConnectionIdGenerator for Generator {
    fn generate_cid(&mut self) -> ConnectionId {
        self.key.seal(self.current.load(Ordering::Relaxed), self.rng.u32(..))
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        self.key.open(cid).map(|_| ()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        CID_LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

/// The bytes of a client's first DCID that name the responder's key: a relay or a scanner of the
/// network learns nothing from them that the address does not tell.
pub(super) fn hint(responder: &[u8; KEY_LEN]) -> [u8; HINT_LEN] {
    let mut out = [0; HINT_LEN];
    let digest = ring::digest::digest(&ring::digest::SHA256, &[b"weft dcid".as_slice(), responder].concat());
    out.copy_from_slice(&digest.as_ref()[..HINT_LEN]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cids_open_and_others_do_not() {
        let key = CidKey::new(&Key([1; 32]));
        let other = CidKey::new(&Key([2; 32]));
        let mut rng = fastrand::Rng::with_seed(7);
        for slot in [0, 1, 255, u32::MAX] {
            let cid = key.seal(slot, rng.u32(..));
            assert_eq!(key.open(&cid), Some(slot));
            assert_eq!(other.open(&cid), None);
            let mut forged = cid.to_vec();
            forged[5] ^= 1;
            assert_eq!(key.open(&forged), None);
            assert_eq!(key.open(&cid[..11]), None);
        }
    }

    #[test]
    fn two_cids_of_one_slot_share_no_part() {
        let key = CidKey::new(&Key([1; 32]));
        let (a, b) = (key.seal(5, 1), key.seal(5, 2));
        assert!(a.chunks(4).zip(b.chunks(4)).all(|(a, b)| a != b));
    }
}
