//! Key derivation and QUIC packet protection: HKDF-SHA-256, ChaCha20-Poly1305 and its header protection
//! (RFC 9001 sections 5.3 and 5.4.4), all by ring.

use bytes::BytesMut;
use quinn_proto::{
    ConnectionId, Side,
    crypto::{self, CryptoError, KeyPair, Keys},
};
use ring::{
    aead::{self, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{self, HKDF_SHA256, KeyType},
    hmac,
};
use zeroize::Zeroize;

pub(super) const KEY_LEN: usize = 32;
/// Poly1305's tag, RFC 8439 section 2.8.
pub(super) const TAG_LEN: usize = 16;

/// Key material: wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(pub [u8; KEY_LEN]);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

struct Len(usize);

impl KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand (RFC 5869) of a uniformly random key. Lengths here are constants far below HKDF's limit
/// of 8,160 bytes, the only thing that `expand` and `fill` refuse; a zeroed output would be a constant
/// key, so the failure is kept visible.
pub(super) fn expand(prk: &[u8; KEY_LEN], info: &[&[u8]], out: &mut [u8]) -> Result<(), Unspecified> {
    hkdf::Prk::new_less_safe(HKDF_SHA256, prk).expand(info, Len(out.len()))?.fill(out)
}

/// A 32-byte key for a label and its context.
pub(crate) fn derive(prk: &Key, label: &[u8], context: &[u8]) -> Key {
    let mut out = Key([0; KEY_LEN]);
    let done = expand(&prk.0, &[label, context], &mut out.0);
    debug_assert!(done.is_ok());
    out
}

/// HKDF-Extract then Expand of something that is not uniformly random by itself.
pub(super) fn extract(salt: &[u8], secret: &[&[u8]], label: &[u8]) -> Key {
    let joined = zeroize::Zeroizing::new(secret.concat());
    let prk = hkdf::Salt::new(HKDF_SHA256, salt).extract(&joined);
    let mut out = Key([0; KEY_LEN]);
    let done = prk.expand(&[label], Len(KEY_LEN)).and_then(|okm| okm.fill(&mut out.0));
    debug_assert!(done.is_ok());
    out
}

/// ChaCha20-Poly1305 under one key.
pub(crate) struct Aead(LessSafeKey);

impl Aead {
    pub(crate) fn new(key: &Key) -> Self {
        // ring refuses a key of another length alone, and a `Key` has 32 bytes.
        let unbound = UnboundKey::new(&CHACHA20_POLY1305, &key.0);
        #[allow(clippy::expect_used)]
        Self(LessSafeKey::new(unbound.expect("a 32-byte key")))
    }

    /// Encrypts in place; gives the tag. Fails only above 256 GiB (RFC 8439 section 2.8).
    pub(crate) fn seal(&self, nonce: [u8; 12], aad: &[u8], body: &mut [u8]) -> Result<[u8; TAG_LEN], CryptoError> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), body).map_err(|_| CryptoError)?;
        tag.as_ref().try_into().map_err(|_| CryptoError)
    }

    /// Decrypts body and tag in place; gives the length of the body.
    pub(crate) fn open(&self, nonce: [u8; 12], aad: &[u8], body: &mut [u8]) -> Result<usize, CryptoError> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.0.open_in_place(nonce, Aad::from(aad), body).map(|plain| plain.len()).map_err(|_| CryptoError)
    }
}

/// RFC 9001 section 5.3: the IV xor the packet number.
fn nonce(iv: &[u8; 12], number: u64) -> [u8; 12] {
    let mut out = *iv;
    for (a, b) in out[4..].iter_mut().zip(number.to_be_bytes()) {
        *a ^= b;
    }
    out
}

struct PacketKey {
    aead: Aead,
    iv: [u8; 12],
}

impl PacketKey {
    fn new(secret: &Key) -> Self {
        let mut iv = [0; 12];
        let done = expand(&secret.0, &[b"iv"], &mut iv);
        debug_assert!(done.is_ok());
        Self { aead: Aead::new(&derive(secret, b"key", b"")), iv }
    }
}

