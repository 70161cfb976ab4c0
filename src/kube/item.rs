//! One item's JSON -> objects of the table, or an error that names kind, namespace, name and field.

use super::{
    convert::{self, Bad, Dropped, Intern, SUBSETS_MAX, check_name},
    json::Piece,
    rule, types,
};
use crate::table::model::{Name, Object, ObjectId, PodId, ServiceId, SliceId};
use nanoserde::{DeJson, DeJsonErr, DeJsonErrReason};
use std::fmt;

/// What an item could not be read for. Where the whole item is meant, `keep` names what it would have become: the old
/// version of that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// "Service shop/web", or where it is in the file.
    pub what: String,
    pub bad: Bad,
    pub keep: Vec<ObjectId>,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, bad: Bad { field, why }, .. } = self;
        if field.is_empty() { write!(f, "{what}: {why}") } else { write!(f, "{what}: {field}: {why}") }
    }
}

/// What became of an item. Of a [`Read::Objects`] with trouble the rest is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    Objects(Vec<Object>, Option<Trouble>),
    /// Not a kind that we read.
    Skipped,
    Bad(Trouble),
}

/// The kinds that become objects of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
    Node,
    Pod,
    /// Istio's DestinationRule.
    Rule,
}

impl Kind {
    /// Others have a kind "Service" too, in groups of their own.
    fn of(kind: &str, api_version: Option<&str>) -> Option<Self> {
        let (kind, group) = match kind {
            "Service" => (Self::Service, "v1"),
            "Endpoints" => (Self::Endpoints, "v1"),
            "Node" => (Self::Node, "v1"),
            "Pod" => (Self::Pod, "v1"),
            "EndpointSlice" => (Self::EndpointSlice, "discovery.k8s.io/v1"),
            "DestinationRule" => (Self::Rule, "networking.istio.io/"),
            _ => return None,
        };
        let fits = |version: &str| version == group || (group.ends_with('/') && version.starts_with(group));
        api_version.is_none_or(fits).then_some(kind)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Rule => "DestinationRule",
        }
    }
}

/// Reads one piece that is no envelope.
pub fn read(piece: &Piece<'_>, names: Intern<'_>) -> Read {
    let at = || format!("the object at byte {}", piece.offset);
    let nameless = |bad| Read::Bad(Trouble { what: at(), bad, keep: Vec::new() });
    let text = match piece.text {
        Ok(text) => text,
        Err(unfit) => return nameless(Bad { field: String::new(), why: unfit.to_string() }),
    };
    let head = match types::Head::deserialize_json(text) {
        Ok(head) => head,
        Err(error) => return nameless(explain(text, &error)),
    };
    // Items of a ServiceList, as the API server prints it, do not repeat their kind.
    let kind = head.kind.as_deref().unwrap_or_else(|| piece.list_kind.strip_suffix("List").unwrap_or(""));
    if kind.is_empty() {
        return nameless(Bad { field: "kind".into(), why: "is missing".into() });
    }
    let Some(kind) = Kind::of(kind, head.api_version.as_deref()) else { return Read::Skipped };
    let meta = head.metadata.unwrap_or_default();
    match identify(kind, &meta, names) {
        Ok(identity) => identity.read(text, names),
        Err(bad) => Read::Bad(Trouble { what: format!("{} in {}", kind.name(), at()), bad, keep: Vec::new() }),
    }
}

/// An object of a kind that its request says: what it says itself of its kind is of no account.
pub struct One {
    identity: Identity,
    /// Tells it from another that had the same name.
    pub uid: String,
    /// Its resourceVersion.
    pub version: String,
}

impl One {
    /// # Errors
    /// Where it has no name that can be used.
    pub fn of(kind: Kind, text: &str, names: Intern<'_>) -> Result<Self, Bad> {
        let head = types::Head::deserialize_json(text).map_err(|error| explain(text, &error))?;
        let meta = head.metadata.unwrap_or_default();
        let identity = identify(kind, &meta, names)?;
        Ok(Self { identity, uid: meta.uid.unwrap_or_default(), version: meta.version.unwrap_or_default() })
    }

    /// All that it may have in the table.
    #[must_use]
    pub fn ids(&self) -> Vec<ObjectId> {
        self.identity.would_be()
    }

    /// The text must be the one of [`One::of`].
    pub fn read(&self, text: &str, names: Intern<'_>) -> Read {
        self.identity.read(text, names)
    }
}

struct Identity {
    kind: Kind,
    /// Empty for nodes.
    namespace: Name,
    name: Name,
}

fn identify(kind: Kind, meta: &types::Meta, names: Intern<'_>) -> Result<Identity, Bad> {
    let name = meta.name.as_deref().unwrap_or("");
    let namespace = match (kind, meta.namespace.as_deref()) {
        (Kind::Node, _) => "",
        (_, None | Some("")) => "default",
        (_, Some(namespace)) => {
            check_name("metadata.namespace", namespace, true)?;
            namespace
        }
    };
    check_name("metadata.name", name, kind == Kind::Service)?;
    let name = match kind {
        Kind::Service | Kind::Endpoints | Kind::Node | Kind::Rule => names(name),
        // Nothing else has these names.
        Kind::EndpointSlice | Kind::Pod => name.into(),
    };
    Ok(Identity { kind, namespace: names(namespace), name })
}

