//! The proxy without rules: what reaches its listener by another way is closed.

use futures_lite::{AsyncReadExt, future::or};
use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    rc::Rc,
    time::Duration,
};
use weft::{
    clock::Clock,
    config::{Backend, Policy, ProxyConfig},
    metrics::ProxyCounters,
    proxy::Proxy,
    reactor::{Async, Timer},
    shared::Writer,
    table::{
        Table,
        balance::{Balancer, Here},
    },
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Connects `clients` times to a proxy and returns how each connection ended, and the counters.
fn ends(max_connections: usize, clients: usize) -> (Vec<ErrorKind>, Rc<ProxyCounters>) {
    let cfg = ProxyConfig {
        enable: true,
        backend: Backend::Auto,
        interfaces: vec![],
        external_ips: false,
        node_ports: Vec::new(),
        mark: 0,
        max_connections,
        drain: 0,
        beside_kube_proxy: false,
    };
    let (table, counters) = (Writer::new(Table::default()), Rc::new(ProxyCounters::default()));
    let here = Here { node: "here".into(), ..Here::default() };
    let balancer = Rc::new(std::cell::RefCell::new(Balancer::new(Policy::RoundRobin, fastrand::Rng::with_seed(1))));
    let (reader, clock) = (table.reader(), Clock::new(0));
    let proxy =
        Proxy::bind(&cfg, LOOPBACK, here, balancer, reader, Writer::new(None).reader(), counters.clone(), clock)
            .unwrap();
    let to = SocketAddr::new(LOOPBACK, proxy.port());
    let asked = async {
        let mut ends = Vec::new();
        for _ in 0..clients {
            // The reset may be there before the connect has been looked at.
            let end = async { Async::<TcpStream>::connect(to).await?.read(&mut [0; 1]).await };
            ends.push(end.await.unwrap_err().kind());
        }
        ends
    };
    let ends = weft::reactor::block_on(or(
        or(asked, async {
            panic!("the proxy ended: {:?}", proxy.run().await);
        }),
        async {
            Timer::after(Duration::from_secs(20)).await;
            panic!("a connection was left hanging");
        },
    ));
    (ends, counters)
}

#[test]
fn a_connection_that_was_not_redirected_is_reset_and_counted() {
    let (ends, counters) = ends(10, 100);
    assert_eq!(ends, [ErrorKind::ConnectionReset; 100]);
    assert_eq!((counters.accepted.get(), counters.refused_surface.get()), (100, 100));
}

#[test]
fn a_connection_too_many_is_reset_and_counted() {
    let (ends, counters) = ends(0, 3);
    assert_eq!(ends, [ErrorKind::ConnectionReset; 3]);
    assert_eq!((counters.accepted.get(), counters.refused_full.get()), (0, 3));
}
