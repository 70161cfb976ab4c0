//! What one file says on its way into the table, with the bounds of all files together.

use super::{files::Sink, item::Read};
use crate::sorted::Map;
use crate::table::{
    Table,
    model::{Change, Name, Object, ObjectId, Source},
};

/// Objects of all files together; those beyond are left out with an error.
pub const OBJECTS_MAX: usize = 65_536;

/// Endpoints of all files together; slices beyond are left out with an error.
pub const ENDPOINTS_MAX: usize = 262_144;

/// Pages of one list; one with more is given up.
pub(super) const PAGES_MAX: u32 = 4_096;

/// What is wrong with the items of one file: the first, and how many.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    first: Option<String>,
    count: usize,
}

impl Troubles {
    pub(super) fn note(&mut self, text: impl ToString) {
        if self.first.is_none() {
            self.first = Some(text.to_string());
        }
        self.count += 1;
    }

    pub(super) fn summary(self) -> Option<String> {
        let more = self.count.saturating_sub(1);
        self.first.map(|first| if more == 0 { first } else { format!("{first} (and {more} more)") })
    }
}

/// What of the Pods is kept: it costs memory, and few need it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// The names of the endpoints' Pods.
    pub(super) pod_names: bool,
    /// The Pods themselves.
    pub(super) pods: bool,
}

/// One file on its way into the table.
pub(super) struct Loading<'k> {
    pub(super) at: usize,
    /// What broken files named, with their place: a file before them must not take it over.
    pub(super) kept: &'k Map<ObjectId, usize>,
    wanted: Wanted,
    pub(super) ids: Vec<ObjectId>,
    /// Of all files so far.
    pub(super) objects: usize,
    pub(super) endpoints: usize,
    pub(super) skipped: usize,
    pub(super) troubles: Troubles,
}

impl<'k> Loading<'k> {
    pub(super) fn new(
        at: usize,
        kept: &'k Map<ObjectId, usize>,
        objects: usize,
        endpoints: usize,
        wanted: Wanted,
    ) -> Self {
        Self { at, kept, wanted, ids: Vec::new(), objects, endpoints, skipped: 0, troubles: Troubles::default() }
    }
}

pub(super) struct IntoTable<'l, 'k, 't> {
    pub(super) loading: &'l mut Loading<'k>,
    pub(super) table: &'t mut Table,
}

impl Sink for IntoTable<'_, '_, '_> {
    fn intern(&mut self, name: &str) -> Name {
        self.table.intern(name)
    }

    fn take(&mut self, read: Read) {
        match read {
            Read::Skipped => self.loading.skipped += 1,
            Read::Bad(trouble) => {
                self.loading.troubles.note(&trouble);
                for id in trouble.keep {
                    self.table.apply(Change::Keep(Source::Manifests, id.clone()));
                    self.loading.ids.extend(self.table.has(Source::Manifests, &id).then_some(id));
                }
            }
            Read::Objects(objects, trouble) => {
                trouble.iter().for_each(|trouble| self.loading.troubles.note(trouble));
                objects.into_iter().for_each(|object| self.put(object));
            }
        }
    }
}

impl IntoTable<'_, '_, '_> {
    fn put(&mut self, mut object: Object) {
        let loading = &mut *self.loading;
        let endpoints = match &mut object {
            Object::Slice(slice) => {
                if !loading.wanted.pod_names {
                    slice.endpoints.iter_mut().for_each(|e| e.pod = None);
                }
                slice.endpoints.len()
            }
            Object::Pod(_) if !loading.wanted.pods => {
                loading.skipped += 1;
                return;
            }
            Object::Service(_) | Object::Node(_) | Object::Pod(_) | Object::Rule(_) => 0,
        };
        if loading.objects == OBJECTS_MAX {
            return loading
                .troubles
                .note(format!("more than {OBJECTS_MAX} objects in all files: the rest is left out"));
        }
        if loading.endpoints + endpoints > ENDPOINTS_MAX {
            let text = format!("more than {ENDPOINTS_MAX} endpoints in all files: the rest is left out");
            return loading.troubles.note(text);
        }
        loading.objects += 1;
        loading.endpoints += endpoints;
        let id = object.id();
        let taken_over = loading.kept.get(&id).is_some_and(|broken| *broken > loading.at);
        loading.ids.push(id);
        if !taken_over {
            self.table.apply(Change::Apply(Source::Manifests, object));
        }
    }
}
