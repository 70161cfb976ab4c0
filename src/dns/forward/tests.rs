//! The forwarder among upstreams that are slow, dead, lossy, truncating or forged, in virtual time.

use super::*;
use crate::{
    clock::Clock,
    dns::{
        cache::TTL_MAX,
        wire::{self, Header, Records, class, kind},
    },
};

const A: &str = "192.0.2.1:53";
const B: &str = "192.0.2.2:53";

/// How an upstream behaves.
#[derive(Clone)]
struct Nature {
    delay: Duration,
    /// Percent of the queries that it never hears.
    loss: u8,
    rcode: u16,
    truncates: bool,
    tcp: bool,
    no_edns: bool,
    /// The driver's socket fails at once (no route, ICMP).
    unreachable: bool,
    /// It answers with the question in lower case.
    folds: bool,
    /// It answers nothing and asks us the same.
    loops: bool,
    ttl: u32,
}

impl Default for Nature {
    fn default() -> Self {
        let delay = Duration::from_millis(10);
        Self {
            delay,
            loss: 0,
            rcode: 0,
            truncates: false,
            tcp: true,
            no_edns: false,
            unreachable: false,
            folds: false,
            loops: false,
            ttl: 60,
        }
    }
}

/// The client that is one of our upstreams.
const LOOPING: u32 = 9999;

enum Event {
    Answer(Vec<u8>),
    Failure,
    /// The upstream asks us.
    Back(Vec<u8>),
}

struct World {
    forward: Forward<u32>,
    natures: BTreeMap<SocketAddr, Nature>,
    now: Instant,
    start: Instant,
    rng: fastrand::Rng,
    events: BTreeMap<(Instant, u32), (u32, Event)>,
    serial: u32,
    /// (when, to whom, reply)
    replies: Vec<(Duration, u32, Vec<u8>)>,
    asked: Vec<(Duration, SocketAddr, Transport)>,
    /// The same for probes, which are not among them.
    probed: Vec<(Duration, SocketAddr)>,
    open: std::collections::BTreeSet<u32>,
    counters: Rc<DnsCounters>,
}

impl World {
    fn new(seed: u64, natures: &[(&str, Nature)]) -> Self {
        let mut ids = fastrand::Rng::with_seed(seed);
        let counters = Rc::new(DnsCounters::default());
        let cache = Cache::new(64, TTL_MAX);
        let mut forward = Forward::new(cache, Box::new(move || ids.u16(..)), Rc::clone(&counters));
        let natures: Vec<(SocketAddr, Nature)> = natures.iter().map(|(a, n)| (a.parse().unwrap(), n.clone())).collect();
        forward.set_upstreams(&natures.iter().map(|n| n.0).collect::<Vec<_>>(), true);
        let now = Clock::new(0).now();
        Self {
            forward,
            natures: natures.into_iter().collect(),
            now,
            start: now,
            rng: fastrand::Rng::with_seed(seed),
            events: BTreeMap::new(),
            serial: 0,
            replies: Vec::new(),
            asked: Vec::new(),
            probed: Vec::new(),
            open: std::collections::BTreeSet::new(),
            counters,
        }
    }

    fn ask(&mut self, name: &str, client: u32) {
        let name = wire::encode_name(name).unwrap();
        let question = [&name[..], &kind::A.to_be_bytes(), &class::IN.to_be_bytes()].concat().into();
        let head = Head { id: client as u16, flags: flag::RD, question, edns: None, limit: 512, prefix: None };
        self.forward.ask(self.now, head, None, client);
        self.drain();
    }

    fn drain(&mut self) -> Option<Instant> {
        let mut buf = Vec::new();
        loop {
            assert!(self.forward.exchanges.len() <= EXCHANGES_MAX && self.forward.pending.len() <= PENDING_MAX);
            match self.forward.poll_output(&mut buf) {
                Output::Ask { exchange, upstream, transport } => {
                    assert!(self.open.insert(exchange));
                    let at = wire::plain_name_end(&buf, 12).unwrap();
                    match wire::u16_at(&buf, at) {
                        Some(PROBE_KIND) => self.probed.push((self.now - self.start, upstream)),
                        _ => self.asked.push((self.now - self.start, upstream, transport)),
                    }
                    self.send(exchange, upstream, transport, &buf);
                }
                Output::Close(exchange) => drop(self.open.remove(&exchange)),
                Output::Reply(LOOPING) => {}
                Output::Reply(to) => self.replies.push((self.now - self.start, to, buf.clone())),
                Output::Wait(at) => return at,
            }
        }
    }

