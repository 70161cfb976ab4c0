#![allow(clippy::question_mark, reason = "what the derive writes")]

use super::*;

const KEEP: &[&str] = &["a", "b", "kind", "list", "name"];

/// Part, offset, text and list kind of every piece, fed in chunks of the lengths given in turn.
fn cut(text: &[u8], chunks: &mut dyn FnMut() -> usize) -> Result<Vec<(Part, u64, String, String)>, JsonError> {
    let (mut scanner, mut pieces, mut rest) = (Scanner::new(KEEP), Vec::new(), text);
    while !rest.is_empty() {
        let (mut chunk, after) = rest.split_at(chunks().clamp(1, rest.len()));
        while let Some(p) = scanner.next(&mut chunk)? {
            let text = p.text.map_or_else(|why| format!("{why:?}"), str::to_owned);
            pieces.push((p.part, p.offset, text, p.list_kind.to_owned()));
        }
        rest = after;
    }
    scanner.finish()?;
    Ok(pieces)
}

fn texts(text: &str) -> Vec<String> {
    let pieces = cut(text.as_bytes(), &mut || usize::MAX).unwrap();
    pieces.into_iter().map(|(part, _, text, kind)| format!("{part:?} {text} {kind}").trim_end().into()).collect()
}

#[test]
fn items_are_cut_out_and_unkept_members_left_out() {
    let list = r#"{ "kind" : "FooList", "x": [1, {"a": "]}"}], "a": {"b": 1234567890123456789, "x": 2},
        "items": [ {"name": "o\"ne\\", "x": null, "b": [1, [2.50, -0], {}, [], true]}, {"x": {}} , 7, null ], "b": 1e+3 }"#;
    assert_eq!(
        texts(list),
        [
            r#"Item {"name":"o\"ne\\","b":[1,[2.50,-0],{},[],true]} FooList"#,
            "Item {} FooList",
            "Item 7 FooList",
            "Item null FooList",
            r#"Envelope {"kind":"FooList","a":{"b":1234567890123456789e0},"b":1e3} FooList"#,
        ]
    );
}

#[test]
fn several_documents_and_lists_without_items() {
    let documents = r#"{"a":1}{"items":[]} {"items":null,"kind":"L"}
        {"items":[{"items":[1],"list":{"items":2}}],"kind":"L"}"#;
    assert_eq!(
        texts(documents),
        [
            r#"Whole {"a":1}"#,
            "Envelope {}",
            r#"Whole {"kind":"L"} L"#,
            r#"Item {"list":{}}"#,
            r#"Envelope {"kind":"L"} L"#
        ]
    );
    assert!(texts(" \n").is_empty());
}

#[test]
fn any_chunking_gives_the_same() {
    let text = "{\"kind\":\"L\",\"items\":[{\"name\":\"\u{fc}\u{1f6d2}\\ud83d\\uded2\",\"x\":{\"a\":[-1.5e-3,false]}},\
                {\"a\":12,\"nam\\u0065\":1}],\"x\":\"\\\\\"}\n{\"a\":[0,{\"b\":\"\"}]}";
    let whole = cut(text.as_bytes(), &mut || usize::MAX).unwrap();
    assert_eq!(whole.len(), 4);
    assert_eq!(cut(text.as_bytes(), &mut || 1).unwrap(), whole);
    for at in 0..text.len() {
        let mut first = Some(at.max(1));
        assert_eq!(cut(text.as_bytes(), &mut || first.take().unwrap_or(usize::MAX)).unwrap(), whole, "cut at {at}");
    }
    for seed in crate::seeds(200) {
        let mut rng = fastrand::Rng::with_seed(seed);
        assert_eq!(cut(text.as_bytes(), &mut || rng.usize(1..9)).unwrap(), whole, "seed {seed}");
    }
    for at in 1..text.len() - 1 {
        let cut_off = cut(&text.as_bytes()[..at], &mut || 7);
        let between = cut_off.as_ref().is_ok_and(|pieces| pieces.len() == 3);
        assert!(cut_off.is_err() || between, "an end at {at} is seen");
    }
}

#[test]
fn what_is_not_json_is_refused_where_it_is() {
    for (text, offset) in [
        ("[]", 0),
        ("- a: b", 0),
        ("{\"a\":}", 5),
        ("{\"x\":]", 5),
        ("{\"a\" 1}", 5),
        ("{a:1}", 1),
        ("{\"a\":1,}", 7),
        ("{\"a\":[1,]}", 8),
        ("{\"a\":[1}", 7),
        ("{\"a\":{]", 6),
        ("{\"a\":01}", 6),
        ("{\"a\":+1}", 5),
        ("{\"a\":.5}", 5),
        ("{\"a\":1.}", 7),
        ("{\"a\":1e}", 7),
        ("{\"a\":-}", 6),
        ("{\"a\":nul}", 8),
        ("{\"a\":trux}", 8),
        ("{\"a\":NaN}", 5),
        ("{\"a\":\"\n\"}", 6),
        ("{\"a\":\"\0\"}", 6),
        ("{\"a\":\"\\0\"}", 7),
        ("{\"a\":\"\\u12g4\"}", 10),
        ("{\"a\":1 // comment\n}", 7),
        ("{\"a\":1}}", 7),
        ("{\"a\":1", 6),
        ("{\"a\":\"", 6),
        ("{\"a\":1}{", 8),
    ] {
        let error = cut(text.as_bytes(), &mut || 3).unwrap_err();
        assert_eq!(error.offset, offset, "{text}: {error}");
    }
}

#[test]
fn depth_and_size_are_limited() {
    let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
    let most = DEPTH_MAX as usize - 1;
    assert!(cut(deep(most).as_bytes(), &mut || 100).is_ok());
    assert_eq!(cut(deep(most + 1).as_bytes(), &mut || 100).unwrap_err().why, "nested too deep");
    let long = "y".repeat(ITEM_MAX);
    let list = format!(r#"{{"items":[{{"a":"{long}"}},{{"x":"{long}"}},{{"a":"short"}},{{"{long}":1}}]}}"#);
    let got = texts(&list);
    assert_eq!(got, ["Item TooLong", "Item {}", r#"Item {"a":"short"}"#, "Item {}", "Envelope {}"]);
    let broken = b"{\"items\":[{\"a\":\"\xff\"},{\"x\":\"\xff\"}]}";
    let got = cut(broken, &mut || 2).unwrap();
    assert_eq!((&*got[0].2, &*got[1].2), ("NotUtf8", "{}"));
}

#[test]
fn mutated_text_never_panics_and_what_passes_is_json_for_the_parser() {
    use nanoserde::DeJson;
    #[derive(DeJson)]
    struct Any {
        #[allow(dead_code)]
        never: Option<bool>,
    }
    let text = r#"{"kind":"L","items":[{"a":[1.5e+2,-0,"x\n\u00fc"],"b":{"name":null,"x":true}}],"a":{}}"#;
    let mut passed = 0;
    for seed in crate::seeds(40_000) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..rng.usize(1..3) {
            let at = rng.usize(..bytes.len());
            match rng.u8(..3) {
                0 => bytes[at] = *rng.choice(b"{}[]\",:\\0e-+ntu /\x00\xff").unwrap(),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, *rng.choice(b"{}[]\",:\\0e-+ntu /").unwrap()),
            }
        }
        for (_, _, text, _) in cut(&bytes, &mut || rng.usize(1..20)).unwrap_or_default() {
            passed += usize::from(text.starts_with('{') && Any::deserialize_json(&text).is_ok());
        }
    }
    assert!(passed > 1000, "{passed}");
}
