//! UDP Services: which ports want a socket, where it is bound, and which client talks to which endpoint.

use super::rules::proxied;
use crate::sorted::{Map, Set};
use crate::table::{
    Table,
    model::{Protocol, ServiceId},
};
use lru::LruCache;
use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// UDP ports of Services that get a socket; those beyond it, in the order of their names, are left to whoever else
/// serves them.
pub const PORTS_MAX: usize = 1_024;

/// Clients' sessions at one time, each with a socket of its own; when full the one that has been silent for longest
/// ends, and its client's next datagram begins another.
pub const SESSIONS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4_095);

/// As Linux' net.netfilter.nf_conntrack_udp_timeout and …_udp_timeout_stream: then the kernel has forgotten the
/// flow too.
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(120);

/// Where the sockets are bound: below the ports that Linux gives out by itself (32768), and NodePorts (30000).
const FIRST: u16 = 10_000;
const COUNT: u16 = 20_000;

/// A Service's UDP port.
pub type PortId = (ServiceId, u16);

/// Where each is served, on weft0's address.
pub type Ports = Map<PortId, u16>;

/// The ports that want a socket: somebody serves them.
#[must_use]
pub fn wanted(table: &Table) -> Set<PortId> {
    let mut out = Set::new();
    for service in proxied(table) {
        for port in service.ports.iter().filter(|p| p.protocol == Protocol::Udp) {
            if out.len() < PORTS_MAX && served(table, &service.id, &port.name, Protocol::Udp, None) {
                out.insert((service.id.clone(), port.number));
            }
        }
    }
    out
}

/// Whether a port has an endpoint that could answer, of one family or of any.
#[must_use]
pub fn served(table: &Table, id: &ServiceId, name: &str, protocol: Protocol, v4: Option<bool>) -> bool {
    table.endpoints(id).any(|(slice, e)| {
        (e.ready || e.serving)
            && v4.is_none_or(|v4| e.address.is_ipv4() == v4)
            && Table::target_port(slice, name, protocol).is_some()
    })
}

/// Whether an endpoint still belongs to the port, and serves.
#[must_use]
pub fn serves(table: &Table, (id, number): &PortId, endpoint: SocketAddr) -> bool {
    let Some(service) = table.service_by_id(id) else { return false };
    let Some(port) = service.ports.iter().find(|p| p.number == *number && p.protocol == Protocol::Udp) else {
        return false;
    };
    table.endpoints(id).any(|(slice, e)| {
        e.address == endpoint.ip()
            && (e.ready || e.serving)
            && Table::target_port(slice, &port.name, Protocol::Udp) == Some(endpoint.port())
    })
}

