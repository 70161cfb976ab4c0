//! A thousand writes of the snapshot, by processes that are killed in the middle of them.

use crate::cli::temp_dir;
use futures_lite::future::block_on;
use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};
use weft::{
    disk,
    table::{
        Table,
        model::{Change, NodeInfo, Object, Source},
        snapshot::{Encoder, Meta, Saved, encode_peers, open, seal},
    },
};

const WRITES: u64 = 1_000;
/// Where the child writes, and with which number it begins.
const FILE: &str = "WEFT_TEST_SNAPSHOT";
const FIRST: &str = "WEFT_TEST_FIRST";

/// Number `n` stands in the time, and in as many nodes as make the length differ from write to write.
fn snapshot(n: u64) -> Vec<u8> {
    let mut table = Table::default();
    for node in 0..200 + n % 97 {
        let name = format!("node-{node}-of-{n}").into();
        let addresses = vec![Ipv4Addr::from_bits(node as u32).into()];
        table.apply(Change::Apply(Source::Api, Object::Node(NodeInfo { name, addresses, zone: None })));
    }
    let meta = Meta { unix: n, node: "edge-1".into(), cluster: None };
    let mut encoder = Encoder::new(&meta, &encode_peers(&[]), &table);
    while !encoder.step(&table) {}
    encoder.finish()
}

/// Not a test of its own: the process that [`writes_that_are_killed_leave_a_whole_file`] kills.
#[test]
fn the_writer_that_is_killed() {
    let (Some(file), Ok(first)) = (env::var_os(FILE), env::var(FIRST)) else { return };
    let writer = disk::Writer::start(file.into(), seal).unwrap();
    for n in first.parse().unwrap().. {
        block_on(writer.write(snapshot(n))).unwrap().unwrap();
    }
}

fn saved(file: &Path) -> Option<Saved> {
    let bytes = disk::read(file, 32 << 20).unwrap()?;
    Some(open(bytes).unwrap_or_else(|e| panic!("a file that cannot be read: {e:?}")))
}

#[test]
fn writes_that_are_killed_leave_a_whole_file() {
    let dir = temp_dir();
    let file = dir.path().join("snapshot");
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut written, mut halves) = (0, 0);
    while written < WRITES {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "snapshot_kill::the_writer_that_is_killed", "--nocapture"])
            .env(FILE, &file)
            .env(FIRST, (written + 1).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // "running 1 test": from here on it takes as long as it takes.
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        std::thread::sleep(Duration::from_micros(rng.u64(..60_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        halves += u32::from(file.with_extension("new").exists());
        let Some(saved) = saved(&file) else { continue };
        let n = saved.meta.unix;
        assert!(n >= written, "seed {seed}: number {n} after {written}");
        let mut table = Table::default();
        assert_eq!(saved.restore(&mut table, &[Source::Api]) as u64, 200 + n % 97, "seed {seed}");
        assert!(table.node(&format!("node-7-of-{n}")).is_some(), "seed {seed}: {n}");
        written = n;
    }
    assert!(halves > 0, "seed {seed}: none was killed in the middle of a write, which shows little");
    drop(fs::remove_file(file));
}
