//! Known answers: with these keys these bytes, on every architecture and in every version that is to talk to the others.
//! Key derivation, packets, IDs and relay frames were computed by another implementation too, from the RFCs, in Python.
//! And the handshake fed in pieces.

use super::{
    Open,
    cid::{CidKey, hint},
    disco::{DiscoKeys, Mapping, Message},
    frame::TagKey,
    identity::{Authority, CaPublic, Certificate, KeyPair, Request, Roles, Secret},
    keys::{Key, PacketCipher, derive, extract, initial_keys, keys, mac},
    noise::{Dial, Local, Purpose, Respond, version},
    open::{encode, encode_answer},
    stream::Refusal,
};
use crate::encoding::HEXLOWER;
use crate::table::model::{Protocol, ServiceId};
use quinn_proto::{
    ConnectionId, Side,
    crypto::{ClientConfig, Keys, ServerConfig, Session},
    transport_parameters::TransportParameters,
};
use std::sync::{Arc, Mutex, atomic::AtomicU32};

const NOW: u32 = 1_795_000_000;
/// initial_max_data 1 MiB, initial_max_streams_bidi 32, initial_source_connection_id (RFC 9000 section 18.2).
const PARAMETERS: &[u8] = &[4, 4, 0x80, 0x10, 0, 0, 8, 1, 32, 15, 4, 1, 2, 3, 4];

#[track_caller]
fn is(bytes: &[u8], hex: &str) {
    assert_eq!(HEXLOWER.encode(bytes), hex);
}

fn authority() -> Authority {
    Authority::from_seed(Secret::new([1; 32])).unwrap()
}

fn identity(name: &str, private: u8) -> (KeyPair, Certificate) {
    let pair = KeyPair::from_private(Secret::new([private; 32])).unwrap();
    let request = Request {
        name: name.into(),
        key: pair.public,
        roles: Roles::RELAY,
        network: "cloud".into(),
        not_after: u64::from(NOW) + 1000,
    };
    (pair, authority().issue(request).unwrap())
}

fn local(name: &str, private: u8, ca: CaPublic, has_aes: bool) -> Arc<Local> {
    let (pair, certificate) = identity(name, private);
    Arc::new(Local {
        secret: Key([private; 32]),
        public: pair.public,
        certificate: certificate.encode(),
        ca,
        psks: vec![(3, Key([9; 32]))],
        unix: Arc::new(AtomicU32::new(NOW)),
        entropy: Some(Mutex::new(fastrand::Rng::with_seed(u64::from(private)))),
        is_relay: true,
        has_aes,
    })
}

fn parameters(side: Side) -> TransportParameters {
    TransportParameters::read(side, &mut &PARAMETERS[..]).unwrap()
}

fn pair(purpose: Purpose) -> [Box<dyn Session>; 2] {
    pair_with(purpose, [false, false])
}

fn pair_with(purpose: Purpose, [near, far]: [bool; 2]) -> [Box<dyn Session>; 2] {
    let ca = authority().public();
    let (near, far) = (local("a", 21, ca, near), local("b", 22, ca, far));
    let dial = Dial { peer: far.public, local: near, name: "b".into(), purpose };
    let client = Arc::new(dial).start_session(version(3), "weft", &parameters(Side::Server)).unwrap();
    [client, Arc::new(Respond::new(far)).start_session(version(3), &parameters(Side::Client))]
}

/// The four messages of a handshake, each read by `feed`; the sessions after it.
fn handshake(purpose: Purpose, feed: impl Fn(usize, &mut dyn Session, &[u8])) -> ([Box<dyn Session>; 2], [Vec<u8>; 4]) {
    let (sessions, messages, _) = handshake_of(pair(purpose), feed);
    (sessions, messages)
}

