//! Large datagrams, a stream each: whatever pieces a peer sends, what comes out is what went in, no more is held than may be,
//! and nothing of it for ever.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{
    cell::Cell,
    collections::BTreeMap,
    rc::Rc,
    sync::LazyLock,
    time::{Duration, Instant},
};
use weft::tunnel::gather::{DATAGRAM_MAX, GATHERED_ALL, GATHERED_MAX, Gather, HEAD, LIFETIME, Stray, session};

/// An instant cannot be made from nothing.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fuzz_target!(|input: &[u8]| {
    let (all, mut now) = (Rc::new(Cell::new(0)), *START);
    let mut gathers = [Gather::new(&all), Gather::new(&all), Gather::new(&all)];
    // What each should hold.
    let mut model: [BTreeMap<u64, (Instant, Vec<u8>)>; 3] = Default::default();
    let mut next = [0; 3];
    // what, stream, offset, length, bytes; …
    let mut rest = input;
    while let [what, stream, high, low, length, tail @ ..] = rest {
        let (piece, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let at = usize::from(what % 3);
        let (gather, held) = (&mut gathers[at], &mut model[at]);
        let stream = next[at] - u64::from(*stream).min(next[at]);
        match what >> 5 {
            0 | 1 => {
                gather.begin(now, next[at]);
                held.insert(next[at], (now, Vec::new()));
                next[at] += 1;
            }
            2..=4 => {
                let offset = usize::from(u16::from_be_bytes([*high, *low])) + usize::from(what & 4) * 100;
                let end = offset + piece.len();
                let (told, whole) = (gather.put(stream, offset as u64, piece), held.get_mut(&stream));
                match told {
                    Ok(told) => {
                        let whole = &mut whole.unwrap().1;
                        whole.resize(whole.len().max(end), 0);
                        whole[offset..end].copy_from_slice(piece);
                        assert_eq!(told, if offset == 0 && end >= HEAD { session(piece) } else { None });
                    }
                    Err(why) => {
                        let odd = offset == 0 && piece.len() >= HEAD && session(piece).is_none();
                        let wrong = whole.is_none() || end > HEAD + DATAGRAM_MAX || odd;
                        // Of what has no head it is not said first that there is no room.
                        assert!(wrong || why == Stray::Full, "{why:?}");
                        gather.forget(stream);
                        held.remove(&stream);
                    }
                }
            }
            5 => {
                let whole = held.remove(&stream).filter(|(_, bytes)| session(bytes).is_some());
                let expected = whole.map(|(_, bytes)| (session(&bytes).unwrap(), bytes[HEAD..].into()));
                assert_eq!(gather.end(stream), expected);
            }
            6 => {
                now += Duration::from_millis(u64::from(u16::from_be_bytes([*high, *low])));
                while let Some(stream) = gather.late(now) {
                    assert!(held.remove(&stream).unwrap().0 + LIFETIME <= now);
                }
            }
            _ => {
                let kept = held.remove(&stream).map(|(_, bytes)| bytes);
                assert_eq!(gather.forget(stream), kept);
            }
        }
        let bytes =
            |held: &BTreeMap<u64, (Instant, Vec<u8>)>| held.values().map(|(_, bytes)| bytes.len()).sum::<usize>();
        for (gather, held) in gathers.iter().zip(&model) {
            assert!(gather.held() == bytes(held) && gather.held() <= GATHERED_MAX);
            assert_eq!(gather.poll_timeout(), held.values().map(|(began, _)| *began + LIFETIME).next());
        }
        assert!(all.get() == model.iter().map(bytes).sum::<usize>() && all.get() <= GATHERED_ALL);
    }
    drop(gathers);
    assert_eq!(all.get(), 0);
});
