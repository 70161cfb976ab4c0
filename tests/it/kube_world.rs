//! A watcher in virtual time, and the bytes that a scripted server answers with.

use std::time::{Duration, Instant};
use weft::{
    kube::{
        resource::Resource,
        watcher::{Input, Output, Report, SPREAD, Setup, Watcher},
    },
    table::{
        Table,
        model::{Change, Source},
    },
};

pub(crate) struct World {
    pub(crate) watcher: Watcher,
    pub(crate) table: Table,
    pub(crate) now: Instant,
    /// Asked, and not yet told of.
    pending: Option<String>,
    pub(crate) connected: bool,
    pub(crate) connects: usize,
    pub(crate) hangups: usize,
    /// What has been asked.
    pub(crate) asked: Vec<String>,
    /// What a try to connect gives instead of a connection.
    pub(crate) refuse: Option<String>,
    /// Bytes of one read.
    pub(crate) step: usize,
}

/// Reads of one byte, of a few, and of all that there is.
pub(crate) const STEPS: [usize; 4] = [1, 7, 100, usize::MAX];

impl World {
    pub(crate) fn of(resource: Resource, metaserver: bool, seed: u64, step: usize) -> Self {
        let now = Instant::now();
        Self::new(resource, metaserver, seed, step, (now, now))
    }

    /// That asks for nothing before `start`.
    pub(crate) fn starting(start: Instant, now: Instant, seed: u64) -> Self {
        Self::new(Resource::Services, false, seed, usize::MAX, (start, now))
    }

    fn new(resource: Resource, metaserver: bool, seed: u64, step: usize, (start, now): (Instant, Instant)) -> Self {
        let mut table = Table::default();
        table.expect(Source::Api);
        let rng = fastrand::Rng::with_seed(seed);
        let setup = Setup { resource, namespace: None, metaserver, pod_names: false, start, spread: SPREAD, rng };
        Self {
            watcher: Watcher::new(setup),
            table,
            now,
            pending: None,
            connected: false,
            connects: 0,
            hangups: 0,
            asked: Vec::new(),
            refuse: None,
            step,
        }
    }

    /// Of Services, as an API server has them, without WatchList.
    pub(crate) fn listing(step: usize) -> Self {
        let mut world = Self::of(Resource::Services, false, 1, step);
        world.no_watch_list();
        world
    }

    pub(crate) fn metaserver(step: usize) -> Self {
        Self::of(Resource::Services, true, 1, step)
    }

    /// Says 422 to the WatchList that is asked for first.
    pub(crate) fn no_watch_list(&mut self) {
        assert!(self.next().contains("sendInitialEvents=true"), "{:?}", self.asked);
        self.refusal(422, "", "sendInitialEvents is forbidden for watch");
    }

    /// One step: what was asked, if anything was.
    fn turn(&mut self, until: Instant) -> Option<String> {
        if let Some(target) = self.pending.take() {
            return Some(target);
        }
        match self.watcher.poll_output() {
            Output::Connect => {
                assert!(!self.connected, "connected already");
                self.connects += 1;
                match self.refuse.clone() {
                    Some(why) => self.input(Input::Refused(why)),
                    None => {
                        self.connected = true;
                        self.input(Input::Connected);
                    }
                }
            }
            Output::Get(target) => {
                assert!(self.connected, "asked without a connection");
                self.asked.push(target.clone());
                return Some(target);
            }
            Output::Hangup => {
                assert!(self.connected);
                self.connected = false;
                self.hangups += 1;
            }
            Output::Wait(at) => {
                self.now = self.now.max(at.min(until));
                self.input(Input::Tick);
            }
        }
        None
    }

    pub(crate) fn input(&mut self, input: Input<'_>) {
        self.watcher.handle_input(self.now, input, &mut self.table);
    }

    /// The next request, whenever it comes.
    pub(crate) fn next(&mut self) -> String {
        let until = self.now + Duration::from_secs(7_200);
        for _ in 0..10_000 {
            if let Some(target) = self.turn(until) {
                return target;
            }
            assert!(self.now < until, "nothing was asked");
        }
        panic!("it runs in circles: {:?}", self.watcher.report());
    }

    /// The next request; one for nothing but the server's version is answered with one that is high enough.
    pub(crate) fn next_watch(&mut self) -> String {
        let asked = self.next();
        if asked != "/api/v1/services?limit=1" {
            return asked;
        }
        self.ok(&list(1_000_000, "x", &[service("of-no-account", 1)]));
        self.next()
    }

    /// Until the server should end the watch that was asked for last.
    pub(crate) fn timeout(&self) -> u64 {
        let asked = self.asked.last().unwrap();
        asked.split_once("timeoutSeconds=").unwrap().1.parse().unwrap()
    }

    /// The next request, and the seconds until it came.
    pub(crate) fn next_after(&mut self) -> (String, f64) {
        let from = self.now;
        let target = self.next();
        (target, (self.now - from).as_secs_f64())
    }

