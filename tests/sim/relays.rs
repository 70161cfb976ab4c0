//! Several relays: which are used, what happens when they go, return, and change.

use crate::{
    nat::Kind,
    pair::{LATER, SEC, payload, seeds},
    world::{Cluster, End, World},
};
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};
use weft::tunnel::{
    Progress, RelaySpec,
    identity::{Certificate, KeyPair, Roles},
};

type Identity = (KeyPair, Certificate);

/// Hosts 0, 1, …: relays; then the nodes.
struct Field {
    world: World,
    cluster: Cluster,
    relays: Vec<Identity>,
    nodes: Vec<Identity>,
}

fn address(relay: usize) -> String {
    format!("11.0.0.{}:7843", relay + 1)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Field {
    fn new(seed: u64, relays: usize) -> Self {
        let (mut world, cluster) = (World::new(seed), Cluster::new());
        let relays: Vec<Identity> =
            (0..relays).map(|r| cluster.identity(&format!("relay-{}", r + 1), Roles::RELAY, LATER)).collect();
        for (r, identity) in relays.iter().enumerate() {
            world.add(&address(r), &cluster, identity, Vec::new());
        }
        Self { world, cluster, relays, nodes: Vec::new() }
    }

    fn specs(&self, list: &[usize]) -> Vec<RelaySpec> {
        let spec = |r: &usize| {
            let (host, port) = (format!("11.0.0.{}", r + 1), 7843);
            RelaySpec { certificate: self.relays[*r].1.clone(), host, port }
        };
        list.iter().map(spec).collect()
    }

    /// A node at site `n` (its public address is 11.n.0.1) that knows these relays.
    fn node(&mut self, n: u8, kind: Kind, list: &[usize]) -> usize {
        let identity = self.cluster.identity(&format!("node-{n}"), Roles::NONE, LATER);
        let specs = self.specs(list);
        let host = self.world.add_site(n, kind, &self.cluster, &identity, specs);
        self.nodes.push(identity);
        host
    }

    fn start_relay(&mut self, relay: usize, list: &[usize]) {
        let specs = self.specs(list);
        let (node, count) = self.world.node(&self.cluster, &self.relays[relay], specs);
        let host = &mut self.world.hosts[relay];
        (host.node, host.count, host.cut) = (node, count, false);
    }

    fn is_registered(&self, host: usize, relay: &str) -> bool {
        self.world.hosts[host].node.relay_views().iter().any(|v| v.name == relay && v.registered)
    }

    /// The names of the first relay and of the one that stands by.
    fn homes(&self, host: usize) -> [String; 2] {
        let views = self.world.hosts[host].node.relay_views();
        let of = |what: &str| views.iter().find(|v| v.note.contains(what)).map(|v| v.name.clone()).unwrap_or_default();
        [of("the first choice"), of("standing by")]
    }

    fn settle(&mut self, hosts: std::ops::Range<usize>, relays: usize) {
        let all = |w: &mut World| {
            hosts.clone().all(|h| w.hosts[h].node.relay_views().iter().filter(|v| v.registered).count() >= relays)
        };
        assert!(self.world.run(30 * SEC, all), "not registered");
    }

    fn connect(&mut self, from: usize, to: usize, most: Duration) -> Result<(End, End), String> {
        let name = self.nodes[to - self.relays.len()].1.name.clone();
        let near = self.world.open(from, &name);
        let mut far = None;
        self.world.run(most, |w| {
            if let Some((key, ..)) = w.hosts[to].incoming.pop_front() {
                w.hosts[to].node.answer(key, &Ok(()));
                far = Some(End { host: to, key });
            }
            w.answer_of(near).is_some()
        });
        match (self.world.answer_of(near), far) {
            (Some(Ok(())), Some(far)) => Ok((near, far)),
            other => Err(format!("{other:?}")),
        }
    }

    fn path(&self, host: usize, peer: usize) -> (&'static str, String) {
        let name = &self.nodes[peer - self.relays.len()].1.name;
        let views = self.world.hosts[host].node.peer_views(self.world.now);
        views.into_iter().find(|v| v.name == *name).map_or(("none", String::new()), |v| (v.path, v.via))
    }

    /// The relay by which this host sends to the peer.
    fn carrier(&self, host: usize, peer: usize) -> usize {
        let (path, via) = self.path(host, peer);
        assert_eq!(path, "relay");
        via.strip_prefix("relay relay-").unwrap().parse::<usize>().unwrap() - 1
    }
}

fn byte(at: usize) -> u8 {
    (at * 7 + at / 251) as u8
}

/// A slow stream of bytes, and the longest time in which none arrived.
struct Trickle {
    from: End,
    to: End,
    sent: usize,
    got: usize,
    gap: Duration,
    next: Instant,
    last: Instant,
    worst: Duration,
}

impl Trickle {
    fn new(world: &World, from: End, to: End) -> Self {
        let (next, last) = (world.now, world.now);
        Self { from, to, sent: 0, got: 0, gap: Duration::from_millis(50), next, last, worst: Duration::ZERO }
    }

    /// 100 bytes each `gap`; panics where the stream breaks.
    fn step(&mut self, world: &mut World) {
        if world.now >= self.next {
            self.next = world.now + self.gap;
            let bytes: Vec<u8> = (self.sent..self.sent + 100).map(byte).collect();
            match world.hosts[self.from.host].node.write(self.from.key, &bytes) {
                Progress::Bytes(n) => self.sent += n,
                Progress::Pending => {}
                other => panic!("write: {other:?}"),
            }
        }
        let mut buf = [0; 4096];
        loop {
            match world.hosts[self.to.host].node.read(self.to.key, &mut buf) {
                Progress::Bytes(n) => {
                    assert!(buf[..n].iter().zip(self.got..).all(|(b, i)| *b == byte(i)), "other bytes");
                    self.got += n;
                    self.worst = self.worst.max(world.now - self.last);
                    self.last = world.now;
                }
                Progress::Pending => break,
                other => panic!("read: {other:?}"),
            }
        }
    }

    /// The longest pause, that of now included.
    fn pause(&self, now: Instant) -> Duration {
        self.worst.max(now - self.last)
    }
}

/// Runs all of them in steps of 10 ms.
fn trickle(world: &mut World, all: &mut [Trickle], most: Duration) {
    let until = world.now + most;
    while world.now < until {
        world.run(Duration::from_millis(10), |_| false);
        all.iter_mut().for_each(|t| t.step(world));
    }
}

fn both_ways(world: &World, (near, far): (End, End)) -> [Trickle; 2] {
    [Trickle::new(world, near, far), Trickle::new(world, far, near)]
}

#[test]
fn a_killed_relay_costs_less_than_three_seconds_and_no_stream() {
    let mut pauses = Vec::new();
    for seed in seeds(30) {
        let mut f = Field::new(seed, 2);
        f.world.loss = if seed % 3 == 0 { 0.05 } else { 0.0 };
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0, 1]), f.node(2, Kind::SymmetricRandom, &[0, 1]));
        f.settle(2..4, 2);
        let ends = f.connect(a, b, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut all = both_ways(&f.world, ends);
        trickle(&mut f.world, &mut all, 2 * SEC + Duration::from_millis(37 * seed));
        let dead = f.carrier(a, b);
        f.world.hosts[dead].cut = true;
        all.iter_mut().for_each(|t| t.worst = Duration::ZERO);
        trickle(&mut f.world, &mut all, 20 * SEC);
        let pause = all.iter().map(|t| t.pause(f.world.now)).max().unwrap();
        assert!(pause <= 3 * SEC, "seed {seed}: {pause:?}");
        assert_ne!(f.carrier(a, b), dead, "seed {seed}");
        pauses.push(pause);
    }
    pauses.sort_unstable();
    eprintln!("a relay killed: median {:?}, most {:?}", pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
}

