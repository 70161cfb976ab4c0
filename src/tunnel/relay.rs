//! The relay: nodes register by one handshake, then exchange datagrams by flows. It never sees plain text
//! and forwards between registered nodes only, so it is no open proxy.

use super::{
    control::{Channel, Control, bare, parse_header},
    frame::{parse_data, retag},
    identity::Certificate,
    keys::{Key, derive},
    outbox::Outbox,
};
use crate::metrics::{TunnelCounters, add, bump};
use lru::LruCache;
use siphasher::sip::SipHasher24;
use std::{
    collections::HashMap,
    hash::Hasher,
    net::SocketAddr,
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Registered nodes; when full the longest silent one goes.
const NODES_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Flows between them; when full the longest unused one goes, and its ends ask for a new one.
const FLOWS_MAX: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();
/// A node pings at least each 25 s; three lost pings and some slack.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// "Your registration is gone" is said at most so often in a second, to all together.
const GONE_PER_SECOND: u32 = 200;
/// Between challenges to one registration.
const CHALLENGE_GAP: Duration = Duration::from_millis(200);

struct Registration {
    certificate: Box<Certificate>,
    channel: Channel,
    address: SocketAddr,
    /// A new source address that has not yet answered.
    candidate: Option<(SocketAddr, u64, Instant)>,
    heard: Instant,
}

#[derive(Clone, Copy)]
struct Flow {
    ends: [u64; 2],
}

/// See the module.
pub(super) struct Relay {
    nodes: LruCache<u64, Registration>,
    by_name: HashMap<String, u64>,
    flows: LruCache<u32, Flow>,
    pairs: HashMap<[u64; 2], u32>,
    cookie_key: [u8; 16],
    gone_budget: (Instant, u32),
    rng: fastrand::Rng,
}

/// What a relay is asked to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
            nodes: LruCache::unbounded(),
            by_name: HashMap::new(),
            flows: LruCache::unbounded(),
            pairs: HashMap::new(),
            cookie_key,
            gone_budget: (now, GONE_PER_SECOND),
            rng,
        }
    }

    pub(super) fn load(&self) -> RelayLoad {
        RelayLoad { nodes: self.nodes.len(), flows: self.flows.len() }
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
        let id = channel.registration;
        if let Some(old) = self.by_name.insert(certificate.name.clone(), id) {
            self.forget(old);
        }
        log::info!(target: "relay", "{} registered from {address}", certificate.name);
        let certificate = Box::new(certificate);
        self.nodes.put(id, Registration { certificate, channel, address, candidate: None, heard: now });
        while self.nodes.len() > NODES_MAX.get() {
            let Some((_, gone)) = self.nodes.pop_lru() else { break };
            self.unname(&gone);
        }
    }

    fn unname(&mut self, gone: &Registration) {
        if self.by_name.get(&gone.certificate.name) == Some(&gone.channel.registration) {
            self.by_name.remove(&gone.certificate.name);
        }
    }

    /// Its flows stay until used or pushed out: each use checks both ends.
    fn forget(&mut self, id: u64) {
        if let Some(gone) = self.nodes.pop(&id) {
            self.unname(&gone);
        }
    }

    /// When `handle_timeout` is next of use.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.nodes.peek_lru().map(|(_, node)| node.heard + SILENCE_MAX)
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        while let Some((id, node)) = self.nodes.peek_lru() {
            if node.heard + SILENCE_MAX > now {
                break;
            }
            let (id, name) = (*id, node.certificate.name.clone());
            log::info!(target: "relay", "{name} is silent: registration ended");
            self.forget(id);
        }
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
        let Some(node) = self.nodes.get_mut(&header.registration) else {
            return self.say_gone(now, from, header.registration, header.cookie, frame.len(), out, count);
        };
        let Some(message) = node.channel.open(frame) else { return bump(&count.control_rejects) };
        node.heard = now;
        if let Control::Answer { token } = message {
            if let Some((address, _, _)) =
                node.candidate.filter(|(address, expected, _)| *address == from && *expected == token)
            {
                log::info!(target: "relay", "{} moved from {} to {address}", node.certificate.name, node.address);
                node.address = address;
                node.candidate = None;
            }
            return;
        }
        self.challenge(now, header.registration, from, out);
        let Some(node) = self.nodes.get_mut(&header.registration) else { return };
        let reply = match message {
            Control::Ping { nonce } => Some(Control::Pong { nonce, observed: from }),
            Control::Open { request, name } => Some(self.open(request, header.registration, &name, out, count)),
            Control::Who { flow } => Some(self.who(flow, header.registration)),
            Control::Bye => {
                log::info!(target: "relay", "{} left", node.certificate.name);
                self.forget(header.registration);
                None
            }
            Control::Pong { .. }
            | Control::Opened { .. }
            | Control::NotFound { .. }
            | Control::Flow { .. }
            | Control::Challenge { .. }
            | Control::Answer { .. }
            | Control::Gone { .. } => {
                bump(&count.control_rejects);
                None
            }
        };
        if let (Some(reply), Some(node)) = (reply, self.nodes.get_mut(&header.registration)) {
            // To where it came from: that is what a PONG proves, and no longer than the question by much.
            let frame = node.channel.seal(&reply);
            if !out.push(from, frame) {
                bump(&count.relay_drops);
            }
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
    fn challenge(&mut self, now: Instant, id: u64, from: SocketAddr, out: &mut Outbox) {
        let token = self.rng.u64(..);
        let Some(node) = self.nodes.get_mut(&id).filter(|n| n.address != from) else { return };
        let token = match node.candidate {
            Some((_, _, at)) if now < at + CHALLENGE_GAP => return,
            Some((address, token, _)) if address == from => token,
            Some(_) | None => token,
        };
        node.candidate = Some((from, token, now));
        let frame = node.channel.seal(&Control::Challenge { token });
        let _ = out.push(from, frame);
    }

    fn open(&mut self, request: u32, from: u64, name: &str, out: &mut Outbox, count: &TunnelCounters) -> Control {
        let Some(to) = self.by_name.get(name).copied().filter(|to| *to != from) else {
            return Control::NotFound { request };
        };
        let mut pair = [from, to];
        pair.sort_unstable();
        let flow = self.pairs.get(&pair).copied().unwrap_or_else(|| self.new_flow(pair));
        self.flows.promote(&flow);
        let Some(certificate) = self.nodes.peek(&from).map(|n| n.certificate.clone()) else {
            return Control::NotFound { request };
        };
        let Some(far) = self.nodes.peek_mut(&to) else { return Control::NotFound { request } };
        let frame = far.channel.seal(&Control::Flow { flow, certificate });
        if !out.push(far.address, frame) {
            bump(&count.relay_drops);
        }
        Control::Opened { request, flow, certificate: far.certificate.clone() }
    }

    fn new_flow(&mut self, pair: [u64; 2]) -> u32 {
        let flow = loop {
            let flow = self.rng.u32(1..);
            if !self.flows.contains(&flow) {
                break flow;
            }
        };
        self.flows.put(flow, Flow { ends: pair });
        self.pairs.insert(pair, flow);
        while self.flows.len() > FLOWS_MAX.get() {
            let Some((_, gone)) = self.flows.pop_lru() else { break };
            self.pairs.remove(&gone.ends);
        }
        flow
    }

    fn who(&self, flow: u32, asks: u64) -> Control {
        let far = self.flows.peek(&flow).and_then(|f| match f.ends {
            [a, b] if a == asks => Some(b),
            [a, b] if b == asks => Some(a),
            [_, _] => None,
        });
        match far.and_then(|far| self.nodes.peek(&far)) {
            Some(node) => Control::Flow { flow, certificate: node.certificate.clone() },
            None => Control::Gone { flow },
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
        let found = parse_data(frame).and_then(|(flow, tag, datagram)| {
            let ends = self.flows.get(&flow)?.ends;
            // The sender is whose tag it is; its address says which to try first.
            let first = usize::from(self.nodes.peek(&ends[0]).is_none_or(|n| n.address != from));
            let sender = [first, 1 - first]
                .into_iter()
                .find(|i| self.nodes.peek(&ends[*i]).is_some_and(|n| n.channel.tag_in.tag(flow, datagram) == tag))?;
            let (near, far) = (ends[sender], ends[1 - sender]);
            let tag = self.nodes.peek(&far).map(|n| (n.channel.tag_out.tag(flow, datagram), n.address));
            Some((flow, near, tag))
        });
        let Some((flow, near, far)) = found else {
            bump(&count.relay_rejects);
            return None;
        };
        let node = self.nodes.get_mut(&near)?;
        node.heard = now;
        let Some((tag, to)) = far else {
            let frame = node.channel.seal(&Control::Gone { flow });
            let _ = out.push(from, frame);
            if let Some(gone) = self.flows.pop(&flow) {
                self.pairs.remove(&gone.ends);
            }
            return None;
        };
        if node.address != from {
            self.challenge(now, near, from, out);
        }
        retag(frame, tag);
        Some((flow, to))
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
