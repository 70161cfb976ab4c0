//! The TCP carrier's streams: whatever a stranger says there is refused, and what a peer has sealed comes out as it went
//! in, wherever the stream is cut; a changed byte ends it, and nothing that was not sent comes out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use weft::{
    carrier::{
        connect::{HEAD_MAX, Proxy},
        noise::{DATAGRAM_MAX, Dialer, HELLO_LEN, Identity, OVERHEAD, Opener, PREFIX, REPLY_LEN, answer, recognise},
        tls::{Greeting, HELLO_MAX, Server},
    },
    tunnel::{
        Key,
        identity::{KeyPair, Secret},
    },
};

fn identity() -> Identity {
    let public = KeyPair::from_private(Secret::new([22; 32])).unwrap().public;
    Identity { secret: Key([22; 32]), public, psks: vec![(3, Key([9; 32])), (2, Key([8; 32]))] }
}

/// Both openers of a stream that a stranger has got hold of.
fn openers() -> (Opener, Opener) {
    let relay = identity();
    let psk = &relay.psks[0].1;
    let (dialer, hello) = Dialer::new(&relay.public, 3, psk).unwrap();
    let (reply, _, up) = answer(&relay, recognise(&relay, &hello).unwrap(), &hello).unwrap();
    (up, dialer.finish(&reply).unwrap().1)
}

/// Datagrams of the lengths that the input says, sealed, spoilt at one place and read in pieces.
fn stream(input: &[u8]) {
    let Some((&[lengths, spoil, at_high, at_low], cuts)) = input.split_first_chunk::<4>() else { return };
    let relay = identity();
    let (dialer, hello) = Dialer::new(&relay.public, 3, &relay.psks[0].1).unwrap();
    let (reply, _, mut opener) = answer(&relay, recognise(&relay, &hello).unwrap(), &hello).unwrap();
    assert!((hello.len(), reply.len()) == (HELLO_LEN, REPLY_LEN));
    let (mut sealer, _) = dialer.finish(&reply).unwrap();
    let (mut stream, mut sent) = (Vec::new(), Vec::new());
    for number in 0..1 + usize::from(lengths % 5) {
        let datagram = vec![number as u8; 1 + (usize::from(lengths) * 97 * (number + 1)) % DATAGRAM_MAX];
        assert!(sealer.seal(&datagram, &mut stream));
        sent.push(datagram);
    }
    let at = usize::from(u16::from_be_bytes([at_high, at_low])) % stream.len();
    stream[at] ^= spoil;

    let (mut held, mut got, mut rest, mut turn, mut ended) = (Vec::new(), Vec::new(), &stream[..], 0, false);
    while !rest.is_empty() && !ended {
        // Without cuts byte by byte.
        let most = cuts.get(turn % cuts.len().max(1)).map_or(1, |c| 1 + usize::from(*c) * 8);
        let (piece, tail) = rest.split_at(most.min(rest.len()));
        held.extend_from_slice(piece);
        (rest, turn) = (tail, turn + 1);
        loop {
            match opener.open(&mut held) {
                Ok(Some(len)) => {
                    got.push(held[PREFIX..PREFIX + len].to_vec());
                    held.drain(..len + OVERHEAD);
                }
                Ok(None) => break,
                Err(_) => {
                    ended = true;
                    break;
                }
            }
        }
        assert!(held.len() <= DATAGRAM_MAX + OVERHEAD + most, "{} bytes are held", held.len());
    }
    assert!(sent.starts_with(&got), "what comes out was sent");
    if spoil == 0 {
        assert!(!ended && got == sent && held.is_empty());
    } else {
        assert!(got.len() < sent.len(), "a changed byte passed");
    }
}

/// A proxy's answer that comes byte by byte: what was taken or refused once stays so, and there is an end to waiting.
fn proxied(input: &[u8]) {
    let input = &input[..input.len().min(600)]; // each beginning is looked at
    let proxy: Proxy = "http://u:p@proxy.example:3128".parse().unwrap();
    for answer in [input, &[b"HTTP/1.1 ", input].concat()] {
        let ends = answer.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
        let first = (0..=answer.len()).map(|len| (len, proxy.judge(&answer[..len]))).find(|(_, j)| *j != Ok(false));
        match first {
            None => assert!(ends.is_none() && answer.len() < HEAD_MAX),
            Some((len, Ok(_))) => assert!(Some(len) == ends && answer[9] == b'2', "taken after {len} bytes"),
            Some((len, Err(why))) => {
                assert!(ends.is_none_or(|end| len <= end) && !why.chars().any(char::is_control), "{why:?}");
                assert!(proxy.judge(answer).is_err(), "refused after {len} bytes, and then taken");
            }
        }
    }
    // What is read of a config shows no password, and asks for one thing.
    if let Ok(proxy) = String::from_utf8_lossy(input).parse::<Proxy>() {
        let request = proxy.request("relay.example", 443);
        assert!(request.ends_with("\r\n\r\n") && request.matches("\r\n\r\n").count() == 1, "{request:?}");
        assert!(!proxy.shown().contains('@') && proxy.port != 0);
    }
}

fuzz_target!(|input: &[u8]| {
    static TLS: OnceLock<Server> = OnceLock::new();
    let relay = identity();
    // A stranger's beginning, whole and with what a hello has around it.
    assert!(recognise(&relay, input).is_err());
    let mut hello = vec![0; HELLO_LEN];
    let given = input.len().min(HELLO_LEN - 3);
    hello[..3].copy_from_slice(&[0, (HELLO_LEN - 2) as u8, 3]);
    hello[3..3 + given].copy_from_slice(&input[..given]);
    assert!(recognise(&relay, &hello).is_err(), "who has not the psk is recognised");
    // A wrong answer.
    let (dialer, _) = Dialer::new(&relay.public, 3, &relay.psks[0].1).unwrap();
    let mut reply = vec![0; REPLY_LEN];
    let given = input.len().min(REPLY_LEN - 2);
    reply[1] = (REPLY_LEN - 2) as u8;
    reply[2..2 + given].copy_from_slice(&input[..given]);
    assert!(dialer.finish(&reply).is_err(), "an answer that is not the relay's is taken");
    // Records that nobody has sealed.
    let (up, down) = openers();
    for mut opener in [up, down] {
        assert!(!matches!(opener.open(&mut input.to_vec()), Ok(Some(_))));
    }
    // TLS, in pieces: no stranger gets a connection, and none is listened to for ever.
    let server = TLS.get_or_init(|| Server::new(&relay.public, &relay.psks).unwrap());
    let (mut greeting, mut taken) = (Greeting::default(), 0);
    let piece = 1 + usize::from(input.first().copied().unwrap_or(0));
    for bytes in input.chunks(piece) {
        match greeting.read(bytes, server) {
            Ok(None) => taken += bytes.len(),
            Ok(Some(_)) => panic!("a stranger's ClientHello is taken"),
            Err(_) => break,
        }
        assert!(taken <= HELLO_MAX);
    }
    stream(input);
    proxied(input);
});
