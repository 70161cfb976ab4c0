//! The driver of the Kubernetes client: a connection for each watch, and one writer of the table.

use crate::{
    carrier::connect::Proxy,
    clock::Clock,
    config::{KubeConfig, ServerKind},
    conn::{Conn, Failure},
    credentials::Credentials,
    kube::{
        SourceStatus,
        access::{Access, Server},
        http,
        resource::Resource,
        watcher::{Input, Output, SPREAD, Setup as Watch, Watcher, first_try},
    },
    netlink::Monitor,
    reactor::Timer,
    shared::{Bell, Listener, Writer},
    table::{
        Table,
        model::{Change, Name, ObjectId, Source},
        scope::Scope,
    },
};
use futures_lite::future::{or, pending, yield_now};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::{Duration, Instant},
};

/// Readers hear of changes once in so long: a storm of events is one change to them.
const COALESCE: Duration = Duration::from_millis(50);

/// Bytes that one read takes; one buffer serves all connections.
const SCRATCH: usize = 16 << 10;

/// Reads before the other tasks have their turn.
const BUDGET: u32 = 8;

/// Addresses that are tried for one connection.
const ADDRESSES_MAX: usize = 8;

/// Changes of links are looked at once in so long.
const LINKS_EVERY: Duration = Duration::from_secs(2);

/// While a certificate is not valid (yet), the clock is looked at so often; this much is a clock that was set.
const CLOCK_EVERY: Duration = Duration::from_secs(5);
const CLOCK_JUMP: u64 = 30;

/// Looks up a host name.
pub type Lookup = Rc<dyn Fn(String) -> Pin<Box<dyn Future<Output = anyhow::Result<Vec<IpAddr>>>>>>;

/// What it is made from.
pub struct Setup {
    pub table: Rc<Writer<Table>>,
    pub clock: Clock,
    pub lookup: Lookup,
    /// The bit of the packet mark that keeps our own rules away.
    pub mark: u32,
    pub pod_names: bool,
    /// Whether Pods are followed, too.
    pub pods: bool,
    /// First requests are spread over this, unless they stay on this machine.
    pub spread: Duration,
}

impl Setup {
    #[must_use]
    pub fn new(table: Rc<Writer<Table>>, clock: Clock, lookup: Lookup, mark: u32) -> Self {
        Self { table, clock, lookup, mark, pod_names: false, pods: false, spread: SPREAD }
    }
}

/// See the module.
pub struct Api {
    hub: Rc<Hub>,
}

/// What `weft status` shows of each resource.
#[derive(Clone)]
pub struct Status(Rc<Hub>);

struct Hub {
    credentials: Credentials,
    proxy: Option<Proxy>,
    watchers: Vec<RefCell<Watcher>>,
    setup: Setup,
    agent: String,
    scratch: RefCell<Vec<u8>>,
    /// The table has changed, and nobody was told yet.
    dirty: Bell,
    links: Bell,
    /// The address that worked last.
    server: Cell<usize>,
    url: RefCell<String>,
    complete: Cell<bool>,
    metaserver: bool,
}

/// What is known of before and will not be followed any more goes: nobody would ever sweep it.
fn forget_others(config: &KubeConfig, pods: bool, table: &mut Table) {
    let is_followed =
        |namespace: &str| config.namespaces.is_empty() || config.namespaces.iter().any(|n| n == namespace);
    for scope in [Scope::Services(None), Scope::Slices(None), Scope::Pods(None), Scope::Rules(None)] {
        table.sweep(Source::Api, &scope, |id| match id {
            ObjectId::Service(id) | ObjectId::Rule(id) => is_followed(&id.namespace),
            ObjectId::Slice(id) => is_followed(&id.namespace),
            ObjectId::Pod(id) => pods && is_followed(&id.namespace),
            ObjectId::Node(_) => true,
        });
    }
}

