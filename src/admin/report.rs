//! The table as the views show it.

use super::view;
use crate::{
    config::Policy,
    table::{
        Table,
        balance::{Fared, Here},
        model::{Affinity, Protocol, Service, ServiceId, ServiceKind, ServicePort},
        rule::Choice,
    },
};
use std::net::SocketAddr;

/// Rules that are named among the warnings; of those beyond the number is said.
const RULES_MAX: usize = 8;

/// What the proxy knows beside the table.
pub struct Proxied<'p> {
    pub policy: Policy,
    pub here: &'p Here,
    pub fared: &'p super::HowFared,
}

/// Every Service, without its endpoints.
#[must_use]
pub fn services(table: &Table, proxied: &Proxied<'_>) -> view::Services {
    view::Services { services: table.services().map(|s| service(table, s, proxied)).collect() }
}

/// The Services of a name, with their endpoints: `namespace/name`, `name.namespace` (what follows is of no account,
/// as in web.shop.svc.cluster.local), or a name, in whichever namespaces it is.
#[must_use]
pub fn named(table: &Table, name: &str, proxied: &Proxied<'_>) -> view::Services {
    let found: Vec<&Service> = match name.split_once('/').map(|(ns, n)| (n, ns)).or_else(|| name.split_once('.')) {
        Some((name, rest)) => {
            let namespace = rest.split('.').next().unwrap_or_default();
            table.service(namespace, name).into_iter().collect()
        }
        None => table.services().filter(|s| &*s.id.name == name).collect(),
    };
    let full =
        |s: &Service| view::Service { endpoints: Some(endpoints(table, s, proxied)), ..service(table, s, proxied) };
    view::Services { services: found.into_iter().map(full).collect() }
}

/// Services, endpoints and nodes.
#[must_use]
pub fn counts(table: &Table) -> (usize, usize, usize) {
    let endpoints = table.services().map(|s| table.endpoints(&s.id).count()).sum();
    (table.services().count(), endpoints, table.nodes().count())
}

/// DestinationRules that say what we do not do.
#[must_use]
pub fn rules(table: &Table) -> Vec<String> {
    let mut out = Vec::new();
    let mut more = 0;
    for rule in table.rules() {
        let ServiceId { namespace, name } = &rule.id;
        let service = rule.host.as_ref().and_then(|host| table.service_by_id(host));
        let is_sticky = service.is_some_and(|s| s.affinity != Affinity::None) && rule.traffic.choice.is_some();
        if rule.not_done.is_empty() && !is_sticky {
            continue;
        }
        more += 1;
        if out.len() < RULES_MAX {
            more -= 1;
            let no = if is_sticky { "loadBalancer (the Service's own affinity wins)" } else { "" };
            let comma = if is_sticky && !rule.not_done.is_empty() { ", " } else { "" };
            out.push(format!("DestinationRule {namespace}/{name}: not done here: {no}{comma}{}", rule.not_done));
        }
    }
    if more > 0 {
        out.push(format!("{more} more DestinationRules say what is not done here"));
    }
    out
}

/// In words.
fn policy(table: &Table, s: &Service, port: &ServicePort, usual: Policy) -> String {
    if s.affinity != Affinity::None {
        return "sticky".into();
    }
    match (table.traffic(&s.id, port).and_then(|t| t.choice.as_ref()), usual) {
        (Some(Choice::Header(name)), _) => format!("hash of {name}"),
        (Some(Choice::SourceIp), _) => "hash of the client's address".into(),
        (Some(Choice::RoundRobin), _) | (None, Policy::RoundRobin) => "round-robin".into(),
        (Some(Choice::Random), _) | (None, Policy::Random) => "random".into(),
        (Some(Choice::LeastRequest), _) | (None, Policy::LeastRequest) => "least-request".into(),
        (None, Policy::Sticky) => "sticky".into(),
    }
}

fn service(table: &Table, s: &Service, proxied: &Proxied<'_>) -> view::Service {
    let (kind, target) = match &s.kind {
        ServiceKind::ClusterIp => ("ClusterIP", None),
        ServiceKind::Headless => ("Headless", None),
        ServiceKind::External(name) => ("ExternalName", Some(name.to_string())),
    };
    let rule = table.rule_of(&s.id);
    let text = |ips: &[std::net::IpAddr]| ips.iter().map(ToString::to_string).collect();
    view::Service {
        namespace: s.id.namespace.to_string(),
        name: s.id.name.to_string(),
        kind: kind.into(),
        ips: text(&s.vips),
        external_ips: text(&s.external_ips),
        ports: s
            .ports
            .iter()
            .map(|p| view::Port {
                name: p.name.to_string(),
                port: p.number,
                protocol: match p.protocol {
                    Protocol::Tcp => "TCP",
                    Protocol::Udp => "UDP",
                    Protocol::Sctp => "SCTP",
                }
                .into(),
                policy: policy(table, s, p, proxied.policy),
            })
            .collect(),
        ready: table.endpoints(&s.id).filter(|(_, e)| e.ready).count(),
        total: table.endpoints(&s.id).count(),
        sticky_secs: match s.affinity {
            Affinity::None => None,
            Affinity::ClientIp { timeout } => Some(timeout.as_secs()),
        },
        rule: rule.map(|r| format!("{}/{}", r.id.namespace, r.id.name)),
        not_done: rule.map(|r| r.not_done.to_string()).filter(|n| !n.is_empty()),
        target,
        endpoints: None,
    }
}

fn endpoints(table: &Table, s: &Service, proxied: &Proxied<'_>) -> Vec<view::Endpoint> {
    let endpoint = |(slice, e): (_, crate::table::packed::EndpointRef<'_>)| {
        let (mut ports, mut all) = (Vec::new(), Fared::default());
        for port in &*s.ports {
            let number = Table::target_port(slice, &port.name, port.protocol);
            ports.push(number.unwrap_or(0));
            let id = (s.id.clone(), port.number, port.protocol);
            if let Some(one) = number.and_then(|n| (proxied.fared)(&id, SocketAddr::new(e.address, n))) {
                all.live += one.live;
                all.connections = all.connections.wrapping_add(one.connections);
                all.failed = all.failed.wrapping_add(one.failed);
                all.ejected = all.ejected.max(one.ejected);
                all.is_silent |= one.is_silent;
            }
        }
        view::Endpoint {
            address: e.address.to_string(),
            ports,
            node: e.node.as_deref().map(Into::into),
            zone: table.zone_of(e.about()).map(Into::into),
            near: table.how_near(proxied.here, e).into(),
            hostname: e.hostname.as_deref().map(Into::into),
            ready: e.ready,
            terminating: e.terminating,
            ejected_secs: all.ejected.map(|left| left.as_secs().max(1)),
            silent: all.is_silent,
            live: all.live,
            connections: all.connections,
            failures: all.failed,
        }
    };
    table.endpoints(&s.id).map(endpoint).collect()
}
