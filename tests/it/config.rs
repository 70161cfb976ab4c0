//! The configuration: its documentation holds, and its errors say where and what.

use std::{collections::BTreeSet, fs, process::Command};
use weft::{
    config::{Config, StaticEndpoint, StaticPort, StaticService},
    table::model::Protocol,
};

const WEFT: &str = env!("CARGO_BIN_EXE_weft");

fn example() -> String {
    fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/weft.toml")).unwrap()
}

/// A comment is `# text`; a key that was commented out has no space.
fn uncommented() -> String {
    let line = |l: &str| match l.strip_prefix('#') {
        Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => key.to_owned(),
        Some(_) | None => l.to_owned(),
    };
    example().lines().map(line).collect::<Vec<_>>().join("\n")
}

/// What the parser knows in a table that is opened by `header`.
fn known(header: &str) -> BTreeSet<String> {
    let error = Config::parse(&format!("{header}\nqqqqqqqqqqqqqqqq = 1")).unwrap_err();
    let list = error.what.strip_prefix("unknown key; known here are ").expect(&error.what).to_owned();
    list.split(", ").map(Into::into).collect()
}

#[test]
fn the_example_names_the_defaults() {
    assert_eq!(Config::parse(&example()).unwrap(), Config::default());
    let mut all = Config::parse(&uncommented()).unwrap();
    let web = StaticService {
        name: "web".into(),
        namespace: "shop".into(),
        ip: Some("10.96.0.10".parse().unwrap()),
        ports: vec![StaticPort { name: "http".into(), port: 80, target: 8080, protocol: Protocol::Tcp }],
        endpoints: vec![StaticEndpoint {
            address: "192.168.1.10".parse().unwrap(),
            port: Some(8080),
            node: Some("edge-1".into()),
            hostname: Some("web-0".into()),
        }],
        sticky: Some(10_800),
    };
    assert_eq!(std::mem::take(&mut all.services), [web]);
    assert_eq!(all.node.bundle.take(), Some("/etc/weft.bundle".into()));
    assert_eq!(all.kube.kubeconfig.take(), Some("/etc/weft/kubeconfig".into()));
    assert_eq!(all.kube.token_file.take(), Some("/etc/weft/token".into()));
    assert_eq!(all.kube.ca_file.take(), Some("/etc/weft/ca.crt".into()));
    assert_eq!(all.dns.take_over.take(), Some(("kube-system".into(), "kube-dns".into())));
    assert_eq!(all, Config::default());
}

#[test]
fn the_example_has_every_key_and_a_sentence_for_it() {
    let example = example();
    for section in known("") {
        let header = if section == "service" { "[[service]]".to_owned() } else { format!("[{section}]") };
        let begin = example.find(&format!("{header}\n")).unwrap_or_else(|| panic!("no {header}"));
        let body = &example[begin + header.len()..];
        let body = &body[..body.find("\n[").unwrap_or(body.len())];
        for key in known(&header) {
            let at = body.find(&format!("\n#{key} = ")).unwrap_or_else(|| panic!("no {key} in {header}"));
            let before = body[..at].lines().last().unwrap_or_default();
            let with_name = key == "namespace" && before.starts_with("#name");
            assert!(before.starts_with("# ") || with_name, "{header} {key} has no sentence, but {before:?}");
        }
    }
    let line = |key: &str| example.lines().find(|l| l.starts_with(&format!("#{key} ="))).unwrap();
    for (header, list) in [("ports = [{", "ports"), ("endpoints = [{", "endpoints")] {
        let error =
            Config::parse(&format!("[[service]]\nname = \"a\"\n{header} qqqqqqqqqqqqqqqq = 1 }}]")).unwrap_err();
        for key in error.what.strip_prefix("unknown key; known here are ").unwrap().split(", ") {
            assert!(line(list).contains(&format!("{key} = ")), "{list}: {key}");
        }
    }
}

