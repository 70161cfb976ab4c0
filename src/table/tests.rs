//! The table against a simple model, under seeded changes.

use super::{model::*, *};
use std::collections::BTreeSet;

const SOURCES: [Source; 3] = [Source::Config, Source::Manifests, Source::Api];

fn name(prefix: &str, n: usize) -> Name {
    format!("{prefix}{n}").into()
}

fn service_id(rng: &mut fastrand::Rng) -> ServiceId {
    ServiceId { namespace: name("ns", rng.usize(..2)), name: name("svc", rng.usize(..2)) }
}

fn address(rng: &mut fastrand::Rng) -> IpAddr {
    if rng.bool() { [10, 0, 0, rng.u8(..6)].into() } else { [0xfd00, 0, 0, 0, 0, 0, 0, rng.u16(..6)].into() }
}

fn addresses(rng: &mut fastrand::Rng, most: usize) -> Vec<IpAddr> {
    (0..rng.usize(..=most)).map(|_| address(rng)).collect()
}

fn object(rng: &mut fastrand::Rng) -> Object {
    match rng.u8(..6) {
        0 | 1 => Object::Service(Service {
            id: service_id(rng),
            kind: ServiceKind::ClusterIp,
            vips: addresses(rng, 2).into(),
            external_ips: addresses(rng, 1).into(),
            ports: [ServicePort {
                name: "".into(),
                number: rng.u16(80..83),
                protocol: Protocol::Tcp,
                node_port: if rng.bool() { rng.u16(30_000..30_003) } else { 0 },
            }]
            .into(),
            affinity: Affinity::None,
            local_only: false,
            external_local: false,
            not_proxied: false,
        }),
        2 | 3 => {
            let id = service_id(rng);
            let mut own = BTreeSet::new();
            let endpoints = addresses(rng, 4).into_iter().filter(|a| own.insert(*a)).map(|address| Endpoint {
                address,
                hostname: None,
                node: rng.bool().then(|| name("node", rng.usize(..3))),
                zone: None,
                pod: None,
                hints: None,
                ready: rng.bool(),
                serving: rng.bool(),
                terminating: rng.bool(),
            });
            let endpoints = endpoints.collect();
            let subset = rng.u8(..4) == 0;
            Object::Slice(Slice {
                id: if subset {
                    SliceId::of_subset(id.namespace, &id.name, rng.usize(..2))
                } else {
                    SliceId { namespace: id.namespace, name: name("slice", rng.usize(..6)) }
                },
                service: id.name,
                ports: [SlicePort { name: "".into(), number: rng.u16(8080..8082), protocol: Protocol::Tcp }].into(),
                endpoints,
            })
        }
        4 => Object::Pod(Pod {
            id: PodId { namespace: name("ns", rng.usize(..3)), name: name("pod", rng.usize(..3)) },
            addresses: addresses(rng, 2),
        }),
        _ => Object::Node(NodeInfo { name: name("node", rng.usize(..4)), addresses: addresses(rng, 2), zone: None }),
    }
}

/// Everything a reader can see, computed from the objects alone.
#[derive(Debug, PartialEq, Default)]
struct Seen {
    services: Vec<Service>,
    nodes: Vec<NodeInfo>,
    endpoints: Vec<(ServiceId, SliceId, Endpoint)>,
    namespaces: BTreeSet<Name>,
    vips: BTreeMap<IpAddr, ServiceId>,
    by_endpoint: BTreeSet<(IpAddr, ServiceId)>,
    holders: BTreeMap<IpAddr, Vec<Name>>,
    pods: BTreeSet<(Name, IpAddr)>,
}

#[derive(Default)]
struct Model(Vec<(Source, Object)>);

impl Model {
    fn put(&mut self, source: Source, object: Object) {
        self.remove(source, &object.id());
        self.0.push((source, object));
    }

    fn remove(&mut self, source: Source, of: &ObjectId) {
        self.0.retain(|(s, o)| !(*s == source && o.id() == *of));
    }

