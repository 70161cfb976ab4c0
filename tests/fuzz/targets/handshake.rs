//! The handshake of two nodes, its messages cut anywhere and one of them spoilt: whole ones are agreed on, of a spoilt one
//! nothing is believed, and bytes that nobody has sealed are no message.
#![no_main]

#[allow(dead_code)]
#[path = "../world.rs"]
mod world;

use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;
use weft::tunnel::noise::{Handshake, Purpose};
use world::Cluster;

thread_local!(static CLUSTER: OnceCell<Cluster> = const { OnceCell::new() });

/// Hands over a message in pieces, without cuts byte by byte; whether all of it was taken.
fn feed(session: &mut dyn Handshake, message: &[u8], cuts: &[u8]) -> bool {
    let (mut rest, mut turn) = (message, 0);
    while !rest.is_empty() {
        let most = cuts.get(turn % cuts.len().max(1)).map_or(1, |c| usize::from(*c));
        let (piece, tail) = rest.split_at(most.min(rest.len()).max(usize::from(turn % 8 == 7)));
        if session.read_handshake(piece).is_err() {
            return false;
        }
        (rest, turn) = (tail, turn + 1);
    }
    true
}

fuzz_target!(|input: &[u8]| {
    let Some((&[kind, which, high, low, value, longer], cuts)) = input.split_first_chunk::<6>() else { return };
    let purpose = if kind & 1 == 0 { Purpose::Peer } else { Purpose::Register };
    let ends = || CLUSTER.with(|c| c.get_or_init(Cluster::default).handshake(purpose, [kind & 2 != 0, kind & 4 != 0]));
    let [mut near, mut far] = ends();
    // Bytes of the input alone, to a fresh responder.
    let [_, mut fresh] = ends();
    let framed = [&(cuts.len() as u16).to_be_bytes(), cuts].concat();
    for bytes in [input, &framed] {
        feed(&mut *fresh, bytes, &[high]);
        assert!(fresh.peer_identity().is_none() && fresh.is_handshaking(), "a stranger is believed");
    }

    let which = usize::from(which % 5); // 4: none is spoilt
    let spoil = |message: &mut Vec<u8>| {
        if message.is_empty() {
            return false;
        }
        let at = usize::from(u16::from_be_bytes([high, low])) % message.len();
        message[at] ^= value;
        message.extend(std::iter::repeat_n(kind, usize::from(longer % 4)));
        value != 0 || longer % 4 != 0
    };
    for number in 0..4 {
        let (from, to) = if number % 3 == 0 { (&mut near, &mut far) } else { (&mut far, &mut near) };
        let mut message = Vec::new();
        let keys = from.write_handshake(&mut message);
        assert!(keys.is_some() || number == 0, "message {number}");
        let spoilt = number == which && spoil(&mut message);
        let taken = feed(&mut **to, &message, cuts);
        if spoilt {
            let believed = if number < 2 { to.peer_identity().is_some() } else { !to.is_handshaking() };
            // What is behind a whole message may come later than it: then that is refused, which ends the connection.
            assert!(!believed || value == 0, "a spoilt message {number} is believed");
            return;
        }
        assert!(taken, "message {number} is refused");
        if number == 1 {
            assert!(to.write_handshake(&mut Vec::new()).is_some());
        }
    }
    let mut secrets = [[0; 32]; 2];
    for (session, secret) in [&near, &far].into_iter().zip(&mut secrets) {
        assert!(!session.is_handshaking() && session.peer_identity().is_some());
        assert!(matches!(session.transport_parameters(), Ok(Some(_))));
        assert!(session.export_keying_material(secret, b"x", b"").is_ok());
    }
    assert!(secrets[0] == secrets[1] && secrets[0] != [0; 32]);
});
