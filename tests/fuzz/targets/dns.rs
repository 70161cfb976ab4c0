//! DNS messages as queries, and as answers of an upstream: no panic, and no reply that cannot be read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{cell::OnceCell, sync::LazyLock, time::Instant};
use weft::{
    config::{DnsConfig, PodNames},
    dns::{
        fuzz,
        wire::{Header, Records},
        zone::Zone,
    },
    kube::{
        files::{Reading, Sink},
        item::Read,
    },
    table::{
        Table,
        model::{Change, Name, Source},
    },
};

/// Of UDP and TCP alike.
const MESSAGE_MAX: usize = 65_535;

struct Into(Table);

impl Sink for Into {
    fn intern(&mut self, name: &str) -> Name {
        self.0.intern(name)
    }

    fn take(&mut self, read: Read) {
        if let Read::Objects(objects, _) = read {
            for object in objects {
                self.0.apply(Change::Apply(Source::Manifests, object));
            }
        }
    }
}

/// A real cluster's objects.
fn world() -> (Table, [Zone; 2]) {
    let mut sink = Into(Table::default());
    let text = include_bytes!("../../it/fixtures/kube/cluster.json");
    Reading::default().feed(text, &mut sink).unwrap();
    assert!(sink.0.services().count() > 3);
    let plain = DnsConfig::default();
    let odd = DnsConfig {
        pods: PodNames::Verified,
        endpoint_pod_names: true,
        empty_is_missing: true,
        namespaces: vec!["default".into(), "kube-system".into()],
        zones: vec!["10.in-addr.arpa".into()],
        fallthrough: vec![".".into()],
        ..DnsConfig::default()
    };
    (sink.0, [plain, odd].map(|c| Zone::new(&c, 1).unwrap()))
}

thread_local!(static WORLD: OnceCell<(Table, [Zone; 2])> = const { OnceCell::new() });

fn readable(reply: &[u8]) {
    assert!(reply.len() <= MESSAGE_MAX, "{} bytes", reply.len());
    let header = Header::parse(reply).expect("a header");
    if header.counts == [0; 4] {
        return;
    }
    let records = Records::new(reply).expect("questions");
    for record in records {
        record.expect("a record");
    }
}

fuzz_target!(|message: &[u8]| {
    WORLD.with(|world_| {
        let (table, zones) = world_.get_or_init(world);
        for (_, reply) in zones.iter().flat_map(|zone| fuzz::query(message, table, zone)) {
            if !reply.is_empty() {
                readable(&reply);
            }
        }
    });
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    fuzz::forward(message, *START).iter().for_each(|reply| readable(reply));
    if let Some(replies) = fuzz::upstream(message) {
        replies.iter().for_each(|reply| readable(reply));
    }
});
