//! What happens to a running agent: reloads, which begin anew what has changed, and the end.
//!
//! The new part is there before the old one goes: its port is in the kernel's rules first, and what the old one has begun
//! comes to its end. The tunnel alone cannot be there twice, for its port is known to others.

use crate::{
    app::{
        Start, Wiring, checks, feed,
        plan::{self, Plan},
        read_bundle, wants_kernel,
    },
    config::Config,
    reactor::Timer,
    table::model::{Change, Source},
    tunnel::identity::Bundle,
};
use anyhow::Context as _;
use futures_lite::future::or;
use std::{future::Future, time::Duration};

/// For what is said to peers and relays at the end.
const GOODBYE: Duration = Duration::from_millis(500);
/// For the rules to be in the kernel; where that takes longer, or the table is not complete, nobody waits.
const IN_KERNEL: Duration = Duration::from_secs(5);
/// For what the old rules brought to an old proxy's socket and it has not accepted yet.
const STRAGGLERS: Duration = Duration::from_secs(1);
/// For an old DNS: as long as a client waits for an answer (resolv.conf(5)).
const ANSWERS: Duration = Duration::from_secs(5);

async fn late(time: Duration) {
    Timer::after(time).await;
}

async fn within(time: Duration, what: impl Future<Output = ()>) {
    or(what, late(time)).await;
}

impl Wiring {
    /// Resolves when the rules are in the kernel, or cannot be for now.
    pub(crate) async fn in_kernel(&self) {
        let (Some(rules), Some(orders)) = (&self.rules, &self.orders) else { return };
        let mut bell = rules.listen();
        let wanted = orders.reader().read(|o| o.number);
        let settled = async {
            while rules.read(|r| r.orders != wanted && r.errors.is_empty()) {
                bell.rung().await;
            }
        };
        within(IN_KERNEL, settled).await;
    }

    /// Takes over what can be changed while running, and says what cannot.
    pub(crate) async fn reload(&mut self, start: &Start) {
        let Some(file) = &start.file else { return log::warn!("reload: there is no --config to read again") };
        let mut new = match Config::load(file) {
            Ok(new) => new,
            Err(why) => return log::error!("reload: {why}; all stays as it is"),
        };
        let mut kept = plan::settle(&self.config, &mut new);
        let bundle = match self.bundle_again(start, &new, &mut kept) {
            Ok(bundle) => bundle,
            Err(why) => return log::error!("reload: {why:#}; all stays as it is"),
        };
        if let Err(why) = checks::relay(&new, bundle.as_ref()) {
            return log::error!("reload: {why:#}; all stays as it is");
        }
        log::set_max_level(start.log.unwrap_or(new.node.log));
        feed(&self.table, &new.services);
        let renewed = bundle.as_ref().map(Bundle::render) != self.bundle.as_ref().map(Bundle::render);
        let plan = plan::plan(&self.config, &new, renewed);
        log::info!("reload: {} services of the configuration{plan}", new.services.len());
        let old = (std::mem::replace(&mut self.config, new), std::mem::replace(&mut self.bundle, bundle));
        self.change(plan, old).await;
        self.show();
        if !kept.is_empty() {
            log::warn!("reload: {} stay as they are until a restart", kept.join(", "));
        }
    }

    /// The secret as it is now; one that would make us somebody else has to wait.
    fn bundle_again(
        &self,
        start: &Start,
        new: &Config,
        kept: &mut Vec<&'static str>,
    ) -> anyhow::Result<Option<Bundle>> {
        let path = start.bundle.as_deref().or(new.node.bundle.as_deref());
        let bundle = path.map(read_bundle).transpose()?;
        let who = |b: &Option<Bundle>| b.as_ref().map_or([0; 32], |b| b.ca.0);
        let same_name = bundle.as_ref().is_none_or(|b| b.certificate.name == self.node);
        if same_name && (who(&bundle) == who(&self.bundle)) {
            return Ok(bundle);
        }
        kept.push("node.bundle");
        Ok(self.bundle.clone())
    }