/// And the keys of its 1-RTT packets, the client's first.
#[allow(clippy::type_complexity)]
fn handshake_of(
    [mut client, mut server]: [Box<dyn Session>; 2],
    feed: impl Fn(usize, &mut dyn Session, &[u8]),
) -> ([Box<dyn Session>; 2], [Vec<u8>; 4], [Keys; 2]) {
    let mut messages: [Vec<u8>; 4] = Default::default();
    assert!(client.write_handshake(&mut messages[0]).is_none());
    feed(0, &mut *server, &messages[0]);
    assert!(server.write_handshake(&mut messages[1]).is_some(), "keys of the Handshake space");
    let servers = server.write_handshake(&mut messages[2]).expect("1-RTT keys");
    feed(1, &mut *client, &messages[1]);
    let mut none = Vec::new();
    assert!(client.write_handshake(&mut none).is_some() && none.is_empty());
    feed(2, &mut *client, &messages[2]);
    let clients = client.write_handshake(&mut messages[3]).expect("1-RTT keys");
    feed(3, &mut *server, &messages[3]);
    for session in [&client, &server] {
        assert!(!session.is_handshaking() && session.peer_identity().is_some());
    }
    ([client, server], messages, [clients, servers])
}

#[test]
fn a_handshake_may_come_in_any_two_pieces_and_byte_by_byte() {
    let whole = |_: usize, s: &mut dyn Session, m: &[u8]| {
        s.read_handshake(m).unwrap();
    };
    let (_, messages) = handshake(Purpose::Peer, whole);
    for (number, message) in messages.iter().enumerate() {
        for cut in 0..=message.len() {
            handshake(Purpose::Peer, |n, s, m| {
                let (first, second) = if n == number { m.split_at(cut) } else { (m, &m[..0]) };
                let ready = s.read_handshake(first).unwrap();
                assert!(!ready || second.is_empty(), "message {number} cut at {cut}");
                if !second.is_empty() {
                    s.read_handshake(second).unwrap();
                }
            });
        }
    }
    handshake(Purpose::Register, |_, s, m| m.chunks(1).for_each(|byte| assert!(s.read_handshake(byte).is_ok())));
}

#[test]
fn a_handshake_with_any_bit_changed_or_a_byte_too_many_fails() {
    let whole = |_: usize, s: &mut dyn Session, m: &[u8]| {
        s.read_handshake(m).unwrap();
    };
    let (_, messages) = handshake(Purpose::Peer, whole);
    let [_, mut server] = pair(Purpose::Peer);
    let longer = [&messages[0][..], &[0]].concat();
    assert!(server.read_handshake(&longer).is_err());
    for at in 2..messages[0].len() {
        let mut forged = messages[0].clone();
        forged[at] ^= 1 << (at % 8);
        let [_, mut server] = pair(Purpose::Peer);
        assert!(server.read_handshake(&forged).is_err(), "byte {at}");
    }
}

#[test]
fn handshake_messages_and_what_follows_from_them() {
    let whole = |_: usize, s: &mut dyn Session, m: &[u8]| {
        s.read_handshake(m).unwrap();
    };
    let ([client, server], messages) = handshake(Purpose::Peer, whole);
    is(
        &messages[0],
        "\
        00e472d4efe6735b0ffaab4af4c07213b7cf6e9b094d6c94b50fc9f9530b2387916e9d2e10720b81d30a735f2527e042\
        f66c63ccdf15c130257ac9f3dc8b27393f75d55b770fe762b7cf6236d04adf5cc998277e49ad314af95433069aade433\
        1d401fd23313a54977c011e27bc5b223162920e7cd317d0c102c5667b857e420988a70211c6544026350433a6f84805f\
        84768f00de3388d69474f7e5061270dcd6d5fd26b6674f0e1ddfb73333eb1b164a3e3589d36ad1b3672493b21df9dc1c\
        4f2f38f98c5ef81c233e2e22a0f8615451c383acf63b271b67f4602a4f4b6b19ab3122f444a1",
    );
    is(
        &messages[1],
        "\
        00b440b1840220d232879ebf6ea9c229dbd565b763e9158187773328480708cb241995a92418636620b22278030e9af0\
        889de7553c9167a06e0516574f6dc73c586285cb1de6064e854180a0d4850eda9543df7f9a846638700dae27796928da\
        844c3ce82ebb7f25c4ec2c371cbf4e35685ad02fe8ac1688a928bdc759d3b712c56bf1ae50daa25185cf2470122a5cfc\
        1aa4d6f877a415d2e82992abd7b28883ba1eb6f73d8889e3cf138a88b498df8c7a9535d4c066",
    );
    is(&messages[2], "0020f3046430d94d043603f13886611ab7eb2e6a77d060706128a791a6a9bacf69b4");
    is(&messages[3], "0020c566681e93b1a1703d969873282ad4de8c4b235640e3416329a53ea5b88555b5");
    let mut exported = [[0; 32]; 2];
    client.export_keying_material(&mut exported[0], b"relay", b"").unwrap();
    server.export_keying_material(&mut exported[1], b"relay", b"").unwrap();
    assert_eq!(exported[0], exported[1]);
    is(&exported[0], "7b16a2b59218a8d441ec911fd34da8a3b084cdf993b744f33411dfe7a06efe52");
}

