//! Whole lives by lot: nodes behind NATs, relays, a network that loses, delays and repeats, streams, faults. What must
//! hold is checked in every one.

use crate::{
    faults::{Fault, Stage, draw},
    nat::Kind,
    pair::{SEC, seeds},
    shards,
    traffic::{State, Traffic},
};
use std::time::{Duration, Instant};
use weft::{config::Congestion, tunnel::Sizes};

/// After the last fault nobody is stuck or on the relay without need for longer.
const RECOVERY: Duration = Duration::from_secs(60);
/// A fault counts as one with the next that comes within this time after its end.
const AFTERMATH: Duration = Duration::from_secs(12);
/// Streams need not survive what takes longer in one piece: an idle connection ends after 60 s.
const BEARABLE: Duration = Duration::from_secs(40);
/// How often streams are given more to carry, and what must always hold is checked.
const SLICE: Duration = Duration::from_millis(500);
/// Long enough for idle connections to be closed and forgotten.
const QUIET: Duration = Duration::from_secs(150);

#[derive(Clone, Debug)]
enum What {
    Fault(Fault),
    /// Streams of so many bytes each way; by both ends at once or by one.
    Open {
        from: usize,
        to: usize,
        bytes: usize,
        both: bool,
    },
}

/// When what happens, in order.
type Script = Vec<(Duration, What)>;
/// From when to when it harms to be there: merged, with aftermath.
type Harm = Vec<(Duration, Duration)>;

struct Life {
    stage: Stage,
    traffic: Traffic,
    script: Script,
    harm: Harm,
    start: Instant,
    part: f64,
    lossy: bool,
}

