//! Our side of the relays: where we are registered, whether they still answer, what they tell us.
//!
//! We register at every relay of the list, so that each holds our entry and any can carry data at once. Two are
//! more than that: the first, which is the nearest, and one that stands by.

mod carried;
mod choose;
mod heard;
mod rank;
mod up;

use super::{
    control::{Control, Rank, RelayAt},
    frame::parse_data,
    identity::{Certificate, PublicKey},
    keys::Key,
    outbox::Outbox,
    path::{Path, Way},
};
use crate::backoff::Backoff;
use choose::weight;
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};
use up::{Turn, Up};

/// Relays at which a node registers for data at a time: a relay's death then costs a resend, not a handshake.
const HOMES: usize = 2;
/// Between tries at a relay that does not answer.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Between handshakes with relays that are to hold no more than our entry.
const LISTED_GAP: Duration = Duration::from_secs(1);
/// Between two looks at what is the best relay now.
const LOOK: Duration = Duration::from_secs(2);
/// A relay that has come back is moved to at some time within this, and not by all nodes at once.
const SPREAD: Duration = Duration::from_secs(30);
/// Between questions for the certificate of a relay that does not answer.
const INQUIRE: Duration = Duration::from_secs(5);
/// After the start: until the round trips of all relays are known.
const YOUNG: Duration = Duration::from_secs(15);
/// With nobody else to carry data a restarted relay is come back to within this.
const HURRY: Duration = Duration::from_secs(1);

enum State {
    Down {
        retry: Instant,
    },
    /// Of a relay of others: not needed, or not worth another try before then.
    Off {
        until: Instant,
    },
    Resolving,
    Dialing,
    Up(Box<Up>),
}

/// One relay.
pub(super) struct Home {
    pub(super) certificate: Certificate,
    /// `host:port` as the user wrote it.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) address: Option<SocketAddr>,
    pub(super) note: String,
    /// Its datagrams go by TCP.
    pub(super) by_tcp: bool,
    state: State,
    /// The last registration, which fell silent, and where that was.
    ghost: Option<(Box<Up>, SocketAddr)>,
    /// Not of our list: learnt from the entry of a node.
    foreign: bool,
    /// It said that it would be restarted: not before then.
    away: Option<Instant>,
    /// When the others were asked for its certificate.
    inquired: Option<Instant>,
    backoff: Backoff,
    weight: u64,
}

/// What the node has to do for a relay.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Resolve(usize),
    Dial(usize),
    /// A handshake under way is of no use.
    Hangup(usize),
    /// The first PONG: the registration holds.
    Registered(usize),
    /// A relay answered a PING beside the others: where it sees us.
    Tried(SocketAddr),
    /// It is silent, or about to leave: data takes other ways where there are any.
    Suspect(usize),
    /// It answers again, maybe to another address of ours.
    Back(usize),
    /// No registration any more: paths through it are dead.
    Lost(usize),
    /// The first relay is another one now.
    Moved {
        from: usize,
        to: usize,
    },
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
    Elsewhere {
        request: u32,
        certificate: Box<Certificate>,
        relays: Vec<RelayAt>,
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
    /// Of a relay that we cannot reach, maybe a newer one.
    Known(Box<Certificate>),
}

/// All relays: those of the list, in its order, and those of others behind them.
pub(super) struct Homes {
    list: Vec<Home>,
    first: Option<usize>,
    standby: Option<usize>,
    /// Of our entry; 0 before the first.
    serial: u64,
    /// When to move to a better first relay, and whether the loads were asked for.
    moving: Option<(Instant, bool)>,
    next_look: Instant,
    next_listed: Instant,
    /// Until then we are new here, and better relays are still being found.
    young: Instant,
    key: PublicKey,
    rng: fastrand::Rng,
}

/// A relay's name, where it is, and its certificate.
#[derive(Clone, Debug)]
pub struct RelaySpec {
    pub certificate: Certificate,
    pub host: String,
    pub port: u16,
}

/// What is shown of a relay.
pub(super) struct Shown {
    pub(super) registered: bool,
    pub(super) rtt: Option<Duration>,
    /// Where it sees us, as far as that is of now.
    pub(super) observed: Option<SocketAddr>,
    pub(super) rank: Rank,
}

