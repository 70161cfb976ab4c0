//! What a connection gets out of its path: windows, congestion control, the path's MTU.

use crate::{
    line::Line,
    nat::Kind,
    pair::{LATER, Pair, SEC, connect, payload, seeds},
    world::{End, World},
};
use std::time::Duration;
use weft::tunnel::{PeerView, Progress, identity::Roles};

const ETHERNET: usize = 1500;
const MBIT: u64 = 1_000_000 / 8;

fn view(world: &World, host: usize, peer: &str) -> PeerView {
    world.hosts[host].node.peer_views(world.now).into_iter().find(|v| v.name == peer).unwrap()
}

/// Runs until both see the other by this path.
fn settle(world: &mut World, path: &str) {
    let both = |w: &mut World| view(w, 1, "b").path == path && view(w, 2, "a").path == path;
    assert!(world.run(20 * SEC, both), "not {path}");
}

/// Bytes that come out at the far end in so long, of a sender who always has more.
fn pour(world: &mut World, near: End, far: End, long: Duration) -> usize {
    let chunk = payload(64 << 10);
    let mut got = 0;
    world.run(long, |w| {
        while let Progress::Bytes(_) = w.hosts[near.host].node.write(near.key, &chunk) {}
        let mut buf = [0; 64 << 10];
        while let Progress::Bytes(n) = w.hosts[far.host].node.read(far.key, &mut buf) {
            got += n;
        }
        false
    });
    got
}

/// The mean of several: by a relay, whose queues are short for so long a round trip, each takes its own course.
#[test]
fn one_stream_fills_a_long_fat_path() {
    const SEEDS: u64 = 6;
    for kind in [Kind::Public, Kind::SymmetricRandom] {
        let mut rates = Vec::new();
        for seed in seeds(SEEDS) {
            let mut p = Pair::new(seed, kind, kind);
            // By the relay each way is two lines.
            let lines = if kind == Kind::Public { 2 } else { 4 };
            p.world.delay = Duration::from_millis(300 / lines);
            p.world.line = Some(Line::new(20 * MBIT, SEC / 10, ETHERNET));
            let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
            settle(&mut p.world, if kind == Kind::Public { "direct" } else { "relay" });
            pour(&mut p.world, near, far, 6 * SEC);
            rates.push(pour(&mut p.world, near, far, 10 * SEC) as u64 / 10);
        }
        let mean = rates.iter().sum::<u64>() / rates.len() as u64;
        assert!(mean >= 17 * MBIT, "{kind:?}: {mean} bytes/s of {}; {rates:?}", 20 * MBIT);
    }
}

#[test]
fn a_shallow_queue_is_not_flooded() {
    for seed in seeds(3) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.delay = SEC / 50;
        p.world.line = Some(Line::new(20 * MBIT, SEC / 50, ETHERNET));
        let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
        settle(&mut p.world, "direct");
        pour(&mut p.world, near, far, 3 * SEC);
        let before = view(&p.world, 1, "b").tx_bytes;
        let got = pour(&mut p.world, near, far, 10 * SEC) as u64;
        let sent = view(&p.world, 1, "b").tx_bytes - before;
        assert!(got >= 10 * 15 * MBIT, "seed {seed}: {} kbit/s", got * 8 / 10_000);
        assert!(got * 10 >= sent * 7, "seed {seed}: {sent} bytes sent for {got}");
    }
}

#[test]
fn a_path_that_has_become_slower_is_filled_again() {
    for seed in seeds(2) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.delay = SEC / 2000;
        p.world.line = Some(Line::new(20 * MBIT, SEC / 20, ETHERNET));
        let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
        settle(&mut p.world, "direct");
        assert!(pour(&mut p.world, near, far, 3 * SEC) as u64 >= 2 * 15 * MBIT, "seed {seed}: while it was fast");
        p.world.delay = SEC / 50;
        pour(&mut p.world, near, far, 13 * SEC);
        let got = pour(&mut p.world, near, far, 5 * SEC) as u64;
        assert!(got >= 5 * 16 * MBIT, "seed {seed}: {} kbit/s; {:?}", got * 8 / 5000, view(&p.world, 1, "b"));
    }
}

