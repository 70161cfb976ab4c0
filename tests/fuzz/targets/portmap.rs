//! A gateway that answers anything: no panic, no rush of requests, and no port but one that its answer says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::LazyLock,
    time::{Duration, Instant},
};
use weft::tunnel::{
    portmap::{Output, PORT, Portmap},
    survey::Gateway,
};

/// An instant cannot be made from nothing.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

fuzz_target!(|input: &[u8]| {
    let mut now = *START;
    let mut core = Portmap::new(7843, fastrand::Rng::with_seed(1));
    core.set_gateway(now, Some(Gateway { address: GATEWAY, local: Ipv4Addr::new(192, 168, 1, 2) }));
    let (mut buf, mut asked) = (Vec::new(), Vec::new());
    // length, bytes; length, bytes; …
    let mut rest = input;
    while let Some((length, tail)) = rest.split_first() {
        let (answer, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        for turn in 0.. {
            assert!(turn < 10, "it does not come to rest");
            match core.poll_output(now, &mut buf) {
                Output::Send(to) => {
                    assert_eq!(to, GATEWAY);
                    asked.clone_from(&buf);
                }
                Output::Mapped(Some(at)) => {
                    let IpAddr::V4(ip) = at.ip() else { panic!("{at}") };
                    assert!(at.port() > 0 && !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast());
                }
                Output::Mapped(None) => {}
                Output::Wait(at) => {
                    now = at.map_or(now, |at| at.max(now)).min(now + Duration::from_secs(1));
                    break;
                }
            }
        }
        // The nonce, protocol and port of an answer to PCP's question are the question's: nobody guesses them.
        let mut answer = answer.to_vec();
        if let (Some(place), Some(same)) = (answer.get_mut(24..42), asked.get(24..42)) {
            place.copy_from_slice(same);
        }
        core.handle_datagram(now, SocketAddr::new(GATEWAY.into(), PORT), &answer);
    }
    let _ = core.bye();
});
