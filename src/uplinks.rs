//! The tunnel's view of the host's links: which there are, by which one a datagram leaves, beacons on each.

use crate::{
    config::TunnelConfig,
    netlink::{self, Monitor},
    reactor::{Async, Timer},
    sys,
    tunnel::survey::{Survey, Uplink},
};
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use std::{
    cell::Cell,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    time::{Duration, Instant},
};

/// Of the block for one site, RFC 2365 section 6.1. All nodes that are to find each other listen on one port.
const LAN_GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 120, 67);
/// Of one link; a transient group, RFC 4291 section 2.7, with the same end.
const LAN_GROUP6: Ipv6Addr = Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0x7765, 0x6674);
/// Between two looks at devices, addresses and routes: a storm of changes costs one look each.
const LOOK_GAP: Duration = Duration::from_millis(200);

/// See the module.
pub struct Links {
    /// Names of interfaces; empty: all but those of containers.
    only: Vec<String>,
    /// Beacons are heard.
    lan: bool,
    v6: bool,
    port: u16,
    pub survey: Survey,
    looked: Option<Instant>,
    /// Something has changed since.
    stale: bool,
    /// None where the kernel has no netlink for us: links are then as they were at the start.
    monitor: Option<Monitor>,
    /// The interface that sends of IPv4 and of IPv6 are bound to; 0: none.
    bound: Cell<[u32; 2]>,
}

impl Links {
    #[must_use]
    pub fn new(config: &TunnelConfig, socket: &Async<UdpSocket>, v6: bool, port: u16) -> Self {
        if v6 {
            let _ = sys::multicast_stays(socket);
        }
        let monitor = Monitor::of_both_families().map_err(|e| log::warn!(target: "tunnel", "{e:#}")).ok();
        let (survey, bound) = (Survey::default(), Cell::new([0; 2]));
        let (only, lan) = (config.interfaces.clone(), config.lan);
        Self { only, lan, v6, port, survey, looked: None, stale: true, monitor, bound }
    }

    /// Whether the user names the interfaces.
    #[must_use]
    pub fn named(&self) -> bool {
        !self.only.is_empty()
    }

    /// Resolves when it is time to look again; cancel-safe.
    ///
    /// # Errors
    /// When the kernel's messages cannot be waited for.
    pub async fn changed(&mut self) -> io::Result<()> {
        if !self.stale {
            match &self.monitor {
                Some(monitor) => monitor.changed().await?,
                None => std::future::pending().await,
            }
            self.stale = true;
        }
        if let Some(looked) = self.looked {
            Timer::at(looked + LOOK_GAP).await;
        }
        Ok(())
    }

    /// Looks; true where something is other than it was. New links are listened on.
    pub fn look(&mut self, now: Instant, socket: &Async<UdpSocket>) -> bool {
        (self.looked, self.stale) = (Some(now), false);
        let mut survey = match netlink::network() {
            Ok(network) => network.survey(&self.only),
            Err(error) => {
                log::debug!(target: "tunnel", "{error:#}");
                return false;
            }
        };
        if !self.v6 {
            survey.links.retain(|l| l.address.is_ipv4());
            survey.uplinks.retain(|u| u.address.is_ipv4());
            survey.scopes.clear();
        }
        if self.lan {
            self.join(&survey, socket);
        }
        let changed = survey != self.survey;
        self.survey = survey;
        changed
    }

    fn join(&self, survey: &Survey, socket: &Async<UdpSocket>) {
        // EADDRINUSE: we are a member by another address of the same link already. A group ends with its interface,
        // which may have come back: so each time anew.
        for link in &survey.links {
            if let IpAddr::V4(ip) = link.address {
                let _ = socket.get_ref().join_multicast_v4(&LAN_GROUP, &ip);
            }
        }
        for scope in &survey.scopes {
            let _ = socket.get_ref().join_multicast_v6(&LAN_GROUP6, *scope);
        }
    }

    /// To a destination as the socket's family writes it.
    #[must_use]
    pub fn destination(&self, to: SocketAddr) -> SocketAddr {
        match to {
            SocketAddr::V4(v4) if self.v6 => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            SocketAddr::V4(_) | SocketAddr::V6(_) => to,
        }
    }

    /// What is sent next leaves by the interface of this address; None: as the routing table says.
    pub fn leave_by(&self, socket: &Async<UdpSocket>, to: SocketAddr, local: Option<IpAddr>) {
        let of = |local| self.survey.uplinks.iter().find(|u: &&Uplink| u.address == local).map_or(0, |u| u.index);
        let index = local.map_or(0, of);
        let mut bound = self.bound.get();
        let slot = &mut bound[usize::from(to.is_ipv6())];
        if *slot != index {
            *slot = index;
            if let Err(error) = sys::unicast_by(socket, to.is_ipv6(), index) {
                log::debug!(target: "tunnel", "interface {index} for what is sent: {error}");
            }
            self.bound.set(bound);
        }
    }

    /// By multicast on each link.
    pub fn beacon(&self, socket: &Async<UdpSocket>, udp: &UdpSocketState, frame: &[u8]) {
        let send = |destination| {
            let transmit = Transmit { destination, ecn: None, contents: frame, segment_size: None, src_ip: None };
            udp.try_send(UdpSockRef::from(socket.get_ref()), &transmit)
        };
        for link in &self.survey.links {
            let IpAddr::V4(interface) = link.address else { continue };
            let to = self.destination(SocketAddr::new(LAN_GROUP.into(), self.port));
            if let Err(error) = sys::multicast_by(socket, interface).and_then(|()| send(to)) {
                log::debug!(target: "tunnel", "beacon by {interface}: {error}");
            }
        }
        for scope in &self.survey.scopes {
            let to = SocketAddrV6::new(LAN_GROUP6, self.port, 0, *scope).into();
            self.leave_by(socket, to, None);
            if let Err(error) = send(to) {
                log::debug!(target: "tunnel", "beacon by interface {scope}: {error}");
            }
        }
    }
}
