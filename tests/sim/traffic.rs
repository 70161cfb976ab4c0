//! Streams with known content, both ways, driven through whatever happens to the nodes at their ends.

use crate::world::World;
use std::{collections::BTreeMap, time::Duration};
use weft::{
    table::model::{Protocol, ServiceId},
    tunnel::{Open, Progress, Refusal},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The OPEN has no answer yet.
    Asking,
    Live,
    /// All bytes came, both ways.
    Done,
    /// Refused, reset or lost.
    Broken(String),
}

/// One stream; index 0 is the end that opened it.
pub struct Flow {
    pub hosts: [usize; 2],
    keys: [Option<u32>; 2],
    /// Of each direction.
    total: usize,
    /// How much may be written by now.
    credit: usize,
    sent: [usize; 2],
    got: [usize; 2],
    ended: [bool; 2],
    /// The node of that end was restarted.
    gone: [bool; 2],
    pub state: State,
    /// A fault is such that it need not survive.
    pub excused: bool,
}

/// Bytes differ by stream, by direction and along the stream.
fn byte(flow: usize, end: usize, at: usize) -> u8 {
    (flow * 31 + end * 101 + at * 7 + at / 251) as u8
}

impl std::fmt::Display for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { hosts, state, sent, got, total, .. } = self;
        write!(f, "{hosts:?} {state:?}, sent {sent:?} and got {got:?} of {total}")
    }
}

#[derive(Default)]
pub struct Traffic {
    pub flows: Vec<Flow>,
    by_key: BTreeMap<(usize, u32), (usize, usize)>,
    /// What must never be: bytes that are wrong, too many, or missing at the end.
    pub wrong: Vec<String>,
}

impl Traffic {
    /// Asks for a stream of `total` bytes each way; they flow as `feed` allows.
    pub fn open(&mut self, world: &mut World, names: &[String], from: usize, to: usize, total: usize) -> usize {
        let flow = self.flows.len();
        let open = Open {
            service: ServiceId { namespace: "shop".into(), name: "web".into() },
            port: flow as u16,
            protocol: Protocol::Tcp,
            endpoint: "10.0.0.1:8080".parse().unwrap(),
        };
        world.touch(from);
        let key = world.hosts[from].node.open(world.now, &names[to], &open);
        let state = if key.is_some() { State::Asking } else { State::Broken("too many streams".into()) };
        self.by_key.extend(key.map(|key| ((from, key), (flow, 0))));
        self.flows.push(Flow {
            hosts: [from, to],
            keys: [key, None],
            total,
            credit: total.min(100),
            sent: [0; 2],
            got: [0; 2],
            ended: [false; 2],
            gone: [false; 2],
            state,
            excused: false,
        });
        self.pump(world, flow, 0);
        flow
    }

    /// Allows `part` more of each stream.
    pub fn feed(&mut self, world: &mut World, part: f64) {
        for flow in 0..self.flows.len() {
            let f = &mut self.flows[flow];
            if f.credit < f.total && matches!(f.state, State::Asking | State::Live) {
                f.credit = f.total.min(f.credit + (f.total as f64 * part).ceil() as usize);
                (0..2).for_each(|end| self.pump(world, flow, end));
            }
        }
    }

    /// The rest of all streams.
    pub fn flush(&mut self, world: &mut World) {
        self.feed(world, 1.0);
    }

    /// Runs for so long, or until `done`.
    pub fn run(
        &mut self,
        world: &mut World,
        most: Duration,
        mut done: impl FnMut(&mut Self, &mut World) -> bool,
    ) -> bool {
        world.run(most, |world| {
            self.look(world);
            done(self, world)
        })
    }

    fn look(&mut self, world: &mut World) {
        for host in 0..world.hosts.len() {
            while let Some((key, _, open)) = world.hosts[host].incoming.pop_front() {
                let flow = usize::from(open.port);
                // A late one, of before all was forgotten.
                let Some(f) = self.flows.get_mut(flow) else {
                    world.touch(host);
                    let now = world.now;
                    world.hosts[host].node.drop_stream(now, key);
                    continue;
                };
                if f.hosts[1] != host {
                    self.wrong.push(format!("stream {flow} came to host {host}"));
                }
                // Its first OPEN may have come to a node that was restarted since: one end at a time.
                if f.keys[1].is_some() || matches!(f.state, State::Broken(_) | State::Done) {
                    world.touch(host);
                    world.hosts[host].node.answer(key, &Err(Refusal::Busy));
                    let now = world.now;
                    world.hosts[host].node.drop_stream(now, key);
                    continue;
                }
                f.keys[1] = Some(key);
                world.touch(host);
                self.by_key.insert((host, key), (flow, 1));
                world.hosts[host].node.answer(key, &Ok(()));
                self.pump(world, flow, 1);
            }
            while let Some(key) = world.hosts[host].woken.pop_first() {
                if let Some((flow, end)) = self.by_key.get(&(host, key)).copied() {
                    self.pump(world, flow, end);
                }
            }
        }
    }