impl Api {
    /// From now on the table waits for the API before it is synced.
    #[must_use]
    pub fn new(config: &KubeConfig, setup: Setup) -> Self {
        let credentials = Credentials::new(config, setup.clock);
        setup.table.update(|t| {
            t.expect(Source::Api);
            forget_others(config, setup.pods, t);
        });
        let access = credentials.access();
        // The rules of a snapshot come before the first try to connect.
        let servers = access.iter().flat_map(|a| &a.servers).map(|s| &s.host);
        for address in servers.chain(config.proxy.as_ref().map(|p| &p.host)).filter_map(|host| host.parse().ok()) {
            setup.table.update(|t| t.guard(address));
        }
        let is_local = |access: &Access| access.servers.iter().all(Server::is_local);
        let metaserver = match config.server {
            ServerKind::Auto => access.as_ref().is_ok_and(|a| a.servers.iter().all(Server::is_metaserver)),
            ServerKind::ApiServer => false,
            ServerKind::MetaServer => true,
        };
        let mut rng = fastrand::Rng::new();
        let spread = if metaserver || access.as_ref().is_ok_and(is_local) { Duration::ZERO } else { setup.spread };
        let start = first_try(setup.clock.now(), spread, &mut rng);
        let mut watch = |resource, namespace: Option<&String>| {
            let namespace: Option<Name> = namespace.map(|n| setup.table.update(|t| t.intern(n)));
            let pod_names = setup.pod_names;
            RefCell::new(Watcher::new(Watch {
                resource,
                namespace,
                metaserver,
                pod_names,
                start,
                spread,
                rng: rng.fork(),
            }))
        };
        let mut watchers = Vec::new();
        let pods = setup.pods.then_some(Resource::Pods);
        let mut follow = |resource| {
            if config.namespaces.is_empty() {
                watchers.push(watch(resource, None));
            }
            watchers.extend(config.namespaces.iter().map(|n| watch(resource, Some(n))));
        };
        [Resource::Services, Resource::Slices].into_iter().chain(pods).for_each(&mut follow);
        follow(Resource::rules(metaserver));
        watchers.push(watch(Resource::Nodes, None));
        let agent = format!("weft/{} ({}/{})", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
        let hub = Hub {
            credentials,
            proxy: config.proxy.clone(),
            watchers,
            setup,
            agent,
            scratch: RefCell::new(vec![0; SCRATCH]),
            dirty: Bell::default(),
            links: Bell::default(),
            server: Cell::new(0),
            url: RefCell::new(access.map_or_else(|_| "api".into(), |a| a.servers[0].to_string())),
            complete: Cell::new(false),
            metaserver,
        };
        Self { hub: Rc::new(hub) }
    }

    #[must_use]
    pub fn status(&self) -> Status {
        Status(Rc::clone(&self.hub))
    }

    /// Follows the API for ever.
    ///
    /// # Errors
    /// None so far: what fails is tried again.
    pub async fn run(self) -> anyhow::Result<()> {
        let hub = &self.hub;
        let mut running: Vec<Pin<Box<dyn Future<Output = ()>>>> =
            vec![Box::pin(hub.tell()), Box::pin(hub.watch_links())];
        for at in 0..hub.watchers.len() {
            running.push(Box::pin(hub.follow(at)));
        }
        // There are few of them, and an executor of their own would cost more than to look at each.
        poll_fn(|cx| {
            running.retain_mut(|task| task.as_mut().poll(cx).is_pending());
            Poll::Pending
        })
        .await
    }
}

impl Status {
    /// Whether an API server tells of endpoints now. metaServer answers from its own store too, and does not say so.
    #[must_use]
    pub fn tells(&self) -> bool {
        let of_slices = |w: &RefCell<Watcher>| {
            let report = w.borrow().report();
            !matches!(report.resource, Resource::Slices | Resource::Endpoints) || report.synced
        };
        !self.0.metaserver && self.0.watchers.iter().all(of_slices)
    }

    #[must_use]
    pub fn list(&self) -> Vec<SourceStatus> {
        let url = self.0.url.borrow();
        let of = |watcher: &RefCell<Watcher>| {
            let report = watcher.borrow().report();
            let of = report.namespace.map_or_else(String::new, |n| format!(" of {n}"));
            SourceStatus {
                name: format!("{url} {}{of}", report.resource.name()),
                synced: report.synced,
                objects: report.objects,
                skipped: 0,
                since: Some(report.since),
                last_error: report.error,
            }
        };
        self.0.watchers.iter().map(of).collect()
    }
}

/// An open connection, and how to ask on it.
struct Line {
    conn: Conn,
    host: String,
    access: Access,
}

enum Woke {
    Time,
    Ready,
    Links,
    Broken,
}

impl Hub {
    /// Rings for the readers, but not for each event.
    async fn tell(&self) {
        let mut dirty = self.dirty.listen();
        loop {
            dirty.rung().await;
            Timer::after(COALESCE).await;
            self.setup.table.ring();
        }
    }

    async fn watch_links(&self) {
        let Ok(monitor) = Monitor::open().map_err(|e| log::warn!("kube: {e:#}")) else { return };
        while monitor.changed().await.is_ok() {
            self.links.ring();
            Timer::after(LINKS_EVERY).await;
        }
    }

    /// Hands an input to a core, and what came of it to the table's readers.
    fn input(&self, at: usize, input: Input<'_>) {
        let mut watcher = self.watchers[at].borrow_mut();
        let table = &self.setup.table;
        let changed = table.update(|t| {
            let before = t.version();
            watcher.handle_input(self.setup.clock.now(), input, t);
            t.version() != before
        });
        if changed {
            self.dirty.ring();
        }
        drop(watcher);
        let needed = |w: &RefCell<Watcher>| {
            let watcher = w.borrow();
            watcher.listed() || !watcher.report().resource.is_needed()
        };
        if !self.complete.get() && self.watchers.iter().all(needed) {
            self.complete.set(true);
            table.update(|t| t.apply(Change::Complete(Source::Api)));
            self.dirty.ring();
        }
    }

