//! `[dns]`.

use super::{
    ConfigError, DnsConfig, PodNames, Upstream,
    raw::RawDns,
    read::Entries,
    resolve::{Put, may_be_dialled},
};
use crate::{
    dns::wire,
    tunnel::identity::{NAME_MAX, node_name},
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use toml::Spanned;

/// EdgeMesh's address for its DNS, so that an edgecore's `clusterDNS` needs no change.
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 96, 16)), 53);
/// CoreDNS's bound for its `ttl`.
const TTL_MAX: usize = 3_600;
/// An entry of the cache takes up to ~1 kB, and routers have 64 MB.
const CACHE_MAX: usize = 65_536;
/// RFC 8767 section 4: a week.
const CACHE_TTL_MAX: usize = 604_800;
/// Domains with servers of their own; more are refused.
const STUBS_MAX: usize = 64;
/// Of one domain.
const SERVERS_MAX: usize = 8;

const REVERSE: [&str; 2] = ["in-addr.arpa", "ip6.arpa"];
const LABEL: &str = "a namespace: 1 to 63 characters a-z, 0-9 and '-'";
const SERVER: &str = "a server's address, such as 192.0.2.1 or 192.0.2.1:53";

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            enable: true,
            listen: LISTEN,
            listen_also: Vec::new(),
            take_over: None,
            domain: "cluster.local".into(),
            zones: REVERSE.map(Into::into).into(),
            fallthrough: REVERSE.map(Into::into).into(),
            ttl: 30,
            pods: PodNames::Insecure,
            namespaces: Vec::new(),
            endpoint_pod_names: false,
            empty_is_missing: false,
            upstream: vec![Upstream::ResolvConf("/etc/resolv.conf".into())],
            stub: Vec::new(),
            cache: 1_024,
            cache_ttl: 86_400,
        }
    }
}

impl Put<'_> {
    pub(super) fn dns(&self, c: &mut DnsConfig, raw: RawDns) -> Result<(), ConfigError> {
        self.flag(&mut c.enable, raw.enable);
        let listen = "an address of weft0 and a port, such as 169.254.96.16:53";
        self.value(&mut c.listen, "dns.listen", raw.listen, listen, |s| {
            s.parse().ok().filter(|a: &SocketAddr| a.port() != 0 && may_be_dialled(a.ip()) && !a.ip().is_loopback())
        })?;
        let also = "an address of this host, such as 192.168.1.1 or 192.168.1.1:53";
        self.list(&mut c.listen_also, "dns.listen_also", raw.listen_also, also, server)?;
        let service = "namespace/name of a Service, such as kube-system/kube-dns";
        self.value(&mut c.take_over, "dns.take_over", raw.take_over, service, |s| {
            let (namespace, name) = s.split_once('/')?;
            Some(Some((label(namespace)?, label(name)?)))
        })?;
        let domain = "a domain such as cluster.local";
        self.value(&mut c.domain, "dns.domain", raw.domain, domain, |s| {
            let bare = s.strip_suffix('.').unwrap_or(s).to_ascii_lowercase();
            // Names below it, such as a Service's, need room too.
            node_name(&bare).filter(|d| d.len() < NAME_MAX - 128).map(Into::into)
        })?;
        let reverse = "a zone of addresses' names, such as 10.in-addr.arpa or ip6.arpa";
        self.list(&mut c.zones, "dns.zones", raw.zones, reverse, |s| {
            let below = |name: &String| REVERSE.iter().any(|z| name.strip_suffix(z).is_some_and(at_label));
            zone(s).filter(below)
        })?;
        let any = "a domain, or \".\" for all";
        self.list(&mut c.fallthrough, "dns.fallthrough", raw.fallthrough, any, zone)?;
        self.number(&mut c.ttl, "dns.ttl", raw.ttl, 0..=TTL_MAX)?;
        let pods =
            [("disabled", PodNames::Disabled), ("insecure", PodNames::Insecure), ("verified", PodNames::Verified)];
        self.choice(&mut c.pods, "dns.pods", raw.pods, &pods)?;
        self.list(&mut c.namespaces, "dns.namespaces", raw.namespaces, LABEL, label)?;
        self.flag(&mut c.endpoint_pod_names, raw.endpoint_pod_names);
        let empty = [("nodata", false), ("nxdomain", true)];
        self.choice(&mut c.empty_is_missing, "dns.empty_services", raw.empty_services, &empty)?;
        let upstream = "a server's address, such as 192.0.2.1 or 192.0.2.1:53, or the path of a resolv.conf";
        self.list(&mut c.upstream, "dns.upstream", raw.upstream, upstream, |s| {
            let file = s.starts_with('/').then(|| Upstream::ResolvConf(s.into()));
            file.or_else(|| server(s).map(Upstream::Server))
        })?;
        if let Some(raw) = raw.stub {
            c.stub = self.stub(raw)?;
        }
        self.number(&mut c.cache, "dns.cache", raw.cache, 0..=CACHE_MAX)?;
        self.number(&mut c.cache_ttl, "dns.cache_ttl", raw.cache_ttl, 0..=CACHE_TTL_MAX)
    }

    fn stub(&self, raw: Entries<Vec<Spanned<String>>>) -> Result<Vec<(String, Vec<SocketAddr>)>, ConfigError> {
        let mut out: Vec<(String, Vec<SocketAddr>)> = Vec::new();
        for (at, (domain, servers)) in raw.0.into_iter().enumerate() {
            let name = self
                .parse("dns.stub", &domain, "a domain such as corp.example", |s| zone(s).filter(|name| name != "."))?;
            if at == STUBS_MAX {
                return Err(self.error(&domain, "dns.stub", format!("more than {STUBS_MAX} domains")));
            }
            if servers.is_empty() || servers.len() > SERVERS_MAX {
                let what = format!("{name}: expected 1 to {SERVERS_MAX} servers");
                return Err(self.error(&domain, "dns.stub", what));
            }
            if out.iter().any(|(other, _)| *other == name) {
                return Err(self.error(&domain, "dns.stub", format!("{name} is there twice")));
            }
            let servers = servers.iter().map(|s| self.parse("dns.stub", s, SERVER, |s| server(s)));
            out.push((name, servers.collect::<Result<_, _>>()?));
        }
        Ok(out)
    }
}

fn server(text: &str) -> Option<SocketAddr> {
    let server = text.parse().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, 53))).ok()?;
    (server.port() != 0 && may_be_dialled(server.ip())).then_some(server)
}

fn label(text: &str) -> Option<String> {
    node_name(text).filter(|l| !l.contains('.')).map(Into::into)
}

/// In lower case and without its last dot; "." is the root.
fn zone(text: &str) -> Option<String> {
    let bare = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let visible = !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_graphic()) && wire::encode_name(&bare).is_some();
    if visible { Some(bare) } else { (text == ".").then(|| text.into()) }
}

/// Whether a suffix may be cut off here: between two labels, or at the beginning.
fn at_label(rest: &str) -> bool {
    rest.is_empty() || rest.ends_with('.')
}
