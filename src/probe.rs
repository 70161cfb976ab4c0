//! `[balancer] probe`: connects to this node's endpoints from time to time while no API server says how they are, and has
//! those that take no connection left out.

use crate::{
    clock::Clock,
    metrics::{ProxyCounters, bump},
    reactor::{Async, LocalExecutor, Timer},
    shared::{Bell, Reader},
    sorted::Set,
    sys,
    table::{
        Table,
        balance::{
            Balancer, Here,
            probe::{Next, Probes},
        },
    },
};
use futures_lite::future::or;
use std::{cell::RefCell, io, net::SocketAddr, rc::Rc, time::Duration};

/// How often we look whether somebody else tells, and which endpoints there are.
const LOOK: Duration = Duration::from_secs(2);

/// For an endpoint of this node to take a connection: as long as a kubelet's probe waits (Kubernetes API: timeoutSeconds).
const PATIENCE: Duration = Duration::from_secs(1);

/// What it is made from.
pub(crate) struct Setup {
    pub period: Duration,
    pub table: Reader<Table>,
    pub here: Here,
    pub balancer: Rc<RefCell<Balancer>>,
    pub counters: Rc<ProxyCounters>,
    pub clock: Clock,
    pub mark: u32,
    /// Whether an API server says how endpoints are.
    pub is_told: Box<dyn Fn() -> bool>,
}

/// Probes for ever.
///
/// # Errors
/// Never.
pub(crate) async fn run(setup: Setup) -> anyhow::Result<()> {
    let Setup { period, table, here, balancer, counters, clock, mark, is_told } = setup;
    let (tasks, ends, bell) = (LocalExecutor::new(), Rc::new(RefCell::new(Vec::new())), Bell::default());
    let mut probes = Probes::new(period);
    let (mut seen, mut look_at, mut over) = (None, clock.now(), bell.listen());
    let work = async {
        loop {
            let now = clock.now();
            if look_at <= now {
                look_at = now + LOOK;
                let version = (!is_told()).then(|| table.read(Table::version));
                if version != seen {
                    match version {
                        Some(_) => {
                            let own = table.read(|t| t.own_endpoints(&here));
                            if seen.is_none() {
                                let (count, every) = (own.len(), period.as_secs());
                                log::info!(
                                    "no API server says how endpoints are: {count} here are tried each {every} s"
                                );
                            }
                            probes.watch(&own, now);
                        }
                        None => {
                            log::info!("an API server says again how endpoints are");
                            probes.rest();
                        }
                    }
                    balancer.borrow_mut().silent = probes.out();
                    seen = version;
                }
            }
            for (address, good) in ends.take() {
                if good == Some(false) {
                    bump(&counters.probe_failures);
                }
                if probes.over(address, good) {
                    tell(&mut balancer.borrow_mut().silent, probes.out(), address);
                }
            }
            let wake = loop {
                match probes.poll(now) {
                    Next::Try(address) => {
                        bump(&counters.probes);
                        let (ends, bell) = (Rc::clone(&ends), bell.clone());
                        let probe = async move {
                            let good = connects(&address, mark).await;
                            ends.borrow_mut().push((address, good));
                            bell.ring();
                        };
                        tasks.spawn(probe).detach();
                    }
                    Next::Wait(at) => break at.map_or(look_at, |at| at.min(look_at)),
                }
            };
            let sleep = async {
                Timer::at(wake).await;
            };
            or(over.rung(), sleep).await;
        }
    };
    tasks.run(work).await
}

fn tell(silent: &mut Set<SocketAddr>, now: Set<SocketAddr>, address: SocketAddr) {
    if now.contains(&address) {
        log::warn!("{address} takes no connections: left out until it does");
    } else {
        log::info!("{address} takes connections again");
    }
    *silent = now;
}

/// None: we could not even try.
async fn connects(to: &SocketAddr, mark: u32) -> Option<bool> {
    let socket = sys::tcp_socket(to).ok()?;
    // Unmarked our own rules might bring it to us.
    sys::set_mark(&socket, mark).ok()?;
    let late = async {
        Timer::after(PATIENCE).await;
        Err(io::ErrorKind::TimedOut.into())
    };
    // No descriptor, port or memory of ours is left.
    let ours = [libc::EADDRNOTAVAIL, libc::ENOBUFS, libc::ENOMEM, libc::ENOSPC];
    match or(Async::connect_by(socket, to), late).await {
        Ok(_) => Some(true),
        Err(e) if e.raw_os_error().is_some_and(|code| ours.contains(&code)) => None,
        Err(_) => Some(false),
    }
}
