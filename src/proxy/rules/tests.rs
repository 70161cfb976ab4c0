use super::*;
use crate::{
    config::Backend,
    table::model::{
        Affinity, Change, Endpoint, NodeInfo, Object, ServiceId, ServicePort, Slice, SliceId, SlicePort, Source,
    },
};
use std::net::Ipv4Addr;

const OWN: Ipv4Addr = Ipv4Addr::new(169, 254, 96, 16);
const PORTS: Ports = Ports { proxy: Some(4000), proxy6: Some(6000), dns: Some((53, 5300)), take_over: None };

fn cfg() -> ProxyConfig {
    ProxyConfig {
        enable: true,
        backend: Backend::Auto,
        interfaces: vec![],
        external_ips: false,
        node_ports: Vec::new(),
        mark: 1,
        max_connections: 10,
        drain: 0,
        beside_kube_proxy: false,
    }
}

fn endpoint(ready: bool) -> Endpoint {
    Endpoint {
        address: "10.1.0.9".parse().unwrap(),
        hostname: None,
        node: None,
        zone: None,
        pod: None,
        hints: None,
        ready,
        serving: ready,
        terminating: false,
    }
}

fn node_port(protocol: Protocol) -> std::rc::Rc<[ServicePort]> {
    [ServicePort { name: "".into(), number: 80, protocol, node_port: 30_080 }].into()
}

fn add(table: &mut Table, name: &str, vip: &str, protocol: Protocol, ready: bool, edit: impl FnOnce(&mut Service)) {
    add_at(table, name, vip, None, protocol, ready, edit);
}

