//! Change -> Table. Mark and sweep by generation: a complete list removes only what its own source named before.
//! Each event costs O(log n) for the object and for each address that it names.

use super::{Entry, Record, Table, Versions, endpoint_slot, index, model::*, packed::StoredSlice};
use std::{collections::HashSet, net::IpAddr, rc::Rc};

/// Where a source stands with its lists.
#[derive(Debug, Default)]
pub(super) struct List {
    generation: u32,
    /// Between Begin and its Complete or Abort.
    open: bool,
    completed: bool,
}

impl List {
    pub(super) fn complete(&self) -> bool {
        self.completed
    }
}

impl Table {
    /// Applies one change; true where something that a reader can see changed.
    pub fn apply(&mut self, change: Change) -> bool {
        let changed = match change {
            Change::Begin(source) => {
                let list = self.lists.entry(source).or_default();
                list.generation = list.generation.wrapping_add(1);
                list.open = true;
                false
            }
            Change::Apply(source, object) => {
                let generation = self.lists.entry(source).or_default().generation;
                match object {
                    Object::Service(service) => self.put_service(source, generation, service),
                    Object::Slice(slice) => self.put_slice(source, generation, slice),
                    Object::Node(node) => self.put_node(source, generation, node),
                    Object::Pod(pod) => self.pods.put(source, generation, pod, &mut self.names),
                    Object::Rule(rule) => self.rules.put(source, generation, rule),
                }
            }
            Change::Keep(source, id) => {
                self.keep(source, &id);
                false
            }
            Change::Delete(source, id) => self.delete(source, &id),
            Change::Complete(source) => self.complete(source),
            Change::Abort(source) => {
                self.lists.entry(source).or_default().open = false;
                false
            }
        };
        self.version += u64::from(changed);
        changed
    }

    fn put_service(&mut self, source: Source, generation: u32, mut service: Service) -> bool {
        self.names.share(&mut service.id.namespace);
        self.names.share(&mut service.id.name);
        if let Some(ports) = Rc::get_mut(&mut service.ports) {
            ports.iter_mut().for_each(|p| self.names.share(&mut p.name));
        }
        self.service_ports.share(&mut service.ports);
        let slot = self.slot_for(&service.id);
        let keys: Vec<_> = keys(&service).collect();
        let namespace = service.id.namespace.clone();
        let versions = &mut self.records[slot as usize].services;
        let was_named = !versions.is_empty();
        let put = put(versions, source, generation, service);
        if let Put::Same = put {
            return false;
        }
        if !was_named && let Some(namespace) = self.namespaces.get_mut(&namespace) {
            namespace.services += 1;
        }
        for key in keys {
            self.by_vip.add(key, slot);
        }
        if let Put::Replaced(old, _) = &put {
            self.unindex_vips(slot, old);
        }
        put.is_visible()
    }

    fn put_slice(&mut self, source: Source, generation: u32, slice: Slice) -> bool {
        let mut moved = false;
        if let Some((slot, _)) = self.find_slice(source, &slice.id)
            && self.records[slot as usize].id.name != slice.service
        {
            moved = self.delete(source, &ObjectId::Slice(slice.id.clone()));
        }
        let slice_key = slice_key(source, &slice.id);
        let (service, slice) = self.pack(slice);
        let slot = self.slot_for(&service);
        let record = &mut self.records[slot as usize];
        let visible = record.source() == Some(source);
        let found = record.slices.binary_search_by(|e| (&e.value.name, e.source).cmp(&(&slice.name, source)));
        let addresses =
            |slice: &StoredSlice| slice.endpoints().map(|e| index::of_address(e.address)).collect::<Vec<_>>();
        let half = endpoint_slot(slot, &slice);
        match found {
            Ok(at) => {
                let entry = &mut record.slices[at];
                entry.generation = generation;
                if entry.value == slice {
                    return moved;
                }
                addresses(&slice).into_iter().for_each(|key| self.by_endpoint.add(key, half));
                let old = std::mem::replace(&mut entry.value, slice);
                addresses(&old).into_iter().for_each(|key| self.by_endpoint.remove(key, half));
            }
            Err(at) => {
                self.by_slice.add(slice_key, slot);
                addresses(&slice).into_iter().for_each(|key| self.by_endpoint.add(key, half));
                insert_exact(&mut record.slices, at, Entry { source, generation, value: slice });
            }
        }
        visible || moved
    }

    /// Shares what many objects have, and drops endpoints that are named twice. With the Service that it belongs to.
    fn pack(&mut self, slice: Slice) -> (ServiceId, StoredSlice) {
        let Slice { id: SliceId { mut namespace, name }, mut service, mut ports, mut endpoints } = slice;
        let names = &mut self.names;
        names.share(&mut namespace);
        names.share(&mut service);
        if let Some(ports) = Rc::get_mut(&mut ports) {
            ports.iter_mut().for_each(|p| names.share(&mut p.name));
        }
        self.slice_ports.share(&mut ports);
        let mut seen = HashSet::with_capacity(endpoints.len());
        endpoints.retain(|e| seen.insert(e.address));
        (ServiceId { namespace, name: service }, StoredSlice::new(name, ports, endpoints, names, &mut self.abouts))
    }

