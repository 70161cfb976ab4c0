//! The head of a connection's first HTTP/1 request, as far as it is there: what a header says, hashed.

use crate::table::rule::hash;

/// Bytes of a head that are looked at; where it does not end in them, the header is not there.
pub(crate) const HEAD_MAX: usize = 8 * 1024;

/// Longer words are no method.
const METHOD_MAX: usize = 16;

/// What is seen so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It may come yet.
    More,
    Found(u64),
    /// There is no such header, or this is not HTTP/1.
    Absent,
}

/// Looks for a header, whose name is in lower case, in the first bytes of a connection; `:path` is the path of the
/// request's target without its query, `:authority` the host.
pub(crate) fn look(bytes: &[u8], name: &str) -> Look {
    let method = bytes.iter().take_while(|b| b.is_ascii_uppercase()).count();
    match bytes.get(method) {
        None if method <= METHOD_MAX => return Look::More,
        Some(b' ') if (1..=METHOD_MAX).contains(&method) => {}
        Some(_) | None => return Look::Absent,
    }
    let name = if name == ":authority" { "host" } else { name };
    let mut lines = bytes.split(|b| *b == b'\n');
    // What follows the last newline is not whole.
    let whole = bytes.iter().filter(|b| **b == b'\n').count();
    let Some(first) = lines.next().filter(|_| whole > 0) else { return Look::More };
    let mut words = first.trim_ascii_end().split(|b| *b == b' ');
    let (_, target, version) = (words.next(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !version.starts_with(b"HTTP/1.") {
        return Look::Absent;
    }
    if name == ":path" {
        return Look::Found(hash(path(target)));
    }
    for line in lines.take(whole - 1) {
        let line = line.trim_ascii_end();
        if line.is_empty() {
            return Look::Absent;
        }
        let colon = line.iter().position(|b| *b == b':').unwrap_or(line.len());
        if line[..colon].eq_ignore_ascii_case(name.as_bytes()) {
            return Look::Found(hash(line.get(colon + 1..).unwrap_or_default().trim_ascii()));
        }
    }
    Look::More
}

/// Of `/a?b` and of `http://host/a?b`: `/a`.
fn path(target: &[u8]) -> &[u8] {
    let end = target.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(target.len());
    let target = &target[..end];
    if target.starts_with(b"/") {
        return target;
    }
    let Some(scheme) = target.windows(3).position(|w| w == b"://") else { return target };
    let host = &target[scheme + 3..];
    host.iter().position(|b| *b == b'/').map_or(b"/", |at| &host[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &[u8] = b"GET /a/b?c=d HTTP/1.1\r\nHost: x\r\nUser-Agent:  curl \r\nX: 1\r\n\r\nUser-Agent: body";

    #[test]
    fn d7_a_header_is_found_in_any_chunking() {
        for (name, value) in [("user-agent", "curl"), (":path", "/a/b"), (":authority", "x"), ("host", "x")] {
            let found = Look::Found(hash(value.as_bytes()));
            assert_eq!(look(REQUEST, name), found, "{name}");
            let mut seen = Look::More;
            for len in 0..REQUEST.len() {
                let now = look(&REQUEST[..len], name);
                assert!(seen == now || seen == Look::More, "{name} after {len} bytes: {seen:?} then {now:?}");
                seen = now;
            }
            assert_eq!(seen, found, "{name}");
        }
        assert_eq!(look(REQUEST, "missing"), Look::Absent);
        assert_eq!(look(&REQUEST[..58], "missing"), Look::More);
        assert_eq!(look(b"GET http://h:1/p?q HTTP/1.0\n", ":path"), Look::Found(hash(b"/p")));
        assert_eq!(look(b"GET http://h HTTP/1.0\n", ":path"), Look::Found(hash(b"/")));
    }

    #[test]
    fn d7_what_is_not_http_is_known_at_once() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00"[..],
            b"SSH-2.0-x\r\n",
            b"get / HTTP/1.1\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"AAAAAAAAAAAAAAAAAAAAAAAA",
            b"GET /\r\n",
            b" ",
            b"\r\n",
        ] {
            assert_eq!(look(bytes, "host"), Look::Absent, "{bytes:?}");
        }
        assert_eq!(look(b"", "host"), Look::More);
    }
}
