//! `[[service]]`, with all that the API server would check.

use super::{
    ConfigError, StaticEndpoint, StaticPort, StaticService,
    raw::{RawEndpoint, RawPort, RawService},
    resolve::{Put, may_be_dialled},
};
use crate::sorted::{Map, Set};
use crate::{table::model::Protocol, tunnel::identity::node_name};
use std::net::IpAddr;
use toml::Spanned;

/// As many Services as the design's largest cluster has; more are refused.
const SERVICES_MAX: usize = 5_000;
/// Of one Service; Kubernetes' own slices hold up to 1,000 endpoints.
const ENDPOINTS_MAX: usize = 1_000;
/// Of one Service (Kubernetes: 100 in a slice).
const PORTS_MAX: usize = 100;
/// Kubernetes API, ClientIPConfig.timeoutSeconds: at most a day.
const STICKY_MAX: u32 = 86_400;

const LABEL: &str = "1 to 63 characters a-z, 0-9 and '-', first and last a letter or digit";
const PORT: &str = "a port from 1 to 65535";

/// `ours`: weft0's own address, which no Service may have.
pub(super) fn resolve(
    put: &Put<'_>,
    raw: Vec<Spanned<RawService>>,
    ours: IpAddr,
) -> Result<Vec<StaticService>, ConfigError> {
    if let Some(more) = raw.get(SERVICES_MAX) {
        return Err(put.error(more, "service", format!("more than {SERVICES_MAX} of them")));
    }
    let mut names = Set::new();
    let mut ips = Map::new();
    let mut out = Vec::with_capacity(raw.len());
    for raw in raw {
        let raw = raw.into_inner();
        let (at_name, at_ip) = (raw.name.clone(), raw.ip.clone());
        let service = one(put, raw)?;
        let full = format!("{}/{}", service.namespace, service.name);
        if !names.insert(full.clone()) {
            return Err(put.error(&at_name, "service.name", format!("{full} is there twice")));
        }
        if let (Some(ip), Some(at)) = (service.ip, at_ip) {
            if ip == ours {
                return Err(put.error(&at, "service.ip", format!("{ip} is weft0's own address (dns.listen)")));
            }
            if let Some(other) = ips.insert(ip, full) {
                return Err(put.error(&at, "service.ip", format!("{ip} is {other}'s already")));
            }
        }
        out.push(service);
    }
    Ok(out)
}

fn one(put: &Put<'_>, raw: RawService) -> Result<StaticService, ConfigError> {
    let name = put.parse("service.name", &raw.name, LABEL, |s| label(s))?;
    let mut namespace = "default".to_owned();
    put.value(&mut namespace, "service.namespace", raw.namespace, LABEL, |s| label(s))?;

    let mut ip = None;
    put.value(&mut ip, "service.ip", raw.ip, "an IP address; none for a headless Service", |s| {
        s.parse().ok().filter(|ip: &IpAddr| may_be_dialled(*ip) && !ip.is_loopback()).map(Some)
    })?;
    let mut sticky = None;
    put.value(&mut sticky, "service.sticky", raw.sticky, "a number of seconds from 1 to 86400", |n| {
        u32::try_from(*n).ok().filter(|n| (1..=STICKY_MAX).contains(n)).map(Some)
    })?;

    if raw.ports.is_empty() {
        let what = format!("{namespace}/{name} has none; expected ports = [{{ port = 80 }}]");
        return Err(put.error(&raw.name, "service.ports", what));
    }
    let ports = ports(put, &raw.ports)?;

    if let Some(more) = raw.endpoints.get(ENDPOINTS_MAX) {
        return Err(put.error(more, "service.endpoints", format!("more than {ENDPOINTS_MAX} of them")));
    }
    let mut seen = Set::new();
    let mut endpoints = Vec::with_capacity(raw.endpoints.len());
    for raw in raw.endpoints {
        let endpoint = endpoint(put, raw.get_ref(), ip)?;
        if !seen.insert((endpoint.address, endpoint.port)) {
            let what = format!("{} is there twice", endpoint.address);
            return Err(put.error(&raw.get_ref().address, "service.endpoints.address", what));
        }
        endpoints.push(endpoint);
    }
    Ok(StaticService { name, namespace, ip, ports, endpoints, sticky })
}

