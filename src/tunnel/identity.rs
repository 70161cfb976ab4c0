//! Who a node is: certificates that peers check offline, the CA that signs them, and the keys behind them.
//! Pure: randomness and the time come in.

mod bundle;
mod secret;

pub use bundle::{Bundle, BundleRelay, EPOCHS_MAX, RELAYS_MAX};
pub use secret::{KeyPair, Psk, Secret};

use ring::{
    rand::SecureRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use std::fmt;

/// An X25519 public key.
pub type PublicKey = [u8; 32];

/// Separates these signatures from any other that the CA key may ever make.
const DOMAIN: &[u8] = b"weft certificate v1\0";
const VERSION: u8 = 1;
/// version, roles, not-after, key, and the two length bytes.
const FIXED: usize = 1 + 1 + 8 + 32 + 1 + 1;
/// Ed25519 (RFC 8032, section 5.1.6).
const SIGNATURE: usize = 64;
/// A Kubernetes node name is a DNS subdomain (RFC 1123, RFC 1035 section 2.3.4).
pub const NAME_MAX: usize = 253;
/// As a label's value (Kubernetes: 63).
pub const NETWORK_MAX: usize = 63;
/// Longer input is refused before it is looked at; the longest certificate has 424 bytes.
pub const CERTIFICATE_MAX: usize = 512;

/// What a node may do beside being a node. Bits of a later version are carried and mean nothing here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    pub const NONE: Self = Self(0);
    /// Forwards datagrams of others.
    pub const RELAY: Self = Self(1);
    /// Opens endpoints of its network for others.
    pub const EGRESS: Self = Self(2);
    /// Signs lists.
    pub const ADMIN: Self = Self(4);
    const NAMED: [(&'static str, Self); 3] = [("relay", Self::RELAY), ("egress", Self::EGRESS), ("admin", Self::ADMIN)];

    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The role of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMED.iter().find(|(n, _)| *n == name).map(|(_, role)| *role)
    }

    /// The names of the roles that it holds, in a fixed order.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMED.into_iter().filter(move |(_, role)| self.contains(*role)).map(|(name, _)| name)
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names().collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(", "))
    }
}

/// Why a certificate is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateError {
    /// The bytes are no certificate; what is wrong with them.
    Malformed(&'static str),
    /// Another cluster's CA signed it, or somebody changed it.
    WrongCa,
    /// Unix seconds of its end.
    Expired { since: u64 },
}

impl fmt::Display for CertificateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "not a certificate: {what}"),
            Self::WrongCa => f.write_str("the certificate is not signed by this cluster's CA"),
            Self::Expired { since } => write!(f, "the certificate expired on {}", utc(*since)),
        }
    }
}

impl std::error::Error for CertificateError {}

/// A node's name, key and rights, signed by the cluster's CA.
///
/// Bytes: version 1, roles u8, not-after u64 BE, key 32, name (u8 length and bytes), network (the same),
/// Ed25519 signature over [`DOMAIN`] and all the bytes before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub name: String,
    pub key: PublicKey,
    pub roles: Roles,
    /// Empty: none.
    pub network: String,
    /// Unix seconds; the certificate holds up to and including this second.
    pub not_after: u64,
    signature: [u8; SIGNATURE],
}

impl Certificate {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.signed_bytes();
        out.extend_from_slice(&self.signature);
        out
    }

    /// Reads the bytes; says nothing yet about who signed them.
    ///
    /// # Errors
    /// `Malformed`, where they are not exactly one certificate.
    pub fn decode(bytes: &[u8]) -> Result<Self, CertificateError> {
        const SHORT: CertificateError = CertificateError::Malformed("it is cut off");
        if bytes.len() > CERTIFICATE_MAX {
            return Err(CertificateError::Malformed("it is too long"));
        }
        let (version, rest) = bytes.split_first().ok_or(SHORT)?;
        if *version != VERSION {
            return Err(CertificateError::Malformed("its version is not known"));
        }
        let (roles, rest) = rest.split_first().ok_or(SHORT)?;
        let (not_after, rest) = rest.split_first_chunk().ok_or(SHORT)?;
        let (key, rest) = rest.split_first_chunk().ok_or(SHORT)?;
        let (name, rest) = text(rest).ok_or(SHORT)?;
        let (network, rest) = text(rest).ok_or(SHORT)?;
        let signature = match rest.len() {
            0..SIGNATURE => return Err(SHORT),
            _ => rest.try_into().map_err(|_| CertificateError::Malformed("bytes follow the signature"))?,
        };
        let (Some(name), Some(network)) = (node_name(name), network_name(network)) else {
            return Err(CertificateError::Malformed("its name or network has forbidden characters"));
        };
        Ok(Self {
            name: name.into(),
            key: *key,
            roles: Roles(*roles),
            network: network.into(),
            not_after: u64::from_be_bytes(*not_after),
            signature,
        })
    }

    /// # Errors
    /// `WrongCa` or `Expired`, in this order.
    pub fn verify(&self, ca: &CaPublic, now_unix: u64) -> Result<(), CertificateError> {
        self.verify_signature(ca)?;
        if now_unix > self.not_after {
            return Err(CertificateError::Expired { since: self.not_after });
        }
        Ok(())
    }

    /// [`Certificate::verify`] without a look at the clock.
    ///
    /// # Errors
    /// `WrongCa`.
    pub fn verify_signature(&self, ca: &CaPublic) -> Result<(), CertificateError> {
        let message = [DOMAIN, &self.signed_bytes()].concat();
        UnparsedPublicKey::new(&ED25519, ca.0).verify(&message, &self.signature).map_err(|_| CertificateError::WrongCa)
    }

    fn signed_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.name.len() + self.network.len() + SIGNATURE);
        out.extend_from_slice(&[VERSION, self.roles.0]);
        out.extend_from_slice(&self.not_after.to_be_bytes());
        out.extend_from_slice(&self.key);
        for text in [&self.name, &self.network] {
            out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(text.as_bytes());
        }
        out
    }
}

