use super::*;

const INSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const SEC: Duration = Duration::from_secs(1);

/// What the gateway speaks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Speaks {
    Pcp,
    /// And answers PCP with "unknown version", as RFC 6886 section 9.3 asks, or with nothing.
    NatPmp {
        polite: bool,
    },
    Nothing,
    Refusal,
}

struct World {
    core: Portmap,
    now: Instant,
    start: Instant,
    speaks: Speaks,
    port: u16,
    /// When the gateway was started.
    booted: Instant,
    /// Requests, with the time since the start.
    asked: Vec<(Duration, Vec<u8>)>,
    mapped: Vec<Option<SocketAddr>>,
}

fn external(port: u16) -> Option<SocketAddr> {
    Some(SocketAddr::new([11, 0, 0, 9].into(), port))
}

impl World {
    fn new(seed: u64, speaks: Speaks) -> Self {
        let now = Instant::now();
        let mut core = Portmap::new(7843, fastrand::Rng::with_seed(seed));
        core.set_gateway(now, Some(Gateway { address: GATEWAY, local: INSIDE }));
        Self { core, now, start: now, speaks, port: 40_000, booted: now, asked: Vec::new(), mapped: Vec::new() }
    }

    fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let epoch = (self.now - self.booted).as_secs() as u32 + 5;
        let mut out = Vec::new();
        match (self.speaks, request[0]) {
            (Speaks::Nothing, _) | (Speaks::NatPmp { polite: false }, 2) => return None,
            (Speaks::NatPmp { polite: true }, 2) => return Some(vec![0, 129, 0, 1, 0, 0, 0, 5]),
            (Speaks::Pcp | Speaks::Refusal, 2) => {
                let code = if self.speaks == Speaks::Refusal { 2 } else { 0 };
                out.extend([2, 0x81, 0, code]);
                out.extend(&request[4..8]);
                out.extend(epoch.to_be_bytes());
                out.extend([0; 12]);
                out.extend(&request[24..42]);
                out.extend(self.port.to_be_bytes());
                out.extend(Ipv4Addr::new(11, 0, 0, 9).to_ipv6_mapped().octets());
            }
            (Speaks::Pcp | Speaks::Refusal, _) => return None,
            (Speaks::NatPmp { .. }, 0) if request[1] == 0 => {
                out.extend([0, 128, 0, 0]);
                out.extend(epoch.to_be_bytes());
                out.extend([11, 0, 0, 9]);
            }
            (Speaks::NatPmp { .. }, _) => {
                out.extend([0, 129, 0, 0]);
                out.extend(epoch.to_be_bytes());
                out.extend(&request[4..6]);
                out.extend(self.port.to_be_bytes());
                out.extend(&request[8..12]);
            }
        }
        Some(out)
    }

    /// Runs timers for so long.
    fn run(&mut self, most: Duration) {
        let until = self.now + most;
        let mut buf = Vec::new();
        loop {
            match self.core.poll_output(self.now, &mut buf) {
                Output::Send(to) => {
                    assert_eq!(to, GATEWAY);
                    self.asked.push((self.now - self.start, buf.clone()));
                    if let Some(answer) = self.answer(&buf) {
                        self.core.handle_datagram(self.now, SocketAddr::new(GATEWAY.into(), PORT), &answer);
                    }
                }
                Output::Mapped(at) => self.mapped.push(at),
                Output::Wait(Some(at)) if at <= until => self.now = self.now.max(at),
                Output::Wait(_) => break,
            }
        }
        self.now = until;
    }
}

#[test]
fn a_gateway_that_speaks_either_gives_a_port_and_is_asked_again_at_half_of_its_lifetime() {
    for seed in 0..20 {
        for speaks in [Speaks::Pcp, Speaks::NatPmp { polite: true }, Speaks::NatPmp { polite: false }] {
            let mut w = World::new(seed, speaks);
            w.run(30 * SEC);
            assert_eq!(w.mapped, [external(40_000)], "{speaks:?}");
            let first = w.asked.len();
            w.run(4 * 3600 * SEC);
            let renewals = &w.asked[first..];
            assert!(!renewals.is_empty() && w.mapped.len() == 1, "{speaks:?} {:?}", w.mapped);
            let half = 3600 * SEC / 2;
            let again = renewals[0].0;
            assert!(again > half.mul_f64(0.8) && again < half + 30 * SEC, "seed {seed} {speaks:?}: {again:?}");
            if speaks == Speaks::Pcp {
                assert!(w.asked.iter().all(|(_, r)| r[24..36] == w.asked[0].1[24..36]), "one nonce for one mapping");
                assert_eq!(renewals[0].1[42..44], 40_000_u16.to_be_bytes(), "the same port, please");
            }
        }
    }
}

#[test]
fn who_does_not_answer_or_refuses_is_left_alone_for_longer_and_longer() {
    for speaks in [Speaks::Nothing, Speaks::Refusal] {
        let mut w = World::new(1, speaks);
        w.run(24 * 3600 * SEC);
        assert_eq!(w.mapped, []);
        let mut rests: Vec<u64> =
            w.asked.windows(2).map(|p| (p[1].0 - p[0].0).as_secs()).filter(|gap| *gap > 100).collect();
        assert!(rests.is_sorted() && rests[0] >= 300, "{speaks:?} {rests:?}");
        assert!(rests.pop().unwrap() > 3 * 3600, "{rests:?}");
        assert!(w.asked.len() < 90, "{speaks:?}: {} requests in a day", w.asked.len());
    }
}

