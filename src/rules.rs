//! Keeps the kernel as the table wants it: weft0 with its address and routes, and the rules. Puts back
//! what somebody took away, and takes all of it away at the end.

use crate::sorted::Set;
use crate::{
    backoff::Backoff,
    clock::Clock,
    config::{Backend, ProxyConfig},
    conntrack,
    iptables::{self, Iptables},
    metrics::{ProxyCounters, add, bump},
    netlink::{self, Monitor},
    nft::{self, Nft},
    proxy::{
        cover, flows,
        rules::{self, Catch, DEVICE, Desired, Ports},
        udp,
    },
    reactor::Timer,
    shared::{Bell, Listener, Reader, Writer},
    table::Table,
};
use anyhow::{Context, Result, anyhow, bail};
use futures_lite::future::or;
use std::{
    cell::Cell,
    io,
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    time::{Duration, Instant},
};

/// Quiet after a change before it is acted on: a rollout changes many Services within milliseconds.
const LULL: Duration = Duration::from_millis(50);
/// The least time between two syncs, and so the most that churn can put one off.
const GAP: Duration = Duration::from_secs(1);
/// How often we look whether somebody flushed our rules: a firewall's reload tells nobody.
const RECHECK: Duration = Duration::from_secs(30);
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
}

/// Who writes the rules.
#[derive(Debug)]
enum Writes {
    Iptables(Iptables),
    Nft(Nft),
}

/// What we know of the kernel from the last sync.
#[derive(Debug, Default)]
struct Known {
    writes: Option<Writes>,
    checked: Option<Instant>,
    /// What conntrack's entries were held against.
    settled: Option<Desired>,
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
                if std::mem::take(&mut ears.heard) && nft::generation() != known.generation {
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
            let change = or(rung(&mut bell), or(closing.rung(), ears.changed()));
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

    /// weft0, its address and its routes.
    fn sync_device(&self, known: &mut Known, status: &mut Status, orders: &Orders) -> Result<()> {
        let around = netlink::surroundings()?;
        if !around.default_interfaces.is_empty() {
            known.default_interfaces = around.default_interfaces;
        }
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
        let ignored = format!("/proc/sys/net/ipv4/conf/{DEVICE}/ignore_routes_with_linkdown");
        if setting(&ignored).is_some_and(|v| v != "0") {
            std::fs::write(&ignored, "0").with_context(|| format!("{ignored} must be 0"))?;
        }
        let wanted = if orders.ports.proxy.is_some() || orders.ports.take_over.is_some() {
            let of = |t: &Table| rules::addresses_of(t, &orders.cfg, self.address, &orders.ports);
            let (vips, mut avoid) = self.table.read(of);
            avoid.extend(around.taken);
            cover::cover(&vips, &avoid)
        } else {
            cover::Cover::default()
        };
        let (added, removed) = netlink::sync_routes(device.index, &wanted.prefixes)?;
        if added + removed > 0 {
            let all: Vec<_> = wanted.prefixes.iter().map(ToString::to_string).collect();
            log::info!("routes to {DEVICE}: {} ({added} new, {removed} gone)", all.join(" "));
        }
        status.routes = wanted.prefixes.len();
        status.notes = notes(wanted.left_out);
        Ok(())
    }

    async fn sync_rules(&self, known: &mut Known, status: &mut Status, orders: &Orders) -> Result<()> {
        let catch = Catch::new(&orders.cfg.interfaces, &known.default_interfaces).map_err(anyhow::Error::msg)?;
        let (Catch::Only(names) | Catch::AllBut(names)) = &catch;
        status.interfaces.clone_from(names);
        let Orders { cfg, ports, udp, .. } = orders;
        let desired = udp.read(|udp| self.table.read(|t| Desired::new(t, cfg, self.address, ports, udp, catch)));
        if desired.left_out > 0 {
            status.notes.push(format!("{} ports of Services are beyond the bound of rules", desired.left_out));
        }
        let guarded = self.table.read(|t| rules::guarded(t, cfg));
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
        let synced = match &mut writes {
            Writes::Iptables(iptables) => {
                iptables.version().clone_into(&mut status.backend);
                iptables.sync(&desired, look).await?
            }
            Writes::Nft(nft) => {
                "nf_tables".clone_into(&mut status.backend);
                let synced = nft.sync(&desired, look);
                known.refused = synced.is_err();
                synced?
            }
        };
        if look {
            known.checked = Some(now);
            let skip_iptables = matches!(writes, Writes::Iptables(_));
            known.ways = nft::open_ways(self.address.into(), skip_iptables)?;
        }
        status.notes.extend(known.ways.iter().cloned());
        if synced.wrote {
            bump(&self.counters.rule_syncs);
            log::debug!("rules: {} in the kernel", synced.rules);
        }
        if look || synced.wrote {
            known.generation = nft::generation();
        }
        status.rules = synced.rules;
        known.writes = Some(writes);
        let ways = flows::changed(known.settled.as_ref(), &desired);
        if !ways.is_empty() {
            let settled = conntrack::settle(&ways, desired.address).await;
            let why = |e| format!("UDP clients that never pause stay where they were: {e:#}");
            known.flows = settled.map(|n| add(&self.counters.udp_flows_deleted, n as u64)).map_err(why).err();
        }
        status.notes.extend(known.flows.clone());
        known.settled = Some(desired);
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

/// What tells us of changes that others make.
#[derive(Debug)]
struct Ears {
    links: Option<Monitor>,
    tables: Option<nft::Monitor>,
    /// Something was heard about tables of nf_tables.
    heard: bool,
}

impl Ears {
    fn new() -> Self {
        let links = Monitor::open().map_err(|e| log::warn!("{e:#}")).ok();
        // Kernels without nf_tables, and users without rights: the look each 30 s is enough.
        let tables = nft::Monitor::open().map_err(|e| log::debug!("{e:#}")).ok();
        Self { links, tables, heard: false }
    }

    /// Resolves at the next change; never where we cannot hear of them.
    async fn changed(&mut self) {
        let Self { links, tables, heard } = self;
        or(
            listen(links, async |m: &Monitor| m.changed().await),
            listen(tables, async |m: &nft::Monitor| m.changed().await.map(|()| *heard = true)),
        )
        .await;
    }
}

async fn listen<M>(monitor: &mut Option<M>, changed: impl AsyncFnOnce(&M) -> io::Result<()>) {
    if let Some(open) = monitor {
        match changed(open).await {
            Ok(()) => return,
            Err(e) => log::warn!("changes of the network are seen only each {} s: {e}", RECHECK.as_secs()),
        }
    }
    *monitor = None;
    std::future::pending().await
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

fn notes(left_out: usize) -> Vec<String> {
    let mut notes = Vec::new();
    if setting("/proc/sys/net/ipv4/ip_forward").is_some_and(|v| v == "0") {
        notes.push("net.ipv4.ip_forward is 0: other machines time out on ports that no Service has".to_owned());
    }
    if left_out > 0 {
        notes.push(format!("{left_out} virtual addresses are reached only while there is a default route"));
    }
    notes
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
