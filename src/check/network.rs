//! The ways out of this machine, the ports that we want, and the relays.

use super::line::{Line, fail, ok, warn};
use crate::{
    admin::view::{Peer, Relay},
    proxy::cover::Net,
    tunnel::BY_TCP,
};
use std::net::Ipv4Addr;

/// QUIC's smallest datagram (RFC 9000 section 14) with the headers of UDP and IPv4, and what IPv6 asks of a link.
const MTU_FAIL: u32 = 1_228;
const MTU_WARN: u32 = 1_280;

/// `holder`: who has the port of `at` (dns.listen) for himself; `shares`: dnsmasq knows to leave weft0 alone.
#[must_use]
pub fn port53(at: &str, holder: Option<&str>, shares: bool) -> Line {
    match holder {
        None => ok("port53", &[at, " is free"]),
        Some(who) if who.starts_with("edgemesh") => {
            fail("port53", &[at, " is taken by ", who], &["remove EdgeMesh from this node first"])
        }
        Some(who) if who.starts_with("weft") => ok("port53", &[at, " is held by ", who]),
        Some(who) if who.starts_with("dnsmasq") && !shares => warn(
            "port53",
            &[who, " takes port 53 of every new address, and does not start where weft has it"],
            &["weft setup"],
        ),
        Some(who) => ok("port53", &["held by ", who, "; weft's rules bring ", at, " to a port of its own"]),
    }
}

/// `resolver`: dnsmasq or systemd-resolved; `done`: it knows of the cluster's names.
#[must_use]
pub fn resolver(resolver: Option<&str>, done: bool) -> Line {
    match resolver {
        Some(name) if done => ok("resolver", &[name, " asks weft for the cluster's names"]),
        Some(name) => warn("resolver", &[name, " does not know of the cluster's names"], &["weft setup"]),
        None => ok("resolver", &["neither dnsmasq nor systemd-resolved is here"]),
    }
}

/// An address that is to be bound, and who has it, or why it cannot be.
#[must_use]
pub fn bind(name: &str, key: &str, at: &str, trouble: Option<&str>) -> Line {
    match trouble {
        None => ok(name, &[at, " is free"]),
        Some(why) => fail(name, &[key, ": ", at, ": ", why], &["end that program, or set another ", key]),
    }
}

/// `ways_out`: the interfaces of default routes.
#[must_use]
pub fn route(ways_out: &[String], vips: &[Ipv4Addr], taken: &[Net]) -> Line {
    let inside = |vip: &&Ipv4Addr| taken.iter().any(|net| net.length() > 1 && net.contains((**vip).into()));
    if let Some(vip) = vips.iter().find(inside) {
        let net = taken.iter().find(|net| net.length() > 1 && net.contains((*vip).into())).map(ToString::to_string);
        return warn(
            "route",
            &[&vip.to_string(), " of a Service lies in ", &net.unwrap_or_default(), ", a network of this host"],
            &["number that network, or the cluster's Services, otherwise"],
        );
    }
    if ways_out.is_empty() {
        return warn(
            "route",
            &["there is no default route: no relay and no other site can be reached"],
            &["see that an uplink has an address and a gateway"],
        );
    }
    ok("route", &["out by ", &ways_out.join(", "), "; virtual addresses collide with no network of this host"])
}

/// Interfaces of default routes with their MTU; `peers`: of an agent at work, which has measured its paths.
#[must_use]
pub fn mtu(links: &[(String, u32)], peers: &[Peer]) -> Line {
    let Some((name, least)) = links.iter().min_by_key(|(_, mtu)| *mtu) else { return ok("mtu", &["no uplink"]) };
    let shown = least.to_string();
    let text = [name.as_str(), " takes ", &shown, " bytes, and the tunnel's smallest packets have 1228 (IPv6: 1248)"];
    if *least < MTU_FAIL {
        return fail("mtu", &text, &["ip link set ", name, " mtu 1500, or what its line takes"]);
    }
    if *least < MTU_WARN {
        return warn("mtu", &text, &["IPv6 wants 1280: ip link set ", name, " mtu 1500, or what its line takes"]);
    }
    let Some(peer) = peers.iter().filter(|p| p.mtu > 0).min_by_key(|p| p.mtu) else {
        return ok("mtu", &[name, " takes ", &shown, " bytes"]);
    };
    let narrowest =
        ["; of the tunnel's paths that to ", &peer.name, " takes the least, ", &peer.mtu.to_string()].concat();
    ok("mtu", &[name, " takes ", &shown, " bytes", &narrowest, " in a datagram"])
}

/// One line for each relay, and one for the NAT that they see.
#[must_use]
pub fn relays(list: &[Relay], nat: &str) -> Vec<Line> {
    let mut out: Vec<Line> = list.iter().map(relay).collect();
    let up = list.iter().filter(|r| r.registered).count();
    if list.is_empty() {
        out.push(warn(
            "relay",
            &["the bundle names none: behind a NAT other nodes are found on the LAN only"],
            &["issue it with --relay name@host:port"],
        ));
    } else if up > 0 {
        out.push(if nat.starts_with("address-dependent") {
            warn(
                "nat",
                &[nat, ": a direct path to another such NAT is not to be had"],
                &["turn on PCP or NAT-PMP (OpenWrt: miniupnpd) at the gateway, or use IPv6"],
            )
        } else if up == 1 && nat.starts_with("unknown") {
            ok("nat", &["there is one; what kind it is takes two relays to tell"])
        } else {
            ok("nat", &[nat])
        });
    }
    out
}

