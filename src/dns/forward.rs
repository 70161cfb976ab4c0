//! Questions to the upstreams: one for all who ask the same, hedged, checked, cached. No sockets: an *exchange* is one
//! query on one socket, which the driver opens and closes.

mod servers;

pub use servers::UPSTREAMS_MAX;

use super::{
    cache::{Cache, Hit},
    foreign::{self, Aging, Head},
    wire::{self, class, flag, rcode},
};
use crate::metrics::{DnsCounters, bump};
use servers::Servers;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

/// Questions at the upstreams. Beyond it a query is answered SERVFAIL (or from a stale entry) and counted: with dead
/// upstreams each stays for 5 s, so this is 50 questions a second.
pub const PENDING_MAX: usize = 256;
/// Queries out at once, each of which is a socket. Beyond it no hedge and no retry is sent.
pub const EXCHANGES_MAX: usize = 256;
/// No prefetch is begun beyond this many questions at the upstreams.
const PREFETCHES_MAX: usize = PENDING_MAX / 4;
/// Clients that wait for one question; the next is answered SERVFAIL and counted.
pub const WAITERS_MAX: usize = 64;
/// A stub resolver asks again after 5 s (resolv.conf(5), timeout): answer before that.
const DEADLINE: Duration = Duration::from_millis(4900);
/// Beyond the 99th percentile of an upstream's answer from its cache; well below what a user notices.
const HEDGE: Duration = Duration::from_millis(300);
/// The first repeat to an upstream that was asked already; doubles.
const REPEAT: Duration = Duration::from_secs(1);
/// RFC 8767 section 5, client response timer.
const STALE_AFTER: Duration = Duration::from_millis(1800);
/// RFC 2308 section 7.1: at most five minutes; short, for links come back.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// RFC 9520 section 3.2: at least one second.
const SILENT_FOR: Duration = Duration::from_secs(1);
/// What a probe asks for: HINFO, as CoreDNS's plugin loop does.
const PROBE_KIND: u16 = 13;
/// A probe that comes back does so at once.
const PROBE_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<T> {
    /// Send the query in the buffer on a socket of its own, and give what comes back to
    /// [`Forward::handle_answer`] or [`Forward::handle_failure`].
    Ask { exchange: u32, upstream: SocketAddr, transport: Transport },
    /// Close the exchange's socket; it may have had none yet.
    Close(u32),
    /// Give the reply in the buffer to a client.
    Reply(T),
    /// Nothing before this time.
    Wait(Option<Instant>),
}

#[derive(Debug)]
enum Todo<T> {
    Ask(u32),
    Close(u32),
    Reply(Client<T>, Answer),
}

#[derive(Debug)]
struct Client<T> {
    head: Head,
    to: T,
}

#[derive(Clone, Debug)]
enum Answer {
    Kept(Rc<[u8]>, Aging),
    Code(u16),
}

#[derive(Debug)]
struct Pending<T> {
    key: Box<[u8]>,
    clients: Vec<Client<T>>,
    /// In the order in which they are asked.
    order: Vec<SocketAddr>,
    attempts: usize,
    live: Vec<u32>,
    next_try: Option<Instant>,
    deadline: Instant,
    /// When the stale answer is given.
    stale_at: Option<Instant>,
    stale: Option<Rc<[u8]>>,
    /// The best that came so far and is no good: a refusal's code, a truncated answer.
    refusal: Option<u16>,
    truncated: Option<Rc<[u8]>>,
    /// Asked only to see whether it comes back to us: nobody waits, nothing is kept.
    is_probe: bool,
}

#[derive(Debug)]
struct Exchange {
    pending: u32,
    upstream: SocketAddr,
    transport: Transport,
    id: u16,
    /// As it was sent: by UDP with letters in random case, which an answer has to repeat (0x20).
    question: Box<[u8]>,
    edns: bool,
}

/// The forwarder. Call [`Forward::poll_output`] after every input until it says [`Output::Wait`].
pub struct Forward<T> {
    servers: Servers,
    cache: Cache,
    pending: BTreeMap<u32, Pending<T>>,
    by_key: HashMap<Box<[u8]>, u32>,
    exchanges: BTreeMap<u32, Exchange>,
    /// Nothing is due before this; it may be too early, never too late.
    due: Option<Instant>,
    next: u32,
    queue: VecDeque<Todo<T>>,
    ids: Box<dyn FnMut() -> u16>,
    counters: Rc<DnsCounters>,
}

