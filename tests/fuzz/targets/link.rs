//! A node and its relay over a link that the input spoils: altered, dropped, repeated and held back datagrams. Once the
//! link is good again the node is registered.
#![no_main]

#[path = "../world.rs"]
mod world;

use libfuzzer_sys::fuzz_target;
use std::{
    cell::OnceCell,
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};
use weft::tunnel::node::{Node, Output};
use world::{Cluster, NODE, RELAY};

thread_local!(static CLUSTER: OnceCell<Cluster> = const { OnceCell::new() });

/// In virtual time: a lost handshake is begun anew with a growing pause.
const PATIENCE: Duration = Duration::from_secs(240);
/// Datagrams on the link at once, far more than a handshake has.
const FLYING_MAX: usize = 512;

struct Link<'i> {
    now: Instant,
    ends: [(SocketAddr, Node); 2],
    flying: VecDeque<(usize, Vec<u8>)>,
    spoil: &'i [u8],
}

impl Link<'_> {
    fn byte(&mut self) -> Option<usize> {
        let (byte, rest) = self.spoil.split_first()?;
        self.spoil = rest;
        Some((*byte).into())
    }

    fn drain(&mut self) -> Option<Instant> {
        let (mut wake, mut buf) = (None, Vec::new());
        for at in 0..2 {
            for turn in 0.. {
                assert!(turn < 5000, "it does not come to rest");
                match self.ends[at].1.poll_output(self.now, &mut buf) {
                    Output::Send { to, segment, .. } if to == self.ends[1 - at].0 => {
                        self.flying.extend(buf.chunks(segment.unwrap_or(buf.len())).map(|d| (1 - at, d.to_vec())));
                    }
                    Output::Send { .. } | Output::Beacon | Output::Event(_) => {}
                    Output::Wait(at) => {
                        wake = wake.into_iter().chain(at).min();
                        break;
                    }
                }
            }
        }
        assert!(self.flying.len() <= FLYING_MAX, "{} datagrams at once", self.flying.len());
        wake
    }

    fn deliver(&mut self, to: usize, mut datagram: Vec<u8>) {
        let (from, length) = (self.ends[1 - to].0, datagram.len());
        self.ends[to].1.handle_datagrams(self.now, from, &mut datagram, length.max(1));
    }

    fn step(&mut self, wake: Option<Instant>) {
        let Some((to, mut datagram)) = self.flying.pop_front() else {
            self.now = wake.unwrap_or(self.now).max(self.now + Duration::from_millis(1));
            self.ends.iter_mut().for_each(|(_, node)| node.handle_tick(self.now));
            return;
        };
        self.now += Duration::from_millis(1);
        match self.byte() {
            None | Some(0..=63) => self.deliver(to, datagram),
            Some(64..=95) => {}
            Some(96..=127) => {
                self.deliver(to, datagram.clone());
                self.deliver(to, datagram);
            }
            Some(128..=159) => self.flying.push_back((to, datagram)),
            Some(160..=191) => {
                datagram.truncate(self.byte().unwrap_or(0) * 6);
                self.deliver(to, datagram);
            }
            Some(192..=223) => {
                let at = (self.byte().unwrap_or(0) << 3) + self.byte().unwrap_or(0) % 8;
                let value = self.byte().unwrap_or(1) as u8;
                if let Some(byte) = datagram.get_mut(at) {
                    *byte ^= value;
                }
                self.deliver(to, datagram);
            }
            Some(_) => {
                // Bytes of the input itself, with the other end's address.
                let length = self.byte().unwrap_or(0).min(self.spoil.len());
                let (forged, rest) = self.spoil.split_at(length);
                self.spoil = rest;
                self.deliver(to, forged.to_vec());
                self.deliver(to, datagram);
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    CLUSTER.with(|cluster| {
        let cluster = cluster.get_or_init(Cluster::default);
        let now = world::start();
        let ends = [(NODE, cluster.node(vec![cluster.relay_spec()])), (RELAY, cluster.relay())];
        let mut link = Link { now, ends, flying: VecDeque::new(), spoil: input };
        let mut until = now + PATIENCE;
        loop {
            let wake = link.drain();
            if !link.spoil.is_empty() {
                until = link.now + PATIENCE;
            } else if link.ends[0].1.relay_views()[0].registered {
                break;
            }
            assert!(link.now < until, "not registered: {:?}", link.ends[0].1.relay_views());
            link.step(wake);
        }
    });
});