impl Home {
    fn new(spec: RelaySpec, foreign: bool, state: State, key: &PublicKey) -> Self {
        Self {
            address: spec.host.parse().ok().map(|ip| SocketAddr::new(ip, spec.port)),
            weight: weight(key, &spec.certificate.name),
            certificate: spec.certificate,
            host: spec.host,
            port: spec.port,
            note: String::new(),
            by_tcp: false,
            state,
            ghost: None,
            foreign,
            away: None,
            inquired: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_MOST),
        }
    }

    fn up(&self) -> Option<&Up> {
        match &self.state {
            State::Up(up) => Some(up),
            State::Down { .. } | State::Off { .. } | State::Resolving | State::Dialing => None,
        }
    }

    fn up_mut(&mut self) -> Option<&mut Up> {
        match &mut self.state {
            State::Up(up) => Some(up),
            State::Down { .. } | State::Off { .. } | State::Resolving | State::Dialing => None,
        }
    }

    fn usable(&self) -> bool {
        self.away.is_none() && self.up().is_some_and(Up::usable)
    }
}

impl Homes {
    /// `serial`: greater than that of any entry before, such as the time.
    pub(super) fn new(
        relays: Vec<RelaySpec>,
        key: PublicKey,
        serial: u64,
        now: Instant,
        mut rng: fastrand::Rng,
    ) -> Self {
        let list = relays.into_iter().map(|spec| Home::new(spec, false, State::Down { retry: now }, &key)).collect();
        let next_listed = now + LISTED_GAP.mul_f64(1.0 + rng.f64());
        let young = now + YOUNG;
        Self { list, first: None, standby: None, serial, moving: None, next_look: now, next_listed, young, key, rng }
    }

    pub(super) fn get(&self, relay: usize) -> Option<&Home> {
        self.list.get(relay)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Registered and answering.
    pub(super) fn usable(&self) -> impl Iterator<Item = usize> + '_ {
        self.list.iter().enumerate().filter(|(_, h)| h.usable()).map(|(i, _)| i)
    }

    pub(super) fn is_usable(&self, relay: usize) -> bool {
        self.list.get(relay).is_some_and(Home::usable)
    }

