//! Virtual time, a seeded network, no sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, unreachable_pub)]

mod direct;
mod line;
mod many;
mod nat;
mod pair;
mod rates;
mod recall;
mod relayed;
mod relays;
mod strangers;
mod uplinks;
mod world;

/// The log of a single run, with WEFT_LOG set: `WEFT_SEED=7 WEFT_LOG=1 cargo test --test sim NAME -- --nocapture`.
pub fn log_to_stderr() {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            eprintln!("{:5} {}: {}", record.level(), record.target(), record.args());
        }
        fn flush(&self) {}
    }
    if std::env::var_os("WEFT_LOG").is_some() {
        let _ = log::set_logger(&Stderr);
        log::set_max_level(log::LevelFilter::Debug);
    }
}
