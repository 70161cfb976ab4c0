//! Which endpoint a connection goes to: nearness, policy, affinity.

use super::{
    Table,
    model::{Name, Protocol, ServiceId},
};
use crate::config::Policy;
use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

/// Who we are, for nearness and for what is ours.
#[derive(Clone, Debug)]
pub struct Here {
    pub node: Name,
    /// Names of the peers of our own `[node] network` are dialled directly; empty: none.
    pub network: Name,
}

/// One connection that wants an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The original destination: VIP and port.
    pub destination: SocketAddr,
    pub protocol: Protocol,
    pub client: IpAddr,
    /// Endpoints that this connection has tried in vain.
    pub tried: &'a [SocketAddr],
}

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Dialled from here: our own endpoint, or one without a node.
    Local(SocketAddr),
    /// Through the tunnel: the far node connects to its own endpoint.
    Remote { node: Name, service: ServiceId, port: u16, address: SocketAddr },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTarget {
    /// No Service has this address and port.
    NotAService,
    /// It has no endpoint that serves (or all were tried).
    NoEndpoint,
}

/// The balancer's own state: cursors and affinities. Owned by the proxy.
#[derive(Debug)]
pub struct Balancer {
    pub policy: Policy,
    cursor: usize,
}

impl Balancer {
    #[must_use]
    pub fn new(policy: Policy, _rng: fastrand::Rng) -> Self {
        Self { policy, cursor: 0 }
    }
}

impl Table {
    /// Picks an endpoint for a connection.
    ///
    /// # Errors
    /// When no Service has the address, or none of its endpoints is left.
    pub fn route(&self, here: &Here, ask: Ask<'_>, balancer: &mut Balancer, _now: Instant) -> Result<Target, NoTarget> {
        let service = self.by_vip(ask.destination.ip()).ok_or(NoTarget::NotAService)?;
        let port = service
            .ports
            .iter()
            .find(|p| p.number == ask.destination.port() && p.protocol == ask.protocol)
            .ok_or(NoTarget::NotAService)?;
        let ready: Vec<_> = self
            .endpoints(&service.id)
            .filter(|(_, e)| e.ready && e.address.is_ipv4() == ask.destination.is_ipv4())
            .filter_map(|(s, e)| {
                Some((SocketAddr::new(e.address, Self::target_port(s, &port.name, port.protocol)?), e))
            })
            .filter(|(address, _)| !ask.tried.contains(address))
            .collect();
        if ready.is_empty() {
            return Err(NoTarget::NoEndpoint);
        }
        balancer.cursor = balancer.cursor.wrapping_add(1);
        let (address, endpoint) = &ready[balancer.cursor % ready.len()];
        Ok(match &endpoint.node {
            Some(node) if *node != here.node => {
                Target::Remote { node: node.clone(), service: service.id.clone(), port: port.number, address: *address }
            }
            Some(_) | None => Target::Local(*address),
        })
    }
}
