//! What is read of Kubernetes' objects. Everything may be absent or null.

#![allow(clippy::question_mark, reason = "what the derive writes")]

use nanoserde::{DeJson, DeJsonErr, DeJsonState, DeJsonTok};
use std::str::Chars;

/// The keys that the types below have, at any depth, for the scanner; sorted.
pub const KEEP: &[&str] = &[
    "address",
    "addressType",
    "addresses",
    "annotations",
    "apiVersion",
    "clientIP",
    "clusterIP",
    "clusterIPs",
    "code",
    "conditions",
    "continue",
    "creationTimestamp",
    "deletionTimestamp",
    "endpoints",
    "exportTo",
    "externalIPs",
    "externalName",
    "externalTrafficPolicy",
    "forNodes",
    "forZones",
    "hints",
    "host",
    "hostname",
    "ingress",
    "internalTrafficPolicy",
    "ip",
    "ipMode",
    "k8s.io/initial-events-end",
    "kind",
    "kubernetes.io/service-name",
    "labels",
    "loadBalancer",
    "message",
    "metadata",
    "name",
    "namespace",
    "nodeName",
    "nodePort",
    "notReadyAddresses",
    "object",
    "phase",
    "podIP",
    "podIPs",
    "port",
    "ports",
    "protocol",
    "ready",
    "reason",
    "resourceVersion",
    "service.edgemesh.kubeedge.io/service-proxy-name",
    "service.kubernetes.io/headless",
    "service.kubernetes.io/service-proxy-name",
    "serving",
    "sessionAffinity",
    "sessionAffinityConfig",
    "spec",
    "status",
    "subsets",
    "targetRef",
    "terminating",
    "timeoutSeconds",
    "topology.kubernetes.io/zone",
    "trafficPolicy",
    "type",
    "uid",
    "workloadSelector",
    "zone",
];

/// A whole number, also where it is written as `8e1` or `80.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int(pub i64);

impl DeJson for Int {
    fn de_json(s: &mut DeJsonState, i: &mut Chars) -> Result<Self, DeJsonErr> {
        /// Whole numbers up to here are exact in an f64.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        let value = match s.tok {
            DeJsonTok::U64(n) => i64::try_from(n).ok(),
            DeJsonTok::I64(n) => Some(n),
            #[expect(clippy::cast_possible_truncation, reason = "it is whole and within bounds")]
            DeJsonTok::F64(n) if n.fract() == 0.0 && n.abs() <= EXACT => Some(n as i64),
            _ => None,
        };
        let value = value.ok_or_else(|| s.err_token("a whole number"))?;
        s.next_tok(i)?;
        Ok(Self(value))
    }
}

/// What says which object it is.
#[derive(Debug, Default, DeJson)]
pub struct Head {
    #[nserde(rename = "apiVersion")]
    pub api_version: Option<String>,
    pub kind: Option<String>,
    pub metadata: Option<Meta>,
}

#[derive(Debug, Default, DeJson)]
pub struct Meta {
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub uid: Option<String>,
    #[nserde(rename = "resourceVersion")]
    pub version: Option<String>,
    /// Of a list: the next page begins here.
    #[nserde(rename = "continue")]
    pub next: Option<String>,
    pub annotations: Option<Annotations>,
}

#[derive(Debug, Default, DeJson)]
pub struct Annotations {
    /// Of a bookmark: what there was when the watch began has been sent.
    #[nserde(rename = "k8s.io/initial-events-end")]
    pub initial_events_end: Option<String>,
}

/// What is read of a `Status`, the API server's error.
#[derive(Debug, Default, DeJson)]
pub struct Status {
    pub message: Option<String>,
    pub reason: Option<String>,
    pub code: Option<Int>,
}

#[derive(Debug, Default, DeJson)]
pub struct Labelled {
    pub labels: Option<Labels>,
}

