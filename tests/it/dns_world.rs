//! A real [`Server`] on loopback, fake upstreams, and clients, for the tests with sockets.

use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};
use simple_dns::{
    CLASS, CharacterString, Name, Packet, QTYPE, Question, RCODE, ResourceRecord, TYPE,
    rdata::{A, AAAA, RData, SOA, TXT},
};
use std::{
    cell::{Cell, RefCell},
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    rc::Rc,
    time::Duration,
};
use weft::{
    clock::Clock,
    config::{DnsConfig, Upstream},
    dns::{Resolver, Server, Setup},
    metrics::DnsCounters,
    reactor::{Async, LocalExecutor, Timer},
    shared::Writer,
    table::{
        Table,
        balance::Here,
        model::{
            Affinity, Change, Endpoint, Object, Protocol, Service, ServiceId, ServiceKind, ServicePort, Slice, SliceId,
            SlicePort, Source,
        },
    },
};

/// No test waits longer.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) type Executor = Rc<LocalExecutor<'static>>;

/// Runs a test's future with tasks beside it; a hang is a failure.
pub(crate) fn run<R>(test: impl AsyncFnOnce(Executor) -> R) -> R {
    let tasks: Executor = Rc::new(LocalExecutor::new());
    let late = async {
        Timer::after(LONG).await;
        panic!("the test hangs")
    };
    weft::reactor::block_on(tasks.run(test(Rc::clone(&tasks)).or(late)))
}

pub(crate) fn config(ip: &str, upstream: Vec<Upstream>) -> DnsConfig {
    DnsConfig { listen: SocketAddr::new(ip.parse().unwrap(), 53), upstream, cache: 64, ..DnsConfig::default() }
}

/// `web.shop` with a virtual address, and `big.shop` without one and with 100 endpoints.
pub(crate) fn table() -> Table {
    let mut table = Table::default();
    let service = |name: &str, kind, vips: Vec<IpAddr>| Service {
        id: ServiceId { namespace: "shop".into(), name: name.into() },
        kind,
        vips: vips.into(),
        external_ips: [].into(),
        ports: [ServicePort { name: "http".into(), number: 80, protocol: Protocol::Tcp, node_port: 0 }].into(),
        affinity: Affinity::None,
        local_only: false,
        external_local: false,
        not_proxied: false,
    };
    let endpoint = |i: u8| Endpoint {
        address: IpAddr::from([10, 244, 0, i]),
        hostname: None,
        node: None,
        zone: None,
        pod: None,
        ready: true,
        serving: true,
        terminating: false,
    };
    let slice = Slice {
        id: SliceId { namespace: "shop".into(), name: "big-1".into() },
        service: "big".into(),
        ports: [SlicePort { name: "http".into(), number: 8080, protocol: Protocol::Tcp }].into(),
        endpoints: (0..100).map(endpoint).collect(),
    };
    let external = ServiceKind::External("www.example.com".into());
    for change in [
        Change::Begin(Source::Config),
        Change::Apply(
            Source::Config,
            Object::Service(service("web", ServiceKind::ClusterIp, vec![[10, 96, 0, 1].into()])),
        ),
        Change::Apply(Source::Config, Object::Service(service("big", ServiceKind::Headless, vec![]))),
        Change::Apply(Source::Config, Object::Service(service("ext", external, vec![]))),
        Change::Apply(Source::Config, Object::Slice(slice)),
        Change::Complete(Source::Config),
    ] {
        table.apply(change);
    }
    table
}

pub(crate) struct Running {
    pub(crate) at: SocketAddr,
    pub(crate) counters: Rc<DnsCounters>,
    pub(crate) resolver: Resolver,
    _table: Writer<Table>,
}

pub(crate) fn setup(counters: &Rc<DnsCounters>) -> Setup {
    Setup { counters: Rc::clone(counters), clock: Clock::new(0), mark: 1, interfaces: vec![] }
}

pub(crate) fn serve(tasks: &Executor, cfg: &DnsConfig) -> Running {
    let table = Writer::new(table());
    let counters = Rc::new(DnsCounters::default());
    let server = Server::bind(cfg, table.reader(), Here::default(), &setup(&counters)).unwrap();
    let at = SocketAddr::new(cfg.listen.ip(), server.port());
    let resolver = server.resolver();
    tasks.spawn(server.run()).detach();
    Running { at, counters, resolver, _table: table }
}

