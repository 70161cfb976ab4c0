//! Keeps the kernel as the table wants it: weft0 with its address and routes, and the rules. Puts back
//! what somebody took away, and takes all of it away at the end.

use crate::sorted::Set;
use crate::{
    backoff::Backoff,
    clock::Clock,
    config::{Backend, ProxyConfig},
    conntrack,
    ears::Ears,
    iptables::{self, Iptables},
    metrics::{ProxyCounters, add, bump},
    netlink,
    nft::{self, Nft},
    proxy::{
        cover, flows,
        rules::{self, ADDRESS6, Catch, DEVICE, Desired, Ports, Sources},
        udp,
    },
    reactor::Timer,
    shared::{Bell, Listener, Reader, Writer},
    table::{Table, balance::Here},
};
use anyhow::{Context, Result, anyhow, bail};
use futures_lite::future::or;
use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    time::{Duration, Instant},
};

/// Quiet after a change before it is acted on: a rollout changes many Services within milliseconds.
const LULL: Duration = Duration::from_millis(50);
/// The least time between two syncs, and so the most that churn can put one off.
const GAP: Duration = Duration::from_secs(1);
/// How often we look whether somebody flushed our rules: a firewall's reload tells nobody.
pub(crate) const RECHECK: Duration = Duration::from_secs(30);
/// How often we look at the size of iptables-legacy's tables: a few microseconds.
const PEEK: Duration = Duration::from_secs(2);
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);
/// How long `undo` waits for a sync under way: longer than a program may take.
const UNDO_PATIENCE: Duration = Duration::from_secs(65);
/// What `weft status` shows of the kernel's side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// "dummy" or "bridge"; empty: there is no weft0.
    pub device: String,
    /// What iptables-restore says of itself, or "nf_tables".
    pub backend: String,
    /// Interfaces whose packets are not caught, or, where the config names some, those that are.
    pub interfaces: Vec<String>,
    pub rules: usize,
    pub routes: usize,
    /// The state of the table that is in the kernel; None: nothing is yet.
    pub version: Option<u64>,
    /// When the kernel was last as we want it.
    pub good: Option<Instant>,
    /// The number of the orders that are in the kernel.
    pub orders: u64,
    /// What keeps us from it; retried.
    pub errors: Vec<String>,
    /// What is as the user wants it, but may surprise.
    pub notes: Vec<String>,
}

/// How `undo` and `run` stay out of each other's way.
#[derive(Debug, Default)]
struct Gate {
    closed: Cell<bool>,
    closing: Bell,
    busy: Cell<bool>,
    idle: Bell,
}

/// While it lives a sync is under way.
struct Busy<'g>(&'g Gate);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.set(false);
        self.0.idle.ring();
    }
}

/// Takes everything away at the end of the process.
#[derive(Clone, Debug)]
pub struct Undo(Rc<Gate>);

impl Undo {
    /// The rules alone: weft0 and its routes stay. Connections go on only where somebody else has chains of NAT too: with
    /// the last one the kernel stops translating.
    ///
    /// # Errors
    /// As [`Self::undo`].
    pub async fn undo_rules(&self) -> Result<Vec<String>> {
        self.stop().await;
        let (mut done, mut errors) = iptables::remove().await;
        nft::remove().map_or_else(|e| errors.push(format!("{e:#}")), |what| done.extend(what));
        if errors.is_empty() { Ok(done) } else { Err(anyhow!("{}", errors.join("; "))) }
    }

    /// Stops the syncs for good, waits for one under way, then removes all that is ours.
    ///
    /// # Errors
    /// When something is left behind; the text says what.
    pub async fn undo(&self) -> Result<Vec<String>> {
        self.stop().await;
        remove_all().await
    }

    async fn stop(&self) {
        self.0.closed.set(true);
        let mut listener = self.0.idle.listen();
        self.0.closing.ring();
        let idle = async {
            while self.0.busy.get() {
                listener.rung().await;
            }
        };
        or(idle, after(UNDO_PATIENCE)).await;
    }
}

