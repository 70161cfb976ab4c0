//! Datagrams of many packets: each whole though packets are lost, none behind another that lost one, none for ever.

use crate::{
    datagrams::{LONG, MBIT, receive, send, session},
    line::Line,
    nat::Kind,
    pair::{Pair, SEC, payload, seeds},
    world::{End, World},
};
use std::{cell::Cell, time::Duration};
use weft::{
    metrics::TunnelCounters,
    table::model::Protocol,
    tunnel::{
        Beside, Progress,
        gather::{GATHERED_MAX, LIFETIME},
    },
};

const MILLI: Duration = Duration::from_millis(1);

/// A session over 50 Mbit/s, 40 ms there and back.
fn far_apart(seed: u64) -> (Pair, End, End) {
    let mut p = Pair::new(seed, Kind::Public, Kind::Public);
    p.world.delay = 20 * MILLI;
    p.world.jitter = 0.0;
    p.world.line = Some(Line::new(50 * MBIT, SEC / 5, 1500));
    let (near, far) = session(&mut p.world, Protocol::Udp);
    p.world.run(5 * SEC, |_| false);
    (p, near, far)
}

fn count(world: &World, host: usize, of: fn(&TunnelCounters) -> &Cell<u64>) -> u64 {
    of(&world.hosts[host].count).get()
}

/// Sends two, the first of which loses packets; gives how long after its beginning each is there.
fn two(p: &mut Pair, sends: impl Fn(&mut World, u16), mut take: impl FnMut(&mut World) -> Vec<u16>) -> [Duration; 2] {
    let mut there = [Duration::ZERO; 2];
    let begin = p.world.now;
    p.world.loss = 1.0;
    sends(&mut p.world, 0);
    p.world.run(MILLI, |_| false);
    p.world.loss = 0.0;
    p.world.run(30 * MILLI, |_| false);
    let second = p.world.now;
    sends(&mut p.world, 1);
    p.world.run(3 * SEC, |w| {
        for number in take(w) {
            there[usize::from(number)] = w.now - if number == 0 { begin } else { second };
        }
        false
    });
    there
}

#[test]
fn one_that_lost_a_packet_does_not_delay_the_next() {
    for seed in seeds(4) {
        let (mut p, near, far) = far_apart(seed);
        // So that it is not the first ever that is measured.
        (10..20).for_each(|n| {
            assert!(send(&mut p.world, near, n, LONG));
            p.world.run(SEC / 5, |_| false);
        });
        assert_eq!(receive(&mut p.world, far).len(), 10, "seed {seed}");
        let each = two(&mut p, |w, n| assert!(send(w, near, n, LONG)), |w| receive(w, far));
        // 10 ms on the line, and 20 of the way.
        assert!(each[1] >= 30 * MILLI && each[1] <= 45 * MILLI, "seed {seed}: {each:?}");
        assert!(each[0] >= 85 * MILLI && each[0] <= 150 * MILLI, "seed {seed}: sent again {each:?}");
        // In one stream the second waits for the first: that is what this is for.
        let (bytes, mut read, mut buf) = (payload(LONG), 0, vec![0; LONG]);
        let write = |w: &mut World, _| {
            w.touch(near.host);
            let mut at = 0;
            while at < LONG {
                let Progress::Bytes(n) = w.hosts[near.host].node.write(near.key, &bytes[at..]) else { panic!() };
                at += n;
            }
        };
        let inside = two(&mut p, write, |w| {
            let before = read / LONG;
            while let Progress::Bytes(n) = w.hosts[far.host].node.read(far.key, &mut buf) {
                read += n;
            }
            (before..read / LONG).map(|n| n as u16).collect()
        });
        assert!(inside[1] > each[1] + 15 * MILLI, "seed {seed}: {inside:?} in one stream, else {each:?}");
    }
}

