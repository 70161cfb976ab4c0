//! Answers of upstreams: what is kept of them, for how long, and how they are given to a client.

use super::wire::{self, Edns, HEADER, Header, OPT_LEN, Query, Records, Reply, Section, flag, kind, rcode};
use simple_dns::{Name, Packet, rdata::RData};
use std::{net::IpAddr, ops::Range};

/// RFC 2308 section 5: negative answers are kept for one to three hours at most.
const NEGATIVE_MAX: u32 = 10_800;
/// RFC 8767 section 4: the TTL of a stale answer.
const STALE_TTL: u32 = 30;

/// What a reply needs of the query that it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub id: u16,
    pub flags: u16,
    /// Name, type and class with the letters' case of the client.
    pub question: Box<[u8]>,
    pub edns: Option<Edns>,
    /// Bytes that the reply may have.
    pub limit: usize,
    /// A reply without OPT that ends in the CNAME whose target is being asked for.
    pub prefix: Option<Box<[u8]>>,
}

impl Head {
    #[must_use]
    pub fn new(query: &Query<'_>, limit: usize) -> Self {
        let (id, flags, edns) = (query.id, query.flags, query.edns);
        Self { id, flags, question: query.question.into(), edns, limit, prefix: None }
    }

    fn query(&self) -> Query<'_> {
        let name = &self.question[..self.question.len().saturating_sub(4)];
        let at = |i| wire::u16_at(&self.question, name.len() + i).unwrap_or(0);
        let (id, flags, edns) = (self.id, self.flags, self.edns);
        Query { id, flags, question: &self.question, name, kind: at(0), class: at(2), edns }
    }

    /// A reply without an answer; of a CNAME whose target nobody can be asked for, the CNAME is all that is known.
    pub fn refuse(&self, code: u16, out: &mut Vec<u8>) {
        match &self.prefix {
            None => Reply::new(&self.query(), self.limit, out).finish(code),
            Some(prefix) => {
                out.clear();
                out.extend_from_slice(prefix);
                let code = if code == rcode::REFUSED { rcode::NOERROR } else { code };
                Reply::resume(&self.query(), self.limit, out).finish(code);
            }
        }
    }

    /// A reply from an answer that [`keep`] let through, for the same question or for the CNAME's target.
    pub fn answer(&self, kept: &[u8], aging: Aging, out: &mut Vec<u8>) {
        match &self.prefix {
            None => self.pass_on(kept, aging, out),
            Some(prefix) => {
                out.clear();
                out.extend_from_slice(prefix);
                join(&self.query(), kept, aging, self.limit, out);
            }
        }
    }

    fn pass_on(&self, kept: &[u8], aging: Aging, out: &mut Vec<u8>) {
        let body = HEADER + self.question.len();
        let (Some(header), Some(rest)) = (Header::parse(kept), kept.get(body..)) else {
            return self.refuse(rcode::SERVFAIL, out);
        };
        out.clear();
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&[0; 10]);
        out.extend_from_slice(&self.question);
        out.extend_from_slice(rest);
        let opt = if self.edns.is_some() { OPT_LEN } else { 0 };
        let mut counts = [1, 0, 0, 0];
        let mut end = body;
        let mut cut = header.flags & flag::TC;
        for record in Records::new(kept).into_iter().flatten().flatten() {
            if record.data.end + opt > self.limit {
                if record.section != Section::Additional {
                    cut = flag::TC;
                }
                break;
            }
            out[record.ttl_at..record.ttl_at + 4].copy_from_slice(&aging.ttl(record.ttl).to_be_bytes());
            counts[record.section as usize + 1] += 1;
            end = record.data.end;
        }
        out.truncate(end);
        if let Some(edns) = self.edns {
            wire::push_opt(out, 0, edns.dnssec_ok);
            counts[3] += 1;
        }
        // RFC 6840 section 5.7: AD only for those who asked
        let wants_ad = self.edns.is_some_and(|e| e.dnssec_ok);
        let passed = header.flags & (flag::RCODE | if wants_ad { flag::AD } else { 0 });
        let flags = flag::QR | flag::RA | self.flags & (flag::RD | flag::CD) | passed | cut;
        out[2..4].copy_from_slice(&flags.to_be_bytes());
        for (i, count) in counts.iter().enumerate() {
            out[4 + 2 * i..6 + 2 * i].copy_from_slice(&u16::to_be_bytes(*count));
        }
    }
}

/// How TTLs are counted down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aging {
    /// Seconds since the answer came.
    pub age: u32,
    /// No TTL is above this.
    pub cap: u32,
    pub stale: bool,
}

