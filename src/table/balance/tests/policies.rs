//! Policies, hints, and endpoints that fail; rows by their numbers.

use super::*;
use crate::table::rule::{NUMBERS, Rule, hash};
use std::rc::Rc;

fn traffic(choice: Option<Choice>, numbers: &[(Number, u32)]) -> Rc<Traffic> {
    let mut all = [0; NUMBERS];
    numbers.iter().for_each(|(which, n)| all[*which as usize] = *n);
    Traffic { choice, numbers: all }.into()
}

fn rule(name: &str, host: Option<&str>, traffic: Rc<Traffic>) -> Rule {
    let id = |name: &str| ServiceId { namespace: "shop".into(), name: name.into() };
    Rule {
        id: id(name),
        host: host.map(id),
        created: "2026-01-01T00:00:00Z".into(),
        private: false,
        traffic,
        ports: [].into(),
        not_done: "".into(),
    }
}

fn with(choice: Choice) -> Object {
    Object::Rule(rule("any", Some("web"), traffic(Some(choice), &[])))
}

fn far(count: usize) -> Vec<Endpoint> {
    (1..=count).map(|n| endpoint(&format!("10.1.0.{n}"), Some("edge-2"))).collect()
}

impl World {
    fn pick_by(&mut self, client: IpAddr, key: Option<u64>) -> Pick {
        let ask = Ask { destination: VIP.parse().unwrap(), protocol: Protocol::Tcp, client, tried: &[] };
        self.table.pick(&self.here, ask, key, &mut self.balancer, self.now).unwrap()
    }

    /// A connection that stays.
    fn hold(&mut self) -> SocketAddr {
        let pick = self.pick_by([192, 168, 0, 1].into(), None);
        let address = address_of(&pick.target);
        self.balancer.begin(&pick.port, address, self.now);
        address
    }

    /// A connection to whatever is picked; those in `dead` fail. The one that took it.
    fn connect(&mut self, dead: &[&str]) -> (SocketAddr, usize) {
        let mut tried = Vec::new();
        loop {
            let ask = Ask {
                destination: VIP.parse().unwrap(),
                protocol: Protocol::Tcp,
                client: [192, 168, 0, 1].into(),
                tried: &tried,
            };
            let Ok(pick) = self.table.pick(&self.here, ask, None, &mut self.balancer, self.now) else {
                panic!("none of {tried:?} and no other")
            };
            let address = address_of(&pick.target);
            self.balancer.begin(&pick.port, address, self.now);
            let is_dead = dead.iter().any(|d| *d == address.ip().to_string());
            if is_dead {
                self.balancer.failed(&pick.port, address, pick.traffic.as_deref(), false, self.now);
            } else {
                self.balancer.worked(&pick.port, address);
            }
            self.balancer.over(&pick.port, address);
            if !is_dead {
                return (address, tried.len());
            }
            tried.push(address);
        }
    }
}

fn address_of(target: &Target) -> SocketAddr {
    let (Target::Local(address) | Target::Remote { address, .. }) = target;
    *address
}

#[test]
fn d4_of_two_the_one_with_fewer_connections() {
    let mut world = World::new(service(), far(3));
    world.put(with(Choice::LeastRequest));
    let slow = world.hold();
    let id = (service().id, 80, Protocol::Tcp);
    for _ in 0..20 {
        world.balancer.begin(&id, slow, world.now);
    }
    let spread = world.spread(300);
    assert!(!spread.contains_key(&slow.to_string()) && spread.len() == 2, "{spread:?}");
    (0..21).for_each(|_| world.balancer.over(&id, slow));
    assert!(world.spread(3_000).into_values().all(|n| (850..1_150).contains(&n)));
    world.balancer.policy = Policy::LeastRequest;
    world.table.apply(Change::Delete(Source::Api, ObjectId::Rule(rule("any", None, traffic(None, &[])).id)));
    let first = world.hold();
    (0..20).for_each(|_| world.balancer.begin(&id, first, world.now));
    assert!(!world.spread(300).contains_key(&first.to_string()), "by the configuration as by a rule");
}

#[test]
fn d8_the_address_of_a_client_and_not_its_port_is_hashed() {
    let mut world = World::new(service(), far(4));
    world.put(with(Choice::SourceIp));
    assert_eq!(world.spread(1_000).len(), 1, "one client, one endpoint");
    let mut seen = BTreeMap::<SocketAddr, usize>::new();
    for n in 0..4_000_u32 {
        *seen.entry(address_of(&world.pick_by(n.to_be_bytes().into(), None).target)).or_default() += 1;
    }
    assert!(seen.len() == 4 && seen.values().all(|n| (850..1_150).contains(n)), "{seen:?}");
    let mut other = World::new(service(), far(4).into_iter().rev().collect());
    other.balancer = Balancer::new(Policy::Random, fastrand::Rng::with_seed(99));
    other.put(with(Choice::SourceIp));
    assert_eq!(other.address(7), world.address(7), "every node comes to the same");
}

