//! A cluster with fixed keys, a node and its relay, all repeatable.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    rc::Rc,
    sync::{Arc, LazyLock, Mutex, atomic::AtomicU32},
    time::Instant,
};
use weft::{
    config::{Congestion, Profile},
    metrics::TunnelCounters,
    tunnel::{
        Key, RelaySpec,
        identity::{Authority, Certificate, KeyPair, Request, Roles, Secret},
        node::{Node, NodeConfig},
        noise::Local,
    },
};

const fn at(last: u8) -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), 7843))
}

#[allow(dead_code)] // of one target alone
pub const NODE: SocketAddr = at(1);
pub const RELAY: SocketAddr = at(2);
#[allow(dead_code)] // of one target alone
pub const STRANGER: SocketAddr = at(3);
/// 2026-11-21.
const NOW: u32 = 1_795_000_000;

/// The same for all runs: an instant cannot be made from nothing.
pub fn start() -> Instant {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    *START
}

pub struct Cluster {
    authority: Authority,
    node: (KeyPair, Certificate),
    relay: (KeyPair, Certificate),
}

impl Default for Cluster {
    fn default() -> Self {
        let authority = Authority::from_seed(Secret::new([1; 32])).unwrap();
        let identity = |name: &str, seed: u8, roles| {
            let pair = KeyPair::from_private(Secret::new([seed; 32])).unwrap();
            let not_after = u64::from(NOW) * 2;
            let request = Request { name: name.into(), key: pair.public, roles, network: String::new(), not_after };
            let certificate = authority.issue(request).unwrap();
            (pair, certificate)
        };
        let node = identity("edge-1", 2, Roles::NONE);
        let relay = identity("relay-1", 3, Roles::RELAY);
        Self { authority, node, relay }
    }
}

impl Cluster {
    fn build(&self, (pair, certificate): &(KeyPair, Certificate), relays: Vec<RelaySpec>) -> Node {
        let mut rng = fastrand::Rng::with_seed(5);
        let local = Local {
            secret: Key(*pair.private.expose()),
            public: pair.public,
            certificate: certificate.encode(),
            ca: self.authority.public(),
            psks: vec![(1, Key([9; 32]))],
            unix: Arc::new(AtomicU32::new(NOW)),
            entropy: Some(Mutex::new(rng.fork())),
            is_relay: certificate.roles.contains(Roles::RELAY),
            has_aes: false,
        };
        let config = NodeConfig {
            local,
            name: certificate.name.clone(),
            relays,
            profile: Profile::Router,
            congestion: Congestion::Auto,
            relay_limits: Default::default(),
            lan: true,
            gso: 4,
            seed: Some([4; 32]),
        };
        Node::new(config, start(), rng, Rc::new(TunnelCounters::default()))
    }

    pub fn node(&self, relays: Vec<RelaySpec>) -> Node {
        self.build(&self.node, relays)
    }

    pub fn relay(&self) -> Node {
        self.build(&self.relay, Vec::new())
    }

    #[allow(dead_code)] // of one target alone
    pub fn relay_spec(&self) -> RelaySpec {
        RelaySpec { certificate: self.relay.1.clone(), host: RELAY.ip().to_string(), port: RELAY.port() }
    }
}
