//! The envelope of a DNS message: reading a query without allocating, walking the records of an answer, and
//! writing a reply record by record up to a limit.
//!
//! simple-dns reads what the upstreams answer ([`super::foreign`]), where names are compressed and have to be taken
//! apart. It cannot stand here: it reserves memory for as many records as a header claims (50 MB for 12 bytes), it
//! drops the DO bit, it refuses classes that it does not know, and it cannot stop at a record when a limit is reached.

use std::ops::Range;

/// RFC 1035 section 4.1.1.
pub const HEADER: usize = 12;
/// RFC 1035 section 2.3.4: octets of a name with its length bytes and the root.
pub const NAME_MAX: usize = 255;
/// RFC 1035 section 2.3.4: a UDP message without EDNS.
pub const PLAIN_MAX: usize = 512;
/// DNS flag day 2020: what passes every common path without fragments.
pub const EDNS_MAX: usize = 1232;
/// Root name, type, class, TTL and length of an OPT record without options (RFC 6891 section 6.1.2).
pub const OPT_LEN: usize = 11;

/// RFC 1035 section 4.1.1 and RFC 6895 section 2.
pub mod flag {
    pub const QR: u16 = 1 << 15;
    pub const OPCODE: u16 = 0b1111 << 11;
    pub const AA: u16 = 1 << 10;
    pub const TC: u16 = 1 << 9;
    pub const RD: u16 = 1 << 8;
    pub const RA: u16 = 1 << 7;
    pub const AD: u16 = 1 << 5;
    pub const CD: u16 = 1 << 4;
    pub const RCODE: u16 = 0b1111;
}

/// RFC 6895 section 2.3.
pub mod rcode {
    pub const NOERROR: u16 = 0;
    pub const FORMERR: u16 = 1;
    pub const SERVFAIL: u16 = 2;
    pub const NXDOMAIN: u16 = 3;
    pub const NOTIMP: u16 = 4;
    pub const REFUSED: u16 = 5;
    pub const BADVERS: u16 = 16;
}

/// RFC 6895 section 3.1.
pub mod kind {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
}

/// RFC 6895 section 3.2.
pub mod class {
    pub const IN: u16 = 1;
    pub const ANY: u16 = 255;
}

/// What an OPT record of a query says (RFC 6891 section 6.1.3); its options are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    pub size: u16,
    pub version: u8,
    pub dnssec_ok: bool,
}

/// A query with one question, borrowed from the message.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub id: u16,
    pub flags: u16,
    /// Name, type and class as they came.
    pub question: &'a [u8],
    /// The wire name with its root byte, never compressed.
    pub name: &'a [u8],
    pub kind: u16,
    pub class: u16,
    pub edns: Option<Edns>,
}

/// What to do with a message that is no query we can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Too short for an id, or itself a response: an answer could start a loop.
    Drop,
    /// Answer with this code and an empty body.
    Code(u16),
}

impl<'a> Query<'a> {
    /// # Errors
    /// See [`Reject`].
    pub fn parse(message: &'a [u8]) -> Result<Self, Reject> {
        let header = Header::parse(message).ok_or(Reject::Drop)?;
        if header.flags & flag::QR != 0 {
            return Err(Reject::Drop);
        }
        if header.flags & flag::OPCODE != 0 {
            return Err(Reject::Code(rcode::NOTIMP));
        }
        let malformed = Reject::Code(rcode::FORMERR);
        if header.counts[0] != 1 {
            return Err(malformed); // RFC 9619
        }
        let name_end = plain_name_end(message, HEADER).ok_or(malformed)?;
        let question = message.get(HEADER..name_end + 4).ok_or(malformed)?;
        let mut edns = None;
        for record in Records::new(message).ok_or(malformed)? {
            let record = record.map_err(|_| malformed)?;
            if record.kind == kind::OPT {
                if edns.is_some() || record.section != Section::Additional || message[record.start] != 0 {
                    return Err(malformed); // RFC 6891 section 6.1.1
                }
                edns = Some(Edns {
                    size: record.class,
                    version: (record.ttl >> 16) as u8,
                    dnssec_ok: record.ttl & 0x8000 != 0,
                });
            }
        }
        Ok(Self {
            id: header.id,
            flags: header.flags,
            question,
            name: &message[HEADER..name_end],
            kind: u16_at(message, name_end).ok_or(malformed)?,
            class: u16_at(message, name_end + 2).ok_or(malformed)?,
            edns,
        })
    }