impl Aging {
    fn ttl(self, ttl: u32) -> u32 {
        if self.stale { STALE_TTL.min(self.cap) } else { plain_ttl(ttl).min(self.cap).saturating_sub(self.age) }
    }
}

/// RFC 2181 section 8: a TTL with its top bit set is zero.
fn plain_ttl(ttl: u32) -> u32 {
    if ttl > i32::MAX as u32 { 0 } else { ttl }
}

/// Whether a message answers a question; a refusal may come without one.
#[must_use]
pub fn answers(message: &[u8], id: u16, question: &[u8]) -> Option<Header> {
    let header = Header::parse(message)?;
    let bare = header.counts == [0; 4] && !matches!(header.flags & flag::RCODE, rcode::NOERROR | rcode::NXDOMAIN);
    let same = header.counts[0] == 1
        && message.get(HEADER..HEADER + question.len()).is_some_and(|q| q.eq_ignore_ascii_case(question));
    (header.id == id && header.flags & flag::QR != 0 && header.flags & flag::OPCODE == 0 && (bare || same))
        .then_some(header)
}

/// Whether the question of a message that [`answers`] has the letters' case of ours; one without any has.
#[must_use]
pub fn repeats(message: &[u8], question: &[u8]) -> bool {
    message.get(HEADER..HEADER + question.len()).is_none_or(|q| q == question) || message.get(5) == Some(&0)
}

/// Puts the question as we know it in the place of the one in a message that [`answers`]: what points into it is then
/// spelt so too.
pub fn ask_as(kept: &mut [u8], question: &[u8]) {
    if let Some(place) = kept.get_mut(HEADER..HEADER + question.len()).filter(|q| q.eq_ignore_ascii_case(question)) {
        place.copy_from_slice(question);
    }
}

/// Gives each letter of a question's name a random case.
pub fn mix_case(question: &mut [u8], random: &mut dyn FnMut() -> u16) {
    let name = question.len().saturating_sub(4);
    let (mut bits, mut left) = (0, 0);
    // a length byte is below 64 and thus no letter
    for letter in question[..name].iter_mut().filter(|b| b.is_ascii_alphabetic()) {
        if left == 0 {
            (bits, left) = (random(), 16);
        }
        *letter ^= if bits & 1 == 0 { 0 } else { 0x20 };
        (bits, left) = (bits >> 1, left - 1);
    }
}

/// An answer without its OPT record, which is between us and the upstream; None where a record is cut.
/// Additional records behind the OPT go too: a name among them may be compressed against what is cut out.
#[must_use]
pub fn keep(message: &[u8]) -> Option<Vec<u8>> {
    let mut counts = [0_u16; 3];
    let mut end = None;
    let mut last = HEADER;
    for record in Records::new(message)? {
        let record = record.ok()?;
        if record.kind == kind::OPT && end.is_none() {
            end = Some(record.start);
        }
        if end.is_none() {
            counts[record.section as usize] += 1;
        }
        last = record.data.end;
    }
    let [_, answers, authority, _] = Header::parse(message)?.counts;
    if counts[..2] != [answers, authority] {
        return None; // an OPT outside the additional section
    }
    let none = answers == 0 && authority == 0 && counts[2] == 0;
    let end = if none { question_end(message)? } else { end.unwrap_or(last) };
    let mut kept = message.get(..end)?.to_vec();
    kept[10..12].copy_from_slice(&counts[2].to_be_bytes());
    Some(kept)
}

fn question_end(message: &[u8]) -> Option<usize> {
    match Header::parse(message)?.counts[0] {
        0 => Some(HEADER),
        _ => Some(wire::plain_name_end(message, HEADER)? + 4),
    }
}

/// Seconds for which an answer may be kept: the lowest TTL of its answers, and for a negative one RFC 2308's.
/// None: not at all.
#[must_use]
pub fn lifetime(kept: &[u8], asked: u16) -> Option<u32> {
    let header = Header::parse(kept)?;
    let (mut least, mut found, mut negative) = (u32::MAX, false, None);
    for record in Records::new(kept)? {
        let record = record.ok()?;
        match record.section {
            Section::Answer => {
                least = least.min(plain_ttl(record.ttl));
                found |= record.kind == asked || asked == wire::class::ANY;
            }
            Section::Authority if record.kind == kind::SOA => {
                let minimum = wire::u32_at(kept, record.data.end.checked_sub(4)?)?;
                negative = Some(plain_ttl(record.ttl).min(plain_ttl(minimum)).min(NEGATIVE_MAX));
            }
            Section::Authority | Section::Additional => {}
        }
    }
    match header.flags & flag::RCODE {
        rcode::NOERROR if found => Some(least),
        rcode::NOERROR | rcode::NXDOMAIN => Some(least.min(negative?)),
        _ => None,
    }
}

