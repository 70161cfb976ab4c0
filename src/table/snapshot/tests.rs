mod world;

use super::*;
use crate::{
    table::{Table, model::*},
    tunnel::Remembered,
};
use std::net::{IpAddr, Ipv6Addr};
use world::World;

fn meta() -> Meta {
    Meta { unix: 1_800_000_000, node: "edge-1".into(), cluster: Some([7; 32]) }
}

fn encode(meta: &Meta, peers: &[Remembered], table: &Table) -> Vec<u8> {
    let mut encoder = Encoder::new(meta, &encode_peers(peers), table);
    while !encoder.step(table) {}
    let mut out = encoder.finish();
    seal(&mut out);
    out
}

fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    seal(&mut bytes);
    bytes
}

/// Everything of a table but what the config says, in an order of its own.
fn contents(table: &Table) -> (Vec<(Source, Object)>, Vec<Source>) {
    let mut all = Vec::new();
    for record in &table.records {
        all.extend(record.services.iter().map(|e| (e.source, Object::Service(e.value.clone()))));
        all.extend(record.slices.iter().map(|e| (e.source, Object::Slice(e.value.unpack(&record.id)))));
    }
    all.extend(table.nodes.values().flatten().map(|e| (e.source, Object::Node(e.value.clone()))));
    all.extend(table.rules.versions().flatten().map(|e| (e.source, Object::Rule(e.value.clone()))));
    all.extend(table.pods.entries().map(|e| (e.source, Object::Pod(e.value.clone()))));
    all.retain(|(source, _)| *source != Source::Config);
    all.sort_by_key(|(source, object)| (*source, object.id()));
    let complete = table.lists.iter().filter(|(s, l)| **s != Source::Config && l.complete()).map(|(s, _)| *s);
    (all, complete.collect())
}

#[test]
fn random_tables_come_back_as_they_were() {
    for seed in crate::seeds(300) {
        let mut world = World(fastrand::Rng::with_seed(seed));
        let most = if seed % 50 == 0 { 2_000 } else { 40 };
        let (table, count) = (world.table(most), world.0.usize(..5));
        let peers = world.peers(count);
        let bytes = encode(&meta(), &peers, &table);
        let saved = open(bytes.clone()).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        assert_eq!((&saved.meta, &saved.peers), (&meta(), &peers), "seed {seed}");
        let mut again = Table::default();
        let restored = saved.restore(&mut again, &[Source::Manifests, Source::Api]);
        assert_eq!(contents(&again), contents(&table), "seed {seed}");
        assert_eq!(restored, saved.objects as usize);
        let mut third = Table::default();
        open(encode(&meta(), &peers, &again)).unwrap().restore(&mut third, &[Source::Manifests, Source::Api]);
        assert_eq!(contents(&third), contents(&table), "seed {seed}: written again");
    }
}

#[test]
fn only_sources_that_are_asked_for_come_back() {
    let mut world = World(fastrand::Rng::with_seed(5));
    let saved = open(encode(&meta(), &[], &world.table(60))).unwrap();
    let mut table = Table::default();
    saved.restore(&mut table, &[Source::Api]);
    assert!(table.objects(Source::Api) > 0);
    assert_eq!((table.objects(Source::Manifests), table.objects(Source::Config)), (0, 0));
}

#[test]
fn the_first_complete_list_replaces_what_was_restored_and_an_absent_name_is_known_before() {
    let node = |name: &str| Object::Node(NodeInfo { name: name.into(), addresses: Vec::new(), zone: None });
    let mut table = Table::default();
    table.apply(Change::Begin(Source::Api));
    table.apply(Change::Apply(Source::Api, node("old")));
    let partial = open(encode(&meta(), &[], &table)).unwrap();
    table.apply(Change::Complete(Source::Api));
    let saved = open(encode(&meta(), &[], &table)).unwrap();

    let mut again = Table::default();
    partial.restore(&mut again, &[Source::Api]);
    assert!(!again.synced() && again.node("old").is_some(), "what was no complete list is none now");

    let mut again = Table::default();
    again.expect(Source::Api);
    saved.restore(&mut again, &[Source::Api]);
    assert!(again.synced());
    again.apply(Change::Begin(Source::Api));
    again.apply(Change::Apply(Source::Api, node("new")));
    assert!(again.synced() && again.node("old").is_some(), "until the list is whole");
    again.apply(Change::Complete(Source::Api));
    assert!(again.node("old").is_none() && again.node("new").is_some());
}

#[test]
fn cut_files_are_refused_wherever_they_are_cut() {
    let mut world = World(fastrand::Rng::with_seed(9));
    let bytes = encode(&meta(), &world.peers(3), &world.table(8));
    for len in 0..bytes.len() {
        let why = open(bytes[..len].to_vec()).unwrap_err();
        assert!(matches!(why, Unusable::Foreign | Unusable::Length(_)), "{len}: {why:?}");
        // A writer that was wrong about what it wrote.
        if len >= HEADER {
            let why = open(resealed(bytes[..len].to_vec())).unwrap_err();
            assert!(matches!(why, Unusable::Content(_)), "{len}: {why:?}");
        }
    }
    assert_eq!(open([&bytes[..], &[0]].concat()).unwrap_err(), Unusable::Length(bytes.len()));
    assert!(matches!(open(resealed([&bytes[..], &[0]].concat())), Err(Unusable::Content(_))));
}