fn millis(rng: &mut fastrand::Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut stage = Stage::new(seed, 1 + usize::from(rng.u8(..3) == 0));
        let world = &mut stage.world;
        // BBR draws random numbers of its own, and a seed must replay.
        world.congestion = Congestion::Cubic;
        world.delay = millis(&mut rng, 1..60);
        world.jitter = rng.f64() * 0.8;
        let lossy = rng.u8(..10) < 3;
        world.loss = if lossy { rng.f64() * 0.04 } else { 0.0 };
        world.duplicate = if rng.bool() { rng.f64() * 0.05 } else { 0.0 };
        let kind = |rng: &mut fastrand::Rng| Kind::ALL[rng.usize(..Kind::ALL.len())];
        let first = stage.add(kind(&mut rng), None);
        let neighbours = rng.u8(..10) == 0;
        for _ in 0..1 + usize::from(rng.u8(..10) == 0) {
            stage.add(kind(&mut rng), neighbours.then_some(first));
        }
        for nat in &mut stage.world.nats {
            nat.expiry = SEC * rng.u32(30..120);
            nat.hairpin = rng.bool();
        }
        let (script, harm) = write(&stage, &mut rng);
        let length = script.last().map_or(SEC, |(at, _)| *at + SEC);
        let part = SLICE.as_secs_f64() / length.as_secs_f64();
        stage.world.record = script.iter().any(|(_, w)| matches!(w, What::Fault(Fault::Replay { .. })));
        let start = stage.world.now;
        Self { stage, traffic: Traffic::default(), script, harm, start, part, lossy }
    }

    fn now(&self) -> Duration {
        self.stage.world.now - self.start
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let hosts: Vec<usize> = self.stage.sites.iter().map(|s| s.host).collect();
        let pairs = hosts.iter().flat_map(|a| hosts.iter().map(move |b| (*a, *b)));
        pairs.filter(|(a, b)| a != b).collect()
    }

    /// Is a stream that was opened now to be answered at the first try?
    fn calm(&self) -> bool {
        let now = self.now();
        let shaken = |(from, to): &(Duration, Duration)| now >= *from && now < *to + RECOVERY;
        now >= 10 * SEC && !self.harm.iter().any(shaken) && self.stage.world.loss < 0.02
    }

    fn open(&mut self, from: usize, to: usize, bytes: usize) -> usize {
        let flow = self.traffic.open(&mut self.stage.world, &self.stage.names, from, to, bytes);
        self.traffic.flows[flow].excused = !self.calm();
        flow
    }

    fn perform(&mut self, what: &What) {
        match what {
            What::Open { from, to, bytes, both } => {
                self.open(*from, *to, *bytes);
                if *both {
                    self.open(*to, *from, *bytes);
                }
            }
            What::Fault(fault) => {
                if fault.harms() {
                    let now = self.now();
                    let long = |(from, to): &(Duration, Duration)| now >= *from && now <= *to && *to - *from > BEARABLE;
                    let unbearable = self.harm.iter().any(long);
                    for f in &mut self.traffic.flows {
                        f.excused |= unbearable || f.state == State::Asking;
                    }
                }
                self.stage.apply(fault);
                if let Fault::Crash { host, .. } = fault {
                    self.traffic.crashed(*host);
                }
            }
        }
    }

    /// Runs until then, with traffic; checks on the way.
    fn run_until(&mut self, at: Duration) -> Result<(), String> {
        while self.now() < at {
            let slice = SLICE.min(at - self.now());
            self.traffic.run(&mut self.stage.world, slice, |_, _| false);
            self.stage.keep();
            for site in &self.stage.sites {
                let node = &self.stage.world.hosts[site.host].node;
                log::trace!("{}: {:?} {:?}", site.host, node.peer_views(self.stage.world.now), node.sizes());
            }
            if slice == SLICE {
                self.traffic.feed(&mut self.stage.world, self.part);
            }
            self.check()?;
        }
        Ok(())
    }

    /// What holds at any time.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = self.traffic.wrong.first() {
            return Err(wrong.clone());
        }
        for (at, flow) in self.traffic.flows.iter().enumerate() {
            if let State::Broken(why) = &flow.state
                && !flow.excused
            {
                return Err(format!("stream {at} of {:?} broke: {why}", flow.hosts));
            }
        }
        for (a, b) in self.pairs() {
            if self.stage.path(a, b) == "direct" && self.stage.direct_possible(a, b) == Some(false) {
                return Err(format!("{a} has a direct path to {b}, which the oracle rules out"));
            }
        }
        for (at, host) in self.stage.world.hosts.iter().enumerate() {
            bounded(&host.node.sizes()).map_err(|why| format!("host {at}: {why}"))?;
        }
        Ok(())
    }

    /// A minute at most after the last fault all is as it should be: streams open, paths are the best there are.
    fn recover(&mut self) -> Result<(), String> {
        let end = self.now();
        let pairs = self.pairs();
        let mut probes: Vec<usize> = pairs.iter().map(|(a, b)| self.open(*a, *b, 3000)).collect();
        let mut late = String::new();
        while self.now() < end + RECOVERY {
            self.run_until((self.now() + SLICE).min(end + RECOVERY))?;
            late.clear();
            for (probe, (a, b)) in probes.iter_mut().zip(&pairs) {
                match &self.traffic.flows[*probe].state {
                    State::Broken(why) => {
                        late = format!("no stream from {a} to {b}: {why}");
                        *probe = self.open(*a, *b, 3000);
                    }
                    State::Asking => late = format!("no answer to a stream from {a} to {b}"),
                    State::Live | State::Done => {}
                }
                let path = self.stage.path(*a, *b);
                let best = match self.stage.direct_possible(*a, *b) {
                    Some(true) => "direct",
                    Some(false) => "relay",
                    None => path,
                };
                if path != best || path == "none" {
                    late = format!("{a} reaches {b} by {path} and not by {best}");
                }
            }
            if late.is_empty() {
                return Ok(());
            }
        }
        Err(format!("a minute after the last fault: {late}"))
    }

    /// All that still lives comes to its end.
    fn finish(&mut self) -> Result<(), String> {
        self.traffic.flush(&mut self.stage.world);
        // The other end of what broke is told at the latest when its connection ends.
        let over = |t: &mut Traffic, _: &mut _| t.flows.iter().all(|f| !matches!(f.state, State::Asking | State::Live));
        let most = if self.lossy { 60 * SEC } else { 30 * SEC };
        if !self.traffic.run(&mut self.stage.world, most, over) {
            let left = self.traffic.flows.iter().position(|f| matches!(f.state, State::Asking | State::Live));
            for site in &self.stage.sites {
                log::trace!("{:?}", self.stage.world.hosts[site.host].node.peer_views(self.stage.world.now));
            }
            return Err(format!("stream {} came to no end: {}", left.unwrap(), self.traffic.flows[left.unwrap()]));
        }
        self.check()
    }

    /// After a while without traffic nothing is left but what is known of others; and it comes to life again.
    fn rest_and_wake(&mut self, long: Duration) -> Result<(), String> {
        self.traffic.drop_all(&mut self.stage.world);
        self.traffic.run(&mut self.stage.world, long, |_, _| false);
        self.check()?;
        for (at, host) in self.stage.world.hosts.iter().enumerate() {
            let sizes = host.node.sizes();
            if sizes.slots + sizes.streams + sizes.handles + sizes.wants + sizes.shadow_bytes > 0 {
                return Err(format!("host {at} is at rest and yet holds {sizes:?}"));
            }
        }
        // One end alone: dials from both would open each other's NAT.
        let (up, pairs) = (self.stage.rng.bool(), self.pairs().into_iter());
        let flows: Vec<usize> = pairs.filter(|(a, b)| (a < b) == up).map(|(a, b)| self.open(a, b, 500)).collect();
        self.finish()?;
        let failed = flows.iter().find(|f| self.traffic.flows[**f].state != State::Done && !self.lossy);
        failed.map_or(Ok(()), |f| Err(format!("after a rest: {}", self.traffic.flows[*f])))
    }
}

