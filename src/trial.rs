//! What `weft check` tries: files, ports, the metaServer of this machine, the API server, the relays. Nothing of it stays.

use crate::{
    admin::view,
    check::{Asked, value},
    clock::{BUILT, Clock},
    config::Config,
    conn::Conn,
    credentials::Credentials,
    holder,
    kube::{
        access::{Access, Server, Token},
        http,
    },
    metrics::TunnelCounters,
    reactor::{LocalExecutor, Timer},
    table::balance::OnLink,
    tunnel::{self, identity::Bundle},
};
use futures_lite::future::or;
use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind, Write as _},
    net::{SocketAddr, TcpListener, ToSocketAddrs as _, UdpSocket},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    rc::Rc,
    time::Duration,
};

/// How long an API server may take for one question, its name and its handshake with it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long relays may take: a few lost packets, and two seconds for a name.
pub(crate) const RELAYS: Duration = Duration::from_secs(6);
/// Between two looks at them.
pub(crate) const LOOK: Duration = Duration::from_millis(50);
/// For the end of the registrations.
const GOODBYE: Duration = Duration::from_millis(500);
/// KubeEdge's default.
const META_SERVER: &str = "127.0.0.1:10550";
/// The first line of an answer is far shorter.
const ANSWER: usize = 512;

/// Makes a file in the directory, or in one like it beside it where it is not there yet, and removes it; and the bytes
/// that are free.
pub(crate) fn write(directory: &Path) -> (Result<(), String>, u64) {
    let there = directory.ancestors().find(|d| d.exists()).unwrap_or(directory);
    let name = format!(".weft-check-{}", std::process::id());
    let attempt = || -> io::Result<()> {
        let at = there.join(name);
        if there == directory {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&at)?;
            let wrote = file.write_all(&[0; 4_096]).and_then(|()| file.sync_all());
            fs::remove_file(&at)?;
            wrote
        } else {
            DirBuilder::new().mode(0o700).create(&at)?;
            fs::remove_dir(&at)
        }
    };
    let free = rustix::fs::statvfs(there).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
    (attempt().map_err(|e| e.to_string()), free)
}

/// Who has an address that we want, or why it cannot be had.
pub(crate) fn bind(at: SocketAddr, is_tcp: bool) -> Option<String> {
    let bound = if is_tcp { TcpListener::bind(at).map(drop) } else { UdpSocket::bind(at).map(drop) };
    let error = bound.err()?;
    let taken = error.kind() == ErrorKind::AddrInUse;
    let holder = if taken { holder::of(at, is_tcp) } else { None };
    Some(holder.map_or_else(|| error.to_string(), |who| ["taken by ", &who].concat()))
}

/// Asks the metaServer that edgecore is configured to run.
pub(crate) fn meta_server(yaml: &str, config: &Config, name: &str) -> Asked {
    let said = value(yaml, &["modules", "metaManager", "metaServer", "server"]).pop();
    let at = said.unwrap_or_else(|| META_SERVER.into());
    let on = value(yaml, &["modules", "metaManager", "metaServer", "enable"]) == ["true"];
    match Server::parse(&["http://", &at].concat()) {
        Some(server) if on => {
            let token = config.kube.token_file.clone().map_or(Token::None, Token::File);
            let access = Access { servers: vec![server], ca: None, client: None, server_name: None, token };
            Asked { at, ..questions(config, &access, name) }
        }
        Some(_) | None => Asked { at, ..Asked::default() },
    }
}

/// Asks the API server of the configuration, as the agent would.
pub(crate) fn api(config: &Config, name: &str) -> Asked {
    match Credentials::new(&config.kube, Clock::new(BUILT)).access() {
        Ok(access) => questions(config, &access, name),
        Err(why) => Asked { at: "kube".into(), services: Some(Err(why)), ..Asked::default() },
    }
}

