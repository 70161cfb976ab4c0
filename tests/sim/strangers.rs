//! Who may make a node answer, work and remember: a relay under handshakes that never end, and garbage meanwhile.

use crate::{
    pair::{LATER, RELAY, SEC, spec},
    world::{Cluster, World},
};
use std::{
    cell::Cell,
    net::SocketAddr,
    time::{Duration, Instant},
};
use weft::tunnel::{
    RelaySpec,
    identity::{Certificate, KeyPair, Roles},
    node::Output,
};

const STRANGER: &str = "203.0.113.66:6666";
/// src/tunnel/noise.rs; the low byte is the psk's epoch.
const VERSION: u32 = 0x7765_6601;
const HALF_OPEN: usize = 50;

struct Siege {
    world: World,
    cluster: Cluster,
    relay: (KeyPair, Certificate),
    node: (KeyPair, Certificate),
    relays: Vec<RelaySpec>,
}

impl Siege {
    fn new(seed: u64) -> Self {
        let cluster = Cluster::new();
        let relay = cluster.identity("relay-1", Roles::RELAY, LATER);
        let node = cluster.identity("a", Roles::NONE, LATER);
        let relays = spec(&relay.1);
        let mut world = World::new(seed);
        world.add(RELAY, &cluster, &relay, Vec::new());
        world.record = true;
        Self { world, cluster, relay, node, relays }
    }

    /// The first Initial of a node that dials the relay, and then is never heard of again.
    fn initial(&mut self) -> Vec<u8> {
        let (mut node, _) = self.world.node(&self.cluster, &self.node, self.relays.clone());
        let mut buf = Vec::new();
        loop {
            match node.poll_output(self.world.now, &mut buf) {
                Output::Send { .. } => return buf,
                Output::Wait(Some(at)) => node.handle_tick(at),
                Output::Wait(None) => panic!("it does not dial"),
                Output::Event(_) | Output::Beacon => {}
            }
        }
    }

    fn dial_from(&mut self, source: &str) {
        let initial = self.initial();
        self.send(source, initial);
    }

    /// Half-open handshakes from as many addresses; the sources.
    fn half_open(&mut self, network: u8, count: usize) -> Vec<SocketAddr> {
        let sources: Vec<String> = (0..count).map(|i| format!("12.{network}.{i}.1:7843")).collect();
        sources.iter().for_each(|source| self.dial_from(source));
        sources.iter().map(|s| s.parse().unwrap()).collect()
    }

    fn send(&mut self, source: &str, bytes: Vec<u8>) {
        self.world.inject(source.parse().unwrap(), RELAY.parse().unwrap(), bytes);
        self.world.run(SEC / 20, |_| false);
    }

    /// What the relay has sent there.
    fn answers(&self, to: SocketAddr) -> Vec<&[u8]> {
        let mine = self.world.recorded.iter().filter(|(_, t, _)| *t == to);
        mine.map(|(_, _, bytes)| &bytes[..]).collect()
    }

    fn count(&self, counter: impl Fn(&weft::metrics::TunnelCounters) -> &Cell<u64>) -> u64 {
        counter(&self.world.hosts[0].count).get()
    }

    fn random(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.world.rng.fill(&mut out);
        out
    }

    /// A long header in front of random bytes, 1,200 in all.
    fn long(&mut self, version: u32, dcid: &[u8], kind: u8, token: &[u8]) -> Vec<u8> {
        let mut out = vec![0xc0 | kind << 4];
        out.extend_from_slice(&version.to_be_bytes());
        out.push(dcid.len() as u8);
        out.extend_from_slice(dcid);
        out.extend_from_slice(&[4, 1, 2, 3, 4]);
        if kind == 0 {
            out.push(token.len() as u8);
            out.extend_from_slice(token);
            let rest = 1200 - out.len() - 2;
            out.extend_from_slice(&(0x4000 | rest as u16).to_be_bytes());
        }
        let rest = self.random(1200 - out.len());
        out.extend_from_slice(&rest);
        out
    }

