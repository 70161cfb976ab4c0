//! The table as the views show it.

use super::view;
use crate::table::{
    Table,
    model::{Affinity, Protocol, Service, ServiceKind},
};

/// Every Service, without its endpoints.
#[must_use]
pub fn services(table: &Table) -> view::Services {
    view::Services { services: table.services().map(|s| service(table, s)).collect() }
}

/// The Services of a name, with their endpoints: `namespace/name`, `name.namespace` (what follows is of no account,
/// as in web.shop.svc.cluster.local), or a name, in whichever namespaces it is.
#[must_use]
pub fn named(table: &Table, name: &str) -> view::Services {
    let found: Vec<&Service> = match name.split_once('/').map(|(ns, n)| (n, ns)).or_else(|| name.split_once('.')) {
        Some((name, rest)) => {
            let namespace = rest.split('.').next().unwrap_or_default();
            table.service(namespace, name).into_iter().collect()
        }
        None => table.services().filter(|s| &*s.id.name == name).collect(),
    };
    let full = |s: &Service| view::Service { endpoints: Some(endpoints(table, s)), ..service(table, s) };
    view::Services { services: found.into_iter().map(full).collect() }
}

/// Services, endpoints and nodes.
#[must_use]
pub fn counts(table: &Table) -> (usize, usize, usize) {
    let endpoints = table.services().map(|s| table.endpoints(&s.id).count()).sum();
    (table.services().count(), endpoints, table.nodes().count())
}

fn service(table: &Table, s: &Service) -> view::Service {
    let (kind, target) = match &s.kind {
        ServiceKind::ClusterIp => ("ClusterIP", None),
        ServiceKind::Headless => ("Headless", None),
        ServiceKind::External(name) => ("ExternalName", Some(name.to_string())),
    };
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
            })
            .collect(),
        ready: table.endpoints(&s.id).filter(|(_, e)| e.ready).count(),
        total: table.endpoints(&s.id).count(),
        sticky_secs: match s.affinity {
            Affinity::None => None,
            Affinity::ClientIp { timeout } => Some(timeout.as_secs()),
        },
        target,
        endpoints: None,
    }
}

fn endpoints(table: &Table, s: &Service) -> Vec<view::Endpoint> {
    let port =
        |slice, p: &crate::table::model::ServicePort| Table::target_port(slice, &p.name, p.protocol).unwrap_or(0);
    table
        .endpoints(&s.id)
        .map(|(slice, e)| view::Endpoint {
            address: e.address.to_string(),
            ports: s.ports.iter().map(|p| port(slice, p)).collect(),
            node: e.node.as_deref().map(Into::into),
            hostname: e.hostname.as_deref().map(Into::into),
            ready: e.ready,
            terminating: e.terminating,
        })
        .collect()
}
