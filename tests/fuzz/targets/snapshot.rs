//! A snapshot's bytes, as they are and behind a good sum: an error or a table, and a table is written and read as itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft::table::{
    Table,
    model::Source,
    snapshot::{Encoder, Meta, encode_peers, open, seal},
};

const SOURCES: [Source; 2] = [Source::Manifests, Source::Api];

/// Magic, version, length and sum.
fn sealed(body: &[u8]) -> Vec<u8> {
    let mut bytes = b"weftsnap\0\x01".to_vec();
    bytes.resize(22, 0);
    bytes.extend_from_slice(body);
    seal(&mut bytes);
    bytes
}

fn written(meta: &Meta, peers: &[u8], table: &Table) -> Vec<u8> {
    let mut encoder = Encoder::new(meta, peers, table);
    while !encoder.step(table) {}
    assert_eq!(encoder.counts().1, 0, "what was read has room");
    let mut bytes = encoder.finish();
    seal(&mut bytes);
    bytes
}

fuzz_target!(|input: &[u8]| {
    drop(open(input.to_vec()));
    let Ok(saved) = open(sealed(input)) else { return };
    let (meta, peers) = (saved.meta.clone(), encode_peers(&saved.peers));
    let mut table = Table::default();
    saved.restore(&mut table, &SOURCES);
    let first = written(&meta, &peers, &table);
    let Ok(saved) = open(first.clone()) else { panic!("what was written cannot be read") };
    let mut again = Table::default();
    saved.restore(&mut again, &SOURCES);
    let second = written(&meta, &peers, &again);
    // Records stand in the order of their first object, which a second reading keeps.
    assert_eq!(first.len(), second.len());
    for source in SOURCES {
        assert_eq!(table.objects(source), again.objects(source));
    }
    let services = |table: &Table| table.services().cloned().collect::<Vec<_>>();
    assert_eq!(services(&table), services(&again));
});
