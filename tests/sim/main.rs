//! Virtual time, a seeded network, no sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, unreachable_pub)]

use std::{cell::Cell, time::Duration};

mod datagrams;
mod direct;
mod faults;
mod heap;
mod large;
mod line;
mod many;
mod mended;
mod nat;
mod pair;
mod rates;
mod recall;
mod relayed;
mod relays;
mod scenario;
mod shards;
mod soak;
mod strangers;
mod traffic;
mod uplinks;
mod world;

thread_local! {
    /// Whose turn it is, and when, for the log.
    static TURN: Cell<(usize, Duration)> = const { Cell::new((usize::MAX, Duration::ZERO)) };
}

/// What is logged from now on is of this host; None: of the test.
pub fn turn(host: Option<usize>, at: Duration) {
    TURN.set((host.unwrap_or(usize::MAX), at));
}

/// The log of a single run, with WEFT_LOG set: `WEFT_SEED=7 WEFT_LOG=debug cargo test --test sim NAME -- --nocapture`;
/// `trace` shows every datagram that arrives, too.
pub fn log_to_stderr() {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            let (host, at) = TURN.get();
            let who = if host == usize::MAX { "--".to_owned() } else { format!("#{host}") };
            eprintln!("{:9.3} {who} {:5} {}: {}", at.as_secs_f64(), record.level(), record.target(), record.args());
        }
        fn flush(&self) {}
    }
    if let Ok(level) = std::env::var("WEFT_LOG") {
        let _ = log::set_logger(&Stderr);
        log::set_max_level(level.parse().unwrap_or(log::LevelFilter::Debug));
    }
}
