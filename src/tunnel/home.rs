//! Our side of the relays: where we are registered, whether they still answer, what they tell us.

mod carried;

use super::{
    control::{Channel, Control, parse_header},
    frame::parse_data,
    identity::Certificate,
    keys::Key,
    outbox::Outbox,
};
use crate::{backoff::Backoff, carrier::address::is_client};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Relays at which a node registers for data at a time: a relay's death then costs a resend, not a handshake.
const HOMES: usize = 2;
/// Below the 30 s for which many home NATs keep an idle UDP mapping, despite RFC 4787 REQ-5's two minutes.
const PING_IDLE: Duration = Duration::from_secs(25);
/// While a path through the relay is in use.
const PING_BUSY: Duration = Duration::from_secs(1);
/// How long after its last datagram a path counts as in use.
const BUSY: Duration = Duration::from_secs(10);
/// After a PING without a PONG.
const PING_AGAIN: Duration = Duration::from_secs(1);
/// Unanswered PINGs that end a registration: with `PING_AGAIN` three seconds.
const PINGS_LOST: u32 = 3;
/// Right after the handshake, before the first PONG: the relay may not have seen our Finished yet.
const FIRST_PINGS: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// Between tries at a relay that does not answer.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(30);

struct Up {
    channel: Channel,
    since: Instant,
    observed: Option<SocketAddr>,
    used: Option<Instant>,
    next_ping: Instant,
    /// Sent and not yet answered, the last first: (nonce, when).
    last_ping: Option<(u32, Instant)>,
    unanswered: u32,
    rtt: Option<Duration>,
}

enum State {
    Down { retry: Instant },
    Resolving,
    Dialing,
    Up(Box<Up>),
}

/// One relay of our list.
pub(super) struct Home {
    pub(super) certificate: Certificate,
    /// `host:port` as the user wrote it.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) address: Option<SocketAddr>,
    state: State,
    backoff: Backoff,
    pub(super) note: String,
    /// Its datagrams go by TCP.
    pub(super) by_tcp: bool,
}

/// What the node has to do for a relay.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Resolve(usize),
    Dial(usize),
    /// The first PONG: the registration holds.
    Registered(usize),
    /// No registration any more: paths through it are dead.
    Lost(usize),
    Opened {
        relay: usize,
        request: u32,
        flow: u32,
        certificate: Box<Certificate>,
    },
    NotFound {
        relay: usize,
        request: u32,
    },
    Flow {
        relay: usize,
        flow: u32,
        certificate: Box<Certificate>,
    },
    Gone {
        relay: usize,
        flow: u32,
    },
}

/// All relays of the list, in the order of preference.
pub(super) struct Homes {
    list: Vec<Home>,
    rng: fastrand::Rng,
}

/// A relay's name, where it is, and its certificate.
#[derive(Clone, Debug)]
pub struct RelaySpec {
    pub certificate: Certificate,
    pub host: String,
    pub port: u16,
}

impl Homes {
    pub(super) fn new(relays: Vec<RelaySpec>, now: Instant, rng: fastrand::Rng) -> Self {
        let home = |spec: RelaySpec| Home {
            address: spec.host.parse().ok().map(|ip| SocketAddr::new(ip, spec.port)),
            certificate: spec.certificate,
            host: spec.host,
            port: spec.port,
            state: State::Down { retry: now },
            backoff: Backoff::new(RETRY_FIRST, RETRY_MOST),
            note: String::new(),
            by_tcp: false,
        };
        Self { list: relays.into_iter().map(home).collect(), rng }
    }

    pub(super) fn get(&self, relay: usize) -> Option<&Home> {
        self.list.get(relay)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    fn up(&mut self, relay: usize) -> Option<&mut Up> {
        match &mut self.list.get_mut(relay)?.state {
            State::Up(up) => Some(up),
            State::Down { .. } | State::Resolving | State::Dialing => None,
        }
    }

    /// Registered and answered at least once.
    pub(super) fn usable(&self) -> impl Iterator<Item = usize> + '_ {
        self.list
            .iter()
            .enumerate()
            .filter(|(_, h)| matches!(&h.state, State::Up(up) if up.rtt.is_some()))
            .map(|(i, _)| i)
    }

    /// The relay that sends from this address.
    pub(super) fn at(&self, address: SocketAddr) -> Option<usize> {
        self.list.iter().position(|h| h.address == Some(address))
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let wanted = self.wanted() > 0;
        let due = |home: &Home| match &home.state {
            State::Down { retry } => wanted.then_some(*retry),
            State::Resolving | State::Dialing => None,
            State::Up(up) => Some(up.next_ping),
        };
        self.list.iter().filter_map(due).min()
    }

