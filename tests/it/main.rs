//! One integration binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cli;
mod config;
mod dns;
mod dns_cases;
mod dns_feed;
mod dns_fixture;
mod dns_mutations;
mod dns_tcp;
mod dns_world;
mod json;
mod layout;
mod licences;
mod manifests;
mod nft;
mod proxy;
mod proxy_pump;
mod snapshot;
mod snapshot_run;