#[test]
fn packets_are_of_aes_where_both_ends_have_it() {
    let whole = |_: usize, s: &mut dyn Session, m: &[u8]| {
        s.read_handshake(m).unwrap();
    };
    for both in [[false, false], [true, false], [false, true], [true, true]] {
        let (mut sessions, _, [client, server]) = handshake_of(pair_with(Purpose::Peer, both), whole);
        let update = |s: &mut Box<dyn Session>| s.next_1rtt_keys().unwrap();
        let [next_client, next_server] = sessions.each_mut().map(update);
        for (from, to) in [(&client.packet, &server.packet), (&next_client, &next_server)] {
            let is_aes = both == [true, true];
            assert_eq!(
                [from.local.confidentiality_limit() == 1 << 23, to.remote.integrity_limit() == 1 << 52],
                [is_aes; 2]
            );
            let mut packet = vec![0x43; 29];
            from.local.encrypt(7, &mut packet, 13);
            let mut body = packet[13..].into();
            to.remote.decrypt(7, &packet[..13], &mut body).unwrap();
        }
    }
}

#[test]
fn keys_and_packets() {
    let (root, dcid) = (Key([7; 32]), ConnectionId::new(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]));
    is(&derive(&root, b"label", b"context").0, "9595ae0e61de149c8cfb85e9edcac9ac870d943d6cece5a6add565bb82f77f8e");
    is(
        &extract(b"salt", &[b"secret", b"more"], b"label").0,
        "7063d3cb8956f671131d4f813ce00cbceb99dc6e7c330071d4ef8e026b54915b",
    );
    is(&mac(&root, &[b"one", b"two"]), "368aa01fb5ebe186853ada05f635b4c81934bb1c36d5cfdb1557c34a6d925323");
    is(&hint(&[5; 32]), "ebb0adec");
    is(&CidKey::new(&root).seal(0x0102_0304, 0x0506_0708), "05060708d3706c5ad8695b2d");
    let initial = initial_keys(&[5; 32], &Key([9; 32]), &dcid, Side::Client);
    let one_rtt = keys(PacketCipher::ChaCha20, &Key([1; 32]), &Key([2; 32]));
    let aes = keys(PacketCipher::Aes128, &Key([1; 32]), &Key([2; 32]));
    for (keys, first, hex) in [
        (
            initial,
            0xc3,
            "\
        c0c3c3c3c3c3c3c3c3ca43d7c46bfc5624a87ab28e56914c920993c71e437cc87b5eebc55f",
        ),
        (
            one_rtt,
            0x43,
            "\
        4a43434343434343430b499ae333cf95389c220c58d8d9cb5a71ef5dcca38fddbce9f52c78",
        ),
        (aes, 0x43, "5b4343434343434343b158fae777a5cd8960cd2dc8b4d7c50cf55a29dddeebcaa3f6de82e6"),
    ] {
        let mut packet = vec![first; 9];
        packet.extend_from_slice(&[0, 0, 1, 44]);
        packet.extend_from_slice(&[0xaa; 8]);
        packet.extend_from_slice(&[0; 16]);
        keys.packet.local.encrypt(300, &mut packet, 13);
        keys.header.local.encrypt(9, &mut packet);
        is(&packet, hex);
    }
    let server = Respond::new(local("b", 22, authority().public(), false));
    is(&server.retry_tag(version(3), &dcid, b"a Retry without its tag"), "268db2942ad7b8f64d53756594133f04");
}

