use super::*;
use crate::proxy::rules::Action;
use std::{collections::BTreeMap, net::Ipv4Addr};

/// What iptables-restore --noflush does, as far as we use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kernel(BTreeMap<String, BTreeMap<String, (String, Vec<String>)>>);

impl Kernel {
    fn load(text: &str) -> Self {
        let mut kernel = Self::default();
        kernel.restore(text).unwrap();
        kernel
    }

    fn restore(&mut self, text: &str) -> Result<(), String> {
        let mut now = String::new();
        for line in text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
            if let Some(table) = line.strip_prefix('*') {
                now = table.to_owned();
                let builtin: &[&str] = match table {
                    "nat" => &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"],
                    _ => &["INPUT", "FORWARD", "OUTPUT"],
                };
                let table = self.0.entry(now.clone()).or_default();
                for chain in builtin {
                    table.entry((*chain).into()).or_insert_with(|| ("ACCEPT".into(), vec![]));
                }
                continue;
            }
            let table = self.0.get_mut(&now).ok_or("no table")?;
            let words: Vec<&str> = line.split(' ').collect();
            match words[0] {
                "COMMIT" => {}
                "-A" => table.get_mut(words[1]).ok_or(line)?.1.push(words[2..].join(" ")),
                "-I" => table.get_mut(words[1]).ok_or(line)?.1.insert(0, words[3..].join(" ")),
                "-D" => {
                    let rules = &mut table.get_mut(words[1]).ok_or(line)?.1;
                    let at = rules.iter().position(|r| *r == words[2..].join(" ")).ok_or(line)?;
                    rules.remove(at);
                }
                "-F" => table.get_mut(words[1]).ok_or(line)?.1.clear(),
                "-X" => {
                    let used = table.values().flat_map(|c| &c.1).any(|r| r.ends_with(&format!("-j {}", words[1])));
                    let empty = table.get(words[1]).is_some_and(|c| c.1.is_empty());
                    if used || !empty {
                        return Err(line.into());
                    }
                    table.remove(words[1]);
                }
                _ => {
                    let (name, policy) = (words[0].strip_prefix(':').ok_or(line)?, words[1]);
                    let chain = table.entry(name.into()).or_default();
                    *chain = (policy.into(), if policy == "-" { vec![] } else { chain.1.clone() });
                }
            }
            for rule in table.values().flat_map(|c| &c.1) {
                let target = rule.rsplit_once("-j ").map_or("", |(_, t)| t);
                if target.starts_with(OURS) && !table.contains_key(target) {
                    return Err(format!("{rule}: no such chain"));
                }
            }
        }
        Ok(())
    }

    fn save(&self) -> String {
        let mut out = String::new();
        for (name, chains) in &self.0 {
            let _ = writeln!(out, "# Generated\n*{name}");
            for (chain, (policy, _)) in chains {
                let _ = writeln!(out, ":{chain} {policy} [0:0]");
            }
            for (chain, (_, rules)) in chains {
                rules.iter().for_each(|r| out.push_str(&format!("-A {chain} {r}\n")));
            }
            out.push_str("COMMIT\n# Completed\n");
        }
        out
    }

    fn saved(&self) -> Saved {
        Saved::parse(&self.save())
    }
}

const FOREIGN: &str = "*filter
:INPUT DROP [12:3400]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -m comment --comment \"jump -j WEFT-INPUT of no one\" -j KUBE-FIREWALL
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -j KUBE-SERVICES
COMMIT
";

