//! DestinationRules: what is kept of them, and which of them is a Service's.

use super::{
    Table, Versions,
    model::{Name, ServiceId, ServicePort, Source},
    reduce::{put, take},
};
use std::{collections::BTreeMap, net::IpAddr, rc::Rc, time::Duration};

/// Rules of one host that are compared; those that came after them are not.
const OF_HOST_MAX: usize = 64;

/// Istio's defaults where a rule asks for outlier detection (DestinationRule, OutlierDetection).
const OUTLIER: Outlier = Outlier { failures: 5, base: Duration::from_secs(30), percent: 10 };

/// How an endpoint is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    RoundRobin,
    Random,
    /// The one with fewer connections of two at random.
    LeastRequest,
    /// By the client's address.
    SourceIp,
    /// By a header of the first request, in lower case; `:path` is the path of its target.
    Header(Name),
}

/// The numbers of a [`Traffic`]; 0 is what is not said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    ConnectMs,
    IdleMs,
    LifeMs,
    Connections,
    KeepaliveMs,
    KeepaliveEveryMs,
    KeepaliveProbes,
    /// `u32::MAX`: endpoints are never ejected.
    Failures,
    EjectMs,
    EjectPercent,
}

/// How many they are.
pub const NUMBERS: usize = Number::EjectPercent as usize + 1;

/// When an endpoint that fails is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// Failures in a row; 0: never.
    pub failures: u32,
    /// For the first time; the n-th time n times as long.
    pub base: Duration,
    /// Of a Service's endpoints at one time at most; one may be, and never all.
    pub percent: u32,
}

/// What a rule says of a Service, or of one port of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// None: what the configuration says.
    pub choice: Option<Choice>,
    pub numbers: [u32; NUMBERS],
}

impl Traffic {
    #[must_use]
    pub fn number(&self, which: Number) -> Option<u32> {
        Some(self.numbers[which as usize]).filter(|n| *n > 0)
    }

    #[must_use]
    pub fn time(&self, which: Number) -> Option<Duration> {
        self.number(which).map(|ms| Duration::from_millis(ms.into()))
    }

