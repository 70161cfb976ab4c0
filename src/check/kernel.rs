//! What the kernel and its firewall let us do.

use super::line::{Line, fail, ok, warn};
use crate::config::Backend;

// linux/capability.h
const CAP_NET_BIND_SERVICE: u64 = 1 << 10;
const CAP_NET_ADMIN: u64 = 1 << 12;
/// Fewer descriptors carry fewer than some 500 connections.
const FILES_MIN: u64 = 1_024;

/// `status`: /proc/self/status.
#[must_use]
pub fn rights(status: &str) -> Line {
    let caps = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
    let has = |cap| caps.is_none_or(|caps| caps & cap != 0);
    match (has(CAP_NET_ADMIN), has(CAP_NET_BIND_SERVICE)) {
        (true, true) => ok("rights", &["CAP_NET_ADMIN and CAP_NET_BIND_SERVICE"]),
        (true, false) => {
            warn("rights", &["no CAP_NET_BIND_SERVICE"], &["give it, or keep dns.listen_also above port 1023"])
        }
        (false, _) => fail("rights", &["no CAP_NET_ADMIN"], &["run weft (and this check) as root"]),
    }
}

/// `made`: the kind of device that was made and removed.
#[must_use]
pub fn device(made: Result<&str, String>) -> Line {
    match made {
        Ok(kind) => ok("device", &["weft0 can be a ", kind]),
        Err(why) => {
            fail("device", &[&why], &[unless_denied(&why, "load the module dummy or bridge (OpenWrt: kmod-dummy)")])
        }
    }
}

/// A module does not help where a right is missing.
fn unless_denied<'a>(why: &str, remedy: &'a str) -> &'a str {
    if why.contains("CAP_NET_ADMIN") { "run weft as root" } else { remedy }
}

/// How rules can be written.
#[derive(Debug)]
pub struct Writers {
    pub wanted: Backend,
    /// Whether the kernel took our rules, and forgot them again; None: not tried.
    pub nft: Option<Result<(), String>>,
    /// The flavour of iptables that is installed.
    pub flavour: Option<String>,
    /// Whether iptables took one of our rules, and forgot it again; None: not tried.
    pub iptables: Option<Result<(), String>>,
    /// The tables of iptables-legacy are in use.
    pub legacy: bool,
}

impl Writers {
    /// Whether iptables would have to write: then it must be tried.
    #[must_use]
    pub fn wants_iptables(&self) -> bool {
        let nft = self.nft.as_ref().is_some_and(Result::is_ok);
        match self.wanted {
            Backend::Iptables => true,
            Backend::Nft => false,
            Backend::Auto => self.flavour.is_some() && (self.legacy || !nft),
        }
    }
}

#[must_use]
pub fn rules(w: &Writers) -> Line {
    let legacy = if w.legacy { "; tables of iptables-legacy are in use" } else { "" };
    let flavour = w.flavour.as_deref().unwrap_or("none");
    let nft = match &w.nft {
        Some(Err(why)) => why.as_str(),
        Some(Ok(())) | None => "",
    };
    if w.wants_iptables() {
        return match (&w.flavour, &w.iptables) {
            (None, _) => fail(
                "rules",
                &["proxy.backend is \"iptables\", and there is none"],
                &["install iptables, or leave proxy.backend to \"auto\""],
            ),
            (Some(_), Some(Err(why))) => fail(
                "rules",
                &["iptables (", flavour, "): ", why, legacy],
                &["load the kernel's nf_nat and ipt_REDIRECT or nft_compat modules"],
            ),
            (Some(_), Some(Ok(())) | None) => ok("rules", &["written by iptables (", flavour, ")", legacy]),
        };
    }
    match &w.nft {
        Some(Ok(())) => ok("rules", &["written into nf_tables; iptables: ", flavour, legacy]),
        Some(Err(_)) if w.wanted == Backend::Nft => {
            let remedy = unless_denied(nft, "load nft_nat, nft_ct and nft_reject (OpenWrt: kmod-nft-nat)");
            fail("rules", &["nf_tables: ", nft], &[remedy])
        }
        Some(Err(_)) | None => fail(
            "rules",
            &["nf_tables: ", nft, "; and no iptables"],
            &["load nft_nat, nft_ct and nft_reject (OpenWrt: kmod-nft-nat), or install iptables"],
        ),
    }
}

