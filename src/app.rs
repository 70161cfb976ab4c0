//! The agent: the parts in the order in which they need each other, as named tasks of one executor; signals; the drain.

mod checks;
mod shown;

use crate::{
    admin::{Admin, Socket, Views, resolve},
    ca,
    clock::{BUILT, Clock},
    config::{Config, PodNames, StaticService},
    dns::{
        self, Resolver,
        answer::{Answerer, Outcome, Via},
        zone::Zone,
    },
    kube::{Manifests, Sources},
    metrics::{DnsCounters, ProxyCounters, TunnelCounters},
    netlink,
    proxy::{Proxy, rules::Ports, udp},
    rules::{self, Rules, Undo},
    shared::{Reader, Writer},
    snapshot::{self, Keeper, Leave, Pace, Restored},
    sys,
    table::{
        Table,
        balance::{Balancer, Here},
        model::Source,
        statics,
    },
    tasks::Tasks,
    tunnel::{self, identity::Bundle},
};
use anyhow::{Context, bail};
use async_signal::{Signal, Signals};
use futures_lite::{
    StreamExt,
    future::{or, pending},
};
use log::LevelFilter;
use shown::Shown;
use smol::{LocalExecutor, Timer};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

/// For what is said to peers and relays at the end.
const GOODBYE: Duration = Duration::from_millis(500);

/// What the command line gives to [`run`].
#[derive(Debug)]
pub struct Start {
    pub config: Config,
    /// Where it came from, for reloads.
    pub file: Option<PathBuf>,
    /// Wins over `[node] bundle`.
    pub bundle: Option<PathBuf>,
    /// Wins over `[node] log`.
    pub log: Option<LevelFilter>,
}

/// Runs until SIGTERM or SIGINT, or until a part fails; leaves nothing behind.
///
/// # Errors
/// When a part cannot start or has ended; the text names it.
pub fn run(start: Start) -> anyhow::Result<()> {
    let executor = Rc::new(LocalExecutor::new());
    smol::block_on(executor.run(agent(Rc::clone(&executor), start)))
}

/// Removes what a killed agent left in the kernel, and says what that was.
///
/// # Errors
/// When something is left.
pub fn cleanup() -> anyhow::Result<Vec<String>> {
    rules::cleanup()
}

async fn agent(executor: Rc<LocalExecutor<'static>>, start: Start) -> anyhow::Result<()> {
    // Before anything is changed in the kernel, so that a signal undoes it.
    let mut signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup]).context("signals")?;
    let config = &start.config;
    let found = snapshot::find(&config.node.state_dir);
    let clock = Clock::new(BUILT).remembering(found.unix());
    let bundle = start.bundle.as_deref().or(config.node.bundle.as_deref()).map(read_bundle).transpose()?;
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let node = checks::name(config, bundle.as_ref(), &host)?;
    checks::relay(config, bundle.as_ref())?;
    // Before any rule is looked at: a living agent's must not be taken for those of a dead one.
    let socket = Socket::bind(&config.admin.socket)?;
    log::info!("weft {} as node {node}", env!("CARGO_PKG_VERSION"));
    checks::warnings(config, bundle.as_ref(), clock.unix()).iter().for_each(|w| log::warn!("{w}"));

    let table = Rc::new(Writer::new(Table::default()));
    feed(&table, &config.services);
    let restored = found.restore(&table, &restorable(config), &node, bundle.as_ref().map(|b| b.ca.0));
    let mut wiring =
        Wiring { restored, tasks: Tasks::new(executor), config, bundle, node, table, clock, counts: Counts::default() };
    let started = wiring.parts(socket);
    let Wiring { mut tasks, table, .. } = wiring;
    let Parts { undo, tunnel, leave } = match started {
        Ok(parts) => parts,
        Err(why) => {
            tasks.stop_all_but(&[]).await;
            if wants_kernel(config) {
                let _ = rules::cleanup().map_err(|left| log::warn!("{left:#}"));
            }
            return Err(why);
        }
    };

    let ended = loop {
        let signal = async { Ok(signals.next().await) };
        match or(signal, async { Err(tasks.ended().await) }).await {
            Ok(Some(Ok(Signal::Hup))) => reload(&start, &table),
            Ok(Some(Ok(signal))) => {
                log::info!("{signal:?}: leaving");
                break Ok(());
            }
            Ok(Some(Err(_)) | None) => break Err(anyhow::anyhow!("signals can no longer be received")),
            Err((name, why)) => break Err(why.context(format!("{name} has ended"))),
        }
    };
    let impatience = async {
        while let Some(signal) = signals.next().await {
            if !matches!(signal, Ok(Signal::Hup)) {
                bail!("a second signal: left in haste; `weft cleanup` removes what is still in the kernel");
            }
        }
        pending().await
    };
    let drained = or(drain(tasks, undo, tunnel, leave), impatience).await;
    ended.and(drained)
}