    fn send(&mut self, exchange: u32, upstream: SocketAddr, transport: Transport, query: &[u8]) {
        let nature = self.natures[&upstream].clone();
        if transport == Transport::Udp && self.rng.u8(..100) < nature.loss {
            return;
        }
        let refused = nature.unreachable || transport == Transport::Tcp && !nature.tcp;
        if nature.loops {
            return self.event(nature.delay, 0, Event::Back(query.into()));
        }
        let event = if refused { Event::Failure } else { Event::Answer(answer(query, &nature, transport)) };
        self.event(nature.delay, exchange, event);
    }

    fn event(&mut self, after: Duration, exchange: u32, event: Event) {
        self.serial += 1;
        self.events.insert((self.now + after, self.serial), (exchange, event));
    }

    /// Lets everything happen until a time from the start.
    fn run_to(&mut self, until: Duration) {
        let until = self.start + until;
        loop {
            let timer = self.drain();
            let event = self.events.keys().next().copied();
            let next = timer.into_iter().chain(event.map(|e| e.0)).min().filter(|t| *t <= until);
            let Some(next) = next else { break };
            self.now = self.now.max(next);
            match event.filter(|e| e.0 <= next).and_then(|e| self.events.remove(&e)) {
                Some((exchange, Event::Answer(bytes))) => {
                    self.forward.handle_answer(self.now, exchange, &bytes);
                }
                Some((_, Event::Back(query))) => {
                    let query = wire::Query::parse(&query).unwrap();
                    self.forward.ask(self.now, Head::new(&query, 512), None, LOOPING);
                }
                Some((exchange, Event::Failure)) => self.forward.handle_failure(self.now, exchange),
                None => self.forward.handle_timeout(self.now),
            }
        }
        self.now = until;
    }

    fn rcode(&self, i: usize) -> u16 {
        Header::parse(&self.replies[i].2).unwrap().flags & flag::RCODE
    }

    fn ttl(&self, i: usize) -> u32 {
        Records::new(&self.replies[i].2).unwrap().next().unwrap().unwrap().ttl
    }
}