    fn wanted(&self) -> usize {
        HOMES.saturating_sub(self.list.iter().filter(|h| !matches!(h.state, State::Down { .. })).count())
    }

    /// Dials what is due and pings what is up.
    pub(super) fn handle_timeout(&mut self, now: Instant, out: &mut Outbox, actions: &mut Vec<Action>) {
        let mut wanted = self.wanted();
        for (relay, home) in self.list.iter_mut().enumerate() {
            match &mut home.state {
                State::Down { retry } if *retry <= now && wanted > 0 => {
                    wanted -= 1;
                    (home.state, _) = if home.address.is_some() {
                        (State::Dialing, actions.push(Action::Dial(relay)))
                    } else {
                        (State::Resolving, actions.push(Action::Resolve(relay)))
                    };
                }
                State::Up(up) if up.next_ping <= now => {
                    let fresh = up.rtt.is_none();
                    let lost =
                        if fresh { up.unanswered as usize >= FIRST_PINGS.len() } else { up.unanswered >= PINGS_LOST };
                    if lost {
                        self.fail(relay, now, "it stopped answering");
                        actions.push(Action::Lost(relay));
                        return self.handle_timeout(now, out, actions);
                    }
                    let nonce = self.rng.u32(..);
                    let busy = up.used.is_some_and(|used| now < used + BUSY);
                    up.unanswered += 1;
                    up.next_ping = now
                        + match FIRST_PINGS.get(up.unanswered as usize).filter(|_| fresh) {
                            Some(gap) => *gap,
                            None if fresh || up.unanswered > 1 || !busy => PING_AGAIN,
                            None => PING_BUSY,
                        };
                    up.last_ping = Some((nonce, now));
                    let frame = up.channel.seal(&Control::Ping { nonce });
                    if let Some(address) = home.address {
                        let _ = out.push(address, frame);
                    }
                }
                State::Down { .. } | State::Resolving | State::Dialing | State::Up(_) => {}
            }
        }
    }

    fn fail(&mut self, relay: usize, now: Instant, why: &str) {
        let Some(home) = self.list.get_mut(relay) else { return };
        let delay = home.backoff.delay(&mut self.rng);
        let name = &home.certificate.name;
        if home.note != why {
            log::warn!(target: "tunnel", "relay {name} at {}:{}: {why}; next try in {delay:.1?}", home.host, home.port);
        }
        home.note = why.into();
        home.state = State::Down { retry: now + delay };
        if home.host.parse::<std::net::IpAddr>().is_err() {
            home.address = None; // its name may stand for another address by now
        }
    }

    pub(super) fn resolved(&mut self, relay: usize, now: Instant, address: Result<SocketAddr, String>) {
        match address {
            Ok(address) => {
                if let Some(home) = self.list.get_mut(relay).filter(|h| matches!(h.state, State::Resolving)) {
                    home.address = Some(address);
                    home.state = State::Down { retry: now };
                }
            }
            Err(why) => self.fail(relay, now, &why),
        }
    }

    /// The handshake for registration was confirmed from our side.
    pub(super) fn established(&mut self, relay: usize, now: Instant, secret: &Key) {
        let Some(home) = self.list.get_mut(relay) else { return };
        home.state = State::Up(Box::new(Up {
            channel: Channel::new(secret, false, 0),
            since: now,
            observed: None,
            used: None,
            next_ping: now,
            last_ping: None,
            unanswered: 0,
            rtt: None,
        }));
    }

    pub(super) fn dial_failed(&mut self, relay: usize, now: Instant, why: &str) {
        if matches!(self.list.get(relay), Some(Home { state: State::Dialing, .. })) {
            self.fail(relay, now, why);
        }
    }

    /// All registrations are asked for a flow to this node.
    pub(super) fn ask(&mut self, request: u32, name: &str, out: &mut Outbox) {
        for home in &mut self.list {
            if let (State::Up(up), Some(address)) = (&mut home.state, home.address) {
                let frame = up.channel.seal(&Control::Open { request, name: name.into() });
                let _ = out.push(address, frame);
            }
        }
    }

    pub(super) fn who(&mut self, relay: usize, flow: u32, out: &mut Outbox) {
        self.send(relay, &Control::Who { flow }, out);
    }

    /// Leaves all relays.
    pub(super) fn bye(&mut self, out: &mut Outbox) {
        (0..self.list.len()).for_each(|relay| self.send(relay, &Control::Bye, out));
    }

