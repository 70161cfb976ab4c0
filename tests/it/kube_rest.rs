//! The rows that ask a client to leave something alone.

use crate::{
    kube_cases::{each_step, rows},
    kube_world::*,
    snapshot, snapshot_run,
};
use weft::kube::http::get;

/// An answer to the first list that is no list of objects: nothing of it is taken, nothing goes, and it is asked anew.
fn is_of_no_use(step: usize, content_type: &str, body: &str) {
    let mut w = World::listing(step);
    w.restored("old");
    w.next();
    w.bytes(format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    let asked = w.next();
    assert!(!asked.contains("watch=1") && !w.watcher.listed(), "{content_type}: {asked}");
    assert_eq!(w.names(), "old", "{content_type}");
    assert!(!w.error().is_empty(), "{content_type}");
}

/// The head of a request.
fn head() -> String {
    let mut out = Vec::new();
    get("host", "/api/v1/services", "weft", None, &mut out);
    String::from_utf8(out).unwrap()
}

rows! {
    // A list with an exact version would be of a cache that may have forgotten it.
    "L5" l5_no_list_is_of_an_exact_version { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(10, &["a"]);
        w.event("ERROR", &status(410, "Expired", "too old"));
        w.end();
        let asked = w.next();
        assert_eq!(asked, "/api/v1/services?limit=500");
        assert!(w.asked.iter().all(|a| !a.contains("resourceVersionMatch=Exact")), "{:?}", w.asked);
    }) }
    "J10" j10_protobuf_is_not_asked_for_and_not_taken { each_step(|step| {
        assert!(head().contains("\r\nAccept: application/json\r\n"), "{}", head());
        is_of_no_use(step, "application/vnd.kubernetes.protobuf", "k8s\0\n\u{7}\n\u{2}v1");
    }) }
    // The names alone: without its spec a Service is none that could be used, and the one that is known stays.
    "J11" j11_objects_without_their_spec_change_nothing { each_step(|step| {
        let mut w = World::listing(step);
        w.list_and_watch(10, &["a"]);
        let partial = r#"{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"a","namespace":"shop","resourceVersion":"11"}}"#;
        w.event("MODIFIED", partial);
        assert_eq!((w.names().as_str(), w.port("a")), ("a", Some(80)));
        assert!(!head().contains("as="), "{}", head());
    }) }
    "J12" j12_a_table_is_no_list { each_step(|step| {
        let table = r#"{"kind":"Table","apiVersion":"meta.k8s.io/v1","metadata":{"resourceVersion":"5"},"columnDefinitions":[],"rows":[]}"#;
        is_of_no_use(step, "application/json", table);
    }) }
    "J14" j14_cbor_is_not_asked_for_and_not_taken { each_step(|step| {
        is_of_no_use(step, "application/cbor", "\u{19}\u{19}x");
    }) }
    "S1" s1_readers_see_all_while_it_is_listed { each_step(|step| {
        let mut w = World::listing(step);
        let names: Vec<String> = (10..30).map(|n| format!("s{n}")).collect();
        w.list_and_watch(10, &names.iter().map(String::as_str).collect::<Vec<_>>());
        w.event("ERROR", &status(410, "Expired", "too old"));
        w.end();
        w.next();
        let items: Vec<String> = names.iter().map(|n| service(n, 2)).collect();
        // Byte by byte, or in whatever pieces: after each of them all is there.
        let text = http(200, "", &list(20, "", &items));
        let pieces: Vec<&str> = text.split_inclusive('}').collect();
        for piece in pieces {
            w.bytes(piece);
            assert_eq!(w.names(), names.join(" "));
        }
        assert!(w.next().contains("watch=1"));
    }) }
    "S5" s5_a_file_that_is_whole_or_not_there {
        snapshot::what_is_written_is_there_after_a_restart();
        snapshot::a_spoilt_file_is_left_out_and_replaced();
        snapshot_run::a_full_disk_keeps_the_old_snapshot_and_hurts_nobody();
    }
    "S6" s6_another_clusters_file { snapshot::another_nodes_and_another_clusters_are_not_used_but_their_time_is(); }
    "S7" s7_the_last_state_serves_for_ever {
        let mut w = World::listing(64);
        w.list_and_watch(10, &["a"]);
        w.refuse = Some("nobody listens there".into());
        w.close();
        // Ten days.
        for _ in 0..240 {
            w.pass(3_600);
            assert_eq!((w.names().as_str(), w.port("a")), ("a", Some(80)));
        }
        assert!(!w.report().synced, "that it is stale is said");
        w.refuse = None;
        w.next_watch();
        w.open();
        w.event("ADDED", &service("b", 12));
        assert_eq!(w.names(), "a b");
    }
}
