//! Kubeconfigs: whatever is in one gives an error or an access without a secret in its Debug.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use weft::kube::{
    access::{Access, Secret, Token},
    yaml::Yaml,
};

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let _ = Yaml::parse(text);
    if let Ok(access) = Access::from_kubeconfig(text, Path::new("/etc")) {
        assert!(!access.servers.is_empty() && access.check().is_ok());
        if let Token::Inline(Secret(token)) = &access.token {
            assert!(token.bytes().all(|b| b.is_ascii_graphic()) && !token.is_empty());
        }
    }
});
