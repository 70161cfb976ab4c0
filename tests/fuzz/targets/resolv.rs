//! resolv.conf and hosts files: no panic, and no server that the text does not name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use weft::dns::upstreams::{OPENWRT, RESOLVED, behind_stubs, hosts, servers};

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let found = servers(text, |name| name.bytes().next().map(u32::from));
    assert!(found.len() <= text.lines().count() && found.iter().all(|s| s.port() == 53));
    let read = |path: &Path| match path.to_str() {
        Some("/etc/resolv.conf") => Some(found.clone()),
        Some(RESOLVED) => Some(vec![([192, 0, 2, 1], 53).into()]),
        Some(OPENWRT) => Some(Vec::new()),
        _ => None,
    };
    let behind = behind_stubs(Path::new("/etc/resolv.conf"), read);
    assert!(
        behind.len() <= found.len() && behind.iter().all(|s| found.contains(s) || s.ip().to_string() == "192.0.2.1")
    );
    if let Some(name) = text.split_ascii_whitespace().nth(1) {
        assert!(hosts(text, name).len() <= text.lines().count());
    }
});
