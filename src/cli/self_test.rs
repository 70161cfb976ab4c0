//! Known answers and round trips of each primitive that the tunnel stands on: what a build for another processor, or
//! one with other flags, gets wrong first. Pure: randomness comes in.

use crate::encoding::HEXLOWER;
use crate::tunnel::{
    identity::{Authority, KeyPair, Request, Roles, Secret},
    suite,
};
use anyhow::{Context, ensure};
use ring::{aead, digest, hmac, rand::SecureRandom};
use std::hash::Hasher;

const NOISE: &str = "Noise_IKpsk1_25519_ChaChaPoly_SHA256";

type Test = fn(&dyn SecureRandom) -> anyhow::Result<()>;

const TESTS: &[(&str, Test)] = &[
    ("sha256", sha256),
    ("hmac-sha256", hmac_sha256),
    ("chacha20-poly1305", chacha20_poly1305),
    ("aes-128-gcm", aes_128_gcm),
    ("xchacha20-poly1305", xchacha20_poly1305),
    ("siphash-2-4", siphash),
    ("x25519", x25519),
    ("ed25519", ed25519),
    ("certificate", certificate),
    ("noise", noise),
];

/// The name of each test, and why it failed.
pub fn run(rng: &dyn SecureRandom) -> impl Iterator<Item = (&'static str, anyhow::Result<()>)> {
    TESTS.iter().map(move |(name, test)| (*name, test(rng)))
}

fn same(got: impl AsRef<[u8]>, want: &str) -> anyhow::Result<()> {
    let got = HEXLOWER.encode(got.as_ref());
    ensure!(got == want, "{got} instead of {want}");
    Ok(())
}

/// 0, 1, 2, …
fn counting<const N: usize>(from: u8) -> [u8; N] {
    std::array::from_fn(|i| from.wrapping_add(i as u8))
}

/// FIPS 180-4's example.
fn sha256(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    same(digest::digest(&digest::SHA256, b"abc"), want)
}

/// RFC 4231, test case 2.
fn hmac_sha256(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, b"Jefe"), b"what do ya want for nothing?");
    same(tag, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843")
}

/// RFC 8439, section 2.8.2.
const SUNSCREEN: &[u8] =
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, \
    sunscreen would be it.";

fn seal(
    algorithm: &'static aead::Algorithm,
    key: &[u8],
    nonce: [u8; 12],
    aad: &[u8],
    text: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let key = aead::UnboundKey::new(algorithm, key).ok().context("the key's length")?;
    let key = aead::LessSafeKey::new(key);
    let nonce = || aead::Nonce::assume_unique_for_key(nonce);
    let mut sealed = text.to_vec();
    key.seal_in_place_append_tag(nonce(), aead::Aad::from(aad), &mut sealed).ok().context("it does not seal")?;

    let mut opened = sealed.clone();
    let opened = key.open_in_place(nonce(), aead::Aad::from(aad), &mut opened).ok().context("it does not open")?;
    ensure!(opened == text, "it opens to something else");
    let mut changed = sealed.clone();
    changed[0] ^= 1;
    let accepted = key.open_in_place(nonce(), aead::Aad::from(aad), &mut changed).is_ok();
    ensure!(!accepted, "it opens what was changed");
    Ok(sealed)
}

fn chacha20_poly1305(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let nonce = [7, 0, 0, 0, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47];
    let aad = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
    let sealed = seal(&aead::CHACHA20_POLY1305, &counting::<32>(0x80), nonce, &aad, SUNSCREEN)?;
    same(&sealed[sealed.len() - 16..], "1ae10b594f09e26a7e902ecbd0600691")
}

/// The GCM specification (McGrew and Viega), test case 2: an empty block under a zero key.
fn aes_128_gcm(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let sealed = seal(&aead::AES_128_GCM, &[0; 16], [0; 12], &[], &[0; 16])?;
    same(sealed, "0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf")
}

