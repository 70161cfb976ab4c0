//! Two nodes and their relays.

use crate::{
    nat::Kind,
    world::{Cluster, End, NOW, World},
};
use std::time::Duration;
use weft::tunnel::{
    RelaySpec,
    identity::{Certificate, KeyPair, Roles},
};

pub const RELAY: &str = "11.0.0.1:7843";
pub const SEC: Duration = Duration::from_secs(1);
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// More with WEFT_SEEDS, others with WEFT_FIRST; one alone with WEFT_SEED.
pub fn seeds(few: u64) -> std::ops::Range<u64> {
    crate::log_to_stderr();
    match number("WEFT_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("WEFT_FIRST").unwrap_or(0);
            first..first + number("WEFT_SEEDS").unwrap_or(few)
        }
    }
}
pub const LATER: u64 = NOW + 1_000_000;

pub struct Pair {
    pub world: World,
    pub cluster: Cluster,
    pub relay: (KeyPair, Certificate),
    pub a: (KeyPair, Certificate),
    pub b: (KeyPair, Certificate),
    pub relays: Vec<RelaySpec>,
}

pub fn spec(certificate: &Certificate) -> Vec<RelaySpec> {
    let (host, port) = RELAY.split_once(':').unwrap();
    vec![RelaySpec { certificate: certificate.clone(), host: host.into(), port: port.parse().unwrap() }]
}

impl Pair {
    /// Hosts 0: relay, 1: a, 2: b, 3: a second relay, by which a NAT's mapping is told.
    pub fn new(seed: u64, a_kind: Kind, b_kind: Kind) -> Self {
        let cluster = Cluster::seeded(seed);
        let relay = cluster.identity("relay-1", Roles::RELAY, LATER);
        let second = cluster.identity("relay-2", Roles::RELAY, LATER);
        let (a, b) = (cluster.identity("a", Roles::NONE, LATER), cluster.identity("b", Roles::NONE, LATER));
        let mut world = World::new(seed);
        let mut relays = spec(&relay.1);
        world.add(RELAY, &cluster, &relay, Vec::new());
        let mut other = spec(&second.1);
        other[0].host = "11.0.0.2".into();
        relays.append(&mut other);
        world.add_site(1, a_kind, &cluster, &a, relays.clone());
        world.add_site(2, b_kind, &cluster, &b, relays.clone());
        world.add("11.0.0.2:7843", &cluster, &second, Vec::new());
        Self { world, cluster, relay, a, b, relays }
    }
}

/// Opens a stream from a to b and has b accept it.
pub fn connect(world: &mut World, most: Duration) -> Result<(End, End), String> {
    let near = world.open(1, "b");
    let mut far = None;
    world.run(most, |w| {
        if let Some((key, peer, _)) = w.hosts[2].incoming.pop_front() {
            assert_eq!(peer, "a");
            w.hosts[2].node.answer(key, &Ok(()));
            far = Some(End { host: 2, key });
        }
        w.answer_of(near).is_some()
    });
    match (world.answer_of(near), far) {
        (Some(Ok(())), Some(far)) => Ok((near, far)),
        other => Err(format!("{other:?}")),
    }
}

pub fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}