    fn seen(&self) -> Seen {
        let mut seen = Seen::default();
        let mut services: BTreeMap<ServiceId, (Source, &Service)> = BTreeMap::new();
        let mut nodes: BTreeMap<Name, (Source, &NodeInfo)> = BTreeMap::new();
        let mut slices: Vec<(Source, &Slice)> = Vec::new();
        let mut pods: BTreeMap<PodId, (Source, &Pod)> = BTreeMap::new();
        for (source, object) in &self.0 {
            match object {
                Object::Service(s) if services.get(&s.id).is_none_or(|(old, _)| old < source) => {
                    services.insert(s.id.clone(), (*source, s));
                }
                Object::Node(n) if nodes.get(&n.name).is_none_or(|(old, _)| old < source) => {
                    nodes.insert(n.name.clone(), (*source, n));
                }
                Object::Slice(s) => slices.push((*source, s)),
                Object::Pod(p) if pods.get(&p.id).is_none_or(|(old, _)| old < source) => {
                    pods.insert(p.id.clone(), (*source, p));
                }
                Object::Service(_) | Object::Node(_) | Object::Pod(_) | Object::Rule(_) => {}
            }
        }
        for (id, (_, pod)) in pods {
            seen.namespaces.insert(id.namespace.clone());
            seen.pods.extend(pod.addresses.iter().map(|a| (id.namespace.clone(), *a)));
        }
        slices.sort_by_key(|(_, s)| &s.id);
        for (id, (source, service)) in &services {
            seen.services.push((*service).clone());
            seen.namespaces.insert(id.namespace.clone());
            let of = |s: &Slice| s.id.namespace == id.namespace && s.service == id.name;
            let mut own: Vec<_> = slices.iter().filter(|(f, s)| f == source && of(s)).map(|(_, s)| *s).collect();
            if own.iter().any(|s| !s.id.is_subset()) {
                own.retain(|s| !s.id.is_subset());
            }
            for (at, slice) in own.iter().enumerate() {
                for e in &slice.endpoints {
                    let state = |e: &Endpoint| (e.ready, e.serving, !e.terminating);
                    let beaten = own.iter().enumerate().filter(|(_, s)| s.ports == slice.ports).any(|(other, s)| {
                        s.endpoints.iter().any(|o| {
                            o.address == e.address && (state(o) > state(e) || (state(o) == state(e) && other < at))
                        })
                    });
                    if !beaten {
                        seen.endpoints.push((id.clone(), slice.id.clone(), e.clone()));
                        seen.by_endpoint.insert((e.address, id.clone()));
                    }
                }
            }
        }
        for external in [false, true] {
            for service in &seen.services {
                for address in if external { &*service.external_ips } else { &*service.vips } {
                    seen.vips.entry(*address).or_insert_with(|| service.id.clone());
                }
            }
        }
        for (name, (_, node)) in nodes {
            seen.nodes.push(node.clone());
            for address in BTreeSet::from_iter(&node.addresses) {
                seen.holders.entry(*address).or_default().push(name.clone());
            }
        }
        seen
    }
}

fn seen(table: &Table) -> Seen {
    let mut seen = Seen {
        services: table.services().cloned().collect(),
        nodes: table.nodes().cloned().collect(),
        ..Seen::default()
    };
    for s in table.services() {
        assert_eq!(table.service(&s.id.namespace, &s.id.name), Some(s));
        seen.endpoints.extend(table.endpoints(&s.id).map(|(slice, e)| {
            let id = SliceId { namespace: s.id.namespace.clone(), name: slice.name.clone() };
            (s.id.clone(), id, e.unpack())
        }));
    }
    let space = (0..6).flat_map(|n| [[10, 0, 0, n].into(), [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)].into()]);
    for address in space {
        seen.vips.extend(table.by_vip(address).map(|s| (address, s.id.clone())));
        seen.by_endpoint.extend(table.by_endpoint(address).map(|(s, e)| {
            assert_eq!(e.address, address);
            (address, s.id.clone())
        }));
        let namespaces = (0..3).map(|n| name("ns", n));
        seen.pods.extend(namespaces.filter(|n| table.has_pod(n, address)).map(|n| (n, address)));
        let holders = table.nodes_with(address);
        if !holders.is_empty() {
            seen.holders.insert(address, holders.to_vec());
        }
    }
    for number in 30_000..30_003 {
        let least = table.services().filter(|s| s.ports[0].node_port == number).map(|s| &s.id).min();
        assert_eq!(table.by_node_port(number, Protocol::Tcp).map(|(s, _)| &s.id), least);
        assert!(table.by_node_port(number, Protocol::Udp).is_none());
    }
    seen.namespaces = (0..3).map(|n| name("ns", n)).filter(|n| table.has_namespace(n)).collect();
    seen
}

