//! The conformance table of DNS cases (fixtures/dns_cases.json; its `format` key says how to read it) against the pure
//! cores: answers, forwarder, cache, in virtual time, with a scripted upstream. simple-dns reads the replies.

use crate::{
    dns_feed::{By, Fed},
    dns_fixture::FakeUpstream,
    dns_world,
    json::Json,
};
use simple_dns::{Packet, rdata::RData};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};
use weft::{
    clock::Clock,
    config::{Config, Upstream},
    dns::{
        answer::{self, Answerer, Outcome, Via},
        cache::Cache,
        foreign::Head,
        forward::{Forward, Output},
        wire::{HEADER, Query, Records, kind, plain_name_end},
        zone::Zone,
    },
    metrics::DnsCounters,
};

#[test]
fn conformance_table() {
    conformance(By::Objects);
}

#[test]
fn conformance_table_by_list_and_watch() {
    conformance(By::ListWatch);
}

#[test]
fn conformance_table_from_manifests() {
    conformance(By::Manifests);
}

fn conformance(by: By) {
    let all = Json::parse(include_str!("fixtures/dns_cases.json"));
    let mut groups: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for case in all["cases"].list() {
        let id = case["id"].text();
        assert!(seen.insert(id), "{id} twice");
        let result = run(&all, case, by);
        let group = groups.entry(case["group"].text()).or_default();
        group.1 += 1;
        group.0 += u32::from(result.is_ok());
        if let Err(why) = result {
            wrong.push(format!("{id} ({}, {}): {why}", case["level"].text(), case["title"].text()));
        }
    }
    let (good, of) = groups.values().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    let mut said = format!("\ndns_cases, {by:?}: {good} of {of}:");
    for (group, (good, of)) in &groups {
        said += &format!(" {group} {good}/{of}");
    }
    // Past the harness, which shows the prints of failures only.
    std::io::stdout().write_all((said + "\n").as_bytes()).unwrap();
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(of, 157);
}

/// The configuration of a case as its user would write it.
fn toml(config: &Json) -> String {
    let texts = |key: &str| config[key].list().iter().map(|z| z.text().to_owned()).collect::<Vec<_>>();
    let known = [
        "about",
        "zones",
        "pods",
        "fallthrough",
        "ttl",
        "forward",
        "namespaces",
        "podnames",
        "unsynced",
        "ignore_empty",
        "cache",
    ];
    let unknown = config.object().keys().find(|k| !known.contains(&k.as_str()));
    assert_eq!(unknown, None, "a setting that is not written");
    let [domain, reverse @ ..] = &texts("zones")[..] else { panic!("no zone") };
    let upstream: &[&str] = if config["forward"] == Json::Bool(false) { &[] } else { &["192.0.2.53"] };
    let mut out = format!(
        "[dns]\ndomain = {domain:?}\nzones = {reverse:?}\nfallthrough = {:?}\nttl = {}\npods = {:?}\nupstream = {upstream:?}\n",
        texts("fallthrough"),
        config["ttl"].number().unwrap(),
        config["pods"].text(),
    );
    if config.has("namespaces") {
        out += &format!("namespaces = {:?}\n", texts("namespaces"));
    }
    if config["podnames"].is_true() {
        out += "endpoint_pod_names = true\n";
    }
    if config["ignore_empty"].is_true() {
        out += "empty_services = \"nxdomain\"\n";
    }
    if let Some(cap) = config["cache"].number() {
        out += &format!("cache_ttl = {cap}\n");
    }
    out
}

fn run(all: &Json, case: &Json, by: By) -> Result<(), String> {
    let want = &case["want"];
    match (&want["tcp_script"], &want["udp_script"]) {
        (Json::Text(script), _) if script == "flood" => return dns_world::idle_connections(200),
        (_, Json::Text(script)) if script == "source-address" => return dns_world::source_address(),
        (Json::Null, Json::Null) => {}
        other => return Err(format!("unknown script {other:?}")),
    }
    let mut world = World::new(all, case["config"].text(), by);
    for step in case["setup"].list() {
        world.setup(step)?;
    }
    if case.has("raw") {
        return raw(&mut world, &case["raw"], want);
    }
    let q = &case["q"];
    let query = encode(q, q["name"].text(), q["type"].text());
    let tcp = q["transport"] == Json::Text("tcp".into());
    let via = if tcp { Via::Tcp } else { Via::Udp };
    let start = world.now;
    let reply = world.ask(&query, via).ok_or("no reply")?;
    let took = (world.now - start).as_millis() as u64;
    if let Some(most) = want["max_ms"].number() {
        ensure(took <= most, || format!("took {took} ms"))?;
    }
    check(&query, &reply, q["name"].text(), want)?;
    if let Some(hits) = want["upstream_hits"].number() {
        ensure(world.upstream.hits == hits, || format!("{} upstream queries", world.upstream.hits))?;
    }
    for then in want["then"].list() {
        follow(&mut world, q, then, &reply)?;
    }
    Ok(())
}