impl crypto::PacketKey for PacketKey {
    fn encrypt(&self, number: u64, buf: &mut [u8], header_len: usize) {
        let (header, rest) = buf.split_at_mut(header_len);
        let (body, tag) = rest.split_at_mut(rest.len() - TAG_LEN);
        match self.aead.seal(nonce(&self.iv, number), header, body) {
            Ok(sealed) => tag.copy_from_slice(&sealed),
            // What could not be sealed must not leave in the clear; the peer drops it.
            Err(CryptoError) => body.fill(0),
        }
    }

    fn decrypt(&self, number: u64, header: &[u8], payload: &mut BytesMut) -> Result<(), CryptoError> {
        let len = self.aead.open(nonce(&self.iv, number), header, payload)?;
        payload.truncate(len);
        Ok(())
    }

    fn tag_len(&self) -> usize {
        TAG_LEN
    }

    /// None below 2^62 for ChaCha20-Poly1305 (RFC 9001 section 6.6).
    fn confidentiality_limit(&self) -> u64 {
        u64::MAX
    }

    /// RFC 9001 section 6.6.
    fn integrity_limit(&self) -> u64 {
        1 << 36
    }
}

struct HeaderKey(aead::quic::HeaderProtectionKey);

impl HeaderKey {
    fn new(secret: &Key) -> Self {
        let key = aead::quic::HeaderProtectionKey::new(&aead::quic::CHACHA20, &derive(secret, b"hp", b"").0);
        #[allow(clippy::expect_used)]
        Self(key.expect("a 32-byte key"))
    }

    /// The low bits of the first byte that are protected: 4 of a long header, 5 of a short one.
    fn apply(&self, offset: usize, packet: &mut [u8], unmask_first: bool) {
        // quinn-proto and our gate check that the sample is there before they come here.
        let Some(sample) = packet.get(offset + 4..offset + 4 + 16) else { return };
        let Ok(mask) = self.0.new_mask(sample) else { return };
        let bits = if packet[0] & 0x80 != 0 { 0x0f } else { 0x1f };
        let plain = if unmask_first { packet[0] ^ (mask[0] & bits) } else { packet[0] };
        packet[0] ^= mask[0] & bits;
        for i in 0..=usize::from(plain & 3) {
            packet[offset + i] ^= mask[1 + i];
        }
    }
}

impl crypto::HeaderKey for HeaderKey {
    fn decrypt(&self, offset: usize, packet: &mut [u8]) {
        self.apply(offset, packet, true);
    }

    fn encrypt(&self, offset: usize, packet: &mut [u8]) {
        self.apply(offset, packet, false);
    }

    fn sample_size(&self) -> usize {
        16
    }
}

pub(super) fn packet_pair(local: &Key, remote: &Key) -> KeyPair<Box<dyn crypto::PacketKey>> {
    KeyPair { local: Box::new(PacketKey::new(local)), remote: Box::new(PacketKey::new(remote)) }
}

pub(super) fn keys(local: &Key, remote: &Key) -> Keys {
    Keys {
        header: KeyPair { local: Box::new(HeaderKey::new(local)), remote: Box::new(HeaderKey::new(remote)) },
        packet: packet_pair(local, remote),
    }
}

/// Keys of the Initial packets: who does not know the responder's key and the psk can form none that
/// opens, so a stranger's packet costs one AEAD check and gets no answer.
pub(super) fn initial_keys(responder: &[u8; KEY_LEN], psk: &Key, dcid: &ConnectionId, side: Side) -> Keys {
    let root = extract(responder, &[&psk.0, dcid], b"weft initial");
    let (client, server) = (derive(&root, b"client in", b""), derive(&root, b"server in", b""));
    match side {
        Side::Client => keys(&client, &server),
        Side::Server => keys(&server, &client),
    }
}

/// HMAC-SHA-256.
pub(super) fn mac(key: &Key, parts: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &key.0));
    parts.iter().for_each(|p| context.update(p));
    let mut out = [0; 32];
    out.copy_from_slice(context.sign().as_ref());
    out
}