    async fn follow(&self, at: usize) {
        let mut line: Option<Line> = None;
        let mut links = self.links.listen();
        // The clock when a certificate was not valid, if that is why there is no connection.
        let mut wrong_clock = None;
        let mut request = Vec::new();
        loop {
            let output = self.watchers[at].borrow_mut().poll_output();
            match output {
                Output::Connect => match self.connect().await {
                    Ok(open) => {
                        (line, wrong_clock) = (Some(open), None);
                        self.input(at, Input::Connected);
                    }
                    Err(why) => {
                        wrong_clock = why.is_about_time.then(|| self.clock_offset());
                        self.input(at, Input::Refused(why.words));
                    }
                },
                Output::Get(target) => {
                    let refused = self.watchers[at].borrow().token_refused();
                    let sent = match &mut line {
                        Some(line) => {
                            let token = self.credentials.token(&line.access, refused);
                            http::get(&line.host, &target, &self.agent, token.as_deref(), &mut request);
                            line.conn.send(&request).await.is_ok()
                        }
                        None => false,
                    };
                    if !sent {
                        line = None;
                        self.input(at, Input::Closed);
                    }
                }
                Output::Hangup => line = None,
                Output::Wait(until) => match self.wait(until, line.as_ref(), &mut links, wrong_clock).await {
                    Woke::Time => self.input(at, Input::Tick),
                    Woke::Ready => self.read(at, &mut line).await,
                    Woke::Links if line.as_ref().is_some_and(|l| !l.conn.is_at_home()) => {
                        line = None;
                        self.input(at, Input::Closed);
                        self.input(at, Input::Nudge);
                    }
                    Woke::Links => self.input(at, Input::Nudge),
                    Woke::Broken => {
                        line = None;
                        self.input(at, Input::Closed);
                    }
                },
            }
        }
    }

    async fn wait(&self, until: Instant, line: Option<&Line>, links: &mut Listener, wrong_clock: Option<u64>) -> Woke {
        let time = async {
            Timer::at(until).await;
            Woke::Time
        };
        let ready = async {
            match line {
                Some(line) if line.conn.readable().await.is_ok() => Woke::Ready,
                Some(_) => Woke::Broken,
                None => pending().await,
            }
        };
        let changed = async {
            links.rung().await;
            Woke::Links
        };
        let clock = async {
            let Some(offset) = wrong_clock else { return pending().await };
            while self.clock_offset().abs_diff(offset) < CLOCK_JUMP {
                Timer::after(CLOCK_EVERY).await;
            }
            Woke::Links
        };
        or(time, or(changed, or(ready, clock))).await
    }

    async fn read(&self, at: usize, line: &mut Option<Line>) {
        for _ in 0..BUDGET {
            let Some(open) = line else { return };
            let mut scratch = self.scratch.borrow_mut();
            match open.conn.read(&mut scratch) {
                Ok(None) => return,
                Ok(Some(0)) => {
                    *line = None;
                    return self.input(at, Input::Closed);
                }
                Ok(Some(n)) => self.input(at, Input::Bytes(&scratch[..n])),
                Err(why) => {
                    *line = None;
                    return self.input(at, Input::Refused(why.words));
                }
            }
            drop(scratch);
            // The core may have something to say to that.
            if !self.watchers[at].borrow().is_reading() {
                return;
            }
        }
        yield_now().await;
    }

    /// The wall clock less the one that only goes forward.
    fn clock_offset(&self) -> u64 {
        self.setup.clock.unix().saturating_sub(self.setup.clock.uptime().as_secs())
    }

    /// To the server that worked last, else to the next, and so on.
    async fn connect(&self) -> Result<Line, Failure> {
        let access = self.credentials.access().map_err(Failure::new)?;
        let count = access.servers.len();
        let (mut last, mut tries) = (None, 0);
        for at in (self.server.get()..).take(count) {
            let server = access.servers[at % count].clone();
            let proxy = self.proxy.as_ref().filter(|_| !server.is_local() && !server.is_metaserver());
            let (words, host, port) = match proxy {
                None => (server.to_string(), &server.host, server.port),
                Some(p) => (format!("{server} through the proxy {}", p.shown()), &p.host, p.port),
            };
            let words = |why: &str| format!("{words}: {why}");
            let addresses = match (self.setup.lookup)(host.clone()).await {
                Ok(addresses) => addresses,
                Err(why) => {
                    last = Some(Failure::new(words(&format!("{why:#}"))));
                    continue;
                }
            };
            for address in addresses {
                if self.setup.table.update(|t| t.guard(address)) {
                    self.dirty.ring();
                }
                tries += 1;
                if tries > ADDRESSES_MAX {
                    break;
                }
                let tls = self.credentials.tls(&access, &server).map_err(|why| Failure::new(words(&why)))?;
                let proxy = proxy.map(|p| (p, p.request(&server.host, server.port)));
                match Conn::open(SocketAddr::new(address, port), self.setup.mark, proxy, tls).await {
                    Ok(conn) => {
                        self.server.set(at % count);
                        *self.url.borrow_mut() = server.to_string();
                        return Ok(Line { conn, host: server.authority(), access });
                    }
                    Err(why) => last = Some(Failure { words: words(&why.words), ..why }),
                }
            }
        }
        Err(last.unwrap_or_else(|| Failure::new("there is no address")))
    }
}