/// For the Services, for EndpointSlices (which a metaServer has from the cloud), and for us: the first server that answers.
fn questions(config: &Config, access: &Access, name: &str) -> Asked {
    let credentials = Credentials::new(&config.kube, Clock::new(BUILT));
    let mut asked = Asked::default();
    for server in &access.servers {
        let ask = |path: &str| -> Result<u16, String> {
            let late = async {
                late(PATIENCE).await;
                Err("no answer".into())
            };
            crate::reactor::block_on(or(question(config, &credentials, access, server, path), late))
        };
        // Of each namespace that is followed; the first that is not to be had is what counts.
        let list = |group: &str, resource: &str| {
            let of = |n: &String| ask(&[group, "/namespaces/", n, "/", resource, "?limit=1"].concat());
            let mut each = config.kube.namespaces.iter().map(of);
            match each.find(|a| *a != Ok(200)) {
                Some(other) => other,
                None if config.kube.namespaces.is_empty() => ask(&[group, "/", resource, "?limit=1"].concat()),
                None => Ok(200),
            }
        };
        let services = list("/api/v1", "services");
        let answered = services.is_ok();
        asked = Asked { at: server.to_string(), ..Asked::default() };
        if services == Ok(200) {
            asked.slices = Some(list("/apis/discovery.k8s.io/v1", "endpointslices"));
            asked.node = ask(&["/api/v1/nodes/", name].concat()).ok();
        }
        asked.services = Some(services);
        if answered {
            break;
        }
    }
    asked
}

/// The status of the answer to a GET.
async fn question(
    config: &Config,
    from: &Credentials,
    access: &Access,
    server: &Server,
    path: &str,
) -> Result<u16, String> {
    let mut last = "its name has no address".to_owned();
    let proxy = config.kube.proxy.as_ref().filter(|_| !server.is_local() && !server.is_metaserver());
    let (host, port) = proxy.map_or((&server.host, server.port), |p| (&p.host, p.port));
    for ip in look_up(host).map_err(|e| e.to_string())? {
        let through = proxy.map(|p| (p, p.request(&server.host, server.port)));
        let opened = Conn::open((ip, port).into(), config.proxy.mark, through, from.tls(access, server)?);
        let mut conn = match opened.await {
            Ok(conn) => conn,
            Err(why) => {
                last = why.words;
                continue;
            }
        };
        let (mut request, mut answer, mut piece) = (Vec::new(), Vec::new(), [0; ANSWER]);
        http::get(&server.authority(), path, "weft-check", from.token(access, false).as_deref(), &mut request);
        conn.send(&request).await.map_err(|e| e.to_string())?;
        while answer.len() < 12 {
            match conn.read(&mut piece).map_err(|why| why.words)? {
                Some(0) => break,
                Some(n) => answer.extend_from_slice(&piece[..n]),
                None => conn.readable().await.map_err(|e| e.to_string())?,
            }
        }
        let text = String::from_utf8_lossy(&answer);
        let status = text.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
        return status.ok_or_else(|| "this is no HTTP: does it want TLS (https)?".into());
    }
    Err(last)
}

/// Registers at the relays as the agent would, looks at what they say, and takes its leave.
pub(crate) fn relays(config: &Config, bundle: Bundle, port_is_free: bool) -> (Vec<view::Relay>, String) {
    let mut tunnel = config.tunnel.clone();
    (tunnel.lan, tunnel.port_mapping) = (false, false);
    if !port_is_free {
        tunnel.listen.set_port(0);
    }
    let setup = tunnel::Setup {
        name: bundle.certificate.name.clone(),
        bundle,
        key: None,
        is_relay: false,
        relay_limits: config.relay.limits,
        mark: config.proxy.mark,
        lookup: Rc::new(|host| Box::pin(std::future::ready(look_up(&host)))),
        clock: Clock::new(BUILT),
        counters: Rc::new(TunnelCounters::default()),
        remembered: Vec::new(),
        on_link: OnLink::default(),
    };
    let (driver, handle) = match tunnel::Driver::bind(&tunnel, setup) {
        Ok(both) => both,
        Err(why) => {
            let note = format!("{why:#}");
            let none =
                view::Relay { name: String::new(), address: String::new(), registered: false, rtt_ms: None, note };
            return (vec![none], String::new());
        }
    };
    let executor = LocalExecutor::new();
    crate::reactor::block_on(executor.run(async {
        let task = executor.spawn(driver.run());
        let answered = async {
            while !handle.relays().iter().all(|r| r.registered && r.rtt_ms.is_some()) {
                Timer::after(LOOK).await;
            }
        };
        or(answered, late(RELAYS)).await;
        let seen = handle.relays().into_iter().map(Into::into).collect();
        let nat = handle.nat();
        or(handle.close(), late(GOODBYE)).await;
        task.cancel().await;
        (seen, nat)
    }))
}