    fn send(&mut self, relay: usize, message: &Control, out: &mut Outbox) {
        let Some(address) = self.list.get(relay).and_then(|h| h.address) else { return };
        if let Some(up) = self.up(relay) {
            let frame = up.channel.seal(message);
            let _ = out.push(address, frame);
        }
    }

    /// Wraps a datagram for a flow; false where the relay is not up.
    pub(super) fn wrap(&mut self, relay: usize, now: Instant, flow: u32, datagram: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(up) = self.up(relay) else { return false };
        up.used(now);
        up.channel.tag_out.frame(flow, datagram, out);
        true
    }

    /// The flow and datagram of a data frame from this relay; None where its tag is wrong.
    pub(super) fn unwrap<'f>(&mut self, relay: usize, now: Instant, frame: &'f [u8]) -> Option<(u32, &'f [u8])> {
        let up = self.up(relay)?;
        let (flow, tag, datagram) = parse_data(frame)?;
        (up.channel.tag_in.tag(flow, datagram) == tag).then_some(())?;
        up.used(now);
        Some((flow, datagram))
    }

    /// False where the frame was none that we accept.
    pub(super) fn handle_control(
        &mut self,
        relay: usize,
        now: Instant,
        frame: &[u8],
        out: &mut Outbox,
        actions: &mut Vec<Action>,
    ) -> bool {
        let (Some(header), Some(up)) = (parse_header(frame), self.up(relay)) else { return false };
        if header.registration != up.channel.registration {
            return false;
        }
        if header.bare {
            // Whoever forged it must have seen our frames; all that it costs us is a new registration.
            let ours = header.cookie == up.channel.cookie;
            if ours {
                self.fail(relay, now, "it was restarted");
                if let Some(home) = self.list.get_mut(relay) {
                    home.state = State::Down { retry: now };
                    home.backoff.reset();
                }
                actions.push(Action::Lost(relay));
            }
            return ours;
        }
        let Some(message) = up.channel.open(frame) else { return false };
        up.channel.cookie = header.cookie;
        match message {
            Control::Pong { nonce, observed } => {
                if up.pong(now, nonce, observed) {
                    let name = &self.list[relay].certificate.name;
                    log::info!(target: "tunnel", "registered at relay {name}, which sees us as {observed}");
                    self.list[relay].backoff.reset();
                    self.list[relay].note.clear();
                    actions.push(Action::Registered(relay));
                }
            }
            Control::Challenge { token } => self.send(relay, &Control::Answer { token }, out),
            Control::Opened { request, flow, certificate } => {
                actions.push(Action::Opened { relay, request, flow, certificate });
            }
            Control::NotFound { request } => actions.push(Action::NotFound { relay, request }),
            Control::Flow { flow, certificate } => actions.push(Action::Flow { relay, flow, certificate }),
            Control::Gone { flow } => actions.push(Action::Gone { relay, flow }),
            Control::Ping { .. }
            | Control::Open { .. }
            | Control::Who { .. }
            | Control::Answer { .. }
            | Control::Bye => {
                return false;
            }
        }
        true
    }

    /// (registered, RTT, since, the address that it sees us at).
    pub(super) fn view(&self, relay: usize) -> (bool, Option<Duration>, Option<Instant>, Option<SocketAddr>) {
        match self.list.get(relay).map(|h| &h.state) {
            Some(State::Up(up)) => (up.rtt.is_some(), up.rtt, Some(up.since), up.observed.filter(|a| !is_client(*a))),
            Some(State::Down { .. } | State::Resolving | State::Dialing) | None => (false, None, None, None),
        }
    }
}

impl Up {
    fn used(&mut self, now: Instant) {
        if self.used.is_none_or(|used| now >= used + PING_BUSY) {
            // An idle relay is pinged each 25 s: one in use is to be found dead in three.
            if self.unanswered == 0 {
                self.next_ping = self.next_ping.min(now + PING_BUSY);
            }
            self.used = Some(now);
        }
    }

    /// True for the first one.
    fn pong(&mut self, now: Instant, nonce: u32, observed: SocketAddr) -> bool {
        let first = self.rtt.is_none();
        if let Some((_, at)) = self.last_ping.filter(|(n, _)| *n == nonce) {
            let rtt = now.saturating_duration_since(at);
            self.rtt = Some(self.rtt.map_or(rtt, |old| (old * 7 + rtt) / 8));
        } else if first {
            self.rtt = Some(FIRST_PINGS[1]); // the PONG of an earlier PING: at least so old
        }
        self.unanswered = 0;
        let busy = self.used.is_some_and(|used| now < used + BUSY);
        self.next_ping = now + if busy { PING_BUSY } else { PING_IDLE };
        self.observed = Some(observed);
        first
    }
}
