//! By which of its addresses a host with several uplinks sends. While it has one alone the routing table decides.

use super::{lan::Link, node::Node, path::Way};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

/// Uplinks of both families that are used; the least preferred are left out.
const UPLINKS_MAX: usize = 6;
/// Links, and networks that a more special route leads to; of more, only the first count.
const NEAR_MAX: usize = 64;

/// Between a relay's silence and the next uplink's turn: time for the others to answer.
const ASK_WAIT: Duration = Duration::from_millis(300);
/// Between turns while no relay answers at all: as long as a handshake may take.
const TURN: Duration = Duration::from_secs(5);
/// Between questions to the relays by the uplinks whose turn it is not: whether they work, and what is seen there.
const TRY_AGAIN: Duration = Duration::from_secs(20);

/// One address for each interface with a default route and each family, the preferred interface first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Uplinks {
    list: Vec<IpAddr>,
    /// Families that had more than one uplink at a time: there a way names its own from then on, also while it is
    /// the only one. Of [IPv4, IPv6].
    several: [bool; 2],
    /// What no default route leads to.
    near: Vec<Link>,
    /// By which of a family, counted from the preferred, everything leaves that is no peer's.
    turn: usize,
}

impl Uplinks {
    /// True where something changed. `named`: by these alone, whatever the routing table prefers.
    pub(super) fn set(&mut self, mut list: Vec<IpAddr>, mut near: Vec<Link>, named: bool) -> bool {
        list.truncate(UPLINKS_MAX);
        near.truncate(NEAR_MAX);
        let mut several = self.several;
        for (family, flag) in several.iter_mut().enumerate() {
            *flag |= named || list.iter().filter(|a| usize::from(a.is_ipv6()) == family).count() > 1;
        }
        let turn = if self.list == list { self.turn } else { 0 };
        let new = Self { list, several, near, turn };
        let changed = *self != new;
        *self = new;
        changed
    }

    fn by_route(&self, remote: IpAddr) -> bool {
        let scoped = matches!(remote, IpAddr::V6(ip) if ip.is_unicast_link_local());
        !self.several[usize::from(remote.is_ipv6())] || scoped || self.near.iter().any(|n| n.contains(remote))
    }

    fn of(&self, remote: IpAddr) -> impl Iterator<Item = IpAddr> {
        self.list.iter().copied().filter(move |a| a.is_ipv6() == remote.is_ipv6())
    }

    /// All ways that lead to an address.
    pub(super) fn ways(&self, remote: SocketAddr) -> Vec<Way> {
        let all = self.of(remote.ip()).map(|local| Way { remote, local: Some(local) });
        if self.by_route(remote.ip()) { vec![remote.into()] } else { all.collect() }
    }

    /// The way by which something came to `local`.
    pub(super) fn way_of(&self, remote: SocketAddr, local: Option<IpAddr>) -> Way {
        let local = local.filter(|local| !self.by_route(remote.ip()) && self.list.contains(local));
        Way { remote, local }
    }

    /// Whether the uplink is there, for a way that names one.
    pub(super) fn has(&self, way: Way) -> bool {
        way.local.is_none_or(|local| self.list.contains(&local))
    }

    /// How many uplinks are preferred to this way's; lower is better.
    pub(super) fn preference(&self, way: Way) -> usize {
        match way.local {
            Some(local) => self.of(way.remote.ip()).position(|a| a == local).unwrap_or(UPLINKS_MAX),
            None if self.by_route(way.remote.ip()) => 0,
            None => UPLINKS_MAX,
        }
    }

    /// The source of what is no peer's, a relay's above all.
    pub(super) fn source(&self, remote: IpAddr) -> Option<IpAddr> {
        let count = self.of(remote).count();
        if self.by_route(remote) || count == 0 { None } else { self.of(remote).nth(self.turn % count) }
    }

    /// Nobody answers by the uplink whose turn it is; true where there is another one.
    pub(super) fn next(&mut self, remote: IpAddr) -> bool {
        let others = !self.by_route(remote) && self.of(remote).count() > 1;
        if others {
            self.turn = (self.turn + 1) % self.of(remote).count();
        }
        others
    }