    fn put_node(&mut self, source: Source, generation: u32, mut node: NodeInfo) -> bool {
        self.names.share(&mut node.name);
        node.zone.iter_mut().for_each(|zone| self.names.share(zone));
        node.addresses.shrink_to_fit();
        let name = node.name.clone();
        let before = self.node_addresses(&name);
        let put = put(self.nodes.entry(name.clone()).or_default(), source, generation, node);
        self.reindex_node(&name, &before);
        put.is_visible()
    }

    fn node_addresses(&self, name: &str) -> Vec<IpAddr> {
        self.node(name).map(|n| n.addresses.clone()).unwrap_or_default()
    }

    fn reindex_node(&mut self, name: &Name, before: &[IpAddr]) {
        for address in before {
            if let Some(holders) = self.node_addresses.get_mut(address) {
                holders.retain(|n| n != name);
                if holders.is_empty() {
                    self.node_addresses.remove(address);
                }
            }
        }
        for address in self.node_addresses(name) {
            let holders = self.node_addresses.entry(address).or_default();
            if let Err(at) = holders.binary_search(name) {
                insert_exact(holders, at, name.clone());
            }
        }
    }

    /// The generation of a source's version of an object.
    fn generation(&mut self, source: Source, id: &ObjectId) -> Option<&mut u32> {
        fn of<T>(versions: &mut [Entry<T>], source: Source) -> Option<&mut u32> {
            versions.iter_mut().find(|e| e.source == source).map(|e| &mut e.generation)
        }
        match id {
            ObjectId::Service(id) => {
                let slot = self.slot(&id.namespace, &id.name)?;
                of(&mut self.records[slot as usize].services, source)
            }
            ObjectId::Node(name) => of(self.nodes.get_mut(name)?, source),
            ObjectId::Pod(id) => of(self.pods.find_mut(id)?, source),
            ObjectId::Rule(id) => of(self.rules.find_mut(id)?, source),
            ObjectId::Slice(id) => {
                let (slot, at) = self.find_slice(source, id)?;
                Some(&mut self.records[slot as usize].slices[at].generation)
            }
        }
    }

    fn keep(&mut self, source: Source, id: &ObjectId) {
        let current = self.lists.entry(source).or_default().generation;
        if let Some(generation) = self.generation(source, id) {
            *generation = current;
        }
    }

    /// Whether a source's version of an object is in the table, seen or shadowed.
    pub fn has(&mut self, source: Source, id: &ObjectId) -> bool {
        self.generation(source, id).is_some()
    }

    fn delete(&mut self, source: Source, id: &ObjectId) -> bool {
        match id {
            ObjectId::Service(id) => {
                let Some(slot) = self.slot(&id.namespace, &id.name) else { return false };
                let versions = &mut self.records[slot as usize].services;
                let Some((old, visible)) = take(versions, source) else { return false };
                if versions.is_empty()
                    && let Some(namespace) = self.namespaces.get_mut(&id.namespace)
                {
                    namespace.services -= 1;
                }
                self.unindex_vips(slot, &old);
                self.release(slot, id);
                visible
            }
            ObjectId::Node(name) => {
                let before = self.node_addresses(name);
                let Some(versions) = self.nodes.get_mut(name) else { return false };
                let Some((_, visible)) = take(versions, source) else { return false };
                if versions.is_empty() {
                    self.nodes.remove(name);
                }
                self.reindex_node(name, &before);
                visible
            }
            ObjectId::Pod(id) => self.pods.delete(source, id),
            ObjectId::Rule(id) => self.rules.delete(source, id),
            ObjectId::Slice(id) => {
                let Some((slot, at)) = self.find_slice(source, id) else { return false };
                let record = &mut self.records[slot as usize];
                let visible = record.source() == Some(source);
                let old = record.slices.remove(at).value;
                record.slices.shrink_to_fit();
                let service = record.id.clone();
                self.by_slice.remove(slice_key(source, id), slot);
                let half = endpoint_slot(slot, &old);
                old.endpoints().for_each(|e| self.by_endpoint.remove(index::of_address(e.address), half));
                self.release(slot, &service);
                visible
            }
        }
    }

