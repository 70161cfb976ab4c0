//! Slices as the table keeps them. Most endpoints of a cluster are alike but for their addresses, so what else is known
//! of one is shared: it costs 16 bytes with an IPv4 address, and 24 with another.

use super::{
    model::{Endpoint, Hints, Name, SlicePort},
    pool::Pool,
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Deref,
    rc::Rc,
};

/// What is known of an endpoint beside its address.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct About {
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

/// An endpoint in the table.
#[derive(Clone, Copy, Debug)]
pub struct EndpointRef<'t> {
    pub address: IpAddr,
    about: &'t About,
}

impl<'t> EndpointRef<'t> {
    #[must_use]
    pub fn new(address: IpAddr, about: &'t About) -> Self {
        Self { address, about }
    }

    /// The same with the table's lifetime.
    #[must_use]
    pub fn about(&self) -> &'t About {
        self.about
    }
}

impl Deref for EndpointRef<'_> {
    type Target = About;

    fn deref(&self) -> &About {
        self.about
    }
}

/// A slice of a Service, which the record knows that it stands in.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredSlice {
    pub name: Name,
    pub ports: Rc<[SlicePort]>,
    rows: Rows,
}

#[derive(Debug, PartialEq, Eq)]
enum Rows {
    V4(Box<[(Ipv4Addr, Rc<About>)]>),
    /// IPv4 addresses among them are mapped (RFC 4291, 2.5.5.2).
    Any(Box<[(Ipv6Addr, Rc<About>)]>),
}

impl StoredSlice {
    pub(super) fn new(
        name: Name,
        ports: Rc<[SlicePort]>,
        endpoints: Vec<Endpoint>,
        names: &mut Pool<str>,
        abouts: &mut Pool<About>,
    ) -> Self {
        let all_v4 = endpoints.iter().all(|e| e.address.is_ipv4());
        let rows = endpoints.into_iter().map(|e| {
            let Endpoint { address, hostname, mut node, mut zone, pod, hints, ready, serving, terminating } = e;
            node.iter_mut().chain(&mut zone).for_each(|name| names.share(name));
            let mut about = Rc::new(About { hostname, node, zone, pod, hints, ready, serving, terminating });
            abouts.share(&mut about);
            (address, about)
        });
        let rows = if all_v4 {
            let v4 = |(address, about)| match address {
                IpAddr::V4(v4) => Some((v4, about)),
                IpAddr::V6(_) => None,
            };
            Rows::V4(rows.filter_map(v4).collect())
        } else {
            let v6 = |address| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            Rows::Any(rows.map(|(address, about)| (v6(address), about)).collect())
        };
        Self { name, ports, rows }
    }

    /// Whether it is a subset of an Endpoints object, which counts only where the Service has no EndpointSlice.
    #[must_use]
    pub fn is_subset(&self) -> bool {
        super::model::is_subset(&self.name)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        match &self.rows {
            Rows::V4(rows) => rows.len(),
            Rows::Any(rows) => rows.len(),
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn endpoints(&self) -> impl Iterator<Item = EndpointRef<'_>> + Clone {
        let (v4, any) = match &self.rows {
            Rows::V4(rows) => (&rows[..], &[][..]),
            Rows::Any(rows) => (&[][..], &rows[..]),
        };
        let v4 = v4.iter().map(|(v4, about)| EndpointRef { address: IpAddr::V4(*v4), about });
        v4.chain(any.iter().map(|(v6, about)| EndpointRef { address: v6.to_canonical(), about }))
    }
}

/// What a source said of it.
#[cfg(test)]
impl EndpointRef<'_> {
    pub(super) fn unpack(&self) -> Endpoint {
        let About { hostname, node, zone, pod, hints, ready, serving, terminating } = self.about;
        let (hostname, node, zone, pod) = (hostname.clone(), node.clone(), zone.clone(), pod.clone());
        let hints = hints.clone();
        let (address, ready, serving, terminating) = (self.address, *ready, *serving, *terminating);
        Endpoint { address, hostname, node, zone, pod, hints, ready, serving, terminating }
    }
}

#[cfg(test)]
impl StoredSlice {
    pub(super) fn unpack(&self, of: &super::model::ServiceId) -> super::model::Slice {
        let id = super::model::SliceId { namespace: of.namespace.clone(), name: self.name.clone() };
        let endpoints = self.endpoints().map(|e| e.unpack()).collect();
        super::model::Slice { id, service: of.name.clone(), ports: self.ports.clone(), endpoints }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_come_back() {
        let (mut names, mut abouts) = (Pool::default(), Pool::default());
        for addresses in [&["10.0.0.1", "10.0.0.2"][..], &["fd00::1", "10.0.0.1"], &["fd00::1"], &[]] {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let endpoint = |address: &IpAddr| Endpoint {
                address: *address,
                hostname: None,
                node: Some("edge-1".into()),
                zone: None,
                pod: None,
                hints: None,
                ready: true,
                serving: true,
                terminating: false,
            };
            let endpoints = addresses.iter().map(endpoint).collect();
            let stored = StoredSlice::new("web-1".into(), [].into(), endpoints, &mut names, &mut abouts);
            assert_eq!(stored.endpoints().map(|e| e.address).collect::<Vec<_>>(), addresses);
            assert_eq!(stored.len(), addresses.len());
            let first = stored.endpoints().next();
            assert!(stored.endpoints().all(|e| std::ptr::eq(e.about(), first.unwrap().about())), "shared");
        }
    }
}
