//! Nodes with more than one address: IPv6 beside IPv4, and two uplinks.

use crate::{
    line::Line,
    nat::{Filter, Kind, Mapping, Nat},
    pair::{Pair, SEC, connect, payload, seeds},
    world::{End, Uplink, World},
};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};
use weft::tunnel::{Link, Progress};

const MBYTE: u64 = 1_000_000;

fn via(world: &World, host: usize, peer: &str) -> String {
    let view = world.hosts[host].node.peer_views(world.now).into_iter().find(|v| v.name == peer);
    view.map_or_else(String::new, |v| format!("{} {}", v.path, v.via))
}

/// One more address of a host, behind a NAT or firewall of its own.
fn add_uplink(world: &mut World, host: usize, address: &str, nat: Nat) {
    world.nats.push(nat);
    let nats = vec![world.nats.len() - 1];
    world.uplinks.push(Uplink { host, address: address.parse().unwrap(), nats });
}

/// The node is told what its kernel would tell it.
fn tell(world: &mut World, host: usize) {
    let mut all = vec![world.hosts[host].address];
    all.extend(world.uplinks.iter().filter(|u| u.host == host).map(|u| u.address));
    let links: Vec<Link> =
        all.iter().map(|a| Link { address: a.ip(), prefix: if a.is_ipv6() { 64 } else { 24 } }).collect();
    let up = all.iter().map(SocketAddr::ip).filter(|ip| !world.down.contains(ip)).collect();
    let (now, port) = (world.now, all[0].port());
    world.hosts[host].node.set_uplinks(now, up, links.clone(), false);
    world.hosts[host].node.set_links(now, links, port);
}

/// Both ends have IPv6 behind a stateful firewall, and IPv4 behind these NATs.
fn with_ipv6(seed: u64, a: Kind, b: Kind, hosts: &[usize]) -> Pair {
    let mut p = Pair::new(seed, a, b);
    for host in hosts {
        let ip = format!("2a0f:ff:{host}::2");
        let firewall = Nat::new(ip.parse().unwrap(), (Mapping::Same, Filter::PortDependent));
        add_uplink(&mut p.world, *host, &format!("[{ip}]:7843"), firewall);
        tell(&mut p.world, *host);
    }
    p
}

#[test]
fn ipv6_passes_two_stateful_firewalls_also_where_ipv4_is_relayed_and_is_preferred_where_it_is_not() {
    for seed in seeds(10) {
        for kind in [Kind::SymmetricRandom, Kind::PortRestricted] {
            let mut p = with_ipv6(seed, kind, kind, &[1, 2]);
            let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let by_ipv6 = |w: &World| {
                via(w, 1, "b") == "direct [2a0f:ff:2::2]:7843" && via(w, 2, "a") == "direct [2a0f:ff:1::2]:7843"
            };
            assert!(p.world.run(3 * SEC, |w| by_ipv6(w)), "seed {seed}, {kind:?}: {}", via(&p.world, 1, "b"));
            let bytes = payload(20_000);
            assert!(p.world.transfer(near, far, &bytes, 20 * SEC).unwrap() == bytes);
            p.world.run(5 * SEC, |_| false);
            assert!(by_ipv6(&p.world), "seed {seed}, {kind:?}: it stays");
        }
    }
}

#[test]
fn ipv6_at_one_end_alone_is_no_path_and_is_said() {
    let mut p = with_ipv6(1, Kind::SymmetricRandom, Kind::SymmetricRandom, &[1]);
    connect(&mut p.world, 20 * SEC).unwrap();
    p.world.run(5 * SEC, |_| false);
    assert_eq!(via(&p.world, 1, "b").split(' ').next(), Some("relay"));
    let note = |host: usize| p.world.hosts[host].node.peer_views(p.world.now)[0].note.clone();
    let mapping = "ours: address-dependent mapping, theirs: address-dependent mapping";
    assert!(note(1).contains(mapping) && note(1).ends_with("; IPv6 only here"), "{}", note(1));
    assert!(note(2).ends_with("; IPv6 only there"), "{}", note(2));
}

#[test]
fn sequential_ports_that_could_not_be_foretold_are_said() {
    let mut p = Pair::new(1, Kind::Symmetric, Kind::SymmetricRandom);
    connect(&mut p.world, 20 * SEC).unwrap();
    p.world.run(5 * SEC, |_| false);
    let note = |host: usize| p.world.hosts[host].node.peer_views(p.world.now)[0].note.clone();
    let (one, other) = ("address-dependent mapping with sequential ports", "address-dependent mapping");
    assert!(note(1).contains(&format!("ours: {one}, theirs: {other}")), "{}", note(1));
    assert!(note(2).contains(&format!("ours: {other}, theirs: {one}")), "{}", note(2));
}

/// a has two uplinks; the second is slower by nothing, and only the preference tells them apart.
fn two_uplinks(seed: u64, a: Kind, b: Kind) -> (Pair, End, End) {
    let mut p = Pair::new(seed, a, b);
    let second = Nat::new("11.1.1.1".parse().unwrap(), a.behaviour().unwrap());
    add_uplink(&mut p.world, 1, "192.168.101.2:7843", second);
    tell(&mut p.world, 1);
    let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    (p, near, far)
}

