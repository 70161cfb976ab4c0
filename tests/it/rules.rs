//! DestinationRules as the API accepts them: none stops anything, what is done is done, and what is not is named.

use std::time::{Duration, Instant};
use weft::{
    config::Policy,
    kube::{
        item::{self, Read},
        json::Scanner,
        resource::Resource,
        types::KEEP,
        watcher::{Input, Output, Setup, Watcher},
    },
    table::{
        Table,
        balance::{Ask, Balancer, Here},
        model::{Change, Object, Protocol, ServiceId, Source},
        rule::{Choice, Number, Rule},
    },
};

const CORPUS: &str = include_str!("fixtures/kube/rules.txt");

const CLUSTER: &str = r#"{"kind":"List","items":[
    {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},
     "spec":{"clusterIP":"10.96.0.10","ports":[{"port":80},{"port":81,"name":"b"}]}},
    {"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","addressType":"IPv4",
     "metadata":{"name":"web-1","namespace":"shop","labels":{"kubernetes.io/service-name":"web"}},
     "ports":[{"port":8080}],"endpoints":[{"addresses":["10.1.0.1"]},{"addresses":["10.1.0.2"]},{"addresses":["10.1.0.3"]}]}]}"#;

fn objects(text: &str) -> Vec<Object> {
    let (mut scanner, mut rest, mut all) = (Scanner::new(KEEP), text.as_bytes(), Vec::new());
    while let Some(piece) = scanner.next(&mut rest).unwrap() {
        if piece.part == weft::kube::json::Part::Envelope {
            continue;
        }
        match item::read(&piece, &mut |name| name.into()) {
            Read::Objects(objects, None) => all.extend(objects),
            other => panic!("{text}: {other:?}"),
        }
    }
    scanner.finish().unwrap();
    all
}

fn rule(name: &str, version: &str, spec: &str) -> Rule {
    let text = format!(
        r#"{{"apiVersion":"networking.istio.io/{version}","kind":"DestinationRule","metadata":{{"name":"{name}",
            "namespace":"shop","creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{spec}}}"#
    );
    match &objects(&text)[..] {
        [Object::Rule(rule)] => rule.clone(),
        other => panic!("{spec}: {other:?}"),
    }
}

fn said(choice: Option<&Choice>) -> String {
    match choice {
        None => "-".into(),
        Some(Choice::RoundRobin) => "round-robin".into(),
        Some(Choice::Random) => "random".into(),
        Some(Choice::LeastRequest) => "least-request".into(),
        Some(Choice::SourceIp) => "source-ip".into(),
        Some(Choice::Header(name)) => format!("header {name}"),
    }
}

#[test]
fn every_rule_is_read_and_what_is_not_done_is_named() {
    let web = ServiceId { namespace: "shop".into(), name: "web".into() };
    let lines: Vec<&str> = CORPUS.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.len() >= 60, "{}", lines.len());
    for (at, line) in lines.iter().enumerate() {
        let parts: Vec<&str> = line.split(" =>").map(str::trim).collect();
        let [spec, choice, not_done] = parts[..] else { panic!("{line}") };
        let version = ["v1", "v1beta1", "v1alpha3", "v2"][at % 4];
        let rule = rule("rule", version, &spec.replace("HOST", r#""host": "web""#));
        let mut table = Table::default();
        table.apply(Change::Apply(Source::Api, Object::Rule(rule.clone())));
        for object in objects(CLUSTER) {
            table.apply(Change::Apply(Source::Api, object));
        }
        let port = &table.service_by_id(&web).unwrap().ports[0];
        let traffic = table.traffic(&web, port).cloned();
        let cut = rule.not_done.strip_suffix(", ...").unwrap_or(&rule.not_done);
        let same = cut == not_done || (cut.len() < rule.not_done.len() && not_done.starts_with(cut));
        assert!(same && rule.not_done.len() < 210, "{line}: {:?}", rule.not_done);
        assert_eq!(said(traffic.as_ref().and_then(|t| t.choice.as_ref())), choice, "{line}");
        let mut balancer = Balancer::new(Policy::RoundRobin, fastrand::Rng::with_seed(1));
        let destination = "10.96.0.10:80".parse().unwrap();
        let ask = Ask { destination, protocol: Protocol::Tcp, client: [192, 168, 0, 1].into(), tried: &[] };
        let mut seen: Vec<_> = (0..60)
            .map(|_| table.pick(&Here::default(), ask, None, &mut balancer, Instant::now()).unwrap().target.address())
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), if choice == "source-ip" { 1 } else { 3 }, "{line}");
    }
}

