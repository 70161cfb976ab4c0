//! Final configuration types: past this file there is no `Option` that means "default" and no string
//! that means an address.

mod dns;
mod error;
mod kube;
mod raw;
pub(crate) mod read;
mod resolve;
mod service;

pub use error::ConfigError;

use crate::{
    carrier::connect::Proxy,
    kube::access::Server,
    proxy::cover::Net,
    table::balance::Nearness,
    tunnel::{RelayLimits, identity::node_name},
};
use std::{
    fmt,
    fs::File,
    io::{self, Read},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

/// A longer file is refused: it is no configuration. 5,000 Services need less than half of it.
const FILE_MAX: u64 = 4 << 20;

/// Everything that `weft run` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub node: NodeConfig,
    pub kube: KubeConfig,
    pub dns: DnsConfig,
    pub proxy: ProxyConfig,
    pub balancer: BalancerConfig,
    pub tunnel: TunnelConfig,
    pub relay: RelayConfig,
    pub admin: AdminConfig,
    pub services: Vec<StaticService>,
}

/// Why a file gives no configuration; the process ends with 64.
#[derive(Debug)]
pub enum LoadError {
    Unreadable(PathBuf, io::Error),
    Wrong(PathBuf, ConfigError),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(path, why) => write!(f, "{}: {why}", path.display()),
            Self::Wrong(path, why) => write!(f, "{}:{why}", path.display()),
        }
    }
}