fn add_at(
    table: &mut Table,
    name: &str,
    vip: &str,
    node: Option<&str>,
    protocol: Protocol,
    ready: bool,
    edit: impl FnOnce(&mut Service),
) {
    let id = ServiceId { namespace: "default".into(), name: name.into() };
    let mut service = Service {
        id: id.clone(),
        kind: ServiceKind::ClusterIp,
        vips: vec![vip.parse().unwrap()].into(),
        external_ips: ["203.0.113.7".parse().unwrap()].into(),
        ports: [ServicePort { name: "".into(), number: 80, protocol, node_port: 0 }].into(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    };
    edit(&mut service);
    table.apply(Change::Apply(Source::Config, Object::Service(service)));
    let slice = Slice {
        id: SliceId { namespace: "default".into(), name: name.into() },
        service: name.into(),
        ports: [SlicePort { name: "".into(), number: 8080, protocol }].into(),
        endpoints: vec![Endpoint { node: node.map(Into::into), ..endpoint(ready) }],
    };
    table.apply(Change::Apply(Source::Config, Object::Slice(slice)));
}

type Rules = Vec<(String, u16, Protocol, Action)>;

fn rules(table: &Table, cfg: &ProxyConfig) -> Rules {
    rules_with(table, cfg, &PORTS)
}

fn rules_with(table: &Table, cfg: &ProxyConfig, ports: &Ports) -> Rules {
    both(table, cfg, ports)[0].clone()
}

/// Those of the interfaces that are caught and of this host, and those of all interfaces.
fn both(table: &Table, cfg: &ProxyConfig, ports: &Ports) -> [Rules; 2] {
    let id = ServiceId { namespace: "default".into(), name: "udp".into() };
    let (udp, here) = ([((id, 80), 10_007)].into(), Here { node: "here".into(), ..Here::default() });
    let addresses = ["192.168.1.1", "198.51.100.1", "127.0.0.1", "fd00:1::1", "fe80::1"].map(|ip| ip.parse().unwrap());
    let from = Sources { table, cfg, ports, udp: &udp, here: &here, addresses: &addresses };
    let desired = Desired::new(&from, OWN.into(), Catch::AllBut(vec![]));
    [desired.rules, desired.outside]
        .map(|all| all.iter().map(|r| (r.address.to_string(), r.port, r.protocol, r.action)).collect())
}

fn dns() -> Rules {
    [Protocol::Udp, Protocol::Tcp].map(|p| (OWN.to_string(), 53, p, Action::Redirect(5300))).to_vec()
}

#[test]
fn served_ports_are_redirected_and_others_refused() {
    let mut table = Table::default();
    add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
    add(&mut table, "dead", "10.96.0.1", Protocol::Tcp, false, |_| ());
    add(&mut table, "udp", "10.96.0.3", Protocol::Udp, true, |_| ());
    add(&mut table, "udp-without-socket", "10.96.0.8", Protocol::Udp, true, |_| ());
    add(&mut table, "udp-dead", "10.96.0.4", Protocol::Udp, false, |_| ());
    add(&mut table, "sctp", "10.96.0.5", Protocol::Sctp, false, |_| ());
    add(&mut table, "other", "10.96.0.6", Protocol::Tcp, true, |s| s.not_proxied = true);
    add(&mut table, "headless", "10.96.0.7", Protocol::Tcp, true, |s| s.kind = ServiceKind::Headless);
    let mut want = dns();
    want.extend([
        ("10.96.0.1".into(), 80, Protocol::Tcp, Action::Refuse),
        ("10.96.0.2".into(), 80, Protocol::Tcp, Action::Redirect(4000)),
        ("10.96.0.3".into(), 80, Protocol::Udp, Action::Redirect(10_007)),
        ("10.96.0.4".into(), 80, Protocol::Udp, Action::Refuse),
    ]);
    assert_eq!(rules(&table, &cfg()), want);
    let (vips, avoid) = addresses_of(&table, &cfg(), OWN.into(), &PORTS);
    assert_eq!(vips.len(), 6);
    assert!(avoid.contains(&"10.1.0.9".parse().unwrap()));
}

#[test]
fn addresses_that_a_service_may_not_take_are_left_alone() {
    for bad in ["169.254.96.16", "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fd00::1"] {
        let mut table = Table::default();
        add(&mut table, "evil", bad, Protocol::Tcp, true, |_| ());
        assert_eq!(rules(&table, &cfg()), dns(), "{bad}");
    }
}

#[test]
fn the_address_of_a_dns_that_is_taken_over_is_answered_here_whoever_serves_it() {
    let port = |number, protocol| ServicePort { name: "".into(), number, protocol, node_port: 0 };
    for (ready, other) in [(true, Action::Redirect(4000)), (false, Action::Refuse)] {
        let mut table = Table::default();
        add(&mut table, "kube-dns", "10.96.0.10", Protocol::Tcp, ready, |s| {
            s.ports = [port(53, Protocol::Udp), port(53, Protocol::Tcp), port(9153, Protocol::Tcp)].into();
        });
        let mut ports = Ports { take_over: Some(("default".into(), "kube-dns".into())), ..PORTS };
        let ours = |protocol| ("10.96.0.10".into(), 53, protocol, Action::Redirect(5300));
        let mut want = dns();
        want.extend([ours(Protocol::Tcp), ours(Protocol::Udp), ("10.96.0.10".into(), 9153, Protocol::Tcp, other)]);
        assert_eq!(rules_with(&table, &cfg(), &ports), want);
        ports.proxy = None;
        want.pop();
        assert_eq!(rules_with(&table, &cfg(), &ports), want);
        let vip = "10.96.0.10".parse().unwrap();
        assert_eq!(addresses_of(&table, &cfg(), OWN.into(), &ports).0, Set::from([vip]));
        ports.dns = None;
        assert!(rules_with(&table, &cfg(), &ports).is_empty());
    }
}

#[test]
fn external_addresses_only_when_asked() {
    let mut table = Table::default();
    add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
    assert_eq!(rules(&table, &cfg()).len(), 3);
    let asked = ProxyConfig { external_ips: true, ..cfg() };
    assert_eq!(rules(&table, &asked)[3].0, "203.0.113.7");
}

#[test]
fn external_addresses_of_nodes_and_api_servers_are_not_taken() {
    let asked = ProxyConfig { external_ips: true, ..cfg() };
    let node = || NodeInfo { name: "n".into(), addresses: vec!["203.0.113.7".parse().unwrap()], zone: None };
    let guards: [fn(&mut Table, NodeInfo); 3] = [
        |table, _| assert!(table.guard("203.0.113.7".parse().unwrap())),
        |table, node| {
            table.apply(Change::Apply(Source::Config, Object::Node(node)));
        },
        |table, _| {
            add(table, "kubernetes", "10.96.0.9", Protocol::Tcp, true, |s| s.external_ips = [].into());
            let (id, slice) = (SliceId { namespace: "default".into(), name: "k".into() }, "203.0.113.7");
            let endpoint = Endpoint { address: slice.parse().unwrap(), ..endpoint(true) };
            let (service, ports) = ("kubernetes".into(), [].into());
            let slice = Slice { id, service, ports, endpoints: vec![endpoint] };
            table.apply(Change::Apply(Source::Config, Object::Slice(slice)));
        },
    ];
    for guard in guards {
        let mut table = Table::default();
        add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |_| ());
        assert_eq!(guarded(&table, &asked), None);
        guard(&mut table, node());
        assert!(rules(&table, &asked).iter().all(|(ip, ..)| ip != "203.0.113.7"));
        assert!(!addresses_of(&table, &asked, OWN.into(), &PORTS).0.contains(&"203.0.113.7".parse().unwrap()));
        let said = guarded(&table, &asked).unwrap();
        assert!(said.starts_with("203.0.113.7, an external address of default/web, "), "{said}");
        assert_eq!(guarded(&table, &cfg()), None, "nobody asked for it");
    }
}

