//! The agent: the parts in the order in which they need each other, as named tasks of one executor; signals; the drain.

use crate::{
    admin::{Admin, Views, resolve, view},
    ca,
    clock::{BUILT, Clock},
    config::{Config, StaticService},
    dns::{
        self,
        answer::{Answerer, Outcome, Via},
        zone::Zone,
    },
    kube::{Manifests, SourceStatus, Sources},
    metrics::{DnsCounters, ProxyCounters, TunnelCounters},
    netlink,
    proxy::{Proxy, rules::Ports},
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
    tunnel::{
        self,
        identity::{Bundle, NAME_RULE, Roles, node_name, utc},
    },
};
use anyhow::{Context, bail, ensure};
use async_signal::{Signal, Signals};
use futures_lite::{FutureExt, StreamExt, future::or};
use log::LevelFilter;
use smol::{LocalExecutor, Task, Timer};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    future::poll_fn,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
    task::Poll,
    time::Duration,
};

/// A certificate that ends sooner is warned of.
const RENEW_SECS: u64 = 30 * 86_400;
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

/// Runs until SIGTERM or SIGINT, or until a part fails.
///
/// # Errors
/// When a part cannot start or has ended; the text names it.
pub fn run(start: Start) -> anyhow::Result<()> {
    let executor = Rc::new(LocalExecutor::new());
    smol::block_on(executor.run(agent(Rc::clone(&executor), start)))
}

async fn agent(executor: Rc<LocalExecutor<'static>>, start: Start) -> anyhow::Result<()> {
    // Before anything is changed in the kernel, so that a signal undoes it.
    let mut signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup]).context("signals")?;
    let config = &start.config;
    let found = snapshot::find(&config.node.state_dir);
    let clock = Clock::new(BUILT).remembering(found.unix());
    let bundle = start.bundle.as_deref().or(config.node.bundle.as_deref()).map(read_bundle).transpose()?;
    let node = name(config, bundle.as_ref())?;
    let warnings = warnings(config, bundle.as_ref(), clock.unix());
    log::info!("weft {} as node {node}", env!("CARGO_PKG_VERSION"));
    warnings.iter().for_each(|w| log::warn!("{w}"));

    let table = Rc::new(Writer::new(Table::default()));
    feed(&table, &config.services);
    let restored = found.restore(&table, &sources(config), &node, bundle.as_ref().map(|b| b.ca.0));
    let known = Known { node, clock, warnings, restored };
    let mut tasks = Tasks::new(executor);
    let Parts { undo, tunnel, leave } = parts(&mut tasks, config, bundle, &table, known)?;

    let ended = loop {
        let signal = async { Ok(signals.next().await) };
        match or(signal, async { Err(tasks.ended().await) }).await {
            Ok(Some(Ok(Signal::Hup))) => reload(&start, &table),
            Ok(Some(Ok(signal))) => {
                log::info!("{signal:?}: leaving");
                break Ok(());
            }
            Ok(Some(Err(_)) | None) => break Err(anyhow::anyhow!("signals can no longer be received")),
            Err((name, result)) => {
                let why = result.err().unwrap_or_else(|| anyhow::anyhow!("it should run for ever"));
                break Err(why.context(format!("{name} has ended")));
            }
        }
    };
    leave.finish().await;
    if let Some(tunnel) = tunnel {
        or(tunnel.close(), after(GOODBYE)).await;
    }
    tasks.stop().await;
    let undone = match undo {
        Some(undo) => undo.undo().await.map(|done| done.iter().for_each(|what| log::info!("{what}"))),
        None => Ok(()),
    };
    ended.and(undone)
}

/// What the end of the process has to do.
struct Parts {
    undo: Option<Undo>,
    tunnel: Option<tunnel::Handle>,
    leave: Rc<Leave>,
}

/// What is known before any part runs.
struct Known {
    node: String,
    clock: Clock,
    warnings: Vec<String>,
    restored: Restored,
}

