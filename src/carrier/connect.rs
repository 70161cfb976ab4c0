//! HTTP's CONNECT (RFC 9110 section 9.3.6), as far as a way out through a proxy needs it, without IO.

use crate::encoding::BASE64;
use std::{fmt, net::Ipv6Addr, str::FromStr};

/// Of an answer's head; a longer one is refused. A proxy's own page comes behind it and is not read.
pub const HEAD_MAX: usize = 8 << 10;
/// Of the proxy's words in an error.
const REASON_MAX: usize = 80;

/// An HTTP proxy of the config.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    pub host: String,
    pub port: u16,
    /// `user:password` in base64 (RFC 7617).
    basic: Option<String>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret = if self.basic.is_some() { "…@" } else { "" };
        write!(f, "http://{secret}{}", join(&self.host, self.port))
    }
}

/// An IPv6 address in brackets.
fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn is_host(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

/// RFC 3986 section 2.1.
fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    Some(out)
}

impl FromStr for Proxy {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let rest = text.strip_prefix("http://").ok_or(())?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, at) = rest.rsplit_once('@').map_or((None, rest), |(user, at)| (Some(user), at));
        let (host, port) = at.rsplit_once(':').ok_or(())?;
        let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).filter(|h| h.parse::<Ipv6Addr>().is_ok());
        let host = v6.or_else(|| is_host(host).then_some(host)).ok_or(())?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or(())?;
        let basic = match user {
            None => None,
            // RFC 7617 section 2: a user's name has no colon, and none of it a control character.
            Some(user) => {
                let (name, password) = user.split_once(':').ok_or(())?;
                let (name, password) = percent_decoded(name).zip(percent_decoded(password)).ok_or(())?;
                let pair = [&name[..], b":", &password].concat();
                if name.is_empty() || name.contains(&b':') || pair.iter().any(u8::is_ascii_control) {
                    return Err(());
                }
                Some(BASE64.encode(&pair))
            }
        };
        Ok(Self { host: host.into(), port, basic })
    }
}

impl Proxy {
    /// Where it is.
    #[must_use]
    pub fn shown(&self) -> String {
        join(&self.host, self.port)
    }

    /// What asks for a way to a relay.
    #[must_use]
    pub fn request(&self, host: &str, port: u16) -> String {
        let to = join(host, port);
        let mut out = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n");
        if let Some(basic) = &self.basic {
            out.push_str("Proxy-Authorization: Basic ");
            out.push_str(basic);
            out.push_str("\r\n");
        }
        out.push_str("\r\n");
        out
    }