/// The longest time without a byte, in steps of 50 ms, of a stream on which bytes go steadily while `then` happens.
fn pause(w: &mut World, from: End, to: End, rest: Duration, then: impl FnOnce(&mut World)) -> Duration {
    let (mut worst, mut last, mut then) = (Duration::ZERO, w.now, Some(then));
    let (when, end) = (w.now + SEC, w.now + SEC + rest);
    while w.now < end {
        if w.now >= when
            && let Some(then) = then.take()
        {
            then(w);
        }
        let _ = w.hosts[from.host].node.write(from.key, &[7; 500]);
        w.run(SEC / 20, |_| false);
        let mut buf = [0; 64 << 10];
        while let Progress::Bytes(_) = w.hosts[to.host].node.read(to.key, &mut buf) {
            worst = worst.max(w.now.saturating_duration_since(last));
            last = w.now;
        }
    }
    worst.max(w.now.saturating_duration_since(last))
}

fn local(world: &World) -> Option<String> {
    via(world, 1, "b").split(" from ").nth(1).map(Into::into)
}

fn until(world: &mut World, most: Duration, local_is: &str) -> Duration {
    let start: Instant = world.now;
    assert!(world.run(most, |w| local(w).as_deref() == Some(local_is)), "{}", via(world, 1, "b"));
    world.now - start
}

#[test]
fn of_two_uplinks_the_second_takes_over_at_once_and_the_first_has_it_back() {
    for seed in seeds(10) {
        let (mut p, near, far) = two_uplinks(seed, Kind::PortRestricted, Kind::PortRestricted);
        until(&mut p.world, 3 * SEC, "192.168.1.2");
        let first: IpAddr = "192.168.1.2".parse().unwrap();
        for (from, to) in [(near, far), (far, near)] {
            // With a carrier that tells, and without.
            for told in [true, false] {
                let gap = pause(&mut p.world, from, to, 10 * SEC, |w| {
                    w.down.insert(first);
                    if told {
                        tell(w, 1);
                    }
                });
                assert!(gap <= 3 * SEC, "seed {seed}: {gap:?}, told {told}");
                assert_eq!(local(&p.world).as_deref(), Some("192.168.101.2"), "seed {seed}, told {told}");
                let gap = pause(&mut p.world, from, to, 60 * SEC, |w| {
                    w.down.clear();
                    tell(w, 1);
                });
                assert!(gap <= SEC, "seed {seed}: {gap:?} on the way back");
                assert_eq!(local(&p.world).as_deref(), Some("192.168.1.2"), "seed {seed}, told {told}");
                assert_eq!(
                    via(&p.world, 2, "a").split(':').next(),
                    Some("direct 11.1.0.1"),
                    "seed {seed}, told {told}"
                );
            }
        }
    }
}

/// Half a megabyte is under way when the path falls silent: the next one's window is far smaller.
#[test]
fn what_was_lost_under_way_does_not_hold_back_the_next_path() {
    for seed in seeds(4) {
        for down in [false, true] {
            let (mut p, near, far) = two_uplinks(seed, Kind::PortRestricted, Kind::PortRestricted);
            p.world.delay = SEC / 1000;
            p.world.line = Some(Line::new(MBYTE * 60, SEC / 50, 1500));
            until(&mut p.world, 3 * SEC, "192.168.1.2");
            let (from, to) = if down { (far, near) } else { (near, far) };
            let (mut worst, mut last, mut got) = (Duration::ZERO, p.world.now, 0);
            let (chunk, mut buf) = (payload(64 << 10), vec![0; 64 << 10]);
            let mut pour = |w: &mut World| {
                while let Progress::Bytes(_) = w.hosts[from.host].node.write(from.key, &chunk) {}
                while let Progress::Bytes(n) = w.hosts[to.host].node.read(to.key, &mut buf) {
                    worst = worst.max(w.now.saturating_duration_since(last));
                    (last, got) = (w.now, got + n as u64);
                }
                false
            };
            p.world.run(SEC / 10, &mut pour);
            p.world.down.insert("192.168.1.2".parse().unwrap());
            p.world.delay = SEC / 50;
            p.world.run(SEC / 10, &mut pour);
            p.world.line = Some(Line::new(MBYTE * 2, SEC / 10, 1500));
            p.world.run(2 * SEC, &mut pour);
            let worst = worst.max(p.world.now.saturating_duration_since(last));
            // A second until the path is suspect; what is lost then is asked for again after half a second more.
            assert!(worst <= 7 * SEC / 4, "seed {seed}, down {down}: {worst:?}, {got} bytes");
        }
    }
}

#[test]
fn relays_are_reached_by_the_second_uplink_too_and_again_by_the_first() {
    for seed in seeds(10) {
        for told in [true, false] {
            let (mut p, near, far) = two_uplinks(seed, Kind::SymmetricRandom, Kind::SymmetricRandom);
            p.world.run(3 * SEC, |_| false);
            assert!(via(&p.world, 1, "b").starts_with("relay"), "seed {seed}");
            let first: IpAddr = "192.168.1.2".parse().unwrap();
            let gap = pause(&mut p.world, near, far, 10 * SEC, |w| {
                w.down.insert(first);
                if told {
                    tell(w, 1);
                }
            });
            // Nobody but a relay's silence says so where the carrier does not.
            assert!(gap <= if told { SEC } else { 3 * SEC }, "seed {seed}: {gap:?}, told {told}");
            let sees = |w: &World| w.hosts[1].node.relay_views()[0].note.clone();
            assert!(sees(&p.world).contains("11.1.1.1:"), "seed {seed}: {}", sees(&p.world));
            let gap = pause(&mut p.world, near, far, 60 * SEC, |w| {
                w.down.clear();
                if told {
                    tell(w, 1);
                }
            });
            assert!(gap <= SEC, "seed {seed}: {gap:?} on the way back");
            assert!(sees(&p.world).contains("11.1.0.1:"), "seed {seed}, told {told}: {}", sees(&p.world));
        }
    }
}
