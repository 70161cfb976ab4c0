//! Certificates and bundles: what is read is what was written, and no altered certificate passes for a signed one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use weft::tunnel::identity::{Authority, Bundle, CERTIFICATE_MAX, Certificate, KeyPair, Request, Roles, Secret};

/// A signed certificate and the key that it was signed with.
static SIGNED: LazyLock<(Authority, Vec<u8>)> = LazyLock::new(|| {
    let authority = Authority::from_seed(Secret::new([7; 32])).unwrap();
    let key = KeyPair::generate(&ring::rand::SystemRandom::new()).unwrap().public;
    let request =
        Request { name: "edge-1".into(), key, roles: Roles::RELAY, network: "cloud".into(), not_after: 1_900_000_000 };
    let bytes = authority.issue(request).unwrap().encode();
    (authority, bytes)
});

fn certificate(bytes: &[u8]) {
    let (authority, signed) = &*SIGNED;
    if let Ok(certificate) = Certificate::decode(bytes) {
        assert!(bytes.len() <= CERTIFICATE_MAX);
        assert_eq!(certificate.encode(), bytes, "not the bytes that were read");
        let valid = certificate.verify(&authority.public(), 1_800_000_000).is_ok();
        assert!(!valid || bytes == signed, "a forged certificate");
    }
}

fuzz_target!(|bytes: &[u8]| {
    certificate(bytes);
    // The same bytes as changes to one that is signed: place, value; place, value; …
    let mut altered = SIGNED.1.clone();
    for change in bytes.chunks_exact(2) {
        let at = usize::from(change[0]) % altered.len();
        altered[at] ^= change[1];
    }
    certificate(&altered);
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(bundle) = Bundle::parse(text)
    {
        let written = bundle.render();
        let again = Bundle::parse(&written).unwrap_or_else(|e| panic!("what was written is not read: {e:#}"));
        assert_eq!(*again.render(), *written);
    }
});
