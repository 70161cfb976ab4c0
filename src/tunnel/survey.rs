//! What the kernel's lists of devices, addresses and routes mean for the tunnel: where other nodes may reach this
//! one, by what it reaches them, and whom to ask for a port.

use super::lan::Link;
use crate::proxy::{
    link::{self, Address, Address6, Route, Route6},
    rules::DEVICE,
};
use std::net::{IpAddr, Ipv4Addr};

/// Devices that lead to containers of this host and to no other node.
const CONTAINERS: [&str; 11] =
    ["cni", "docker", "veth", "flannel", "cali", "cilium", "lxc", "kube-", "podman", "nerdctl", "virbr"];

/// The kernel's lists; of the routes those that lead out.
#[derive(Debug, Default)]
pub struct Network {
    pub links: Vec<link::Link>,
    pub addresses: Vec<Address>,
    pub addresses6: Vec<Address6>,
    pub routes: Vec<Route>,
    pub routes6: Vec<Route6>,
}

/// An address of an interface that a default route leads out by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub address: IpAddr,
    pub index: u32,
}

/// Whom to ask for a port, and as whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub address: Ipv4Addr,
    pub local: Ipv4Addr,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The links that we are on.
    pub links: Vec<Link>,
    /// The indices of the interfaces that have an IPv6 address of their link.
    pub scopes: Vec<u32>,
    /// The preferred first.
    pub uplinks: Vec<Uplink>,
    /// Networks that are reached by no default route.
    pub near: Vec<Link>,
    pub gateway: Option<Gateway>,
}