/// draft-irtf-cfrg-xchacha-03, appendix A.3.1.
fn xchacha20_poly1305(_: &dyn SecureRandom) -> anyhow::Result<()> {
    use chacha20poly1305::{AeadInPlace, KeyInit, XChaCha20Poly1305, XNonce};
    let cipher = XChaCha20Poly1305::new(&counting::<32>(0x80).into());
    let aad = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
    let nonce = XNonce::from(counting::<24>(0x40));
    let mut text = SUNSCREEN.to_vec();
    let tag = cipher.encrypt_in_place_detached(&nonce, &aad, &mut text).ok().context("it does not seal")?;
    same(tag, "c0875924c1c7987947deafd8780acf49")?;
    cipher.decrypt_in_place_detached(&nonce, &aad, &mut text, &tag).ok().context("it does not open")?;
    ensure!(text == SUNSCREEN, "it opens to something else");
    Ok(())
}

/// The authors' vectors (Aumasson and Bernstein): 15 counting bytes under a counting key.
fn siphash(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let mut hasher = siphasher::sip::SipHasher24::new_with_key(&counting(0));
    hasher.write(&counting::<15>(0));
    same(hasher.finish().to_be_bytes(), "a129ca6149be45e5")
}

/// RFC 7748, section 5.2, after one iteration.
fn x25519(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let mut nine = [0; 32];
    nine[0] = 9;
    let pair = KeyPair::from_private(Secret::new(nine))?;
    same(pair.public, "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
}

/// RFC 8032, section 7.1, test 1.
fn ed25519(_: &dyn SecureRandom) -> anyhow::Result<()> {
    let seed =
        HEXLOWER.decode(b"9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60").ok().context("hex")?;
    let pair = ring::signature::Ed25519KeyPair::from_seed_unchecked(&seed).ok().context("the seed")?;
    same(
        pair.sign(b""),
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b\
         d25bf5f0595bbe24655141438e7a100b",
    )
}

fn certificate(rng: &dyn SecureRandom) -> anyhow::Result<()> {
    let ca = Authority::generate(rng)?;
    let key = KeyPair::generate(rng)?.public;
    let request = Request { name: "self-test".into(), key, roles: Roles::RELAY, network: String::new(), not_after: 1 };
    let issued = ca.issue(request)?;
    issued.verify(&ca.public(), 1)?;
    ensure!(issued.verify(&ca.public(), 2).is_err(), "an expired one is accepted");
    ensure!(issued.verify(&Authority::generate(rng)?.public(), 1).is_err(), "one of another CA is accepted");
    Ok(())
}

/// Both sides of the tunnel's handshake, and a message each way.
fn noise(rng: &dyn SecureRandom) -> anyhow::Result<()> {
    let (node, relay) = (KeyPair::generate(rng)?, KeyPair::generate(rng)?);
    let psk: Secret<[u8; 32]> = Secret::random(rng)?;
    let builder = |private| -> anyhow::Result<snow::Builder<'_>> {
        Ok(suite::builder(NOISE, None)?.psk(1, psk.expose())?.local_private_key(private)?)
    };
    let mut initiator =
        builder(node.private.expose())?.remote_public_key(&relay.public)?.build_initiator().context("initiator")?;
    let mut responder = builder(relay.private.expose())?.build_responder().context("responder")?;

    let (mut wire, mut text) = ([0; 512], [0; 512]);
    let sent = initiator.write_message(b"certificate", &mut wire)?;
    let got = responder.read_message(&wire[..sent], &mut text)?;
    ensure!(&text[..got] == b"certificate", "the first message changed on its way");
    ensure!(responder.get_remote_static() == Some(&node.public[..]), "the responder learnt another key");
    let sent = responder.write_message(b"answer", &mut wire)?;
    let got = initiator.read_message(&wire[..sent], &mut text)?;
    ensure!(&text[..got] == b"answer", "the second message changed on its way");
    ensure!(initiator.get_handshake_hash() == responder.get_handshake_hash(), "the two hashes differ");

    let (mut initiator, mut responder) = (initiator.into_transport_mode()?, responder.into_transport_mode()?);
    let sent = initiator.write_message(b"data", &mut wire)?;
    let got = responder.read_message(&wire[..sent], &mut text)?;
    ensure!(&text[..got] == b"data", "data changed on its way");
    wire[0] ^= 1;
    ensure!(initiator.read_message(&wire[..sent], &mut text).is_err(), "changed data is accepted");
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn all_pass_here() {
        for (name, result) in super::run(&ring::rand::SystemRandom::new()) {
            if let Err(why) = result {
                panic!("{name}: {why:#}");
            }
        }
    }
}
