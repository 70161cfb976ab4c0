//! The path machine's errands: candidates, PINGs and CALL_ME_MAYBEs go out, what it decides is done.

use super::{
    disco::{CANDIDATES_MAX, DiscoKeys, Mapping, Message, key_id},
    identity::Certificate,
    lan::Link,
    node::{Node, Origin},
    path::{Path, Way},
    peer::Peer,
    predict::Ports,
    punch::Do,
};
use crate::metrics::bump;
use std::{
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::Instant,
};

/// Where else than at our own addresses we may be reached.
#[derive(Default)]
pub(super) struct Reach {
    /// Through the gateway, which was asked for it.
    mapped: Option<SocketAddr>,
    /// Through a NAT that gives ports one after the other.
    ports: Ports,
}

impl Node {
    /// The interfaces' addresses and our port; a change makes every live peer look for a path anew.
    pub fn set_links(&mut self, now: Instant, mut links: Vec<Link>, port: u16) {
        links.sort_unstable();
        links.dedup();
        links.truncate(CANDIDATES_MAX);
        if self.lan.links != links {
            let beyond_links = |ip: IpAddr| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            let known = links.iter().map(|link| link.address).filter(|ip| beyond_links(*ip));
            self.local = known.map(|ip| SocketAddr::new(ip, port)).collect();
            self.lan.set_links(now, links);
            self.due = Some(now);
            self.seek_all(now);
        }
    }

    /// The gateway lets in at this address what is for us; None: not any more.
    pub fn set_mapped(&mut self, now: Instant, mapped: Option<SocketAddr>) {
        if self.reach.mapped != mapped {
            self.reach.mapped = mapped;
            self.tell_all(now);
        }
    }

    pub(super) fn seek_all(&mut self, now: Instant) {
        let live: Vec<String> = self.peers.iter().filter(|p| p.slot.is_some()).map(|p| p.name.clone()).collect();
        live.iter().for_each(|name| self.seek(now, name));
    }

    /// Live peers hear where we may be reached, however lately they did.
    pub(super) fn tell_all(&mut self, now: Instant) {
        self.peers.iter_mut().for_each(|p| p.paths.tell_again());
        self.seek_all(now);
    }

    /// A NAT's mapping behaviour, as far as the relays can tell.
    pub(super) fn mapping(&self) -> Mapping {
        let mut seen: Vec<SocketAddr> =
            (0..self.homes.len()).filter_map(|relay| self.homes.shown(relay)?.observed).collect();
        if seen.iter().any(SocketAddr::is_ipv4) {
            seen.retain(SocketAddr::is_ipv4); // one view of each family tells nothing
        }
        match seen[..] {
            [] => Mapping::Unknown,
            _ if seen.iter().all(|a| self.local.contains(a)) => Mapping::None,
            [_] => Mapping::Unknown,
            [first, ..] if seen.iter().all(|a| *a == first) => Mapping::EndpointIndependent,
            [..] if self.reach.ports.sequential() => Mapping::Sequential,
            [..] => Mapping::Dependent,
        }
    }

    /// What a relay's word may change of what peers are told.
    pub(super) fn seen_by(&self, relay: usize) -> (Option<SocketAddr>, Mapping) {
        (self.homes.shown(relay).and_then(|shown| shown.observed), self.mapping())
    }

    /// Where a peer may reach us, what is likelier first.
    fn candidates(&self, now: Instant, peer: &Peer) -> Vec<SocketAddr> {
        let seen = (0..self.homes.len()).filter_map(|relay| self.homes.shown(relay)?.observed);
        let mut all: Vec<SocketAddr> =
            seen.chain(self.pilot.seen()).chain(self.reach.mapped).chain(self.local.iter().copied()).collect();
        // Only to who has one mapping himself: else both would guess.
        if peer.mapping == Mapping::EndpointIndependent && self.mapping() == Mapping::Sequential {
            all.extend(self.reach.ports.next(now, &peer.paths.candidates.listed()));
        }
        let mut unique = Vec::new();
        all.retain(|a| {
            !unique.contains(a) && {
                unique.push(*a);
                true
            }
        });
        all.truncate(CANDIDATES_MAX);
        all
    }

