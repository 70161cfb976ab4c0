//! A strict reader for the YAML that kubeconfigs are written in: block mappings and lists, flow ones (and so JSON),
//! plain and quoted scalars, block scalars, comments. Anchors, tags, aliases and several documents are refused.

use std::fmt;

/// Collections in each other; a kubeconfig has five.
const DEPTH_MAX: u32 = 16;

#[derive(Clone, PartialEq, Eq)]
pub enum Yaml {
    Null,
    Text(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct YamlError {
    pub line: usize,
    pub why: &'static str,
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for YamlError {}

static NULL: Yaml = Yaml::Null;

impl Yaml {
    /// # Errors
    /// Where the text is not of the kind that is read here.
    pub fn parse(text: &str) -> Result<Self, YamlError> {
        let mut reader = Reader { text, at: 0, line: 1, depth: 0 };
        reader.skip()?;
        if reader.rest().starts_with("---") && reader.column() == 0 {
            reader.bump(3);
            reader.skip()?;
        }
        let value = reader.value(0, false)?;
        reader.skip()?;
        if reader.rest().starts_with("...") && reader.column() == 0 {
            reader.bump(3);
            reader.skip()?;
        }
        if reader.rest().is_empty() { Ok(value) } else { Err(reader.error("this does not belong to what is above it")) }
    }

    /// The value of a key; Null where there is none.
    #[must_use]
    pub fn get(&self, key: &str) -> &Self {
        match self {
            Self::Map(members) => members.iter().find(|(k, _)| k == key).map_or(&NULL, |(_, v)| v),
            Self::Null | Self::Text(_) | Self::List(_) => &NULL,
        }
    }

    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Null | Self::List(_) | Self::Map(_) => None,
        }
    }

    #[must_use]
    pub fn list(&self) -> &[Self] {
        match self {
            Self::List(list) => list,
            Self::Null | Self::Text(_) | Self::Map(_) => &[],
        }
    }
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    line: usize,
    depth: u32,
}

impl<'t> Reader<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn error(&self, why: &'static str) -> YamlError {
        YamlError { line: self.line, why }
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn bump(&mut self, bytes: usize) {
        self.line += self.rest()[..bytes].matches('\n').count();
        self.at += bytes;
    }

    fn column(&self) -> usize {
        self.at - self.text[..self.at].rfind('\n').map_or(0, |at| at + 1)
    }

    /// Over blanks, line ends and comments.
    fn skip(&mut self) -> Result<(), YamlError> {
        loop {
            let rest = self.rest();
            let blanks = rest.len() - rest.trim_start_matches([' ', '\n', '\r']).len();
            self.bump(blanks);
            match self.peek() {
                Some('#') if self.column() == 0 || blanks > 0 || self.text[..self.at].ends_with([' ', '\t']) => {
                    let end = self.rest().find('\n').unwrap_or_else(|| self.rest().len());
                    self.bump(end);
                }
                Some('\t') if self.rest().trim_start_matches(['\t', ' ']).starts_with(['\n', '\r', '#']) => {
                    self.bump(1)
                }
                Some('\t') => return Err(self.error("a tab; YAML wants blanks")),
                _ => return Ok(()),
            }
        }
    }