#[test]
fn all_relays_killed_and_started_cost_ten_seconds_at_most_and_no_stream() {
    for seed in seeds(15) {
        let mut f = Field::new(seed, 2);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0, 1]), f.node(2, Kind::SymmetricRandom, &[0, 1]));
        f.settle(2..4, 2);
        let ends = f.connect(a, b, 5 * SEC).unwrap();
        let mut all = both_ways(&f.world, ends);
        trickle(&mut f.world, &mut all, 2 * SEC);
        (0..2).for_each(|r| f.world.hosts[r].cut = true);
        trickle(&mut f.world, &mut all, SEC * (1 + seed as u32 * 2));
        (0..2).for_each(|r| f.start_relay(r, &[]));
        let start = f.world.now;
        let before: Vec<usize> = all.iter().map(|t| t.got).collect();
        let until = start + 20 * SEC;
        while f.world.now < until && all.iter().zip(&before).any(|(t, n)| t.got <= *n + 1000) {
            trickle(&mut f.world, &mut all, SEC / 10);
        }
        assert!(f.world.now <= start + 10 * SEC, "seed {seed}: {:?}", f.world.now - start);
        all.iter().for_each(|t| assert!(t.pause(f.world.now) > SEC));
    }
}

#[test]
fn a_planned_restart_costs_nothing() {
    for seed in seeds(15) {
        let mut f = Field::new(seed, 2);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0, 1]), f.node(2, Kind::SymmetricRandom, &[0, 1]));
        f.settle(2..4, 2);
        let ends = f.connect(a, b, 5 * SEC).unwrap();
        let mut all = both_ways(&f.world, ends);
        trickle(&mut f.world, &mut all, 2 * SEC);
        let leaving = f.carrier(a, b);
        let now = f.world.now;
        f.world.hosts[leaving].node.shutdown(now);
        all.iter_mut().for_each(|t| t.worst = Duration::ZERO);
        // It goes on for a moment, as the driver does.
        trickle(&mut f.world, &mut all, SEC * 2 / 5);
        f.world.hosts[leaving].cut = true;
        trickle(&mut f.world, &mut all, SEC);
        f.start_relay(leaving, &[]);
        trickle(&mut f.world, &mut all, 30 * SEC);
        let pause = all.iter().map(|t| t.pause(f.world.now)).max().unwrap();
        assert!(pause <= SEC / 4, "seed {seed}: {pause:?}");
        let back = format!("relay-{}", leaving + 1);
        assert!(f.is_registered(a, &back) && f.is_registered(b, &back), "seed {seed}: not back");
    }
}

