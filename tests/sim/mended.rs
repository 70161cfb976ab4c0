//! What whole lives have found: each in its smallest form.

use crate::{
    faults::{Fault, Stage},
    nat::Kind,
    pair::{SEC, seeds},
    traffic::{State, Traffic},
    world::World,
};

/// Two nodes and relays; a stream from the first to the second is open.
fn pair(seed: u64, kind: Kind, relays: usize) -> (Stage, Traffic, usize, usize) {
    let mut stage = Stage::new(seed, relays);
    let (a, b) = (stage.add(kind, None), stage.add(kind, None));
    let mut traffic = Traffic::default();
    assert!(reaches(&mut stage, &mut traffic, a, b, 20), "seed {seed}: no stream");
    (stage, traffic, a, b)
}

/// Opens a stream of a few bytes, again and again; says whether one was answered in so many seconds.
fn reaches(stage: &mut Stage, traffic: &mut Traffic, from: usize, to: usize, seconds: u32) -> bool {
    let until = stage.world.now + SEC * seconds;
    while stage.world.now < until {
        let flow = traffic.open(&mut stage.world, &stage.names, from, to, 5000);
        let most = until.saturating_duration_since(stage.world.now);
        let told = |t: &mut Traffic, _: &mut _| t.flows[flow].state != State::Asking;
        traffic.run(&mut stage.world, most, told);
        if matches!(traffic.flows[flow].state, State::Live | State::Done) {
            return true;
        }
        traffic.run(&mut stage.world, SEC / 5, |_, _| false);
    }
    false
}

#[test]
fn a_restarted_peer_that_dials_first_ends_the_streams_of_before() {
    for seed in seeds(10) {
        // Whose handshake it was must make no difference.
        for swap in [false, true] {
            let (mut stage, mut traffic, a, b) = pair(seed, Kind::SymmetricRandom, 1);
            let (stays, restarts) = if swap { (b, a) } else { (a, b) };
            traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
            let flow = traffic.open(&mut stage.world, &stage.names, stays, restarts, 5000);
            traffic.run(&mut stage.world, SEC, |_, _| false);
            assert_eq!(traffic.flows[flow].state, State::Live, "seed {seed}, {swap}");
            stage.apply(&Fault::Crash { host: restarts, remembers: false });
            traffic.crashed(restarts);
            // Its new connection and the dead one share a path.
            assert!(reaches(&mut stage, &mut traffic, restarts, stays, 5), "seed {seed}, {swap}");
            traffic.flush(&mut stage.world);
            let told = |t: &mut Traffic, _: &mut _| matches!(t.flows[flow].state, State::Broken(_));
            assert!(traffic.run(&mut stage.world, 8 * SEC, told), "seed {seed}, {swap}: {}", traffic.flows[flow]);
        }
    }
}

#[test]
fn streams_go_on_soon_after_an_outage_of_most_of_a_minute() {
    for seed in seeds(10) {
        for kind in [Kind::Public, Kind::SymmetricRandom] {
            let (mut stage, mut traffic, a, b) = pair(seed, kind, 1);
            let flow = traffic.open(&mut stage.world, &stage.names, a, b, 200_000);
            traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
            stage.apply(&Fault::Cut(b));
            traffic.flush(&mut stage.world);
            traffic.run(&mut stage.world, 45 * SEC, |_, _| false);
            stage.apply(&Fault::Mend(b));
            // A relay is tried again at the latest after so long; then everything is to flow at once.
            let done = |t: &mut Traffic, _: &mut _| t.flows[flow].state == State::Done;
            let (over, start) = (traffic.run(&mut stage.world, 20 * SEC, done), stage.world.now);
            assert!(over, "seed {seed}, {kind:?}: {}", traffic.flows[flow]);
            let rtt = stage.world.hosts[a].node.peer_views(start)[0].rtt_ms;
            assert!(rtt < Some(1000), "seed {seed}, {kind:?}: {rtt:?} ms");
        }
    }
}