fn answer(query: &[u8], nature: &Nature, transport: Transport) -> Vec<u8> {
    let edns = query[11] == 1;
    let end = wire::plain_name_end(query, 12).unwrap() + 4;
    let mut reply = query[..end].to_vec();
    if nature.folds {
        reply[12..end].make_ascii_lowercase();
    }
    let cut = nature.truncates && transport == Transport::Udp;
    let rcode = if edns && nature.no_edns { rcode::FORMERR } else { nature.rcode };
    reply[2] |= 0x80 | if cut { 2 } else { 0 };
    reply[3] = 0x80 | rcode as u8;
    reply[11] = 0;
    if rcode == rcode::NOERROR && !cut {
        reply[7] = 1;
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        reply.extend_from_slice(&nature.ttl.to_be_bytes());
        reply.extend_from_slice(&[0, 4, 192, 0, 2, 80]);
    }
    if edns && !nature.no_edns {
        reply[11] = 1;
        wire::push_opt(&mut reply, 0, false);
    }
    reply
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn dead() -> Nature {
    Nature { loss: 100, ..Nature::default() }
}

#[test]
fn a_dead_upstream_costs_one_hedge_and_is_asked_last_from_then_on() {
    let mut w = World::new(1, &[(A, dead()), (B, Nature::default())]);
    w.ask("a.example", 1);
    w.run_to(ms(1000));
    assert_eq!(w.replies[0].0, HEDGE + ms(10));
    w.ask("b.example", 2);
    w.run_to(ms(1500));
    assert_eq!(w.replies[1].0, ms(1010), "the one that works is asked first");
    assert_eq!((w.asked.len(), w.probed.len()), (3, 1));
    w.run_to(ms(3000));
    assert_eq!(w.open.len(), 0);
}

#[test]
fn a_silent_upstream_is_asked_three_times_and_then_it_is_servfail() {
    let mut w = World::new(1, &[(A, dead())]);
    w.ask("a.example", 1);
    w.run_to(ms(8000));
    let times: Vec<Duration> = w.asked.iter().map(|a| a.0).collect();
    assert_eq!(times, [ms(0), ms(1000), ms(3000)]);
    assert_eq!((w.replies.len(), w.replies[0].0, w.rcode(0)), (1, DEADLINE, rcode::SERVFAIL));
    assert_eq!((w.counters.upstream_timeouts.get(), w.open.len()), (1, 0));
}

#[test]
fn unreachable_ones_fail_at_once() {
    let nature = Nature { unreachable: true, delay: ms(0), ..Nature::default() };
    let mut w = World::new(1, &[(A, nature.clone()), (B, nature)]);
    w.ask("a.example", 1);
    w.run_to(ms(0));
    assert_eq!((w.replies.len(), w.rcode(0), w.open.len()), (1, rcode::SERVFAIL, 0));
}

#[test]
fn a_refusal_is_passed_on_only_when_nobody_does_better() {
    let refusing = Nature { rcode: rcode::REFUSED, ..Nature::default() };
    let mut w = World::new(1, &[(A, refusing.clone()), (B, Nature::default())]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    assert_eq!((w.replies[0].0, w.rcode(0)), (ms(20), rcode::NOERROR));
    let mut w = World::new(1, &[(A, refusing.clone()), (B, refusing)]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    w.ask("a.example", 2);
    w.run_to(ms(200));
    assert_eq!((w.rcode(0), w.rcode(1), w.asked.len()), (rcode::REFUSED, rcode::REFUSED, 2), "kept for a while");
    w.run_to(ms(6000));
    w.ask("a.example", 3);
    w.run_to(ms(6100));
    assert_eq!(w.asked.len(), 4, "and not for long");
}

#[test]
fn forged_answers_are_not_taken() {
    let mut w = World::new(1, &[(A, Nature { delay: ms(500), ..Nature::default() })]);
    let mut buf = Vec::new();
    let name = wire::encode_name("a.example").unwrap();
    let question = [&name[..], &[0, 1, 0, 1]].concat().into();
    let head = Head { id: 7, flags: 0, question, edns: None, limit: 512, prefix: None };
    w.forward.ask(w.now, head, None, 1);
    let Output::Ask { exchange, .. } = w.forward.poll_output(&mut buf) else { panic!("no query") };
    let good = answer(&buf, &Nature::default(), Transport::Udp);
    let forged = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad
    };
    for bad in [
        forged(&|m| m[1] ^= 1),
        forged(&|m| m[2] &= 0x7f),
        forged(&|m| m[13] ^= 1),
        forged(&|m| m[5] = 0),
        forged(&|m| m.truncate(20)),
        forged(&|m| m[7] = 9),
        vec![],
    ] {
        assert!(!w.forward.handle_answer(w.now, exchange, &bad));
        assert!(matches!(w.forward.poll_output(&mut buf), Output::Wait(_)));
    }
    let Output::Wait(_) = w.forward.poll_output(&mut buf) else { panic!() };
    // a guess that has everything but the letters' case costs a question, and tells nobody anything
    assert!(w.forward.handle_answer(w.now, exchange, &forged(&|m| m[13] ^= 0x20)));
    assert_eq!(w.forward.poll_output(&mut buf), Output::Close(exchange));
    let Output::Ask { exchange: again, .. } = w.forward.poll_output(&mut buf) else { panic!("no second query") };
    assert!(w.forward.handle_answer(w.now, exchange, &good), "too late");
    assert!(matches!(w.forward.poll_output(&mut buf), Output::Wait(_)));
    assert!(w.forward.handle_answer(w.now, again, &answer(&buf, &Nature::default(), Transport::Udp)));
    assert_eq!(w.forward.poll_output(&mut buf), Output::Close(again));
    assert_eq!(w.forward.poll_output(&mut buf), Output::Reply(1));
    assert_eq!(w.counters.malformed.get(), 8);
}

#[test]
fn queries_have_letters_in_random_case_where_the_upstream_keeps_them() {
    let mut w = World::new(1, &[(A, Nature::default()), (B, Nature::default())]);
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..40 {
        let mut buf = Vec::new();
        let name = wire::encode_name(&format!("a-long-enough-name{i}.example")).unwrap();
        let question = [&name[..], &[0, 1, 0, 1]].concat().into();
        let head = Head { id: 7, flags: 0, question, edns: None, limit: 512, prefix: None };
        w.forward.ask(w.now, head, None, i);
        let Output::Ask { .. } = w.forward.poll_output(&mut buf) else { panic!("no query") };
        assert!(buf[12..].to_ascii_lowercase().starts_with(&name));
        let case = |b: &u8| b.is_ascii_uppercase();
        seen.insert(buf[12..32].iter().map(case).collect::<Vec<_>>());
    }
    assert!(seen.len() > 35, "{}", seen.len());

    let mut w = World::new(1, &[(A, Nature { folds: true, ..Nature::default() })]);
    for (i, name) in ["a.example", "b.example", "c.example"].iter().enumerate() {
        w.ask(name, i as u32);
        w.run_to(ms(100 * (i as u64 + 1)));
        assert_eq!((w.replies.len(), w.rcode(i)), (i + 1, rcode::NOERROR));
    }
    assert_eq!(w.asked.len(), 4, "once it is known, it is asked in lower case at once");
    assert!(w.asked.iter().all(|a| a.2 == Transport::Udp));
}

#[test]
fn an_answer_that_comes_late_changes_nothing() {
    let slow = Nature { delay: ms(700), ttl: 1000, ..Nature::default() };
    let mut w = World::new(1, &[(A, slow), (B, Nature { ttl: 2, ..Nature::default() })]);
    w.ask("a.example", 1);
    w.run_to(ms(1000));
    assert_eq!((w.replies.len(), w.replies[0].0), (1, HEDGE + ms(10)));
    w.ask("a.example", 2);
    w.run_to(ms(1001));
    assert_eq!((w.replies.len(), w.ttl(1)), (2, 2), "the cache has what was given");
}

#[test]
fn an_upstream_that_asks_us_is_found_out_and_left() {
    let looping = Nature { loops: true, ..Nature::default() };
    let mut w = World::new(1, &[(A, looping.clone()), (B, Nature::default())]);
    w.ask("a.example", 1);
    w.run_to(ms(1000));
    assert_eq!((w.replies[0].0, w.probed.len()), (HEDGE + ms(10), 1));
    for i in 0..50 {
        w.ask(&format!("n{i}.example"), i);
        w.run_to(ms(2000 + 1000 * u64::from(i)));
    }
    assert_eq!(w.asked.iter().filter(|a| a.1 == A.parse().unwrap()).count(), 1, "never again");
    assert_eq!((w.replies.len(), w.open.len()), (51, 0));

    // alone: the first waits in vain, those behind it fail at once, and after a while it is tried again
    let mut w = World::new(1, &[(A, looping)]);
    w.ask("a.example", 1);
    w.run_to(ms(5500));
    assert_eq!((w.replies[0].0, w.rcode(0)), (DEADLINE, rcode::SERVFAIL));
    w.ask("b.example", 2);
    assert_eq!((w.replies[1].0, w.rcode(1)), (ms(5500), rcode::SERVFAIL));
    w.natures.insert(A.parse().unwrap(), Nature::default());
    w.run_to(ms(310_000));
    w.ask("b.example", 3);
    w.run_to(ms(311_000));
    assert_eq!(w.rcode(2), rcode::NOERROR);
}

#[test]
fn names_below_a_stub_domain_are_asked_of_its_servers_only() {
    let mut w = World::new(1, &[(A, Nature::default()), (B, Nature { ttl: 7, ..Nature::default() })]);
    w.forward.set_upstreams(&[A.parse().unwrap()], true);
    w.forward.set_stub(&wire::encode_name("corp.example").unwrap(), &[B.parse().unwrap()]);
    for (i, name) in ["www.Corp.Example", "corp.example", "xcorp.example", "example"].iter().enumerate() {
        w.ask(name, i as u32);
        w.run_to(ms(100 * (i as u64 + 1)));
    }
    let to: Vec<String> = w.asked.iter().map(|a| a.1.to_string()).collect();
    assert_eq!(to, [B, B, A, A]);
    w.natures.insert(B.parse().unwrap(), dead());
    w.ask("other.corp.example", 9);
    w.run_to(ms(6000));
    assert_eq!((w.replies.len(), w.rcode(4)), (5, rcode::SERVFAIL), "a private name is not told to others");
    assert_eq!(w.asked.iter().filter(|a| a.1 == A.parse().unwrap()).count(), 2);
}

#[test]
fn hot_names_are_fetched_before_they_end() {
    let mut w = World::new(1, &[(A, Nature { ttl: 60, delay: ms(50), ..Nature::default() })]);
    for second in 0..300 {
        w.ask("hot.example", second);
        w.run_to(ms(1000 * u64::from(second + 1)));
    }
    let waited = w.replies.iter().filter(|r| r.0.as_millis() % 1000 != 0).count();
    assert_eq!((w.replies.len(), waited), (300, 1), "only the first waits");
    assert!((5..=7).contains(&w.asked.len()), "{}", w.asked.len());
}

#[test]
fn ten_minutes_without_upstreams() {
    let good = Nature { ttl: 30, ..Nature::default() };
    let mut w = World::new(1, &[(A, good.clone()), (B, good.clone())]);
    w.ask("hot.example", 0);
    w.run_to(ms(1000));
    let set = |w: &mut World, nature: &Nature| {
        w.natures.values_mut().for_each(|n| *n = nature.clone());
    };
    set(&mut w, &dead());
    let mut late = Duration::ZERO;
    for i in 1..=600 {
        let before = w.replies.len();
        let asked = w.now - w.start;
        w.ask("hot.example", i);
        w.ask("cold.example", 10_000 + i);
        w.run_to(ms(1000 * u64::from(i + 1)));
        if let Some(reply) = w.replies[before..].iter().find(|r| r.1 == i) {
            late = late.max(reply.0 - asked);
            assert_eq!(Header::parse(&reply.2).unwrap().flags & flag::RCODE, rcode::NOERROR, "at {i} s");
        }
        assert!(w.forward.pending.len() <= 4 && w.open.len() <= 16, "at {i} s");
    }
    w.run_to(ms(606_000));
    assert!(late <= STALE_AFTER, "{late:?}");
    assert_eq!(w.replies.iter().filter(|r| r.1 <= 600).count(), 601, "each was answered, stale");
    set(&mut w, &good);
    let back = w.now - w.start;
    let mut fresh = None;
    for i in 0..20 {
        w.ask("cold.example", 20_000 + i);
        w.run_to(back + ms(100 * u64::from(i + 1)));
        let good = |r: &&(Duration, u32, Vec<u8>)| {
            r.1 >= 20_000 && Header::parse(&r.2).unwrap().flags & flag::RCODE == rcode::NOERROR
        };
        fresh = fresh.or_else(|| w.replies.iter().find(good).map(|r| r.0));
    }
    assert!(fresh.is_some_and(|at| at - back < ms(2000)), "{fresh:?} after {back:?}");
}

#[test]
fn a_new_link_forgets_what_was_not_there() {
    let missing = Nature { rcode: rcode::NXDOMAIN, ..Nature::default() };
    let mut w = World::new(1, &[(A, missing)]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    w.natures.insert(A.parse().unwrap(), dead());
    w.ask("b.example", 2);
    w.run_to(ms(3500));
    assert_eq!((w.replies.len(), w.rcode(0)), (1, rcode::NXDOMAIN));
    w.natures.insert(A.parse().unwrap(), Nature::default());
    w.forward.handle_link_change(w.now);
    w.run_to(ms(3600));
    assert_eq!((w.replies.len(), w.rcode(1)), (2, rcode::NOERROR), "who waits is served at once");
    w.ask("a.example", 3);
    w.run_to(ms(3700));
    assert_eq!(w.rcode(2), rcode::NOERROR);
}

#[test]
fn all_who_ask_the_same_share_one_query_and_keep_their_own_id_and_case() {
    let mut w = World::new(1, &[(A, Nature::default())]);
    for (i, name) in ["www.example.com", "WWW.example.com", "www.EXAMPLE.com"].iter().enumerate() {
        w.ask(name, i as u32);
    }
    w.ask("www.example.com", 0); // the first asks again: it waits already
    w.run_to(ms(100));
    assert_eq!((w.asked.len(), w.replies.len()), (1, 3));
    let mut ids: Vec<u8> = w.replies.iter().map(|r| r.2[1]).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2]);
    assert!(w.replies.iter().all(|r| r.1 as u8 == r.2[1]));
}

#[test]
fn truncated_answers_are_asked_again_by_tcp_and_passed_on_where_that_is_shut() {
    let truncating = Nature { truncates: true, ..Nature::default() };
    let mut w = World::new(1, &[(A, truncating.clone())]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    assert_eq!(w.asked.iter().map(|a| a.2).collect::<Vec<_>>(), [Transport::Udp, Transport::Tcp]);
    assert_eq!(w.replies[0].2[2] & 2, 0);
    let mut w = World::new(1, &[(A, Nature { tcp: false, ..truncating })]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    assert_eq!(w.replies[0].2[2] & 2, 2);
    w.ask("a.example", 2);
    w.run_to(ms(200));
    assert_eq!(w.asked.len(), 4, "a truncated answer is not kept");
}

#[test]
fn an_upstream_without_edns_is_asked_without() {
    let mut w = World::new(1, &[(A, Nature { no_edns: true, ..Nature::default() })]);
    w.ask("a.example", 1);
    w.run_to(ms(100));
    assert_eq!((w.asked.len(), w.rcode(0)), (2, rcode::NOERROR));
}

#[test]
fn ttls_count_down_and_what_is_stale_is_given_when_nobody_answers() {
    let mut w = World::new(1, &[(A, Nature { ttl: 10, ..Nature::default() })]);
    w.ask("a.example", 1);
    w.run_to(ms(4010));
    w.ask("a.example", 2);
    w.run_to(ms(12_000));
    assert_eq!((w.ttl(0), w.ttl(1), w.asked.len()), (10, 6, 1));
    w.natures.insert(A.parse().unwrap(), dead());
    w.ask("a.example", 3);
    w.run_to(ms(17_500));
    assert_eq!((w.replies[2].0, w.ttl(2)), (ms(12_000) + STALE_AFTER, 30), "RFC 8767's timer and TTL");
    w.ask("a.example", 4);
    assert_eq!(w.replies[3].0, ms(17_500), "now that it is known to be down, at once");
    w.natures.insert(A.parse().unwrap(), Nature { ttl: 10, ..Nature::default() });
    w.run_to(ms(60_000));
    w.ask("a.example", 5);
    w.run_to(ms(61_000));
    assert_eq!((w.ttl(4), w.open.len()), (10, 0), "and fresh when it is back");
}

#[test]
fn nothing_grows_without_bound() {
    let mut w = World::new(1, &[(A, dead()), (B, dead())]);
    for i in 0..2000 {
        w.ask(&format!("n{i}.example"), i);
    }
    assert_eq!(w.forward.pending.len(), PENDING_MAX);
    assert_eq!(w.counters.overflow.get(), 2000 - PENDING_MAX as u64);
    w.run_to(ms(10_000));
    assert_eq!((w.replies.len(), w.forward.pending.len(), w.forward.by_key.len(), w.open.len()), (2000, 0, 0, 0));
    let mut w = World::new(1, &[(A, dead())]);
    for i in 0..WAITERS_MAX as u32 + 5 {
        w.ask("same.example", i);
    }
    assert_eq!(w.replies.len(), 5);
}

#[test]
fn without_upstreams_it_is_a_refusal_or_a_failure() {
    let mut w = World::new(1, &[]);
    w.ask("a.example", 1);
    w.forward.set_upstreams(&[], false);
    w.ask("a.example", 2);
    assert_eq!((w.rcode(0), w.rcode(1)), (rcode::SERVFAIL, rcode::REFUSED));
}

#[test]
fn everyone_gets_exactly_one_reply_in_time_in_any_world() {
    for seed in crate::seeds(3000) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut nature = || Nature {
            delay: ms(rng.u64(..3000)),
            loss: rng.u8(..=100),
            rcode: rng.choice([0, 0, 0, 2, 3, 5]).unwrap_or(0),
            truncates: rng.bool(),
            tcp: rng.bool(),
            no_edns: rng.u8(..5) == 0,
            unreachable: rng.u8(..5) == 0,
            folds: rng.u8(..5) == 0,
            loops: rng.u8(..8) == 0,
            ttl: rng.u32(..20),
        };
        let natures = [(A, nature()), (B, nature()), ("192.0.2.3:53", nature())];
        let mut w = World::new(seed, &natures[..1 + seed as usize % 3]);
        let mut asked = BTreeMap::new();
        for i in 0..20 {
            w.ask(["a.example", "b.example", "c.example"][i as usize % 3], i);
            asked.insert(i, w.now - w.start);
            let step = ms(w.rng.u64(..3000));
            w.run_to(w.now - w.start + step);
        }
        w.run_to(w.now - w.start + ms(5000));
        assert_eq!(w.replies.len(), 20, "seed {seed}");
        w.run_to(w.now - w.start + ms(600_000));
        for (when, to, reply) in &w.replies {
            let since = asked.remove(to).unwrap_or_else(|| panic!("seed {seed}: two replies"));
            assert!(*when - since <= DEADLINE, "seed {seed}");
            assert!(Records::new(reply).unwrap().all(|r| r.is_ok()), "seed {seed}");
        }
        assert_eq!((w.open.len(), w.forward.pending.len(), w.forward.by_key.len()), (0, 0, 0), "seed {seed}");
    }
}
