//! One node with more peers than it keeps connections to.

use crate::{
    nat::Kind,
    pair::{LATER, Pair, SEC, connect, seeds},
    world::{Cluster, NOW, World},
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use weft::{
    metrics::TunnelCounters,
    table::model::{Protocol, ServiceId},
    tunnel::{
        Open, Remembered,
        identity::{Certificate, KeyPair, Roles},
        node::{Event, Node, Output},
    },
};

const LIVE_MAX: usize = 256;
/// More than there is room for beside the live ones.
const CLOSING: usize = 70;
const HUB: &str = "11.0.0.1:7843";

fn web() -> Open {
    Open {
        service: ServiceId { namespace: "shop".into(), name: "web".into() },
        port: 80,
        protocol: Protocol::Tcp,
        endpoint: "10.0.0.1:8080".parse().unwrap(),
    }
}

/// One hub, and nodes that reach it without anything between; each pair runs alone.
struct Star {
    world: World,
    cluster: Cluster,
    hub: (KeyPair, Certificate),
    node: Node,
    count: std::rc::Rc<TunnelCounters>,
    now: Instant,
    /// So much later the next of what the hub says arrives.
    late: Duration,
    /// Streams that the hub was asked for: (its key, whose).
    asked: Vec<(u32, String)>,
}

struct Spoke {
    node: Node,
    address: SocketAddr,
    key: u32,
}

impl Star {
    fn new() -> Self {
        let cluster = Cluster::new();
        let hub = cluster.identity("hub", Roles::NONE, LATER);
        let mut world = World::new(1);
        let (mut node, count) = world.node(&cluster, &hub, Vec::new());
        node.set_unix(NOW);
        let now = world.now;
        Self { world, cluster, hub, node, count, now, late: Duration::ZERO, asked: Vec::new() }
    }

    fn spoke(&mut self, i: usize) -> Spoke {
        let identity = self.cluster.identity(&format!("node-{i}"), Roles::NONE, LATER);
        let (mut node, _) = self.world.node(&self.cluster, &identity, Vec::new());
        node.remember(vec![Remembered { certificate: self.hub.1.clone(), address: HUB.parse().unwrap() }]);
        let address = format!("11.1.{}.{}:7843", i / 250, 1 + i % 250).parse().unwrap();
        Spoke { node, address, key: 0 }
    }

    /// Sends all that one has to say to the other; when it wants to be woken.
    fn drain(&mut self, spoke: &mut Spoke) -> Instant {
        let (mut buf, hub) = (Vec::new(), HUB.parse().unwrap());
        let mut wake = self.now + SEC;
        for _ in 0..100 {
            let mut quiet = true;
            for of_hub in [false, true] {
                let (from, to, source) = match of_hub {
                    false => (&mut spoke.node, &mut self.node, spoke.address),
                    true => (&mut self.node, &mut spoke.node, hub),
                };
                loop {
                    match from.poll_output(self.now, &mut buf) {
                        Output::Send { to: address, segment, .. } => {
                            quiet = false;
                            let segment = segment.unwrap_or(buf.len());
                            if of_hub {
                                self.now += std::mem::take(&mut self.late);
                            }
                            if address == if of_hub { spoke.address } else { hub } {
                                to.handle_datagrams(self.now, source, &mut buf, segment);
                            }
                        }
                        Output::Event(Event::Incoming { key, peer, .. }) => self.asked.push((key, peer)),
                        Output::Event(_) | Output::Beacon => {}
                        Output::Wait(at) => {
                            wake = at.map_or(wake, |at| at.min(wake));
                            break;
                        }
                    }
                }
            }
            if quiet {
                break;
            }
        }
        wake
    }

    fn run(&mut self, spoke: &mut Spoke, long: Duration) {
        let until = self.now + long;
        while self.now < until {
            let wake = self.drain(spoke);
            self.now = wake.min(until).max(self.now + Duration::from_millis(1));
            spoke.node.handle_tick(self.now);
            self.node.handle_tick(self.now);
        }
    }

    /// The spoke opens a stream, and the hub accepts it.
    fn open(&mut self, spoke: &mut Spoke) {
        spoke.key = spoke.node.open(self.now, "hub", &web()).unwrap();
        self.run(spoke, SEC / 20);
        let (key, _) = self.asked.last().expect("the stream arrives");
        self.node.answer(*key, &Ok(()));
        self.run(spoke, SEC / 100);
        assert_eq!(spoke.node.opened(spoke.key), Some(Ok(())));
    }

    fn close(&mut self, spoke: &mut Spoke) {
        let (key, _) = self.asked.pop().expect("it is open");
        spoke.node.drop_stream(self.now, spoke.key);
        self.node.drop_stream(self.now, key);
        self.run(spoke, SEC / 50);
    }

    fn live(&self) -> Vec<String> {
        let views = self.node.peer_views(self.now).into_iter();
        views.filter(|v| v.path != "none").map(|v| v.name).collect()
    }
}

#[test]
fn the_connection_unused_for_longest_makes_room_for_the_257th() {
    let mut star = Star::new();
    let mut spokes: Vec<Spoke> = Vec::new();
    for i in 0..LIVE_MAX {
        let mut spoke = star.spoke(i);
        star.open(&mut spoke);
        // The first three keep their streams.
        if i >= 3 {
            star.close(&mut spoke);
        }
        spokes.push(spoke);
    }
    assert_eq!(star.live().len(), LIVE_MAX, "within a minute nobody has gone");
    let mut one_more = star.spoke(LIVE_MAX);
    star.open(&mut one_more);
    let live = star.live();
    assert_eq!((live.len(), star.count.connections_displaced.get()), (LIVE_MAX, 1));
    for (name, here) in [("node-0", true), ("node-2", true), ("node-3", false), ("node-4", true), ("node-256", true)] {
        assert_eq!(live.iter().any(|n| n == name), here, "{name}");
    }
    // It is known still and comes back, in the place of the next.
    assert!(star.node.peer_views(star.now).iter().any(|v| v.name == "node-3"));
    let mut back = spokes.swap_remove(3);
    star.run(&mut back, SEC / 10);
    star.open(&mut back);
    let live = star.live();
    assert!(live.len() == LIVE_MAX && live.iter().any(|n| n == "node-3") && !live.iter().any(|n| n == "node-4"));
}

/// It lasts for three PTOs, and a PTO for what the handshake took: that closing takes longer than these newcomers.
#[test]
fn those_that_are_closing_make_room_as_well() {
    let mut star = Star::new();
    for i in 0..LIVE_MAX {
        let mut spoke = star.spoke(i);
        if i < CLOSING {
            star.late = SEC / 2;
        }
        star.open(&mut spoke);
        star.close(&mut spoke);
    }
    assert_eq!(star.live().len(), LIVE_MAX, "within a minute nobody has gone");
    for i in 0..CLOSING {
        let mut spoke = star.spoke(LIVE_MAX + i);
        spoke.node.open(star.now, "hub", &web()).unwrap();
        star.run(&mut spoke, SEC / 100);
        assert_eq!(star.asked.len(), i + 1, "this one has to wait");
    }
    assert_eq!((star.live().len(), star.count.connections_displaced.get()), (LIVE_MAX, CLOSING as u64));
    assert_eq!(star.count.budget_exceeded.get(), 0);
}

#[test]
fn where_all_carry_streams_nobody_is_thrown_away() {
    let mut star = Star::new();
    let mut spokes: Vec<Spoke> = Vec::new();
    for i in 0..LIVE_MAX {
        let mut spoke = star.spoke(i);
        star.open(&mut spoke);
        spokes.push(spoke);
    }
    let mut one_more = star.spoke(LIVE_MAX);
    let key = one_more.node.open(star.now, "hub", &web()).unwrap();
    star.run(&mut one_more, SEC);
    assert_eq!(star.live().len(), LIVE_MAX);
    let refusal = one_more.node.opened(key).expect("an answer").expect_err("no place").to_string();
    assert!(refusal.contains("too many connections"), "{refusal}");
    assert!(!star.live().iter().any(|n| n == "node-256"));
    // As soon as one has no more streams there is a place.
    let mut first = spokes.swap_remove(0);
    let (key, _) = star.asked.remove(0);
    first.node.drop_stream(star.now, first.key);
    star.node.drop_stream(star.now, key);
    star.run(&mut first, SEC / 20);
    star.open(&mut one_more);
    assert!(star.live().iter().any(|n| n == "node-256"));
}

#[test]
fn a_connection_without_streams_ends_and_comes_back_in_one_round_trip() {
    for seed in seeds(5) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        let (near, far) = connect(&mut p.world, 20 * SEC).unwrap();
        p.world.run(3 * SEC, |_| false);
        let now = p.world.now;
        p.world.hosts[1].node.drop_stream(now, near.key);
        p.world.hosts[2].node.drop_stream(now, far.key);
        let path = |w: &World| w.hosts[1].node.peer_views(w.now)[0].path;
        p.world.run(55 * SEC, |_| false);
        assert_eq!(path(&p.world), "direct", "seed {seed}: closed too early");
        p.world.run(15 * SEC, |_| false);
        assert_eq!(path(&p.world), "none", "seed {seed}: still there");
        let (start, delay) = (p.world.now, p.world.delay);
        p.world.open(1, "b");
        assert!(p.world.run(5 * SEC, |w| path(w) == "direct"));
        // There and back; the world tells of it at its next event.
        assert!(p.world.now - start <= 3 * delay + delay / 2, "seed {seed}: {:?}", p.world.now - start);
    }
}