    /// Something came from a relay to this address: the uplink works. True where it is preferred to the present one.
    pub(super) fn works(&mut self, way: Way) -> bool {
        let at = self.preference(way);
        let better = way.local.is_some() && at < self.turn;
        if better {
            self.turn = at;
        }
        better
    }

    /// The uplinks whose turn it is not.
    fn others(&self, remote: IpAddr) -> Vec<IpAddr> {
        let now = self.source(remote);
        self.of(remote).filter(|a| now.is_some_and(|now| now != *a)).collect()
    }
}

/// When relays are asked for by another uplink.
#[derive(Debug, Default)]
pub(super) struct Pilot {
    /// A relay was silent; the others were asked.
    asked: Option<Instant>,
    turned: Option<Instant>,
    next_try: Option<Instant>,
    /// What takes a relay's path is to be said again when a relay answers.
    moved: bool,
    /// Where a relay sees us by uplinks whose turn it is not.
    seen: BTreeMap<IpAddr, SocketAddr>,
}

impl Pilot {
    pub(super) fn seen(&self) -> impl Iterator<Item = SocketAddr> {
        self.seen.values().copied()
    }

    /// A relay is there that may be asked.
    pub(super) fn try_at(&mut self, now: Instant) {
        self.next_try = self.next_try.map(|at| at.min(now));
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        [self.asked.map(|at| at + ASK_WAIT), self.next_try].into_iter().flatten().min()
    }
}

impl Node {
    /// By which of our addresses default routes lead out, the preferred first, and the networks that none of them
    /// leads to. Peers on an uplink that is gone go by another at once.
    /// `named`: the user names the interfaces, and nothing goes by others.
    pub fn set_uplinks(&mut self, now: Instant, list: Vec<IpAddr>, near: Vec<Link>, named: bool) {
        if !Rc::make_mut(&mut self.uplinks).set(list, near, named) {
            return;
        }
        self.move_relays(now);
        let known: Vec<String> = self.peers.iter().map(|p| p.name.clone()).collect();
        for name in known {
            self.with_paths(now, &name, |peer, _, out| peer.paths.relinked(now, out));
        }
        self.seek_all(now);
    }

    /// The relays are to see at once where we are.
    fn move_relays(&mut self, now: Instant) {
        self.homes.relocated(now);
        let mut seen = std::mem::take(&mut self.pilot.seen);
        seen.retain(|local, _| self.uplinks.list.contains(local));
        self.pilot = Pilot { asked: None, turned: Some(now), next_try: Some(now), moved: true, seen };
        self.due = Some(now);
    }

