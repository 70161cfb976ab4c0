use super::*;
use crate::proxy::nft::{
    expr::{Expr, Meta, Refusal, Verdict},
    ruleset,
    wire::{Attrs, Batch, request},
};

const V4: u8 = Family::V4 as u8;
const INET: u8 = Family::Inet as u8;

/// The body of a message, as the kernel's list has it.
fn body(family: u8, attrs: impl FnOnce(&mut Attrs<'_>)) -> Vec<u8> {
    request(Kind::NewRule, 0, 0, family, attrs)[16..].to_vec()
}

fn chain(ways: &mut Ways, family: u8, table: &str, name: &str, hook: Option<u32>, policy: u32) {
    ways.chain(&body(family, |a| {
        a.text(1, table);
        a.text(3, name);
        if let Some(hook) = hook {
            a.nest(4, |h| h.number(1, hook));
            a.number(5, policy);
            a.text(7, "filter");
        }
    }));
}

fn rule_of(family: u8, table: &str, chain: &str, handle: u64, exprs: &[Expr<'_>], userdata: &[u8]) -> Vec<u8> {
    body(family, |a| {
        a.text(1, table);
        a.text(2, chain);
        a.long(3, handle);
        a.nest(4, |list| exprs.iter().for_each(|e| e.write(list)));
        if !userdata.is_empty() {
            a.bytes(7, userdata);
        }
    })
}

fn rule(ways: &mut Ways, table: &str, chain: &str, exprs: &[Expr<'_>]) {
    ways.rule(&rule_of(INET, table, chain, 9, exprs, b""));
}

fn names(ways: &Ways) -> Vec<String> {
    ways.missing(Family::V4, false).iter().map(ToString::to_string).collect()
}

const REFUSE: Expr<'_> = Expr::Refuse(Refusal::Unreachable, Family::V4);

#[test]
fn a_policy_to_drop_wants_a_way_in() {
    let mut ways = Ways::default();
    chain(&mut ways, INET, "fw4", "input", Some(1), 0);
    chain(&mut ways, INET, "fw4", "forward", Some(2), 0);
    chain(&mut ways, INET, "open", "input", Some(1), 1);
    chain(&mut ways, INET, "fw4", "input_lan", None, 0);
    chain(&mut ways, V4, TABLE, "input", Some(1), 0);
    chain(&mut ways, V4, "filter", "INPUT", Some(1), 0);
    // Bridges and devices have families of their own.
    chain(&mut ways, 7, "br", "input", Some(1), 0);
    assert_eq!(names(&ways), ["chain inet fw4 input", "chain ip filter INPUT"]);
    assert_eq!(ways.missing(Family::V4, true).len(), 1);
    assert_eq!(ways.missing(Family::V6, false).len(), 1);
    assert!(ways.ours().is_empty() && ways.spare(&[Family::V4]).is_empty());
}

#[test]
fn a_rule_that_refuses_all_of_an_interface_wants_one_too_and_a_narrow_one_does_not() {
    let lan = [Expr::Meta(Meta::InName, 0), Expr::Is(b"lan0")];
    let jump = Expr::Verdict(Verdict::Jump("zone"));
    let port = [Expr::Port(0), Expr::Is(&[0, 22])];
    for (in_base, in_zone, want) in [
        (vec![lan[0], lan[1], jump], vec![REFUSE], true),
        (vec![jump], vec![jump], false),
        (vec![jump], vec![lan[0], lan[1], REFUSE], true),
        (vec![REFUSE], vec![], true),
        (vec![port[0], port[1], REFUSE], vec![], false),
        (vec![port[0], port[1], jump], vec![REFUSE], false),
        (vec![Expr::Status, Expr::And([1, 0, 0, 0]), Expr::IsNot(&[0; 4]), REFUSE], vec![], false),
        (vec![lan[0], lan[1], Expr::Verdict(Verdict::Accept)], vec![REFUSE], false),
    ] {
        let mut ways = Ways::default();
        chain(&mut ways, INET, "fw", "input", Some(1), 1);
        rule(&mut ways, "fw", "input", &in_base);
        rule(&mut ways, "fw", "zone", &in_zone);
        // Of another table: no matter.
        rule(&mut ways, "other", "input", &[REFUSE]);
        assert_eq!(!names(&ways).is_empty(), want, "{in_base:?} {in_zone:?}");
    }
}

#[test]
fn what_we_put_in_is_known_again_and_goes_when_nobody_needs_it() {
    let way = Way { family: Family::Inet, table: "fw4".into(), chain: "input".into(), of_iptables: false };
    for (own, family, policy, wants) in [
        ("169.254.96.16", Family::V4, 0, true),
        ("169.254.96.16", Family::V4, 1, false),
        ("fd00:96::16", Family::V6, 0, true),
    ] {
        let own = own.parse().unwrap();
        let mut ways = Ways::default();
        chain(&mut ways, INET, "fw4", "input", Some(1), policy);
        // As we send it, with the handle that the kernel adds.
        let mut batch = Batch::default();
        ruleset::open_way(&mut batch, &way, own);
        let sent = batch.done(1);
        let body = &sent[20 + 16..sent.len() - 20];
        let with_handle = |handle: u64| {
            let handle = request(Kind::NewRule, 0, 0, INET, |a| a.long(3, handle));
            [body, &handle[20..]].concat()
        };
        ways.rule(&with_handle(77));
        ways.rule(&with_handle(78));
        assert_eq!(ways.ours(), [77, 78].map(|handle| (way.clone(), family, handle)));
        assert!(ways.missing(family, false).is_empty());
        let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
        assert_eq!(ways.missing(other, false).is_empty(), !wants);
        let spare = |served| ways.spare(&[served]).into_iter().map(|(_, _, handle)| handle).collect::<Vec<_>>();
        assert_eq!(spare(family), if wants { vec![78] } else { vec![77, 78] });
        assert_eq!(spare(other), [77, 78]);
    }
}

#[test]
fn a_firewall_without_end_is_left_alone() {
    let mut ways = Ways::default();
    chain(&mut ways, INET, "fw", "input", Some(1), 0);
    for i in 0..=CHAINS_MOST {
        rule(&mut ways, "fw", &format!("c{i}"), &[REFUSE]);
    }
    assert!(names(&ways).is_empty());
}

#[test]
fn notifications_that_concern_us() {
    let of = |table: &str| body(V4, |a| a.text(1, table));
    let new = |kind: Kind, body: &[u8]| concerns_us(kind.number(), body);
    assert!(new(Kind::DelTable, &of("fw4")) && new(Kind::DelRule, &of(TABLE)) && new(Kind::DelElement, &of(TABLE)));
    assert!(!new(Kind::NewRule, &of("kube-proxy")) && !new(Kind::NewElement, &of("kube-proxy")));
    assert!(!new(Kind::NewChain, &of("kube-proxy")));
    assert!(new(
        Kind::NewChain,
        &body(V4, |a| {
            a.text(1, "fw4");
            a.nest(4, |h| h.number(1, 1));
        })
    ));
    assert!(new(Kind::DelRule, &rule_of(INET, "fw4", "input", 5, &[], &comment(Family::V4))));
    assert!(new(Kind::NewRule, &rule_of(V4, "nat", "PREROUTING", 5, &[], b"kube-proxy's jump")));
    assert!(!new(Kind::NewRule, &rule_of(V4, "nat", "KUBE-SERVICES", 5, &[], b"kube-proxy's Service")));
    // A bridge's table of our name is none of ours.
    assert!(!new(Kind::DelRule, &body(7, |a| a.text(1, TABLE))));
}

#[test]
fn cut_messages_are_nothing_and_no_end() {
    let mut batch = Batch::default();
    let way = Way { family: Family::Inet, table: "fw4".into(), chain: "input".into(), of_iptables: false };
    ruleset::open_way(&mut batch, &way, "169.254.96.16".parse().unwrap());
    let sent = batch.done(1);
    let mut rng = fastrand::Rng::with_seed(4);
    for round in 0..4_000 {
        let mut bytes = sent[20..].to_vec();
        bytes.truncate(rng.usize(..bytes.len()));
        for _ in 0..rng.usize(..4) {
            if let Some(at) = (!bytes.is_empty()).then(|| rng.usize(..bytes.len())) {
                bytes[at] = rng.u8(..);
            }
        }
        let mut ways = Ways::default();
        ways.rule(&bytes);
        ways.chain(&bytes);
        let (_, _, _) = (ways.missing(Family::V4, false), ways.spare(&[Family::V4]), concerns_us(round, &bytes));
    }
}