/// Site 1 is near to relays 1 and 2, site 2 to relays 3 and 4.
fn far_apart(f: &mut Field) {
    let pairs = [("11.1.0.1", [2, 3]), ("11.2.0.1", [0, 1])];
    for (site, relays) in pairs {
        for r in relays {
            f.world.far.push((ip(site), ip(&format!("11.0.0.{}", r + 1)), Duration::from_millis(40)));
        }
    }
}

#[test]
fn homed_on_one_and_two_a_node_reaches_one_on_three_and_four() {
    for seed in seeds(10) {
        for (kind, wanted) in [(Kind::SymmetricRandom, "relay"), (Kind::PortRestricted, "direct")] {
            let mut f = Field::new(seed, 4);
            far_apart(&mut f);
            let list: Vec<usize> = (0..4).map(|r| (r + seed as usize) % 4).collect();
            let (a, b) = (f.node(1, kind, &list), f.node(2, kind, &list));
            f.settle(4..6, 4);
            f.world.run(20 * SEC, |_| false);
            let of = |homes: [String; 2]| {
                let mut homes = homes.map(|h| h.replace("relay-", ""));
                homes.sort();
                homes.concat()
            };
            assert_eq!((of(f.homes(a)), of(f.homes(b))), ("12".into(), "34".into()), "seed {seed}");
            // Long enough for the mappings to the relays that only hold entries to have gone.
            f.world.run(100 * SEC, |_| false);
            let start = f.world.now;
            let (near, far) = f.connect(a, b, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(f.world.now - start <= 2 * SEC, "seed {seed}: {:?}", f.world.now - start);
            f.world.run(3 * SEC, |_| false);
            assert_eq!((f.path(a, b).0, f.path(b, a).0), (wanted, wanted), "seed {seed}");
            for (from, to) in [(near, far), (far, near)] {
                let bytes = payload(50_000);
                let got = f.world.transfer(from, to, &bytes, 30 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                assert!(got == bytes, "seed {seed}");
            }
        }
    }
}

#[test]
fn a_relay_that_is_not_of_our_list_is_learnt_from_an_entry_and_used() {
    for seed in seeds(10) {
        let mut f = Field::new(seed, 4);
        far_apart(&mut f);
        // All that both know is relay 1, which is far from the other.
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0, 1]), f.node(2, Kind::SymmetricRandom, &[2, 3, 0]));
        f.settle(4..6, 2);
        f.world.run(20 * SEC, |_| false);
        assert!(!f.homes(b).contains(&"relay-1".to_owned()), "seed {seed}: {:?}", f.homes(b));
        let (near, far) = f.connect(a, b, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(f.carrier(a, b) >= 2 && f.carrier(b, a) >= 2, "seed {seed}");
        let got = f.world.transfer(near, far, &payload(50_000), 30 * SEC).unwrap();
        assert!(got == payload(50_000));
        // And back, to whom has no entry at any of ours: it is registered at one of them.
        f.connect(b, a, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

#[test]
fn a_relay_with_a_new_key_is_used_without_a_new_bundle() {
    for seed in seeds(10) {
        let mut f = Field::new(seed, 2);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0, 1]), f.node(2, Kind::SymmetricRandom, &[0, 1]));
        f.settle(2..4, 2);
        let ends = f.connect(a, b, 5 * SEC).unwrap();
        let mut all = both_ways(&f.world, ends);
        trickle(&mut f.world, &mut all, SEC);
        f.relays[1] = f.cluster.identity("relay-2", Roles::RELAY, LATER);
        f.start_relay(1, &[0]); // its bundle names the other
        let there = |w: &World| w.hosts[1].node.relay_load().unwrap().nodes;
        let start = f.world.now;
        while there(&f.world) < 2 && f.world.now < start + 60 * SEC {
            trickle(&mut f.world, &mut all, SEC / 4);
        }
        assert!(f.world.now < start + 30 * SEC, "seed {seed}: {:?}", f.world.now - start);
        f.world.hosts[0].cut = true;
        trickle(&mut f.world, &mut all, 10 * SEC);
        assert_eq!((f.carrier(a, b), f.carrier(b, a)), (1, 1), "seed {seed}");
        assert!(all.iter().all(|t| t.pause(f.world.now) < 5 * SEC), "seed {seed}");
    }
}