impl Identity {
    fn what(&self) -> String {
        match self.kind {
            Kind::Node => format!("Node {}", self.name),
            kind @ (Kind::Service | Kind::EndpointSlice | Kind::Endpoints | Kind::Pod | Kind::Rule) => {
                format!("{} {}/{}", kind.name(), self.namespace, self.name)
            }
        }
    }

    fn service(&self) -> ServiceId {
        ServiceId { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    fn pod(&self) -> PodId {
        PodId { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    fn slice(&self) -> SliceId {
        SliceId { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    fn would_be(&self) -> Vec<ObjectId> {
        let subset = |index| SliceId::of_subset(self.namespace.clone(), &self.name, index);
        match self.kind {
            Kind::Service => vec![ObjectId::Service(self.service())],
            Kind::EndpointSlice => vec![ObjectId::Slice(self.slice())],
            Kind::Endpoints => (0..SUBSETS_MAX).map(|index| ObjectId::Slice(subset(index))).collect(),
            Kind::Node => vec![ObjectId::Node(self.name.clone())],
            Kind::Pod => vec![ObjectId::Pod(self.pod())],
            Kind::Rule => vec![ObjectId::Rule(self.service())],
        }
    }

    fn read(&self, text: &str, names: Intern<'_>) -> Read {
        let mut dropped = Dropped::default();
        match self.objects(text, &mut dropped, names) {
            Ok(objects) => {
                let trouble = |bad| Trouble { what: self.what(), bad, keep: Vec::new() };
                Read::Objects(objects, dropped.summary().map(trouble))
            }
            Err(bad) => Read::Bad(Trouble { what: self.what(), bad, keep: self.would_be() }),
        }
    }

    fn objects(&self, text: &str, dropped: &mut Dropped, names: Intern<'_>) -> Result<Vec<Object>, Bad> {
        fn parse<T: DeJson>(text: &str) -> Result<T, Bad> {
            T::deserialize_json(text).map_err(|error| explain(text, &error))
        }
        Ok(match self.kind {
            Kind::Service => {
                vec![Object::Service(convert::service(self.service(), parse(text)?, dropped, names)?)]
            }
            Kind::EndpointSlice => {
                let slice = convert::slice(self.slice(), parse(text)?, dropped, names)?;
                slice.into_iter().map(Object::Slice).collect()
            }
            Kind::Endpoints => {
                let slices = convert::subsets(&self.service(), parse(text)?, dropped, names)?;
                slices.into_iter().map(Object::Slice).collect()
            }
            Kind::Node => vec![Object::Node(convert::node(self.name.clone(), parse(text)?, dropped, names))],
            Kind::Pod => vec![Object::Pod(convert::pod(self.pod(), parse(text)?, dropped))],
            Kind::Rule => vec![Object::Rule(rule::read(self.service(), text, names))],
        })
    }
}

/// The parser's error with the path of the value that it stumbled over.
fn explain(text: &str, error: &DeJsonErr) -> Bad {
    let why = match &error.msg {
        DeJsonErrReason::UnexpectedToken(_, expected) => match expected.as_str() {
            "string" | "String" => "expected a string".into(),
            "{" => "expected an object".into(),
            "[" => "expected a list".into(),
            "boolean" => "expected true or false".into(),
            other => format!("expected {other}"),
        },
        DeJsonErrReason::CannotParse(what) => format!("cannot read the {what}"),
        DeJsonErrReason::OutOfRange(what) => format!("{what} is out of range"),
        other => format!("{other:?}").trim_end().to_lowercase(),
    };
    // The parser has taken the value and one more character, or a part of the value and none more.
    Bad { field: path_before(text, error.col.saturating_sub(1)), why }
}

/// The path of the last value that begins before a character of compact JSON.
fn path_before(text: &str, limit: usize) -> String {
    enum In {
        Object(String),
        List(usize),
    }
    let mut stack: Vec<In> = Vec::new();
    let mut path = String::new();
    let mut expects_key = false;
    let mut chars = text.chars().enumerate();
    while let Some((_, c)) = chars.next().filter(|(at, _)| *at < limit) {
        let mut string = None;
        match c {
            ',' => {
                match stack.last_mut() {
                    Some(In::List(index)) => *index += 1,
                    Some(In::Object(_)) => expects_key = true,
                    None => {}
                }
                continue;
            }
            ':' => continue,
            '}' | ']' => {
                stack.pop();
                continue;
            }
            '"' => {
                let mut escaped = false;
                let inside = chars.by_ref().map(|(_, c)| c).take_while(|c| {
                    let ends = *c == '"' && !escaped;
                    escaped = *c == '\\' && !escaped;
                    !ends
                });
                string = Some(inside.collect::<String>());
            }
            _ => {}
        }
        if expects_key {
            if let (Some(In::Object(key)), Some(name)) = (stack.last_mut(), string) {
                *key = name;
            }
            expects_key = false;
            continue;
        }
        path = stack.iter().fold(String::new(), |path, level| match level {
            In::Object(key) if path.is_empty() => key.clone(),
            In::Object(key) => format!("{path}.{key}"),
            In::List(index) => format!("{path}[{index}]"),
        });
        match c {
            '{' => {
                stack.push(In::Object(String::new()));
                expects_key = true;
            }
            '[' => stack.push(In::List(0)),
            _ => {}
        }
    }
    path
}

#[cfg(test)]
mod tests;
