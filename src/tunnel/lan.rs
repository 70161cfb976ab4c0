//! LAN beacons (0x13): nodes of one cluster find each other on a link without any relay.
//!
//! `0x13 | nonce 24 | XChaCha20-Poly1305(asks u8, certificate)` under a key from the psk. The source of the
//! packet is where its sender may be reached. A beacon is never answered to a source off the link.

use super::{
    identity::Certificate,
    keys::{Key, TAG_LEN, derive, fill},
    node::{Event, Node, Output},
    path::{Path, Way},
};
use crate::{metrics::bump, sorted::Map};
use chacha20poly1305::{AeadInPlace, KeyInit, XChaCha20Poly1305, XNonce};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

const BEACON: u8 = 0x13;
const NONCE: usize = 24;
/// A certificate and a byte.
const BODY_MAX: usize = 1024;
/// Between beacons on a quiet link.
const EVERY: Duration = Duration::from_secs(30);
/// Between beacons that ask for somebody, all together: a wish for many nodes is one question.
const ASK_GAP: Duration = Duration::from_millis(100);
/// A neighbour that was not heard for so long is none any more: three beacons.
const HEARD: Duration = Duration::from_secs(100);
/// After a change of our links those of before have so long to be heard again.
const HEARD_BEFORE: Duration = Duration::from_secs(5);
/// Neighbours that are told of; more are nodes like all others.
const NEIGHBOURS_MAX: usize = 256;
/// Beacons that are opened in a second; more are dropped unread.
const OPENED_PER_SECOND: u32 = 200;

