//! What we send to nf_tables, held against what nft sent for the same rules written by hand (fixtures/nft, `record`
//! makes the bytes). Headers of netlink are in the order of the host, so the bytes are of a little-endian one.
#![cfg(target_endian = "little")]

use std::{collections::BTreeMap, fs, net::IpAddr};
use weft::{
    proxy::{
        nft::{
            ruleset,
            ways::Way,
            wire::{Batch, Family},
        },
        rules::{Action, Catch, Desired, REFUSED, Rule},
    },
    table::model::Protocol,
};

/// NLA_F_NESTED.
const NESTED: u16 = 0x8000;
const APPEND: u16 = 0x800;
const NEWTABLE: u8 = 0;
const DELTABLE: u8 = 2;
const NEWRULE: u8 = 6;
const NEWSET: u8 = 9;
const NEWSETELEM: u8 = 12;

/// An attribute tree: nested ones in the order of their types, but lists as they are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Bytes(Vec<u8>),
    Nest(Vec<(u16, Self)>),
}

fn tree(mut bytes: &[u8]) -> Vec<(u16, Node)> {
    let mut out = Vec::new();
    while bytes.len() >= 4 {
        let len = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let kind = u16::from_le_bytes([bytes[2], bytes[3]]);
        let value = &bytes[4..len];
        let node = if kind & NESTED == 0 { Node::Bytes(value.to_vec()) } else { Node::Nest(tree(value)) };
        out.push((kind & !NESTED, node));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    // Attributes have no order; the elements of a list all have the same type, and keep theirs.
    out.sort_by_key(|(kind, _)| *kind);
    out
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Message {
    kind: u8,
    family: u8,
    append: bool,
    attrs: Vec<(u16, Node)>,
}

/// The messages of a batch, without what a set is called by inside it and what only nft reads again (its types' names).
fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let len = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
        let (kind, subsystem) = (bytes[4], bytes[5]);
        let flags = u16::from_le_bytes([bytes[6], bytes[7]]);
        if subsystem == 10 {
            let mut attrs = tree(&bytes[20..len]);
            match kind {
                // NFTA_SET_ID, NFTA_SET_USERDATA of a concatenation
                NEWSET => attrs.retain(|(kind, value)| match value {
                    Node::Bytes(bytes) => *kind != 10 && !(*kind == 13 && bytes.len() > 6),
                    Node::Nest(_) => true,
                }),
                // NFTA_SET_ELEM_LIST_SET_ID; a hash table has no order
                NEWSETELEM => {
                    attrs.retain(|(kind, _)| *kind != 4);
                    for (_, list) in attrs.iter_mut().filter(|(kind, _)| *kind == 3) {
                        let Node::Nest(elements) = list else { panic!("{list:?}") };
                        // NFTA_LIST_ELEM; nft counts them instead, and the kernel does not look.
                        elements.iter_mut().for_each(|(kind, _)| *kind = 1);
                        elements.sort();
                    }
                }
                // NFTA_TABLE_FLAGS, which are none
                NEWTABLE => attrs.retain(|(kind, _)| *kind != 2),
                _ => {}
            }
            let append = kind == NEWRULE && flags & APPEND != 0;
            out.push(Message { kind, family: bytes[16], append, attrs: attrs.into_iter().map(plain).collect() });
        }
        bytes = &bytes[len..];
    }
    out
}

/// nft names a set in a lookup by its id too, and sometimes says of a bitwise that it is the usual one.
fn plain((kind, node): (u16, Node)) -> (u16, Node) {
    let Node::Nest(mut inside) = node else { return (kind, node) };
    let is = |name: &str| matches!(inside.first(), Some((1, Node::Bytes(b))) if b == format!("{name}\0").as_bytes());
    let (lookup, bitwise) = (is("lookup"), is("bitwise"));
    if let Some((2, Node::Nest(data))) = inside.last_mut() {
        data.retain(|attr| {
            let implied = lookup && attr.0 == 4 || bitwise && *attr == (6, Node::Bytes(vec![0; 4]));
            !implied
        });
    }
    (kind, Node::Nest(inside.into_iter().map(plain).collect()))
}

/// What is made, in any order, and the rules of each chain in theirs.
type Made = (Vec<Message>, BTreeMap<(u8, String, String), Vec<Message>>);

fn made(messages: Vec<Message>) -> Made {
    let (mut things, mut rules) = (Vec::new(), BTreeMap::<_, Vec<_>>::new());
    for message in messages {
        if message.kind == NEWRULE {
            let text = |wanted| match message.attrs.iter().find(|(kind, _)| *kind == wanted) {
                Some((_, Node::Bytes(b))) => String::from_utf8(b.clone()).unwrap(),
                other => panic!("{other:?}"),
            };
            rules.entry((message.family, text(1), text(2))).or_default().push(message);
        } else if message.kind != DELTABLE {
            things.push(message);
        }
    }
    things.sort();
    things.dedup();
    (things, rules)
}

fn fixture(name: &str) -> Made {
    let path = format!("{}/tests/it/fixtures/nft/{name}.hex", env!("CARGO_MANIFEST_DIR"));
    let text: String = fs::read_to_string(path).unwrap().split_whitespace().collect();
    let bytes: Vec<u8> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect();
    made(messages(&bytes))
}

fn rule(address: &str, protocol: Protocol, port: u16, action: Action) -> Rule {
    Rule { address: address.parse().unwrap(), protocol, port, action }
}

type ByChain = Vec<(String, Vec<Message>)>;