/// `drops`: chains that would drop connections to Services, and why one takes no rule of ours.
#[must_use]
pub fn input(drops: &[(String, Option<String>)], address: &str) -> Line {
    if let Some((chain, why)) = drops.iter().find_map(|(chain, why)| Some((chain, why.as_ref()?))) {
        return fail(
            "input",
            &[chain, " drops connections to Services, and takes no rule: ", why],
            &["let its owner accept: ct status dnat ip daddr ", address, " accept"],
        );
    }
    match drops {
        [] => ok("input", &["no chain of others drops connections to Services"]),
        [(first, _), ..] => ok("input", &[first, " drops what it does not know: weft puts one rule there"]),
    }
}

/// `forward`: /proc/sys/net/ipv4/ip_forward.
#[must_use]
pub fn forward(forward: &str) -> Line {
    if forward.trim() == "0" {
        return warn(
            "forward",
            &["net.ipv4.ip_forward is 0: other machines time out on ports that no Service has"],
            &["sysctl -w net.ipv4.ip_forward=1, where this machine is a gateway"],
        );
    }
    ok("forward", &["net.ipv4.ip_forward is on"])
}

/// `count`, `most`: of /proc/sys/net/netfilter/nf_conntrack_*; empty: nothing is tracked yet.
#[must_use]
pub fn conntrack(count: &str, most: &str) -> Line {
    let (Ok(entries), Ok(limit)) = (count.trim().parse::<u64>(), most.trim().parse::<u64>()) else {
        return ok("conntrack", &["nothing is tracked yet"]);
    };
    let (count, most) = (count.trim(), most.trim());
    if limit > 0 && entries * 10 >= limit * 9 {
        return warn(
            "conntrack",
            &[count, " of ", most, " entries are taken: new connections will be dropped"],
            &["raise net.netfilter.nf_conntrack_max"],
        );
    }
    ok("conntrack", &[count, " of ", most, " entries"])
}

/// `limit`: of open files, as far as it can be raised.
#[must_use]
pub fn files(limit: u64) -> Line {
    let shown = limit.to_string();
    if limit < FILES_MIN {
        return warn(
            "files",
            &["at most ", &shown, " open files: two for each connection"],
            &["raise the hard limit (ulimit -Hn, LimitNOFILE=, procd's limits)"],
        );
    }
    ok("files", &["up to ", &shown, " open"])
}

/// Who else rewrites virtual addresses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    /// Programs of Cilium at the sockets: the address is rewritten before netfilter sees a packet.
    pub cilium_sockets: bool,
    pub cilium: bool,
    /// kube-proxy in the mode ipvs: its device, or entries in /proc/net/ip_vs.
    pub ipvs: bool,
    pub kube_proxy: bool,
    pub edgemesh: bool,
}

