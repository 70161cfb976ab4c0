//! A connection or UDP session that an endpoint has: counted while it lives, a connection as long as its Service's rule
//! allows.

use crate::{
    metrics::{add, bump},
    proxy::Shared,
    pump,
    reactor::{Async, Timer},
    table::{
        balance::{Ask, NoTarget, Pick, PortId, Target},
        model::ServiceId,
        rule::{Number, Traffic},
    },
    tcp,
};
use futures_lite::future::or;
use std::{
    cell::Cell,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream},
    ops::Deref,
    pin::Pin,
    rc::Rc,
    time::Duration,
};

/// See the module.
pub(crate) struct Lease<S: Deref<Target = Shared>> {
    shared: S,
    port: PortId,
    pub(crate) address: SocketAddr,
    traffic: Option<Rc<Traffic>>,
    /// Another endpoint could have it instead.
    pub(crate) has_others: bool,
}

/// Bytes up and down of one connection.
pub(crate) type Moved = [Cell<u64>; 2];

impl<S: Deref<Target = Shared>> Drop for Lease<S> {
    fn drop(&mut self) {
        self.shared.balancer.borrow_mut().over(&self.port, self.address);
    }
}

impl<S: Deref<Target = Shared>> Lease<S> {
    /// Picks an endpoint, which has a connection more from now on.
    pub(crate) fn take(shared: S, ask: Ask<'_>, key: Option<u64>) -> Result<(Target, Self), NoTarget> {
        let now = shared.clock.now();
        let mut balancer = shared.balancer.borrow_mut();
        let Pick { target, port, traffic, has_others } =
            shared.table.read(|t| t.pick(&shared.here, ask, key, &mut balancer, now))?;
        let address = target.address();
        balancer.begin(&port, address, now);
        drop(balancer);
        Ok((target, Self { shared, port, address, traffic, has_others }))
    }

    fn time(&self, which: Number) -> Option<Duration> {
        self.traffic.as_ref()?.time(which)
    }

    /// How long the endpoint may take to accept, where the rule says so.
    pub(crate) fn patience(&self) -> Option<Duration> {
        self.time(Number::ConnectMs)
    }

    pub(crate) fn worked(&self) {
        self.shared.balancer.borrow_mut().worked(&self.port, self.address);
    }

    pub(crate) fn failed(&self) {
        self.fails(false);
    }

    /// Nothing is heard of its node.
    pub(crate) fn gone(&self) {
        self.fails(true);
    }

    fn fails(&self, is_gone: bool) {
        let now = self.shared.clock.now();
        let traffic = self.traffic.as_deref();
        if self.shared.balancer.borrow_mut().failed(&self.port, self.address, traffic, is_gone, now) {
            bump(&self.shared.counters.ejections);
            let (ServiceId { namespace, name }, number, _) = &self.port;
            self.shared.say(|| format!("{namespace}/{name}:{number}: {} fails: left out for a while", self.address));
        }
    }

    /// Sets what the rule wants of the connection to the endpoint; what the kernel does not take stays as it is.
    pub(crate) fn prepare(&self, server: &Async<TcpStream>) {
        let Some(traffic) = &self.traffic else { return };
        let (idle, every) = (traffic.time(Number::KeepaliveMs), traffic.time(Number::KeepaliveEveryMs));
        let probes = traffic.number(Number::KeepaliveProbes).and_then(|n| u8::try_from(n).ok());
        if idle.is_some() || every.is_some() || probes.is_some() {
            let usual = pump::KEEPALIVE;
            let least = Duration::from_secs(1);
            let (idle, every) = (idle.unwrap_or(usual.0).max(least), every.unwrap_or(usual.1).max(least));
            let _ = tcp::keepalive(server, idle, every, probes.unwrap_or(usual.2));
        }
    }

    /// Where the bytes of this connection are to be counted: by itself where somebody has to look at them.
    pub(crate) fn counts<'c>(&'c self, own: &'c Moved) -> [&'c Cell<u64>; 2] {
        let counters = &self.shared.counters;
        let is_limited = self.time(Number::IdleMs).is_some() || self.time(Number::LifeMs).is_some();
        if is_limited { [&own[0], &own[1]] } else { [&counters.bytes_up, &counters.bytes_down] }
    }

    /// Relays, no longer than the rule allows. What it drops is reset.
    pub(crate) async fn limited(
        &self,
        relay: Pin<&mut dyn Future<Output = io::Result<()>>>,
        own: &Moved,
    ) -> io::Result<()> {
        let (idle, life) = (self.time(Number::IdleMs), self.time(Number::LifeMs));
        let counters = &self.shared.counters;
        let begun = self.shared.clock.now();
        let seen = Cell::new([0, 0]);
        let count = || {
            let now = [own[0].get(), own[1].get()];
            let [up, down] = seen.replace(now);
            add(&counters.bytes_up, now[0] - up);
            add(&counters.bytes_down, now[1] - down);
            now != [up, down]
        };
        let over = async {
            let mut moved = begun;
            loop {
                // A quarter more than the rule says at most.
                let look = idle.map(|idle| self.shared.clock.now() + idle / 4);
                let end = life.map(|life| begun + life);
                match look.into_iter().chain(end).min() {
                    Some(at) => Timer::at(at).await,
                    None => return std::future::pending().await,
                };
                let now = self.shared.clock.now();
                if count() {
                    moved = now;
                }
                let is_idle = idle.is_some_and(|idle| now.saturating_duration_since(moved) >= idle);
                if is_idle || end.is_some_and(|end| now >= end) {
                    return Err(ErrorKind::TimedOut.into());
                }
            }
        };
        let done = or(relay, over).await;
        count();
        done
    }
}