/// The parts in the order in which they need each other.
fn parts(
    tasks: &mut Tasks,
    config: &Config,
    bundle: Option<Bundle>,
    table: &Rc<Writer<Table>>,
    known: Known,
) -> anyhow::Result<Parts> {
    let Known { node, clock, warnings, mut restored } = known;
    let node = node.as_str();
    let mark = config.proxy.mark;
    let listen = config.dns.listen;
    let kernel = config.dns.enable || config.proxy.enable;
    let counters =
        (Rc::new(DnsCounters::default()), Rc::new(ProxyCounters::default()), Rc::new(TunnelCounters::default()));
    if let Err(why) = sys::raise_nofile() {
        log::warn!("the limit of open files stays as it is: {why}");
    }
    if kernel {
        // What a killed agent left would send packets to ports that nobody listens on.
        for what in rules::cleanup().context("what an agent before us left in the kernel")? {
            log::info!("{what}");
        }
        let IpAddr::V4(ip) = listen.ip() else { bail!("dns.listen: weft0 needs an IPv4 address") };
        let device = netlink::ensure_device(ip)?;
        log::info!("weft0 is a {} with {ip}", device.kind);
    }

    let manifests = Manifests::new(&config.kube.manifests, Rc::clone(table), clock);
    let sources = manifests.sources();
    tasks.spawn("manifests", manifests.run());

    let zone = Zone::new(&config.dns, u32::try_from(clock.unix()).unwrap_or(u32::MAX))?;
    let (resolver, dns_port) = if config.dns.enable {
        let server = dns::Server::bind(&config.dns, table.reader(), Rc::clone(&counters.0), clock, mark)?;
        let (resolver, port) = (server.resolver(), server.port());
        tasks.spawn("dns", server.run());
        (resolver, Some(port))
    } else {
        let forwarder = dns::Forwarder::new(&config.dns, Rc::clone(&counters.0), clock, mark);
        let resolver = forwarder.resolver();
        tasks.spawn("resolver", forwarder.run());
        (resolver, None)
    };

    let cluster = bundle.as_ref().map(|b| b.ca.0);
    let tunnel = match bundle {
        Some(bundle) if config.tunnel.enable || config.relay.enable => {
            let lookup: tunnel::Lookup = Rc::new(move |host| {
                let resolver = resolver.clone();
                Box::pin(async move { resolver.lookup(&host).await })
            });
            let setup = tunnel::Setup {
                name: node.into(),
                bundle,
                key: None,
                is_relay: config.relay.enable,
                mark,
                lookup,
                clock,
                counters: Rc::clone(&counters.2),
                remembered: std::mem::take(&mut restored.peers),
            };
            let (driver, handle) = tunnel::Driver::bind(&config.tunnel, setup)?;
            log::info!("tunnel on UDP {}", driver.local_addr()?);
            tasks.spawn("tunnel", driver.run());
            Some(handle)
        }
        Some(_) | None => None,
    };

    let proxy_port = if config.proxy.enable {
        let here = Here {
            node: node.into(),
            network: config.node.network.as_str().into(),
            zone: config.node.zone.as_str().into(),
            neighbours: BTreeSet::new(),
        };
        let balancer = Balancer::new(config.balancer.default, fastrand::Rng::new());
        let (reader, counter) = (table.reader(), Rc::clone(&counters.1));
        let proxy = Proxy::bind(&config.proxy, listen.ip(), here, balancer, reader, tunnel.clone(), counter, clock)?;
        let port = proxy.port();
        tasks.spawn("proxy", proxy.run());
        Some(port)
    } else {
        None
    };

    let (undo, status) = if kernel {
        let ports = Ports { proxy: proxy_port, dns: dns_port.map(|port| (listen.port(), port)) };
        let rules = Rules::new(&config.proxy, listen.ip(), ports, table.reader(), Rc::clone(&counters.1), clock)?;
        let (undo, status) = (rules.undo(), rules.status());
        tasks.spawn("rules", rules.run());
        (Some(undo), Some(status))
    } else {
        (None, None)
    };

    let keeper = snapshot::Setup {
        directory: config.node.state_dir.clone(),
        node: node.into(),
        cluster,
        table: table.reader(),
        tunnel: tunnel.clone(),
        clock,
        pace: Pace::default(),
    };
    let keeper = Keeper::new(keeper, &restored)?;
    let (leave, kept, kept_too) = (keeper.leave(), keeper.status(), keeper.status());
    tasks.spawn("snapshot", keeper.run());

    let shown =
        Shown { dns_port, proxy_port, listen, tunnel: tunnel.clone(), relay: config.relay.enable, status, kept, clock };
    let answerer = RefCell::new(Answerer::new(zone));
    let (domain, reader) = (config.dns.domain.clone(), table.reader());
    let views = Views {
        node: node.into(),
        clock,
        table: table.reader(),
        tunnel: tunnel.clone(),
        dns_counters: Some(counters.0),
        proxy_counters: Some(counters.1),
        tunnel_counters: Some(counters.2),
        sources: Box::new({
            let statics = !config.services.is_empty();
            move || list_sources(statics, &sources)
        }),
        parts: Box::new(move || shown.parts()),
        warnings: Box::new(move || {
            let trouble = kept_too.read(|kept| kept.trouble.clone());
            warnings.iter().cloned().chain(trouble).collect()
        }),
        resolve: Box::new(move |name| {
            resolve::resolve(name, &domain, |query| {
                let mut reply = Vec::new();
                let outcome = reader.read(|t| answerer.borrow_mut().reply(query, Via::Tcp, t, &mut reply));
                match outcome {
                    Outcome::Reply | Outcome::Reject => resolve::Exchange::Reply(reply),
                    Outcome::Forward | Outcome::Chase(_) | Outcome::Drop => resolve::Exchange::Foreign,
                }
            })
        }),
    };
    tasks.spawn("admin", Admin::bind(&config.admin.socket, views)?.run());
    Ok(Parts { undo, tunnel, leave })
}

