//! Devices, addresses and routes by rtnetlink. Each request is answered by the kernel at once, so it is
//! made and read in one go; only [`Monitor`] waits, in the loop.

use crate::sorted::{Map, Set};
use crate::{
    proxy::{
        cover::Net,
        link::{self, Answer, DeviceKind, Link, Raw},
        rules::{ADDRESS6, DEVICE},
    },
    reactor::Async,
    sys::{self, Family},
    tunnel::survey::Network,
};
use anyhow::{Context, Result, bail};
use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
    time::Duration,
};

/// How long an answer may take: rtnl is one lock for the whole kernel.
const PATIENCE: Duration = Duration::from_secs(5);

/// netlink(7): the kernel's datagrams have at most this size for readers that offer no more.
const DATAGRAM: usize = 32 * 1024;

/// Datagrams of one dump that we read at most: some 300,000 routes. Beyond it the dump is an error, and
/// what was found so far is not used.
const DATAGRAMS: usize = 4_096;

/// Prefixes of this length and shorter count as default routes: VPNs halve them to win over the real one.
const DEFAULT_LIKE: u8 = 1;

/// What our device says of itself.
const ALIAS: &str = "weft: services of the cluster; `weft cleanup` removes it";

/// A socket for questions to the kernel, one at a time.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    seq: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(family: Family) -> Result<Self> {
        let fd = sys::netlink(family, 0, PATIENCE).context("netlink is not available")?;
        Ok(Self { fd, seq: 0, buffer: vec![0; DATAGRAM] })
    }

    /// Sends what `make` builds and hands over what is answered until the end.
    pub(crate) fn exchange(
        &mut self,
        make: impl FnOnce(u32) -> Vec<u8>,
        take: &mut dyn FnMut(&Raw<'_>),
    ) -> io::Result<()> {
        self.seq = self.seq.wrapping_add(1);
        let request = make(self.seq);
        sys::room_to_send(&self.fd, request.len())?;
        sys::send(&self.fd, &request)?;
        for _ in 0..DATAGRAMS {
            let datagram = match sys::receive(&self.fd, &mut self.buffer, true) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                other => other?,
            };
            for raw in link::messages(datagram).filter(|raw| raw.seq == self.seq) {
                match raw.end() {
                    Some(Answer::Done) => return Ok(()),
                    Some(Answer::Failed(code)) => return Err(io::Error::from_raw_os_error(code)),
                    Some(_) | None => take(&raw),
                }
            }
        }
        Err(io::Error::other("the kernel's list is too long"))
    }

    fn ask(&mut self, make: impl FnOnce(u32) -> Vec<u8>, mut take: impl FnMut(Answer)) -> io::Result<()> {
        self.exchange(make, &mut |raw| take(raw.answer()))
    }

    fn tell(&mut self, make: impl FnOnce(u32) -> Vec<u8>) -> io::Result<()> {
        self.ask(make, |_| ())
    }

    fn links(&mut self) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let result = self.ask(link::dump_links, |answer| {
            if let Answer::Link(link) = answer {
                links.push(link);
            }
        });
        result.context("cannot list the network devices")?;
        Ok(links)
    }

    fn addresses(&mut self) -> Result<Vec<link::Address>> {
        let mut addresses = Vec::new();
        let result = self.ask(link::dump_addresses, |answer| {
            if let Answer::Address(address) = answer {
                addresses.push(address);
            }
        });
        result.context("cannot list the addresses")?;
        Ok(addresses)
    }

    /// None where the kernel has no IPv6.
    fn addresses6(&mut self) -> Vec<link::Address6> {
        let mut addresses = Vec::new();
        let _ = self.ask(link::dump_addresses6, |answer| {
            if let Answer::Address6(address) = answer {
                addresses.push(address);
            }
        });
        addresses
    }

    fn routes6(&mut self) -> Vec<link::Route6> {
        let mut routes = Vec::new();
        let _ = self.ask(link::dump_routes6, |answer| {
            if let Answer::Route6(route) = answer {
                routes.push(route);
            }
        });
        routes
    }

    fn routes(&mut self, mut take: impl FnMut(link::Route)) -> Result<()> {
        let result = self.ask(link::dump_routes, |answer| {
            if let Answer::Route(route) = answer {
                take(route);
            }
        });
        result.context("cannot list the routes")
    }

    /// Deletes a table of nftables in which nothing is; true where it did.
    fn delete_empty_table(&mut self, v4: bool, name: &str) -> io::Result<bool> {
        let mut uses = None;
        let found = self.ask(
            |seq| link::get_nft_table(seq, v4, name),
            |answer| {
                if let Answer::TableUse(n) = answer {
                    uses = Some(n);
                }
            },
        );
        match found {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            other => other?,
        }
        if uses != Some(0) {
            return Ok(false);
        }
        self.tell(|seq| link::delete_nft_table(seq, v4, name)).map(|()| true)
    }
}

