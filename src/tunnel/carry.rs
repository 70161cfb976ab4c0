//! What relays carry for us: flows to peers are asked for, taken when a relay falls silent, given up when gone.

use super::{
    control::RelayAt,
    home::Action,
    identity::{Certificate, Roles},
    node::{Event, Node, Origin},
    noise::{Dial, Purpose},
    path::Path,
    peer::{ANSWER_WAIT, Peer, Want},
    slot::Role,
};
use crate::metrics::bump;
use std::{
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

/// A node that has just started may register a moment later than others ask for it.
const UNKNOWN_GRACE: Duration = Duration::from_secs(2);
/// Between questions to the relays for a flow: of a stream that waits, and of a connection without any path.
const ASK_AGAIN: [Duration; 3] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(1000)];
/// The same after [`ANSWER_WAIT`], for connections that live on and have another path.
const ASK_SELDOM: Duration = Duration::from_secs(5);
/// A connection without any path for so long: its streams that wait for an answer are told.
const CUT_OFF: Duration = Duration::from_secs(2);
/// Both ends of a connection may use another relay of those that they share. The one of the lower name follows the
/// other after the first time without a word by its own relay, the other after the second.
const FOLLOW: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];

impl Node {
    pub(super) fn want_flow(&mut self, now: Instant, name: &str) {
        let request = self.rng.u32(1..);
        let Some(peer) = self.peers.get_mut(name) else { return };
        if peer.request == 0 {
            peer.request = request;
        }
        peer.want =
            Some(Want { since: now, next_ask: now + ASK_AGAIN[0], asked: 1, unknown_at: Vec::new(), told: false });
        self.due = Some(now);
        self.homes.ask(peer.request, name, &mut self.outbox);
    }

    /// Asks again where an answer is due; of these peers some are.
    pub(super) fn drive_wants(&mut self, now: Instant, peers: &[Rc<str>]) {
        let (mut late, mut cut) = (Vec::new(), Vec::new());
        for name in peers {
            let Some(peer) = self.peers.get_mut(name) else { continue };
            let stranded = peer.paths.current().is_none();
            let Some(want) = peer.want.as_mut().filter(|w| w.next_ask <= now) else { continue };
            let waited = now.saturating_duration_since(want.since);
            let seldom = peer.slot.is_some() && (!stranded || waited > ANSWER_WAIT * 2);
            want.next_ask = now + if seldom { ASK_SELDOM } else { ASK_AGAIN[want.asked.min(ASK_AGAIN.len() - 1)] };
            want.asked += 1;
            if waited >= ANSWER_WAIT && peer.slot.is_none() && peer.dialing.is_none() {
                late.push(peer.name.clone());
                continue;
            }
            if waited >= CUT_OFF && stranded && peer.slot.is_some() {
                cut.push(peer.name.clone());
            }
            if want.unknown_at.is_empty() {
                self.homes.ask(peer.request, &peer.name, &mut self.outbox);
            } else {
                // Its own relays may be others, and their entries not here yet.
                self.homes.ask_all(peer.request, &peer.name, &mut self.outbox);
            }
        }
        for name in late {
            let up = self.homes.usable().count();
            let why = match (up, self.homes.len()) {
                (0, 0) => "nobody of this name is on our links, and no relay is configured",
                (0, _) => "no relay answers, and nobody of this name is on our links",
                _ => "the relays did not say how to reach it",
            };
            self.give_up(&name, why);
        }
        for name in cut {
            let slots = self.slots.iter().filter(|(_, s)| s.peer.as_ref() == Some(&name));
            let keys: Vec<u32> = slots.flat_map(|(_, s)| s.streams.values().copied()).collect();
            self.kill_unanswered(keys, "there is no path to it now: no relay answers that it has registered at");
        }
    }

