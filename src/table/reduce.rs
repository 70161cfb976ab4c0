//! Change -> Table. Mark and sweep by generation: a complete list removes only what its own source named before.

use super::{Entry, Table, Versions, model::*};
use std::collections::BTreeMap;

/// Where a source stands with its lists.
#[derive(Debug, Default)]
pub(super) struct List {
    generation: u32,
    completed: u32,
}

impl List {
    pub(super) fn complete(&self) -> bool {
        self.completed > 0
    }
}

/// Puts a version in its place by source; true where the table's visible content changed.
fn put<T: PartialEq>(versions: &mut Versions<T>, source: Source, generation: u32, value: T) -> bool {
    match versions.binary_search_by_key(&source, |e| e.source) {
        Ok(at) => {
            versions[at].generation = generation;
            let changed = versions[at].value != value;
            versions[at].value = value;
            changed
        }
        Err(at) => {
            versions.insert(at, Entry { source, generation, value });
            true
        }
    }
}

fn take<K: Ord, T>(map: &mut BTreeMap<K, Versions<T>>, key: &K, source: Source) -> bool {
    let Some(versions) = map.get_mut(key) else { return false };
    let before = versions.len();
    versions.retain(|e| e.source != source);
    let changed = versions.len() != before;
    if versions.is_empty() {
        map.remove(key);
    }
    changed
}

fn stale<K: Clone, T>(map: &BTreeMap<K, Versions<T>>, source: Source, generation: u32) -> Vec<K> {
    map.iter()
        .filter(|(_, v)| v.iter().any(|e| e.source == source && e.generation != generation))
        .map(|(k, _)| k.clone())
        .collect()
}

impl Table {
    /// Applies one change; true where something that a reader can see changed.
    pub fn apply(&mut self, change: Change) -> bool {
        let changed = match change {
            Change::Begin(source) => {
                let list = self.lists.entry(source).or_default();
                list.generation = list.generation.wrapping_add(1);
                false
            }
            Change::Apply(source, object) => self.insert(source, object),
            Change::Delete(source, id) => self.delete(source, &id),
            Change::Complete(source) => self.sweep(source),
        };
        if changed {
            self.reindex();
            self.version += 1;
        }
        changed
    }

    fn insert(&mut self, source: Source, object: Object) -> bool {
        let generation = self.lists.entry(source).or_default().generation;
        match object {
            Object::Service(s) => put(self.services.entry(s.id.clone()).or_default(), source, generation, s),
            Object::Node(n) => put(self.nodes.entry(n.name.clone()).or_default(), source, generation, n),
            Object::Slice(s) => {
                let owner = ServiceId { namespace: s.id.namespace.clone(), name: s.service.clone() };
                let mut moved = false;
                if self.slice_owner.get(&(source, s.id.clone())).is_some_and(|old| *old != owner) {
                    moved = self.delete(source, &ObjectId::Slice(s.id.clone()));
                }
                self.slice_owner.insert((source, s.id.clone()), owner.clone());
                let of_service = self.slices.entry(owner).or_default();
                put(of_service.entry(s.id.clone()).or_default(), source, generation, s) || moved
            }
        }
    }

    fn delete(&mut self, source: Source, id: &ObjectId) -> bool {
        match id {
            ObjectId::Service(id) => take(&mut self.services, id, source),
            ObjectId::Node(name) => take(&mut self.nodes, name, source),
            ObjectId::Slice(id) => {
                let Some(owner) = self.slice_owner.remove(&(source, id.clone())) else { return false };
                let Some(of_service) = self.slices.get_mut(&owner) else { return false };
                let changed = take(of_service, id, source);
                if of_service.is_empty() {
                    self.slices.remove(&owner);
                }
                changed
            }
        }
    }

    fn sweep(&mut self, source: Source) -> bool {
        let list = self.lists.entry(source).or_default();
        list.completed += 1;
        let generation = list.generation;
        let mut gone: Vec<ObjectId> =
            stale(&self.services, source, generation).into_iter().map(ObjectId::Service).collect();
        gone.extend(stale(&self.nodes, source, generation).into_iter().map(ObjectId::Node));
        for of_service in self.slices.values() {
            gone.extend(stale(of_service, source, generation).into_iter().map(ObjectId::Slice));
        }
        let first = list_completed_once(&self.lists, source);
        gone.iter().fold(first, |changed, id| self.delete(source, id) || changed)
    }

    fn reindex(&mut self) {
        self.by_vip.clear();
        self.by_endpoint.clear();
        self.namespaces.clear();
        for (id, versions) in &self.services {
            let Some(service) = versions.last().map(|e| &e.value) else { continue };
            *self.namespaces.entry(id.namespace.clone()).or_default() += 1;
            for vip in service.vips.iter().chain(&service.external_ips) {
                self.by_vip.entry(*vip).or_insert_with(|| id.clone());
            }
        }
        let ids: Vec<ServiceId> = self.slices.keys().cloned().collect();
        for id in ids {
            let addresses: Vec<_> = self.endpoints(&id).map(|(_, e)| e.address).collect();
            for address in addresses {
                self.by_endpoint.entry(address).or_default().insert(id.clone());
            }
        }
    }
}

/// The first complete list is a visible change even when empty: readers wait for it.
fn list_completed_once(lists: &BTreeMap<Source, List>, source: Source) -> bool {
    lists.get(&source).is_some_and(|l| l.completed == 1)
}