/// What concerns our own table, and what is in those of others.
fn split((things, rules): Made) -> (Vec<Message>, ByChain, Vec<Message>) {
    let ours = |m: &Message| m.attrs[0] == (1, Node::Bytes(b"weft\0".to_vec()));
    let (own, foreign): (Vec<_>, Vec<_>) = rules.into_iter().partition(|((_, table, _), _)| table == "weft\0");
    let own = own.into_iter().map(|((_, _, chain), rules)| (chain, rules)).collect();
    (things.into_iter().filter(ours).collect(), own, foreign.into_iter().flat_map(|(_, rules)| rules).collect())
}

fn check(name: &str, desired: &Desired, ways: &[Way]) {
    let mut batch = Batch::default();
    ruleset::install(&mut batch, desired);
    for way in ways {
        ruleset::open_way(&mut batch, way, desired.address);
    }
    let (things, rules, mut foreign) = split(made(messages(&batch.done(7))));
    let (want_things, want_rules, mut want_foreign) = split(fixture(name));
    assert_eq!(things, want_things);
    assert_eq!(rules.len(), want_rules.len());
    for (got, want) in rules.into_iter().zip(want_rules) {
        assert_eq!(got.0, want.0);
        for (at, (got, want)) in got.1.iter().zip(&want.1).enumerate() {
            assert_eq!(got, want, "rule {at}");
        }
        assert_eq!(got.1.len(), want.1.len());
    }
    // In a fresh chain of the fixture there is no difference between head and end.
    foreign.iter_mut().chain(&mut want_foreign).for_each(|m| m.append = false);
    foreign.sort();
    want_foreign.sort();
    assert_eq!(foreign, want_foreign);
}

fn way(family: Family, table: &str, chain: &str, of_iptables: bool) -> Way {
    Way { family, table: table.into(), chain: chain.into(), of_iptables }
}

#[test]
fn as_nft_sends_it_for_ipv4() {
    let own: IpAddr = "169.254.96.16".parse().unwrap();
    let rules = vec![
        rule("169.254.96.16", Protocol::Udp, 53, Action::Redirect(5300)),
        rule("10.96.0.1", Protocol::Tcp, 80, Action::Redirect(4000)),
        rule("10.96.0.2", Protocol::Tcp, 80, Action::Refuse),
    ];
    let outside = vec![
        rule("192.168.1.1", Protocol::Tcp, 30_080, Action::Redirect(4000)),
        rule("192.168.1.1", Protocol::Udp, 30_081, Action::Drop),
    ];
    let desired = Desired {
        address: own,
        mark: 0x20,
        catch: Catch::AllBut(vec!["wan0".into()]),
        rules,
        outside: outside.clone(),
        left_out: 0,
    };
    let ways = [way(Family::Inet, "fw4", "input", false), way(Family::V4, "filter", "INPUT", true)];
    check("v4", &desired, &ways);
}

#[test]
fn as_nft_sends_it_for_ipv6() {
    let own: IpAddr = "fd00:96::16".parse().unwrap();
    let rules = vec![
        rule("fd00::1", Protocol::Udp, 53, Action::Redirect(5300)),
        rule("fd00::2", Protocol::Tcp, 80, Action::Refuse),
    ];
    let outside = vec![rule("fd00:1::1", Protocol::Tcp, 30_080, Action::Redirect(4000))];
    let catch = Catch::Only(vec!["br-lan".into(), "eth1".into()]);
    let desired = Desired { address: own, mark: 0x4000, catch, rules, outside: outside.clone(), left_out: 0 };
    check("v6", &desired, &[way(Family::Inet, "fw4", "input", false)]);
}

/// The elements of each message that changes elements: kind, set, how many.
fn changes(old: &Desired, new: &Desired) -> Vec<(u8, String, usize)> {
    let mut batch = Batch::default();
    ruleset::change(&mut batch, old, new);
    messages(&batch.done(1))
        .into_iter()
        .map(|m| {
            let Some((2, Node::Bytes(set))) = m.attrs.get(1) else { panic!("{m:?}") };
            let Some((3, Node::Nest(list))) = m.attrs.get(2) else { panic!("{m:?}") };
            (m.kind, String::from_utf8_lossy(set).trim_end_matches('\0').to_owned(), list.len())
        })
        .collect()
}

#[test]
fn only_what_differs_is_sent() {
    let rules: Vec<_> = (0..10_000_u32)
        .map(|i| Rule {
            address: IpAddr::V4((0x0a60_0000 + i).into()),
            protocol: Protocol::Tcp,
            port: 80,
            action: Action::Redirect(4000),
        })
        .collect();
    let own = "169.254.96.16".parse().unwrap();
    let outside = vec![rule("192.168.1.1", Protocol::Udp, 30_081, Action::Drop)];
    let old = Desired {
        address: own,
        mark: 0x20,
        catch: Catch::AllBut(vec!["wan0".into()]),
        rules,
        outside: outside.clone(),
        left_out: 0,
    };
    assert_eq!(changes(&old, &old), []);
    let mut new = old.clone();
    new.rules[5].action = Action::Refuse;
    new.rules[77].port = REFUSED + 1;
    new.rules.truncate(9_999);
    new.outside[0].action = Action::Redirect(4000);
    new.catch = Catch::AllBut(vec!["wwan0".into()]);
    let want = [(14, "interfaces", 1), (12, "interfaces", 1), (14, "services", 3), (12, "services", 2)]
        .into_iter()
        .chain([(14, "outside", 1), (12, "outside", 1)]);
    assert_eq!(changes(&old, &new), want.map(|(kind, set, n)| (kind, set.to_owned(), n)).collect::<Vec<_>>());
    // All of them fit into messages of less than 64 KiB.
    let none = Desired { rules: vec![], ..old.clone() };
    let all = changes(&none, &old);
    assert_eq!((all.len(), all.iter().map(|c| c.2).sum::<usize>()), (20, 10_000));
}
