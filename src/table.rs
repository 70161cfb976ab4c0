//! The one state: Services, endpoints and nodes, with one writer. DNS, proxy and tunnel read it in place.

pub mod balance;
mod index;
pub mod model;
pub mod packed;
mod pods;
mod pool;
mod reduce;
pub mod scope;
pub mod snapshot;
pub mod statics;
#[cfg(test)]
mod tests;

use index::Index;
use model::{Name, NodeInfo, Protocol, Service, ServiceId, ServiceKind, ServicePort, SliceId, SlicePort, Source};
use packed::{About, EndpointRef, StoredSlice};
use std::{collections::BTreeMap, net::IpAddr};

/// Addresses of API servers that are remembered; of more the oldest is forgotten.
const SERVERS_MAX: usize = 32;

/// The Service that leads to the API servers.
const KUBERNETES: (&str, &str) = ("default", "kubernetes");

/// One object of one source, with the generation of the list that named it last.
#[derive(Clone, Debug)]
struct Entry<T> {
    source: Source,
    generation: u32,
    value: T,
}

/// All sources' versions of one object, the winning one last.
type Versions<T> = Vec<Entry<T>>;

/// A Service, in all its versions, and its slices by name and source. Slices may come before their Service.
#[derive(Debug, Default)]
struct Record {
    id: ServiceId,
    services: Versions<Service>,
    slices: Vec<Entry<StoredSlice>>,
}

impl Record {
    /// The source whose Service is seen; only its slices are seen with it.
    fn source(&self) -> Option<Source> {
        Some(self.services.last()?.source)
    }

    fn service(&self) -> Option<&Service> {
        Some(&self.services.last()?.value)
    }

    fn slice_id(&self, slice: &StoredSlice) -> SliceId {
        SliceId { namespace: self.id.namespace.clone(), name: slice.name.clone() }
    }

    /// Endpoints objects count only where there is no EndpointSlice.
    fn visible_slices(&self) -> impl Iterator<Item = &StoredSlice> + Clone {
        let source = self.source();
        let of_source = self.slices.iter().filter(move |e| Some(e.source) == source).map(|e| &e.value);
        let sliced = of_source.clone().any(|s| !s.is_subset());
        of_source.filter(move |s| !(sliced && s.is_subset()))
    }
}

/// The Services of one namespace.
#[derive(Debug, Default)]
struct Namespace {
    slots: BTreeMap<Name, u32>,
    /// Those that are more than slices without a Service.
    services: usize,
}

/// See the module.
///
/// 5,000 Services with 20,000 endpoints in 5,000 slices keep 2.8 MB, measured on x86-64: 0.7 the Services, 0.7 records
/// (0.4 of it touched), 0.6 slices and endpoints, 0.3 indices, the rest names. musl's allocator makes two thirds more of it.
#[derive(Debug, Default)]
pub struct Table {
    namespaces: BTreeMap<Name, Namespace>,
    records: Vec<Record>,
    /// Slots of records that are empty.
    free: Vec<u32>,
    nodes: BTreeMap<Name, Versions<NodeInfo>>,
    /// The nodes whose visible version has the address. Sites behind NATs often share private addresses.
    node_addresses: BTreeMap<IpAddr, Vec<Name>>,
    pods: pods::Pods,
    /// All versions' vips, external addresses and node ports -> slot.
    by_vip: Index,
    /// All slices' endpoints -> 2 × slot, + 1 for subsets of Endpoints objects.
    by_endpoint: Index,
    /// Slices' ids with their source -> slot: for deletes, and for slices that change their label.
    by_slice: Index,
    lists: BTreeMap<Source, reduce::List>,
    names: pool::Pool<str>,
    abouts: pool::Pool<About>,
    service_ports: pool::Recent<ServicePort>,
    slice_ports: pool::Recent<SlicePort>,
    /// Addresses at which API servers are.
    servers: Vec<IpAddr>,
    version: u64,
}

impl Table {
    /// Says that a source will list: the table is not synced before it has.
    pub fn expect(&mut self, source: Source) {
        self.lists.entry(source).or_default();
    }

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

    /// The shared allocation of a name.
    pub fn intern(&mut self, name: &str) -> Name {
        self.names.get(name)
    }

    fn slot(&self, namespace: &str, name: &str) -> Option<u32> {
        self.namespaces.get(namespace)?.slots.get(name).copied()
    }

