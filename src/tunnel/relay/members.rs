//! The nodes that are registered at a relay. A node keeps its number when it registers anew, so that flows to
//! it outlive a new registration and a new address.

use super::{directory::Kept, limits::Bucket};
use crate::tunnel::{
    control::{Channel, Rank},
    identity::Certificate,
};
use lru::LruCache;
use std::{
    collections::HashMap,
    net::SocketAddr,
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Registered nodes; when full the longest silent one goes.
pub(super) const MEMBERS_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// A node pings a relay for data at least each 25 s, and one that holds its entry each 60 s: three lost pings and
/// some slack.
const SILENCE_MAX: Duration = Duration::from_secs(90);
const SILENCE_LISTED: Duration = Duration::from_secs(200);
/// Between two looks for the silent.
const SWEEP: Duration = Duration::from_secs(5);

/// A node's number at this relay, stable while it is registered.
pub(super) type Id = u32;

pub(super) struct Member {
    pub(super) certificate: Box<Certificate>,
    pub(super) channel: Channel,
    pub(super) address: SocketAddr,
    /// A new source address that has not yet answered: its token, and when it was asked.
    pub(super) candidate: Option<(SocketAddr, u64, Instant)>,
    pub(super) heard: Instant,
    pub(super) rank: Rank,
    pub(super) kept: Kept,
    /// What is left of its rates.
    pub(super) data: Bucket,
    pub(super) opens: Bucket,
    pub(super) registrations: Bucket,
}

pub(super) struct Members {
    list: LruCache<Id, Member>,
    by_name: HashMap<String, Id>,
    by_registration: HashMap<u64, Id>,
    by_address: HashMap<SocketAddr, Id>,
    /// Members whose first relay we are.
    firsts: u16,
    next: Id,
    sweep: Option<Instant>,
}

impl Members {
    pub(super) fn new() -> Self {
        Self {
            list: LruCache::unbounded(),
            by_name: HashMap::new(),
            by_registration: HashMap::new(),
            by_address: HashMap::new(),
            firsts: 0,
            next: 0,
            sweep: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn firsts(&self) -> u16 {
        self.firsts
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.list.iter_mut().map(|(_, member)| member)
    }

    pub(super) fn get(&self, id: Id) -> Option<&Member> {
        self.list.peek(&id)
    }

    /// Counts as a sign of life.
    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut Member> {
        self.list.get_mut(&id)
    }

    pub(super) fn named(&self, name: &str) -> Option<Id> {
        self.by_name.get(name).copied()
    }

    pub(super) fn registered(&self, registration: u64) -> Option<Id> {
        self.by_registration.get(&registration).copied()
    }

    pub(super) fn at(&self, address: SocketAddr) -> Option<Id> {
        self.by_address.get(&address).copied()
    }

    /// A node of this name registers, for the first time or anew.
    pub(super) fn put(&mut self, member: Member) -> Id {
        let (name, registration, address) =
            (member.certificate.name.clone(), member.channel.registration, member.address);
        let id = self.named(&name).unwrap_or_else(|| self.vacant());
        if let Some(old) = self.list.pop(&id) {
            self.unlink(id, &old);
        }
        self.sweep.get_or_insert(member.heard + SWEEP);
        self.list.put(id, member);
        self.by_name.insert(name, id);
        self.by_registration.insert(registration, id);
        self.by_address.insert(address, id);
        while self.list.len() > MEMBERS_MAX.get() {
            let Some((id, gone)) = self.list.pop_lru() else { break };
            self.unlink(id, &gone);
        }
        id
    }

    fn vacant(&mut self) -> Id {
        loop {
            self.next = self.next.wrapping_add(1);
            if !self.list.contains(&self.next) {
                return self.next;
            }
        }
    }

    fn unlink(&mut self, id: Id, gone: &Member) {
        self.firsts -= u16::from(gone.rank == Rank::First);
        self.by_name.remove(&gone.certificate.name);
        self.by_registration.remove(&gone.channel.registration);
        if self.at(gone.address) == Some(id) {
            self.by_address.remove(&gone.address);
        }
    }

    /// What we are to this node from now on.
    pub(super) fn ranked(&mut self, id: Id, rank: Rank) {
        let Some(member) = self.list.peek_mut(&id) else { return };
        self.firsts -= u16::from(member.rank == Rank::First);
        self.firsts += u16::from(rank == Rank::First);
        member.rank = rank;
    }

    /// It has shown that it receives at its new address.
    pub(super) fn moved(&mut self, id: Id, address: SocketAddr) {
        let Some(member) = self.list.peek_mut(&id) else { return };
        let old = std::mem::replace(&mut member.address, address);
        if self.at(old) == Some(id) {
            self.by_address.remove(&old);
        }
        self.by_address.insert(address, id);
    }

    pub(super) fn remove(&mut self, id: Id) {
        if let Some(gone) = self.list.pop(&id) {
            self.unlink(id, &gone);
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.sweep
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.sweep.is_none_or(|at| now < at) {
            return;
        }
        let most = |m: &Member| if m.rank == Rank::Listed { SILENCE_LISTED } else { SILENCE_MAX };
        let silent = |m: &Member| m.heard + most(m) <= now;
        let gone: Vec<Id> = self.list.iter().filter(|(_, m)| silent(m)).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(member) = self.get(id) {
                log::info!(target: "relay", "{} is silent: registration ended", member.certificate.name);
            }
            self.remove(id);
        }
        self.sweep = (self.len() > 0).then_some(now + SWEEP);
    }
}