/// The bounds that the product names.
fn bounded(s: &Sizes) -> Result<(), String> {
    let fits = s.slots <= 320
        && s.streams <= 4096
        && s.peers <= 1000
        && s.candidates <= 64 * s.peers
        && s.probes <= 256 * s.peers
        && s.handles == s.slots
        && s.flows <= 2 * s.peers
        && s.disco_ids <= s.peers
        && s.outbox_bytes <= 2 << 20
        && s.shadow_bytes <= 32 * 1500 * s.slots;
    if fits { Ok(()) } else { Err(format!("out of bounds: {s:?}")) }
}

fn write(stage: &Stage, rng: &mut fastrand::Rng) -> (Script, Harm) {
    let mut script = Vec::new();
    let mut at = millis(rng, 0..3000);
    let pick = |rng: &mut fastrand::Rng| {
        let from = rng.usize(..stage.sites.len());
        let to = (from + rng.usize(1..stage.sites.len())) % stage.sites.len();
        (stage.sites[from].host, stage.sites[to].host)
    };
    for _ in 0..rng.usize(1..5) {
        let (from, to) = pick(rng);
        let bytes = rng.usize(1..4000) * if rng.u8(..8) == 0 { 20 } else { 1 };
        script.push((at, What::Open { from, to, bytes, both: rng.u8(..3) == 0 }));
        at += match rng.u8(..40) {
            0..=22 => millis(rng, 0..1500),
            23..=37 => millis(rng, 1500..9000),
            38 => millis(rng, 9000..40_000),
            _ => millis(rng, 40_000..200_000),
        };
        script.extend(draw(stage, rng).into_iter().map(|(after, fault)| (at + after, What::Fault(fault))));
        if rng.bool() {
            at += millis(rng, 0..4000);
        }
    }
    script.sort_by_key(|(at, _)| *at);
    let mut harm = Harm::new();
    for (at, what) in &script {
        let What::Fault(fault) = what else { continue };
        if !fault.harms() {
            continue;
        }
        // What lasts is harm until it ends.
        let last = script.iter().filter(|(end, w)| end > at && matches!(w, What::Fault(f) if f.ends(fault)));
        let until = last.map(|(end, _)| *end).next().unwrap_or(*at) + AFTERMATH;
        match harm.last_mut() {
            Some((_, end)) if *end >= *at => *end = (*end).max(until),
            _ => harm.push((*at, until)),
        }
    }
    (script, harm)
}

/// One life; what went wrong, where something did.
fn live(seed: u64) -> Result<(), String> {
    let mut life = Life::new(seed);
    for (at, what) in std::mem::take(&mut life.script) {
        life.run_until(at)?;
        log::info!("{:?}: {what:?}", life.now());
        life.perform(&what);
    }
    log::info!("{:?}: no more faults", life.now());
    life.recover()?;
    log::info!("{:?}: recovered", life.now());
    life.finish()?;
    match seed % 8 {
        0 => life.rest_and_wake(QUIET),
        1 => life.rest_and_wake(QUIET + 300 * SEC),
        _ => Ok(()),
    }
}

#[test]
fn any_life_ends_well() {
    shards::run("tests/sim/run", seeds(120), live);
}

#[test]
fn a_seed_replays_exactly() {
    for seed in seeds(4) {
        let trace = || {
            let mut life = Life::new(seed);
            let mut all = Vec::new();
            for (at, what) in std::mem::take(&mut life.script) {
                let _ = life.run_until(at);
                life.perform(&what);
                all.push((life.now(), life.stage.world.sent.clone(), life.stage.world.rng.clone().u64(..)));
            }
            all
        };
        assert!(trace() == trace(), "seed {seed}: two runs differ");
    }
}
