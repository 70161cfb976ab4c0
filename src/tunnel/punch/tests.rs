use super::*;

const RELAY: Path = Path::Relay { relay: 0, flow: 1 };
const SEC: Duration = Duration::from_secs(1);

struct Machine {
    paths: Paths,
    rng: fastrand::Rng,
    now: Instant,
}

impl Machine {
    fn new() -> Self {
        let mut paths = Paths::default();
        assert!(paths.set_relay(Some(RELAY)));
        Self { paths, rng: fastrand::Rng::with_seed(1), now: Instant::now() }
    }

    /// Runs timers for so long; gives what was asked for, with the time since the start.
    fn run(&mut self, most: Duration) -> Vec<(Duration, Do)> {
        let (start, until) = (self.now, self.now + most);
        let mut all = Vec::new();
        while let Some(at) = self.paths.poll_timeout().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            let mut out = Vec::new();
            self.paths.handle_timeout(self.now, &mut self.rng, &mut out);
            all.extend(out.into_iter().map(|d| (self.now - start, d)));
        }
        self.now = until;
        all
    }

    fn direct(&mut self, address: &str) -> Way {
        let (remote, mut out) = (address.parse().unwrap(), Vec::new());
        self.paths.called(self.now, false, &[remote], &mut out);
        let address = Way::from(remote);
        let pings = self.run(SCHEDULE[1]);
        let txid = pings.iter().find_map(|(_, d)| match d {
            Do::Ping { to, txid } if *to == address => Some(*txid),
            _ => None,
        });
        self.now += Duration::from_millis(20);
        self.paths.ponged(self.now, txid.unwrap(), &mut out);
        assert!(out.contains(&Do::Switch(Path::Direct(address))));
        address
    }
}

#[test]
fn a_round_pings_each_candidate_at_the_times_of_the_schedule() {
    let mut m = Machine::new();
    let list: [SocketAddr; 2] = ["11.0.0.1:5".parse().unwrap(), "192.168.1.2:5".parse().unwrap()];
    let mut out = Vec::new();
    m.paths.called(m.now, true, &list, &mut out);
    assert_eq!(out, [Do::CallMeMaybe { asks: false }]);
    let pings = m.run(2 * SEC);
    for address in list {
        let times: Vec<Duration> = pings
            .iter()
            .filter(|(_, d)| matches!(d, Do::Ping { to, .. } if *to == address.into()))
            .map(|(t, _)| *t)
            .collect();
        assert_eq!(times, SCHEDULE);
    }
    assert_eq!(m.paths.current(), Some(RELAY), "nothing is proven");
}

#[test]
fn a_call_is_made_again_until_it_is_answered() {
    let calls = |m: &mut Machine, most| -> Vec<Duration> {
        let all = m.run(most).into_iter();
        all.filter(|(_, d)| matches!(d, Do::CallMeMaybe { asks: true })).map(|(t, _)| t).collect()
    };
    let mut m = Machine::new();
    let mut out = Vec::new();
    m.paths.seek(m.now, &mut out);
    assert_eq!(out, [Do::CallMeMaybe { asks: true }]);
    assert_eq!(calls(&mut m, 10 * SEC), [250, 750, 1750].map(Duration::from_millis), "and no more");

    m.paths.seek(m.now, &mut out);
    assert_eq!(calls(&mut m, SEC / 2).len(), 1);
    m.paths.called(m.now, false, &["11.0.0.1:5".parse().unwrap()], &mut out);
    assert_eq!(calls(&mut m, 10 * SEC), [], "answered");

    m.paths.seek(m.now, &mut out);
    m.direct("11.0.0.2:5");
    assert_eq!(calls(&mut m, SEC), [], "a path is found");
}

