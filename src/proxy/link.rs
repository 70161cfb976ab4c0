//! Messages of rtnetlink, and the two of nfnetlink that we need: encoder and decoder. Netlink is spoken
//! inside one kernel and is host-endian by definition (netlink(7)); addresses are in network order.

use super::cover::{Net, Prefix};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `rtm_protocol` of our routes. Neither linux/rtnetlink.h nor iproute2's rt_protos gives it to anybody;
/// it is the letter w.
pub const ROUTE_PROTOCOL: u8 = 0x77;

/// The largest metric: a route of anybody else to the same prefix wins.
pub const METRIC: u32 = u32::MAX;

/// weft0's hardware address: locally administered, and "weft0" in letters. It is set by the very message
/// that makes the device, so that a device is known as ours however we were killed.
pub const MAC: [u8; 6] = [0x02, b'w', b'e', b'f', b't', b'0'];

// linux/netlink.h
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_NONREC: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE: u16 = 0x3fff;
// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RT_TABLE_MAIN: u8 = 254;
const RT_TABLE_LOCAL: u32 = 255;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
/// RTMGRP_LINK, RTMGRP_IPV4_IFADDR and RTMGRP_IPV4_ROUTE: what can take away ours or change whom we catch.
pub const GROUPS: u32 = 0x1 | 0x10 | 0x40;
/// RTMGRP_IPV6_IFADDR and RTMGRP_IPV6_ROUTE.
pub const GROUPS_IPV6: u32 = 0x100 | 0x400;
// linux/if_link.h, linux/if_addr.h, linux/if.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u8 = 0x02;
const IFA_F_TEMPORARY: u32 = 0x01;
/// Duplicate, deprecated, tentative: no address to be reached at, or not for long.
const IFA_F_UNFIT: u32 = 0x08 | 0x20 | 0x40;
const IFF_UP: u32 = 1;
const IFF_RUNNING: u32 = 0x40;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
// linux/netfilter/nfnetlink.h, nf_tables.h
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_USE: u16 = 3;

/// What a device without packets is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Dummy,
    /// Without ports it forwards nothing; every kernel of a router has it.
    Bridge,
}