/// Both ends have filled their windows with what went into the void, and the first probe of whoever is heard again goes
/// there as well: neither may wait for the other's ACK.
#[test]
fn streams_go_on_where_both_ends_have_sent_into_the_void() {
    for seed in seeds(20) {
        for first in [true, false] {
            let (mut stage, mut traffic, a, b) = pair(seed, Kind::PortRestricted, 1);
            traffic.run(&mut stage.world, 3 * SEC, |_, _| false);
            let flows =
                [(a, b), (b, a)].map(|(from, to)| traffic.open(&mut stage.world, &stage.names, from, to, 200_000));
            traffic.run(&mut stage.world, SEC, |_, _| false);
            let (alone, nat) = (if first { a } else { b }, stage.world.hosts[a].nats[0]);
            stage.apply(&Fault::Block(0, alone));
            stage.apply(&Fault::Rebind { host: a, nat, moves: true });
            traffic.flush(&mut stage.world);
            traffic.run(&mut stage.world, 27 * SEC, |_, _| false);
            stage.apply(&Fault::Unblock(0, alone));
            let done = |t: &mut Traffic, _: &mut _| flows.iter().all(|f| t.flows[*f].state == State::Done);
            let over = traffic.run(&mut stage.world, 15 * SEC, done);
            assert!(over, "seed {seed}, {first}: {}; {}", traffic.flows[flows[0]], traffic.flows[flows[1]]);
        }
    }
}

#[test]
fn streams_whose_open_was_cut_off_are_forgotten_with_their_connection() {
    let mut cut_off = 0;
    for seed in seeds(30) {
        let (mut stage, mut traffic, a, b) = pair(seed, Kind::Public, 1);
        stage.world.loss = 0.4;
        for _ in 0..8 {
            let flow = traffic.open(&mut stage.world, &stage.names, a, b, 1900);
            assert_eq!(traffic.flows[flow].state, State::Asking);
            traffic.flush(&mut stage.world);
        }
        stage.world.run(SEC / 50, |_| false);
        let held = stage.world.hosts[b].node.sizes().streams;
        cut_off += held - stage.world.hosts[b].incoming.len() - 1;
        stage.apply(&Fault::Crash { host: a, remembers: false });
        traffic.crashed(a);
        stage.world.loss = 0.0;
        traffic.run(&mut stage.world, 100 * SEC, |_, _| false);
        traffic.drop_all(&mut stage.world);
        let sizes = stage.world.hosts[b].node.sizes();
        assert_eq!(sizes.streams, 0, "seed {seed}: {sizes:?}");
    }
    assert!(cut_off > 0, "none was cut off: this shows nothing");
}

#[test]
fn a_node_that_a_relay_sees_elsewhere_looks_for_direct_paths_at_once() {
    for seed in seeds(10) {
        let (mut stage, mut traffic, a, b) = pair(seed, Kind::PortRestricted, 1);
        stage.apply(&Fault::Block(a, b));
        let flow = traffic.open(&mut stage.world, &stage.names, a, b, 4_000_000);
        let seconds = |stage: &mut Stage, traffic: &mut Traffic, many: u32| {
            for _ in 0..many {
                traffic.feed(&mut stage.world, 0.001);
                traffic.run(&mut stage.world, SEC, |_, _| false);
            }
        };
        seconds(&mut stage, &mut traffic, 76); // the last round was a while ago, the next is a while off
        assert_eq!(stage.path(a, b), "relay", "seed {seed}");
        stage.apply(&Fault::Unblock(a, b));
        let nat = stage.world.hosts[a].nats[0];
        stage.apply(&Fault::Rebind { host: a, nat, moves: true });
        seconds(&mut stage, &mut traffic, 5);
        assert_eq!(stage.path(a, b), "direct", "seed {seed}");
        assert_eq!(traffic.flows[flow].state, State::Live, "seed {seed}");
    }
}

#[test]
fn a_replayed_datagram_does_not_hasten_the_end_of_a_connection() {
    for seed in seeds(10) {
        let (mut stage, mut traffic, a, b) = pair(seed, Kind::PortRestricted, 1);
        stage.world.record = true;
        let flow = traffic.open(&mut stage.world, &stage.names, a, b, 3000);
        traffic.run(&mut stage.world, 5 * SEC, |_, _| false);
        let recorded = std::mem::take(&mut stage.world.recorded);
        stage.world.record = false;
        // An outage, replays of before it, then another address: the connection is prodded with stale news.
        for host in [a, b] {
            stage.apply(&Fault::Cut(host));
        }
        traffic.run(&mut stage.world, 30 * SEC, |_, _| false);
        for host in [a, b] {
            stage.apply(&Fault::Mend(host));
        }
        for (from, to, bytes) in recorded {
            stage.world.inject(from, to, bytes);
        }
        stage.apply(&Fault::Move(a));
        traffic.flush(&mut stage.world);
        let done = |t: &mut Traffic, _: &mut _| t.flows[flow].state == State::Done;
        assert!(traffic.run(&mut stage.world, 20 * SEC, done), "seed {seed}: {}", traffic.flows[flow]);
    }
}