    /// The checked certificate of a peer, and the keys that follow from it.
    pub(super) fn know(&mut self, name: &str, certificate: &Certificate) {
        let local = &self.transport.local;
        let keys = || DiscoKeys::new(&local.secret, &local.public, &certificate.key, &local.psks.first()?.1);
        self.peers.know(name, certificate, keys);
    }

    pub(super) fn seek(&mut self, now: Instant, name: &str) {
        self.with_paths(now, name, |peer, _, out| peer.paths.seek(now, out));
    }

    /// Runs one step of a peer's path machine and does what it asks for.
    pub(super) fn with_paths(
        &mut self,
        now: Instant,
        name: &str,
        step: impl FnOnce(&mut Peer, &mut fastrand::Rng, &mut Vec<Do>),
    ) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let mut out = Vec::new();
        peer.paths.candidates.uplinks = Rc::clone(&self.uplinks);
        step(peer, &mut self.rng, &mut out);
        for errand in out {
            self.run_errand(now, name, errand);
        }
    }

    fn run_errand(&mut self, now: Instant, name: &str, errand: Do) {
        match errand {
            Do::Ping { to, txid } => {
                if self.behind_nat(to) {
                    self.reach.ports.sent(now, to.remote);
                }
                if self.peers.get(name).is_some_and(|p| p.paths.is_silent(now)) {
                    self.homes.doubt(now);
                    self.due = Some(now);
                }
                let preference = self.uplinks.preference(to) as u8;
                self.send_disco(now, name, Path::Direct(to), &Message::Ping { txid, preference });
            }
            Do::CallMeMaybe { asks } => {
                self.note_relays(now);
                let Some(peer) = self.peers.get(name) else { return };
                let (mapping, candidates) = (self.mapping(), self.candidates(now, peer));
                let message = Message::CallMeMaybe { asks, mapping, candidates };
                if let Some(path) = peer.paths.relay().or_else(|| peer.paths.current()) {
                    self.send_disco(now, name, path, &message);
                }
            }
            Do::Switch(path) => self.switch(now, name, path),
            Do::Suspect { tell } => {
                let Some(relay) = self.peers.get(name).and_then(|p| p.paths.relay()) else { return };
                if tell {
                    self.send_disco(now, name, relay, &Message::PathDown);
                }
                for index in self.slots_of(name) {
                    let Some(slot) = self.slots.get_mut(index) else { continue };
                    slot.doubt(relay);
                    let recent = std::mem::take(&mut slot.recent);
                    recent.iter().for_each(|datagram| self.send_raw(now, relay, datagram));
                }
            }
            Do::Trust => {
                for index in self.slots_of(name) {
                    if let Some(slot) = self.slots.get_mut(index) {
                        slot.trust();
                    }
                }
            }
        }
    }

    /// Whether what goes this way passes the NAT that the relays see us behind.
    fn behind_nat(&self, way: Way) -> bool {
        let ours = way.local.is_none() || way.local == self.uplinks.source(way.remote.ip());
        way.remote.is_ipv4() && ours && !self.lan.holds(way.remote.ip())
    }

    fn note_relays(&mut self, now: Instant) {
        for relay in 0..self.homes.len() {
            let at = self.homes.get(relay).and_then(|h| h.address);
            if let (Some(at), Some(seen)) = (at, self.homes.observed(relay))
                && self.behind_nat(at.into())
            {
                self.reach.ports.seen(now, at, seen);
            }
        }
    }

    pub(super) fn slots_of(&self, name: &str) -> Vec<u32> {
        self.slots.iter().filter(|(_, s)| !s.lost && s.peer.as_deref() == Some(name)).map(|(index, _)| index).collect()
    }

    /// The new path is proven: congestion control and RTT of the old one are of no use any more.
    fn switch(&mut self, now: Instant, name: &str, path: Path) {
        let way = self.describe(path);
        log::info!(target: "tunnel", "{name}: by {way} from now on");
        if let Some(peer) = self.peers.get_mut(name) {
            peer.path_since = now;
        }
        let on_link = self.on_link(path);
        for index in self.slots_of(name) {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.move_to(now, path, on_link);
                self.touch(index);
            }
        }
        if let Some(certificate) = self.peers.get(name).and_then(|p| p.certificate.clone()) {
            self.redial(now, name, path, &certificate);
        }
    }

    /// Connections take the peer's path where it was set without a switch.
    pub(super) fn follow(&mut self, now: Instant, name: &str) {
        let Some(peer) = self.peers.get(name) else { return };
        let Some(path) = peer.paths.current() else { return };
        let dialing = peer.dialing;
        for index in self.slots_of(name).into_iter().chain(dialing) {
            if let Some(slot) = self.slots.get_mut(index).filter(|s| s.path != path || s.stranded) {
                slot.path = path;
                slot.prod(now); // says to the other end where we are
                self.touch(index);
            }
        }
    }

    fn send_disco(&mut self, now: Instant, name: &str, path: Path, message: &Message) {
        let Some(keys) = self.peers.get(name).and_then(|p| p.disco.as_ref()) else { return };
        let frame = keys.seal(message, &mut self.rng);
        self.send_raw(now, path, &frame);
    }

    pub(super) fn handle_disco(&mut self, now: Instant, origin: Origin, frame: &[u8]) {
        let named = key_id(frame).and_then(|id| self.peers.of_disco(id)).map(str::to_owned);
        let opened = named.and_then(|name| {
            let message = self.peers.get(&name)?.disco.as_ref()?.open(frame)?;
            Some((name, message))
        });
        let Some((name, message)) = opened else { return bump(&self.count.disco_rejects) };
        match (message, origin) {
            (Message::Ping { txid, preference }, Origin::Address(from)) => {
                self.send_disco(now, &name, Path::Direct(from), &Message::Pong { txid, observed: from.remote });
                self.with_paths(now, &name, |peer, rng, out| {
                    peer.paths.came_from(now, from, rng, out);
                    peer.paths.candidates.prefer(from, preference);
                });
            }
            (Message::Pong { txid, observed }, Origin::Address(_)) => {
                let mut proven = None;
                self.with_paths(now, &name, |peer, _, out| proven = peer.paths.ponged(now, txid, out));
                if let Some(way) = proven.filter(|way| !way.is_lan() && self.behind_nat(*way)) {
                    self.reach.ports.seen(now, way.remote, observed);
                }
            }
            (Message::CallMeMaybe { asks, mapping, candidates }, _) => {
                if let Some(peer) = self.peers.get_mut(&name) {
                    peer.mapping = mapping;
                }
                self.with_paths(now, &name, |peer, _, out| peer.paths.called(now, asks, &candidates, out));
            }
            (Message::PathDown, Origin::Relay { .. }) => {
                self.with_paths(now, &name, |peer, _, out| peer.paths.path_down(now, out));
            }
            // A PING or PONG proves an address, and a relay has none of its own to prove.
            (Message::Ping { .. } | Message::Pong { .. }, Origin::Relay { .. })
            | (Message::PathDown, Origin::Address(_)) => {
                bump(&self.count.disco_rejects);
            }
        }
    }

    /// A QUIC datagram of this peer's came by this way.
    pub(super) fn path_heard(&mut self, now: Instant, name: &str, origin: Origin, len: usize) {
        self.with_paths(now, name, |peer, rng, out| {
            peer.paths.received(now, len);
            if let Origin::Address(from) = origin {
                peer.paths.came_from(now, from, rng, out);
            }
        });
    }

    pub(super) fn path_sent(&mut self, now: Instant, index: u32, len: usize) {
        let Some(name) = self.slots.get(index).and_then(|s| s.peer.as_ref()) else { return };
        if let Some(peer) = self.peers.get_mut(name) {
            peer.paths.sent(now, len);
        }
    }

    /// Of these peers some are due.
    pub(super) fn drive_paths(&mut self, now: Instant, peers: &[Rc<str>]) {
        for name in peers {
            self.with_paths(now, name, |peer, rng, out| peer.paths.handle_timeout(now, rng, out));
        }
    }
}
