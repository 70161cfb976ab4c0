//! What toml parsed -> structs, with the place and the path of the first mistake. What serde's derive makes of the same
//! structs is fifty times as large.

use std::{borrow::Cow, fmt, ops::Range};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

pub(crate) type Value<'t> = Spanned<DeValue<'t>>;

/// Why a text does not give what is asked for.
#[derive(Debug)]
pub(crate) struct Mistake {
    pub(crate) span: Range<usize>,
    /// The keys down to it, with dots; empty for the whole text.
    pub(crate) path: String,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    Said(String),
    /// A key of the table at the path, and those that it may have.
    Unknown(String, &'static [&'static str]),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Said(text) => f.write_str(text),
            Self::Unknown(key, known) => write!(f, "unknown field `{key}`, expected one of `{}`", known.join("`, `")),
        }
    }
}

impl Mistake {
    fn new(span: Range<usize>, what: String) -> Self {
        Self { span, path: String::new(), what: What::Said(what) }
    }

    fn below(mut self, key: &str) -> Self {
        if !self.path.is_empty() {
            self.path.insert(0, '.');
        }
        self.path.insert_str(0, key);
        self
    }
}

/// A value of a kind that is not expected, as serde says it.
fn unexpected(value: &Value<'_>, expected: &str) -> Mistake {
    let (kind, text) = match value.get_ref() {
        DeValue::String(s) => ("string ", format!("{s:?}")),
        DeValue::Integer(n) => ("integer ", format!("`{n}`")),
        DeValue::Float(n) => ("floating point ", format!("`{n}`")),
        DeValue::Boolean(b) => ("boolean ", format!("`{b}`")),
        DeValue::Array(_) => ("sequence", String::new()),
        DeValue::Datetime(_) => ("datetime", String::new()),
        DeValue::Table(_) => ("map", String::new()),
    };
    Mistake::new(value.span(), format!("invalid type: {kind}{text}, expected {expected}"))
}

/// What can be read of a value.
pub(crate) trait Read: Sized {
    fn read(value: &Value<'_>) -> Result<Self, Mistake>;

    /// What it is where its key is not there; None: it has to be.
    fn absent() -> Option<Self> {
        None
    }
}

impl Read for bool {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        value.get_ref().as_bool().ok_or_else(|| unexpected(value, "a boolean"))
    }
}

impl Read for String {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        value.get_ref().as_str().map(Into::into).ok_or_else(|| unexpected(value, "a string"))
    }
}

impl Read for i64 {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        let number = value.get_ref().as_integer().ok_or_else(|| unexpected(value, "i64"))?;
        Self::from_str_radix(number.as_str(), number.radix())
            .map_err(|_| Mistake::new(value.span(), format!("invalid value: integer `{number}`, expected i64")))
    }
}

impl Read for u8 {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        let number = i64::read(value)?;
        Self::try_from(number)
            .map_err(|_| Mistake::new(value.span(), format!("invalid value: integer `{number}`, expected u8")))
    }
}

impl<T: Read> Read for Spanned<T> {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        Ok(Self::new(value.span(), T::read(value)?))
    }
}

impl<T: Read> Read for Option<T> {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        T::read(value).map(Some)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }
}

impl<T: Read> Read for Vec<T> {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        let items = value.get_ref().as_array().ok_or_else(|| unexpected(value, "a sequence"))?;
        items.iter().map(T::read).collect()
    }

    fn absent() -> Option<Self> {
        Some(Self::new())
    }
}

/// A table whose keys are the user's, in the order of the keys.
pub(crate) struct Entries<T>(pub(crate) Vec<(Spanned<String>, T)>);

impl<T: Read> Read for Entries<T> {
    fn read(value: &Value<'_>) -> Result<Self, Mistake> {
        let table = value.get_ref().as_table().ok_or_else(|| unexpected(value, "a map"))?;
        let entry = |(key, value): (&Spanned<Cow<'_, str>>, &Value<'_>)| {
            let item = T::read(value).map_err(|e| e.below(key.get_ref()))?;
            Ok((Spanned::new(key.span(), key.get_ref().clone().into_owned()), item))
        };
        table.iter().map(entry).collect::<Result<_, _>>().map(Self)
    }
}

/// A table of which each key is known.
pub(crate) struct Known<'v, 't> {
    table: &'v DeTable<'t>,
    span: Range<usize>,
}

impl<'v, 't> Known<'v, 't> {
    pub(crate) fn new(value: &'v Value<'t>, known: &'static [&'static str]) -> Result<Self, Mistake> {
        let table = value.get_ref().as_table().ok_or_else(|| unexpected(value, "a table"))?;
        match table.keys().find(|key| !known.contains(&&**key.get_ref())) {
            None => Ok(Self { table, span: value.span() }),
            Some(key) => {
                let what = What::Unknown(key.get_ref().clone().into_owned(), known);
                Err(Mistake { span: key.span(), path: String::new(), what })
            }
        }
    }

    pub(crate) fn get<T: Read>(&self, key: &'static str) -> Result<T, Mistake> {
        match self.table.get(key) {
            Some(value) => T::read(value).map_err(|e| e.below(key)),
            None => T::absent().ok_or_else(|| Mistake::new(self.span.clone(), format!("missing field `{key}`"))),
        }
    }
}

/// Reads a whole text.
pub(crate) fn document<T: Read>(text: &str) -> Result<T, Mistake> {
    match DeTable::parse(text) {
        Ok(root) => T::read(&Spanned::new(root.span(), DeValue::Table(root.into_inner()))),
        Err(e) => Err(Mistake::new(e.span().unwrap_or(0..0), e.message().trim_end().to_owned())),
    }
}

/// Structs that are read from tables: each field is a key, and other keys are refused.
macro_rules! tables {
    ($($visible:vis struct $name:ident { $($shown:vis $key:ident: $kind:ty,)* })*) => {$(
        $visible struct $name { $($shown $key: $kind,)* }

        impl $crate::config::read::Read for $name {
            fn read(value: &$crate::config::read::Value<'_>) -> Result<Self, $crate::config::read::Mistake> {
                let known = $crate::config::read::Known::new(value, &[$(stringify!($key)),*])?;
                Ok(Self { $($key: known.get(stringify!($key))?,)* })
            }

            fn absent() -> Option<Self> {
                Self::read(&toml::Spanned::new(0..0, toml::de::DeValue::Table(Default::default()))).ok()
            }
        }
    )*};
}

pub(crate) use tables;
