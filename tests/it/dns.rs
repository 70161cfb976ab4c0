//! The DNS server with real sockets on loopback: both transports, the way to the upstreams, look-ups.

use crate::dns_world::{
    FakeUpstream, addresses, by_tcp, by_udp, config, idle_connections, query, read_framed, run, serve, setup,
    source_address, until,
};
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _, future::zip};
use simple_dns::{Packet, PacketFlag, RCODE, TYPE, rdata::RData};
use std::{
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    rc::Rc,
    time::Duration,
};
use weft::{
    clock::Clock,
    config::Upstream,
    dns::{Forwarder, Server},
    reactor::Async,
    table::balance::Here,
};

const WEB: &str = "web.shop.svc.cluster.local";
const BIG: &str = "big.shop.svc.cluster.local";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// An address where nobody listens, by UDP or TCP.
fn shut() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

#[test]
fn cluster_names_by_udp_and_tcp() {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        for (i, reply) in
            [by_udp(server.at, &query(7, WEB, TYPE::A)).await, by_tcp(server.at, &query(7, WEB, TYPE::A)).await]
                .into_iter()
                .enumerate()
        {
            assert_eq!(addresses(&reply), Ok(vec![ip("10.96.0.1")]));
            assert_eq!(Packet::parse(&reply).unwrap().id(), 7);
            assert_eq!(server.counters.answered.get(), 2, "both were asked; reply {i}");
        }
        assert_eq!(addresses(&by_udp(server.at, &query(8, "www.example.com", TYPE::A)).await), Err(RCODE::Refused));
    });
}

#[test]
fn what_is_cut_by_udp_is_whole_by_tcp() {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        let reply = by_udp(server.at, &query(1, BIG, TYPE::A)).await;
        let cut = Packet::parse(&reply).unwrap();
        assert!(cut.has_flags(PacketFlag::TRUNCATION) && reply.len() <= 512 && cut.answers.len() > 20);
        let whole = addresses(&by_tcp(server.at, &query(1, BIG, TYPE::A)).await).unwrap();
        assert_eq!(whole.len(), 100);
    });
}

#[test]
fn a_connection_takes_many_queries_in_pieces_and_answers_each() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let mut stream = Async::<TcpStream>::connect(server.at).await.unwrap();
        let names = [WEB, "www.example.com", BIG, "no.such.example", WEB];
        let mut bytes = Vec::new();
        for (i, name) in names.iter().enumerate() {
            bytes.extend_from_slice(&framed(&query(i as u16, name, TYPE::A)));
        }
        for piece in bytes.chunks(5) {
            stream.write_all(piece).await.unwrap();
            futures_lite::future::yield_now().await;
        }
        stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        let mut counts = [None; 5];
        for _ in 0..5 {
            let reply = read_framed(&mut stream).await.unwrap();
            let id = Packet::parse(&reply).unwrap().id();
            counts[usize::from(id)] = Some(addresses(&reply).map(|a| a.len()));
        }
        assert_eq!(counts, [Some(Ok(1)), Some(Ok(1)), Some(Ok(100)), Some(Err(RCODE::NameError)), Some(Ok(1))]);
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "closed once all is answered");
    });
}

#[test]
fn hundreds_of_pipelined_queries_are_all_answered() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let stream = Rc::new(Async::<TcpStream>::connect(server.at).await.unwrap());
        let all: Vec<u8> = (0..500_u16)
            .flat_map(|i| framed(&query(i, if i % 3 == 0 { "www.example.com" } else { BIG }, TYPE::A)))
            .collect();
        let mut reader = Rc::clone(&stream);
        let mut seen = [false; 500];
        let read = async {
            for _ in 0..500 {
                let mut length = [0; 2];
                (&*reader).read_exact(&mut length).await.unwrap();
                let mut reply = vec![0; u16::from_be_bytes(length).into()];
                (&*reader).read_exact(&mut reply).await.unwrap();
                let id = usize::from(Packet::parse(&reply).unwrap().id());
                assert!(!std::mem::replace(&mut seen[id], true), "{id} twice");
            }
        };
        zip(async { (&*stream).write_all(&all).await.unwrap() }, read).await;
        reader = stream;
        drop(reader);
        assert!(seen.iter().all(|s| *s));
    });
}

#[test]
fn a_frame_too_long_for_a_query_closes_the_connection() {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        let mut stream = Async::<TcpStream>::connect(server.at).await.unwrap();
        stream.write_all(&[0xff, 0xff, 0, 0]).await.unwrap();
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
    });
}

#[test]
fn foreign_names_are_asked_once_and_each_from_another_port() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        for _ in 0..3 {
            let reply = by_udp(server.at, &query(1, "www.example.com", TYPE::A)).await;
            assert_eq!(addresses(&reply), Ok(vec![ip("192.0.2.80")]));
            assert!(Packet::parse(&reply).unwrap().has_flags(PacketFlag::RECURSION_AVAILABLE));
        }
        assert_eq!((upstream.queries.get(), server.counters.cached.get()), (1, 2));
        for i in 0..8 {
            let reply = by_udp(server.at, &query(1, &format!("n{i}.example"), TYPE::A)).await;
            assert_eq!(addresses(&reply), Err(RCODE::NameError));
        }
        let mut ports = upstream.sources.borrow().clone();
        ports.sort_unstable();
        ports.dedup();
        assert!(ports.len() >= 7, "{ports:?}");
    });
}