fn relay(r: &Relay) -> Line {
    let (name, note) = (["relay ", &r.name].concat(), if r.note.is_empty() { "no answer" } else { &r.note });
    if r.registered {
        let rtt = r.rtt_ms.map_or_else(String::new, |ms| [", ", &ms.to_string(), " ms"].concat());
        let text = [&r.address, &rtt, ": ", note];
        return if note == BY_TCP {
            warn(&name, &text, &["open UDP to it: by TCP all is slower, and no path is direct"])
        } else {
            ok(&name, &text)
        };
    }
    fail(
        &name,
        &[&r.address, ": ", note],
        &["is it running, is UDP to it open, and was the bundle issued by the same CA?"],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(line: &Line) -> String {
        [line.verdict.as_str(), " ", &line.text, " ", &line.remedy].concat()
    }

    #[test]
    fn port_53() {
        let at = "169.254.96.16:53";
        for (holder, shares, expected) in [
            (None, false, "ok 169.254.96.16:53 is free"),
            (Some("dnsmasq (process 7)"), false, "warn dnsmasq (process 7) takes port 53"),
            (Some("dnsmasq (process 7)"), true, "ok held by dnsmasq"),
            (Some("unbound (process 7)"), false, "ok held by unbound"),
            (Some("edgemesh-agent (process 7)"), true, "fail 169.254.96.16:53 is taken by edgemesh-agent"),
        ] {
            assert!(said(&port53(at, holder, shares)).starts_with(expected), "{holder:?} {shares}");
        }
        assert!(said(&resolver(Some("dnsmasq"), false)).ends_with("weft setup"));
        assert!(said(&resolver(Some("dnsmasq"), true)).starts_with("ok"));
        assert!(said(&bind("tunnel-port", "tunnel.listen", "[::]:7843", Some("taken by x"))).starts_with("fail"));
        assert!(said(&bind("tunnel-port", "tunnel.listen", "[::]:7843", None)).starts_with("ok"));
    }

    #[test]
    fn routes() {
        let wan = ["wan".to_owned()];
        let net = |a: [u8; 4], len| Net::new(Ipv4Addr::from(a).into(), len);
        let vip = [Ipv4Addr::new(10, 96, 0, 10)];
        assert!(said(&route(&wan, &vip, &[net([192, 168, 1, 0], 24), net([0; 4], 0)])).starts_with("ok out by wan"));
        assert!(
            said(&route(&wan, &vip, &[net([10, 0, 0, 0], 8)]))
                .starts_with("warn 10.96.0.10 of a Service lies in 10.0.0.0/8")
        );
        assert!(said(&route(&[], &vip, &[])).starts_with("warn there is no default route"));
    }

    #[test]
    fn sizes() {
        for (least, expected) in [(1_227, "fail"), (1_228, "warn"), (1_280, "ok")] {
            assert_eq!(mtu(&[("a".into(), 1_500), ("b".into(), least)], &[]).verdict, expected);
        }
        assert_eq!(mtu(&[], &[]).verdict, "ok");
        let peer = |name: &str, mtu| Peer {
            name: name.into(),
            path: String::new(),
            via: String::new(),
            rtt_ms: None,
            congestion: String::new(),
            mtu,
            since_secs: 0,
            streams: 0,
            tx_bytes: 0,
            rx_bytes: 0,
            note: String::new(),
        };
        let peers = [peer("gone", 0), peer("wide", 1_452), peer("narrow", 1_280)];
        assert!(
            mtu(&[("a".into(), 1_500)], &peers).text.ends_with("that to narrow takes the least, 1280 in a datagram")
        );
    }

    #[test]
    fn relays_and_nat() {
        let relay = |registered| Relay {
            name: "r".into(),
            address: "192.0.2.1:7843".into(),
            registered,
            rtt_ms: Some(20),
            note: if registered { "sees us as 192.0.2.9:7843".into() } else { String::new() },
        };
        let lines = |list: &[Relay], nat| relays(list, nat).iter().map(said).collect::<Vec<_>>();
        assert!(lines(&[], "")[0].starts_with("warn the bundle names none"));
        let good = lines(&[relay(true), relay(false)], "unknown mapping");
        assert_eq!(good[0], "ok 192.0.2.1:7843, 20 ms: sees us as 192.0.2.9:7843 ");
        assert!(good[1].starts_with("fail 192.0.2.1:7843: no answer is it running"));
        assert!(good[2].contains("takes two relays to tell"));
        assert!(lines(&[relay(true), relay(true)], "address-dependent mapping")[2].starts_with("warn"));
        assert_eq!(
            lines(&[relay(true), relay(true)], "endpoint-independent mapping")[2],
            "ok endpoint-independent mapping "
        );
        let by_tcp = Relay { note: BY_TCP.into(), ..relay(true) };
        assert!(lines(&[by_tcp], "")[0].starts_with("warn 192.0.2.1:7843, 20 ms: by TCP"));
        assert_eq!(lines(&[relay(false)], "unknown mapping").len(), 1);
    }
}