/// Does what a request asks for; that it is so already is no error.
fn unless(done: io::Result<()>, already: ErrorKind) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == already => Ok(false),
        Err(e) => Err(e),
    }
}

fn ours(link: &Link) -> bool {
    link.mac == link::MAC || link.alias == ALIAS
}

fn cannot(what: &str, e: io::Error) -> anyhow::Error {
    let denied = e.kind() == ErrorKind::PermissionDenied;
    let hint = if denied { " (needs CAP_NET_ADMIN: run weft as root)" } else { "" };
    anyhow::Error::new(e).context(format!("cannot {what}{hint}"))
}

/// Our device, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub index: u32,
    /// "dummy" or "bridge".
    pub kind: String,
}

/// What the host's own routes and addresses say about where VIPs are not, and about whom we catch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Interfaces of default routes, of all routing tables.
    pub default_interfaces: Set<String>,
    /// The same of IPv6.
    pub default_interfaces6: Set<String>,
    /// Connected networks, routes of others, gateways.
    pub taken: Vec<Net>,
    /// Of this host, but weft0's.
    pub addresses: Vec<IpAddr>,
    /// Whether weft0 has its address of IPv6.
    pub has_own6: bool,
}

/// Makes weft0 where it is not there, sets it up, and gives it our address and no other IPv4 address.
///
/// # Errors
/// Without CAP_NET_ADMIN, without dummy and bridge devices, or when a device of somebody else has the name.
pub fn ensure_device(ip: Ipv4Addr) -> Result<Device> {
    let mut socket = Socket::open(Family::Route)?;
    let mut links = socket.links()?;
    if !links.iter().any(|l| l.name == DEVICE) {
        create(&mut socket, &links, DEVICE)?;
        links = socket.links()?;
    }
    let Some(device) = links.into_iter().find(|l| l.name == DEVICE) else {
        bail!("{DEVICE} vanished while it was being made");
    };
    if !ours(&device) {
        bail!("there is a {} named {DEVICE} that weft did not make: rename or remove it", device_kind(&device));
    }
    if !device.up || device.alias != ALIAS {
        let up = socket.tell(|seq| link::set_link_up(seq, device.index, ALIAS));
        up.map_err(|e| cannot("set weft0 up", e))?;
    }
    let there: Vec<_> = socket.addresses()?.into_iter().filter(|a| a.index == device.index).map(|a| a.local).collect();
    for old in there.iter().filter(|a| **a != ip) {
        let gone = socket.tell(|seq| link::delete_address(seq, device.index, (*old).into()));
        unless(gone, ErrorKind::AddrNotAvailable).map_err(|e| cannot("remove an old address of weft0", e))?;
    }
    if !there.contains(&ip) {
        let added = socket.tell(|seq| link::add_address(seq, device.index, ip.into()));
        unless(added, ErrorKind::AlreadyExists).map_err(|e| cannot("give weft0 its address", e))?;
    }
    Ok(Device { index: device.index, kind: device.kind })
}

/// Gives weft0 its address of IPv6, or takes it away.
///
/// # Errors
/// Where IPv6 is switched off, above all.
pub fn set_address6(device: u32, wanted: bool) -> Result<()> {
    let mut socket = Socket::open(Family::Route)?;
    let own = ADDRESS6.into();
    let (message, already) = match wanted {
        true => (socket.tell(|seq| link::add_address(seq, device, own)), ErrorKind::AlreadyExists),
        false => (socket.tell(|seq| link::delete_address(seq, device, own)), ErrorKind::AddrNotAvailable),
    };
    let done = unless(message, already);
    done.map(drop).map_err(|e| cannot("set the IPv6 address of weft0", e))
}

