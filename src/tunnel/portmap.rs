//! Asks the gateway for a UDP port by which the tunnel is reached from outside: PCP (RFC 6887), else NAT-PMP
//! (RFC 6886), else nothing. Without IO; its driver drains `poll_output` after every input until it says Wait.

mod natpmp;
mod pcp;

use super::survey::Gateway;
use pcp::NONCE;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Both protocols' port at the gateway.
pub const PORT: u16 = 5351;
/// What is asked for. The RFCs suggest up to two hours; a shorter one finds out sooner that a gateway was restarted.
const LIFETIME: u32 = 3600;
/// What we believe of a lifetime that the gateway grants: RFC 6887 section 15 has at least two minutes.
const LIFETIME_RANGE: (u32, u32) = (120, 86_400);
/// RFC 6887 section 8.1.1: 3 s, then twice as long each time; three are enough for a gateway that is one hop away.
const PCP_WAITS: [u64; 3] = [3000, 6000, 12_000];
/// RFC 6886 section 3.1: 250 ms, then twice as long each time.
const NATPMP_WAITS: [u64; 5] = [250, 500, 1000, 2000, 4000];
/// Between tries at a gateway that did not answer, or refused; twice as long each time.
const REST_FIRST: Duration = Duration::from_secs(300);
const REST_MOST: Duration = Duration::from_secs(4 * 3600);

/// What is asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is nobody to ask.
    Idle,
    Pcp,
    /// The outside address, then the port.
    Address,
    Port,
    /// Until the half of the lifetime has passed.
    Held,
    /// Nobody answered, or we were refused.
    Rest,
}

/// RFC 6887 section 8.5 and RFC 6886 section 3.6: the gateway's clock, by which a restart of it shows.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    server: u32,
    client: Instant,
}

impl Epoch {
    /// Whether a later epoch fits: else the gateway has forgotten its mappings since.
    fn goes_on(self, now: Instant, server: u32) -> bool {
        let passed = now.saturating_duration_since(self.client).as_secs();
        let told = u64::from(server.saturating_sub(self.server));
        server.saturating_add(1) >= self.server && passed + 2 >= told - told / 16 && told + 2 >= passed - passed / 16
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `buf` goes to the gateway's [`PORT`].
    Send(Ipv4Addr),
    /// What is sent there reaches us, or (None) nothing does any more.
    Mapped(Option<SocketAddr>),
    Wait(Option<Instant>),
}

/// See the module.
#[derive(Debug)]
pub struct Portmap {
    gateway: Option<Gateway>,
    port: u16,
    rng: fastrand::Rng,
    /// RFC 6887 section 11.2: the same for all requests of one mapping.
    nonce: [u8; NONCE],
    step: Step,
    /// Requests of this step that nobody answered yet.
    tries: usize,
    next: Option<Instant>,
    rest: Duration,
    natpmp: bool,
    epoch: Option<Epoch>,
    /// What NAT-PMP says of the outside address.
    outside: Option<Ipv4Addr>,
    held: Option<(SocketAddr, Instant)>,
    told: Option<SocketAddr>,
}

impl Portmap {
    #[must_use]
    pub fn new(port: u16, mut rng: fastrand::Rng) -> Self {
        let mut nonce = [0; NONCE];
        rng.fill(&mut nonce);
        Self {
            gateway: None,
            port,
            rng,
            nonce,
            step: Step::Idle,
            tries: 0,
            next: None,
            rest: REST_FIRST,
            natpmp: false,
            epoch: None,
            outside: None,
            held: None,
            told: None,
        }
    }

    /// Whom to ask from now on: a new one is asked at once. Who has a public address needs to ask nobody.
    pub fn set_gateway(&mut self, now: Instant, gateway: Option<Gateway>) {
        let gateway = gateway.filter(|g| behind_nat(g.local));
        if gateway == self.gateway {
            return;
        }
        self.gateway = gateway;
        self.rng.fill(&mut self.nonce);
        (self.natpmp, self.epoch, self.outside, self.held) = (false, None, None, None);
        self.rest = REST_FIRST;
        match gateway {
            Some(_) => self.go(now, Step::Pcp),
            None => (self.step, self.next) = (Step::Idle, None),
        }
    }

