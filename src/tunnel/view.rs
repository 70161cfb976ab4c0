//! What the tunnel shows of itself.

use super::{
    PeerView, RelayView, congestion::controller, control::Rank, disco::Mapping, home::Shown, node::Node, path::Path,
    peer::Peer,
};
use crate::carrier::address::is_made_up;
use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

/// Of a relay that is reached, but by TCP alone.
pub const BY_TCP: &str = "by TCP: it does not answer by UDP";

/// How much a node holds: what must not grow with its age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Connections, those that are being closed too, and quinn's handles of them.
    pub slots: usize,
    pub handles: usize,
    pub streams: usize,
    pub peers: usize,
    /// Searches for a flow.
    pub wants: usize,
    pub flows: usize,
    pub disco_ids: usize,
    pub candidates: usize,
    /// PINGs without a PONG.
    pub probes: usize,
    pub outbox_bytes: usize,
    /// Datagrams that would go again by the relay.
    pub shadow_bytes: usize,
    pub remembered: usize,
    /// Of a relay: who is registered, and which pairs have a flow.
    pub relay_nodes: usize,
    pub relay_flows: usize,
}

impl Node {
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let (flows, disco_ids) = self.peers.index_sizes();
        let relay = self.relay_load().unwrap_or_default();
        Sizes {
            slots: self.slots.iter().count(),
            handles: self.by_handle.len(),
            streams: self.streams.len(),
            peers: self.peers.iter().count(),
            wants: self.peers.iter().filter(|p| p.want.is_some()).count(),
            flows,
            disco_ids,
            candidates: self.peers.iter().map(|p| p.paths.tried()).sum(),
            probes: self.peers.iter().map(|p| p.paths.unanswered()).sum(),
            outbox_bytes: self.outbox.len(),
            shadow_bytes: self.slots.iter().flat_map(|(_, s)| &s.recent).map(Vec::len).sum(),
            remembered: self.peers.of_before.len(),
            relay_nodes: relay.nodes,
            relay_flows: relay.flows,
        }
    }

    pub(super) fn describe(&self, path: Path) -> String {
        match path {
            Path::Direct(way) => way.to_string(),
            Path::Relay { relay, .. } => {
                format!("relay {}", self.homes.get(relay).map_or("?", |h| h.certificate.name.as_str()))
            }
        }
    }

    #[must_use]
    pub fn peer_views(&self, now: Instant) -> Vec<PeerView> {
        let view = |p: &Peer| {
            let slot = p.slot.and_then(|index| self.slots.get(index));
            let path = slot.map(|s| s.path);
            PeerView {
                name: p.name.clone(),
                path: path.map_or("none", |p| if p.is_relay() { "relay" } else { "direct" }),
                via: path.map(|p| self.describe(p)).unwrap_or_default(),
                rtt_ms: slot.map(|s| u32::try_from(s.conn.rtt().as_millis()).unwrap_or(u32::MAX)),
                congestion: slot.map_or("", |s| controller(&s.conn)),
                mtu: slot.map_or(0, |s| s.conn.current_mtu()),
                since_secs: slot.map_or(0, |_| now.saturating_duration_since(p.path_since).as_secs()),
                streams: self
                    .slots
                    .iter()
                    .filter(|(_, s)| s.peer.as_ref() == Some(&p.name))
                    .map(|(_, s)| s.streams.len())
                    .sum(),
                tx_bytes: p.tx_bytes + slot.map_or(0, |s| s.tx_bytes),
                rx_bytes: p.rx_bytes + slot.map_or(0, |s| s.rx_bytes),
                note: self.why_not_direct(p, path),
            }
        };
        self.peers.iter().map(view).collect()
    }

    #[must_use]
    pub fn relay_views(&self) -> Vec<RelayView> {
        let view = |relay: usize| {
            let home = self.homes.get(relay)?;
            let Shown { registered, rtt, observed, rank } = self.homes.shown(relay)?;
            Some(RelayView {
                name: home.certificate.name.clone(),
                address: home
                    .address
                    .filter(|a| !is_made_up(*a))
                    .map_or_else(|| format!("{}:{}", home.host, home.port), |a| a.to_string()),
                registered,
                rtt_ms: rtt.map(|d| u32::try_from(d.as_millis()).unwrap_or(u32::MAX)),
                note: match observed {
                    Some(address) if registered => match rank {
                        Rank::First => format!("sees us as {address}, the first choice"),
                        Rank::Standby => format!("sees us as {address}, standing by"),
                        Rank::Listed => format!("sees us as {address}"),
                    },
                    _ if registered && home.by_tcp => BY_TCP.into(),
                    _ => home.note.clone(),
                },
            })
        };
        (0..self.homes.len()).filter_map(view).collect()
    }

    /// The NATs in RFC 4787's words, while the relay carries the data.
    fn why_not_direct(&self, peer: &Peer, path: Option<Path>) -> String {
        if !peer.note.is_empty() || !path.is_some_and(Path::is_relay) {
            return peer.note.clone();
        }
        if peer.mapping == Mapping::Unknown && peer.paths.tried() == 0 {
            return "not direct yet: it has not said where it may be reached".into();
        }
        let tried = peer.paths.tried();
        // Between two that have IPv6 there are firewalls at most, and those are punched through like NATs.
        let global = |a: &SocketAddr| matches!(a.ip(), IpAddr::V6(ip) if !ip.is_unique_local());
        let ipv6 = match (self.local.iter().any(global), peer.paths.candidates.have_ipv6()) {
            (true, true) => "; IPv6 at both ends, and it does not pass",
            (true, false) => "; IPv6 only here",
            (false, true) => "; IPv6 only there",
            (false, false) => "",
        };
        format!("not direct: {tried} addresses tried; ours: {}, theirs: {}{ipv6}", self.mapping(), peer.mapping)
    }
}
