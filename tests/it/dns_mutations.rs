//! Mutated messages through the pure cores: nothing panics, and what comes out can be read. The entries are those of
//! the fuzz targets.

use crate::dns_world::{config, query, record, table};
use simple_dns::{CLASS, Name, Packet, Question, TYPE};
use weft::dns::{
    answer::Outcome,
    fuzz,
    wire::{EDNS_MAX, Header, Query, Records},
    zone::Zone,
};

/// Every byte belongs to the header, the question or a record.
fn readable(reply: &[u8]) -> bool {
    let header = Header::parse(reply).expect("a header");
    if header.counts == [0; 4] {
        return reply.len() == 12;
    }
    let Some(records) = Records::new(reply) else { return false };
    let mut end = None;
    for record in records {
        let Ok(record) = record else { return false };
        end = Some(record.data.end);
    }
    end.is_none_or(|end| end == reply.len())
}

fn mutate(message: &mut Vec<u8>, rng: &mut fastrand::Rng) {
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(..message.len());
        match rng.u8(..6) {
            0 => message[at] = rng.u8(..),
            1 => message[at] ^= 1 << rng.u8(..8),
            2 => message.truncate(at.max(1)),
            3 => message.insert(at, rng.u8(..)),
            4 => drop(message.remove(at)),
            _ => message.extend((0..rng.usize(..40)).map(|_| rng.u8(..))),
        }
        if message.is_empty() {
            message.push(0);
        }
    }
}

fn queries() -> Vec<Vec<u8>> {
    let names = [
        "web.shop.svc.cluster.local",
        "big.shop.svc.cluster.local",
        "_http._tcp.big.shop.svc.cluster.local",
        "ext.shop.svc.cluster.local",
        "10-244-0-7.big.shop.svc.cluster.local",
        "10-1-2-3.shop.pod.cluster.local",
        "fd00-1--2.shop.pod.cluster.local",
        "7.0.244.10.in-addr.arpa",
        "cluster.local",
        "www.example.com",
    ];
    let kinds = [TYPE::A, TYPE::AAAA, TYPE::SRV, TYPE::PTR, TYPE::SOA, TYPE::NS, TYPE::TXT];
    let opt = [0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 8, 0, 10, 0, 4, 1, 2, 3, 4];
    let mut all = Vec::new();
    for name in names {
        for kind in kinds {
            let plain = query(9, name, kind);
            let mut edns = [&plain[..], &opt].concat();
            edns[11] = 1;
            all.extend([plain, edns]);
        }
    }
    all
}

#[test]
fn mutated_queries() {
    let (table, zone) = (table(), Zone::new(&config("127.0.0.1", vec![]), 1).unwrap());
    let seeds = queries();
    let mut outcomes = [0; 4];
    for seed in 0..10_000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut message = rng.choice(&seeds).unwrap().clone();
        if seed >= seeds.len() as u64 {
            mutate(&mut message, &mut rng);
        }
        let [(udp, by_udp), (tcp, by_tcp)] = fuzz::query(&message, &table, &zone);
        assert_eq!(udp, tcp, "seed {seed}");
        match udp {
            Outcome::Reply | Outcome::Reject => {
                outcomes[usize::from(udp == Outcome::Reject)] += 1;
                assert!(readable(&by_udp) && readable(&by_tcp), "seed {seed}: {by_udp:?}");
                let most = Query::parse(&message).map_or(12, |q| q.udp_limit());
                assert!(by_udp.len() <= most && most <= EDNS_MAX && by_udp[..2] == message[..2], "seed {seed}");
            }
            Outcome::Chase(_) | Outcome::Forward => outcomes[2] += 1,
            Outcome::Drop => outcomes[3] += 1,
        }
    }
    assert!(outcomes.iter().all(|n| *n > 200), "{outcomes:?}: not much was tried");
}

#[test]
fn mutated_upstream_answers() {
    let name = |text| Name::new(text).unwrap();
    let mut packet = Packet::new_reply(9);
    packet.questions.push(Question::new(name("www.example.com"), TYPE::A.into(), CLASS::IN.into(), false));
    packet.answers = vec![
        record("www.example.com", TYPE::CNAME, "host.example.com"),
        record("host.example.com", TYPE::A, "192.0.2.1"),
        record("host.example.com", TYPE::TXT, "text"),
        record("host.example.com", TYPE::AAAA, "fd00::1"),
    ];
    packet.name_servers = vec![record("example.com", TYPE::SOA, "60")];
    packet.additional_records = vec![record("ns.example.com", TYPE::A, "192.0.2.2")];
    *packet.opt_mut() = Some(simple_dns::rdata::OPT { opt_codes: vec![], udp_packet_size: 1232, version: 0 });
    let good = packet.build_bytes_vec_compressed().unwrap();
    let [plain, joined] = fuzz::upstream(&good).unwrap();
    assert_eq!(Packet::parse(&plain).unwrap().answers.len(), 4);
    assert_eq!(Packet::parse(&joined).unwrap().answers.len(), 3, "the TXT is not an address");

    let mut taken = 0;
    for seed in 0..20_000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut message = good.clone();
        mutate(&mut message, &mut rng);
        if let Some(replies) = fuzz::upstream(&message) {
            taken += 1;
            assert!(replies.iter().all(|r| readable(r) && r.len() <= 512), "seed {seed}");
        }
    }
    assert!(taken > 5000, "{taken}: not much was tried");
}

/// A header that claims more records than there are must not make anybody reserve memory for them.
#[test]
fn claimed_counts_are_not_believed() {
    let mut message = query(9, "www.example.com", TYPE::A);
    message[2] |= 0x80;
    for counts in [[0xff; 6], [0, 1, 0xff, 0xff, 0xff, 0xff]] {
        message[6..12].copy_from_slice(&counts);
        assert!(fuzz::upstream(&message).is_none());
    }
}
