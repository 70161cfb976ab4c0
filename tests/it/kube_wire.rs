//! The driver of the Kubernetes client against a server of our own on loopback: credentials, TLS, several addresses.

use crate::{cli::temp_dir, kube_cases::rows, kube_world::*};
use futures_lite::future::or;
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, Stream,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    rc::Rc,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use weft::{
    api::{Api, Setup, Status},
    clock::{BUILT, Clock},
    config::Config,
    kube::resource::Resource,
    reactor::{LocalExecutor, Timer},
    shared::Writer,
    table::{Table, model::Source},
};

/// Nothing here takes longer, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

type Answer = Box<dyn Fn(&str) -> String + Send + Sync>;

/// A server whose threads end with the process; all that it was asked.
struct Server {
    at: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(tls: Option<Arc<ServerConfig>>, answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (at, asked) = (listener.local_addr().unwrap(), Arc::default());
        let (answer, log): (Arc<Answer>, Arc<Mutex<Vec<String>>>) = (Arc::new(Box::new(answer)), Arc::clone(&asked));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log, tls) = (Arc::clone(&answer), Arc::clone(&log), tls.clone());
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let Some(tls) = tls else { return serve(&mut stream, &answer, &log, "") };
                    let mut conn = ServerConnection::new(tls).unwrap();
                    if conn.complete_io(&mut stream).is_err() {
                        return;
                    }
                    let alpn = String::from_utf8(conn.alpn_protocol().unwrap_or_default().to_vec()).unwrap();
                    let client = conn.peer_certificates().map_or(0, <[_]>::len);
                    let note = format!("X-Tls: {alpn}, {client} certificates\r\n");
                    serve(&mut Stream::new(&mut conn, &mut stream), &answer, &log, &note);
                });
            }
        });
        Self { at, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(stream: &mut (impl Read + Write), answer: &Answer, log: &Mutex<Vec<String>>, note: &str) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
        if head.ends_with(b"\r\n\r\n") {
            let request = String::from_utf8(std::mem::take(&mut head)).unwrap() + note;
            log.lock().unwrap().push(request.clone());
            let reply = answer(&request);
            if reply.is_empty() || stream.write_all(reply.as_bytes()).and_then(|()| stream.flush()).is_err() {
                return;
            }
        }
    }
}

/// One Service and one slice; watches that tell nothing.
fn cluster(request: &str) -> String {
    if request.contains("watch=1") {
        return if request.contains("sendInitialEvents") {
            http(422, "", &status(422, "Invalid", "x"))
        } else {
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".into()
        };
    }
    let items = if request.contains("/services") { vec![service("web", 1)] } else { Vec::new() };
    http(200, "", &list(10, "", &items))
}

fn since(begun: Instant) -> Duration {
    Instant::now() - begun
}

fn bearer(request: &str) -> Option<&str> {
    request.lines().find_map(|line| line.strip_prefix("Authorization: Bearer "))
}

struct World {
    table: Rc<Writer<Table>>,
    status: Status,
    begun: Instant,
}

impl World {
    fn synced(&self) -> bool {
        self.table.update(|t| t.synced())
    }

    fn error(&self) -> String {
        self.status.list()[0].last_error.clone().unwrap_or_default()
    }
}

/// Runs the driver with `[kube]` of a configuration until the check is content.
fn run(kube: &str, mut done: impl FnMut(&World) -> bool) {
    let config = Config::parse(&format!("[kube]\n{kube}")).unwrap();
    let table = Rc::new(Writer::new(Table::default()));
    let lookup: weft::api::Lookup = Rc::new(|host| Box::pin(async move { Ok(vec![host.parse()?]) }));
    let mut setup = Setup::new(Rc::clone(&table), Clock::new(BUILT), lookup, 0);
    setup.spread = Duration::ZERO;
    let api = Api::new(&config.kube, setup);
    let world = World { table, status: api.status(), begun: Instant::now() };
    let executor = LocalExecutor::new();
    let ended = weft::reactor::block_on(executor.run(or(async { Some(api.run().await) }, async {
        while !done(&world) {
            assert!(since(world.begun) < PATIENCE, "{:?}", world.status.list());
            Timer::after(Duration::from_millis(10)).await;
        }
        None
    })));
    assert!(ended.is_none());
}