fn desired(services: u8) -> Desired {
    let own = Ipv4Addr::new(169, 254, 96, 16);
    let mut rules =
        vec![Rule { address: own.into(), protocol: Protocol::Udp, port: 53, action: Action::Redirect(5300) }];
    rules.extend((1..=services).map(|i| Rule {
        address: Ipv4Addr::new(10, 96, 0, i).into(),
        protocol: Protocol::Tcp,
        port: 80,
        action: if i % 2 == 1 { Action::Redirect(4000) } else { Action::Refuse },
    }));
    let node = Rule {
        address: Ipv4Addr::new(192, 168, 1, 1).into(),
        protocol: Protocol::Udp,
        port: 30_053,
        action: Action::Drop,
    };
    let (catch, outside) = (Catch::AllBut(vec!["wan".into()]), vec![node]);
    Desired { address: own.into(), mark: 0x4000, catch, rules, outside, left_out: 0 }
}

fn apply(desired: &Desired, saved: &Saved) -> String {
    super::apply(desired, saved, &made(saved).collect::<Vec<_>>())
}

#[test]
fn golden() {
    let nat = "*nat
:WEFT-PRE - [0:0]
:WEFT-NODE - [0:0]
:WEFT-SVC - [0:0]
:WEFT-MADE - [0:0]
-I PREROUTING 1 -j WEFT-PRE
-I OUTPUT 1 -j WEFT-SVC
-A WEFT-PRE -j WEFT-NODE
-A WEFT-PRE -i wan -j RETURN
-A WEFT-PRE -j WEFT-SVC
-A WEFT-SVC -m mark --mark 0x4000/0x4000 -j RETURN
-A WEFT-NODE -d 192.168.1.1/32 -p udp -m udp --dport 30053 -j DNAT --to-destination 169.254.96.16:9
-A WEFT-SVC -d 169.254.96.16/32 -p udp -m udp --dport 53 -j DNAT --to-destination 169.254.96.16:5300
-A WEFT-SVC -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.96.16:4000
-A WEFT-SVC -d 10.96.0.2/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.96.16:1
COMMIT
";
    let filter = "*filter
:WEFT-INPUT - [0:0]
:WEFT-REJECT - [0:0]
:WEFT-MADE - [0:0]
-I INPUT 1 -j WEFT-INPUT
-I FORWARD 1 -o weft0 -j WEFT-REJECT
-I OUTPUT 1 -o weft0 -j WEFT-REJECT
-A WEFT-INPUT -d 169.254.96.16/32 -p tcp -m tcp --dport 1 -j REJECT --reject-with tcp-reset
-A WEFT-INPUT -d 169.254.96.16/32 -p udp -m udp --dport 1 -j REJECT --reject-with icmp-port-unreachable
-A WEFT-INPUT -d 169.254.96.16/32 -p tcp -m tcp --dport 9 -j DROP
-A WEFT-INPUT -d 169.254.96.16/32 -p udp -m udp --dport 9 -j DROP
-A WEFT-INPUT -d 169.254.96.16/32 -m conntrack --ctstate DNAT -j ACCEPT
-A WEFT-INPUT -d 169.254.96.16/32 -i lo -j ACCEPT
-A WEFT-INPUT -d 169.254.96.16/32 -p tcp -j REJECT --reject-with tcp-reset
-A WEFT-INPUT -d 169.254.96.16/32 -p udp -j REJECT --reject-with icmp-port-unreachable
-A WEFT-REJECT -m conntrack --ctstate DNAT -j RETURN
-A WEFT-REJECT -d 224.0.0.0/4 -j RETURN
-A WEFT-REJECT -p tcp -j REJECT --reject-with tcp-reset
-A WEFT-REJECT -j REJECT --reject-with icmp-port-unreachable
COMMIT
";
    assert_eq!(apply(&desired(2), &Saved::default()), format!("{nat}{filter}"));
}

#[test]
fn undo_after_apply_is_identity_among_foreign_rules() {
    let before = Kernel::load(FOREIGN);
    let mut kernel = before.clone();
    for services in [3, 0, 7] {
        kernel.restore(&apply(&desired(services), &kernel.saved())).unwrap();
        assert_eq!(kernel.saved().counts().0, 5);
    }
    assert_ne!(kernel, before);
    assert_eq!(remains(&kernel.saved()), []);
    kernel.restore(&undo(&kernel.saved()).unwrap()).unwrap();
    assert_eq!(kernel, before);
    assert_eq!(undo(&kernel.saved()), None);
}

