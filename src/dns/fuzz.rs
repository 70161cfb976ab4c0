//! Entries for fuzz targets: any bytes, a small table, no panic.

use super::{
    answer::{Answerer, Outcome, Via},
    foreign::{self, Aging, Head},
    wire::{HEADER, Query},
    zone::Zone,
};
use crate::table::Table;

/// Answers arbitrary bytes over UDP and TCP and returns what came of each.
pub fn query(message: &[u8], table: &Table, zone: &Zone) -> [(Outcome, Vec<u8>); 2] {
    [Via::Udp, Via::Tcp].map(|via| {
        let mut out = Vec::new();
        let outcome = Answerer::new(zone.clone()).reply(message, via, table, &mut out);
        (outcome, out)
    })
}

/// Takes arbitrary bytes for an upstream's answer to their own question, plain and behind a CNAME, and returns the
/// replies that clients would get.
pub fn upstream(message: &[u8]) -> Option<[Vec<u8>; 2]> {
    let mut as_query = message.get(..HEADER)?.to_vec();
    as_query[2] = 1;
    as_query[3] = 0;
    as_query[4..HEADER].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    as_query.extend_from_slice(message.get(HEADER..)?);
    let asked = Query::parse(&as_query).ok()?;
    let mut head = Head::new(&asked, asked.udp_limit());
    foreign::answers(message, asked.id, asked.question)?;
    let kept = foreign::keep(message)?;
    let _ = foreign::lifetime(&kept, asked.kind);
    let _ = foreign::addresses(&kept);
    let aging = Aging { age: 1, cap: 60, stale: false };
    let (mut plain, mut joined) = (Vec::new(), Vec::new());
    head.answer(&kept, aging, &mut plain);
    let mut prefix = as_query[..HEADER + asked.question.len()].to_vec();
    prefix[2] |= 0x80;
    head.prefix = Some(prefix.into());
    head.answer(&kept, aging, &mut joined);
    Some([plain, joined])
}
