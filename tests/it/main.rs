//! One integration binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cli;
mod config;
mod dns;
mod dns_allocations;
mod dns_api;
mod dns_cases;
mod dns_feed;
mod dns_fixture;
mod dns_mutations;
mod dns_tcp;
mod dns_world;
#[allow(dead_code, unreachable_pub)]
#[path = "../sim/heap.rs"]
mod heap;
mod json;
mod kube_cases;
mod kube_meta;
mod kube_recorded;
mod kube_rest;
mod kube_streams;
mod kube_wire;
mod kube_world;
mod layout;
mod licences;
mod manifests;
mod nft;
mod proxy;
mod proxy_pump;
mod rules;
mod snapshot;
mod snapshot_kill;
mod snapshot_run;
