//! Keys that are wiped when dropped and that no log can show.

use super::PublicKey;
use crate::encoding::BASE64;
use ring::rand::SecureRandom;
use snow::{
    params::DHChoice,
    resolvers::{CryptoResolver, DefaultResolver},
};
use std::fmt;
use zeroize::{Zeroize, Zeroizing};

/// A value that is wiped when dropped and that `{:?}` does not show.
#[derive(Clone)]
pub struct Secret<T: Zeroize>(T);

impl<T: Zeroize> Secret<T> {
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for the one use that needs it.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T: Zeroize> Drop for Secret<T> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<T: Zeroize> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

impl<const N: usize> PartialEq for Secret<[u8; N]> {
    /// Takes the same time wherever the two differ.
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl<const N: usize> Secret<[u8; N]> {
    /// # Errors
    /// When the system has no randomness to give.
    pub fn random(rng: &dyn SecureRandom) -> anyhow::Result<Self> {
        let mut secret = Self([0; N]);
        rng.fill(&mut secret.0).map_err(|_| anyhow::anyhow!("the system's random number generator failed"))?;
        Ok(secret)
    }

    /// Base64, with padding (RFC 4648, section 4).
    #[must_use]
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE64.encode(&self.0))
    }

    /// What [`Secret::to_base64`] gave; white space around it is of no account. None: it is not base64 of N bytes.
    #[must_use]
    pub fn from_base64(text: &str) -> Option<Self> {
        let bytes = Zeroizing::new(BASE64.decode(text.trim().as_bytes()).ok()?);
        let mut secret = Self([0; N]);
        (bytes.len() == N).then(|| secret.0.copy_from_slice(&bytes))?;
        Some(secret)
    }
}

/// A node's X25519 key.
#[derive(Clone, Debug)]
pub struct KeyPair {
    pub public: PublicKey,
    pub private: Secret<[u8; 32]>,
}

impl KeyPair {
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate(rng: &dyn SecureRandom) -> anyhow::Result<Self> {
        Self::from_private(Secret::random(rng)?)
    }

    /// # Errors
    /// When this build has no X25519.
    pub fn from_private(private: Secret<[u8; 32]>) -> anyhow::Result<Self> {
        let mut dh = DefaultResolver
            .resolve_dh(&DHChoice::Curve25519)
            .ok_or_else(|| anyhow::anyhow!("this build of snow has no X25519"))?;
        dh.set(private.expose());
        let mut public = [0; 32];
        public.copy_from_slice(dh.pubkey());
        // snow does not wipe its copy.
        dh.set(&[0; 32]);
        Ok(Self { public, private })
    }
}

/// A cluster's shared key. The epoch is the low byte of the QUIC version, so that the previous key and
/// the current one can be told apart while a new one spreads.
#[derive(Clone, Debug, PartialEq)]
pub struct Psk {
    pub epoch: u8,
    pub key: Secret<[u8; 32]>,
}
