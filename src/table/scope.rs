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
    Rules(Option<Name>),
}

impl Table {
    /// Goes through what a source has in a scope, seen or shadowed.
    pub fn each(&self, source: Source, scope: &Scope, then: &mut dyn FnMut(ObjectId)) {
        fn of<'e, T>(entries: &'e [Entry<T>], source: Source) -> impl Iterator<Item = &'e T> + use<'e, T> {
            entries.iter().filter(move |e| e.source == source).map(|e| &e.value)
        }
        let is_within = |within: &Option<Name>, namespace: &Name| within.as_ref().is_none_or(|w| w == namespace);
        match scope {
            Scope::Services(within) => {
                for record in self.records.iter().filter(|r| is_within(within, &r.id.namespace)) {
                    of(&record.services, source).for_each(|_| then(ObjectId::Service(record.id.clone())));
                }
            }
            Scope::Slices(within) => {
                for record in self.records.iter().filter(|r| is_within(within, &r.id.namespace)) {
                    of(&record.slices, source).for_each(|slice| then(ObjectId::Slice(record.slice_id(slice))));
                }
            }
            Scope::Pods(within) => {
                let pods = self.pods.versions().flat_map(|p| of(p, source));
                let within = pods.filter(|pod| is_within(within, &pod.id.namespace));
                within.for_each(|pod| then(ObjectId::Pod(pod.id.clone())));
            }
            Scope::Rules(within) => {
                let rules = self.rules.versions().flat_map(|r| of(r, source));
                let within = rules.filter(|rule| is_within(within, &rule.id.namespace));
                within.for_each(|rule| then(ObjectId::Rule(rule.id.clone())));
            }
            Scope::Nodes => {
                let nodes = self.nodes.values().flat_map(|n| of(n, source));
                nodes.for_each(|node| then(ObjectId::Node(node.name.clone())));
            }
        }
    }

    /// How many those are.
    #[must_use]
    pub fn count(&self, source: Source, scope: &Scope) -> usize {
        let mut count = 0;
        self.each(source, scope, &mut |_| count += 1);
        count
    }

    /// Addresses of endpoints in all Services; one that stands twice with one Service counts once.
    #[must_use]
    pub fn endpoints_held(&self) -> usize {
        self.by_endpoint.len()
    }

    /// Ends a list that was complete for a scope: what `named` does not know goes. How many went.
    pub fn sweep(&mut self, source: Source, scope: &Scope, named: impl Fn(&ObjectId) -> bool) -> usize {
        let mut gone = Vec::new();
        self.each(source, scope, &mut |id| {
            if !named(&id) {
                gone.push(id);
            }
        });
        let count = gone.len();
        for id in gone {
            self.apply(Change::Delete(source, id));
        }
        self.clean();
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
            vips: Vec::new().into(),
            external_ips: [].into(),
            ports: [].into(),
            affinity: crate::table::model::Affinity::None,
            local_only: false,
            external_local: false,
            not_proxied: false,
        })
    }

    #[test]
    fn only_the_scope_is_swept() {
        let mut table = Table::default();
        let slice = Slice {
            id: SliceId { namespace: "a".into(), name: "x-1".into() },
            service: "x".into(),
            ports: [].into(),
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
        let mut left = Vec::new();
        table.each(Source::Api, &Scope::Services(None), &mut |id| left.push(id));
        left.sort_unstable();
        assert_eq!(left, [kept, service("b", "x").id()]);
        assert_eq!(table.count(Source::Api, &Scope::Services(Some("a".into()))), 1);
        assert!(table.service("a", "y").is_some(), "another source has it still");
        assert_eq!(table.sweep(Source::Api, &Scope::Slices(None), |_| false), 1);
        assert_eq!(table.sweep(Source::Api, &Scope::Nodes, |_| false), 1);
        assert_eq!(table.objects(Source::Api), 2);
    }
}
