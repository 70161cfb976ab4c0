//! The rows of the list-watch conformance table against the watcher, in virtual time, in reads of any size. The ids are
//! those of the table: L lists, W watches, E errors, T transport, J JSON, A credentials, S the store, M metaServer.

use crate::{heap, kube_meta, kube_rest, kube_streams, kube_wire, kube_world::*};
use std::{collections::BTreeMap, io::Write as _, panic::catch_unwind, time::Duration};
use weft::kube::{
    resource::Resource,
    watcher::{Input, SPREAD, first_try},
};

/// A row's id and its test.
pub(crate) type Row = (&'static str, fn());

/// Each row is a test of its own, and counted below.
macro_rules! rows {
    ($($id:literal $name:ident $body:block)*) => {
        $(#[test] fn $name() $body)*
        pub(crate) const ROWS: &[crate::kube_cases::Row] = &[$(($id, $name)),*];
    };
}
pub(crate) use rows;

/// Rows that no test here can show, and where they are.
const ELSEWHERE: &[(&str, &str)] = &[
    ("T4", "an address that goes away needs a kernel: tests/netns/kube address"),
    ("T10", "our own rules need a kernel: tests/netns/kube own-rules"),
];

#[test]
fn every_row() {
    let groups = [("L", 15), ("W", 16), ("E", 12), ("T", 12), ("J", 15), ("A", 7), ("S", 9), ("M", 20)];
    let mut tests: BTreeMap<&str, fn()> = BTreeMap::new();
    for (id, test) in [ROWS, kube_streams::ROWS, kube_meta::ROWS, kube_wire::ROWS, kube_rest::ROWS].concat() {
        assert!(tests.insert(id, test).is_none(), "{id} twice");
    }
    let (mut wrong, mut sum, mut said) = (Vec::new(), (0, 0), String::new());
    for (group, count) in groups {
        let (mut good, mut of) = (0, 0);
        for id in (1..=count).map(|n| format!("{group}{n}")) {
            match (tests.remove(id.as_str()), ELSEWHERE.iter().any(|(other, _)| *other == id)) {
                (Some(test), false) => {
                    of += 1;
                    if catch_unwind(test).is_ok() { good += 1 } else { wrong.push(id) }
                }
                (None, true) => {}
                (Some(_), true) => wrong.push(format!("{id} is said to be elsewhere")),
                (None, false) => wrong.push(format!("{id} has no test")),
            }
        }
        let rest = ELSEWHERE.iter().filter(|(id, _)| id.starts_with(group)).map(|(id, why)| format!("; {id}: {why}"));
        said += &format!("client {group} {good:3} of {of}{}\n", rest.collect::<String>());
        assert_eq!(of + ELSEWHERE.iter().filter(|(id, _)| id.starts_with(group)).count(), count);
        sum = (sum.0 + good, sum.1 + of);
    }
    said += &format!("client all {} of {}\n", sum.0, sum.1);
    // Shown without being asked for: what print! writes, the test harness keeps.
    std::io::stdout().write_all(said.as_bytes()).unwrap();
    assert!(wrong.is_empty() && tests.is_empty(), "{wrong:?} {:?}", tests.keys());
}

/// Over 5 s, and not in a heap.
fn is_spread(mut times: Vec<f64>, when: &str) {
    times.sort_by(f64::total_cmp);
    let (first, last) = (times[0], times[times.len() - 1]);
    assert!(last - first >= 5.0, "{when}: from {first} to {last}");
    let most = (0..times.len()).map(|n| times[n..].iter().take_while(|t| **t < times[n] + 0.5).count()).max();
    assert!(most.unwrap() < times.len() / 4, "{when}: {most:?} of {} within half a second", times.len());
}

pub(crate) fn each_step(test: impl Fn(usize)) {
    STEPS.into_iter().for_each(test);
}

rows! {
    "E1" e1_retry_after {
        let mut w = World::listing(64);
        w.next();
        for _ in 0..3 {
            w.refusal(429, "Retry-After: 7\r\n", "too many requests");
            let (asked, seconds) = w.next_after();
            assert!((7.0..9.0).contains(&seconds) && asked.contains("limit=500"), "{asked} {seconds}");
        }
        w.ok(&list(1, "x", &[service("a", 1)]));
        w.next();
        w.refusal(429, "Retry-After: 1\r\n", "too many requests");
        assert!(w.next().contains("continue=x"), "the same request");
        for _ in 0..9 {
            w.refusal(429, "Retry-After: 1\r\n", "x");
            w.next();
        }
        w.refusal(429, "Retry-After: 1\r\n", "x");
        assert!(!w.next().contains("continue"), "given up after ten times");
    }
    "E2" e2_too_many_requests_without_a_time {
        let mut w = World::listing(64);
        w.next();
        w.refusal(429, "", "x");
        assert!(w.next_after().1 > 0.1);
    }
    "E3" e3_errors_of_the_server {
        let mut w = World::listing(64);
        w.next();
        w.refusal(503, "Retry-After: 3\r\n", "x");
        assert!((3.0..4.1).contains(&w.next_after().1));
        let mut waits = Vec::new();
        for _ in 0..10 {
            w.refusal(503, "", "x");
            waits.push(w.next_after().1);
        }
        assert!(waits[9] >= 15.0 && waits.iter().all(|s| (0.1..=30.0).contains(s)), "{waits:?}");
    }
    "E4" e4_a_server_that_shuts_down {
        let mut w = World::listing(64);
        w.next();
        w.bytes(http(429, "Retry-After: 1\r\nConnection: close\r\n", "{}"));
        w.next();
        assert_eq!((w.connects, w.hangups), (2, 1));
    }
    "E5" e5_a_server_that_is_not_there {
        let mut w = World::of(Resource::Services, false, 3, 64);
        w.restored("old");
        w.refuse = Some("nobody listens there".into());
        w.pass(60);
        assert!((5..=11).contains(&w.connects), "{} tries", w.connects);
        assert_eq!((w.names().as_str(), w.error().as_str()), ("old", "nobody listens there"));
        w.refuse = None;
        assert!(w.next().contains("watch=1"));
    }
    "E6" e6_a_fleet_does_not_come_back_at_once {
        // A thousand that were started at once.
        let now = std::time::Instant::now();
        let starts = (0..1_000).map(|seed| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut w = World::starting(first_try(now, SPREAD, &mut rng), now, seed);
            w.next();
            (w.now - now).as_secs_f64()
        });
        is_spread(starts.collect(), "at the start");
        for outage in [1_u64, 300] {
            let times = (0..1_000).map(|seed| {
                let mut w = World::of(Resource::Services, false, seed, usize::MAX);
                w.next();
                w.open();
                w.event("BOOKMARK", &bookmark(5, true));
                w.pass(20);
                let from = w.now;
                w.close();
                w.refuse = Some("down".into());
                w.pass(outage);
                w.refuse = None;
                let target = w.next();
                assert!(!target.contains("sendInitialEvents"), "{target}");
                (w.now - from).as_secs_f64()
            });
            is_spread(times.collect(), &format!("after {outage} s"));
        }
    }
    "E7" e7_parameters_that_are_not_liked {
        let mut w = World::of(Resource::Services, false, 1, 64);
        assert!(w.next().contains("sendInitialEvents"));
        w.refusal(400, "", "x");
        assert!(w.next().contains("limit=500"));
        w.refusal(422, "", "x");
        assert_eq!(w.next(), "/api/v1/services?resourceVersion=0");
        w.ok(&list(3, "", &[]));
        assert!(w.next().contains("allowWatchBookmarks"));
        w.refusal(400, "", "x");
        let (asked, seconds) = w.next_after();
        assert!(!asked.contains("Bookmarks") && seconds == 0.0, "{asked}");
        w.refusal(400, "", "x");
        assert!(w.next_after().1 > 0.1, "nothing is left to be dropped");
    }
    "E8" e8_not_acceptable {
        let mut out = Vec::new();
        weft::kube::http::get("h", "/", "a", None, &mut out);
        assert!(String::from_utf8(out).unwrap().contains("\r\nAccept: application/json\r\n"));
        let mut w = World::listing(64);
        w.next();
        w.refusal(406, "", "only the following media types are accepted");
        assert!(w.next_after().1 >= 5.0 && w.error().contains("406"));
    }
    "E9" e9_a_captive_portal { each_step(|step| {
        for (kind, body) in [("text/html", "<html>"), ("application/json", "<html>"), ("application/json", ""), ("application/json", "[]"), ("application/json", "{}")] {
            let mut w = World::listing(step);
            w.restored("old");
            w.next();
            w.bytes(format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
            assert!(!w.watcher.listed() && !w.error().is_empty(), "{kind} {body}");
            assert!(w.next_after().1 > 0.1 && w.names() == "old");
        }
    }) }
    "E10" e10_a_status_with_200 { each_step(|step| {
        let mut w = World::listing(step);
        w.restored("old");
        w.next();
        w.ok(&status(500, "", "upstream failed").replace("\"metadata\":{}", "\"metadata\":{\"resourceVersion\":\"1\"},\"items\":[]"));
        assert!(!w.watcher.listed() && w.names() == "old" && w.error().contains("upstream failed"), "{}", w.error());
    }) }
    "E11" e11_redirects_are_not_followed {
        let mut w = World::listing(64);
        w.next();
        w.bytes(http(302, "Location: https://elsewhere.example/\r\n", ""));
        let (asked, seconds) = w.next_after();
        assert!(asked.starts_with("/api/v1/services") && seconds >= 5.0);
        assert!(w.error().contains("https://elsewhere.example/"), "{}", w.error());
    }
    "E12" e12_a_clock_that_was_set {
        let mut w = World::of(Resource::Services, false, 1, 64);
        w.refuse = Some("the server's certificate is not valid yet".into());
        w.pass(120);
        w.refuse = None;
        let from = w.now;
        w.input(weft::kube::watcher::Input::Nudge);
        w.next();
        assert!(w.now - from <= Duration::from_secs(1));
    }

    "T1" t1_bodies_of_all_kinds { each_step(|step| {
        let body = list(4, "", &[service("a", 1)]);
        for (head, body) in [
            (format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()), body.clone()),
            ("HTTP/1.0 200 OK\r\n\r\n".into(), body.clone()),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into(), format!("{:X}; a=b\r\n{body}\r\n0\r\nTrailer: x\r\n\r\n", body.len())),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into(), body.bytes().map(|b| format!("01\r\n{}\r\n", b as char)).chain(["0\r\n\r\n".into()]).collect()),
        ] {
            let mut w = World::listing(step);
            w.next();
            w.bytes(head.clone() + &body);
            if head.contains("1.0") {
                w.close();
            }
            assert_eq!((w.names().as_str(), w.watcher.listed()), ("a", true), "{head}");
        }
        let mut w = World::listing(step);
        w.next();
        w.bytes("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFF\r\n");
        assert!(w.error().contains("HTTP/1.1"), "{}", w.error());
    }) }
    "T2" t2_interim_answers { each_step(|step| {
        let mut w = World::listing(step);
        w.next();
        w.bytes("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n");
        w.ok(&list(4, "", &[service("a", 1)]));
        assert_eq!(w.names(), "a");
    }) }
    "T3" t3_silence_after_bookmarks {
        let mut w = World::listing(64);
        w.list_and_watch(1, &["a"]);
        w.event("BOOKMARK", &bookmark(4, false));
        let (asked, seconds) = w.next_after();
        assert!((200.0..207.0).contains(&seconds), "three bookmarks missed: {seconds}");
        assert!(asked.contains("watch=1") || asked.ends_with("limit=1"), "{asked}");
        assert_eq!((w.hangups, w.names().as_str()), (1, "a"));
    }
    "T5" t5_compression_is_not_asked_for {
        let mut out = Vec::new();
        weft::kube::http::get("h", "/", "a", None, &mut out);
        assert!(!String::from_utf8(out).unwrap().to_lowercase().contains("accept-encoding"));
        let mut w = World::listing(64);
        w.next();
        w.bytes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx");
        assert!(w.error().contains("compressed"), "{}", w.error());
    }

    "J1" j1_one_large_object {
        let mut w = World::listing(4096);
        w.list_and_watch(1, &[]);
        let large = service("a", 2).replace("\"managedFields\"", &format!("\"annotations\":{{\"x\":\"{}\"}},\"f\"", "é\\n".repeat(400_000)));
        let text = event("ADDED", &large);
        let chunk = format!("{:x}\r\n{text}\r\n", text.len());
        let (before, mut most) = (heap::held(), 0);
        for piece in chunk.as_bytes().chunks(4096) {
            w.input(Input::Bytes(piece));
            most = most.max(heap::held() - before);
        }
        assert!(text.len() > 1 << 20 && most < 8 << 10, "{most} bytes held of {}", text.len());
        assert_eq!(w.names(), "a");
    }
    "J2" j2_what_is_not_read_is_not_kept {
        let fields = format!("\"x\":[{}]", vec!["{\"f:a\":{\"f:b\":{}}}"; 5_000].join(","));
        let text = service("a", 2).replace("\"a\":\"\\\"{\"", &fields);
        assert!(text.len() > 90_000);
        let mut scanner = weft::kube::json::Scanner::new(weft::kube::types::KEEP);
        let kept = scanner.next(&mut text.as_bytes()).unwrap().unwrap().text.unwrap().len();
        assert!(kept < 300, "{kept} bytes kept");
    }
    "J3" j3_the_type_behind_the_object { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a", "b"]);
        w.chunk(&format!("{{\"object\":{},\"type\":\"DELETED\"}}", service("a", 2)));
        assert_eq!(w.names(), "b");
    }) }
    "J4" j4_escapes { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &[]);
        let text = service("a", 2).replace("\"name\":\"a\"", "\"name\":\"\\u0061\\u002db\",\"x\":\"\\ud83d\\ude00\\/\\u003c\"");
        w.event("ADDED", &text);
        assert_eq!(w.names(), "a-b");
    }) }
    "J5" j5_numbers {
        let mut w = World::listing(64);
        w.list_and_watch(1, &[]);
        for (name, port) in [("a", "8e1"), ("b", "80.0"), ("c", "80,\"targetPort\":8080")] {
            w.event("ADDED", &service(name, 2).replace("\"port\":80", &format!("\"port\":{port}")));
            assert_eq!(w.port(name), Some(80), "{port}");
        }
    }
    "J6" j6_nulls {
        let mut w = World::of(Resource::Slices, false, 1, 64);
        w.no_watch_list();
        w.next();
        let slice = |rest: &str| format!(r#"{{"metadata":{{"name":"x","namespace":"shop","labels":{{"kubernetes.io/service-name":"web"}},"annotations":null}},"addressType":"IPv4",{rest}}}"#);
        w.ok(&list(1, "", &[slice(r#""endpoints":[{"addresses":["10.1.0.1"],"hostname":null,"conditions":{"ready":null},"nodeName":null}],"ports":[{"port":80,"name":null}]"#)]));
        w.next();
        w.open();
        assert_eq!(w.report().objects, 1);
        w.event("MODIFIED", &slice("\"endpoints\":null,\"ports\":null"));
        assert_eq!((w.report().objects, w.hangups), (1, 0));
    }
    "J7" j7_bombs { each_step(|step| {
        for bomb in ["[".repeat(200), "{\"a\":".repeat(200)] {
            let mut w = World::listing(step);
            w.list_and_watch(1, &["a"]);
            w.chunk(&bomb);
            assert!(!w.watcher.is_reading() && !w.error().is_empty());
            assert!(w.next().contains("watch=1") && w.names() == "a");
        }
        if step > 1_000 {
            let mut w = World::listing(step);
            w.list_and_watch(1, &["a"]);
            w.chunk("{\"type\":\"ADDED\",\"object\":{\"x\":\"");
            for _ in 0..20 {
                w.chunk(&"y".repeat(1 << 20));
            }
            assert!(w.error().contains("too long"), "{}", w.error());
        }
    }) }
    "J8" j8_text_that_is_none { each_step(|step| {
        for bad in [&b"{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"\xff\"}}}"[..], b"{\"type\":\"A\x01\"}"] {
            let mut w = World::listing(step);
            w.list_and_watch(6, &["a"]);
            w.bytes([format!("{:x}\r\n", bad.len()).as_bytes(), bad, b"\r\n"].concat());
            let (asked, seconds) = w.next_after();
            assert!(asked.contains("watch=1&") && asked.contains("resourceVersion=6&") && seconds > 0.1, "{asked}");
            assert_eq!(w.names(), "a");
        }
    }) }
    "J9" j9_keys_that_are_there_twice {
        let mut w = World::listing(64);
        w.list_and_watch(1, &[]);
        w.chunk(&format!("{{\"type\":\"DELETED\",\"type\":\"ADDED\",\"object\":{{}},\"object\":{}}}", service("a", 2)));
        assert_eq!(w.names(), "a");
    }
    "J13" j13_selectors {
        let mut w = World::of(Resource::Slices, false, 1, 64);
        let first = w.next();
        assert!(first.contains("labelSelector=kubernetes.io%2Fservice-name&"), "{first}");
        w.refusal(422, "", "x");
        w.next();
        w.ok(&list(1, "x", &[]));
        w.next();
        w.ok(&list(1, "", &[]));
        w.next();
        assert!(w.asked.iter().all(|a| a.contains("labelSelector=kubernetes.io%2Fservice-name")), "{:?}", w.asked);
        assert!(!World::of(Resource::Services, false, 1, 64).next().contains("Selector"), "DNS needs the headless ones");
    }
    "J15" j15_a_long_list_is_never_held {
        // 60 MB of list through reads of 16 kB: 1,500 objects, each with 40 kB that nobody reads.
        let mut w = World::listing(16 << 10);
        w.next();
        let filler = "z".repeat(40_000);
        w.bytes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{\"kind\":\"ServiceList\",\"metadata\":{\"resourceVersion\":\"5\"},\"items\":[");
        for n in 0..1_500 {
            let comma = if n > 0 { "," } else { "" };
            w.bytes(comma.to_owned() + &service(&format!("s{n}"), n).replace("\"managedFields\"", &format!("\"annotations\":{{\"q\":\"{filler}\"}},\"f\"")));
        }
        w.bytes("]}");
        w.close();
        assert_eq!(w.table.services().count(), 1_500);
    }

    "S3" s3_twenty_relists_hold_one_copy {
        let mut w = World::listing(4096);
        for round in 0..20 {
            w.next();
            let items: Vec<String> = (round..round + 500).map(|n| service(&format!("s{n}"), n)).collect();
            w.ok(&list(5_000, "", &items));
            assert_eq!((w.report().objects, w.table.services().count()), (500, 500));
            w.next();
            w.open();
            w.event("BOOKMARK", &bookmark(6_000, false));
            w.pass(1);
            w.event("ERROR", &status(410, "Expired", "x"));
        }
    }
    "S8" s8_the_state_of_before_is_replaced_by_its_difference {
        let mut w = World::listing(64);
        w.restored("a");
        w.restored("old");
        let version = w.table.version();
        w.next();
        w.ok(&list(10, "x", &[service("a", 1)]));
        assert_eq!(w.table.version(), version, "what is the same is no change");
        w.next();
        w.ok(&list(10, "", &[service("b", 1)]));
        assert_eq!(w.names(), "a b");
    }
}
