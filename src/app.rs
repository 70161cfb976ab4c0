//! The agent: the parts in the order in which they need each other, as named tasks of one executor; signals; the drain.

pub(crate) mod checks;
pub(crate) mod plan;
mod shown;

use crate::{
    admin::{self, Admin, Socket, Views, resolve},
    api::{self, Api},
    ca,
    clock::{BUILT, Clock},
    config::{Config, PodNames, Policy, StaticService},
    dns::{
        self, Resolver,
        answer::{Answerer, Outcome, Via},
        zone::Zone,
    },
    health::Health,
    kube::{Manifests, Sources},
    metrics::{DnsCounters, ProxyCounters, TunnelCounters},
    netlink,
    notify::Notify,
    probe,
    proxy::{Drain, Proxy, rules::Ports, udp},
    reactor::{Async, LocalExecutor},
    rules::{self, Orders, Rules, Undo},
    shared::{Reader, Writer},
    snapshot::{self, Keeper, Leave, Pace, Restored},
    sorted::Set,
    sys,
    table::{
        Table,
        balance::{Balancer, Here, Nodes, OnLink},
        model::Source,
        statics,
    },
    tasks::Tasks,
    tunnel::{
        self,
        identity::{Bundle, Roles},
    },
};
use anyhow::{Context, bail};
use futures_lite::{
    AsyncReadExt,
    future::{or, pending},
};
use log::LevelFilter;
use shown::Shown;
use std::{
    cell::RefCell,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

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
    // A task, so that not every wake-up of another looks for signals.
    let agent = executor.spawn(agent(Rc::clone(&executor), start));
    crate::reactor::block_on(executor.run(agent))
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
    let signals = Signals::new().context("signals")?;
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
    let mut wiring = Wiring::new(Tasks::new(executor), config.clone(), bundle, node, table, clock, restored);
    if let Err(why) = wiring.parts(socket).await {
        wiring.tasks.stop_all_but(&[]).await;
        if wants_kernel(config) {
            let _ = rules::cleanup().map_err(|left| log::warn!("{left:#}"));
        }
        return Err(why);
    }

    let notify = Rc::new(Notify::from_env());
    wiring.in_kernel().await;
    notify.tell("READY=1");
    let ended = loop {
        let signal = async { Ok(signals.next().await) };
        let ended = async { Err(wiring.tasks.ended().await) };
        match or(or(signal, ended), alive(&notify)).await {
            Ok(Ok(libc::SIGHUP)) => {
                notify.tell("RELOADING=1");
                or(wiring.reload(&start), alive(&notify)).await;
                notify.tell("READY=1");
            }
            Ok(Ok(signal)) => {
                log::info!("{}: leaving", if signal == libc::SIGTERM { "SIGTERM" } else { "SIGINT" });
                break Ok(());
            }
            Ok(Err(why)) => break Err(anyhow::Error::new(why).context("signals can no longer be received")),
            Err((name, why)) => break Err(why.context(format!("{name} has ended"))),
        }
    };
    notify.tell("STOPPING=1");
    let impatience = async {
        while let Ok(signal) = signals.next().await {
            if signal != libc::SIGHUP {
                bail!("a second signal: left in haste; `weft cleanup` removes what is still in the kernel");
            }
        }
        pending().await
    };
    let patience = if ended.is_ok() { wiring.config.proxy.drain } else { 0 };
    let gently = async {
        wiring.drain(Duration::from_secs(patience.into())).await;
        wiring.leave().await
    };
    let drained = or(or(gently, impatience), alive(&notify)).await;
    ended.and(drained)
}

/// What ends the agent, or reloads it.
struct Signals(Async<OwnedFd>);

impl Signals {
    fn new() -> io::Result<Self> {
        Async::new_nonblocking(sys::signals(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?).map(Self)
    }

    async fn next(&self) -> io::Result<i32> {
        let mut one = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.0).read_exact(&mut one).await?;
        Ok(i32::from_ne_bytes([one[0], one[1], one[2], one[3]]))
    }
}

