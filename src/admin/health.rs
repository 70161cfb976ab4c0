//! Whether the agent does its work, for those who begin it anew where it does not; and what is said of that by HTTP.

use std::time::{Duration, Instant};

/// A longer head is refused; a kubelet's has 150 bytes.
pub const HEAD_MAX: usize = 2048;
/// What a client may ask for.
const PATHS: [&str; 2] = ["/healthz", "/livez"];

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Signs<'s> {
    /// Whether there should be rules.
    pub wants_rules: bool,
    /// Whether every source of the table has given a complete list.
    pub synced: bool,
    /// When the rules were last as they should be; None: never.
    pub rules: Option<Instant>,
    /// What keeps us from them.
    pub errors: &'s [String],
    /// Between two looks at the rules.
    pub period: Duration,
}

/// One line of what is wrong; None: all is well. Two periods are let pass, as kube-proxy does
/// (pkg/proxy/healthcheck), since one failure is tried again soon.
#[must_use]
pub fn unwell(signs: &Signs<'_>, now: Instant) -> Option<String> {
    let Signs { wants_rules, synced, rules, errors, period } = *signs;
    let age = rules.map(|at| now.saturating_duration_since(at));
    if !wants_rules && synced || age.is_some_and(|age| age <= 2 * period) {
        return None;
    }
    let mut line = match age {
        Some(age) if wants_rules => format!("rules: not synced for {} s", age.as_secs()),
        Some(_) | None if !synced => "table: not every source has given a complete list yet".to_owned(),
        Some(_) | None => "rules: not in the kernel yet".to_owned(),
    };
    if wants_rules && let Some(error) = errors.first() {
        line += ": ";
        line.extend(error.chars().map(|c| if c.is_control() { ' ' } else { c }));
    }
    Some(line)
}

/// The answer to the head of a request, which is whole or too long; what is wrong is only asked for where it counts.
#[must_use]
pub fn answer(head: &[u8], unwell: impl FnOnce() -> Option<String>) -> String {
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii_end();
    let mut words = line.split(|b| *b == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let version = words.next().unwrap_or_default();
    let path = target.split(|b| *b == b'?').next().unwrap_or_default();
    let found = PATHS.iter().position(|p| p.as_bytes() == path);
    let (code, body) = match (method, found) {
        _ if !version.starts_with(b"HTTP/1.") => ("400 Bad Request", "not HTTP/1".to_owned()),
        _ if !is_whole(head) => ("431 Request Header Fields Too Large", format!("more than {HEAD_MAX} bytes")),
        (_, None) => ("404 Not Found", PATHS.join(" ")),
        (b"GET" | b"HEAD", Some(0)) => match unwell() {
            Some(why) => ("503 Service Unavailable", why),
            None => ("200 OK", "ok".to_owned()),
        },
        (b"GET" | b"HEAD", Some(_)) => ("200 OK", "ok".to_owned()),
        (_, Some(_)) => ("405 Method Not Allowed\r\nAllow: GET, HEAD", "GET or HEAD".to_owned()),
    };
    let length = body.len() + 1;
    let body = if method == b"HEAD" { String::new() } else { body + "\n" };
    format!(
        "HTTP/1.1 {code}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\nCache-Control: no-store\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// Whether a head has come to its end.
#[must_use]
pub fn is_whole(head: &[u8]) -> bool {
    head.windows(4).any(|w| w == b"\r\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(30);

    #[test]
    fn two_periods_pass_before_it_is_unwell() {
        let begin = Instant::now();
        let after = |secs| begin + Duration::from_secs(secs);
        let errors = ["weft0 is\nsomebody else's".to_owned(), "more".to_owned()];
        let none = Signs { wants_rules: true, synced: false, rules: None, errors: &[], period: PERIOD };
        let at = |signs: Signs<'_>, secs| unwell(&signs, after(secs)).unwrap_or_default();
        let unknown = "table: not every source has given a complete list yet";
        assert_eq!(at(none, 0), unknown);
        assert_eq!(at(Signs { wants_rules: false, ..none }, 500), unknown);
        let synced = Signs { synced: true, ..none };
        assert_eq!(at(synced, 1), "rules: not in the kernel yet");
        let failing = Signs { errors: &errors, ..synced };
        assert_eq!(at(failing, 1), "rules: not in the kernel yet: weft0 is somebody else's");
        assert_eq!(at(Signs { wants_rules: false, ..failing }, 500), "", "where there are none they do not count");
        // Good once; each sync since then has failed, or none has ended.
        for errors in [&errors[..], &[]] {
            let once = Signs { rules: Some(begin), errors, ..synced };
            assert_eq!(at(once, 1), "");
            assert_eq!(at(once, 60), "");
            assert!(at(once, 61).starts_with("rules: not synced for 61 s"), "{}", at(once, 61));
            let again = Signs { rules: Some(after(70)), ..once };
            assert_eq!(at(again, 71), "", "well again");
        }
        // Another API that has not answered yet: the rules stand still.
        let lost = Signs { rules: Some(begin), synced: false, ..synced };
        assert_eq!((at(lost, 60), at(lost, 75)), (String::new(), "rules: not synced for 75 s".into()));
        assert_eq!(at(Signs { wants_rules: false, ..lost }, 75), unknown, "rules of before a reload do not count");
    }

    #[test]
    fn requests() {
        let ask = |head: &str, why: Option<&str>| {
            let answer = answer(head.as_bytes(), || why.map(Into::into));
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let length: usize =
                head.split("Content-Length: ").nth(1).unwrap().split('\r').next().unwrap().parse().unwrap();
            assert!(body.is_empty() || length == body.len(), "{answer}");
            (head[9..12].parse::<u16>().unwrap(), body.to_owned())
        };
        let get = |path: &str, why| ask(&format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"), why);
        assert_eq!(get("/healthz", None), (200, "ok\n".into()));
        assert_eq!(get("/healthz?verbose", Some("rules: no")), (503, "rules: no\n".into()));
        assert_eq!(get("/livez", Some("rules: no")), (200, "ok\n".into()));
        assert_eq!(get("/", None), (404, "/healthz /livez\n".into()));
        assert_eq!(get("/healthz/", None).0, 404);
        assert_eq!(ask("HEAD /healthz HTTP/1.0\r\n\r\n", Some("rules: no")), (503, String::new()));
        assert_eq!(ask("POST /livez HTTP/1.1\r\n\r\n", None).0, 405);
        assert_eq!(ask("GET /livez HTTP/1.1\r\nA: b", None).0, 431);
        for odd in ["", "\r\n\r\n", "GET /livez\r\n\r\n", "GET /livez HTTP/2.0\r\n\r\n", "\0\u{fffd} \n"] {
            assert_eq!(ask(odd, None).0, 400, "{odd:?}");
        }
    }
}
