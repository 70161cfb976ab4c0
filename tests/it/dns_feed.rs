//! How the conformance table's fixture gets into the table: as objects; as an API server's lists and watches; or as the
//! file that kubectl prints, through the driver of manifests.

use crate::{
    cli::{TempDir, temp_dir},
    dns_api::{Api, Event},
    dns_fixture::{name, pod, service, slice},
    json::Json,
};
use std::{collections::BTreeMap, fs, path::PathBuf, rc::Rc};
use weft::{
    clock::Clock,
    config::{DnsConfig, PodNames},
    kube::Manifests,
    shared::Writer,
    table::{
        Table,
        model::{Change, Object, ObjectId, ServiceId, SliceId, Source},
        snapshot::{self, Encoder, Meta},
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Objects,
    ListWatch,
    Manifests,
}

/// A table and what feeds it.
pub(crate) struct Fed {
    pub(crate) table: Rc<Writer<Table>>,
    cfg: DnsConfig,
    feed: Feed,
}

enum Feed {
    Objects,
    /// With what it holds: kind, namespace and name -> the object as JSON.
    Api(Api, BTreeMap<String, String>),
    Files(Files),
}

struct Files {
    dir: TempDir,
    driver: Manifests,
    /// Kind, namespace and name -> the object as JSON.
    items: BTreeMap<String, String>,
}

impl Files {
    fn path(&self) -> PathBuf {
        self.dir.path().join("all.json")
    }

    fn write(&mut self) {
        let items = self.items.values().cloned().collect::<Vec<_>>().join(",\n");
        let (new, path) = (self.dir.path().join("new"), self.path());
        fs::write(&new, format!("{{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[{items}]}}")).unwrap();
        fs::rename(new, path).unwrap();
        weft::reactor::block_on(self.driver.look());
        let status = self.driver.sources().list();
        assert!(status.iter().all(|s| s.last_error.is_none()), "{status:?}");
    }
}

/// As the agent makes it from `[dns]`.
fn manifests(dir: &TempDir, table: &Rc<Writer<Table>>, cfg: &DnsConfig) -> Manifests {
    let patterns = [dir.path().join("all.json").display().to_string()];
    Manifests::new(&patterns, Rc::clone(table), Clock::new(0))
        .with_pod_names(cfg.endpoint_pod_names)
        .with_pods(cfg.pods == PodNames::Verified)
}

impl Fed {
    /// A table that waits for its first list.
    pub(crate) fn new(by: By, cfg: &DnsConfig) -> Self {
        let table = Rc::new(Writer::new(Table::default()));
        let feed = match by {
            By::Objects => Feed::Objects,
            By::ListWatch => Feed::Api(Api::new(cfg), BTreeMap::new()),
            By::Manifests => {
                let dir = temp_dir();
                let driver = manifests(&dir, &table, cfg);
                Feed::Files(Files { dir, driver, items: BTreeMap::new() })
            }
        };
        if !matches!(feed, Feed::Files(_)) {
            table.update(|t| t.expect(Source::Api));
        }
        Self { table, cfg: cfg.clone(), feed }
    }

    /// The first list.
    pub(crate) fn fill(&mut self, fixture: &Json) {
        match &mut self.feed {
            Feed::Objects => {
                self.table.update(|t| t.apply(Change::Begin(Source::Api)));
                self.apply(fixture);
                self.table.update(|t| t.apply(Change::Complete(Source::Api)));
            }
            Feed::Api(api, items) => {
                items.extend(json(fixture));
                let all: Vec<(String, String)> = items.clone().into_iter().collect();
                api.list(&self.table, &all);
            }
            Feed::Files(_) => self.apply(fixture),
        }
    }

    pub(crate) fn apply(&mut self, objects: &Json) {
        match &mut self.feed {
            Feed::Objects => self.table.update(|t| {
                let each = |key: &str| objects[key].list().to_vec();
                let services = each("services").into_iter().map(|s| Object::Service(service(&s)));
                let slices = each("slices").into_iter().map(|s| Object::Slice(slice(&s)));
                let pods = each("pods").into_iter().map(|p| Object::Pod(pod(&p)));
                for object in services.chain(slices).chain(pods) {
                    t.apply(Change::Apply(Source::Api, object));
                }
            }),
            Feed::Api(api, items) => {
                for (key, item) in json(objects) {
                    let event = if items.contains_key(&key) { Event::Modified } else { Event::Added };
                    api.event(&self.table, event, &item);
                    items.insert(key, item);
                }
            }
            Feed::Files(files) => {
                files.items.extend(json(objects));
                files.write();
            }
        }
    }

    pub(crate) fn delete(&mut self, which: &Json) {
        let pairs = |key: &str| -> Vec<(String, String)> {
            let text = |pair: &Json, i: usize| pair.list()[i].text().to_owned();
            which[key].list().iter().map(|pair| (text(pair, 0), text(pair, 1))).collect()
        };
        let keys: Vec<String> = [("Service", "services"), ("EndpointSlice", "slices")]
            .into_iter()
            .flat_map(|(kind, key)| pairs(key).into_iter().map(move |(ns, own)| format!("{kind} {ns}/{own}")))
            .collect();
        match &mut self.feed {
            Feed::Objects => self.table.update(|t| {
                for (ns, own) in pairs("services") {
                    let id = ServiceId { namespace: name(&ns), name: name(&own) };
                    t.apply(Change::Delete(Source::Api, ObjectId::Service(id)));
                }
                for (ns, own) in pairs("slices") {
                    let id = SliceId { namespace: name(&ns), name: name(&own) };
                    t.apply(Change::Delete(Source::Api, ObjectId::Slice(id)));
                }
            }),
            Feed::Api(api, items) => {
                for key in keys {
                    api.event(&self.table, Event::Deleted, &items.remove(&key).unwrap());
                }
            }
            Feed::Files(files) => {
                for key in keys {
                    assert!(files.items.remove(&key).is_some());
                }
                files.write();
            }
        }
    }

    /// The process is made anew, with the snapshot of before and no word of any source yet.
    pub(crate) fn restart(&mut self) {
        let meta = Meta { unix: 1, node: "edge-1".into(), cluster: None };
        let bytes = self.table.update(|t| {
            let mut encoder = Encoder::new(&meta, &snapshot::encode_peers(&[]), t);
            while !encoder.step(t) {}
            let mut bytes = encoder.finish();
            snapshot::seal(&mut bytes);
            bytes
        });
        let table = Rc::new(Writer::new(Table::default()));
        let source = if matches!(self.feed, Feed::Files(_)) { Source::Manifests } else { Source::Api };
        table.update(|t| {
            t.expect(source);
            snapshot::open(bytes).unwrap().restore(t, &[source])
        });
        if let Feed::Files(files) = &mut self.feed {
            files.driver = manifests(&files.dir, &table, &self.cfg);
        }
        self.table = table;
    }
}

/// Each as the API server has it, under its kind, namespace and name.
fn json(objects: &Json) -> Vec<(String, String)> {
    let each = |key: &str| objects[key].list().iter();
    let slices = each("slices").map(slice_json);
    each("services").map(service_json).chain(slices).chain(each("pods").map(pod_json)).collect()
}

fn quoted(text: &str) -> String {
    format!("{text:?}")
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
}

fn texts(of: &Json) -> String {
    list(of.list().iter().map(|i| quoted(i.text())))
}

fn object(kind: &str, group: &str, of: &Json, own: &str, labels: &str, rest: &str) -> (String, String) {
    let ns = of["ns"].text();
    let json = format!(
        "{{\"apiVersion\":{group:?},\"kind\":{kind:?},\"metadata\":{{\"namespace\":{ns:?},\"name\":{own:?}{labels}}},{rest}}}"
    );
    (format!("{kind} {ns}/{own}"), json)
}

/// `name:port/PROTO`.
fn ports(of: &Json) -> String {
    list(of.list().iter().map(|p| {
        let (rest, protocol) = p.text().split_once('/').unwrap();
        let (name, port) = rest.split_once(':').unwrap();
        format!("{{\"name\":{name:?},\"port\":{port},\"protocol\":{protocol:?}}}")
    }))
}

fn service_json(s: &Json) -> (String, String) {
    let kind = if s.has("type") { s["type"].text() } else { "ClusterIP" };
    let mut spec = format!("\"type\":{kind:?},\"ports\":{}", ports(&s["ports"]));
    if let [first, ..] = s["ips"].list() {
        spec += &format!(",\"clusterIP\":{:?},\"clusterIPs\":{}", first.text(), texts(&s["ips"]));
    }
    if s.has("externalName") {
        spec += &format!(",\"externalName\":{:?}", s["externalName"].text());
    }
    spec += &format!(",\"externalIPs\":{}", texts(&s["externalIPs"]));
    let ingress = list(s["lb"].list().iter().map(|ip| format!("{{\"ip\":{:?}}}", ip.text())));
    let rest = format!("\"spec\":{{{spec}}},\"status\":{{\"loadBalancer\":{{\"ingress\":{ingress}}}}}");
    object("Service", "v1", s, s["name"].text(), "", &rest)
}

fn slice_json(s: &Json) -> (String, String) {
    let parsed = slice(s);
    let labels = format!(",\"labels\":{{\"kubernetes.io/service-name\":{:?}}}", s["svc"].text());
    let family = if s.has("family") { s["family"].text() } else { "IPv4" };
    let endpoints = match s["eps"].list() {
        [one] if one.has("range") => {
            list(parsed.endpoints.iter().map(|e| format!("{{\"addresses\":[\"{}\"]}}", e.address)))
        }
        all => list(all.iter().map(endpoint_json)),
    };
    let rest = format!("\"addressType\":{family:?},\"ports\":{},\"endpoints\":{endpoints}", ports(&s["ports"]));
    object("EndpointSlice", "discovery.k8s.io/v1", s, &parsed.id.name, &labels, &rest)
}

fn endpoint_json(e: &Json) -> String {
    if let Json::Text(address) = e {
        return format!("{{\"addresses\":[{address:?}]}}");
    }
    let mut out = format!("{{\"addresses\":[{:?}]", e["ip"].text());
    if e.has("hostname") {
        out += &format!(",\"hostname\":{:?}", e["hostname"].text());
    }
    if e.has("pod") {
        out += &format!(",\"targetRef\":{{\"kind\":\"Pod\",\"name\":{:?}}}", e["pod"].text());
    }
    let states = ["ready", "serving", "terminating"].into_iter().filter(|key| e.has(key)).map(|key| match &e[key] {
        Json::Bool(state) => format!("{key:?}:{state}"),
        other => {
            assert!(other.is_null());
            format!("{key:?}:null")
        }
    });
    out + &format!(",\"conditions\":{{{}}}}}", states.collect::<Vec<_>>().join(","))
}

fn pod_json(p: &Json) -> (String, String) {
    let ip = p["ip"].text();
    let rest = format!("\"status\":{{\"phase\":\"Running\",\"podIP\":{ip:?},\"podIPs\":[{{\"ip\":{ip:?}}}]}}");
    object("Pod", "v1", p, p["name"].text(), "", &rest)
}
