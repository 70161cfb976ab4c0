//! Manifests: any cut into pieces gives the same objects, and the table takes whatever is read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft::{
    kube::{
        files::{Check, Reading, Sink},
        item::Read,
    },
    table::{
        Table,
        model::{Change, Name, Source},
    },
};

#[derive(Default)]
struct Into {
    table: Table,
    read: Vec<Read>,
}

impl Sink for Into {
    fn intern(&mut self, name: &str) -> Name {
        self.table.intern(name)
    }

    fn take(&mut self, read: Read) {
        if let Read::Objects(objects, _) = &read {
            for object in objects.clone() {
                self.table.apply(Change::Apply(Source::Manifests, object));
            }
        }
        self.read.push(read);
    }
}

fn read(mut text: &[u8], step: usize) -> (Vec<Read>, Option<u64>) {
    let (mut reading, mut sink) = (Reading::default(), Into::default());
    while !text.is_empty() {
        let (piece, rest) = text.split_at(step.min(text.len()));
        if reading.feed(piece, &mut sink).is_err() {
            return (sink.read, None);
        }
        text = rest;
    }
    let hash = reading.finish().ok();
    (sink.read, hash)
}

fuzz_target!(|input: &[u8]| {
    let Some((step, text)) = input.split_first() else { return };
    let whole = read(text, usize::MAX);
    assert_eq!(read(text, 1 + usize::from(*step) % 16), whole);
    let mut check = Check::default();
    if check.feed(text).is_ok()
        && let Ok(hash) = check.finish()
    {
        assert_eq!(whole.1, Some(hash), "what the check lets through is read to the end");
    }
});
