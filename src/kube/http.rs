//! HTTP/1.1 as a client needs it, without IO: the head of a request -> bytes; bytes, in any chunking, -> the head, the
//! body's pieces and the end of a response (RFC 9112).

use std::fmt;

/// Bytes of one head, or of a chunk's lines and the trailers; a longer one is an error. Go's servers send less than 1 kB.
const HEAD_MAX: usize = 16 << 10;

/// Bytes of a chunk, and of a body whose length is said; more is refused.
const LENGTH_MAX: u64 = 1 << 31;

/// Informational answers (RFC 9110, 15.2) before the real one; more is an error.
const INTERIM_MAX: u8 = 8;

/// What is kept of a header's value that is shown.
const SHOWN_MAX: usize = 200;

/// The answer is not HTTP/1.1 as we can read it; the connection is of no use after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpError(pub &'static str);

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not an answer in HTTP/1.1: {}", self.0)
    }
}

impl std::error::Error for HttpError {}

/// What is read of a response's head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    /// Empty where it is not said.
    pub content_type: String,
    /// Seconds; a date is not read.
    pub retry_after: Option<u32>,
    pub location: String,
    /// The connection ends with this answer.
    pub close: bool,
    encoded: bool,
    chunked: bool,
    length: Option<u64>,
}

impl Head {
    /// The media type is JSON, or none is said.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.content_type.is_empty() || self.content_type.contains("json")
    }
}

/// What comes next in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'b> {
    /// [`Response::head`] is there.
    Head,
    Body(&'b [u8]),
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    StatusLine,
    Headers,
    /// The end of the head was seen: say so, then go on.
    HeadDone,
    Body(u64),
    UntilClose,
    ChunkSize,
    Chunk(u64),
    /// The line end behind a chunk.
    ChunkEnd,
    Trailers,
    Done,
}

/// One response. Feed it with [`Response::next`] until that says [`Part::End`].
#[derive(Debug)]
pub struct Response {
    state: State,
    head: Head,
    line: Vec<u8>,
    /// Of the head, or of the lines since the last chunk.
    line_bytes: usize,
    interim: u8,
}

impl Default for Response {
    fn default() -> Self {
        Self { state: State::StatusLine, head: Head::default(), line: Vec::new(), line_bytes: 0, interim: 0 }
    }
}

