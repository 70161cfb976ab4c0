//! The log: lines to stderr, bounded so that neither an attacker nor a flapping link fills a flash disk.

use crate::sorted::Map;
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::{
    fmt::Write as _,
    io::Write as _,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// Lines that one place in the source may write at once…
const BURST: u32 = 20;
/// …and how soon after that it may write another. At 100 bytes a line: under 1 MB a day from each place.
const REFILL: Duration = Duration::from_secs(10);
/// Places that are told apart; the others share one allowance.
const PLACES_MAX: usize = 512;
/// Longer lines are cut.
const LINE_MAX: usize = 1_024;

/// Starts the log, once in a process.
pub fn start(level: LevelFilter) {
    let logger =
        LOGGER.get_or_init(|| Logger { start: Instant::now(), journal: is_journal(), places: Mutex::default() });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

/// What `--log` or `WEFT_LOG` says, in this order; else nothing.
///
/// # Errors
/// A text that names no level.
pub fn level_asked(flag: Option<&str>) -> Result<Option<LevelFilter>, String> {
    let (from, text) = match (flag, std::env::var("WEFT_LOG")) {
        (Some(flag), _) => ("--log", flag.to_owned()),
        (None, Ok(var)) if !var.is_empty() => ("WEFT_LOG", var),
        (None, Ok(_) | Err(_)) => return Ok(None),
    };
    let level = text.parse().ok().filter(|l| *l != LevelFilter::Off);
    level.map(Some).ok_or_else(|| format!("{from} {text:?}: expected error, warn, info, debug or trace"))
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

struct Logger {
    start: Instant,
    /// Whether stderr goes to the journal, which has a time of its own and takes `<N>` for the level.
    journal: bool,
    places: Mutex<Places>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = Instant::now().saturating_duration_since(self.start);
        // Who asks for debug lines wants them all.
        let hidden = if record.level() > Level::Info {
            0
        } else {
            let place = (record.module_path_static().unwrap_or_default(), record.line().unwrap_or_default());
            match self.places.lock().unwrap_or_else(PoisonError::into_inner).admit(place, now) {
                Some(hidden) => hidden,
                None => return,
            }
        };
        let mut line = line(self.journal, now, record.level(), record.target(), record.args());
        if hidden > 0 {
            let _ = write!(line, " (and {hidden} like it, not shown)");
        }
        line.push('\n');
        // One write, so that lines of several processes do not mix; nowhere is left to report a failure to.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

fn line(journal: bool, now: Duration, level: Level, target: &str, message: &std::fmt::Arguments<'_>) -> String {
    let mut line = String::with_capacity(128);
    let target = target.strip_prefix("weft::").unwrap_or(target);
    let _ = if journal {
        // sd-daemon(3): the levels of syslog.
        let priority = match level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        write!(line, "<{priority}>{target}: ")
    } else {
        write!(line, "{:>9.3} {level:<5} {target}: ", now.as_secs_f64())
    };
    let message = message.to_string();
    // A peer's text must not be able to write lines of its own, or to a terminal.
    for c in message.chars() {
        if line.len() > LINE_MAX {
            line.push('…');
            break;
        }
        if c.is_control() {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// systemd.exec(5): `JOURNAL_STREAM` is the device and inode of the journal's socket.
fn is_journal() -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(stderr) = std::fs::metadata("/dev/stderr") else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|s| s == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// A place in the source: module and line.
type Place = (&'static str, u32);

#[derive(Debug, Default)]
struct Places(Map<Place, Allowance>);

#[derive(Debug)]
struct Allowance {
    left: u32,
    /// Since when `left` has been filling up.
    since: Duration,
    hidden: u64,
}

impl Places {
    /// How many lines were held back before this one; None: hold this one back too.
    fn admit(&mut self, place: Place, now: Duration) -> Option<u64> {
        let place = if self.0.len() < PLACES_MAX || self.0.contains_key(&place) { place } else { ("", 0) };
        let a = self.0.or_insert_with(place, || Allowance { left: BURST, since: now, hidden: 0 });
        let refilled = u32::try_from(now.saturating_sub(a.since).as_secs() / REFILL.as_secs()).unwrap_or(BURST);
        if a.left.saturating_add(refilled) >= BURST {
            (a.left, a.since) = (BURST, now);
        } else {
            (a.left, a.since) = (a.left + refilled, a.since + REFILL * refilled);
        }
        match a.left.checked_sub(1) {
            Some(left) => {
                a.left = left;
                Some(std::mem::take(&mut a.hidden))
            }
            None => {
                a.hidden += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line() {
        let now = Duration::from_millis(12_345);
        let made = |journal| line(journal, now, Level::Warn, "weft::tunnel", &format_args!("a\nb\u{1b}[31m"));
        assert_eq!(made(false), "   12.345 WARN  tunnel: a\\nb\\u{1b}[31m");
        assert_eq!(made(true), "<4>tunnel: a\\nb\\u{1b}[31m");
        let long = line(false, now, Level::Info, "x", &format_args!("{}", "é".repeat(5_000)));
        assert!(long.len() <= LINE_MAX + 8 && long.ends_with('…'), "{}", long.len());
    }

    #[test]
    fn a_flood_is_held_back_and_counted() {
        let mut places = Places::default();
        let mut shown = Vec::new();
        // Ten a second for a quarter of an hour.
        for tenth in 0..9_000 {
            if let Some(hidden) = places.admit(("flood", 1), Duration::from_millis(tenth * 100)) {
                shown.push(hidden);
            }
        }
        assert_eq!(shown.len(), BURST as usize + 89);
        assert_eq!(shown[BURST as usize..], [vec![80], vec![99; 88]].concat());
        // Another place is not concerned, and after a rest all is as before.
        assert_eq!(places.admit(("other", 1), Duration::from_secs(900)), Some(0));
        let rested = Duration::from_secs(900) + REFILL * BURST;
        assert_eq!(places.admit(("flood", 1), rested), Some(99));
        assert_eq!(places.admit(("flood", 1), rested), Some(0));
    }

    #[test]
    fn places_are_bounded() {
        let mut places = Places::default();
        let admitted = (0..5_000).filter(|n| places.admit(("many", *n), Duration::ZERO).is_some()).count();
        assert_eq!(admitted, PLACES_MAX + BURST as usize);
        assert!(places.0.len() <= PLACES_MAX + 1);
    }
}
