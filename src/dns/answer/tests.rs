//! What the conformance table (tests/it/dns_cases.rs) does not ask.

use super::*;
use crate::{
    config::DnsConfig,
    dns::wire::{Header, Records, encode_name},
    table::model::{
        Affinity, Change, Endpoint, NodeInfo, Object, Pod, PodId, ServiceId, ServicePort, Slice, SliceId, SlicePort,
        Source,
    },
};

fn zone() -> Zone {
    Zone::new(&DnsConfig::default(), 0).unwrap()
}

fn service(name: &str, kind: ServiceKind, vips: &[IpAddr]) -> Change {
    let port = ServicePort { name: "http".into(), number: 80, protocol: Protocol::Tcp, node_port: 0 };
    let id = ServiceId { namespace: "shop".into(), name: name.into() };
    let service = Service {
        id,
        kind,
        vips: vips.to_vec().into(),
        external_ips: [[198, 51, 100, 7].into()].into(),
        ports: [port].into(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    };
    Change::Apply(Source::Api, Object::Service(service))
}

fn slice(of: &str, count: u32) -> Change {
    let endpoint = |i: u32| Endpoint {
        address: std::net::Ipv4Addr::from_bits(0x0af4_0000 + i).into(),
        hostname: None,
        node: None,
        zone: None,
        pod: None,
        hints: None,
        ready: true,
        serving: true,
        terminating: false,
    };
    let slice = Slice {
        id: SliceId { namespace: "shop".into(), name: of.into() },
        service: of.into(),
        ports: [SlicePort { name: "http".into(), number: 8080, protocol: Protocol::Tcp }].into(),
        endpoints: (0..count).map(endpoint).collect(),
    };
    Change::Apply(Source::Api, Object::Slice(slice))
}

fn table(synced: bool) -> Table {
    let mut table = Table::default();
    table.apply(Change::Begin(Source::Api));
    table.apply(service("web", ServiceKind::ClusterIp, &[[10, 96, 0, 1].into()]));
    table.apply(service("many", ServiceKind::Headless, &[]));
    table.apply(slice("many", 5000));
    for i in 0..20 {
        let target = format!("chain-{}.shop.svc.cluster.local", i + 1);
        table.apply(service(&format!("chain-{i}"), ServiceKind::External(target.as_str().into()), &[]));
    }
    if synced {
        table.apply(Change::Complete(Source::Api));
    }
    table
}

fn ask(answerer: &mut Answerer, table: &Table, name: &str, kind: u16, class: u16, via: Via) -> (u16, Vec<u8>) {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend_from_slice(&encode_name(name).unwrap());
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&class.to_be_bytes());
    let mut out = Vec::new();
    assert_eq!(answerer.reply(&query, via, table, &mut out), Outcome::Reply, "{name}");
    (Header::parse(&out).unwrap().flags, out)
}

fn code(table: &Table, name: &str, kind: u16) -> u16 {
    ask(&mut Answerer::new(zone()), table, name, kind, class::IN, Via::Udp).0 & flag::RCODE
}

#[test]
fn before_the_first_sync_what_is_there_is_told_and_what_is_not_is_unknown() {
    let table = table(false);
    assert_eq!(code(&table, "web.shop.svc.cluster.local", kind::A), rcode::NOERROR);
    assert_eq!(code(&table, "ghost.shop.svc.cluster.local", kind::A), rcode::SERVFAIL);
    assert_eq!(code(&table, "cluster.local", kind::SOA), rcode::NOERROR);
}

/// RFC 8020: a resolver that knows that a name is missing knows that all below it are.
#[test]
fn what_has_something_below_it_is_not_missing() {
    let table = table(true);
    for there in ["_tcp.web.shop", "_tcp.many.shop", "shop"] {
        assert_eq!(code(&table, &format!("{there}.svc.cluster.local"), kind::A), rcode::NOERROR, "{there}");
    }
    for missing in ["_udp.web.shop", "_tcp.ghost.shop", "_sctp.many.shop"] {
        assert_eq!(code(&table, &format!("{missing}.svc.cluster.local"), kind::A), rcode::NXDOMAIN, "{missing}");
    }
    assert_eq!(code(&table, "dns.cluster.local", kind::A), rcode::NOERROR);
    assert_eq!(code(&table, "ns.dns.cluster.local", kind::A), rcode::NOERROR);
}

#[test]
fn other_classes_are_refused() {
    let table = table(true);
    for name in ["web.shop.svc.cluster.local", "version.bind"] {
        let chaos = 3;
        let (flags, _) = ask(&mut Answerer::new(zone()), &table, name, kind::TXT, chaos, Via::Udp);
        assert_eq!(flags & flag::RCODE, rcode::REFUSED);
    }
}

#[test]
fn every_endpoint_is_first_in_turn_and_large_sets_are_cut_between_records() {
    let (table, mut answerer) = (table(true), Answerer::new(zone()));
    let name = "many.shop.svc.cluster.local";
    let mut firsts = std::collections::BTreeSet::new();
    for via in [Via::Udp, Via::Tcp, Via::Udp] {
        let (flags, out) = ask(&mut answerer, &table, name, kind::A, class::IN, via);
        assert!(flags & flag::TC != 0, "5000 do not fit anywhere");
        let records: Vec<_> = Records::new(&out).unwrap().map(Result::unwrap).collect();
        assert_eq!(records.last().unwrap().data.end, out.len());
        assert!(out.len() <= if via == Via::Udp { 512 } else { TCP_MAX });
        firsts.insert(out[records[0].data.clone()].to_vec());
    }
    assert_eq!(firsts.len(), 3);
    let (flags, out) = ask(&mut answerer, &table, &format!("_http._tcp.{name}"), kind::SRV, class::IN, Via::Tcp);
    assert!(flags & flag::TC != 0 && Records::new(&out).unwrap().all(|r| r.is_ok()));
}

