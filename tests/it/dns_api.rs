//! What an API server says of the conformance table's fixture: one list of each resource, then one line for each event
//! of its watch, byte by byte as they come, through the readers of Kubernetes' JSON. A client that asks for them itself
//! takes the place of [`Api::list`] and [`Api::event`].

use std::rc::Rc;
use weft::{
    config::{DnsConfig, PodNames},
    kube::{
        files::{Reading, Sink},
        item::Read,
    },
    shared::Writer,
    table::{
        Table,
        model::{Change, Name, Object, Source},
    },
};

/// The lists, with their kinds and those of their items.
const RESOURCES: [(&str, &str, &str); 3] = [
    ("ServiceList", "v1", "Service "),
    ("EndpointSliceList", "discovery.k8s.io/v1", "EndpointSlice "),
    ("PodList", "v1", "Pod "),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Added,
    Modified,
    Deleted,
}

/// Reads on behalf of one table.
pub(crate) struct Api {
    pod_names: bool,
    pods: bool,
    rng: fastrand::Rng,
}

struct Into<'t> {
    table: &'t mut Table,
    change: fn(Object) -> Change,
    pod_names: bool,
    pods: bool,
    /// That were read.
    items: usize,
}

impl Sink for Into<'_> {
    fn intern(&mut self, name: &str) -> Name {
        self.table.intern(name)
    }

    fn take(&mut self, read: Read) {
        let Read::Objects(objects, None) = read else { panic!("{read:?}") };
        self.items += 1;
        for mut object in objects {
            match &mut object {
                Object::Slice(slice) if !self.pod_names => slice.endpoints.iter_mut().for_each(|e| e.pod = None),
                Object::Pod(_) if !self.pods => continue,
                Object::Service(_) | Object::Slice(_) | Object::Pod(_) | Object::Node(_) => {}
            }
            self.table.apply((self.change)(object));
        }
    }
}

impl Api {
    pub(crate) fn new(cfg: &DnsConfig) -> Self {
        let pods = cfg.pods == PodNames::Verified;
        Self { pod_names: cfg.endpoint_pod_names, pods, rng: fastrand::Rng::with_seed(3) }
    }

    /// The first lists, whole. `items` are the objects, each with its kind and name.
    pub(crate) fn list(&mut self, table: &Rc<Writer<Table>>, items: &[(String, String)]) {
        table.update(|t| t.apply(Change::Begin(Source::Api)));
        let mut listed = 0;
        for (kind, version, prefix) in RESOURCES {
            let of: Vec<&str> = items.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, i)| bare(i)).collect();
            // The server repeats neither kind nor version in the items.
            let text = format!(
                "{{\"kind\":{kind:?},\"apiVersion\":{version:?},\"metadata\":{{\"resourceVersion\":\"7\"}},\"items\":[{{{}]}}\n",
                of.join(",{")
            );
            let text = if of.is_empty() { text.replace("[{]", "[]") } else { text };
            listed += self.read(table, text.as_bytes(), |o| Change::Apply(Source::Api, o));
        }
        assert_eq!(listed, items.len());
        table.update(|t| t.apply(Change::Complete(Source::Api)));
    }

    pub(crate) fn event(&mut self, table: &Rc<Writer<Table>>, event: Event, item: &str) {
        let name = format!("{event:?}").to_ascii_uppercase();
        let line = format!("{{\"type\":\"{name}\",\"object\":{item}}}\n");
        let object = line.strip_prefix(&format!("{{\"type\":\"{name}\",\"object\":")).unwrap();
        let object = object.strip_suffix("}\n").unwrap();
        let change = match event {
            Event::Added | Event::Modified => |o| Change::Apply(Source::Api, o),
            Event::Deleted => |o: Object| Change::Delete(Source::Api, o.id()),
        };
        assert_eq!(self.read(table, object.as_bytes(), change), 1);
    }

    /// In pieces, as TCP brings them; how many objects there were.
    fn read(&mut self, table: &Rc<Writer<Table>>, mut text: &[u8], change: fn(Object) -> Change) -> usize {
        let mut reading = Reading::default();
        let mut items = 0;
        while !text.is_empty() {
            let (piece, rest) = text.split_at(self.rng.usize(1..3000).min(text.len()));
            table.update(|table| {
                let mut sink = Into { table, change, pod_names: self.pod_names, pods: self.pods, items: 0 };
                reading.feed(piece, &mut sink).unwrap();
                items += sink.items;
            });
            text = rest;
        }
        reading.finish().unwrap();
        items
    }
}

/// Without its first members, which are version and kind, and without its first brace.
fn bare(item: &str) -> &str {
    &item[item.find("\"metadata\"").unwrap()..]
}