/// One record; a TXT's data is its one string, a SOA's the minimum.
pub(crate) fn record(owner: &str, kind: TYPE, data: &str) -> ResourceRecord<'static> {
    let name = |text: &str| Name::new(text).unwrap().into_owned();
    let rdata = match kind {
        TYPE::A => RData::A(A::from(data.parse::<std::net::Ipv4Addr>().unwrap())),
        TYPE::AAAA => RData::AAAA(AAAA::from(data.parse::<std::net::Ipv6Addr>().unwrap())),
        TYPE::CNAME => RData::CNAME(name(data).into()),
        TYPE::PTR => RData::PTR(name(data).into()),
        TYPE::TXT => {
            RData::TXT(TXT::new().with_char_string(CharacterString::new(data.as_bytes()).unwrap()).into_owned())
        }
        TYPE::SOA => RData::SOA(SOA {
            mname: name("ns.example.com"),
            rname: name("root.example.com"),
            serial: 1,
            refresh: 7200,
            retry: 1800,
            expire: 86_400,
            minimum: data.parse().unwrap(),
        }),
        other => panic!("{other:?}"),
    };
    ResourceRecord::new(name(owner), CLASS::IN, 300, rdata)
}

/// An upstream that answers `www.example.com` with one address, `big.example.com` truncated by UDP and whole by TCP,
/// and anything else with NXDOMAIN.
pub(crate) struct FakeUpstream {
    pub(crate) at: SocketAddr,
    pub(crate) queries: Cell<u32>,
    pub(crate) by_tcp: Cell<u32>,
    /// It hears and says nothing.
    pub(crate) dead: Cell<bool>,
    pub(crate) ttl: Cell<u32>,
    pub(crate) sources: RefCell<Vec<u16>>,
}

impl FakeUpstream {
    pub(crate) fn start(tasks: &Executor) -> Rc<Self> {
        let (udp, tcp) = loop {
            let udp = Async::<UdpSocket>::bind(([127, 0, 0, 1], 0)).unwrap();
            match Async::<TcpListener>::bind(udp.get_ref().local_addr().unwrap()) {
                Ok(tcp) => break (udp, tcp),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::AddrInUse),
            }
        };
        let it = Rc::new(Self {
            at: udp.get_ref().local_addr().unwrap(),
            queries: Cell::new(0),
            by_tcp: Cell::new(0),
            dead: Cell::new(false),
            ttl: Cell::new(300),
            sources: RefCell::default(),
        });
        let this = Rc::clone(&it);
        tasks
            .spawn(async move {
                let mut buf = [0; 2048];
                loop {
                    let (n, from) = udp.recv_from(&mut buf).await.unwrap();
                    if Packet::parse(&buf[..n]).unwrap().questions[0].qtype == TYPE::HINFO.into() {
                        continue; // a probe of an upstream that said nothing
                    }
                    this.queries.set(this.queries.get() + 1);
                    this.sources.borrow_mut().push(from.port());
                    if !this.dead.get() {
                        udp.send_to(&this.answer(&buf[..n], false), from).await.unwrap();
                    }
                }
            })
            .detach();
        let this = Rc::clone(&it);
        tasks
            .spawn(async move {
                loop {
                    let (mut stream, _) = tcp.accept().await.unwrap();
                    this.by_tcp.set(this.by_tcp.get() + 1);
                    let query = read_framed(&mut stream).await.unwrap();
                    let answer = this.answer(&query, true);
                    // in two pieces: readers have to put them together
                    let framed = [&(answer.len() as u16).to_be_bytes()[..], &answer].concat();
                    let (a, b) = framed.split_at(7);
                    stream.write_all(a).await.unwrap();
                    futures_lite::future::yield_now().await;
                    stream.write_all(b).await.unwrap();
                }
            })
            .detach();
        it
    }

    fn answer(&self, query: &[u8], tcp: bool) -> Vec<u8> {
        let query = Packet::parse(query).unwrap();
        let question = query.questions[0].clone();
        let name = question.qname.to_string().to_ascii_lowercase();
        let mut reply = Packet::new_reply(query.id());
        reply.questions.push(question.clone());
        let v4 = question.qtype == QTYPE::TYPE(TYPE::A);
        match (name.as_str(), tcp) {
            ("www.example.com", _) if v4 => reply.answers.push(record(&name, TYPE::A, "192.0.2.80")),
            ("www.example.com", _) => reply.name_servers.push(record("example.com", TYPE::SOA, "60")),
            ("big.example.com", false) => reply.set_flags(simple_dns::PacketFlag::TRUNCATION),
            ("big.example.com", true) => {
                reply.answers.extend((0..200).map(|i| record(&name, TYPE::A, &format!("192.0.2.{i}"))));
            }
            _ => *reply.rcode_mut() = RCODE::NameError,
        }
        reply.answers.iter_mut().for_each(|r| r.ttl = self.ttl.get());
        reply.build_bytes_vec_compressed().unwrap()
    }
}

