//! What a reload has to do: which parts are begun anew, and what has to wait for a restart.

use crate::config::{Config, PodNames};

/// The parts that another configuration concerns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) manifests: bool,
    pub(crate) kube: bool,
    pub(crate) dns: bool,
    pub(crate) tunnel: bool,
    pub(crate) proxy: bool,
    pub(crate) rules: bool,
    pub(crate) health: bool,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { manifests, kube, dns, tunnel, proxy, rules, health } = *self;
        let parts = [
            (manifests, "manifests"),
            (kube, "kube"),
            (dns, "dns"),
            (tunnel, "tunnel"),
            (proxy, "proxy"),
            (rules, "rules"),
            (health, "health"),
        ];
        let named: Vec<&str> = parts.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        if named.is_empty() { Ok(()) } else { write!(f, "; begun anew: {}", named.join(", ")) }
    }
}

/// Puts back what a running agent cannot change, and names it.
pub(crate) fn settle(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut kept = Vec::new();
    keep(&mut kept, "node.name", &old.node.name, &mut new.node.name);
    keep(&mut kept, "node.state_dir", &old.node.state_dir, &mut new.node.state_dir);
    keep(&mut kept, "dns.listen", &old.dns.listen, &mut new.dns.listen);
    keep(&mut kept, "proxy.backend", &old.proxy.backend, &mut new.proxy.backend);
    keep(&mut kept, "proxy.mark", &old.proxy.mark, &mut new.proxy.mark);
    keep(&mut kept, "admin.socket", &old.admin.socket, &mut new.admin.socket);
    kept
}

fn keep<T: Clone + PartialEq>(kept: &mut Vec<&'static str>, key: &'static str, old: &T, new: &mut T) {
    if old != new {
        new.clone_from(old);
        kept.push(key);
    }
}

/// Both configurations are settled; `bundle`: the secret has changed too.
pub(crate) fn plan(old: &Config, new: &Config, bundle: bool) -> Plan {
    let here = |c: &Config| (c.node.zone.clone(), c.node.network.clone(), c.node.neighbours.clone());
    let moved = here(old) != here(new) || bundle;
    let pods =
        |c: &Config| (c.dns.enable && c.dns.pods == PodNames::Verified, c.dns.enable && c.dns.endpoint_pod_names);
    let of_proxy = |c: &Config| (c.proxy.enable, c.proxy.max_connections, c.balancer.clone());
    let dns = old.dns != new.dns || old.proxy.interfaces != new.proxy.interfaces || moved;
    let proxy = of_proxy(old) != of_proxy(new) || moved && new.proxy.enable;
    // The drain counts at the end alone.
    let mut same = new.proxy.clone();
    same.drain = old.proxy.drain;
    // Who follows an API does not care for files, and the other way round.
    let mut same_api = new.kube.clone();
    same_api.manifests.clone_from(&old.kube.manifests);
    Plan {
        manifests: old.kube.manifests != new.kube.manifests || pods(old) != pods(new),
        kube: old.kube != same_api || pods(old) != pods(new) && (old.kube.follows() || new.kube.follows()),
        dns,
        tunnel: old.tunnel != new.tunnel || old.relay != new.relay || bundle,
        proxy,
        rules: dns || proxy || old.proxy != same,
        health: old.admin.http != new.admin.http,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text).unwrap()
    }

    fn parts(old: &str, new: &str) -> String {
        let plan = plan(&config(old), &config(new), false).to_string();
        plan.trim_start_matches("; begun anew: ").replace(", ", " ")
    }

    #[test]
    fn only_what_changes_is_begun_anew() {
        for (old, new, expected) in [
            ("", "", ""),
            ("", "node.log = \"debug\"\n[[service]]\nname = \"a\"\nports = [{ port = 1 }]", ""),
            ("", "kube.manifests = [\"/a\"]", "manifests"),
            ("", "kube.api = \"http://127.0.0.1:10550\"", "kube"),
            ("kube.api = \"in-cluster\"", "kube.api = \"in-cluster\"\nkube.namespaces = [\"a\"]", "kube"),
            (
                "kube.api = \"in-cluster\"",
                "kube.api = \"in-cluster\"\ndns.pods = \"verified\"",
                "manifests kube dns rules",
            ),
            ("", "dns.ttl = 5", "dns rules"),
            ("", "dns.pods = \"verified\"", "manifests dns rules"),
            ("", "dns.enable = false", "dns rules"),
            ("", "proxy.enable = false", "proxy rules"),
            ("", "balancer.default = \"random\"", "proxy rules"),
            ("", "proxy.external_ips = true", "rules"),
            ("", "proxy.interfaces = [\"br-lan\"]", "dns rules"),
            ("", "proxy.drain = 1", ""),
            ("", "tunnel.enable = false", "tunnel"),
            ("", "relay.enable = true", "tunnel"),
            ("", "node.zone = \"z\"", "dns proxy rules"),
            ("", "node.neighbours = [\"cloud-*\"]", "dns proxy rules"),
            ("", "balancer.egress = { \"cloud-*\" = \"cloud-1\" }", "proxy rules"),
            ("", "proxy.beside_kube_proxy = true", "rules"),
            ("", "admin.http = \"127.0.0.1:7844\"", "health"),
            ("proxy.enable = false", "proxy.enable = false\nnode.zone = \"z\"", "dns rules"),
        ] {
            assert_eq!(parts(old, new), expected, "{old:?} -> {new:?}");
            assert_eq!(parts(new, old), expected, "{new:?} -> {old:?}");
        }
        let all = plan(&config(""), &config(""), true);
        let kept = Plan { manifests: false, kube: false, health: false, ..all };
        assert_eq!(all, Plan { dns: true, tunnel: true, proxy: true, rules: true, ..kept });
    }

    #[test]
    fn what_cannot_be_changed_is_kept_and_named() {
        let old = config("");
        let mut new = config(
            "node.name = \"b\"\nnode.state_dir = \"/x\"\ndns.listen = \"169.254.1.1:53\"\nproxy.backend = \"nft\"\n\
             proxy.mark = 64\nadmin.socket = \"/y\"\ndns.ttl = 5",
        );
        let kept = settle(&old, &mut new);
        assert_eq!(kept, ["node.name", "node.state_dir", "dns.listen", "proxy.backend", "proxy.mark", "admin.socket"]);
        assert_eq!(new, config("dns.ttl = 5"));
        assert_eq!(settle(&old, &mut new), Vec::<&str>::new());
    }
}
