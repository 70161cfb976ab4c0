//! The driver of the nf_tables backend: sends transactions, looks whether they still hold, and hears of changes.

use crate::{
    netlink::Socket,
    proxy::{
        link::{Raw, messages},
        nft::{
            ruleset::{self, INTERFACES, OUTSIDE, SERVICES, TABLE},
            sum::Sum,
            ways::{Ways, concerns_us},
            wire::{Batch, Family, Kind, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, attr, number, request},
        },
        rules::Desired,
    },
    reactor::Async,
    rules::Synced,
    sys,
};
use anyhow::{Context, Result};
use futures_lite::future::yield_now;
use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    os::fd::OwnedFd,
    rc::Rc,
    time::Duration,
};

/// Those that have a table of ours.
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// How often a list is asked for again that changed while it was read; then the last one counts.
const TRIES: usize = 5;

/// linux/netfilter/nfnetlink.h: the group that hears of each transaction.
const NFNLGRP_NFTABLES: u32 = 7;

/// Notifications that are read before the others may run.
const EVENTS: usize = 64;

/// What we know of the kernel from the last sync.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    /// Of IPv4, and of IPv6.
    families: [Known; 2],
}

/// Of one family's table.
#[derive(Debug, Default)]
struct Known {
    applied: Option<Rc<Desired>>,
    sum: Sum,
    /// Elements were changed since the sum was made.
    changed: bool,
}

/// One list of the kernel, of a table or of all; true where nothing changed while it was read. What is not there is an
/// empty list.
fn list(
    socket: &mut Socket,
    kind: Kind,
    family: u8,
    table: Option<&str>,
    set: Option<&str>,
    take: &mut dyn FnMut(u16, &[u8]),
) -> io::Result<bool> {
    let mut whole = true;
    let ask = |seq| {
        request(kind, NLM_F_DUMP, seq, family, |a| {
            table.into_iter().for_each(|t| a.text(1, t));
            set.into_iter().for_each(|s| a.text(2, s));
        })
    };
    let done = socket.exchange(ask, &mut |raw| {
        whole &= !raw.interrupted;
        take(raw.kind, raw.body);
    });
    match done {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(whole),
        done => done.map(|()| whole),
    }
}

/// Sends a transaction; one in which nothing is changes nothing.
fn commit(socket: &mut Socket, batch: Batch) -> io::Result<()> {
    if batch.is_empty() { Ok(()) } else { socket.exchange(|seq| batch.done(seq), &mut |_| ()) }
}

/// A number that rises with each transaction of anybody; None: the kernel has no nf_tables, or none for us.
#[must_use]
pub fn generation() -> Option<u32> {
    let mut found = None;
    let ask = |seq| request(Kind::GetGeneration, NLM_F_ACK, seq, 0, |_| ());
    let take = &mut |raw: &Raw<'_>| found = raw.body.get(4..).and_then(|b| attr(b, 1)).and_then(number);
    Socket::open(sys::Family::Netfilter).ok()?.exchange(ask, take).ok()?;
    found
}

/// Tells when somebody changes what concerns our rules.
#[derive(Debug)]
pub struct Monitor(Async<OwnedFd>);

impl Monitor {
    /// # Errors
    /// Without CAP_NET_ADMIN.
    pub fn open() -> Result<Self> {
        let fd = sys::netlink(sys::Family::Netfilter, 1 << (NFNLGRP_NFTABLES - 1), Duration::ZERO)?;
        Ok(Self(Async::new(fd)?))
    }

    /// Resolves when something has changed since the last call; cancel-safe.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn changed(&self) -> io::Result<()> {
        let mut buffer = [0; 4_096];
        loop {
            self.0.readable().await?;
            let mut heard = false;
            for _ in 0..EVENTS {
                match sys::receive(&self.0, &mut buffer, false) {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    // What was lost, or is too large to be looked at, may concern us.
                    Err(e) if e.kind() == ErrorKind::InvalidData || e.raw_os_error() == Some(libc::ENOBUFS) => {
                        heard = true;
                    }
                    datagram => heard |= messages(datagram?).any(|raw| concerns_us(raw.kind, raw.body)),
                }
            }
            if heard {
                return Ok(());
            }
            yield_now().await;
        }
    }
}

