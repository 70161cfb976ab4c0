//! What relays tell us, of themselves and of each other.

use super::{
    Action, Home, Homes, LOOK, RETRY_FIRST, RelaySpec, State,
    up::{BESIDE, Up},
};
use crate::tunnel::{
    control::{Control, RelayAt, parse_header},
    identity::Certificate,
    outbox::Outbox,
};
use std::time::{Duration, Instant};

/// Relays of others that we register at to reach somebody; when full the longest unused one goes.
const FOREIGN_MAX: usize = 8;

impl Homes {
    /// False where the frame was none that we accept.
    pub(in crate::tunnel) fn handle_control(
        &mut self,
        relay: usize,
        now: Instant,
        frame: &[u8],
        out: &mut Outbox,
        actions: &mut Vec<Action>,
    ) -> bool {
        let (Some(header), Some(home)) = (parse_header(frame), self.list.get_mut(relay)) else { return false };
        let known = |up: &Up| up.channel.registration == header.registration;
        if home.ghost.as_ref().is_some_and(|(ghost, _)| known(ghost)) {
            return self.haunted(relay, now, frame, out, actions);
        }
        let Some(up) = home.up_mut().filter(|up| known(up)) else { return false };
        if header.bare {
            // Whoever forged it must have seen our frames; all that it costs us is a new registration.
            let ours = header.cookie == up.channel.cookie;
            if ours {
                self.restarted(relay, now);
                actions.push(Action::Lost(relay));
                self.choose(now, out, actions);
            }
            return ours;
        }
        let Some(message) = up.channel.open(frame) else { return false };
        up.channel.cookie = header.cookie;
        let silent = up.rtt.is_some() && up.suspect;
        up.heard(now);
        self.told(relay, now, message, silent, out, actions)
    }

    /// A relay has forgotten us: it is registered at again at once, or when it asked us to.
    fn restarted(&mut self, relay: usize, now: Instant) {
        let away = self.list.get(relay).and_then(|h| h.away);
        if let Some(home) = self.list.get_mut(relay) {
            home.away = away.or(Some(now));
            home.backoff.reset();
        }
        self.fail(relay, now, "it was restarted");
        if let Some(home) = self.list.get_mut(relay) {
            home.ghost = None;
        }
    }

    /// A registration that we held for ended has been answered.
    fn haunted(
        &mut self,
        relay: usize,
        now: Instant,
        frame: &[u8],
        out: &mut Outbox,
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some((header, home)) = parse_header(frame).zip(self.list.get_mut(relay)) else { return false };
        let Some((ghost, at)) = &mut home.ghost else { return false };
        if header.bare {
            let ours = header.cookie == ghost.channel.cookie;
            if ours && !matches!(home.state, State::Up(_)) {
                actions.push(Action::Hangup(relay));
                home.address = Some(*at);
                self.restarted(relay, now);
            }
            return ours;
        }
        let Some(message) = ghost.channel.open(frame) else { return false };
        if let Some((mut up, at)) = home.ghost.take_if(|_| !matches!(home.state, State::Up(_))) {
            up.heard(now);
            home.address = Some(at);
            home.state = State::Up(up);
            home.note.clear();
            home.backoff.reset();
            log::info!(target: "tunnel", "relay {} answers again", home.certificate.name);
            actions.extend([Action::Hangup(relay), Action::Registered(relay)]);
            self.told(relay, now, message, true, out, actions);
            self.choose(now, out, actions);
        }
        true
    }

