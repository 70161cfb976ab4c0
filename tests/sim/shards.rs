//! Many seeds on all cores; the first that fails is named, with the command that runs it alone.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

/// Failures that are told one by one.
const TOLD_MAX: usize = 20;

/// Runs `one` for each seed.
///
/// # Panics
/// When it fails for any.
pub fn run(command: &str, seeds: Range<u64>, one: fn(u64) -> Result<(), String>) {
    let (start, count) = (Instant::now(), seeds.end - seeds.start);
    let next = AtomicU64::new(seeds.start);
    let failures = Mutex::new(Vec::new());
    let alone = count == 1;
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let result = if alone { Ok(one(seed)) } else { catch_unwind(AssertUnwindSafe(|| one(seed))) };
            let why = match result {
                Ok(Ok(())) => continue,
                Ok(Err(why)) => why,
                Err(_) => "it panicked".into(),
            };
            failures.lock().unwrap().push((seed, why));
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from).min(count as usize);
    thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    eprintln!(
        "{count} seeds, {} failed, {:.1} s on {cores} cores",
        failures.len(),
        (Instant::now() - start).as_secs_f64()
    );
    for (seed, why) in failures.iter().take(TOLD_MAX) {
        eprintln!("seed {seed}: {why}\n  alone: WEFT_SEED={seed} WEFT_LOG=info {command}");
    }
    assert!(failures.is_empty(), "{} of {count} seeds failed; the first is {}", failures.len(), failures[0].0);
}
