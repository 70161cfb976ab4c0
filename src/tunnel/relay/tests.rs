//! A relay and the channels of its nodes, without a network.

use super::{super::frame::TagKey, members::MEMBERS_MAX, *};
use crate::tunnel::{
    control::{Entry, RelayAt},
    identity::{Authority, Request, Secret},
};

struct Bench {
    relay: Relay,
    out: Outbox,
    count: TunnelCounters,
    now: Instant,
    authority: Authority,
}

fn at(n: u32) -> SocketAddr {
    let [_, a, b, c] = n.to_be_bytes();
    ([10, a, b, c], 7843).into()
}

fn name(n: u32) -> String {
    format!("node-{n}")
}

impl Bench {
    fn new(limits: RelayLimits) -> Self {
        let now = Instant::now();
        let relay = Relay::new(&Key([1; 32]), limits, now, fastrand::Rng::with_seed(1));
        let authority = Authority::from_seed(Secret::new([1; 32])).unwrap();
        Self { relay, out: Outbox::default(), count: TunnelCounters::default(), now, authority }
    }

    fn certificate(&self, name: &str, roles: Roles) -> Certificate {
        let request = Request { name: name.into(), key: [7; 32], roles, network: String::new(), not_after: 9 };
        self.authority.issue(request).unwrap()
    }

    /// None where it is not let in.
    fn register(&mut self, n: u32, turn: u8) -> Option<Channel> {
        let mut secret = Key([turn; 32]);
        secret.0[..4].copy_from_slice(&n.to_be_bytes());
        let certificate = self.certificate(&name(n), Roles::NONE);
        let taken = self.relay.register(self.now, certificate, &secret, at(n), &self.count);
        taken.then(|| Channel::new(&secret, false, 0))
    }

    fn say(&mut self, n: u32, channel: &mut Channel, message: &Control) {
        let frame = channel.seal(message);
        self.relay.handle_control(self.now, at(n), &frame, &mut self.out, &self.count);
    }

    /// All that goes to this node, opened.
    fn told(&mut self, n: u32, channel: &mut Channel) -> Vec<Control> {
        let (mut buf, mut told) = (Vec::new(), Vec::new());
        while let Some((to, _)) = self.out.pop(&mut buf) {
            if to.remote == at(n) {
                channel.cookie = parse_header(&buf).unwrap().cookie;
                told.extend(channel.open(&buf));
            }
        }
        told
    }