/// Each mistake, and all that is said of it.
const MISTAKES: &[(&str, &str)] = &[
    // No TOML.
    ("[node", "1:6: unclosed table, expected `]`"),
    ("a = \nb = 2", "1:5: string values must be quoted, expected literal string"),
    ("[node]\nname = \"a\"\nname = \"b\"", "3:1: duplicate key"),
    // Unknown keys.
    ("[nod]", "1:2: nod: unknown key; did you mean node?"),
    ("[dns]\nlisen = 1", "2:1: dns.lisen: unknown key; did you mean dns.listen?"),
    ("relay.enabled = true", "1:7: relay.enabled: unknown key; did you mean relay.enable?"),
    ("[kube]\nkubecfg = \"/a\"", "2:1: kube.kubecfg: unknown key; did you mean kube.kubeconfig?"),
    (
        "[kube]\napi = \"https://a:x\"",
        "2:7: kube.api: \"https://a:x\": expected \"none\", \"auto\", \"in-cluster\", or addresses of one cluster such as \
         https://192.0.2.1:6443",
    ),
    (
        "[kube]\napi = \"http://192.0.2.1\"\ntoken_file = \"/t\"",
        "3:14: kube.token_file: a token is not sent over plain http to another machine; expected https in kube.api",
    ),
    (
        "kube.namespaces = [\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\",\"p\",\"q\"]",
        "1:84: kube.namespaces: more than 16 of them",
    ),
    (
        "[kube]\nnamespaces = [\"a\", \"B\"]",
        "2:20: kube.namespaces: \"B\": expected a namespace's name, of 1 to 63 characters a-z, 0-9 and '-'",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ prot = 80 }]",
        "3:12: service.ports.prot: unknown key; did you mean service.ports.port?",
    ),
    // Types.
    ("[dns]\nenable = \"yes\"", "2:10: dns.enable: invalid type: string \"yes\", expected a boolean"),
    ("dns.listen = 53", "1:14: dns.listen: invalid type: integer `53`, expected a string"),
    ("[[service]]\nnamespace = \"a\"", "1:1: service: missing field `name`"),
    // Values.
    (
        "[node]\n  name = \"Edge 1\"",
        "2:10: node.name: \"Edge 1\": expected a node's name: characters a-z, 0-9, '-' and '.'; empty for the bundle's",
    ),
    ("node.state_dir = \"lib\"", "1:18: node.state_dir: \"lib\": expected an absolute path"),
    (
        "node.log = \"loud\"",
        "1:12: node.log: \"loud\": expected \"error\" or \"warn\" or \"info\" or \"debug\" or \"trace\"",
    ),
    (
        "dns.listen = \"169.254.96.16\"",
        "1:14: dns.listen: \"169.254.96.16\": expected an address of weft0 and a port, such as 169.254.96.16:53",
    ),
    ("dns.ttl = 3601", "1:11: dns.ttl: 3601: expected a number from 0 to 3600"),
    ("dns.ttl = -1", "1:11: dns.ttl: -1: expected a number from 0 to 3600"),
    (
        "[dns]\nupstream = [\"192.0.2.1\",\n  \"ns1\"]",
        "3:3: dns.upstream: \"ns1\": expected a server's address, such as 192.0.2.1 or 192.0.2.1:53, or the path of a \
         resolv.conf",
    ),
    (
        "dns.listen_also = [\"0.0.0.0\"]",
        "1:20: dns.listen_also: \"0.0.0.0\": expected an address of this host, such as 192.168.1.1 or 192.168.1.1:53",
    ),
    (
        "dns.take_over = \"kube-dns\"",
        "1:17: dns.take_over: \"kube-dns\": expected namespace/name of a Service, such as kube-system/kube-dns",
    ),
    (
        "dns.zones = [\"10.in-addr.arpa\", \"xip6.arpa\"]",
        "1:33: dns.zones: \"xip6.arpa\": expected a zone of addresses' names, such as 10.in-addr.arpa or ip6.arpa",
    ),
    ("dns.fallthrough = [\"a..b\"]", "1:20: dns.fallthrough: \"a..b\": expected a domain, or \".\" for all"),
    ("dns.pods = \"secure\"", "1:12: dns.pods: \"secure\": expected \"disabled\" or \"insecure\" or \"verified\""),
    (
        "dns.namespaces = [\"a.b\"]",
        "1:19: dns.namespaces: \"a.b\": expected a namespace: 1 to 63 characters a-z, 0-9 and '-'",
    ),
    ("dns.empty_services = \"\"", "1:22: dns.empty_services: \"\": expected \"nodata\" or \"nxdomain\""),
    ("[dns.stub]\n\"a b\" = [\"10.0.0.1\"]", "2:1: dns.stub: \"a b\": expected a domain such as corp.example"),
    ("[dns.stub]\n\"corp.example\" = []", "2:1: dns.stub: corp.example: expected 1 to 8 servers"),
    (
        "[dns.stub]\n\"corp.example\" = [\"10.0.0.1\", \"ns1\"]",
        "2:31: dns.stub: \"ns1\": expected a server's address, such as 192.0.2.1 or 192.0.2.1:53",
    ),
    ("[dns.stub]\na = [\"10.0.0.1\"]\n\"A.\" = [\"10.0.0.1\"]", "2:1: dns.stub: a is there twice"),
    ("dns.cache_ttl = 604801", "1:17: dns.cache_ttl: 604801: expected a number from 0 to 604800"),
    ("proxy.mark = 3", "1:14: proxy.mark: 3: expected one bit of 32, such as 0x20"),
    ("proxy.mark = 0x1_0000_0000", "1:14: proxy.mark: 4294967296: expected one bit of 32, such as 0x20"),
    ("proxy.backend = \"nftables\"", "1:17: proxy.backend: \"nftables\": expected \"auto\" or \"iptables\" or \"nft\""),
    ("proxy.max_connections = 0", "1:25: proxy.max_connections: 0: expected a number from 1 to 65536"),
    (
        "proxy.interfaces = [\"br-lan\", \"-j ACCEPT\"]",
        "1:31: proxy.interfaces: \"-j ACCEPT\": expected an interface's name, of 1 to 15 characters",
    ),
    (
        "[tunnel]\ninterfaces = [\"an interface with a long name\"]",
        "2:15: tunnel.interfaces: \"an interface with a long name\": expected an interface's name, of 1 to 15 characters",
    ),
    (
        "tunnel.relays = [\"relay.example:7843\"]",
        "1:18: tunnel.relays: \"relay.example:7843\": expected name@host:port, such as relay-1@relay.example:7843",
    ),
    // Services.
    ("[[service]]\nname = \"a\"", "2:8: service.ports: default/a has none; expected ports = [{ port = 80 }]"),
    (
        "[[service]]\nname = \"a.b\"\nports = [{ port = 80 }]",
        "2:8: service.name: \"a.b\": expected 1 to 63 characters a-z, 0-9 and '-', first and last a letter or digit",
    ),
    (
        "service = [{ name = \"a\", ports = [{ port = 1 }] },\n           { name = \"a\", ports = [{ port = 1 }] }]",
        "2:21: service.name: default/a is there twice",
    ),
    (
        "[[service]]\nname = \"a\"\nip = \"10.0.0.1\"\nports = [{ port = 1 }]\n\
         [[service]]\nname = \"b\"\nip = \"10.0.0.1\"\nports = [{ port = 1 }]",
        "7:6: service.ip: 10.0.0.1 is default/a's already",
    ),
    (
        "[[service]]\nname = \"a\"\nip = \"169.254.96.16\"\nports = [{ port = 1 }]",
        "3:6: service.ip: 169.254.96.16 is weft0's own address (dns.listen)",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ port = 65536 }]",
        "3:19: service.ports.port: 65536: expected a port from 1 to 65535",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ port = 80 }, { port = 81 }]",
        "3:25: service.ports.name: with several ports each needs a name of its own",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ name = \"x\", port = 80 }, { name = \"y\", port = 80 }]",
        "3:58: service.ports.port: 80 is there twice",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ port = 80, protocol = \"icmp\" }]",
        "3:34: service.ports.protocol: \"icmp\": expected \"TCP\", \"UDP\" or \"SCTP\"",
    ),
    (
        "[[service]]\nname = \"a\"\nip = \"10.0.0.1\"\nports = [{ port = 80 }]\nendpoints = [{ address = \"fd00::1\" }]",
        "5:26: service.endpoints.address: fd00::1 is not of the family of the Service's ip",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ port = 80 }]\nendpoints = [{ address = \"127.0.0.1\" }]",
        "4:26: service.endpoints.address: 127.0.0.1 is another on each node; say which: node = \"…\"",
    ),
    (
        "[[service]]\nname = \"a\"\nports = [{ port = 80 }]\nsticky = 86401",
        "4:10: service.sticky: 86401: expected a number of seconds from 1 to 86400",
    ),
];

