//! The primitives of our Noise handshakes: SHA-256 is ring's, which is here anyway, the others are snow's own.

use super::keys::fill;
use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use snow::{
    params::{CipherChoice, DHChoice, HashChoice, NoiseParams},
    resolvers::{CryptoResolver, DefaultResolver},
    types::{Cipher, Dh, Hash, Random},
};

/// A builder with them.
///
/// # Errors
/// When the pattern is none.
pub(crate) fn builder<'a>(pattern: &str, seed: Option<u64>) -> Result<snow::Builder<'a>, snow::Error> {
    let params: NoiseParams = pattern.parse()?;
    Ok(snow::Builder::with_resolver(params, Box::new(Suite { seed })))
}

struct Suite {
    /// Makes the ephemeral keys predictable: for simulations alone.
    seed: Option<u64>,
}

impl CryptoResolver for Suite {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        match self.seed {
            None => DefaultResolver.resolve_rng(),
            Some(seed) => Some(Box::new(Seeded(fastrand::Rng::with_seed(seed)))),
        }
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        matches!(choice, HashChoice::SHA256).then(|| Box::new(Sha256(Context::new(&SHA256))) as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

struct Seeded(fastrand::Rng);

impl Random for Seeded {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        fill(&mut self.0, dest);
        Ok(())
    }
}

struct Sha256(Context);

impl Hash for Sha256 {
    fn name(&self) -> &'static str {
        "SHA256"
    }

    fn block_len(&self) -> usize {
        SHA256.block_len()
    }

    fn hash_len(&self) -> usize {
        SHA256_OUTPUT_LEN
    }

    fn reset(&mut self) {
        self.0 = Context::new(&SHA256);
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        let digest = std::mem::replace(&mut self.0, Context::new(&SHA256)).finish();
        out[..SHA256_OUTPUT_LEN].copy_from_slice(digest.as_ref());
    }
}

/// Whether this machine has instructions for AES and for GCM's multiplication: without them both are slow.
pub(crate) fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}
