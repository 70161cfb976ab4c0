//! Random tables and peers.

use crate::{
    table::{
        Table,
        model::*,
        rule::{Choice, Rule, Traffic},
    },
    tunnel::{
        Remembered,
        identity::{Authority, Request, Roles, Secret},
    },
};
use std::{
    net::{IpAddr, Ipv6Addr},
    rc::Rc,
    time::Duration,
};

/// A world of names and addresses so small that objects meet.
pub(super) struct World(pub(super) fastrand::Rng);

impl World {
    fn name(&mut self) -> Name {
        let most = if self.0.u8(..) == 0 { 253 } else { 2 };
        format!("{}{}", "x".repeat(self.0.usize(..=most)), self.0.u8(..12)).into()
    }

    fn maybe(&mut self) -> Option<Name> {
        self.0.bool().then(|| self.name())
    }

    fn address(&mut self) -> IpAddr {
        let low = self.0.u8(..40);
        if self.0.bool() { [10, 0, 0, low].into() } else { Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, low.into()).into() }
    }

    fn list<T>(&mut self, most: usize, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.0.usize(..=most)).map(|_| item(self)).collect()
    }

    fn protocol(&mut self) -> Protocol {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][self.0.usize(..3)]
    }

    fn id(&mut self) -> ServiceId {
        ServiceId { namespace: self.name(), name: self.name() }
    }

    fn traffic(&mut self) -> Rc<Traffic> {
        let name = self.name();
        let choices =
            [Choice::RoundRobin, Choice::Random, Choice::LeastRequest, Choice::SourceIp, Choice::Header(name)];
        let choice = self.0.bool().then(|| choices[self.0.usize(..5)].clone());
        Traffic { choice, numbers: std::array::from_fn(|_| self.0.u32(..)) }.into()
    }

    fn rule(&mut self) -> Rule {
        Rule {
            id: self.id(),
            host: self.0.bool().then(|| self.id()),
            created: self.name(),
            private: self.0.bool(),
            traffic: self.traffic(),
            ports: self.list(3, |w| (w.0.u16(..), w.traffic())).into(),
            not_done: self.maybe().unwrap_or_default(),
        }
    }

    fn object(&mut self) -> Object {
        match self.0.u8(..7) {
            0 | 1 => Object::Service(Service {
                id: ServiceId { namespace: self.name(), name: self.name() },
                kind: match self.0.u8(..3) {
                    0 => ServiceKind::ClusterIp,
                    1 => ServiceKind::Headless,
                    _ => ServiceKind::External(self.name()),
                },
                vips: self.list(2, Self::address).into(),
                external_ips: self.list(2, Self::address).into(),
                ports: self
                    .list(3, |w| ServicePort {
                        name: if w.0.bool() { "".into() } else { w.name() },
                        number: w.0.u16(..),
                        protocol: w.protocol(),
                        node_port: w.0.u16(..),
                    })
                    .into(),
                affinity: match self.0.u32(..3) {
                    0 => Affinity::None,
                    n => Affinity::ClientIp { timeout: Duration::from_secs(u64::from(n) * 43_200) },
                },
                local_only: self.0.bool(),
                external_local: self.0.bool(),
                not_proxied: self.0.bool(),
            }),
            2 | 3 => Object::Slice(Slice {
                id: SliceId { namespace: self.name(), name: self.name() },
                service: self.name(),
                ports: self
                    .list(3, |w| SlicePort { name: w.name(), number: w.0.u16(..), protocol: w.protocol() })
                    .into(),
                endpoints: self.list(6, |w| Endpoint {
                    address: w.address(),
                    hostname: w.maybe(),
                    node: w.maybe(),
                    zone: w.maybe(),
                    pod: w.maybe(),
                    hints: w.0.bool().then(|| {
                        Hints { zones: w.list(2, Self::name).into(), nodes: w.list(2, Self::name).into() }.into()
                    }),
                    ready: w.0.bool(),
                    serving: w.0.bool(),
                    terminating: w.0.bool(),
                }),
            }),
            5 => Object::Rule(self.rule()),
            4 => Object::Pod(Pod {
                id: PodId { namespace: self.name(), name: self.name() },
                addresses: self.list(2, Self::address),
            }),
            _ => {
                Object::Node(NodeInfo { name: self.name(), addresses: self.list(3, Self::address), zone: self.maybe() })
            }
        }
    }

    pub(super) fn table(&mut self, objects: usize) -> Table {
        let mut table = Table::default();
        for source in [Source::Config, Source::Manifests, Source::Api] {
            table.apply(Change::Begin(source));
            for _ in 0..self.0.usize(..=objects) {
                let object = self.object();
                let id = object.id();
                table.apply(Change::Apply(source, object));
                if self.0.u8(..8) == 0 {
                    table.apply(Change::Delete(source, id));
                }
            }
            if self.0.u8(..4) > 0 {
                table.apply(Change::Complete(source));
            }
        }
        table
    }

    pub(super) fn peers(&mut self, count: usize) -> Vec<Remembered> {
        let authority = Authority::from_seed(Secret::new([3; 32])).unwrap();
        let one = |n: usize| {
            let (name, key) = (format!("edge-{n:04}"), [n as u8; 32]);
            let request = Request { name, key, roles: Roles::NONE, network: "hall".into(), not_after: u64::MAX };
            let certificate = authority.issue(request).unwrap();
            Remembered { certificate, address: (self.address(), self.0.u16(1..)).into() }
        };
        (0..count).map(one).collect()
    }
}
