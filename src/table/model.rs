//! What a cluster consists of, reduced to what DNS, proxy and tunnel need.

use super::rule::Rule;
use std::{net::IpAddr, ops::Deref, rc::Rc, time::Duration};

/// An interned name; cloning is a count.
pub type Name = Rc<str>;

/// A few addresses; the only one of most Services needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses(Held);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Held {
    One(IpAddr),
    /// None, or several.
    Several(Box<[IpAddr]>),
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(addresses: Vec<IpAddr>) -> Self {
        Self(match addresses[..] {
            [one] => Held::One(one),
            _ => Held::Several(addresses.into()),
        })
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        Vec::from_iter(addresses).into()
    }
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Held::One(one) => std::slice::from_ref(one),
            Held::Several(several) => several,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Where an object was told of. A later one wins by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// `[[service]]` of the config.
    Config,
    /// Files of `[kube] manifests`.
    Manifests,
    /// The API server or metaServer.
    Api,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId {
    pub namespace: Name,
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// Has virtual addresses; of type ClusterIP, NodePort or LoadBalancer.
    ClusterIp,
    /// `clusterIP: None`.
    Headless,
    /// A CNAME and nothing else.
    External(Name),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty where the only port has no name.
    pub name: Name,
    pub number: u16,
    pub protocol: Protocol,
    /// 0: none.
    pub node_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    None,
    ClientIp {
        /// Counted from the last use.
        timeout: Duration,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub id: ServiceId,
    pub kind: ServiceKind,
    /// clusterIPs; empty until allocated, and for headless ones.
    pub vips: Addresses,
    /// externalIPs and the load balancer's ingress addresses.
    pub external_ips: Box<[IpAddr]>,
    pub ports: Rc<[ServicePort]>,
    pub affinity: Affinity,
    /// internalTrafficPolicy: Local.
    pub local_only: bool,
    /// externalTrafficPolicy: Local.
    pub external_local: bool,
    /// Carries a label that gives it to another proxy (`service.kubernetes.io/service-proxy-name`, …/headless).
    pub not_proxied: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SliceId {
    pub namespace: Name,
    pub name: Name,
}

impl SliceId {
    /// The id of one subset of an Endpoints object: no Kubernetes name holds a slash.
    #[must_use]
    pub fn of_subset(namespace: Name, service: &str, index: usize) -> Self {
        Self { namespace, name: format!("{service}/{index}").into() }
    }

    /// Whether it is a subset of an Endpoints object, which counts only where the Service has no EndpointSlice.
    #[must_use]
    pub fn is_subset(&self) -> bool {
        is_subset(&self.name)
    }
}

/// Whether a slice of this name is a subset of an Endpoints object.
pub(super) fn is_subset(name: &str) -> bool {
    name.contains('/')
}

/// An EndpointSlice (or one subset of an Endpoints object).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub id: SliceId,
    /// The Service's name, in the slice's namespace.
    pub service: Name,
    pub ports: Rc<[SlicePort]>,
    pub endpoints: Vec<Endpoint>,
}

/// The target port of a slice, joined to the Service's port by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    pub name: Name,
    pub number: u16,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub hostname: Option<Name>,
    pub node: Option<Name>,
    pub zone: Option<Name>,
    /// Name of the Pod that it stands for.
    pub pod: Option<Name>,
    pub hints: Option<Rc<Hints>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

/// For whom the cloud means an endpoint (EndpointHints).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    pub zones: Box<[Name]>,
    pub nodes: Box<[Name]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    pub name: Name,
    pub addresses: Vec<IpAddr>,
    pub zone: Option<Name>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodId {
    pub namespace: Name,
    pub name: Name,
}

/// A Pod, for its name in the DNS and nothing else; one that has ended or is being deleted has no addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub id: PodId,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Service(Service),
    Slice(Slice),
    Node(NodeInfo),
    /// Only where the names of Pods are verified.
    Pod(Pod),
    Rule(Rule),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectId {
    Service(ServiceId),
    Slice(SliceId),
    Node(Name),
    Pod(PodId),
    /// Its own name, not that of its host.
    Rule(ServiceId),
}

impl Object {
    #[must_use]
    pub fn id(&self) -> ObjectId {
        match self {
            Self::Service(s) => ObjectId::Service(s.id.clone()),
            Self::Slice(s) => ObjectId::Slice(s.id.clone()),
            Self::Node(n) => ObjectId::Node(n.name.clone()),
            Self::Pod(p) => ObjectId::Pod(p.id.clone()),
            Self::Rule(r) => ObjectId::Rule(r.id.clone()),
        }
    }
}

/// What a source says; the only input of the reducer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A complete list begins: what it does not name is swept at [`Change::Complete`].
    Begin(Source),
    Apply(Source, Object),
    /// The list names an object that could not be read: what was known of it stays.
    Keep(Source, ObjectId),
    Delete(Source, ObjectId),
    /// The list is whole: what it did not name goes. Without a [`Change::Begin`] nothing goes.
    Complete(Source),
    /// The list broke off, or is not plausible (a body that is no list; no items and no resourceVersion either,
    /// which is how metaServer says that it does not know): nothing is swept, the source is as complete as before.
    Abort(Source),
}
