//! One integration binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dns;
mod dns_cases;
mod dns_world;
mod json;
