//! Desired rules -> a transaction that makes our table, or changes what has changed in it. One map serves any number
//! of Services: a packet costs the same with one and with ten thousand.

use super::{
    expr::{Expr, Meta, Refusal, Verdict, registers},
    wire::{Attrs, Batch, Family, Kind, NLM_F_APPEND, NLM_F_CREATE},
};
use crate::sorted::Set;
use crate::{
    proxy::rules::{Catch, DEVICE, DISCARD, Desired, REFUSED, Rule},
    table::model::Protocol,
};
use std::net::IpAddr;

/// Our table's name, in each family.
pub const TABLE: &str = "weft";
/// The map of addresses and ports, and the chain that looks into it.
pub const SERVICES: &str = "services";
/// The set of interfaces whose packets are caught, or are not.
pub const INTERFACES: &str = "interfaces";
/// The map of what is caught by whichever interface it comes.
pub const OUTSIDE: &str = "outside";
const UNSERVED: &str = "unserved";

/// Ahead of kube-proxy's and everybody's DNAT (NF_IP_PRI_NAT_DST is -100).
const BEFORE_DNAT: i32 = -110;
/// Ahead of other filters (NF_IP_PRI_FILTER is 0): what is not ours to serve is refused before they see it.
const BEFORE_FILTER: i32 = -10;

/// Elements in one message: 64 KiB is the most that one attribute may have, and one of IPv6 takes 80 bytes.
const ELEMENTS: usize = 512;

/// IFNAMSIZ: names of interfaces in a set are that long.
const NAME: usize = 16;
/// What nft wants to know of a set of names to list it: NFTNL_UDATA_SET_KEYBYTEORDER is BYTEORDER_HOST_ENDIAN.
const HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1_u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};
/// IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h, in the host's order.
const DST_NAT: [u8; 4] = 0x20_u32.to_ne_bytes();
const TCP: u8 = 6;

// linux/netfilter/nf_tables.h
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_SET_MAP: u32 = 8;
const NF_ACCEPT: u32 = 1;
// The types of data as nft numbers them (its datatype.h); in a concatenation six bits each.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_PORT: u32 = 13;
const TYPE_NAME: u32 = 41;

