//! The relay: nodes register by one handshake, then exchange datagrams by flows. It never sees plain text
//! and forwards between registered nodes only, so it is no open proxy.

mod directory;
mod flows;
mod members;

use super::{
    control::{Channel, Control, Rank, bare, parse_header},
    frame::{parse_data, retag},
    identity::{Certificate, Roles},
    keys::{Key, derive},
    outbox::Outbox,
};
use crate::metrics::{TunnelCounters, add, bump};
use directory::{Directory, Kept};
use flows::Flows;
use members::{Id, Member, Members};
use siphasher::sip::SipHasher24;
use std::{
    hash::Hasher,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// "Your registration is gone" is said at most so often in a second, to all together.
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
    cookie_key: [u8; 16],
    gone_budget: (Instant, u32),
    rng: fastrand::Rng,
}

/// What a relay is asked to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayLoad {
    pub nodes: usize,
    pub flows: usize,
}

impl Relay {
    /// `root` is derived from the static key, so that cookies outlive a restart.
    pub(super) fn new(root: &Key, now: Instant, rng: fastrand::Rng) -> Self {
        let mut cookie_key = [0; 16];
        cookie_key.copy_from_slice(&derive(root, b"relay cookie", b"").0[..16]);
        Self {
            members: Members::new(),
            flows: Flows::new(),
            directory: Directory::default(),
            cookie_key,
            gone_budget: (now, GONE_PER_SECOND),
            rng,
        }
    }

    pub(super) fn load(&self) -> RelayLoad {
        RelayLoad { nodes: self.members.len(), flows: self.flows.len() }
    }

    fn cookie(&self, registration: u64) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.cookie_key);
        hasher.write(&registration.to_be_bytes());
        hasher.finish()
    }

    /// A handshake for registration was confirmed: the exporter's secret is known to that node alone.
    pub(super) fn register(&mut self, now: Instant, certificate: Certificate, secret: &Key, address: SocketAddr) {
        let mut channel = Channel::new(secret, true, 0);
        channel.cookie = self.cookie(channel.registration);
        log::info!(target: "relay", "{} registered from {address}", certificate.name);
        let certificate = Box::new(certificate);
        // Until it says otherwise.
        let (rank, kept) = (Rank::Standby, Kept::default());
        self.members.put(Member { certificate, channel, address, candidate: None, heard: now, rank, kept });
    }

    /// When `handle_timeout` is next of use.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.members.poll_timeout()
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
            Control::Open { request, name } => Some(self.open(request, id, &name, out, count)),
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
        if now >= self.gone_budget.0 + Duration::from_secs(1) {
            self.gone_budget = (now, GONE_PER_SECOND);
        }
        let answer = bare(id, cookie);
        if cookie == self.cookie(id) && asked > answer.len() && self.gone_budget.1 > 0 {
            self.gone_budget.1 -= 1;
            let _ = out.push(to, answer);
        }
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

    /// Forwards a batch of frames of equal size that came from one address; tags are replaced in place.
    pub(super) fn handle_data(
        &mut self,
        now: Instant,
        from: SocketAddr,
        batch: &mut [u8],
        segment: usize,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) {
        // Runs of frames of one flow leave as one batch.
        let mut run: Option<(usize, u32, SocketAddr)> = None;
        let mut start = 0;
        while start < batch.len() {
            let end = (start + segment).min(batch.len());
            let next = self.forward(now, from, &mut batch[start..end], out, count);
            match (run, next) {
                (Some((_, flow, _)), Some((same, _))) if flow == same => {}
                (run_before, _) => {
                    flush(run_before, &batch[..start], segment, out, count);
                    run = next.map(|(flow, to)| (start, flow, to));
                }
            }
            start = end;
        }
        flush(run, batch, segment, out, count);
    }

    /// Checks and retags one frame: (flow, where it goes).
    fn forward(
        &mut self,
        now: Instant,
        from: SocketAddr,
        frame: &mut [u8],
        out: &mut Outbox,
        count: &TunnelCounters,
    ) -> Option<(u32, SocketAddr)> {
        let Some((flow, tag, datagram)) = parse_data(frame) else {
            bump(&count.relay_rejects);
            return None;
        };
        let signs = |id: Id| self.members.get(id).is_some_and(|n| n.channel.tag_in.tag(flow, datagram) == tag);
        // The sender is whose tag it is; its address says which to try first.
        let guess = self.members.at(from);
        let Some(ends) = self.flows.ends(flow) else {
            return self.unknown_flow(guess.filter(|id| signs(*id)), from, flow, out, count);
        };
        let first = usize::from(guess == Some(ends[1]));
        let Some(sender) = [first, 1 - first].into_iter().find(|i| signs(ends[*i])) else {
            bump(&count.relay_rejects);
            return None;
        };
        let (near, far) = (ends[sender], ends[1 - sender]);
        let far = self.members.get(far).map(|n| (n.channel.tag_out.tag(flow, datagram), n.address));
        let Some((tag, to)) = far else {
            self.flows.remove(flow);
            return self.unknown_flow(Some(near), from, flow, out, count);
        };
        let node = self.members.get_mut(near)?;
        node.heard = now;
        if node.address != from {
            self.challenge(now, near, from, out);
        }
        retag(frame, tag);
        Some((flow, to))
    }

    /// Whoever has proved to be a node is told that its flow is none, each time: the word may be lost.
    fn unknown_flow(
        &mut self,
        sender: Option<Id>,
        from: SocketAddr,
        flow: u32,
        out: &mut Outbox,
        count: &TunnelCounters,
    ) -> Option<(u32, SocketAddr)> {
        bump(&count.relay_rejects);
        self.tell(sender?, from, &Control::Gone { flow }, out, count);
        None
    }
}

fn flush(
    run: Option<(usize, u32, SocketAddr)>,
    batch: &[u8],
    segment: usize,
    out: &mut Outbox,
    count: &TunnelCounters,
) {
    let Some((start, _, to)) = run else { return };
    let frames = &batch[start..];
    let packets = frames.len().div_ceil(segment) as u64;
    if out.push_batch(to, frames, segment) {
        add(&count.relayed_datagrams, packets);
        add(&count.relayed_bytes, frames.len() as u64);
    } else {
        add(&count.relay_drops, packets);
    }
}
