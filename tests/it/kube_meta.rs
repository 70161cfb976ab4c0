//! The rows of KubeEdge's metaServer, and a double of it that does what they say.

use crate::{kube_cases::rows, kube_world::*};
use weft::kube::resource::Resource;

const EMPTY: &str = r#"{"items":[],"kind":"ServiceList","apiVersion":"v1"}"#;

fn replay(w: &mut World, objects: &[String]) {
    for object in objects {
        w.event("ADDED", object);
    }
}

/// A list and a watch, of objects with their versions.
fn round(w: &mut World, version: u64, objects: &[(&str, u64)]) {
    assert_eq!(w.next(), "/api/v1/services");
    answered(w, version, objects);
}

/// A list that was asked for, and the watch.
fn answered(w: &mut World, version: u64, objects: &[(&str, u64)]) {
    let items: Vec<String> = objects.iter().map(|(name, version)| service(name, *version)).collect();
    w.ok(&list(version, "", &items));
    assert!(w.next().contains("watch=1"));
    w.open();
}

/// Lets the watch live until the next list is asked for; the seconds that took.
fn until_list(w: &mut World) -> f64 {
    let (asked, seconds) = w.next_after();
    assert_eq!(asked, "/api/v1/services");
    seconds
}

rows! {
    "M1" m1_a_list_may_take_its_time {
        let mut w = World::metaserver(64);
        w.next();
        assert_eq!(w.pass(13), [""; 0]);
        w.ok(&list(9, "", &[service("a", 1)]));
        assert_eq!((w.names().as_str(), w.hangups), ("a", 0));
    }
    "M2" m2_never_in_pages {
        let mut w = World::metaserver(64);
        assert_eq!(w.next(), "/api/v1/services");
        let mut w = World::of(Resource::Slices, true, 1, 64);
        assert_eq!(w.next(), "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=kubernetes.io%2Fservice-name");
    }
    "M3" m3_nothing_known_is_not_nothing_there {
        for step in STEPS {
            let mut w = World::metaserver(step);
            w.restored("old");
            w.next();
            w.ok(EMPTY);
            assert_eq!((w.names().as_str(), w.watcher.listed()), ("old", false));
            assert!(w.error().contains("dynamicController"), "{}", w.error());
            assert!(w.next_after().1 > 0.1);
        }
    }
    "M4" m4_versions_may_go_back {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10), ("b", 11)]);
        until_list(&mut w);
        w.ok(&list(150, "", &[service("a", 10)]));
        assert_eq!(w.names(), "a b", "perhaps of the node's own store");
        assert!(w.error().is_empty());
        w.next();
        w.open();
        w.event("ADDED", &service("c", 201));
        assert_eq!(w.names(), "a b c");
    }
    "M5" m5_each_kind_has_its_watch {
        for resource in [Resource::Services, Resource::Slices, Resource::Nodes] {
            let mut w = World::of(resource, true, 1, 64);
            w.next();
            w.ok(&list(9, "", &[]));
            let asked = w.next();
            assert!(asked.contains("watch=1") && asked.contains(resource.name()), "{asked}");
        }
    }
    "M6" m6_every_watch_begins_with_a_replay {
        let mut w = World::metaserver(7);
        round(&mut w, 200, &[("a", 10)]);
        let version = w.table.version();
        replay(&mut w, &[service("a", 10), service_with("a", 9, "a", 99)]);
        assert_eq!((w.port("a"), w.table.version()), (Some(80), version));
        w.event("MODIFIED", &service_with("a", 203, "a", 81));
        assert_eq!(w.port("a"), Some(81));
        w.pass(60);
        w.end();
        assert!(w.next().contains("watch=1"));
        w.open();
        replay(&mut w, &[service("a", 10)]);
        assert_eq!(w.port("a"), Some(81), "older than what we hold");
    }
    "M7" m7_ghosts_stay_away {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10)]);
        replay(&mut w, &[service("a", 10), service("ghost", 5)]);
        assert_eq!(w.names(), "a");
        w.event("ADDED", &service("new", 205));
        assert_eq!(w.names(), "a new");
        let seconds = until_list(&mut w);
        assert!((300.0..600.0).contains(&seconds), "{seconds}");
    }
    "M8" m8_a_lost_event_is_found_by_the_next_list {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10), ("b", 11)]);
        until_list(&mut w);
        w.ok(&list(300, "", &[service("b", 11), service("c", 250)]));
        assert_eq!(w.names(), "b c");
    }
    "M9" m9_never_a_watch_list {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[]);
        until_list(&mut w);
        answered(&mut w, 210, &[]);
        assert!(w.asked.iter().all(|a| !a.contains("sendInitialEvents") && !a.contains("ookmarks")), "{:?}", w.asked);
    }
    "M10" m10_events_out_of_order {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10)]);
        w.event("MODIFIED", &service_with("a", 205, "a", 82));
        w.event("MODIFIED", &service_with("a", 203, "a", 81));
        w.event("DELETED", &service("a", 204));
        assert_eq!(w.port("a"), Some(82));
        w.event("DELETED", &service("a", 206));
        w.event("MODIFIED", &service_with("a", 205, "a", 82));
        assert_eq!(w.names(), "");
        w.event("ADDED", &service_with("a", 208, "again", 83));
        assert_eq!(w.port("a"), Some(83));
    }
    "M11" m11_what_is_no_longer_selected_is_deleted {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10)]);
        w.event("DELETED", &service("a", 201));
        assert_eq!(w.names(), "");
    }
    "M12" m12_the_end_of_a_watch_may_be_an_error {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10)]);
        w.pass(200);
        w.event("ERROR", &status(500, "", "stop to watch, timeout"));
        let (asked, seconds) = w.next_after();
        assert!(asked.contains("watch=1") && seconds == 0.0, "{asked} {seconds}");
        assert!(w.error().is_empty());
    }
    "M13" m13_json_is_asked_for {
        let mut out = Vec::new();
        weft::kube::http::get("127.0.0.1:10550", "/", "a", None, &mut out);
        assert!(String::from_utf8(out).unwrap().contains("Accept: application/json\r\n"));
    }
    "M14" m14_a_list_of_a_wrong_kind {
        let mut w = World::metaserver(64);
        w.next();
        w.ok(&list(9, "", &[service("a", 1)]).replace("ServiceList", "ServicList"));
        assert_eq!((w.names().as_str(), w.watcher.listed()), ("a", true));
    }
    "M15" m15_endpoints_without_a_node {
        let mut w = World::of(Resource::Slices, true, 1, 64);
        w.next();
        let slice = r#"{"metadata":{"name":"kubernetes","namespace":"default","labels":{"kubernetes.io/service-name":"kubernetes"},"uid":"u","resourceVersion":"3"},"addressType":"IPv4","endpoints":[{"addresses":["169.254.30.10"]}],"ports":[{"port":10550}]}"#;
        w.ok(&list(9, "", &[slice.into()]));
        assert_eq!(w.report().objects, 1);
    }
    "M16" m16_what_it_adds_is_ignored {
        let mut w = World::metaserver(7);
        w.next();
        let item = service("a", 1).replacen('{', "{\"kind\":\"Service\",\"apiVersion\":\"v1\",", 1).replace("\"uid\"", "\"selfLink\":\"shop/services/a\",\"uid\"");
        w.ok(&list(9, "", &[item]));
        assert_eq!(w.names(), "a");
    }
    "M17" m17_what_is_not_there_is_an_empty_list {
        let mut w = World::of(Resource::Nodes, true, 1, 64);
        w.next();
        w.refusal(404, "", "the server could not find the requested resource");
        assert!((60.0..300.0).contains(&w.next_after().1));
        w.ok(EMPTY);
        assert!(!w.watcher.listed() && w.next_after().1 > 0.1);
    }
    "M18" m18_edgecore_starts_again {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[("a", 10), ("b", 11)]);
        w.pass(30);
        w.close();
        w.refuse = Some("nobody listens there".into());
        w.pass(15);
        assert!(w.connects >= 4 && w.names() == "a b");
        w.refuse = None;
        assert!(w.next().contains("watch=1"));
        w.open();
        replay(&mut w, &[service("a", 10), service("b", 11)]);
        assert_eq!((w.names().as_str(), w.error().as_str()), ("a b", ""));
    }
    "M19" m19_discovery_is_not_needed {
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[]);
        until_list(&mut w);
        assert!(w.asked.iter().all(|a| a.starts_with("/api/v1/services")), "{:?}", w.asked);
    }
    "M20" m20_the_same_requests_always {
        let mut asked = Vec::new();
        for seed in 0..5 {
            let mut w = World::of(Resource::Services, true, seed, 64);
            round(&mut w, 200 + seed, &[]);
            w.pass(100);
            w.end();
            w.next();
            asked.extend(w.asked);
        }
        asked.sort();
        asked.dedup();
        assert_eq!(asked, ["/api/v1/services", "/api/v1/services?watch=1&timeoutSeconds=600"]);
    }
    "S4" s4_only_metaserver_is_listed_again {
        let mut w = World::listing(64);
        w.list_and_watch(1, &["a"]);
        for version in 0..100 {
            w.pass(w.timeout());
            w.event("BOOKMARK", &bookmark(version + 2, false));
            w.end();
            assert!(w.next().contains("watch=1"));
            w.open();
        }
        let mut w = World::metaserver(64);
        round(&mut w, 200, &[]);
        assert!(until_list(&mut w) < 600.0);
    }
}

