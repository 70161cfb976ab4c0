//! `weft resolve`: asks our own DNS core as a client would, and puts its answer in words.

use super::view::{Answer, Resolution};
use crate::tunnel::identity::NAME_MAX;
use simple_dns::{CLASS, Name, Packet, QCLASS, QTYPE, Question, RCODE, TYPE, rdata::RData};
use std::net::IpAddr;

/// What a DNS core does with a query.
pub enum Exchange {
    Reply(Vec<u8>),
    /// The upstreams answer it.
    Foreign,
}

/// Asks for a name's addresses and SRV records, or for an address's names. A name without a dot at its end is tried as
/// it is and then as a pod's search list would have it, until one exists.
pub fn resolve(name: &str, domain: &str, mut ask: impl FnMut(&[u8]) -> Exchange) -> Resolution {
    let name = name.trim();
    if let Ok(ip) = name.parse() {
        return one(&reverse(ip), &[TYPE::PTR], &mut ask);
    }
    let bare = name.trim_end_matches('.');
    let mut tries = vec![bare.to_owned()];
    if !name.ends_with('.') {
        tries.extend([format!("{bare}.svc.{domain}"), format!("{bare}.{domain}")]);
    }
    let mut first = None;
    for name in tries {
        let found = one(&name, &[TYPE::A, TYPE::AAAA, TYPE::SRV], &mut ask);
        if found.code == "NOERROR" {
            return found;
        }
        first.get_or_insert(found);
    }
    first.unwrap_or_else(|| bad(bare))
}

fn bad(name: &str) -> Resolution {
    Resolution { name: name.into(), code: "NOT A NAME".into(), answers: Vec::new() }
}

fn one(name: &str, kinds: &[TYPE], ask: &mut impl FnMut(&[u8]) -> Exchange) -> Resolution {
    let mut out = Resolution { name: name.into(), code: "NOERROR".into(), answers: Vec::new() };
    let mut seen = crate::sorted::Set::new();
    for kind in kinds {
        let Some(query) = query(name, *kind) else { return bad(name) };
        let reply = match ask(&query) {
            Exchange::Reply(reply) => reply,
            Exchange::Foreign => return Resolution { code: "FORWARD".into(), answers: Vec::new(), ..out },
        };
        let Ok(reply) = Packet::parse(&reply) else { return Resolution { code: "UNREADABLE".into(), ..out } };
        if reply.rcode() != RCODE::NoError {
            return Resolution { code: code(reply.rcode()), ..out };
        }
        for record in &reply.answers {
            let (kind, data) = show(&record.rdata);
            // A CNAME comes with each of the kinds.
            if seen.insert((record.name.to_string(), kind.clone(), data.clone())) {
                out.answers.push(Answer { name: record.name.to_string(), kind, ttl: record.ttl, data });
            }
        }
    }
    out
}

fn query(name: &str, kind: TYPE) -> Option<Vec<u8>> {
    if name.len() > NAME_MAX || name.split('.').any(str::is_empty) {
        return None;
    }
    let mut packet = Packet::new_query(1);
    packet.questions.push(Question::new(Name::new(name).ok()?, QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN), false));
    packet.build_bytes_vec().ok()
}

fn code(code: RCODE) -> String {
    match code {
        RCODE::NoError => "NOERROR",
        RCODE::FormatError => "FORMERR",
        RCODE::ServerFailure => "SERVFAIL: the table is not complete yet",
        RCODE::NameError => "NXDOMAIN",
        RCODE::NotImplemented => "NOTIMP",
        RCODE::Refused => "REFUSED",
        other => return format!("{other:?}"),
    }
    .into()
}

fn show(data: &RData<'_>) -> (String, String) {
    match data {
        RData::A(a) => ("A".into(), std::net::Ipv4Addr::from(a.address).to_string()),
        RData::AAAA(a) => ("AAAA".into(), std::net::Ipv6Addr::from(a.address).to_string()),
        RData::PTR(p) => ("PTR".into(), p.0.to_string()),
        RData::CNAME(c) => ("CNAME".into(), c.0.to_string()),
        RData::SRV(s) => ("SRV".into(), format!("{} {} {} {}", s.priority, s.weight, s.port, s.target)),
        other => (format!("{:?}", other.type_code()), String::new()),
    }
}

/// RFC 1035, section 3.5, and RFC 3596, section 2.5.
fn reverse(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let nibbles = ip.octets().into_iter().rev().map(|o| format!("{:x}.{:x}.", o & 15, o >> 4));
            nibbles.collect::<String>() + "ip6.arpa"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::{ResourceRecord, rdata};

    /// Knows web.shop.svc.cluster.local and one address.
    fn core(query: &[u8]) -> Exchange {
        let query = Packet::parse(query).unwrap();
        let question = query.questions[0].clone();
        let name = question.qname.to_string();
        let mut reply = query.into_reply();
        let mut answer = |data| {
            reply.answers.push(ResourceRecord::new(question.qname.clone().into_owned(), CLASS::IN, 30, data));
        };
        match (name.as_str(), question.qtype) {
            ("web.shop.svc.cluster.local", QTYPE::TYPE(TYPE::A)) => {
                answer(RData::A(rdata::A { address: 0x0a60_000a }));
            }
            ("web.shop.svc.cluster.local", _) => {}
            ("10.0.96.10.in-addr.arpa", QTYPE::TYPE(TYPE::PTR)) => {
                answer(RData::PTR(rdata::PTR(Name::new_unchecked("web.shop.svc.cluster.local"))));
            }
            _ if name.ends_with("cluster.local") => *reply.rcode_mut() = RCODE::NameError,
            _ => return Exchange::Foreign,
        }
        Exchange::Reply(reply.build_bytes_vec().unwrap())
    }

    fn short(name: &str) -> String {
        let r = resolve(name, "cluster.local", core);
        let answers: Vec<_> = r.answers.iter().map(|a| format!(" {} {} {}", a.kind, a.ttl, a.data)).collect();
        format!("{}: {}{}", r.name, r.code, answers.concat())
    }

    #[test]
    fn names_are_tried_as_a_pod_would() {
        let found = "web.shop.svc.cluster.local: NOERROR A 30 10.96.0.10";
        for name in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "web.shop.svc.cluster.local."] {
            assert_eq!(short(name), found, "{name}");
        }
        assert_eq!(short("web.shop."), "web.shop: FORWARD");
        assert_eq!(short("example.com"), "example.com: FORWARD");
        assert_eq!(short("no.shop.svc.cluster.local"), "no.shop.svc.cluster.local: NXDOMAIN");
        assert_eq!(short("10.96.0.10"), "10.0.96.10.in-addr.arpa: NOERROR PTR 30 web.shop.svc.cluster.local");
    }

    #[test]
    fn what_is_no_name_is_told() {
        for name in ["", ".", "..", "a..b", &"a".repeat(64), &["a"; 200].join(".")] {
            assert!(short(name).contains("NOT A NAME"), "{name:?}: {}", short(name));
        }
    }

    #[test]
    fn ipv6_reverse() {
        let ip = "2001:db8::567:89ab".parse().unwrap();
        assert_eq!(reverse(ip), "b.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa");
    }
}