impl std::error::Error for LoadError {}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Where it cannot be read, and its first mistake.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_string(&mut text));
        let unreadable = |why| LoadError::Unreadable(path.into(), why);
        if read.map_err(unreadable)? as u64 > FILE_MAX {
            return Err(unreadable(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 4 MiB")));
        }
        Self::parse(&text).map_err(|why| LoadError::Wrong(path.into(), why))
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// Empty: the bundle's name, else the host's.
    pub name: String,
    pub zone: String,
    pub network: String,
    /// Other nodes of that network: names, or what they begin with and a `*`.
    pub neighbours: Vec<String>,
    pub state_dir: PathBuf,
    pub bundle: Option<PathBuf>,
    /// What is logged, unless `--log` or `WEFT_LOG` says.
    pub log: log::LevelFilter,
}

/// Where the API is, unless a kubeconfig says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Api {
    None,
    /// A pod's, else that of an agent of k3s or RKE2.
    Auto,
    InCluster,
    Urls(Vec<Server>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerKind {
    /// KubeEdge's metaServer is told by its port.
    Auto,
    ApiServer,
    MetaServer,
}

impl KubeConfig {
    /// Whether an API is to be followed.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.api != Api::None || self.kubeconfig.is_some()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct KubeConfig {
    pub api: Api,
    pub kubeconfig: Option<PathBuf>,
    pub token_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    /// What of them is followed; empty: all.
    pub namespaces: Vec<String>,
    pub server: ServerKind,
    /// Through which an API that is not on this machine is reached.
    pub proxy: Option<Proxy>,
    /// Paths, the last component of each may hold `*`.
    pub manifests: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNames {
    Disabled,
    /// Whatever address is in the name, in a namespace that there is.
    Insecure,
    /// Only those of Pods that are in the table.
    Verified,
}

#[derive(Clone, Debug, PartialEq)]
pub struct DnsConfig {
    pub enable: bool,
    /// Where the responder is reached: weft0's address.
    pub listen: SocketAddr,
    /// Addresses of this host that are bound as they are, beside it.
    pub listen_also: Vec<SocketAddr>,
    /// Namespace and name of a Service whose virtual addresses are answered here.
    pub take_over: Option<(String, String)>,
    pub domain: String,
    /// Reverse zones that are ours.
    pub zones: Vec<String>,
    /// Names below these that we do not have are asked of the upstreams; "." is all.
    pub fallthrough: Vec<String>,
    pub ttl: u32,
    pub pods: PodNames,
    /// Namespaces that are shown; empty: all.
    pub namespaces: Vec<String>,
    /// An endpoint without a hostname is called after its Pod.
    pub endpoint_pod_names: bool,
    /// A Service with virtual addresses and no ready endpoint is NXDOMAIN.
    pub empty_is_missing: bool,
    pub upstream: Vec<Upstream>,
    /// Domains with servers of their own.
    pub stub: Vec<(String, Vec<SocketAddr>)>,
    /// Entries of the cache of foreign names.
    pub cache: usize,
    /// Seconds for which a foreign answer is kept at most.
    pub cache_ttl: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    Server(SocketAddr),
    ResolvConf(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Auto,
    Iptables,
    Nft,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ProxyConfig {
    pub enable: bool,
    pub backend: Backend,
    /// Interfaces whose clients are caught; empty: all but those of a default route.
    pub interfaces: Vec<String>,
    pub external_ips: bool,
    /// Networks: NodePorts are served on those of this host's addresses that lie in one of them.
    pub node_ports: Vec<Net>,
    /// One bit of the packet mark: set on our own sockets.
    pub mark: u32,
    pub max_connections: usize,
    /// Seconds that connections have to come to their end when the agent leaves.
    pub drain: u32,
    /// What kube-proxy can do is left to it: Services all of whose endpoints are in our own network.
    pub beside_kube_proxy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    RoundRobin,
    Random,
    LeastRequest,
    Sticky,
}

#[derive(Clone, Debug, PartialEq)]
pub struct BalancerConfig {
    pub default: Policy,
    /// The nearest kind that has an endpoint is used; `Any` is the last in any case.
    pub prefer: Vec<Nearness>,
    /// Failures in a row after which an endpoint is left out for a while; 0: never.
    pub outlier: u32,
    /// Seconds in which each endpoint of this node is tried once, while no API server says how it is; 0: never.
    pub probe: u32,
    /// Nodes, as in `neighbours`, and the node that opens their endpoints for others. The first that fits counts.
    pub egress: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    Auto,
    Router,
    Server,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    Auto,
    Bbr,
    Cubic,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TunnelConfig {
    pub enable: bool,
    pub listen: SocketAddr,
    /// Interfaces whose addresses are candidates; empty: all but those of containers.
    pub interfaces: Vec<String>,
    /// Beacons on the links.
    pub lan: bool,
    /// The gateway is asked for a port.
    pub port_mapping: bool,
    pub profile: Profile,
    pub congestion: Congestion,
    /// `name@host:port`; those of the bundle are used too.
    pub relays: Vec<RelayName>,
    /// Where relays listen, and are tried, by TCP; 0: nowhere.
    pub tcp_fallback: u16,
    /// The way out for TCP.
    pub proxy: Option<Proxy>,
}

/// A relay as the user writes it: `name@host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayName {
    pub name: String,
    pub host: String,
    pub port: u16,
}

impl RelayName {
    /// `host:port`, an IPv6 address in brackets.
    #[must_use]
    pub fn address(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

impl FromStr for RelayName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, address) = text.split_once('@').ok_or("expected name@host:port, and there is no @")?;
        let (host, port) = address.rsplit_once(':').ok_or("expected name@host:port, and there is no port")?;
        let host = match host.strip_prefix('[').map(|h| h.strip_suffix(']')) {
            Some(Some(v6)) if v6.parse::<Ipv6Addr>().is_ok() => v6,
            Some(_) => return Err("expected name@host:port, and [...] is no IPv6 address"),
            None if host.contains(':') => return Err("expected name@host:port; an IPv6 address stands in brackets"),
            None => host,
        };
        if node_name(name).is_none() {
            return Err("expected name@host:port, and the name is not a node's (a-z, 0-9, '-' and '.')");
        }
        if host.is_empty()
            || host.len() > 253
            || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b))
        {
            return Err("expected name@host:port, and the host is neither a name nor an address");
        }
        match port.parse() {
            Ok(port) if port > 0 => Ok(Self { name: name.into(), host: host.into(), port }),
            Ok(_) | Err(_) => Err("expected name@host:port, and the port is not 1 to 65535"),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct RelayConfig {
    pub enable: bool,
    pub limits: RelayLimits,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AdminConfig {
    pub socket: PathBuf,
    /// Where /healthz and /livez are served; None: nowhere.
    pub http: Option<SocketAddr>,
}

/// `[[service]]`: a Service without any Kubernetes.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticService {
    pub name: String,
    pub namespace: String,
    /// None: headless.
    pub ip: Option<IpAddr>,
    pub ports: Vec<StaticPort>,
    pub endpoints: Vec<StaticEndpoint>,
    /// ClientIP affinity's timeout in seconds, 1..=86,400 (Kubernetes API: ClientIPConfig); None: no affinity.
    pub sticky: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct StaticPort {
    pub name: String,
    pub port: u16,
    /// The endpoints' port; `port` where the user gave none.
    pub target: u16,
    pub protocol: crate::table::model::Protocol,
}

#[derive(Clone, Debug, PartialEq)]
pub struct StaticEndpoint {
    pub address: IpAddr,
    /// Overrides the port's target for this endpoint.
    pub port: Option<u16>,
    pub node: Option<String>,
    pub hostname: Option<String>,
}