/// Shows signs of life, and never ends.
async fn alive<T>(notify: &Notify) -> T {
    notify.live().await;
    pending().await
}

/// `[[service]]` is one complete list.
pub(crate) fn feed(table: &Writer<Table>, services: &[StaticService]) {
    table.update(|t| {
        for change in statics::changes(services) {
            t.apply(change);
        }
    });
    table.ring();
}

/// The sources whose last known state counts until they speak themselves.
fn restorable(config: &Config) -> Vec<Source> {
    let files = (!config.kube.manifests.is_empty()).then_some(Source::Manifests);
    files.into_iter().chain(config.kube.follows().then_some(Source::Api)).collect()
}

/// What the agent would call itself.
pub(crate) fn name(config: &Config, bundle: Option<&Bundle>, host: &str) -> anyhow::Result<String> {
    checks::name(config, bundle, host)
}

pub(crate) fn read_bundle(path: &Path) -> anyhow::Result<Bundle> {
    let mode = fs::metadata(path).with_context(|| format!("bundle {}", path.display()))?.mode();
    if mode & 0o077 != 0 {
        log::warn!("{0} is a secret and others may read it: chmod 600 {0}", path.display());
    }
    ca::read_bundle(path).context("bundle")
}

/// Whether weft0 and rules are wanted.
pub(crate) fn wants_kernel(config: &Config) -> bool {
    config.dns.enable || config.proxy.enable
}

#[derive(Default)]
struct Counts {
    dns: Rc<DnsCounters>,
    proxy: Rc<ProxyCounters>,
    tunnel: Rc<TunnelCounters>,
}

/// What the parts are made from, and those that run.
pub(crate) struct Wiring {
    pub(crate) tasks: Tasks,
    pub(crate) config: Config,
    pub(crate) bundle: Option<Bundle>,
    pub(crate) node: String,
    pub(crate) table: Rc<Writer<Table>>,
    clock: Clock,
    counts: Counts,
    /// What the snapshot held.
    pub(crate) restored: Restored,
    manifests: Sources,
    api: Option<api::Status>,
    /// Of the DNS, or the forwarder, that runs.
    resolver: Rc<RefCell<Option<Resolver>>>,
    dns_port: Option<u16>,
    pub(crate) tunnel: Writer<Option<tunnel::Handle>>,
    tunnel_at: Option<SocketAddr>,
    /// Whom the tunnel finds on our LANs.
    on_link: OnLink,
    /// Its port, that of IPv6, and those of UDP.
    proxy: Option<(u16, Option<u16>, Reader<udp::Ports>)>,
    /// Of all proxies, so that clients stay where they are when another one begins.
    balancer: Rc<RefCell<Balancer>>,
    /// Of the proxy that runs, the last, and of those before it.
    pub(crate) drains: Vec<Drain>,
    pub(crate) undo: Option<Undo>,
    pub(crate) rules: Option<Reader<rules::Status>>,
    pub(crate) orders: Option<Writer<Orders>>,
    pub(crate) leave: Option<(Rc<Leave>, Reader<snapshot::Status>)>,
    shown: Option<admin::Shown>,
}

impl Wiring {
    fn new(
        tasks: Tasks,
        config: Config,
        bundle: Option<Bundle>,
        node: String,
        table: Rc<Writer<Table>>,
        clock: Clock,
        restored: Restored,
    ) -> Self {
        Self {
            tasks,
            config,
            bundle,
            node,
            table,
            clock,
            restored,
            counts: Counts::default(),
            manifests: Sources::default(),
            api: None,
            resolver: Rc::default(),
            dns_port: None,
            tunnel: Writer::new(None),
            tunnel_at: None,
            on_link: OnLink::default(),
            proxy: None,
            balancer: Rc::new(RefCell::new(Balancer::new(Policy::RoundRobin, fastrand::Rng::new()))),
            drains: Vec::new(),
            undo: None,
            rules: None,
            orders: None,
            leave: None,
            shown: None,
        }
    }

