//! What is wrong with a configuration, and where.

use super::read::{Mistake, What};
use std::{fmt, ops::Range};

/// Names nothing nearer than this many edits.
const NEAR: usize = 3;

/// One mistake: line and column (from 1, in characters), the key, what was found and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub line: usize,
    pub column: usize,
    /// Empty where the text is no TOML.
    pub key: String,
    pub what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    pub(super) fn new(text: &str, span: Range<usize>, key: &str, what: impl Into<String>) -> Self {
        let before = text.get(..span.start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Self { line, column, key: key.into(), what: what.into() }
    }

    pub(super) fn from_mistake(text: &str, mistake: Mistake) -> Self {
        let Mistake { span, path, what } = mistake;
        match what {
            What::Said(what) => Self::new(text, span, &path, what),
            What::Unknown(key, known) => {
                let full = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                let what = match nearest(&key, known) {
                    Some(near) => format!("unknown key; did you mean {}?", full(near)),
                    None => format!("unknown key; known here are {}", known.join(", ")),
                };
                Self::new(text, span, &full(&key), what)
            }
        }
    }
}

fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let near = known.iter().map(|k| (distance(key, k), *k)).min()?;
    (near.0 <= NEAR && near.0 < key.chars().count().max(2)).then_some(near.1)
}

/// Levenshtein's.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let swap = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = swap.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in [("", "", 0), ("a", "", 1), ("listen", "lisen", 1), ("kitten", "sitting", 3)] {
            assert_eq!(distance(a, b), d, "{a} {b}");
            assert_eq!(distance(b, a), d, "{b} {a}");
        }
    }

    #[test]
    fn the_nearest_key_is_near() {
        let known = ["enable", "listen", "ttl"];
        assert_eq!(nearest("lisen", &known), Some("listen"));
        assert_eq!(nearest("TTL", &known), None);
        assert_eq!(nearest("take_over", &known), None);
    }
}