/// Stateless reset tokens, from a key that outlives a reboot (RFC 9000 section 10.3.2).
pub(super) struct ResetKey(hmac::Key);

impl ResetKey {
    pub(super) fn new(key: &Key) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, &key.0))
    }
}

impl crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], out: &mut [u8]) {
        let tag = hmac::sign(&self.0, data);
        let len = out.len().min(tag.as_ref().len());
        out[..len].copy_from_slice(&tag.as_ref()[..len]);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        hmac::verify(&self.0, data, signature).map_err(|_| CryptoError)
    }
}

/// Seals the tokens of Retry packets.
pub(super) struct TokenKey(pub(super) Key);

impl crypto::HandshakeTokenKey for TokenKey {
    fn aead_from_hkdf(&self, random: &[u8]) -> Box<dyn crypto::AeadKey> {
        Box::new(TokenAead(Aead::new(&derive(&self.0, b"token", random))))
    }
}

/// A fresh key per token, hence a nonce of zeros.
struct TokenAead(Aead);

impl crypto::AeadKey for TokenAead {
    fn seal(&self, data: &mut Vec<u8>, aad: &[u8]) -> Result<(), CryptoError> {
        let tag = self.0.seal([0; 12], aad, data)?;
        data.extend_from_slice(&tag);
        Ok(())
    }

    fn open<'a>(&self, data: &'a mut [u8], aad: &[u8]) -> Result<&'a mut [u8], CryptoError> {
        let len = self.0.open([0; 12], aad, data)?;
        Ok(&mut data[..len])
    }
}

/// Random bytes, the same of a seed on machines of either byte order (`fastrand::Rng::fill` takes the machine's).
pub(super) fn fill(rng: &mut fastrand::Rng, out: &mut [u8]) {
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&rng.u64(..).to_le_bytes()[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_open_what_the_other_sealed_and_nobody_else() {
        let (responder, psk) = ([7; 32], Key([9; 32]));
        let dcid = ConnectionId::new(&[1; 16]);
        let client = initial_keys(&responder, &psk, &dcid, Side::Client);
        for (good, key, psk) in [(true, responder, 9), (false, responder, 8), (false, [6; 32], 9)] {
            let server = initial_keys(&key, &Key([psk; 32]), &dcid, Side::Server);
            let mut packet = vec![0xc3; 20];
            packet.extend_from_slice(&[5; 40]);
            packet.extend_from_slice(&[0; TAG_LEN]);
            client.packet.local.encrypt(4, &mut packet, 20);
            client.header.local.encrypt(16, &mut packet);
            server.header.remote.decrypt(16, &mut packet);
            let mut payload = BytesMut::from(&packet[20..]);
            let opened = server.packet.remote.decrypt(4, &packet[..20], &mut payload);
            assert_eq!(opened.is_ok() && payload[..] == [5; 40], good);
        }
    }

    #[test]
    fn header_protection_is_its_own_inverse() {
        let keys = keys(&Key([1; 32]), &Key([1; 32]));
        for first in [0xc0, 0xc3, 0x41, 0x43] {
            let mut packet = vec![first; 64];
            keys.header.local.encrypt(9, &mut packet);
            assert_ne!(packet, vec![first; 64]);
            keys.header.remote.decrypt(9, &mut packet);
            assert_eq!(packet, vec![first; 64]);
        }
    }

    /// RFC 9001 appendix A.5: the only ChaCha20 vector of QUIC.
    #[test]
    fn header_mask_of_rfc_9001() {
        let hp = crate::encoding::HEXLOWER
            .decode(b"25a282b9e82f06f21f488917a4fc8f1b73573685608597d0efcb076b0ab7a7a4")
            .unwrap();
        let key = aead::quic::HeaderProtectionKey::new(&aead::quic::CHACHA20, &hp).unwrap();
        let sample = crate::encoding::HEXLOWER.decode(b"5e5cd55c41f69080575d7999c25a5bfb").unwrap();
        assert_eq!(key.new_mask(&sample).unwrap(), [0xae, 0xfe, 0xfe, 0x7d, 0x03]);
    }
}
