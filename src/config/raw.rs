//! The file as it stands: every key optional, unknown ones refused. Values that are parsed further keep their place.

use super::read::{Entries, tables};
use toml::Spanned;

pub(super) type Text = Option<Spanned<String>>;
pub(super) type Number = Option<Spanned<i64>>;

tables! {
    pub(super) struct RawConfig {
        pub(super) node: RawNode,
        pub(super) kube: RawKube,
        pub(super) dns: RawDns,
        pub(super) proxy: RawProxy,
        pub(super) balancer: RawBalancer,
        pub(super) tunnel: RawTunnel,
        pub(super) relay: RawRelay,
        pub(super) admin: RawAdmin,
        pub(super) service: Vec<Spanned<RawService>>,
    }

    pub(super) struct RawNode {
        pub(super) name: Text,
        pub(super) zone: Text,
        pub(super) network: Text,
        pub(super) neighbours: Option<Vec<Spanned<String>>>,
        pub(super) state_dir: Text,
        pub(super) bundle: Text,
        pub(super) log: Text,
    }

    pub(super) struct RawKube {
        pub(super) api: Text,
        pub(super) kubeconfig: Text,
        pub(super) token_file: Text,
        pub(super) ca_file: Text,
        pub(super) namespaces: Option<Vec<Spanned<String>>>,
        pub(super) server: Text,
        pub(super) proxy: Text,
        pub(super) manifests: Option<Vec<Spanned<String>>>,
    }

    pub(super) struct RawDns {
        pub(super) enable: Option<bool>,
        pub(super) listen: Text,
        pub(super) listen_also: Option<Vec<Spanned<String>>>,
        pub(super) take_over: Text,
        pub(super) domain: Text,
        pub(super) zones: Option<Vec<Spanned<String>>>,
        pub(super) fallthrough: Option<Vec<Spanned<String>>>,
        pub(super) ttl: Number,
        pub(super) pods: Text,
        pub(super) namespaces: Option<Vec<Spanned<String>>>,
        pub(super) endpoint_pod_names: Option<bool>,
        pub(super) empty_services: Text,
        pub(super) upstream: Option<Vec<Spanned<String>>>,
        pub(super) stub: Option<Entries<Vec<Spanned<String>>>>,
        pub(super) cache: Number,
        pub(super) cache_ttl: Number,
    }

    pub(super) struct RawProxy {
        pub(super) enable: Option<bool>,
        pub(super) backend: Text,
        pub(super) interfaces: Option<Vec<Spanned<String>>>,
        pub(super) external_ips: Option<bool>,
        pub(super) node_ports: Option<Vec<Spanned<String>>>,
        pub(super) mark: Number,
        pub(super) max_connections: Number,
        pub(super) drain: Number,
        pub(super) beside_kube_proxy: Option<bool>,
    }

    pub(super) struct RawBalancer {
        pub(super) default: Text,
        pub(super) prefer: Option<Vec<Spanned<String>>>,
        pub(super) outlier: Number,
        pub(super) probe: Number,
        pub(super) egress: Option<Entries<Spanned<String>>>,
    }

    pub(super) struct RawTunnel {
        pub(super) enable: Option<bool>,
        pub(super) listen: Text,
        pub(super) interfaces: Option<Vec<Spanned<String>>>,
        pub(super) lan: Option<bool>,
        pub(super) port_mapping: Option<bool>,
        pub(super) profile: Text,
        pub(super) congestion: Text,
        pub(super) relays: Option<Vec<Spanned<String>>>,
        pub(super) tcp_fallback: Number,
        pub(super) proxy: Text,
    }

    pub(super) struct RawRelay {
        pub(super) enable: Option<bool>,
        pub(super) rate: Number,
        pub(super) node_rate: Number,
        pub(super) node_burst: Number,
    }

    pub(super) struct RawAdmin {
        pub(super) socket: Text,
        pub(super) http: Text,
    }

    pub(super) struct RawService {
        pub(super) name: Spanned<String>,
        pub(super) namespace: Text,
        pub(super) ip: Text,
        pub(super) sticky: Number,
        pub(super) ports: Vec<Spanned<RawPort>>,
        pub(super) endpoints: Vec<Spanned<RawEndpoint>>,
    }

    pub(super) struct RawPort {
        pub(super) name: Text,
        pub(super) port: Spanned<i64>,
        pub(super) target: Number,
        pub(super) protocol: Text,
    }

    pub(super) struct RawEndpoint {
        pub(super) address: Spanned<String>,
        pub(super) port: Number,
        pub(super) node: Text,
        pub(super) hostname: Text,
    }
}