#[test]
fn loss_delays_those_that_it_hits_and_loses_none() {
    for seed in seeds(3) {
        for (loss, half, within) in [(0.01, 25, 45 * MILLI), (0.05, 30, 100 * MILLI)] {
            let (mut p, near, far) = far_apart(seed);
            p.world.loss = loss;
            let (mut began, mut took, mut order, mut small) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            // One large and two small: 10 Mbit/s.
            for number in 0..180 {
                let len = if number % 3 == 0 { LONG } else { 60 };
                assert!(send(&mut p.world, near, number, len));
                began.push(p.world.now);
                p.world.run(if number < 179 { 17 * MILLI } else { 2 * SEC }, |w| {
                    for number in receive(w, far) {
                        let after = w.now - began[usize::from(number)];
                        if number % 3 == 0 {
                            took.push(after);
                            order.push(number);
                        } else {
                            small.push(after);
                        }
                    }
                    false
                });
            }
            assert_eq!(took.len(), 60, "seed {seed}, {loss}: all are whole");
            assert!(!order.is_sorted(), "seed {seed}, {loss}: some went past others");
            took.sort_unstable();
            assert!(took[half] <= within, "seed {seed}, {loss}: {took:?}");
            // Those that were lost are lost; the others do not wait, two round trips there and back at most.
            small.sort_unstable();
            let most = small[small.len() * 99 / 100 - 1];
            assert!(small.len() >= 100 && most <= 60 * MILLI, "seed {seed}, {loss}: {} small, {most:?}", small.len());
        }
    }
}