#[test]
fn a_table_that_was_not_there_is_removed_unless_somebody_uses_it_by_now() {
    let mut kernel = Kernel::default();
    kernel.restore(&apply(&desired(1), &kernel.saved())).unwrap();
    kernel.restore(&apply(&desired(2), &kernel.saved())).unwrap();
    kernel.restore("*nat\n-A POSTROUTING -o wan -j MASQUERADE\nCOMMIT\n").unwrap();
    let left = remains(&kernel.saved());
    assert_eq!(left.iter().map(|r| r.table).collect::<Vec<_>>(), ["filter"]);
    assert_eq!(left[0].text, "*filter\n-X INPUT\n-X FORWARD\n-X OUTPUT\nCOMMIT\n");
    kernel.restore(&undo(&kernel.saved()).unwrap()).unwrap();
    kernel.restore(&left[0].text).unwrap();
    assert!(kernel.0["filter"].is_empty());
    assert_eq!(kernel.0["nat"]["POSTROUTING"].1.len(), 1);
}

#[test]
fn what_a_flush_or_an_older_version_left_is_put_right() {
    let mut kernel = Kernel::load(FOREIGN);
    kernel.restore(&apply(&desired(2), &kernel.saved())).unwrap();
    let whole = kernel.clone();
    let digest = kernel.saved().digest();
    let damages = [
        "*nat\n-F PREROUTING\nCOMMIT\n",
        "*nat\n-F WEFT-SVC\nCOMMIT\n",
        "*nat\n-D OUTPUT -j WEFT-SVC\nCOMMIT\n",
        "*filter\n-A INPUT -j WEFT-INPUT\nCOMMIT\n",
        "*nat\n:WEFT-OLD - [0:0]\n-A PREROUTING -i wan -j WEFT-OLD\n-A WEFT-OLD -j WEFT-SVC\nCOMMIT\n",
    ];
    for damage in damages {
        kernel.restore(damage).unwrap();
        assert_ne!(kernel.saved().digest(), digest, "{damage}");
        kernel.restore(&apply(&desired(2), &kernel.saved())).unwrap();
        assert_eq!(kernel.saved().digest(), digest, "{damage}");
    }
    kernel.restore("*nat\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n").unwrap();
    assert_eq!(kernel, whole);
}

#[test]
fn a_foreign_comment_that_names_us_is_not_ours() {
    assert!(!Kernel::load(FOREIGN).saved().ours());
    let text = "*raw\n:WEFT-X - [0:0]\nCOMMIT\ngarbage\n-A\n*nat\n:\n-A \n-A x\nCOMMIT";
    assert!(!Saved::parse(text).ours());
}

#[test]
fn a_jump_that_kube_proxy_has_come_before_is_moved_to_the_head_once() {
    let ours = "-A PREROUTING -j WEFT-PRE\n";
    let kube = "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n";
    let table = |rules: &str| format!("*nat\n:WEFT-PRE - [0:0]\n{rules}-A OUTPUT -j WEFT-SVC\nCOMMIT\n");
    let [first, second] = [[ours, kube], [kube, ours]].map(|rules| Saved::parse(&table(&rules.concat())));
    assert_ne!(first.digest(), second.digest());
    assert_eq!((first.behind(), second.behind()), (false, true));
    let desired = desired(1);
    let moved = ["-D PREROUTING -j WEFT-PRE", "-I PREROUTING 1 -j WEFT-PRE"];
    let has = |saved: &Saved| moved.map(|line| apply(&desired, saved).lines().any(|l| l == line));
    assert_eq!((has(&first), has(&second)), ([false; 2], [true; 2]));
    let others = Saved::parse(&table(&format!("-A PREROUTING -j DOCKER\n{ours}")));
    assert_eq!(has(&others), [false; 2], "others may want to be first");
}