/// Where to bind, in the order of trying: a restart comes to the same, so that flows of clients which never pause
/// still arrive. FNV-1a; whoever names Services so that they collide only moves his own ports.
pub fn places((id, number): &PortId) -> impl Iterator<Item = u16> + use<> {
    let bytes = id.namespace.bytes().chain([0]).chain(id.name.bytes()).chain(number.to_be_bytes());
    let hash = bytes.fold(0x811c_9dc5_u32, |sum, b| (sum ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let first = (hash % u32::from(COUNT)) as u16;
    (0..COUNT).map(move |step| FIRST + (first + step) % COUNT)
}

/// A client as seen by the socket of a port.
pub type Key = (u16, SocketAddr);

#[derive(Debug)]
struct Session<L> {
    id: u32,
    endpoint: SocketAddr,
    last: Instant,
    answered: bool,
    leg: L,
}

impl<L> Session<L> {
    fn is_over(&self, now: Instant) -> bool {
        let patience = if self.answered { ANSWERED } else { UNANSWERED };
        now.saturating_duration_since(self.last) >= patience
    }
}

/// Who talks to whom. `L` is the way to the endpoint, which closes when it is dropped: what these functions return
/// is to be dropped by the caller, outside of any borrow.
#[derive(Debug)]
pub struct Sessions<L> {
    all: LruCache<Key, Session<L>>,
    next: u32,
}

impl<L> Default for Sessions<L> {
    fn default() -> Self {
        Self::with_room(SESSIONS_MAX)
    }
}

impl<L> Sessions<L> {
    #[must_use]
    pub fn with_room(most: NonZeroUsize) -> Self {
        Self { all: LruCache::sparse(most), next: 0 }
    }

    /// The way to a client's endpoint, which is used by this.
    pub fn of(&mut self, now: Instant, key: &Key) -> Option<(SocketAddr, &L)> {
        let session = self.all.get_mut(key).filter(|s| !s.is_over(now))?;
        session.last = now;
        Some((session.endpoint, &session.leg))
    }

    /// A number for the next session, by which it ends itself.
    pub fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }

    /// Returns the one that had to make room, or had the same client.
    pub fn open(&mut self, now: Instant, key: Key, id: u32, endpoint: SocketAddr, leg: L) -> Option<L> {
        let session = Session { id, endpoint, last: now, answered: false, leg };
        self.all.push(key, session).map(|(_, old)| old.leg)
    }

    /// The endpoint has answered: true for the first time.
    pub fn answered(&mut self, now: Instant, key: &Key, id: u32) -> bool {
        let Some(session) = self.all.get_mut(key).filter(|s| s.id == id) else { return false };
        session.last = now;
        !std::mem::replace(&mut session.answered, true)
    }

    pub fn close(&mut self, key: &Key, id: Option<u32>) -> Option<L> {
        self.all.peek(key).filter(|s| id.is_none_or(|id| s.id == id))?;
        self.all.pop(key).map(|s| s.leg)
    }

    /// Ends the oldest: its descriptor is needed.
    pub fn close_oldest(&mut self) -> Option<L> {
        self.all.pop_lru().map(|(_, s)| s.leg)
    }

    /// Ends those that are silent for too long, and those whose endpoint does not `stay`.
    pub fn sweep(&mut self, now: Instant, mut stay: impl FnMut(u16, SocketAddr) -> bool) -> Vec<L> {
        let over = |(key, s): (&Key, &Session<L>)| (s.is_over(now) || !stay(key.0, s.endpoint)).then_some(*key);
        let gone: Vec<Key> = self.all.iter().filter_map(over).collect();
        gone.iter().filter_map(|key| self.all.pop(key)).map(|s| s.leg).collect()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u16) -> Key {
        (10_000, SocketAddr::new([10, 0, 0, 1].into(), n))
    }

    fn endpoint(n: u8) -> SocketAddr {
        SocketAddr::new([10, 1, 0, n].into(), 53)
    }

    #[test]
    fn row_58_a_silent_session_ends_after_its_time_and_an_answered_one_lives_longer() {
        let (mut sessions, begin) = (Sessions::default(), Instant::now());
        for n in [1, 2] {
            let id = sessions.number();
            assert_eq!(sessions.open(begin, client(n), id, endpoint(1), n), None);
        }
        sessions.answered(begin, &client(2), 2);
        let later = begin + UNANSWERED;
        assert!(sessions.of(later - Duration::from_secs(1), &client(1)).is_some());
        assert!(sessions.of(later, &client(2)).is_some());
        let late = begin + UNANSWERED * 2;
        assert_eq!(sessions.sweep(late, |_, _| true), [1]);
        assert!(sessions.of(late + ANSWERED, &client(2)).is_none());
    }

    #[test]
    fn row_59_a_hundred_thousand_clients_are_bounded_and_the_oldest_ends() {
        let room = NonZeroUsize::new(100).unwrap();
        let (mut sessions, now) = (Sessions::with_room(room), Instant::now());
        let mut ended = Vec::new();
        for n in 0..100_000_u32 {
            let from = (10_000, SocketAddr::new([10, 0, (n >> 16) as u8, 1].into(), n as u16));
            let id = sessions.number();
            ended.extend(sessions.open(now, from, id, endpoint(1), n));
            sessions.of(now, &client(0));
        }
        assert_eq!((sessions.len(), ended.len()), (100, 99_900));
        // The first client never fell silent.
        assert!(!ended.contains(&0) && ended[0] == 1);
    }

    #[test]
    fn row_57_only_sessions_of_endpoints_that_serve_no_longer_end() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        for n in 1..=4 {
            let id = sessions.number();
            sessions.open(now, client(n), id, endpoint(n as u8 % 2), n);
        }
        let mut gone = sessions.sweep(now, |port, to| port == 10_000 && to == endpoint(0));
        gone.sort_unstable();
        assert_eq!(gone, [1, 3]);
        assert_eq!(sessions.close(&client(2), Some(9)), None);
        assert_eq!(sessions.close(&client(2), Some(2)), Some(2));
        assert_eq!((sessions.close_oldest(), sessions.is_empty()), (Some(4), true));
    }

    #[test]
    fn places_are_the_same_again_and_go_round_all() {
        let id = |name: &str| (ServiceId { namespace: "default".into(), name: name.into() }, 53);
        let all: Vec<u16> = places(&id("dns")).collect();
        assert_eq!(all, places(&id("dns")).collect::<Vec<_>>());
        assert_eq!(all.iter().collect::<Set<_>>().len(), usize::from(COUNT));
        assert!(all.iter().all(|p| (FIRST..FIRST + COUNT).contains(p)));
        assert_ne!(all[0], places(&id("other")).next().unwrap());
    }
}
