//! Streams: what the rest of the process reads and writes. A key is the caller's until it drops it, also
//! when the connection below is gone.

use super::{
    Open, Refusal,
    datagrams::Arrived,
    node::{Event, Node},
    open::{OPEN_MAX, answer_needs, decode, decode_answer, encode, encode_answer},
    slot::Slot,
    transport::stream_limit,
};
use crate::table::model::Protocol;
use quinn_proto::{Dir, FinishError, ReadError, ReadableError, StreamId, VarInt, WriteError};
use std::time::{Duration, Instant};

/// Streams of all connections; more are refused.
pub(super) const STREAMS_MAX: usize = 4096;
/// Streams that wait for a connection; one more is refused.
const WAITING_MAX: usize = 1024;
/// Of an OPEN and the first bytes behind it, while the stream waits; what is more waits at the caller.
const HEAD_MAX: usize = 2048;
/// Application error codes of RESET_STREAM and STOP_SENDING.
pub(super) const ABANDONED: VarInt = VarInt::from_u32(1);

#[derive(Debug)]
enum State {
    /// Waits for a connection or for room for one more stream; the OPEN is kept.
    Waiting,
    /// We opened it; the answer is being read.
    Asked { answer: Vec<u8> },
    /// The peer opened it; its OPEN is being read.
    Reading { open: Vec<u8> },
    /// The peer opened it and waits for our answer, or we gave it.
    Live,
    /// Nothing more can be read or written.
    Dead { why: String },
}

#[derive(Debug)]
pub(super) struct Stream {
    state: State,
    /// (slot, QUIC's id) once it exists.
    place: Option<(u32, StreamId)>,
    /// Bytes of ours that go before all data: the OPEN and what was written behind it so far, or our answer.
    head: Vec<u8>,
    refused: Option<Refusal>,
    finished: bool,
    /// Where it is a session of UDP.
    arrived: Option<Arrived>,
}

/// What a read or write came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Bytes(usize),
    Pending,
    /// Of reads: the peer has sent FIN.
    End,
    Broken(String),
}

#[derive(Default)]
pub(super) struct Streams {
    list: Vec<Option<Stream>>,
    free: Vec<u32>,
    /// How many wait for a connection.
    waiting: usize,
    /// Bytes beside all of them that their readers have not taken.
    pub(super) arrived_bytes: usize,
}

impl Streams {
    fn insert(&mut self, stream: Stream) -> Option<u32> {
        if let Some(key) = self.free.pop() {
            self.list[key as usize] = Some(stream);
            return Some(key);
        }
        let key = u32::try_from(self.list.len()).ok().filter(|k| (*k as usize) < STREAMS_MAX)?;
        self.list.push(Some(stream));
        Some(key)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len() - self.free.len()
    }

    fn get_mut(&mut self, key: u32) -> Option<&mut Stream> {
        self.list.get_mut(key as usize)?.as_mut()
    }

    /// Where a stream is that was opened and answered.
    pub(super) fn live(&self, key: u32) -> Option<(u32, StreamId)> {
        self.list.get(key as usize)?.as_ref().filter(|s| matches!(s.state, State::Live))?.place
    }

    pub(super) fn arrived(&mut self, key: u32) -> Option<&mut Arrived> {
        self.get_mut(key)?.arrived.as_mut()
    }

    fn remove(&mut self, key: u32) -> Option<Stream> {
        let stream = self.list.get_mut(key as usize)?.take()?;
        self.free.push(key);
        self.waiting -= usize::from(matches!(stream.state, State::Waiting));
        self.arrived_bytes -= stream.arrived.iter().flatten().map(|bytes| bytes.len()).sum::<usize>();
        Some(stream)
    }
}

impl Node {
    /// Asks for a stream to a node; None when there are too many.
    pub fn open(&mut self, now: Instant, node: &str, open: &Open) -> Option<u32> {
        if self.streams.waiting >= WAITING_MAX {
            return None;
        }
        let key = self.streams.insert(Stream {
            state: State::Waiting,
            place: None,
            head: encode(open),
            refused: None,
            finished: false,
            arrived: beside(open),
        })?;
        self.streams.waiting += 1;
        self.want_stream(now, node, key);
        Some(key)
    }