#[test]
fn keys_of_an_initial_that_was_opened_serve_that_one_alone() {
    let server = Respond::new(local("b", 22, authority().public(), false));
    let sealed = |keys: &Keys| {
        let mut packet = vec![0x43; 40];
        keys.packet.local.encrypt(7, &mut packet, 13);
        packet
    };
    let of = |first: u8| ConnectionId::new(&[first; 16]);
    let fresh = |dcid: &ConnectionId| sealed(&server.initial_keys(version(3), dcid).unwrap_or_else(|_| panic!("keys")));
    let (one, other) = (fresh(&of(1)), fresh(&of(2)));
    assert_ne!(one, other);
    for asked in [1, 2] {
        assert!(server.admits(version(3), &of(1), |_| Some(())).is_some());
        assert_eq!(fresh(&of(asked)), [&one, &other][usize::from(asked) - 1].clone());
        assert_eq!(fresh(&of(1)), one, "and once");
    }
    assert!(server.admits(version(3), &of(1), |_| None).is_none() && fresh(&of(1)) == one);
    assert!(server.admits(version(9), &of(1), |_| Some(())).is_none(), "no psk of that epoch");
}

#[test]
fn frames() {
    is(
        &identity("edge-1", 21).1.encode(),
        "\
        0101000000006afd8aa8bce059bf5b2ab7a91f3e863acf0c84d3ebbe04ca8490094b052b5b15afab174306656467652d\
        3105636c6f7564fc1c2076072bdb7a9cc0341411bfa44f013b0a1119271156c3495c419941e6060d2e914f83ddea55fe\
        b15389d5e31abcabef3bc1650490a9761351344a3b380f",
    );
    let service = ServiceId { namespace: "shop".into(), name: "web".into() };
    let endpoint = "[2001:db8::1]:8080".parse().unwrap();
    is(
        &encode(&Open { service, port: 80, protocol: Protocol::Tcp, endpoint }),
        "0020010600500620010db80000000000000000000000011f900473686f7003776562",
    );
    is(&encode_answer(&Ok(())), "00");
    is(&encode_answer(&Err(Refusal::ConnectFailed("refused".into()))), "02000772656675736564");
    let mut out = Vec::new();
    TagKey::new(&Key([7; 32]), b"to relay").frame(0x0102_0304, &[0x41; 40], &mut out);
    is(
        &out,
        "\
        1101020304ebcd8321986905824141414141414141414141414141414141414141414141414141414141414141414141\
        4141414141",
    );
    let (a, b) = (identity("a", 21).0, identity("b", 22).0);
    let keys = DiscoKeys::new(&Key([21; 32]), &a.public, &b.public, &Key([9; 32])).unwrap();
    let other = DiscoKeys::new(&Key([22; 32]), &b.public, &a.public, &Key([9; 32])).unwrap();
    let from = "192.0.2.1:7843".parse().unwrap();
    for (message, hex) in [
        (
            Message::Ping { txid: 0x0102_0304_0506_0708, preference: 1 },
            "\
        108c487ce4699729c8b1bed1b6cdbd33a83dfeb5aae597dc8886461af303bb583d0520c7c73f40eb9960d83f50e1dee4\
        57def2fa5ddf24ba2756ac",
        ),
        (
            Message::Pong { txid: 1, observed: from },
            "\
        108c487ce4699729c8b1bed1b6cdbd33a83dfeb5aae597dc8886461af303bb583d0621c5c43b45ed9e69ddd627c3f4da\
        2f3b7501bf5833472a032421dc0d1f84a5",
        ),
        (
            Message::CallMeMaybe { asks: true, mapping: Mapping::Dependent, candidates: vec![from] },
            "\
        108c487ce4699729c8b1bed1b6cdbd33a83dfeb5aae597dc8886461af303bb583d0720c6c53f85ed9c69c7b5d2206121\
        b76c4858cc71290c8d6bf5f9",
        ),
        (
            Message::PathDown,
            "\
        108c487ce4699729c8b1bed1b6cdbd33a83dfeb5aae597dc8886461af303bb583d0007f98e6eba166a55bd953e387456\
        eed0",
        ),
    ] {
        let frame = keys.seal(&message, &mut fastrand::Rng::with_seed(1));
        assert!(other.open(&frame).is_some());
        is(&frame, hex);
    }
}