#[test]
fn every_flipped_bit_is_seen() {
    let mut world = World(fastrand::Rng::with_seed(11));
    let bytes = encode(&meta(), &world.peers(2), &world.table(8));
    for bit in 0..bytes.len() * 8 {
        let mut broken = bytes.clone();
        broken[bit / 8] ^= 1 << (bit % 8);
        assert!(open(broken).is_err(), "bit {bit}");
    }
}

#[test]
fn nonsense_behind_a_good_sum_is_an_error_or_a_table_and_never_a_panic() {
    let mut world = World(fastrand::Rng::with_seed(13));
    let (peers, table) = (world.peers(2), world.table(12));
    let bytes = encode(&meta(), &peers, &table);
    let mut read = 0;
    for _ in 0..5_000 {
        let mut broken = bytes.clone();
        for _ in 0..world.0.usize(1..4) {
            let at = world.0.usize(HEADER..broken.len());
            broken[at] = world.0.u8(..);
        }
        if let Ok(saved) = open(resealed(broken)) {
            saved.restore(&mut Table::default(), &[Source::Manifests, Source::Api]);
            read += 1;
        }
    }
    assert!(read > 0, "some are still well formed");
}

#[test]
fn another_version_is_named() {
    let mut bytes = encode(&meta(), &[], &Table::default());
    bytes[9] += 1;
    let why = open(bytes).unwrap_err();
    assert_eq!(why, Unusable::Version(2));
    assert!(why.to_string().contains("version 2"), "{why}");
}

#[test]
fn the_bytes_are_these_on_every_machine() {
    let mut table = Table::default();
    table.apply(Change::Apply(
        Source::Api,
        Object::Node(NodeInfo { name: "n".into(), addresses: vec![[10, 0, 0, 1].into()], zone: Some("z".into()) }),
    ));
    table.apply(Change::Complete(Source::Api));
    let meta = Meta { unix: 0x0102_0304, node: "e".into(), cluster: None };
    let bytes = encode(&meta, &[], &table);
    let body = b"\0\0\0\0\x01\x02\x03\x04\x01e\0\x02\0\0\0\0\0\x01\x03\x02\x01n\x01z\0\x01\x04\x0a\0\0\x01";
    assert_eq!(bytes[..14], *b"weftsnap\0\x01\0\0\0\x1f");
    assert_eq!(bytes[HEADER..], body[..]);
    assert_eq!(bytes[14..HEADER], 0xce1d_e514_aeb7_935d_u64.to_be_bytes());
}

#[test]
fn what_has_no_room_is_left_out_and_counted() {
    let mut world = World(fastrand::Rng::with_seed(1));
    let mut table = Table::default();
    table.apply(Change::Begin(Source::Api));
    let text = |len: usize| -> Name { "n".repeat(len).into() };
    for len in [1, 255, 256] {
        let node = NodeInfo { name: text(len), addresses: Vec::new(), zone: None };
        table.apply(Change::Apply(Source::Api, Object::Node(node)));
    }
    table.apply(Change::Complete(Source::Api));
    let peers = world.peers(PEERS_MAX + 5);
    let mut encoder = Encoder::new(&meta(), &encode_peers(&peers), &table);
    assert!(encoder.step(&table));
    assert_eq!(encoder.counts(), (2, 1));
    let saved = open(resealed(encoder.finish())).unwrap();
    assert_eq!((saved.objects, saved.peers.len()), (2, PEERS_MAX));
}

#[test]
fn a_table_beyond_the_bound_is_left_out_as_a_whole_and_then_counts_as_unknown() {
    let mut world = World(fastrand::Rng::with_seed(2));
    let mut table = Table::default();
    table.apply(Change::Begin(Source::Api));
    let addresses: Vec<IpAddr> = (0..60_000).map(|n| Ipv6Addr::from_bits(n).into()).collect();
    for n in 0..35 {
        let node = NodeInfo { name: format!("node-{n}").into(), addresses: addresses.clone(), zone: None };
        table.apply(Change::Apply(Source::Api, Object::Node(node)));
    }
    table.apply(Change::Complete(Source::Api));
    let mut encoder = Encoder::new(&meta(), &encode_peers(&world.peers(1)), &table);
    while !encoder.step(&table) {}
    assert_eq!(encoder.counts(), (0, 35));
    let saved = open(resealed(encoder.finish())).unwrap();
    assert_eq!((saved.objects, saved.peers.len(), &saved.meta), (0, 1, &meta()));
    let mut again = Table::default();
    again.expect(Source::Api);
    saved.restore(&mut again, &[Source::Api]);
    assert!(!again.synced());
}