#[test]
fn d11_removing_one_of_ten_moves_about_a_tenth_of_the_keys() {
    let mut world = World::new(service(), far(10));
    world.put(with(Choice::Header("user-agent".into())));
    let keys = |world: &mut World| -> Vec<SocketAddr> {
        let key = |n: u32| Some(hash(format!("agent-{n}").as_bytes()));
        (0..10_000).map(|n| address_of(&world.pick_by([1, 2, 3, 4].into(), key(n)).target)).collect()
    };
    let before = keys(&mut world);
    let mut fewer = far(10);
    let gone = fewer.remove(4).address;
    world.put(slice("web-1", fewer));
    let after = keys(&mut world);
    let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert!(before.iter().zip(&after).all(|(a, b)| a == b || a.ip() == gone), "only those of the one that went");
    assert!((800..=1_500).contains(&moved), "{moved} of 10,000");
    world.put(slice("web-1", far(10)));
    assert_eq!(keys(&mut world), before, "it comes back to its keys");
}

#[test]
fn d7_without_the_header_it_is_in_turn() {
    let mut world = World::new(service(), three());
    world.put(with(Choice::Header("user-agent".into())));
    assert_eq!(world.spread(999).into_values().collect::<Vec<_>>(), [333; 3]);
    let ask =
        Ask { destination: VIP.parse().unwrap(), protocol: Protocol::Tcp, client: [192, 168, 0, 1].into(), tried: &[] };
    assert_eq!(world.table.wants_header(&ask).as_deref(), Some("user-agent"));
    let timeout = Duration::from_secs(60);
    world.put(Object::Service(Service { affinity: Affinity::ClientIp { timeout }, ..service() }));
    assert_eq!(world.table.wants_header(&ask), None, "D13: the affinity wins");
    assert_eq!(world.spread(100).len(), 1);
}

#[test]
fn d1_d29_d30_which_rule_is_a_services() {
    let mut world = World::new(service(), three());
    let id = service().id;
    let named = |world: &World| world.table.rule_of(&id).map(|r| r.id.name.to_string());
    let mut early = Table::default();
    early.apply(Change::Apply(Source::Api, with(Choice::SourceIp)));
    early.apply(Change::Apply(Source::Api, Object::Service(service())));
    assert!(early.rule_of(&id).is_some(), "D30: the rule came first");
    let empty = || traffic(None, &[]);
    world.put(Object::Rule(rule("web", Some("no-such-service"), empty())));
    assert_eq!(named(&world).as_deref(), Some("web"), "D1: by its own name, as EdgeMesh does");
    world.put(Object::Rule(rule("other", Some("web"), empty())));
    assert_eq!(named(&world).as_deref(), Some("other"), "the host counts more");
    world.put(Object::Rule(Rule { created: "2025-06-01T00:00:00Z".into(), ..rule("zzz", Some("web"), empty()) }));
    assert_eq!(named(&world).as_deref(), Some("zzz"), "D29: the oldest");
    let mut foreign = rule("foreign", Some("web"), empty());
    (foreign.id.namespace, foreign.created) = ("else".into(), "2020-01-01T00:00:00Z".into());
    world.put(Object::Rule(foreign.clone()));
    assert_eq!(named(&world).as_deref(), Some("zzz"), "its own namespace before another");
    for name in ["zzz", "other", "web"] {
        world.table.apply(Change::Delete(Source::Api, ObjectId::Rule(rule(name, None, empty()).id)));
    }
    assert_eq!(named(&world).as_deref(), Some("foreign"));
    world.put(Object::Rule(Rule { private: true, ..foreign }));
    assert_eq!(named(&world), None, "D27: exported to its own namespace alone");
}

#[test]
fn d16_a_port_has_its_own_policy() {
    let mut world = World::new(service(), three());
    let mut both = rule("any", Some("web"), traffic(Some(Choice::SourceIp), &[]));
    both.ports = [(81, traffic(None, &[]))].into();
    world.put(Object::Rule(both));
    assert_eq!(world.spread(30).len(), 1);
    let mut admin = BTreeMap::<SocketAddr, usize>::new();
    for _ in 0..30 {
        *admin.entry(address_of(&world.ask("10.96.0.10:81", 1, &[]).unwrap())).or_default() += 1;
    }
    assert_eq!(admin.into_values().collect::<Vec<_>>(), [10; 3], "not merged with what is said of all");
}