#[test]
fn a_relay_of_the_same_name_without_the_role_or_of_another_ca_is_not_believed() {
    for (seed, stranger) in [(1, true), (2, false)] {
        let mut f = Field::new(seed, 2);
        f.node(1, Kind::Public, &[0, 1]);
        f.settle(2..3, 2);
        let other = Cluster::new();
        let (cluster, roles) = if stranger { (&other, Roles::RELAY) } else { (&f.cluster, Roles::NONE) };
        f.relays[1] = cluster.identity("relay-2", roles, LATER);
        f.start_relay(1, &[0]);
        f.world.run(60 * SEC, |_| false);
        assert!(!f.is_registered(2, "relay-2") && f.is_registered(2, "relay-1"), "{stranger}");
    }
}

/// How many of these have the relay as their first one.
fn firsts(f: &Field, hosts: std::ops::Range<usize>, relay: &str) -> usize {
    hosts.filter(|h| f.homes(*h)[0] == relay).count()
}

#[test]
fn fifty_nodes_share_two_relays_again_after_one_was_away() {
    for seed in seeds(1) {
        let mut f = Field::new(seed, 2);
        for n in 0..50 {
            f.node(n + 1, Kind::SymmetricRandom, &[0, 1]);
        }
        f.settle(2..52, 2);
        let mut all = Vec::new();
        for pair in 0..25 {
            let ends = f.connect(2 + pair * 2, 3 + pair * 2, 5 * SEC).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            all.extend(both_ways(&f.world, ends));
        }
        all.iter_mut().for_each(|t| t.gap = Duration::from_millis(250));
        f.world.hosts[1].cut = true;
        // For some it carries nothing: they find out with their next PING.
        trickle(&mut f.world, &mut all, 30 * SEC);
        assert_eq!(firsts(&f, 2..52, "relay-1"), 50, "seed {seed}");
        f.start_relay(1, &[]);
        all.iter_mut().for_each(|t| t.worst = Duration::ZERO);
        // It is found within its next question, and moved to by jitter.
        let start = f.world.now;
        trickle(&mut f.world, &mut all, 5 * SEC);
        let soon = firsts(&f, 2..52, "relay-2");
        assert!(soon <= 15, "seed {seed}: {soon} moved at once");
        trickle(&mut f.world, &mut all, 40 * SEC);
        let (one, two) = (firsts(&f, 2..52, "relay-1"), firsts(&f, 2..52, "relay-2"));
        assert!(one + two == 50 && one.max(two) * 10 <= one.min(two) * 12, "seed {seed}: {one} and {two}");
        let pause = all.iter().map(|t| t.pause(f.world.now)).max().unwrap();
        assert!(pause <= SEC, "seed {seed}: a pause of {pause:?} in the {:?} after", f.world.now - start);
    }
}

