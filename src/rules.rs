//! Keeps the kernel as the table wants it: weft0 with its address and routes, and the rules. Puts back
//! what somebody took away, and takes all of it away at the end.

use crate::{
    backoff::Backoff,
    clock::Clock,
    config::ProxyConfig,
    exec,
    metrics::{ProxyCounters, bump},
    netlink::{self, Monitor},
    proxy::{
        cover,
        iptables::{self, Saved},
        rules::{self, Catch, DEVICE, Desired, Ports},
    },
    shared::{Bell, Listener, Reader, Writer},
    table::Table,
};
use anyhow::{Context, Result, anyhow, bail};
use futures_lite::future::or;
use smol::Timer;
use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
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
/// Seconds that iptables waits for its lock.
const LOCK_WAIT: &str = "5";

/// What `weft status` shows of the kernel's side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// "dummy" or "bridge"; empty: there is no weft0.
    pub device: String,
    /// What iptables-restore says of itself.
    pub backend: String,
    /// Interfaces whose packets are not caught, or, where the config names some, those that are.
    pub interfaces: Vec<String>,
    pub rules: usize,
    pub routes: usize,
    /// The state of the table that is in the kernel; None: nothing is yet.
    pub version: Option<u64>,
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
    /// Stops the syncs for good, waits for one under way, then removes all that is ours.
    ///
    /// # Errors
    /// When something is left behind; the text says what.
    pub async fn undo(&self) -> Result<Vec<String>> {
        self.0.closed.set(true);
        let mut listener = self.0.idle.listen();
        self.0.closing.ring();
        let idle = async {
            while self.0.busy.get() {
                listener.rung().await;
            }
        };
        or(idle, after(UNDO_PATIENCE)).await;
        remove_all().await
    }
}

/// The driver; see the module.
#[derive(Debug)]
pub struct Rules {
    cfg: ProxyConfig,
    address: Ipv4Addr,
    ports: Ports,
    table: Reader<Table>,
    counters: Rc<ProxyCounters>,
    clock: Clock,
    status: Writer<Status>,
    gate: Rc<Gate>,
}

/// What we know of the kernel from the last sync.
#[derive(Debug, Default)]
struct Known {
    tools: Option<Tools>,
    applied: Option<Desired>,
    digest: u64,
    checked: Option<Instant>,
    /// The tables that were not there before us.
    made: Vec<iptables::Kind>,
    /// The last that were found: while the uplink is down nobody on it may become a client.
    default_interfaces: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Tools {
    restore: PathBuf,
    save: PathBuf,
    /// What it says of itself.
    version: String,
    wait: bool,
}

impl Rules {
    /// `listen` is weft0's address, `ports` where our parts listen on it.
    ///
    /// # Errors
    /// When `listen` is no IPv4 address, or a configured interface's name cannot stand in a rule.
    pub fn new(
        cfg: &ProxyConfig,
        listen: IpAddr,
        ports: Ports,
        table: Reader<Table>,
        counters: Rc<ProxyCounters>,
        clock: Clock,
    ) -> Result<Self> {
        let IpAddr::V4(address) = listen else { bail!("{listen}: weft0 needs an IPv4 address") };
        Catch::new(&cfg.interfaces, &BTreeSet::new()).map_err(|e| anyhow!("proxy.interfaces: {e}"))?;
        let (status, gate) = (Writer::new(Status::default()), Rc::default());
        Ok(Self { cfg: cfg.clone(), address, ports, table, counters, clock, status, gate })
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
        let mut bell = self.table.listen();
        let mut closing = self.gate.closing.listen();
        let mut monitor = Monitor::open().map_err(|e| log::warn!("{e:#}")).ok();
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        let mut rng = fastrand::Rng::new();
        let mut last: Option<Instant> = None;
        while !self.gate.closed.get() {
            let mut wait = RECHECK;
            if self.table.read(Table::synced) {
                if let Some(last) = last {
                    Timer::at(last + GAP).await;
                }
                last = Some(self.clock.now());
                if self.sync(&mut known).await {
                    backoff.reset();
                    // What woke us in between must not put off the look at the rules.
                    let now = self.clock.now();
                    wait = known.checked.map_or(RECHECK, |at| (at + RECHECK).saturating_duration_since(now)).max(GAP);
                } else {
                    wait = backoff.delay(&mut rng);
                }
            }
            let change = or(bell.rung(), or(closing.rung(), changed(&mut monitor)));
            or(change, after(wait)).await;
            if last.is_some() {
                settle(&mut bell, &mut monitor).await;
            }
        }
        std::future::pending().await
    }