#[test]
fn interface_names_cannot_smuggle_options() {
    let none = Set::new();
    assert_eq!(Catch::new(&[], &Set::from(["wan".into()])).unwrap(), Catch::AllBut(vec!["wan".into()]));
    assert_eq!(Catch::new(&["br-lan.2".into()], &none).unwrap(), Catch::Only(vec!["br-lan.2".into()]));
    for bad in ["", "a b", "-j", "x\nCOMMIT", "\"", "much-too-long-name"] {
        assert!(Catch::new(&[bad.into()], &none).is_err(), "{bad:?}");
    }
}

#[test]
fn node_ports_are_served_on_the_addresses_that_the_config_names() {
    let mut table = Table::default();
    add(&mut table, "web", "10.96.0.2", Protocol::Tcp, true, |s| s.ports = node_port(Protocol::Tcp));
    add(&mut table, "udp", "10.96.0.3", Protocol::Udp, true, |s| s.ports = node_port(Protocol::Udp));
    add(&mut table, "sixth", "fd00::3", Protocol::Tcp, true, |s| s.ports = node_port(Protocol::Tcp));
    let ask = |nets: &[&str]| {
        let node_ports = nets.iter().map(|net| net.parse().unwrap()).collect();
        let [rules, outside] = both(&table, &ProxyConfig { node_ports, ..cfg() }, &PORTS);
        // Whoever comes from inside is served there too.
        assert!(outside.iter().all(|rule| rules.contains(rule)) && rules.len() == outside.len() + 4, "{rules:?}");
        outside
    };
    let at = |ip: &str| {
        let rule = |protocol, port| (ip.to_owned(), 30_080, protocol, Action::Redirect(port));
        [rule(Protocol::Tcp, 4000), rule(Protocol::Udp, 10_007)]
    };
    assert_eq!(ask(&[]), []);
    assert_eq!(ask(&["192.168.0.0/16", "fc00::/7"]), at("192.168.1.1"));
    assert_eq!(ask(&["0.0.0.0/0", "::/0"]), [at("192.168.1.1"), at("198.51.100.1")].concat());
}

#[test]
fn a_node_port_with_the_external_policy_local_turns_others_away_where_nothing_serves_it() {
    for (node, ready, inside, outside) in [
        ("here", true, Action::Redirect(4000), Action::Redirect(4000)),
        ("there", true, Action::Redirect(4000), Action::Drop),
        ("here", false, Action::Refuse, Action::Refuse),
    ] {
        let mut table = Table::default();
        add_at(&mut table, "web", "10.96.0.2", Some(node), Protocol::Tcp, ready, |s| {
            (s.ports, s.external_local) = (node_port(Protocol::Tcp), true);
        });
        let node_ports = vec!["192.168.1.1".parse().unwrap()];
        let all = both(&table, &ProxyConfig { node_ports, ..cfg() }, &PORTS);
        assert_eq!(all.map(|rules| rules.last().unwrap().3), [inside, outside], "{node} {ready}");
    }
}

#[test]
fn beside_kube_proxy_what_it_can_do_is_left_to_it() {
    let mut table = Table::default();
    for (name, vip, node, ready) in [
        ("near", "10.96.0.1", "here", true),
        ("far", "10.96.0.2", "elsewhere", true),
        ("gone", "10.96.0.3", "elsewhere", false),
    ] {
        add_at(&mut table, name, vip, Some(node), Protocol::Tcp, ready, |s| s.ports = node_port(Protocol::Tcp));
    }
    let mut cfg = ProxyConfig { node_ports: vec!["192.168.0.0/16".parse().unwrap()], ..cfg() };
    assert_eq!(rules(&table, &cfg).len(), 2 + 3 + 1);
    cfg.beside_kube_proxy = true;
    let [caught, outside] = both(&table, &cfg, &PORTS);
    let vips = caught.iter().map(|r| (r.0.as_str(), r.1)).collect::<Vec<_>>();
    assert_eq!(vips[2..], [("10.96.0.2", 80), ("192.168.1.1", 30_080)]);
    assert_eq!(outside, [("192.168.1.1".to_owned(), 30_080, Protocol::Tcp, Action::Redirect(4000))]);
}
