//! DNS over TCP with clients that are slow, many or in a hurry; and further addresses to listen on.

use crate::dns_world::{FakeUpstream, addresses, by_tcp, by_udp, config, query, read_framed, run, serve, setup, until};
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _};
use simple_dns::{Packet, TYPE};
use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    rc::Rc,
};
use weft::{
    config::{DnsConfig, Upstream},
    dns::Server,
    reactor::Async,
    shared::Writer,
    table::{Table, balance::Here},
};

const WEB: &str = "web.shop.svc.cluster.local";
const BIG: &str = "big.shop.svc.cluster.local";

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

#[test]
fn an_answer_that_is_ready_overtakes_one_that_is_not() {
    run(async |tasks| {
        let upstream = FakeUpstream::start(&tasks);
        upstream.dead.set(true);
        let server = serve(&tasks, &config("127.0.0.1", vec![Upstream::Server(upstream.at)]));
        let mut stream = Async::<TcpStream>::connect(server.at).await.unwrap();
        let all = [framed(&query(1, "slow.example", TYPE::A)), framed(&query(2, WEB, TYPE::A))].concat();
        stream.write_all(&all).await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..2 {
            ids.push(Packet::parse(&read_framed(&mut stream).await.unwrap()).unwrap().id());
        }
        assert_eq!(ids, [2, 1]);
    });
}

#[test]
fn slow_clients_do_not_keep_others_waiting_and_are_let_go() {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        let mut slow = Vec::new();
        let part = framed(&query(1, WEB, TYPE::A));
        for _ in 0..40 {
            let mut stream = Async::<TcpStream>::connect(server.at).await.unwrap();
            stream.write_all(&part[..part.len() - 1]).await.unwrap();
            slow.push(stream);
        }
        // These ask and never read: what is kept for each of them is bounded.
        let many: Vec<u8> = (0..2000).flat_map(|i| framed(&query(i, BIG, TYPE::A))).collect();
        let mut deaf = Vec::new();
        for _ in 0..10 {
            let stream = Rc::new(Async::<TcpStream>::connect(server.at).await.unwrap());
            let (writer, many) = (Rc::clone(&stream), many.clone());
            tasks.spawn(async move { drop((&*writer).write_all(&many).await) }).detach();
            deaf.push(stream);
        }
        for i in 0..50 {
            for reply in
                [by_tcp(server.at, &query(i, WEB, TYPE::A)).await, by_udp(server.at, &query(i, WEB, TYPE::A)).await]
            {
                assert_eq!(addresses(&reply), Ok(vec![IpAddr::from([10, 96, 0, 1])]));
            }
        }
        // half a query, however it was fed, is no use of a connection
        let mut first = slow.remove(0);
        assert!(matches!(first.read(&mut [0]).await, Ok(0) | Err(_)));
    });
}

fn bind(cfg: &DnsConfig) -> anyhow::Result<Server> {
    let table = Writer::new(Table::default());
    Server::bind(cfg, table.reader(), Here::default(), &setup(&Rc::default()))
}

#[test]
fn whoever_has_a_port_that_is_wanted_is_named() {
    let own = format!("(process {})", std::process::id());
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    for (at, transport) in [(udp.local_addr().unwrap(), "UDP"), (tcp.local_addr().unwrap(), "TCP")] {
        let cfg = DnsConfig { listen_also: vec![at], ..config("127.0.0.1", vec![]) };
        let why = bind(&cfg).err().unwrap().to_string();
        assert!(why.starts_with(&format!("dns.listen_also: {at} ({transport}) is taken by ")), "{why}");
        assert!(why.ends_with(&own), "{why}");
    }
}

#[test]
fn further_addresses_are_served_by_both_transports() {
    run(async |tasks| {
        let also: Vec<SocketAddr> = ["127.0.0.53:0", "[::1]:0"]
            .iter()
            .filter_map(|at| {
                let at = UdpSocket::bind(at).ok()?.local_addr().ok()?; // a host may have no IPv6
                TcpListener::bind(at).ok().map(|_| at)
            })
            .collect();
        let upstream = FakeUpstream::start(&tasks);
        let cfg = config("127.0.0.1", vec![Upstream::Server(upstream.at)]);
        let server = serve(&tasks, &DnsConfig { listen_also: also.clone(), ..cfg });
        assert!(!also.is_empty());
        for at in also {
            for name in [WEB, "www.example.com"] {
                let message = query(3, name, TYPE::A);
                assert!(addresses(&by_udp(at, &message).await).is_ok_and(|a| a.len() == 1), "{at} {name}");
                assert!(addresses(&by_tcp(at, &message).await).is_ok_and(|a| a.len() == 1), "{at} {name}");
            }
        }
        until(|| server.counters.queries.get() >= 4).await;
        assert_eq!(server.counters.refused.get(), 0);
    });
}