/// `br-` and twelve hexadecimal digits; OpenWrt's br-lan is none.
fn docker_bridge(name: &str) -> bool {
    name.strip_prefix("br-").is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Neither loopback, nor weft0, nor a device of containers; or what the user names.
fn wanted(name: &str, only: &[String]) -> bool {
    if only.is_empty() {
        name != DEVICE && name != "lo" && !CONTAINERS.iter().any(|c| name.starts_with(c)) && !docker_bridge(name)
    } else {
        only.iter().any(|o| o == name)
    }
}

/// Interfaces of default routes, by metric, each once.
fn default_devices(routes: impl Iterator<Item = (u32, Vec<u32>)>) -> Vec<u32> {
    let mut by_metric: Vec<(u32, Vec<u32>)> = routes.collect();
    by_metric.sort_by_key(|(metric, _)| *metric);
    let mut devices = Vec::new();
    for index in by_metric.into_iter().flat_map(|(_, devices)| devices) {
        if !devices.contains(&index) {
            devices.push(index);
        }
    }
    devices
}

impl Network {
    /// `only`, where it is not empty, names the interfaces that are used.
    #[must_use]
    pub fn survey(&self, only: &[String]) -> Survey {
        let chosen = |index: u32| self.links.iter().find(|l| l.index == index && l.up && wanted(&l.name, only));
        // Without a carrier an interface keeps its addresses and routes, and sends nothing.
        let running = |index: &u32| chosen(*index).is_some_and(|l| l.running);
        let mut found = Survey::default();
        for a in self.addresses.iter().filter(|a| chosen(a.index).is_some() && !a.local.is_loopback()) {
            found.links.push(Link { address: a.local.into(), prefix: a.network.length() });
        }
        let fit = |a: &&Address6| a.fit && !a.local.is_loopback() && !a.local.is_multicast();
        for a in self.addresses6.iter().filter(fit).filter(|a| chosen(a.index).is_some()) {
            if a.local.is_unicast_link_local() && !found.scopes.contains(&a.index) {
                found.scopes.push(a.index);
            }
            found.links.push(Link { address: a.local.into(), prefix: a.length });
        }
        let defaults = self.routes.iter().filter(|r| r.to.length() == 0);
        for index in default_devices(defaults.map(|r| (r.metric, r.devices.clone()))).iter().filter(|i| running(i)) {
            self.uplink(*index, &mut found);
        }
        let defaults = self.routes6.iter().filter(|r| r.length == 0);
        for index in default_devices(defaults.map(|r| (r.metric, r.devices.clone()))).iter().filter(|i| running(i)) {
            // RFC 4291: what is global unicast today is in 2000::/3. An address that stays is better than one of a day.
            let mut of = self.addresses6.iter().filter(|a| a.index == *index && a.fit);
            let global = |a: &&Address6| a.local.segments()[0] >> 13 == 1;
            let best = of.by_ref().filter(global).min_by_key(|a| a.temporary);
            found.uplinks.extend(best.map(|a| Uplink { address: a.local.into(), index: a.index }));
        }
        found.near = found.links.clone();
        let special = self.routes.iter().filter(|r| r.to.length() > 1 && r.devices.iter().any(running));
        found.near.extend(special.map(|r| Link { address: r.to.address().into(), prefix: r.to.length() }));
        let special = self.routes6.iter().filter(|r| r.length > 3 && r.devices.iter().any(running));
        found.near.extend(special.map(|r| Link { address: r.to.into(), prefix: r.length }));
        found.near.sort_unstable();
        found.near.dedup();
        found
    }

    fn uplink(&self, index: u32, found: &mut Survey) {
        let route = self.routes.iter().filter(|r| r.to.length() == 0 && r.devices.contains(&index));
        let gateway = route.min_by_key(|r| r.metric).and_then(|r| r.gateways.first().copied());
        let here = || self.addresses.iter().filter(|a| a.index == index && !a.local.is_loopback());
        let beside = |a: &&Address| {
            let link = Link { address: a.local.into(), prefix: a.network.length() };
            gateway.is_some_and(|g| link.contains(g.into()))
        };
        let Some(local) = here().find(beside).or_else(|| here().next()).map(|a| a.local) else { return };
        found.uplinks.push(Uplink { address: local.into(), index });
        if let (Some(address), None) = (gateway, found.gateway) {
            found.gateway = Some(Gateway { address, local });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::cover::Prefix;

    fn device(index: u32, name: &str, running: bool) -> link::Link {
        link::Link { index, name: name.into(), up: true, running, ..link::Link::default() }
    }

    fn v4(index: u32, local: [u8; 4], length: u8) -> Address {
        Address { index, local: local.into(), network: Prefix::new(local.into(), length) }
    }

    fn v6(index: u32, local: &str) -> Address6 {
        Address6 { index, local: local.parse().unwrap(), length: 64, temporary: false, fit: true }
    }

    fn default_by(index: u32, metric: u32, gateway: [u8; 4]) -> Route {
        let to = Prefix::new([0, 0, 0, 0].into(), 0);
        let gateways = vec![gateway.into()];
        Route { to, protocol: 3, metric, leads_out: true, devices: vec![index], gateways }
    }

    fn default6_by(index: u32, metric: u32) -> Route6 {
        Route6 { to: "::".parse().unwrap(), length: 0, protocol: 3, metric, leads_out: true, devices: vec![index] }
    }

    /// Wired, LTE, the LAN's bridge, containers, weft0.
    fn router() -> Network {
        Network {
            links: vec![
                device(1, "lo", true),
                device(2, "wan", true),
                device(3, "wwan0", true),
                device(4, "br-lan", true),
                device(5, "br-0123456789ab", true),
                device(6, "weft0", true),
            ],
            addresses: vec![
                v4(1, [127, 0, 0, 1], 8),
                v4(2, [172, 16, 9, 9], 32),
                v4(2, [192, 168, 1, 2], 24),
                v4(3, [10, 64, 0, 2], 30),
                v4(4, [192, 168, 7, 1], 24),
                v4(5, [172, 17, 0, 1], 16),
                v4(6, [169, 254, 96, 16], 32),
            ],
            addresses6: vec![
                v6(1, "::1"),
                v6(2, "fe80::2"),
                v6(2, "2a0f::2"),
                Address6 { temporary: true, ..v6(2, "2a0f::abcd") },
                Address6 { fit: false, ..v6(2, "2a0f::dead") },
                v6(4, "fd00::1"),
                v6(5, "2a0f:5::1"),
            ],
            routes: vec![default_by(3, 200, [10, 64, 0, 1]), default_by(2, 100, [192, 168, 1, 1])],
            routes6: vec![default6_by(2, 1024)],
        }
    }

    fn texts(list: impl IntoIterator<Item = IpAddr>) -> Vec<String> {
        list.into_iter().map(|a| a.to_string()).collect()
    }

    #[test]
    fn containers_and_unfit_addresses_are_nobodys_and_uplinks_come_by_metric() {
        let found = router().survey(&[]);
        let links = texts(found.links.iter().map(|l| l.address));
        let want =
            ["172.16.9.9", "192.168.1.2", "10.64.0.2", "192.168.7.1", "fe80::2", "2a0f::2", "2a0f::abcd", "fd00::1"];
        assert_eq!(links, want);
        assert_eq!(found.scopes, [2]);
        // The address beside the gateway, and the one that stays.
        assert_eq!(texts(found.uplinks.iter().map(|u| u.address)), ["192.168.1.2", "10.64.0.2", "2a0f::2"]);
        assert_eq!(found.uplinks.iter().map(|u| u.index).collect::<Vec<_>>(), [2, 3, 2]);
        let gateway = Gateway { address: [192, 168, 1, 1].into(), local: [192, 168, 1, 2].into() };
        assert_eq!(found.gateway, Some(gateway));
    }

    #[test]
    fn an_uplink_without_carrier_is_none() {
        let mut network = router();
        network.links[1].running = false;
        let found = network.survey(&[]);
        assert_eq!(texts(found.uplinks.iter().map(|u| u.address)), ["10.64.0.2"]);
        assert_eq!(found.gateway.unwrap().address, Ipv4Addr::new(10, 64, 0, 1));
        assert!(found.links.iter().any(|l| l.address.to_string() == "192.168.1.2"), "it has its address still");
    }

    #[test]
    fn the_user_may_name_interfaces() {
        let found = router().survey(&["br-lan".into(), "wwan0".into()]);
        assert_eq!(texts(found.links.iter().map(|l| l.address)), ["10.64.0.2", "192.168.7.1", "fd00::1"]);
        assert_eq!(texts(found.uplinks.iter().map(|u| u.address)), ["10.64.0.2"]);
        assert_eq!(router().survey(&["none".into()]), Survey::default());
    }

    #[test]
    fn the_bridges_of_containers_are_told_from_others() {
        for (name, theirs) in
            [("br-lan", false), ("br-0123456789ab", true), ("br-0123456789xy", false), ("docker0", true)]
        {
            assert_eq!(!wanted(name, &[]), theirs, "{name}");
        }
    }
}