impl<T: PartialEq> Forward<T> {
    /// `ids` gives the queries' ids: unpredictable ones.
    #[must_use]
    pub fn new(cache: Cache, ids: Box<dyn FnMut() -> u16>, counters: Rc<DnsCounters>) -> Self {
        Self {
            servers: Servers::default(),
            cache,
            pending: BTreeMap::new(),
            by_key: HashMap::new(),
            exchanges: BTreeMap::new(),
            due: None,
            next: 0,
            queue: VecDeque::new(),
            ids,
            counters,
        }
    }

    /// Those to ask from now on, best first. `configured`: the user named some, so that having none is a failure and
    /// not a refusal.
    pub fn set_upstreams(&mut self, addresses: &[SocketAddr], configured: bool) {
        self.servers.set(&[0], addresses, configured);
    }

    /// Those to ask for the names below a domain, which is in wire form and in lower case.
    pub fn set_stub(&mut self, domain: &[u8], addresses: &[SocketAddr]) {
        self.servers.set(domain, addresses, true);
    }

    /// Another link, or none: what did not exist or did not answer may now.
    pub fn handle_link_change(&mut self, now: Instant) {
        self.cache.forget_negative();
        self.servers.forgive();
        for pending in self.pending.values_mut().filter(|p| !p.is_probe) {
            (pending.attempts, pending.next_try) = (0, Some(now));
        }
        self.is_due(now);
        self.step(now);
    }

    /// A client's question, or with `target` the name that its question leads to.
    pub fn ask(&mut self, now: Instant, head: Head, target: Option<&[u8]>, to: T) {
        self.step(now);
        let Some(at) = head.question.len().checked_sub(4) else { return };
        let number = |i| wire::u16_at(&head.question, at + i).unwrap_or(0);
        let key = foreign::key(target.unwrap_or(&head.question[..at]), number(0), number(2), &head);
        let client = Client { head, to };
        if let Some(upstream) = self.servers.loops(now, foreign::name(&key)) {
            log::warn!("dns: upstream {upstream} sends what it is asked back to us: it is not asked for a while");
            self.leave(now, upstream);
            return self.queue.push_back(Todo::Reply(client, Answer::Code(rcode::REFUSED)));
        }
        let stale = match self.cache.get(now, &key) {
            Some(Hit::Fresh { message, age, ends }) => {
                bump(&self.counters.cached);
                let aging = Aging { age, cap: self.cache.cap(), stale: false };
                self.queue.push_back(Todo::Reply(client, Answer::Kept(message, aging)));
                if ends {
                    self.prefetch(now, key);
                }
                return;
            }
            Some(Hit::Failed(code)) => return self.queue.push_back(Todo::Reply(client, Answer::Code(code))),
            Some(Hit::Stale { message, failing: true }) => return self.reply_stale(client, message),
            Some(Hit::Stale { message, failing: false }) => Some(message),
            None => None,
        };
        if let Some(pending) = self.by_key.get(&key).and_then(|serial| self.pending.get_mut(serial)) {
            // a client that asks again with the same id is waiting already
            if pending.clients.iter().any(|c| c.head.id == client.head.id && c.to == client.to) {
                return;
            }
            if let Some(message) = stale {
                if pending.stale.is_none() {
                    // it began as a prefetch
                    (pending.stale, pending.stale_at) = (Some(Rc::clone(&message)), Some(now + STALE_AFTER));
                    self.due = self.due.map(|due| due.min(now + STALE_AFTER));
                }
                if pending.stale_at.is_none() {
                    return self.reply_stale(client, message);
                }
            }
            if pending.clients.len() < WAITERS_MAX {
                return pending.clients.push(client);
            }
            bump(&self.counters.overflow);
            return self.queue.push_back(Todo::Reply(client, Answer::Code(rcode::SERVFAIL)));
        }
        let full = self.pending.len() >= PENDING_MAX || self.exchanges.len() >= EXCHANGES_MAX;
        let name = foreign::name(&key);
        let order = if full { Vec::new() } else { self.servers.order(now, name) };
        if order.is_empty() {
            if full {
                bump(&self.counters.overflow);
            }
            let code = if full || self.servers.configured(name) { rcode::SERVFAIL } else { rcode::REFUSED };
            return match stale {
                Some(message) => self.reply_stale(client, message),
                None => self.queue.push_back(Todo::Reply(client, Answer::Code(code))),
            };
        }
        let mut clients = vec![client];
        if let Some(message) = stale.as_ref().filter(|_| self.servers.all_down(now, &order)) {
            clients.drain(..).for_each(|c| self.reply_stale(c, Rc::clone(message)));
        }
        bump(&self.counters.forwarded);
        self.begin(now, Pending::new(now, key, clients, order, stale));
    }