    /// A part that cannot be as the new configuration wants it stays as it was.
    async fn change(&mut self, plan: Plan, (old, bundle): (Config, Option<Bundle>)) {
        if wants_kernel(&self.config)
            && !wants_kernel(&old)
            && let Err(why) = self.weft0()
        {
            log::error!("reload: {why:#}; dns and proxy stay off");
            (self.config.dns.enable, self.config.proxy.enable) = (false, false);
        }
        if plan.manifests {
            if let Some(before) = self.tasks.take("manifests") {
                before.cancel().await;
            }
            self.manifests();
            if self.config.kube.manifests.is_empty() {
                self.table.update(|t| {
                    t.apply(Change::Begin(Source::Manifests));
                    t.apply(Change::Complete(Source::Manifests));
                });
                self.table.ring();
            }
        }
        let mut old_dns = None;
        if let Some(before) = Some(plan.dns).filter(|on| *on).and_then(|_| self.tasks.take("dns")) {
            // Its addresses of this host cannot be bound twice.
            let also = &self.config.dns.listen_also;
            let before = if also.iter().any(|at| old.dns.listen_also.contains(at)) {
                before.cancel().await;
                None
            } else {
                Some(before)
            };
            let made = self.dns();
            match (made, before) {
                (Ok(()), before) => old_dns = before,
                (Err(why), before) => {
                    log::error!("reload: dns stays as it was: {why:#}");
                    self.config.dns = old.dns.clone();
                    match before {
                        Some(before) => self.tasks.put("dns", before),
                        None => self.dns().unwrap_or_else(|why| log::error!("reload: dns is off: {why:#}")),
                    }
                }
            }
        }
        if plan.kube {
            if let Some(before) = self.tasks.take("kube") {
                before.cancel().await;
            }
            self.api();
            if !self.config.kube.follows() {
                self.table.update(|t| {
                    t.apply(Change::Begin(Source::Api));
                    t.apply(Change::Complete(Source::Api));
                });
                self.table.ring();
            }
        }
        if plan.tunnel {
            self.tunnel_anew(&old, bundle).await;
        }
        let mut before = None;
        if plan.proxy {
            before = self.tasks.take("proxy").zip(self.drains.last().cloned());
            if let Err(why) = self.proxy() {
                log::error!("reload: the proxy is off: {why:#}");
            }
        }
        if plan.kube || plan.proxy {
            self.probes();
        }
        if plan.rules {
            if let Err(why) = self.rules().await {
                log::error!("reload: {why:#}");
            }
            self.in_kernel().await;
        }
        if let Some(task) = old_dns {
            self.tasks.retire(task, late(ANSWERS));
        }
        if let Some((task, drain)) = before {
            self.tasks.retire(task, async move {
                late(STRAGGLERS).await;
                drain.begin();
                drain.idle().await;
            });
        }
        if plan.health {
            if let Some(before) = self.tasks.take("health") {
                before.cancel().await;
            }
            if let Err(why) = self.health() {
                log::error!("reload: {why:#}");
                // So that the next reload tries again.
                self.config.admin.http = None;
            }
        }
        if !wants_kernel(&self.config)
            && let Some(undo) = self.undo.take()
        {
            if let Some(rules) = self.tasks.take("rules") {
                rules.cancel().await;
            }
            self.rules = None;
            self.idle(Duration::from_secs(self.config.proxy.drain.into())).await;
            if let Err(why) = undo.undo().await {
                log::error!("reload: {why:#}");
            }
        }
    }

    async fn tunnel_anew(&mut self, old: &Config, bundle: Option<Bundle>) {
        let before = self.tasks.take("tunnel");
        self.goodbye().await;
        if let Some(before) = before {
            before.cancel().await;
        }
        if let Err(why) = self.tunnel() {
            log::error!("reload: the tunnel stays as it was: {why:#}");
            (self.config.tunnel, self.config.relay) = (old.tunnel.clone(), old.relay.clone());
            self.bundle = bundle;
            self.tunnel().unwrap_or_else(|why| log::error!("reload: the tunnel is off: {why:#}"));
        }
    }

    /// A word to peers and relays; after it there is no tunnel.
    async fn goodbye(&mut self) {
        if let Some(handle) = self.tunnel.update(Option::take) {
            self.restored.peers = handle.remembered();
            self.tunnel.ring();
            within(GOODBYE, handle.close()).await;
        }
    }

    /// Waits until no proxy has a connection, at most for `patience`.
    async fn idle(&self, patience: Duration) {
        let all = async {
            for drain in &self.drains {
                drain.idle().await;
            }
        };
        within(patience, all).await;
    }

    /// Connections come to their end, and for most of the time new ones are served.
    pub(crate) async fn drain(&self, patience: Duration) {
        // With the rules in place all the while: the last chain of NAT takes with it what translates the connections that
        // live (nf_nat's hooks), and their clients would hang.
        let last = patience / 5;
        self.idle(patience - last).await;
        self.drains.iter().for_each(|drain| drain.begin());
        self.idle(last).await;
    }

    /// Connections end while their packets still find the way back; then a word to peers and relays; then the rest of
    /// the kernel's state goes.
    pub(crate) async fn leave(mut self) -> anyhow::Result<()> {
        self.tasks.stop_all_but(&["rules", "tunnel", "snapshot"]).await;
        if let Some((leave, _)) = &self.leave {
            leave.finish().await;
        }
        self.goodbye().await;
        // While the rules' own task still runs: a sync under way comes to its end.
        let undone = match &self.undo {
            Some(undo) => undo.undo().await.map(|done| done.iter().for_each(|what| log::info!("removed {what}"))),
            None => Ok(()),
        };
        self.tasks.stop_all_but(&[]).await;
        undone.context("the end")
    }
}