#[test]
fn any_length_comes_whole_both_ways_through_loss_and_doubles() {
    for seed in seeds(3) {
        let mut p = Pair::new(seed, Kind::PortRestricted, Kind::SymmetricRandom);
        (p.world.loss, p.world.duplicate) = (0.03, 0.1);
        let (near, far) = session(&mut p.world, Protocol::Udp);
        let mut rng = fastrand::Rng::with_seed(seed);
        let lens: Vec<usize> =
            [65_507, 1500, 65_507].into_iter().chain((0..60).map(|_| rng.usize(1500..20_000))).collect();
        for (from, to) in [(near, far), (far, near)] {
            let mut got = Vec::new();
            for (number, len) in lens.iter().enumerate() {
                assert!(send(&mut p.world, from, number as u16, *len), "seed {seed}: {number}");
                p.world.run(SEC / 20, |_| false);
                got.extend(receive(&mut p.world, to));
            }
            p.world.run(LIFETIME, |_| false);
            got.extend(receive(&mut p.world, to));
            got.sort_unstable();
            assert_eq!(got, (0..lens.len() as u16).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}

#[test]
fn many_short_ones_get_more_streams() {
    let (mut p, near, far) = far_apart(1);
    let mut got = 0;
    // 1,000 a second of 1,500 bytes: 40 in a round trip.
    for number in 0..3000 {
        assert!(send(&mut p.world, near, number, 1500));
        p.world.run(MILLI, |_| false);
        got += receive(&mut p.world, far).len();
    }
    p.world.run(SEC, |w| {
        got += receive(w, far).len();
        false
    });
    let counts = [near, far].map(|end| {
        [
            count(&p.world, end.host, |c| &c.udp_full),
            count(&p.world, end.host, |c| &c.udp_late),
            count(&p.world, end.host, |c| &c.udp_strays),
        ]
    });
    assert_eq!((got, counts), (3000, [[0; 3]; 2]));
}

#[test]
fn too_many_are_dropped_and_the_next_are_not() {
    let (mut p, near, far) = far_apart(2);
    for round in 1..4 {
        let sent = (0..1000).filter(|n| send(&mut p.world, near, *n, LONG)).count();
        let full = count(&p.world, near.host, |c| &c.udp_full);
        assert!((GATHERED_MAX / LONG..20).contains(&sent) && full == round * (1000 - sent as u64), "{sent}, {full}");
        let mut got = 0;
        p.world.run(3 * SEC, |w| {
            got += receive(w, far).len();
            false
        });
        assert_eq!(got, sent, "all for which there was room come whole");
    }
    let at_far = |of| count(&p.world, far.host, of);
    assert_eq!([at_far(|c| &c.udp_full), at_far(|c| &c.udp_late), at_far(|c| &c.udp_strays)], [0; 3]);
}

#[test]
fn those_that_take_too_long_are_given_up_and_later_ones_are_not_kept_up() {
    for seed in seeds(3) {
        let (mut p, near, far) = far_apart(seed);
        assert!((0..6).all(|n| send(&mut p.world, near, n, LONG)));
        // Some packets are there, of one or two.
        p.world.run(32 * MILLI, |_| false);
        p.world.hosts[1].cut = true;
        p.world.run(LIFETIME + SEC, |_| false);
        p.world.hosts[1].cut = false;
        let late = |p: &Pair| [near, far].map(|end| count(&p.world, end.host, |c| &c.udp_late));
        let [near_late, far_late] = late(&p);
        assert!(near_late >= 4 && far_late >= 1, "seed {seed}: {near_late}, {far_late}");
        let came = receive(&mut p.world, far);
        assert!(came.len() <= 2, "seed {seed}: {came:?}");
        p.world.run(5 * SEC, |_| false);
        assert_eq!(receive(&mut p.world, far), [], "seed {seed}: what is so old is not wanted");
        // What was held is free again.
        assert!((10..20).all(|n| send(&mut p.world, near, n, 50_000)), "seed {seed}");
        p.world.run(4 * SEC, |_| false);
        assert_eq!(receive(&mut p.world, far).len(), 10, "seed {seed}");
        assert_eq!(late(&p), [near_late, far_late], "seed {seed}");
    }
}

#[test]
fn before_the_answer_the_stream_itself_must_carry_it() {
    let mut p = Pair::new(1, Kind::Public, Kind::Public);
    let near = p.world.open(1, "b");
    for len in [60, LONG] {
        let now = p.world.now;
        let became = p.world.hosts[1].node.send_datagram(now, near.key, &payload(len));
        assert_eq!(became, Beside::InStream, "{len}");
    }
    assert_eq!(count(&p.world, 1, |c| &c.udp_streams), 0);
}

#[test]
fn of_a_session_that_is_over_nothing_is_kept_and_the_others_go_on() {
    let (mut p, near, far) = far_apart(3);
    let (other, beside) = session(&mut p.world, Protocol::Udp);
    assert!(send(&mut p.world, near, 0, LONG));
    let now = p.world.now;
    p.world.hosts[far.host].node.drop_stream(now, far.key);
    for number in 1..5 {
        send(&mut p.world, near, number, LONG);
        assert!(send(&mut p.world, other, number, LONG));
    }
    p.world.run(2 * SEC, |_| false);
    assert_eq!(receive(&mut p.world, beside).len(), 4);
    assert!(count(&p.world, far.host, |c| &c.udp_strays) >= 1);
    assert_eq!(count(&p.world, far.host, |c| &c.udp_late), 0);
}

#[test]
fn more_than_the_line_carries_leaves_connections_their_share() {
    for (seed, len) in seeds(2).flat_map(|seed| [(seed, LONG), (seed, 4000)]) {
        let mut p = Pair::new(seed, Kind::Public, Kind::Public);
        p.world.delay = 20 * MILLI;
        p.world.line = Some(Line::new(20 * MBIT, SEC / 10, 1500));
        let (near, far) = session(&mut p.world, Protocol::Udp);
        let (tcp, tcp_far) = session(&mut p.world, Protocol::Tcp);
        p.world.run(5 * SEC, |_| false);
        p.world.hosts[tcp.host].woken.extend([tcp.key]);
        let (bytes, mut buf) = (payload(LONG), vec![0; LONG]);
        let (mut got, mut whole, mut due) = (0, 0, p.world.now);
        p.world.run(6 * SEC, |w| {
            // 40 Mbit/s.
            while due <= w.now {
                send(w, near, 0, len);
                due += Duration::from_secs_f64(len as f64 / (40 * MBIT) as f64);
            }
            if w.hosts[tcp.host].woken.remove(&tcp.key) {
                while let Progress::Bytes(_) = w.hosts[tcp.host].node.write(tcp.key, &bytes) {}
                w.touch(tcp.host);
            }
            while let Progress::Bytes(n) = w.hosts[tcp_far.host].node.read(tcp_far.key, &mut buf) {
                got += n;
            }
            whole += receive(w, far).len();
            false
        });
        let mbit = [got, whole * len].map(|bytes| bytes as f64 / 6.0 / MBIT as f64);
        // Streams take turns: there is one of TCP beside some 50 of 4,000 bytes, which have 18 to share.
        assert!(mbit[0] >= 0.2 && mbit[1] >= 9.0, "seed {seed}, {len}: TCP and UDP have {mbit:?} Mbit/s");
    }
}
