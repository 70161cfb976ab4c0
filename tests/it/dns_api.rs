//! An API server with the conformance table's fixture, and the watchers that follow it: Services and Pods by a WatchList,
//! slices by a list and a watch behind it. What it says comes in pieces, as TCP brings it.

use crate::kube_world::{bookmark, event, http, status};
use std::{
    rc::Rc,
    time::{Duration, Instant},
};
use weft::{
    clock::Clock,
    config::{DnsConfig, PodNames},
    kube::{
        resource::Resource,
        watcher::{Input, Output, Setup, Watcher},
    },
    shared::Writer,
    table::{
        Table,
        model::{Change, Source},
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Added,
    Modified,
    Deleted,
}

/// One resource and who follows it.
struct Followed {
    kind: &'static str,
    group: &'static str,
    watcher: Watcher,
}

pub(crate) struct Api {
    followed: Vec<Followed>,
    now: Instant,
    rng: fastrand::Rng,
    version: u64,
}

const STREAM: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

impl Api {
    /// As the agent follows one.
    pub(crate) fn new(cfg: &DnsConfig) -> Self {
        let now = Clock::new(0).now();
        let pods = (cfg.pods == PodNames::Verified).then_some((Resource::Pods, "Pod", "v1"));
        let all = [(Resource::Services, "Service", "v1"), (Resource::Slices, "EndpointSlice", "discovery.k8s.io/v1")];
        let follow = |(resource, kind, group)| {
            let (pod_names, rng) = (cfg.endpoint_pod_names, fastrand::Rng::with_seed(3));
            let (start, spread) = (now, Duration::ZERO);
            let setup = Setup { resource, namespace: None, metaserver: false, pod_names, start, spread, rng };
            Followed { kind, group, watcher: Watcher::new(setup) }
        };
        let followed = all.into_iter().chain(pods).map(follow).collect();
        Self { followed, now, rng: fastrand::Rng::with_seed(3), version: 7 }
    }

    /// The first lists, whole. `items` are the objects, each with its kind and name.
    pub(crate) fn list(&mut self, table: &Rc<Writer<Table>>, items: &[(String, String)]) {
        for at in 0..self.followed.len() {
            let Followed { kind, group, .. } = self.followed[at];
            let of = items.iter().filter(|(key, _)| key.split(' ').next() == Some(kind));
            let of: Vec<String> = of.map(|(_, item)| self.versioned(item)).collect();
            assert!(self.asked(at, table).contains("sendInitialEvents=true"));
            if group == "v1" {
                let mut text = STREAM.to_owned();
                of.iter().for_each(|item| text += &chunk(&event("ADDED", item)));
                let end = bookmark(self.version, true).replace("Service", kind);
                self.say(at, table, &(text + &chunk(&event("BOOKMARK", &end))));
            } else {
                self.say(
                    at,
                    table,
                    &http(422, "", &status(422, "Invalid", "sendInitialEvents is forbidden for watch")),
                );
                assert!(!self.asked(at, table).contains("watch=1"));
                // The server repeats neither kind nor version in the items.
                let bare: Vec<String> =
                    of.iter().map(|i| format!("{{{}", &i[i.find("\"metadata\"").unwrap()..])).collect();
                let (version, bare) = (self.version, bare.join(","));
                let meta = format!("{{\"resourceVersion\":\"{version}\"}}");
                let text = format!(
                    "{{\"kind\":\"{kind}List\",\"apiVersion\":{group:?},\"metadata\":{meta},\"items\":[{bare}]}}"
                );
                self.say(at, table, &http(200, "", &text));
                assert!(self.asked(at, table).contains("watch=1"));
                self.say(at, table, STREAM);
            }
            let report = self.followed[at].watcher.report();
            assert!(report.synced && report.error.is_none() && report.objects == of.len(), "{report:?}");
        }
        table.update(|t| t.apply(Change::Complete(Source::Api)));
    }

    pub(crate) fn event(&mut self, table: &Rc<Writer<Table>>, event_: Event, item: &str) {
        let of = |f: &Followed| item.contains(&format!("\"kind\":{:?},\"metadata\"", f.kind));
        let Some(at) = self.followed.iter().position(of) else { return };
        let item = self.versioned(item);
        self.say(at, table, &chunk(&event(&format!("{event_:?}").to_ascii_uppercase(), &item)));
        let report = self.followed[at].watcher.report();
        assert!(report.synced && report.error.is_none(), "{report:?}");
    }

    fn versioned(&mut self, item: &str) -> String {
        self.version += 1;
        item.replacen(
            "\"metadata\":{",
            &format!("\"metadata\":{{\"uid\":\"u\",\"resourceVersion\":\"{}\",", self.version),
            1,
        )
    }

    /// What a watcher asks for next.
    fn asked(&mut self, at: usize, table: &Rc<Writer<Table>>) -> String {
        let watcher = &mut self.followed[at].watcher;
        for _ in 0..100 {
            let input = match watcher.poll_output() {
                Output::Get(target) => return target,
                Output::Connect => Input::Connected,
                Output::Hangup => Input::Closed,
                Output::Wait(until) => {
                    self.now = self.now.max(until);
                    Input::Tick
                }
            };
            table.update(|t| watcher.handle_input(self.now, input, t));
        }
        panic!("nothing is asked: {:?}", watcher.report());
    }

    fn say(&mut self, at: usize, table: &Rc<Writer<Table>>, text: &str) {
        let mut left = text.as_bytes();
        while !left.is_empty() {
            let (piece, rest) = left.split_at(self.rng.usize(1..3000).min(left.len()));
            let watcher = &mut self.followed[at].watcher;
            table.update(|t| watcher.handle_input(self.now, Input::Bytes(piece), t));
            left = rest;
        }
    }
}