fn sum(socket: &mut Socket, family: Family) -> io::Result<Sum> {
    let mut sum = Sum::default();
    for _ in 0..TRIES {
        sum = Sum::default();
        let mut whole = true;
        let lists = [
            (Kind::GetChain, None, None),
            (Kind::GetRule, Some(TABLE), None),
            (Kind::GetElement, Some(TABLE), Some(SERVICES)),
            (Kind::GetElement, Some(TABLE), Some(OUTSIDE)),
            (Kind::GetElement, Some(TABLE), Some(INTERFACES)),
        ];
        for (kind, table, set) in lists {
            whole &= list(socket, kind, family as u8, table, set, &mut |kind, body| sum.take(kind, body))?;
        }
        if whole {
            break;
        }
    }
    Ok(sum)
}

impl Nft {
    /// # Errors
    /// When the kernel has no nf_tables, or we may not use them.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::open(sys::Family::Netfilter)?;
        let there = list(&mut socket, Kind::GetChain, 0, None, None, &mut |_, _| ());
        there.map_err(cannot).context("nf_tables")?;
        Ok(Self { socket, families: Default::default() })
    }

    /// Makes the rules of each family what is desired, in one transaction. Without `look` what was written last counts as
    /// being there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sync(&mut self, desired: &[Option<Rc<Desired>>; 2], look: bool) -> Result<Synced> {
        let Self { socket, families } = self;
        let mut listed = look.then(generation).flatten();
        let mut batch = Batch::default();
        let mut fresh = [false; 2];
        for ((known, desired), (family, fresh)) in
            families.iter_mut().zip(desired).zip(FAMILIES.into_iter().zip(&mut fresh))
        {
            if look {
                known.look(socket, family)?;
            }
            match (&known.applied, desired) {
                (None, Some(new)) => {
                    ruleset::install(&mut batch, new);
                    *fresh = true;
                }
                (Some(was), Some(new)) if was != new => {
                    ruleset::change(&mut batch, was, new);
                    known.changed = true;
                }
                (Some(_), None) => ruleset::remove(&mut batch, family),
                (Some(_), Some(_)) | (None, None) => continue,
            }
            // Until the kernel has said that it has them.
            known.applied = None;
        }
        let wrote = !batch.is_empty();
        commit(socket, batch).map_err(cannot).context("nf_tables: the kernel refuses the rules")?;
        if wrote {
            listed = generation();
        }
        let mut rules = 0;
        for ((known, desired), (family, fresh)) in families.iter_mut().zip(desired).zip(FAMILIES.into_iter().zip(fresh))
        {
            if fresh {
                known.sum = sum(socket, family).context("cannot list our rules")?;
                known.changed = false;
            }
            known.applied.clone_from(desired);
            rules += desired.as_ref().map_or(0, |desired| known.sum.rules + ruleset::count(desired));
        }
        Ok(Synced { wrote, rules, generation: listed })
    }
}

impl Known {
    /// Looks whether what was written is still there, and forgets it where it is not.
    fn look(&mut self, socket: &mut Socket, family: Family) -> Result<()> {
        let Some(applied) = &self.applied else { return Ok(()) };
        let now = sum(socket, family).context("cannot list our rules")?;
        if now.holds(&self.sum, ruleset::count(applied)) && (self.changed || now == self.sum) {
            self.sum = now;
            self.changed = false;
        } else {
            log::warn!("rules: somebody has changed or flushed ours; they are put back");
            self.applied = None;
        }
        Ok(())
    }
}

fn cannot(e: io::Error) -> anyhow::Error {
    let hint = match e.kind() {
        ErrorKind::PermissionDenied => " (needs CAP_NET_ADMIN: run weft as root)",
        ErrorKind::NotFound => " (a kernel module is missing: nft_nat, nft_ct and nft_reject are needed)",
        _ => "",
    };
    anyhow::anyhow!("{e}{hint}")
}

/// Whether a kernel without nf_tables says this.
fn is_absent(e: &io::Error) -> bool {
    let code = e.raw_os_error();
    [libc::EOPNOTSUPP, libc::EINVAL, libc::EPROTONOSUPPORT].into_iter().any(|absent| code == Some(absent))
}

fn ways(socket: &mut Socket) -> io::Result<Ways> {
    let mut ways = Ways::default();
    list(socket, Kind::GetChain, 0, None, None, &mut |_, body| ways.chain(body))?;
    for (family, table) in ways.tables() {
        list(socket, Kind::GetRule, family as u8, Some(&table), None, &mut |_, body| ways.rule(body))?;
    }
    Ok(ways)
}

