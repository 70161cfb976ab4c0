use super::*;
use crate::config::RelayName;
use ring::rand::SystemRandom;

const NOW: u64 = 1_795_000_000;

fn ca() -> Authority {
    Authority::generate(&SystemRandom::new()).unwrap()
}

fn request(name: &str) -> Request {
    Request { name: name.into(), key: [7; 32], roles: Roles::RELAY, network: "cloud".into(), not_after: NOW + 10 }
}

fn bundle(ca: &Authority) -> Bundle {
    let rng = SystemRandom::new();
    let pair = KeyPair::generate(&rng).unwrap();
    let node = Request { key: pair.public, roles: Roles::NONE, ..request("edge-1") };
    Bundle {
        certificate: ca.issue(node).unwrap(),
        key: Some(pair.private),
        ca: ca.public(),
        psks: vec![
            Psk { epoch: 2, key: Secret::random(&rng).unwrap() },
            Psk { epoch: 1, key: Secret::random(&rng).unwrap() },
        ],
        relays: vec![BundleRelay {
            at: RelayName { name: "relay-1".into(), host: "relay.example".into(), port: 7843 },
            certificate: ca.issue(request("relay-1")).unwrap(),
        }],
    }
}

#[test]
fn a_certificate_comes_back_whole_and_holds_to_its_last_second() {
    let ca = ca();
    for (name, network) in [("a", ""), ("edge-1.example", "cloud"), (&["a"; 127].join("."), &"n".repeat(63))] {
        let c = ca.issue(Request { network: network.into(), ..request(name) }).unwrap();
        let bytes = c.encode();
        assert!(bytes.len() <= CERTIFICATE_MAX);
        let back = Certificate::decode(&bytes).unwrap();
        assert_eq!(back, c);
        assert_eq!(back.verify(&ca.public(), NOW + 10), Ok(()));
        assert_eq!(back.verify(&ca.public(), NOW + 11), Err(CertificateError::Expired { since: NOW + 10 }));
    }
}

#[test]
fn the_wire_form_is_the_documented_one() {
    let bytes = ca().issue(request("ab")).unwrap().encode();
    assert_eq!(bytes[..2], [1, 1]);
    assert_eq!(bytes[2..10], (NOW + 10).to_be_bytes());
    assert_eq!(bytes[10..42], [7; 32]);
    assert_eq!(&bytes[42..51], b"\x02ab\x05cloud");
    assert_eq!(bytes.len(), 51 + 64);
}

#[test]
fn any_changed_byte_and_any_other_ca_is_refused() {
    let (ca, other) = (ca(), ca());
    let c = ca.issue(request("edge-1")).unwrap();
    assert_eq!(c.verify(&other.public(), NOW), Err(CertificateError::WrongCa));
    let bytes = c.encode();
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        if let Ok(changed) = Certificate::decode(&bytes) {
            assert_eq!(changed.verify(&ca.public(), NOW), Err(CertificateError::WrongCa), "byte {at}");
        }
    }
    for len in 0..bytes.len() {
        assert!(matches!(Certificate::decode(&bytes[..len]), Err(CertificateError::Malformed(_))), "{len} bytes");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(Certificate::decode(&longer), Err(CertificateError::Malformed("bytes follow the signature")));
    assert_eq!(Certificate::decode(&[1; 513]), Err(CertificateError::Malformed("it is too long")));
}

#[test]
fn bytes_at_random_never_panic() {
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..20_000 {
        let mut bytes = vec![0; rng.usize(..600)];
        rng.fill(&mut bytes);
        if let Some(first) = bytes.first_mut() {
            *first = 1;
        }
        let _ = Certificate::decode(&bytes);
    }
}

#[test]
fn names_that_no_node_has_are_not_signed() {
    for name in ["", "Edge", "a b", "a..b", "-a", "a-", ".", "a.", "é", &"a".repeat(64), &["a"; 128].join(".")] {
        assert_eq!(ca().issue(request(name)), Err(CertificateError::Malformed(NAME_RULE)), "{name:?}");
    }
    let network = Request { network: "n".repeat(64), ..request("a") };
    assert_eq!(ca().issue(network), Err(CertificateError::Malformed(NETWORK_RULE)));
}