    /// Nothing of this is answered.
    fn garbage(&mut self, cids: &[Vec<u8>]) {
        let key = self.relay.1.key;
        let digest = ring::digest::digest(&ring::digest::SHA256, &[b"weft dcid".as_slice(), &key].concat());
        let hint: Vec<u8> = [&digest.as_ref()[..4], &[0; 8]].concat();
        let mut all = Vec::new();
        for version in [1, 0x1a2a_3a4a, 0, VERSION + 8, 0x7765_6700] {
            all.push(self.long(version, &hint, 0, b""));
        }
        for dcid in [&hint[..0], &hint[..4], &hint[..7], &[7; 20], &[7; 21], &hint] {
            all.push(self.long(VERSION, dcid, 0, b""));
        }
        for cid in cids {
            for kind in 0..4 {
                all.push(self.long(VERSION, cid, kind, b""));
                all.push(self.long(VERSION, cid, kind, &[5; 40]));
            }
        }
        for first in 0..=u8::MAX {
            let mut bytes = self.random(1 + usize::from(first) / 8);
            bytes[0] = first;
            all.push(bytes);
        }
        // Of another cluster: it knows our key and not the psk, or has the psk of before the last one.
        for psks in [vec![(1, [8; 32])], vec![(0, [9; 32])]] {
            let ours = std::mem::replace(&mut self.cluster.psks, psks);
            all.push(self.initial());
            self.cluster.psks = ours;
        }
        for bytes in all {
            self.send(STRANGER, bytes);
        }
        let answers = self.answers(STRANGER.parse().unwrap());
        assert!(answers.is_empty(), "{} answers, the first {:02x?}", answers.len(), &answers[0][..30]);
    }
}

/// The sender's connection ID in a long header.
fn scid(long: &[u8]) -> Vec<u8> {
    let at = 6 + usize::from(long[5]);
    long[at + 1..at + 1 + usize::from(long[at])].to_vec()
}

#[test]
fn a_stranger_gets_no_byte_whatever_is_half_open() {
    let mut s = Siege::new(1);
    s.garbage(&[]);
    // IDs of handshakes under way, and of a Retry.
    let sources = s.half_open(1, HALF_OPEN);
    s.dial_from("12.2.0.1:7843");
    assert_eq!(s.count(|c| &c.retries_sent), 1);
    let retried = s.answers("12.2.0.1:7843".parse().unwrap());
    assert_eq!((retried.len(), retried[0][0] >> 4 & 3), (1, 3), "one Retry");
    assert!(retried[0].len() * 3 <= 1200);
    let mut cids = vec![scid(retried[0])];
    cids.extend(sources.iter().take(3).map(|source| scid(s.answers(*source)[0])));
    s.garbage(&cids);
    // Their slots belong to others now.
    s.world.run(30 * SEC, |_| false);
    s.half_open(3, HALF_OPEN);
    s.garbage(&cids);
}

#[test]
fn a_node_gets_in_behind_fifty_handshakes_that_never_end() {
    for seed in 0..5 {
        let mut s = Siege::new(seed);
        s.half_open(1, HALF_OPEN);
        // All get a Retry while the same slot is free, and one after the other takes one.
        let nodes: Vec<usize> = (1..=3)
            .map(|i| {
                let identity = s.cluster.identity(&format!("node-{i}"), Roles::NONE, LATER);
                s.world.add(&format!("11.{i}.0.1:7843"), &s.cluster, &identity, s.relays.clone())
            })
            .collect();
        let registered = |w: &mut World| nodes.iter().all(|n| w.hosts[*n].node.relay_views()[0].registered);
        assert!(s.world.run(SEC, registered), "seed {seed}");
        assert!(s.count(|c| &c.retries_sent) >= 3, "seed {seed}");
    }
}

#[test]
fn one_address_cannot_take_all_handshakes() {
    let mut s = Siege::new(1);
    for port in 1..=40 {
        s.dial_from(&format!("12.1.1.1:{port}"));
    }
    assert_eq!(s.count(|c| &c.retries_sent), 40 - 8);
    s.dial_from("12.1.1.2:1");
    assert_eq!(s.count(|c| &c.retries_sent), 40 - 8, "another address is another's");
}

#[test]
fn public_key_work_beyond_its_budget_is_put_off() {
    let mut s = Siege::new(1);
    let took = |s: &mut Siege, time: Duration| {
        let end = s.world.now + time;
        s.world.hosts[0].node.account(|| end);
    };
    s.dial_from("12.1.1.1:1");
    took(&mut s, Duration::from_millis(400));
    s.dial_from("12.1.2.1:1");
    assert_eq!(s.count(|c| &c.retries_sent), 1, "a tenth of the time, and the last one took long");
    s.world.run(5 * SEC, |_| false);
    s.dial_from("12.1.3.1:1");
    assert_eq!(s.count(|c| &c.retries_sent), 1);
    // A node that the Retry sends back is let in as soon as there is time again.
    took(&mut s, Duration::from_millis(200));
    let node = s.world.add("11.1.0.1:7843", &s.cluster, &s.node, s.relays.clone());
    let start: Instant = s.world.now;
    let registered = |w: &mut World| w.hosts[node].node.relay_views()[0].registered;
    assert!(s.world.run(10 * SEC, registered));
    assert!(s.world.now >= start + SEC && s.count(|c| &c.budget_exceeded) > 0, "{:?}", s.world.now - start);
}
