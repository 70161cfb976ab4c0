//! The relay: nodes register by one handshake, then exchange datagrams by flows. It never sees plain text
//! and forwards between registered nodes only, so it is no open proxy.

mod directory;
mod flows;
mod forward;
mod limits;
mod members;
mod queue;

pub use limits::{Rate, RelayLimits};

use super::{
    control::{Channel, Control, Rank, bare, parse_header},
    identity::{Certificate, Roles},
    keys::{Key, derive},
    outbox::Outbox,
};
use crate::metrics::{TunnelCounters, bump};
use directory::{Directory, Kept};
use flows::Flows;
use limits::{Bucket, OPENS, REGISTRATION, REGISTRATIONS};
use members::{Id, Member, Members};
use queue::Queue;
use siphasher::sip::SipHasher24;
use std::{
    hash::Hasher,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// "Your registration is gone" or "your flow" is said at most so often in a second, to all together.
const GONE_PER_SECOND: u32 = 200;
/// Between challenges to one registration.
const CHALLENGE_GAP: Duration = Duration::from_millis(200);

/// Nodes come back to a restarted relay at some time within this, and…
const RESTART_LEAST: Duration = Duration::from_secs(1);
/// …this for each of them: a handshake costs about a millisecond, and there is other work.
const RESTART_EACH: Duration = Duration::from_millis(5);

/// See the module.
pub(super) struct Relay {
    members: Members,
    flows: Flows,
    directory: Directory,
    queue: Queue,
    limits: RelayLimits,
    cookie_key: [u8; 16],
    gone_budget: (Instant, u32),
    rng: fastrand::Rng,
}

/// What a relay tells of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayLoad {
    pub nodes: usize,
    /// Nodes whose first relay it is.
    pub firsts: u16,
    pub flows: usize,
    /// Bytes of datagrams that wait for their turn.
    pub queued: usize,
    /// Since the start.
    pub datagrams: u64,
    pub bytes: u64,
    /// Datagrams that were not passed on, by the reason.
    pub drops: [(&'static str, u64); 5],
}

impl Relay {
    /// `root` is derived from the static key, so that cookies outlive a restart.
    pub(super) fn new(root: &Key, limits: RelayLimits, now: Instant, rng: fastrand::Rng) -> Self {
        let mut cookie_key = [0; 16];
        cookie_key.copy_from_slice(&derive(root, b"relay cookie", b"").0[..16]);
        Self {
            members: Members::new(),
            flows: Flows::new(),
            directory: Directory::default(),
            queue: Queue::new(limits, now),
            limits,
            cookie_key,
            gone_budget: (now, GONE_PER_SECOND),
            rng,
        }
    }

    pub(super) fn load(&self, count: &TunnelCounters) -> RelayLoad {
        RelayLoad {
            nodes: self.members.len(),
            firsts: self.members.firsts(),
            flows: self.flows.len(),
            queued: self.queue.len(),
            datagrams: count.relayed_datagrams.get(),
            bytes: count.relayed_bytes.get(),
            drops: [
                ("wrong tag", count.relay_rejects.get()),
                ("no such flow", count.relay_unknown_flows.get()),
                ("over the rate", count.relay_over_rate.get()),
                ("queue full", count.relay_drops.get()),
                ("too late", count.relay_late.get()),
            ],
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.members.len() == 0
    }

    fn cookie(&self, registration: u64) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.cookie_key);
        hasher.write(&registration.to_be_bytes());
        hasher.finish()
    }

    /// A handshake for registration was confirmed: the exporter's secret is known to that node alone. False where
    /// the node registers too often.
    pub(super) fn register(
        &mut self,
        now: Instant,
        certificate: Certificate,
        secret: &Key,
        address: SocketAddr,
        count: &TunnelCounters,
    ) -> bool {
        let old = self.members.named(&certificate.name).and_then(|id| self.members.get(id));
        let (data, opens, mut registrations) = match old {
            Some(old) => (old.data, old.opens, old.registrations),
            None => {
                let node = self.limits.node.unwrap_or(OPENS);
                (Bucket::new(node, now), Bucket::new(OPENS, now), Bucket::new(REGISTRATIONS, now))
            }
        };
        if !registrations.take(now, REGISTRATIONS, REGISTRATION) {
            bump(&count.relay_over_rate);
            return false;
        }
        let mut channel = Channel::new(secret, true, 0);
        channel.cookie = self.cookie(channel.registration);
        log::info!(target: "relay", "{} registered from {address}", certificate.name);
        let certificate = Box::new(certificate);
        // Until it says otherwise.
        let (rank, kept) = (Rank::Standby, Kept::default());
        self.members.put(Member {
            certificate,
            channel,
            address,
            candidate: None,
            heard: now,
            rank,
            kept,
            data,
            opens,
            registrations,
        });
        true
    }

    /// When `handle_timeout` is next of use.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.members.poll_timeout().into_iter().chain(self.queue.poll_timeout()).min()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.members.handle_timeout(now);
    }

    pub(super) fn handle_control(
        &mut self,
        now: Instant,
        from: SocketAddr,
        frame: &[u8],
        out: &mut Outbox,
        count: &TunnelCounters,
    ) {
        let Some(header) = parse_header(frame) else { return bump(&count.control_rejects) };
        let found = self.members.registered(header.registration).and_then(|id| Some((id, self.members.get_mut(id)?)));
        let Some((id, node)) = found else {
            return self.say_gone(now, from, header.registration, header.cookie, frame.len(), out, count);
        };
        let Some(message) = node.channel.open(frame) else { return bump(&count.control_rejects) };
        node.heard = now;
        if let Control::Answer { token } = message {
            if node.candidate.take_if(|(address, expected, _)| *address == from && *expected == token).is_some() {
                log::info!(target: "relay", "{} moved from {} to {from}", node.certificate.name, node.address);
                self.members.moved(id, from);
            }
            return;
        }
        self.challenge(now, id, from, out);
        let reply = match message {
            Control::Ping { nonce } => {
                let serial = self.members.get(id).map_or(0, |n| n.kept.serial);
                Some(Control::Pong { nonce, observed: from, serial, load: self.members.firsts() })
            }
            Control::Open { request, name } => {
                let may = self.members.get_mut(id).is_some_and(|n| n.opens.take(now, OPENS, 1));
                if !may {
                    return bump(&count.relay_over_rate);
                }
                Some(self.open(request, id, &name, out, count))
            }
            Control::Who { flow } => Some(self.who(flow, id)),
            Control::Enter { rank, entry } => {
                self.members.ranked(id, rank);
                if let Some(node) = self.members.get_mut(id) {
                    self.directory.keep(&mut node.kept, *entry);
                }
                None
            }
            Control::Which { name } => self.which(&name),
            Control::Bye => {
                if let Some(node) = self.members.get(id) {
                    log::info!(target: "relay", "{} left", node.certificate.name);
                }
                self.members.remove(id);
                None
            }
            Control::Pong { .. }
            | Control::Opened { .. }
            | Control::NotFound { .. }
            | Control::Flow { .. }
            | Control::Challenge { .. }
            | Control::Answer { .. }
            | Control::Elsewhere { .. }
            | Control::Restarting { .. }
            | Control::Known { .. }
            | Control::Gone { .. } => {
                bump(&count.control_rejects);
                None
            }
        };
        if let Some(reply) = reply {
            // To where it came from: that is what a PONG proves, and no longer than the question by much.
            self.tell(id, from, &reply, out, count);
        }
    }

    fn tell(&mut self, id: Id, to: SocketAddr, message: &Control, out: &mut Outbox, count: &TunnelCounters) {
        let Some(node) = self.members.get_mut(id) else { return };
        if !out.push(to, node.channel.seal(message)) {
            bump(&count.relay_drops);
        }
    }

    /// Only who shows our own cookie is answered: strangers get nothing.
    #[allow(clippy::too_many_arguments)]
    fn say_gone(
        &mut self,
        now: Instant,
        to: SocketAddr,
        id: u64,
        cookie: u64,
        asked: usize,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) {
        bump(&count.control_rejects);
        let answer = bare(id, cookie);
        if cookie == self.cookie(id) && asked > answer.len() && self.may_say_gone(now) {
            let _ = out.push(to, answer);
        }
    }

    fn may_say_gone(&mut self, now: Instant) -> bool {
        if now >= self.gone_budget.0 + Duration::from_secs(1) {
            self.gone_budget = (now, GONE_PER_SECOND);
        }
        let may = self.gone_budget.1 > 0;
        self.gone_budget.1 -= u32::from(may);
        may
    }

    /// Data goes to a new address only after it was shown that the node receives there.
    fn challenge(&mut self, now: Instant, id: Id, from: SocketAddr, out: &mut Outbox) {
        let token = self.rng.u64(..);
        let Some(node) = self.members.get_mut(id).filter(|n| n.address != from) else { return };
        let token = match node.candidate {
            Some((_, _, at)) if now < at + CHALLENGE_GAP => return,
            Some((address, token, _)) if address == from => token,
            Some(_) | None => token,
        };
        node.candidate = Some((from, token, now));
        let frame = node.channel.seal(&Control::Challenge { token });
        let _ = out.push(from, frame);
    }

    fn open(&mut self, request: u32, from: Id, name: &str, out: &mut Outbox, count: &TunnelCounters) -> Control {
        let to = self.members.named(name).filter(|to| *to != from);
        let ends = to.and_then(|to| Some((to, self.members.get(from)?, self.members.get(to)?)));
        let Some((to, near, far)) = ends else { return Control::NotFound { request } };
        if let (Rank::Listed, Some(entry)) = (far.rank, far.kept.entry()) {
            return Control::Elsewhere { request, certificate: far.certificate.clone(), entry };
        }
        let (ours, theirs, address) = (near.certificate.clone(), far.certificate.clone(), far.address);
        let flow = self.flows.between(from, to, &mut self.rng);
        self.tell(to, address, &Control::Flow { flow, certificate: ours }, out, count);
        Control::Opened { request, flow, certificate: theirs }
    }

    fn who(&self, flow: u32, asks: Id) -> Control {
        match self.flows.far(flow, asks).and_then(|far| self.members.get(far)) {
            Some(node) => Control::Flow { flow, certificate: node.certificate.clone() },
            None => Control::Gone { flow },
        }
    }

    /// The certificate with which a relay registered here last.
    fn which(&self, name: &str) -> Option<Control> {
        let node = self.members.get(self.members.named(name)?)?;
        let relay = node.certificate.roles.contains(Roles::RELAY);
        relay.then(|| Control::Known { certificate: node.certificate.clone() })
    }

    /// All nodes are told that we are leaving and will be back; they come back one after the other.
    pub(super) fn say_restarting(&mut self, out: &mut Outbox) {
        let spread = RESTART_LEAST + RESTART_EACH * self.members.len() as u32;
        let message = Control::Restarting { spread: spread.as_millis() as u32 };
        for node in self.members.iter_mut() {
            let _ = out.push(node.address, node.channel.seal(&message));
        }
    }
}

#[cfg(test)]
mod tests;
