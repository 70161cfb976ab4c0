//! weft: the network of a Kubernetes edge cluster in one small static executable.
//!
//! # Architecture
//!
//! One process, one thread, one event loop. **A file inside a folder under `src/` never does IO; only
//! files at the top of `src/` may.** The folders hold pure cores: `now`, randomness and bytes come in,
//! bytes and events come out. The files at the top drive them.
//!
//! ```text
//!  [[service]] ─┐                       ┌─► dns    ── answers, or asks the upstreams
//!  manifests  ──┼─► Change ─► Table ────┼─► rules  ── iptables-restore, weft0, routes
//!  (API later) ─┤   (one writer, bell)  ├─► proxy  ── accept ─► route ─► pump ─► endpoint
//!  snapshot   ──┘                       └─► snapshot  ▲           │      (its own thread writes)
//!                        serve_remote ─────────┘                  ▼
//!                                     tunnel ◄──── streams ── TunnelStream
//!                                       │ nQUIC over a virtual address per peer
//!                                       └─► one UDP socket: QUIC, relay data, relay control, STUN
//! ```

pub mod admin;
pub mod app;
pub mod backoff;
pub mod ca;
pub mod cli;
pub mod clock;
pub mod config;
pub mod disk;
pub mod dns;
pub mod exec;
pub mod kube;
pub mod log;
pub mod metrics;
pub mod netlink;
pub mod proxy;
pub mod pump;
pub mod resolver;
pub mod rules;
pub mod shared;
pub mod snapshot;
pub mod sys;
pub mod table;
pub mod tasks;
pub mod tunnel;