#[test]
fn d18_no_more_connections_than_the_rule_says() {
    let mut world = World::new(service(), three());
    world.put(Object::Rule(rule("any", Some("web"), traffic(None, &[(Number::Connections, 10)]))));
    let held: Vec<_> = (0..10).map(|_| world.hold()).collect();
    assert_eq!(world.ask(VIP, 1, &[]), Err(NoTarget::Full));
    assert!(world.ask("10.96.0.10:81", 1, &[]).is_ok(), "for each port");
    world.balancer.over(&(service().id, 80, Protocol::Tcp), held[0]);
    assert!(world.ask(VIP, 1, &[]).is_ok());
}

#[test]
fn d28_policies_change_and_go_while_running() {
    let mut world = World::new(service(), three());
    let id = rule("any", None, traffic(None, &[])).id;
    for choice in [Choice::SourceIp, Choice::Random, Choice::LeastRequest, Choice::Header("x".into())] {
        world.put(with(choice.clone()));
        world.spread(50);
        assert!(world.table.apply(Change::Delete(Source::Api, ObjectId::Rule(id.clone()))));
        assert_eq!(world.spread(30).into_values().collect::<Vec<_>>(), [10; 3], "round robin after {choice:?}");
    }
}

#[test]
fn d25_one_that_fails_is_left_out_for_longer_each_time() {
    let mut world = World::new(service(), three());
    let numbers = [(Number::Failures, 5), (Number::EjectMs, 30_000), (Number::EjectPercent, 10)];
    world.put(Object::Rule(rule("any", Some("web"), traffic(None, &numbers))));
    let retries = |world: &mut World, connections: usize| -> usize {
        (0..connections).map(|_| world.connect(&["10.1.0.2"]).1).sum()
    };
    assert_eq!(retries(&mut world, 100), 5, "five failures, and then nobody tries");
    world.now += Duration::from_secs(29);
    assert_eq!(retries(&mut world, 100), 0);
    world.now += Duration::from_secs(2);
    assert_eq!(retries(&mut world, 100), 1, "one tries, the others do not");
    world.now += Duration::from_secs(59);
    assert_eq!(retries(&mut world, 100), 0, "twice as long");
    world.now += Duration::from_secs(2);
    let (_, failed) = (0..10).fold((0, 0), |(n, failed), _| (n + 1, failed + world.connect(&[]).1));
    assert_eq!(failed, 0);
    assert_eq!(world.spread(30).into_values().collect::<Vec<_>>(), [10; 3], "well again");
}

#[test]
fn ejection_has_a_floor_and_the_last_one_stays() {
    for (count, dead, out) in [(1, 1, 0), (2, 2, 1), (3, 3, 1), (10, 9, 5), (10, 10, 5)] {
        let mut world = World::new(service(), far(count));
        let port = (service().id, 80, Protocol::Tcp);
        let address = |n: usize| SocketAddr::new(IpAddr::from([10, 1, 0, n as u8]), 8080);
        world.spread(1);
        for n in 1..=dead {
            for _ in 0..5 {
                world.balancer.begin(&port, address(n), world.now);
                world.balancer.failed(&port, address(n), None, false, world.now);
                world.balancer.over(&port, address(n));
            }
        }
        let fared = |n: usize| world.balancer.fared(&port, address(n), world.now);
        let ejected = (1..=count).filter(|n| fared(*n).is_some_and(|f| f.ejected.is_some())).count();
        assert_eq!(ejected, out, "{dead} of {count}");
        assert!(world.ask(VIP, 1, &[]).is_ok());
    }
}

#[test]
fn c49_when_all_others_were_tried_those_left_out_are_tried_too() {
    let mut world = World::new(service(), three());
    for _ in 0..20 {
        world.connect(&["10.1.0.2"]);
    }
    let (address, tries) = world.connect(&["10.1.0.1", "10.1.0.3"]);
    assert_eq!((address.ip().to_string().as_str(), tries), ("10.1.0.2", 2));
}

#[test]
fn failures_of_one_moment_count_once() {
    let mut world = World::new(service(), three());
    let port = (service().id, 80, Protocol::Tcp);
    let bad = world.hold();
    for _ in 0..100 {
        world.balancer.begin(&port, bad, world.now);
    }
    let out = (0..100).filter(|_| world.balancer.failed(&port, bad, None, false, world.now)).count();
    assert_eq!(out, 1);
    let fared = world.balancer.fared(&port, bad, world.now).unwrap();
    assert_eq!((fared.ejected, fared.failed, fared.live), (Some(Duration::from_secs(10)), 100, 101));
}

