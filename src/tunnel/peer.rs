//! What is known of another node: a record of a few hundred bytes, not a connection.

use super::{
    disco::{DiscoKeys, Mapping},
    identity::Certificate,
    path::Path,
    punch::Paths,
    recall::Remembered,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    rc::Rc,
    time::{Duration, Instant},
};

/// Records; when full, one without a connection goes.
pub(super) const PEERS_MAX: usize = 1000;
/// The dialler says after this that nobody answered, and what waits for it fails.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// A search for a flow to a peer.
pub(super) struct Want {
    pub(super) since: Instant,
    pub(super) next_ask: Instant,
    pub(super) asked: usize,
    /// Relays that do not know the name.
    pub(super) unknown_at: Vec<usize>,
    /// A relay said at which others it is.
    pub(super) told: bool,
}

pub(super) struct Peer {
    pub(super) name: String,
    key: Rc<str>,
    /// For when it is on the list of timers; that may be too early, never too late.
    timer: Option<Instant>,
    touched: bool,
    pub(super) certificate: Option<Certificate>,
    /// The confirmed connection on which streams are opened.
    pub(super) slot: Option<u32>,
    /// A handshake of ours under way.
    pub(super) dialing: Option<u32>,
    /// That one, where it goes to an address of before a restart and nobody has said that it still holds.
    pub(super) guess: Option<u32>,
    pub(super) paths: Paths,
    pub(super) path_since: Instant,
    pub(super) disco: Option<DiscoKeys>,
    /// Of the peer's NAT, as it says.
    pub(super) mapping: Mapping,
    pub(super) want: Option<Want>,
    /// By it relays answer to our questions for a flow; 0 before the first.
    pub(super) request: u32,
    /// When something last came by the relay that carries it.
    pub(super) relay_heard: Instant,
    /// Our keys of streams that wait for a connection.
    pub(super) waiting: VecDeque<u32>,
    pub(super) note: String,
    pub(super) tx_bytes: u64,
    pub(super) rx_bytes: u64,
}

impl Peer {
    fn new(name: &str, now: Instant) -> Self {
        Self {
            name: name.into(),
            key: name.into(),
            timer: None,
            touched: false,
            certificate: None,
            slot: None,
            dialing: None,
            guess: None,
            paths: Paths::default(),
            path_since: now,
            disco: None,
            mapping: Mapping::Unknown,
            want: None,
            request: 0,
            relay_heard: now,
            waiting: VecDeque::new(),
            note: String::new(),
            tx_bytes: 0,
            rx_bytes: 0,
        }
    }

    /// The path by the relay, or that it is gone.
    pub(super) fn set_relay(&mut self, now: Instant, path: Option<Path>) {
        self.relay_heard = now;
        if self.paths.set_relay(path) {
            self.path_since = now;
        }
    }

    /// When there is something to do for it.
    fn timeout(&self) -> Option<Instant> {
        self.want.as_ref().map(|w| w.next_ask).into_iter().chain(self.paths.poll_timeout()).min()
    }

    fn in_use(&self) -> bool {
        self.slot.is_some() || self.dialing.is_some() || self.want.is_some() || !self.waiting.is_empty()
    }
}

/// Once for each peer whose timer may have changed.
fn touch(peer: &mut Peer, touched: &mut Vec<Rc<str>>) {
    if !peer.touched {
        peer.touched = true;
        touched.push(Rc::clone(&peer.key));
    }
}

/// All peers by name, and the flows that lead to them.
#[derive(Default)]
pub(super) struct Peers {
    by_name: BTreeMap<String, Peer>,
    by_flow: HashMap<(usize, u32), String>,
    by_disco: HashMap<u64, String>,
    /// A thousand idle peers cost nothing: whoever may change a peer touches it, and only those that were touched
    /// are looked at.
    timers: BTreeSet<(Instant, Rc<str>)>,
    touched: Vec<Rc<str>>,
    /// Of before a restart, unchecked; at most [`PEERS_MAX`].
    pub(super) of_before: BTreeMap<String, Remembered>,
}

impl Peers {
    pub(super) fn get(&self, name: &str) -> Option<&Peer> {
        self.by_name.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Peer> {
        let peer = self.by_name.get_mut(name)?;
        touch(peer, &mut self.touched);
        Some(peer)
    }

    /// When somebody is next due.
    pub(super) fn poll_timeout(&mut self) -> Option<Instant> {
        let mut touched = std::mem::take(&mut self.touched);
        for key in touched.drain(..) {
            let Some(peer) = self.by_name.get_mut(&*key) else { continue };
            peer.touched = false;
            let Some(at) = peer.timeout() else { continue };
            if peer.timer.is_none_or(|old| at < old) {
                if let Some(old) = peer.timer.replace(at) {
                    self.timers.remove(&(old, Rc::clone(&key)));
                }
                self.timers.insert((at, key));
            }
        }
        self.touched = touched;
        self.timers.first().map(|(at, _)| *at)
    }

    /// Those who are due, and maybe some who are not any more.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Rc<str>> {
        let mut due = Vec::new();
        while self.poll_timeout().is_some_and(|at| at <= now) {
            let Some((_, key)) = self.timers.pop_first() else { break };
            if let Some(peer) = self.by_name.get_mut(&*key) {
                peer.timer = None;
            }
            due.push(key);
        }
        for key in &due {
            self.get_mut(key);
        }
        due
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.by_name.values()
    }