    fn record(&self, id: &ServiceId) -> Option<(u32, &Record)> {
        let slot = self.slot(&id.namespace, &id.name)?;
        Some((slot, &self.records[slot as usize]))
    }

    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.records[self.slot(namespace, name)? as usize].service()
    }

    #[must_use]
    pub fn service_by_id(&self, id: &ServiceId) -> Option<&Service> {
        self.service(&id.namespace, &id.name)
    }

    /// In the order of their ids.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.namespaces.values().flat_map(|n| n.slots.values()).filter_map(|s| self.records[*s as usize].service())
    }

    #[must_use]
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|n| n.services > 0) || self.pods.in_namespace(namespace)
    }

    /// The Service whose virtual (or external) address this is. Of several that share an external address the first;
    /// a virtual address is never another Service's external one.
    #[must_use]
    pub fn by_vip(&self, address: IpAddr) -> Option<&Service> {
        self.all_by_vip(address).min_by_key(|s| (!s.vips.contains(&address), &s.id))
    }

    /// All Services that have this as a virtual or external address, in no order.
    fn all_by_vip(&self, address: IpAddr) -> impl Iterator<Item = &Service> {
        self.by_vip
            .slots(index::of_address(address))
            .filter_map(|slot| self.records[slot as usize].service())
            .filter(move |s| s.vips.contains(&address) || s.external_ips.contains(&address))
    }

    /// The Service, and its port, whose NodePort this is. The API gives one to one Service alone; of several the first.
    #[must_use]
    pub fn by_node_port(&self, number: u16, protocol: Protocol) -> Option<(&Service, &ServicePort)> {
        self.by_vip
            .slots(index::of_node_port(number, protocol))
            .filter_map(|slot| self.records[slot as usize].service())
            .filter(|s| !s.not_proxied && s.kind == ServiceKind::ClusterIp)
            .filter_map(|s| Some((s, s.ports.iter().find(|p| p.node_port == number && p.protocol == protocol)?)))
            .min_by_key(|(s, _)| &s.id)
    }

    /// Every endpoint of a Service with the slice that names it, from the source that names the Service. An address
    /// that stands in two slices with the same ports comes once, in its better state.
    pub fn endpoints<'t>(
        &'t self,
        id: &ServiceId,
    ) -> impl Iterator<Item = (&'t StoredSlice, EndpointRef<'t>)> + use<'t> {
        self.record(id).into_iter().flat_map(move |(slot, record)| self.endpoints_of(slot, record))
    }

    fn endpoints_of<'t>(
        &'t self,
        slot: u32,
        record: &'t Record,
    ) -> impl Iterator<Item = (&'t StoredSlice, EndpointRef<'t>)> + use<'t> {
        let slices = record.visible_slices();
        let several = slices.clone().nth(1).is_some();
        slices.clone().flat_map(|slice| slice.endpoints().map(move |e| (slice, e))).filter(move |(slice, e)| {
            let twins = || self.by_endpoint.count(index::of_address(e.address), endpoint_slot(slot, slice));
            !several || twins() < 2 || is_best(slices.clone(), slice, *e)
        })
    }

    /// The endpoints of an address, for reverse look-ups.
    pub fn by_endpoint(&self, address: IpAddr) -> impl Iterator<Item = (&Service, EndpointRef<'_>)> {
        let mut last = None;
        self.by_endpoint
            .slots(index::of_address(address))
            .map(|half| half / 2)
            .filter(move |slot| last.replace(*slot) != Some(*slot))
            .filter_map(|slot| Some((slot, &self.records[slot as usize], self.records[slot as usize].service()?)))
            .flat_map(|(slot, record, service)| self.endpoints_of(slot, record).map(move |(_, e)| (service, e)))
            .filter(move |(_, e)| e.address == address)
    }

    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        Some(&self.nodes.get(name)?.last()?.value)
    }

    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values().filter_map(|v| Some(&v.last()?.value))
    }

    /// The nodes that have an address, in the order of their names.
    #[must_use]
    pub fn nodes_with(&self, address: IpAddr) -> &[Name] {
        self.node_addresses.get(&address).map_or(&[], Vec::as_slice)
    }

    /// Says that an API server is (or may be) at this address. True where that was not known.
    pub fn guard(&mut self, server: IpAddr) -> bool {
        let is_new = !self.servers.contains(&server);
        if is_new {
            if self.servers.len() == SERVERS_MAX {
                self.servers.remove(0);
            }
            self.servers.push(server);
        }
        is_new
    }

    /// Whether this is a node's own address, or an API server's: no Service may have it for an external one, which
    /// whoever may create a Service can choose.
    #[must_use]
    pub fn is_guarded(&self, address: IpAddr) -> bool {
        let of_server = |(s, _): (&Service, EndpointRef<'_>)| (&*s.id.namespace, &*s.id.name) == KUBERNETES;
        self.servers.contains(&address)
            || !self.nodes_with(address).is_empty()
            || self.by_endpoint(address).any(of_server)
    }

    /// Whether a Pod of the namespace has the address.
    #[must_use]
    pub fn has_pod(&self, namespace: &str, address: IpAddr) -> bool {
        self.pods.has(namespace, address)
    }

    /// How many objects a source has in the table, seen or shadowed.
    #[must_use]
    pub fn objects(&self, source: Source) -> usize {
        fn of<T>(entries: &[Entry<T>], source: Source) -> usize {
            entries.iter().filter(|e| e.source == source).count()
        }
        self.records.iter().map(|r| of(&r.services, source) + of(&r.slices, source)).sum::<usize>()
            + self.nodes.values().map(|n| of(n, source)).sum::<usize>()
            + self.pods.versions().map(|p| of(p, source)).sum::<usize>()
    }

    /// The port of a slice that a Service's port stands for: joined by name and protocol.
    #[must_use]
    pub fn target_port(slice: &StoredSlice, name: &str, protocol: Protocol) -> Option<u16> {
        slice.ports.iter().find(|p| &*p.name == name && p.protocol == protocol).map(|p| p.number)
    }
}

fn endpoint_slot(slot: u32, slice: &StoredSlice) -> u32 {
    2 * slot + u32::from(slice.is_subset())
}

/// Whether this is the first in the best state of all endpoints with its address and ports.
fn is_best<'t>(slices: impl Iterator<Item = &'t StoredSlice>, slice: &StoredSlice, endpoint: EndpointRef<'_>) -> bool {
    let twins = slices.filter(|s| s.ports == slice.ports).filter_map(|s| {
        let twin = s.endpoints().find(|e| e.address == endpoint.address)?;
        Some((s, (twin.ready, twin.serving, !twin.terminating)))
    });
    let best = twins.reduce(|best, twin| if twin.1 > best.1 { twin } else { best });
    best.is_some_and(|(best, _)| std::ptr::eq(best, slice))
}