async fn late(time: Duration) {
    Timer::after(time).await;
}

/// As the C library does it: nothing else waits here.
fn look_up(host: &str) -> anyhow::Result<Vec<std::net::IpAddr>> {
    Ok((host, 0).to_socket_addrs()?.map(|a| a.ip()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read as _, thread};

    #[test]
    fn a_directory_is_as_it_was() {
        let directory = std::env::temp_dir().join(format!("weft-trial-{}", std::process::id()));
        let (written, free) = write(&directory);
        assert!(written.is_ok() && free > 0 && !directory.exists());
        fs::create_dir(&directory).unwrap();
        assert!(write(&directory).0.is_ok());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir(&directory).unwrap();
        assert!(write(Path::new("/proc/nowhere")).0.is_err());
    }

    #[test]
    fn a_port_that_is_taken_has_a_holder() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        // Under emulation /proc/net is the host's, in the host's byte order: its addresses cannot be read.
        let said = bind(at, false).unwrap();
        assert!(said.starts_with("taken by ") || cfg!(target_endian = "big"), "{said}");
        drop(socket);
        assert_eq!(bind(at, false), None);
        assert!(bind("192.0.2.1:1".parse().unwrap(), true).is_some());
    }

    #[test]
    fn a_server_that_knows_services_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            for status in ["200 OK", "404 Not Found", "200 OK"] {
                let mut stream = listener.accept().unwrap().0;
                let mut request = [0; 512];
                let n = stream.read(&mut request).unwrap();
                assert!(request[..n].starts_with(b"GET /api"));
                write!(stream, "HTTP/1.1 {status}\r\n\r\n").unwrap();
            }
        });
        let yaml = format!("modules:\n  metaManager:\n    metaServer:\n      enable: true\n      server: {at}\n");
        let config = Config::parse("").unwrap();
        let asked = meta_server(&yaml, &config, "edge-1");
        assert_eq!((asked.services, asked.slices, asked.node), (Some(Ok(200)), Some(Ok(404)), Some(200)));
        server.join().unwrap();
        assert!(matches!(meta_server(&yaml, &config, "edge-1").services, Some(Err(_))));
        assert!(meta_server("", &config, "edge-1").services.is_none());
    }

    #[test]
    fn an_api_of_two_servers_and_two_namespaces() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let mut asked = Vec::new();
            for status in ["200 OK", "403 Forbidden"] {
                let mut stream = listener.accept().unwrap().0;
                let mut request = [0; 512];
                let n = stream.read(&mut request).unwrap();
                asked.push(String::from_utf8_lossy(&request[..n]).lines().next().unwrap().to_owned());
                write!(stream, "HTTP/1.1 {status}\r\n\r\n").unwrap();
            }
            asked
        });
        // A port that was free a moment ago: nobody listens there.
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = format!("kube.api = \"http://{nobody},http://{at}\"\nkube.namespaces = [\"a\", \"b\"]");
        let asked = api(&Config::parse(&config).unwrap(), "edge-1");
        assert_eq!((asked.at, asked.services, asked.slices), (format!("http://{at}"), Some(Ok(403)), None));
        let paths = [
            "GET /api/v1/namespaces/a/services?limit=1 HTTP/1.1",
            "GET /api/v1/namespaces/b/services?limit=1 HTTP/1.1",
        ];
        assert_eq!(server.join().unwrap(), paths);
        let none = api(&Config::parse("kube.kubeconfig = \"/nowhere\"").unwrap(), "edge-1");
        assert!(none.services.is_some_and(|s| s.is_err_and(|why| why.contains("/nowhere"))));
    }
}