/// What is wanted of the rules; a reload changes it.
#[derive(Clone, Debug)]
pub struct Orders {
    /// Rises with each change.
    pub number: u64,
    pub cfg: ProxyConfig,
    /// Where our parts listen on weft0's address.
    pub ports: Ports,
    pub udp: Reader<udp::Ports>,
    /// Of which the node's name counts.
    pub here: Here,
}

/// The driver; see the module.
#[derive(Debug)]
pub struct Rules {
    orders: Reader<Orders>,
    address: Ipv4Addr,
    table: Reader<Table>,
    counters: Rc<ProxyCounters>,
    clock: Clock,
    status: Writer<Status>,
    gate: Rc<Gate>,
}

/// What came of a backend's sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Synced {
    /// Whether anything was written.
    pub wrote: bool,
    /// Rules in the kernel, and elements of maps.
    pub rules: usize,
    /// Of nf_tables, before it was last listed what is there; None: it was not.
    pub generation: Option<u32>,
}

/// Who writes the rules.
#[derive(Debug)]
enum Writes {
    Iptables(Iptables),
    Nft(Nft),
}

impl Writes {
    fn name(&self) -> &str {
        match self {
            Self::Iptables(iptables) => iptables.version(),
            Self::Nft(_) => "nf_tables",
        }
    }

    /// The tables that change without our [`Ears`] hearing of it.
    fn silent(&self) -> Option<&Iptables> {
        match self {
            Self::Iptables(iptables) if iptables.silent() => Some(iptables),
            Self::Iptables(_) | Self::Nft(_) => None,
        }
    }

    async fn sync(&mut self, desired: &[Option<Rc<Desired>>; 2], look: bool) -> Result<Synced> {
        match self {
            Self::Iptables(iptables) => iptables.sync(desired, look).await,
            Self::Nft(nft) => nft.sync(desired, look),
        }
    }
}

/// What we know of the kernel from the last sync.
#[derive(Debug, Default)]
struct Known {
    writes: Option<Writes>,
    checked: Option<Instant>,
    /// What conntrack's entries of each family were held against.
    settled: [Option<Rc<Desired>>; 2],
    /// Of nf_tables, when we had last looked and written.
    generation: Option<u32>,
    /// Of the rules by nf_tables, the last time.
    refused: bool,
    /// What chains of others would not let us do.
    ways: Vec<String>,
    /// External addresses that no Service may have.
    guarded: Option<String>,
    /// Why UDP's old flows could not be looked at.
    flows: Option<String>,
    /// The last that were found: while the uplink is down nobody on it may become a client.
    default_interfaces: Set<String>,
    default_interfaces6: Set<String>,
    /// Of this host, but weft0's.
    addresses: Vec<IpAddr>,
    /// Whether there is something to be served by IPv6, and weft0 has an address for it.
    has_ipv6: bool,
}

impl Known {
    fn silent(&self) -> Option<&Iptables> {
        self.writes.as_ref().and_then(Writes::silent)
    }

    /// Resolves when somebody has changed tables that are silent.
    async fn changed(&self) {
        let Some(tables) = self.silent() else { return std::future::pending().await };
        while !tables.changed() {
            after(PEEK).await;
        }
    }
}

impl Rules {
    /// `listen` is weft0's address.
    ///
    /// # Errors
    /// When `listen` is no IPv4 address, or a configured interface's name cannot stand in a rule.
    pub fn new(
        orders: Reader<Orders>,
        listen: IpAddr,
        table: Reader<Table>,
        counters: Rc<ProxyCounters>,
        clock: Clock,
    ) -> Result<Self> {
        let IpAddr::V4(address) = listen else { bail!("{listen}: weft0 needs an IPv4 address") };
        orders.read(|o| may_stand_in_rules(&o.cfg))?;
        let (status, gate) = (Writer::new(Status::default()), Rc::default());
        Ok(Self { orders, address, table, counters, clock, status, gate })
    }

    #[must_use]
    pub fn status(&self) -> Reader<Status> {
        self.status.reader()
    }

    #[must_use]
    pub fn undo(&self) -> Undo {
        Undo(Rc::clone(&self.gate))
    }

