//! What the agent tells: the JSON of the socket and of `--json`, and what the tables are made from.
// nanoserde's derive writes what clippy would write otherwise.
#![allow(clippy::question_mark)]

use nanoserde::{DeJson, SerJson};
use std::collections::BTreeMap;

/// The agent's answer where it has none.
#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Failure {
    pub error: String,
}

#[derive(Clone, Debug, Default, DeJson, PartialEq, SerJson)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub pid: u32,
    pub uptime_secs: u64,
    /// Whether every source of the table has given a complete list.
    pub synced: bool,
    pub sources: Vec<Source>,
    pub services: usize,
    pub endpoints: usize,
    pub nodes: usize,
    pub parts: Vec<Part>,
    pub relays: Vec<Relay>,
    /// What kind of NAT the relays see; empty: there is no tunnel.
    pub nat: String,
    /// Of a relay: what it carries.
    pub relaying: Option<Relaying>,
    /// Peers with a path.
    pub peers: usize,
    pub counters: BTreeMap<String, u64>,
    pub warnings: Vec<String>,
}

/// What feeds the table: `[[service]]`, a file of `[kube] manifests`, or a resource of the API.
#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Source {
    pub name: String,
    /// Whether what it holds now is in the table.
    pub synced: bool,
    pub objects: usize,
    /// For how long it is synced or not; none: that is not known.
    pub since_secs: Option<u64>,
    /// Empty: none.
    pub error: String,
}

/// One part of the process: dns, proxy, rules, tunnel, relay.
#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Part {
    pub name: String,
    pub on: bool,
    /// Such as where it listens, or why it is off.
    pub note: String,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Relay {
    pub name: String,
    pub address: String,
    pub registered: bool,
    pub rtt_ms: Option<u32>,
    pub note: String,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Relaying {
    pub nodes: usize,
    /// Nodes whose first relay this is.
    pub firsts: usize,
    pub flows: usize,
    /// Bytes that wait to be sent.
    pub queued_bytes: usize,
    pub datagrams: u64,
    pub bytes: u64,
    /// Datagrams that were not passed on, by the reason.
    pub drops: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Peers {
    pub peers: Vec<Peer>,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Peer {
    pub name: String,
    pub path: String,
    pub via: String,
    pub rtt_ms: Option<u32>,
    /// Of the path, while there is a connection: bbr or cubic, and the largest datagram.
    pub congestion: String,
    pub mtu: u16,
    pub since_secs: u64,
    pub streams: usize,
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub note: String,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Services {
    pub services: Vec<Service>,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Service {
    pub namespace: String,
    pub name: String,
    /// ClusterIP, Headless or ExternalName.
    pub kind: String,
    pub ips: Vec<String>,
    pub external_ips: Vec<String>,
    pub ports: Vec<Port>,
    pub ready: usize,
    pub total: usize,
    /// Of ClientIP affinity; none: no affinity.
    pub sticky_secs: Option<u64>,
    /// The DestinationRule that counts, and its fields that are not done.
    pub rule: Option<String>,
    pub not_done: Option<String>,
    /// Of an ExternalName.
    pub target: Option<String>,
    /// Only where one Service was asked for.
    pub endpoints: Option<Vec<Endpoint>>,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Port {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    /// How an endpoint is chosen.
    pub policy: String,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Endpoint {
    pub address: String,
    /// The target ports, in the order of the Service's; 0 where there is none.
    pub ports: Vec<u16>,
    pub node: Option<String>,
    pub zone: Option<String>,
    /// "here", "network", "LAN", "zone": of which kind it is near; empty: of none.
    pub near: String,
    pub hostname: Option<String>,
    pub ready: bool,
    pub terminating: bool,
    /// For so long it is left out, since it failed.
    pub ejected_secs: Option<u64>,
    /// It is left out until it takes our probes again.
    pub silent: bool,
    /// Connections that it has from here, and those that it had; those that it did not take.
    pub live: u32,
    pub connections: u32,
    pub failures: u32,
}

/// What our own DNS says to a name.
#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Resolution {
    /// As it was asked, after the search list.
    pub name: String,
    /// NOERROR, NXDOMAIN, …; FORWARD: the upstreams answer it.
    pub code: String,
    pub answers: Vec<Answer>,
}

#[derive(Clone, Debug, DeJson, PartialEq, SerJson)]
pub struct Answer {
    pub name: String,
    pub kind: String,
    pub ttl: u32,
    pub data: String,
}
