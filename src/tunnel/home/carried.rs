//! Relays as those see them who carry datagrams by TCP where UDP is dead.

use super::{Homes, State};
use crate::tunnel::{control::Control, identity::PublicKey, node::Node, slot::Role};
use std::{net::SocketAddr, time::Instant};

/// A relay, and whether it answers.
#[derive(Clone, Debug)]
pub(crate) struct RelaySeen {
    pub(crate) name: String,
    pub(crate) key: PublicKey,
    pub(crate) host: String,
    /// None: its name is being looked up.
    pub(crate) address: Option<SocketAddr>,
    /// It is wanted and does not answer.
    pub(crate) missing: bool,
    /// It has answered before.
    pub(crate) answered: bool,
    /// Its last PONG came by UDP.
    pub(crate) by_udp: bool,
}

impl Homes {
    fn missing(&self, relay: usize) -> bool {
        match self.list.get(relay).map(|h| &h.state) {
            Some(State::Up(up)) => !up.usable() || up.pulse().0,
            Some(State::Resolving | State::Dialing | State::Down { .. }) => true,
            // Of others, and of no use now.
            Some(State::Off { .. }) | None => false,
        }
    }

    /// It is asked, or dialled, at once.
    fn ask_now(&mut self, relay: usize, now: Instant) {
        let Some(home) = self.list.get_mut(relay) else { return };
        match &mut home.state {
            State::Up(up) => up.next_ping = now,
            State::Down { retry } => {
                *retry = now;
                home.backoff.reset();
            }
            State::Off { .. } | State::Resolving | State::Dialing => {}
        }
        if let Some((ghost, _)) = &mut home.ghost {
            ghost.next_ping = now;
        }
    }
}

impl Node {
    /// Streams are open, or wait for their peers.
    pub(crate) fn is_live(&self) -> bool {
        self.slots.iter().any(|(_, s)| !s.streams.is_empty()) || self.peers.iter().any(|p| !p.waiting.is_empty())
    }

    /// None behind the last relay.
    pub(crate) fn relay_at(&self, relay: usize) -> Option<RelaySeen> {
        let home = self.homes.get(relay)?;
        Some(RelaySeen {
            name: home.certificate.name.clone(),
            key: home.certificate.key,
            host: home.host.clone(),
            address: home.address,
            missing: self.homes.missing(relay),
            answered: home.ghost.is_some() || home.up().is_some_and(|up| up.rtt.is_some()),
            by_udp: home.up().is_some_and(|up| up.observed.is_some()),
        })
    }

    /// A PING for a relay where we are registered, beside all others. The relay answers to where it comes from.
    pub(crate) fn probe_relay(&mut self, relay: usize) -> Option<Vec<u8>> {
        let nonce = self.rng.u32(..);
        Some(self.homes.list.get_mut(relay)?.up_mut()?.channel.seal(&Control::Ping { nonce }))
    }

    /// Datagrams to this relay go another way from now on.
    pub(crate) fn relay_way(&mut self, now: Instant, relay: usize, by_tcp: bool) {
        if let Some(home) = self.homes.list.get_mut(relay) {
            home.by_tcp = by_tcp;
        }
        // A handshake under way would wait for its next timer.
        let dialing = self.slots.iter().find(|(_, s)| s.role == Role::Registering(relay) && !s.lost).map(|(i, _)| i);
        if let Some(index) = dialing.filter(|_| self.homes.missing(relay)) {
            self.homes.dial_failed(relay, now, "it is asked another way");
            self.close(now, index, "another way");
        }
        for other in 0..self.homes.len() {
            // What one relay has shown is soon known of all.
            if other == relay || self.homes.is_usable(other) {
                self.homes.ask_now(other, now);
            }
        }
        self.due = Some(now);
        self.handle_tick(now);
    }
}