    /// The relays for data that answer, the first one first.
    pub(super) fn chosen(&self) -> impl Iterator<Item = usize> + '_ {
        self.first.into_iter().chain(self.standby).filter(|relay| self.is_usable(*relay))
    }

    fn is_chosen(&self, relay: usize) -> bool {
        self.first == Some(relay) || self.standby == Some(relay)
    }

    /// The relay of this path answers.
    pub(super) fn carries(&self, path: Path) -> bool {
        matches!(path, Path::Relay { relay, .. } if self.is_usable(relay))
    }

    /// This very certificate is a relay's that we know.
    pub(super) fn with(&self, certificate: &Certificate) -> bool {
        self.list.iter().any(|h| h.certificate == *certificate)
    }

    /// The relay that sends from this address.
    pub(super) fn at(&self, address: SocketAddr) -> Option<usize> {
        let there = |h: &Home| h.address == Some(address) || h.ghost.as_ref().is_some_and(|(_, at)| *at == address);
        self.list.iter().position(there)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let hurry = self.settled() < HOMES;
        let due = |home: &Home| match &home.state {
            State::Down { retry } if hurry || home.foreign => Some(*retry),
            State::Down { retry } => Some((*retry).max(self.next_listed)),
            State::Off { .. } | State::Resolving | State::Dialing => None,
            State::Up(up) => Some(up.next_ping),
        };
        let ghosts = self.list.iter().filter_map(|h| Some(h.ghost.as_ref()?.0.next_ping));
        let look = self.list.iter().any(|h| h.up().is_some()).then_some(self.next_look);
        self.list.iter().filter_map(due).chain(ghosts).chain(look).min()
    }

    /// Relays of the list that are up, or on the way.
    fn settled(&self) -> usize {
        self.list.iter().filter(|h| !h.foreign && !matches!(h.state, State::Down { .. })).count()
    }

    /// Dials what is due, pings what is up, and looks which relay is the best.
    pub(super) fn handle_timeout(&mut self, now: Instant, out: &mut Outbox, actions: &mut Vec<Action>) {
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        order.sort_by_key(|relay| self.list[*relay].weight);
        for relay in order {
            self.drive(relay, now, out, actions);
        }
        if now >= self.next_look {
            self.next_look = now + LOOK;
            self.choose(now, out, actions);
            self.inquire(now, out);
        }
    }

    fn drive(&mut self, relay: usize, now: Instant, out: &mut Outbox, actions: &mut Vec<Action>) {
        let hurry = self.settled() < HOMES;
        let Some(home) = self.list.get_mut(relay) else { return };
        if let Some((ghost, at)) = home.ghost.as_mut().filter(|(ghost, _)| ghost.next_ping <= now) {
            let _ = out.push(*at, ghost.ghost_turn(now, &mut self.rng));
        }
        match &mut home.state {
            State::Down { retry } if *retry <= now && (hurry || home.foreign || self.next_listed <= now) => {
                if !hurry && !home.foreign {
                    self.next_listed = now + LISTED_GAP.mul_f64(0.5 + self.rng.f64());
                }
                (home.state, _) = if home.address.is_some() {
                    (State::Dialing, actions.push(Action::Dial(relay)))
                } else {
                    (State::Resolving, actions.push(Action::Resolve(relay)))
                };
            }
            State::Up(up) if up.next_ping <= now => match up.turn(now, &mut self.rng) {
                Turn::Ping(frame) => drop(home.address.map(|to| out.push(to, frame))),
                Turn::Suspect(frame) => {
                    let _ = home.address.map(|to| out.push(to, frame));
                    actions.push(Action::Suspect(relay));
                    self.choose(now, out, actions);
                }
                Turn::Dead => {
                    self.fail(relay, now, "it stopped answering");
                    actions.push(Action::Lost(relay));
                    self.choose(now, out, actions);
                }
            },
            State::Down { .. } | State::Off { .. } | State::Resolving | State::Dialing | State::Up(_) => {}
        }
    }

    /// The relay has no registration of ours now; it is tried again later.
    fn fail(&mut self, relay: usize, now: Instant, why: &str) {
        let others = self.usable().any(|other| other != relay);
        let Some(home) = self.list.get_mut(relay) else { return };
        let mut delay = home.backoff.delay(&mut self.rng);
        if let Some(away) = home.away.take() {
            let most = if others { SPREAD } else { HURRY };
            delay = away.saturating_duration_since(now).min(most);
        }
        let name = &home.certificate.name;
        if home.note != why {
            log::warn!(target: "tunnel", "relay {name} at {}:{}: {why}; next try in {delay:.1?}", home.host, home.port);
        }
        home.note = why.into();
        let next = if home.foreign { State::Off { until: now + delay } } else { State::Down { retry: now + delay } };
        if let (State::Up(up), Some(at)) = (std::mem::replace(&mut home.state, next), home.address) {
            // What never answered has nothing to come back to.
            home.ghost = up.rtt.is_some().then_some((up, at));
        }
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
        home.ghost = None;
        home.away = None;
        home.state = State::Up(Box::new(Up::new(secret, now)));
    }

    pub(super) fn dial_failed(&mut self, relay: usize, now: Instant, why: &str) {
        if matches!(self.list.get(relay), Some(Home { state: State::Dialing, .. })) {
            self.fail(relay, now, why);
        }
    }

    /// The relays for data are asked for a flow to this node; where none of them answers, whichever may.
    pub(super) fn ask(&mut self, request: u32, name: &str, out: &mut Outbox) {
        let mut asked: Vec<usize> = self.chosen().collect();
        if asked.is_empty() {
            asked.extend(0..self.list.len());
        }
        asked.into_iter().for_each(|relay| self.ask_at(relay, request, name, out));
    }

    /// All relays of the list are asked.
    pub(super) fn ask_all(&mut self, request: u32, name: &str, out: &mut Outbox) {
        (0..self.list.len()).for_each(|relay| self.ask_at(relay, request, name, out));
    }

    pub(super) fn ask_at(&mut self, relay: usize, request: u32, name: &str, out: &mut Outbox) {
        self.send(relay, &Control::Open { request, name: name.into() }, out);
    }

    /// The certificates of those that do not answer may be of before a change of their keys: others may know.
    fn inquire(&mut self, now: Instant, out: &mut Outbox) {
        let lost = |h: &&mut Home| !h.foreign && h.up().is_none() && !h.note.is_empty();
        let mut names = Vec::new();
        for home in self.list.iter_mut().filter(lost) {
            if home.inquired.is_none_or(|at| now >= at + INQUIRE) {
                home.inquired = Some(now);
                names.push(home.certificate.name.clone());
            }
        }
        let told: Vec<usize> = self.usable().collect();
        for (name, relay) in names.into_iter().flat_map(|name| told.iter().map(move |relay| (name.clone(), *relay))) {
            self.send(relay, &Control::Which { name }, out);
        }
    }

    pub(super) fn who(&mut self, relay: usize, flow: u32, out: &mut Outbox) {
        self.send(relay, &Control::Who { flow }, out);
    }

    pub(super) fn first_address(&self) -> Option<SocketAddr> {
        self.list.iter().find_map(|home| home.address)
    }

    fn all_up(&mut self) -> impl Iterator<Item = (&mut Up, Option<SocketAddr>)> {
        self.list.iter_mut().filter_map(|home| {
            let address = home.address;
            home.up_mut().map(|up| (up, address))
        })
    }

    /// We may have moved: each relay is to see it at once.
    pub(super) fn relocated(&mut self, now: Instant) {
        self.all_up().for_each(|(up, _)| up.relocated(now));
    }

    /// (whether one does not answer, when one answered last); none: nobody has ever.
    pub(super) fn pulse(&mut self) -> (bool, Option<Instant>) {
        let up = self.all_up().map(|(up, _)| up.pulse());
        up.fold((false, None), |(late, last), (is_late, heard)| (late || is_late, last.max(heard)))
    }

    /// A peer is silent: is it the peer, or our link?
    pub(super) fn doubt(&mut self, now: Instant) {
        for relay in [self.first, self.standby].into_iter().flatten() {
            if let Some(up) = self.list.get_mut(relay).and_then(Home::up_mut) {
                up.doubt(now);
            }
        }
    }

    /// Those that have answered until now are asked whether they still do.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.all_up().for_each(|(up, _)| up.hurry(now));
    }

    /// A PING beside the others, from that address of ours.
    pub(super) fn try_by(&mut self, local: IpAddr, out: &mut Outbox) {
        for (up, address) in self.all_up() {
            if let Some(remote) = address {
                let _ = out.push(Way { remote, local: Some(local) }, up.ping_beside());
            }
        }
    }

    /// Where a relay saw us last.
    pub(super) fn observed(&self, relay: usize) -> Option<SocketAddr> {
        self.list.get(relay)?.up()?.observed
    }

    /// Leaves all relays.
    pub(super) fn bye(&mut self, out: &mut Outbox) {
        (0..self.list.len()).for_each(|relay| self.send(relay, &Control::Bye, out));
    }

    fn send(&mut self, relay: usize, message: &Control, out: &mut Outbox) {
        let Some(home) = self.list.get_mut(relay) else { return };
        if let (Some(address), State::Up(up)) = (home.address, &mut home.state) {
            let frame = up.channel.seal(message);
            let _ = out.push(address, frame);
        }
    }

    /// Wraps a datagram for a flow; false where the relay is not up.
    pub(super) fn wrap(&mut self, relay: usize, now: Instant, flow: u32, datagram: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(up) = self.list.get_mut(relay).and_then(Home::up_mut) else { return false };
        up.used(now);
        up.channel.tag_out.frame(flow, datagram, out);
        true
    }

    /// The flow and datagram of a data frame from this relay; None where its tag is wrong.
    pub(super) fn unwrap<'f>(&mut self, relay: usize, now: Instant, frame: &'f [u8]) -> Option<(u32, &'f [u8])> {
        let up = self.list.get_mut(relay).and_then(Home::up_mut)?;
        let (flow, tag, datagram) = parse_data(frame)?;
        (up.channel.tag_in.tag(flow, datagram) == tag).then_some(())?;
        up.heard(now);
        up.used(now);
        Some((flow, datagram))
    }

    pub(super) fn shown(&self, relay: usize) -> Option<Shown> {
        let home = self.list.get(relay).filter(|h| !matches!(h.state, State::Off { .. }))?;
        let (up, rank) = (home.up(), self.rank(relay));
        Some(Shown {
            registered: up.is_some_and(|up| up.rtt.is_some()),
            rtt: up.and_then(|up| up.rtt),
            // A mapping of a NAT's that nothing keeps open is soon another.
            observed: up.filter(|up| up.kept).and_then(|up| up.observed),
            rank,
        })
    }
}
