//! Datagrams beside a stream: whole or not at all, and never behind large ones.

use crate::{
    line::Line,
    nat::Kind,
    pair::{Pair, SEC, payload, seeds},
    world::{End, World},
};
use std::time::{Duration, Instant};
use weft::{
    table::model::{Protocol, ServiceId},
    tunnel::{Beside, Open},
};

pub const LONG: usize = 64_000;
pub const MBIT: u64 = 1_000_000 / 8;

/// A session of a's with b.
pub fn session(world: &mut World, protocol: Protocol) -> (End, End) {
    let service = ServiceId { namespace: "shop".into(), name: "names".into() };
    let open = Open { service, port: 53, protocol, endpoint: "10.0.0.1:53".parse().unwrap() };
    world.touch(1);
    let near = End { host: 1, key: world.hosts[1].node.open(world.now, "b", &open).unwrap() };
    let mut far = None;
    assert!(world.run(20 * SEC, |w| {
        if let Some((key, _, asked)) = w.hosts[2].incoming.pop_front() {
            assert_eq!(asked, open);
            w.hosts[2].node.answer(key, &Ok(()));
            far = Some(End { host: 2, key });
        }
        w.answer_of(near).is_some()
    }));
    (near, far.unwrap())
}

/// Sends a numbered datagram of this length; whether it is on its way.
pub fn send(world: &mut World, end: End, number: u16, len: usize) -> bool {
    let mut bytes = payload(len.max(2));
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    world.touch(end.host);
    world.hosts[end.host].node.send_datagram(world.now, end.key, &bytes) == Beside::Sent
}

/// The numbers of those that have come, each as it was sent.
pub fn receive(world: &mut World, end: End) -> Vec<u16> {
    let mut out = Vec::new();
    while let Some(bytes) = world.hosts[end.host].node.datagram(end.key) {
        assert_eq!(bytes[2..], payload(bytes.len())[2..], "other bytes");
        out.push(u16::from_be_bytes([bytes[0], bytes[1]]));
    }
    out
}

#[test]
fn datagrams_arrive_whole_both_ways_and_only_at_their_stream() {
    for seed in seeds(4) {
        let mut p = Pair::new(seed, Kind::PortRestricted, Kind::PortRestricted);
        p.world.duplicate = 0.1;
        let (near, far) = session(&mut p.world, Protocol::Udp);
        let (other, silent) = session(&mut p.world, Protocol::Udp);
        assert_ne!(near.key, other.key);
        for (from, to) in [(near, far), (far, near)] {
            let mut got = Vec::new();
            for number in 0..200 {
                assert!(send(&mut p.world, from, number, usize::from(number) * 5), "seed {seed}: {number}");
                p.world.run(SEC / 500, |_| false);
                got.extend(receive(&mut p.world, to));
            }
            p.world.run(SEC, |_| false);
            got.extend(receive(&mut p.world, to));
            got.sort_unstable();
            assert_eq!(got, (0..200).collect::<Vec<_>>(), "seed {seed}: each of them, once");
        }
        assert_eq!(receive(&mut p.world, silent), []);
        // Nobody would take what comes beside a connection.
        let (tcp, far_tcp) = session(&mut p.world, Protocol::Tcp);
        send(&mut p.world, tcp, 1, 10);
        p.world.run(SEC, |_| false);
        assert_eq!(receive(&mut p.world, far_tcp), []);
        // Behind the end of its stream there is nobody.
        let now = p.world.now;
        p.world.hosts[near.host].node.drop_stream(now, near.key);
        send(&mut p.world, far, 1, 10);
        p.world.run(SEC, |_| false);
        assert!(!send(&mut p.world, near, 1, 10));
    }
}

#[test]
fn what_nobody_takes_is_dropped_at_a_bound() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    let (near, far) = session(&mut p.world, Protocol::Udp);
    p.world.run(5 * SEC, |_| false);
    for number in 0..1000 {
        send(&mut p.world, near, number, 100);
        p.world.run(SEC / 1000, |_| false);
    }
    p.world.run(SEC, |_| false);
    let got = receive(&mut p.world, far);
    assert!(!got.is_empty() && got.len() <= 128, "{} wait", got.len());
    // All that were sent at once: those that found no room on their way out pushed out older ones.
    for number in 0..1000 {
        send(&mut p.world, near, number, 1000);
    }
    let mut got = Vec::new();
    p.world.run(5 * SEC, |w| {
        got.extend(receive(w, far));
        false
    });
    assert!(got.len() < 500 && got.contains(&999), "{} of 1000", got.len());
}

#[test]
fn small_ones_do_not_wait_for_large_ones() {
    for seed in seeds(4) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.delay = Duration::from_millis(20);
        p.world.jitter = 0.0;
        p.world.line = Some(Line::new(50 * MBIT, SEC / 10, 1500));
        let (near, far) = session(&mut p.world, Protocol::Udp);
        p.world.run(5 * SEC, |_| false);
        let round_trip = 2 * p.world.delay;
        let (mut began, mut slowest, mut got, mut whole) = (Vec::<Instant>::new(), Duration::ZERO, 0, 0);
        // A third of all, each 10 ms: 17 Mbit/s.
        for turn in 0..300_u16 {
            assert!(send(&mut p.world, near, turn, if turn % 3 == 0 { LONG } else { 60 }));
            began.push(p.world.now);
            p.world.run(SEC / 100, |w| {
                for number in receive(w, far) {
                    if number % 3 == 0 {
                        whole += 1;
                    } else {
                        slowest = slowest.max(w.now - began[usize::from(number)]);
                        got += 1;
                    }
                }
                false
            });
        }
        assert!(got >= 195 && whole >= 95, "seed {seed}: {got} of 200, {whole} of 100");
        assert!(
            slowest <= round_trip + p.world.delay,
            "seed {seed}: one way {slowest:?}, a round trip is {round_trip:?}"
        );
    }
}