/// A few bytes each second.
fn trickle(world: &mut World, near: End, far: End, seconds: usize) {
    for _ in 0..seconds {
        let _ = world.hosts[near.host].node.write(near.key, b"tick");
        world.run(SEC, |w| {
            let _ = w.hosts[far.host].node.read(far.key, &mut [0; 64]);
            false
        });
    }
}

/// Two nodes behind one NAT, on one LAN.
fn neighbours(seed: u64) -> (Pair, End, End) {
    let mut p = Pair::new(seed, Kind::PortRestricted, Kind::Public);
    let third = p.cluster.identity("c", Roles::NONE, LATER);
    let c = p.world.add_neighbour(1, 3, &p.cluster, &third, p.relays.clone());
    p.world.run(2 * SEC, |_| false);
    let near = p.world.open(1, "c");
    let mut far = None;
    p.world.run(5 * SEC, |w| {
        far = far.or_else(|| w.hosts[c].incoming.pop_front().map(|(key, ..)| End { host: c, key }));
        far.is_some()
    });
    (p, near, far.unwrap())
}

#[test]
fn congestion_control_follows_the_path() {
    for seed in seeds(5) {
        let mut p = Pair::new(seed, Kind::PortRestricted, Kind::PortRestricted);
        connect(&mut p.world, 20 * SEC).unwrap();
        settle(&mut p.world, "direct");
        assert_eq!(view(&p.world, 1, "b").congestion, "bbr", "seed {seed}: over the internet");

        let (mut p, near, far) = neighbours(seed);
        let (node, peer) = (near.host, "c");
        let direct = |w: &mut World| view(w, node, peer).path == "direct";
        assert!(p.world.run(10 * SEC, direct), "seed {seed}");
        assert_eq!(view(&p.world, node, peer).congestion, "cubic", "seed {seed}: on a link");
        // The link is cut: the relay carries it, with the other control.
        p.world.blocked.push((near.host, far.host));
        trickle(&mut p.world, near, far, 5);
        let now = view(&p.world, node, peer);
        assert_eq!((now.path, now.congestion), ("relay", "bbr"), "seed {seed}");
        p.world.blocked.clear();
        trickle(&mut p.world, near, far, 60);
        let now = view(&p.world, node, peer);
        assert_eq!((now.path, now.congestion), ("direct", "cubic"), "seed {seed}");
    }
}

/// Runs a transfer that never ends until so many bytes are through; how long it took.
fn until_through(world: &mut World, near: End, far: End, bytes: usize, most: Duration) -> Option<Duration> {
    let (start, chunk, mut got) = (world.now, payload(16 << 10), 0);
    let through = world.run(most, |w| {
        while let Progress::Bytes(_) = w.hosts[near.host].node.write(near.key, &chunk) {}
        let mut buf = [0; 16 << 10];
        while let Progress::Bytes(n) = w.hosts[far.host].node.read(far.key, &mut buf) {
            got += n;
        }
        got >= bytes
    });
    through.then(|| world.now - start)
}

/// A quarter of a megabyte in windows that double: 32 packets of 1,200 bytes, then 77, 154 kB.
#[test]
fn a_new_path_has_no_slow_beginning() {
    let (mut one_way, mut both_ways) = (Vec::new(), Vec::new());
    for seed in seeds(8) {
        for (both, took) in [(false, &mut one_way), (true, &mut both_ways)] {
            let mut p = Pair::new(seed, Kind::Public, Kind::Public);
            // A round trip of 40 ms.
            p.world.delay = SEC / 50;
            p.world.line = Some(Line::new(100 * MBIT, SEC / 10, ETHERNET));
            let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
            settle(&mut p.world, "direct");
            trickle(&mut p.world, near, far, 3);
            let chunk = payload(256 << 10);
            if both {
                while let Progress::Bytes(_) = p.world.hosts[far.host].node.write(far.key, &chunk) {}
            }
            took.push(until_through(&mut p.world, near, far, 256 << 10, 5 * SEC).unwrap_or(5 * SEC));
        }
    }
    for took in [&mut one_way, &mut both_ways] {
        took.sort_unstable();
    }
    assert!(one_way[7] <= SEC / 5, "{one_way:?}; both ways {both_ways:?}");
    assert!(both_ways[7] <= 9 * SEC / 50, "both ways {both_ways:?}");
}

