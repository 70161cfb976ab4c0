//! Days: two nodes with some traffic now and then and a rare fault. Nothing grows.

use crate::{
    faults::{Fault, Stage, draw},
    heap,
    nat::Kind,
    pair::{SEC, number, seeds},
    shards,
    traffic::{State, Traffic},
};
use std::time::Duration;
use weft::{config::Congestion, tunnel::Sizes};

const HOUR: Duration = Duration::from_secs(3600);
/// When all has been seen once: what is there then may stay.
const FIRST: u32 = 2;
/// Before a look everybody is left alone for so long: connections end, mappings are forgotten.
const REST: Duration = Duration::from_secs(400);
/// Buffers and tables keep the room of their fullest moment, and a restart frees it: so the leanest hour of the last third
/// of the day is held against that of the first. One forgotten connection, of 15 kB, in each four hours is too much.
const SLACK: isize = 64 << 10;

/// What is held at rest.
struct Look {
    nodes: Vec<Sizes>,
    heap: isize,
}

struct Days {
    stage: Stage,
    traffic: Traffic,
    rng: fastrand::Rng,
    nodes: [usize; 2],
}

impl Days {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut stage = Stage::new(seed, 2);
        stage.world.congestion = Congestion::Cubic;
        stage.world.delay = Duration::from_millis(rng.u64(1..60));
        stage.world.loss = if rng.bool() { 0.005 } else { 0.0 };
        let mut kind = || Kind::ALL[rng.usize(..Kind::ALL.len())];
        let nodes = [stage.add(kind(), None), stage.add(kind(), None)];
        Self { stage, traffic: Traffic::default(), rng, nodes }
    }

    fn hour(&mut self) -> Result<(), String> {
        let end = self.stage.world.now + HOUR - REST;
        while self.stage.world.now < end {
            for _ in 0..self.rng.usize(1..4) {
                let [a, b] = self.nodes;
                let (from, to) = if self.rng.bool() { (a, b) } else { (b, a) };
                let bytes = self.rng.usize(1..20_000);
                self.traffic.open(&mut self.stage.world, &self.stage.names, from, to, bytes);
            }
            self.traffic.flush(&mut self.stage.world);
            let pause = Duration::from_millis(self.rng.u64(1000..700_000));
            self.traffic.run(&mut self.stage.world, pause, |_, _| false);
            if self.rng.u8(..6) == 0 {
                let faults = draw(&self.stage, &mut self.rng);
                let start = self.stage.world.now;
                for (after, fault) in faults {
                    let wait = (start + after).saturating_duration_since(self.stage.world.now);
                    self.traffic.run(&mut self.stage.world, wait, |_, _| false);
                    self.stage.apply(&fault);
                    if let Fault::Crash { host, .. } = fault {
                        self.traffic.crashed(host);
                    }
                }
            }
        }
        self.traffic.drop_all(&mut self.stage.world);
        self.traffic.forget();
        self.traffic.run(&mut self.stage.world, REST, |_, _| false);
        self.traffic.wrong.first().map_or(Ok(()), |wrong| Err(wrong.clone()))
    }

    fn look(&mut self) -> Result<Look, String> {
        self.stage.world.tidy();
        let hosts = self.stage.world.hosts.iter();
        let nodes: Vec<Sizes> = hosts.map(|h| h.node.sizes()).collect();
        match nodes.iter().find(|s| s.slots + s.streams + s.handles + s.wants + s.outbox_bytes + s.shadow_bytes > 0) {
            Some(busy) => Err(format!("at rest: {busy:?}")),
            None => Ok(Look { nodes, heap: heap::held() }),
        }
    }

    fn works(&mut self) -> Result<(), String> {
        let [a, b] = self.nodes;
        let flow = self.traffic.open(&mut self.stage.world, &self.stage.names, a, b, 1000);
        self.traffic.flush(&mut self.stage.world);
        self.traffic.run(&mut self.stage.world, 30 * SEC, |t, _| t.flows[flow].state == State::Done);
        match &self.traffic.flows[flow] {
            f if f.state == State::Done => Ok(()),
            f => Err(format!("in the end: {f}")),
        }
    }
}

fn day(seed: u64) -> Result<(), String> {
    let mut days = Days::new(seed);
    let (mut first, mut heap): (Option<Look>, Vec<isize>) = (None, Vec::new());
    for hour in 1..=number("WEFT_HOURS").unwrap_or(6) {
        days.hour().map_err(|why| format!("hour {hour}: {why}"))?;
        let look = days.look().map_err(|why| format!("hour {hour}: {why}"))?;
        log::info!("hour {hour}: {} bytes, {:?}", look.heap, look.nodes);
        heap.push(look.heap);
        let Some(first) = &first else {
            first = Some(look).filter(|_| hour >= FIRST.into());
            continue;
        };
        for (host, (then, now)) in first.nodes.iter().zip(&look.nodes).enumerate() {
            let kept = |s: &Sizes| [s.peers, s.disco_ids, s.remembered];
            let grown = kept(now).iter().zip(kept(then)).any(|(now, then)| *now > then.max(1));
            if grown || now.flows > 2 * now.peers || now.candidates > 64 * now.peers || now.relay_nodes > 2 {
                return Err(format!("hour {hour}, host {host}: {now:?}, which was {then:?} in hour {FIRST}"));
            }
        }
    }
    let third = heap.len().div_ceil(3);
    let least = |hours: &[isize]| hours.iter().copied().min().unwrap_or_default();
    if least(&heap[heap.len() - third..]) > least(&heap[..third]) + SLACK {
        return Err(format!("bytes held after each hour: {heap:?}"));
    }
    days.works()
}

#[test]
fn nothing_grows() {
    shards::run("tests/sim/run soak", seeds(2), day);
}
