//! Pods by namespace, and which namespaces have an address.

use super::{
    Entry, Versions,
    model::{Name, Pod, PodId, Source},
    pool::Pool,
    reduce::{put, take},
};
use std::{collections::BTreeMap, net::IpAddr};

#[derive(Debug, Default)]
pub(super) struct Pods {
    namespaces: BTreeMap<Name, BTreeMap<Name, Versions<Pod>>>,
    /// The namespaces whose visible Pods have the address, one for each Pod: those of a node share its address.
    addresses: BTreeMap<IpAddr, Vec<Name>>,
}

impl Pods {
    pub(super) fn in_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    pub(super) fn has(&self, namespace: &str, address: IpAddr) -> bool {
        self.addresses.get(&address).is_some_and(|holders| holders.iter().any(|n| **n == *namespace))
    }

    pub(super) fn versions(&self) -> impl Iterator<Item = &Versions<Pod>> {
        self.namespaces.values().flat_map(BTreeMap::values)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry<Pod>> {
        self.versions().flatten()
    }

    pub(super) fn find_mut(&mut self, id: &PodId) -> Option<&mut Versions<Pod>> {
        self.namespaces.get_mut(&id.namespace)?.get_mut(&id.name)
    }

    /// True where what is seen has changed.
    pub(super) fn put(&mut self, source: Source, generation: u32, mut pod: Pod, names: &mut Pool<str>) -> bool {
        names.share(&mut pod.id.namespace);
        pod.addresses.sort_unstable();
        pod.addresses.dedup();
        pod.addresses.shrink_to_fit();
        let id = pod.id.clone();
        let before = self.seen(&id);
        let pods = self.namespaces.entry(id.namespace.clone()).or_default();
        let visible = put(pods.entry(id.name.clone()).or_default(), source, generation, pod).is_visible();
        self.reindex(&id, &before);
        visible
    }

    pub(super) fn delete(&mut self, source: Source, id: &PodId) -> bool {
        let before = self.seen(id);
        let Some((_, visible)) = self.find_mut(id).and_then(|versions| take(versions, source)) else { return false };
        if let Some(pods) = self.namespaces.get_mut(&id.namespace) {
            pods.retain(|name, versions| *name != id.name || !versions.is_empty());
            if pods.is_empty() {
                self.namespaces.remove(&id.namespace);
            }
        }
        self.reindex(id, &before);
        visible
    }

    fn seen(&self, id: &PodId) -> Vec<IpAddr> {
        let versions = self.namespaces.get(&id.namespace).and_then(|pods| pods.get(&id.name));
        versions.and_then(|v| Some(v.last()?.value.addresses.clone())).unwrap_or_default()
    }

    fn reindex(&mut self, id: &PodId, before: &[IpAddr]) {
        let after = self.seen(id);
        if after == before {
            return;
        }
        for address in before {
            if let Some(holders) = self.addresses.get_mut(address) {
                if let Some(at) = holders.iter().position(|n| *n == id.namespace) {
                    holders.swap_remove(at);
                }
                if holders.is_empty() {
                    self.addresses.remove(address);
                }
            }
        }
        for address in after {
            let holders = self.addresses.entry(address).or_default();
            holders.reserve_exact(1);
            holders.push(id.namespace.clone());
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.namespaces.is_empty() && self.addresses.is_empty()
    }
}