    /// Time goes by; nobody answers.
    pub(crate) fn pass(&mut self, seconds: u64) -> Vec<String> {
        let (until, from) = (self.now + Duration::from_secs(seconds), self.asked.len());
        while self.now < until {
            self.turn(until);
        }
        self.asked[from..].to_vec()
    }

    pub(crate) fn bytes(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        for piece in bytes.chunks(self.step.min(bytes.len().max(1))) {
            if !self.connected {
                return;
            }
            self.input(Input::Bytes(piece));
            // A hang-up is obeyed before the next read.
            if !self.watcher.is_reading() {
                match self.watcher.poll_output() {
                    Output::Hangup => (self.connected, self.hangups) = (false, self.hangups + 1),
                    Output::Get(target) => {
                        self.asked.push(target.clone());
                        self.pending = Some(target);
                    }
                    Output::Connect => panic!("connects in the middle of an answer"),
                    Output::Wait(_) => {}
                }
            }
        }
    }

    pub(crate) fn close(&mut self) {
        self.connected = false;
        self.input(Input::Closed);
    }

    /// 200 with a body of known length.
    pub(crate) fn ok(&mut self, body: &str) {
        self.bytes(http(200, "", body));
    }

    /// The beginning of a stream: a watch that is granted.
    pub(crate) fn open(&mut self) {
        self.bytes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    }

    /// One chunk of a stream.
    pub(crate) fn chunk(&mut self, text: &str) {
        self.bytes(format!("{:x}\r\n{text}\r\n", text.len()));
    }

    pub(crate) fn event(&mut self, kind: &str, object: &str) {
        self.chunk(&event(kind, object));
    }

    /// The clean end of a stream.
    pub(crate) fn end(&mut self) {
        self.bytes("0\r\n\r\n");
    }

    pub(crate) fn refusal(&mut self, code: u16, headers: &str, message: &str) {
        self.bytes(http(code, headers, &status(code, "", message)));
    }

    /// A list that is complete, and the watch behind it.
    pub(crate) fn list_and_watch(&mut self, version: u64, names: &[&str]) -> String {
        let asked = self.next();
        assert!(!asked.contains("watch=1"), "{asked}");
        let items: Vec<String> = names.iter().map(|name| service(name, 1)).collect();
        self.ok(&list(version, "", &items));
        let asked = self.next();
        assert!(asked.contains("watch=1"), "{asked}");
        self.open();
        asked
    }

    /// The names of the Services, in order.
    pub(crate) fn names(&self) -> String {
        self.table.services().map(|s| s.id.name.to_string()).collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn port(&self, name: &str) -> Option<u16> {
        Some(self.table.service("shop", name)?.ports.first()?.number)
    }

    pub(crate) fn report(&self) -> Report {
        self.watcher.report()
    }

    pub(crate) fn error(&self) -> String {
        self.report().error.unwrap_or_default()
    }

    /// Something of before a restart.
    pub(crate) fn restored(&mut self, name: &str) {
        let text = service(name, 1);
        let one = weft::kube::item::One::of(weft::kube::item::Kind::Service, &text, &mut |name| name.into()).unwrap();
        let weft::kube::item::Read::Objects(objects, None) = one.read(&text, &mut |name| name.into()) else { panic!() };
        for object in objects {
            self.table.apply(Change::Apply(Source::Api, object));
        }
    }
}

pub(crate) fn http(code: u16, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Port 80, uid and address from the name.
pub(crate) fn service(name: &str, version: u64) -> String {
    service_with(name, version, name, 80)
}

pub(crate) fn service_with(name: &str, version: u64, uid: &str, port: u16) -> String {
    let last = name.bytes().fold(1_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte)).max(1);
    format!(
        r#"{{"metadata":{{"name":"{name}","namespace":"shop","uid":"{uid}","resourceVersion":"{version}","managedFields":[{{"a":"\"{{"}}]}},"spec":{{"clusterIP":"10.96.1.{last}","ports":[{{"port":{port},"targetPort":"http"}}]}}}}"#
    )
}

pub(crate) fn list(version: u64, next: &str, items: &[String]) -> String {
    format!(
        r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{"resourceVersion":"{version}","continue":"{next}"}},"items":[{}]}}"#,
        items.join(",")
    )
}

pub(crate) fn event(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

pub(crate) fn bookmark(version: u64, ends: bool) -> String {
    let annotations = if ends { r#","annotations":{"k8s.io/initial-events-end":"true"}"# } else { "" };
    format!(r#"{{"kind":"Service","metadata":{{"resourceVersion":"{version}"{annotations}}}}}"#)
}

pub(crate) fn status(code: u16, reason: &str, message: &str) -> String {
    format!(
        r#"{{"kind":"Status","apiVersion":"v1","metadata":{{}},"status":"Failure","message":"{message}","reason":"{reason}","code":{code}}}"#
    )
}