/// Makes a device as weft0 would be and removes it; "dummy" or "bridge".
///
/// # Errors
/// As [`ensure_device`].
pub fn try_device() -> Result<&'static str> {
    const NAME: &str = "weft-check";
    let mut socket = Socket::open(Family::Route)?;
    let before = socket.links()?;
    if !before.iter().any(|l| l.name == NAME) {
        create(&mut socket, &before, NAME)?;
    }
    let made = socket.links()?.into_iter().find(|l| l.name == NAME && ours(l)).context("it vanished")?;
    socket.tell(|seq| link::delete_link(seq, made.index)).map_err(|e| cannot("remove a device", e))?;
    Ok(if made.kind == DeviceKind::Dummy.name() { DeviceKind::Dummy } else { DeviceKind::Bridge }.name())
}

fn device_kind(link: &Link) -> &str {
    if link.kind.is_empty() { "device" } else { &link.kind }
}

/// A dummy, else a bridge. The module of the dummies makes a dummy0 when it is loaded: that goes again.
fn create(socket: &mut Socket, before: &[Link], name: &str) -> Result<()> {
    let had_dummy0 = before.iter().any(|l| l.name == "dummy0");
    let dummy = socket.tell(|seq| link::create_link(seq, name, DeviceKind::Dummy));
    if !had_dummy0 {
        let by_chance = |l: &&Link| l.name == "dummy0" && l.kind == "dummy" && !l.up;
        if let Some(link) = socket.links()?.iter().find(by_chance) {
            let _ = socket.tell(|seq| link::delete_link(seq, link.index));
        }
    }
    let Err(e) = dummy else { return Ok(()) };
    if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::AlreadyExists) {
        return Err(cannot("make weft0", e));
    }
    let bridge = socket.tell(|seq| link::create_link(seq, name, DeviceKind::Bridge));
    bridge.map_err(|b| cannot("make weft0, neither as a bridge nor as a dummy", b).context(format!("dummy: {e}")))
}

/// Makes our routes what they should be; returns how many it added and removed. One that somebody else
/// has with the very same metric is left alone.
///
/// # Errors
/// As the kernel's; the other routes are made all the same.
pub fn sync_routes(device: u32, wanted: &[Net]) -> Result<(usize, usize)> {
    let mut socket = Socket::open(Family::Route)?;
    let mut there = Set::new();
    socket.routes(|route| {
        if route.protocol == link::ROUTE_PROTOCOL && route.devices == [device] {
            there.insert(Net::from(route.to));
        }
    })?;
    let ours = |r: &link::Route6| r.protocol == link::ROUTE_PROTOCOL && r.devices == [device];
    there.extend(socket.routes6().into_iter().filter(ours).map(|r| Net::new(r.to.into(), r.length)));
    let wanted: Set<Net> = wanted.iter().copied().collect();
    let (mut added, mut removed, mut failed) = (0, 0, None);
    for prefix in wanted.difference(&there) {
        let result = socket.tell(|seq| link::add_route(seq, device, *prefix));
        match unless(result, ErrorKind::AlreadyExists) {
            Ok(new) => added += usize::from(new),
            Err(e) => failed = Some(cannot(&format!("add the route to {prefix}"), e)),
        }
    }
    for prefix in there.difference(&wanted) {
        // ESRCH, which has no ErrorKind: it is gone already.
        match socket.tell(|seq| link::delete_route(seq, device, *prefix)) {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                failed = Some(cannot(&format!("remove the route to {prefix}"), e));
            }
            Ok(()) | Err(_) => removed += 1,
        }
    }
    failed.map_or(Ok((added, removed)), Err)
}

/// Looks around.
///
/// # Errors
/// When the kernel does not list its devices, addresses or routes.
pub fn surroundings() -> Result<Surroundings> {
    let mut socket = Socket::open(Family::Route)?;
    let names: Map<u32, String> = socket.links()?.into_iter().map(|l| (l.index, l.name)).collect();
    let own = names.iter().find(|(_, name)| *name == DEVICE).map(|(index, _)| *index);
    let mut found = Surroundings::default();
    for address in socket.addresses()?.iter().filter(|a| Some(a.index) != own) {
        found.taken.push(address.network.into());
        found.addresses.push(address.local.into());
    }
    socket.routes(|route| {
        if !route.leads_out || route.protocol == link::ROUTE_PROTOCOL {
            return;
        }
        if route.to.length() <= DEFAULT_LIKE {
            let devices = route.devices.iter().filter_map(|index| names.get(index));
            found.default_interfaces.extend(devices.filter(|name| *name != DEVICE).cloned());
        } else {
            found.taken.push(route.to.into());
        }
        found.taken.extend(route.gateways.iter().map(|g| Net::host((*g).into())));
    })?;
    for address in socket.addresses6() {
        if Some(address.index) == own {
            found.has_own6 |= address.local == ADDRESS6;
        } else {
            found.taken.push(Net::new(address.local.into(), address.length));
            found.addresses.extend(address.fit.then_some(IpAddr::V6(address.local)));
        }
    }
    for route in socket.routes6() {
        let outside = || route.devices.iter().filter(|index| Some(**index) != own);
        if !route.leads_out || route.protocol == link::ROUTE_PROTOCOL {
            continue;
        } else if route.length <= DEFAULT_LIKE {
            found.default_interfaces6.extend(outside().filter_map(|index| names.get(index)).cloned());
        } else if outside().next().is_some() {
            found.taken.push(Net::new(route.to.into(), route.length));
        }
    }
    found.taken.sort_unstable();
    found.taken.dedup();
    Ok(found)
}