/// What must hold of the insides: nothing is left of what is gone.
fn assert_lean(table: &Table) {
    let slots: usize = table.namespaces.values().map(|n| n.slots.len()).sum();
    assert_eq!(slots + table.free.len(), table.records.len());
    if slots == 0 {
        assert_eq!(table.by_vip.len() + table.by_endpoint.len() + table.by_slice.len(), 0);
        assert!(table.namespaces.is_empty());
    }
    if table.objects(Source::Config) + table.objects(Source::Manifests) + table.objects(Source::Api) == 0 {
        assert!(table.pods.is_empty());
    }
}

#[test]
fn changes_in_any_order_equal_the_model() {
    for seed in crate::seeds(60) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut table, mut model) = (Table::default(), Model::default());
        for step in 0..120 {
            let source = SOURCES[rng.usize(..3)];
            let object = object(&mut rng);
            let before = seen(&table);
            let changed = if rng.u8(..3) == 0 {
                model.remove(source, &object.id());
                table.apply(Change::Delete(source, object.id()))
            } else {
                model.put(source, object.clone());
                table.apply(Change::Apply(source, object))
            };
            let after = seen(&table);
            assert_eq!(after, model.seen(), "seed {seed} step {step}");
            assert!(changed || before == after, "seed {seed} step {step}: an unreported change");
        }
        for source in SOURCES {
            table.apply(Change::Begin(source));
            table.apply(Change::Complete(source));
        }
        assert_eq!(seen(&table), Seen::default(), "seed {seed}");
        assert_lean(&table);
    }
}

#[test]
fn a_shuffled_relist_equals_a_fresh_list() {
    for seed in crate::seeds(60) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut used = Table::default();
        for _ in 0..100 {
            let source = SOURCES[rng.usize(..3)];
            let object = object(&mut rng);
            used.apply(Change::Apply(source, object));
        }
        let mut fresh = Table::default();
        for source in SOURCES {
            let mut model = Model::default();
            (0..30).for_each(|_| model.put(source, object(&mut rng)));
            let mut list: Vec<_> = model.0.into_iter().map(|(s, o)| Change::Apply(s, o)).collect();
            for table in [&mut fresh, &mut used] {
                rng.shuffle(&mut list);
                table.apply(Change::Begin(source));
                list.iter().for_each(|change| {
                    table.apply(change.clone());
                });
                table.apply(Change::Complete(source));
            }
            let (version, before) = (used.version(), seen(&used));
            rng.shuffle(&mut list);
            let again = std::iter::once(Change::Begin(source)).chain(list).chain([Change::Complete(source)]);
            assert_eq!(again.filter(|c| used.apply(c.clone())).count(), 0, "seed {seed}: nothing changed");
            assert_eq!((version, before), (used.version(), seen(&used)), "seed {seed}");
        }
        assert_eq!(seen(&used), seen(&fresh), "seed {seed}");
        assert_lean(&used);
    }
}

fn filled(source: Source) -> (Table, Seen) {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut table = Table::default();
    table.apply(Change::Begin(source));
    for _ in 0..60 {
        table.apply(Change::Apply(source, object(&mut rng)));
    }
    table.apply(Change::Complete(source));
    let seen = seen(&table);
    (table, seen)
}

#[test]
fn what_a_later_source_hides_is_no_visible_change() {
    let node = |address: [u8; 4]| {
        Object::Node(NodeInfo { name: "edge-1".into(), addresses: vec![address.into()], zone: None })
    };
    let mut table = Table::default();
    assert!(table.apply(Change::Apply(Source::Api, node([10, 0, 0, 1]))));
    let version = table.version();
    for address in [[10, 0, 0, 2], [10, 0, 0, 3]] {
        assert!(!table.apply(Change::Apply(Source::Config, node(address))));
    }
    assert_eq!(table.version(), version);
    assert!(table.apply(Change::Delete(Source::Api, ObjectId::Node("edge-1".into()))));
    assert_eq!(table.nodes_with([10, 0, 0, 3].into()), ["edge-1".into()]);
}

#[test]
fn an_implausible_list_never_wipes_the_table() {
    let (mut table, before) = filled(Source::Api);
    for change in [Change::Begin(Source::Api), Change::Abort(Source::Api), Change::Complete(Source::Api)] {
        assert!(!table.apply(change));
    }
    assert_eq!(seen(&table), before);
    assert!(table.synced());
    table.apply(Change::Begin(Source::Api));
    assert!(table.apply(Change::Complete(Source::Api)), "a plausible empty list does");
    assert_eq!(seen(&table), Seen::default());
}

