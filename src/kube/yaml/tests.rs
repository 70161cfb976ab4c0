use super::*;

fn show(y: &Yaml) -> String {
    match y {
        Yaml::Null => "~".into(),
        Yaml::Text(text) => format!("{text:?}"),
        Yaml::List(list) => format!("[{}]", list.iter().map(show).collect::<Vec<_>>().join(",")),
        Yaml::Map(map) => {
            format!("{{{}}}", map.iter().map(|(k, v)| format!("{k}:{}", show(v))).collect::<Vec<_>>().join(","))
        }
    }
}

#[test]
fn what_is_read() {
    for (text, want) in [
        ("", "~"),
        ("a: b", r#"{a:"b"}"#),
        ("---\na: b # c\n# d\n\nc: 'it''s'\n...\n", r#"{a:"b",c:"it's"}"#),
        ("a:\n- b: 1\n  c: 2\n- d\ne: ~\n", r#"{a:[{b:"1",c:"2"},"d"],e:~}"#),
        ("a:\n  - b:\n      c: x:y#z\n    d:\n", r#"{a:[{b:{c:"x:y#z"},d:~}]}"#),
        ("- - a\n  - b\n- c", r#"[["a","b"],"c"]"#),
        ("a: {b: https://x:1/, 'c': [1, \"2, 3\"], d}\n", r#"{a:{b:"https://x:1/",c:["1","2, 3"],d:~}}"#),
        ("{\"a\":{\"b\":[\"\\u00e9\\n\"]},\n \"c\":null}", "{a:{b:[\"é\\n\"]},c:~}"),
        ("a: |\n  x\n   y\n\n  z\nb: >-\n  x\n  y\n", "{a:\"x\\n y\\n\\nz\\n\",b:\"x y\"}"),
        ("a:\n  one\n  two\nb: c\r\nd: e\r\n", r#"{a:"one two",b:"c",d:"e"}"#),
        ("\"a b\": c", r#"{a b:"c"}"#),
    ] {
        assert_eq!(Yaml::parse(text).map(|y| show(&y)), Ok(want.to_owned()), "{text:?}");
    }
}

#[test]
fn what_is_refused() {
    for (text, line) in [
        ("a: &x b", 1),
        ("a: *x", 1),
        ("a: !!binary x", 1),
        ("a: b\n\tc: d", 2),
        ("a: b\na: c", 2),
        ("a: b: c", 1),
        ("a: [b, c", 1),
        ("a: {b: c]", 1),
        ("a: \"b\nc\"", 2),
        ("a: \"b\" c", 1),
        ("a: b\n---\nc: d", 2),
        ("a:\n  b: c\n d: e", 3),
        ("? a\n: b", 1),
        ("a: \"\\ud800\"", 1),
        (&"[".repeat(99), 1),
        (&"- ".repeat(99), 1),
    ] {
        let error = Yaml::parse(text).map(|y| show(&y)).map_err(|e| e.line);
        assert_eq!(error, Err(line), "{text:?}");
    }
}

#[test]
fn mutilated_texts_end_and_never_panic() {
    let text = "a:\n- b: {c: 'd', e: [1, \"2\"]}\n  f: |\n    x\n# g\nh:\n  i: é\n";
    let letters: Vec<char> = "{}[]:,-|>#'\"\\\n\t &*!é?~ab".chars().collect();
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..20_000 {
        let mut chars: Vec<char> = text.chars().collect();
        for _ in 0..rng.usize(1..5) {
            let at = rng.usize(..chars.len());
            chars[at] = letters[rng.usize(..letters.len())];
        }
        let _ = Yaml::parse(&chars.iter().collect::<String>());
    }
}