    /// None: the rule does not speak of it.
    #[must_use]
    pub fn outlier(&self) -> Option<Outlier> {
        let (failures, base, percent) =
            (self.number(Number::Failures), self.time(Number::EjectMs), self.number(Number::EjectPercent));
        (failures.is_some() || base.is_some() || percent.is_some()).then(|| Outlier {
            failures: failures.map_or(OUTLIER.failures, |n| if n == u32::MAX { 0 } else { n }),
            base: base.unwrap_or(OUTLIER.base),
            percent: percent.unwrap_or(OUTLIER.percent),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub id: ServiceId,
    /// The Service that its host is the name of; None: it is none of a cluster's.
    pub host: Option<ServiceId>,
    /// RFC 3339; of two rules for a host the older one counts.
    pub created: Name,
    /// `exportTo: ["."]`.
    pub private: bool,
    pub traffic: Rc<Traffic>,
    /// For single ports of the Service, where nothing of `traffic` counts.
    pub ports: Box<[(u16, Rc<Traffic>)]>,
    /// The fields that we do not do, with commas between them.
    pub not_done: Name,
}

impl Rule {
    /// What it says of a port.
    #[must_use]
    pub fn of_port(&self, port: u16) -> &Rc<Traffic> {
        self.ports.iter().find(|(number, _)| *number == port).map_or(&self.traffic, |(_, traffic)| traffic)
    }

    /// Smaller counts more: in the Service's own namespace, then the oldest.
    fn rank(&self, of: &ServiceId) -> (bool, &str, &ServiceId) {
        (self.id.namespace != of.namespace, &self.created, &self.id)
    }
}

/// The Service that a host is the name of, seen from a namespace: `name`, `name.namespace`, `name.namespace.svc` and
/// whatever follows that.
#[must_use]
pub fn host(host: &str, namespace: &str, intern: &mut dyn FnMut(&str) -> Name) -> Option<ServiceId> {
    let host = host.to_ascii_lowercase();
    let mut labels = host.trim_end_matches('.').split('.');
    let (name, namespace) = (labels.next()?, labels.next().unwrap_or(namespace));
    let is_name = !name.is_empty() && !name.contains('*') && labels.next().is_none_or(|l| l == "svc");
    is_name.then(|| ServiceId { namespace: intern(namespace), name: intern(name) })
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Rules {
    of: BTreeMap<ServiceId, Versions<Rule>>,
    /// The visible rules by the Service that their host names, in no order.
    by_host: BTreeMap<ServiceId, Vec<ServiceId>>,
}

impl Rules {
    pub(super) fn versions(&self) -> impl Iterator<Item = &Versions<Rule>> {
        self.of.values()
    }

    pub(super) fn find_mut(&mut self, id: &ServiceId) -> Option<&mut Versions<Rule>> {
        self.of.get_mut(id)
    }

    fn visible(&self, id: &ServiceId) -> Option<&Rule> {
        Some(&self.of.get(id)?.last()?.value)
    }

    /// True where what is seen has changed.
    pub(super) fn put(&mut self, source: Source, generation: u32, rule: Rule) -> bool {
        let id = rule.id.clone();
        let before = self.visible(&id).and_then(|r| r.host.clone());
        let put = put(self.of.entry(id.clone()).or_default(), source, generation, rule);
        let visible = put.is_visible();
        if visible && let Some(rule) = self.visible(&id).filter(|r| !r.not_done.is_empty()) {
            let ServiceId { namespace, name } = &id;
            log::warn!("DestinationRule {namespace}/{name}: not done here, and left out: {}", rule.not_done);
        }
        self.reindex(&id, before);
        visible
    }

    pub(super) fn delete(&mut self, source: Source, id: &ServiceId) -> bool {
        let before = self.visible(id).and_then(|r| r.host.clone());
        let Some(versions) = self.of.get_mut(id) else { return false };
        let Some((_, visible)) = take(versions, source) else { return false };
        if versions.is_empty() {
            self.of.remove(id);
        }
        self.reindex(id, before);
        visible
    }

    fn reindex(&mut self, id: &ServiceId, before: Option<ServiceId>) {
        let after = self.visible(id).and_then(|r| r.host.clone());
        if before == after {
            return;
        }
        if let Some(before) = before
            && let Some(rules) = self.by_host.get_mut(&before)
        {
            rules.retain(|rule| rule != id);
            if rules.is_empty() {
                self.by_host.remove(&before);
            }
        }
        if let Some(after) = after {
            self.by_host.entry(after).or_default().push(id.clone());
        }
    }

    fn of_host(&self, id: &ServiceId) -> Option<&Rule> {
        let rules = self.by_host.get(id)?.iter().take(OF_HOST_MAX).filter_map(|rule| self.visible(rule));
        rules.filter(|r| !r.private || r.id.namespace == id.namespace).min_by(|a, b| a.rank(id).cmp(&b.rank(id)))
    }
}

impl Table {
    /// The rule of a Service: by its host, else, as EdgeMesh does, the one with the Service's own name where its host is
    /// no Service's.
    #[must_use]
    pub fn rule_of(&self, id: &ServiceId) -> Option<&Rule> {
        let by_name = || {
            let no_service = |rule: &&Rule| rule.host.as_ref().is_none_or(|host| self.service_by_id(host).is_none());
            self.rules.visible(id).filter(no_service)
        };
        self.rules.of_host(id).or_else(by_name)
    }

    /// What a rule says of a Service's port.
    #[must_use]
    pub fn traffic(&self, id: &ServiceId, port: &ServicePort) -> Option<&Rc<Traffic>> {
        self.rule_of(id).map(|rule| rule.of_port(port.number))
    }

    /// All rules, in the order of their names.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.of.values().filter_map(|versions| Some(&versions.last()?.value))
    }
}

/// A hash that is the same on every machine.
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    siphasher::sip::SipHasher13::new().hash(bytes)
}

/// The bytes of an address for [`hash`]: IPv4 in its mapped form.
#[must_use]
pub fn bytes_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