/// An address of an interface, and how much of it names the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Link {
    pub(super) fn contains(self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let host = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
                (u32::from(a) ^ u32::from(b)) & !host == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let host = u128::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
                (u128::from(a) ^ u128::from(b)) & !host == 0
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// When beacons go out.
pub(super) struct Lan {
    aead: Option<XChaCha20Poly1305>,
    pub(super) links: Vec<Link>,
    next: Instant,
    /// The next one asks all to answer.
    asks: bool,
    asked: Option<Instant>,
    /// Nodes on our links, and until when they count.
    neighbours: Map<String, Instant>,
    budget: (Instant, u32),
}

impl Lan {
    /// Without a psk there are no beacons.
    pub(super) fn new(psk: Option<&Key>, now: Instant) -> Self {
        let aead = psk.map(|psk| XChaCha20Poly1305::new(&derive(psk, b"lan", b"").0.into()));
        let (links, neighbours) = (Vec::new(), Map::new());
        Self { aead, links, next: now, asks: true, asked: None, neighbours, budget: (now, OPENED_PER_SECOND) }
    }

    pub(super) fn enabled(&self) -> bool {
        self.aead.is_some() && !self.links.is_empty()
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.enabled().then_some(self.next)
    }

    /// Somebody is looked for, or a link came up.
    pub(super) fn ask(&mut self, now: Instant) {
        let at = self.asked.map_or(now, |asked| now.max(asked + ASK_GAP));
        (self.asks, self.next) = (true, self.next.min(at));
    }

    /// Whether an address is on one of our links.
    pub(super) fn holds(&self, ip: IpAddr) -> bool {
        self.links.iter().any(|link| link.contains(ip))
    }

    pub(super) fn set_links(&mut self, now: Instant, links: Vec<Link>) {
        self.links = links;
        self.neighbours.values_mut().for_each(|until| *until = (*until).min(now + HEARD_BEFORE));
        self.ask(now);
    }

    /// Whether it is a new neighbour.
    fn hear(&mut self, now: Instant, name: &str) -> bool {
        let known = self.neighbours.get_mut(name).map(|until| *until = now + HEARD).is_some();
        let new = !known && self.neighbours.len() < NEIGHBOURS_MAX;
        if new {
            self.neighbours.insert(name.into(), now + HEARD);
        }
        new
    }

    /// Whether some are no neighbours any more.
    fn forget(&mut self, now: Instant) -> bool {
        let before = self.neighbours.len();
        self.neighbours.retain(|_, until| now < *until);
        self.neighbours.len() < before
    }

    fn seal(&self, asks: bool, certificate: &[u8], rng: &mut fastrand::Rng) -> Option<Vec<u8>> {
        let mut out = vec![BEACON];
        let mut nonce = [0; NONCE];
        fill(rng, &mut nonce);
        out.extend_from_slice(&nonce);
        let mut body = vec![u8::from(asks)];
        body.extend_from_slice(certificate);
        let tag =
            self.aead.as_ref()?.encrypt_in_place_detached(XNonce::from_slice(&nonce), &[BEACON], &mut body).ok()?;
        out.extend_from_slice(&body);
        out.extend_from_slice(&tag);
        Some(out)
    }

    fn open(&mut self, now: Instant, frame: &[u8]) -> Option<(bool, Certificate)> {
        if now >= self.budget.0 + Duration::from_secs(1) {
            self.budget = (now, OPENED_PER_SECOND);
        }
        self.budget.1 = self.budget.1.checked_sub(1)?;
        let nonce = frame.get(1..=NONCE)?;
        let sealed = frame.get(1 + NONCE..).filter(|s| (TAG_LEN..=BODY_MAX).contains(&s.len()))?;
        let (body, tag) = sealed.split_at(sealed.len() - TAG_LEN);
        let mut body = body.to_vec();
        let nonce = XNonce::from_slice(nonce);
        self.aead.as_ref()?.decrypt_in_place_detached(nonce, &[BEACON], &mut body, tag.into()).ok()?;
        let (asks, certificate) = body.split_first()?;
        Some((*asks != 0, Certificate::decode(certificate).ok()?))
    }
}

impl Node {
    /// A beacon for every link, where one is due.
    pub(super) fn beacon(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<Output> {
        let lan = &mut self.lan;
        if !lan.enabled() || now < lan.next {
            return None;
        }
        let asks = std::mem::take(&mut lan.asks);
        lan.next = now + EVERY.mul_f64(0.9 + self.rng.f64() * 0.2);
        if asks {
            lan.asked = Some(now);
        }
        *buf = lan.seal(asks, &self.transport.local.certificate, &mut self.rng)?;
        Some(Output::Beacon)
    }

    /// Where beacons do not come through, a path tells as well who is on a link of ours.
    pub(super) fn look_around(&mut self, now: Instant) {
        let on_link = |path: Path| matches!(path, Path::Direct(way) if self.lan.holds(way.remote.ip()));
        let beside = self.slots.iter().filter(|(_, s)| on_link(s.path)).filter_map(|(_, s)| s.peer.clone());
        let beside: Vec<String> = beside.collect();
        let found = beside.iter().filter(|name| self.lan.hear(now, name)).count();
        if self.lan.forget(now) || found > 0 {
            self.tell_neighbours();
        }
    }

    fn tell_neighbours(&mut self) {
        self.events.push_back(Event::Neighbours(self.lan.neighbours.keys().cloned().collect()));
    }

    pub(super) fn handle_beacon(&mut self, now: Instant, from: SocketAddr, frame: &[u8]) {
        if !self.lan.holds(from.ip()) || self.local.contains(&from) {
            return bump(&self.count.beacon_rejects);
        }
        let Some((asks, certificate)) = self.lan.open(now, frame) else { return bump(&self.count.beacon_rejects) };
        let name = certificate.name.clone();
        if name == self.name {
            return; // our own, by another interface
        }
        if let Err(why) = certificate.verify(&self.transport.local.ca, self.unix()) {
            bump(&self.count.bad_certificate);
            return log::warn!(target: "tunnel", "beacon of {name} at {from}: {why}");
        }
        if asks {
            let reply = self.lan.seal(false, &self.transport.local.certificate, &mut self.rng);
            let _ = reply.is_some_and(|frame| self.outbox.push(from, frame));
        }
        if self.lan.hear(now, &name) {
            self.tell_neighbours();
        }
        if self.peers.entry(now, &name).is_none() {
            return;
        }
        self.know(&name, &certificate);
        let Some(peer) = self.peers.get_mut(&name) else { return };
        let new = peer.paths.last_good() != Some(from);
        if new {
            log::debug!(target: "tunnel", "{name} is on this link, at {from}");
        }
        let way = Way::from(from);
        if peer.paths.last_good().is_some_and(|at| at.is_ipv4() && Way::from(at).rank() < way.rank()) {
            // It was heard by IPv4 as well.
            return peer.paths.candidates.learn_address(from);
        }
        peer.paths.remember(from);
        if peer.slot.is_some() {
            if new {
                self.seek(now, &name);
            }
        } else if peer.dialing.is_some() {
            self.redial(now, &name, Path::to(from), &certificate);
        } else if !peer.waiting.is_empty() {
            peer.want = None;
            self.dial(now, &name, Path::to(from), &certificate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_forgotten_and_bounded() {
        let start = Instant::now();
        let after = |secs| start + Duration::from_secs(secs);
        let mut lan = Lan::new(None, start);
        let names = |lan: &Lan| lan.neighbours.keys().cloned().collect::<Vec<_>>();
        assert!(lan.hear(start, "a") && lan.hear(start, "b") && !lan.hear(after(60), "b"));
        assert!(!lan.forget(after(99)) && lan.forget(after(100)));
        assert_eq!(names(&lan), ["b"]);
        lan.hear(after(100), "c");
        lan.set_links(after(101), Vec::new());
        assert!(!lan.hear(after(102), "c"), "it has been one all the time");
        assert!(!lan.forget(after(105)) && lan.forget(after(106)));
        assert_eq!(names(&lan), ["c"]);
        let new = (0..2 * NEIGHBOURS_MAX).filter(|n| lan.hear(after(107), &n.to_string())).count();
        assert_eq!(new, NEIGHBOURS_MAX - 1);
    }

    #[test]
    fn links_contain_what_shares_their_prefix() {
        let link = |a: &str, prefix| Link { address: a.parse().unwrap(), prefix };
        for (link, other, inside) in [
            (link("192.168.1.2", 24), "192.168.1.77", true),
            (link("192.168.1.2", 24), "192.168.2.77", false),
            (link("10.0.0.1", 32), "10.0.0.1", true),
            (link("10.0.0.1", 32), "10.0.0.2", false),
            (link("10.0.0.1", 0), "8.8.8.8", true),
            (link("fd00::1", 64), "fd00::2", true),
            (link("fd00::1", 64), "fd01::2", false),
            (link("fd00::1", 64), "10.0.0.1", false),
        ] {
            assert_eq!(link.contains(other.parse().unwrap()), inside, "{link:?} {other}");
        }
    }
}