/// Offline, an object that is deleted there, and back again: nothing is wiped, nothing comes back.
#[test]
fn a_link_that_goes_and_comes() {
    for step in STEPS {
        let mut w = World::metaserver(step);
        w.restored("of-before");
        round(&mut w, 200, &[("a", 10), ("b", 11)]);
        replay(&mut w, &[service("a", 10), service("b", 11)]);
        assert_eq!(w.names(), "a b of-before", "the first list may be of the node's store");
        // What the first list leaves open is asked again soon; the cloud's version has gone on by then.
        assert!((14.0..16.0).contains(&until_list(&mut w)));
        w.ok(&list(204, "", &[service("a", 10), service("b", 11)]));
        assert_eq!(w.names(), "a b");
        w.next();
        w.open();
        // The link is down: the store answers, with less, and then with nothing.
        until_list(&mut w);
        w.ok(&list(190, "", &[service("a", 10)]));
        assert_eq!(w.names(), "a b");
        w.next();
        w.open();
        replay(&mut w, &[service("a", 10), service("b", 11)]);
        until_list(&mut w);
        w.ok(EMPTY);
        assert_eq!(w.names(), "a b");
        // The cloud is back, without b; the store still has it.
        w.next();
        w.ok(&list(300, "", &[service("a", 10)]));
        assert_eq!(w.names(), "a");
        w.next();
        w.open();
        replay(&mut w, &[service("a", 10), service("b", 11)]);
        assert_eq!(w.names(), "a", "a ghost of the store");
        // Offline again: the list of the store has the ghost, too.
        until_list(&mut w);
        w.ok(&list(290, "", &[service("a", 10), service("b", 11)]));
        assert_eq!(w.names(), "a");
        w.next();
        w.open();
        until_list(&mut w);
        w.ok(&list(310, "", &[service("a", 10), service_with("b", 305, "another", 81)]));
        assert_eq!((w.names().as_str(), w.port("b")), ("a b", Some(81)));
    }
}
