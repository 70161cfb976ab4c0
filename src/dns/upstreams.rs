//! Which servers to ask: resolv.conf's text, and what stands behind a stub that is named there.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6},
    path::Path,
};

/// Where systemd-resolved keeps the servers behind its stub (systemd-resolved.service(8)).
pub const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// Where OpenWrt keeps the servers behind its dnsmasq.
pub const OPENWRT: &str = "/tmp/resolv.conf.d/resolv.conf.auto";
const PORT: u16 = 53;

/// The servers of a resolv.conf(5). `index` gives the number of an interface, for `fe80::1%eth0`.
pub fn servers(text: &str, index: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let lines = text.lines().map(|l| l.split(['#', ';']).next().unwrap_or(""));
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let server = words.next().filter(|w| *w == "nameserver").and_then(|_| words.next())?;
            let (address, scope) = server.split_once('%').map_or((server, None), |(a, s)| (a, Some(s)));
            match (address.parse().ok()?, scope) {
                (IpAddr::V6(v6), Some(scope)) => {
                    let scope = scope.parse().ok().or_else(|| index(scope))?;
                    Some(SocketAddrV6::new(v6, PORT, 0, scope).into())
                }
                (address, None) => Some(SocketAddr::new(address, PORT)),
                (IpAddr::V4(_), Some(_)) => None,
            }
        })
        .collect()
}

/// The servers of a file, with stubs replaced by what is behind them: the stub would ask us back, or knows less.
/// `read` gives a file's servers, None where it cannot be read.
pub fn behind_stubs(path: &Path, read: impl Fn(&Path) -> Option<Vec<SocketAddr>>) -> Vec<SocketAddr> {
    let mut all = Vec::new();
    for server in read(path).unwrap_or_default() {
        let address = server.ip();
        let behind = if is_resolved(address) { Some(RESOLVED) } else { address.is_loopback().then_some(OPENWRT) };
        let behind = behind.map(Path::new).filter(|b| *b != path).and_then(&read).filter(|b| !b.is_empty());
        for server in behind.unwrap_or_else(|| vec![server]) {
            if !all.contains(&server) {
                all.push(server);
            }
        }
    }
    all
}

/// The stub and the proxy of systemd-resolved(8).
fn is_resolved(address: IpAddr) -> bool {
    [53, 54].iter().any(|last| address == IpAddr::from([127, 0, 0, *last]))
}

/// The addresses that a hosts(5) file gives a name.
#[must_use]
pub fn hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let lines = text.lines().map(|l| l.split('#').next().unwrap_or(""));
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|w| w.eq_ignore_ascii_case(name)).then_some(address)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resolv_conf() {
        let text = "# x\nsearch a.b\nnameserver 10.0.0.1\n nameserver  fd00::1 # y\nnameserver fe80::1%eth0\n\
                    nameserver fe80::1%wan\nnameserver fe80::2%7\nnameserver\nnameserver x\nnameservers 1.1.1.1\n;nameserver 2.2.2.2";
        let got = servers(text, |name| (name == "eth0").then_some(3));
        let want: Vec<SocketAddr> = ["10.0.0.1:53", "[fd00::1]:53", "[fe80::1%3]:53", "[fe80::2%7]:53"]
            .iter()
            .map(|s| s.parse().unwrap())
            .collect();
        assert_eq!(got, want);
    }

    #[test]
    fn reads_hosts() {
        let text = "127.0.0.1 localhost\n10.0.0.2\trelay Relay.example # relay2\nfd00::2 relay.example\nx relay";
        assert_eq!(hosts(text, "relay.EXAMPLE."), ["10.0.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
        assert_eq!(hosts(text, "relay2"), Vec::<IpAddr>::new());
    }

    #[test]
    fn stubs_give_way_to_what_is_behind_them() {
        let at = |s: &str| SocketAddr::new(s.parse().unwrap(), 53);
        let files = |present: &'static [(&'static str, &'static str)]| {
            move |path: &Path| {
                let (_, text) = present.iter().find(|(p, _)| Path::new(p) == path)?;
                Some(servers(text, |_| None))
            }
        };
        let etc = Path::new("/etc/resolv.conf");
        let stub = ("/etc/resolv.conf", "nameserver 127.0.0.53");
        assert_eq!(behind_stubs(etc, files(&[])), []);
        let got = behind_stubs(
            etc,
            files(&[("/etc/resolv.conf", "nameserver 127.0.0.53"), (RESOLVED, "nameserver 9.9.9.9")]),
        );
        assert_eq!(got, [at("9.9.9.9")]);
        assert_eq!(behind_stubs(etc, move |p| (p == etc).then(|| servers(stub.1, |_| None))), [at("127.0.0.53")]);
        let got = behind_stubs(
            etc,
            files(&[
                ("/etc/resolv.conf", "nameserver 127.0.0.1\nnameserver ::1\nnameserver 8.8.8.8"),
                (OPENWRT, "nameserver 10.0.0.1"),
            ]),
        );
        assert_eq!(got, [at("10.0.0.1"), at("8.8.8.8")]);
        // resolved's own file naming a loopback server is no stub of itself
        let got = behind_stubs(Path::new(OPENWRT), files(&[(OPENWRT, "nameserver 127.0.0.1")]));
        assert_eq!(got, [at("127.0.0.1")]);
    }
}
