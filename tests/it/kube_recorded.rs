//! What a real API server said (fixtures/kube/*.http, made by record-streams), cut at every byte.

use crate::kube_world::World;
use weft::kube::resource::Resource;

const PAGES: [&str; 2] = [include_str!("fixtures/kube/page-1.http"), include_str!("fixtures/kube/page-2.http")];
const WATCH: &str = include_str!("fixtures/kube/watch.http");
const WATCH_LIST: &str = include_str!("fixtures/kube/watch-list.http");
const AFTER: &str = include_str!("fixtures/kube/after.http");
const GONE_WATCH: &str = include_str!("fixtures/kube/gone-watch.http");
const GONE_LIST: &str = include_str!("fixtures/kube/gone-list.http");
const REFUSED: &str = include_str!("fixtures/kube/refused.http");

fn world() -> World {
    World::of(Resource::Services, false, 1, usize::MAX)
}

fn table(world: &World) -> String {
    world.table.services().map(|s| format!("{s:?}\n")).collect()
}

/// What there is in the end.
fn after() -> String {
    let mut w = world();
    w.next();
    w.bytes(REFUSED);
    w.next();
    w.bytes(AFTER);
    assert_eq!(w.names(), "four one three");
    assert_eq!(w.table.service("recorded", "one").unwrap().ports[0].number, 8081);
    table(&w)
}

/// Up to the watch.
fn listed(mut feed: impl FnMut(&mut World, &str)) -> World {
    let mut w = world();
    w.next();
    feed(&mut w, REFUSED);
    assert!(w.next().contains("limit=500"));
    feed(&mut w, PAGES[0]);
    assert!(w.next().contains("continue=ey"));
    feed(&mut w, PAGES[1]);
    assert_eq!(w.names(), "one three two");
    assert!(w.next().contains("watch=1"));
    w
}

/// The events with their versions.
fn events() -> Vec<(u64, String)> {
    let body = WATCH.split_once("\r\n\r\n").unwrap().1;
    let lines = body.lines().filter(|line| line.starts_with('{'));
    let version = |line: &str| {
        let text = line.split_once("\"resourceVersion\":\"").unwrap().1;
        text[..text.find('"').unwrap()].parse().unwrap()
    };
    lines.map(|line| (version(line), line.to_owned())).collect()
}

#[test]
fn reads_that_end_anywhere() {
    let want = after();
    let half = |at: usize| {
        move |w: &mut World, text: &str| {
            let (first, second) = text.as_bytes().split_at(at.min(text.len()));
            w.bytes(first);
            w.bytes(second);
        }
    };
    let longest = PAGES.iter().chain([&WATCH, &WATCH_LIST]).map(|t| t.len()).max().unwrap();
    for at in 0..=longest {
        let mut w = listed(half(at));
        half(at)(&mut w, WATCH);
        assert_eq!(table(&w), want, "cut at {at}");
        let mut w = world();
        w.next();
        half(at)(&mut w, WATCH_LIST);
        assert!(table(&w) == want && w.watcher.listed(), "a WatchList, cut at {at}");
    }
}

#[test]
fn a_watch_that_is_cut_anywhere_goes_on_where_it_was() {
    let (want, events) = (after(), events());
    for at in 0..WATCH.len() {
        let mut w = listed(|w, text| w.bytes(text));
        w.pass(5);
        w.bytes(&WATCH.as_bytes()[..at]);
        w.close();
        let mut asked = w.next();
        if !asked.contains("watch=1") {
            // A server that was away may have lost its state: its version is looked at first.
            w.bytes(AFTER);
            asked = w.next();
        }
        let from = asked.split_once("&resourceVersion=").unwrap().1;
        let from: u64 = from[..from.find('&').unwrap()].parse().unwrap();
        w.open();
        for (_, event) in events.iter().filter(|(version, _)| *version > from) {
            w.chunk(event);
        }
        assert_eq!(table(&w), want, "cut at {at}");
        assert_eq!(w.asked.iter().filter(|a| a.contains("limit=500")).count(), 2, "no list but the first: {at}");
    }
}

#[test]
fn a_list_that_is_cut_anywhere_sweeps_nothing() {
    let want = after();
    for at in 0..AFTER.len() {
        let mut w = world();
        w.restored("old");
        w.next();
        w.bytes(REFUSED);
        w.next();
        w.bytes(&AFTER.as_bytes()[..at]);
        w.close();
        assert!(w.names().contains("old") && !w.watcher.listed(), "cut at {at}");
        w.next();
        w.bytes(AFTER);
        assert_eq!(table(&w), want, "cut at {at}");
    }
}

#[test]
fn versions_that_are_gone() {
    let mut w = listed(|w, text| w.bytes(text));
    w.bytes(GONE_WATCH);
    let (asked, seconds) = w.next_after();
    assert_eq!((asked.as_str(), seconds), ("/api/v1/services?limit=500", 0.0));
    w.bytes(GONE_LIST);
    w.next();
    w.bytes(AFTER);
    assert_eq!(table(&w), after());
}
