//! Text -> final types: the defaults, with what the file says put in their places.

use super::{
    AdminConfig, Backend, BalancerConfig, Config, ConfigError, Congestion, DnsConfig, KubeConfig, NodeConfig, Policy,
    Profile, ProxyConfig, RelayConfig, TunnelConfig,
    raw::{Number, RawBalancer, RawConfig, RawNode, RawProxy, RawRelay, RawTunnel, Text},
    read, service,
};
use crate::{
    carrier::connect::Proxy,
    table::balance::{Nearness, OUTLIER, PREFER},
    tunnel::{
        Rate, RelayLimits,
        identity::{network_name, node_name},
    },
};
use log::LevelFilter;
use std::{
    fmt::Debug,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};
use toml::Spanned;

const TUNNEL_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 7843);

/// Bit 5. Taken are 8–13 (OpenWrt mwan3's 0x3F00; 13 by the CNI portmap plugin too), 14 and 15 (kube-proxy), 16–23
/// (OpenWrt pbr's 0xFF0000, Tailscale), 16–31 (Calico's default 0xFFFF0000), 7 (the AWS CNI); Cilium uses 8–11 and
/// 16–31, and the lower bits only in packets of other clusters that it has marked there too. The list:
/// github.com/fwmark/registry, and each project's own default.
const MARK: u32 = 1 << 5;

/// Private networks (RFC 1918, RFC 4193): a NodePort is not open to the internet unless that is asked for.
const NODE_PORTS: [&str; 4] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"];

/// Two descriptors for each.
const CONNECTIONS_MAX: usize = 65_536;
/// Seconds: service managers kill what takes longer.
const DRAIN_MAX: usize = 600;
/// Seconds: an endpoint that is tried more rarely is found out by its clients.
const PROBE_MAX: usize = 3_600;
/// Mbit/s: more than any one socket carries.
const RATE_MAX: usize = 100_000;
/// kB: a batch of the kernel's has up to 64.
const BURST_MIN: usize = 64;
const BURST_MAX: usize = 100_000;
/// kB.
const NODE_BURST: u64 = 1_000;
/// Linux: IFNAMSIZ is 16 with its NUL.
const INTERFACE_MAX: usize = 15;
/// Lists of the file are refused beyond this many items.
const LIST_MAX: usize = 64;

impl Default for Config {
    fn default() -> Self {
        Self {
            node: NodeConfig {
                name: String::new(),
                zone: String::new(),
                network: String::new(),
                neighbours: Vec::new(),
                state_dir: PathBuf::from("/var/lib/weft"),
                bundle: None,
                log: LevelFilter::Info,
            },
            kube: KubeConfig::default(),
            dns: DnsConfig::default(),
            proxy: ProxyConfig {
                enable: true,
                backend: Backend::Auto,
                interfaces: Vec::new(),
                external_ips: false,
                node_ports: NODE_PORTS.into_iter().filter_map(|net| net.parse().ok()).collect(),
                mark: MARK,
                max_connections: 4_096,
                drain: 5,
                beside_kube_proxy: false,
            },
            balancer: BalancerConfig {
                default: Policy::RoundRobin,
                prefer: PREFER.into(),
                outlier: OUTLIER.failures,
                probe: 0,
                egress: Vec::new(),
            },
            tunnel: TunnelConfig {
                enable: true,
                listen: TUNNEL_LISTEN,
                interfaces: Vec::new(),
                lan: true,
                port_mapping: true,
                profile: Profile::Auto,
                congestion: Congestion::Auto,
                relays: Vec::new(),
                tcp_fallback: 443,
                proxy: None,
            },
            relay: RelayConfig { enable: false, limits: RelayLimits::default() },
            admin: AdminConfig { socket: PathBuf::from("/run/weft/weft.sock"), http: None },
            services: Vec::new(),
        }
    }
}

