//! What DNS has to know of the host's links: whether the way out has changed, and whose queries are answered.

use crate::sorted::Set;
use crate::{
    netlink::{self, Monitor},
    reactor::Timer,
    shared::{Reader, Writer},
};
use futures_lite::future::or;
use std::{fs, path::Path, time::Duration};

/// Changes come in bursts; none is looked at before it is over, or at least after this.
const LULL: Duration = Duration::from_secs(1);
/// Where nobody tells of changes.
const RECHECK: Duration = Duration::from_secs(30);

/// Interfaces by their index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clients {
    AllBut(Vec<u32>),
    Only(Vec<u32>),
}

/// The links as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The interfaces of default routes that have a carrier.
    pub uplinks: Set<String>,
    clients: Clients,
}

impl Seen {
    /// Whether those who come in by an interface are answered.
    #[must_use]
    pub fn serves(&self, index: u32) -> bool {
        match &self.clients {
            Clients::AllBut(refused) => !refused.contains(&index),
            Clients::Only(served) => served.contains(&index),
        }
    }
}

/// See the module.
pub struct Links {
    /// As `[proxy] interfaces` has them.
    interfaces: Vec<String>,
    seen: Writer<Seen>,
    /// The last that were found: while the uplink is down nobody on it may become a client.
    outside: Set<String>,
}

impl Links {
    #[must_use]
    pub fn new(interfaces: &[String]) -> Self {
        let seen = Writer::new(Seen { uplinks: Set::new(), clients: Clients::AllBut(Vec::new()) });
        let mut links = Self { interfaces: interfaces.to_vec(), seen, outside: Set::new() };
        links.look();
        links
    }

    #[must_use]
    pub fn seen(&self) -> Reader<Seen> {
        self.seen.reader()
    }

    /// Follows the links for ever.
    pub async fn run(mut self) {
        let monitor = Monitor::open().map_err(|why| log::warn!("dns: changes of links: {why:#}")).ok();
        loop {
            let changed = async {
                match &monitor {
                    Some(open) if open.changed().await.is_ok() => {}
                    Some(_) | None => {
                        Timer::after(RECHECK).await;
                    }
                }
            };
            changed.await;
            let more = async {
                if let Some(open) = &monitor {
                    while open.changed().await.is_ok() {}
                }
                std::future::pending().await
            };
            let lull = async {
                Timer::after(LULL).await;
            };
            or(lull, more).await;
            self.look();
        }
    }

    fn look(&mut self) {
        let mut out = match netlink::surroundings() {
            Ok(around) => around.default_interfaces,
            Err(why) => return log::warn!("dns: links: {why:#}"),
        };
        out.extend(default_interfaces_v6(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default()));
        let carried = |name: &&String| read(name, "carrier").is_none_or(|carrier| carrier != "0");
        let uplinks = out.iter().filter(carried).cloned().collect();
        if !out.is_empty() {
            self.outside = out;
        }
        let indexes = |names: &mut dyn Iterator<Item = &str>| names.filter_map(index).collect::<Vec<u32>>();
        let clients = if self.interfaces.is_empty() {
            Clients::AllBut(indexes(&mut self.outside.iter().map(String::as_str)))
        } else {
            Clients::Only(indexes(&mut self.interfaces.iter().map(String::as_str).chain(["lo"])))
        };
        let new = Seen { uplinks, clients };
        if self.seen.update(|seen| std::mem::replace(seen, new.clone())) != new {
            self.seen.ring();
        }
    }
}

/// Of what the kernel lists as IPv6 routes: an unreachable one (RTF_REJECT, linux/ipv6_route.h) leads nowhere.
pub(crate) fn default_interfaces_v6(list: &str) -> impl Iterator<Item = String> + '_ {
    const REJECT: u32 = 0x200;
    list.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [to, length, .., flags, device] = words[..] else { return None };
        let leads = u32::from_str_radix(flags, 16).is_ok_and(|f| f & REJECT == 0) && device != "lo";
        (leads && length == "00" && to.bytes().all(|b| b == b'0')).then(|| device.to_owned())
    })
}

fn read(interface: &str, what: &str) -> Option<String> {
    let path = Path::new("/sys/class/net").join(interface).join(what);
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The number of an interface of this host.
#[must_use]
pub fn index(name: &str) -> Option<u32> {
    if name.contains('/') { None } else { read(name, "ifindex")?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_of_ipv6() {
        let zero = "0".repeat(32);
        let line = |to: &str, length: &str, flags: &str, device: &str| {
            format!("{to} {length} {zero} 00 fe80{} 00000400 1 0 {flags} {device}\n", &zero[4..])
        };
        let list = line(&zero, "00", "00450003", "wan6")
            + &line(&zero, "00", "00200200", "reject")
            + &line(&zero, "00", "00450003", "lo")
            + &line(&format!("fe80{}", &zero[4..]), "40", "00000001", "eth1")
            + "nonsense\n";
        assert_eq!(default_interfaces_v6(&list).collect::<Vec<_>>(), ["wan6"]);
        assert!(default_interfaces_v6(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default()).count() < 100);
    }

    #[test]
    fn who_is_served() {
        let seen = |clients| Seen { uplinks: Set::new(), clients };
        assert!(seen(Clients::AllBut(vec![2])).serves(1) && !seen(Clients::AllBut(vec![2])).serves(2));
        assert!(seen(Clients::Only(vec![2])).serves(2) && !seen(Clients::Only(vec![2])).serves(1));
        let lo = index("lo").unwrap();
        for interfaces in [vec![], vec!["no-such-thing".into()]] {
            assert!(Links::new(&interfaces).seen().read(|s| s.serves(lo)), "{interfaces:?}");
        }
        assert!(!Links::new(&["no-such-thing".into()]).seen().read(|s| s.serves(lo + 1000)));
    }
}
