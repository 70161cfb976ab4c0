//! Key derivation and QUIC packet protection: HKDF-SHA-256, ChaCha20-Poly1305 or AES-128-GCM, and their header
//! protection (RFC 9001 sections 5.3 and 5.4), all by ring.

use bytes::BytesMut;
use quinn_proto::{
    ConnectionId, Side,
    crypto::{self, CryptoError, KeyPair, Keys},
};
use ring::{
    aead::{self, AES_128_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{self, HKDF_SHA256, KeyType},
    hmac,
};
use zeroize::Zeroize;

pub(super) const KEY_LEN: usize = 32;
/// Poly1305's tag (RFC 8439 section 2.8), and GCM's (RFC 5116 section 5.1).
pub(super) const TAG_LEN: usize = 16;
/// Of AES-128.
const AES_KEY_LEN: usize = 16;

/// What protects packets. Each has keys of its own labels: no key is ever used with both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PacketCipher {
    ChaCha20,
    /// Where both ends have instructions for it, a third of the time.
    Aes128,
}

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
    Root::new(prk).derive(label, context)
}

/// A key from which several are derived: what HMAC makes of it is made once.
struct Root(hkdf::Prk);

impl Root {
    fn new(key: &Key) -> Self {
        Self(hkdf::Prk::new_less_safe(HKDF_SHA256, &key.0))
    }

    fn derive(&self, label: &[u8], context: &[u8]) -> Key {
        let mut out = Key([0; KEY_LEN]);
        self.fill(&[label, context], &mut out.0);
        out
    }

    fn fill(&self, info: &[&[u8]], out: &mut [u8]) {
        let done = self.0.expand(info, Len(out.len())).and_then(|okm| okm.fill(out));
        debug_assert!(done.is_ok());
    }
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

/// An AEAD under one key.
pub(crate) struct Aead(LessSafeKey);

impl Aead {
    /// ChaCha20-Poly1305.
    pub(crate) fn new(key: &Key) -> Self {
        Self::with(&CHACHA20_POLY1305, &key.0)
    }

    fn with(algorithm: &'static aead::Algorithm, key: &[u8]) -> Self {
        // ring refuses a key of another length alone, and both callers have the right one.
        #[allow(clippy::expect_used)]
        Self(LessSafeKey::new(UnboundKey::new(algorithm, key).expect("a key of the right length")))
    }

    /// Encrypts in place; gives the tag. Fails only above 256 GiB (RFC 8439 section 2.8), or 64 GiB (GCM).
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
    cipher: PacketCipher,
    aead: Aead,
    iv: [u8; 12],
}

impl PacketKey {
    fn new(cipher: PacketCipher, secret: &Root) -> Self {
        let mut iv = [0; 12];
        secret.fill(&[b"iv"], &mut iv);
        let aead = match cipher {
            PacketCipher::ChaCha20 => Aead::new(&secret.derive(b"key", b"")),
            PacketCipher::Aes128 => Aead::with(&AES_128_GCM, &secret.derive(b"aes key", b"").0[..AES_KEY_LEN]),
        };
        Self { cipher, aead, iv }
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

    /// RFC 9001 section 6.6; quinn changes the keys before. None below 2^62 for ChaCha20-Poly1305.
    fn confidentiality_limit(&self) -> u64 {
        match self.cipher {
            PacketCipher::ChaCha20 => u64::MAX,
            PacketCipher::Aes128 => 1 << 23,
        }
    }

    /// RFC 9001 section 6.6.
    fn integrity_limit(&self) -> u64 {
        match self.cipher {
            PacketCipher::ChaCha20 => 1 << 36,
            PacketCipher::Aes128 => 1 << 52,
        }
    }
}

struct HeaderKey(aead::quic::HeaderProtectionKey);

impl HeaderKey {
    fn new(cipher: PacketCipher, secret: &Root) -> Self {
        let new = aead::quic::HeaderProtectionKey::new;
        let key = match cipher {
            PacketCipher::ChaCha20 => new(&aead::quic::CHACHA20, &secret.derive(b"hp", b"").0),
            PacketCipher::Aes128 => new(&aead::quic::AES_128, &secret.derive(b"aes hp", b"").0[..AES_KEY_LEN]),
        };
        #[allow(clippy::expect_used)]
        Self(key.expect("a key of the right length"))
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

pub(super) fn packet_pair(cipher: PacketCipher, local: &Key, remote: &Key) -> KeyPair<Box<dyn crypto::PacketKey>> {
    let packet = |secret| Box::new(PacketKey::new(cipher, &Root::new(secret)));
    KeyPair { local: packet(local), remote: packet(remote) }
}

pub(super) fn keys(cipher: PacketCipher, local: &Key, remote: &Key) -> Keys {
    let (local, remote) = (Root::new(local), Root::new(remote));
    let header = |secret| Box::new(HeaderKey::new(cipher, secret));
    let packet = |secret| Box::new(PacketKey::new(cipher, secret));
    Keys {
        header: KeyPair { local: header(&local), remote: header(&remote) },
        packet: KeyPair { local: packet(&local), remote: packet(&remote) },
    }
}

/// Keys of the Initial packets: who does not know the responder's key and the psk can form none that
/// opens, so a stranger's packet costs one AEAD check and gets no answer.
pub(super) fn initial_keys(responder: &[u8; KEY_LEN], psk: &Key, dcid: &ConnectionId, side: Side) -> Keys {
    let root = Root::new(&extract(responder, &[&psk.0, dcid], b"weft initial"));
    let (client, server) = (root.derive(b"client in", b""), root.derive(b"server in", b""));
    match side {
        Side::Client => keys(PacketCipher::ChaCha20, &client, &server),
        Side::Server => keys(PacketCipher::ChaCha20, &server, &client),
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
        use PacketCipher::{Aes128, ChaCha20};
        for (cipher, first) in [(ChaCha20, 0xc0), (ChaCha20, 0x43), (Aes128, 0xc3), (Aes128, 0x41)] {
            let keys = keys(cipher, &Key([1; 32]), &Key([1; 32]));
            let mut packet = vec![first; 64];
            keys.header.local.encrypt(9, &mut packet);
            assert_ne!(packet, vec![first; 64]);
            keys.header.remote.decrypt(9, &mut packet);
            assert_eq!(packet, vec![first; 64]);
        }
    }

    /// RFC 9001 appendix A.5, the only ChaCha20 vector of QUIC, and A.2.
    #[test]
    fn header_masks_of_rfc_9001() {
        let hex = |text: &[u8]| crate::encoding::HEXLOWER.decode(text).unwrap();
        let mask = |algorithm, key: &[u8], sample: &[u8]| {
            aead::quic::HeaderProtectionKey::new(algorithm, &hex(key)).unwrap().new_mask(&hex(sample)).unwrap()
        };
        let chacha20 = b"25a282b9e82f06f21f488917a4fc8f1b73573685608597d0efcb076b0ab7a7a4";
        let got = mask(&aead::quic::CHACHA20, chacha20, b"5e5cd55c41f69080575d7999c25a5bfb");
        assert_eq!(got, [0xae, 0xfe, 0xfe, 0x7d, 0x03]);
        let aes = b"9f50449e04a0e810283a1e9933adedd2";
        let got = mask(&aead::quic::AES_128, aes, b"d1b1c98dd7689fb8ec11d242b123dc9b");
        assert_eq!(got, [0x43, 0x7b, 0x9a, 0xec, 0x36]);
    }
}
