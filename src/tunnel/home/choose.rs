//! Which of the relays that answer is the first, and which stands by.

use siphasher::sip::SipHasher24;
use std::{hash::Hasher, time::Duration};

/// Two round trips that differ by less, or by a fifth, are alike.
const ALIKE: Duration = Duration::from_millis(5);

/// A relay that answers, as far as the choice goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) relay: usize,
    pub(super) rtt: Duration,
    /// For how many nodes it is the first, as it says.
    pub(super) load: u16,
    /// Ours alone: so nodes spread over relays that are alike.
    pub(super) weight: u64,
}

/// A node's own order among relays.
pub(super) fn weight(key: &[u8; 32], relay: &str) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(key);
    hasher.write(relay.as_bytes());
    hasher.finish()
}

fn nearer(a: Duration, b: Duration) -> bool {
    a + ALIKE.max(b / 5) < b
}

/// The nearest; of those that are as near, the one of our own order.
pub(super) fn best(offers: &[Offer], but: Option<usize>) -> Option<usize> {
    let open = || offers.iter().filter(|o| Some(o.relay) != but);
    let least = open().map(|o| o.rtt).min()?;
    open().filter(|o| !nearer(least, o.rtt)).min_by_key(|o| o.weight).map(|o| o.relay)
}

/// A relay that is worth leaving `first` for: it is nearer (true), or as near and carries clearly less.
pub(super) fn worth(offers: &[Offer], first: usize) -> Option<(usize, bool)> {
    let now = offers.iter().find(|o| o.relay == first)?;
    let near = offers.iter().filter(|o| nearer(o.rtt, now.rtt)).min_by_key(|o| o.rtt);
    let alike = |o: &&Offer| o.relay != first && !nearer(now.rtt, o.rtt);
    let lighter = |o: &&Offer| (u32::from(o.load) + 1) * 11 < u32::from(now.load) * 10;
    let lightest = || offers.iter().filter(alike).filter(lighter).min_by_key(|o| o.load);
    near.map(|o| (o.relay, true)).or_else(|| lightest().map(|o| (o.relay, false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(relay: usize, ms: u64, load: u16, weight: u64) -> Offer {
        Offer { relay, rtt: Duration::from_millis(ms), load, weight }
    }

    #[test]
    fn the_nearest_is_best_and_our_own_order_counts_among_equals() {
        let offers = [offer(0, 40, 0, 1), offer(1, 20, 0, 9), offer(2, 23, 0, 3), offer(3, 30, 0, 0)];
        assert_eq!(best(&offers, None), Some(2));
        assert_eq!(best(&offers, Some(2)), Some(1));
        assert_eq!(best(&offers[..1], Some(0)), None);
    }

    #[test]
    fn a_first_relay_is_left_for_a_nearer_or_a_lighter_one_and_not_for_little() {
        let cases = [
            (offer(1, 25, 0, 0), 0, None), // alone, it has nobody to share with
            (offer(1, 36, 9, 0), 1, None),
            (offer(1, 30, 99, 0), 9, Some((1, true))),
            (offer(1, 40, 24, 0), 26, None),
            (offer(1, 44, 23, 0), 27, Some((1, false))),
            (offer(1, 60, 0, 0), 27, None),
        ];
        for (other, load, wanted) in cases {
            let first = offer(0, if load == 0 { 26 } else { 40 }, load, 0);
            assert_eq!(worth(&[first, other], 0), wanted, "{other:?} beside {first:?}");
        }
    }

    #[test]
    fn the_orders_of_many_nodes_differ() {
        let ahead = (0..200_u8).filter(|n| weight(&[*n; 32], "relay-1") < weight(&[*n; 32], "relay-2")).count();
        assert!((70..130).contains(&ahead), "{ahead} of 200");
    }
}