impl Config {
    /// # Errors
    /// The first mistake in the text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = read::document(text).map_err(|e| ConfigError::from_mistake(text, e))?;
        let put = Put { text };
        let mut c = Self::default();
        put.node(&mut c.node, raw.node)?;
        put.kube(&mut c.kube, raw.kube)?;
        put.dns(&mut c.dns, raw.dns)?;
        put.proxy(&mut c.proxy, raw.proxy)?;
        put.balancer(&mut c.balancer, raw.balancer)?;
        put.tunnel(&mut c.tunnel, raw.tunnel)?;
        put.relay(&mut c.relay, raw.relay)?;
        put.value(&mut c.admin.socket, "admin.socket", raw.admin.socket, SOCKET, |s| {
            // Linux: sun_path has 108 bytes with its NUL.
            path(s).filter(|_| s.len() < 108)
        })?;
        let http = "an address and a port, such as 127.0.0.1:7844; empty for none";
        put.value(&mut c.admin.http, "admin.http", raw.admin.http, http, |s| {
            if s.is_empty() { Some(None) } else { s.parse().ok().filter(|a: &SocketAddr| a.port() > 0).map(Some) }
        })?;
        c.services = service::resolve(&put, raw.service, c.dns.listen.ip())?;
        Ok(c)
    }
}

const SOCKET: &str = "an absolute path of up to 107 bytes";
pub(super) const PATH: &str = "an absolute path";

/// Puts the file's values in the places of the defaults.
pub(super) struct Put<'t> {
    pub(super) text: &'t str,
}

