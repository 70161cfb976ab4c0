//! What `weft check` tries: files, ports, the metaServer of this machine, the relays. Nothing of it stays.

use crate::{
    admin::view,
    check::{Asked, value},
    clock::{BUILT, Clock},
    config::Config,
    holder,
    metrics::TunnelCounters,
    reactor::{LocalExecutor, Timer},
    tunnel::{self, identity::Bundle},
};
use futures_lite::future::or;
use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    rc::Rc,
    time::Duration,
};

/// How long a program on this machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long relays may take: a few lost packets, and two seconds for a name.
const RELAYS: Duration = Duration::from_secs(6);
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(50);
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

/// Asks for the Services, which the metaServer has itself, for EndpointSlices, which it has from the cloud, and for us.
pub(crate) fn meta_server(yaml: &str, name: &str) -> Asked {
    let said = value(yaml, &["modules", "metaManager", "metaServer", "server"]).pop();
    let at = said.unwrap_or_else(|| META_SERVER.into());
    let on = value(yaml, &["modules", "metaManager", "metaServer", "enable"]) == ["true"];
    let mut asked = Asked { at, ..Asked::default() };
    if on {
        let services = get(&asked.at, "/api/v1/services?limit=1").map_err(|e| e.to_string());
        if services == Ok(200) {
            let slices = get(&asked.at, "/apis/discovery.k8s.io/v1/endpointslices?limit=1");
            asked.slices = Some(slices.map_err(|e| e.to_string()));
            asked.node = get(&asked.at, &["/api/v1/nodes/", name].concat()).ok();
        }
        asked.services = Some(services);
    }
    asked
}

/// The status of the answer to a GET by plain HTTP.
fn get(at: &str, path: &str) -> io::Result<u16> {
    let to = at.to_socket_addrs()?.next().ok_or(ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request =
        ["GET ", path, " HTTP/1.1\r\nHost: ", at, "\r\nAccept: application/json\r\nConnection: close\r\n\r\n"];
    stream.write_all(request.concat().as_bytes())?;
    let mut answer = Vec::new();
    while answer.len() < 12 {
        let mut piece = [0; ANSWER];
        match stream.read(&mut piece)? {
            0 => break,
            n => answer.extend_from_slice(&piece[..n]),
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let status = text.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    status.ok_or_else(|| io::Error::other("this is no HTTP"))
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
    use std::thread;

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
        let asked = meta_server(&yaml, "edge-1");
        assert_eq!((asked.services, asked.slices, asked.node), (Some(Ok(200)), Some(Ok(404)), Some(200)));
        server.join().unwrap();
        assert!(matches!(meta_server(&yaml, "edge-1").services, Some(Err(_))));
        assert!(meta_server("", "edge-1").services.is_none());
    }
}