    /// Syncs until [`Undo::undo`]; a failure is kept in the status and tried again.
    ///
    /// # Errors
    /// None: nothing here ends the process.
    pub async fn run(self) -> Result<()> {
        let mut known = Known::default();
        let mut ordered = self.orders.listen();
        let mut orders = self.orders.read(Clone::clone);
        let mut bell = (self.table.listen(), orders.udp.listen());
        let mut closing = self.gate.closing.listen();
        let mut ears = Ears::new();
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        let mut rng = fastrand::Rng::new();
        let mut last: Option<Instant> = None;
        while !self.gate.closed.get() {
            let mut wait = RECHECK;
            if self.table.read(Table::synced) {
                if let Some(last) = last.filter(|_| self.orders.read(|o| o.number) == orders.number) {
                    let gap = async {
                        Timer::at(last + GAP).await;
                    };
                    or(ordered.rung(), gap).await;
                }
                if self.orders.read(|o| o.number) != orders.number {
                    orders = self.orders.read(Clone::clone);
                    bell.1 = orders.udp.listen();
                }
                last = Some(self.clock.now());
                let heard = std::mem::take(&mut ears.heard) && nft::generation() != known.generation;
                if heard || known.silent().is_some_and(Iptables::changed) {
                    known.checked = None;
                }
                if self.sync(&mut known, &orders).await {
                    backoff.reset();
                    // What woke us in between must not put off the look at the rules.
                    let now = self.clock.now();
                    wait = known.checked.map_or(RECHECK, |at| (at + RECHECK).saturating_duration_since(now)).max(GAP);
                } else {
                    wait = backoff.delay(&mut rng);
                }
            }
            let change = or(rung(&mut bell), or(closing.rung(), or(ears.changed(), known.changed())));
            or(ordered.rung(), or(change, after(wait))).await;
            if last.is_some() && self.orders.read(|o| o.number) == orders.number {
                settle(&mut bell, &mut ears).await;
            }
        }
        std::future::pending().await
    }

    /// One sync of everything; true where the kernel is as we want it.
    async fn sync(&self, known: &mut Known, orders: &Orders) -> bool {
        if self.gate.closed.get() {
            return true;
        }
        self.gate.busy.set(true);
        let _busy = Busy(&self.gate);
        let mut status = self.status.update(|s| s.clone());
        status.notes.clear();
        let mut errors = Vec::new();
        let version = self.table.read(Table::version);
        if let Err(e) = self.sync_device(known, &mut status, orders) {
            errors.push(format!("{e:#}"));
        }
        // Without the device the rules would lead to an address that is not there.
        if status.device.is_empty() {
            log::debug!("rules: nothing is redirected without {DEVICE}");
        } else if let Err(e) = self.sync_rules(known, &mut status, orders).await {
            known.writes = None;
            known.checked = None;
            bump(&self.counters.rule_errors);
            errors.push(format!("{e:#}"));
        }
        let good = errors.is_empty();
        if good {
            (status.version, status.orders) = (Some(version), orders.number);
            status.good = Some(self.clock.now());
        }
        for error in errors.iter().filter(|e| !status.errors.contains(e)) {
            log::warn!("rules: {error}");
        }
        if good && !status.errors.is_empty() {
            log::info!("rules: all is well again");
        }
        status.errors = errors;
        if self.status.update(|s| std::mem::replace(s, status.clone())) != status {
            self.status.ring();
        }
        good
    }