#[test]
fn the_nearest_endpoints_are_told_first_and_equals_in_turn() {
    let mut table = table(true);
    for (name, zone) in [("edge-1", "hall"), ("edge-2", "hall"), ("edge-3", "yard")] {
        let node = NodeInfo { name: name.into(), addresses: vec![], zone: Some(zone.into()) };
        table.apply(Change::Apply(Source::Api, Object::Node(node)));
    }
    let Change::Apply(source, Object::Slice(mut near)) = slice("near", 6) else { unreachable!() };
    // .0 is nobody's, .1 says its zone itself
    let nodes = [None, Some("edge-3"), Some("edge-3"), Some("edge-1"), Some("edge-2"), Some("edge-1")];
    near.endpoints.iter_mut().zip(nodes).for_each(|(e, node)| e.node = node.map(Into::into));
    near.endpoints[1].zone = Some("hall".into());
    table.apply(service("near", ServiceKind::Headless, &[]));
    table.apply(Change::Apply(source, Object::Slice(near)));
    let mut zone = zone();
    zone.here.node = "edge-1".into();
    let mut answerer = Answerer::new(zone);
    let mut told = std::collections::BTreeSet::new();
    for _ in 0..4 {
        let name = "near.shop.svc.cluster.local";
        let (_, out) = ask(&mut answerer, &table, name, kind::A, class::IN, Via::Udp);
        let last: Vec<u8> = Records::new(&out).unwrap().map(|r| out[r.unwrap().data.end - 1]).collect();
        let mut groups = [last[..2].to_vec(), last[2..4].to_vec(), last[4..].to_vec()];
        groups.iter_mut().for_each(|g| g.sort_unstable());
        assert_eq!(groups, [[3, 5], [1, 4], [0, 2]], "{last:?}");
        told.insert(last);
    }
    assert_eq!(told.len(), 2, "in turn");
}

#[test]
fn verified_pods_come_and_go() {
    let mut table = table(true);
    let mut zone = zone();
    zone.pods = PodNames::Verified;
    let mut answerer = Answerer::new(zone);
    let mut code = |table: &Table, name: &str| {
        ask(&mut answerer, table, &format!("{name}.pod.cluster.local"), kind::A, class::IN, Via::Udp).0 & flag::RCODE
    };
    let pod = |addresses: &[IpAddr]| {
        let id = PodId { namespace: "idle".into(), name: "p".into() };
        Change::Apply(Source::Api, Object::Pod(Pod { id, addresses: addresses.into() }))
    };
    assert_eq!(code(&table, "10-244-0-1.idle"), rcode::NXDOMAIN);
    assert!(table.apply(pod(&[[10, 244, 0, 1].into()])));
    assert_eq!(code(&table, "10-244-0-1.idle"), rcode::NOERROR);
    assert_eq!(code(&table, "idle"), rcode::NOERROR, "a namespace with nothing but pods");
    assert_eq!(code(&table, "10-244-0-1.shop"), rcode::NXDOMAIN);
    assert!(table.apply(pod(&[])), "it has ended");
    assert_eq!(code(&table, "10-244-0-1.idle"), rcode::NXDOMAIN);
}

#[test]
fn a_chain_of_cnames_ends() {
    let table = table(true);
    let (flags, out) =
        ask(&mut Answerer::new(zone()), &table, "chain-0.shop.svc.cluster.local", kind::A, class::IN, Via::Tcp);
    let records = Records::new(&out).unwrap().map(Result::unwrap).filter(|r| r.kind == kind::CNAME).count();
    assert_eq!((flags & flag::RCODE, records), (rcode::NOERROR, CHAIN_MAX + 1));
}

#[test]
fn external_addresses_are_not_told_by_reverse_names() {
    let mut out = Vec::new();
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend_from_slice(&encode_name("7.100.51.198.in-addr.arpa").unwrap());
    query.extend_from_slice(&[0, 12, 0, 1]);
    let outcome = Answerer::new(zone()).reply(&query, Via::Udp, &table(true), &mut out);
    assert_eq!(outcome, Outcome::Forward);
}

#[test]
fn an_endpoint_is_found_by_its_address_as_we_write_it_and_no_other_way() {
    let mut table = table(true);
    let Change::Apply(source, Object::Slice(mut slice)) = slice("many", 3) else { panic!() };
    slice.endpoints[0].address = "fd00:244::31".parse().unwrap();
    slice.endpoints[1].address = "::ffff:10.1.2.3".parse().unwrap();
    slice.endpoints[2].hostname = Some("10-1-2-9".into());
    table.apply(Change::Apply(source, Object::Slice(slice)));
    for (label, kind, want) in [
        ("fd00-244--31", kind::AAAA, rcode::NOERROR),
        ("FD00-244--31", kind::AAAA, rcode::NOERROR),
        ("fd00-0244--31", kind::AAAA, rcode::NXDOMAIN),
        ("10-1-2-3", kind::A, rcode::NOERROR),
        ("10-1-2-9", kind::A, rcode::NOERROR),
        ("10-244-0-2", kind::A, rcode::NXDOMAIN),
    ] {
        assert_eq!(code(&table, &format!("{label}.many.shop.svc.cluster.local"), kind), want, "{label}");
    }
}