/// Appends the answer to a question about a CNAME's target to a reply that ends in that CNAME.
pub fn join(query: &Query<'_>, kept: &[u8], aging: Aging, limit: usize, out: &mut Vec<u8>) {
    let mut reply = Reply::resume(query, limit, out);
    let Some(packet) = packet(kept) else { return reply.finish(rcode::SERVFAIL) };
    let code = Header::parse(kept).map_or(rcode::SERVFAIL, |h| h.flags & flag::RCODE);
    for record in &packet.answers {
        let mut data = Vec::with_capacity(16);
        let kind = match &record.rdata {
            RData::A(a) => {
                data.extend_from_slice(&a.address.to_be_bytes());
                kind::A
            }
            RData::AAAA(aaaa) => {
                data.extend_from_slice(&aaaa.address.to_be_bytes());
                kind::AAAA
            }
            RData::CNAME(target) => {
                write_name(target, &mut data);
                kind::CNAME
            }
            _ => continue, // signatures and the like: only addresses are asked for behind a CNAME
        };
        let fits = reply.record(
            Section::Answer,
            |out| write_name(&record.name, out),
            kind,
            aging.ttl(record.ttl),
            |out| out.extend_from_slice(&data),
        );
        if !fits {
            reply.set(flag::TC);
            break;
        }
    }
    reply.finish(code); // RFC 6604: that of the last name
}

fn write_name(name: &Name<'_>, out: &mut Vec<u8>) {
    for label in name.as_bytes() {
        out.push(label.len() as u8);
        out.extend_from_slice(label);
    }
    out.push(0);
}

/// simple-dns reserves room for as many records as the header claims, so they are counted first.
fn packet(message: &[u8]) -> Option<Packet<'_>> {
    let claimed: usize = Header::parse(message)?.counts[1..].iter().map(|n| usize::from(*n)).sum();
    let there = Records::new(message)?.take_while(Result::is_ok).count();
    if claimed != there {
        return None;
    }
    Packet::parse(message).ok()
}

/// simple-dns tells letters' cases apart.
fn same(a: &Name<'_>, b: &Name<'_>) -> bool {
    a.as_bytes().map(<[u8]>::to_ascii_lowercase).eq(b.as_bytes().map(<[u8]>::to_ascii_lowercase))
}

/// The addresses that an answer leads to from its question.
#[must_use]
pub fn addresses(message: &[u8]) -> Vec<IpAddr> {
    let Some(packet) = packet(message) else { return Vec::new() };
    let Some(mut name) = packet.questions.first().map(|q| &q.qname) else { return Vec::new() };
    for _ in 0..packet.answers.len() {
        let next = packet.answers.iter().find_map(|r| match &r.rdata {
            RData::CNAME(target) if same(&r.name, name) => Some(&target.0),
            _ => None,
        });
        match next {
            Some(target) => name = target,
            None => break,
        }
    }
    let of_name = packet.answers.iter().filter(|r| same(&r.name, name));
    of_name
        .filter_map(|r| match &r.rdata {
            RData::A(a) => Some(IpAddr::from(a.address.to_be_bytes())),
            RData::AAAA(aaaa) => Some(IpAddr::from(aaaa.address.to_be_bytes())),
            _ => None,
        })
        .collect()
}

/// Lower-case question and flags: what makes two queries one.
#[must_use]
pub fn key(name: &[u8], kind: u16, class: u16, head: &Head) -> Box<[u8]> {
    let mut key = Vec::with_capacity(name.len() + 5);
    key.extend(name.iter().map(u8::to_ascii_lowercase));
    key.extend_from_slice(&kind.to_be_bytes());
    key.extend_from_slice(&class.to_be_bytes());
    let dnssec_ok = head.edns.is_some_and(|e| e.dnssec_ok);
    key.push(u8::from(dnssec_ok) | u8::from(head.flags & flag::CD != 0) << 1);
    key.into_boxed_slice()
}

/// The question in a [`key`].
#[must_use]
pub fn question(key: &[u8]) -> &[u8] {
    &key[..key.len().saturating_sub(1)]
}

/// The name in a [`key`], in wire form and lower case.
#[must_use]
pub fn name(key: &[u8]) -> &[u8] {
    &key[..key.len().saturating_sub(5)]
}

/// The flags in a [`key`], for [`write_query`].
#[must_use]
pub fn bits(key: &[u8]) -> u8 {
    key.last().copied().unwrap_or(0)
}

/// The query that goes to an upstream; `bits` are a key's.
pub fn write_query(question: &[u8], bits: u8, id: u16, edns: bool, out: &mut Vec<u8>) {
    let flags = flag::RD | if bits & 2 != 0 { flag::CD } else { 0 };
    out.clear();
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
    out.extend_from_slice(question);
    if edns {
        wire::push_opt(out, 0, bits & 1 != 0);
    }
}

