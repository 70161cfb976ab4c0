//! One answer under way: its bytes -> objects in the table, and what the watcher must know.

use super::{Ask, Lost};
use crate::{
    kube::{
        http::{Part, Response},
        json::{Part as Json, Scanner},
        store::Store,
        types::{self, KEEP},
    },
    table::Table,
};
use nanoserde::DeJson;
use std::time::{Duration, Instant};

/// Bytes of one event, kept or not; etcd refuses objects above 1.5 MiB, and an API server requests above 3 MB.
const EVENT_MAX: u64 = 8 << 20;

/// What is kept of the body of a refusal.
const REFUSAL_MAX: usize = 8 << 10;

/// Longer versions are no versions; longer tokens of pages no tokens.
const VERSION_MAX: usize = 64;
const NEXT_MAX: usize = 16 << 10;

/// The metadata of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) version: String,
    pub(super) next: String,
}

/// What an answer has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// 200 to a watch.
    Opened,
    /// A version that was reached.
    Event(String),
    /// The objects that there were have all been sent.
    AllSent(String),
    /// An object that could not be read.
    Trouble(String),
    End,
}

pub(super) struct Answer {
    pub(super) ask: Ask,
    pub(super) began: Instant,
    pub(super) heard: Instant,
    /// When the head of a 200 came.
    pub(super) opened: Option<Instant>,
    pub(super) events: u32,
    pub(super) bookmarks: u32,
    /// Of a WatchList: all has been sent.
    pub(super) complete: bool,
    pub(super) page: Option<Page>,
    http: Response,
    scanner: Scanner,
    /// Where the last event ended.
    last_end: u64,
    refusal: Vec<u8>,
    /// What is left of a body's part that holds several events.
    strange: bool,
}

impl Answer {
    pub(super) fn new(ask: Ask, now: Instant) -> Self {
        Self {
            ask,
            began: now,
            heard: now,
            opened: None,
            events: 0,
            bookmarks: 0,
            complete: false,
            page: None,
            http: Response::default(),
            scanner: Scanner::new(KEEP),
            last_end: 0,
            refusal: Vec::new(),
            strange: false,
        }
    }