async fn after(patience: Duration) {
    Timer::after(patience).await;
}

/// For `weft status`: what runs, and where.
struct Shown {
    dns_port: Option<u16>,
    proxy_port: Option<u16>,
    listen: SocketAddr,
    tunnel: Option<tunnel::Handle>,
    relay: bool,
    status: Option<Reader<rules::Status>>,
    kept: Reader<snapshot::Status>,
    clock: Clock,
}

impl Shown {
    fn parts(&self) -> Vec<view::Part> {
        let part = |name: &str, on: bool, note: String| view::Part { name: name.into(), on, note };
        let ip = self.listen.ip();
        let behind = |port: Option<u16>, named: &str| port.map_or_else(String::new, |p| format!("{named} {ip}:{p}"));
        let rules = self.status.as_ref().map(|s| s.read(Clone::clone));
        let load = self.tunnel.as_ref().and_then(tunnel::Handle::relay_load);
        vec![
            part("dns", self.dns_port.is_some(), behind(self.dns_port, &format!("{} by", self.listen))),
            part("proxy", self.proxy_port.is_some(), behind(self.proxy_port, "TCP by")),
            part(
                "rules",
                rules.as_ref().is_some_and(|r| r.version.is_some()),
                rules.map(|r| rules_note(&r)).unwrap_or_default(),
            ),
            part("tunnel", self.tunnel.is_some(), String::new()),
            part(
                "relay",
                self.relay && load.is_some(),
                load.map(|l| format!("{} nodes, {} flows", l.nodes, l.flows)).unwrap_or_default(),
            ),
            self.kept.read(|kept| part("snapshot", kept.trouble.is_none(), kept.note(self.clock.now()))),
        ]
    }
}

fn rules_note(r: &rules::Status) -> String {
    let mut out = format!("weft0 ({}), {} rules, {} routes, {}", r.device, r.rules, r.routes, r.backend);
    for text in r.errors.iter().chain(&r.notes) {
        out.push_str("; ");
        out.push_str(text);
    }
    out
}

/// Removes what a killed agent left in the kernel.
///
/// # Errors
/// When something is left.
pub fn cleanup() -> anyhow::Result<Vec<String>> {
    rules::cleanup()
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
    let cheap = |c: &Config| {
        let mut c = c.clone();
        c.services.clear();
        c.node.log = LevelFilter::Off;
        c
    };
    if cheap(&new) == cheap(&start.config) {
        log::info!("reload: {} services of the configuration", new.services.len());
    } else {
        log::warn!("reload: [[service]] and node.log are taken over; what else has changed needs a restart");
    }
}