/// Type of the question in a [`key`].
#[must_use]
pub fn asked_kind(key: &[u8]) -> u16 {
    let question: Range<usize> = 0..question(key).len();
    question.end.checked_sub(4).and_then(|at| wire::u16_at(key, at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::{
        CLASS, Question, ResourceRecord, TYPE,
        rdata::{A, CNAME, OPT, SOA},
    };

    fn name(text: &str) -> Name<'_> {
        Name::new(text).unwrap()
    }

    fn a(owner: &'static str, ttl: u32) -> ResourceRecord<'static> {
        ResourceRecord::new(name(owner), CLASS::IN, ttl, RData::A(A { address: 7 }))
    }

    fn soa(ttl: u32, minimum: u32) -> ResourceRecord<'static> {
        let (mname, rname) = (name("ns.example.com"), name("root.example.com"));
        let soa = SOA { mname, rname, serial: 1, refresh: 2, retry: 3, expire: 4, minimum };
        ResourceRecord::new(name("example.com"), CLASS::IN, ttl, RData::SOA(soa))
    }

    fn message(answers: Vec<ResourceRecord<'static>>, authority: Vec<ResourceRecord<'static>>, code: u8) -> Vec<u8> {
        let mut packet = Packet::new_reply(1);
        packet.questions.push(Question::new(name("www.example.com"), TYPE::A.into(), CLASS::IN.into(), false));
        packet.answers = answers;
        packet.name_servers = authority;
        let mut message = packet.build_bytes_vec_compressed().unwrap();
        message[3] |= code;
        message
    }

    #[test]
    fn how_long_answers_are_kept() {
        let cname = |ttl| {
            let data = RData::CNAME(CNAME(name("host.example.com")));
            ResourceRecord::new(name("www.example.com"), CLASS::IN, ttl, data)
        };
        for (what, answers, authority, code, want) in [
            ("the lowest of the answers", vec![cname(50), a("host.example.com", 40)], vec![], 0, Some(40)),
            ("a TTL with its top bit set", vec![a("www.example.com", 1 << 31)], vec![], 0, Some(0)),
            ("NODATA: the SOA's minimum", vec![], vec![soa(900, 60)], 0, Some(60)),
            ("NXDOMAIN: the SOA's TTL", vec![], vec![soa(30, 60)], 3, Some(30)),
            ("at most three hours", vec![], vec![soa(90_000, 80_000)], 3, Some(NEGATIVE_MAX)),
            ("a chain that leads nowhere", vec![cname(20)], vec![soa(900, 60)], 3, Some(20)),
            ("without a SOA not at all", vec![], vec![], 3, None),
            ("a chain without its end", vec![cname(20)], vec![], 0, None),
            ("a failure", vec![a("www.example.com", 9)], vec![], 2, None),
        ] {
            let message = message(answers, authority, code);
            assert_eq!(lifetime(&keep(&message).unwrap(), kind::A), want, "{what}");
        }
    }

    #[test]
    fn the_opt_is_cut_out_and_nothing_else() {
        let mut packet = Packet::new_reply(1);
        packet.questions.push(Question::new(name("www.example.com"), TYPE::A.into(), CLASS::IN.into(), false));
        packet.answers = vec![a("www.example.com", 5)];
        let plain = packet.build_bytes_vec_compressed().unwrap();
        *packet.opt_mut() = Some(OPT { opt_codes: vec![], udp_packet_size: 4096, version: 0 });
        let with_opt = packet.build_bytes_vec_compressed().unwrap();
        assert_eq!(keep(&with_opt).unwrap(), plain);
        assert_eq!(keep(&plain).unwrap(), plain);
        assert_eq!(keep(&plain[..plain.len() - 1]), None);
    }

    #[test]
    fn addresses_follow_the_chain_whatever_the_order_and_take_no_strangers() {
        let link = |from, to| ResourceRecord::new(name(from), CLASS::IN, 1, RData::CNAME(CNAME(name(to))));
        let chain = vec![
            a("c.example.com", 1),
            link("b.example.com", "c.example.com"),
            a("stranger.example", 1),
            link("www.example.com", "b.example.com"),
        ];
        assert_eq!(addresses(&message(chain, vec![], 0)), [IpAddr::from([0, 0, 0, 7])]);
        let circle = vec![link("www.example.com", "b.example.com"), link("b.example.com", "www.example.com")];
        assert_eq!(addresses(&message(circle, vec![], 0)), Vec::<IpAddr>::new());
    }
}
