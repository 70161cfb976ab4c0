//! The agent: the parts in the order in which they need each other, as named tasks of one executor; signals; the drain.

use crate::{
    admin::{Admin, Views, resolve, view},
    ca,
    clock::{BUILT, Clock},
    config::{Config, StaticService},
    shared::Writer,
    table::Table,
    tunnel::identity::{Bundle, NAME_RULE, Roles, node_name, utc},
};
use anyhow::{Context, ensure};
use async_signal::{Signal, Signals};
use futures_lite::{FutureExt, StreamExt, future::or};
use log::LevelFilter;
use smol::{LocalExecutor, Task};
use std::{
    fs,
    future::poll_fn,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
    task::Poll,
};

/// A certificate that ends sooner is warned of.
const RENEW_SECS: u64 = 30 * 86_400;

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
    let clock = Clock::new(BUILT);
    let config = &start.config;
    let bundle = start.bundle.as_deref().or(config.node.bundle.as_deref()).map(read_bundle).transpose()?;
    let node = name(config, bundle.as_ref())?;
    let warnings = warnings(config, bundle.as_ref(), clock.unix());
    log::info!("weft {} as node {node}", env!("CARGO_PKG_VERSION"));
    warnings.iter().for_each(|w| log::warn!("{w}"));

    let table = Writer::new(Table::default());
    feed(&table, &config.services);
    let mut tasks = Tasks::new(executor);
    let mut parts = Vec::new();
    for (name, on) in [("dns", config.dns.enable), ("proxy", config.proxy.enable), ("tunnel", config.tunnel.enable)] {
        parts.push(view::Part {
            name: name.into(),
            on: false,
            note: if on { "not in this build" } else { "by the configuration" }.into(),
        });
    }
    let domain = config.dns.domain.clone();
    let views = Views {
        node,
        clock,
        table: table.reader(),
        tunnel: None,
        dns_counters: None,
        proxy_counters: None,
        tunnel_counters: None,
        sources: sources(config),
        parts: Box::new(move || parts.clone()),
        warnings: Box::new(move || warnings.clone()),
        resolve: Box::new(move |name| resolve::resolve(name, &domain, |_| resolve::Exchange::Foreign)),
    };
    tasks.spawn("admin", Admin::bind(&config.admin.socket, views)?.run());

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
    tasks.stop().await;
    ended
}

/// Removes what a killed agent left in the kernel.
///
/// # Errors
/// When something is left.
pub fn cleanup() -> anyhow::Result<()> {
    Ok(())
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

fn feed(_table: &Writer<Table>, _services: &[StaticService]) {}

fn sources(config: &Config) -> Vec<String> {
    let mut out = Vec::new();
    if !config.services.is_empty() {
        out.push("config".into());
    }
    out.extend(config.kube.manifests.iter().map(|m| format!("manifests {m}")));
    out
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
