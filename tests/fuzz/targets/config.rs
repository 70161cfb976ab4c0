//! Configurations: any text is read or refused, and a refusal names a place that is in the text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft::config::Config;

fuzz_target!(|text: &str| {
    match Config::parse(text) {
        Ok(config) => drop(format!("{config:?}")),
        Err(error) => {
            let said = error.to_string();
            assert!(!said.trim().is_empty());
            assert!(error.line <= text.lines().count() + 1, "{said}");
        }
    }
});
