//! weft: the network of a Kubernetes edge cluster in one small static executable.
//!
//! # Architecture
//!
//! One process, one thread, one event loop. **A file inside a folder under `src/` never does IO; only
//! files at the top of `src/` may.** The folders hold pure cores: `now`, randomness and bytes come in,
//! bytes and events come out. The files at the top drive them. `reactor` is the loop, `sockets` are the descriptors in it;
//! it is our own, since async-io's takes turns with a thread of its own at epoll(7), each turn a futex and two switches.
//!
//! ```text
//!  [[service]] ─┐                       ┌─► dns    ── answers, or asks the upstreams
//!  manifests  ──┼─► Change ─► Table ────┼─► rules  ── iptables-restore, weft0, routes
//!  API        ──┤   (one writer, bell)  ├─► proxy  ── accept ─► route ─► pump ─► endpoint
//!  snapshot   ──┘                       └─► snapshot  ▲           │      (its own thread writes)
//!                        served ───────────────┘                  ▼
//!                                     tunnel ◄──── streams ── TunnelStream
//!                                       │ nQUIC over a virtual address per peer
//!                                       └─► one UDP socket: QUIC, disco, relay data and control, LAN beacons
//! ```
//!
//! # The balancer
//!
//! `table::balance` picks an endpoint: it takes the nearest that serve, as hints and the Service's policies have it,
//! and of those one by the policy; whom the tunnel finds on our LANs (`tunnel::lan`) is as near as our zone.
//! `table::balance::state` is what it remembers between connections, one for all proxies; `table::rule` says which
//! DestinationRule is a Service's. `lease` is a connection that an endpoint has, `first` looks at the bytes that a
//! client sends before it has one. A hash goes to the endpoint with the highest weight (rendezvous): there is no ring
//! to keep, and one that goes moves no keys but its own. While no API server says how endpoints are
//! `table::balance::probe` says which of this node's is to be tried, and `probe` tries it.
//!
//! # The Kubernetes client
//!
//! `api` drives one `kube::watcher::Watcher` for each resource (and namespace): bytes go in, requests and timers come
//! out, and what the bytes say goes through `kube::store` straight into the table, item by item. `kube::http` frames
//! answers, `kube::json` cuts objects out of them, `kube::known` tells metaServer's own store from the cloud behind it,
//! `kube::access` is what a kubeconfig says. `conn` is a connection, `credentials` reads files that others rotate.
//!
//! Where this differs from the first design: a list is swept by what it named, and not by generations, for each resource
//! lists by itself; rustls is driven by hand, as it is without IO itself; TLS 1.3 alone is spoken; bodies are never
//! compressed. After a connection that broke the server's version is looked at (one object), for one that was restored
//! from a backup answers a watch from its lost future with silence.
//!
//! # The life of an agent
//!
//! `app` wires the parts. `reload` begins those anew that another configuration concerns (`app::plan` says which): the new
//! one is in the kernel's rules before the old one goes, and ends when its last connection has. `notify` speaks with the
//! service manager, `health` with who asks by HTTP whether all is well (`admin::health` says). `check` is what `weft check`
//! says, `trial` what it tries; `setup` edits the files of the host's resolver.
//!
//! # The tunnel
//!
//! `tunnel::node::Node` is the root of everything below `src/tunnel/`. quinn-proto sees one virtual address
//! for each connection (`slot`); the path below it is a relay's flow or an address of the peer (`path`), and
//! `punch` decides which: data begins on the relay at once, and moves when a PONG has proven a better one of the
//! `candidates`. Where they come from: `survey` (the kernel's lists, by `links`), the relays' PONGs, `portmap` (the
//! gateway), `predict` (a NAT that counts). A way is a pair of addresses where there are several `uplinks`.
//! `gate` lets no long header through to quinn that was not sealed for our key and psk; `noise` is the
//! handshake, `cid` the connection IDs that name a slot, `home` our registrations at relays, `carry` what
//! they carry for us, `relay` the relay itself, `lan` the beacons, `recall` what the snapshot remembers of peers.
//! `connect` begins connections, of others only as far as `admit` finds them worth public-key work; `windows` gives
//! each what its path needs out of one budget, `congestion` picks BBR or Cubic by the path and bounds the former.
//!
//! A session of UDP is a stream: `datagrams` that fit into one packet go beside it, and each `large` one by a stream of its
//! own, at whose end `gather` has put it together. Within 5 s it is whole, or given up.
//!
//! A node registers at every relay of its list and tells each where it is to be found. Two of them carry its data:
//! the nearest, and one that stands by, through which there is a flow to each live peer beside the first. A relay
//! that says nothing for a second after a question is avoided; its registration is asked after until it answers, or
//! says that it was restarted. Whoever is at none of our relays is found by its entry, at its own.
//!
//! Where UDP is dead `carrier` takes the datagrams for a relay by TCP instead: `detour` opens such connections at a node,
//! `reception` takes them at a relay, to which such a node is one more address. The tunnel itself knows no difference.
//!
//! Where this differs from the first design: no datagram of UDP is cut into fragments, since a stream of its own costs two
//! or three packets no more and none is lost for one of them; relay data carries no counter (13 bytes have no room for one;
//! the tag covers length and first 16 bytes, which no two QUIC packets share), and what STUN would tell, the
//! relay's sealed PONG tells. A node's entry is not signed, since its key is one for key agreement: who leaves it
//! has registered under that key, and a relay that lies of it gains no more than by its silence.

pub mod admin;
pub mod api;
pub mod app;
pub mod backoff;
pub mod ca;
pub mod carrier;
pub mod check;
pub mod cli;
pub mod clock;
pub mod config;
mod conn;
pub mod conntrack;
mod credentials;
pub mod detour;
pub mod disk;
pub mod dns;
mod ears;
pub mod encoding;
pub mod exec;
mod first;
pub mod health;
pub mod holder;
pub mod iptables;
pub mod kube;
mod lease;
pub mod links;
pub mod log;
pub mod metrics;
pub mod netlink;
pub mod nft;
pub mod notify;
pub mod portmap;
mod probe;
pub mod proxy;
pub mod pump;
pub mod reactor;
pub mod reception;
mod reload;
pub mod resolver;
pub mod rules;
mod served;
pub mod setup;
pub mod shared;
pub mod snapshot;
pub mod sockets;
pub mod sorted;
pub mod streamed;
pub mod sys;
pub mod table;
pub mod tasks;
pub mod tcp;
pub mod trial;
pub mod tunnel;
pub mod udp;
pub mod uplinks;

/// Seeds of a test; a tenth of them where it runs under emulation, as cross/gate lets it.
#[cfg(test)]
fn seeds(count: u64) -> std::ops::Range<u64> {
    0..if cfg!(target_arch = "x86_64") { count } else { count.div_ceil(10) }
}