fn follow(world: &mut World, q: &Json, then: &Json, before: &[u8]) -> Result<(), String> {
    let known = ["wait_ms", "ttl_lower", "upstream_hits_total", "type", "answer", "pair", "same_socket"];
    if let Some(other) = then.object().keys().find(|k| !known.contains(&k.as_str())) {
        return Err(format!("unknown follow-up {other}"));
    }
    let name = q["name"].text();
    if then.has("pair") {
        for kind in then["pair"].list() {
            let reply = world.ask(&encode(q, name, kind.text()), Via::Udp).ok_or("no reply to one of the pair")?;
            ensure(Packet::parse(&reply).is_ok(), || "unreadable".into())?;
        }
        return Ok(());
    }
    world.now += Duration::from_millis(then["wait_ms"].number().unwrap_or(0));
    let kind = if then.has("type") { then["type"].text() } else { q["type"].text() };
    let reply = world.ask(&encode(q, name, kind), Via::Udp).ok_or("no reply to the follow-up")?;
    let (first, second) = (records(before)?.0, records(&reply)?.0);
    if then["ttl_lower"].is_true() {
        ensure(first[0].2 > second[0].2, || format!("TTL {} then {}", first[0].2, second[0].2))?;
    }
    if let Some(total) = then["upstream_hits_total"].number() {
        ensure(world.upstream.hits == total, || format!("{} upstream queries in all", world.upstream.hits))?;
    }
    if then.has("answer") {
        let got: Vec<&str> = second.iter().map(|r| r.3.as_str()).collect();
        let wanted: Vec<&str> = then["answer"].list().iter().map(Json::text).collect();
        ensure(got == wanted, || format!("{got:?}"))?;
    }
    Ok(())
}

fn raw(world: &mut World, raw: &Json, want: &Json) -> Result<(), String> {
    let hex = raw["hex"].text();
    let message: Vec<u8> =
        (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
    let reply = world.ask(&message, Via::Udp);
    if want["no_reply"].is_true() {
        return ensure(reply.is_none(), || format!("{reply:?}"));
    }
    let code = reply.as_deref().map(rcode);
    let allowed = want["rcode_any"].list();
    let fits = match code {
        None => allowed.contains(&Json::Null),
        Some(code) => allowed.contains(&Json::Text(code.into())),
    };
    ensure(fits, || format!("rcode {code:?}"))?;
    if let Some(reply) = reply {
        ensure(reply[..2] == message[..2], || "another id".into())?;
        ensure(reply[2] & 1 == message[2] & 1, || "RD is not echoed".into())?;
        ensure(reply[3] & 0x10 == message[3] & 0x10, || "CD is not echoed".into())?;
    }
    Ok(())
}

fn ensure(good: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(why()) }
}

/// Owner, type, TTL, data as the table writes them.
type Line = (String, String, u32, String);
type Sections = (Vec<Line>, Vec<Line>, Vec<Line>);

