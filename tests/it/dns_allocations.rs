//! What a query for a cluster name costs in allocations: none, once the buffers have grown to their size.

use crate::{
    dns_world::{config, query, run, serve, table},
    heap,
};
use simple_dns::TYPE;
use std::net::UdpSocket;
use weft::{
    config::DnsConfig,
    dns::{
        answer::{Answerer, Outcome, Via},
        zone::Zone,
    },
    reactor::Async,
};

const QUERIES: u16 = 200;

const NAMES: [(&str, TYPE); 14] = [
    ("web.shop.svc.cluster.local", TYPE::A),
    ("web.shop.svc.cluster.local", TYPE::AAAA),
    ("WEB.shop.svc.cluster.LOCAL", TYPE::TXT),
    ("big.shop.svc.cluster.local", TYPE::A),
    ("10-244-0-7.big.shop.svc.cluster.local", TYPE::A),
    ("_http._tcp.web.shop.svc.cluster.local", TYPE::SRV),
    ("_http._tcp.big.shop.svc.cluster.local", TYPE::SRV),
    ("10-244-0-7.shop.pod.cluster.local", TYPE::A),
    ("1.0.96.10.in-addr.arpa", TYPE::PTR),
    ("7.0.244.10.in-addr.arpa", TYPE::PTR),
    ("web.shop.svc.cluster.local.shop.svc.cluster.local", TYPE::A),
    ("cluster.local", TYPE::SOA),
    ("cluster.local", TYPE::NS),
    ("dns-version.cluster.local", TYPE::TXT),
];

#[test]
fn a_cluster_name_costs_none_beyond_its_reply() {
    let cfg = DnsConfig { zones: vec!["in-addr.arpa".into()], ..DnsConfig::default() };
    let (table, mut out) = (table(), Vec::with_capacity(usize::from(u16::MAX)));
    let mut answerer = Answerer::new(Zone::new(&cfg, 1).unwrap());
    for (name, kind) in NAMES {
        for via in [Via::Udp, Via::Tcp] {
            let message = query(7, name, kind);
            // The scratch grows to its size.
            assert_eq!(answerer.reply(&message, via, &table, &mut out), Outcome::Reply);
            assert_eq!(simple_dns::Packet::parse(&out).unwrap().id(), 7);
            let before = heap::allocations();
            for _ in 0..QUERIES {
                assert_eq!(answerer.reply(&message, via, &table, &mut out), Outcome::Reply);
            }
            assert_eq!(heap::allocations() - before, 0, "{QUERIES} times {name} {kind:?} by {via:?}");
        }
    }
    // One that leads out of the cluster is kept while its target is asked for: the counter counts.
    let before = heap::allocations();
    let outcome = answerer.reply(&query(7, "ext.shop.svc.cluster.local", TYPE::A), Via::Udp, &table, &mut out);
    assert!(matches!(outcome, Outcome::Chase(_)) && heap::allocations() > before);
}

/// The whole way by UDP. The reactor and the executor's queue cost a few at each wake-up, so many come at once: nothing
/// else runs while they are sent.
#[test]
fn the_way_from_socket_to_socket_costs_none_of_ours() {
    const BURST: u16 = 16;
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        let socket = Async::<UdpSocket>::bind(([127, 0, 0, 1], 0)).unwrap();
        socket.get_ref().connect(server.at).unwrap();
        let messages: Vec<Vec<u8>> = (0..BURST).map(|id| query(id, "web.shop.svc.cluster.local", TYPE::A)).collect();
        let bursts = async |count: u16| {
            for _ in 0..count {
                messages.iter().for_each(|m| assert_eq!(socket.get_ref().send(m).unwrap(), m.len()));
                for _ in 0..BURST {
                    assert!(socket.recv(&mut [0; 512]).await.unwrap() > 40);
                }
            }
        };
        bursts(20).await;
        let (answered, before) = (server.counters.answered.get(), heap::allocations());
        bursts(QUERIES / BURST).await;
        let cost = heap::allocations() - before;
        let answered = server.counters.answered.get() - answered;
        assert_eq!(answered, u64::from(QUERIES / BURST * BURST));
        assert!(cost as u64 * 2 < answered, "{cost} allocations for {answered} queries");
    });
}
