//! The conformance table's fixture: its objects as the table has them, and its upstream.

use crate::{dns_world, json::Json};
use simple_dns::{Packet, PacketFlag, TYPE};
use std::net::IpAddr;
use weft::{
    dns::forward::Transport,
    table::model::{
        Affinity, Endpoint, Name, Pod, PodId, Protocol, Service, ServiceId, ServiceKind, ServicePort, Slice, SliceId,
        SlicePort,
    },
};

pub(crate) struct FakeUpstream {
    pub(crate) names: Json,
    pub(crate) dead: bool,
    pub(crate) hits: u64,
}

impl FakeUpstream {
    pub(crate) fn answer(&mut self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let query = Packet::parse(query).unwrap();
        let question = query.questions[0].clone();
        if question.qtype == TYPE::HINFO.into() {
            return None; // a probe of an upstream that said nothing
        }
        if transport == Transport::Udp {
            self.hits += 1;
        }
        let name = format!("{}.", question.qname).to_ascii_lowercase();
        let entry = &self.names[name.as_str()];
        if self.dead || entry["drop"].is_true() {
            return None;
        }
        let mut reply = Packet::new_reply(query.id());
        reply.set_flags(PacketFlag::RECURSION_AVAILABLE | PacketFlag::RECURSION_DESIRED);
        *reply.opt_mut() = query.opt().cloned();
        reply.questions.push(question.clone());
        if let Some(code) = entry["rcode"].number() {
            *reply.rcode_mut() = (code as u16).into();
            return Some(reply.build_bytes_vec_compressed().unwrap());
        }
        if entry["tc_udp"].is_true() && transport == Transport::Udp {
            reply.set_flags(PacketFlag::TRUNCATION);
            return Some(reply.build_bytes_vec_compressed().unwrap());
        }
        let mut records = Vec::new();
        let (mut owner, mut at) = (name.clone(), entry);
        if let Json::Text(target) = &at["CNAME"] {
            records.push(dns_world::record(&owner, TYPE::CNAME, target));
            (owner, at) = (target.clone(), &self.names[target.as_str()]);
        }
        let simple_dns::QTYPE::TYPE(asked) = question.qtype else { panic!("{question:?}") };
        for (key, kind) in [("A", TYPE::A), ("AAAA", TYPE::AAAA), ("PTR", TYPE::PTR), ("TXT", TYPE::TXT)] {
            if kind == asked {
                for data in at[key].list() {
                    let data = if let Json::List(parts) = data { parts[0].text() } else { data.text() };
                    records.push(dns_world::record(&owner, kind, data));
                }
            }
        }
        if entry.is_null() {
            *reply.rcode_mut() = simple_dns::RCODE::NameError;
        }
        if records.is_empty() {
            reply.name_servers.push(dns_world::record("example.com.", TYPE::SOA, "60"));
        }
        reply.answers = records;
        Some(reply.build_bytes_vec_compressed().unwrap())
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.into()
}

/// `name:port/PROTO`.
fn port(text: &str) -> (Name, u16, Protocol) {
    let (port, protocol) = text.split_once('/').unwrap();
    let (label, number) = port.split_once(':').unwrap();
    let protocol = match protocol {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("{other}"),
    };
    (name(label), number.parse().unwrap(), protocol)
}

fn addresses(list: &Json) -> Vec<IpAddr> {
    list.list().iter().filter(|i| i.text() != "None").map(|i| i.text().parse().unwrap()).collect()
}

pub(crate) fn service(s: &Json) -> Service {
    let ips = s["ips"].list();
    let kind = if s["type"] == Json::Text("ExternalName".into()) {
        ServiceKind::External(name(s["externalName"].text()))
    } else if ips.iter().any(|i| i.text() == "None") {
        ServiceKind::Headless
    } else {
        ServiceKind::ClusterIp
    };
    let external = [addresses(&s["lb"]), addresses(&s["externalIPs"])].concat();
    let ports = s["ports"].list().iter().map(|p| {
        let (name, number, protocol) = port(p.text());
        ServicePort { name, number, protocol, node_port: 0 }
    });
    Service {
        id: ServiceId { namespace: name(s["ns"].text()), name: name(s["name"].text()) },
        kind,
        vips: addresses(&s["ips"]).into(),
        external_ips: external.into(),
        ports: ports.collect(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    }
}

pub(crate) fn slice(s: &Json) -> Slice {
    let family = if s["family"] == Json::Text("IPv6".into()) { "ipv6" } else { "ipv4" };
    let default = format!("{}-{family}", s["svc"].text());
    let own = if s.has("slice") { s["slice"].text() } else { &default };
    let ports = s["ports"].list().iter().map(|p| {
        let (name, number, protocol) = port(p.text());
        SlicePort { name, number, protocol }
    });
    Slice {
        id: SliceId { namespace: name(s["ns"].text()), name: name(own) },
        service: name(s["svc"].text()),
        ports: ports.collect(),
        endpoints: s["eps"].list().iter().flat_map(endpoints).collect(),
    }
}

pub(crate) fn pod(p: &Json) -> Pod {
    let id = PodId { namespace: name(p["ns"].text()), name: name(p["name"].text()) };
    Pod { id, addresses: vec![p["ip"].text().parse().unwrap()] }
}

fn endpoints(e: &Json) -> Vec<Endpoint> {
    let plain = |address: IpAddr| Endpoint {
        address,
        hostname: None,
        node: None,
        zone: None,
        pod: None,
        hints: None,
        ready: true,
        serving: true,
        terminating: false,
    };
    if let Json::Text(address) = e {
        return vec![plain(address.parse().unwrap())];
    }
    if let [first, count] = e["range"].list() {
        let first: std::net::Ipv4Addr = first.text().parse().unwrap();
        let all = 0..count.number().unwrap() as u32;
        return all.map(|i| plain(std::net::Ipv4Addr::from_bits(first.to_bits() + i).into())).collect();
    }
    let text = |key: &str| e.has(key).then(|| name(e[key].text()));
    vec![Endpoint {
        hostname: text("hostname"),
        pod: text("pod"),
        ready: e["ready"] != Json::Bool(false),
        serving: e["serving"] != Json::Bool(false),
        terminating: e["terminating"].is_true(),
        ..plain(e["ip"].text().parse().unwrap())
    }]
}