    fn go(&mut self, now: Instant, step: Step) {
        (self.step, self.tries, self.next) = (step, 0, Some(now));
    }

    fn give_up(&mut self, now: Instant, least: Duration) {
        (self.step, self.natpmp) = (Step::Rest, false);
        self.next = Some(now + self.rest.max(least.min(REST_MOST)));
        self.rest = (self.rest * 2).min(REST_MOST);
    }

    /// A datagram came to the socket from which requests are sent. Anything but the gateway's answer is nothing.
    pub fn handle_datagram(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) {
        let Some(gateway) = self.gateway else { return };
        if (from.ip().to_canonical(), from.port()) != (IpAddr::V4(gateway.address), PORT) {
            return;
        }
        match self.step {
            Step::Pcp => self.take_pcp(now, bytes),
            Step::Address | Step::Port => self.take_natpmp(now, bytes),
            Step::Idle | Step::Held | Step::Rest => {}
        }
    }

    /// ICMP says that nobody listens there.
    pub fn handle_refused(&mut self, now: Instant) {
        match self.step {
            Step::Pcp | Step::Address | Step::Port => self.give_up(now, Duration::ZERO),
            Step::Idle | Step::Held | Step::Rest => {}
        }
    }

    fn take_pcp(&mut self, now: Instant, bytes: &[u8]) {
        match pcp::parse(bytes, &self.nonce, self.port) {
            Some(pcp::Answer::Mapped { external: IpAddr::V4(ip), port, lifetime, epoch }) => {
                self.hold(now, ip, port, lifetime, epoch);
            }
            Some(pcp::Answer::Mapped { .. }) => self.give_up(now, Duration::ZERO),
            Some(pcp::Answer::Refused { code, lifetime }) => {
                log::debug!(target: "tunnel", "the gateway gives no port: PCP's result {code}");
                self.give_up(now, Duration::from_secs(lifetime.into()));
            }
            None if pcp::unknown_version(bytes) => {
                self.natpmp = true;
                self.go(now, Step::Address);
            }
            None => {}
        }
    }

    fn take_natpmp(&mut self, now: Instant, bytes: &[u8]) {
        match (natpmp::parse(bytes, self.port), self.step) {
            (Some(natpmp::Answer::Address { ip, .. }), Step::Address) => {
                (self.outside, self.natpmp) = (Some(ip), true);
                self.go(now, Step::Port);
            }
            (Some(natpmp::Answer::Port { port, lifetime, epoch }), Step::Port) => {
                let ip = self.outside.unwrap_or(Ipv4Addr::UNSPECIFIED);
                self.hold(now, ip, port, lifetime, epoch);
            }
            (Some(natpmp::Answer::Refused { code }), _) => {
                log::debug!(target: "tunnel", "the gateway gives no port: NAT-PMP's result {code}");
                self.give_up(now, Duration::ZERO);
            }
            (Some(natpmp::Answer::Address { .. } | natpmp::Answer::Port { .. }) | None, _) => {}
        }
    }

