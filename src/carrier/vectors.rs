//! Known answers: the bytes of a TCP carrier with these keys, on every architecture and in every version that is to talk
//! to the others. They were computed by another implementation too, from the Noise specification, in Python.

use super::noise::{Dialer, HELLO_LEN, Identity, OVERHEAD, PREFIX, REPLY_LEN, answer_seeded, recognise};
use crate::{
    encoding::HEXLOWER,
    tunnel::{
        Key,
        identity::{KeyPair, Secret},
    },
};

const HELLO: &str = "0051038c7ba3e577a85b6282791a7649f3a49b62af9aafd556640fe3f178d834c37b7b75f6f4bc4ec27ef45cb4f8abc42e87ecc6517c5cbcd199f4cda61356aa991cde156f14dd33e510ac02e72a3e4279e3d8";
const REPLY: &str =
    "0030a01033bbd4b6f41076dd0ae931c1cd22d102f8fff9ddfe6b52b1fbfb7c2c51675ca91c2ff807bfa50f7e00a38a1daefd";
/// Of each direction, 41 41 41 41 41 and \"second\".
const UP: &str = "00151c60abf2e8ba40873f4f966b8c94584da9d23f307a001670df4bc8ce8cd0510826f4cce89f9d6b8b7dc369036b";
const DOWN: &str = "0015503aa7a3d2ea5a8b63497b46f2df0e416909aadab4001618d195720d181d5c12a815f3db7ea5e5838b4bbfeae5";

#[test]
fn a_handshake_and_the_records_after_it() {
    let pair = KeyPair::from_private(Secret::new([22; 32])).unwrap();
    let relay = Identity { secret: Key([22; 32]), public: pair.public, psks: vec![(3, Key([9; 32]))] };
    let (dialer, hello) = Dialer::seeded(&relay.public, 3, &relay.psks[0].1, Some(1)).unwrap();
    assert_eq!((HEXLOWER.encode(&hello).as_str(), hello.len()), (HELLO, HELLO_LEN));
    let psk = recognise(&relay, &hello).unwrap();
    let (reply, mut down, mut at_relay) = answer_seeded(&relay, psk, &hello, Some(2)).unwrap();
    assert_eq!((HEXLOWER.encode(&reply).as_str(), reply.len()), (REPLY, REPLY_LEN));
    let (mut up, mut at_node) = dialer.finish(&reply).unwrap();
    for (sealer, opener, known) in [(&mut up, &mut at_relay, UP), (&mut down, &mut at_node, DOWN)] {
        let mut stream = Vec::new();
        assert!(sealer.seal(&[0x41; 5], &mut stream) && sealer.seal(b"second", &mut stream));
        assert_eq!(HEXLOWER.encode(&stream), known);
        assert_eq!(opener.open(&mut stream), Ok(Some(5)));
        assert_eq!(stream[PREFIX..][..5], [0x41; 5]);
        let second = &mut stream[5 + OVERHEAD..];
        assert_eq!(opener.open(second), Ok(Some(6)));
        assert_eq!(second[PREFIX..][..6], *b"second");
    }
}