fn ports(put: &Put<'_>, raw: &[Spanned<RawPort>]) -> Result<Vec<StaticPort>, ConfigError> {
    if let Some(more) = raw.get(PORTS_MAX) {
        return Err(put.error(more, "service.ports", format!("more than {PORTS_MAX} of them")));
    }
    let (mut names, mut numbers) = (Set::new(), Set::new());
    let mut out = Vec::with_capacity(raw.len());
    for at in raw {
        let raw = at.get_ref();
        let mut name = String::new();
        put.value(&mut name, "service.ports.name", raw.name.clone(), LABEL, |s| label(s))?;
        let port = put.parse("service.ports.port", &raw.port, PORT, number)?;
        let target = optional(put, "service.ports.target", raw.target.as_ref())?.unwrap_or(port);
        let mut protocol = Protocol::Tcp;
        put.value(
            &mut protocol,
            "service.ports.protocol",
            raw.protocol.clone(),
            "\"TCP\", \"UDP\" or \"SCTP\"",
            |s| match s.to_ascii_lowercase().as_str() {
                "tcp" => Some(Protocol::Tcp),
                "udp" => Some(Protocol::Udp),
                "sctp" => Some(Protocol::Sctp),
                _ => None,
            },
        )?;
        if !numbers.insert((port, protocol)) {
            return Err(put.error(&raw.port, "service.ports.port", format!("{port} is there twice")));
        }
        if !names.insert(name.clone()) {
            let what = if name.is_empty() {
                "with several ports each needs a name of its own".to_owned()
            } else {
                format!("{name:?} is there twice")
            };
            return match &raw.name {
                Some(at) => Err(put.error(at, "service.ports.name", what)),
                None => Err(put.error(at, "service.ports.name", what)),
            };
        }
        out.push(StaticPort { name, port, target, protocol });
    }
    Ok(out)
}

fn endpoint(put: &Put<'_>, raw: &RawEndpoint, vip: Option<IpAddr>) -> Result<StaticEndpoint, ConfigError> {
    let key = "service.endpoints.address";
    let address =
        put.parse(key, &raw.address, "an IP address", |s| s.parse().ok().filter(|ip: &IpAddr| may_be_dialled(*ip)))?;
    if vip.is_some_and(|vip| vip.is_ipv4() != address.is_ipv4()) {
        return Err(put.error(&raw.address, key, format!("{address} is not of the family of the Service's ip")));
    }
    if address.is_loopback() && raw.node.is_none() {
        return Err(put.error(
            &raw.address,
            key,
            format!("{address} is another on each node; say which: node = \"…\""),
        ));
    }
    let mut node = None;
    put.value(&mut node, "service.endpoints.node", raw.node.clone(), "a node's name", |s| {
        node_name(s).map(|s| Some(s.into()))
    })?;
    let mut hostname = None;
    put.value(&mut hostname, "service.endpoints.hostname", raw.hostname.clone(), LABEL, |s| label(s).map(Some))?;
    let port = optional(put, "service.endpoints.port", raw.port.as_ref())?;
    Ok(StaticEndpoint { address, port, node, hostname })
}

fn optional(put: &Put<'_>, key: &str, raw: Option<&Spanned<i64>>) -> Result<Option<u16>, ConfigError> {
    raw.map(|raw| put.parse(key, raw, PORT, number)).transpose()
}

fn number(n: &i64) -> Option<u16> {
    u16::try_from(*n).ok().filter(|n| *n != 0)
}

/// RFC 1123.
fn label(text: &str) -> Option<String> {
    node_name(text).filter(|l| !l.contains('.')).map(Into::into)
}