    /// A relay's control frame came by this way.
    pub(super) fn uplink_works(&mut self, now: Instant, way: Way) {
        if let Some(local) = way.local.filter(|_| Rc::make_mut(&mut self.uplinks).works(way)) {
            log::info!(target: "tunnel", "relays are asked from {local} again");
            self.move_relays(now);
        }
        if std::mem::take(&mut self.pilot.moved) {
            let relayed = self.slots.iter().filter(|(_, s)| s.peer.is_some() && s.path.is_relay());
            let relayed: Vec<u32> = relayed.map(|(index, _)| index).collect();
            for index in relayed {
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.conn.ping();
                }
                self.touch(index);
            }
        }
    }

    /// A relay saw us at this address by that uplink.
    pub(super) fn uplink_seen(&mut self, now: Instant, way: Way, seen: SocketAddr) {
        if let Some(local) = way.local
            && self.pilot.seen.insert(local, seen) != Some(seen)
        {
            self.tell_all(now);
        }
    }

    /// Relays are reached by the first uplink by which they answer.
    pub(super) fn drive_uplinks(&mut self, now: Instant) {
        let Some(relay) = self.homes.first_address().filter(|at| self.uplinks.source(at.ip()).is_some()) else {
            self.pilot = Pilot::default();
            return;
        };
        let (late, heard) = self.homes.pulse();
        let since_turn = self.pilot.turned.is_none_or(|at| now >= at + TURN);
        match self.pilot.asked {
            Some(at) if now < at + ASK_WAIT => {}
            Some(at) => {
                self.pilot.asked = None;
                if heard.is_none_or(|heard| heard < at) {
                    self.next_uplink(now, relay.ip());
                }
            }
            None if late => {
                self.pilot.asked = Some(now);
                self.homes.hurry(now);
            }
            None if heard.is_none() && since_turn => self.next_uplink(now, relay.ip()),
            None => {}
        }
        if self.pilot.next_try.is_none_or(|at| now >= at) {
            self.pilot.next_try = Some(now + TRY_AGAIN);
            for local in self.uplinks.others(relay.ip()) {
                self.homes.try_by(local, &mut self.outbox);
            }
        }
    }

    fn next_uplink(&mut self, now: Instant, relay: IpAddr) {
        if Rc::make_mut(&mut self.uplinks).next(relay) {
            let by = self.uplinks.source(relay).unwrap_or(relay);
            log::info!(target: "tunnel", "no relay answers: they are asked from {by} now");
            self.move_relays(now);
        } else {
            self.pilot.turned = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplinks(list: &[&str]) -> Uplinks {
        let mut uplinks = Uplinks::default();
        uplinks.set(addresses(list), vec![Link { address: "192.168.1.2".parse().unwrap(), prefix: 24 }], false);
        uplinks
    }

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|a| a.parse().unwrap()).collect()
    }

    fn remote() -> SocketAddr {
        "11.0.0.1:5".parse().unwrap()
    }

    #[test]
    fn one_uplink_leaves_all_to_the_routing_table() {
        let uplinks = uplinks(&["192.168.1.2", "2a0f::2"]);
        assert_eq!(uplinks.ways(remote()), [remote().into()]);
        assert_eq!(uplinks.source(remote().ip()), None);
        assert_eq!(uplinks.way_of(remote(), Some("192.168.1.2".parse().unwrap())), remote().into());
    }

    #[test]
    fn one_that_the_user_names_is_used_whatever_the_routes_say() {
        let mut one = Uplinks::default();
        one.set(addresses(&["10.0.0.2"]), Vec::new(), true);
        let way = Way { remote: remote(), local: Some("10.0.0.2".parse().unwrap()) };
        assert_eq!((one.ways(remote()), one.source(remote().ip())), (vec![way], way.local));
        assert_eq!(one.ways("[2a0f::9]:5".parse().unwrap()), [], "no way by a family that it has not");
    }

    #[test]
    fn of_two_each_is_a_way_but_not_to_a_neighbour() {
        let mut two = uplinks(&["192.168.1.2", "10.0.0.2"]);
        let ways = two.ways(remote());
        let locals: Vec<String> = ways.iter().map(|w| w.local.unwrap().to_string()).collect();
        assert_eq!(locals, ["192.168.1.2", "10.0.0.2"]);
        assert_eq!((two.preference(ways[0]), two.preference(ways[1])), (0, 1));
        assert!(two.preference(remote().into()) > 1);
        let neighbour = "192.168.1.9:5".parse().unwrap();
        assert_eq!(two.ways(neighbour), [neighbour.into()]);
        assert_eq!(two.preference(neighbour.into()), 0);

        // The first is pulled: the second is still named, and the first is no way any more.
        assert!(two.set(addresses(&["10.0.0.2"]), Vec::new(), false));
        assert_eq!(two.ways(remote()), ways[1..]);
        assert!(!two.has(ways[0]) && two.has(ways[1]));
    }

    #[test]
    fn relays_are_asked_by_the_next_uplink_and_again_by_the_first_when_it_works() {
        let mut two = uplinks(&["192.168.1.2", "10.0.0.2"]);
        let ip = remote().ip();
        let named = |u: &Uplinks| u.source(ip).unwrap().to_string();
        assert_eq!((named(&two), two.others(ip)), ("192.168.1.2".into(), addresses(&["10.0.0.2"])));
        assert!(two.next(ip));
        assert_eq!((named(&two), two.others(ip)), ("10.0.0.2".into(), addresses(&["192.168.1.2"])));
        assert!(!two.works(two.ways(remote())[1]));
        assert!(two.works(two.ways(remote())[0]));
        assert_eq!(named(&two), "192.168.1.2");
        assert!(!uplinks(&["192.168.1.2"]).next(ip));
    }
}