    /// One sync of everything; true where the kernel is as we want it.
    async fn sync(&self, known: &mut Known) -> bool {
        if self.gate.closed.get() {
            return true;
        }
        self.gate.busy.set(true);
        let _busy = Busy(&self.gate);
        let mut status = self.status.update(|s| s.clone());
        status.notes.clear();
        let mut errors = Vec::new();
        let version = self.table.read(Table::version);
        if let Err(e) = self.sync_device(known, &mut status) {
            errors.push(format!("{e:#}"));
        }
        // Without the device the rules would lead to an address that is not there.
        if status.device.is_empty() {
            log::debug!("rules: nothing is redirected without {DEVICE}");
        } else if let Err(e) = self.sync_rules(known, &mut status).await {
            known.applied = None;
            known.tools = None;
            bump(&self.counters.rule_errors);
            errors.push(format!("{e:#}"));
        }
        let good = errors.is_empty();
        if good {
            status.version = Some(version);
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
    fn sync_device(&self, known: &mut Known, status: &mut Status) -> Result<()> {
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
        let wanted = if self.ports.proxy.is_some() || self.ports.take_over.is_some() {
            let of = |t: &Table| rules::addresses_of(t, &self.cfg, self.address, &self.ports);
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

    async fn sync_rules(&self, known: &mut Known, status: &mut Status) -> Result<()> {
        let catch = Catch::new(&self.cfg.interfaces, &known.default_interfaces).map_err(anyhow::Error::msg)?;
        let (Catch::Only(names) | Catch::AllBut(names)) = &catch;
        status.interfaces.clone_from(names);
        let desired = self.table.read(|t| Desired::new(t, &self.cfg, self.address, &self.ports, catch));
        if desired.left_out > 0 {
            status.notes.push(format!("{} ports of Services are beyond the bound of rules", desired.left_out));
        }
        let now = self.clock.now();
        let due = known.checked.is_none_or(|then| now.saturating_duration_since(then) >= RECHECK);
        if known.applied.as_ref() == Some(&desired) && !due {
            return Ok(());
        }
        if known.tools.is_none() {
            known.tools = Some(Tools::new("iptables").await?);
        }
        let Some(tools) = &known.tools else { bail!("no iptables") };
        status.backend.clone_from(&tools.version);
        let saved = tools.save().await?;
        known.checked = Some(now);
        if known.applied.as_ref() == Some(&desired) && saved.digest() == known.digest {
            return Ok(());
        }
        if known.applied.is_some() && saved.digest() != known.digest {
            log::warn!("rules: somebody has changed or flushed ours; they are put back");
        }
        known.applied = None;
        let made: Vec<_> = iptables::made(&saved).filter(|kind| !known.made.contains(kind)).collect();
        known.made.extend(made);
        tools.restore(&iptables::apply(&desired, &saved, &known.made)).await?;
        bump(&self.counters.rule_syncs);
        let saved = tools.save().await?;
        known.digest = saved.digest();
        status.rules = saved.counts().1;
        log::debug!("rules: {} in the kernel", status.rules);
        known.applied = Some(desired);
        Ok(())
    }
}

async fn after(time: Duration) {
    Timer::after(time).await;
}

/// Resolves at the next change of devices, addresses or routes; never where we cannot hear of them.
async fn changed(monitor: &mut Option<Monitor>) {
    if let Some(open) = monitor {
        match open.changed().await {
            Ok(()) => return,
            Err(e) => log::warn!("changes of the network are seen only each {} s: {e}", RECHECK.as_secs()),
        }
    }
    *monitor = None;
    std::future::pending().await
}

/// Waits for a lull, at most for [`GAP`].
async fn settle(bell: &mut Listener, monitor: &mut Option<Monitor>) {
    let lull = async {
        loop {
            let more = or(
                async {
                    or(bell.rung(), changed(monitor)).await;
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

/// The words of `iptables-restore v1.8.9 (nf_tables)`; a number that is missing counts as 0.
fn version_of(line: &str) -> Option<[u16; 3]> {
    let text = line.split(' ').find_map(|word| word.strip_prefix('v'))?;
    let mut numbers = text.split('.').map(|n| n.parse().unwrap_or(0));
    Some([numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0)])
}

impl Tools {
    /// `family` is "iptables", or one of its variants.
    async fn new(family: &str) -> Result<Self> {
        let find = |what: &str| {
            let name = format!("{family}-{what}");
            exec::find(&name).with_context(|| format!("{name} is not installed (the package is called iptables)"))
        };
        let (restore, save) = (find("restore")?, find("save")?);
        let mut version = String::new();
        let mut first = |line: &str| {
            if version.is_empty() {
                line.clone_into(&mut version);
            }
        };
        exec::run(&restore, &["--version"], "", &mut first).await?;
        // Since 1.6.2 iptables-restore waits for the lock where it is told to.
        let wait = version_of(&version).is_some_and(|v| v >= [1, 6, 2]);
        Ok(Self { restore, save, version, wait })
    }

    fn nft(&self) -> bool {
        self.version.contains("nf_tables")
    }

    async fn save(&self) -> Result<Saved> {
        let mut saved = Saved::default();
        exec::run(&self.save, &[], "", |line| saved.line(line)).await?;
        Ok(saved)
    }

    async fn restore(&self, text: &str) -> Result<()> {
        let args: &[&str] = if self.wait { &["--noflush", "-w", LOCK_WAIT] } else { &["--noflush"] };
        exec::run(&self.restore, args, text, |_| ()).await
    }

    /// Takes our rules away; None: there were none.
    async fn undo(&self) -> Result<Option<String>> {
        let saved = self.save().await?;
        let Some(text) = iptables::undo(&saved) else { return Ok(None) };
        let remains = iptables::remains(&saved);
        self.restore(&text).await?;
        if self.nft() {
            for part in remains {
                // Somebody may have begun to use it: then it stays, and is theirs.
                if let Err(e) = self.restore(&part.text).await {
                    log::debug!("table {}: {e:#}", part.table);
                }
                if let Err(e) = netlink::remove_empty_table(part.table) {
                    log::debug!("table {}: {e:#}", part.table);
                }
            }
        }
        let (chains, rules) = saved.counts();
        Ok(Some(format!("{chains} chains and {rules} rules ({})", self.version)))
    }
}

/// Removes all that is ours from the kernel, whatever made it. Says what it removed.
async fn remove_all() -> Result<Vec<String>> {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    let mut seen: Vec<(PathBuf, bool)> = Vec::new();
    for family in ["iptables", "iptables-nft", "iptables-legacy"] {
        // Each variant has tables of its own; the default one is one of them under a second name.
        let Ok(tools) = Tools::new(family).await else { continue };
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let id = (real(&tools.restore), tools.nft());
        if seen.contains(&id) {
            continue;
        }
        seen.push(id);
        match tools.undo().await {
            Ok(what) => done.extend(what),
            Err(e) => errors.push(format!("{e:#}")),
        }
    }
    match netlink::remove() {
        Ok(what) => done.extend(what),
        Err(e) => errors.push(format!("{e:#}")),
    }
    if errors.is_empty() { Ok(done) } else { Err(anyhow!("{}", errors.join("; "))) }
}

/// Removes what a killed agent left in the kernel; without one running. Says what it removed.
///
/// # Errors
/// When something is left behind; the text says what.
pub fn cleanup() -> Result<Vec<String>> {
    smol::block_on(remove_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named() {
        let missing = smol::block_on(Tools::new("no-such-tables")).unwrap_err();
        assert!(missing.to_string().starts_with("no-such-tables-restore is not installed"), "{missing}");
    }

    #[test]
    fn versions() {
        assert_eq!(version_of("iptables-restore v1.8.9 (nf_tables)"), Some([1, 8, 9]));
        assert_eq!(version_of("iptables-restore v1.6"), Some([1, 6, 0]));
        assert_eq!(version_of("busybox"), None);
    }
}
