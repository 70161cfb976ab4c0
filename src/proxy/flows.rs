//! Conntrack's entries: those that lead elsewhere than the rules now would are found and deleted. A client of UDP that
//! never pauses would stay on its old entry for ever; one of TCP that began before its Service was there would send its SYN
//! nowhere again, and so would the next one from the same port for two minutes. Connections that live are left alone.

use super::{
    nft::wire::{Attrs, NLM_F_ACK, NLM_F_DUMP, attr, message, number},
    rules::{Desired, Rule},
};
use crate::sorted::Map;
use crate::table::model::Protocol;
use std::net::{IpAddr, SocketAddr};

// linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h: NFNL_SUBSYS_CTNETLINK and its messages.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// linux/netfilter/nf_conntrack_common.h: IPS_SEEN_REPLY.
const SEEN_REPLY: u32 = 1 << 1;

/// What becomes of packets of a protocol to an address and port: they go to this port of our address; None: nothing of
/// ours.
pub type Ways = Map<(u8, SocketAddr), Option<u16>>;

fn ways(desired: &Desired) -> Ways {
    let way = |protocol| move |r: &Rule| ((protocol, SocketAddr::new(r.address, r.port)), Some(r.action.port()));
    let of = |p, protocol| desired.rules.iter().filter(move |r| r.protocol == p).map(way(protocol));
    of(Protocol::Tcp, TCP).chain(of(Protocol::Udp, UDP)).collect()
}

/// What is to be done since the rules were others.
#[must_use]
pub fn changed(old: Option<&Desired>, new: &Desired) -> Ways {
    if old.is_some_and(|old| old.rules == new.rules) {
        return Ways::new();
    }
    let (was, now) = (old.map(ways).unwrap_or_default(), ways(new));
    let udp = was.keys().filter(|(protocol, _)| *protocol == UDP);
    let gone = udp.filter(|at| !now.contains_key(*at)).map(|at| (*at, None)).collect::<Ways>();
    let fresh = now.into_iter().filter(|(at, to)| was.get(at) != Some(to));
    gone.into_iter().chain(fresh).collect()
}

/// Asks for all entries of a family.
#[must_use]
pub fn list(seq: u32, family: u8) -> Vec<u8> {
    message(GET, NLM_F_DUMP, seq, family, |_| ())
}

/// Address and port of one side of a tuple: its source or its destination.
fn side(tuple: &[u8], source: bool) -> Option<SocketAddr> {
    let (ip, proto) = (attr(tuple, 1)?, attr(tuple, 2)?);
    let (v4, v6, port) = if source { (1, 3, 2) } else { (2, 4, 3) };
    let address = match (attr(ip, v4), attr(ip, v6)) {
        (Some(bytes), _) => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        (None, bytes) => IpAddr::from(<[u8; 16]>::try_from(bytes?).ok()?),
    };
    Some(SocketAddr::new(address, u16::from_be_bytes(attr(proto, port)?.try_into().ok()?)))
}