#[test]
fn errors_read_well() {
    let text = |e: CertificateError| e.to_string();
    assert_eq!(text(CertificateError::WrongCa), "the certificate is not signed by this cluster's CA");
    assert_eq!(
        text(CertificateError::Expired { since: 1_709_164_740 }),
        "the certificate expired on 2024-02-28 23:59 UTC"
    );
    assert_eq!(text(CertificateError::Malformed("it is cut off")), "not a certificate: it is cut off");
}

#[test]
fn dates() {
    assert_eq!(utc(0), "1970-01-01 00:00 UTC");
    assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
    assert_eq!(utc(4_102_444_799), "2099-12-31 23:59 UTC");
}

#[test]
fn x25519_as_rfc_7748_has_it() {
    // RFC 7748, section 5.2, after one iteration: the base point (9) times a scalar of the same bytes.
    let mut nine = [0; 32];
    nine[0] = 9;
    let public = KeyPair::from_private(Secret::new(nine)).unwrap().public;
    assert_eq!(
        crate::encoding::HEXLOWER.encode(&public),
        "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    );
}

#[test]
fn the_authority_comes_back_from_its_seed() {
    let ca = ca();
    let text = ca.seed().to_base64();
    let back = Authority::from_seed(Secret::from_base64(&text).unwrap()).unwrap();
    assert_eq!(back.public(), ca.public());
    assert_eq!(back.issue(request("a")), ca.issue(request("a")));
}

#[test]
fn a_bundle_comes_back_whole() {
    let whole = bundle(&ca());
    assert_eq!(Bundle::parse(&whole.render()).unwrap(), whole);
    let keyless = Bundle { key: None, relays: Vec::new(), ..whole };
    assert_eq!(Bundle::parse(&keyless.render()).unwrap(), keyless);
    assert!(keyless.render().starts_with(
        "# weft bundle of edge-1\n# roles: none, network: cloud, good until 2026-11-18 11:06 UTC\n\
         # Secret: it holds the cluster's psk. Keep it 0600.\n"
    ));
}

#[test]
fn a_bundle_that_does_not_fit_says_where() {
    let ca = ca();
    let good = bundle(&ca);
    let text = good.render();
    let parse = |text: &str| format!("{:#}", Bundle::parse(text).unwrap_err());
    let edit = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        parse(&text.replace(from, to))
    };
    let other = self::bundle(&self::ca());
    let key = good.key.as_ref().unwrap().to_base64();

    assert_eq!(edit("version = 1", "version = 9"), "version = 9: this weft reads bundles of version 1");
    assert_eq!(edit(&key, "AAAA"), "private_key: expected 32 bytes in base64");
    assert_eq!(
        edit(&key, &other.key.as_ref().unwrap().to_base64()),
        "private_key: it is not the key of the certificate (edge-1)"
    );
    assert_eq!(
        edit(&crate::encoding::BASE64.encode(&good.ca.0), &crate::encoding::BASE64.encode(&other.ca.0)),
        "certificate, against the bundle's ca: the certificate is not signed by this cluster's CA"
    );
    assert_eq!(edit("epoch = 1", "epoch = 2"), "psk: epoch 2 is there twice");
    assert_eq!(edit("name = \"relay-1\"", "name = \"relay-2\""), "relay \"relay-2\": certificate: it is relay-1's");
    assert_eq!(
        edit("relay.example:7843", "relay.example"),
        "relay \"relay-1\": address: expected name@host:port, and there is no port"
    );
    assert_eq!(parse(&Bundle { psks: Vec::new(), ..good.clone() }.render()), "psk: there is none");
    let plain = ca.issue(Request { roles: Roles::EGRESS, ..request("relay-1") }).unwrap();
    let relays = vec![BundleRelay { certificate: plain, ..good.relays[0].clone() }];
    assert_eq!(
        parse(&Bundle { relays, ..good.clone() }.render()),
        "relay \"relay-1\": certificate: it has not the role relay"
    );
}

#[test]
fn neither_errors_nor_debug_show_a_secret() {
    let bundle = bundle(&ca());
    let key = bundle.key.as_ref().unwrap().to_base64();
    let text = bundle.render().replace(&*key, &format!("{}\" \"", *key));
    let error = format!("{:#}", Bundle::parse(&text).unwrap_err());
    assert!(error.starts_with("line 7: ") && !error.contains(&**key), "{error}");
    let debug = format!("{bundle:?}");
    assert!(debug.contains("key: Some(Secret(***))") && !debug.contains(&**key), "{debug}");
}