#[derive(Debug, Default, DeJson)]
pub struct Labels {
    #[nserde(rename = "kubernetes.io/service-name")]
    pub service_name: Option<String>,
    #[nserde(rename = "service.kubernetes.io/service-proxy-name")]
    pub proxy_name: Option<String>,
    /// EdgeMesh's own, whose mere presence says the same there.
    #[nserde(rename = "service.edgemesh.kubeedge.io/service-proxy-name")]
    pub edgemesh_proxy: Option<String>,
    #[nserde(rename = "service.kubernetes.io/headless")]
    pub headless: Option<String>,
    #[nserde(rename = "topology.kubernetes.io/zone")]
    pub zone: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct Service {
    pub metadata: Option<Labelled>,
    pub spec: Option<ServiceSpec>,
    pub status: Option<ServiceStatus>,
}

#[derive(Debug, Default, DeJson)]
pub struct ServiceSpec {
    #[nserde(rename = "type")]
    pub kind: Option<String>,
    #[nserde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[nserde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    #[nserde(rename = "externalIPs")]
    pub external_ips: Option<Vec<String>>,
    #[nserde(rename = "externalName")]
    pub external_name: Option<String>,
    pub ports: Option<Vec<ServicePort>>,
    #[nserde(rename = "sessionAffinity")]
    pub affinity: Option<String>,
    #[nserde(rename = "sessionAffinityConfig")]
    pub affinity_config: Option<AffinityConfig>,
    #[nserde(rename = "internalTrafficPolicy")]
    pub internal_policy: Option<String>,
    #[nserde(rename = "externalTrafficPolicy")]
    pub external_policy: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct ServicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<Int>,
    #[nserde(rename = "nodePort")]
    pub node_port: Option<Int>,
}

#[derive(Debug, Default, DeJson)]
pub struct AffinityConfig {
    #[nserde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

#[derive(Debug, Default, DeJson)]
pub struct ClientIp {
    #[nserde(rename = "timeoutSeconds")]
    pub timeout: Option<Int>,
}

#[derive(Debug, Default, DeJson)]
pub struct ServiceStatus {
    #[nserde(rename = "loadBalancer")]
    pub load_balancer: Option<LoadBalancer>,
}

#[derive(Debug, Default, DeJson)]
pub struct LoadBalancer {
    pub ingress: Option<Vec<Ingress>>,
}

#[derive(Debug, Default, DeJson)]
pub struct Ingress {
    pub ip: Option<String>,
    #[nserde(rename = "ipMode")]
    pub ip_mode: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct EndpointSlice {
    pub metadata: Option<Labelled>,
    #[nserde(rename = "addressType")]
    pub address_type: Option<String>,
    pub endpoints: Option<Vec<Endpoint>>,
    pub ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Default, DeJson)]
pub struct Endpoint {
    pub addresses: Option<Vec<String>>,
    pub conditions: Option<Conditions>,
    pub hostname: Option<String>,
    #[nserde(rename = "nodeName")]
    pub node: Option<String>,
    pub zone: Option<String>,
    #[nserde(rename = "targetRef")]
    pub target: Option<TargetRef>,
    pub hints: Option<Hints>,
}

#[derive(Debug, Default, DeJson)]
pub struct Hints {
    #[nserde(rename = "forZones")]
    pub zones: Option<Vec<Named>>,
    #[nserde(rename = "forNodes")]
    pub nodes: Option<Vec<Named>>,
}

#[derive(Debug, Default, DeJson)]
pub struct Named {
    pub name: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Debug, Default, DeJson)]
pub struct TargetRef {
    pub kind: Option<String>,
    pub name: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct EndpointPort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<Int>,
}

#[derive(Debug, Default, DeJson)]
pub struct Endpoints {
    pub subsets: Option<Vec<Subset>>,
}

#[derive(Debug, Default, DeJson)]
pub struct Subset {
    pub addresses: Option<Vec<SubsetAddress>>,
    #[nserde(rename = "notReadyAddresses")]
    pub not_ready: Option<Vec<SubsetAddress>>,
    pub ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Default, DeJson)]
pub struct SubsetAddress {
    pub ip: Option<String>,
    pub hostname: Option<String>,
    #[nserde(rename = "nodeName")]
    pub node: Option<String>,
    #[nserde(rename = "targetRef")]
    pub target: Option<TargetRef>,
}

#[derive(Debug, Default, DeJson)]
pub struct Node {
    pub metadata: Option<Labelled>,
    pub status: Option<NodeStatus>,
}

#[derive(Debug, Default, DeJson)]
pub struct NodeStatus {
    pub addresses: Option<Vec<NodeAddress>>,
}

#[derive(Debug, Default, DeJson)]
pub struct Pod {
    pub metadata: Option<PodMeta>,
    pub status: Option<PodStatus>,
}

#[derive(Debug, Default, DeJson)]
pub struct PodMeta {
    #[nserde(rename = "deletionTimestamp")]
    pub deleted: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct PodStatus {
    pub phase: Option<String>,
    #[nserde(rename = "podIP")]
    pub ip: Option<String>,
    #[nserde(rename = "podIPs")]
    pub ips: Option<Vec<PodIp>>,
}

#[derive(Debug, Default, DeJson)]
pub struct PodIp {
    pub ip: Option<String>,
}

#[derive(Debug, Default, DeJson)]
pub struct NodeAddress {
    #[nserde(rename = "type")]
    pub kind: Option<String>,
    pub address: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_for_the_search() {
        assert!(KEEP.is_sorted());
    }

    #[test]
    fn whole_numbers_in_all_their_forms() {
        let int = |text: &str| ClientIp::deserialize_json(&format!("{{\"timeoutSeconds\":{text}}}")).ok();
        for (text, value) in [("80", 80), ("-1", -1), ("8e1", 80), ("80.0", 80), ("9223372036854775807", i64::MAX)] {
            assert_eq!(int(text).and_then(|c| c.timeout), Some(Int(value)), "{text}");
        }
        assert_eq!(int("null").map(|c| c.timeout), Some(None));
        for text in ["\"80\"", "80.5", "9223372036854775808", "18446744073709551615", "1e300", "true", "[]"] {
            assert!(int(text).is_none(), "{text}");
        }
    }
}
