//! Which relay is the first and which stands by, and what all of them are told of it.

use super::{
    Action, Home, Homes, LISTED_GAP, SPREAD, State,
    choose::{Offer, best, worth},
};
use crate::tunnel::{
    control::{Control, Entry, Rank, RelayAt},
    outbox::Outbox,
};
use std::time::{Duration, Instant};

/// A relay of others is left when it carried nothing for so long.
const FOREIGN_IDLE: Duration = Duration::from_secs(300);
/// For the answers to the PINGs that ask for loads as they are now.
const WEIGH: Duration = Duration::from_millis(500);
/// Certificates in an entry: with more, its frames would not pass everywhere.
const ENTRY_BYTES: usize = 640;

impl Homes {
    pub(in crate::tunnel) fn rank(&self, relay: usize) -> Rank {
        if self.first == Some(relay) {
            Rank::First
        } else if self.standby == Some(relay) {
            Rank::Standby
        } else {
            Rank::Listed
        }
    }

    fn offers(&self) -> Vec<Offer> {
        let offer = |(relay, home): (usize, &Home)| {
            let up = home.up().filter(|_| home.usable() && !home.foreign)?;
            Some(Offer { relay, rtt: up.rtt?, load: up.load, weight: home.weight })
        };
        self.list.iter().enumerate().filter_map(offer).collect()
    }

    /// A silent relay is replaced at once; for a better one we move some time later, not all nodes together.
    pub(super) fn choose(&mut self, now: Instant, out: &mut Outbox, actions: &mut Vec<Action>) {
        self.retire(now, out);
        let offers = self.offers();
        let answers = |relay: &usize| offers.iter().any(|o| o.relay == *relay);
        let before = (self.first, self.standby);
        if !self.first.is_some_and(|first| answers(&first)) {
            // While nobody answers all stays as it is.
            if let Some(next) = self.standby.filter(answers).or_else(|| best(&offers, None)) {
                (self.first, self.standby, self.moving) = (Some(next), self.first, None);
            }
        }
        let Some(first) = self.first else { return };
        if !self.standby.is_some_and(|standby| answers(&standby) && standby != first) {
            let old = self.standby.filter(|standby| *standby != first);
            self.standby = best(&offers, Some(first)).or(old);
        }
        // Another that stands by is no trouble to anybody.
        let others: Vec<Offer> = offers.iter().filter(|o| o.relay != first).copied().collect();
        if self.standby.is_some_and(|standby| matches!(worth(&others, standby), Some((_, true)))) {
            self.standby = best(&offers, Some(first));
        }
        self.rebalance(now, first, &offers, out, actions);
        if (self.first, self.standby) != before {
            self.announce(now, out);
        }
    }

    fn rebalance(&mut self, now: Instant, first: usize, offers: &[Offer], out: &mut Outbox, actions: &mut Vec<Action>) {
        let Some((to, nearer)) = worth(offers, first) else {
            self.moving = None;
            return;
        };
        match self.moving {
            None => {
                let spread = if nearer && now < self.young { LISTED_GAP } else { SPREAD };
                self.moving = Some((now + spread.mul_f64(self.rng.f64()), false));
            }
            Some((at, _)) if now < at => {}
            // Others have moved meanwhile: what the loads were some time ago counts for nothing.
            Some((_, false)) => {
                self.moving = Some((now + WEIGH, true));
                for relay in [first, to] {
                    if let Some(up) = self.list.get_mut(relay).and_then(Home::up_mut) {
                        up.next_ping = now;
                    }
                }
                self.next_look = now + WEIGH;
            }
            Some((_, true)) => {
                let [old, new] = [first, to].map(|relay| self.list[relay].certificate.name.as_str());
                log::info!(target: "tunnel", "relay {new} is the first one now, and no longer {old}");
                (self.first, self.standby, self.moving) = (Some(to), Some(first), None);
                actions.push(Action::Moved { from: first, to });
                self.announce(now, out);
            }
        }
    }

    /// Relays of others that carry nothing any more.
    fn retire(&mut self, now: Instant, out: &mut Outbox) {
        for relay in 0..self.list.len() {
            let Some(home) = self.list.get(relay).filter(|h| h.foreign) else { continue };
            if home.up().is_some_and(|up| up.idle(now) > FOREIGN_IDLE) {
                self.send(relay, &Control::Bye, out);
                self.list[relay].state = State::Off { until: now };
            }
        }
    }

    /// Our entry has changed: all relays of the list are told. What is lost on the way their PONGs show.
    fn announce(&mut self, now: Instant, out: &mut Outbox) {
        self.serial += 1;
        for relay in self.first.into_iter().chain(self.standby) {
            if let Some(up) = self.list.get_mut(relay).and_then(Home::up_mut) {
                up.next_ping = up.next_ping.min(now); // from here on its mapping is kept open
            }
        }
        for relay in 0..self.list.len() {
            self.enter(relay, out);
        }
    }

    pub(super) fn enter(&mut self, relay: usize, out: &mut Outbox) {
        if self.list.get(relay).is_none_or(|h| h.foreign) {
            return;
        }
        let mut room = ENTRY_BYTES;
        let named = self.first.into_iter().chain(self.standby).filter_map(|relay| {
            let home = self.list.get(relay)?;
            room = room.checked_sub(home.certificate.encode().len())?;
            Some(RelayAt { address: home.address?, certificate: home.certificate.clone() })
        });
        let entry = Box::new(Entry { relays: named.collect(), serial: self.serial });
        let message = Control::Enter { rank: self.rank(relay), entry };
        self.send(relay, &message, out);
    }
}