    fn flow(&mut self, from: u32, channel: &mut Channel, to: u32) -> u32 {
        self.say(from, channel, &Control::Open { request: 1, name: name(to) });
        match &self.told(from, channel)[..] {
            [Control::Opened { flow, .. }] => *flow,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a datagram; whether it left for somebody, and whom.
    fn data(&mut self, from: u32, tag: &TagKey, flow: u32, len: usize) -> Option<SocketAddr> {
        let mut frame = Vec::new();
        tag.frame(flow, &vec![5; len], &mut frame);
        let size = frame.len();
        self.relay.handle_data(self.now, at(from), &mut frame, size, &mut self.out, &self.count);
        let mut buf = Vec::new();
        let (to, _) = self.out.pop(&mut buf)?;
        (buf[0] == frame[0]).then_some(to.remote)
    }
}

#[test]
fn a_flow_outlives_registrations_and_ends_with_a_node() {
    let mut b = Bench::new(RelayLimits::default());
    let mut one = b.register(1, 1).unwrap();
    b.register(2, 1).unwrap();
    let flow = b.flow(1, &mut one, 2);
    assert_eq!(b.data(1, &one.tag_out, flow, 100), Some(at(2)));
    let mut two = b.register(2, 2).unwrap();
    assert_eq!(b.data(1, &one.tag_out, flow, 100), Some(at(2)));
    assert_eq!(b.data(2, &two.tag_out, flow, 100), Some(at(1)));
    assert_eq!(b.data(2, &one.tag_in, flow, 100), None, "another's tag");
    b.say(2, &mut two, &Control::Bye);
    for _ in 0..3 {
        assert_eq!(b.data(1, &one.tag_out, flow, 100), None);
    }
    let mut frame = Vec::new();
    one.tag_out.frame(flow, &[5; 100], &mut frame);
    b.relay.handle_data(b.now, at(1), &mut frame, 113, &mut b.out, &b.count);
    assert_eq!(b.told(1, &mut one), [Control::Gone { flow }], "each time, since the word may be lost");
    assert_eq!(b.count.relay_unknown_flows.get(), 4);
}

#[test]
fn strangers_and_forgers_get_nothing_and_old_friends_a_word() {
    let mut b = Bench::new(RelayLimits::default());
    let mut one = b.register(1, 1).unwrap();
    b.say(1, &mut one, &Control::Ping { nonce: 1 });
    assert!(matches!(b.told(1, &mut one)[..], [Control::Pong { .. }]));
    let ping = one.seal(&Control::Ping { nonce: 2 });
    let mut forged = ping.clone();
    forged[12] ^= 1; // the cookie
    // Restarted.
    b.relay = Relay::new(&Key([1; 32]), RelayLimits::default(), b.now, fastrand::Rng::with_seed(2));
    for (frame, answered) in
        [(&forged, false), (&ping[..26].to_vec(), true), (&ping[..25].to_vec(), false), (&ping, true)]
    {
        b.relay.handle_control(b.now, at(1), frame, &mut b.out, &b.count);
        let mut buf = Vec::new();
        let answer = b.out.pop(&mut buf);
        assert_eq!(answer.is_some(), answered, "{}", frame.len());
        assert!(buf.len() < frame.len() || !answered, "more than was sent");
    }
    let mut data = Vec::new();
    one.tag_out.frame(7, &[5; 100], &mut data);
    b.relay.handle_data(b.now, at(1), &mut data, 113, &mut b.out, &b.count);
    assert!(b.out.pop(&mut Vec::new()).is_none(), "a flow of before: who sends is not known any more");
}

#[test]
fn a_node_that_is_only_listed_is_found_elsewhere() {
    let mut b = Bench::new(RelayLimits::default());
    let (mut one, mut two) = (b.register(1, 1).unwrap(), b.register(2, 1).unwrap());
    let relays = vec![RelayAt { address: at(9), certificate: b.certificate("relay-9", Roles::RELAY) }];
    let entry = Entry { serial: 5, relays };
    b.say(2, &mut two, &Control::Enter { rank: Rank::Listed, entry: Box::new(entry.clone()) });
    b.say(1, &mut one, &Control::Open { request: 3, name: name(2) });
    let told = b.told(1, &mut one);
    assert!(matches!(&told[..], [Control::Elsewhere { request: 3, entry: e, .. }] if **e == entry), "{told:?}");
    b.say(2, &mut two, &Control::Enter { rank: Rank::First, entry: Box::new(Entry { serial: 6, ..entry }) });
    assert_eq!(b.relay.load(&b.count).firsts, 1);
    b.flow(1, &mut one, 2);
    b.say(2, &mut two, &Control::Ping { nonce: 1 });
    assert!(matches!(b.told(2, &mut two).last(), Some(Control::Pong { serial: 6, load: 1, .. })));
    b.now += Duration::from_secs(91);
    b.relay.handle_timeout(b.now);
    assert_eq!((b.relay.load(&b.count).nodes, b.relay.load(&b.count).firsts), (0, 0));
}

#[test]
fn only_a_relay_is_known_as_one() {
    let mut b = Bench::new(RelayLimits::default());
    let mut one = b.register(1, 1).unwrap();
    let certificate = b.certificate("relay-2", Roles::RELAY);
    assert!(b.relay.register(b.now, certificate.clone(), &Key([8; 32]), at(8), &b.count));
    for who in ["relay-2", "node-1", "nobody"] {
        b.say(1, &mut one, &Control::Which { name: who.into() });
    }
    assert_eq!(b.told(1, &mut one), [Control::Known { certificate: Box::new(certificate) }]);
}

#[test]
fn a_node_is_held_to_its_rates() {
    let rate = Rate { each_second: 100_000, burst: 50_000 };
    let mut b = Bench::new(RelayLimits { all: None, node: Some(rate) });
    let (mut one, two) = (b.register(1, 1).unwrap(), b.register(2, 1).unwrap());
    let flow = b.flow(1, &mut one, 2);
    let mut passed = 0;
    for _ in 0..200 {
        passed += usize::from(b.data(1, &one.tag_out, flow, 1187).is_some());
        b.now += Duration::from_millis(5);
    }
    assert!((120..=128).contains(&passed), "{passed}: 50 kB and a second of 100 kB");
    assert!(b.data(2, &two.tag_out, flow, 1187).is_some(), "the other has its own");
    assert_eq!(b.count.relay_over_rate.get(), 200 - passed as u64);

    let registered = (0..40).filter(|turn| b.register(3, *turn).is_some()).count();
    assert_eq!(registered, 8);
    b.now += Duration::from_secs(4);
    assert!(b.register(3, 50).is_some() && b.register(4, 1).is_some());
    let opened = (0..2000).filter(|_| {
        b.say(1, &mut one, &Control::Open { request: 1, name: name(2) });
        !b.told(1, &mut one).is_empty()
    });
    assert!((1024..=1200).contains(&opened.count()));
}

#[test]
fn the_longest_silent_node_goes_when_there_are_too_many() {
    let mut b = Bench::new(RelayLimits::default());
    let mut one = b.register(1, 1).unwrap();
    b.register(2, 1).unwrap();
    for n in 3..=MEMBERS_MAX.get() as u32 {
        b.register(n, 1).unwrap();
    }
    b.say(1, &mut one, &Control::Ping { nonce: 1 });
    b.register(9999, 1).unwrap();
    assert_eq!(b.relay.load(&b.count).nodes, MEMBERS_MAX.get());
    b.say(1, &mut one, &Control::Open { request: 1, name: name(2) });
    assert_eq!(b.told(1, &mut one).last(), Some(&Control::NotFound { request: 1 }));
    b.flow(1, &mut one, 3);
}

#[test]
fn what_is_more_than_the_relay_sends_waits_and_comes() {
    let rate = Rate { each_second: 100_000, burst: 10_000 };
    let mut b = Bench::new(RelayLimits { all: Some(rate), node: None });
    let (mut one, _two) = (b.register(1, 1).unwrap(), b.register(2, 1).unwrap());
    let flow = b.flow(1, &mut one, 2);
    let sent = (0..30).filter(|_| b.data(1, &one.tag_out, flow, 987).is_some()).count();
    assert_eq!((sent, b.relay.load(&b.count).queued), (10, 20_000));
    let mut buf = Vec::new();
    for _ in 0..300 {
        b.now = b.relay.queue.poll_timeout().map_or(b.now, |at| at.max(b.now));
        if let Some((to, _)) = b.relay.pop(b.now, &mut buf, &b.count) {
            assert_eq!(to, at(2));
        }
    }
    assert_eq!((b.relay.load(&b.count).queued, b.count.relay_drops.get()), (0, 0));
    assert_eq!(b.count.relayed_datagrams.get() + b.count.relay_late.get(), 30);
}