#[test]
fn a_path_of_1280_bytes_works_direct_and_relayed() {
    for seed in seeds(3) {
        for (kind, path) in [(Kind::Public, "direct"), (Kind::SymmetricRandom, "relay")] {
            let mut p = Pair::new(seed, kind, kind);
            p.world.line = Some(Line::new(20 * MBIT, SEC / 20, 1280));
            let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
            settle(&mut p.world, path);
            let bytes = payload(500_000);
            let got = p.world.transfer(near, far, &bytes, 5 * SEC).unwrap_or_else(|e| panic!("{seed} {kind:?}: {e}"));
            assert!(got == bytes, "seed {seed}");
            // IPv4 and UDP, and a relay's header; the search ends with steps of 20 bytes.
            let fits = 1280 - 28 - if path == "relay" { 13 } else { 0 };
            // Each size that does not pass is tried three times, and given up after somewhat more than a round trip.
            let found = |w: &World| view(w, 1, "b").mtu;
            for _ in 0..5 {
                let long = if found(&p.world) < fits - 32 { SEC } else { SEC / 100 };
                pour(&mut p.world, near, far, long);
            }
            let found = found(&p.world);
            assert!((fits - 32..=fits).contains(&found), "seed {seed} {kind:?}: {found} of {fits}");
        }
    }
}

#[test]
fn a_black_hole_is_found_within_five_seconds() {
    for seed in seeds(3) {
        for (kind, path) in [(Kind::Public, "direct"), (Kind::SymmetricRandom, "relay")] {
            // quinn asks for four bursts of loss, of a probe timeout each.
            for (rtt, most) in [(20, 5), (100, 5), (300, 8)] {
                let mut p = Pair::new(seed, kind, kind);
                p.world.delay = Duration::from_millis(rtt / if path == "relay" { 4 } else { 2 });
                p.world.line = Some(Line::new(10 * MBIT, SEC / 10, ETHERNET));
                let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
                settle(&mut p.world, path);
                let named = format!("seed {seed}, {path}, {rtt} ms");
                until_through(&mut p.world, near, far, 2_000_000, 20 * SEC).expect(&named);
                assert!(view(&p.world, 1, "b").mtu >= 1400, "{named}");
                p.world.line = Some(Line::new(10 * MBIT, SEC / 10, 1300));
                // What is on the line comes out still.
                pour(&mut p.world, near, far, SEC / 2);
                let again = until_through(&mut p.world, near, far, 100_000, most * SEC - SEC / 2).is_some();
                assert!(again, "{named}: still nothing, by {}", view(&p.world, 1, "b").path);
                // Or what has come through since.
                let (found, fits) = (view(&p.world, 1, "b").mtu, 1300 - 28 - if path == "relay" { 13 } else { 0 });
                assert!((1200..=fits).contains(&found), "{named}: {found}");
            }
        }
    }
}

#[test]
fn a_registration_probes_no_mtu() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    p.world.record = true;
    let registered = |w: &mut World| w.hosts[1].node.relay_views().iter().all(|r| r.registered);
    assert!(p.world.run(5 * SEC, registered));
    p.world.run(5 * SEC, |_| false);
    let quic = p.world.recorded.iter().filter(|(_, _, bytes)| bytes[0] & 0x40 != 0);
    let lens: Vec<_> = quic.map(|(from, _, bytes)| (from.to_string(), bytes.len())).collect();
    assert!(lens.len() > 8 && lens.iter().all(|l| l.1 <= 1200), "{lens:?}");
}