/// One line for each of them that is there.
#[must_use]
pub fn others(o: Others) -> Vec<Line> {
    let mut out = Vec::new();
    if o.cilium_sockets {
        out.push(fail(
            "cilium",
            &["Cilium's socket load balancing rewrites virtual addresses before netfilter"],
            &["set socketLB.hostNamespaceOnly=true and bpf-lb-sock=false, or do not run weft's proxy here"],
        ));
    } else if o.cilium {
        out.push(warn(
            "cilium",
            &["Cilium is here: with kubeProxyReplacement it may serve Services before weft"],
            &["see that bpf-lb-sock is false"],
        ));
    }
    if o.ipvs {
        out.push(warn(
            "ipvs",
            &["kube-proxy's IPVS is here: virtual addresses are the host's own"],
            &["take kube-proxy off this node, or set it to the mode iptables or nftables"],
        ));
    }
    if o.edgemesh {
        out.push(fail(
            "edgemesh",
            &["edgemesh-agent runs here: it serves the same addresses and DNS"],
            &["remove EdgeMesh from this node first"],
        ));
    }
    if o.kube_proxy {
        out.push(warn(
            "kube-proxy",
            &["kube-proxy runs here: of Services that both serve, weft's rules come first"],
            &["keep it off edge nodes, or let weft serve none of its Services here"],
        ));
    }
    if out.is_empty() {
        out.push(ok("others", &["nobody else rewrites virtual addresses here"]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(line: &Line) -> String {
        [line.verdict.as_str(), " ", &line.text, " ", &line.remedy].concat()
    }

    #[test]
    fn capabilities() {
        assert!(said(&rights("Name:\tweft\nCapEff:\t000001ffffffffff\n")).starts_with("ok"));
        assert!(said(&rights("CapEff:\t0000000000001000")).starts_with("warn no CAP_NET_BIND"));
        assert!(said(&rights("CapEff:\t0000000000000400")).starts_with("fail no CAP_NET_ADMIN"));
        assert!(said(&rights("CapEff:\t0000000000001400")).starts_with("ok"));
    }

    #[test]
    fn who_writes_the_rules() {
        let no = || Some(Err("not supported".to_owned()));
        let w = |wanted, nft, flavour: Option<&str>, legacy| Writers {
            wanted,
            nft,
            flavour: flavour.map(Into::into),
            iptables: Some(Ok(())),
            legacy,
        };
        use Backend::{Auto, Iptables, Nft};
        for (writers, expected) in [
            (w(Auto, Some(Ok(())), None, false), "ok written into nf_tables; iptables: none"),
            (w(Auto, Some(Ok(())), Some("legacy"), true), "ok written by iptables (legacy); tables of iptables-legacy"),
            (w(Auto, Some(Ok(())), None, true), "ok written into nf_tables"),
            (w(Auto, no(), Some("nft"), false), "ok written by iptables (nft)"),
            (w(Auto, no(), None, false), "fail nf_tables: not supported; and no iptables load nft_nat"),
            (w(Nft, no(), Some("nft"), false), "fail nf_tables: not supported load nft_nat"),
            (w(Iptables, Some(Ok(())), None, false), "fail proxy.backend is \"iptables\", and there is none"),
            (Writers { iptables: no(), ..w(Iptables, no(), Some("nft"), false) }, "fail iptables (nft): not supported"),
        ] {
            assert!(said(&rules(&writers)).starts_with(expected), "{writers:?}: {}", said(&rules(&writers)));
        }
    }

    #[test]
    fn chains_of_others() {
        let way = |why: Option<&str>| ("chain inet fw4 input".to_owned(), why.map(Into::into));
        assert!(said(&input(&[], "x")).starts_with("ok no chain"));
        assert!(said(&input(&[way(None)], "x")).contains("weft puts one rule there"));
        let line = input(&[way(None), way(Some("Operation not permitted"))], "169.254.96.16");
        assert!(said(&line).starts_with("fail chain inet fw4 input drops"));
        assert_eq!(line.remedy, "let its owner accept: ct status dnat ip daddr 169.254.96.16 accept");
    }

    #[test]
    fn settings_and_limits() {
        assert!(said(&forward("0\n")).starts_with("warn") && said(&forward("1")).starts_with("ok"));
        assert!(said(&conntrack("90", "100")).starts_with("warn") && said(&conntrack("89", "100")).starts_with("ok"));
        assert!(said(&conntrack("", "")).starts_with("ok") && said(&conntrack("1", "0")).starts_with("ok"));
        assert!(said(&files(256)).starts_with("warn") && said(&files(4096)).starts_with("ok"));
        assert!(said(&device(Ok("bridge"))).starts_with("ok") && said(&device(Err("no".into()))).starts_with("fail"));
    }

    #[test]
    fn those_who_are_in_the_way() {
        let names = |o| others(o).iter().map(|l| [&l.verdict, " ", &l.name].concat()).collect::<Vec<_>>();
        assert_eq!(names(Others::default()), ["ok others"]);
        let all = Others { cilium_sockets: true, cilium: true, ipvs: true, kube_proxy: true, edgemesh: true };
        assert_eq!(names(all), ["fail cilium", "warn ipvs", "fail edgemesh", "warn kube-proxy"]);
        assert_eq!(names(Others { cilium: true, ..Others::default() }), ["warn cilium"]);
    }
}