    /// weft0, its addresses and its routes.
    fn sync_device(&self, known: &mut Known, status: &mut Status, orders: &Orders) -> Result<()> {
        let around = netlink::surroundings()?;
        for (known, found) in [
            (&mut known.default_interfaces, around.default_interfaces),
            (&mut known.default_interfaces6, around.default_interfaces6),
        ] {
            if !found.is_empty() {
                *known = found;
            }
        }
        known.addresses = around.addresses;
        let device = match netlink::ensure_device(self.address) {
            Ok(device) => device,
            Err(e) => {
                status.device.clear();
                return Err(e);
            }
        };
        if status.device != device.kind {
            log::info!("{DEVICE} is a {} with {}", device.kind, self.address);
        }
        status.device = device.kind;
        // A bridge without ports has no carrier. It is our own device: nobody else's setting is changed.
        for family in ["ipv4", "ipv6"] {
            let ignored = format!("/proc/sys/net/{family}/conf/{DEVICE}/ignore_routes_with_linkdown");
            if setting(&ignored).is_some_and(|v| v != "0") {
                std::fs::write(&ignored, "0").with_context(|| format!("{ignored} must be 0"))?;
            }
        }
        let of = |own| self.table.read(|t| rules::addresses_of(t, &orders.cfg, own, &orders.ports));
        let (mut vips, mut avoid) = of(self.address.into());
        let (vips6, avoid6) = of(ADDRESS6.into());
        known.has_ipv6 = !vips6.is_empty();
        status.notes = notes(known.has_ipv6);
        if known.has_ipv6 != around.has_own6
            && let Err(e) = netlink::set_address6(device.index, known.has_ipv6)
        {
            known.has_ipv6 = false;
            status.notes.push(format!("Services have no IPv6 here: {e:#}"));
        }
        if known.has_ipv6 {
            vips.extend(vips6);
            avoid.extend(avoid6);
        }
        avoid.extend(around.taken);
        let wanted = cover::cover(&vips, &avoid);
        let (added, removed) = netlink::sync_routes(device.index, &wanted.nets)?;
        if added + removed > 0 {
            let all: Vec<_> = wanted.nets.iter().map(ToString::to_string).collect();
            log::info!("routes to {DEVICE}: {} ({added} new, {removed} gone)", all.join(" "));
        }
        status.routes = wanted.nets.len();
        if wanted.left_out > 0 {
            let left_out = wanted.left_out;
            status.notes.push(format!("{left_out} virtual addresses are reached only while there is a default route"));
        }
        Ok(())
    }

    fn desired(&self, known: &Known, own: IpAddr, orders: &Orders) -> Result<Rc<Desired>> {
        let Orders { cfg, ports, udp, here, .. } = orders;
        let mut outside = known.default_interfaces.clone();
        if own.is_ipv6() {
            outside.extend(known.default_interfaces6.iter().cloned());
        }
        let catch = Catch::new(&cfg.interfaces, &outside).map_err(anyhow::Error::msg)?;
        let desired = udp.read(|udp| {
            self.table.read(|table| {
                let from = Sources { table, cfg, ports, udp, here, addresses: &known.addresses };
                Desired::new(&from, own, catch)
            })
        });
        Ok(Rc::new(desired))
    }

    async fn sync_rules(&self, known: &mut Known, status: &mut Status, orders: &Orders) -> Result<()> {
        let own: &[IpAddr] = &[self.address.into(), ADDRESS6.into()][..1 + usize::from(known.has_ipv6)];
        let mut desired = [Some(self.desired(known, own[0], orders)?), None];
        if let Some(own) = own.get(1) {
            desired[1] = Some(self.desired(known, *own, orders)?);
        }
        if let Some(Catch::Only(names) | Catch::AllBut(names)) = desired[0].as_ref().map(|d| &d.catch) {
            status.interfaces.clone_from(names);
        }
        let left_out: usize = desired.iter().flatten().map(|d| d.left_out).sum();
        if left_out > 0 {
            status.notes.push(format!("{left_out} ports of Services are beyond the bound of rules"));
        }
        let guarded = self.table.read(|t| rules::guarded(t, &orders.cfg));
        if let Some(note) = &guarded {
            if known.guarded.as_ref() != Some(note) {
                log::warn!("rules: {note}");
            }
            status.notes.push(note.clone());
        }
        known.guarded = guarded;
        let now = self.clock.now();
        let look = known.checked.is_none_or(|then| now.saturating_duration_since(then) >= RECHECK);
        let mut writes = match known.writes.take() {
            Some(writes) => writes,
            None => choose(orders.cfg.backend, known.refused).await?,
        };
        writes.name().clone_into(&mut status.backend);
        let mut synced = writes.sync(&desired, look).await;
        if let Err(e) = &synced
            && desired[1].take().is_some()
        {
            status.notes.push(format!("Services have no IPv6 here: {e:#}"));
            synced = writes.sync(&desired, look).await;
        }
        known.refused = synced.is_err() && matches!(writes, Writes::Nft(_));
        let synced = synced?;
        if look {
            known.checked = Some(now);
            let skip_iptables = matches!(writes, Writes::Iptables(_));
            known.ways = nft::open_ways(own, skip_iptables)?;
        }
        status.notes.extend(known.ways.iter().cloned());
        if synced.wrote {
            bump(&self.counters.rule_syncs);
            log::debug!("rules: {} in the kernel", synced.rules);
        }
        known.generation = synced.generation.or(known.generation);
        status.rules = synced.rules;
        known.writes = Some(writes);
        for (settled, desired) in known.settled.iter_mut().zip(desired) {
            let Some(desired) = desired else { continue };
            let ways = flows::changed(settled.as_deref(), &desired);
            if !ways.is_empty() {
                let done = conntrack::settle(&ways, desired.address).await;
                let why = |e| format!("UDP clients that never pause stay where they were: {e:#}");
                known.flows = done.map(|n| add(&self.counters.udp_flows_deleted, n as u64)).map_err(why).err();
            }
            *settled = Some(desired);
        }
        status.notes.extend(known.flows.clone());
        Ok(())
    }
}

