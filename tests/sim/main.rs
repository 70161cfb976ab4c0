//! Virtual time, a seeded network, no sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod relayed;
mod world;
