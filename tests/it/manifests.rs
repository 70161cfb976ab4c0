//! Manifests that a real API server printed (fixtures/kube/record), through the driver into the table.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use weft::{
    clock::Clock,
    config::Policy,
    kube::{
        Manifests, SourceStatus, Sources,
        files::{Reading, Sink},
        item::Read,
    },
    shared::{Reader, Writer},
    table::{
        Table,
        balance::{Ask, Balancer, Here, NoTarget, Target},
        model::{Affinity, Name, Protocol, Service, ServiceKind},
    },
};

/// A directory of its own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weft-manifests-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), text).unwrap();
    }

    fn pattern(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

struct World {
    manifests: Manifests,
    table: Reader<Table>,
    sources: Sources,
}

impl World {
    fn new(patterns: &[String]) -> Self {
        let writer = Rc::new(Writer::new(Table::default()));
        let table = writer.reader();
        let manifests = Manifests::new(patterns, writer, Clock::new(0));
        Self { sources: manifests.sources(), manifests, table }
    }

    fn look(&mut self) {
        weft::reactor::block_on(self.manifests.look());
    }

    /// "namespace/name" of all Services.
    fn services(&self) -> Vec<String> {
        self.table.read(|t| t.services().map(|s| format!("{}/{}", s.id.namespace, s.id.name)).collect())
    }

    fn service(&self, name: &str) -> Service {
        let (namespace, name) = name.split_once('/').unwrap();
        self.table.read(|t| t.service(namespace, name).cloned()).unwrap_or_else(|| panic!("no Service {name}"))
    }

    /// address:target (state, node) of each endpoint of a Service's port, in the order of the addresses.
    fn endpoints(&self, service: &str, port: &str, protocol: Protocol) -> Vec<String> {
        let id = self.service(service).id;
        let mut all: Vec<_> = self.table.read(|t| {
            let shown = t.endpoints(&id).filter_map(|(slice, e)| {
                let to = SocketAddr::new(e.address, Table::target_port(slice, port, protocol)?);
                let state = match (e.ready, e.serving, e.terminating) {
                    (true, _, false) => "ready",
                    (false, false, false) => "unready",
                    (false, true, true) => "terminating",
                    other => panic!("{other:?}"),
                };
                Some(format!("{to} {state} {}", e.node.as_deref().unwrap_or("-")))
            });
            shown.collect()
        });
        all.sort();
        all
    }

    fn route(&self, here: &str, destination: SocketAddr, protocol: Protocol) -> Result<Target, NoTarget> {
        let here = Here { node: here.into(), ..Here::default() };
        let mut balancer = Balancer::new(Policy::RoundRobin, fastrand::Rng::with_seed(1));
        let ask = Ask { destination, protocol, client: [192, 168, 0, 1].into(), tried: &[] };
        let now = Clock::new(0).now();
        self.table.read(|t| t.pick(&here, ask, None, &mut balancer, now)).map(|pick| pick.target)
    }

    fn status(&self, name: &str) -> SourceStatus {
        let list = self.sources.list();
        let found = list.iter().find(|s| s.name.ends_with(name)).cloned();
        found.unwrap_or_else(|| panic!("{name} is not in {list:?}"))
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures/kube").join(name)
}

fn recorded() -> World {
    let names = ["cluster.json", "endpoints.json"];
    let mut world = World::new(&names.map(|name| fixture(name).to_str().unwrap().to_owned()));
    assert!(!world.table.read(Table::synced));
    world.look();
    assert!(world.table.read(Table::synced));
    world
}

fn vip(world: &World, service: &str) -> IpAddr {
    world.service(service).vips[0]
}

#[test]
fn what_the_api_server_printed_is_in_the_table() {
    let world = recorded();
    assert_eq!(
        world.services(),
        [
            "default/kubernetes",
            "media/dual",
            "media/marked-headless",
            "media/other-proxy",
            "media/sctp",
            "shop/balanced",
            "shop/by-hand",
            "shop/db",
            "shop/db-all",
            "shop/empty",
            "shop/external",
            "shop/legacy",
            "shop/local",
            "shop/manual",
            "shop/multi",
            "shop/node-port",
            "shop/sticky",
            "shop/sticky-default",
            "shop/udp",
            "shop/web",
        ]
    );
    for status in world.sources.list() {
        assert_eq!((status.synced, status.skipped, &status.last_error), (true, 0, &None), "{status:?}");
        assert!(status.objects > 20, "{status:?}");
    }
    let nodes: Vec<_> = world.table.read(|t| {
        t.nodes().map(|n| format!("{} {:?} {:?}", n.name, n.zone.as_deref().unwrap_or("-"), n.addresses)).collect()
    });
    assert_eq!(
        nodes,
        [
            "cloud-1 \"-\" [203.0.113.13, 2001:db8::13]",
            "edge-1 \"north\" [203.0.113.11]",
            "edge-2 \"south\" [203.0.113.12]"
        ]
    );
    world.table.read(|t| {
        assert!(t.has_namespace("shop") && t.has_namespace("default") && !t.has_namespace("kube-system"));
        let of_pod: Vec<_> = t.by_endpoint("10.1.1.20".parse().unwrap()).map(|(s, _)| s.id.name.to_string()).collect();
        assert_eq!(of_pod, ["db", "db-all"]);
    });
}

#[test]
fn services_keep_their_shape() {
    let world = recorded();
    let web = world.service("shop/web");
    assert_eq!(
        (&web.kind, web.affinity, web.local_only, web.not_proxied),
        (&ServiceKind::ClusterIp, Affinity::None, false, false)
    );
    assert_eq!(world.service("shop/db").kind, ServiceKind::Headless);
    assert_eq!(world.service("shop/legacy").kind, ServiceKind::External("legacy.example.com".into()));
    for (name, seconds) in [("shop/sticky", 600), ("shop/sticky-default", 10_800)] {
        assert_eq!(world.service(name).affinity, Affinity::ClientIp { timeout: Duration::from_secs(seconds) });
    }
    assert!(world.service("shop/local").local_only);
    assert_eq!(world.service("shop/node-port").ports[0].node_port, 30_080);
    let external = |name| world.service(name).external_ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(external("shop/balanced"), ["198.51.100.10"]);
    assert_eq!(external("shop/external"), ["198.51.100.20"]);
    assert!(world.service("media/other-proxy").not_proxied && world.service("media/marked-headless").not_proxied);
    let dual = world.service("media/dual").vips;
    assert!(dual.len() == 2 && dual[0].is_ipv4() && dual[1].is_ipv6(), "{dual:?}");
    let ports: Vec<_> =
        world.service("shop/multi").ports.iter().map(|p| (p.name.to_string(), p.number, p.protocol)).collect();
    assert!(
        ports.contains(&("dns".into(), 53, Protocol::Udp)) && ports.contains(&("dns-tcp".into(), 53, Protocol::Tcp))
    );
    for service in world.services() {
        for &vip in world.service(&service).vips.iter() {
            assert_eq!(world.table.read(|t| t.by_vip(vip).map(|s| s.id.clone())), Some(world.service(&service).id));
        }
    }
}

#[test]
fn endpoints_have_their_own_ports_and_states() {
    let world = recorded();
    let web = [
        "10.1.1.10:8080 ready edge-1",
        "10.1.1.13:8080 terminating edge-1",
        "10.1.2.10:8080 ready edge-2",
        "10.1.2.11:8000 ready edge-2",
        "10.1.2.12:8080 unready edge-2",
    ];
    assert_eq!(world.endpoints("shop/web", "http", Protocol::Tcp), web);
    assert_eq!(world.endpoints("shop/multi", "dns", Protocol::Udp)[0], "10.1.1.10:1053 ready edge-1");
    let db = ["10.1.1.20:5432 ready edge-1", "10.1.2.20:5432 unready edge-2"];
    assert_eq!(world.endpoints("shop/db", "sql", Protocol::Tcp), db);
    let all = ["10.1.1.20:5432 ready edge-1", "10.1.2.20:5432 ready edge-2"];
    assert_eq!(world.endpoints("shop/db-all", "sql", Protocol::Tcp), all, "publishNotReadyAddresses");
    let manual = ["192.0.2.200:8888 ready -", "192.0.2.201:8888 ready edge-2"];
    assert_eq!(world.endpoints("shop/manual", "http", Protocol::Tcp), manual, "mirrored");
    let by_hand = ["192.0.2.210:8080 ready -", "192.0.2.211:8080 unready -"];
    assert_eq!(world.endpoints("shop/by-hand", "http", Protocol::Tcp), by_hand);
    let dual = ["10.1.3.10:8554 ready cloud-1", "[fd00:1:3::10]:8554 ready cloud-1"];
    assert_eq!(world.endpoints("media/dual", "rtp", Protocol::Tcp), dual);
    assert_eq!(world.endpoints("shop/empty", "", Protocol::Tcp), [""; 0]);
    let db = world.service("shop/db").id;
    let hosts: Vec<_> = world.table.read(|t| t.endpoints(&db).filter_map(|(_, e)| e.hostname.clone()).collect());
    assert_eq!(hosts, [Name::from("db-0"), Name::from("db-1")]);
    let pods = |world: &World| world.table.read(|t| t.endpoints(&db).filter_map(|(_, e)| e.pod.clone()).count());
    assert_eq!(pods(&world), 0);
    let mut named = World::new(&[fixture("cluster.json").to_str().unwrap().to_owned()]);
    named.manifests = named.manifests.with_pod_names(true);
    named.look();
    assert_eq!(pods(&named), 2);
}

#[test]
fn connections_find_their_way() {
    let world = recorded();
    let to = |service, port| SocketAddr::new(vip(&world, service), port);
    assert_eq!(
        world.route("edge-1", to("shop/web", 80), Protocol::Tcp),
        Ok(Target::Local("10.1.1.10:8080".parse().unwrap()))
    );
    let far = world.route("cloud-1", to("shop/web", 80), Protocol::Tcp);
    assert!(matches!(&far, Ok(Target::Remote { node, port: 80, .. }) if node.starts_with("edge-")), "{far:?}");
    assert_eq!(world.route("cloud-1", to("shop/local", 80), Protocol::Tcp), Err(NoTarget::NoEndpoint));
    assert_eq!(world.route("edge-1", to("shop/empty", 80), Protocol::Tcp), Err(NoTarget::NoEndpoint));
    assert_eq!(world.route("edge-1", to("shop/web", 81), Protocol::Tcp), Err(NoTarget::NotAService));
    assert_eq!(world.route("edge-1", to("media/other-proxy", 80), Protocol::Tcp), Err(NoTarget::NotAService));
    assert!(world.route("edge-1", to("shop/multi", 53), Protocol::Udp).is_ok());
    let outside = "198.51.100.10:443".parse().unwrap();
    assert!(world.route("edge-1", outside, Protocol::Tcp).is_ok());
    assert_eq!(world.route("edge-1", "198.51.100.11:443".parse().unwrap(), Protocol::Tcp), Err(NoTarget::NotAService));
    // The API server's own endpoint names no node, but its address is one's.
    let api = world.route("edge-1", to("default/kubernetes", 443), Protocol::Tcp);
    assert!(matches!(&api, Ok(Target::Remote { node, .. }) if &**node == "cloud-1"), "{api:?}");
    let here = world.route("cloud-1", to("default/kubernetes", 443), Protocol::Tcp);
    assert_eq!(here, Ok(Target::Local("203.0.113.13:6443".parse().unwrap())));
}

#[test]
fn endpoints_objects_count_where_there_is_no_slice() {
    let sliced = recorded();
    let mut world =
        World::new(&["raw-services.json", "endpoints.json"].map(|n| fixture(n).to_str().unwrap().to_owned()));
    world.look();
    for (service, port) in [("shop/web", "http"), ("shop/manual", "http"), ("shop/db", "sql")] {
        // Endpoints objects do not know of terminating endpoints.
        let mut expected = sliced.endpoints(service, port, Protocol::Tcp);
        expected.retain(|e| !e.contains("terminating"));
        let found = world.endpoints(service, port, Protocol::Tcp);
        assert_eq!(found, expected, "{service}");
    }
}

/// Lists as the API server itself prints them: on one line, items without a kind, managed fields.
#[test]
fn raw_lists_are_read_too() {
    let mut world =
        World::new(&["raw-services.json", "raw-slices.json"].map(|n| fixture(n).to_str().unwrap().to_owned()));
    world.look();
    assert_eq!(world.services().len(), 15);
    assert!(world.service("shop/sticky").affinity != Affinity::None);
    for status in world.sources.list() {
        assert_eq!((status.synced, status.last_error), (true, None));
    }
    assert_eq!(world.status("raw-slices.json").objects, 3);
}

#[derive(Default, PartialEq, Debug)]
struct All(Vec<Read>);

impl Sink for All {
    fn intern(&mut self, name: &str) -> Name {
        name.into()
    }

    fn take(&mut self, read: Read) {
        self.0.push(read);
    }
}

#[test]
fn a_file_cut_at_every_byte_reads_the_same() {
    let bytes = fs::read(fixture("media.json")).unwrap();
    let read = |cuts: &[usize]| {
        let (mut reading, mut all, mut from) = (Reading::default(), All::default(), 0);
        for to in cuts.iter().copied().chain([bytes.len()]) {
            reading.feed(&bytes[from..to], &mut all).unwrap();
            from = to;
        }
        reading.finish().map(|hash| (hash, all)).unwrap()
    };
    let whole = read(&[]);
    assert_eq!(whole.1.0.iter().filter(|r| matches!(r, Read::Objects(o, None) if o.len() == 1)).count(), 4);
    for at in 0..bytes.len() {
        assert_eq!(read(&[at]), whole, "cut at {at}");
    }
    assert_eq!(read(&(0..bytes.len()).collect::<Vec<_>>()), whole, "byte by byte");
    for at in 1..bytes.len() - 1 {
        let mut reading = Reading::default();
        reading.feed(&bytes[..at], &mut All::default()).unwrap();
        assert!(reading.finish().is_err(), "a file that ends at {at} is seen to be cut off");
    }
}

fn service(name: &str, port: u32) -> String {
    let ports = format!(r#"[{{"port":{port}}}]"#);
    format!(r#"{{"kind":"Service","metadata":{{"name":"{name}","namespace":"n"}},"spec":{{"ports":{ports}}}}}"#)
}

#[test]
fn files_come_change_break_mend_and_go() {
    let directory = Directory::new();
    let mut world = World::new(&[directory.pattern("*.json")]);
    let mut bell = world.table.listen();
    let mut rung = || weft::reactor::block_on(futures_lite::future::poll_once(bell.rung())).is_some();
    world.look();
    assert!(world.table.read(Table::synced), "an empty directory is a fact");
    assert!(rung());

    directory.write("a.json", service("one", 80) + "\n" + &service("two", 80));
    directory.write("b.json", service("three", 80));
    directory.write(".c.json", service("hidden", 80));
    world.look();
    assert_eq!(world.services(), ["n/one", "n/three", "n/two"]);
    assert!(rung());
    world.look();
    world.look();
    assert!(!rung(), "nothing has changed");

    // Half written: the old content stays, and the other file can change all the same.
    directory.write("a.json", &service("four", 80).as_bytes()[..20]);
    directory.write("b.json", service("five", 80));
    world.look();
    assert_eq!(world.services(), ["n/five", "n/one", "n/two"]);
    let status = world.status("a.json");
    assert_eq!((status.synced, status.objects), (false, 2));
    let error = status.last_error.unwrap();
    assert!(error.ends_with("a.json: not JSON at byte 20: it ends in the middle of a document"), "{error}");
    directory.write("a.json", "");
    world.look();
    assert_eq!(world.services(), ["n/five", "n/one", "n/two"]);
    assert!(world.status("a.json").last_error.unwrap().ends_with("a.json: it is empty"));

    directory.write("a.json", service("four", 80));
    world.look();
    assert_eq!(world.services(), ["n/five", "n/four"]);
    assert_eq!(world.status("a.json").last_error, None);
    rung();

    fs::remove_file(directory.0.join("a.json")).unwrap();
    world.look();
    assert_eq!(world.services(), ["n/five"]);
    assert!(rung());
    directory.write("a.json", r#"{"kind":"List","items":[]}"#);
    directory.write("b.json", r#"{"kind":"Status","status":"Failure","message":"Unauthorized"}"#);
    world.look();
    assert_eq!(world.services(), ["n/five"]);
    let error = world.status("b.json").last_error.unwrap();
    assert!(error.ends_with("b.json: it is an error of the API server: Unauthorized"), "{error}");
}

#[test]
fn the_later_file_wins_and_what_it_hid_comes_back() {
    let directory = Directory::new();
    directory.write("a.json", service("web", 80));
    directory.write("b.json", service("web", 81));
    let mut world = World::new(&[directory.pattern("*.json")]);
    world.look();
    assert_eq!(world.service("n/web").ports[0].number, 81);
    directory.write("b.json", "{");
    directory.write("a.json", service("web", 82));
    world.look();
    assert_eq!(world.service("n/web").ports[0].number, 81, "what a broken file said still wins");
    fs::remove_file(directory.0.join("b.json")).unwrap();
    world.look();
    assert_eq!(world.service("n/web").ports[0].number, 82);
}

#[test]
fn a_bad_item_keeps_its_old_version_and_the_rest_is_used() {
    let directory = Directory::new();
    let mut world = World::new(&[directory.pattern("all.json")]);
    directory.write("all.json", service("one", 80) + &service("two", 80));
    world.look();
    directory.write("all.json", service("one", 70_000) + &service("two", 81) + r#"{"kind":"ConfigMap"}"#);
    world.look();
    assert_eq!((world.service("n/one").ports[0].number, world.service("n/two").ports[0].number), (80, 81));
    let status = world.status("all.json");
    assert_eq!((status.synced, status.objects, status.skipped), (true, 2, 1));
    let error = status.last_error.unwrap();
    assert!(error.ends_with("all.json: Service n/one: spec.ports[0].port: 70000 is not in 1..=65535"), "{error}");
    directory.write("all.json", service("two", 81));
    world.look();
    assert_eq!(world.services(), ["n/two"], "once it is not named it goes");
}

#[test]
fn a_broken_file_at_the_start_leaves_the_table_unsynced() {
    let directory = Directory::new();
    directory.write("a.json", "apiVersion: v1\nkind: Service\n");
    let mut world = World::new(&[directory.pattern("a.json"), directory.pattern("b.json")]);
    world.look();
    assert!(!world.table.read(Table::synced));
    let error = world.status("a.json").last_error.unwrap();
    assert!(error.ends_with("not JSON at byte 0: expected an object, as kubectl get ... -o json prints it"), "{error}");
    assert!(world.status("b.json").last_error.unwrap().starts_with("No such file"));
    directory.write("b.json", service("one", 80));
    world.look();
    assert!(world.table.read(Table::synced));
    assert_eq!(world.services(), ["n/one"]);
}

#[test]
fn a_file_swapped_by_a_symlink_is_seen() {
    let directory = Directory::new();
    for version in [1, 2] {
        fs::create_dir(directory.0.join(format!("..{version}"))).unwrap();
        directory.write(&format!("..{version}/web.json"), service("web", version));
    }
    let link = |version: u32| {
        std::os::unix::fs::symlink(format!("..{version}"), directory.0.join("..new")).unwrap();
        fs::rename(directory.0.join("..new"), directory.0.join("..data")).unwrap();
    };
    link(1);
    std::os::unix::fs::symlink("..data/web.json", directory.0.join("web.json")).unwrap();
    let mut world = World::new(&[directory.pattern("*.json")]);
    world.look();
    assert_eq!(world.service("n/web").ports[0].number, 1);
    link(2);
    world.look();
    assert_eq!(world.service("n/web").ports[0].number, 2);
}

#[test]
fn what_is_no_file_does_not_block() {
    let directory = Directory::new();
    fs::create_dir(directory.0.join("directory.json")).unwrap();
    let pipe = directory.pattern("pipe.json");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut world = World::new(&[directory.pattern("*.json")]);
    world.look();
    assert_eq!(world.sources.list().len(), 1);
    assert!(world.status("pipe.json").last_error.unwrap().ends_with("it is not a regular file"));
}

#[test]
fn too_many_endpoints_are_left_out_with_an_error() {
    let directory = Directory::new();
    let endpoints = r#"{"addresses":["10.1.0.1"]},"#.repeat(999) + r#"{"addresses":["10.1.0.1"]}"#;
    let mut text = String::new();
    for n in 0..264 {
        let meta = format!(r#"{{"name":"s-{n}","namespace":"n","labels":{{"kubernetes.io/service-name":"web"}}}}"#);
        text += &format!(r#"{{"kind":"EndpointSlice","metadata":{meta},"endpoints":[{endpoints}]}}"#);
    }
    directory.write("a.json", text);
    let mut world = World::new(&[directory.pattern("*.json")]);
    world.look();
    let status = world.status("a.json");
    assert_eq!(status.objects, weft::kube::ENDPOINTS_MAX / 1000);
    let error = status.last_error.unwrap();
    assert!(error.ends_with("more than 262144 endpoints in all files: the rest is left out (and 1 more)"), "{error}");
}