impl Put<'_> {
    pub(super) fn error<T>(&self, at: &Spanned<T>, key: &str, what: impl Into<String>) -> ConfigError {
        ConfigError::new(self.text, at.span(), key, what)
    }

    /// Parses a value that is there; `expected` ends the sentence "expected …".
    pub(super) fn parse<R: Debug, T>(
        &self,
        key: &str,
        raw: &Spanned<R>,
        expected: &str,
        parse: impl FnOnce(&R) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let value = raw.get_ref();
        parse(value).ok_or_else(|| self.error(raw, key, format!("{value:?}: expected {expected}")))
    }

    pub(super) fn value<R: Debug, T>(
        &self,
        slot: &mut T,
        key: &str,
        raw: Option<Spanned<R>>,
        expected: &str,
        parse: impl FnOnce(&R) -> Option<T>,
    ) -> Result<(), ConfigError> {
        if let Some(raw) = raw {
            *slot = self.parse(key, &raw, expected, parse)?;
        }
        Ok(())
    }

    pub(super) fn list<T>(
        &self,
        slot: &mut Vec<T>,
        key: &str,
        raw: Option<Vec<Spanned<String>>>,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<(), ConfigError> {
        let Some(raw) = raw else { return Ok(()) };
        if let Some(more) = raw.get(LIST_MAX) {
            return Err(self.error(more, key, format!("more than {LIST_MAX} items")));
        }
        *slot = raw.iter().map(|item| self.parse(key, item, expected, |s| parse(s))).collect::<Result<_, _>>()?;
        Ok(())
    }

    pub(super) fn choice<T: Copy>(
        &self,
        slot: &mut T,
        key: &str,
        raw: Option<Spanned<String>>,
        choices: &[(&str, T)],
    ) -> Result<(), ConfigError> {
        let expected = choices.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
        self.value(slot, key, raw, &expected, |s| choices.iter().find(|(name, _)| name == s).map(|(_, v)| *v))
    }

    pub(super) fn number<T>(
        &self,
        slot: &mut T,
        key: &str,
        raw: Number,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<(), ConfigError>
    where
        T: TryFrom<usize>,
    {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.value(slot, key, raw, &expected, |n| {
            usize::try_from(*n).ok().filter(|n| range.contains(n)).and_then(|n| T::try_from(n).ok())
        })
    }

    pub(super) fn flag(&self, slot: &mut bool, raw: Option<bool>) {
        *slot = raw.unwrap_or(*slot);
    }

    fn node(&self, c: &mut NodeConfig, raw: RawNode) -> Result<(), ConfigError> {
        let name = "a node's name: characters a-z, 0-9, '-' and '.'; empty for the bundle's";
        self.value(&mut c.name, "node.name", raw.name, name, |s| {
            (s.is_empty() || node_name(s).is_some()).then(|| s.clone())
        })?;
        let label = "up to 63 characters a-z, 0-9, '-' and '.'";
        for (slot, key, raw) in [(&mut c.zone, "node.zone", raw.zone), (&mut c.network, "node.network", raw.network)] {
            self.value(slot, key, raw, label, |s| network_name(s).map(Into::into))?;
        }
        self.list(&mut c.neighbours, "node.neighbours", raw.neighbours, NODES, nodes)?;
        self.value(&mut c.state_dir, "node.state_dir", raw.state_dir, PATH, |s| path(s))?;
        self.value(&mut c.bundle, "node.bundle", raw.bundle, PATH, |s| path(s).map(Some))?;
        self.choice(
            &mut c.log,
            "node.log",
            raw.log,
            &[
                ("error", LevelFilter::Error),
                ("warn", LevelFilter::Warn),
                ("info", LevelFilter::Info),
                ("debug", LevelFilter::Debug),
                ("trace", LevelFilter::Trace),
            ],
        )
    }

    fn balancer(&self, c: &mut BalancerConfig, raw: RawBalancer) -> Result<(), ConfigError> {
        let policies = [
            ("round-robin", Policy::RoundRobin),
            ("random", Policy::Random),
            ("least-request", Policy::LeastRequest),
            ("sticky", Policy::Sticky),
        ];
        self.choice(&mut c.default, "balancer.default", raw.default, &policies)?;
        let kinds = "\"node\", \"network\", \"zone\" or \"any\"";
        self.list(&mut c.prefer, "balancer.prefer", raw.prefer, kinds, |kind| match kind {
            "node" => Some(Nearness::Node),
            "network" => Some(Nearness::Network),
            "zone" => Some(Nearness::Zone),
            "any" => Some(Nearness::Any),
            _ => None,
        })?;
        let expected = "a number of failures from 0 to 1000";
        self.value(&mut c.outlier, "balancer.outlier", raw.outlier, expected, |n| {
            u32::try_from(*n).ok().filter(|n| *n <= 1_000)
        })?;
        self.number(&mut c.probe, "balancer.probe", raw.probe, 0..=PROBE_MAX)?;
        for (of, by) in raw.egress.into_iter().flat_map(|all| all.0) {
            let of = self.parse("balancer.egress", &of, NODES, |s| nodes(s))?;
            let by = self.parse("balancer.egress", &by, "the name of a node", |s| node_name(s).map(Into::into))?;
            c.egress.push((of, by));
        }
        Ok(())
    }

    fn proxy(&self, c: &mut ProxyConfig, raw: RawProxy) -> Result<(), ConfigError> {
        self.flag(&mut c.enable, raw.enable);
        let backends = [("auto", Backend::Auto), ("iptables", Backend::Iptables), ("nft", Backend::Nft)];
        self.choice(&mut c.backend, "proxy.backend", raw.backend, &backends)?;
        self.list(&mut c.interfaces, "proxy.interfaces", raw.interfaces, INTERFACE, interface)?;
        self.flag(&mut c.external_ips, raw.external_ips);
        self.flag(&mut c.beside_kube_proxy, raw.beside_kube_proxy);
        let net = "a network such as 192.168.0.0/16, or an address";
        self.list(&mut c.node_ports, "proxy.node_ports", raw.node_ports, net, |s| s.parse().ok())?;
        self.value(&mut c.mark, "proxy.mark", raw.mark, "one bit of 32, such as 0x20", |n| {
            u32::try_from(*n).ok().filter(|n| n.is_power_of_two())
        })?;
        self.number(&mut c.max_connections, "proxy.max_connections", raw.max_connections, 1..=CONNECTIONS_MAX)?;
        self.number(&mut c.drain, "proxy.drain", raw.drain, 0..=DRAIN_MAX)
    }

    fn tunnel(&self, c: &mut TunnelConfig, raw: RawTunnel) -> Result<(), ConfigError> {
        self.flag(&mut c.enable, raw.enable);
        let listen = "an address and a port, such as [::]:7843";
        self.value(&mut c.listen, "tunnel.listen", raw.listen, listen, |s| s.parse().ok())?;
        self.list(&mut c.interfaces, "tunnel.interfaces", raw.interfaces, INTERFACE, interface)?;
        self.flag(&mut c.lan, raw.lan);
        self.flag(&mut c.port_mapping, raw.port_mapping);
        let profiles = [("auto", Profile::Auto), ("router", Profile::Router), ("server", Profile::Server)];
        self.choice(&mut c.profile, "tunnel.profile", raw.profile, &profiles)?;
        let kinds = [("auto", Congestion::Auto), ("bbr", Congestion::Bbr), ("cubic", Congestion::Cubic)];
        self.choice(&mut c.congestion, "tunnel.congestion", raw.congestion, &kinds)?;
        let relay = "name@host:port, such as relay-1@relay.example:7843";
        self.list(&mut c.relays, "tunnel.relays", raw.relays, relay, |s| s.parse().ok())?;
        self.number(&mut c.tcp_fallback, "tunnel.tcp_fallback", raw.tcp_fallback, 0..=65_535)?;
        self.way_out(&mut c.proxy, "tunnel.proxy", raw.proxy)
    }

    /// An HTTP proxy. Its password must not be in the error.
    pub(super) fn way_out(&self, slot: &mut Option<Proxy>, key: &str, raw: Text) -> Result<(), ConfigError> {
        let Some(raw) = raw else { return Ok(()) };
        let text = raw.get_ref();
        let proxy = if text.is_empty() { Ok(None) } else { text.parse().map(Some) };
        *slot = proxy.map_err(|()| {
            self.error(&raw, key, "expected http://host:port or http://user:password@host:port, with % codes")
        })?;
        Ok(())
    }

    fn relay(&self, c: &mut RelayConfig, raw: RawRelay) -> Result<(), ConfigError> {
        self.flag(&mut c.enable, raw.enable);
        let (mut all, mut node, mut burst) = (0_u64, 0, NODE_BURST);
        for (slot, key, raw) in [(&mut all, "relay.rate", raw.rate), (&mut node, "relay.node_rate", raw.node_rate)] {
            self.number(slot, key, raw, 0..=RATE_MAX)?;
        }
        self.number(&mut burst, "relay.node_burst", raw.node_burst, BURST_MIN..=BURST_MAX)?;
        let rate = |mbits: u64, burst| (mbits > 0).then_some(Rate { each_second: mbits * 125_000, burst });
        // Of all: what leaves in a few milliseconds.
        c.limits = RelayLimits { all: rate(all, 64_000.max(all * 500)), node: rate(node, burst * 1000) };
        Ok(())
    }
}

const NODES: &str = "the name of a node, or how several begin and a *, such as cloud-*";

fn nodes(text: &str) -> Option<String> {
    // What a pattern leaves open may be any one character of a name.
    let name = text.strip_suffix('*').map_or_else(|| text.to_owned(), |front| format!("{front}0"));
    node_name(&name).map(|_| text.into())
}

const INTERFACE: &str = "an interface's name, of 1 to 15 characters";

fn interface(text: &str) -> Option<String> {
    // The kernel's dev_valid_name; and iptables would take a last + for a wildcard.
    let valid = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '+' | '!' | '"' | '\'' | '\\');
    let named = (1..=INTERFACE_MAX).contains(&text.len()) && text != "." && text != ".." && !text.starts_with('-');
    (named && text.chars().all(valid)).then(|| text.into())
}

/// An absolute path, without NUL, which no system call takes.
pub(super) fn path(text: &str) -> Option<PathBuf> {
    (text.starts_with('/') && !text.contains('\0')).then(|| text.into())
}

/// No address of nobody, of everybody or of many.
pub(super) fn may_be_dialled(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST)
}