    /// Judges the answer as far as it has come: Ok(false) asks for more.
    ///
    /// # Errors
    /// A text for the user: the proxy says no, or it is none.
    pub fn judge(&self, answer: &[u8]) -> Result<bool, String> {
        const NOT_HTTP: &str = "what answers there is no HTTP proxy";
        let version = b"HTTP/1.";
        if answer.iter().zip(version).any(|(a, b)| a != b) {
            return Err(NOT_HTTP.into());
        }
        let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
            let long = answer.len() >= HEAD_MAX;
            return if long { Err("the proxy's answer has no end".into()) } else { Ok(false) };
        };
        let line = answer.split(|b| *b == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line.get(version.len() + 2..).unwrap_or_default());
        let (code, reason) = line.split_once(' ').unwrap_or((&line, ""));
        let digits = code.len() == 3 && code.bytes().all(|b| b.is_ascii_digit());
        let Some(code) = code.parse::<u16>().ok().filter(|_| digits) else { return Err(NOT_HTTP.into()) };
        match (code, &self.basic) {
            // The relay says nothing before we do, so these bytes are not its.
            (200..=299, _) if answer.len() > end + 4 => Err("the proxy says more than it was asked".into()),
            (200..=299, _) => Ok(true),
            (407, None) => Err("the proxy wants a user and a password (407)".into()),
            (407, Some(_)) => Err("the proxy does not take our user and password (407)".into()),
            (code, _) => {
                let shown = reason.chars().filter(|c| !c.is_control()).take(REASON_MAX);
                Err(format!("the proxy answers {code} {}", shown.collect::<String>()).trim_end().into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(text: &str) -> Option<Proxy> {
        text.parse().ok()
    }

    #[test]
    fn urls() {
        let plain = proxy("http://proxy.example:3128").unwrap();
        assert_eq!((plain.host.as_str(), plain.port, plain.basic), ("proxy.example", 3128, None));
        assert_eq!(proxy("http://192.0.2.1:80/").unwrap().host, "192.0.2.1");
        assert_eq!(proxy("http://[2001:db8::1]:80").unwrap().host, "2001:db8::1");
        // RFC 7617 section 2's example, and one with what must be escaped.
        let known = proxy("http://Aladdin:open%20sesame@p:1").unwrap();
        assert_eq!(known.basic.as_deref(), Some("QWxhZGRpbjpvcGVuIHNlc2FtZQ=="));
        assert_eq!(format!("{known:?}"), "http://…@p:1");
        assert_eq!(proxy("http://a:b%40c@p:1").unwrap().basic, Some(BASE64.encode(b"a:b@c")));
        for wrong in [
            "",
            "proxy:3128",
            "https://p:1",
            "http://p",
            "http://p:0",
            "http://p:65536",
            "http://:1",
            "http://a b:1",
            "http://p:1/x",
            "http://user@p:1",
            "http://:pw@p:1",
            "http://a%3ab:c@p:1",
            "http://a:%0d%0a@p:1",
            "http://a:%4@p:1",
            "http://a:%zz@p:1",
            "http://[::1:1",
            "http://p\r\nX: y:1",
        ] {
            assert_eq!(proxy(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn requests() {
        let asked = proxy("http://p:1").unwrap().request("2001:db8::1", 443);
        assert_eq!(asked, "CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\r\n");
        let asked = proxy("http://a:b@p:1").unwrap().request("relay.example", 443);
        assert!(asked.ends_with("\r\nProxy-Authorization: Basic YTpi\r\n\r\n"), "{asked}");
    }

    #[test]
    fn answers_at_every_cut() {
        let p = proxy("http://p:1").unwrap();
        let yes = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 p\r\n\r\n";
        for len in 0..yes.len() {
            assert_eq!(p.judge(&yes[..len]), Ok(false), "{len}");
        }
        assert_eq!(p.judge(yes), Ok(true));
        assert_eq!(p.judge(b"HTTP/1.0 204\r\n\r\n"), Ok(true));
        let no = |answer: &[u8]| p.judge(answer).unwrap_err();
        assert_eq!(no(b"HTTP/1.1 403 Forbidden\r\nX: y\r\n\r\n<html>"), "the proxy answers 403 Forbidden");
        assert_eq!(no(b"HTTP/1.1 502\r\n\r\n"), "the proxy answers 502");
        assert!(no(b"HTTP/1.1 407 Who?\r\n\r\n").contains("wants a user"));
        assert!(
            proxy("http://a:b@p:1").unwrap().judge(b"HTTP/1.1 407 No\r\n\r\n").unwrap_err().contains("does not take")
        );
        assert!(no(b"HTTP/1.1 200 OK\r\n\r\nx").contains("more than it was asked"));
        let long = [&yes[..20], &[b'a'; HEAD_MAX]].concat();
        assert!(no(&long).contains("no end"));
        let hostile: [&[u8]; 7] = [
            b"S",
            b"HTTP/2",
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 2000 x\r\n\r\n",
            b"HTTP/1.1 +20 x\r\n\r\n",
            b"HTTP/1.\r\n\r\n",
            b"HTTP/1.1  200\r\n\r\n",
        ];
        for not_http in hostile {
            assert_eq!(no(not_http), "what answers there is no HTTP proxy", "{}", not_http.escape_ascii());
        }
        let reason = [b"HTTP/1.1 500 ".to_vec(), vec![b'\x1b'; 10], vec![b'e'; 500], b"\r\n\r\n".to_vec()].concat();
        assert_eq!(no(&reason), format!("the proxy answers 500 {}", "e".repeat(REASON_MAX)));
    }
}