    fn begin(&mut self, now: Instant, pending: Pending<T>) {
        let serial = self.serial();
        self.by_key.insert(pending.key.clone(), serial);
        self.pending.insert(serial, pending);
        self.try_next(now, serial);
    }

    /// Asks again for what is about to be stale and is asked often.
    fn prefetch(&mut self, now: Instant, key: Box<[u8]>) {
        let order = self.servers.order(now, foreign::name(&key));
        if self.pending.len() < PREFETCHES_MAX && !self.by_key.contains_key(&key) && !order.is_empty() {
            bump(&self.counters.forwarded);
            self.begin(now, Pending::new(now, key, Vec::new(), order, None));
        }
    }

    /// Notes that an upstream was silent, and finds out whether that is because it waits for us: it is asked for a
    /// name that nobody else knows, which then comes back.
    fn suspect(&mut self, now: Instant, upstream: SocketAddr) {
        self.servers.fails(now, upstream);
        if self.pending.len() >= PENDING_MAX || !self.servers.probe_is_due(now, upstream) {
            return;
        }
        let mut key = Vec::with_capacity(24);
        for part in 0..4 {
            if part % 2 == 0 {
                key.push(8); // two labels of eight letters
            }
            let id = (self.ids)();
            key.extend([12, 8, 4, 0].map(|shift| b"0123456789abcdef"[usize::from(id >> shift & 15)]));
        }
        key.push(0);
        self.servers.probe(upstream, &key);
        key.extend_from_slice(&PROBE_KIND.to_be_bytes());
        key.extend_from_slice(&class::IN.to_be_bytes());
        key.push(0);
        let probe = Pending::new(now, key.into(), Vec::new(), vec![upstream], None);
        self.begin(now, Pending { is_probe: true, deadline: now + PROBE_MAX, ..probe });
    }

    /// Stops asking an upstream that asks us.
    fn leave(&mut self, now: Instant, upstream: SocketAddr) {
        for pending in self.pending.values_mut() {
            if let Some(at) = pending.order.iter().position(|a| *a == upstream) {
                pending.order.remove(at);
                pending.attempts -= usize::from(at < pending.attempts);
            }
        }
        let live: Vec<(u32, u32)> =
            self.exchanges.iter().filter(|(_, x)| x.upstream == upstream).map(|(id, x)| (*id, x.pending)).collect();
        for (exchange, serial) in live {
            self.close(serial, exchange);
            self.go_on(now, serial);
        }
    }

    /// Bytes that came on an exchange's socket (without TCP's length); true: the exchange is over.
    pub fn handle_answer(&mut self, now: Instant, exchange: u32, message: &[u8]) -> bool {
        self.step(now);
        let Some(of) = self.exchanges.get(&exchange) else { return true };
        let (serial, upstream, transport, edns) = (of.pending, of.upstream, of.transport, of.edns);
        let header = foreign::answers(message, of.id, &of.question);
        let Some((header, mut kept)) = header.and_then(|h| Some((h, foreign::keep(message)?))) else {
            bump(&self.counters.malformed);
            match transport {
                Transport::Udp => return false, // not from whom it says; the true one may still come
                Transport::Tcp => {
                    self.handle_failure(now, exchange);
                    return true;
                }
            }
        };
        if transport == Transport::Udp && !foreign::repeats(message, &of.question) {
            // Forged, or from one that does not keep the letters: it is asked anew, from another port.
            bump(&self.counters.malformed);
            self.servers.folded(now, upstream);
            self.close(serial, exchange);
            self.open(now, serial, upstream, transport, edns);
            return true;
        }
        let Some(pending) = self.pending.get_mut(&serial) else { return true };
        foreign::ask_as(&mut kept, foreign::question(&pending.key));
        let kept: Rc<[u8]> = kept.into();
        self.servers.works(upstream);
        let code = header.flags & flag::RCODE;
        if header.flags & flag::TC != 0 && transport == Transport::Udp {
            pending.truncated = Some(kept);
            self.close(serial, exchange);
            self.open(now, serial, upstream, Transport::Tcp, edns);
            return true;
        }
        match code {
            rcode::NOERROR | rcode::NXDOMAIN => {
                let lifetime = foreign::lifetime(&kept, foreign::asked_kind(&pending.key));
                if let Some(seconds) = lifetime.filter(|_| !pending.is_probe) {
                    let key = pending.key.clone();
                    self.cache.put(now, &key, Rc::clone(&kept), seconds);
                }
                self.slower_than(now, serial, exchange);
                let aging = Aging { age: 0, cap: self.cache.cap(), stale: false };
                self.finish(serial, &Answer::Kept(kept, aging));
            }
            // RFC 6891 section 6.2.2: it may not know EDNS
            rcode::FORMERR | rcode::NOTIMP if edns => {
                self.close(serial, exchange);
                self.open(now, serial, upstream, transport, false);
            }
            _ => {
                pending.refusal = Some(code);
                self.close(serial, exchange);
                self.go_on(now, serial);
            }
        }
        true
    }