#[test]
fn failed_rounds_come_again_in_longer_steps_while_the_peer_is_used() {
    let mut m = Machine::new();
    m.paths.called(m.now, false, &["11.0.0.1:5".parse().unwrap()], &mut Vec::new());
    let mut rounds: Vec<u64> = Vec::new();
    for second in 0..600 {
        m.paths.received(m.now, 1200);
        let called = m.run(SEC).iter().any(|(_, d)| matches!(d, Do::CallMeMaybe { asks: true }));
        // Of a round there are several, since nobody answers.
        if called && rounds.last().is_none_or(|last| second > last + 3) {
            rounds.push(second);
        }
    }
    // 1.5 s for a round, then the gap: 5, 15, and from then on 45 s, seen in steps of a second.
    assert_eq!(rounds[..5], [6, 22, 69, 116, 163]);
    assert_eq!(rounds.len(), 14);
}

#[test]
fn failed_rounds_of_a_peer_that_says_little_come_seldom() {
    let mut m = Machine::new();
    m.paths.received(m.now, 1200);
    m.paths.called(m.now, false, &["11.0.0.1:5".parse().unwrap()], &mut Vec::new());
    let calls = |d: Vec<(Duration, Do)>| d.iter().filter(|(_, d)| matches!(d, Do::CallMeMaybe { .. })).count();
    let round = 1 + CALL_AGAIN.len();
    assert_eq!(calls(m.run(90 * SEC)), 3 * round, "after 5, 15 and 60 s");
    assert_eq!(calls(m.run(200 * SEC)), 0);
    m.paths.sent(m.now, 1200);
    assert_eq!(calls(m.run(48 * SEC)), round, "bytes flow again");
}

#[test]
fn silence_makes_suspect_and_then_relays_and_an_answer_ends_it() {
    let mut m = Machine::new();
    m.direct("11.0.0.1:5");
    m.paths.sent(m.now, 1200);
    let said: Vec<(Duration, Do)> = m
        .run(4 * SEC)
        .into_iter()
        .filter(|(_, d)| matches!(d, Do::Suspect { .. } | Do::Switch(_) | Do::Trust))
        .collect();
    assert_eq!(said, [(SEC, Do::Suspect { tell: true }), (3 * SEC, Do::Switch(RELAY))]);

    let mut m = Machine::new();
    let address = m.direct("11.0.0.1:5");
    m.paths.sent(m.now, 1200);
    let pings = m.run(2 * SEC);
    let mut out = Vec::new();
    m.paths.came_from(m.now, address, &mut m.rng, &mut out);
    assert_eq!(out, [], "one direction alone is no path");
    let last = pings.iter().rev().find_map(|(_, d)| if let Do::Ping { txid, .. } = d { Some(*txid) } else { None });
    m.paths.ponged(m.now, last.unwrap(), &mut out);
    assert_eq!(out, [Do::Trust]);
    assert_eq!(m.paths.current(), Some(Path::Direct(address)));
}

#[test]
fn who_is_told_that_nothing_arrives_asks_at_once_and_believes_only_an_answer() {
    let mut m = Machine::new();
    let address = m.direct("11.0.0.1:5");
    let mut all = Vec::new();
    m.paths.path_down(m.now, &mut all);
    assert_eq!(all, [Do::Suspect { tell: false }]);
    for _ in 0..40 {
        all.extend(m.run(SEC / 10).into_iter().map(|(_, d)| d));
        m.paths.came_from(m.now, address, &mut m.rng, &mut all);
    }
    let pings = all.iter().filter(|d| matches!(d, Do::Ping { to, .. } if *to == address)).count();
    assert!(all.contains(&Do::Switch(RELAY)) && !all.contains(&Do::Trust) && pings >= 12, "{all:?}");
}

#[test]
fn a_lan_path_is_taken_over_a_faster_one_of_lower_rank_and_not_given_up_for_it() {
    let mut m = Machine::new();
    m.direct("11.0.0.1:5");
    let lan = m.direct("192.168.1.2:5");
    let mut out = Vec::new();
    let other: SocketAddr = "11.0.0.1:6".parse().unwrap();
    m.paths.came_from(m.now, other.into(), &mut m.rng, &mut out);
    let Some(Do::Ping { txid, .. }) = out.first().copied() else { panic!() };
    m.paths.ponged(m.now, txid, &mut out);
    assert_eq!(m.paths.current(), Some(Path::Direct(lan)));
}