/// # Errors
/// The name of an interface that cannot.
pub fn may_stand_in_rules(cfg: &ProxyConfig) -> Result<()> {
    Catch::new(&cfg.interfaces, &Set::new()).map(drop).map_err(|e| anyhow!("proxy.interfaces: {e}"))
}

/// nf_tables for choice. iptables where it is installed and its legacy tables are in use: those we could not see into,
/// and where the kernel has refused our tables.
async fn choose(backend: Backend, refused: bool) -> Result<Writes> {
    let nft = match backend {
        Backend::Nft => true,
        Backend::Iptables => false,
        Backend::Auto => !iptables::is_installed() || !(refused || iptables::has_legacy_tables()),
    };
    if nft {
        match Nft::open() {
            Err(e) if backend == Backend::Nft || !iptables::is_installed() => return Err(e),
            Err(e) => log::info!("rules: {e:#}; iptables is used"),
            Ok(nft) => return Ok(Writes::Nft(nft)),
        }
    }
    Iptables::new().await.map(Writes::Iptables)
}

async fn after(time: Duration) {
    Timer::after(time).await;
}

async fn rung((table, udp): &mut (Listener, Listener)) {
    or(table.rung(), udp.rung()).await;
}

/// Waits for a lull, at most for [`GAP`].
async fn settle(bell: &mut (Listener, Listener), ears: &mut Ears) {
    let lull = async {
        loop {
            let more = or(
                async {
                    or(rung(bell), ears.changed()).await;
                    true
                },
                async {
                    Timer::after(LULL).await;
                    false
                },
            );
            if !more.await {
                return;
            }
        }
    };
    or(lull, after(GAP)).await;
}

fn setting(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn notes(has_ipv6: bool) -> Vec<String> {
    let all = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];
    let off = |name: &&str| setting(&format!("/proc/sys/net/{name}")).is_some_and(|v| v == "0");
    let note = |name: &str| {
        let name = name.replace('/', ".");
        format!("net.{name} is 0: other machines time out on ports that no Service has")
    };
    all[..1 + usize::from(has_ipv6)].iter().filter(|name| off(name)).map(|name| note(name)).collect()
}

/// Removes all that is ours from the kernel, whatever made it. Says what it removed.
async fn remove_all() -> Result<Vec<String>> {
    let (mut done, mut errors) = iptables::remove().await;
    for removed in [nft::remove(), netlink::remove()] {
        match removed {
            Ok(what) => done.extend(what),
            Err(e) => errors.push(format!("{e:#}")),
        }
    }
    if errors.is_empty() { Ok(done) } else { Err(anyhow!("{}", errors.join("; "))) }
}

/// Removes what a killed agent left in the kernel; without one running. Says what it removed.
///
/// # Errors
/// When something is left behind; the text says what.
pub fn cleanup() -> Result<Vec<String>> {
    crate::reactor::block_on(remove_all())
}