/// Connections end while their packets still find the way back; then a word to peers and relays; then the rules.
async fn drain(
    mut tasks: Tasks,
    undo: Option<Undo>,
    tunnel: Option<tunnel::Handle>,
    leave: Rc<Leave>,
) -> anyhow::Result<()> {
    tasks.stop_all_but(&["rules", "tunnel", "snapshot"]).await;
    leave.finish().await;
    if let Some(tunnel) = tunnel {
        let patience = async {
            Timer::after(GOODBYE).await;
        };
        or(tunnel.close(), patience).await;
    }
    // While the rules' own task still runs: a sync under way comes to its end.
    let undone = match undo {
        Some(undo) => undo.undo().await.map(|done| done.iter().for_each(|what| log::info!("removed {what}"))),
        None => Ok(()),
    };
    tasks.stop_all_but(&[]).await;
    undone
}

/// Takes over what can be changed while running, and says what cannot.
fn reload(start: &Start, table: &Writer<Table>) {
    let Some(file) = &start.file else { return log::warn!("reload: there is no --config to read again") };
    let new = match Config::load(file) {
        Ok(new) => new,
        Err(why) => return log::error!("reload: {why}; all stays as it is"),
    };
    log::set_max_level(start.log.unwrap_or(new.node.log));
    feed(table, &new.services);
    if checks::reloads(&start.config, &new) {
        log::info!("reload: {} services of the configuration", new.services.len());
    } else {
        log::warn!("reload: [[service]] and node.log are taken over; what else has changed needs a restart");
    }
}

/// `[[service]]` is one complete list.
fn feed(table: &Writer<Table>, services: &[StaticService]) {
    table.update(|t| {
        for change in statics::changes(services) {
            t.apply(change);
        }
    });
    table.ring();
}

/// The sources whose last known state counts until they speak themselves.
fn restorable(config: &Config) -> Vec<Source> {
    (!config.kube.manifests.is_empty()).then_some(Source::Manifests).into_iter().collect()
}

fn read_bundle(path: &Path) -> anyhow::Result<Bundle> {
    let mode = fs::metadata(path).with_context(|| format!("bundle {}", path.display()))?.mode();
    if mode & 0o077 != 0 {
        log::warn!("{0} is a secret and others may read it: chmod 600 {0}", path.display());
    }
    ca::read_bundle(path).context("bundle")
}

/// Whether weft0 and rules are wanted.
fn wants_kernel(config: &Config) -> bool {
    config.dns.enable || config.proxy.enable
}

#[derive(Default)]
struct Counts {
    dns: Rc<DnsCounters>,
    proxy: Rc<ProxyCounters>,
    tunnel: Rc<TunnelCounters>,
}

/// What the end of the process has to do.
struct Parts {
    undo: Option<Undo>,
    tunnel: Option<tunnel::Handle>,
    leave: Rc<Leave>,
}

/// What the parts are made from.
struct Wiring<'c> {
    tasks: Tasks,
    config: &'c Config,
    bundle: Option<Bundle>,
    node: String,
    table: Rc<Writer<Table>>,
    clock: Clock,
    counts: Counts,
    /// What the snapshot held.
    restored: Restored,
}