/// What the kernel says of devices, addresses and routes, for [`survey`](crate::tunnel::survey). IPv6's part is
/// empty where the kernel has none.
///
/// # Errors
/// When the kernel does not list its devices, addresses or routes.
pub fn network() -> Result<Network> {
    let mut socket = Socket::open(Family::Route)?;
    let mut network = Network { links: socket.links()?, addresses: socket.addresses()?, ..Network::default() };
    socket.routes(|route| network.routes.extend(Some(route).filter(|r| r.leads_out)))?;
    network.addresses6 = socket.addresses6();
    network.routes6 = socket.routes6();
    network.routes6.retain(|route| route.leads_out);
    Ok(network)
}

/// Removes our device, and with it its address and routes. Says what it removed.
///
/// # Errors
/// Without CAP_NET_ADMIN.
pub fn remove() -> Result<Vec<String>> {
    let mut socket = Socket::open(Family::Route)?;
    let links = socket.links()?;
    let Some(device) = links.iter().find(|l| l.name == DEVICE && ours(l)) else { return Ok(Vec::new()) };
    let mut routes = 0_usize;
    socket.routes(|route| routes += usize::from(route.devices == [device.index] && route.leads_out))?;
    let addresses = socket.addresses()?.iter().filter(|a| a.index == device.index).count();
    socket.tell(|seq| link::delete_link(seq, device.index)).map_err(|e| cannot("remove weft0", e))?;
    Ok(vec![format!("device {DEVICE} ({}), its addresses: {addresses}, its routes: {routes}", device_kind(device))])
}

/// Removes a table of nftables, of the family ip or ip6, if nothing is in it.
///
/// # Errors
/// When the kernel refuses, or has no nftables.
pub fn remove_empty_table(v4: bool, name: &str) -> Result<bool> {
    let deleted = Socket::open(Family::Netfilter)?.delete_empty_table(v4, name);
    deleted.with_context(|| format!("cannot remove the empty table {name}"))
}

/// Tells when devices, addresses or routes have changed.
#[derive(Debug)]
pub struct Monitor {
    socket: Async<OwnedFd>,
}

impl Monitor {
    /// # Errors
    /// When there is no netlink.
    pub fn open() -> Result<Self> {
        Self::of(link::GROUPS)
    }

    /// The same for IPv6 too.
    ///
    /// # Errors
    /// When there is no netlink.
    pub fn of_both_families() -> Result<Self> {
        Self::of(link::GROUPS | link::GROUPS_IPV6)
    }

    fn of(groups: u32) -> Result<Self> {
        let fd = sys::netlink(Family::Route, groups, PATIENCE).context("netlink is not available")?;
        Ok(Self { socket: Async::new(fd)? })
    }

    /// Resolves when something has changed since the last call; cancel-safe.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn changed(&self) -> io::Result<()> {
        futures_lite::future::poll_fn(|cx| self.socket.poll_readable(cx)).await?;
        let mut buffer = [0; 512];
        // What was lost (ENOBUFS) or is too large for the buffer is a change like any other. At most as many
        // as one turn may take: a storm of routes must not own the loop.
        for _ in 0..256 {
            match sys::receive(&self.socket, &mut buffer, false) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::InvalidData || e.raw_os_error() == Some(libc::ENOBUFS) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anybody_may_look_around() {
        let mut socket = Socket::open(Family::Route).unwrap();
        let links = socket.links().unwrap();
        assert!(links.iter().any(|l| l.name == "lo"), "{links:?}");
        assert!(!links.iter().any(|l| l.name == "lo" && ours(l)));
        socket.addresses().unwrap();
        assert!(!surroundings().unwrap().default_interfaces.contains("lo"));
    }
}
