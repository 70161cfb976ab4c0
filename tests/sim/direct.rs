//! Paths without the relay: found where the oracle says so, and only there.

use crate::{
    nat::Kind,
    pair::{Pair, SEC, connect, payload, seeds},
    world::{Cluster, End, NOW, World},
};
use std::time::Duration;
use weft::tunnel::{Link, Progress, identity::Roles};

fn path(p: &Pair, host: usize, peer: &str) -> &'static str {
    p.world.hosts[host].node.peer_views(p.world.now).into_iter().find(|v| v.name == peer).map_or("none", |v| v.path)
}

#[test]
fn direct_if_and_only_if_the_oracle_says_so() {
    for seed in seeds(5) {
        for a in Kind::ALL {
            for b in Kind::ALL {
                let mut p = Pair::new(seed, a, b);
                let named = format!("seed {seed}: {a:?} and {b:?}");
                let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("{named}: {e}"));
                let both = |p: &Pair| path(p, 1, "b") == "direct" && path(p, 2, "a") == "direct";
                let start = p.world.now;
                while !both(&p) && p.world.now < start + 3 * SEC {
                    p.world.run(SEC / 20, |_| false);
                }
                assert_eq!(both(&p), a.direct_possible(b), "{named}");
                let bytes = payload(20_000);
                for (from, to) in [(near, far), (far, near)] {
                    let got = p.world.transfer(from, to, &bytes, 30 * SEC).unwrap_or_else(|e| panic!("{named}: {e}"));
                    assert!(got == bytes, "{named}");
                }
            }
        }
    }
}