fn check(query: &[u8], reply: &[u8], name: &str, want: &Json) -> Result<(), String> {
    let code = rcode(reply);
    let codes = std::iter::once(&want["rcode"]).chain(want["rcode_alt"].list());
    ensure(codes.into_iter().any(|c| c.text() == code), || format!("rcode {code}"))?;
    let bit = |at: usize, mask: u8| reply[at] & mask != 0;
    let flags = [("aa", bit(2, 4)), ("tc", bit(2, 2)), ("ra", bit(3, 0x80))];
    for (flag, set) in flags {
        let free = want[flag] == Json::Text("any".into()) || want[format!("{flag}_alt").as_str()].is_true();
        ensure(free || want[flag] == Json::Bool(set), || format!("{flag} is {set}"))?;
    }
    ensure(reply[..2] == query[..2] && bit(2, 0x80), || "another id, or no response".into())?;
    let (answer, authority, additional) = records(reply)?;
    if want.has("answer_subset_of") {
        let pool: Vec<Want> = want["answer_subset_of"].list().iter().map(|r| Want::new(r, name)).collect();
        let distinct: BTreeSet<&Line> = answer.iter().collect();
        ensure(distinct.len() == answer.len(), || "a record twice".into())?;
        for line in &answer {
            ensure(pool.iter().any(|w| w.fits(line, false)), || format!("unexpected {line:?}"))?;
        }
        if let Some(least) = want["answer_count"].list().first().and_then(Json::number) {
            ensure(answer.len() as u64 >= least, || format!("{} records", answer.len()))?;
        }
    } else {
        let alternatives = std::iter::once(&want["answer"]).chain(want["answer_alt"].list());
        let (ordered, lower) = (want["ordered"].is_true(), want["ttl_max"].is_true());
        let fits = alternatives.into_iter().any(|a| same(&answer, a, name, ordered, lower));
        ensure(fits, || format!("answer {answer:?}"))?;
    }
    check_authority(&authority, want)?;
    if want.has("additional") {
        let fits = same(&additional, &want["additional"], name, false, false);
        let left_out = want["additional_optional"].is_true() && additional.is_empty();
        ensure(fits || left_out, || format!("additional {additional:?}"))?;
    }
    if let Some(most) = want["len_max"].number() {
        ensure(reply.len() as u64 <= most, || format!("{} bytes", reply.len()))?;
    }
    if want["case_exact"].is_true() {
        let end = Query::parse(query).unwrap().question.len() + 12;
        ensure(reply[12..end] == query[12..end], || "the question's case is lost".into())?;
    }
    check_edns(reply, want)
}

fn check_authority(authority: &[Line], want: &Json) -> Result<(), String> {
    if want["authority_optional"].is_true() {
        return Ok(());
    }
    let soa = &want["authority"];
    if matches!(soa, Json::List(_)) {
        return ensure(authority.is_empty(), || format!("authority {authority:?}"));
    }
    let [(owner, kind, ttl, data)] = authority else { return Err(format!("authority {authority:?}")) };
    let minimum = data.split(' ').next_back().and_then(|m| m.parse().ok());
    let fits = owner == soa["soa_owner"].text()
        && kind == "SOA"
        && minimum == soa["minimum"].number()
        && u64::from(*ttl) <= soa["ttl_max"].number().unwrap_or(u64::MAX);
    ensure(fits, || format!("authority {authority:?}"))
}

fn check_edns(reply: &[u8], want: &Json) -> Result<(), String> {
    if !want.has("edns_want") {
        return Ok(());
    }
    let opt = Records::new(reply).unwrap().map(Result::unwrap).find(|r| r.kind == kind::OPT);
    match (&want["edns_want"], opt) {
        (Json::Null, None) => Ok(()),
        (Json::Null, Some(_)) => Err("an OPT that was not asked for".into()),
        (_, None) => Err("no OPT".into()),
        (edns, Some(opt)) => {
            let version = u64::from(opt.ttl >> 16 & 0xff);
            ensure(Some(version) == edns["version"].number(), || format!("EDNS version {version}"))?;
            ensure(edns["do"].is_null() || edns["do"] == Json::Bool(opt.ttl & 0x8000 != 0), || "DO".into())?;
            ensure(opt.data.is_empty(), || "options in the OPT".into())
        }
    }
}

fn same(got: &[Line], want: &Json, name: &str, ordered: bool, lower: bool) -> bool {
    let wanted: Vec<Want> = want.list().iter().map(|r| Want::new(r, name)).collect();
    if got.len() != wanted.len() {
        return false;
    }
    if ordered {
        return wanted.iter().zip(got).all(|(w, g)| w.fits(g, lower));
    }
    let mut left: Vec<&Line> = got.iter().collect();
    wanted.iter().all(|w| left.iter().position(|g| w.fits(g, lower)).map(|i| left.swap_remove(i)).is_some())
}

struct Want {
    owner: String,
    kind: String,
    ttl: Option<u64>,
    data: String,
}