    /// Each part in the order in which they need each other.
    async fn parts(&mut self, socket: Socket) -> anyhow::Result<()> {
        if let Err(why) = sys::raise_nofile() {
            log::warn!("the limit of open files stays as it is: {why}");
        }
        self.weft0()?;
        self.manifests();
        self.dns()?;
        self.api();
        self.tunnel()?;
        self.proxy()?;
        self.probes();
        self.rules().await?;
        self.snapshot()?;
        self.admin(socket)
    }

    pub(crate) fn weft0(&self) -> anyhow::Result<()> {
        if !wants_kernel(&self.config) {
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

    pub(crate) fn manifests(&mut self) {
        let (files, dns) = (&self.config.kube.manifests, &self.config.dns);
        let manifests = Manifests::new(files, Rc::clone(&self.table), self.clock)
            .with_pod_names(dns.enable && dns.endpoint_pod_names)
            .with_pods(dns.enable && dns.pods == PodNames::Verified);
        self.manifests = manifests.sources();
        self.tasks.spawn("manifests", manifests.run());
    }

    /// Also without DNS: the tunnel looks up its relays.
    pub(crate) fn dns(&mut self) -> anyhow::Result<()> {
        let Config { dns: cfg, proxy, .. } = &self.config;
        let setup = dns::Setup {
            counters: Rc::clone(&self.counts.dns),
            clock: self.clock,
            mark: proxy.mark,
            interfaces: proxy.interfaces.clone(),
        };
        if !cfg.enable {
            let forwarder = dns::Forwarder::new(cfg, &setup);
            *self.resolver.borrow_mut() = Some(forwarder.resolver());
            self.dns_port = None;
            self.tasks.spawn("dns", forwarder.run());
            return Ok(());
        }
        let server = dns::Server::bind(cfg, self.table.reader(), self.here(), &setup)?;
        *self.resolver.borrow_mut() = Some(server.resolver());
        self.dns_port = Some(server.port());
        self.tasks.spawn("dns", server.run());
        Ok(())
    }

    /// After the DNS, which looks up the server's name.
    pub(crate) fn api(&mut self) {
        let kube = &self.config.kube;
        self.api = None;
        if !kube.follows() {
            return;
        }
        let resolver = Rc::clone(&self.resolver);
        let lookup: api::Lookup = Rc::new(move |host| {
            let resolver = resolver.borrow().clone();
            Box::pin(async move { resolver.context("nobody looks up names")?.lookup(&host).await })
        });
        let mut setup = api::Setup::new(Rc::clone(&self.table), self.clock, lookup, self.config.proxy.mark);
        let dns = &self.config.dns;
        setup.pod_names = dns.enable && dns.endpoint_pod_names;
        setup.pods = dns.enable && dns.pods == PodNames::Verified;
        let api = Api::new(kube, setup);
        self.api = Some(api.status());
        self.tasks.spawn("kube", api.run());
    }

    fn here(&self) -> Here {
        Here {
            node: self.node.as_str().into(),
            network: checks::network(&self.config, self.bundle.as_ref()).into(),
            zone: self.config.node.zone.as_str().into(),
            neighbours: self.config.node.neighbours.iter().map(String::as_str).collect(),
            on_link: self.on_link.clone(),
            is_egress: self.bundle.as_ref().is_some_and(|b| b.certificate.roles.contains(Roles::EGRESS)),
            egress: self
                .config
                .balancer
                .egress
                .iter()
                .map(|(of, by)| (Nodes::from_iter([&**of]), (&**by).into()))
                .collect(),
        }
    }

    pub(crate) fn tunnel(&mut self) -> anyhow::Result<()> {
        self.on_link.set(&[]);
        let Some(bundle) = self.bundle.clone().filter(|_| self.config.tunnel.enable) else { return Ok(()) };
        let resolver = Rc::clone(&self.resolver);
        let setup = tunnel::Setup {
            name: self.node.clone(),
            bundle,
            key: None,
            is_relay: self.config.relay.enable,
            relay_limits: self.config.relay.limits,
            mark: self.config.proxy.mark,
            lookup: Rc::new(move |host| {
                let resolver = resolver.borrow().clone();
                Box::pin(async move { resolver.context("nobody looks up names")?.lookup(&host).await })
            }),
            clock: self.clock,
            counters: Rc::clone(&self.counts.tunnel),
            remembered: std::mem::take(&mut self.restored.peers),
            on_link: self.on_link.clone(),
        };
        let (driver, handle) = tunnel::Driver::bind(&self.config.tunnel, setup)?;
        let at = driver.local_addr()?;
        log::info!("tunnel on UDP {at}");
        self.tasks.spawn("tunnel", driver.run());
        self.tunnel_at = Some(at);
        self.tunnel.update(|slot| *slot = Some(handle));
        self.tunnel.ring();
        Ok(())
    }

    pub(crate) fn proxy(&mut self) -> anyhow::Result<()> {
        let Config { dns, proxy, balancer, .. } = &self.config;
        self.proxy = None;
        if !proxy.enable {
            return Ok(());
        }
        let here = self.here();
        let mut state = self.balancer.borrow_mut();
        state.policy = balancer.default;
        state.prefer.clone_from(&balancer.prefer);
        state.outlier.failures = balancer.outlier;
        drop(state);
        let balancer = Rc::clone(&self.balancer);
        let (table, counters, tunnel) = (self.table.reader(), Rc::clone(&self.counts.proxy), self.tunnel.reader());
        let proxy = Proxy::bind(proxy, dns.listen.ip(), here, balancer, table, tunnel, counters, self.clock)?;
        self.proxy = Some((proxy.port(), proxy.port6(), proxy.udp_ports()));
        self.drains.retain(|drain| !drain.is_idle());
        self.drains.push(proxy.drain());
        self.tasks.spawn("proxy", proxy.run());
        Ok(())
    }

    /// Anew whenever the API or the proxy is.
    pub(crate) fn probes(&mut self) {
        drop(self.tasks.take("probes"));
        self.balancer.borrow_mut().silent = Set::new();
        let Config { proxy, balancer, .. } = &self.config;
        if !proxy.enable || balancer.probe == 0 {
            return;
        }
        let api = self.api.clone();
        let setup = probe::Setup {
            period: Duration::from_secs(balancer.probe.into()),
            table: self.table.reader(),
            here: self.here(),
            balancer: Rc::clone(&self.balancer),
            counters: Rc::clone(&self.counts.proxy),
            clock: self.clock,
            mark: proxy.mark,
            is_told: Box::new(move || api.as_ref().is_some_and(api::Status::tells)),
        };
        self.tasks.spawn("probes", probe::run(setup));
    }

    fn snapshot(&mut self) -> anyhow::Result<()> {
        let setup = snapshot::Setup {
            directory: self.config.node.state_dir.clone(),
            node: self.node.clone(),
            cluster: self.bundle.as_ref().map(|b| b.ca.0),
            table: self.table.reader(),
            tunnel: self.tunnel.reader(),
            clock: self.clock,
            pace: Pace::default(),
        };
        let keeper = Keeper::new(setup, &self.restored)?;
        self.leave = Some((keeper.leave(), keeper.status()));
        self.tasks.spawn("snapshot", keeper.run());
        Ok(())
    }

    /// Those of before stay until those of now take their place.
    pub(crate) async fn rules(&mut self) -> anyhow::Result<()> {
        if !wants_kernel(&self.config) {
            self.orders = None;
            if let Some(undo) = &self.undo {
                undo.undo_rules().await?;
            }
            return Ok(());
        }
        let Config { dns, proxy, .. } = &self.config;
        rules::may_stand_in_rules(proxy)?;
        let dns_ports = self.dns_port.map(|port| (dns.listen.port(), port));
        let (port, port6, udp) = match self.proxy.clone() {
            Some((port, port6, udp)) => (Some(port), port6, udp),
            None => (None, None, Writer::new(udp::Ports::new()).reader()),
        };
        let ports = Ports { proxy: port, proxy6: port6, dns: dns_ports, take_over: dns.take_over.clone() };
        let mut orders = Orders { number: 1, cfg: proxy.clone(), ports, udp, here: self.here() };
        if let Some(before) = &self.orders {
            before.update(|before| {
                orders.number = before.number + 1;
                *before = orders;
            });
            before.ring();
            return Ok(());
        }
        let orders = Writer::new(orders);
        let (table, counters) = (self.table.reader(), Rc::clone(&self.counts.proxy));
        let rules = Rules::new(orders.reader(), dns.listen.ip(), table, counters, self.clock)?;
        (self.undo, self.rules, self.orders) = (Some(rules.undo()), Some(rules.status()), Some(orders));
        self.tasks.spawn("rules", rules.run());
        Ok(())
    }

    fn admin(&mut self, socket: Socket) -> anyhow::Result<()> {
        let admin = Admin::new(socket, self.views()?);
        self.shown = Some(admin.shown());
        self.tasks.spawn("admin", admin.run());
        self.health()
    }

    pub(crate) fn health(&mut self) -> anyhow::Result<()> {
        if let (Some(at), Some(shown)) = (self.config.admin.http, &self.shown) {
            let health = Health::bind(at, Rc::clone(shown))?;
            self.tasks.spawn("health", health.run());
        }
        Ok(())
    }

    /// The socket tells of the parts as they are now.
    pub(crate) fn show(&self) {
        match (self.views(), &self.shown) {
            (Ok(views), Some(shown)) => *shown.borrow_mut() = Rc::new(views),
            (Ok(_), None) => {}
            (Err(why), _) => log::warn!("{why:#}"),
        }
    }

    fn views(&self) -> anyhow::Result<Views> {
        let tunnel = self.tunnel.reader().read(Clone::clone);
        let shown = Shown {
            kept: self.leave.as_ref().context("there is no snapshot yet")?.1.clone(),
            config: self.config.clone(),
            bundle: self.bundle.as_ref().map(|b| Bundle { key: None, psks: Vec::new(), ..b.clone() }),
            clock: self.clock,
            table: self.table.reader(),
            manifests: self.manifests.clone(),
            api: self.api.clone(),
            dns_port: self.dns_port,
            proxy_port: self.proxy.as_ref().map(|(port, ..)| *port),
            rules: self.rules.clone(),
            tunnel: self.tunnel_at.zip(tunnel.clone()),
        };
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
        let (balancer, clock) = (Rc::clone(&self.balancer), self.clock);
        let (parts, sources, warnings) = (Rc::clone(&shown), Rc::clone(&shown), Rc::clone(&shown));
        let unwell = Rc::clone(&shown);
        Ok(Views {
            node: self.node.clone(),
            clock: self.clock,
            table: self.table.reader(),
            tunnel,
            dns_counters: Some(Rc::clone(&self.counts.dns)),
            proxy_counters: Some(Rc::clone(&self.counts.proxy)),
            tunnel_counters: Some(Rc::clone(&self.counts.tunnel)),
            sources: Box::new(move || sources.sources()),
            parts: Box::new(move || parts.parts()),
            warnings: Box::new(move || warnings.warnings()),
            unwell: Box::new(move || unwell.unwell()),
            resolve: Box::new(resolve),
            policy: self.config.balancer.default,
            here: self.here(),
            fared: Box::new(move |port, address| balancer.borrow().fared(port, address, clock.now())),
        })
    }
}