    /// All that one end can do now.
    fn pump(&mut self, world: &mut World, flow: usize, end: usize) {
        let f = &mut self.flows[flow];
        let Some(key) = f.keys[end] else { return };
        world.touch(f.hosts[end]);
        let node = &mut world.hosts[f.hosts[end]].node;
        if f.state == State::Asking && end == 0 {
            match node.opened(key) {
                None => {}
                Some(Ok(())) => f.state = State::Live,
                Some(Err(why)) => return self.broke(world, flow, end, why.to_string()),
            }
        }
        let f = &mut self.flows[flow];
        let mut buf = [0; 4096];
        while f.sent[end] < f.credit {
            let len = buf.len().min(f.credit - f.sent[end]);
            buf[..len].iter_mut().enumerate().for_each(|(i, b)| *b = byte(flow, end, f.sent[end] + i));
            match node.write(key, &buf[..len]) {
                Progress::Bytes(n) => f.sent[end] += n,
                Progress::Broken(why) => return self.broke(world, flow, end, format!("write: {why}")),
                Progress::Pending | Progress::End => break,
            }
        }
        if f.sent[end] == f.total {
            node.finish(key);
        }
        let theirs = 1 - end;
        while !f.ended[end] {
            match node.read(key, &mut buf) {
                Progress::Bytes(n) => {
                    let at = f.got[end];
                    if at + n > f.total || (0..n).any(|i| buf[i] != byte(flow, theirs, at + i)) {
                        self.wrong.push(format!("stream {flow}: wrong bytes behind {at}, of {n}"));
                    }
                    f.got[end] += n;
                }
                Progress::End => {
                    f.ended[end] = true;
                    if f.got[end] != f.total {
                        self.wrong.push(format!("stream {flow}: FIN after {} of {} bytes", f.got[end], f.total));
                    }
                }
                Progress::Pending => break,
                Progress::Broken(why) => return self.broke(world, flow, end, format!("read: {why}")),
            }
        }
        if f.ended == [true; 2] {
            f.state = State::Done;
            (0..2).for_each(|end| self.drop_end(world, flow, end));
        } else if f.gone[theirs] && f.ended[end] && f.sent[end] == f.total {
            // It has all, asks no more, and so will never be told.
            self.broke(world, flow, end, "the other end was restarted".into());
        }
    }

    fn broke(&mut self, world: &mut World, flow: usize, end: usize, why: String) {
        self.drop_end(world, flow, end);
        let f = &mut self.flows[flow];
        // One end may be told late what the other knows.
        if !matches!(f.state, State::Broken(_) | State::Done) {
            f.state = State::Broken(why);
        }
    }

    fn drop_end(&mut self, world: &mut World, flow: usize, end: usize) {
        let f = &mut self.flows[flow];
        if let Some(key) = f.keys[end].take() {
            let now = world.now;
            self.by_key.remove(&(f.hosts[end], key));
            world.touch(f.hosts[end]);
            world.hosts[f.hosts[end]].node.drop_stream(now, key);
        }
    }

    /// A node was restarted: its ends are no more.
    pub fn crashed(&mut self, host: usize) {
        self.by_key.retain(|(h, _), _| *h != host);
        for f in self.flows.iter_mut().filter(|f| f.hosts.contains(&host)) {
            let end = usize::from(f.hosts[1] == host);
            if f.state != State::Done {
                f.keys[end] = None;
                f.excused = true;
            }
            f.gone[end] = true;
            if end == 0 && matches!(f.state, State::Asking | State::Live) {
                f.state = State::Broken("its node was restarted".into());
            }
        }
    }

    /// Starts anew; nothing may be open.
    pub fn forget(&mut self) {
        self.flows.clear();
        self.by_key.clear();
    }

    /// Gives up whatever is still open.
    pub fn drop_all(&mut self, world: &mut World) {
        for flow in 0..self.flows.len() {
            (0..2).for_each(|end| self.drop_end(world, flow, end));
            if matches!(self.flows[flow].state, State::Asking | State::Live) {
                self.flows[flow].state = State::Broken("given up".into());
            }
        }
    }
}