    /// `silent`: until now it did not answer.
    #[allow(clippy::too_many_arguments)]
    fn told(
        &mut self,
        relay: usize,
        now: Instant,
        message: Control,
        silent: bool,
        out: &mut Outbox,
        actions: &mut Vec<Action>,
    ) -> bool {
        let chosen = self.is_chosen(relay);
        let Some(home) = self.list.get_mut(relay) else { return false };
        match message {
            Control::Pong { nonce: BESIDE, observed, .. } => actions.push(Action::Tried(observed)),
            Control::Pong { nonce, observed, serial, load } => {
                let Some(up) = home.up_mut() else { return false };
                if up.pulse().0 || silent {
                    actions.push(Action::Back(relay));
                }
                if up.pong(now, nonce, observed, load, chosen) {
                    let name = &home.certificate.name;
                    log::info!(target: "tunnel", "registered at relay {name}, which sees us as {observed}");
                    home.backoff.reset();
                    home.note.clear();
                    actions.push(Action::Registered(relay));
                    self.choose(now, out, actions);
                }
                if serial != self.serial {
                    self.enter(relay, out);
                }
            }
            Control::Challenge { token } => self.send(relay, &Control::Answer { token }, out),
            Control::Opened { request, flow, certificate } => {
                actions.push(Action::Opened { relay, request, flow, certificate });
            }
            Control::NotFound { request } => actions.push(Action::NotFound { relay, request }),
            Control::Elsewhere { request, certificate, entry } => {
                actions.push(Action::Elsewhere { request, certificate, relays: entry.relays });
            }
            Control::Flow { flow, certificate } => actions.push(Action::Flow { relay, flow, certificate }),
            Control::Gone { flow } => actions.push(Action::Gone { relay, flow }),
            Control::Restarting { spread } => {
                let spread = Duration::from_millis(spread.into()).min(super::SPREAD);
                log::info!(target: "tunnel", "relay {} is about to be restarted", home.certificate.name);
                home.away = Some(now + spread.mul_f64(self.rng.f64()));
                actions.push(Action::Suspect(relay));
                self.choose(now, out, actions);
            }
            Control::Known { certificate } => actions.push(Action::Known(certificate)),
            Control::Ping { .. }
            | Control::Open { .. }
            | Control::Who { .. }
            | Control::Answer { .. }
            | Control::Enter { .. }
            | Control::Which { .. }
            | Control::Bye => return false,
        }
        true
    }

    /// Another node is found at this relay, whether it is of our list or not; it is registered at if need be.
    pub(in crate::tunnel) fn visit(&mut self, now: Instant, at: &RelayAt, actions: &mut Vec<Action>) -> Option<usize> {
        if let Some(relay) = self.list.iter().position(|h| h.certificate.name == at.certificate.name) {
            let home = &mut self.list[relay];
            if matches!(home.state, State::Off { until } if until <= now) {
                home.certificate = at.certificate.clone();
                (home.address, home.state) = (Some(at.address), State::Down { retry: now });
            } else if let State::Down { retry } = &mut home.state {
                // Nobody waits for its turn whom a stream waits for.
                self.next_listed = now;
                *retry = (*retry).min(now + RETRY_FIRST);
            }
            return Some(relay);
        }
        let spec = RelaySpec {
            certificate: at.certificate.clone(),
            host: at.address.ip().to_string(),
            port: at.address.port(),
        };
        let home = Home::new(spec, true, State::Down { retry: now }, &self.key);
        if self.list.iter().filter(|h| h.foreign).count() < FOREIGN_MAX {
            self.list.push(home);
            return Some(self.list.len() - 1);
        }
        let foreign = self.list.iter().enumerate().filter(|(_, h)| h.foreign);
        let idle = |h: &Home| h.up().map_or(Duration::MAX, |up| up.idle(now));
        let (relay, _) = foreign.max_by_key(|(_, h)| idle(h)).filter(|(_, h)| idle(h) > LOOK)?;
        actions.extend([Action::Hangup(relay), Action::Lost(relay)]);
        self.list[relay] = home;
        Some(relay)
    }

    /// A newer certificate of a relay of our list, which the caller has checked; true where it was one.
    pub(in crate::tunnel) fn renew(&mut self, now: Instant, certificate: &Certificate) -> Option<usize> {
        let relay = self.list.iter().position(|h| h.certificate.name == certificate.name)?;
        let home = &mut self.list[relay];
        let newer = certificate.key != home.certificate.key && certificate.not_after >= home.certificate.not_after;
        if !newer || home.up().is_some_and(Up::usable) {
            return None;
        }
        log::info!(target: "tunnel", "relay {} has another key now, with a certificate", certificate.name);
        home.certificate = certificate.clone();
        (home.ghost, home.state) = (None, State::Down { retry: now });
        home.backoff.reset();
        Some(relay)
    }
}
