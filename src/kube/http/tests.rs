use super::*;

/// The status, the body and whether the end came; fed in pieces of `step` bytes.
fn read(text: &[u8], step: usize) -> Result<(u16, Vec<u8>, bool), HttpError> {
    let (mut response, mut body, mut ended) = (Response::default(), Vec::new(), false);
    for mut piece in text.chunks(step) {
        while let Some(part) = response.next(&mut piece)? {
            match part {
                Part::Head => {}
                Part::Body(bytes) => body.extend_from_slice(bytes),
                Part::End => {
                    ended = true;
                    break;
                }
            }
        }
    }
    Ok((response.head.status, body, ended || response.ends_with_connection()))
}

fn both(text: &str) -> Result<(u16, String, bool), HttpError> {
    let whole = read(text.as_bytes(), usize::MAX);
    for step in 1..8 {
        assert_eq!(read(text.as_bytes(), step), whole, "in pieces of {step}: {text:?}");
    }
    whole.map(|(status, body, ended)| (status, String::from_utf8(body).unwrap(), ended))
}

#[test]
fn bodies_of_all_kinds() {
    let ok = |status, body: &str, ended| Ok((status, body.to_owned(), ended));
    for (text, want) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", ok(200, "hello", true)),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", ok(200, "hell", false)),
        ("HTTP/1.1 200 OK\ncontent-length: 0\n\n", ok(200, "", true)),
        ("HTTP/1.1 200\r\n\r\nall of it", ok(200, "all of it", true)),
        ("HTTP/1.0 503 x y\r\n\r\n", ok(503, "", true)),
        ("HTTP/1.1 204 No Content\r\n\r\n", ok(204, "", true)),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;a=\"b\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n",
            ok(200, "abc0123456789", true),
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n1\r\na\r\n0\r\n\r\n",
            ok(200, "a", true),
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", ok(200, "a", false)),
        (
            "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 C\r\n\r\nHTTP/1.1 404 N\r\nContent-Length: 1\r\n\r\nx",
            ok(404, "x", true),
        ),
    ] {
        assert_eq!(both(text), want, "{text:?}");
    }
}

#[test]
fn what_is_no_answer() {
    let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "y".repeat(HEAD_MAX));
    let interim = "HTTP/1.1 100 C\r\n\r\n".repeat(9);
    for (text, why) in [
        ("SSH-2.0-x\r\n", "no status line"),
        ("HTTP/2 200\r\n", "no status line"),
        ("HTTP/1.1 99 x\r\n", "no status line"),
        ("HTTP/1.1 2000\r\n", "no status line"),
        (&long, "its head is too long"),
        (&interim, "too many interim answers"),
        ("HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "a header without a name"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "a length that is none"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2147483649\r\n\r\n", "a length that is none"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "two lengths"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "a transfer coding that was not asked for"),
        (
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n",
            "a compressed body that was not asked for",
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n80000001\r\n", "a chunk without a size"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n", "a chunk without a size"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", "a chunk is longer than it says"),
    ] {
        assert_eq!(both(text), Err(HttpError(why)), "{text:?}");
    }
}

#[test]
fn what_is_read_of_a_head() {
    let mut response = Response::default();
    let mut text: &[u8] = b"HTTP/1.1 429 Slow\r\nRETRY-AFTER: 7\r\nConnection: keep-alive, Close\r\nContent-Type: Text/HTML\r\nLocation: https://a/\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(response.next(&mut text), Ok(Some(Part::Head)));
    let head = response.head();
    assert_eq!((head.status, head.retry_after, head.close, head.is_json()), (429, Some(7), true, false));
    assert_eq!((&*head.content_type, &*head.location), ("text/html", "https://a/"));
    assert_eq!(response.next(&mut text), Ok(Some(Part::End)));
}

#[test]
fn requests() {
    let (mut out, mut query) = (Vec::new(), String::new());
    escape("!a/b,c=d é", &mut query);
    assert_eq!(query, "%21a%2Fb%2Cc%3Dd%20%C3%A9");
    get("[::1]:6443", "/api?x=1", "weft/1", Some("secret"), &mut out);
    let text = String::from_utf8(out).unwrap();
    assert_eq!(
        text,
        "GET /api?x=1 HTTP/1.1\r\nHost: [::1]:6443\r\nUser-Agent: weft/1\r\nAccept: application/json\r\nAuthorization: Bearer secret\r\n\r\n"
    );
}