/// Sees to it that no input chain of others drops what was redirected to one of `own`: in each that would is one rule of
/// ours for each. Says what it could not do.
///
/// # Errors
/// When the kernel's chains cannot be listed; a kernel without nf_tables has none.
pub fn open_ways(own: &[IpAddr], skip_iptables: bool) -> Result<Vec<String>> {
    let mut socket = Socket::open(sys::Family::Netfilter)?;
    let found = match ways(&mut socket) {
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        found => found.context("cannot list the chains of nf_tables")?,
    };
    let mut notes = Vec::new();
    for own in own {
        for way in found.missing(ruleset::family(*own), skip_iptables) {
            let mut batch = Batch::default();
            ruleset::open_way(&mut batch, &way, *own);
            match commit(&mut socket, batch) {
                Ok(()) => log::info!("rules: {way} would drop connections to Services: one rule of ours lets them in"),
                // A table that belongs to a running program, firewalld for one: it has to be told by its own means.
                Err(e) => notes.push(format!("{way} may drop connections to Services, and takes no rule: {e}")),
            }
        }
    }
    let served: Vec<_> = own.iter().map(|own| ruleset::family(*own)).collect();
    for (way, _, handle) in found.spare(&served) {
        let mut batch = Batch::default();
        ruleset::close_way(&mut batch, &way, handle);
        if let Err(e) = commit(&mut socket, batch) {
            log::debug!("{way}: {e}");
        }
    }
    Ok(notes)
}

/// Sends a transaction that the kernel refuses at its very end, and so forgets: true to life, and without a trace.
fn rehearse(socket: &mut Socket, mut batch: Batch, family: Family) -> io::Result<()> {
    // linux/netlink.h: what is there already must not be.
    const NLM_F_EXCL: u16 = 0x200;
    for flags in [NLM_F_CREATE, NLM_F_CREATE | NLM_F_EXCL] {
        batch.push(Kind::NewTable, flags, family, |a| a.text(1, "weft-check"));
    }
    match commit(socket, batch) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
        Ok(()) => Err(io::Error::other("a transaction with a mistake in it was taken")),
    }
}

/// Whether the kernel would take our rules.
///
/// # Errors
/// Why not.
pub fn attempt(desired: &Desired) -> Result<()> {
    let mut batch = Batch::default();
    ruleset::install(&mut batch, desired);
    rehearse(&mut Socket::open(sys::Family::Netfilter)?, batch, ruleset::family(desired.address)).map_err(cannot)
}

/// The input chains of others that would drop what was redirected to `own`, and why one of them takes no rule of ours.
///
/// # Errors
/// As [`open_ways`].
pub fn closed_ways(own: IpAddr, skip_iptables: bool) -> Result<Vec<(String, Option<String>)>> {
    let mut socket = Socket::open(sys::Family::Netfilter)?;
    let found = match ways(&mut socket) {
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        found => found.map_err(cannot)?,
    };
    let closed = found.missing(ruleset::family(own), skip_iptables).into_iter().map(|way| {
        let mut batch = Batch::default();
        ruleset::open_way(&mut batch, &way, own);
        let refused = rehearse(&mut socket, batch, way.family).err();
        (way.to_string(), refused.map(|e| e.to_string()))
    });
    Ok(closed.collect())
}

/// Removes our tables, and our rules from chains of others. Says what it removed.
///
/// # Errors
/// When something is left behind.
pub fn remove() -> Result<Vec<String>> {
    let mut socket = Socket::open(sys::Family::Netfilter)?;
    let found = match ways(&mut socket) {
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        found => found.map_err(cannot).context("nf_tables")?,
    };
    let mut done = Vec::new();
    for family in FAMILIES {
        let there = sum(&mut socket, family).context("nf_tables")?;
        if !there.is_empty() {
            let mut batch = Batch::default();
            ruleset::remove(&mut batch, family);
            commit(&mut socket, batch).with_context(|| format!("cannot remove table {} {TABLE}", family.name()))?;
            let (family, Sum { rules, elements, .. }) = (family.name(), there);
            done.push(format!("table {family} {TABLE} of nf_tables: {rules} rules and {elements} elements"));
        }
    }
    for (way, _, handle) in found.ours() {
        let mut batch = Batch::default();
        ruleset::close_way(&mut batch, way, *handle);
        match commit(&mut socket, batch) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e).with_context(|| format!("a rule in {way}")),
            Ok(()) | Err(_) => done.push(format!("a rule in {way}")),
        }
    }
    Ok(done)
}