pub(crate) fn query(id: u16, name: &str, kind: TYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(simple_dns::PacketFlag::RECURSION_DESIRED);
    packet.questions.push(Question::new(Name::new(name).unwrap(), kind.into(), CLASS::IN.into(), false));
    packet.build_bytes_vec().unwrap()
}

/// Asks by UDP from a connected socket, so that only what comes from that very address is seen.
pub(crate) async fn by_udp(server: SocketAddr, message: &[u8]) -> Vec<u8> {
    let any: IpAddr = if server.is_ipv4() { [127, 0, 0, 1].into() } else { [0; 16].into() };
    let socket = Async::<UdpSocket>::bind((any, 0)).unwrap();
    socket.get_ref().connect(server).unwrap();
    socket.send(message).await.unwrap();
    let mut buf = vec![0; 65_535];
    let n = socket.recv(&mut buf).await.unwrap();
    buf.truncate(n);
    buf
}

pub(crate) async fn by_tcp(server: SocketAddr, message: &[u8]) -> Vec<u8> {
    let mut stream = Async::<TcpStream>::connect(server).await.unwrap();
    stream.write_all(&[&(message.len() as u16).to_be_bytes()[..], message].concat()).await.unwrap();
    read_framed(&mut stream).await.unwrap()
}

pub(crate) async fn read_framed(stream: &mut Async<TcpStream>) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// The addresses in a reply, or its code.
pub(crate) fn addresses(reply: &[u8]) -> Result<Vec<IpAddr>, RCODE> {
    let packet = Packet::parse(reply).unwrap();
    if packet.rcode() != RCODE::NoError {
        return Err(packet.rcode());
    }
    let of = |r: &ResourceRecord<'_>| match &r.rdata {
        RData::A(a) => Some(IpAddr::from(a.address.to_be_bytes())),
        RData::AAAA(a) => Some(IpAddr::from(a.address.to_be_bytes())),
        _ => None,
    };
    Ok(packet.answers.iter().filter_map(of).collect())
}

/// Waits for something that another task brings about.
pub(crate) async fn until(what: impl Fn() -> bool) {
    while !what() {
        Timer::after(Duration::from_millis(2)).await;
    }
}

/// Idle TCP connections, more than the server keeps, do not keep UDP from being served.
pub(crate) fn idle_connections(count: usize) -> Result<(), String> {
    run(async |tasks| {
        let server = serve(&tasks, &config("127.0.0.1", vec![]));
        let mut idle = Vec::new();
        for _ in 0..count {
            idle.push(Async::<TcpStream>::connect(server.at).await.map_err(|e| e.to_string())?);
        }
        let reply = by_udp(server.at, &query(1, "web.shop.svc.cluster.local", TYPE::A)).await;
        let by_udp = addresses(&reply).map_err(|e| format!("{e:?}"))?;
        let reply = by_tcp(server.at, &query(1, "web.shop.svc.cluster.local", TYPE::A)).await;
        let same = addresses(&reply) == Ok(by_udp.clone()) && by_udp == [IpAddr::from([10, 96, 0, 1])];
        if same { Ok(()) } else { Err(format!("{by_udp:?}")) }
    })
}

/// A reply leaves from the address that was asked, for each address that the responder may be bound to.
pub(crate) fn source_address() -> Result<(), String> {
    run(async |tasks| {
        for ip in ["127.0.0.1", "127.0.96.16"] {
            let server = serve(&tasks, &config(ip, vec![]));
            let socket = Async::<UdpSocket>::bind(([127, 0, 0, 1], 0)).unwrap();
            let message = query(1, "web.shop.svc.cluster.local", TYPE::A);
            socket.send_to(&message, server.at).await.unwrap();
            let (_, from) = socket.recv_from(&mut [0; 512]).await.unwrap();
            if from != server.at {
                return Err(format!("asked {}, answered by {from}", server.at));
            }
        }
        Ok(())
    })
}
