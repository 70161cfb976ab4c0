//! A node that restarts with what it knew of its peers.

use crate::{
    nat::Kind,
    pair::{LATER, Pair, SEC, connect, payload, seeds},
    world::{Cluster, World},
};
use std::{net::SocketAddr, time::Duration};
use weft::tunnel::{
    Link, Remembered,
    identity::{Certificate, KeyPair, Roles},
};

fn path(world: &World) -> &'static str {
    world.hosts[1].node.peer_views(world.now).into_iter().find(|v| v.name == "b").map_or("none", |v| v.path)
}

fn place(world: &mut World, host: usize, address: SocketAddr) {
    world.hosts[host].address = address;
    let link = Link { address: address.ip(), prefix: 24 };
    let now = world.now;
    world.hosts[host].node.set_links(now, vec![link], address.port());
}

/// Host 1 after a restart: what it knew before.
fn restart(
    world: &mut World,
    cluster: &Cluster,
    a: &(KeyPair, Certificate),
    relays: Vec<weft::tunnel::RelaySpec>,
) -> Vec<Remembered> {
    let known = world.hosts[1].node.remembered();
    let (node, count) = world.node(cluster, a, relays);
    (world.hosts[1].node, world.hosts[1].count) = (node, count);
    let address = world.hosts[1].address;
    place(world, 1, address);
    known
}

/// Two nodes with a direct path, then the first one restarted.
fn restarted(seed: u64, kind: Kind) -> (Pair, Vec<Remembered>) {
    let mut p = Pair::new(seed, kind, kind);
    connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    assert!(p.world.run(5 * SEC, |w| path(w) == "direct"), "seed {seed}: not direct");
    let known = restart(&mut p.world, &p.cluster, &p.a, p.relays.clone());
    assert_eq!(known.iter().map(|k| k.certificate.name.as_str()).collect::<Vec<_>>(), ["b"]);
    (p, known)
}

#[test]
fn a_peer_is_reached_while_all_relays_are_away_and_only_because_it_was_known() {
    for seed in seeds(10) {
        for knows in [true, false] {
            let (mut p, known) = restarted(seed, Kind::Public);
            p.world.hosts[0].cut = true;
            p.world.hosts[3].cut = true;
            if knows {
                p.world.hosts[1].node.remember(known.clone());
                assert_eq!(p.world.hosts[1].node.remembered(), known, "not forgotten before it is used");
            }
            let start = p.world.now;
            assert_eq!(connect(&mut p.world, 10 * SEC).is_ok(), knows, "seed {seed}");
            if knows {
                assert!(p.world.now - start < SEC / 2, "seed {seed}: {:?}", p.world.now - start);
                assert_eq!(path(&p.world), "direct");
                assert_eq!(p.world.hosts[1].node.remembered(), known);
            }
        }
    }
}

#[test]
fn a_connection_that_was_made_without_a_relay_falls_back_on_one_that_came_later() {
    for seed in seeds(10) {
        let (mut p, known) = restarted(seed, Kind::Public);
        p.world.hosts[0].cut = true;
        p.world.hosts[3].cut = true;
        p.world.hosts[1].node.remember(known);
        let (node, count) = p.world.node(&p.cluster, &p.b, p.relays.clone());
        (p.world.hosts[2].node, p.world.hosts[2].count) = (node, count);
        let address = p.world.hosts[2].address;
        place(&mut p.world, 2, address);
        let (near, far) = connect(&mut p.world, 10 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        // So long that the relays have forgotten both, too.
        p.world.run(120 * SEC, |_| false);
        (p.world.hosts[0].cut, p.world.hosts[3].cut) = (false, false);
        let registered = |w: &World, host: usize| w.hosts[host].node.relay_views().iter().all(|r| r.registered);
        assert!(p.world.run(200 * SEC, |w| registered(w, 1) && registered(w, 2)), "seed {seed}");
        p.world.run(6 * SEC, |_| false);
        p.world.blocked.push((1, 2));
        let start = p.world.now;
        let bytes = payload(20_000);
        let got = p.world.transfer(near, far, &bytes, 20 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(got == bytes && p.world.now - start < 5 * SEC, "seed {seed}: {:?}", p.world.now - start);
    }
}

#[test]
fn an_address_that_does_not_hold_any_more_costs_nothing_where_a_relay_answers() {
    for seed in seeds(20) {
        let (mut p, known) = restarted(seed, Kind::PortRestricted);
        p.world.blocked.push((1, 2));
        p.world.hosts[1].node.remember(known);
        let start = p.world.now;
        connect(&mut p.world, 10 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let took = p.world.now - start;
        assert!(took < SEC / 2, "seed {seed}: {took:?}");
        assert_eq!(path(&p.world), "relay");
    }
}

#[test]
fn a_neighbour_that_has_moved_is_found_by_its_beacon_at_once() {
    for seed in seeds(10) {
        let cluster = Cluster::new();
        let mut world = World::new(seed);
        let (a, b) = (cluster.identity("a", Roles::NONE, LATER), cluster.identity("b", Roles::NONE, LATER));
        let other = cluster.identity("c", Roles::NONE, LATER);
        world.add("11.0.0.9:7843", &cluster, &other, Vec::new());
        world.add_site(1, Kind::PortRestricted, &cluster, &a, Vec::new());
        world.add_neighbour(1, 3, &cluster, &b, Vec::new());
        connect(&mut world, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let known = restart(&mut world, &cluster, &a, Vec::new());
        assert_eq!(known.len(), 1);
        world.hosts[1].node.remember(known);
        place(&mut world, 2, "192.168.1.77:7843".parse().unwrap());
        let start = world.now;
        connect(&mut world, 10 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(world.now - start < SEC, "seed {seed}: {:?}", world.now - start);
    }
}

#[test]
fn what_another_ca_signed_or_has_expired_is_not_used() {
    let stranger = Cluster::new();
    for (certificate, kept) in [
        (stranger.identity("b", Roles::NONE, LATER).1, 1),
        (Cluster::new().identity("b", Roles::NONE, crate::world::NOW - 1).1, 0),
    ] {
        let (mut p, _) = restarted(3, Kind::Public);
        let address = p.world.hosts[2].address;
        p.world.hosts[1].node.remember(vec![Remembered { certificate, address }]);
        assert_eq!(p.world.hosts[1].node.remembered().len(), kept);
        let start = p.world.now;
        connect(&mut p.world, 10 * SEC).unwrap();
        assert!(p.world.now - start < SEC + Duration::from_millis(500), "{:?}", p.world.now - start);
        assert_eq!(p.world.hosts[1].count.bad_certificate.get(), 1);
        assert_eq!(p.world.hosts[1].node.remembered()[0].certificate, p.b.1, "the right one by now");
    }
}

#[test]
fn a_thousand_are_remembered_and_no_more() {
    let mut world = World::new(1);
    let cluster = Cluster::new();
    let host = world.add("11.0.0.9:7843", &cluster, &cluster.identity("a", Roles::NONE, LATER), Vec::new());
    let address = "11.0.0.1:1".parse().unwrap();
    let one = |n| Remembered { certificate: cluster.identity(&format!("b-{n}"), Roles::NONE, LATER).1, address };
    world.hosts[host].node.remember((0..1_010).map(one).collect());
    assert_eq!(world.hosts[host].node.remembered().len(), 1_000);
}
