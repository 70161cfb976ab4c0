//! The layout law: a file inside a folder under src/ never does IO; unsafe is in src/sys.rs; files stay small; what
//! lies where.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// No file is longer; the aim is half of it.
const LINES_MAX: usize = 600;
/// Of the files under src/.
const MEDIAN_MAX: usize = 240;
/// What a core must not name. Its clock, randomness and bytes come in as arguments.
const IO: [&str; 6] = ["reactor::", "sockets::", "std::fs", "std::process", "std::env", "::now()"];
/// clippy denies these; only a reasoned `allow` gets past it, and only here.
const PANICS: [&str; 3] = ["clippy::unwrap_used", "clippy::expect_used", "clippy::panic"];
const MAY_PANIC: [&str; 2] = ["src/tunnel/keys.rs", "src/reactor.rs"];
const TOP: [&str; 10] = [
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "src",
    "cross",
    "config",
    "packaging",
    "tests",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// All .rs files below, as paths from the root.
fn sources(below: &str) -> Vec<(String, String)> {
    let (mut found, mut todo) = (Vec::new(), vec![root().join(below)]);
    while let Some(directory) = todo.pop() {
        for name in names(&directory) {
            let path = directory.join(&name);
            if path.is_dir() {
                todo.push(path);
            } else if name.ends_with(".rs") {
                let shown = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push((shown, fs::read_to_string(path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Comments and the insides of strings and characters as blanks; lines stay where they are.
fn code(text: &str) -> String {
    let text: Vec<char> = text.chars().collect();
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < text.len() {
        let start = i;
        let word = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        let hashes = if at(i) == 'r' && (!word || at(i - 1) == 'b') {
            text[i + 1..].iter().take_while(|c| **c == '#').count()
        } else {
            0
        };
        if at(i) == '/' && at(i + 1) == '/' {
            while i < text.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            loop {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 || i >= text.len() {
                    break;
                }
            }
        } else if at(i) == 'r' && (!word || at(i - 1) == 'b') && at(i + 1 + hashes) == '"' {
            i += hashes + 2;
            while i < text.len() && !(at(i) == '"' && (1..=hashes).all(|n| at(i + n) == '#')) {
                i += 1;
            }
            i += hashes + 1;
        } else if at(i) == '"' {
            i += 1;
            while i < text.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < text.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
        } else {
            out.push(at(i));
            i += 1;
            continue;
        }
        out.extend(text[start..i.min(text.len())].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
    }
    out
}

/// The same without what is only compiled for tests.
fn product(code: &str) -> String {
    const TEST: &str = "#[cfg(test)]";
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(start) = out[from..].find(TEST).map(|at| at + from) {
        let mut end = out.len();
        let mut depth = 0;
        for (at, c) in out[start + TEST.len()..].char_indices() {
            match c {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(c, '}' | ';') {
                end = start + TEST.len() + at + c.len_utf8();
                break;
            }
        }
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        from = start + blank.len();
        out.replace_range(start..end, &blank);
    }
    out
}

/// What `use std::{…}` brings, as `std::fs` and so on.
fn grouped(line: &str) -> Vec<String> {
    let Some((_, inside)) = line.split_once("std::{") else { return Vec::new() };
    let (mut depth, mut item, mut items) = (0, String::new(), Vec::new());
    for c in inside.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            _ if depth == 0 && !c.is_whitespace() => item.push(c),
            _ => {}
        }
    }
    items.push(item);
    items.iter().map(|item| format!("std::{}", item.split("::").next().unwrap())).collect()
}

fn is_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

/// Each breach of the law in one file of src/, as `path:line: what`.
fn breaches(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        found.push(format!("{path}: {lines} lines, {LINES_MAX} at most"));
    }
    let code = code(text);
    if is_word(&code, "unsafe") && path != "src/sys.rs" {
        found.push(format!("{path}: unsafe outside src/sys.rs"));
    }
    if code.contains("#[ignore") {
        found.push(format!("{path}: an ignored test"));
    }
    if path.ends_with("/tests.rs") {
        return found;
    }
    let product = product(&code);
    let core = path.matches('/').count() > 1;
    for (number, line) in product.lines().enumerate() {
        let mut say = |what: &str| found.push(format!("{path}:{}: {what}", number + 1));
        for lint in PANICS {
            if line.contains(lint) && !MAY_PANIC.contains(&path) {
                say(&format!("{lint} is allowed outside tests"));
            }
        }
        for io in IO {
            if core && line.contains(io) {
                say(&format!("{io} in a core"));
            }
        }
    }
    if core {
        for (at, _) in product.match_indices("std::{") {
            let items = grouped(&product[at..]);
            let number = product[..at].lines().count().max(1);
            found.extend(
                items.iter().filter(|i| IO.contains(&i.as_str())).map(|i| format!("{path}:{number}: {i} in a core")),
            );
        }
    }
    found
}

#[test]
fn cores_do_no_io_and_files_are_small() {
    let files = sources("src");
    assert!(files.len() > 40, "only {} files", files.len());
    let found: Vec<String> = files.iter().flat_map(|(path, text)| breaches(path, text)).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
    let mut lines: Vec<usize> = files.iter().map(|(_, text)| text.lines().count()).collect();
    lines.sort_unstable();
    let median = lines[lines.len() / 2];
    assert!(median <= MEDIAN_MAX, "the median file has {median} lines, {MEDIAN_MAX} at most");
}

#[test]
fn a_core_is_named_after_its_folder() {
    for (path, _) in sources("src") {
        assert!(!path.ends_with("/mod.rs"), "{path}: foo.rs beside foo/, not foo/mod.rs");
        let parent = Path::new(&path).parent().unwrap();
        if parent != Path::new("src") {
            let driver = root().join(parent).with_extension("rs");
            assert!(driver.is_file(), "{path}: there is no {}", driver.display());
        }
    }
}

#[test]
fn tests_are_small_and_none_is_ignored() {
    let files = sources("tests");
    assert!(files.len() > 10, "only {} files", files.len());
    for (path, text) in files {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{path}: {lines} lines, {LINES_MAX} at most");
        assert!(!code(&text).contains("#[ignore"), "{path}: an ignored test");
    }
}

#[test]
fn the_top_folder_holds_what_is_expected() {
    let found: BTreeSet<String> = names(&root()).into_iter().filter(|n| !n.starts_with('.') && n != "target").collect();
    let allowed: BTreeSet<String> = TOP.map(str::to_owned).into();
    let extra: Vec<&String> = found.difference(&allowed).collect();
    assert!(extra.is_empty(), "not for the top folder: {extra:?}");
    let missing: Vec<&String> = allowed.difference(&found).filter(|n| n.as_str() != "packaging").collect();
    assert!(missing.is_empty(), "missing: {missing:?}");
}

/// The law's test is held to its own: every breach is seen, and nothing else.
#[test]
fn every_kind_of_breach_is_seen() {
    let core = "src/a/b.rs";
    for (text, want) in [
        ("fn f() { weft::reactor::block_on(g()) }", "src/a/b.rs:1: reactor:: in a core"),
        ("\nfn f() { sockets::x() }", "src/a/b.rs:2: sockets:: in a core"),
        ("use std::fs::File;", "src/a/b.rs:1: std::fs in a core"),
        ("use std::{io, env};", "src/a/b.rs:1: std::env in a core"),
        ("use std::{\n    io::{self, Read},\n    process::Command,\n};", "src/a/b.rs:1: std::process in a core"),
        ("let now = Instant::now();", "src/a/b.rs:1: ::now() in a core"),
        ("let c = '\"'; x::now()", "src/a/b.rs:1: ::now() in a core"),
        ("let c = '\\''; #[allow(clippy::panic)]", "src/a/b.rs:1: clippy::panic is allowed outside tests"),
        ("fn f<'a>(x: &'a u8) { unsafe { g() } }", "src/a/b.rs: unsafe outside src/sys.rs"),
        ("#[cfg(test)]\nmod tests { #[test] #[ignore] fn t() {} }", "src/a/b.rs: an ignored test"),
        ("#[cfg(test)]\nmod tests;\nfn f() { x::now() }", "src/a/b.rs:3: ::now() in a core"),
        ("#[cfg(test)]\nfn g() { h(|| { 1 }) }\nlet n = T::now();", "src/a/b.rs:3: ::now() in a core"),
        (&"\n".repeat(601), "src/a/b.rs: 601 lines, 600 at most"),
    ] {
        assert_eq!(breaches(core, text), [want], "{text:?}");
    }
    for text in [
        "// reactor:: and #[allow(clippy::unwrap_used)]",
        "/* unsafe /* std::fs */ ::now() */ fn f() {}",
        "/// `Instant::now()`\nconst A: &str = \"std::env \\\" unsafe\";",
        "const A: &str = r#\"unsafe \" std::fs\"#; const B: &[u8] = br\"reactor::\";",
        "#[cfg(test)]\nmod tests {\n    #[allow(clippy::expect_used)]\n    fn t() { Instant::now(); let c = '{'; }\n}",
        "use std::{io::{self, Read}, net::SocketAddr, time::Instant};",
        "let unsafely = 1;",
    ] {
        assert_eq!(breaches(core, text), [""; 0], "{text:?}");
    }
    assert_eq!(breaches("src/a.rs", "let n = Instant::now(); std::fs::read(p); reactor::x()"), [""; 0]);
    assert_eq!(breaches("src/sys.rs", "unsafe { f() }"), [""; 0]);
    assert_eq!(breaches("src/a/tests.rs", "Instant::now();"), [""; 0]);
}