impl Wiring<'_> {
    /// Each part in the order in which they need each other.
    fn parts(&mut self, socket: Socket) -> anyhow::Result<Parts> {
        if let Err(why) = sys::raise_nofile() {
            log::warn!("the limit of open files stays as it is: {why}");
        }
        self.weft0()?;
        let manifests = self.manifests();
        let (resolver, dns_port) = self.dns()?;
        let tunnel = self.tunnel(resolver)?;
        let handle = tunnel.as_ref().map(|(_, handle)| handle.clone());
        let (proxy_port, udp) = self.proxy(handle.clone())?.unzip();
        let (undo, rules) = self.rules(dns_port, proxy_port, udp)?.unzip();
        let (leave, kept) = self.snapshot(handle.clone())?;
        let shown = Shown {
            kept,
            config: self.config.clone(),
            bundle: self.bundle.as_ref().map(|b| Bundle { key: None, psks: Vec::new(), ..b.clone() }),
            clock: self.clock,
            table: self.table.reader(),
            manifests,
            dns_port,
            proxy_port,
            rules,
            tunnel,
        };
        self.admin(socket, shown)?;
        Ok(Parts { undo, tunnel: handle, leave })
    }

    fn weft0(&self) -> anyhow::Result<()> {
        if !wants_kernel(self.config) {
            return Ok(());
        }
        // What a killed agent left would send packets to ports that nobody listens on.
        for what in rules::cleanup().context("what an agent before us left in the kernel")? {
            log::info!("removed {what}, left by an agent before us");
        }
        let IpAddr::V4(ip) = self.config.dns.listen.ip() else { bail!("dns.listen: weft0 needs an IPv4 address") };
        netlink::ensure_device(ip)?;
        Ok(())
    }

    fn manifests(&mut self) -> Sources {
        let (files, dns) = (&self.config.kube.manifests, &self.config.dns);
        let manifests = Manifests::new(files, Rc::clone(&self.table), self.clock)
            .with_pod_names(dns.enable && dns.endpoint_pod_names)
            .with_pods(dns.enable && dns.pods == PodNames::Verified);
        let sources = manifests.sources();
        self.tasks.spawn("manifests", manifests.run());
        sources
    }

    /// Also without DNS: the tunnel looks up its relays.
    fn dns(&mut self) -> anyhow::Result<(Resolver, Option<u16>)> {
        let Config { dns: cfg, proxy, .. } = self.config;
        let setup = dns::Setup {
            counters: Rc::clone(&self.counts.dns),
            clock: self.clock,
            mark: proxy.mark,
            interfaces: proxy.interfaces.clone(),
        };
        if !cfg.enable {
            let forwarder = dns::Forwarder::new(cfg, &setup);
            let resolver = forwarder.resolver();
            self.tasks.spawn("resolver", forwarder.run());
            return Ok((resolver, None));
        }
        let server = dns::Server::bind(cfg, self.table.reader(), self.here(), &setup)?;
        let (resolver, port) = (server.resolver(), server.port());
        self.tasks.spawn("dns", server.run());
        Ok((resolver, Some(port)))
    }

    fn here(&self) -> Here {
        Here {
            node: self.node.as_str().into(),
            network: checks::network(self.config, self.bundle.as_ref()).into(),
            zone: self.config.node.zone.as_str().into(),
            neighbours: BTreeSet::new(),
        }
    }

    fn tunnel(&mut self, resolver: Resolver) -> anyhow::Result<Option<(SocketAddr, tunnel::Handle)>> {
        let Some(bundle) = self.bundle.clone().filter(|_| self.config.tunnel.enable) else { return Ok(None) };
        let setup = tunnel::Setup {
            name: self.node.clone(),
            bundle,
            key: None,
            is_relay: self.config.relay.enable,
            relay_limits: self.config.relay.limits,
            mark: self.config.proxy.mark,
            lookup: Rc::new(move |host| {
                let resolver = resolver.clone();
                Box::pin(async move { resolver.lookup(&host).await })
            }),
            clock: self.clock,
            counters: Rc::clone(&self.counts.tunnel),
            remembered: std::mem::take(&mut self.restored.peers),
        };
        let (driver, handle) = tunnel::Driver::bind(&self.config.tunnel, setup)?;
        let at = driver.local_addr()?;
        log::info!("tunnel on UDP {at}");
        self.tasks.spawn("tunnel", driver.run());
        Ok(Some((at, handle)))
    }

    fn proxy(&mut self, tunnel: Option<tunnel::Handle>) -> anyhow::Result<Option<(u16, Reader<udp::Ports>)>> {
        let Config { dns, proxy, balancer, .. } = self.config;
        if !proxy.enable {
            return Ok(None);
        }
        let here = self.here();
        let balancer = Balancer::new(balancer.default, fastrand::Rng::new());
        let (table, counters) = (self.table.reader(), Rc::clone(&self.counts.proxy));
        let proxy = Proxy::bind(proxy, dns.listen.ip(), here, balancer, table, tunnel, counters, self.clock)?;
        let ports = (proxy.port(), proxy.udp_ports());
        self.tasks.spawn("proxy", proxy.run());
        Ok(Some(ports))
    }

    fn snapshot(&mut self, tunnel: Option<tunnel::Handle>) -> anyhow::Result<(Rc<Leave>, Reader<snapshot::Status>)> {
        let setup = snapshot::Setup {
            directory: self.config.node.state_dir.clone(),
            node: self.node.clone(),
            cluster: self.bundle.as_ref().map(|b| b.ca.0),
            table: self.table.reader(),
            tunnel,
            clock: self.clock,
            pace: Pace::default(),
        };
        let keeper = Keeper::new(setup, &self.restored)?;
        let (leave, kept) = (keeper.leave(), keeper.status());
        self.tasks.spawn("snapshot", keeper.run());
        Ok((leave, kept))
    }

    fn rules(
        &mut self,
        dns_port: Option<u16>,
        proxy_port: Option<u16>,
        udp: Option<Reader<udp::Ports>>,
    ) -> anyhow::Result<Option<(Undo, Reader<rules::Status>)>> {
        if !wants_kernel(self.config) {
            return Ok(None);
        }
        let Config { dns, proxy, .. } = self.config;
        let dns_ports = dns_port.map(|port| (dns.listen.port(), port));
        let ports = Ports { proxy: proxy_port, dns: dns_ports, take_over: dns.take_over.clone() };
        let (table, counters) = (self.table.reader(), Rc::clone(&self.counts.proxy));
        let udp = udp.unwrap_or_else(|| Writer::new(udp::Ports::new()).reader());
        let rules = Rules::new(proxy, dns.listen.ip(), ports, table, udp, counters, self.clock)?;
        let shared = (rules.undo(), rules.status());
        self.tasks.spawn("rules", rules.run());
        Ok(Some(shared))
    }

    fn admin(&mut self, socket: Socket, shown: Shown) -> anyhow::Result<()> {
        let serial = u32::try_from(self.clock.unix()).unwrap_or(u32::MAX);
        let answerer = RefCell::new(Answerer::new(Zone::new(&self.config.dns, serial)?));
        let (domain, table) = (self.config.dns.domain.clone(), self.table.reader());
        let resolve = move |name: &str| {
            resolve::resolve(name, &domain, |query| {
                let mut reply = Vec::new();
                let outcome = table.read(|t| answerer.borrow_mut().reply(query, Via::Tcp, t, &mut reply));
                match outcome {
                    // Of a chase: the CNAME that leads out of the cluster.
                    Outcome::Reply | Outcome::Reject | Outcome::Chase(_) => resolve::Exchange::Reply(reply),
                    Outcome::Forward | Outcome::Drop => resolve::Exchange::Foreign,
                }
            })
        };
        let shown = Rc::new(shown);
        let (parts, sources, warnings) = (Rc::clone(&shown), Rc::clone(&shown), Rc::clone(&shown));
        let views = Views {
            node: self.node.clone(),
            clock: self.clock,
            table: self.table.reader(),
            tunnel: shown.tunnel.as_ref().map(|(_, handle)| handle.clone()),
            dns_counters: Some(Rc::clone(&self.counts.dns)),
            proxy_counters: Some(Rc::clone(&self.counts.proxy)),
            tunnel_counters: Some(Rc::clone(&self.counts.tunnel)),
            sources: Box::new(move || sources.sources()),
            parts: Box::new(move || parts.parts()),
            warnings: Box::new(move || warnings.warnings()),
            resolve: Box::new(resolve),
        };
        self.tasks.spawn("admin", Admin::new(socket, views).run());
        Ok(())
    }
}
