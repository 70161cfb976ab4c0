//! Two nodes and a relay.

use crate::{
    nat::Kind,
    pair::{Pair, RELAY, SEC, connect, payload, seeds, spec},
    world::{NOW, World},
};
use std::time::Duration;
use weft::tunnel::{Progress, Refusal, identity::Roles};

#[test]
fn streams_carry_all_bytes_both_ways_through_loss_delay_and_duplication() {
    for seed in seeds(30) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.loss = if seed % 3 == 0 { 0.0 } else { 0.1 };
        p.world.duplicate = 0.05;
        let registered = |w: &mut World| w.hosts[1..3].iter().all(|h| h.node.relay_views()[0].registered);
        assert!(p.world.run(60 * SEC, registered), "seed {seed}: not registered");
        let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for (from, to) in [(near, far), (far, near)] {
            let bytes = payload(200_000);
            let got = p.world.transfer(from, to, &bytes, 60 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(got == bytes, "seed {seed}: bytes differ");
        }
    }
}

#[test]
fn the_first_answer_comes_within_three_round_trips_of_registration() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.world.delay = Duration::from_millis(25);
    p.world.run(2 * SEC, |_| false);
    let start = p.world.now;
    connect(&mut p.world, 5 * SEC).unwrap();
    // One RTT between the nodes is two links there and two back.
    let rtt = 4 * p.world.delay;
    assert!(p.world.now - start <= 3 * rtt, "{:?}", p.world.now - start);
}

#[test]
fn what_is_written_before_there_is_a_connection_comes_with_the_open() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.world.delay = Duration::from_millis(25);
    p.world.run(2 * SEC, |_| false);
    let near = p.world.open(1, "b");
    let request = payload(5000);
    let Progress::Bytes(early) = p.world.hosts[1].node.write(near.key, &request) else { panic!("nothing is taken") };
    assert_eq!(p.world.hosts[1].node.write(near.key, &request[early..]), Progress::Pending, "it takes ever more");
    let start = p.world.now;
    let (mut far, mut got) = (None, Vec::new());
    let whole = p.world.run(5 * SEC, |w| {
        far = far.or_else(|| w.hosts[2].incoming.pop_front().map(|(key, ..)| key));
        let mut buf = [0; 8192];
        if let Some(Progress::Bytes(len)) = far.map(|key| w.hosts[2].node.read(key, &mut buf)) {
            got.extend_from_slice(&buf[..len]);
        }
        got.len() >= 500 // the rest may come in another datagram, and out of order
    });
    assert!(whole && early > 500 && got == request[..got.len()], "{early} taken, {} came", got.len());
    // To the relay and back for the flow, there and back for the handshake, and there.
    assert!(p.world.now - start <= 8 * p.world.delay + p.world.delay, "{:?}", p.world.now - start);
}

#[test]
fn a_restarted_relay_is_used_again_and_no_stream_is_lost() {
    for seed in seeds(10) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        let (near, far) = connect(&mut p.world, 5 * SEC).unwrap();
        let (node, count) = p.world.node(&p.cluster, &p.relay, Vec::new());
        (p.world.hosts[0].node, p.world.hosts[0].count) = (node, count);
        let start = p.world.now;
        let got =
            p.world.transfer(near, far, &payload(50_000), 10 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(got == payload(50_000));
        assert!(p.world.now - start <= 5 * SEC, "seed {seed}: {:?}", p.world.now - start);
    }
}

#[test]
fn a_restarted_node_is_reached_again() {
    for seed in seeds(10) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        connect(&mut p.world, 5 * SEC).unwrap();
        let (node, count) = p.world.node(&p.cluster, &p.b, spec(&p.relay.1));
        (p.world.hosts[2].node, p.world.hosts[2].count) = (node, count);
        let start = p.world.now;
        while connect(&mut p.world, 5 * SEC).is_err() {
            assert!(p.world.now - start < 10 * SEC, "seed {seed}");
        }
    }
}

#[test]
fn simultaneous_dials_end_in_working_streams_both_ways() {
    for seed in seeds(50) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        let (ab, ba) = (p.world.open(1, "b"), p.world.open(2, "a"));
        let done = p.world.run(5 * SEC, |w| {
            for host in [1, 2] {
                while let Some((key, _, _)) = w.hosts[host].incoming.pop_front() {
                    w.hosts[host].node.answer(key, &Ok(()));
                }
            }
            w.answer_of(ab) == Some(Ok(())) && w.answer_of(ba) == Some(Ok(()))
        });
        assert!(done, "seed {seed}: {:?} {:?}", p.world.answer_of(ab), p.world.answer_of(ba));
    }
}

fn refused(p: &mut Pair) -> String {
    let near = p.world.open(1, "b");
    p.world.run(8 * SEC, |w| w.answer_of(near).is_some());
    match p.world.answer_of(near) {
        Some(Err(Refusal::Unreachable(why))) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_expired_certificate_is_refused_with_the_reason() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.a = p.cluster.identity("a", Roles::NONE, NOW - 1);
    let (node, count) = p.world.node(&p.cluster, &p.a, spec(&p.relay.1));
    (p.world.hosts[1].node, p.world.hosts[1].count) = (node, count);
    refused(&mut p);
    assert!(p.world.hosts[0].count.bad_certificate.get() > 0);
    assert!(
        p.world.hosts[1].node.relay_views()[0].note.contains("expired"),
        "{:?}",
        p.world.hosts[1].node.relay_views()
    );
}

#[test]
fn a_node_with_another_psk_gets_no_byte_back() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.cluster.psks = vec![(1, [8; 32])];
    let (node, count) = p.world.node(&p.cluster, &p.a, spec(&p.relay.1));
    (p.world.hosts[1].node, p.world.hosts[1].count) = (node, count);
    p.world.hosts[2].cut = true;
    p.world.run(5 * SEC, |_| false);
    assert_eq!(p.world.sent.get(&RELAY.parse().unwrap()), None);
    assert!(p.world.hosts[0].count.initial_undecryptable.get() > 0);
}

#[test]
fn an_unknown_name_fails_soon_and_says_so() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.world.run(2 * SEC, |_| false);
    let (start, near) = (p.world.now, p.world.open(1, "nobody"));
    p.world.run(8 * SEC, |w| w.answer_of(near).is_some());
    assert!(p.world.now - start < 3 * SEC);
    assert!(
        matches!(p.world.answer_of(near), Some(Err(Refusal::Unreachable(why))) if why.contains("no relay knows it"))
    );
}