#[must_use]
pub fn family(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

#[must_use]
pub fn protocol(p: Protocol) -> u8 {
    // IANA's assigned numbers.
    match p {
        Protocol::Tcp => TCP,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// One address and port that clients use, and the port of weft0's address where they are brought.
type Element = (IpAddr, u8, u16, u16);

fn elements(rules: &[Rule]) -> Set<Element> {
    rules.iter().map(|r| (r.address, protocol(r.protocol), r.port, r.action.port())).collect()
}

fn octets(address: IpAddr) -> ([u8; 16], usize) {
    match address {
        IpAddr::V4(v4) => {
            let mut long = [0; 16];
            long[..4].copy_from_slice(&v4.octets());
            (long, 4)
        }
        IpAddr::V6(v6) => (v6.octets(), 16),
    }
}

/// Address, then each number in the front of four bytes, as the registers hold them.
fn concatenated(address: IpAddr, protocol: Option<u8>, port: u16) -> Vec<u8> {
    let (octets, len) = octets(address);
    let mut out = octets[..len].to_vec();
    out.extend(protocol.iter().flat_map(|p| [*p, 0, 0, 0]));
    out.extend(port.to_be_bytes());
    out.extend([0; 2]);
    out
}

fn name(interface: &str) -> [u8; NAME] {
    let mut out = [0; NAME];
    // One byte is left for the final zero: longer names are no interface's.
    out.iter_mut().zip(interface.bytes().take(NAME - 1)).for_each(|(to, from)| *to = from);
    out
}

/// How many elements our table's sets have.
#[must_use]
pub fn count(desired: &Desired) -> usize {
    let (Catch::Only(names) | Catch::AllBut(names)) = &desired.catch;
    desired.rules.len() + desired.outside.len() + names.iter().collect::<Set<_>>().len()
}

/// Writes our table anew, whatever is there under its name.
pub fn install(batch: &mut Batch, desired: &Desired) {
    let family = family(desired.address);
    remove(batch, family);
    let table = |b: &mut Batch| b.push(Kind::NewTable, NLM_F_CREATE, family, |a| a.text(NFTA_TABLE_NAME, TABLE));
    table(batch);
    sets(batch, family);
    chains(batch, family);
    rules(batch, family, desired);
    let (Catch::Only(names) | Catch::AllBut(names)) = &desired.catch;
    put_names(batch, Kind::NewElement, family, names.iter().map(String::as_str));
    for (set, rules) in [(SERVICES, &desired.rules), (OUTSIDE, &desired.outside)] {
        put(batch, Kind::NewElement, family, set, desired.address, elements(rules));
    }
}

/// Removes our table of a family, whether it is there or not.
pub fn remove(batch: &mut Batch, family: Family) {
    for (kind, flags) in [(Kind::NewTable, NLM_F_CREATE), (Kind::DelTable, 0)] {
        batch.push(kind, flags, family, |a| a.text(NFTA_TABLE_NAME, TABLE));
    }
}

/// Sends only the elements that differ; where more than those differ, all.
pub fn change(batch: &mut Batch, old: &Desired, new: &Desired) {
    let same_kind =
        matches!((&old.catch, &new.catch), (Catch::Only(_), Catch::Only(_)) | (Catch::AllBut(_), Catch::AllBut(_)));
    if old.address != new.address || old.mark != new.mark || !same_kind {
        return install(batch, new);
    }
    let family = family(new.address);
    let (Catch::Only(was) | Catch::AllBut(was)) = &old.catch;
    let (Catch::Only(now) | Catch::AllBut(now)) = &new.catch;
    let gone = |a: &'_ [String], b: &[String]| a.iter().filter(|n| !b.contains(n)).cloned().collect::<Vec<_>>();
    put_names(batch, Kind::DelElement, family, gone(was, now).iter().map(String::as_str));
    put_names(batch, Kind::NewElement, family, gone(now, was).iter().map(String::as_str));
    for (set, was, now) in [(SERVICES, &old.rules, &new.rules), (OUTSIDE, &old.outside, &new.outside)] {
        let (was, now) = (elements(was), elements(now));
        // A key whose value has changed is deleted first: the kernel takes no other value for it.
        put(batch, Kind::DelElement, family, set, new.address, was.difference(&now).copied());
        put(batch, Kind::NewElement, family, set, new.address, now.difference(&was).copied());
    }
}

fn sets(batch: &mut Batch, family: Family) {
    let (kind, len) = match family {
        Family::V4 | Family::Inet => (TYPE_IPV4, 4),
        Family::V6 => (TYPE_IPV6, 16),
    };
    let key = (kind << 6 | TYPE_PROTOCOL) << 6 | TYPE_PORT;
    let mut set = |id: u32, name: &str, flags: u32, key: (u32, u32), value: Option<(u32, u32)>| {
        batch.push(Kind::NewSet, NLM_F_CREATE, family, |a| {
            a.text(1, TABLE);
            a.text(2, name);
            a.number(3, flags);
            a.number(4, key.0);
            a.number(5, key.1);
            if let Some((kind, len)) = value {
                a.number(6, kind);
                a.number(7, len);
            }
            a.number(10, id);
            if value.is_none() {
                a.bytes(13, &HOST_ORDER);
            }
        });
    };
    set(1, INTERFACES, 0, (TYPE_NAME, NAME as u32), None);
    for (id, name) in [(2, SERVICES), (3, OUTSIDE)] {
        set(id, name, NFTA_SET_MAP, (key, len + 8), Some((kind << 6 | TYPE_PORT, len + 4)));
    }
}

fn chains(batch: &mut Batch, family: Family) {
    let mut chain = |name: &str, hook: Option<(&str, u32, i32)>| {
        batch.push(Kind::NewChain, NLM_F_CREATE, family, |a| {
            a.text(NFTA_CHAIN_TABLE, TABLE);
            a.text(NFTA_CHAIN_NAME, name);
            if let Some((kind, number, priority)) = hook {
                a.nest(NFTA_CHAIN_HOOK, |h| {
                    h.number(1, number);
                    h.number(2, priority.cast_unsigned());
                });
                a.number(NFTA_CHAIN_POLICY, NF_ACCEPT);
                a.text(NFTA_CHAIN_TYPE, kind);
            }
        });
    };
    // NF_INET_PRE_ROUTING, NF_INET_LOCAL_IN, NF_INET_FORWARD, NF_INET_LOCAL_OUT: linux/netfilter.h
    chain("prerouting", Some(("nat", 0, BEFORE_DNAT)));
    chain("output", Some(("nat", 3, BEFORE_DNAT)));
    chain(SERVICES, None);
    chain("input", Some(("filter", 1, BEFORE_FILTER)));
    chain("forward", Some(("filter", 2, BEFORE_FILTER)));
    chain("local", Some(("filter", 3, BEFORE_FILTER)));
    chain(UNSERVED, None);
}

/// A rule at the end of a chain.
fn rule(batch: &mut Batch, family: Family, chain: &str, exprs: &[Expr<'_>]) {
    batch.push(Kind::NewRule, NLM_F_CREATE | NLM_F_APPEND, family, |a| {
        a.text(NFTA_RULE_TABLE, TABLE);
        a.text(NFTA_RULE_CHAIN, chain);
        list(a, exprs);
    });
}

fn list(a: &mut Attrs<'_>, exprs: &[Expr<'_>]) {
    a.nest(NFTA_RULE_EXPRESSIONS, |list| exprs.iter().for_each(|e| e.write(list)));
}

fn rules(batch: &mut Batch, family: Family, desired: &Desired) {
    use Expr::{And, Destination, Dnat, In, Is, IsNot, Map, Meta as Load, Port, Refuse, Status};
    let verdict = Expr::Verdict;
    let services = verdict(Verdict::Jump(SERVICES));
    let named = Load(Meta::InName, 0);
    let after = registers(family);
    let key = [Destination(family, 0), Load(Meta::Protocol, after), Port(after + 1)];
    rule(batch, family, "prerouting", &[key[0], key[1], key[2], Map(OUTSIDE), Dnat(family)]);
    match &desired.catch {
        Catch::Only(_) => rule(batch, family, "prerouting", &[named, In(INTERFACES), services]),
        Catch::AllBut(_) => {
            rule(batch, family, "prerouting", &[named, In(INTERFACES), verdict(Verdict::Return)]);
            rule(batch, family, "prerouting", &[services]);
        }
    }
    rule(batch, family, "output", &[services]);
    let mark = desired.mark.to_ne_bytes();
    let marked = [Load(Meta::Mark, 0), And(mark), Is(&mark), verdict(Verdict::Return)];
    rule(batch, family, SERVICES, &marked);
    rule(batch, family, SERVICES, &[key[0], key[1], key[2], Map(SERVICES), Dnat(family)]);

    // Refusals, and what is sent to our address without having been redirected (that of the host itself is left to
    // the proxy, which closes and counts it).
    let (octets, len) = octets(desired.address);
    let tcp = [Load(Meta::Protocol, 0), Is(&[TCP])];
    let udp = [Load(Meta::Protocol, 0), Is(&[17])];
    let refused = REFUSED.to_be_bytes();
    let reset = Refuse(Refusal::Reset, family);
    let unreachable = Refuse(Refusal::Unreachable, family);
    let [dnat, bit, set] = [Status, And(DST_NAT), IsNot(&[0; 4])];
    let accept = verdict(Verdict::Accept);
    let mut input = |exprs: &[Expr<'_>]| rule(batch, family, "input", exprs);
    input(&[Destination(family, 0), IsNot(&octets[..len]), accept]);
    input(&[tcp[0], tcp[1], Port(0), Is(&refused), reset]);
    input(&[udp[0], udp[1], Port(0), Is(&refused), unreachable]);
    for proto in [tcp, udp] {
        input(&[proto[0], proto[1], Port(0), Is(&DISCARD.to_be_bytes()), verdict(Verdict::Drop)]);
    }
    input(&[dnat, bit, set, accept]);
    input(&[named, Is(&name("lo")), accept]);
    input(&[tcp[0], tcp[1], reset]);
    input(&[udp[0], udp[1], unreachable]);

    // What was redirected still names weft0 in output: the route was chosen before.
    let device = name(DEVICE);
    for chain in ["forward", "local"] {
        rule(batch, family, chain, &[Load(Meta::OutName, 0), Is(&device), verdict(Verdict::Jump(UNSERVED))]);
    }
    let back = verdict(Verdict::Return);
    rule(batch, family, UNSERVED, &[dnat, bit, set, back]);
    match family {
        Family::V4 | Family::Inet => {
            rule(batch, family, UNSERVED, &[Destination(family, 0), And([0xf0, 0, 0, 0]), Is(&[0xe0, 0, 0, 0]), back]);
        }
        // Neighbour discovery, and multicast.
        Family::V6 => {
            rule(batch, family, UNSERVED, &[Load(Meta::Protocol, 0), Is(&[58]), back]);
            rule(batch, family, UNSERVED, &[Expr::Prefix, Is(&[0xff]), back]);
        }
    }
    rule(batch, family, UNSERVED, &[tcp[0], tcp[1], reset]);
    rule(batch, family, UNSERVED, &[unreachable]);
}

/// Adds elements to a set, or takes them out; nothing where there are none.
fn put_all(batch: &mut Batch, kind: Kind, family: Family, set: &str, all: &[(Vec<u8>, Option<Vec<u8>>)]) {
    for some in all.chunks(ELEMENTS) {
        batch.push(kind, if kind == Kind::NewElement { NLM_F_CREATE } else { 0 }, family, |a| {
            a.text(1, TABLE);
            a.text(2, set);
            a.nest(3, |list| {
                for (key, value) in some {
                    list.nest(1, |e| {
                        e.nest(1, |k| k.bytes(1, key));
                        if let Some(value) = value {
                            e.nest(2, |v| v.bytes(1, value));
                        }
                    });
                }
            });
        });
    }
}

fn put_names<'n>(batch: &mut Batch, kind: Kind, family: Family, names: impl Iterator<Item = &'n str>) {
    let all: Vec<_> = names.map(|n| (name(n).to_vec(), None)).collect();
    put_all(batch, kind, family, INTERFACES, &all);
}

fn put(batch: &mut Batch, kind: Kind, family: Family, set: &str, own: IpAddr, all: impl IntoIterator<Item = Element>) {
    let bytes = |(address, protocol, port, to): Element| {
        (concatenated(address, Some(protocol), port), Some(concatenated(own, None, to)))
    };
    let all: Vec<_> = all.into_iter().map(bytes).collect();
    put_all(batch, kind, family, set, &all);
}

/// Lets what was redirected to our address through a chain of somebody else: a rule at its head.
pub fn open_way(batch: &mut Batch, way: &super::ways::Way, own: IpAddr) {
    let (octets, len) = octets(own);
    let v = family(own);
    let mut exprs = Vec::new();
    // iptables-nft calls a table broken that holds expressions which it does not know; ours come before its own, and
    // have refused by then what was not redirected.
    if !way.of_iptables {
        exprs.extend([Expr::Status, Expr::And(DST_NAT), Expr::IsNot(&[0; 4])]);
    }
    let number = [v as u8];
    if way.family == Family::Inet {
        exprs.extend([Expr::Meta(Meta::Family, 0), Expr::Is(&number)]);
    }
    exprs.extend([Expr::Destination(v, 0), Expr::Is(&octets[..len]), Expr::Verdict(Verdict::Accept)]);
    batch.push(Kind::NewRule, NLM_F_CREATE, way.family, |a| {
        a.text(NFTA_RULE_TABLE, &way.table);
        a.text(NFTA_RULE_CHAIN, &way.chain);
        list(a, &exprs);
        a.bytes(NFTA_RULE_USERDATA, &super::ways::comment(v));
    });
}

/// Takes a rule of ours out of a chain of somebody else.
pub fn close_way(batch: &mut Batch, way: &super::ways::Way, handle: u64) {
    batch.push(Kind::DelRule, 0, way.family, |a| {
        a.text(NFTA_RULE_TABLE, &way.table);
        a.text(NFTA_RULE_CHAIN, &way.chain);
        a.long(NFTA_RULE_HANDLE, handle);
    });
}
