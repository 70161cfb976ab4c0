//! A stranger's datagrams at the tunnel's port: of node and relay, whatever comes, not one byte goes back.
#![no_main]

#[path = "../world.rs"]
mod world;

use libfuzzer_sys::fuzz_target;
use std::{cell::OnceCell, time::Duration};
use weft::tunnel::node::Output;
use world::{Cluster, RELAY, STRANGER};

thread_local!(static CLUSTER: OnceCell<Cluster> = const { OnceCell::new() });

fuzz_target!(|input: &[u8]| {
    CLUSTER.with(|cluster| {
        let cluster = cluster.get_or_init(Cluster::default);
        for mut node in [cluster.node(Vec::new()), cluster.relay()] {
            let (mut now, mut buf) = (world::start(), Vec::new());
            // length, bytes; length, bytes; …
            let mut rest = input;
            while let Some((length, tail)) = rest.split_first() {
                let (datagram, tail) = tail.split_at(tail.len().min(usize::from(*length) * 6));
                rest = tail;
                let mut batch = datagram.to_vec();
                node.handle_datagrams(now, STRANGER, &mut batch, datagram.len().max(1));
                // The same once more from an address that a relay could have, in pieces.
                let mut batch = datagram.to_vec();
                node.handle_datagrams(now, RELAY, &mut batch, 1 + usize::from(*length));
                now += Duration::from_millis(u64::from(*length));
                node.handle_tick(now);
                for turn in 0.. {
                    assert!(turn < 1000, "it does not come to rest");
                    match node.poll_output(now, &mut buf) {
                        Output::Send { to, .. } => panic!("{} bytes to {to}: {buf:02x?}", buf.len()),
                        Output::Beacon | Output::Event(_) => {}
                        Output::Wait(_) => break,
                    }
                }
            }
        }
    });
});