    fn hold(&mut self, now: Instant, ip: Ipv4Addr, port: u16, lifetime: u32, epoch: u32) {
        let lost = self.epoch.is_some_and(|e| !e.goes_on(now, epoch));
        self.epoch = Some(Epoch { server: epoch, client: now });
        if lost && self.natpmp {
            // Restarted: it may have another address too.
            return self.go(now, Step::Address);
        }
        let nobody = ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || ip.is_broadcast();
        if nobody || port == 0 || lifetime == 0 {
            return self.give_up(now, Duration::ZERO);
        }
        let lifetime = lifetime.clamp(LIFETIME_RANGE.0, LIFETIME_RANGE.1);
        let external = SocketAddr::new(ip.into(), port);
        if self.held.is_none_or(|(old, _)| old != external) {
            let by = if self.natpmp { "NAT-PMP" } else { "PCP" };
            log::info!(target: "tunnel", "the gateway gives us {external} for {lifetime} s ({by})");
        }
        self.held = Some((external, now + Duration::from_secs(lifetime.into())));
        self.rest = REST_FIRST;
        (self.step, self.tries) = (Step::Held, 0);
        // RFC 6887 section 11.2.1: at the half, and not all clients of a gateway at once.
        self.next = Some(now + Duration::from_secs(lifetime.into()).mul_f64(0.5 - self.rng.f64() / 16.0));
    }

    fn request(&self, lifetime: u32, gateway: Gateway, out: &mut Vec<u8>) {
        let before = self.held.map(|(at, _)| at);
        let port = before.map_or(self.port, |at| at.port());
        match self.step {
            Step::Address => natpmp::ask_address(out),
            Step::Port => natpmp::ask_port(self.port, port, lifetime, out),
            Step::Pcp | Step::Idle | Step::Held | Step::Rest => {
                let ip = match before.map(|at| at.ip()) {
                    Some(IpAddr::V4(ip)) => ip,
                    Some(IpAddr::V6(_)) | None => Ipv4Addr::UNSPECIFIED,
                };
                let (client, nonce) = (gateway.local, self.nonce);
                let request = pcp::Request { client, nonce, port: self.port, lifetime, suggested: Some((ip, port)) };
                request.encode(out);
            }
        }
    }

    /// What to do next; `buf` is overwritten where it says Send.
    #[must_use]
    pub fn poll_output(&mut self, now: Instant, buf: &mut Vec<u8>) -> Output {
        if self.held.is_some_and(|(_, until)| until <= now) {
            self.held = None;
        }
        let held = self.held.map(|(at, _)| at);
        if held != self.told {
            self.told = held;
            return Output::Mapped(held);
        }
        let Some(gateway) = self.gateway else { return Output::Wait(None) };
        while self.next.is_some_and(|at| at <= now) {
            let waits: &[u64] = match self.step {
                Step::Pcp => &PCP_WAITS,
                Step::Address | Step::Port => &NATPMP_WAITS,
                Step::Held | Step::Rest => {
                    self.go(now, if self.natpmp { Step::Address } else { Step::Pcp });
                    continue;
                }
                Step::Idle => &[],
            };
            match waits.get(self.tries) {
                Some(wait) => {
                    self.tries += 1;
                    // RFC 6887 section 8.1.1: more or less a tenth.
                    let wait = Duration::from_millis(*wait).mul_f64(0.9 + self.rng.f64() * 0.2);
                    self.next = Some(now + wait);
                    buf.clear();
                    self.request(LIFETIME, gateway, buf);
                    return Output::Send(gateway.address);
                }
                None if self.step == Step::Pcp => self.go(now, Step::Address),
                None => self.give_up(now, Duration::ZERO),
            }
        }
        Output::Wait([self.next, self.held.map(|(_, until)| until)].into_iter().flatten().min())
    }

    /// What deletes the mapping, and to whom it goes; None where there is none.
    #[must_use]
    pub fn bye(&mut self) -> Option<(Ipv4Addr, Vec<u8>)> {
        let (gateway, _) = (self.gateway?, self.held?);
        let mut out = Vec::new();
        if self.natpmp {
            natpmp::ask_port(self.port, 0, 0, &mut out);
        } else {
            self.step = Step::Pcp;
            self.request(0, gateway, &mut out);
        }
        self.held = None;
        Some((gateway.address, out))
    }
}

/// Private addresses, a provider's shared ones (RFC 6598), those of a link.
fn behind_nat(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    ip.is_private() || ip.is_link_local() || (a == 100 && b & 0xc0 == 64)
}

#[cfg(test)]
mod tests;