impl Response {
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Takes from the input up to the end of the next part, or all of it where none ends in it.
    ///
    /// # Errors
    /// Where it is no response.
    pub fn next<'b>(&mut self, input: &mut &'b [u8]) -> Result<Option<Part<'b>>, HttpError> {
        loop {
            match self.state {
                State::HeadDone => {
                    self.state = self.body()?;
                    return Ok(Some(Part::Head));
                }
                State::Body(0) => self.state = State::Done,
                State::Done => return Ok(Some(Part::End)),
                _ if input.is_empty() => return Ok(None),
                State::Body(left) => {
                    let taken = take(input, left);
                    self.state = State::Body(left - taken.len() as u64);
                    return Ok(Some(Part::Body(taken)));
                }
                State::Chunk(left) => {
                    let taken = take(input, left);
                    let left = left - taken.len() as u64;
                    self.state = if left == 0 { State::ChunkEnd } else { State::Chunk(left) };
                    return Ok(Some(Part::Body(taken)));
                }
                State::UntilClose => return Ok(Some(Part::Body(std::mem::take(input)))),
                State::StatusLine | State::Headers | State::ChunkSize | State::ChunkEnd | State::Trailers => {
                    if self.take_line(input)? {
                        let line = std::mem::take(&mut self.line);
                        self.state = self.after_line(&line)?;
                        self.line = line;
                        self.line.clear();
                    }
                }
            }
        }
    }

    /// Gives back the last bytes of the body's part that came last.
    pub fn unread(&mut self, count: usize) {
        let count = count as u64;
        self.state = match self.state {
            State::Body(left) => State::Body(left + count),
            State::Chunk(left) => State::Chunk(left + count),
            State::ChunkEnd if count > 0 => State::Chunk(count),
            other => other,
        };
    }

    /// Whether the end of the connection is this response's own end.
    #[must_use]
    pub fn ends_with_connection(&self) -> bool {
        matches!(self.state, State::UntilClose | State::Done)
    }

    /// True once a whole line, without its end, is in `line`.
    fn take_line(&mut self, input: &mut &[u8]) -> Result<bool, HttpError> {
        let (taken, whole) = match input.iter().position(|b| *b == b'\n') {
            Some(at) => (at + 1, true),
            None => (input.len(), false),
        };
        self.line_bytes += taken;
        if self.line_bytes > HEAD_MAX {
            return Err(HttpError("its head is too long"));
        }
        self.line.extend_from_slice(&input[..taken]);
        *input = &input[taken..];
        if whole {
            self.line.pop();
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
        }
        Ok(whole)
    }

    fn after_line(&mut self, line: &[u8]) -> Result<State, HttpError> {
        Ok(match self.state {
            State::StatusLine => {
                let bad = HttpError("no status line");
                let rest = line.strip_prefix(b"HTTP/1.").ok_or(bad)?;
                let (minor, rest) = rest.split_first().ok_or(bad)?;
                let digits = rest.strip_prefix(b" ").and_then(|r| r.get(..3)).ok_or(bad)?;
                let status = std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok());
                let status: u16 = status.filter(|s| (100..600).contains(s)).ok_or(bad)?;
                if rest.get(4).is_some_and(|b| *b != b' ') {
                    return Err(bad);
                }
                self.head = Head { status, close: *minor == b'0', ..Head::default() };
                State::Headers
            }
            State::Headers if line.is_empty() => {
                self.line_bytes = 0;
                if self.head.status >= 200 {
                    return Ok(State::HeadDone);
                }
                self.interim += 1;
                if self.interim > INTERIM_MAX || self.head.status == 101 {
                    return Err(HttpError("too many interim answers"));
                }
                State::StatusLine
            }
            State::Headers => {
                self.header(line)?;
                State::Headers
            }
            State::ChunkSize => {
                self.line_bytes = 0;
                match chunk_size(line)? {
                    0 => State::Trailers,
                    size => State::Chunk(size),
                }
            }
            State::ChunkEnd if line.is_empty() => State::ChunkSize,
            State::ChunkEnd => return Err(HttpError("a chunk is longer than it says")),
            State::Trailers if line.is_empty() => State::Done,
            other @ (State::Trailers
            | State::HeadDone
            | State::Body(_)
            | State::UntilClose
            | State::Chunk(_)
            | State::Done) => other,
        })
    }

    fn header(&mut self, line: &[u8]) -> Result<(), HttpError> {
        let bad = HttpError("a header without a name");
        let at = line.iter().position(|b| *b == b':').filter(|at| *at > 0).ok_or(bad)?;
        let (name, value) = (&line[..at], line[at + 1..].trim_ascii());
        if !name.iter().all(|b| b.is_ascii_graphic()) {
            return Err(bad);
        }
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        let has = |token: &str| {
            value.split(|b| *b == b',').any(|part| part.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
        };
        let text = || String::from_utf8_lossy(&value[..value.len().min(SHOWN_MAX)]).into_owned();
        let number = |value: &[u8]| {
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            std::str::from_utf8(value).ok().filter(|_| digits).and_then(|v| v.parse::<u64>().ok())
        };
        if is("content-length") {
            let length = number(value).filter(|n| *n <= LENGTH_MAX).ok_or(HttpError("a length that is none"))?;
            if self.head.length.is_some_and(|before| before != length) {
                return Err(HttpError("two lengths"));
            }
            self.head.length = Some(length);
        } else if is("transfer-encoding") {
            if !has("chunked") || value.contains(&b',') {
                return Err(HttpError("a transfer coding that was not asked for"));
            }
            self.head.chunked = true;
        } else if is("content-encoding") {
            self.head.encoded = !has("identity");
        } else if is("connection") {
            self.head.close |= has("close");
        } else if is("content-type") {
            self.head.content_type = text().to_ascii_lowercase();
        } else if is("retry-after") {
            self.head.retry_after = number(value).and_then(|n| u32::try_from(n).ok());
        } else if is("location") {
            self.head.location = text();
        }
        Ok(())
    }

    /// How the body is delimited (RFC 9112, 6.3).
    fn body(&mut self) -> Result<State, HttpError> {
        let head = &mut self.head;
        if head.encoded {
            return Err(HttpError("a compressed body that was not asked for"));
        }
        Ok(match (head.status, head.chunked, head.length) {
            (204 | 304, _, _) => State::Done,
            (_, true, _) => State::ChunkSize,
            (_, false, Some(length)) => State::Body(length),
            (_, false, None) => {
                head.close = true;
                State::UntilClose
            }
        })
    }
}

fn take<'b>(input: &mut &'b [u8], most: u64) -> &'b [u8] {
    let n = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
    let (taken, rest) = input.split_at(n);
    *input = rest;
    taken
}

/// The size in front of a chunk; what follows a semicolon is of no account.
fn chunk_size(line: &[u8]) -> Result<u64, HttpError> {
    let digits = line.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    let hex = !digits.is_empty() && digits.len() <= 16 && digits.iter().all(u8::is_ascii_hexdigit);
    let size = std::str::from_utf8(digits).ok().filter(|_| hex).and_then(|d| u64::from_str_radix(d, 16).ok());
    size.filter(|s| *s <= LENGTH_MAX).ok_or(HttpError("a chunk without a size"))
}

/// A GET. Nothing of the arguments may hold a line end: they are checked where they are read.
pub fn get(host: &str, path: &str, agent: &str, token: Option<&str>, out: &mut Vec<u8>) {
    out.clear();
    let lines = ["GET ", path, " HTTP/1.1\r\nHost: ", host, "\r\nUser-Agent: ", agent];
    lines.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
    out.extend_from_slice(b"\r\nAccept: application/json\r\n");
    if let Some(token) = token {
        for part in ["Authorization: Bearer ", token, "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// A value of a query (RFC 3986, 2.3: all but the unreserved characters are escaped).
pub fn escape(value: &str, out: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let hex = |n: u8| char::from(b"0123456789ABCDEF"[usize::from(n & 15)]);
            out.extend(['%', hex(byte >> 4), hex(byte)]);
        }
    }
}

#[cfg(test)]
mod tests;