impl Want {
    fn new(record: &Json, name: &str) -> Self {
        let [owner, kind, ttl, data] = record.list() else { panic!("{record:?}") };
        let owner = if owner.text().is_empty() { name } else { owner.text() };
        Self {
            owner: owner.to_ascii_lowercase(),
            kind: kind.text().into(),
            ttl: ttl.number(),
            data: data.text().to_ascii_lowercase(),
        }
    }

    fn fits(&self, (owner, kind, ttl, data): &Line, lower: bool) -> bool {
        let ttl_fits = self.ttl.is_none_or(|t| t == u64::from(*ttl) || lower && u64::from(*ttl) <= t);
        let tokens: Vec<&str> = self.data.split(' ').collect();
        let got: Vec<&str> = data.split(' ').collect();
        let data_fits = tokens.len() == got.len() && tokens.iter().zip(&got).all(|(w, g)| *w == "*" || w == g);
        self.owner == *owner && self.kind == *kind && ttl_fits && data_fits
    }
}

fn rcode(reply: &[u8]) -> &'static str {
    let extended = Records::new(reply)
        .and_then(|mut r| r.find_map(|r| r.ok().filter(|r| r.kind == kind::OPT)))
        .map_or(0, |opt| opt.ttl >> 24);
    match extended << 4 | u32::from(reply[3] & 15) {
        0 => "NOERROR",
        1 => "FORMERR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        4 => "NOTIMP",
        5 => "REFUSED",
        16 => "BADVERS",
        other => panic!("rcode {other}"),
    }
}

/// Answer, authority and additional (without OPT) of a reply, as simple-dns reads them.
fn records(reply: &[u8]) -> Result<Sections, String> {
    let mut reply = reply.to_vec();
    // simple-dns reads no question for a type that it does not know
    if let Some(at) = plain_name_end(&reply, HEADER).filter(|at| reply[*at] == 0xff) {
        reply[at..at + 2].copy_from_slice(&kind::TXT.to_be_bytes());
    }
    let packet = Packet::parse(&reply).map_err(|e| format!("unreadable reply: {e}"))?;
    let lines = |records: &[simple_dns::ResourceRecord<'_>]| {
        records
            .iter()
            .map(|r| {
                let name = |n: &simple_dns::Name<'_>| format!("{n}.").to_ascii_lowercase();
                let (kind, data) = match &r.rdata {
                    RData::A(a) => ("A", std::net::Ipv4Addr::from(a.address).to_string()),
                    RData::AAAA(a) => ("AAAA", std::net::Ipv6Addr::from(a.address).to_string()),
                    RData::CNAME(c) => ("CNAME", name(&c.0)),
                    RData::PTR(p) => ("PTR", name(&p.0)),
                    RData::NS(n) => ("NS", name(&n.0)),
                    RData::SRV(s) => ("SRV", format!("{} {} {} {}", s.priority, s.weight, s.port, name(&s.target))),
                    RData::TXT(t) => ("TXT", format!("\"{}\"", String::try_from(t.clone()).unwrap())),
                    RData::SOA(s) => {
                        ("SOA", format!("{} {} {} {}", name(&s.mname), name(&s.rname), s.serial, s.minimum))
                    }
                    other => panic!("{other:?}"),
                };
                (name(&r.name), kind.to_owned(), r.ttl, data)
            })
            .collect()
    };
    Ok((lines(&packet.answers), lines(&packet.name_servers), lines(&packet.additional_records)))
}

fn kind_number(name: &str) -> u16 {
    let known = [("A", 1), ("NS", 2), ("CNAME", 5), ("SOA", 6), ("PTR", 12), ("HINFO", 13), ("MX", 15), ("TXT", 16)];
    let more = [("AAAA", 28), ("SRV", 33), ("AXFR", 252), ("ANY", 255), ("CAA", 257)];
    let found = known.iter().chain(&more).find(|(n, _)| *n == name).map(|(_, number)| *number);
    found.unwrap_or_else(|| name.strip_prefix("TYPE").expect("a known type").parse().unwrap())
}