    /// The exchange's socket failed, or its connection ended early.
    pub fn handle_failure(&mut self, now: Instant, exchange: u32) {
        self.step(now);
        let Some(of) = self.exchanges.get(&exchange) else { return };
        let (serial, upstream, transport) = (of.pending, of.upstream, of.transport);
        if transport == Transport::Udp {
            self.servers.fails(now, upstream); // it answers by UDP: that TCP is shut says little
        }
        self.close(serial, exchange);
        self.go_on(now, serial);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.step(now);
    }

    /// `buf` is overwritten where the output says so.
    #[must_use]
    pub fn poll_output(&mut self, buf: &mut Vec<u8>) -> Output<T> {
        while let Some(todo) = self.queue.pop_front() {
            match todo {
                Todo::Close(exchange) => return Output::Close(exchange),
                Todo::Ask(exchange) => {
                    let Some(of) = self.exchanges.get(&exchange) else { continue };
                    let Some(pending) = self.pending.get(&of.pending) else { continue };
                    foreign::write_query(&of.question, foreign::bits(&pending.key), of.id, of.edns, buf);
                    return Output::Ask { exchange, upstream: of.upstream, transport: of.transport };
                }
                Todo::Reply(client, answer) => {
                    match answer {
                        Answer::Kept(kept, aging) => client.head.answer(&kept, aging, buf),
                        Answer::Code(code) => client.head.refuse(code, buf),
                    }
                    return Output::Reply(client.to);
                }
            }
        }
        Output::Wait(self.due.filter(|_| !self.pending.is_empty()))
    }

    /// Advances time.
    fn step(&mut self, now: Instant) {
        if self.due.is_none_or(|due| now < due) {
            return;
        }
        self.due = None;
        let due: Vec<u32> = self.pending.iter().filter(|(_, p)| p.due() <= now).map(|(s, _)| *s).collect();
        for serial in due {
            let Some(pending) = self.pending.get_mut(&serial) else { continue };
            if pending.deadline <= now {
                let silent = if pending.is_probe { Vec::new() } else { pending.live.clone() };
                if !pending.is_probe {
                    bump(&self.counters.upstream_timeouts);
                }
                for exchange in silent {
                    if let Some(upstream) = self.exchanges.get(&exchange).map(|e| e.upstream) {
                        self.suspect(now, upstream);
                    }
                }
                self.give_up(now, serial, SILENT_FOR);
                continue;
            }
            if pending.stale_at.is_some_and(|t| t <= now) {
                pending.stale_at = None;
                let (clients, stale) = (std::mem::take(&mut pending.clients), pending.stale.clone());
                for client in clients {
                    if let Some(stale) = &stale {
                        self.reply_stale(client, Rc::clone(stale));
                    }
                }
            }
            let try_now = self.pending.get(&serial).is_some_and(|p| p.next_try.is_some_and(|t| t <= now));
            if try_now {
                self.try_next(now, serial);
            }
        }
        let next = self.pending.values().map(Pending::due).min();
        self.due = self.due.into_iter().chain(next).min();
    }