    /// Bytes that a reply by UDP may have.
    #[must_use]
    pub fn udp_limit(&self) -> usize {
        self.edns.map_or(PLAIN_MAX, |e| usize::from(e.size).clamp(PLAIN_MAX, EDNS_MAX))
    }
}

/// The fixed part of a message.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub id: u16,
    pub flags: u16,
    /// Questions, answers, authority, additional.
    pub counts: [u16; 4],
}

impl Header {
    #[must_use]
    pub fn parse(message: &[u8]) -> Option<Self> {
        let at = |i| u16_at(message, i);
        Some(Self { id: at(0)?, flags: at(2)?, counts: [at(4)?, at(6)?, at(8)?, at(10)?] })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    Answer,
    Authority,
    Additional,
}

/// One resource record, by its place in the message.
#[derive(Clone, Debug)]
pub struct Record {
    pub section: Section,
    pub start: usize,
    pub kind: u16,
    pub class: u16,
    /// Where the TTL's four bytes are.
    pub ttl_at: usize,
    pub ttl: u32,
    pub data: Range<usize>,
}

/// A record that runs over the end of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut;

/// Walks the records behind the questions; ends after the first that is cut.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: [u16; 3],
}

impl<'a> Records<'a> {
    /// None where the questions cannot be read.
    #[must_use]
    pub fn new(message: &'a [u8]) -> Option<Self> {
        let [questions, left @ ..] = Header::parse(message)?.counts;
        let mut at = HEADER;
        for _ in 0..questions {
            at = name_end(message, at)? + 4;
            message.get(..at)?;
        }
        Some(Self { message, at, left })
    }

    fn record(&self, section: Section) -> Option<Record> {
        let name_end = name_end(self.message, self.at)?;
        let length = usize::from(u16_at(self.message, name_end + 8)?);
        let data = name_end + 10..name_end + 10 + length;
        self.message.get(data.clone())?;
        Some(Record {
            section,
            start: self.at,
            kind: u16_at(self.message, name_end)?,
            class: u16_at(self.message, name_end + 2)?,
            ttl_at: name_end + 4,
            ttl: u32_at(self.message, name_end + 4)?,
            data,
        })
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, Cut>;

    fn next(&mut self) -> Option<Self::Item> {
        let section = [Section::Answer, Section::Authority, Section::Additional];
        let which = self.left.iter().position(|&n| n > 0)?;
        let Some(record) = self.record(section[which]) else {
            self.left = [0; 3];
            return Some(Err(Cut));
        };
        self.left[which] -= 1;
        self.at = record.data.end;
        Some(Ok(record))
    }
}

/// The end of an uncompressed name, within the limits of RFC 1035.
#[must_use]
pub fn plain_name_end(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        if length > 63 || at - start > NAME_MAX {
            return None;
        }
        if length == 0 {
            return Some(at);
        }
    }
}

/// The end of a name that may be compressed; its pointer is not followed.
#[must_use]
pub fn name_end(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        match usize::from(*message.get(at)?) {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + length,
            0xc0.. => return (at + 2 <= message.len()).then_some(at + 2),
            _ => return None,
        }
    }
}

#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The wire form, in lower case, of a name as it is written; None where a label or the whole is too long, a label is
/// empty or the name holds an escape.
#[must_use]
pub fn encode_name(text: &str) -> Option<Box<[u8]>> {
    let mut wire = Vec::with_capacity(text.len() + 2);
    let text = text.strip_suffix('.').unwrap_or(text);
    if !text.is_empty() {
        for label in text.split('.') {
            if label.is_empty() || label.len() > 63 || label.contains('\\') {
                return None;
            }
            wire.push(label.len() as u8);
            wire.extend(label.bytes().map(|b| b.to_ascii_lowercase()));
        }
    }
    wire.push(0);
    (wire.len() <= NAME_MAX).then(|| wire.into_boxed_slice())
}

