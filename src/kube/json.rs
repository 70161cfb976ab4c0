//! A pull scanner that cuts the items of lists out of a stream of JSON documents, in any chunking, and copies only the
//! members that somebody reads: the rest (managed fields, annotations, images) is 50-80 % of the bytes.
//!
//! It is strict (RFC 8259), for the parser behind it is not: on text that is no JSON that one may panic or never end.

use std::fmt;

/// Containers in each other; deeper text is refused. Kubernetes' own objects nest about 12 deep.
const DEPTH_MAX: u32 = 64;

/// Bytes kept of one item; a longer one is reported as unfit and skipped. etcd refuses objects above 1.5 MiB.
const ITEM_MAX: usize = 2 << 20;

/// A buffer that grew beyond this for one big item is given back after it.
const ITEM_USUAL: usize = 64 << 10;

/// Longest key that is compared with those to keep; longer ones are skipped with their values.
const KEY_MAX: usize = 64;

/// Not JSON, or no object: nothing that follows can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// Bytes before the one that does not fit.
    pub offset: u64,
    pub why: &'static str,
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not JSON at byte {}: {}", self.offset, self.why)
    }
}

impl std::error::Error for JsonError {}

/// Of the member with this key all is kept, whatever its keys: what of it is not known is said.
const WHOLE: &str = "trafficPolicy";

/// Characters of an integer that fits 64 bits for certain.
const INTEGER_MAX: u32 = 18;

/// What a [`Piece`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// An element of a document's `items`.
    Item,
    /// A document that had `items`, without them.
    Envelope,
    /// Any other document.
    Whole,
}

/// Why a piece cannot be had, while those after it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    TooLong,
    NotUtf8,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "has more than {ITEM_MAX} bytes of what would be read"),
            Self::NotUtf8 => f.write_str("is not UTF-8"),
        }
    }
}