#[test]
fn an_object_that_could_not_be_read_keeps_its_old_version() {
    let (mut table, before) = filled(Source::Manifests);
    table.apply(Change::Begin(Source::Manifests));
    let services = before.services.iter().map(|s| ObjectId::Service(s.id.clone()));
    let nodes = before.nodes.iter().map(|n| ObjectId::Node(n.name.clone()));
    let slices = before.endpoints.iter().map(|(_, slice, _)| ObjectId::Slice(slice.clone()));
    let pod = |n: usize| PodId { namespace: name("ns", n % 3), name: name("pod", n / 3) };
    let pods = (0..9).map(|n| ObjectId::Pod(pod(n)));
    for id in services.chain(nodes).chain(slices).chain(pods) {
        assert!(!table.apply(Change::Keep(Source::Manifests, id)));
    }
    table.apply(Change::Keep(Source::Manifests, ObjectId::Node("unknown".into())));
    table.apply(Change::Complete(Source::Manifests));
    assert_eq!(seen(&table), before);
}

#[test]
fn a_source_that_is_expected_must_list_first() {
    let mut table = Table::default();
    assert!(table.synced());
    table.expect(Source::Manifests);
    assert!(!table.synced());
    table.apply(Change::Begin(Source::Manifests));
    table.apply(Change::Abort(Source::Manifests));
    assert!(!table.synced());
    table.apply(Change::Begin(Source::Manifests));
    assert!(table.apply(Change::Complete(Source::Manifests)) && table.synced());
}

#[test]
fn a_node_port_leads_to_its_service_and_with_the_external_policy_local_to_its_endpoints_here() {
    let id = ServiceId { namespace: "shop".into(), name: "web".into() };
    let endpoint = |address: &str, node: &str| Endpoint {
        address: address.parse().unwrap(),
        hostname: None,
        node: Some(node.into()),
        zone: None,
        pod: None,
        hints: None,
        ready: true,
        serving: true,
        terminating: false,
    };
    let here = balance::Here { node: "near".into(), ..balance::Here::default() };
    for external_local in [false, true] {
        let mut table = Table::default();
        table.apply(Change::Apply(
            Source::Api,
            Object::Service(Service {
                id: id.clone(),
                kind: ServiceKind::ClusterIp,
                vips: vec!["10.96.0.1".parse().unwrap()].into(),
                external_ips: [].into(),
                ports: [ServicePort { name: "".into(), number: 80, protocol: Protocol::Tcp, node_port: 30_080 }].into(),
                affinity: Affinity::None,
                local_only: false,
                external_local,
                not_proxied: false,
            }),
        ));
        table.apply(Change::Apply(
            Source::Api,
            Object::Slice(Slice {
                id: SliceId { namespace: "shop".into(), name: "web".into() },
                service: "web".into(),
                ports: [SlicePort { name: "".into(), number: 8080, protocol: Protocol::Tcp }].into(),
                endpoints: vec![endpoint("10.1.0.1", "near"), endpoint("10.1.0.2", "far")],
            }),
        ));
        let mut balancer = balance::Balancer::new(crate::config::Policy::RoundRobin, fastrand::Rng::with_seed(1));
        balancer.prefer = vec![balance::Nearness::Any];
        let mut nodes = |destination: &str, client: &str| {
            let ask = balance::Ask {
                destination: destination.parse().unwrap(),
                protocol: Protocol::Tcp,
                client: client.parse().unwrap(),
                tried: &[],
            };
            let now = crate::clock::Clock::new(0).now();
            let mut picks =
                (0..4).map(|_| table.pick(&here, ask, None, &mut balancer, now).map(|p| p.target)).collect::<Vec<_>>();
            picks.dedup();
            picks.len()
        };
        let others = if external_local { 1 } else { 4 };
        assert_eq!(nodes("192.168.1.1:30080", "192.168.1.9"), others, "{external_local}");
        assert_eq!(nodes("192.168.1.1:30080", "192.168.1.1"), 4, "the host itself");
        assert_eq!(nodes("10.96.0.1:80", "192.168.1.9"), 4);
        assert_eq!(nodes("192.168.1.1:30081", "192.168.1.9"), 1, "no such port");
    }
}
