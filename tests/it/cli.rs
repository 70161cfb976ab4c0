//! The executable: exit codes, output, files' modes, and an agent that is asked over its socket.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

const WEFT: &str = env!("CARGO_BIN_EXE_weft");

/// A directory that goes with its owner.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn temp_dir() -> TempDir {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("weft-it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    fs::create_dir_all(&path).unwrap();
    TempDir(path)
}

fn weft<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Output {
    Command::new(WEFT).args(args).env_remove("WEFT_LOG").output().unwrap()
}

/// Exit code, stdout, stderr.
fn said<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S]) -> (i32, String, String) {
    let out = weft(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn ok<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S]) -> String {
    let (code, out, err) = said(args);
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    out
}

fn fails<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S]) -> String {
    let (code, out, err) = said(args);
    assert_eq!((code, out.as_str()), (1, ""), "{args:?}: {err}");
    err
}

/// A `weft run` that ends with its owner.
struct Agent {
    child: Child,
    socket: String,
}

impl Agent {
    /// Started with a config that switches off all that needs rights or a free port.
    fn start(dir: &TempDir, more: &str, args: &[&str]) -> Self {
        let socket = dir.file("run/weft.sock");
        Self::configure(dir, &socket, more);
        let config = dir.file("weft.toml");
        let child = Command::new(WEFT)
            .args(["run", "--config", &config])
            .args(args)
            .env_remove("WEFT_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut agent = Self { child, socket };
        let until = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&agent.socket).is_err() {
            if let Some(status) = agent.child.try_wait().unwrap() {
                panic!("ended with {status}: {}", agent.log());
            }
            assert!(Instant::now() < until, "no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    fn configure(dir: &TempDir, socket: &str, more: &str) {
        let text = format!(
            "dns.enable = false\nproxy.enable = false\ntunnel.enable = false\nnode.name = \"edge-1\"\n\
             node.state_dir = \"{}\"\nadmin.socket = \"{socket}\"\n{more}",
            dir.file("state")
        );
        fs::write(dir.path().join("weft.toml"), text).unwrap();
    }

    fn ask(&self, args: &[&str]) -> (i32, String, String) {
        said(&[args, &["--socket", &self.socket]].concat())
    }

    fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reply = String::new();
        let _ = stream.read_to_string(&mut reply);
        reply
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    fn log(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn terminate(mut self) -> (i32, String) {
        self.signal("-TERM");
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        let log = self.log();
        (code, log)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SERVICES: &str = r#"
[[service]]
name = "web"
namespace = "shop"
ip = "10.96.0.10"
ports = [{ name = "http", port = 80, target = 8080 }]
endpoints = [{ address = "192.168.1.10", node = "edge-1" }, { address = "192.168.1.11", port = 9090 }]

[[service]]
name = "db"
ports = [{ port = 5432 }]
"#;

#[test]
fn help_is_no_error_and_bad_usage_is_2() {
    for args in [&["--help"][..], &["help"], &["ca", "issue", "--help"], &["run", "--help"]] {
        let text = ok(args);
        assert!(text.starts_with("Usage: weft"), "{text}");
    }
    let help = ok(&["--help"]);
    for command in ["run", "status", "peers", "services", "resolve", "check", "setup", "ca", "cleanup", "version"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
    }
    for args in [
        &[][..],
        &["nonsense"],
        &["run", "--nonsense"],
        &["status", "more"],
        &["resolve"],
        &["ca", "issue"],
        &["ca", "issue", "--node", "Edge 1"],
        &["ca", "issue", "--node", "a", "--role", "king"],
        &["ca", "issue", "--node", "a", "--relay", "r:1"],
        &["ca", "issue", "--node", "a", "--public-key", "AAAA"],
        &["run", "--log", "loud"],
    ] {
        let (code, out, err) = said(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("weft: "), "{args:?}: {err}");
    }
}

#[test]
fn version_and_self_test() {
    assert!(ok(&["version"]).starts_with(&format!("weft {} (", env!("CARGO_PKG_VERSION"))));
    let json = ok(&["version", "--json"]);
    assert!(json.starts_with(&format!("{{\"version\":\"{}\"", env!("CARGO_PKG_VERSION"))), "{json}");
    let tests = ok(&["version", "--self-test"]);
    for name in ["sha256", "chacha20-poly1305", "noise", "ed25519", "x25519"] {
        assert!(tests.lines().any(|l| l.starts_with(name) && l.ends_with(" ok")), "{name} in {tests}");
    }
}

#[test]
fn without_an_agent_the_remedy_is_named() {
    let dir = temp_dir();
    let socket = dir.file("none.sock");
    for args in [&["status"][..], &["peers"], &["services"], &["resolve", "web.shop"]] {
        let error = fails(&[args, &["--socket", &socket]].concat());
        let want =
            format!("weft: no agent answers at {socket}: start it with `weft run`, or name its socket with --socket\n");
        assert_eq!(error, want);
    }
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(fails(&["status", "--socket", &socket]).contains("no agent answers"));
}

#[test]
fn an_agent_tells_and_leaves_nothing() {
    let dir = temp_dir();
    let agent = Agent::start(&dir, SERVICES, &[]);
    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&agent.socket), 0o600);

    let (code, out, err) = agent.ask(&["status"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("node      edge-1 (weft "), "{out}");
    let (_, json, _) = agent.ask(&["status", "--json"]);
    assert!(json.contains("\"node\":\"edge-1\"") && json.contains("\"counters\":{"), "{json}");
    assert_eq!(agent.ask(&["peers", "--json"]).1, "{\"peers\":[]}\n");

    let all = "NAMESPACE  NAME  KIND       ADDRESS     PORTS        READY\n\
               default    db    Headless   none        5432/TCP     0/0\n\
               shop       web   ClusterIP  10.96.0.10  http:80/TCP  2/2\n";
    assert_eq!(agent.ask(&["services"]).1, all);
    let web = "shop/web  ClusterIP  10.96.0.10  http:80/TCP\n\
               port 80/TCP: round-robin\n\
               ENDPOINT      PORTS  NODE    ZONE  NEAR  HOSTNAME  LIVE/ALL  FAILED  STATE\n\
               192.168.1.10  8080   edge-1  -     here  -         0/0       0       ready\n\
               192.168.1.11  9090   -       -     -     -         0/0       0       ready\n";
    for name in ["web", "shop/web", "web.shop", "web.shop.svc.cluster.local"] {
        assert_eq!(agent.ask(&["services", name]).1, web, "{name}");
    }
    assert_eq!(agent.ask(&["services", "db"]).1, "default/db  Headless  none  5432/TCP\nno endpoints\n");
    let json = agent.ask(&["services", "--json"]).1;
    assert!(json.contains(r#""name":"web","kind":"ClusterIP","ips":["10.96.0.10"]"#), "{json}");
    assert_eq!(agent.ask(&["resolve", "web.shop"]).1, "web.shop.svc.cluster.local  30  A  10.96.0.10\n");
    assert!(agent.ask(&["resolve", "10.96.0.10"]).1.ends_with("PTR  web.shop.svc.cluster.local\n"));
    let nx = agent.ask(&["resolve", "no.shop.svc.cluster.local"]);
    assert_eq!((nx.0, nx.2.as_str()), (1, "weft: no.shop.svc.cluster.local: NXDOMAIN\n"));

    let (code, _, err) = agent.ask(&["services", "no/such"]);
    assert_eq!((code, err.as_str()), (1, "weft: no service no/such\n"));
    let (code, out, err) = agent.ask(&["resolve", "www.example.com"]);
    let foreign = "weft: www.example.com: not a name of the cluster: the upstream servers answer it\n";
    assert_eq!((code, out.as_str(), err.as_str()), (1, "", foreign));

    let socket = agent.socket.clone();
    let (code, log) = agent.terminate();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("SIGTERM: leaving"), "{log}");
    assert!(!Path::new(&socket).exists());
    let left: Vec<_> = fs::read_dir(Path::new(&socket).parent().unwrap()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_is_no_question_gets_an_error_and_silence_gets_nothing() {
    let dir = temp_dir();
    let agent = Agent::start(&dir, "", &[]);
    let want = r#"{"error":"expected: status, peers, services [NAME], or resolve NAME"}"#;
    for bad in ["\n", "nonsense\n", "status now\n", "resolve\n", "\u{1}\u{2}\n", "GET / HTTP/1.1\r\n\r\n"] {
        assert_eq!(agent.raw(bad.as_bytes()), want, "{bad:?}");
    }
    assert_eq!(agent.raw(&[0xff; 3]), want);
    assert!(agent.raw(&[b'a'; 5_000]).len() <= want.len());
    assert!(agent.raw(b"services \"\\\x1b\n").contains(r#"no service \"\\\u001b"#));
    // Clients that say nothing hold up nobody.
    let idle: Vec<_> = (0..7).map(|_| UnixStream::connect(&agent.socket).unwrap()).collect();
    assert_eq!(agent.ask(&["peers"]).1, "no peers\n");
    drop(idle);
    assert_eq!(agent.ask(&["peers"]).0, 0);
}

#[test]
fn cleanup_leaves_a_living_agent_alone() {
    let dir = temp_dir();
    let agent = Agent::start(&dir, "", &[]);
    let error = fails(&["cleanup", "--socket", &agent.socket]);
    assert!(error.contains("an agent is at work"), "{error}");
}

#[test]
fn a_second_agent_is_refused_and_a_dead_one_is_replaced() {
    let dir = temp_dir();
    let mut first = Agent::start(&dir, "", &[]);
    let error = fails_last(&["run", "--config", &dir.file("weft.toml")]);
    assert_eq!(error, format!("weft: admin socket {}: another agent answers there", first.socket));
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(Path::new(&first.socket).exists());
    let second = Agent::start(&dir, "", &[]);
    assert_eq!(second.terminate().0, 0);

    fs::write(&first.socket, "mine").unwrap();
    let error = fails_last(&["run", "--config", &dir.file("weft.toml")]);
    assert!(error.ends_with("there is something else than a socket"), "{error}");
    assert_eq!(fs::read_to_string(&first.socket).unwrap(), "mine");
}

fn fails_last(args: &[&str]) -> String {
    fails(args).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_hangup_reads_the_file_again() {
    let dir = temp_dir();
    let mut agent = Agent::start(&dir, "", &[]);
    let mut log = BufReader::new(agent.child.stderr.take().unwrap());
    let mut line_with = |what: &str| {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the log ends without {what:?}");
        }
        line
    };
    Agent::configure(&dir, &agent.socket, SERVICES);
    agent.signal("-HUP");
    line_with("reload: 2 services of the configuration");
    assert!(agent.ask(&["status"]).1.contains("\ntable     2 services, 2 endpoints, 0 nodes\n"));
    Agent::configure(&dir, &agent.socket, "dns.ttl = 5\nproxy.mark = 64");
    agent.signal("-HUP");
    line_with("0 services of the configuration; begun anew: dns, rules");
    line_with("proxy.mark stay as they are until a restart");
    assert_eq!(agent.ask(&["services"]).1, "no services\n");
    fs::write(dir.path().join("weft.toml"), "dns = 1").unwrap();
    agent.signal("-HUP");
    let line = line_with("all stays as it is");
    assert!(line.contains("weft.toml:1:7: dns: "), "{line}");
    assert_eq!(agent.ask(&["status"]).0, 0);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = Command::new(WEFT)
        .args(["version", "--self-test"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), &b""[..]));

    let dir = temp_dir();
    let agent = Agent::start(&dir, SERVICES, &[]);
    for command in ["peers", "services", "status", "--help"] {
        let socket = if command == "--help" { String::new() } else { format!("--socket {}", agent.socket) };
        let script = format!("{{ {WEFT} {command} {socket}; echo code $? >&2; }} | head -c 1");
        let out = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(out.stderr).unwrap(), "code 0\n", "{command}");
    }
}

#[test]
fn the_log_level_of_the_flag_wins() {
    let dir = temp_dir();
    let agent = Agent::start(&dir, "node.log = \"trace\"", &["--log", "error"]);
    assert_eq!(agent.terminate(), (0, String::new()));
}

#[test]
fn a_ca_from_nothing_to_a_node() {
    let dir = temp_dir();
    let (ca, relay, edge) = (dir.file("ca"), dir.file("relay.bundle"), dir.file("edge.bundle"));
    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert!(fails(&["ca", "show", "--dir", &ca]).contains("`weft ca init"));
    assert!(ok(&["ca", "init", "--dir", &ca]).starts_with(&format!("made a CA in {ca}\n")));
    assert_eq!(mode(&ca), 0o700);
    for secret in ["ca/ca.key", "ca/psk"] {
        assert_eq!(mode(&dir.file(secret)), 0o600, "{secret}");
    }
    let key = fs::read(dir.file("ca/ca.key")).unwrap();
    assert!(fails(&["ca", "init", "--dir", &ca]).contains("is there already"));
    assert_eq!(fs::read(dir.file("ca/ca.key")).unwrap(), key);

    // A relay must exist, and be one, before others can name it.
    let at = "relay-1@relay.example:7843";
    let issue = |more: &str| -> Vec<String> {
        let line = format!("ca issue --dir {ca} {more}");
        line.split(' ').map(Into::into).collect()
    };
    let with_relay = issue(&format!("--node edge-1 --relay {at} --out {edge}"));
    assert!(
        fails(&with_relay).contains("relay relay-1: no certificate was issued; first: weft ca issue --node relay-1")
    );
    ok(&issue(&format!("--node relay-1 --out {}", dir.file("plain"))));
    assert!(fails(&with_relay).contains("its certificate has not the role relay"));
    assert!(!Path::new(&edge).exists());
    let again = ok(&issue(&format!("--node relay-1 --role relay --role egress --out {relay}")));
    assert!(again.contains("An older certificate of relay-1 stays good until"), "{again}");
    ok(&with_relay);
    assert_eq!((mode(&edge), mode(&relay)), (0o600, 0o600));
    assert!(fails(&with_relay).contains("is there already"));

    let shown = ok(&["ca", "show", &edge]);
    assert!(shown.starts_with("node        edge-1\nroles       none\n"), "{shown}");
    assert!(shown.contains("relay       relay-1@relay.example:7843 until "), "{shown}");
    let json = ok(&["ca", "show", &relay, "--json"]);
    assert!(json.contains("\"roles\":[\"relay\",\"egress\"]") && json.contains("\"has_private_key\":true"), "{json}");
    let all = ok(&["ca", "show", "--dir", &ca]);
    assert!(all.contains("\nedge-1   ") && all.contains("\nrelay-1  relay,egress"), "{all}");

    // What is shown is no secret, and what is written can be read.
    let text = fs::read_to_string(&edge).unwrap();
    let bundle = weft::tunnel::identity::Bundle::parse(&text).unwrap();
    let secrets = [
        bundle.key.as_ref().unwrap().to_base64(),
        bundle.psks[0].key.to_base64(),
        String::from_utf8(key).unwrap().into(),
    ];
    for shown in [shown, json, all] {
        assert!(secrets.iter().all(|s| !shown.contains(s.trim())), "{shown}");
    }
    assert_eq!(bundle.psks[0].epoch, 1);
    assert_eq!(bundle.relays[0].certificate.name, "relay-1");

    // A node that keeps its key to itself.
    let public = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    let told = ok(&issue(&format!("--node edge-2 --public-key {public} --out {}", dir.file("2"))));
    assert!(told.contains("fill in its line private_key"), "{told}");
    assert!(fs::read_to_string(dir.file("2")).unwrap().lines().all(|l| !l.starts_with("private_key")));
    assert!(fails(&issue("--node edge-3 --days 0")).contains("--days 0"));
}

#[test]
fn a_damaged_ca_says_what_is_damaged() {
    let dir = temp_dir();
    let ca = dir.file("ca");
    ok(&["ca", "init", "--dir", &ca]);
    let (other, psk) = (dir.file("other"), fs::read_to_string(dir.file("ca/psk")).unwrap());
    ok(&["ca", "init", "--dir", &other]);
    let show = || fails(&["ca", "show", "--dir", &ca]);
    for (bad, said) in
        [("", "psk: expected one or two lines"), ("1 AAAA\n", "psk: "), (&psk.replace("1 ", "256 "), "psk: ")]
    {
        fs::write(dir.file("ca/psk"), bad).unwrap();
        assert!(show().contains(said), "{bad:?}: {}", show());
    }
    fs::write(dir.file("ca/psk"), format!("2 {}{psk}", psk.split(' ').nth(1).unwrap())).unwrap();
    assert!(ok(&["ca", "show", "--dir", &ca]).contains("psk epochs  [2, 1]"));
    fs::copy(dir.file("other/ca.pub"), dir.file("ca/ca.pub")).unwrap();
    assert!(show().contains("ca.pub is not the public half of ca.key"));
    fs::write(dir.file("ca/ca.key"), "nonsense").unwrap();
    assert!(show().contains("ca.key: expected 32 bytes in base64"));
}

#[test]
fn a_bundle_that_does_not_fit_stops_the_agent_and_an_open_one_is_told() {
    let dir = temp_dir();
    let (ca, bundle) = (dir.file("ca"), dir.file("b"));
    ok(&["ca", "init", "--dir", &ca]);
    ok(&["ca", "issue", "--dir", &ca, "--node", "edge-2", "--out", &bundle]);
    Agent::configure(&dir, &dir.file("s"), "");
    let run = |bundle: &str| fails_last(&["run", "--config", &dir.file("weft.toml"), "--bundle", bundle]);
    assert_eq!(run(&bundle), "weft: node.name is edge-1, and the bundle is edge-2's");
    Agent::configure(&dir, &dir.file("s"), "relay.enable = true");
    assert!(fails_last(&["run", "--config", &dir.file("weft.toml")]).contains("a relay needs the tunnel"));
    Agent::configure(&dir, &dir.file("s"), "");
    assert!(run(&dir.file("none")).contains("none: No such file"));
    fs::write(dir.file("bad"), "version = 1").unwrap();
    assert!(run(&dir.file("bad")).contains("bad: line 1: missing field `certificate`"));

    let mine = dir.file("mine");
    ok(&["ca", "issue", "--dir", &ca, "--node", "edge-1", "--out", &mine]);
    fs::set_permissions(&mine, fs::Permissions::from_mode(0o644)).unwrap();
    let (code, log) = Agent::start(&dir, "", &["--bundle", &mine]).terminate();
    assert_eq!(code, 0);
    assert!(log.contains(&format!("chmod 600 {mine}")), "{log}");
}