    pub(super) fn act_on(&mut self, now: Instant, action: Action) {
        match action {
            Action::Resolve(relay) => {
                if let Some(home) = self.homes.get(relay) {
                    self.events.push_back(Event::Resolve { relay, host: home.host.clone() });
                }
            }
            Action::Dial(relay) => self.register(now, relay),
            Action::Hangup(relay) => self.hang_up(now, relay),
            Action::Registered(relay) => self.registered(now, relay),
            Action::Tried(_) => {}
            Action::Suspect(relay) => self.avoid(now, |path| on(path, relay)),
            Action::Back(relay) => self.prod_all(now, relay),
            Action::Lost(relay) => {
                self.peers.unbind_relay(relay);
                self.avoid(now, |path| on(path, relay));
            }
            Action::Moved { from, to } => self.moved(now, from, to),
            Action::Opened { relay, request, flow, certificate } => {
                self.flow_opened(now, relay, request, flow, *certificate);
            }
            Action::NotFound { relay, request } => self.not_found(now, relay, request),
            Action::Elsewhere { request, certificate, relays } => self.elsewhere(now, request, *certificate, relays),
            Action::Flow { relay, flow, certificate } => self.flow_told(now, relay, flow, *certificate),
            Action::Gone { relay, flow } => {
                self.peers.unbind_flow(relay, flow);
                self.avoid(now, |path| path == Path::Relay { relay, flow });
            }
            Action::Known(certificate) => self.relay_renewed(now, &certificate),
        }
    }

