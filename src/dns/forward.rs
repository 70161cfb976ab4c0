//! Questions to the upstreams: one for all who ask the same, hedged, checked, cached. No sockets: an *exchange* is one
//! query on one socket, which the driver opens and closes.

use super::{
    cache::{Cache, Hit},
    foreign::{self, Aging, Head},
    wire::{flag, rcode},
};
use crate::metrics::{DnsCounters, bump};
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
/// Clients that wait for one question; the next is answered SERVFAIL and counted.
pub const WAITERS_MAX: usize = 64;
/// Upstreams used; resolv.conf(5) itself allows three.
pub const UPSTREAMS_MAX: usize = 8;
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
/// How long an upstream that failed is asked last; doubles with each failure up to 64 s.
const DOWN_FOR: Duration = Duration::from_secs(1);

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
struct Upstream {
    address: SocketAddr,
    failures: u32,
    down_until: Option<Instant>,
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
}

#[derive(Debug)]
struct Exchange {
    pending: u32,
    upstream: SocketAddr,
    transport: Transport,
    id: u16,
    edns: bool,
}

/// The forwarder. Call [`Forward::poll_output`] after every input until it says [`Output::Wait`].
pub struct Forward<T> {
    upstreams: Vec<Upstream>,
    configured: bool,
    cache: Cache,
    pending: BTreeMap<u32, Pending<T>>,
    by_key: HashMap<Box<[u8]>, u32>,
    exchanges: BTreeMap<u32, Exchange>,
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
            upstreams: Vec::new(),
            configured: false,
            cache,
            pending: BTreeMap::new(),
            by_key: HashMap::new(),
            exchanges: BTreeMap::new(),
            next: 0,
            queue: VecDeque::new(),
            ids,
            counters,
        }
    }

    /// Those to ask from now on, best first. `configured`: the user named some, so that having none is a failure and
    /// not a refusal.
    pub fn set_upstreams(&mut self, addresses: &[SocketAddr], configured: bool) {
        self.configured = configured;
        let mut old = std::mem::take(&mut self.upstreams);
        for address in addresses.iter().take(UPSTREAMS_MAX) {
            if self.upstreams.iter().any(|u| u.address == *address) {
                continue;
            }
            let known = old.iter().position(|u| u.address == *address).map(|i| old.swap_remove(i));
            self.upstreams.push(known.unwrap_or(Upstream { address: *address, failures: 0, down_until: None }));
        }
    }

    /// A client's question, or with `target` the name that its question leads to.
    pub fn ask(&mut self, now: Instant, head: Head, target: Option<&[u8]>, to: T) {
        self.step(now);
        let key = match (target, head.question.len().checked_sub(4)) {
            (Some(target), Some(at)) => {
                let number = |i| super::wire::u16_at(&head.question, at + i).unwrap_or(0);
                foreign::key(target, number(0), number(2), &head)
            }
            (None, Some(at)) => {
                let number = |i| super::wire::u16_at(&head.question, at + i).unwrap_or(0);
                foreign::key(&head.question[..at], number(0), number(2), &head)
            }
            (_, None) => return,
        };
        let client = Client { head, to };
        let all_down = self.upstreams.iter().all(|u| u.down_until.is_some_and(|t| now < t));
        let stale = match self.cache.get(now, &key) {
            Some(Hit::Fresh { message, age }) => {
                bump(&self.counters.cached);
                let aging = Aging { age, cap: self.cache.cap(), stale: false };
                return self.queue.push_back(Todo::Reply(client, Answer::Kept(message, aging)));
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
            if pending.clients.len() < WAITERS_MAX {
                return pending.clients.push(client);
            }
            bump(&self.counters.overflow);
            return self.queue.push_back(Todo::Reply(client, Answer::Code(rcode::SERVFAIL)));
        }
        let full = self.pending.len() >= PENDING_MAX || self.exchanges.len() >= EXCHANGES_MAX;
        if full || self.upstreams.is_empty() {
            if full {
                bump(&self.counters.overflow);
            }
            let code = if self.configured { rcode::SERVFAIL } else { rcode::REFUSED };
            return match stale {
                Some(message) => self.reply_stale(client, message),
                None => self.queue.push_back(Todo::Reply(client, Answer::Code(code))),
            };
        }
        bump(&self.counters.forwarded);
        let mut clients = vec![client];
        if let (true, Some(message)) = (all_down, &stale) {
            let message = Rc::clone(message);
            clients.drain(..).for_each(|c| self.reply_stale(c, Rc::clone(&message)));
        }
        let serial = self.serial();
        self.by_key.insert(key.clone(), serial);
        let pending = Pending {
            key,
            clients,
            order: self.order(now),
            attempts: 0,
            live: Vec::new(),
            next_try: None,
            deadline: now + DEADLINE,
            stale_at: stale.is_some().then(|| now + STALE_AFTER),
            stale,
            refusal: None,
            truncated: None,
        };
        self.pending.insert(serial, pending);
        self.try_next(now, serial);
    }

    /// Bytes that came on an exchange's socket (without TCP's length); true: the exchange is over.
    pub fn handle_answer(&mut self, now: Instant, exchange: u32, message: &[u8]) -> bool {
        self.step(now);
        let Some(of) = self.exchanges.get(&exchange) else { return true };
        let (serial, upstream, transport, edns) = (of.pending, of.upstream, of.transport, of.edns);
        let Some(pending) = self.pending.get_mut(&serial) else { return true };
        let header = foreign::answers(message, of.id, foreign::question(&pending.key));
        let Some((header, kept)) = header.and_then(|h| Some((h, foreign::keep(message)?))) else {
            bump(&self.counters.malformed);
            match transport {
                Transport::Udp => return false, // not from whom it says; the true one may still come
                Transport::Tcp => {
                    self.handle_failure(now, exchange);
                    return true;
                }
            }
        };
        let kept: Rc<[u8]> = kept.into();
        self.works(upstream);
        let code = header.flags & flag::RCODE;
        let Some(pending) = self.pending.get_mut(&serial) else { return true };
        if header.flags & flag::TC != 0 && transport == Transport::Udp {
            pending.truncated = Some(kept);
            self.close(serial, exchange);
            self.open(serial, upstream, Transport::Tcp, edns);
            return true;
        }
        match code {
            rcode::NOERROR | rcode::NXDOMAIN => {
                if let Some(seconds) = foreign::lifetime(&kept, foreign::asked_kind(&pending.key)) {
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
                self.open(serial, upstream, transport, false);
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
            self.fails(now, upstream); // it answers by UDP: that TCP is shut says little
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
                    foreign::write_query(&pending.key, of.id, of.edns, buf);
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
        Output::Wait(self.pending.values().map(Pending::due).min())
    }

    /// Advances time.
    fn step(&mut self, now: Instant) {
        let due: Vec<u32> = self.pending.iter().filter(|(_, p)| p.due() <= now).map(|(s, _)| *s).collect();
        for serial in due {
            let Some(pending) = self.pending.get_mut(&serial) else { continue };
            if pending.deadline <= now {
                bump(&self.counters.upstream_timeouts);
                let silent: Vec<u32> = pending.live.clone();
                for exchange in silent {
                    if let Some(upstream) = self.exchanges.get(&exchange).map(|e| e.upstream) {
                        self.fails(now, upstream);
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
        pending.next_try = wait.map(|w| now + w);
        self.open(serial, upstream, Transport::Udp, true);
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
        if pending.truncated.is_none() {
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

    fn open(&mut self, serial: u32, upstream: SocketAddr, transport: Transport, edns: bool) {
        if self.exchanges.len() >= EXCHANGES_MAX {
            return;
        }
        let exchange = self.serial();
        let id = (self.ids)();
        let Some(pending) = self.pending.get_mut(&serial) else { return };
        pending.live.push(exchange);
        self.exchanges.insert(exchange, Exchange { pending: serial, upstream, transport, id, edns });
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

    /// Working ones first, each group in the user's order.
    fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let down = |u: &&Upstream| u.down_until.is_some_and(|t| now < t);
        let up = self.upstreams.iter().filter(|u| !down(u));
        up.chain(self.upstreams.iter().filter(down)).map(|u| u.address).collect()
    }

    fn works(&mut self, address: SocketAddr) {
        if let Some(upstream) = self.upstreams.iter_mut().find(|u| u.address == address) {
            (upstream.failures, upstream.down_until) = (0, None);
        }
    }

    fn fails(&mut self, now: Instant, address: SocketAddr) {
        if let Some(upstream) = self.upstreams.iter_mut().find(|u| u.address == address) {
            upstream.down_until = Some(now + DOWN_FOR * (1 << upstream.failures.min(6)));
            upstream.failures = upstream.failures.saturating_add(1);
        }
    }

    /// Upstreams that were asked before the one that answered, and said nothing until the hedge overtook them.
    fn slower_than(&mut self, now: Instant, serial: u32, winner: u32) {
        let Some(pending) = self.pending.get(&serial) else { return };
        let of = |e: &u32| self.exchanges.get(e).map(|x| x.upstream);
        let best = of(&winner);
        let slow: Vec<SocketAddr> =
            pending.live.iter().filter(|e| **e < winner).filter_map(of).filter(|u| Some(*u) != best).collect();
        slow.into_iter().for_each(|u| self.fails(now, u));
    }

    /// Wraps after 2^32; nothing lives that long.
    fn serial(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

impl<T> Pending<T> {
    fn due(&self) -> Instant {
        [self.next_try, self.stale_at].into_iter().flatten().fold(self.deadline, Instant::min)
    }
}

#[cfg(test)]
mod tests;
