//! One file's bytes -> what is in it, in any chunking.

use super::{
    item::{self, Read},
    json::{JsonError, Part, Scanner},
    types::{self, KEEP},
};
use crate::table::model::Name;
use nanoserde::DeJson;
use siphasher::sip::SipHasher13;
use std::{fmt, hash::Hasher};

/// Why nothing of a file can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    NotJson(JsonError),
    /// A file that is written anew is empty at first; a list without items is not.
    Empty,
    /// It holds the API server's error instead of objects.
    Status(String),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson(error) => error.fmt(f),
            Self::Empty => f.write_str("it is empty"),
            Self::Status(message) => write!(f, "it is an error of the API server: {}", message.escape_debug()),
        }
    }
}

impl std::error::Error for Unreadable {}

impl From<JsonError> for Unreadable {
    fn from(error: JsonError) -> Self {
        Self::NotJson(error)
    }
}

/// The first look at a file: whether it can be used, and the hash of its bytes.
#[derive(Debug)]
pub struct Check {
    scanner: Scanner,
    hash: SipHasher13,
    documents: usize,
}

impl Default for Check {
    fn default() -> Self {
        Self { scanner: Scanner::new(KEEP), hash: SipHasher13::new(), documents: 0 }
    }
}

impl Check {
    /// # Errors
    /// Where the file cannot be used.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Unreadable> {
        self.hash.write(bytes);
        while let Some(piece) = self.scanner.next(&mut bytes)? {
            match piece.part {
                Part::Item => continue,
                Part::Envelope | Part::Whole => self.documents += 1,
            }
            let head = piece.text.ok().and_then(|text| Some((text, types::Head::deserialize_json(text).ok()?)));
            if let Some((text, head)) = head
                && head.kind.as_deref() == Some("Status")
            {
                let status = types::Status::deserialize_json(text).unwrap_or_default();
                return Err(Unreadable::Status(status.message.unwrap_or_default()));
            }
        }
        Ok(())
    }

    /// The hash of the whole file.
    ///
    /// # Errors
    /// Where the file cannot be used.
    pub fn finish(&self) -> Result<u64, Unreadable> {
        self.scanner.finish()?;
        if self.documents == 0 {
            return Err(Unreadable::Empty);
        }
        Ok(self.hash.finish())
    }
}

/// Takes what a file says, and shares its names.
pub trait Sink {
    fn intern(&mut self, name: &str) -> Name;
    fn take(&mut self, read: Read);
}

/// The second look: everything that is in the file.
#[derive(Debug)]
pub struct Reading {
    scanner: Scanner,
    hash: SipHasher13,
}

impl Default for Reading {
    fn default() -> Self {
        Self { scanner: Scanner::new(KEEP), hash: SipHasher13::new() }
    }
}

impl Reading {
    /// # Errors
    /// Where the file is not JSON; what came before has been taken.
    pub fn feed(&mut self, mut bytes: &[u8], sink: &mut impl Sink) -> Result<(), JsonError> {
        self.hash.write(bytes);
        while let Some(piece) = self.scanner.next(&mut bytes)? {
            if piece.part != Part::Envelope {
                let read = item::read(&piece, &mut |name| sink.intern(name));
                sink.take(read);
            }
        }
        Ok(())
    }

    /// The hash of the whole file: if it is not that of the check, the file has changed in between.
    ///
    /// # Errors
    /// Where the file ends in the middle of a document.
    pub fn finish(&self) -> Result<u64, JsonError> {
        self.scanner.finish()?;
        Ok(self.hash.finish())
    }
}