    /// Opens a waiting stream on a connection; false while the peer allows no more.
    pub(super) fn try_open(&mut self, index: u32, key: u32) -> bool {
        let Some(slot) = self.slots.get_mut(index) else { return false };
        let Some(stream) = self.streams.get_mut(key) else { return true };
        if !matches!(stream.state, State::Waiting) {
            return true;
        }
        let Some(id) = slot.conn.streams().open(Dir::Bi) else { return false };
        slot.streams.insert(id, key);
        stream.place = Some((index, id));
        stream.state = State::Asked { answer: Vec::new() };
        self.streams.waiting -= 1;
        self.flush_head(key);
        self.touch(index);
        self.events.push_back(Event::Wake(key));
        true
    }

    /// Writes what goes before the data; true once it is gone.
    fn flush_head(&mut self, key: u32) -> bool {
        let Some(stream) = self.streams.get_mut(key) else { return false };
        let Some((index, id)) = stream.place else { return false };
        if stream.head.is_empty() {
            return true;
        }
        let Some(slot) = self.slots.get_mut(index) else { return false };
        if let Ok(len) = slot.conn.send_stream(id).write(&stream.head) {
            stream.head.drain(..len);
        }
        stream.head.is_empty()
    }

    /// New streams of a peer, and those whose OPEN is not whole yet.
    pub(super) fn accept_streams(&mut self, index: u32) {
        loop {
            let Some(slot) = self.slots.get_mut(index) else { return };
            let Some(id) = slot.conn.streams().accept(Dir::Bi) else { break };
            let stream = Stream {
                state: State::Reading { open: Vec::new() },
                place: Some((index, id)),
                head: Vec::new(),
                refused: None,
                finished: false,
                arrived: None,
            };
            match self.streams.insert(stream) {
                Some(key) => {
                    slot.streams.insert(id, key);
                    self.readable(index, id);
                }
                None => abandon(slot, id),
            }
        }
        if let Some(slot) = self.slots.get_mut(index) {
            let limit = stream_limit(slot.conn.streams().remote_open_streams(Dir::Bi) as usize);
            if slot.conn.max_concurrent_streams(Dir::Bi) < limit.into_inner() {
                slot.conn.set_max_concurrent_streams(Dir::Bi, limit);
            }
        }
    }

