//! What whole lives have found: each in its smallest form.

use crate::{
    faults::{Fault, Stage},
    nat::Kind,
    pair::{SEC, seeds},
    traffic::{State, Traffic},
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
        let (mut stage, mut traffic, a, b) = pair(seed, Kind::SymmetricRandom, 1);
        stage.apply(&Fault::Crash { host: b, remembers: false });
        traffic.crashed(b);
        // Its new connection and the dead one share a path.
        assert!(reaches(&mut stage, &mut traffic, b, a, 5), "seed {seed}");
        traffic.flush(&mut stage.world);
        let told = |t: &mut Traffic, _: &mut _| matches!(t.flows[0].state, State::Broken(_));
        assert!(traffic.run(&mut stage.world, 8 * SEC, told), "seed {seed}: {}", traffic.flows[0]);
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