/// Whether the message of [`delete_stale`] is about UDP, and the message, if the listed entry leads elsewhere than `ways`
/// say and is UDP's or of a connection that nobody has answered.
#[must_use]
pub fn delete_stale(seq: u32, body: &[u8], ways: &Ways, own: IpAddr) -> Option<(bool, Vec<u8>)> {
    let (family, attrs) = (*body.first()?, body.get(4..)?);
    let (orig, reply) = (attr(attrs, CTA_TUPLE_ORIG)?, attr(attrs, CTA_TUPLE_REPLY)?);
    let [protocol] = *attr(attr(orig, 2)?, 1)? else { return None };
    if protocol != UDP && attr(attrs, CTA_STATUS).and_then(number)? & SEEN_REPLY != 0 {
        return None;
    }
    let way = ways.get(&(protocol, side(orig, false)?))?;
    let leads_to = side(reply, true)?;
    let good = match way {
        Some(port) => leads_to == SocketAddr::new(own, *port),
        None => leads_to.ip() != own,
    };
    let delete = || {
        message(DELETE, NLM_F_ACK, seq, family, |a: &mut Attrs<'_>| {
            a.nest(CTA_TUPLE_ORIG, |t| t.raw(orig));
            for kind in [CTA_ID, CTA_ZONE] {
                attr(attrs, kind).into_iter().for_each(|value| a.bytes(kind, value));
            }
        })
    };
    (!good).then(|| (protocol == UDP, delete()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::rules::{Action, Catch, REFUSED};

    const OWN: &str = "169.254.96.16";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn desired(rules: &[(&str, Action)]) -> Desired {
        let rule = |(to, action): &(&str, Action)| {
            let to = at(to);
            Rule { address: to.ip(), protocol: Protocol::Udp, port: to.port(), action: *action }
        };
        let rules = rules.iter().map(rule).collect();
        Desired {
            address: OWN.parse().unwrap(),
            mark: 1,
            catch: Catch::AllBut(vec![]),
            rules,
            outside: vec![],
            left_out: 0,
        }
    }

    fn tuple(a: &mut Attrs<'_>, kind: u16, protocol: u8, from: SocketAddr, to: SocketAddr) {
        a.nest(kind, |t| {
            t.nest(1, |ip| {
                for (kind, address) in [(1, from.ip()), (2, to.ip())] {
                    match address {
                        IpAddr::V4(v4) => ip.bytes(kind, &v4.octets()),
                        IpAddr::V6(v6) => ip.bytes(kind + 2, &v6.octets()),
                    }
                }
            });
            t.nest(2, |p| {
                p.bytes(1, &[protocol]);
                p.bytes(2, &from.port().to_be_bytes());
                p.bytes(3, &to.port().to_be_bytes());
            });
        });
    }

    fn entry(protocol: u8, to: &str, answered_by: &str, status: u32) -> Vec<u8> {
        let client = at("192.168.1.5:4444");
        let bytes = message(GET, 0, 0, 2, |a| {
            tuple(a, CTA_TUPLE_ORIG, protocol, client, at(to));
            tuple(a, CTA_TUPLE_REPLY, protocol, at(answered_by), client);
            a.bytes(CTA_STATUS, &status.to_be_bytes());
            a.bytes(CTA_ID, &[1, 2, 3, 4]);
        });
        bytes[16..].to_vec()
    }

    #[test]
    fn what_changed() {
        let a = ("10.96.0.1:53", Action::Redirect(5300));
        let old = desired(&[a, ("10.96.0.2:53", Action::Redirect(5301)), ("10.96.0.3:53", Action::Refuse)]);
        let new = desired(&[a, ("10.96.0.3:53", Action::Redirect(5303)), ("10.96.0.4:53", Action::Refuse)]);
        let want = [("10.96.0.2:53", None), ("10.96.0.3:53", Some(5303)), ("10.96.0.4:53", Some(REFUSED))];
        assert_eq!(changed(Some(&old), &new), want.map(|(to, port)| ((UDP, at(to)), port)).into());
        assert_eq!(changed(None, &old).len(), 3);
        assert!(changed(Some(&new), &new).is_empty());
        // Of TCP what goes is left to its end, and what comes is looked at.
        let tcp = |mut desired: Desired| {
            desired.rules.iter_mut().for_each(|r| r.protocol = Protocol::Tcp);
            desired
        };
        let want = [("10.96.0.3:53", 5303), ("10.96.0.4:53", REFUSED)];
        assert_eq!(changed(Some(&tcp(old)), &tcp(new)), want.map(|(to, port)| ((TCP, at(to)), Some(port))).into());
    }

    #[test]
    fn only_what_leads_elsewhere_and_does_not_live_is_deleted() {
        let own = OWN.parse().unwrap();
        let ways = Ways::from([
            ((TCP, at("10.96.0.5:53")), Some(5305)),
            ((UDP, at("10.96.0.1:53")), Some(5300)),
            ((UDP, at("10.96.0.2:53")), None),
        ]);
        // IPS_CONFIRMED, and with a reply.
        let (alone, answered) = (8, 8 | SEEN_REPLY);
        for (protocol, to, answered_by, status, deleted) in [
            (UDP, "10.96.0.1:53", "169.254.96.16:5300", alone, false),
            (UDP, "10.96.0.1:53", "169.254.96.16:5301", alone, true),
            (UDP, "10.96.0.1:53", "169.254.96.16:5301", answered, true),
            (UDP, "10.96.0.1:53", "10.96.0.1:53", alone, true),
            (UDP, "10.96.0.2:53", "169.254.96.16:5301", answered, true),
            (UDP, "10.96.0.2:53", "10.96.0.2:53", alone, false),
            (UDP, "10.96.0.3:53", "169.254.96.16:5301", alone, false),
            (TCP, "10.96.0.1:53", "10.96.0.1:53", alone, false),
            (TCP, "10.96.0.5:53", "10.96.0.5:53", alone, true),
            (TCP, "10.96.0.5:53", "10.96.0.5:53", answered, false),
            (TCP, "10.96.0.5:53", "169.254.96.16:1", alone, true),
            (TCP, "10.96.0.5:53", "169.254.96.16:1", answered, false),
            (TCP, "10.96.0.5:53", "169.254.96.16:5305", alone, false),
            (132, "10.96.0.5:53", "10.96.0.5:53", alone, false),
        ] {
            let listed = entry(protocol, to, answered_by, status);
            let message = delete_stale(7, &listed, &ways, own);
            assert_eq!(message.is_some(), deleted, "{to} by {answered_by}");
            let Some((is_udp, message)) = message else { continue };
            assert_eq!(is_udp, protocol == UDP);
            // Named by the tuple as it was listed.
            assert_eq!(attr(&message[20..], CTA_TUPLE_ORIG), attr(&listed[4..], CTA_TUPLE_ORIG));
            assert_eq!(attr(&message[20..], CTA_ID), Some(&[1, 2, 3, 4][..]));
        }
    }

    #[test]
    fn cut_entries_are_nothing() {
        let ways = Ways::from([((UDP, at("10.96.0.1:53")), Some(5300))]);
        let whole = entry(UDP, "10.96.0.1:53", "10.9.9.9:53", 8);
        for end in 0..whole.len() {
            let _ = delete_stale(1, &whole[..end], &ways, OWN.parse().unwrap());
        }
    }
}