#[test]
fn two_nodes_that_prefer_different_relays_do_not_chase_each_other() {
    for seed in seeds(20) {
        let (mut stage, mut traffic, a, b) = pair(seed, Kind::SymmetricRandom, 2);
        let before: u64 = stage.world.sent.values().sum();
        for _ in 0..10 {
            traffic.open(&mut stage.world, &stage.names, b, a, 500);
            traffic.run(&mut stage.world, SEC, |_, _| false);
        }
        let bytes = stage.world.sent.values().sum::<u64>() - before;
        assert!(bytes < 400_000, "seed {seed}: {bytes} bytes for 10 kB");
    }
}

#[test]
fn a_peer_that_is_restarted_in_its_first_moment_ends_the_streams_of_before() {
    for seed in seeds(10) {
        let mut stage = Stage::new(seed, 1);
        let (a, b) = (stage.add(Kind::SymmetricRandom, None), stage.add(Kind::SymmetricRandom, None));
        let mut traffic = Traffic::default();
        traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
        let handshakes = |w: &World| w.hosts[a].count.handshakes.get();
        let before = handshakes(&stage.world);
        traffic.open(&mut stage.world, &stage.names, b, a, 5000);
        assert!(traffic.run(&mut stage.world, 5 * SEC, |_, w| handshakes(w) > before), "seed {seed}");
        let flow = traffic.open(&mut stage.world, &stage.names, a, b, 5000);
        // Nothing that would tell a restart comes any more.
        stage.apply(&Fault::Cut(a));
        stage.apply(&Fault::Crash { host: b, remembers: false });
        traffic.crashed(b);
        traffic.run(&mut stage.world, SEC, |_, _| false);
        stage.apply(&Fault::Mend(a));
        assert!(reaches(&mut stage, &mut traffic, b, a, 10), "seed {seed}");
        let told = |t: &mut Traffic, _: &mut _| matches!(t.flows[flow].state, State::Broken(_));
        assert!(traffic.run(&mut stage.world, SEC, told), "seed {seed}: {}", traffic.flows[flow]);
    }
}

#[test]
fn a_restart_of_the_peer_ends_all_connections_with_it_at_once() {
    for seed in seeds(10) {
        let mut stage = Stage::new(seed, 1);
        let (a, b) = (stage.add(Kind::PortRestricted, None), stage.add(Kind::PortRestricted, None));
        let mut traffic = Traffic::default();
        traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
        // Both dial, and streams go on in both connections.
        for (from, to) in [(a, b), (b, a)] {
            traffic.open(&mut stage.world, &stage.names, from, to, 5000);
        }
        traffic.run(&mut stage.world, 4 * SEC, |_, _| false);
        assert!(traffic.flows.iter().all(|f| f.state == State::Live), "seed {seed}");
        let sizes = |w: &World| (w.hosts[a].node.sizes().slots, w.hosts[a].node.sizes().streams);
        assert_eq!(sizes(&stage.world), (2, 2), "seed {seed}");
        stage.apply(&Fault::Crash { host: b, remembers: false });
        traffic.crashed(b);
        stage.apply(&Fault::Cut(b));
        traffic.flush(&mut stage.world);
        traffic.run(&mut stage.world, 15 * SEC, |_, _| false);
        stage.apply(&Fault::Mend(b));
        assert!(
            traffic.run(&mut stage.world, 30 * SEC, |_, w| sizes(w).1 < 2),
            "seed {seed}: {:?}",
            sizes(&stage.world)
        );
        assert!(traffic.run(&mut stage.world, SEC, |_, w| sizes(w).1 == 0), "seed {seed}: {:?}", sizes(&stage.world));
    }
}

