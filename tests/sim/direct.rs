//! Paths without the relay: found where the oracle says so, and only there.

use crate::{
    nat::Kind,
    pair::{Pair, SEC, connect, payload, seeds},
};

fn path(p: &Pair, host: usize, peer: &str) -> &'static str {
    p.world.hosts[host].node.peer_views(p.world.now).into_iter().find(|v| v.name == peer).map_or("none", |v| v.path)
}

#[test]
fn direct_if_and_only_if_the_oracle_says_so() {
    for seed in seeds(5) {
        for a in Kind::ALL {
            for b in Kind::ALL {
                let mut p = Pair::new(seed, a, b);
                let named = format!("seed {seed}: {a:?} and {b:?}");
                let (near, far) = connect(&mut p.world, 20 * SEC).unwrap_or_else(|e| panic!("{named}: {e}"));
                let both = |p: &Pair| path(p, 1, "b") == "direct" && path(p, 2, "a") == "direct";
                let start = p.world.now;
                while !both(&p) && p.world.now < start + 3 * SEC {
                    p.world.run(SEC / 20, |_| false);
                }
                assert_eq!(both(&p), a.direct_possible(b), "{named}");
                let bytes = payload(20_000);
                for (from, to) in [(near, far), (far, near)] {
                    let got = p.world.transfer(from, to, &bytes, 30 * SEC).unwrap_or_else(|e| panic!("{named}: {e}"));
                    assert!(got == bytes, "{named}");
                }
            }
        }
    }
}
