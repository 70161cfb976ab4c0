//! What the executable is made of: each crate's licence, where it comes from, and that no crate is there twice without
//! a reason. config/deny.toml says the same to cargo-deny.
#![allow(clippy::question_mark, reason = "what the derive writes")]

use nanoserde::DeJson;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};
use toml::de::{DeTable, DeValue};

/// Permissive, and none asks for more than its text. GPL and MPL stay out: the executable is linked statically.
const ALLOWED: [&str; 11] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Unicode-3.0",
    "Zlib",
    "0BSD",
    "CC0-1.0",
    "Unlicense",
];
/// Little and big endian, 64 and 32 bit: what they need besides the others is in here.
const TARGETS: [&str; 4] = [
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-musl",
    "armv7-unknown-linux-musleabihf",
    "mips-unknown-linux-musl",
];
/// Crates that may be there in several versions, and why. Each has to be removed again with its reason.
const DOUBLES: [(&str, &str); 4] = [
    ("chacha20", "0.9 of chacha20poly1305; 0.10 of rand, which quinn-proto takes its random numbers from"),
    ("cpufeatures", "0.2 of the ciphers and sha2; 0.3 of chacha20 0.10"),
    ("getrandom", "0.2 of ring, 0.3 of snow, 0.4 of rand; a few hundred bytes each"),
    ("syn", "2 and 3, of the derive macros: in no executable"),
];

#[derive(DeJson)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(DeJson)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

#[derive(DeJson)]
struct Resolve {
    nodes: Vec<Node>,
    root: Option<String>,
}

#[derive(DeJson)]
struct Node {
    id: String,
    deps: Vec<Dep>,
}

#[derive(DeJson)]
struct Dep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}

#[derive(DeJson)]
struct DepKind {
    kind: Option<String>,
}

/// Package ids that `root` needs to run or to be built, itself not included.
fn reached(resolve: &Resolve) -> BTreeSet<String> {
    let nodes: BTreeMap<&str, &Node> = resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let root = resolve.root.as_deref().unwrap();
    let (mut found, mut todo) = (BTreeSet::new(), vec![root]);
    while let Some(id) = todo.pop() {
        for dep in &nodes[id].deps {
            let needed = dep.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"));
            if needed && found.insert(dep.pkg.clone()) {
                todo.push(&dep.pkg);
            }
        }
    }
    found
}

/// What goes into the executable on any of the targets.
fn packages() -> Vec<Package> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut found: BTreeMap<String, Package> = BTreeMap::new();
    for target in TARGETS {
        let out = Command::new(&cargo)
            .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", target])
            .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
            .output()
            .unwrap();
        assert!(out.status.success(), "{target}: {}", String::from_utf8_lossy(&out.stderr));
        let metadata: Metadata = DeJson::deserialize_json(std::str::from_utf8(&out.stdout).unwrap()).unwrap();
        let reached = reached(&metadata.resolve);
        found.extend(
            metadata
                .packages
                .into_iter()
                .filter(|p| reached.contains(&p.id))
                .map(|package| (package.id.clone(), package)),
        );
    }
    found.into_values().collect()
}

/// Whether a SPDX expression can be met with what is allowed: of an OR one side, of an AND both.
fn met(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words: Vec<&str> = spaced.split_whitespace().rev().collect();
    either(&mut words) && words.is_empty()
}

fn either(words: &mut Vec<&str>) -> bool {
    let mut met = both(words);
    while words.last() == Some(&"OR") {
        words.pop();
        met |= both(words);
    }
    met
}

fn both(words: &mut Vec<&str>) -> bool {
    let mut met = one(words);
    while words.last() == Some(&"AND") {
        words.pop();
        met &= one(words);
    }
    met
}

fn one(words: &mut Vec<&str>) -> bool {
    match words.pop() {
        Some("(") => either(words) && words.pop() == Some(")"),
        Some(licence) if words.last() == Some(&"WITH") => {
            words.pop();
            let licence = format!("{licence} WITH {}", words.pop().unwrap_or_default());
            ALLOWED.contains(&licence.as_str())
        }
        Some(licence) => ALLOWED.contains(&licence),
        None => false,
    }
}

#[test]
fn each_crate_is_from_the_index_and_under_an_allowed_licence() {
    let packages = packages();
    assert!(packages.len() > 50, "only {} crates", packages.len());
    for Package { name, version, license, source, .. } in packages {
        let license = license.unwrap_or_default();
        assert!(met(&license), "{name} {version}: {license:?} is not allowed");
        let source = source.unwrap_or_default();
        assert!(source.starts_with("registry+") && source.ends_with("crates.io-index"), "{name} {version}: {source:?}");
    }
}

#[test]
fn no_crate_is_there_twice_without_a_reason() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in packages() {
        versions.entry(package.name).or_default().insert(package.version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    let allowed: BTreeSet<&str> = DOUBLES.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<&str> = versions.keys().map(String::as_str).collect();
    assert_eq!(found, allowed, "{versions:?}");
}

/// The two lists are one.
#[test]
fn cargo_deny_is_told_the_same() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/deny.toml")).unwrap();
    let deny = DeTable::parse(&text).unwrap().into_inner();
    let strings = |value: &DeValue<'_>, key: Option<&str>| -> BTreeSet<String> {
        let items = value.as_array().unwrap().iter();
        items.map(|item| key.map_or(item, |key| &item.get_ref()[key]).get_ref().as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(strings(deny["licenses"].get_ref()["allow"].get_ref(), None), ALLOWED.map(str::to_owned).into());
    assert_eq!(
        strings(deny["bans"].get_ref()["skip"].get_ref(), Some("crate")),
        DOUBLES.map(|(name, _)| name.to_owned()).into()
    );
}

#[test]
fn expressions_are_read_as_spdx_says() {
    for good in [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-2.0 OR MIT",
        "(MIT OR Apache-2.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception OR GPL-3.0-only",
        "GPL-3.0-only AND MIT OR ISC",
    ] {
        assert!(met(good), "{good}");
    }
    for bad in ["", "GPL-3.0-only", "MIT AND GPL-2.0", "MIT WITH Some-exception", "(MIT", "MIT ISC", "OR"] {
        assert!(!met(bad), "{bad}");
    }
}
