//! What the objects of one list and watch do to the table. Nothing but hashes is kept of them here.

use super::{
    item::{One, Read},
    known::{Known, Verdict},
    loading::{ENDPOINTS_MAX, OBJECTS_MAX, Troubles},
    resource::Resource,
};
use crate::table::{
    Table,
    model::{Change, Name, Object, ObjectId, Source},
    scope::Scope,
};
use siphasher::sip::SipHasher13;
use std::hash::{Hash, Hasher};

/// How a list came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Complete,
    /// Something may be gone, and this list cannot tell: ask again soon.
    Doubtful,
}

pub(super) struct Store {
    pub(super) resource: Resource,
    namespace: Option<Name>,
    pod_names: bool,
    /// While a list is under way: hashes of the ids that it named.
    seen: Option<Vec<u64>>,
    /// Of metaServer.
    known: Option<Known>,
    /// The list has an item without a name that can be read: which is meant nobody knows, so nothing is swept.
    nameless: bool,
    troubles: Troubles,
    /// Objects of ours in the table.
    pub(super) objects: usize,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = SipHasher13::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Versions are opaque, but comparable as numbers since 1.35 (and in practice before); 0 where it is none.
pub(super) fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}

impl Store {
    pub(super) fn new(resource: Resource, namespace: Option<Name>, metaserver: bool, pod_names: bool) -> Self {
        let known = metaserver.then(Known::default);
        let troubles = Troubles::default();
        Self { resource, namespace, pod_names, seen: None, known, nameless: false, troubles, objects: 0 }
    }

    pub(super) fn scope(&self) -> Scope {
        self.resource.scope(self.namespace.as_ref())
    }

    /// A complete list begins.
    pub(super) fn begin(&mut self) {
        self.seen = Some(Vec::new());
        self.nameless = false;
        self.troubles = Troubles::default();
        if let Some(known) = &mut self.known {
            known.begin();
        }
    }

    /// The list has broken off: nothing is swept.
    pub(super) fn abort(&mut self) {
        self.seen = None;
    }

    /// The list is whole. What could not be read in it is told to the log.
    pub(super) fn end(&mut self, version: &str, table: &mut Table) -> (Ended, Option<String>) {
        let mut seen = self.seen.take().unwrap_or_default();
        seen.sort_unstable();
        let scope = self.scope();
        let named = |id: &ObjectId| seen.binary_search(&hash(id)).is_ok();
        let verdict = self.known.as_mut().map_or(Verdict::Cloud, |known| known.end(number(version)));
        if verdict != Verdict::Perhaps && !self.nameless {
            table.sweep(Source::Api, &scope, named);
        }
        let doubtful = match verdict {
            Verdict::Cloud => false,
            Verdict::Again => true,
            Verdict::Perhaps => {
                let mut all_named = true;
                table.each(Source::Api, &scope, &mut |id| all_named &= named(&id));
                !all_named
            }
        };
        let ended = if doubtful { Ended::Doubtful } else { Ended::Complete };
        self.objects = table.count(Source::Api, &scope);
        (ended, std::mem::take(&mut self.troubles).summary())
    }

    /// An object of a list, or of an ADDED or MODIFIED. What is wrong with one of an event.
    pub(super) fn put(&mut self, text: &str, table: &mut Table) -> Result<(), String> {
        let one = match One::of(self.resource.kind(), text, &mut |name| table.intern(name)) {
            Ok(one) => one,
            Err(bad) => return self.unreadable(&format!("an object without a usable name: {} {}", bad.field, bad.why)),
        };
        let ids = one.ids();
        if let (Some(known), Some(first)) = (&mut self.known, ids.first()) {
            let (id, uid, version) = (hash(first), hash(&one.uid), number(&one.version));
            let used = if self.seen.is_some() { known.listed(id, uid, version) } else { known.event(id, uid, version) };
            if !used {
                return Ok(());
            }
        }
        match one.read(text, &mut |name| table.intern(name)) {
            Read::Skipped => Ok(()),
            Read::Bad(trouble) => {
                // The old version stays.
                self.name(trouble.keep.iter());
                self.complain(&trouble)
            }
            Read::Objects(objects, trouble) => {
                let held: Vec<ObjectId> = objects.iter().map(Object::id).collect();
                let over = objects.into_iter().filter_map(|object| self.apply(object, table).err()).last();
                for id in ids.into_iter().filter(|id| !held.contains(id)) {
                    self.delete(id, table);
                }
                self.name(held.iter());
                trouble.into_iter().map(|t| t.to_string()).chain(over).try_for_each(|text| self.complain(&text))
            }
        }
    }

    /// An object of a DELETED.
    pub(super) fn remove(&mut self, text: &str, table: &mut Table) -> Result<(), String> {
        let one = match One::of(self.resource.kind(), text, &mut |name| table.intern(name)) {
            Ok(one) => one,
            Err(bad) => return Err(format!("a deleted object without a usable name: {} {}", bad.field, bad.why)),
        };
        let ids = one.ids();
        if let (Some(known), Some(first)) = (&mut self.known, ids.first())
            && !known.deleted(hash(first), hash(&one.uid), number(&one.version))
        {
            return Ok(());
        }
        ids.into_iter().for_each(|id| self.delete(id, table));
        Ok(())
    }

    /// An item of a list that cannot even be told by its name.
    pub(super) fn unreadable(&mut self, why: &str) -> Result<(), String> {
        self.nameless = true;
        self.complain(&why)
    }

    fn complain(&mut self, what: &impl ToString) -> Result<(), String> {
        if self.seen.is_none() {
            return Err(what.to_string());
        }
        self.troubles.note(what.to_string());
        Ok(())
    }

    fn name<'i>(&mut self, ids: impl Iterator<Item = &'i ObjectId>) {
        if let Some(seen) = &mut self.seen {
            seen.extend(ids.map(hash));
        }
    }

    fn apply(&mut self, mut object: Object, table: &mut Table) -> Result<(), String> {
        let mut endpoints = 0;
        if let Object::Slice(slice) = &mut object {
            if !self.pod_names {
                slice.endpoints.iter_mut().for_each(|e| e.pod = None);
            }
            endpoints = slice.endpoints.len();
        }
        if !table.has(Source::Api, &object.id()) {
            let full = self.objects >= OBJECTS_MAX;
            if full || table.endpoints_held() + endpoints > ENDPOINTS_MAX {
                return Err(format!(
                    "more than {OBJECTS_MAX} objects or {ENDPOINTS_MAX} endpoints: the rest is left out; \
                     [kube] namespaces would choose"
                ));
            }
            self.objects += 1;
        }
        table.apply(Change::Apply(Source::Api, object));
        Ok(())
    }

    fn delete(&mut self, id: ObjectId, table: &mut Table) {
        if table.has(Source::Api, &id) {
            self.objects = self.objects.saturating_sub(1);
            table.apply(Change::Delete(Source::Api, id));
        }
    }
}
