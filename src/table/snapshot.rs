//! The snapshot's bytes: what a node must know before anybody answers it. Every number is big-endian.
//!
//! `magic 8 | version u16 | length u32 | SipHash-1-3 of the body u64 | body`, and the body is
//! `unix u64 | node str | cluster u8 (0 | 1, 32 bytes) | complete u8 | peers u16 × (certificate u16 + bytes, address) |
//! objects u32 × object`. Texts have a length byte, lists a u16, addresses a 4 or a 6 before them.
//!
//! The sum guards against cut and rotten files, and not against whoever may write to the directory: he could make
//! a good one too. So 64 bits suffice, and the hash that the table uses anyway is the fastest there is on a small CPU.
//! Certificates are checked against the CA when they are used.

mod read;
#[cfg(test)]
mod tests;
mod write;

pub use read::{Saved, Unusable, open};
pub use write::{Encoder, encode_peers, seal};

use super::model::Source;
use siphasher::sip::SipHasher13;

const MAGIC: &[u8; 8] = b"weftsnap";
/// Raised with every change of the body; others are not read.
const VERSION: u16 = 1;
/// Magic, version, length and sum.
const HEADER: usize = 8 + 2 + 4 + 8;
/// A longer file is not read, and a table that would make one is left out. The most that manifests may hold (65,536
/// objects with 262,144 endpoints) takes some 20 MB; 5,000 Services with 20,000 endpoints take 2.
pub const SNAPSHOT_MAX: usize = 32 << 20;
/// More are left out: of so many peers at most the tunnel knows.
pub const PEERS_MAX: usize = 1_000;

const SERVICE: u8 = 1;
const SLICE: u8 = 2;
const NODE: u8 = 3;
/// Came later: a weft that does not know it takes the whole for unreadable, as it would another version.
const POD: u8 = 4;
/// As POD; so are the hints of an endpoint.
const RULE: u8 = 5;

/// Whose snapshot it is, and of when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Unix seconds by the clock of the node.
    pub unix: u64,
    pub node: String,
    /// The CA's public key; None without a tunnel.
    pub cluster: Option<[u8; 32]>,
}

/// Of any bytes.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    SipHasher13::new().hash(bytes)
}

/// The sources that are saved, with their bytes. The config is always at hand.
const SOURCES: [(Source, u8); 2] = [(Source::Manifests, 1), (Source::Api, 2)];

fn source_byte(source: Source) -> Option<u8> {
    SOURCES.iter().find(|(s, _)| *s == source).map(|(_, byte)| *byte)
}