/// The public half of a cluster's signing key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaPublic(pub [u8; 32]);

/// What an [`Authority`] is to sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub name: String,
    pub key: PublicKey,
    pub roles: Roles,
    pub network: String,
    pub not_after: u64,
}

/// A cluster's Ed25519 signing key.
pub struct Authority {
    seed: Secret<[u8; 32]>,
    pair: Ed25519KeyPair,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("public", &self.public()).finish_non_exhaustive()
    }
}

impl Authority {
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate(rng: &dyn SecureRandom) -> anyhow::Result<Self> {
        Self::from_seed(Secret::random(rng)?)
    }

    /// # Errors
    /// When the seed is no Ed25519 key; none is known that is not.
    pub fn from_seed(seed: Secret<[u8; 32]>) -> anyhow::Result<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.expose())
            .map_err(|e| anyhow::anyhow!("not an Ed25519 key: {e}"))?;
        Ok(Self { seed, pair })
    }

    /// What [`Authority::from_seed`] takes.
    #[must_use]
    pub fn seed(&self) -> &Secret<[u8; 32]> {
        &self.seed
    }

    #[must_use]
    pub fn public(&self) -> CaPublic {
        let mut public = [0; 32];
        public.copy_from_slice(self.pair.public_key().as_ref());
        CaPublic(public)
    }

    /// # Errors
    /// `Malformed` when the name or the network could not be read back.
    pub fn issue(&self, request: Request) -> Result<Certificate, CertificateError> {
        let Request { name, key, roles, network, not_after } = request;
        node_name(&name).ok_or(CertificateError::Malformed(NAME_RULE))?;
        network_name(&network).ok_or(CertificateError::Malformed(NETWORK_RULE))?;
        let mut certificate = Certificate { name, key, roles, network, not_after, signature: [0; SIGNATURE] };
        let signature = self.pair.sign(&[DOMAIN, &certificate.signed_bytes()].concat());
        certificate.signature.copy_from_slice(signature.as_ref());
        Ok(certificate)
    }
}

pub const NAME_RULE: &str =
    "a name has 1 to 253 characters a-z, 0-9, '-' and '.'; each part begins and ends with a letter or digit";
pub const NETWORK_RULE: &str =
    "a network has 0 to 63 characters a-z, 0-9, '-' and '.'; each part begins and ends with a letter or digit";

/// The name itself where it is a DNS subdomain, as Kubernetes wants of nodes.
#[must_use]
pub fn node_name(name: &str) -> Option<&str> {
    let label = |l: &str| {
        let bytes = l.as_bytes();
        (1..=63).contains(&bytes.len())
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    (name.len() <= NAME_MAX && name.split('.').all(label)).then_some(name)
}

/// The network itself where it may stand in a certificate; empty means none.
#[must_use]
pub fn network_name(network: &str) -> Option<&str> {
    (network.is_empty() || (network.len() <= NETWORK_MAX && node_name(network).is_some())).then_some(network)
}

/// A length byte and that many bytes of UTF-8, and the rest.
fn text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*len))?;
    // What is not UTF-8 has forbidden characters, and so has this.
    Some((std::str::from_utf8(text).unwrap_or("\u{fffd}"), rest))
}

/// `2028-11-20 07:03 UTC` of Unix seconds.
#[must_use]
pub fn utc(unix: u64) -> String {
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let days = unix / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", unix / 3_600 % 24, unix / 60 % 60)
}

#[cfg(test)]
mod tests;
