//! `[[service]]` of the config -> changes of [`Source::Config`].

use super::model::{
    Affinity, Change, Endpoint, Object, Service, ServiceId, ServiceKind, ServicePort, Slice, SliceId, SlicePort, Source,
};
use crate::config::StaticService;
use crate::sorted::Map;
use std::time::Duration;

/// One complete list.
pub fn changes(services: &[StaticService]) -> impl Iterator<Item = Change> + '_ {
    let objects = services.iter().flat_map(|s| std::iter::once(Object::Service(service(s))).chain(slices(s)));
    std::iter::once(Change::Begin(Source::Config))
        .chain(objects.map(|o| Change::Apply(Source::Config, o)))
        .chain(std::iter::once(Change::Complete(Source::Config)))
}

fn id(of: &StaticService) -> ServiceId {
    ServiceId { namespace: of.namespace.as_str().into(), name: of.name.as_str().into() }
}

fn service(of: &StaticService) -> Service {
    Service {
        id: id(of),
        kind: if of.ip.is_some() { ServiceKind::ClusterIp } else { ServiceKind::Headless },
        vips: of.ip.into_iter().collect(),
        external_ips: [].into(),
        ports: of
            .ports
            .iter()
            .map(|p| ServicePort { name: p.name.as_str().into(), number: p.port, protocol: p.protocol, node_port: 0 })
            .collect(),
        affinity: of
            .sticky
            .map_or(Affinity::None, |seconds| Affinity::ClientIp { timeout: Duration::from_secs(seconds.into()) }),
        local_only: false,
        external_local: false,
        not_proxied: false,
    }
}

/// One slice for the endpoints on the ports' targets, and one for each port that endpoints have instead. A colon, which
/// no Service's name holds, keeps the names of the latter apart from those of other Services.
fn slices(of: &StaticService) -> impl Iterator<Item = Object> + '_ {
    let mut by_port: Map<Option<u16>, Vec<Endpoint>> = Map::new();
    for endpoint in &of.endpoints {
        by_port.or_insert_with(endpoint.port, Default::default).push(Endpoint {
            address: endpoint.address,
            hostname: endpoint.hostname.as_deref().map(Into::into),
            node: endpoint.node.as_deref().map(Into::into),
            zone: None,
            pod: None,
            hints: None,
            ready: true,
            serving: true,
            terminating: false,
        });
    }
    by_port.into_iter().map(move |(port, endpoints)| {
        let id = id(of);
        let name = port.map_or_else(|| id.name.clone(), |port| format!("{}:{port}", of.name).into());
        Object::Slice(Slice {
            id: SliceId { namespace: id.namespace, name },
            service: id.name,
            ports: of
                .ports
                .iter()
                .map(|p| SlicePort {
                    name: p.name.as_str().into(),
                    number: port.unwrap_or(p.target),
                    protocol: p.protocol,
                })
                .collect(),
            endpoints,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{StaticEndpoint, StaticPort},
        table::{Table, model::Protocol},
    };

    #[test]
    fn a_static_service_with_an_endpoint_on_a_port_of_its_own() {
        let endpoint = |address: &str, port| StaticEndpoint {
            address: address.parse().unwrap(),
            port,
            node: Some("edge-1".into()),
            hostname: None,
        };
        let services = [StaticService {
            name: "web".into(),
            namespace: "shop".into(),
            ip: Some("10.96.0.10".parse().unwrap()),
            ports: vec![StaticPort { name: "http".into(), port: 80, target: 8080, protocol: Protocol::Tcp }],
            endpoints: vec![endpoint("10.1.0.1", None), endpoint("10.1.0.2", Some(9090))],
            sticky: Some(60),
        }];
        let mut table = Table::default();
        changes(&services).for_each(|change| {
            table.apply(change);
        });
        assert!(table.synced());
        let web = table.by_vip("10.96.0.10".parse().unwrap()).unwrap();
        assert_eq!(web.affinity, Affinity::ClientIp { timeout: Duration::from_secs(60) });
        let targets: Vec<_> = table
            .endpoints(&web.id)
            .map(|(s, e)| format!("{}:{}", e.address, Table::target_port(s, "http", Protocol::Tcp).unwrap()))
            .collect();
        assert_eq!(targets, ["10.1.0.1:8080", "10.1.0.2:9090"]);
        assert!(changes(&[]).filter(|c| table.apply(c.clone())).count() > 0);
        assert_eq!(table.services().count(), 0);
    }
}