    /// For what is rare: all timers are looked at again.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.by_name.values_mut().for_each(|peer| touch(peer, &mut self.touched));
        self.by_name.values_mut()
    }

    /// The record of this name, a new one if need be; None when all records are in use.
    pub(super) fn entry(&mut self, now: Instant, name: &str) -> Option<&mut Peer> {
        if !self.by_name.contains_key(name) && self.by_name.len() >= PEERS_MAX {
            let idle = self.by_name.values().filter(|p| !p.in_use()).min_by_key(|p| p.path_since)?.name.clone();
            if let Some(Peer { timer: Some(at), key, .. }) = self.by_name.remove(&idle) {
                self.timers.remove(&(at, key));
            }
            self.by_flow.retain(|_, n| *n != idle);
            self.by_disco.retain(|_, n| *n != idle);
        }
        self.by_name.entry(name.into()).or_insert_with(|| Peer::new(name, now));
        self.get_mut(name)
    }

    /// The peer whose disco keys have this id.
    pub(super) fn of_disco(&self, id: u64) -> Option<&str> {
        self.by_disco.get(&id).map(String::as_str)
    }

    /// The peer's certificate, which the caller has checked, and the keys that follow from it.
    pub(super) fn know(&mut self, name: &str, certificate: &Certificate, keys: impl FnOnce() -> Option<DiscoKeys>) {
        let Some(peer) = self.by_name.get_mut(name) else { return };
        if peer.certificate.as_ref().is_some_and(|c| c.key == certificate.key) {
            peer.certificate = Some(certificate.clone());
            return;
        }
        if let Some(old) = &peer.disco {
            self.by_disco.remove(&old.in_id);
        }
        peer.certificate = Some(certificate.clone());
        peer.disco = keys();
        if let Some(keys) = &peer.disco {
            self.by_disco.insert(keys.in_id, name.into());
        }
    }

    /// A relay says with whom a flow is.
    pub(super) fn bind_flow(&mut self, relay: usize, flow: u32, name: &str) {
        // A relay hands out one flow for a pair, so older ones to the same peer are dead.
        self.by_flow.retain(|(r, _), n| *r != relay || n != name);
        self.by_flow.insert((relay, flow), name.into());
    }

    pub(super) fn of_flow(&self, relay: usize, flow: u32) -> Option<&str> {
        self.by_flow.get(&(relay, flow)).map(String::as_str)
    }

    /// All flows that are known to lead there: (relay, flow), one for a relay.
    pub(super) fn flows_to(&self, name: &str) -> impl Iterator<Item = (usize, u32)> {
        self.by_flow.iter().filter(move |(_, n)| *n == name).map(|(at, _)| *at)
    }

    pub(super) fn unbind_flow(&mut self, relay: usize, flow: u32) {
        self.by_flow.remove(&(relay, flow));
    }

    pub(super) fn unbind_relay(&mut self, relay: usize) {
        self.by_flow.retain(|(r, _), _| *r != relay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(next_ask: Instant) -> Option<Want> {
        Some(Want { since: next_ask, next_ask, asked: 0, unknown_at: Vec::new(), told: false })
    }

    #[test]
    fn nobody_is_forgotten_and_only_who_was_touched_is_looked_at() {
        let (start, mut rng) = (Instant::now(), fastrand::Rng::with_seed(5));
        let (mut peers, mut now) = (Peers::default(), start);
        for _ in 0..20_000 {
            now += Duration::from_millis(rng.u64(0..20));
            let name = format!("node-{}", rng.u32(0..50));
            let at = now + Duration::from_millis(rng.u64(0..2000));
            match rng.u8(0..4) {
                0 => peers.entry(now, &name).unwrap().want = want(at),
                1 => {
                    if let Some(peer) = peers.get_mut(&name) {
                        peer.want = None;
                    }
                }
                2 => {
                    let Some(peer) = peers.iter_mut().find(|p| p.name == name) else { continue };
                    peer.want = want(at);
                }
                _ => {
                    let expected: Vec<String> = peers
                        .iter()
                        .filter(|p| p.timeout().is_some_and(|t| t <= now))
                        .map(|p| p.name.clone())
                        .collect();
                    let due = peers.due(now);
                    assert!(expected.iter().all(|name| due.iter().any(|d| **d == **name)));
                    for name in due {
                        let Some(peer) = peers.get_mut(&name) else { continue };
                        peer.want = peer.want.take().filter(|w| w.next_ask > now);
                    }
                }
            }
            let first = peers.iter().filter_map(Peer::timeout).min();
            let told = peers.poll_timeout();
            assert!(first.is_none() || told.is_some_and(|t| Some(t) <= first), "{told:?} for {first:?}");
            assert!(peers.timers.len() <= 50 && peers.touched.is_empty());
        }
    }

    #[test]
    fn a_thousand_records_and_the_longest_unused_one_goes() {
        let start = Instant::now();
        let mut peers = Peers::default();
        for i in 0..PEERS_MAX {
            let peer = peers.entry(start + Duration::from_secs(i as u64), &format!("node-{i}")).unwrap();
            peer.want = want(start);
        }
        assert!(peers.entry(start, "one-more").is_none(), "all are in use");
        for name in ["node-7", "node-3"] {
            peers.get_mut(name).unwrap().want = None;
        }
        assert!(peers.entry(start, "one-more").is_some());
        assert!(peers.get("node-3").is_none() && peers.get("node-7").is_some());
        assert_eq!(peers.iter().count(), PEERS_MAX);
        peers.due(start + Duration::from_secs(1));
        assert!(peers.timers.is_empty(), "no timer is left of it");
    }
}
