//! The proxy and its rules alone, for `tests/netns/proxy`. Services come as lines on stdin:
//! `NAME VIP PORT tcp|udp [ENDPOINT:PORT …]`; `gone NAME` removes one; `complete` ends the list; `status` and `counters` print them; the end of stdin undoes everything.
//! `proxy-agent cleanup` does what `weft cleanup` does.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic)]

use futures_lite::{AsyncBufReadExt, StreamExt, io::BufReader};
use std::{net::SocketAddr, rc::Rc};
use weft::{
    clock::Clock,
    config::{Backend, Policy, ProxyConfig},
    metrics::ProxyCounters,
    proxy::{Proxy, rules::Ports},
    reactor::{Async, LocalExecutor},
    rules::{self, Orders, Rules},
    shared::Writer,
    sys,
    table::{
        Table,
        balance::{Balancer, Here},
        model::{
            Affinity, Change, Endpoint, Object, ObjectId, Protocol, Service, ServiceId, ServiceKind, ServicePort,
            Slice, SliceId, SlicePort, Source,
        },
    },
};

fn put(table: &mut Table, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    let id = |name: &str| ServiceId { namespace: "default".into(), name: name.into() };
    if words[0] == "complete" {
        table.apply(Change::Complete(Source::Config));
        return;
    }
    if words[0] == "gone" {
        table.apply(Change::Delete(Source::Config, ObjectId::Service(id(words[1]))));
        return;
    }
    let protocol = if words[3] == "tcp" { Protocol::Tcp } else { Protocol::Udp };
    let service = Service {
        id: id(words[0]),
        kind: ServiceKind::ClusterIp,
        vips: vec![words[1].parse().unwrap()].into(),
        external_ips: [].into(),
        ports: [ServicePort { name: "".into(), number: words[2].parse().unwrap(), protocol, node_port: 0 }].into(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    };
    table.apply(Change::Apply(Source::Config, Object::Service(service)));
    for at in 0..4 {
        let slice = SliceId { namespace: "default".into(), name: format!("{}-{at}", words[0]).into() };
        let Some(endpoint) = words.get(4 + at).map(|w| w.parse::<SocketAddr>().unwrap()) else {
            table.apply(Change::Delete(Source::Config, ObjectId::Slice(slice)));
            continue;
        };
        let slice = Slice {
            id: slice,
            service: words[0].into(),
            ports: [SlicePort { name: "".into(), number: endpoint.port(), protocol }].into(),
            endpoints: vec![Endpoint {
                address: endpoint.ip(),
                hostname: None,
                node: None,
                zone: None,
                pod: None,
                hints: None,
                ready: true,
                serving: true,
                terminating: false,
            }],
        };
        table.apply(Change::Apply(Source::Config, Object::Slice(slice)));
    }
}

struct Stdout;

impl log::Log for Stdout {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("weft") {
            println!("log {} {}", record.level(), record.args());
        }
    }

    fn flush(&self) {}
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("cleanup") {
        rules::cleanup().unwrap().iter().for_each(|line| println!("{line}"));
        return;
    }
    log::set_logger(&Stdout).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    sys::raise_nofile().unwrap();
    let ex = LocalExecutor::new();
    weft::reactor::block_on(ex.run(async {
        let (listen, clock) = ("169.254.96.16".parse().unwrap(), Clock::new(0));
        let cfg = ProxyConfig {
            enable: true,
            backend: match std::env::var("BACKEND").as_deref() {
                Ok("nft") => Backend::Nft,
                Ok(_) => Backend::Iptables,
                Err(_) => Backend::Auto,
            },
            interfaces: vec![],
            external_ips: false,
            node_ports: Vec::new(),
            mark: 0x4000_0000,
            max_connections: 2_000,
            drain: 0,
            beside_kube_proxy: false,
        };
        let table = Writer::new(Table::default());
        table.update(|t| t.apply(Change::Begin(Source::Config)));
        let counters = Rc::new(ProxyCounters::default());
        let here = Here { node: "here".into(), ..Here::default() };
        let balancer = Rc::new(std::cell::RefCell::new(Balancer::new(Policy::RoundRobin, fastrand::Rng::new())));
        let reader = table.reader();
        let proxy =
            Proxy::bind(&cfg, listen, here, balancer, reader, Writer::new(None).reader(), counters.clone(), clock)
                .unwrap();
        let dns = Async::new(sys::udp_socket(&SocketAddr::new(listen, 0)).unwrap()).unwrap();
        let ports = Ports {
            proxy: Some(proxy.port()),
            proxy6: proxy.port6(),
            dns: Some((53, dns.get_ref().local_addr().unwrap().port())),
            ..Ports::default()
        };
        println!("port {}", proxy.port());
        let orders = Writer::new(Orders { number: 1, cfg, ports, udp: proxy.udp_ports(), here: Here::default() });
        let rules = Rules::new(orders.reader(), listen, table.reader(), counters.clone(), clock).unwrap();
        let (undo, status) = (rules.undo(), rules.status());
        ex.spawn(proxy.run()).detach();
        ex.spawn(rules.run()).detach();
        ex.spawn(async move {
            let mut bytes = [0; 512];
            while let Ok((n, from)) = dns.recv_from(&mut bytes).await {
                let _ = dns.send_to(&bytes[..n], from).await;
            }
        })
        .detach();
        let mut lines = BufReader::new(Async::new(std::io::stdin()).unwrap()).lines();
        while let Some(Ok(line)) = lines.next().await {
            match line.as_str() {
                "status" => println!("status {:?}", status.read(Clone::clone)),
                "counters" => println!("counters {:?}", counters.each().map(|c| (c.0, c.2)).collect::<Vec<_>>()),
                line => {
                    table.update(|t| put(t, line));
                    println!("version {}", table.reader().read(Table::version));
                    table.ring();
                }
            }
        }
        match undo.undo().await {
            Ok(done) => println!("undone {done:?}"),
            Err(e) => panic!("{e:#}"),
        }
    }));
}