#[test]
fn numbers_and_times_are_those_of_the_rule() {
    let pool = r#"{"maxConnections":100,"connectTimeout":"1.5s","idleTimeout":"1h1m","maxConnectionDuration":"500us",
        "tcpKeepalive":{"probes":3,"time":"7200s","interval":"75000ms"}}"#;
    let outlier =
        r#"{"consecutive5xxErrors":0,"consecutiveGatewayErrors":3,"baseEjectionTime":"15m","maxEjectionPercent":50}"#;
    let spec = format!(
        r#"{{"host":"web","trafficPolicy":{{"connectionPool":{{"tcp":{pool}}},"outlierDetection":{outlier}}}}}"#
    );
    let traffic = rule("a", "v1", &spec).traffic;
    for (which, wanted) in [
        (Number::Connections, 100),
        (Number::ConnectMs, 1_500),
        (Number::IdleMs, 3_660_000),
        (Number::LifeMs, 1),
        (Number::KeepaliveProbes, 3),
        (Number::KeepaliveMs, 7_200_000),
        (Number::KeepaliveEveryMs, 75_000),
        (Number::EjectMs, 900_000),
    ] {
        assert_eq!(traffic.number(which), Some(wanted), "{which:?}");
    }
    let outlier = traffic.outlier().unwrap();
    assert_eq!((outlier.failures, outlier.percent), (3, 50));
    let never = r#"{"host":"web","trafficPolicy":{"outlierDetection":{"consecutive5xxErrors":0}}}"#;
    assert_eq!(rule("a", "v1", never).traffic.outlier().map(|o| o.failures), Some(0));
    assert_eq!(rule("a", "v1", r#"{"host":"web"}"#).traffic.outlier(), None);
}

#[test]
fn a_rule_of_the_services_name_counts_where_its_host_is_no_service() {
    let spec = r#"{"host":"hostname-lb-edge","trafficPolicy":{"loadBalancer":{"simple":"RANDOM"}}}"#;
    let mut table = Table::default();
    table.apply(Change::Apply(Source::Api, Object::Rule(rule("web", "v1alpha3", spec))));
    for object in objects(CLUSTER) {
        table.apply(Change::Apply(Source::Api, object));
    }
    let web = ServiceId { namespace: "shop".into(), name: "web".into() };
    assert_eq!(table.rule_of(&web).and_then(|r| r.traffic.choice.clone()), Some(Choice::Random));
    let other = r#"{"apiVersion":"example.com/v1","kind":"DestinationRule","metadata":{"name":"x"},"spec":{}}"#;
    let mut rest = other.as_bytes();
    let mut scanner = Scanner::new(KEEP);
    let piece = scanner.next(&mut rest).unwrap().unwrap();
    assert_eq!(item::read(&piece, &mut |name| name.into()), Read::Skipped, "of another group");
}

#[test]
fn what_is_not_done_is_named_in_a_few_words() {
    let many: Vec<String> = (0..500).map(|n| format!(r#""field{n}":{n}"#)).collect();
    let deep = format!("{}1{}", r#"{"a":"#.repeat(55), "}".repeat(55));
    let spec = format!(r#"{{"host":"web","trafficPolicy":{{{},"deep":{deep}}}}}"#, many.join(","));
    let rule = rule("a", "v1", &spec);
    assert!(rule.not_done.len() < 210 && rule.not_done.ends_with(", ..."), "{}", rule.not_done);
}

/// Asks a server that answers each path by `serve` until the watcher rests; the paths that it was asked for.
fn followed(watcher: &mut Watcher, table: &mut Table, now: Instant, serve: impl Fn(&str) -> String) -> Vec<String> {
    let mut asked = Vec::new();
    watcher.handle_input(now, Input::Tick, table);
    for _ in 0..100 {
        match watcher.poll_output() {
            Output::Connect => watcher.handle_input(now, Input::Connected, table),
            Output::Get(target) => {
                let answer = serve(&target);
                asked.push(target.split('?').next().unwrap().to_owned());
                watcher.handle_input(now, Input::Bytes(answer.as_bytes()), table);
            }
            Output::Hangup => {}
            Output::Wait(_) => break,
        }
    }
    asked
}

fn http(status: u16, body: &str) -> String {
    format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn the_version_that_the_server_has_is_followed_and_no_version_is_no_error() {
    let begun = Instant::now();
    let setup = |metaserver| Setup {
        resource: Resource::rules(metaserver),
        namespace: None,
        metaserver,
        pod_names: false,
        start: begun,
        spread: Duration::ZERO,
        rng: fastrand::Rng::with_seed(7),
    };
    let absent = |_: &str| http(404, r#"{"kind":"Status","code":404,"message":"the server could not find it"}"#);
    let all: Vec<String> =
        ["v1", "v1beta1", "v1alpha3"].map(|v| format!("/apis/networking.istio.io/{v}/destinationrules")).into();
    let (mut watcher, mut table) = (Watcher::new(setup(false)), Table::default());
    assert_eq!(followed(&mut watcher, &mut table, begun, absent), all);
    let report = watcher.report();
    assert!(report.synced && report.error.is_none(), "{report:?}");
    assert_eq!(followed(&mut watcher, &mut table, begun + Duration::from_secs(50), absent), [""; 0], "slowly");
    let item = r#"{"metadata":{"name":"r","namespace":"shop","uid":"u","resourceVersion":"5"},
        "spec":{"host":"web","trafficPolicy":{"loadBalancer":{"simple":"RANDOM"}}}}"#;
    let present = |target: &str| {
        if !target.contains("/v1beta1/") {
            absent(target)
        } else if target.contains("watch=1") {
            let bookmark = r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9",
                "annotations":{"k8s.io/initial-events-end":"true"}}}}"#;
            let events = format!("{{\"type\":\"ADDED\",\"object\":{item}}}{bookmark}");
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
            format!("{head}{:x}\r\n{events}\r\n", events.len())
        } else {
            http(
                200,
                &format!(r#"{{"kind":"DestinationRuleList","metadata":{{"resourceVersion":"9"}},"items":[{item}]}}"#),
            )
        }
    };
    let later = begun + Duration::from_secs(400);
    let asked = followed(&mut watcher, &mut table, later, present);
    assert_eq!(asked.last(), Some(&all[1]), "the CRD came later: {asked:?}");
    assert_eq!((table.rules().count(), watcher.report().synced), (1, true));
    let (mut edge, mut table) = (Watcher::new(setup(true)), Table::default());
    assert_eq!(followed(&mut edge, &mut table, begun, absent)[0], all[2], "metaServer knows EdgeMesh's");
}

#[test]
fn mutilated_rules_end_and_never_panic() {
    let mut rng = fastrand::Rng::with_seed(11);
    for line in CORPUS.lines().filter(|line| !line.starts_with('#')) {
        let spec = line.split(" =>").next().unwrap().replace("HOST", r#""host": "web""#);
        let whole = format!(
            r#"{{"apiVersion":"networking.istio.io/v1","kind":"DestinationRule","metadata":{{"name":"r"}},"spec":{spec}}}"#
        );
        for _ in 0..200 {
            let mut bytes = whole.clone().into_bytes();
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..bytes.len());
                match rng.u8(..3) {
                    0 => bytes[at] = b"{}[]\",:0ae\\-."[rng.usize(..13)],
                    1 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, b"{}[]\",:0ae\\-."[rng.usize(..13)]),
                }
            }
            let (mut scanner, mut rest) = (Scanner::new(KEEP), &bytes[..]);
            while let Ok(Some(piece)) = scanner.next(&mut rest) {
                let _ = item::read(&piece, &mut |name| name.into());
            }
        }
    }
}