/// One object, as JSON without white space and without the members that are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub part: Part,
    /// Where in the stream it begins.
    pub offset: u64,
    pub text: Result<&'a str, Unfit>,
    /// Of an item: the list's `kind` so far ("" where it comes after the items).
    pub list_kind: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Document,
    Value,
    /// After `[`.
    ValueOrEnd,
    Key,
    /// After `{`.
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    None,
    Text {
        key: bool,
        escape: Escape,
    },
    Number(Digits, u32),
    /// What is left of `true`, `false` or `null`.
    Literal(&'static [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Begun,
    /// Hex digits to come.
    Hex(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digits {
    Minus,
    Zero,
    Whole,
    Dot,
    Fraction,
    Exponent,
    Sign,
    Power,
}

#[derive(Debug, Default)]
struct Copied {
    bytes: Vec<u8>,
    offset: u64,
    too_long: bool,
}

impl Copied {
    fn push(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() > ITEM_MAX {
            self.too_long = true;
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    fn begin(&mut self, offset: u64) {
        self.bytes.clear();
        self.bytes.shrink_to(ITEM_USUAL);
        self.too_long = false;
        self.offset = offset;
    }

    fn text(&self) -> Result<&str, Unfit> {
        if self.too_long {
            return Err(Unfit::TooLong);
        }
        std::str::from_utf8(&self.bytes).map_err(|_| Unfit::NotUtf8)
    }
}

/// See the module. Feed it with [`Scanner::next`] until the input is used up, and end with [`Scanner::finish`].
#[derive(Debug)]
pub struct Scanner {
    keep: &'static [&'static str],
    offset: u64,
    expect: Expect,
    token: Token,
    depth: u32,
    /// A bit for each depth: whether it is an object.
    objects: u64,
    /// A bit for each depth: whether a member of it was copied, so that the next one needs a comma.
    copied: u64,
    /// The depth whose current member is not copied.
    skip: Option<u32>,
    /// The depth of a [`WHOLE`] that is under way.
    whole: Option<u32>,
    /// The value to come is a document's `items`.
    items_next: bool,
    in_items: bool,
    had_items: bool,
    key: Vec<u8>,
    key_escaped: bool,
    list_kind: String,
    document: Copied,
    item: Copied,
}

impl Scanner {
    /// `keep`: the keys to keep at any depth, sorted. "items" is known without.
    #[must_use]
    pub fn new(keep: &'static [&'static str]) -> Self {
        Self {
            keep,
            offset: 0,
            expect: Expect::Document,
            token: Token::None,
            depth: 0,
            objects: 0,
            copied: 0,
            skip: None,
            whole: None,
            items_next: false,
            in_items: false,
            had_items: false,
            key: Vec::with_capacity(KEY_MAX),
            key_escaped: false,
            list_kind: String::new(),
            document: Copied::default(),
            item: Copied::default(),
        }
    }

    /// Takes from the input up to the end of the next piece, or all of it where none ends in it.
    ///
    /// # Errors
    /// Where the input is not JSON; the scanner is of no use after that.
    pub fn next<'s>(&'s mut self, input: &mut &[u8]) -> Result<Option<Piece<'s>>, JsonError> {
        while !input.is_empty() {
            let (used, part) = self.step(input)?;
            self.offset += used as u64;
            *input = &input[used..];
            if let Some(part) = part {
                let copied = if part == Part::Item { &self.item } else { &self.document };
                let (offset, text) = (copied.offset, copied.text());
                return Ok(Some(Piece { part, offset, text, list_kind: &self.list_kind }));
            }
        }
        Ok(None)
    }

    /// To be called where the stream ends.
    ///
    /// # Errors
    /// When that is in the middle of a document.
    pub fn finish(&self) -> Result<(), JsonError> {
        match self.expect {
            Expect::Document => Ok(()),
            Expect::Value
            | Expect::ValueOrEnd
            | Expect::Key
            | Expect::KeyOrEnd
            | Expect::Colon
            | Expect::CommaOrEnd => Err(self.error("it ends in the middle of a document")),
        }
    }

    /// Bytes taken so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    fn error(&self, why: &'static str) -> JsonError {
        JsonError { offset: self.offset, why }
    }

    /// Looks at the head of a non-empty input: how many bytes it took (0: look again), and what ended with them.
    fn step(&mut self, input: &[u8]) -> Result<(usize, Option<Part>), JsonError> {
        match self.token {
            Token::None => self.between(input[0]),
            Token::Text { key, escape } => self.text(input, key, escape),
            Token::Number(digits, count) => self.number(input[0], digits, count),
            Token::Literal(rest) => {
                if rest.first() != Some(&input[0]) {
                    return Err(self.error("expected true, false or null"));
                }
                self.copy(&input[..1]);
                self.token = Token::Literal(&rest[1..]);
                if rest.len() > 1 {
                    return Ok((1, None));
                }
                self.token = Token::None;
                Ok((1, self.value_ended()))
            }
        }
    }

    fn between(&mut self, byte: u8) -> Result<(usize, Option<Part>), JsonError> {
        if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
            return Ok((1, None));
        }
        match (self.expect, byte) {
            (Expect::Document, b'{') => {
                self.document.begin(self.offset);
                self.list_kind.clear();
                self.had_items = false;
                self.open(b'{')?;
            }
            (Expect::Document, _) => {
                return Err(self.error("expected an object, as kubectl get ... -o json prints it"));
            }
            (Expect::KeyOrEnd, b'}') | (Expect::ValueOrEnd, b']') => return Ok((1, self.close(byte))),
            (Expect::Key | Expect::KeyOrEnd, b'"') => {
                self.key.clear();
                self.key_escaped = false;
                self.token = Token::Text { key: true, escape: Escape::None };
            }
            (Expect::Key | Expect::KeyOrEnd, _) => return Err(self.error("expected a key in quotes")),
            (Expect::Colon, b':') => self.expect = Expect::Value,
            (Expect::Colon, _) => return Err(self.error("expected a colon after the key")),
            (Expect::CommaOrEnd, b',') => {
                self.expect = if self.in_object() { Expect::Key } else { Expect::Value };
            }
            (Expect::CommaOrEnd, b'}') if self.in_object() => return Ok((1, self.close(byte))),
            (Expect::CommaOrEnd, b']') if !self.in_object() => return Ok((1, self.close(byte))),
            (Expect::CommaOrEnd, _) => return Err(self.error("expected a comma or the end of the list or object")),
            (Expect::Value | Expect::ValueOrEnd, _) => self.value(byte)?,
        }
        Ok((1, None))
    }

    /// The first byte of a value.
    fn value(&mut self, byte: u8) -> Result<(), JsonError> {
        let is_items = std::mem::take(&mut self.items_next);
        if is_items && byte == b'[' {
            (self.in_items, self.had_items) = (true, true);
            return self.open(byte);
        }
        if is_items {
            self.skip = Some(self.depth);
        }
        if self.in_items && self.depth == 2 {
            self.item.begin(self.offset);
        } else if !self.in_object() {
            self.separate();
        }
        self.token = match byte {
            b'{' | b'[' => return self.open(byte),
            b'"' => Token::Text { key: false, escape: Escape::None },
            b'-' => Token::Number(Digits::Minus, 1),
            b'0' => Token::Number(Digits::Zero, 1),
            b'1'..=b'9' => Token::Number(Digits::Whole, 1),
            b't' => Token::Literal(b"rue"),
            b'f' => Token::Literal(b"alse"),
            b'n' => Token::Literal(b"ull"),
            _ => return Err(self.error("expected a value")),
        };
        self.copy(&[byte]);
        Ok(())
    }

    fn text(&mut self, input: &[u8], key: bool, escape: Escape) -> Result<(usize, Option<Part>), JsonError> {
        let byte = input[0];
        let (used, escape) = match escape {
            Escape::None => match input.iter().position(|b| matches!(b, b'"' | b'\\' | 0..=0x1f)) {
                Some(0) if byte == b'"' => {
                    self.token = Token::None;
                    if key {
                        self.key_ended();
                        return Ok((1, None));
                    }
                    self.copy(b"\"");
                    self.note_kind();
                    return Ok((1, self.value_ended()));
                }
                Some(0) if byte == b'\\' => {
                    self.key_escaped |= key;
                    (1, Escape::Begun)
                }
                Some(0) => return Err(self.error("a control character in a string")),
                plain => (plain.unwrap_or(input.len()), Escape::None),
            },
            Escape::Begun => match byte {
                b'u' => (1, Escape::Hex(4)),
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => (1, Escape::None),
                _ => return Err(self.error("an unknown escape in a string")),
            },
            Escape::Hex(left) if byte.is_ascii_hexdigit() => {
                (1, if left == 1 { Escape::None } else { Escape::Hex(left - 1) })
            }
            Escape::Hex(_) => return Err(self.error("expected four hex digits")),
        };
        if key {
            let room = KEY_MAX + 1 - self.key.len();
            self.key.extend_from_slice(&input[..used.min(room)]);
        } else {
            self.copy(&input[..used]);
        }
        self.token = Token::Text { key, escape };
        Ok((used, None))
    }

    fn number(&mut self, byte: u8, digits: Digits, count: u32) -> Result<(usize, Option<Part>), JsonError> {
        use Digits::*;
        let next = match (digits, byte) {
            (Minus, b'0') => Zero,
            (Minus | Whole, b'0'..=b'9') => Whole,
            (Zero | Whole, b'.') => Dot,
            (Dot | Fraction, b'0'..=b'9') => Fraction,
            (Zero | Whole | Fraction, b'e' | b'E') => Exponent,
            (Exponent, b'+' | b'-') => Sign,
            (Exponent | Sign | Power, b'0'..=b'9') => Power,
            (Zero | Whole | Fraction | Power, _) => {
                self.token = Token::None;
                if digits == Whole && count > INTEGER_MAX {
                    self.copy(b"e0");
                }
                return Ok((0, self.value_ended()));
            }
            (Minus | Dot | Exponent | Sign, _) => return Err(self.error("expected a digit")),
        };
        // The parser behind this one does not know 1e+3, and gives up on the whole object where an integer is too long,
        // but not on a fraction.
        if byte != b'+' {
            self.copy(&[byte]);
        }
        self.token = Token::Number(next, count.saturating_add(1));
        Ok((1, None))
    }

    fn open(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.depth == DEPTH_MAX {
            return Err(self.error("nested too deep"));
        }
        if !(self.in_items && self.depth == 1) {
            self.copy(&[byte]);
        }
        self.depth += 1;
        let bit = 1 << (self.depth - 1);
        self.copied &= !bit;
        if byte == b'{' {
            self.objects |= bit;
            self.expect = Expect::KeyOrEnd;
        } else {
            self.objects &= !bit;
            self.expect = Expect::ValueOrEnd;
        }
        Ok(())
    }

    fn close(&mut self, byte: u8) -> Option<Part> {
        if self.in_items && self.depth == 2 {
            self.in_items = false;
            self.depth = 1;
            self.expect = Expect::CommaOrEnd;
            return None;
        }
        self.copy(&[byte]);
        self.depth -= 1;
        self.value_ended()
    }

    fn value_ended(&mut self) -> Option<Part> {
        self.expect = if self.depth == 0 { Expect::Document } else { Expect::CommaOrEnd };
        if self.skip == Some(self.depth) {
            self.skip = None;
            return None;
        }
        if self.whole == Some(self.depth) {
            self.whole = None;
        }
        match self.depth {
            0 if self.had_items => Some(Part::Envelope),
            0 => Some(Part::Whole),
            2 if self.in_items => Some(Part::Item),
            _ => None,
        }
    }

    fn key_ended(&mut self) {
        self.expect = Expect::Colon;
        if self.skip.is_some() {
            return;
        }
        let key = std::str::from_utf8(&self.key).unwrap_or_default();
        let is_kept = match self.whole {
            Some(_) => key.len() <= KEY_MAX,
            None => self.keep.binary_search(&key).is_ok() || (self.depth == 1 && key == "items"),
        };
        if self.key_escaped || !is_kept {
            self.skip = Some(self.depth);
        } else if self.depth == 1 && key == "items" && self.whole.is_none() {
            self.items_next = true;
        } else {
            if self.whole.is_none() && key == WHOLE {
                self.whole = Some(self.depth);
            }
            let key = std::mem::take(&mut self.key);
            self.separate();
            for part in [b"\"", &*key, b"\":"] {
                self.copy(part);
            }
            self.key = key;
        }
    }

    /// The list's kind is needed before the list ends.
    fn note_kind(&mut self) {
        if self.depth == 1 && self.skip.is_none() && self.key == b"kind" {
            let text = self.document.bytes.strip_suffix(b"\"").unwrap_or_default();
            let from = text.iter().rposition(|b| *b == b'"').map_or(0, |at| at + 1);
            self.list_kind = String::from_utf8_lossy(&text[from..][..(text.len() - from).min(KEY_MAX)]).into_owned();
        }
    }

    fn in_object(&self) -> bool {
        self.depth > 0 && self.objects & (1 << (self.depth - 1)) != 0
    }

    fn separate(&mut self) {
        if self.skip.is_some() {
            return;
        }
        let bit = 1 << (self.depth - 1);
        if self.copied & bit != 0 {
            self.copy(b",");
        }
        self.copied |= bit;
    }

    fn copy(&mut self, bytes: &[u8]) {
        if self.skip.is_none() {
            if self.in_items { self.item.push(bytes) } else { self.document.push(bytes) }
        }
    }
}

#[cfg(test)]
mod tests;
