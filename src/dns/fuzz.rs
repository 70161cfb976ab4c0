//! Entries for fuzz targets: any bytes, a small table, no panic.

use super::{
    answer::{Answerer, Outcome, Via},
    cache::Cache,
    foreign::{self, Aging, Head},
    forward::{Forward, Output},
    wire::{HEADER, Query},
    zone::Zone,
};
use crate::{metrics::DnsCounters, table::Table};
use std::{net::SocketAddr, rc::Rc, time::Instant};

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

/// Gives arbitrary bytes to the forwarder as the answer to the question that is in them, with the right id, and returns
/// the replies to those who asked, among them one from the cache.
pub fn forward(message: &[u8], now: Instant) -> Vec<Vec<u8>> {
    let mut replies = Vec::new();
    let mut as_query = message.to_vec();
    as_query.resize(message.len().max(HEADER), 0);
    as_query[2..HEADER].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let Ok(asked) = Query::parse(&as_query) else { return replies };
    let mut forward = Forward::new(Cache::new(8, 60), Box::new(|| 0x5a5a), Rc::new(DnsCounters::default()));
    forward.set_upstreams(&[SocketAddr::from(([192, 0, 2, 1], 53))], true);
    let mut buf = Vec::new();
    for client in 0..2 {
        forward.ask(now, Head::new(&asked, asked.udp_limit()), None, client);
        loop {
            match forward.poll_output(&mut buf) {
                Output::Ask { exchange, .. } => {
                    let mut answer = message.to_vec();
                    let same = buf.len().min(HEADER + asked.question.len()).min(answer.len());
                    if same >= HEADER {
                        answer[..2].copy_from_slice(&buf[..2]);
                        answer[HEADER..same].copy_from_slice(&buf[HEADER..same]);
                    }
                    if !forward.handle_answer(now, exchange, &answer) {
                        forward.handle_failure(now, exchange);
                    }
                }
                Output::Close(_) => {}
                Output::Reply(_) => replies.push(buf.clone()),
                Output::Wait(_) => break,
            }
        }
    }
    replies
}