/// `[[service]]` is one complete list.
fn feed(table: &Writer<Table>, services: &[StaticService]) {
    table.update(|t| {
        statics::changes(services).for_each(|change| {
            t.apply(change);
        })
    });
    table.ring();
}

/// Those that list what the snapshot keeps; what another one said once would never be replaced.
fn sources(config: &Config) -> Vec<Source> {
    (!config.kube.manifests.is_empty()).then_some(Source::Manifests).into_iter().collect()
}

fn list_sources(statics: bool, manifests: &Sources) -> Vec<String> {
    let named = |s: &SourceStatus| match &s.last_error {
        Some(error) => format!("manifests {}: {error}", s.name),
        None => format!("manifests {}: {} objects", s.name, s.objects),
    };
    let first = statics.then(|| "config".to_owned());
    first.into_iter().chain(manifests.list().iter().map(named)).collect()
}

fn read_bundle(path: &Path) -> anyhow::Result<Bundle> {
    let mode = fs::metadata(path).with_context(|| format!("bundle {}", path.display()))?.mode();
    if mode & 0o077 != 0 {
        log::warn!("{0} is a secret and others may read it: chmod 600 {0}", path.display());
    }
    ca::read_bundle(path).context("bundle")
}

/// The config's, else the bundle's, else the host's.
fn name(config: &Config, bundle: Option<&Bundle>) -> anyhow::Result<String> {
    let wanted = &config.node.name;
    if let Some(bundle) = bundle {
        let issued = &bundle.certificate.name;
        ensure!(wanted.is_empty() || wanted == issued, "node.name is {wanted}, and the bundle is {issued}'s");
        return Ok(issued.clone());
    }
    if !wanted.is_empty() {
        return Ok(wanted.clone());
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").context("the host's name")?.trim().to_ascii_lowercase();
    ensure!(node_name(&host).is_some(), "the host's name {host:?} names no node ({NAME_RULE}): set node.name");
    Ok(host)
}

/// What is no error and should not stay so.
fn warnings(config: &Config, bundle: Option<&Bundle>, now: u64) -> Vec<String> {
    let mut out = Vec::new();
    match bundle {
        None if config.tunnel.enable || config.relay.enable => {
            out.push("there is no bundle, and so no tunnel: other nodes' endpoints cannot be reached".into());
        }
        None => {}
        Some(bundle) => {
            let c = &bundle.certificate;
            if let Err(why) = c.verify(&bundle.ca, now) {
                out.push(format!("{why}: other nodes refuse us; `weft ca issue --node {}` makes a new one", c.name));
            } else if c.not_after - now < RENEW_SECS {
                out.push(format!("the certificate ends on {}", utc(c.not_after)));
            }
            if config.relay.enable && !c.roles.contains(Roles::RELAY) {
                out.push("relay.enable, and the certificate has not the role relay: nodes will not use us".into());
            }
        }
    }
    out
}

/// Named tasks; the first that ends ends the process.
struct Tasks {
    executor: Rc<LocalExecutor<'static>>,
    running: Vec<(&'static str, Task<anyhow::Result<()>>)>,
}

impl Tasks {
    fn new(executor: Rc<LocalExecutor<'static>>) -> Self {
        Self { executor, running: Vec::new() }
    }

    fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + 'static) {
        self.running.push((name, self.executor.spawn(task)));
    }

    async fn ended(&mut self) -> (&'static str, anyhow::Result<()>) {
        poll_fn(|cx| {
            for at in 0..self.running.len() {
                let (name, task) = &mut self.running[at];
                if let Poll::Ready(result) = task.poll(cx) {
                    let name = *name;
                    drop(self.running.swap_remove(at));
                    return Poll::Ready((name, result));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Cancels all, the last first, and waits until each has let go of what it held.
    async fn stop(mut self) {
        while let Some((_, task)) = self.running.pop() {
            task.cancel().await;
        }
    }
}