impl DeviceKind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dummy => "dummy",
            Self::Bridge => "bridge",
        }
    }
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Bytes as a u32 in the order of the host.
fn u32_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn u16_of(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = bytes.get(..16)?.try_into().ok()?;
    Some(octets.into())
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    Some(octets.into())
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, seq: u32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend(seq.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(fixed);
        Self(bytes)
    }

    fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        // Ours are names and numbers, far below 64 KiB.
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(aligned(self.0.len()), 0);
        self
    }

    fn done(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

fn zero_ended(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// ifinfomsg: family, pad, type u16, index i32, flags u32, change u32.
fn ifinfo(index: u32, flags: u32, change: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

/// Makes a device with our hardware address; an existing one of that name is an error.
#[must_use]
pub fn create_link(seq: u32, name: &str, kind: DeviceKind) -> Vec<u8> {
    let info = Message(Vec::new()).attr(IFLA_INFO_KIND, kind.name().as_bytes()).0;
    Message::new(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, seq, &ifinfo(0, 0, 0))
        .attr(IFLA_IFNAME, &zero_ended(name))
        .attr(IFLA_ADDRESS, &MAC)
        .attr(IFLA_LINKINFO | NLA_F_NESTED, &info)
        .done()
}

/// Sets a device up and says in its alias whose it is.
#[must_use]
pub fn set_link_up(seq: u32, index: u32, alias: &str) -> Vec<u8> {
    Message::new(RTM_SETLINK, NLM_F_ACK, seq, &ifinfo(index, IFF_UP, IFF_UP))
        .attr(IFLA_IFALIAS, alias.as_bytes())
        .done()
}

#[must_use]
pub fn delete_link(seq: u32, index: u32) -> Vec<u8> {
    Message::new(RTM_DELLINK, NLM_F_ACK, seq, &ifinfo(index, 0, 0)).done()
}

#[must_use]
pub fn dump_links(seq: u32) -> Vec<u8> {
    Message::new(RTM_GETLINK, NLM_F_DUMP, seq, &ifinfo(0, 0, 0)).done()
}

fn octets(ip: IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(v4) => (AF_INET, v4.octets().into()),
        IpAddr::V6(v6) => (AF_INET6, v6.octets().into()),
    }
}

/// ifaddrmsg: family, prefix length, flags, scope, index u32.
fn address(kind: u16, flags: u16, seq: u32, index: u32, ip: IpAddr) -> Message {
    let (family, octets) = octets(ip);
    // Nobody else is on our device to have the same one.
    let mut fixed = vec![family, Net::host(ip).length(), IFA_F_NODAD, RT_SCOPE_LINK];
    if family == AF_INET {
        fixed[2] = 0;
    }
    fixed.extend(index.to_ne_bytes());
    Message::new(kind, NLM_F_ACK | flags, seq, &fixed).attr(IFA_LOCAL, &octets).attr(IFA_ADDRESS, &octets)
}

/// Adds the address alone. Of link scope, or deprecated from the start, so that the kernel never takes it as the source
/// towards other machines.
#[must_use]
pub fn add_address(seq: u32, index: u32, ip: IpAddr) -> Vec<u8> {
    let message = address(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, seq, index, ip);
    match ip {
        IpAddr::V4(_) => message.done(),
        // ifa_cacheinfo: preferred for no time, valid for ever; two stamps.
        IpAddr::V6(_) => {
            let times = [0, u32::MAX, 0, 0].map(u32::to_ne_bytes).concat();
            message.attr(IFA_CACHEINFO, &times).done()
        }
    }
}

#[must_use]
pub fn delete_address(seq: u32, index: u32, ip: IpAddr) -> Vec<u8> {
    address(RTM_DELADDR, 0, seq, index, ip).done()
}

#[must_use]
pub fn dump_addresses(seq: u32) -> Vec<u8> {
    Message::new(RTM_GETADDR, NLM_F_DUMP, seq, &[AF_INET, 0, 0, 0, 0, 0, 0, 0]).done()
}

/// rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags u32.
fn route(kind: u16, flags: u16, seq: u32, index: u32, to: Net) -> Vec<u8> {
    let (family, octets) = octets(to.address());
    let mut fixed = vec![family, to.length(), 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, RT_SCOPE_LINK, RTN_UNICAST];
    fixed.extend([0; 4]);
    Message::new(kind, NLM_F_ACK | flags, seq, &fixed)
        .attr(RTA_DST, &octets)
        .attr(RTA_OIF, &index.to_ne_bytes())
        .attr(RTA_PRIORITY, &METRIC.to_ne_bytes())
        .done()
}

#[must_use]
pub fn add_route(seq: u32, index: u32, to: Net) -> Vec<u8> {
    route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, seq, index, to)
}

#[must_use]
pub fn delete_route(seq: u32, index: u32, to: Net) -> Vec<u8> {
    route(RTM_DELROUTE, 0, seq, index, to)
}

#[must_use]
pub fn dump_routes(seq: u32) -> Vec<u8> {
    let mut fixed = [0; 12];
    fixed[0] = AF_INET;
    Message::new(RTM_GETROUTE, NLM_F_DUMP, seq, &fixed).done()
}

#[must_use]
pub fn dump_addresses6(seq: u32) -> Vec<u8> {
    Message::new(RTM_GETADDR, NLM_F_DUMP, seq, &[AF_INET6, 0, 0, 0, 0, 0, 0, 0]).done()
}

#[must_use]
pub fn dump_routes6(seq: u32) -> Vec<u8> {
    let mut fixed = [0; 12];
    fixed[0] = AF_INET6;
    Message::new(RTM_GETROUTE, NLM_F_DUMP, seq, &fixed).done()
}

fn family(v4: bool) -> u8 {
    if v4 { AF_INET } else { AF_INET6 }
}

fn nft(kind: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | kind
}

/// Asks how much is in a table of the family ip, or ip6.
#[must_use]
pub fn get_nft_table(seq: u32, v4: bool, name: &str) -> Vec<u8> {
    Message::new(nft(NFT_MSG_GETTABLE), NLM_F_ACK, seq, &[family(v4), 0, 0, 0])
        .attr(NFTA_TABLE_NAME, &zero_ended(name))
        .done()
}

/// Deletes a table of the family ip; the kernel refuses where anything is in it. Answered under `seq`.
#[must_use]
pub fn delete_nft_table(seq: u32, v4: bool, name: &str) -> Vec<u8> {
    // nfgenmsg: family, version, resource id in network order: the batch's subsystem.
    let subsystem = [0, 0, 0, NFNL_SUBSYS_NFTABLES as u8];
    [
        Message::new(NFNL_MSG_BATCH_BEGIN, 0, seq, &subsystem).done(),
        Message::new(nft(NFT_MSG_DELTABLE), NLM_F_ACK | NLM_F_NONREC, seq, &[family(v4), 0, 0, 0])
            .attr(NFTA_TABLE_NAME, &zero_ended(name))
            .done(),
        Message::new(NFNL_MSG_BATCH_END, 0, seq, &subsystem).done(),
    ]
    .concat()
}

/// A message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The end of a dump, or success.
    Done,
    /// An errno.
    Failed(i32),
    Link(Link),
    Address(Address),
    Address6(Address6),
    Route(Route),
    Route6(Route6),
    /// How many chains, sets and objects a table of nftables has.
    TableUse(u32),
    /// Of a kind that we did not ask for.
    Other,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Vec<u8>,
    pub alias: String,
    /// "dummy", "bridge", …; empty for hardware.
    pub kind: String,
    pub up: bool,
    /// It has a carrier.
    pub running: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub index: u32,
    pub local: Ipv4Addr,
    pub network: Prefix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address6 {
    pub index: u32,
    pub local: Ipv6Addr,
    pub length: u8,
    /// RFC 8981: for a day or so.
    pub temporary: bool,
    /// Neither deprecated nor tentative nor somebody else's too.
    pub fit: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route6 {
    pub to: Ipv6Addr,
    pub length: u8,
    pub protocol: u8,
    pub metric: u32,
    /// Not of the table of local addresses, and of a type that leads out.
    pub leads_out: bool,
    pub devices: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub to: Prefix,
    pub protocol: u8,
    pub metric: u32,
    /// Not of the table of local addresses, and of a type that leads out.
    pub leads_out: bool,
    pub devices: Vec<u32>,
    pub gateways: Vec<Ipv4Addr>,
}

/// Attributes: type and value. Ends at the first that does not fit.
fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (len, kind) = (usize::from(u16_of(bytes)?), u16_of(bytes.get(2..)?)? & NLA_TYPE);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

fn link(body: &[u8]) -> Option<Link> {
    let flags = u32_of(body.get(8..)?)?;
    let (up, running) = (flags & IFF_UP != 0, flags & IFF_RUNNING != 0);
    let mut link = Link { index: u32_of(body.get(4..)?)?, up, running, ..Link::default() };
    for (kind, value) in attrs(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_IFALIAS => link.alias = text(value),
            IFLA_LINKINFO => {
                link.kind = attrs(value).find(|(k, _)| *k == IFLA_INFO_KIND).map(|(_, v)| text(v)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

fn address_of(body: &[u8]) -> Option<Address> {
    let (len, index) = (*body.get(1)?, u32_of(body.get(4..)?)?);
    let find = |wanted| attrs(body.get(8..).unwrap_or_default()).find(|(k, _)| *k == wanted).and_then(|(_, v)| ipv4(v));
    // On a point-to-point link IFA_ADDRESS is the other end, and the network.
    let network = find(IFA_ADDRESS).or_else(|| find(IFA_LOCAL))?;
    Some(Address { index, local: find(IFA_LOCAL).unwrap_or(network), network: Prefix::new(network, len) })
}

fn address6_of(body: &[u8]) -> Option<Address6> {
    let (length, flags, index) = (*body.get(1)?, *body.get(2)?, u32_of(body.get(4..)?)?);
    let (mut local, mut flags) = (None, u32::from(flags));
    for (kind, value) in attrs(body.get(8..)?) {
        match kind {
            // On a point-to-point link IFA_ADDRESS is the other end.
            IFA_LOCAL => local = ipv6(value),
            IFA_ADDRESS => local = local.or_else(|| ipv6(value)),
            IFA_FLAGS => flags = u32_of(value)?,
            _ => {}
        }
    }
    let (temporary, fit) = (flags & IFA_F_TEMPORARY != 0, flags & IFA_F_UNFIT == 0);
    Some(Address6 { index, local: local?, length, temporary, fit })
}

fn route6_of(body: &[u8]) -> Option<Route6> {
    let [_, length, _, _, table, protocol, _, kind] = *body.get(..8)? else { return None };
    let (mut table, mut to) = (u32::from(table), Ipv6Addr::UNSPECIFIED);
    let (mut metric, mut devices) = (0, Vec::new());
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => to = ipv6(value)?,
            RTA_OIF => devices.extend(u32_of(value)),
            RTA_PRIORITY => metric = u32_of(value)?,
            RTA_TABLE => table = u32_of(value)?,
            RTA_MULTIPATH => hops(value, &mut devices, &mut Vec::new()),
            _ => {}
        }
    }
    let leads_out = table != RT_TABLE_LOCAL && kind == RTN_UNICAST;
    Some(Route6 { to, length, protocol, metric, leads_out, devices })
}

fn route_of(body: &[u8]) -> Option<Route> {
    let [_, len, _, _, table, protocol, _, kind] = *body.get(..8)? else { return None };
    let mut table = u32::from(table);
    let mut to = Ipv4Addr::UNSPECIFIED;
    let (mut metric, mut devices, mut gateways) = (0, Vec::new(), Vec::new());
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => to = ipv4(value)?,
            RTA_OIF => devices.extend(u32_of(value)),
            RTA_GATEWAY => gateways.extend(ipv4(value)),
            RTA_PRIORITY => metric = u32_of(value)?,
            RTA_TABLE => table = u32_of(value)?,
            RTA_MULTIPATH => hops(value, &mut devices, &mut gateways),
            _ => {}
        }
    }
    let leads_out = table != RT_TABLE_LOCAL && kind == RTN_UNICAST;
    Some(Route { to: Prefix::new(to, len), protocol, metric, leads_out, devices, gateways })
}

/// rtnexthop: len u16, flags, hops, ifindex i32, then attributes.
fn hops(mut bytes: &[u8], devices: &mut Vec<u32>, gateways: &mut Vec<Ipv4Addr>) {
    while let Some(hop) = u16_of(bytes).and_then(|len| bytes.get(..usize::from(len))).filter(|hop| hop.len() >= 8) {
        devices.extend(u32_of(&hop[4..]));
        gateways.extend(attrs(&hop[8..]).filter(|(k, _)| *k == RTA_GATEWAY).filter_map(|(_, v)| ipv4(v)));
        bytes = bytes.get(aligned(hop.len())..).unwrap_or_default();
    }
}

/// One message of the kernel, undecoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw<'b> {
    pub seq: u32,
    pub kind: u16,
    /// NLM_F_DUMP_INTR: something changed within a list, which is then not of one moment.
    pub interrupted: bool,
    pub body: &'b [u8],
}

impl Raw<'_> {
    /// The end of a dump, success or an error; None: a message of some kind.
    #[must_use]
    pub fn end(&self) -> Option<Answer> {
        match self.kind {
            NLMSG_DONE => Some(Answer::Done),
            NLMSG_ERROR => Some(u32_of(self.body).map_or(Answer::Other, |code| match code.cast_signed() {
                0 => Answer::Done,
                code => Answer::Failed(code.wrapping_neg()),
            })),
            _ => None,
        }
    }

    #[must_use]
    pub fn answer(&self) -> Answer {
        let body = self.body;
        let table = nft(0); // NFT_MSG_NEWTABLE
        let decoded = match self.kind {
            RTM_NEWLINK => link(body).map(Answer::Link),
            RTM_NEWADDR if body.first() == Some(&AF_INET6) => address6_of(body).map(Answer::Address6),
            RTM_NEWROUTE if body.first() == Some(&AF_INET6) => route6_of(body).map(Answer::Route6),
            RTM_NEWADDR => address_of(body).map(Answer::Address),
            RTM_NEWROUTE => route_of(body).map(Answer::Route),
            kind if kind == table => attrs(body.get(4..).unwrap_or_default())
                .find(|(k, _)| *k == NFTA_TABLE_USE)
                .and_then(|(_, v)| Some(Answer::TableUse(u32::from_be_bytes(v.get(..4)?.try_into().ok()?)))),
            _ => self.end(),
        };
        decoded.unwrap_or(Answer::Other)
    }
}

/// The messages of one datagram. Ends at the first that does not fit.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Raw<'_>> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_of(bytes)?).ok()?;
        let (kind, flags) = (u16_of(bytes.get(4..)?)?, u16_of(bytes.get(6..)?)?);
        let seq = u32_of(bytes.get(8..)?)?;
        let body = bytes.get(HEADER..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some(Raw { seq, kind, interrupted: flags & NLM_F_DUMP_INTR != 0, body })
    })
}

/// The messages of one datagram, with their sequence numbers. Ends at the first that does not fit.
pub fn answers(bytes: &[u8]) -> impl Iterator<Item = (u32, Answer)> {
    messages(bytes).map(|raw| (raw.seq, raw.answer()))
}

#[cfg(test)]
mod tests;