fn tls_file(name: &str) -> String {
    format!("{}/tests/it/fixtures/kube/tls/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// With the certificate of one of the two CAs; `clients`: a certificate of the first one is asked for.
fn tls(number: u8, clients: bool) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().unwrap();
    let builder = if clients {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(tls_file("ca1.crt")).unwrap()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let certificate = CertificateDer::from_pem_file(tls_file(&format!("server{number}.crt"))).unwrap();
    let key = PrivateKeyDer::from_pem_file(tls_file(&format!("server{number}.key"))).unwrap();
    let mut config = builder.with_single_cert(vec![certificate], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

/// As kubelet does: a link to a folder is swapped.
fn rotate(directory: &Path, name: &str, content: &str) {
    let folder = directory.join(format!("..{}", fastrand::u64(..)));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join(name), content).unwrap();
    let (link, new) = (directory.join("..data"), directory.join("..new"));
    std::os::unix::fs::symlink(&folder, &new).unwrap();
    fs::rename(&new, &link).unwrap();
    let file = directory.join(name);
    if !file.exists() {
        std::os::unix::fs::symlink("..data/".to_owned() + name, file).unwrap();
    }
}

rows! {
    "T6" t6_http_1_1_alone_is_offered {
        let server = Server::new(Some(tls(1, false)), cluster);
        run(&format!("api = \"https://{}\"\nca_file = {:?}", server.at, tls_file("ca1.crt")), World::synced);
        assert!(server.asked().iter().all(|r| r.contains("X-Tls: http/1.1, 0")), "{:?}", server.asked());
    }
    "T7" t7_several_addresses {
        let server = Server::new(None, cluster);
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        run(&format!("api = \"http://{closed}, http://{}\"", server.at), World::synced);
    }
    "T8" t8_another_ca {
        let server = Server::new(Some(tls(2, false)), cluster);
        let dir = temp_dir();
        let ca = |n: u8| fs::read_to_string(tls_file(&format!("ca{n}.crt"))).unwrap();
        rotate(dir.path(), "ca.crt", &ca(1));
        let mut swapped = false;
        run(&format!("api = \"https://{}\"\nca_file = \"{}/ca.crt\"", server.at, dir.path().display()), |w| {
            if !swapped && w.error().contains("of another CA") {
                rotate(dir.path(), "ca.crt", &ca(2));
                swapped = true;
            }
            w.synced()
        });
        assert!(swapped);
    }
    "T9" t9_kubeconfigs {
        let server = Server::new(Some(tls(1, true)), cluster);
        let dir = temp_dir();
        let path = dir.path().join("kubeconfig");
        let base64 = |name: &str| weft::encoding::BASE64.encode(&fs::read(tls_file(name)).unwrap());
        let write = |user: &str| {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n\
                 clusters:\n- name: c\n  cluster:\n    server: https://{}\n    tls-server-name: api.example\n    \
                 certificate-authority-data: {}\nusers:\n- name: u\n  user:\n    {user}\n",
                server.at, base64("ca1.crt")
            );
            fs::write(&path, text).unwrap();
        };
        let config = format!("kubeconfig = {path:?}");
        run(&config, |w| w.error().contains("No such file"));
        write("exec: {command: aws}");
        run(&config, |w| w.error().contains("exec is not done here"));
        write("token: x");
        run(&config, |w| w.error().contains("is the client's certificate right?"));
        let files = format!("client-certificate: {}\n    client-key: {}", tls_file("client.crt"), tls_file("client.key"));
        let inline = format!("client-certificate-data: {}\n    client-key-data: {}", base64("client.crt"), base64("client.key"));
        for user in [files, inline] {
            write(&user);
            run(&config, World::synced);
            assert!(server.asked().last().unwrap().contains("http/1.1, 1 certificates"));
        }
    }
    "T11" t11_through_a_proxy {
        // A proxy that knows one user, and what it was asked for.
        let server = Server::new(Some(tls(1, false)), cluster);
        let (listener, asked) = (TcpListener::bind("127.0.0.1:0").unwrap(), Arc::new(Mutex::new(Vec::new())));
        let (proxy, log, to) = (listener.local_addr().unwrap(), Arc::clone(&asked), server.at);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut client, log) = (stream.unwrap(), Arc::clone(&log));
                thread::spawn(move || {
                    let (mut head, mut byte) = (Vec::new(), [0]);
                    while !head.ends_with(b"\r\n\r\n") {
                        client.read_exact(&mut byte).unwrap();
                        head.push(byte[0]);
                    }
                    let head = String::from_utf8(head).unwrap();
                    let known = head.contains("\r\nProxy-Authorization: Basic dTpwLw==\r\n");
                    log.lock().unwrap().push(head);
                    if !known {
                        return client.write_all(b"HTTP/1.1 407 Who?\r\n\r\n").unwrap();
                    }
                    client.write_all(b"HTTP/1.1 200 Here\r\nVia: x\r\n\r\n").unwrap();
                    let server = TcpStream::connect(to).unwrap();
                    let (mut from, mut into) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                    thread::spawn(move || std::io::copy(&mut from, &mut into));
                    let _ = std::io::copy(&mut client, &mut &server);
                });
            }
        });
        // The certificate's name, which the proxy alone can find.
        let port = server.at.port();
        let config = format!("api = \"https://api.example:{port}\"\nca_file = {:?}", tls_file("ca1.crt"));
        let through = |user: &str| format!("{config}\nproxy = \"http://{user}{proxy}\"");
        run(&through(""), |w| w.error().contains(&format!("through the proxy {proxy}: the proxy wants a user")));
        run(&through("u:p%2F@"), World::synced);
        assert!(asked.lock().unwrap().iter().all(|a| a.starts_with(&format!("CONNECT api.example:{port} HTTP/1.1\r\n"))));
        let direct = asked.lock().unwrap().len();
        // What is on this machine is reached without it.
        let local = Server::new(None, cluster);
        run(&format!("api = \"http://{}\"\nproxy = \"http://{proxy}\"", local.at), World::synced);
        assert_eq!(asked.lock().unwrap().len(), direct);
    }

    "T12" t12_a_name_for_the_audit_log {
        let server = Server::new(None, cluster);
        run(&format!("api = \"http://{}\"", server.at), World::synced);
        let agent = format!("\r\nUser-Agent: weft/{} (linux/", env!("CARGO_PKG_VERSION"));
        assert!(server.asked().iter().all(|r| r.contains(&agent) && r.contains(&format!("\r\nHost: {}\r\n", server.at))));
    }

    "A1" a1_a_token_that_is_rotated {
        let right = Arc::new(Mutex::new("one".to_owned()));
        let valid = Arc::clone(&right);
        let server = Server::new(None, move |request| {
            if bearer(request) != Some(&valid.lock().unwrap()) {
                return http(401, "", &status(401, "Unauthorized", "Unauthorized"));
            }
            // Watches end at once, so that the token is shown again.
            if request.contains("watch=1") { String::new() } else { cluster(request) }
        });
        let dir = temp_dir();
        rotate(dir.path(), "token", "one\n");
        let mut rotated = 0;
        run(&format!("api = \"http://{}\"\ntoken_file = \"{}/token\"", server.at, dir.path().display()), |w| {
            if rotated == 0 && w.synced() {
                *right.lock().unwrap() = "two".into();
                rotate(dir.path(), "token", "two\n");
                rotated = server.asked().len();
            }
            rotated > 0 && server.asked()[rotated..].iter().any(|r| bearer(r) == Some("two"))
        });
    }
    "A2" a2_an_open_watch_needs_no_new_token {
        let server = Server::new(None, cluster);
        let dir = temp_dir();
        fs::write(dir.path().join("token"), "one").unwrap();
        let mut settled = None;
        run(&format!("api = \"http://{}\"\ntoken_file = \"{}/token\"", server.at, dir.path().display()), |_| {
            let watches = server.asked().iter().filter(|r| r.contains("allowWatchBookmarks") && r.contains("&resourceVersion=10")).count();
            if watches == 3 && settled.is_none() {
                fs::write(dir.path().join("token"), "two").unwrap();
                settled = Some((Instant::now(), server.asked().len()));
            }
            settled.is_some_and(|(at, count)| {
                assert_eq!(server.asked().len(), count, "asked again");
                since(at) > Duration::from_millis(400)
            })
        });
    }
    "A3" a3_refused_for_ever {
        let mut w = crate::kube_world::World::listing(64);
        w.restored("old");
        w.next();
        let mut waits = Vec::new();
        for _ in 0..12 {
            w.refusal(401, "", "Unauthorized");
            assert!(w.watcher.token_refused());
            waits.push(w.next_after().1);
        }
        assert!(waits[0] <= 1.0 && waits[11] >= 30.0, "{waits:?}");
        assert!(w.names() == "old" && w.error().contains("not accepted"));
    }
    "A4" a4_an_empty_token_file {
        let server = Server::new(None, |request| {
            if request.contains("watch=1") { http(401, "", "{}") } else { cluster(request) }
        });
        let dir = temp_dir();
        let path = dir.path().join("token");
        fs::write(&path, "one").unwrap();
        let mut emptied = 0;
        run(&format!("api = \"http://{}\"\ntoken_file = {path:?}", server.at), |_| {
            if emptied == 0 && !server.asked().is_empty() {
                fs::write(&path, "").unwrap();
                emptied = server.asked().len();
            }
            // Each refusal has the file read again.
            server.asked().len() >= emptied + 3
        });
        assert!(server.asked().iter().all(|r| bearer(r) == Some("one")), "{:?}", server.asked());
    }
    "A5" a5_a_line_end_behind_the_token {
        let server = Server::new(None, cluster);
        let dir = temp_dir();
        let path = dir.path().join("token");
        fs::write(&path, "one\r\n").unwrap();
        run(&format!("api = \"http://{}\"\ntoken_file = {path:?}", server.at), World::synced);
        assert!(server.asked().iter().all(|r| r.contains("\r\nAuthorization: Bearer one\r\n")));
    }
    "A6" a6_no_token_and_none_in_the_clear {
        let server = Server::new(None, cluster);
        run(&format!("api = \"http://{}\"", server.at), World::synced);
        assert!(server.asked().iter().all(|r| !r.contains("Authorization")));
        let error = Config::parse("[kube]\napi = \"http://192.0.2.1\"\ntoken_file = \"/t\"").unwrap_err();
        assert!(error.to_string().contains("a token is not sent over plain http"), "{error}");
        let dir = temp_dir();
        let path = dir.path().join("k");
        fs::write(&path, "current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'http://192.0.2.1'}}]\nusers: [{name: u, user: {token: t}}]\n").unwrap();
        run(&format!("kubeconfig = {path:?}"), |w| w.error().contains("a token is not sent over plain http"));
    }
    "A7" a7_one_resource_is_not_allowed {
        let server = Server::new(None, |request| {
            if request.contains("/nodes") { http(403, "", &status(403, "Forbidden", "nodes is forbidden")) } else { cluster(request) }
        });
        run(&format!("api = \"http://{}\"", server.at), |w| {
            let all = w.status.list();
            w.synced() && all[0].synced && all[1].synced && all[2].last_error.as_ref().is_some_and(|e| e.contains("rbac.yaml"))
        });
    }
    "S2" s2_synced_when_services_and_slices_are {
        let slices = Arc::new(Mutex::new(false));
        let (let_go, held) = (Arc::clone(&slices), Arc::clone(&slices));
        let server = Server::new(None, move |request| {
            if request.contains("endpointslices") && !*held.lock().unwrap() { http(429, "Retry-After: 0\r\n", "{}") } else { cluster(request) }
        });
        let mut seen = None;
        run(&format!("api = \"http://{}\"", server.at), |w| {
            let services = w.table.update(|t| t.objects(Source::Api));
            if services == 1 && seen.is_none() {
                seen = Some(Instant::now());
            }
            if seen.is_some_and(|at| since(at) > Duration::from_millis(300)) && !*let_go.lock().unwrap() {
                assert!(!w.synced(), "without slices");
                *let_go.lock().unwrap() = true;
            }
            w.synced()
        });
        assert!(*slices.lock().unwrap());
    }
    "S9" s9_a_storm_is_few_changes {
        let server = Server::new(None, |request| {
            let reply = cluster(request);
            if !request.contains("/services") || !reply.contains("chunked") {
                return reply;
            }
            let text: String = (0..5_000).map(|n| event("MODIFIED", &service_with("web", n + 11, "web", 1_000 + (n % 7_000) as u16))).collect();
            format!("{reply}{:x}\r\n{text}\r\n", text.len())
        });
        let mut rings = None;
        let (mut begun, mut count) = (None, 0);
        run(&format!("api = \"http://{}\"", server.at), |w| {
            let reader = w.table.reader();
            let listener = rings.get_or_insert_with(|| reader.listen());
            count += usize::from(weft::reactor::block_on(futures_lite::future::poll_once(listener.rung())).is_some());
            begun.get_or_insert_with(Instant::now);
            w.table.update(|t| t.service("shop", "web").is_some_and(|s| s.ports[0].number == 5_999))
        });
        let most = since(begun.unwrap()).as_millis() / 50 + 3;
        assert!((count as u128) <= most, "{count} changes, {most} at most");
    }
}

/// An address of another machine is never asked in a test; that it would be is seen in the requests' paths.
#[test]
fn namespaces_are_followed_one_by_one() {
    let server = Server::new(None, cluster);
    run(&format!("api = \"http://{}\"\nnamespaces = [\"b\", \"a\"]", server.at), |w| {
        w.synced() && w.status.list().len() == 5
    });
    let asked = server.asked().concat();
    for path in
        ["/api/v1/namespaces/a/services?", "/apis/discovery.k8s.io/v1/namespaces/b/endpointslices?", "/api/v1/nodes?"]
    {
        assert!(asked.contains(path), "{path} in {asked}");
    }
    assert!(!asked.contains("/api/v1/services"), "{asked}");
    assert_eq!(Resource::Services.name(), "services");
}