    fn is_due(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Asks the next upstream, or one again once all were asked.
    fn try_next(&mut self, now: Instant, serial: u32) {
        let Some(pending) = self.pending.get_mut(&serial) else { return };
        let all = pending.order.len();
        let Some(upstream) = pending.order.get(pending.attempts % all.max(1)).copied() else { return };
        pending.attempts += 1;
        let wait = match pending.attempts.checked_sub(all) {
            None => Some(HEDGE),
            Some(repeats @ 0..=1) => Some(REPEAT * (1 << repeats)),
            Some(_) => None,
        };
        pending.next_try = wait.filter(|_| !pending.is_probe).map(|w| now + w);
        let due = pending.due();
        self.is_due(due);
        self.open(now, serial, upstream, Transport::Udp, true);
    }

    /// After an exchange that brought nothing: the next upstream that was not asked, else wait for those that are
    /// out, else give up.
    fn go_on(&mut self, now: Instant, serial: u32) {
        let Some(pending) = self.pending.get(&serial) else { return };
        if pending.attempts < pending.order.len() {
            self.try_next(now, serial);
        } else if pending.live.is_empty() {
            let lasting = if pending.refusal.is_some() { REFUSED_FOR } else { SILENT_FOR };
            self.give_up(now, serial, lasting);
        }
    }

    fn give_up(&mut self, now: Instant, serial: u32, lasting: Duration) {
        let Some(pending) = self.pending.get(&serial) else { return };
        let cap = self.cache.cap();
        let answer = match (&pending.stale, &pending.truncated, pending.refusal) {
            (Some(stale), _, _) => Answer::Kept(Rc::clone(stale), Aging { age: 0, cap, stale: true }),
            (None, Some(truncated), _) => Answer::Kept(Rc::clone(truncated), Aging { age: 0, cap, stale: false }),
            (None, None, code) => Answer::Code(code.unwrap_or(rcode::SERVFAIL)),
        };
        if pending.truncated.is_none() && !pending.is_probe {
            let key = pending.key.clone();
            self.cache.fail(now, &key, pending.refusal.unwrap_or(rcode::SERVFAIL), lasting);
        }
        self.finish(serial, &answer);
    }

    fn finish(&mut self, serial: u32, answer: &Answer) {
        let Some(pending) = self.pending.remove(&serial) else { return };
        self.by_key.remove(&pending.key);
        for exchange in pending.live {
            self.exchanges.remove(&exchange);
            self.queue.push_back(Todo::Close(exchange));
        }
        for client in pending.clients {
            self.queue.push_back(Todo::Reply(client, answer.clone()));
        }
    }

    fn open(&mut self, now: Instant, serial: u32, upstream: SocketAddr, transport: Transport, edns: bool) {
        if self.exchanges.len() >= EXCHANGES_MAX {
            return;
        }
        let exchange = self.serial();
        let id = (self.ids)();
        let mixed = transport == Transport::Udp && !self.servers.folds(now, upstream);
        let Some(pending) = self.pending.get_mut(&serial) else { return };
        let mut question: Box<[u8]> = foreign::question(&pending.key).into();
        if mixed {
            foreign::mix_case(&mut question, &mut self.ids);
        }
        pending.live.push(exchange);
        self.exchanges.insert(exchange, Exchange { pending: serial, upstream, transport, id, question, edns });
        self.queue.push_back(Todo::Ask(exchange));
    }

    fn close(&mut self, serial: u32, exchange: u32) {
        self.exchanges.remove(&exchange);
        if let Some(pending) = self.pending.get_mut(&serial) {
            pending.live.retain(|e| *e != exchange);
        }
        self.queue.push_back(Todo::Close(exchange));
    }

    fn reply_stale(&mut self, client: Client<T>, message: Rc<[u8]>) {
        bump(&self.counters.cached);
        let aging = Aging { age: 0, cap: self.cache.cap(), stale: true };
        self.queue.push_back(Todo::Reply(client, Answer::Kept(message, aging)));
    }

    /// Upstreams that were asked before the one that answered, and said nothing until the hedge overtook them.
    fn slower_than(&mut self, now: Instant, serial: u32, winner: u32) {
        let Some(pending) = self.pending.get(&serial) else { return };
        let of = |e: &u32| self.exchanges.get(e).map(|x| x.upstream);
        let best = of(&winner);
        let slow: Vec<SocketAddr> =
            pending.live.iter().filter(|e| **e < winner).filter_map(of).filter(|u| Some(*u) != best).collect();
        slow.into_iter().for_each(|u| self.suspect(now, u));
    }

    /// Wraps after 2^32; nothing lives that long.
    fn serial(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

impl<T> Pending<T> {
    fn new(
        now: Instant,
        key: Box<[u8]>,
        clients: Vec<Client<T>>,
        order: Vec<SocketAddr>,
        stale: Option<Rc<[u8]>>,
    ) -> Self {
        Self {
            key,
            clients,
            order,
            attempts: 0,
            live: Vec::new(),
            next_try: None,
            deadline: now + DEADLINE,
            stale_at: stale.is_some().then(|| now + STALE_AFTER),
            stale,
            refusal: None,
            truncated: None,
            is_probe: false,
        }
    }

    fn due(&self) -> Instant {
        [self.next_try, self.stale_at].into_iter().flatten().fold(self.deadline, Instant::min)
    }
}

#[cfg(test)]
mod tests;