    /// A value whose block must begin at or behind a column. `inline`: behind a key or a dash on the same line.
    fn value(&mut self, column: usize, inline: bool) -> Result<Yaml, YamlError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("nested too deep"));
        }
        let value = self.value_at(column, inline);
        self.depth -= 1;
        value
    }

    fn value_at(&mut self, column: usize, inline: bool) -> Result<Yaml, YamlError> {
        let line = self.line;
        self.skip()?;
        let at = self.column();
        if self.rest().is_empty() || (self.line > line || !inline) && at < column || self.is_marker() {
            return Ok(Yaml::Null);
        }
        match self.peek() {
            Some('&' | '*' | '!' | '%' | '@' | '`') => Err(self.error("anchors, aliases and tags are not read here")),
            Some('{' | '[') => self.flow(),
            Some('|' | '>') => self.block_scalar(column),
            Some('?') if self.rest()[1..].starts_with([' ', '\n']) => {
                Err(self.error("keys behind a ? are not read here"))
            }
            Some('-') if self.rest()[1..].is_empty() || self.rest()[1..].starts_with([' ', '\n', '\r']) => {
                self.list(at)
            }
            _ if self.key_end().is_some() && (!inline || self.line > line || column > 0) => {
                self.map(at, inline && self.line == line)
            }
            _ => Ok(scalar(self.text_value(column)?)),
        }
    }

    fn is_marker(&self) -> bool {
        self.column() == 0 && (self.rest().starts_with("---") || self.rest().starts_with("..."))
    }

    fn list(&mut self, column: usize) -> Result<Yaml, YamlError> {
        let mut list = Vec::new();
        loop {
            let rest = self.rest();
            let dash = rest.starts_with("- ") || rest.starts_with("-\n") || rest.starts_with("-\r") || rest == "-";
            if self.column() != column || !dash || self.is_marker() {
                return Ok(Yaml::List(list));
            }
            self.bump(1);
            list.push(self.value(column + 1, true)?);
            self.skip()?;
        }
    }

    /// Where the key that begins here ends, if it is one.
    fn key_end(&self) -> Option<usize> {
        let rest = self.rest();
        let line = &rest[..rest.find('\n').unwrap_or(rest.len())];
        let from = match line.chars().next()? {
            quote @ ('"' | '\'') => line[1..].find(quote)? + 2,
            _ => 0,
        };
        let colon = line[from..].match_indices(':').map(|(at, _)| from + at);
        colon
            .into_iter()
            .find(|at| line[at + 1..].is_empty() || line[at + 1..].starts_with([' ', '\t', '\r']))
            .filter(|at| from == 0 && !line[..*at].contains(" #") || line[from..*at].trim().is_empty())
    }

    fn map(&mut self, column: usize, inline: bool) -> Result<Yaml, YamlError> {
        // `key: a: b` is no mapping; `- key: value` is one.
        if inline && self.text[..self.at].trim_end_matches(' ').ends_with(':') {
            return Err(self.error("a key behind a key on one line"));
        }
        let mut members: Vec<(String, Yaml)> = Vec::new();
        loop {
            if self.rest().is_empty() || self.column() != column || self.is_marker() {
                if self.column() > column && !self.rest().is_empty() {
                    return Err(self.error("indented further than the line above"));
                }
                return Ok(Yaml::Map(members));
            }
            let Some(end) = self.key_end() else { return Err(self.error("expected key: value")) };
            let key = self.rest()[..end].trim().trim_matches(['"', '\'']).to_owned();
            if key == "<<" || members.iter().any(|(k, _)| *k == key) {
                return Err(self.error("a key that is there twice, or a merge"));
            }
            self.bump(end + 1);
            // A list may stand in the column of its key.
            let line = self.line;
            let mut ahead = Reader { depth: 0, ..*self };
            ahead.skip()?;
            let is_list = ahead.line > line && ahead.column() == column && ahead.rest().starts_with("- ");
            let value = self.value(if is_list { column } else { column + 1 }, true)?;
            members.push((key, value));
            self.skip()?;
        }
    }

    /// A scalar in block context: to the end of its line, and over the lines behind that are indented at least so.
    fn text_value(&mut self, column: usize) -> Result<(String, bool), YamlError> {
        if let Some('"' | '\'') = self.peek() {
            let text = self.quoted()?;
            let rest = self.rest();
            let line = rest[..rest.find('\n').unwrap_or(rest.len())].trim();
            if !line.is_empty() && !line.starts_with('#') {
                return Err(self.error("something behind the closing quote"));
            }
            return Ok((text, true));
        }
        let mut text = String::new();
        loop {
            let rest = self.rest();
            let line = &rest[..rest.find('\n').unwrap_or(rest.len())];
            let part = &line[..line.find(" #").unwrap_or(line.len())];
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(part.trim());
            self.bump(line.len());
            let mut ahead = Reader { depth: 0, ..*self };
            ahead.skip()?;
            // One that is indented like the rest goes on; nothing that is a key or an item does.
            let goes_on = !ahead.rest().is_empty() && ahead.line > self.line && ahead.column() >= column.max(1);
            if !goes_on || ahead.key_end().is_some() || part.len() < line.len() {
                return Ok((text, false));
            }
            *self = Reader { depth: self.depth, ..ahead };
        }
    }

    fn quoted(&mut self) -> Result<String, YamlError> {
        let quote = self.peek().unwrap_or('"');
        self.bump(1);
        let mut text = String::new();
        loop {
            let Some(c) = self.peek() else { return Err(self.error("a quote that is not closed")) };
            self.bump(c.len_utf8());
            match c {
                '\'' if quote == '\'' && self.peek() == Some('\'') => {
                    self.bump(1);
                    text.push('\'');
                }
                _ if c == quote => return Ok(text),
                '\\' if quote == '"' => {
                    let Some(c) = self.peek() else { continue };
                    self.bump(c.len_utf8());
                    text.push(match c {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        '"' | '\\' | '/' | ' ' => c,
                        'u' => {
                            let hex = self.rest().get(..4).and_then(|h| u32::from_str_radix(h, 16).ok());
                            let Some(c) = hex.and_then(char::from_u32) else { return Err(self.error("a bad \\u")) };
                            self.bump(4);
                            c
                        }
                        _ => return Err(self.error("an escape that is not read here")),
                    });
                }
                '\n' => return Err(self.error("a quoted text over several lines is not read here")),
                c => text.push(c),
            }
        }
    }

    /// `|` keeps the lines, `>` joins them.
    fn block_scalar(&mut self, column: usize) -> Result<Yaml, YamlError> {
        let keeps = self.peek() == Some('|');
        let rest = self.rest();
        let header = &rest[1..rest.find('\n').unwrap_or(rest.len())];
        let strips = match header.trim() {
            "" | "+" => false,
            "-" => true,
            _ => return Err(self.error("a block scalar of this form is not read here")),
        };
        self.bump(1 + header.len());
        let (mut text, mut indent) = (String::new(), None);
        while self.rest().starts_with('\n') {
            let line = self.rest()[1..].split('\n').next().unwrap_or_default();
            let blank = line.trim().is_empty();
            let own = line.len() - line.trim_start_matches(' ').len();
            let indent = *indent.get_or_insert(own);
            if !blank && (own < indent || own < column.max(1)) {
                break;
            }
            self.bump(1 + line.len());
            text.push_str(line.get(indent..).unwrap_or_default().trim_end_matches('\r'));
            text.push(if keeps || blank { '\n' } else { ' ' });
            if self.rest().is_empty() {
                break;
            }
        }
        let end = text.trim_end().len();
        text.truncate(end);
        if !strips && !text.is_empty() {
            text.push('\n');
        }
        Ok(Yaml::Text(text))
    }

    fn flow(&mut self) -> Result<Yaml, YamlError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("nested too deep"));
        }
        self.skip()?;
        let value = match self.peek() {
            Some('{') => {
                let mut members: Vec<(String, Yaml)> = Vec::new();
                self.bump(1);
                while !self.closes('}')? {
                    let key = self.flow_scalar()?.0;
                    if members.iter().any(|(k, _)| *k == key) {
                        return Err(self.error("a key that is there twice"));
                    }
                    self.skip()?;
                    let value = if self.peek() == Some(':') {
                        self.bump(1);
                        self.flow()?
                    } else {
                        Yaml::Null
                    };
                    members.push((key, value));
                    self.comma('}')?;
                }
                Yaml::Map(members)
            }
            Some('[') => {
                let mut list = Vec::new();
                self.bump(1);
                while !self.closes(']')? {
                    list.push(self.flow()?);
                    self.comma(']')?;
                }
                Yaml::List(list)
            }
            _ => scalar(self.flow_scalar()?),
        };
        self.depth -= 1;
        Ok(value)
    }

    fn closes(&mut self, end: char) -> Result<bool, YamlError> {
        self.skip()?;
        let closes = self.peek() == Some(end);
        self.bump(usize::from(closes));
        Ok(closes)
    }

    fn comma(&mut self, end: char) -> Result<(), YamlError> {
        self.skip()?;
        match self.peek() {
            Some(',') => self.bump(1),
            Some(c) if c == end => {}
            _ => return Err(self.error("expected a comma or the closing bracket")),
        }
        Ok(())
    }

    fn flow_scalar(&mut self) -> Result<(String, bool), YamlError> {
        match self.peek() {
            Some('"' | '\'') => return Ok((self.quoted()?, true)),
            Some('&' | '*' | '!' | '%' | '@' | '`' | '|' | '>') | None => {
                return Err(self.error("expected a value"));
            }
            Some(_) => {}
        }
        let rest = self.rest();
        let mut end = rest.find([',', '{', '}', '[', ']', '\n']).unwrap_or(rest.len());
        // A colon ends a key only before a blank, so that addresses may stand without quotes.
        if let Some(colon) = rest[..end].find(": ").or_else(|| rest[..end].strip_suffix(':').map(str::len)) {
            end = colon;
        }
        self.bump(end);
        Ok((rest[..end].trim().to_owned(), false))
    }
}

/// What stands without quotes may be nothing.
fn scalar((text, quoted): (String, bool)) -> Yaml {
    if !quoted && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL") { Yaml::Null } else { Yaml::Text(text) }
}

#[cfg(test)]
mod tests;