#[test]
fn a_direct_path_that_nobody_kept_open_is_not_relied_on() {
    for seed in seeds(10) {
        for rest in [100, 600] {
            let (mut stage, mut traffic, a, b) = pair(seed, Kind::PortRestricted, 1);
            traffic.flush(&mut stage.world);
            traffic.run(&mut stage.world, 5 * SEC, |_, _| false);
            assert_eq!(stage.path(a, b), "direct", "seed {seed}");
            // The relay knows of no flow between the two any more, and they have no connection that would ask for one.
            traffic.run(&mut stage.world, rest * SEC, |_, _| false);
            stage.apply(&Fault::Crash { host: stage.relays[0].host, remembers: false });
            for host in [a, b] {
                let nat = stage.world.hosts[host].nats[0];
                stage.apply(&Fault::Rebind { host, nat, moves: false });
            }
            traffic.run(&mut stage.world, rest * SEC, |_, _| false);
            let flow = traffic.open(&mut stage.world, &stage.names, a, b, 5000);
            let live = |t: &mut Traffic, _: &mut _| t.flows[flow].state == State::Live;
            assert!(traffic.run(&mut stage.world, 2 * SEC, live), "seed {seed}, {rest} s: {}", traffic.flows[flow]);
        }
    }
}

#[test]
fn a_restart_right_after_an_outage_ends_all_streams_of_before() {
    for seed in seeds(10) {
        for soon in [true, false] {
            let mut stage = Stage::new(seed, 1);
            let (a, b) = (stage.add(Kind::PortRestricted, None), stage.add(Kind::PortRestricted, None));
            let mut traffic = Traffic::default();
            traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
            // Both dial, and streams go on in both connections.
            for (from, to) in [(a, b), (b, a)] {
                traffic.open(&mut stage.world, &stage.names, from, to, 80_000);
            }
            traffic.run(&mut stage.world, SEC * if soon { 2 } else { 8 }, |_, _| false);
            assert!(traffic.flows.iter().all(|f| f.state == State::Live), "seed {seed}, {soon}");
            traffic.flush(&mut stage.world);
            stage.apply(&Fault::Cut(a));
            traffic.run(&mut stage.world, 4 * SEC, |_, _| false);
            stage.apply(&Fault::Mend(a));
            // Its probes are seconds apart by now; what comes first is the new connection.
            let back = stage.world.hosts[b].count.rx_datagrams.get();
            traffic.run(&mut stage.world, SEC, |_, w| w.hosts[b].count.rx_datagrams.get() > back + 2);
            stage.apply(&Fault::Crash { host: a, remembers: true });
            traffic.crashed(a);
            assert!(reaches(&mut stage, &mut traffic, a, b, 10), "seed {seed}, {soon}");
            let over = |t: &mut Traffic, _: &mut _| t.flows[..2].iter().all(|f| matches!(f.state, State::Broken(_)));
            assert!(
                traffic.run(&mut stage.world, 10 * SEC, over),
                "seed {seed}, {soon}: {} and {}",
                traffic.flows[0],
                traffic.flows[1]
            );
        }
    }
}

/// The peer's handshake ends just before it stands still, ours begins just then: what becomes of ours says nothing of the
/// paths of the peer's.
#[test]
fn a_dial_that_nobody_answers_takes_no_path_from_a_connection_of_the_peers() {
    for seed in seeds(4) {
        for delay in (60..180).step_by(6) {
            let mut stage = Stage::new(seed, 1);
            let (a, b) = (stage.add(Kind::PortRestricted, None), stage.add(Kind::PortRestricted, None));
            let mut traffic = Traffic::default();
            traffic.run(&mut stage.world, 2 * SEC, |_, _| false);
            traffic.open(&mut stage.world, &stage.names, a, b, 1000);
            traffic.run(&mut stage.world, SEC * delay / 1000, |_, _| false);
            stage.apply(&Fault::Freeze(a));
            traffic.open(&mut stage.world, &stage.names, b, a, 1000);
            traffic.run(&mut stage.world, 8 * SEC, |_, _| false);
            let nat = stage.world.hosts[b].nats[0];
            stage.apply(&Fault::Rebind { host: b, nat, moves: true });
            stage.apply(&Fault::Thaw(a));
            assert!(reaches(&mut stage, &mut traffic, a, b, 20), "seed {seed}, {delay} ms");
            for _ in 0..60 {
                traffic.run(&mut stage.world, SEC, |_, _| false);
                reaches(&mut stage, &mut traffic, b, a, 5);
            }
            assert_eq!([stage.path(a, b), stage.path(b, a)], ["direct"; 2], "seed {seed}, {delay} ms");
        }
    }
}
