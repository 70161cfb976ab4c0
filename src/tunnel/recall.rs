//! What a node knows of its peers from before a restart: certificates, and where each was reached last.
//! So it reaches them again while the relays are away.

use super::{identity::Certificate, node::Node, path::Path, peer::PEERS_MAX, slot::Slot};
use crate::metrics::bump;
use std::{collections::BTreeMap, net::SocketAddr, time::Instant};

/// One peer as the snapshot keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub certificate: Certificate,
    /// Where it was reached without a relay, last.
    pub address: SocketAddr,
}

/// An address of a link says nothing without the interface, and that may have another number after a restart.
fn lasts(at: SocketAddr) -> bool {
    !matches!(at, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local())
}

impl Node {
    /// Takes in what was known before a restart; nothing of it is trusted before it is used. Those beyond 1,000 are
    /// left out.
    pub fn remember(&mut self, peers: Vec<Remembered>) {
        let room = PEERS_MAX.saturating_sub(self.peers.of_before.len());
        let named = peers.into_iter().map(|p| (p.certificate.name.clone(), p));
        self.peers.of_before.extend(named.filter(|(name, _)| *name != self.name).take(room));
    }

    /// What is worth knowing after a restart, by name; at most 1,000: first those of this run.
    #[must_use]
    pub fn remembered(&self) -> Vec<Remembered> {
        let now = self.unix();
        let mut all = BTreeMap::new();
        for peer in self.peers.iter() {
            if let (Some(certificate), Some(address)) =
                (&peer.certificate, peer.paths.last_good().filter(|at| lasts(*at)))
            {
                all.insert(peer.name.clone(), Remembered { certificate: certificate.clone(), address });
            }
        }
        for (name, peer) in &self.peers.of_before {
            if all.len() < PEERS_MAX && now <= peer.certificate.not_after {
                all.entry(name.clone()).or_insert_with(|| peer.clone());
            }
        }
        all.into_values().collect()
    }

    /// A peer is wanted: what is remembered of it counts where nothing better is known.
    pub(super) fn recall(&mut self, name: &str) {
        let Some(peer) = self.peers.get(name).filter(|p| p.paths.last_good().is_none()) else { return };
        let known = peer.certificate.clone();
        let Some(Remembered { certificate, address }) = self.peers.of_before.get(name).cloned() else { return };
        match known {
            // Its address is another node's now, for all we know.
            Some(known) if known.key != certificate.key => return,
            Some(_) => {}
            None => {
                if let Err(why) = certificate.verify(&self.transport.local.ca, self.unix()) {
                    bump(&self.count.bad_certificate);
                    log::warn!(target: "tunnel", "{name} as it was before the restart is of no use: {why}");
                    self.peers.of_before.remove(name);
                    return;
                }
                self.know(name, &certificate);
            }
        }
        if let Some(peer) = self.peers.get_mut(name) {
            peer.paths.remember(address);
        }
    }

    /// A dial by a remembered address that nobody has answered gives way to a path that leads there for sure.
    pub(super) fn redial(&mut self, now: Instant, name: &str, path: Path, certificate: &Certificate) {
        let Some(index) = self.peers.get(name).and_then(|p| p.dialing.filter(|d| p.guess == Some(*d))) else { return };
        // Bytes prove nothing: those of a connection of before the restart may come to this slot.
        let answered = |s: &Slot| s.conn.stats().frame_rx.crypto > 0;
        if self.slots.get(index).is_some_and(|s| !answered(s) && s.path != path) {
            if let Some(peer) = self.peers.get_mut(name) {
                (peer.dialing, peer.guess, peer.want) = (None, None, None);
            }
            self.close(now, index, "there is a better way");
            self.dial(now, name, path, certificate);
        }
    }
}