    /// What goes by this relay, or would if it had to, may have waited long, and each probe for twice as long.
    fn prod_all(&mut self, now: Instant, relay: usize) {
        let by = |p: &&Peer| p.paths.relay().is_some_and(|path| on(path, relay)) && p.paths.is_doubtful();
        let names: Vec<String> = self.peers.iter().filter(by).map(|p| p.name.clone()).collect();
        for index in names.iter().flat_map(|name| self.slots_of(name)).collect::<Vec<_>>() {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.prod(now);
                self.touch(index);
            }
        }
    }

    /// A host name was looked up for [`Event::Resolve`].
    pub fn resolved(&mut self, now: Instant, relay: usize, address: Result<SocketAddr, String>) {
        self.homes.resolved(relay, now, address);
        self.due = Some(now);
        self.handle_tick(now);
    }

    fn register(&mut self, now: Instant, relay: usize) {
        let Some(home) = self.homes.get(relay) else { return };
        let Some(address) = home.address else { return };
        let (name, peer) = (home.certificate.name.clone(), home.certificate.key);
        let dial = Dial { local: Arc::clone(&self.transport.local), peer, name, purpose: Purpose::Register };
        if let Err(why) = self.connect_slot(now, dial, Role::Registering(relay), Path::to(address)) {
            self.homes.dial_failed(relay, now, &why);
        }
    }

    fn hang_up(&mut self, now: Instant, relay: usize) {
        let done = self.slots.iter().filter(|(_, s)| s.role == Role::Registering(relay)).map(|(i, _)| i);
        let done: Vec<u32> = done.collect();
        done.into_iter().for_each(|index| self.close(now, index, "registered"));
    }

    /// The relay answered under the registration's keys: the connection has done its work.
    fn registered(&mut self, now: Instant, relay: usize) {
        self.hang_up(now, relay);
        self.pilot.try_at(now);
        for peer in self.peers.iter_mut() {
            // Those whose connections it is to carry, should the other relay fall silent, too.
            let live = peer.slot.is_some() && peer.request != 0 && self.homes.chosen().any(|r| r == relay);
            if peer.want.is_some() || live {
                self.homes.ask_at(relay, peer.request, &peer.name, &mut self.outbox);
            }
        }
    }

    /// Another flow to this peer, by a relay that answers: by our first one if there is one.
    fn other_flow(&self, name: &str, bad: &impl Fn(Path) -> bool) -> Option<Path> {
        let flows = self.peers.flows_to(name).map(|(relay, flow)| Path::Relay { relay, flow });
        let good = |path: &Path| matches!(path, Path::Relay { relay, .. } if self.homes.is_usable(*relay));
        let rank =
            |path: &Path| matches!(path, Path::Relay { relay, .. } if Some(*relay) == self.homes.chosen().next());
        flows.filter(|path| good(path) && !bad(*path)).max_by_key(rank)
    }

    /// Peers on these paths get another where there is one: their connections go on.
    fn avoid(&mut self, now: Instant, bad: impl Fn(Path) -> bool) {
        let hit: Vec<String> =
            self.peers.iter().filter(|p| p.paths.relay().is_some_and(&bad)).map(|p| p.name.clone()).collect();
        for name in hit {
            match self.other_flow(&name, &bad) {
                Some(path) => self.carry_by(now, &name, path, true),
                None => self.stranded(now, &name, &bad),
            }
        }
    }

    /// No other flow is known. A silent relay may yet answer, and what is lost is lost.
    fn stranded(&mut self, now: Instant, name: &str, bad: &impl Fn(Path) -> bool) {
        let known = self.peers.flows_to(name).any(|(relay, flow)| bad(Path::Relay { relay, flow }));
        let Some(peer) = self.peers.get_mut(name) else { return };
        if !known {
            peer.set_relay(now, None);
            let pathless = peer.paths.current().is_none();
            if let Some(want) = &mut peer.want {
                want.next_ask = now;
            }
            for index in self.slots_of(name) {
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.stranded = pathless;
                }
            }
        }
        let Some(peer) = self.peers.get_mut(name) else { return };
        if (peer.slot.is_some() || peer.dialing.is_some()) && peer.want.is_none() {
            self.want_flow(now, name);
        }
    }

    /// From now on this relay is the peer's; `again`: what went by the other may be lost.
    fn carry_by(&mut self, now: Instant, name: &str, path: Path, again: bool) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let old = peer.paths.relay();
        peer.set_relay(now, Some(path));
        let slots: Vec<u32> = self.slots_of(name);
        // What went into the void long ago is better sent anew: an ACK of it would measure all that time as the RTT.
        let again = again && !slots.iter().any(|index| self.slots.get(*index).is_some_and(|s| s.stranded));
        self.follow(now, name);
        for index in slots {
            let Some(slot) = self.slots.get_mut(index) else { continue };
            slot.also = slot.also.map(|_| path);
            if again && slot.path == path && old != Some(path) {
                let recent = std::mem::take(&mut slot.recent);
                recent.iter().for_each(|datagram| self.send_raw(now, path, datagram));
            }
        }
    }

    /// Our first relay is another one: what goes by relays goes by it, as far as there are flows.
    fn moved(&mut self, now: Instant, from: usize, to: usize) {
        let with = |p: &&Peer| p.paths.relay().is_some_and(|path| on(path, from));
        let names: Vec<String> = self.peers.iter().filter(with).map(|p| p.name.clone()).collect();
        for name in names {
            let flow = self.peers.flows_to(&name).find(|(relay, _)| *relay == to);
            if let Some((relay, flow)) = flow {
                self.carry_by(now, &name, Path::Relay { relay, flow }, false);
            }
        }
    }

    /// What a relay says of a peer is believed only as far as the CA signed it.
    fn checked(&self, certificate: &Certificate) -> bool {
        if self.peers.get(&certificate.name).is_some_and(|p| p.certificate.as_ref() == Some(certificate)) {
            return true; // it was looked at before
        }
        let verdict = certificate.verify(&self.transport.local.ca, self.unix());
        if let Err(why) = &verdict {
            bump(&self.count.bad_certificate);
            log::warn!(target: "tunnel", "a relay told of {}, whose certificate does not hold: {why}", certificate.name);
        }
        verdict.is_ok()
    }

    fn flow_opened(&mut self, now: Instant, relay: usize, request: u32, flow: u32, certificate: Certificate) {
        let name = certificate.name.clone();
        if self.peers.get(&name).is_none_or(|p| p.request != request) || !self.checked(&certificate) {
            return;
        }
        self.peers.bind_flow(relay, flow, &name);
        let path = Path::Relay { relay, flow };
        let Some(peer) = self.peers.get_mut(&name) else { return };
        let (wanted, idle, dialing) = (peer.want.take().is_some(), peer.slot.is_none(), peer.dialing.is_some());
        let carried = peer.paths.relay().is_some_and(|p| self.homes.carries(p));
        self.know(&name, &certificate);
        if !carried {
            self.carry_by(now, &name, path, true);
        }
        if !wanted {
            return; // another relay has answered before: this one stands by
        }
        self.seek(now, &name);
        if dialing {
            self.redial(now, &name, path, &certificate);
        } else if idle {
            self.dial(now, &name, path, &certificate);
        }
        self.follow(now, &name);
    }

    fn not_found(&mut self, now: Instant, relay: usize, request: u32) {
        let Some(peer) = self.peers.iter_mut().find(|p| p.want.is_some() && p.request == request) else { return };
        let Some(want) = &mut peer.want else { return };
        if !want.unknown_at.contains(&relay) {
            want.unknown_at.push(relay);
        }
        let all = self.homes.usable().all(|relay| want.unknown_at.contains(&relay));
        let grace = if want.told { ANSWER_WAIT } else { UNKNOWN_GRACE };
        if all && peer.slot.is_none() && peer.dialing.is_none() && now >= want.since + grace {
            let name = peer.name.clone();
            self.give_up(&name, "no relay knows it: it is not registered, or the name is wrong");
        }
    }

    /// The peer's own relays are others: it is asked for there.
    fn elsewhere(&mut self, now: Instant, request: u32, certificate: Certificate, relays: Vec<RelayAt>) {
        let name = certificate.name.clone();
        let wanted = |p: &Peer| p.request == request && p.want.is_some();
        if !self.peers.get(&name).is_some_and(wanted) || !self.checked(&certificate) {
            return;
        }
        if let Some(want) = self.peers.get_mut(&name).and_then(|p| p.want.as_mut()) {
            want.told = true;
        }
        let mut actions = Vec::new();
        for at in &relays {
            let known = self.homes.with(&at.certificate);
            if at.certificate.name == self.name || !known && !self.is_relay(&at.certificate) {
                continue;
            }
            if !known {
                self.relay_renewed(now, &at.certificate);
            }
            if let Some(relay) = self.homes.visit(now, at, &mut actions) {
                self.homes.ask_at(relay, request, &name, &mut self.outbox);
            }
        }
        self.due = Some(now);
        self.act(now, actions);
    }

    fn is_relay(&self, certificate: &Certificate) -> bool {
        certificate.roles.contains(Roles::RELAY) && self.checked(certificate)
    }

    /// Another relay tells of a relay that we cannot reach.
    fn relay_renewed(&mut self, now: Instant, certificate: &Certificate) {
        if !self.homes.with(certificate)
            && self.is_relay(certificate)
            && let Some(relay) = self.homes.renew(now, certificate)
        {
            self.hang_up(now, relay);
            self.due = Some(now);
        }
    }

    /// A relay says who is at the other end of a flow that the other end asked for.
    fn flow_told(&mut self, now: Instant, relay: usize, flow: u32, certificate: Certificate) {
        if !self.checked(&certificate) {
            return;
        }
        let name = certificate.name.clone();
        let Some(peer) = self.peers.entry(now, &name) else { return };
        let carried = peer.paths.relay().is_some_and(|p| self.homes.carries(p));
        peer.want = None;
        let idle = peer.slot.is_none() && peer.dialing.is_none() && !peer.waiting.is_empty();
        self.know(&name, &certificate);
        self.peers.bind_flow(relay, flow, &name);
        if !carried {
            self.carry_by(now, &name, Path::Relay { relay, flow }, true);
        }
        if idle {
            self.reach(now, &name);
        }
    }

    /// A datagram for this slot came from there.
    pub(super) fn heard(&mut self, now: Instant, index: u32, origin: Origin, len: u64) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.rx_bytes += len;
        let path = slot.path;
        let Some(name) = slot.peer.clone() else { return };
        self.path_heard(now, &name, origin, len as usize);
        let Origin::Relay { relay, flow } = origin else { return };
        let lag = FOLLOW[usize::from(self.name > name)];
        let Some(peer) = self.peers.get_mut(&name) else { return };
        let current = peer.paths.relay();
        if current == Some(origin.path()) {
            peer.relay_heard = now;
            return;
        }
        if path == origin.path() {
            return;
        }
        let carried = current.is_some_and(|p| self.homes.carries(p)) && now < peer.relay_heard + lag;
        // The relay vouches for whom a flow is with: only then does the path follow.
        match self.peers.of_flow(relay, flow) {
            Some(known) if known == name => {
                if !carried {
                    self.carry_by(now, &name, origin.path(), false);
                }
            }
            Some(_) => {}
            None => self.homes.who(relay, flow, &mut self.outbox),
        }
    }
}

fn on(path: Path, relay: usize) -> bool {
    matches!(path, Path::Relay { relay: r, .. } if r == relay)
}