    /// Ends a list. The first complete one is a visible change even when empty: readers wait for it.
    fn complete(&mut self, source: Source) -> bool {
        let list = self.lists.entry(source).or_default();
        let first = !std::mem::replace(&mut list.completed, true);
        let generation = list.generation;
        if !std::mem::take(&mut list.open) {
            return first;
        }
        fn stale<T>(entry: &Entry<T>, source: Source, generation: u32) -> bool {
            entry.source == source && entry.generation != generation
        }
        let mut gone = Vec::new();
        for record in &self.records {
            let services = record.services.iter().filter(|e| stale(e, source, generation));
            gone.extend(services.map(|e| ObjectId::Service(e.value.id.clone())));
            let slices = record.slices.iter().filter(|e| stale(e, source, generation));
            gone.extend(slices.map(|e| ObjectId::Slice(record.slice_id(&e.value))));
        }
        let nodes = self.nodes.values().flatten().filter(|e| stale(e, source, generation));
        gone.extend(nodes.map(|e| ObjectId::Node(e.value.name.clone())));
        let pods = self.pods.entries().filter(|e| stale(e, source, generation));
        gone.extend(pods.map(|e| ObjectId::Pod(e.value.id.clone())));
        let rules = self.rules.versions().flatten().filter(|e| stale(e, source, generation));
        gone.extend(rules.map(|e| ObjectId::Rule(e.value.id.clone())));
        let changed = gone.iter().fold(first, |changed, id| self.delete(source, id) || changed);
        drop(gone);
        self.clean();
        changed
    }

    fn find_slice(&self, source: Source, id: &SliceId) -> Option<(u32, usize)> {
        self.by_slice.slots(slice_key(source, id)).find_map(|slot| {
            let record = &self.records[slot as usize];
            let found = record.slices.binary_search_by(|e| (&e.value.name, e.source).cmp(&(&id.name, source)));
            found.ok().filter(|_| record.id.namespace == id.namespace).map(|at| (slot, at))
        })
    }

    fn slot_for(&mut self, id: &ServiceId) -> u32 {
        if let Some(slot) = self.slot(&id.namespace, &id.name) {
            return slot;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.records.push(Record::default());
            u32::try_from(self.records.len() - 1).unwrap_or(u32::MAX)
        });
        self.records[slot as usize].id = id.clone();
        self.namespaces.entry(id.namespace.clone()).or_default().slots.insert(id.name.clone(), slot);
        slot
    }

    /// Frees the slot of a record that has nothing left.
    fn release(&mut self, slot: u32, id: &ServiceId) {
        let record = &self.records[slot as usize];
        if !record.services.is_empty() || !record.slices.is_empty() {
            return;
        }
        if let Some(namespace) = self.namespaces.get_mut(&id.namespace) {
            namespace.slots.remove(&id.name);
            if namespace.slots.is_empty() {
                self.namespaces.remove(&id.namespace);
            }
        }
        self.records[slot as usize] = Record::default();
        self.free.push(slot);
    }

    /// Gives back what nobody has any more.
    pub(super) fn clean(&mut self) {
        self.abouts.clean();
        self.names.clean();
    }

    fn unindex_vips(&mut self, slot: u32, service: &Service) {
        for key in keys(service) {
            self.by_vip.remove(key, slot);
        }
    }
}

/// All that a Service is looked for by.
fn keys(service: &Service) -> impl Iterator<Item = u32> + '_ {
    let node_ports = service.ports.iter().filter(|p| p.node_port > 0);
    let addresses = service.vips.iter().chain(&*service.external_ips).map(|ip| index::of_address(*ip));
    addresses.chain(node_ports.map(|p| index::of_node_port(p.node_port, p.protocol)))
}

fn slice_key(source: Source, id: &SliceId) -> u32 {
    index::hash(&(source, id))
}

/// What became of a version that was put in its place; the flag says whether it is the one that is seen.
pub(super) enum Put<T> {
    Same,
    New(bool),
    Replaced(T, bool),
}

impl<T> Put<T> {
    pub(super) fn is_visible(&self) -> bool {
        match self {
            Self::Same => false,
            Self::New(visible) | Self::Replaced(_, visible) => *visible,
        }
    }
}

pub(super) fn put<T: PartialEq>(versions: &mut Versions<T>, source: Source, generation: u32, value: T) -> Put<T> {
    match versions.binary_search_by_key(&source, |e| e.source) {
        Ok(at) => {
            let visible = at + 1 == versions.len();
            versions[at].generation = generation;
            if versions[at].value == value {
                return Put::Same;
            }
            Put::Replaced(std::mem::replace(&mut versions[at].value, value), visible)
        }
        Err(at) => {
            insert_exact(versions, at, Entry { source, generation, value });
            Put::New(at + 1 == versions.len())
        }
    }
}

pub(super) fn take<T>(versions: &mut Versions<T>, source: Source) -> Option<(T, bool)> {
    let at = versions.binary_search_by_key(&source, |e| e.source).ok()?;
    let visible = at + 1 == versions.len();
    let old = versions.remove(at).value;
    versions.shrink_to_fit();
    Some((old, visible))
}

/// `Vec::insert` makes room for four at first, which thousands of lists of one would pay for.
fn insert_exact<T>(list: &mut Vec<T>, at: usize, value: T) {
    list.reserve_exact(1);
    list.insert(at, value);
}