    pub(super) fn lived(&self, now: Instant) -> Duration {
        self.opened.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    pub(super) fn closes(&self) -> bool {
        self.http.head().close
    }

    fn is_watch(&self) -> bool {
        match self.ask {
            Ask::Watch | Ask::WatchList { .. } => true,
            Ask::List { .. } | Ask::Probe => false,
        }
    }

    /// Takes from the input up to the next thing that is said, or all of it.
    pub(super) fn next(
        &mut self,
        input: &mut &[u8],
        store: &mut Store,
        table: &mut Table,
    ) -> Result<Option<Said>, Lost> {
        loop {
            let before = *input;
            match self.http.next(input)? {
                None => return Ok(None),
                Some(Part::Head) if self.http.head().status != 200 => {}
                Some(Part::Head) => {
                    if !self.http.head().is_json() {
                        return Err(Lost::NotJson(self.http.head().content_type.clone()));
                    }
                    if self.is_watch() {
                        self.opened = Some(self.heard);
                        return Ok(Some(Said::Opened));
                    }
                }
                Some(Part::Body(bytes)) if self.http.head().status != 200 => {
                    let room = REFUSAL_MAX - self.refusal.len();
                    self.refusal.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Some(Part::Body(mut bytes)) => {
                    let said = self.body(&mut bytes, store, table)?;
                    if said.is_some() {
                        // The rest of this part is given back: the response has counted it already.
                        self.http.unread(bytes.len());
                        *input = &before[before.len() - input.len() - bytes.len()..];
                        return Ok(said);
                    }
                }
                Some(Part::End) => return self.end().map(Some),
            }
        }
    }

    fn end(&self) -> Result<Said, Lost> {
        if self.http.head().status != 200 {
            return Err(self.refused());
        }
        let whole = self.scanner.finish().is_ok();
        if whole || self.is_watch() { Ok(Said::End) } else { Err(Lost::Cut) }
    }

    /// The connection has ended.
    pub(super) fn closed(&mut self) -> Result<(), Lost> {
        if !self.http.ends_with_connection() { Err(Lost::Cut) } else { self.end().map(drop) }
    }

    fn refused(&self) -> Lost {
        let head = self.http.head();
        let body = std::str::from_utf8(&self.refusal).unwrap_or_default();
        // The parser behind trusts its text to be JSON.
        let mut scanner = Scanner::new(KEEP);
        let status = match scanner.next(&mut body.as_bytes()) {
            Ok(Some(piece)) => piece.text.ok().and_then(|text| types::Status::deserialize_json(text).ok()),
            Ok(None) | Err(_) => None,
        };
        Lost::Status {
            code: head.status,
            retry_after: head.retry_after,
            message: status.and_then(|s| s.message).unwrap_or_default(),
            location: head.location.clone(),
        }
    }

    fn body(&mut self, bytes: &mut &[u8], store: &mut Store, table: &mut Table) -> Result<Option<Said>, Lost> {
        let watch = self.is_watch();
        while let Some(piece) = self.scanner.next(bytes)? {
            if !watch && piece.part == Json::Item {
                if self.ask != Ask::Probe {
                    // What is wrong is told at the list's end.
                    let _ = match piece.text {
                        Ok(text) => store.put(text, table),
                        Err(unfit) => store.unreadable(&format!("an item {unfit}")),
                    };
                }
                continue;
            }
            let text = piece.text.map_err(|unfit| Lost::NotKube(format!("an object that {unfit}")))?;
            let had_items = piece.part == Json::Envelope;
            if !watch {
                self.page = Some(page(text, had_items)?);
                continue;
            }
            let (kind, object) = members(text);
            let meta = || {
                let head = types::Head::deserialize_json(object).unwrap_or_default();
                head.metadata.unwrap_or_default()
            };
            let said = match kind {
                "ADDED" | "MODIFIED" => {
                    store.put(object, table).map_or_else(Said::Trouble, |()| Said::Event(version(meta().version)))
                }
                "DELETED" => {
                    store.remove(object, table).map_or_else(Said::Trouble, |()| Said::Event(version(meta().version)))
                }
                "BOOKMARK" => {
                    let meta = meta();
                    self.bookmarks += 1;
                    let end = meta.annotations.and_then(|a| a.initial_events_end).as_deref() == Some("true");
                    let all = end && !self.complete && self.ask != Ask::Watch;
                    if all { Said::AllSent(version(meta.version)) } else { Said::Event(version(meta.version)) }
                }
                "ERROR" => {
                    let status = types::Status::deserialize_json(object).unwrap_or_default();
                    let code = status.code.map_or(0, |c| u16::try_from(c.0).unwrap_or(0));
                    let gone = matches!(status.reason.as_deref(), Some("Expired" | "Gone"));
                    let message = status.message.unwrap_or_default();
                    return Err(Lost::Event { code: if gone { 410 } else { code }, message });
                }
                "" => return Err(Lost::NotKube("an event without a type".into())),
                other => {
                    if !std::mem::replace(&mut self.strange, true) {
                        log::info!("events of type {:?} are not known here: ignored", other);
                    }
                    continue;
                }
            };
            self.events = self.events.saturating_add(1);
            self.last_end = self.scanner.offset();
            return Ok(Some(said));
        }
        if watch && self.scanner.offset() - self.last_end > EVENT_MAX {
            return Err(Lost::NotKube("an event that is too long".into()));
        }
        Ok(None)
    }
}

fn version(version: Option<String>) -> String {
    version.filter(|v| v.len() <= VERSION_MAX).unwrap_or_default()
}

/// A list's metadata; what it says of its kind is of no account, but that it is no Status.
fn page(text: &str, had_items: bool) -> Result<Page, Lost> {
    let head = types::Head::deserialize_json(text).map_err(|_| Lost::NotAList)?;
    let kind = head.kind.unwrap_or_default();
    if kind == "Status" {
        let status = types::Status::deserialize_json(text).unwrap_or_default();
        return Err(Lost::NotKube(format!(
            "an error with the code of success: {}",
            status.message.unwrap_or_default()
        )));
    }
    if !had_items && !kind.ends_with("List") {
        return Err(Lost::NotAList);
    }
    let meta = head.metadata.unwrap_or_default();
    let next = meta.next.filter(|n| n.len() <= NEXT_MAX).unwrap_or_default();
    Ok(Page { version: version(meta.version), next })
}

/// Type and object of an event, in compact JSON that has passed the scanner; the last wins where one is there twice.
fn members(text: &str) -> (&str, &str) {
    let (mut kind, mut object) = ("", "null");
    let bytes = text.as_bytes();
    let mut at = 1;
    while bytes.get(at) == Some(&b'"') {
        let key = at..value_end(bytes, at);
        let value = key.end + 1..value_end(bytes, key.end + 1);
        at = value.end + 1;
        match (text.get(key).unwrap_or_default(), text.get(value).unwrap_or_default()) {
            ("\"type\"", value) => kind = value.trim_matches('"'),
            ("\"object\"", value) => object = value,
            _ => {}
        }
    }
    (kind, object)
}

/// Where the value ends that begins at `at`.
pub(in crate::kube) fn value_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_u32;
    let (mut inside, mut escaped) = (false, false);
    while let Some(byte) = bytes.get(at) {
        match byte {
            _ if inside => {
                inside = escaped || *byte != b'"';
                escaped = !escaped && *byte == b'\\';
            }
            b'"' => inside = true,
            b'{' | b'[' => depth += 1,
            b',' | b':' if depth == 0 => return at,
            b'}' | b']' if depth == 0 => return at,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_and_object_in_any_order() {
        for (text, kind, object) in [
            (r#"{"type":"ADDED","object":{"a":[1,"}\"]"],"b":{}}}"#, "ADDED", r#"{"a":[1,"}\"]"],"b":{}}"#),
            (r#"{"object":{"metadata":{}},"type":"DELETED"}"#, "DELETED", r#"{"metadata":{}}"#),
            (r#"{"type":"A","type":"B","object":1,"object":{}}"#, "B", "{}"),
            (r#"{"metadata":{"type":"X"}}"#, "", "null"),
            ("{}", "", "null"),
        ] {
            assert_eq!(members(text), (kind, object), "{text}");
        }
    }
}
