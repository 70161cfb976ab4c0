mod policies;

use super::{state::AFFINITIES_MAX, *};
use crate::{config::Policy, table::model::*};
use std::{collections::BTreeMap, time::Duration};

const VIP: &str = "10.96.0.10:80";

fn endpoint(address: &str, node: Option<&str>) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        hostname: None,
        node: node.map(Into::into),
        zone: None,
        pod: None,
        hints: None,
        ready: true,
        serving: true,
        terminating: false,
    }
}

fn service() -> Service {
    Service {
        id: ServiceId { namespace: "shop".into(), name: "web".into() },
        kind: ServiceKind::ClusterIp,
        vips: vec!["10.96.0.10".parse().unwrap()].into(),
        external_ips: ["192.0.2.10".parse().unwrap()].into(),
        ports: [("http", 80), ("admin", 81)]
            .map(|(name, number)| ServicePort { name: name.into(), number, protocol: Protocol::Tcp, node_port: 0 })
            .into(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    }
}

fn slice(name: &str, endpoints: Vec<Endpoint>) -> Object {
    Object::Slice(Slice {
        id: SliceId { namespace: "shop".into(), name: name.into() },
        service: "web".into(),
        ports: [("http", 8080), ("admin", 9000)]
            .map(|(name, number)| SlicePort { name: name.into(), number, protocol: Protocol::Tcp })
            .into(),
        endpoints,
    })
}

struct World {
    table: Table,
    here: Here,
    balancer: Balancer,
    now: Instant,
}

impl World {
    fn new(service: Service, endpoints: Vec<Endpoint>) -> Self {
        let mut world = Self {
            table: Table::default(),
            here: Here { node: "edge-1".into(), ..Here::default() },
            balancer: Balancer::new(Policy::RoundRobin, fastrand::Rng::with_seed(1)),
            now: crate::clock::Clock::new(0).now(),
        };
        world.put(Object::Service(service));
        world.put(slice("web-1", endpoints));
        world
    }

    fn put(&mut self, object: Object) {
        self.table.apply(Change::Apply(Source::Api, object));
    }

    fn node(&mut self, name: &str, address: &str, zone: Option<&str>) {
        let addresses = vec![address.parse().unwrap()];
        self.put(Object::Node(NodeInfo { name: name.into(), addresses, zone: zone.map(Into::into) }));
    }

    fn ask(&mut self, destination: &str, client: u8, tried: &[SocketAddr]) -> Result<Target, NoTarget> {
        let destination = destination.parse().unwrap();
        let ask = Ask { destination, protocol: Protocol::Tcp, client: [192, 168, 0, client].into(), tried };
        self.table.pick(&self.here, ask, None, &mut self.balancer, self.now).map(|pick| pick.target)
    }

    fn address(&mut self, client: u8) -> String {
        match self.ask(VIP, client, &[]).unwrap() {
            Target::Local(address) | Target::Remote { address, .. } => address.to_string(),
        }
    }

    fn spread(&mut self, picks: usize) -> BTreeMap<String, usize> {
        let mut seen = BTreeMap::new();
        (0..picks).for_each(|_| *seen.entry(self.address(1)).or_default() += 1);
        seen
    }
}

fn three() -> Vec<Endpoint> {
    [1, 2, 3].map(|n| endpoint(&format!("10.1.0.{n}"), Some("edge-2"))).into()
}

#[test]
fn round_robin_is_even_for_each_port_by_itself() {
    let mut world = World::new(service(), three());
    for _ in 0..999 {
        world.ask("10.96.0.10:81", 1, &[]).unwrap();
    }
    let spread = world.spread(999);
    assert_eq!(spread.into_values().collect::<Vec<_>>(), [333; 3]);
    let one = world.ask(VIP, 1, &[]).unwrap();
    let Target::Remote { node, service, port, address } = one else { panic!("{one:?}") };
    assert_eq!((&*node, &*service.name, port, address.port()), ("edge-2", "web", 80, 8080));
}

#[test]
fn random_is_about_even() {
    let mut world = World::new(service(), three());
    world.balancer.policy = Policy::Random;
    assert!(world.spread(1000).into_values().all(|n| (273..=393).contains(&n)));
}

#[test]
fn an_address_in_two_slices_counts_once() {
    let mut world = World::new(service(), three());
    world.put(slice("web-2", vec![endpoint("10.1.0.1", Some("edge-2"))]));
    let Object::Slice(mut other_ports) = slice("web-3", vec![endpoint("10.1.0.2", Some("edge-2"))]) else { panic!() };
    other_ports.ports = other_ports.ports[..1].into();
    world.put(Object::Slice(other_ports));
    assert_eq!(world.spread(999).into_values().collect::<Vec<_>>(), [333; 3]);
}

#[test]
fn the_nearest_kind_that_has_an_endpoint_is_used() {
    let far = || endpoint("10.1.0.3", Some("edge-3"));
    let mut all = vec![endpoint("10.1.0.1", Some("edge-1")), endpoint("10.1.0.2", Some("edge-2")), far()];
    let mut world = World::new(service(), all.clone());
    world.node("edge-1", "172.16.0.1", Some("north"));
    world.node("edge-2", "172.16.0.2", Some("north"));
    world.node("edge-3", "172.16.0.3", Some("south"));
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.1:8080"]);
    assert_eq!(world.ask(VIP, 1, &[]), Ok(Target::Local("10.1.0.1:8080".parse().unwrap())));
    world.balancer.prefer = vec![Nearness::Any];
    assert_eq!(world.spread(9).into_values().collect::<Vec<_>>(), [3; 3]);
    world.balancer.prefer = vec![Nearness::Node, Nearness::Zone];
    all.remove(0);
    world.put(slice("web-1", all));
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.2:8080"]);
    world.here.zone = "south".into();
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.3:8080"]);
    let on_link = world.here.on_link.clone();
    on_link.set(&["edge-2".into(), "edge-9".into()]);
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.2:8080", "10.1.0.3:8080"], "on a LAN of ours");
    let near = |address: &str| {
        let mut all = world.table.endpoints(&service().id).map(|(_, e)| e);
        let endpoint = all.find(|e| e.address.to_string() == address).unwrap();
        (world.table.nearness(&world.here, endpoint), world.table.how_near(&world.here, endpoint))
    };
    assert_eq!([near("10.1.0.2"), near("10.1.0.3")], [(Nearness::Zone, "LAN"), (Nearness::Zone, "zone")]);
    on_link.set(&[]);
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.3:8080"]);
    world.put(slice("web-1", vec![endpoint("10.1.0.9", Some("edge-9"))]));
    assert_eq!(world.spread(4).into_keys().collect::<Vec<_>>(), ["10.1.0.9:8080"]);
}

#[test]
fn a_failed_endpoint_is_not_tried_again_and_none_is_no_endpoint() {
    let mut world = World::new(service(), three());
    let mut tried = Vec::new();
    for _ in 0..3 {
        let Ok(Target::Remote { address, .. }) = world.ask(VIP, 1, &tried) else { panic!("{tried:?}") };
        assert!(!tried.contains(&address));
        tried.push(address);
    }
    assert_eq!(world.ask(VIP, 1, &tried), Err(NoTarget::NoEndpoint));
    assert_eq!(world.ask("10.96.0.10:9999", 1, &[]), Err(NoTarget::NotAService));
    assert_eq!(world.ask("10.96.0.11:80", 1, &[]), Err(NoTarget::NotAService));
    assert!(matches!(world.ask("192.0.2.10:80", 1, &[]), Ok(Target::Remote { .. })));
    world.put(Object::Service(Service { not_proxied: true, ..service() }));
    assert_eq!(world.ask(VIP, 1, &[]), Err(NoTarget::NotAService));
}

#[test]
fn unready_ones_get_nothing_and_terminating_ones_only_as_a_last_resort() {
    let unready = Endpoint { ready: false, serving: false, ..endpoint("10.1.0.1", Some("edge-1")) };
    let dying = Endpoint { ready: false, terminating: true, ..endpoint("10.1.0.2", Some("edge-1")) };
    let dead = Endpoint { serving: false, ..Endpoint { address: "10.1.0.4".parse().unwrap(), ..dying.clone() } };
    let far = endpoint("10.1.0.3", Some("edge-3"));
    let mut world = World::new(service(), vec![unready.clone(), dying.clone(), dead.clone(), far]);
    assert_eq!(world.spread(5).into_keys().collect::<Vec<_>>(), ["10.1.0.3:8080"]);
    world.put(slice("web-1", vec![unready.clone(), dying, dead.clone()]));
    assert_eq!(world.spread(5).into_keys().collect::<Vec<_>>(), ["10.1.0.2:8080"]);
    world.put(slice("web-1", vec![unready, dead]));
    assert_eq!(world.ask(VIP, 1, &[]), Err(NoTarget::NoEndpoint));
}

#[test]
fn a_client_stays_with_its_endpoint_until_the_timeout_after_the_last_use() {
    let timeout = Duration::from_secs(5);
    let sticky = Service { affinity: Affinity::ClientIp { timeout }, ..service() };
    let mut world = World::new(sticky, three());
    let mut elsewhere = 0;
    for client in 0..30 {
        let first = world.address(client);
        for _ in 0..4 {
            world.now += Duration::from_secs(3);
            assert_eq!(world.address(client), first);
        }
        world.now += Duration::from_secs(6);
        elsewhere += usize::from(world.address(client) != first);
    }
    assert!(elsewhere > 0, "all 30 got the same endpoint again");
}

#[test]
fn affinity_survives_churn_and_moves_when_the_endpoint_is_gone_or_failed() {
    for (policy, affinity) in
        [(Policy::Sticky, Affinity::None), (Policy::Random, Affinity::ClientIp { timeout: Duration::from_secs(60) })]
    {
        let mut world = World::new(Service { affinity, ..service() }, three());
        world.balancer.policy = policy;
        let first = world.address(1);
        (0..50).for_each(|client| {
            world.address(client);
        });
        let mut more = three();
        more.extend((4..30).map(|n| endpoint(&format!("10.1.0.{n}"), Some("edge-1"))));
        more.reverse();
        world.put(slice("web-1", more.clone()));
        assert_eq!(world.address(1), first);
        let failed = [first.parse().unwrap()];
        let second = world.ask(VIP, 1, &failed).unwrap();
        assert_eq!(world.ask(VIP, 1, &[]), Ok(second.clone()), "the new one is kept");
        let (Target::Local(gone) | Target::Remote { address: gone, .. }) = second;
        more.retain(|e| e.address != gone.ip());
        world.put(slice("web-1", more));
        assert_ne!(world.address(1), gone.to_string());
    }
}

#[test]
fn affinities_are_bounded() {
    let mut world = World::new(service(), three());
    world.balancer.policy = Policy::Sticky;
    for n in 0..2 * AFFINITIES_MAX.get() {
        let client = IpAddr::from(u32::try_from(n).unwrap().to_be_bytes());
        let ask = Ask { destination: VIP.parse().unwrap(), protocol: Protocol::Tcp, client, tried: &[] };
        world.table.pick(&world.here, ask, None, &mut world.balancer, world.now).unwrap();
    }
    assert_eq!(world.balancer.affinities.len(), AFFINITIES_MAX.get());
}

#[test]
fn the_internal_policy_local_leaves_only_our_own() {
    let all = || vec![endpoint("10.1.0.1", Some("edge-1")), endpoint("10.1.0.2", Some("edge-2"))];
    let mut world = World::new(Service { local_only: true, ..service() }, all());
    world.balancer.prefer = vec![Nearness::Any];
    assert_eq!(world.spread(5).into_keys().collect::<Vec<_>>(), ["10.1.0.1:8080"]);
    world.here.node = "edge-3".into();
    assert_eq!(world.ask(VIP, 1, &[]), Err(NoTarget::NoEndpoint));
    assert!(world.ask("192.0.2.10:80", 1, &[]).is_ok(), "it is about the virtual address only");
}

#[test]
fn an_endpoint_without_a_node_is_sought_among_the_nodes_addresses() {
    let mut world = World::new(service(), vec![endpoint("172.16.0.2", None)]);
    let address: SocketAddr = "172.16.0.2:8080".parse().unwrap();
    let id = service().id;
    assert_eq!(world.ask(VIP, 1, &[]), Ok(Target::Local(address)), "no node has it");
    assert!(!world.table.owns(&world.here, &id, 80, Protocol::Tcp, address), "dialled for us, not for peers");
    world.node("edge-2", "172.16.0.2", None);
    assert!(matches!(world.ask(VIP, 1, &[]), Ok(Target::Remote { node, .. }) if &*node == "edge-2"));
    world.node("edge-3", "172.16.0.2", None);
    assert_eq!(world.ask(VIP, 1, &[]), Ok(Target::Local(address)), "two have it: it could be either's");
    world.node("edge-1", "172.16.0.2", None);
    assert_eq!(world.ask(VIP, 1, &[]), Ok(Target::Local(address)));
    assert!(world.table.owns(&world.here, &id, 80, Protocol::Tcp, address));
}

#[test]
fn a_neighbour_is_dialled_directly() {
    let mut world = World::new(service(), vec![endpoint("10.1.0.2", Some("edge-2"))]);
    world.here.neighbours = ["edge-2"].into_iter().collect();
    assert!(matches!(world.ask(VIP, 1, &[]), Ok(Target::Remote { .. })), "no network, no neighbours");
    world.here.network = "cloud".into();
    assert_eq!(world.ask(VIP, 1, &[]), Ok(Target::Local("10.1.0.2:8080".parse().unwrap())));
    world.here.neighbours = ["cloud-*", "edge-*"].into_iter().collect();
    assert!(matches!(world.ask(VIP, 1, &[]), Ok(Target::Local(_))), "by how it begins");
    assert!(!world.table.needs_tunnel(&world.here, &service().id));
    world.here.neighbours = ["cloud-*", "edge-20"].into_iter().collect();
    assert!(matches!(world.ask(VIP, 1, &[]), Ok(Target::Remote { .. })));
    assert!(world.table.needs_tunnel(&world.here, &service().id));
}

#[test]
fn an_egress_opens_its_neighbours_endpoints_and_others_ask_it() {
    let nobody = Nodes::default();
    let mut world = World::new(service(), vec![endpoint("10.1.0.2", Some("cloud-2")), endpoint("10.1.0.3", None)]);
    let (id, address) = (service().id, "10.1.0.2:8080".parse().unwrap());
    let owns = |world: &World, to| world.table.owns(&world.here, &id, 80, Protocol::Tcp, to);
    world.here.egress = vec![(["cloud-*"].into_iter().collect(), "cloud-1".into())];
    let asked = (0..2).map(|_| world.ask(VIP, 1, &[]).unwrap()).find(|t| matches!(t, Target::Remote { .. }));
    assert!(matches!(asked, Some(Target::Remote { node, address: to, .. }) if &*node == "cloud-1" && to == address));
    (world.here.network, world.here.neighbours) = ("cloud".into(), ["cloud-*"].into_iter().collect());
    assert!(!owns(&world, address), "the role is not ours");
    world.here.is_egress = true;
    assert!(owns(&world, address));
    assert!(!owns(&world, "10.1.0.3:8080".parse().unwrap()), "nobody says that it is a neighbour's");
    assert!(!owns(&world, "10.1.0.2:22".parse().unwrap()), "no endpoint");
    world.here.neighbours = nobody;
    assert!(!owns(&world, address), "of another network");
}

#[test]
fn only_our_own_endpoints_of_that_port_are_opened_for_peers() {
    let all = vec![endpoint("10.1.0.1", Some("edge-1")), endpoint("10.1.0.2", Some("edge-2"))];
    let mut world = World::new(service(), all);
    let id = service().id;
    let owns = |world: &World, id: &ServiceId, port, protocol, address: &str| {
        world.table.owns(&world.here, id, port, protocol, address.parse().unwrap())
    };
    assert!(owns(&world, &id, 80, Protocol::Tcp, "10.1.0.1:8080"));
    assert!(owns(&world, &id, 81, Protocol::Tcp, "10.1.0.1:9000"));
    for (port, protocol, address) in [
        (80, Protocol::Tcp, "10.1.0.2:8080"),
        (80, Protocol::Tcp, "10.1.0.1:9000"),
        (80, Protocol::Tcp, "10.1.0.1:22"),
        (80, Protocol::Udp, "10.1.0.1:8080"),
        (8080, Protocol::Tcp, "10.1.0.1:8080"),
        (80, Protocol::Tcp, "127.0.0.1:8080"),
    ] {
        assert!(!owns(&world, &id, port, protocol, address), "{port} {protocol:?} {address}");
    }
    let other = ServiceId { namespace: "shop".into(), name: "db".into() };
    assert!(!owns(&world, &other, 80, Protocol::Tcp, "10.1.0.1:8080"));
    world.put(Object::Service(Service { not_proxied: true, ..service() }));
    assert!(!owns(&world, &id, 80, Protocol::Tcp, "10.1.0.1:8080"));
}

#[test]
fn services_that_share_an_external_address_are_told_apart_by_port() {
    let mut world = World::new(service(), three());
    let other = ServiceId { namespace: "shop".into(), name: "aaa".into() };
    let ports = [ServicePort { name: "".into(), number: 443, protocol: Protocol::Tcp, node_port: 0 }].into();
    world.put(Object::Service(Service { id: other, vips: vec![].into(), ports, ..service() }));
    assert!(world.ask("192.0.2.10:80", 1, &[]).is_ok());
    assert_eq!(world.ask("192.0.2.10:443", 1, &[]), Err(NoTarget::NoEndpoint));
}

#[test]
fn what_takes_no_probe_is_the_last_to_be_chosen() {
    let mut endpoints = three();
    endpoints.push(endpoint("10.1.0.4", Some("edge-1")));
    let mut sticky = service();
    sticky.affinity = Affinity::ClientIp { timeout: Duration::from_secs(600) };
    let mut world = World::new(sticky, endpoints);
    let own: Vec<_> = world.table.own_endpoints(&world.here).iter().map(ToString::to_string).collect();
    assert_eq!(own, ["10.1.0.4:8080", "10.1.0.4:9000"]);
    let id = (service().id, 80, Protocol::Tcp);
    let local: SocketAddr = "10.1.0.4:8080".parse().unwrap();
    assert_eq!(world.address(1), local.to_string());
    assert_eq!(world.balancer.fared(&id, local, world.now), None);
    // Others are used, also by whom was there before; the other port is not meant.
    world.balancer.silent = [local].into();
    let elsewhere = world.address(1);
    assert_ne!(elsewhere, local.to_string());
    assert!(matches!(world.ask("10.96.0.10:81", 1, &[]), Ok(Target::Local(a)) if a.port() == 9000));
    assert!(world.balancer.fared(&id, local, world.now).unwrap().is_silent);
    // Where nobody is left it is tried all the same.
    world.balancer.silent = (1..=4).map(|n| SocketAddr::new([10, 1, 0, n].into(), 8080)).collect();
    assert_eq!(world.address(2), local.to_string());
    world.balancer.silent = Set::new();
    assert_eq!(world.address(3), local.to_string());
}

#[test]
fn of_our_own_endpoints_those_are_tried_that_clients_are_sent_to() {
    let mut ending = endpoint("10.1.0.2", Some("edge-1"));
    (ending.ready, ending.terminating) = (false, true);
    let mut not_ready = endpoint("10.1.0.3", Some("edge-1"));
    (not_ready.ready, not_ready.serving) = (false, false);
    let local = endpoint("10.1.0.1", Some("edge-1"));
    let anywhere = endpoint("10.1.0.5", None);
    let mut world =
        World::new(service(), vec![local, ending, not_ready, endpoint("10.1.0.4", Some("edge-2")), anywhere]);
    let own =
        |world: &World| world.table.own_endpoints(&world.here).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(own(&world), ["10.1.0.1:8080", "10.1.0.1:9000", "10.1.0.2:8080", "10.1.0.2:9000"]);
    let mut others = service();
    others.not_proxied = true;
    world.put(Object::Service(others));
    assert_eq!(own(&world), [] as [&str; 0]);
    let mut datagrams = service();
    datagrams.ports = datagrams.ports.iter().cloned().collect();
    std::rc::Rc::get_mut(&mut datagrams.ports).unwrap()[0].protocol = Protocol::Udp;
    world.put(Object::Service(datagrams));
    assert_eq!(own(&world), ["10.1.0.1:9000", "10.1.0.2:9000"]);
}
