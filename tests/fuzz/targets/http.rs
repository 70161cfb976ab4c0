//! Answers of an API server: any cut gives the same table, and the watcher always comes to rest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::time::{Duration, Instant};
use weft::{
    kube::{
        resource::Resource,
        watcher::{Input, Output, Setup, Watcher},
    },
    table::Table,
};

/// Answers every request with the same bytes, and closes: what is in the table after some of them.
fn follow(text: &[u8], step: usize, metaserver: bool) -> String {
    let (mut now, mut table) = (Instant::now(), Table::default());
    let resource = if metaserver { Resource::Services } else { Resource::Slices };
    let rng = fastrand::Rng::with_seed(1);
    let spread = Duration::from_secs(1);
    let mut watcher =
        Watcher::new(Setup { resource, namespace: None, metaserver, pod_names: true, start: now, spread, rng });
    let mut asked = 0;
    let mut turns = 0;
    while asked < 6 {
        turns += 1;
        assert!(turns < 1_000, "it never comes to rest");
        let input = match watcher.poll_output() {
            Output::Connect => Input::Connected,
            Output::Hangup => continue,
            Output::Wait(at) => {
                now = now.max(at);
                Input::Tick
            }
            Output::Get(target) => {
                assert!(target.starts_with('/') && target.bytes().all(|b| b.is_ascii_graphic()), "{target}");
                asked += 1;
                for piece in text.chunks(step) {
                    watcher.handle_input(now, Input::Bytes(piece), &mut table);
                    if !watcher.is_reading() {
                        break;
                    }
                }
                Input::Closed
            }
        };
        watcher.handle_input(now, input, &mut table);
    }
    let mut ids = Vec::new();
    table.each(weft::table::model::Source::Api, &resource.scope(None), &mut |id| ids.push(id));
    format!("{:?} {ids:?}", table.services().collect::<Vec<_>>())
}

fuzz_target!(|input: &[u8]| {
    let Some((first, text)) = input.split_first() else { return };
    let metaserver = first & 1 == 1;
    let whole = follow(text, usize::MAX, metaserver);
    assert_eq!(follow(text, 1 + usize::from(*first) / 16, metaserver), whole);
});