#[test]
fn an_external_name_brings_its_targets_addresses() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let reply = by_udp(server.at, &query(1, "ext.shop.svc.cluster.local", TYPE::A)).await;
        let packet = Packet::parse(&reply).unwrap();
        assert!(matches!(packet.answers[0].rdata, RData::CNAME(_)));
        assert_eq!(addresses(&reply), Ok(vec![ip("192.0.2.80")]));
    });
}

#[test]
fn an_upstream_that_truncates_is_asked_by_tcp() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let whole = by_tcp(server.at, &query(1, "big.example.com", TYPE::A)).await;
        assert_eq!(addresses(&whole).unwrap().len(), 200);
        let cut = by_udp(server.at, &query(1, "big.example.com", TYPE::A)).await;
        assert!(Packet::parse(&cut).unwrap().has_flags(PacketFlag::TRUNCATION) && cut.len() <= 512);
        assert_eq!((upstream.queries.get(), upstream.by_tcp.get()), (1, 1), "the second came from the cache");
    });
}

#[test]
fn a_silent_upstream_is_overtaken_and_a_shut_one_skipped() {
    run(async |tasks| {
        let (silent, good) = (FakeUpstream::start(&tasks), FakeUpstream::start(&tasks));
        silent.dead.set(true);
        let all = [shut(), silent.at, good.at].map(Upstream::Server);
        let server = serve(&tasks, &config("127.0.0.1", all.into()));
        let clock = Clock::new(0);
        let reply = by_udp(server.at, &query(1, "www.example.com", TYPE::A)).await;
        assert_eq!(addresses(&reply), Ok(vec![ip("192.0.2.80")]));
        let took = clock.uptime();
        assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(2), "{took:?}");
        assert_eq!((silent.queries.get(), good.queries.get()), (1, 1));
    });
}

#[test]
fn when_nobody_answers_the_stale_answer_is_given() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        upstream.ttl.set(0);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let ask = async || by_udp(server.at, &query(1, "www.example.com", TYPE::A)).await;
        assert!(addresses(&ask().await).is_ok());
        upstream.dead.set(true);
        let clock = Clock::new(0);
        let reply = ask().await;
        assert_eq!(addresses(&reply), Ok(vec![ip("192.0.2.80")]));
        assert_eq!(Packet::parse(&reply).unwrap().answers[0].ttl, 30);
        assert!(clock.uptime() < Duration::from_secs(4));
        until(|| server.counters.upstream_timeouts.get() == 1).await;
        let clock = Clock::new(0);
        assert!(addresses(&ask().await).is_ok());
        assert!(clock.uptime() < Duration::from_secs(1), "at once, now that it is known to be dead");
        // a cluster name never waits for that
        assert_eq!(addresses(&by_udp(server.at, &query(1, WEB, TYPE::A)).await), Ok(vec![ip("10.96.0.1")]));
    });
}

#[test]
fn with_all_upstreams_shut_it_is_servfail_at_once() {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(shut())]));
        let clock = Clock::new(0);
        let reply = by_udp(server.at, &query(1, "www.example.com", TYPE::A)).await;
        assert_eq!(addresses(&reply), Err(RCODE::ServerFailure));
        assert!(clock.uptime() < Duration::from_secs(2));
    });
}

#[test]
fn look_ups_of_our_own_with_and_without_a_server() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        let cfg = config("127.0.0.1", vec![Upstream::Server(upstream.at)]);
        let server = serve(&tasks, &cfg);
        let alone = Forwarder::new(&cfg, &setup(&Rc::default()));
        let resolver = alone.resolver();
        tasks.spawn(alone.run()).detach();
        for resolver in [server.resolver, resolver] {
            assert_eq!(resolver.lookup("192.0.2.7").await.unwrap(), [ip("192.0.2.7")]);
            assert_eq!(resolver.lookup("[fd00::1]").await.unwrap(), [ip("fd00::1")]);
            assert_eq!(resolver.lookup("www.example.com").await.unwrap(), [ip("192.0.2.80")]);
            let why = resolver.lookup("missing.example").await.unwrap_err().to_string();
            assert_eq!(why, "missing.example: no address found");
            assert!(resolver.lookup("a..b").await.is_err());
        }
        assert_eq!(upstream.queries.get(), 8, "A and AAAA of two names, twice");
    });
}

#[test]
fn a_server_that_is_dropped_lets_go_of_its_port() {
    run(async |tasks| {
        let cfg = config("127.0.0.1", vec![]);
        let table = weft::shared::Writer::new(weft::table::Table::default());
        let server = Server::bind(&cfg, table.reader(), Here::default(), &setup(&Rc::default())).unwrap();
        let at = SocketAddr::new(cfg.listen.ip(), server.port());
        let task = tasks.spawn(server.run());
        let mut open = Async::<TcpStream>::connect(at).await.unwrap();
        open.write_all(&framed(&query(1, "a.example", TYPE::A))).await.unwrap();
        read_framed(&mut open).await.unwrap();
        task.cancel().await;
        assert_eq!(open.read(&mut [0]).await.unwrap_or(0), 0);
        UdpSocket::bind(at).unwrap();
    });
}

#[test]
fn idle_connections_do_not_stop_udp() {
    idle_connections(200).unwrap();
}

#[test]
fn replies_leave_from_the_address_that_was_asked() {
    source_address().unwrap();
}