/// Two addresses of one rank, whose round trips vary so that now the one is faster, now the other.
#[test]
fn two_paths_do_not_take_turns() {
    let mut m = Machine::new();
    let list: [SocketAddr; 2] = ["11.0.0.1:5".parse().unwrap(), "11.0.0.2:5".parse().unwrap()];
    let (mut switches, mut out) = (0, Vec::new());
    for i in 0..60 {
        m.paths.received(m.now, 1200);
        m.paths.called(m.now, false, &list, &mut out);
        let pings = m.run(SCHEDULE[1]);
        for faster in [true, false] {
            m.now += Duration::from_millis(40);
            let now_faster = |to: Way| (to.remote == list[0]) == (i / 8 % 2 == 0);
            for (_, what) in &pings {
                if let Do::Ping { to, txid } = what
                    && now_faster(*to) == faster
                {
                    m.paths.ponged(m.now, *txid, &mut out);
                }
            }
        }
        switches += out.drain(..).filter(|d| matches!(d, Do::Switch(_))).count();
    }
    assert!((1..=3).contains(&switches), "{switches} in {:?}", m.now);
}

#[test]
fn an_unknown_pong_proves_nothing() {
    let mut m = Machine::new();
    m.paths.called(m.now, false, &["11.0.0.1:5".parse().unwrap()], &mut Vec::new());
    m.run(Duration::ZERO);
    assert_eq!(m.paths.ponged(m.now, 42, &mut Vec::new()), None);
    assert_eq!(m.paths.current(), Some(RELAY));
}

#[test]
fn a_busy_path_is_pinged_each_second_and_an_idle_one_left_alone_in_the_end() {
    let mut m = Machine::new();
    let address = m.direct("11.0.0.1:5");
    m.run(2 * SEC); // the rest of the round
    m.paths.received(m.now, 1200);
    let mut pings = 0;
    for _ in 0..400 {
        for (_, what) in m.run(SEC) {
            if let Do::Ping { txid, to } = what {
                assert_eq!(to, address);
                pings += 1;
                m.paths.ponged(m.now, txid, &mut Vec::new());
            }
        }
    }
    assert!((20..=26).contains(&pings), "{pings}: 10 in the busy 10 s, then one each 25 s up to 300 s");
    assert_eq!(m.paths.poll_timeout(), None);
    assert_eq!(m.paths.current(), Some(RELAY));
}

#[test]
fn a_path_that_is_left_alone_and_has_no_relay_beside_it_is_none_any_more() {
    let mut m = Machine::new();
    let address = m.direct("11.0.0.1:5");
    assert!(!m.paths.set_relay(None));
    assert_eq!(m.paths.current(), Some(Path::Direct(address)));
    for _ in 0..400 {
        for (_, what) in m.run(SEC) {
            if let Do::Ping { txid, .. } = what {
                m.paths.ponged(m.now, txid, &mut Vec::new());
            }
        }
    }
    assert_eq!((m.paths.current(), m.paths.last_good()), (None, Some(address.remote)));
}

#[test]
fn keepalives_alone_cost_few_pings() {
    let mut m = Machine::new();
    m.direct("11.0.0.1:5");
    let mut pings = 0;
    for step in 0..600 * 20 {
        if step % 400 == 0 {
            m.paths.sent(m.now, QUIET);
            m.paths.received(m.now, QUIET);
        }
        for (_, what) in m.run(SEC / 20) {
            let Do::Ping { txid, .. } = what else { continue };
            m.paths.ponged(m.now, txid, &mut Vec::new());
            pings += 1;
        }
    }
    assert!((25..=70).contains(&pings), "{pings} in ten minutes");
    assert!(matches!(m.paths.current(), Some(Path::Direct(_))), "it is not left to lapse");
}