/// By the relay a call crosses two links there and its answer two back: of four tries three fail at this loss.
#[test]
fn a_fifth_lost_on_each_link_keeps_few_on_the_relay() {
    let mut times = Vec::new();
    for seed in seeds(100) {
        let mut p = Pair::new(seed, Kind::PortRestricted, Kind::PortRestricted);
        p.world.loss = 0.2;
        connect(&mut p.world, 60 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let start = p.world.now;
        while path(&p, 1, "b") != "direct" || path(&p, 2, "a") != "direct" {
            p.world.run(SEC / 20, |_| false);
            assert!(p.world.now < start + 60 * SEC, "seed {seed}: not direct");
        }
        times.push(p.world.now - start);
    }
    times.sort_unstable();
    let (p50, p95) = (times[times.len() / 2], times[times.len() * 95 / 100]);
    assert!(p50 <= SEC && p95 <= 3 * SEC, "{p50:?}, {p95:?}; {times:?}");
}

/// Brings a pair to a direct path with an open stream.
fn direct_pair(seed: u64, a: Kind, b: Kind) -> (Pair, End, End) {
    let mut p = Pair::new(seed, a, b);
    let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let start = p.world.now;
    while path(&p, 1, "b") != "direct" || path(&p, 2, "a") != "direct" {
        p.world.run(SEC / 20, |_| false);
        assert!(p.world.now < start + 5 * SEC, "seed {seed}: not direct");
    }
    (p, near, far)
}

/// How long one byte takes from one end to the other, and back.
fn echo(p: &mut Pair, near: End, far: End, most: Duration) -> Duration {
    let start = p.world.now;
    for (from, to) in [(near, far), (far, near)] {
        let mut sent = false;
        let arrived = p.world.run(most, |w| {
            sent = sent || w.hosts[from.host].node.write(from.key, b"x") == Progress::Bytes(1);
            match w.hosts[to.host].node.read(to.key, &mut [0; 16]) {
                Progress::Bytes(_) => true,
                Progress::Pending => false,
                broken => panic!("{broken:?}"),
            }
        });
        assert!(arrived, "nothing after {most:?}");
    }
    p.world.now - start
}

#[test]
fn a_dead_direct_path_costs_less_than_three_seconds_and_is_found_again() {
    let mut times = Vec::new();
    for seed in seeds(20) {
        let (mut p, near, far) = direct_pair(seed, Kind::PortRestricted, Kind::PortRestricted);
        echo(&mut p, near, far, SEC);
        p.world.blocked.push((1, 2));
        times.push(echo(&mut p, near, far, 10 * SEC));
        assert_eq!(path(&p, 1, "b"), "direct", "seed {seed}: suspect, not yet given up");
        for _ in 0..5 {
            echo(&mut p, near, far, 3 * SEC);
            p.world.run(SEC, |_| false);
        }
        assert_eq!(path(&p, 1, "b"), "relay", "seed {seed}");
        p.world.blocked.clear();
        // At most a minute after the fault has ended nobody is on the relay any more.
        for _ in 0..60 {
            echo(&mut p, near, far, 3 * SEC);
            p.world.run(SEC, |_| false);
        }
        assert_eq!((path(&p, 1, "b"), path(&p, 2, "a")), ("direct", "direct"), "seed {seed}");
    }
    times.sort_unstable();
    assert!(times[times.len() - 1] <= 2 * SEC, "{times:?}");
}

/// A NAT or firewall that lets pass one direction only: what comes must not speak for what goes.
#[test]
fn a_path_that_is_dead_in_one_direction_is_left_at_both_ends() {
    for seed in seeds(10) {
        for (from, to) in [(1, 2), (2, 1)] {
            let (mut p, near, far) = direct_pair(seed, Kind::PortRestricted, Kind::PortRestricted);
            echo(&mut p, near, far, SEC);
            p.world.mute.push((from, to));
            let worst = (0..20).map(|_| {
                p.world.run(SEC, |_| false);
                echo(&mut p, near, far, 10 * SEC)
            });
            let worst = worst.max().unwrap_or_default();
            assert!(worst <= 2 * SEC, "seed {seed}, {from} to {to}: {worst:?}");
            assert_eq!((path(&p, 1, "b"), path(&p, 2, "a")), ("relay", "relay"), "seed {seed}, {from} to {to}");
            p.world.mute.clear();
            for _ in 0..60 {
                echo(&mut p, near, far, 3 * SEC);
                p.world.run(SEC, |_| false);
            }
            assert_eq!((path(&p, 1, "b"), path(&p, 2, "a")), ("direct", "direct"), "seed {seed}, {from} to {to}");
        }
    }
}

#[test]
fn a_rebound_nat_of_either_side_loses_no_stream() {
    for seed in seeds(10) {
        for (nat, from_far) in [(0, false), (0, true), (1, false), (1, true)] {
            let (mut p, near, far) = direct_pair(seed, Kind::PortRestricted, Kind::PortRestricted);
            let (from, to) = if from_far { (far, near) } else { (near, far) };
            // A transfer in one direction alone, of 1 MB in about four seconds.
            let mut sent = 0;
            let mut got = 0;
            let mut rebound = None;
            let mut worst = Duration::ZERO;
            let mut last = p.world.now;
            let done = p.world.run(60 * SEC, |w| {
                let chunk = [7; 4000];
                if sent < 1_000_000
                    && let Progress::Bytes(n) = w.hosts[from.host].node.write(from.key, &chunk)
                {
                    sent += n;
                }
                let mut buf = [0; 64 << 10];
                while let Progress::Bytes(n) = w.hosts[to.host].node.read(to.key, &mut buf) {
                    got += n;
                    worst = worst.max(w.now - last);
                    last = w.now;
                }
                if got > 300_000 && rebound.is_none() {
                    rebound = Some(w.now);
                    let public = format!("11.{}.0.77", nat + 1).parse().unwrap();
                    w.nats[nat].rebind(Some(public));
                }
                got >= 1_000_000
            });
            assert!(done, "seed {seed}, NAT {nat}, from far {from_far}: {got} bytes");
            assert!(worst <= 2 * SEC, "seed {seed}, NAT {nat}, from far {from_far}: a gap of {worst:?}");
        }
    }
}

#[test]
fn an_idle_peer_whose_nat_was_rebound_is_reached_after_its_next_word() {
    for seed in seeds(10) {
        let (mut p, near, far) = direct_pair(seed, Kind::PortRestricted, Kind::PortRestricted);
        p.world.run(60 * SEC, |_| false);
        p.world.nats[1].rebind(None);
        // Nobody can know before: it says something each 20 s, and notices within a second that it is not answered.
        let took = echo(&mut p, near, far, 30 * SEC);
        assert!(took <= 22 * SEC, "seed {seed}: {took:?}");
    }
}

#[test]
fn a_rebooted_node_behind_its_nat_is_reached_in_two_seconds() {
    for seed in seeds(10) {
        let (mut p, near, far) = direct_pair(seed, Kind::PortRestricted, Kind::PortRestricted);
        echo(&mut p, near, far, SEC);
        let (node, count) = p.world.node(&p.cluster, &p.b, p.relays.clone());
        (p.world.hosts[2].node, p.world.hosts[2].count) = (node, count);
        let local = p.world.hosts[2].address;
        let now = p.world.now;
        let link = Link { address: local.ip(), prefix: 24 };
        p.world.hosts[2].node.set_links(now, vec![link], local.port());
        while connect(&mut p.world, 2 * SEC).is_err() {
            assert!(p.world.now < now + 2 * SEC, "seed {seed}");
        }
        assert!(p.world.now < now + 2 * SEC, "seed {seed}: {:?}", p.world.now - now);
    }
}

#[test]
fn a_replayed_initial_displaces_nothing() {
    for seed in seeds(5) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.record = true;
        let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
        let recorded = std::mem::take(&mut p.world.recorded);
        p.world.record = false;
        for (from, to, bytes) in recorded {
            p.world.inject(from, to, bytes);
        }
        let took = echo(&mut p, near, far, 3 * SEC);
        assert!(took < SEC, "seed {seed}: {took:?}");
    }
}

#[test]
fn two_nodes_on_one_lan_find_each_other_without_any_relay() {
    for seed in seeds(20) {
        for kind in [Kind::PortRestricted, Kind::Symmetric] {
            let cluster = Cluster::new();
            let mut world = World::new(seed);
            world.delay = Duration::from_millis(1);
            let hub = cluster.identity("hub", Roles::NONE, NOW + 1000);
            world.add("11.0.0.1:7843", &cluster, &hub, Vec::new());
            let (a, b) =
                (cluster.identity("a", Roles::NONE, NOW + 1000), cluster.identity("b", Roles::NONE, NOW + 1000));
            world.add_site(1, kind, &cluster, &a, Vec::new());
            world.add_neighbour(1, 3, &cluster, &b, Vec::new());
            let start = world.now;
            let (near, far) = connect(&mut world, SEC).unwrap_or_else(|e| panic!("seed {seed}, {kind:?}: {e}"));
            assert!(world.now - start <= SEC, "seed {seed}");
            assert_eq!(world.transfer(near, far, &payload(9000), 5 * SEC).unwrap(), payload(9000));
            assert_eq!(world.hosts[1].node.peer_views(world.now)[0].path, "direct");
        }
    }
}