#[test]
fn a_flow_leads_to_a_peer_that_has_registered_anew() {
    for seed in seeds(20) {
        let mut f = Field::new(seed, 1);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0]), f.node(2, Kind::SymmetricRandom, &[0]));
        f.settle(1..3, 1);
        f.connect(a, b, 5 * SEC).unwrap();
        f.world.run(SEC * (seed as u32 % 5), |_| false);
        let specs = f.specs(&[0]);
        let (node, count) = f.world.node(&f.cluster, &f.nodes[1], specs);
        (f.world.hosts[b].node, f.world.hosts[b].count) = (node, count);
        let start = f.world.now;
        // The first try may only show that the connection is of before.
        while f.connect(a, b, 5 * SEC).is_err() {
            assert!(f.world.now < start + 2 * SEC, "seed {seed}");
        }
        assert!(f.world.now < start + 2 * SEC, "seed {seed}: {:?}", f.world.now - start);
    }
}

#[test]
fn a_peer_that_registers_a_moment_later_is_waited_for() {
    for seed in seeds(10) {
        let mut f = Field::new(seed, 2);
        let a = f.node(1, Kind::SymmetricRandom, &[0, 1]);
        f.settle(2..3, 2);
        let near = f.world.open(a, "node-2");
        f.world.run(SEC * 3 / 2, |_| false);
        let b = f.node(2, Kind::SymmetricRandom, &[0, 1]);
        let done = f.world.run(3 * SEC, |w| {
            while let Some((key, ..)) = w.hosts[b].incoming.pop_front() {
                w.hosts[b].node.answer(key, &Ok(()));
            }
            w.answer_of(near).is_some()
        });
        assert!(done && f.world.answer_of(near) == Some(Ok(())), "seed {seed}: {:?}", f.world.answer_of(near));
    }
}

#[test]
fn idle_peers_find_a_restarted_relay_again_when_they_are_used() {
    for seed in seeds(10) {
        let mut f = Field::new(seed, 1);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0]), f.node(2, Kind::SymmetricRandom, &[0]));
        f.settle(1..3, 1);
        let ends = f.connect(a, b, 5 * SEC).unwrap();
        f.world.run(40 * SEC + SEC * seed as u32, |_| false);
        f.start_relay(0, &[]);
        let mut all = both_ways(&f.world, ends);
        trickle(&mut f.world, &mut all, 15 * SEC);
        let pause = all.iter().map(|t| t.pause(f.world.now)).max().unwrap();
        assert!(pause <= 7 * SEC, "seed {seed}: {pause:?}");
    }
}

#[test]
fn whoever_is_cut_off_from_its_relays_is_told_within_seven_seconds() {
    for seed in seeds(5) {
        let mut f = Field::new(seed, 1);
        let (a, b) = (f.node(1, Kind::SymmetricRandom, &[0]), f.node(2, Kind::SymmetricRandom, &[0]));
        f.settle(1..3, 1);
        f.connect(a, b, 5 * SEC).unwrap();
        f.world.hosts[0].cut = true;
        let (start, near) = (f.world.now, f.world.open(a, "node-2"));
        f.world.run(20 * SEC, |w| w.answer_of(near).is_some());
        assert!(matches!(f.world.answer_of(near), Some(Err(_))), "seed {seed}");
        assert!(f.world.now - start <= 7 * SEC, "seed {seed}: {:?}", f.world.now - start);
    }
}