#[test]
fn mistakes_are_named_with_their_place() {
    for (text, said) in MISTAKES {
        let error = Config::parse(text).map_or_else(|e| e.to_string(), |c| format!("accepted: {c:?}"));
        assert_eq!(error, *said, "\n{text}");
    }
}

#[test]
fn columns_count_characters() {
    assert_eq!(Config::parse("# ü\ndns = { domain = \"ü\", ttl = 9999 }").unwrap_err().column, 18);
    assert_eq!(Config::parse("node.zone = \"ü\"").unwrap_err().to_string().split(' ').next(), Some("1:13:"));
}

#[test]
fn ports_of_one_number_may_differ_in_protocol() {
    let text = "[[service]]\nname = \"dns\"\nports = [{ name = \"a\", port = 53 }, { name = \"b\", port = 53, protocol = \"UDP\" }]";
    assert_eq!(Config::parse(text).unwrap().services[0].ports.len(), 2);
}

#[test]
fn mutilated_files_never_panic() {
    let text = uncommented();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..3_000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..rng.usize(1..6) {
            let at = rng.usize(..bytes.len());
            match rng.u8(..3) {
                0 => bytes[at] = rng.u8(32..127),
                1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let _ = Config::parse(&String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn a_bad_file_ends_run_with_64() {
    let dir = crate::cli::temp_dir();
    let path = dir.path().join("weft.toml");
    fs::write(&path, "[dns]\nlisen = 1\n").unwrap();
    let out = Command::new(WEFT).args(["run", "--config"]).arg(&path).output().unwrap();
    assert_eq!(out.status.code(), Some(64));
    assert_eq!(
        String::from_utf8(out.stderr).unwrap(),
        format!("weft: {}:2:1: dns.lisen: unknown key; did you mean dns.listen?\n", path.display())
    );
    let missing = dir.path().join("none.toml");
    let out = Command::new(WEFT).args(["run", "--config"]).arg(&missing).output().unwrap();
    assert_eq!(out.status.code(), Some(64));
    assert!(String::from_utf8(out.stderr).unwrap().contains("none.toml: No such file"));
}
