//! The rows of lists and watches.

use crate::{
    kube_cases::{each_step, rows},
    kube_world::*,
};
use std::time::Duration;
use weft::kube::resource::{Ask, Options, Resource, target};

rows! {
    "L1" l1_pages { each_step(|step| {
        let mut w = World::listing(step);
        assert_eq!(w.next(), "/api/v1/services?limit=500&resourceVersion=0");
        w.ok(&list(10, "a/b==", &[service("a", 1), service("b", 2)]));
        assert_eq!(w.next(), "/api/v1/services?limit=500&continue=a%2Fb%3D%3D");
        w.ok(&list(10, "c", &[service("c", 3)]));
        assert_eq!(w.next(), "/api/v1/services?limit=500&continue=c");
        assert!(!w.watcher.listed());
        w.ok(&list(10, "", &[service("d", 4)]));
        assert_eq!((w.names().as_str(), w.watcher.listed(), w.connects), ("a b c d", true, 1));
    }) }
    "L2" l2_the_watch_begins_at_the_lists_version { each_step(|step| {
        let mut w = World::listing(step);
        w.next();
        w.ok(&list(10, "x", &[service("a", 99)]));
        w.next();
        w.ok(&list(10, "", &[]));
        assert!(w.next().contains("watch=1&allowWatchBookmarks=true&resourceVersion=10&timeoutSeconds="));
    }) }
    "L3" l3_a_page_too_late { each_step(|step| {
        let mut w = World::listing(step);
        w.restored("old");
        w.next();
        w.ok(&list(10, "x", &[service("a", 1)]));
        w.next();
        w.refusal(410, "", "The provided continue parameter is too old");
        assert_eq!(w.names(), "a old", "nothing is swept by half a list");
        let (asked, seconds) = w.next_after();
        assert_eq!((asked.as_str(), seconds), ("/api/v1/services", 0.0));
        w.ok(&list(20, "", &[service("b", 1)]));
        assert_eq!(w.names(), "b");
    }) }
    "L4" l4_a_server_that_knows_no_limit {
        let mut w = World::listing(4096);
        w.next();
        let items: Vec<String> = (0..2_000).map(|n| service(&format!("s{n}"), n)).collect();
        w.ok(&list(5_000, "", &items));
        assert_eq!((w.table.services().count(), w.report().objects), (2_000, 2_000));
        assert!(w.next().contains("watch=1"));
    }
    "L6" l6_items_without_a_kind { each_step(|step| {
        let mut w = World::listing(step);
        w.next();
        let wrong = service("a", 1).replacen('{', r#"{"kind":"Pod","apiVersion":"v1","#, 1);
        w.ok(&list(1, "", &[wrong, service("b", 1)]).replace(r#""kind":"ServiceList","#, ""));
        assert_eq!(w.names(), "a b");
    }) }
    "L7" l7_empty_in_three_ways { each_step(|step| {
        for items in [r#","items":[]"#, r#","items":null"#, ""] {
            let mut w = World::listing(step);
            w.restored("old");
            w.next();
            w.ok(&format!(r#"{{"kind":"ServiceList","metadata":{{"resourceVersion":"7"}}{items}}}"#));
            assert_eq!((w.names().as_str(), w.watcher.listed()), ("", true), "{items}");
            assert!(w.next().contains("resourceVersion=7"));
        }
    }) }
    "L8" l8_an_object_on_two_pages {
        let mut w = World::listing(64);
        w.next();
        w.ok(&list(10, "x", &[service_with("a", 1, "u", 80)]));
        w.next();
        w.ok(&list(10, "", &[service_with("a", 2, "u", 81)]));
        assert_eq!((w.names().as_str(), w.port("a")), ("a", Some(81)));
    }
    "L9" l9_deleted_and_made_again { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(10, &["a"]);
        w.event("ADDED", &service_with("a", 12, "another", 90));
        assert_eq!((w.names().as_str(), w.port("a"), w.report().objects), ("a", Some(90), 1));
    }) }
    "L10" l10_a_list_that_breaks_off { each_step(|step| {
        let mut w = World::listing(step);
        w.restored("old");
        w.next();
        let body = list(10, "", &[service("a", 1), service("b", 1)]);
        let whole = http(200, "", &body);
        w.bytes(&whole[..whole.len() - 9]);
        w.close();
        assert!(w.names().contains("old") && !w.watcher.listed());
        assert!(!w.next().contains("watch=1"));
        w.ok(&list(11, "", &[service("b", 1)]));
        assert_eq!(w.names(), "b");
    }) }
    "L11" l11_not_allowed {
        let mut w = World::listing(usize::MAX);
        w.restored("old");
        let mut waits = Vec::new();
        w.next();
        for _ in 0..12 {
            w.refusal(403, "", "services is forbidden: User x cannot list");
            assert!(w.error().contains("bind the ClusterRole of packaging/kubernetes/rbac.yaml"), "{}", w.error());
            waits.push(w.next_after().1);
        }
        assert!(waits[0] >= 5.0 && waits[11] >= 150.0 && waits.iter().all(|s| *s <= 300.0), "{waits:?}");
        assert_eq!(w.names(), "old");
        w.ok(&list(11, "", &[service("b", 1)]));
        assert_eq!((w.names().as_str(), w.error().as_str()), ("b", ""));
    }
    "L12" l12_no_endpointslices {
        let mut w = World::of(Resource::Slices, false, 1, 64);
        assert!(w.next().starts_with("/apis/discovery.k8s.io/v1/endpointslices?labelSelector=kubernetes.io%2Fservice-name&"));
        w.refusal(404, "", "the server could not find the requested resource");
        let asked = w.next();
        assert!(asked.starts_with("/api/v1/endpoints?watch=1"), "{asked}");
        w.open();
        let subset = r#"{"addresses":[{"ip":"10.1.0.1"}],"ports":[{"port":80}]}"#;
        let object = |subsets: &str| format!(r#"{{"metadata":{{"name":"web","namespace":"shop"}},"subsets":[{subsets}]}}"#);
        w.event("ADDED", &object(&format!("{subset},{subset}")));
        w.event("BOOKMARK", &bookmark(5, true));
        assert_eq!(w.report().objects, 2);
        w.event("MODIFIED", &object(subset));
        assert_eq!(w.report().objects, 1, "one subset less");
        w.pass(100);
        w.end();
        assert!(w.next().starts_with("/apis/discovery.k8s.io/"), "perhaps there are slices by now");
        w.refusal(404, "", "no");
        assert!(w.next().starts_with("/api/v1/endpoints"));
        w.refusal(404, "", "no");
        let (asked, seconds) = w.next_after();
        assert!(asked.contains("endpointslices") && (60.0..=300.0).contains(&seconds), "{asked} after {seconds}");
    }
    "L13" l13_a_replica_that_is_behind {
        let mut w = World::listing(64);
        assert!(w.next().ends_with("&resourceVersion=0"));
        w.bytes(http(504, "Retry-After: 1\r\n", &status(504, "Timeout", "Too large resource version")));
        let (asked, seconds) = w.next_after();
        assert_eq!(asked, "/api/v1/services?limit=500");
        assert!((1.0..2.1).contains(&seconds), "{seconds}");
    }
    "L14" l14_versions_are_numbers_only_to_compare { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(9, &["a"]);
        w.event("MODIFIED", &service_with("a", 10, "a", 81));
        assert_eq!(w.port("a"), Some(81), "10 is after 9");
        w.event("MODIFIED", &service_with("a", 0, "a", 82).replace("\"resourceVersion\":\"0\"", "\"resourceVersion\":\"x-y\""));
        assert_eq!(w.port("a"), Some(82));
        w.pass(30);
        w.end();
        assert!(w.next_watch().contains("resourceVersion=x-y&"));
    }) }
    "L15" l15_paths {
        let options = Options { limit: false, bookmarks: false, timeout: 300, metaserver: false };
        let list = Ask::List { next: String::new(), cached: false };
        for (resource, namespace, path) in [
            (Resource::Services, None, "/api/v1/services"),
            (Resource::Endpoints, Some("a"), "/api/v1/namespaces/a/endpoints"),
            (Resource::Nodes, Some("a"), "/api/v1/nodes"),
            (
                Resource::Pods,
                None,
                "/api/v1/pods?fieldSelector=status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed",
            ),
            (
                Resource::Slices,
                Some("a"),
                "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices?labelSelector=kubernetes.io%2Fservice-name",
            ),
        ] {
            assert_eq!(target(resource, namespace, &list, options, ""), path);
        }
    }

    "W1" w1_events_and_chunks_have_nothing_to_do_with_each_other { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &[]);
        let text = [event("ADDED", &service("a", 2)), event("ADDED", &service("b", 3)).replace(',', ",\n "), event("ADDED", &service("c", 4)).replace("targetPort", "\\u0074é")].concat();
        let (first, rest) = text.as_bytes().split_at(text.find('é').unwrap() + 1);
        let (second, third) = rest.split_at(5);
        for piece in [first, second, third] {
            w.bytes([format!("{:X};x=1\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
        }
        assert_eq!(w.names(), "a b c");
    }) }
    "W2" w2_an_unknown_type { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        w.event("FOO", &service("b", 2));
        w.event("ADDED", &service("c", 3));
        assert_eq!((w.names().as_str(), w.hangups), ("a c", 0));
    }) }
    "W3" w3_a_bookmark_moves_the_version { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        w.event("BOOKMARK", &bookmark(50, false));
        w.pass(70);
        w.close();
        assert_eq!(w.names(), "a");
        assert!(w.next_watch().contains("resourceVersion=50&"));
    }) }
    "W4" w4_deleted { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a", "b"]);
        w.event("DELETED", &service("a", 9));
        assert_eq!(w.names(), "b");
        w.pass(10);
        w.end();
        assert!(w.next_watch().contains("resourceVersion=9&"));
    }) }
    "W5" w5_no_longer_selected {
        let mut w = World::of(Resource::Slices, false, 1, 64);
        w.no_watch_list();
        w.next();
        let slice = |label: &str| format!(r#"{{"metadata":{{"name":"x","namespace":"shop","labels":{{{label}}}}},"addressType":"IPv4","endpoints":[{{"addresses":["10.1.0.1"]}}],"ports":[{{"port":80}}]}}"#);
        let labelled = slice(r#""kubernetes.io/service-name":"web""#);
        w.ok(&list(1, "", std::slice::from_ref(&labelled)));
        w.next();
        w.open();
        assert_eq!(w.report().objects, 1);
        w.event("DELETED", &slice(""));
        assert_eq!(w.report().objects, 0);
        w.event("ADDED", &labelled);
        // The same without a selector: what is no longer of a Service goes.
        w.event("MODIFIED", &slice(""));
        assert_eq!(w.report().objects, 0);
    }
    "W6" w6_events_for_unknown_and_known { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        w.event("MODIFIED", &service("b", 2));
        w.event("ADDED", &service_with("a", 3, "a", 81));
        w.event("DELETED", &service("c", 4));
        assert_eq!((w.names().as_str(), w.port("a"), w.report().objects), ("a b", Some(81), 2));
    }) }
    "W7" w7_gone_in_the_stream { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        w.event("ERROR", &status(410, "Expired", "too old resource version: 1 (5)"));
        assert_eq!(w.names(), "a");
        let (asked, seconds) = w.next_after();
        assert_eq!((asked.as_str(), seconds), ("/api/v1/services?limit=500", 0.0));
        w.ok(&list(5, "", &[service("b", 1)]));
        assert_eq!(w.names(), "b");
        w.next();
        w.open();
        w.event("ERROR", &status(0, "Gone", "again"));
        assert!(w.next_after().1 > 0.0, "not in circles");
    }) }
    "W8" w8_errors_of_the_server { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(7, &["a"]);
        let begun = w.now;
        loop {
            w.event("ERROR", &status(500, "InternalError", "etcd event received with PrevKv=nil"));
            let (asked, seconds) = w.next_after();
            assert!(seconds > 0.0);
            if !asked.contains("watch=1") {
                break;
            }
            assert!(asked.contains("resourceVersion=7&") && w.now - begun < Duration::from_secs(130), "{asked}");
            w.open();
        }
        assert!(w.now - begun >= Duration::from_secs(55) && w.names() == "a");
    }) }
    "W9" w9_gone_at_opening {
        let mut w = World::listing(64);
        w.next();
        w.ok(&list(1, "", &[service("a", 1)]));
        w.next();
        w.refusal(410, "", "too old");
        assert_eq!(w.next_after(), ("/api/v1/services?limit=500".into(), 0.0));
    }
    "W10" w10_the_clean_end_of_a_watch { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        for cycle in 0..20 {
            w.pass(w.timeout());
            w.event("BOOKMARK", &bookmark(cycle + 2, false));
            w.end();
            assert_eq!(w.next_after().1, 0.0);
            w.open();
        }
        assert_eq!(w.asked.iter().filter(|a| !a.contains("watch=1")).count(), 1, "one list in all");
        assert_eq!((w.connects, w.error().as_str()), (1, ""));
    }) }
    "W11" w11_cut_in_the_middle_of_an_event { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(1, &["a"]);
        w.event("ADDED", &service("b", 2));
        w.pass(20);
        let half = event("ADDED", &service("c", 3));
        w.bytes(format!("{:x}\r\n{}", half.len(), &half[..half.len() - 3]));
        w.close();
        assert_eq!(w.names(), "a b");
        let from = w.now;
        let asked = w.next_watch();
        assert!(asked.contains("resourceVersion=2&") && w.now - from <= Duration::from_secs(6), "{asked}");
        assert!(!w.asked.iter().any(|a| a.ends_with("limit=500")) && w.names() == "a b");
        w.open();
        // Restored from a backup meanwhile: what it has now counts, and not a watch from a version of its lost future.
        w.pass(20);
        w.close();
        assert_eq!(w.next(), "/api/v1/services?limit=1");
        w.ok(&list(1, "x", &[service("of-no-account", 1)]));
        assert_eq!(w.next(), "/api/v1/services?limit=500");
        w.ok(&list(1, "", &[service("a", 1)]));
        assert_eq!(w.names(), "a");
        assert!(w.next().contains("resourceVersion=1&"));
    }) }
    "W12" w12_never_a_watch_without_a_version {
        let mut w = World::listing(64);
        for round in 0..3 {
            w.list_and_watch(round + 1, &["a"]);
            w.event("ERROR", &status(410, "Expired", "x"));
        }
        for asked in w.asked.iter().filter(|a| a.contains("watch=1") && !a.contains("sendInitialEvents")) {
            assert!(asked.contains("&resourceVersion=") && !asked.contains("resourceVersion=0"), "{asked}");
        }
    }
    "W13" w13_watch_list { each_step(|step| {
        let mut w = World::of(Resource::Services, false, 1, step);
        w.restored("old");
        let asked = w.next();
        let query = "/api/v1/services?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&resourceVersion=0&timeoutSeconds=";
        assert!(asked.starts_with(query), "{asked}");
        w.open();
        w.event("ADDED", &service("b", 9));
        w.event("ADDED", &service("a", 3));
        assert_eq!((w.names().as_str(), w.watcher.listed()), ("a b old", false));
        w.event("BOOKMARK", &bookmark(12, true));
        assert_eq!((w.names().as_str(), w.watcher.listed(), w.report().synced), ("a b", true, true));
        w.event("DELETED", &service("b", 14));
        assert_eq!(w.names(), "a");
        w.pass(100);
        w.end();
        assert!(w.next_watch().contains("resourceVersion=14&"));
        // Cut before its end: from the beginning. No bookmark: listed.
        let mut w = World::of(Resource::Services, false, 1, step);
        w.restored("old");
        w.next();
        w.open();
        w.event("ADDED", &service("a", 3));
        w.close();
        assert!(w.next().contains("sendInitialEvents") && w.names() == "a old");
        w.open();
        w.event("ADDED", &service("a", 3));
        let (asked, seconds) = w.next_after();
        assert!(asked.starts_with("/api/v1/services?limit=500") && (10.0..10.1).contains(&seconds), "{asked} {seconds}");
        // Cut again and again, as by a proxy that does not know it.
        let mut w = World::of(Resource::Services, false, 1, step);
        for _ in 0..2 {
            assert!(w.next().contains("sendInitialEvents"));
            w.close();
        }
        assert!(w.next().starts_with("/api/v1/services?limit=500"));
        // An etcd that is too old for it.
        let mut w = World::of(Resource::Services, false, 1, step);
        w.next();
        w.open();
        w.event("ERROR", &status(500, "InternalError", "x"));
        assert!(w.next().starts_with("/api/v1/services?limit=500"));
    }) }
    "W14" w14_closed_for_being_slow {
        let mut w = World::listing(64);
        w.list_and_watch(1, &["a"]);
        w.event("ADDED", &service("b", 2));
        w.close();
        let asked = w.next_watch();
        assert!(asked.contains("watch=1") && asked.contains("resourceVersion=2&"), "{asked}");
    }
    "W15" w15_headers_that_come_late {
        let mut w = World::listing(64);
        w.next();
        w.ok(&list(1, "", &[]));
        w.next();
        assert_eq!(w.pass(250), [""; 0]);
        w.open();
        w.event("ADDED", &service("a", 2));
        assert_eq!((w.names().as_str(), w.hangups), ("a", 0));
        // But not for ever.
        let mut w = World::listing(64);
        w.next();
        w.ok(&list(1, "", &[]));
        w.next();
        let (asked, seconds) = w.next_after();
        assert!(asked.ends_with("limit=1") && (330.0..640.0).contains(&seconds), "{asked} after {seconds}");
    }
    "W16" w16_what_is_not_kept_is_no_change {
        let mut w = World::listing(64);
        w.list_and_watch(1, &["a"]);
        let version = w.table.version();
        w.event("MODIFIED", &service("a", 2).replace("\"a\":", "\"b\":"));
        assert_eq!(w.table.version(), version);
    }
}