#[test]
fn e73_e74_hints_count_where_every_ready_endpoint_has_one_and_one_is_for_us() {
    let hinted = |n: u8, zones: &[&str], nodes: &[&str]| {
        let names = |list: &[&str]| list.iter().map(|n| (*n).into()).collect::<Box<[Name]>>();
        let hints = Hints { zones: names(zones), nodes: names(nodes) };
        let hints = (!zones.is_empty() || !nodes.is_empty()).then(|| hints.into());
        Endpoint { hints, ..endpoint(&format!("10.1.0.{n}"), Some("edge-2")) }
    };
    let ending = |e: Endpoint| Endpoint { ready: false, terminating: true, ..e };
    let two = || vec![hinted(1, &["north"], &[]), hinted(2, &["south"], &[]), hinted(3, &["north"], &[])];
    let cases: [(&str, Vec<Endpoint>, &[u8]); 8] = [
        ("zones", two(), &[1, 3]),
        ("one has none", vec![hinted(1, &["north"], &[]), hinted(2, &[], &[])], &[1, 2]),
        ("none is for us", vec![hinted(1, &["south"], &[]), hinted(2, &["south"], &[])], &[1, 2]),
        ("nodes before zones", vec![hinted(1, &["south"], &["edge-1"]), hinted(2, &["north"], &["edge-2"])], &[1]),
        ("none for this node", vec![hinted(1, &["south"], &["edge-3"]), hinted(2, &["north"], &["edge-2"])], &[2]),
        (
            "an unready one does not count",
            {
                let unready = Endpoint { ready: false, serving: false, ..hinted(2, &[], &[]) };
                vec![hinted(1, &["north"], &[]), unready, hinted(3, &["south"], &[])]
            },
            &[1],
        ),
        ("E75: terminating ones alone", vec![ending(hinted(1, &["north"], &[])), ending(hinted(2, &[], &[]))], &[1, 2]),
        ("E75: and one that is ready", vec![ending(hinted(1, &["north"], &[])), hinted(2, &["south"], &[])], &[2]),
    ];
    for (name, endpoints, wanted) in cases {
        let mut world = World::new(service(), endpoints);
        world.here.zone = "north".into();
        let seen: Vec<_> = world.spread(60).into_keys().collect();
        let wanted: Vec<_> = wanted.iter().map(|n| format!("10.1.0.{n}:8080")).collect();
        assert_eq!(seen, wanted, "{name}");
    }
    let mut world = World::new(service(), two());
    world.here.zone = "north".into();
    let tried = ["10.1.0.1:8080".parse().unwrap(), "10.1.0.3:8080".parse().unwrap()];
    assert_eq!(address_of(&world.ask(VIP, 1, &tried).unwrap()).to_string(), "10.1.0.2:8080", "better than none");
}

#[test]
fn e69_e70_affinity_is_of_each_port_and_moves_from_what_fails() {
    let timeout = Duration::from_secs(60);
    let mut world = World::new(Service { affinity: Affinity::ClientIp { timeout }, ..service() }, three());
    let first = world.address(1);
    let host = first.trim_end_matches(":8080").to_owned();
    let (moved, _) = world.connect(&[&host]);
    assert_ne!(moved.to_string(), first);
    assert_eq!(world.address(1), moved.to_string(), "and stays there");
    let mut other_ports = 0;
    for client in 2..40 {
        let (one, other) = (world.address(client), world.ask("10.96.0.10:81", client, &[]).unwrap());
        other_ports += usize::from(one.trim_end_matches(":8080") != address_of(&other).ip().to_string());
    }
    assert!(other_ports > 5, "{other_ports}");
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut world = World::new(service(), three());
    for n in 0..20_000_u32 {
        let id = (ServiceId { namespace: "a".into(), name: (n % 6_000).to_string().into() }, 80, Protocol::Tcp);
        world.balancer.begin(&id, SocketAddr::new(n.to_be_bytes().into(), 1), world.now);
        world.balancer.over(&id, SocketAddr::new(n.to_be_bytes().into(), 1));
    }
    let (ports, endpoints) = world.balancer.held();
    assert!(ports <= 4_096 && endpoints.0 <= 8_192 && endpoints.0 == endpoints.1, "{ports} {endpoints:?}");
}