fn encode(q: &Json, name: &str, kind: &str) -> Vec<u8> {
    let mut m = vec![0xbe, 0xef, u8::from(q["rd"] != Json::Bool(false)), 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.').filter(|l| !l.is_empty()) {
        m.push(label.len() as u8);
        m.extend_from_slice(label.as_bytes());
    }
    m.push(0);
    m.extend_from_slice(&kind_number(kind).to_be_bytes());
    m.extend_from_slice(&[0, 1]);
    let edns = &q["edns"];
    if !edns.is_null() {
        m[11] = 1;
        let number = |key: &str, default| edns[key].number().unwrap_or(default);
        m.extend_from_slice(&[0, 0, 41]);
        m.extend_from_slice(&(number("size", 1232) as u16).to_be_bytes());
        m.extend_from_slice(&[0, number("version", 0) as u8, if edns["do"].is_true() { 0x80 } else { 0 }, 0]);
        let mut options = Vec::new();
        for option in edns["options"].list() {
            let [code, hex] = option.list() else { panic!("{option:?}") };
            let hex = hex.text();
            options.extend_from_slice(&(code.number().unwrap() as u16).to_be_bytes());
            options.extend_from_slice(&((hex.len() / 2) as u16).to_be_bytes());
            options.extend((0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()));
        }
        m.extend_from_slice(&(options.len() as u16).to_be_bytes());
        m.extend_from_slice(&options);
    }
    m
}

/// The cores with their surroundings, in virtual time.
struct World {
    answerer: Answerer,
    fed: Fed,
    forward: Forward<u32>,
    upstream: FakeUpstream,
    now: Instant,
    asked: u32,
}

impl World {
    fn new(all: &Json, config: &str, by: By) -> Self {
        let config = &all["configs"][config];
        let cfg = Config::parse(&toml(config)).unwrap_or_else(|e| panic!("{e}")).dns;
        let mut rng = fastrand::Rng::with_seed(1);
        let cache = Cache::new(cfg.cache, cfg.cache_ttl);
        let mut forward = Forward::new(cache, Box::new(move || rng.u16(..)), Rc::new(DnsCounters::default()));
        let servers: Vec<SocketAddr> = cfg
            .upstream
            .iter()
            .map(|u| match u {
                Upstream::Server(address) => *address,
                Upstream::ResolvConf(path) => panic!("{path:?}"),
            })
            .collect();
        forward.set_upstreams(&servers, !cfg.upstream.is_empty());
        let mut fed = Fed::new(by, &cfg);
        if !config["unsynced"].is_true() {
            fed.fill(&all["fixture"]);
        }
        Self {
            answerer: Answerer::new(Zone::new(&cfg, 1000).unwrap()),
            fed,
            forward,
            upstream: FakeUpstream {
                names: all["upstream"].clone(),
                dead: config["forward"] == Json::Text("dead".into()),
                hits: 0,
            },
            now: Clock::new(0).now(),
            asked: 0,
        }
    }

    fn setup(&mut self, step: &Json) -> Result<(), String> {
        match step.object().keys().next().map(String::as_str) {
            Some("apply") => self.fed.apply(&step["apply"]),
            Some("delete") => self.fed.delete(&step["delete"]),
            // Nothing tells of changes from now on.
            Some("api") if step["api"].text() == "down" => {}
            Some("restart") if step["restart"].is_true() => self.fed.restart(),
            _ => return Err(format!("unknown step {step:?}")),
        }
        Ok(())
    }

    /// One query and, in as much virtual time as it takes, its reply.
    fn ask(&mut self, message: &[u8], via: Via) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let outcome = self.fed.table.update(|t| self.answerer.reply(message, via, t, &mut out));
        let target = match outcome {
            Outcome::Reply | Outcome::Reject => return Some(out),
            Outcome::Drop => return None,
            Outcome::Forward => None,
            Outcome::Chase(target) => Some(target),
        };
        let query = Query::parse(message).unwrap();
        let mut head = Head::new(&query, answer::limit(&query, via));
        head.prefix = target.is_some().then(|| out.into());
        self.asked += 1;
        self.forward.ask(self.now, head, target.as_deref(), self.asked);
        let mut buf = Vec::new();
        loop {
            match self.forward.poll_output(&mut buf) {
                Output::Ask { exchange, transport, .. } => {
                    if let Some(answer) = self.upstream.answer(&buf, transport) {
                        self.now += Duration::from_millis(1);
                        assert!(self.forward.handle_answer(self.now, exchange, &answer), "a good answer was not taken");
                    }
                }
                Output::Close(_) => {}
                Output::Reply(to) => {
                    assert_eq!(to, self.asked);
                    return Some(buf);
                }
                Output::Wait(at) => {
                    self.now = at.expect("a reply is due");
                    self.forward.handle_timeout(self.now);
                }
            }
        }
    }
}