/// A reply being written: records go in section by section, and one that does not fit is left out whole.
pub struct Reply<'o> {
    out: &'o mut Vec<u8>,
    limit: usize,
    counts: [u16; 4],
    edns: Option<Edns>,
}

impl<'o> Reply<'o> {
    /// Begins a reply to a query with its question as it came (RFC 1035; resolvers check the letters' case).
    /// RA is always set: what we do not know ourselves is asked of the upstreams.
    pub fn new(query: &Query<'_>, limit: usize, out: &'o mut Vec<u8>) -> Self {
        out.clear();
        out.extend_from_slice(&query.id.to_be_bytes());
        let flags = flag::QR | flag::RA | query.flags & (flag::RD | flag::CD);
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(query.question);
        let reserve = if query.edns.is_some() { OPT_LEN } else { 0 };
        Self { out, limit: limit.saturating_sub(reserve), counts: [1, 0, 0, 0], edns: query.edns }
    }

    /// Goes on with one that [`Reply::pause`] left.
    pub fn resume(query: &Query<'_>, limit: usize, out: &'o mut Vec<u8>) -> Self {
        let counts = Header::parse(out).map_or([1, 0, 0, 0], |h| h.counts);
        let reserve = if query.edns.is_some() { OPT_LEN } else { 0 };
        Self { out, limit: limit.saturating_sub(reserve), counts, edns: query.edns }
    }

    pub fn set(&mut self, flags: u16) {
        let old = u16_at(self.out, 2).unwrap_or(0);
        self.out[2..4].copy_from_slice(&(old | flags).to_be_bytes());
    }

    /// The low four bits; the rest of an extended code goes into OPT.
    pub fn set_rcode(&mut self, code: u16) {
        let old = u16_at(self.out, 2).unwrap_or(0) & !flag::RCODE;
        self.out[2..4].copy_from_slice(&(old | code & flag::RCODE).to_be_bytes());
    }

    /// Where the next record begins.
    #[must_use]
    pub fn position(&self) -> usize {
        self.out.len()
    }

    /// Writes one record; false, and nothing written, where it does not fit. `owner` writes the name.
    pub fn record(
        &mut self,
        section: Section,
        owner: impl FnOnce(&mut Vec<u8>),
        kind: u16,
        ttl: u32,
        data: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        let start = self.out.len();
        owner(self.out);
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&class::IN.to_be_bytes());
        self.out.extend_from_slice(&ttl.to_be_bytes());
        let length_at = self.out.len();
        self.out.extend_from_slice(&[0; 2]);
        data(self.out);
        let fits = self.out.len() <= self.limit;
        if let (true, Ok(length)) = (fits, u16::try_from(self.out.len() - length_at - 2)) {
            self.out[length_at..length_at + 2].copy_from_slice(&length.to_be_bytes());
            self.counts[section as usize + 1] += 1;
            return true;
        }
        self.out.truncate(start);
        false
    }

    fn write_counts(&mut self) {
        for (i, count) in self.counts.iter().enumerate() {
            self.out[4 + 2 * i..6 + 2 * i].copy_from_slice(&count.to_be_bytes());
        }
    }

    /// Leaves a reply that others will add to; it has no OPT yet.
    pub fn pause(mut self) {
        self.write_counts();
    }

    /// Ends the reply, with an OPT record where the query had one (RFC 6891 section 6.1.1).
    pub fn finish(mut self, code: u16) {
        self.set_rcode(code);
        if let Some(edns) = self.edns {
            push_opt(self.out, code, edns.dnssec_ok);
            self.counts[3] += 1;
        }
        self.write_counts();
    }
}