#[test]
fn a_port_that_is_not_renewed_is_told_to_be_gone_and_another_one_to_be_new() {
    let mut w = World::new(1, Speaks::Pcp);
    w.run(SEC);
    w.port = 50_000;
    w.run(1900 * SEC);
    assert_eq!(w.mapped, [external(40_000), external(50_000)]);
    w.speaks = Speaks::Nothing;
    w.run(3601 * SEC);
    assert_eq!(w.mapped[2..], [None]);
    w.speaks = Speaks::Pcp;
    w.run(4 * 3600 * SEC);
    assert_eq!(w.mapped[3..], [external(50_000)]);
}

#[test]
fn a_restarted_gateway_of_natpmp_is_asked_for_its_address_again() {
    let mut w = World::new(1, Speaks::NatPmp { polite: true });
    w.run(1000 * SEC);
    let before = w.asked.len();
    w.booted = w.now;
    w.run(1000 * SEC);
    let kinds: Vec<u8> = w.asked[before..].iter().map(|(_, r)| r[1]).collect();
    assert_eq!(kinds, [0, 1, 0, 1], "renewed, found restarted, then once more");
}

#[test]
fn epochs_of_rfc_6887_section_8_5() {
    let now = Instant::now();
    let epoch = Epoch { server: 1000, client: now };
    for (passed, server, goes_on) in [
        (100, 1100, true),
        (100, 1094, true),
        (100, 1080, false),
        (100, 1120, false),
        (0, 999, true),
        (0, 998, false),
        (5000, 3, false),
        (100, u32::MAX, false),
    ] {
        assert_eq!(epoch.goes_on(now + passed * SEC, server), goes_on, "{passed} s, {server}");
    }
}

#[test]
fn only_the_gateways_answer_from_its_port_counts() {
    let mut w = World::new(1, Speaks::Nothing);
    w.run(SEC);
    w.speaks = Speaks::Pcp;
    let answer = w.answer(&w.asked[0].1).unwrap();
    for from in ["192.168.1.3:5351", "192.168.1.1:5352", "[::1]:5351"] {
        w.core.handle_datagram(w.now, from.parse().unwrap(), &answer);
    }
    let mut forged = answer.clone();
    forged[30] ^= 1;
    w.core.handle_datagram(w.now, SocketAddr::new(GATEWAY.into(), PORT), &forged);
    assert!(w.core.held.is_none());
    w.core.handle_datagram(w.now, "[::ffff:192.168.1.1]:5351".parse().unwrap(), &answer);
    assert!(w.core.held.is_some());
}

#[test]
fn nobodys_addresses_are_no_mapping() {
    for (ip, port) in [([0, 0, 0, 0], 5), ([127, 0, 0, 1], 5), ([224, 0, 0, 1], 5), ([11, 0, 0, 9], 0)] {
        let mut w = World::new(1, Speaks::Nothing);
        w.core.hold(w.now, ip.into(), port, 3600, 1);
        assert!(w.core.held.is_none() && w.core.step == Step::Rest);
    }
}

#[test]
fn at_the_end_the_mapping_is_deleted() {
    for (speaks, want) in [(Speaks::Pcp, 2), (Speaks::NatPmp { polite: true }, 0)] {
        let mut w = World::new(1, speaks);
        w.run(SEC);
        let (to, bytes) = w.core.bye().unwrap();
        assert_eq!((to, bytes[0]), (GATEWAY, want));
        let lifetime = if want == 2 { &bytes[4..8] } else { &bytes[8..12] };
        assert_eq!(lifetime, [0; 4]);
        assert!(want == 0 || bytes[24..36] == w.asked[0].1[24..36]);
        assert!(w.core.bye().is_none());
    }
    assert!(World::new(1, Speaks::Nothing).core.bye().is_none());
}

#[test]
fn a_public_address_asks_nobody_and_another_gateway_is_asked_at_once() {
    let mut w = World::new(1, Speaks::Pcp);
    w.run(SEC);
    let public = Gateway { address: [11, 0, 0, 1].into(), local: [11, 0, 0, 2].into() };
    w.core.set_gateway(w.now, Some(public));
    w.run(3600 * SEC);
    assert_eq!((w.asked.len(), w.mapped.last()), (1, Some(&None)));
    w.core.set_gateway(w.now, Some(Gateway { address: GATEWAY, local: INSIDE }));
    w.run(SEC);
    assert_eq!(w.mapped.last(), Some(&external(40_000)));
    for (ip, nat) in
        [([100, 64, 0, 1], true), ([100, 128, 0, 1], false), ([172, 16, 0, 1], true), ([11, 0, 0, 1], false)]
    {
        assert_eq!(behind_nat(ip.into()), nat, "{ip:?}");
    }
}

#[test]
fn whatever_comes_instead_of_an_answer_is_no_panic_and_no_mapping() {
    for seed in 0..2000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut w = World::new(seed, Speaks::Nothing);
        for _ in 0..20 {
            let mut bytes = vec![0; rng.usize(..80)];
            rng.fill(&mut bytes);
            if let Some(first) = bytes.first_mut() {
                *first = [0, 2][rng.usize(..2)];
            }
            w.core.handle_datagram(w.now, SocketAddr::new(GATEWAY.into(), PORT), &bytes);
            w.run(SEC * rng.u32(..10));
        }
        assert_eq!(w.mapped, [], "seed {seed}");
    }
}
