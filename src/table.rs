//! The one state: Services, endpoints and nodes, with one writer. DNS, proxy and tunnel read it in place.

pub mod balance;
pub mod model;
mod reduce;

use model::{Endpoint, Name, NodeInfo, Protocol, Service, ServiceId, Slice, SliceId, Source};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// One object of one source, with the generation of the list that named it last.
#[derive(Clone, Debug)]
struct Entry<T> {
    source: Source,
    generation: u32,
    value: T,
}

/// All sources' versions of one object, the winning one last.
type Versions<T> = Vec<Entry<T>>;

/// See the module.
#[derive(Debug, Default)]
pub struct Table {
    services: BTreeMap<ServiceId, Versions<Service>>,
    /// By Service, then by slice.
    slices: BTreeMap<ServiceId, BTreeMap<SliceId, Versions<Slice>>>,
    /// Which Service each slice belongs to, for deletes and for slices that change their label.
    slice_owner: BTreeMap<(Source, SliceId), ServiceId>,
    nodes: BTreeMap<Name, Versions<NodeInfo>>,
    by_vip: BTreeMap<IpAddr, ServiceId>,
    by_endpoint: BTreeMap<IpAddr, BTreeSet<ServiceId>>,
    namespaces: BTreeMap<Name, usize>,
    lists: BTreeMap<Source, reduce::List>,
    version: u64,
}

impl Table {
    /// Whether every source that began a list has completed one: before that an absent name is unknown, not absent.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.lists.values().all(reduce::List::complete)
    }

    /// Rises with every visible change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        let id = ServiceId { namespace: namespace.into(), name: name.into() };
        self.service_by_id(&id)
    }

    #[must_use]
    pub fn service_by_id(&self, id: &ServiceId) -> Option<&Service> {
        Some(&self.services.get(id)?.last()?.value)
    }

    /// In the order of their ids.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().filter_map(|v| Some(&v.last()?.value))
    }

    #[must_use]
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// The Service whose virtual (or external) address this is.
    #[must_use]
    pub fn by_vip(&self, address: IpAddr) -> Option<&Service> {
        self.service_by_id(self.by_vip.get(&address)?)
    }

    /// Every endpoint of a Service with the slice that names it, from the source that names the Service.
    pub fn endpoints<'t>(&'t self, id: &ServiceId) -> impl Iterator<Item = (&'t Slice, &'t Endpoint)> + use<'t> {
        let source = self.services.get(id).and_then(|v| v.last()).map(|e| e.source);
        self.slices
            .get(id)
            .into_iter()
            .flat_map(BTreeMap::values)
            .flatten()
            .filter(move |entry| Some(entry.source) == source)
            .flat_map(|entry| entry.value.endpoints.iter().map(|endpoint| (&entry.value, endpoint)))
    }

    /// The endpoints of an address, for reverse look-ups.
    pub fn by_endpoint(&self, address: IpAddr) -> impl Iterator<Item = (&Service, &Endpoint)> {
        self.by_endpoint
            .get(&address)
            .into_iter()
            .flatten()
            .filter_map(|id| self.service_by_id(id))
            .flat_map(move |s| self.endpoints(&s.id).map(move |(_, e)| (s, e)))
            .filter(move |(_, e)| e.address == address)
    }

    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        Some(&self.nodes.get(name)?.last()?.value)
    }

    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values().filter_map(|v| Some(&v.last()?.value))
    }

    /// The port of a slice that a Service's port stands for: joined by name and protocol.
    #[must_use]
    pub fn target_port(slice: &Slice, name: &str, protocol: Protocol) -> Option<u16> {
        slice.ports.iter().find(|p| &*p.name == name && p.protocol == protocol).map(|p| p.number)
    }
}