/// An OPT record without options.
pub fn push_opt(out: &mut Vec<u8>, code: u16, dnssec_ok: bool) {
    out.push(0);
    out.extend_from_slice(&kind::OPT.to_be_bytes());
    out.extend_from_slice(&(EDNS_MAX as u16).to_be_bytes());
    out.extend_from_slice(&[(code >> 4) as u8, 0, if dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
}

/// An empty reply to something whose question cannot be read.
pub fn reject(message: &[u8], code: u16, out: &mut Vec<u8>) {
    out.clear();
    let Some(header) = Header::parse(message) else { return };
    out.extend_from_slice(&header.id.to_be_bytes());
    let flags = flag::QR | header.flags & (flag::OPCODE | flag::RD) | code & flag::RCODE;
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&[0; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, extra: &[u8], additional: u8) -> Vec<u8> {
        let mut m = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional];
        m.extend_from_slice(&encode_name(name).unwrap());
        m.extend_from_slice(&[0, 1, 0, 1]);
        m.extend_from_slice(extra);
        m
    }

    #[test]
    fn reads_a_question_and_its_opt() {
        let opt = [0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0];
        let m = query("web.shop.svc.cluster.local", &opt, 1);
        let q = Query::parse(&m).unwrap();
        assert_eq!((q.id, q.kind, q.class), (0x1234, kind::A, class::IN));
        assert_eq!(q.edns, Some(Edns { size: 4096, version: 0, dnssec_ok: true }));
        assert_eq!(q.udp_limit(), EDNS_MAX);
        assert_eq!(q.name, &*encode_name("web.shop.svc.cluster.local.").unwrap());
    }

    #[test]
    fn what_is_no_query_is_dropped_or_told_so() {
        let good = query("a.b", &[], 0);
        let code = |m: &[u8]| Query::parse(m).map(|_| ()).unwrap_err();
        assert_eq!(code(&good[..11]), Reject::Drop);
        let mut response = good.clone();
        response[2] |= 0x80;
        assert_eq!(code(&response), Reject::Drop);
        let mut status = good.clone();
        status[2] |= 0x10;
        assert_eq!(code(&status), Reject::Code(rcode::NOTIMP));
        for cut in HEADER..good.len() {
            assert_eq!(code(&good[..cut]), Reject::Code(rcode::FORMERR), "cut at {cut}");
        }
        let many = query("a.b", &[], 9);
        assert_eq!(code(&many), Reject::Code(rcode::FORMERR));
        let opt = [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];
        assert_eq!(code(&query("a.b", &[opt, opt].concat(), 2)), Reject::Code(rcode::FORMERR));
    }

    #[test]
    fn a_record_that_does_not_fit_is_left_out_whole() {
        let m = query("a.b", &[], 0);
        let q = Query::parse(&m).unwrap();
        let mut out = Vec::new();
        let mut reply = Reply::new(&q, m.len() + 20, &mut out);
        let owner = |o: &mut Vec<u8>| o.extend_from_slice(&[0xc0, 12]);
        assert!(reply.record(Section::Answer, owner, kind::A, 5, |o| o.extend_from_slice(&[1, 2, 3, 4])));
        let position = reply.position();
        assert!(!reply.record(Section::Answer, owner, kind::A, 5, |o| o.extend_from_slice(&[1, 2, 3, 5])));
        assert_eq!(reply.position(), position);
        reply.finish(rcode::NOERROR);
        let records: Vec<_> = Records::new(&out).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(records.len(), 1);
        assert_eq!(out[records[0].data.clone()], [1, 2, 3, 4]);
    }

    #[test]
    fn names_that_cannot_be_written_are_refused() {
        assert!(encode_name("a..b").is_none());
        assert!(encode_name(&"x".repeat(64)).is_none());
        assert!(encode_name(&["x".repeat(63).as_str(); 4].join(".")).is_none());
        assert_eq!(&*encode_name(".").unwrap(), &[0]);
        assert_eq!(&*encode_name("A.b.").unwrap(), b"\x01a\x01b\0");
    }
}
