//! The part of a source's objects that one list of an API server is complete for: one kind, in one namespace or in all.

use super::{
    Entry, Table,
    model::{Change, Name, ObjectId, Source},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// None: of all namespaces.
    Services(Option<Name>),
    Slices(Option<Name>),
    Nodes,
    Pods(Option<Name>),
}

impl Table {
    /// What a source has in a scope, seen or shadowed.
    #[must_use]
    pub fn ids(&self, source: Source, scope: &Scope) -> Vec<ObjectId> {
        fn of<'e, T>(entries: &'e [Entry<T>], source: Source) -> impl Iterator<Item = &'e T> + use<'e, T> {
            entries.iter().filter(move |e| e.source == source).map(|e| &e.value)
        }
        let records = |within: &Option<Name>| {
            let slots = match within {
                Some(name) => self.namespaces.get(name).into_iter().collect::<Vec<_>>(),
                None => self.namespaces.values().collect(),
            };
            slots.into_iter().flat_map(|n| n.slots.values()).map(|slot| &self.records[*slot as usize])
        };
        match scope {
            Scope::Services(within) => records(within)
                .flat_map(|r| of(&r.services, source))
                .map(|service| ObjectId::Service(service.id.clone()))
                .collect(),
            Scope::Slices(within) => records(within)
                .flat_map(|r| of(&r.slices, source))
                .map(|slice| ObjectId::Slice(slice.id.clone()))
                .collect(),
            Scope::Pods(within) => self
                .pods
                .versions()
                .flat_map(|p| of(p, source))
                .filter(|pod| within.as_ref().is_none_or(|w| *w == pod.id.namespace))
                .map(|pod| ObjectId::Pod(pod.id.clone()))
                .collect(),
            Scope::Nodes => {
                self.nodes.values().flat_map(|n| of(n, source)).map(|n| ObjectId::Node(n.name.clone())).collect()
            }
        }
    }

    /// Addresses of endpoints in all Services; one that stands twice with one Service counts once.
    #[must_use]
    pub fn endpoints_held(&self) -> usize {
        self.by_endpoint.len()
    }

    /// Ends a list that was complete for a scope: what `named` does not know goes. How many went.
    pub fn sweep(&mut self, source: Source, scope: &Scope, named: impl Fn(&ObjectId) -> bool) -> usize {
        let gone: Vec<ObjectId> = self.ids(source, scope).into_iter().filter(|id| !named(id)).collect();
        let count = gone.len();
        for id in gone {
            self.apply(Change::Delete(source, id));
        }
        self.names.clean();
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::model::{NodeInfo, Object, Service, ServiceId, ServiceKind, Slice, SliceId};

    fn service(namespace: &str, name: &str) -> Object {
        let id = ServiceId { namespace: namespace.into(), name: name.into() };
        Object::Service(Service {
            id,
            kind: ServiceKind::Headless,
            vips: Vec::new(),
            external_ips: Vec::new(),
            ports: Vec::new(),
            affinity: crate::table::model::Affinity::None,
            local_only: false,
            not_proxied: false,
        })
    }

    #[test]
    fn only_the_scope_is_swept() {
        let mut table = Table::default();
        let slice = Slice {
            id: SliceId { namespace: "a".into(), name: "x-1".into() },
            service: "x".into(),
            ports: Vec::new(),
            endpoints: Vec::new(),
        };
        let node = NodeInfo { name: "n".into(), addresses: Vec::new(), zone: None };
        for object in
            [service("a", "x"), service("a", "y"), service("b", "x"), Object::Slice(slice), Object::Node(node)]
        {
            table.apply(Change::Apply(Source::Api, object));
        }
        table.apply(Change::Apply(Source::Manifests, service("a", "y")));
        let kept = service("a", "x").id();
        assert_eq!(table.sweep(Source::Api, &Scope::Services(Some("a".into())), |id| *id == kept), 1);
        assert_eq!(table.ids(Source::Api, &Scope::Services(None)), [kept, service("b", "x").id()]);
        assert!(table.service("a", "y").is_some(), "another source has it still");
        assert_eq!(table.sweep(Source::Api, &Scope::Slices(None), |_| false), 1);
        assert_eq!(table.sweep(Source::Api, &Scope::Nodes, |_| false), 1);
        assert_eq!(table.objects(Source::Api), 2);
    }
}