    pub(super) fn readable(&mut self, index: u32, id: StreamId) {
        let Some(key) = self.slots.get(index).and_then(|s| s.streams.get(&id).copied()) else { return };
        let Some(stream) = self.streams.get_mut(key) else { return };
        match &mut stream.state {
            State::Reading { open } => {
                let mut bytes = std::mem::take(open);
                let verdict = self.pull(index, id, &mut bytes, |b| match b {
                    [high, low, rest @ ..] => usize::from(u16::from_be_bytes([*high, *low])).saturating_sub(rest.len()),
                    _ => 2 - b.len(),
                });
                self.opened_by_peer(index, id, key, bytes, verdict);
            }
            State::Asked { answer } => {
                let mut bytes = std::mem::take(answer);
                let verdict = self.pull(index, id, &mut bytes, answer_needs);
                let state = match (decode_answer(&bytes), verdict) {
                    (Some((Ok(()), _)), _) => State::Live,
                    (Some((Err(refusal), _)), _) => {
                        if let Some(stream) = self.streams.get_mut(key) {
                            stream.refused = Some(refusal);
                        }
                        State::Dead { why: "refused".into() }
                    }
                    (None, Ok(())) => State::Asked { answer: bytes },
                    (None, Err(why)) => State::Dead { why },
                };
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.state = state;
                }
                self.events.push_back(Event::Wake(key));
            }
            State::Waiting | State::Live | State::Dead { .. } => self.events.push_back(Event::Wake(key)),
        }
    }

    /// Reads until `needs` says 0 or nothing more is there; an error where the stream ended before.
    fn pull(&mut self, index: u32, id: StreamId, into: &mut Vec<u8>, needs: fn(&[u8]) -> usize) -> Result<(), String> {
        let mut buf = [0; 256];
        loop {
            let wanted = needs(into).min(buf.len());
            if wanted == 0 || into.len() > OPEN_MAX {
                return Ok(());
            }
            match self.read_raw(index, id, &mut buf[..wanted]) {
                Progress::Bytes(len) => into.extend_from_slice(&buf[..len]),
                Progress::Pending => return Ok(()),
                Progress::End => return Err("the stream ended before its first message".into()),
                Progress::Broken(why) => return Err(why),
            }
        }
    }

    fn opened_by_peer(&mut self, index: u32, id: StreamId, key: u32, bytes: Vec<u8>, verdict: Result<(), String>) {
        let whole = bytes.first_chunk().is_some_and(|l| bytes.len() == 2 + usize::from(u16::from_be_bytes(*l)));
        let too_long = bytes.first_chunk().is_some_and(|l| usize::from(u16::from_be_bytes(*l)) > OPEN_MAX);
        let peer = self.slots.get(index).and_then(|s| s.peer.clone());
        let open = if whole { decode(&bytes[2..]) } else { None };
        match (open, peer) {
            (Some(open), Some(peer)) => {
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.state = State::Live;
                    stream.arrived = beside(&open);
                }
                self.events.push_back(Event::Incoming { key, peer, open });
            }
            (None, _) if !whole && !too_long && verdict.is_ok() => {
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.state = State::Reading { open: bytes };
                }
            }
            (_, peer) => {
                let why = verdict.err().unwrap_or_else(|| "it is malformed".into());
                log::warn!(target: "tunnel", "an OPEN of {} is refused: {why}", peer.unwrap_or_default());
                self.streams.remove(key);
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.streams.remove(&id);
                    abandon(slot, id);
                }
                self.touch(index);
            }
        }
    }

    pub(super) fn writable(&mut self, index: u32, id: StreamId) {
        if let Some(key) = self.slots.get(index).and_then(|s| s.streams.get(&id).copied()) {
            self.flush_head(key);
            self.events.push_back(Event::Wake(key));
        }
    }

    /// What became of our OPEN: None while there is no answer.
    pub fn opened(&mut self, key: u32) -> Option<Result<(), Refusal>> {
        let stream = self.streams.get_mut(key)?;
        if let Some(refusal) = &stream.refused {
            return Some(Err(refusal.clone()));
        }
        match &stream.state {
            State::Waiting | State::Asked { .. } | State::Reading { .. } => None,
            State::Live => Some(Ok(())),
            State::Dead { why } => Some(Err(Refusal::Unreachable(why.clone()))),
        }
    }

    /// Whether nothing that opens has come from there for so long, or longer.
    #[must_use]
    pub fn is_silent(&self, now: Instant, node: &str, long: Duration) -> bool {
        let peer = self.peers.get(node);
        let slot = peer.and_then(|p| self.slots.get(p.slot.or(p.dialing)?));
        slot.is_none_or(|s| now >= s.alive + long)
    }

    /// Answers a peer's OPEN; after a refusal the stream is over.
    pub fn answer(&mut self, key: u32, answer: &Result<(), Refusal>) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.head = encode_answer(answer);
        self.flush_head(key);
        if answer.is_err() {
            self.finish(key);
        } else if let Some((index, _)) = self.streams.get_mut(key).and_then(|s| s.place) {
            self.touch(index);
        }
    }

    pub fn read(&mut self, key: u32, buf: &mut [u8]) -> Progress {
        let Some(stream) = self.streams.get_mut(key) else { return Progress::Broken("closed".into()) };
        match (&stream.state, stream.place) {
            (State::Dead { why }, _) => Progress::Broken(why.clone()),
            (State::Live, Some((index, id))) => self.read_raw(index, id, buf),
            (State::Waiting | State::Asked { .. } | State::Reading { .. } | State::Live, _) => Progress::Pending,
        }
    }

    fn read_raw(&mut self, index: u32, id: StreamId, buf: &mut [u8]) -> Progress {
        let Some(slot) = self.slots.get_mut(index) else { return Progress::Broken("the connection was lost".into()) };
        let mut recv = slot.conn.recv_stream(id);
        let mut chunks = match recv.read(true) {
            Ok(chunks) => chunks,
            Err(ReadableError::ClosedStream) => return Progress::End,
            Err(ReadableError::IllegalOrderedRead) => return Progress::Broken("read out of order".into()),
        };
        let mut filled = 0;
        let mut last = Progress::Pending;
        while filled < buf.len() {
            match chunks.next(buf.len() - filled) {
                Ok(Some(chunk)) => {
                    buf[filled..filled + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
                    filled += chunk.bytes.len();
                }
                Ok(None) => {
                    last = Progress::End;
                    break;
                }
                Err(ReadError::Blocked) => break,
                Err(ReadError::Reset(_)) => {
                    last = Progress::Broken("reset by the peer".into());
                    break;
                }
            }
        }
        let credit = chunks.finalize().should_transmit();
        slot.windows.read(filled);
        if credit {
            self.touch(index);
        }
        if filled > 0 { Progress::Bytes(filled) } else { last }
    }

    pub fn write(&mut self, key: u32, bytes: &[u8]) -> Progress {
        let Some(stream) = self.streams.get_mut(key) else { return Progress::Broken("closed".into()) };
        let (index, id) = match (&stream.state, stream.place) {
            (State::Dead { why }, _) => return Progress::Broken(why.clone()),
            (State::Waiting, _) => {
                let len = bytes.len().min(HEAD_MAX.saturating_sub(stream.head.len()));
                stream.head.extend_from_slice(&bytes[..len]);
                return if len > 0 { Progress::Bytes(len) } else { Progress::Pending };
            }
            (State::Reading { .. }, _) | (_, None) => return Progress::Pending,
            (State::Asked { .. } | State::Live, Some(place)) => place,
        };
        if !self.flush_head(key) {
            return Progress::Pending;
        }
        let Some(slot) = self.slots.get_mut(index) else { return Progress::Broken("the connection was lost".into()) };
        let result = slot.conn.send_stream(id).write(bytes);
        slot.windows.written(result.as_ref().map_or(0, |len| *len));
        self.touch(index);
        match result {
            Ok(len) => Progress::Bytes(len),
            Err(WriteError::Blocked) => Progress::Pending,
            Err(WriteError::Stopped(_)) => Progress::Broken("the peer stopped reading".into()),
            Err(WriteError::ClosedStream) => Progress::Broken("closed".into()),
        }
    }

    /// Sends FIN behind what was written; Pending while bytes of ours still go before it.
    pub fn finish(&mut self, key: u32) -> Progress {
        let Some(stream) = self.streams.get_mut(key) else { return Progress::End };
        if stream.finished || matches!(stream.state, State::Dead { .. }) {
            return Progress::End;
        }
        if !self.flush_head(key) {
            return Progress::Pending;
        }
        let Some(stream) = self.streams.get_mut(key) else { return Progress::End };
        stream.finished = true;
        let Some((index, id)) = stream.place else { return Progress::End };
        let Some(slot) = self.slots.get_mut(index) else { return Progress::End };
        let result = slot.conn.send_stream(id).finish();
        self.touch(index);
        match result {
            Ok(()) | Err(FinishError::ClosedStream) => Progress::End,
            Err(FinishError::Stopped(_)) => Progress::Broken("the peer stopped reading".into()),
        }
    }

    /// The caller is done with a stream: what is not finished is reset.
    pub fn drop_stream(&mut self, now: Instant, key: u32) {
        let Some(stream) = self.streams.remove(key) else { return };
        let Some((index, id)) = stream.place else { return };
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.streams.remove(&id);
        if !stream.finished {
            let _ = slot.conn.send_stream(id).reset(ABANDONED);
        }
        let _ = slot.conn.recv_stream(id).stop(ABANDONED);
        if slot.streams.is_empty() {
            slot.idle_since = now;
        }
        self.touch(index);
    }

    /// Those of these streams whose OPEN has no answer yet get none.
    pub(super) fn kill_unanswered(&mut self, mut keys: Vec<u32>, why: &str) {
        keys.retain(|key| matches!(self.streams.get_mut(*key), Some(Stream { state: State::Asked { .. }, .. })));
        self.kill_streams(keys, why);
    }

    /// The connection of these streams is gone, or they never got one.
    pub(super) fn kill_streams(&mut self, keys: impl IntoIterator<Item = u32>, why: &str) {
        for key in keys {
            let Some(stream) = self.streams.get_mut(key) else { continue };
            // Of a peer's stream whose OPEN is not whole nobody knows who could drop it.
            if matches!(stream.state, State::Reading { .. }) {
                self.streams.remove(key);
                continue;
            }
            let waited = matches!(stream.state, State::Waiting);
            stream.state = State::Dead { why: why.into() };
            self.streams.waiting -= usize::from(waited);
            self.events.push_back(Event::Wake(key));
        }
    }
}

/// Datagrams come beside a session of UDP alone: nobody would take those of another stream.
fn beside(open: &Open) -> Option<Arrived> {
    (open.protocol == Protocol::Udp).then(Arrived::new)
}

fn abandon(slot: &mut Slot, id: StreamId) {
    let _ = slot.conn.send_stream(id).reset(ABANDONED);
    let _ = slot.conn.recv_stream(id).stop(ABANDONED);
}
