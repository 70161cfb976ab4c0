//! Desired rules -> the text of `iptables-restore --noflush`, and the text that takes them away again.
//! Everything of ours is in chains named `WEFT-*`; what `iptables-save` prints tells what is there.

use super::cover::Net;
use super::rules::{Catch, DEVICE, DISCARD, Desired, REFUSED, Rule};
use crate::sorted::Set;
use crate::table::model::Protocol;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;

/// What all our chains' names begin with.
const OURS: &str = "WEFT-";

/// An empty chain that says: this table was not there before us, and may go with us. The knowledge
/// outlives a killed agent and, as the rules do, ends with the boot.
const MADE: &str = "WEFT-MADE";

/// How kube-proxy's jumps end. It puts them at the head, once, and leaves them where they are.
const KUBE_PROXY: &str = "-j KUBE-SERVICES";

/// One table of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nat,
    Filter,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Nat, Self::Filter];

    fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    fn chains(self) -> &'static [&'static str] {
        match self {
            Self::Nat => &["WEFT-PRE", "WEFT-NODE", "WEFT-SVC"],
            Self::Filter => &["WEFT-INPUT", "WEFT-REJECT"],
        }
    }

    /// Built-in chain, and how we jump from it, as iptables-save prints it.
    fn jumps(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Nat => &[("PREROUTING", "-j WEFT-PRE"), ("OUTPUT", "-j WEFT-SVC")],
            Self::Filter => &[
                ("INPUT", "-j WEFT-INPUT"),
                ("FORWARD", "-o weft0 -j WEFT-REJECT"),
                ("OUTPUT", "-o weft0 -j WEFT-REJECT"),
            ],
        }
    }
}

/// One table as iptables-save prints it, reduced to what concerns us: thousands of foreign rules cost
/// nothing, and our own only a sum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SavedTable {
    present: bool,
    /// Our chains, in order.
    chains: Set<String>,
    /// Built-in or foreign chain, and its rule that jumps to a chain of ours.
    jumps: Vec<(String, String)>,
    /// Built-in chains in which kube-proxy's jump comes before ours.
    behind: Set<String>,
    /// How many rules our chains hold, and their sum.
    rules: usize,
    sum: u64,
    /// Whether there is a rule or chain of somebody else, or a policy other than ACCEPT.
    foreign: bool,
}

/// What `iptables-save` printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    nat: SavedTable,
    filter: SavedTable,
    /// The table that the lines are of.
    now: Option<Kind>,
}

/// The words after `-A CHAIN`.
fn rule_of(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("-A ")?.split_once(' ')
}

/// Whether the rule's target is a chain of ours; a quoted comment may say what it likes.
fn jumps_to_us(rule: &str) -> bool {
    let mut quoted = false;
    let mut escaped = false;
    let bare: String = rule
        .chars()
        .filter(|c| {
            let was = quoted;
            if *c == '"' && !escaped {
                quoted = !quoted;
            }
            escaped = *c == '\\' && !escaped;
            !was && !quoted
        })
        .collect();
    let mut words = bare.split(' ');
    words.any(|w| w == "-j" || w == "-g") && words.next().is_some_and(|target| target.starts_with(OURS))
}

impl SavedTable {
    fn chain(&mut self, declared: &str) {
        let mut words = declared.split(' ');
        let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if name.starts_with(OURS) {
            self.chains.insert(name.to_owned());
        } else if policy != "ACCEPT" {
            self.foreign = true;
        }
    }

    fn rule(&mut self, line: &str) {
        match rule_of(line) {
            Some((chain, _)) if chain.starts_with(OURS) => {
                self.rules += 1;
                self.sum = mix(self.sum, line);
            }
            Some((chain, rule)) if jumps_to_us(rule) => self.jumps.push((chain.to_owned(), rule.to_owned())),
            Some((chain, rule)) => {
                self.foreign = true;
                if rule.ends_with(KUBE_PROXY) && !self.jumps.iter().any(|(of, _)| of == chain) {
                    self.behind.insert(chain.to_owned());
                }
            }
            None => self.foreign = true,
        }
    }

    fn ours(&self) -> bool {
        !self.chains.is_empty() || !self.jumps.is_empty()
    }
}

/// FNV-1a over lines: tells a change from none, and is no defence against an author of rules.
fn mix(sum: u64, line: &str) -> u64 {
    line.bytes()
        .chain([b'\n'])
        .fold(sum ^ 0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Saved {
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        text.lines().for_each(|line| saved.line(line));
        saved
    }

    /// Takes the next line of the output.
    pub fn line(&mut self, line: &str) {
        let line = line.trim_end();
        // iptables-nft says so where a table holds what only nft can read.
        if line.starts_with('#') && line.contains("incompatible") {
            self.nat.foreign = true;
            self.filter.foreign = true;
        }
        if let Some(name) = line.strip_prefix('*') {
            self.now = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        }
        let table = match self.now {
            Some(Kind::Nat) => &mut self.nat,
            Some(Kind::Filter) => &mut self.filter,
            None => return,
        };
        match line.as_bytes().first() {
            Some(b'*') => table.present = true,
            Some(b':') => table.chain(&line[1..]),
            Some(b'-') => table.rule(line),
            Some(_) | None => {}
        }
    }

    fn table(&self, kind: Kind) -> &SavedTable {
        match kind {
            Kind::Nat => &self.nat,
            Kind::Filter => &self.filter,
        }
    }

    /// Whether anything of ours is there.
    #[must_use]
    pub fn ours(&self) -> bool {
        Kind::ALL.iter().any(|k| self.table(*k).ours())
    }

    /// Whether a jump of ours comes after kube-proxy's.
    #[must_use]
    pub fn behind(&self) -> bool {
        let late = |table: &SavedTable| table.jumps.iter().any(|(chain, _)| table.behind.contains(chain));
        Kind::ALL.iter().any(|k| late(self.table(*k)))
    }

    /// A sum over each chain, jump and rule of ours: it stays the same where nobody has touched ours.
    #[must_use]
    pub fn digest(&self) -> u64 {
        Kind::ALL.iter().map(|k| self.table(*k)).fold(0, |sum, table| {
            let sum = table.chains.iter().fold(mix(sum, &table.sum.to_string()), |sum, chain| mix(sum, chain));
            table.jumps.iter().fold(sum, |sum, (chain, rule)| {
                let behind = if table.behind.contains(chain) { "behind" } else { "" };
                mix(mix(mix(sum, chain), rule), behind)
            })
        })
    }

    /// How many chains and rules of ours are there.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let sum = |f: fn(&SavedTable) -> usize| Kind::ALL.iter().map(|k| f(self.table(*k))).sum();
        (sum(|t| t.chains.len()), sum(|t| t.rules + t.jumps.len()))
    }
}

fn protocol(p: Protocol) -> &'static str {
    match p {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The rules of our chains, each as `CHAIN rest`. Written the way iptables-save prints them.
struct Body<'d>(&'d Desired, Kind);

impl fmt::Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Kind::Nat => nat(self.0, f),
            Kind::Filter => filter(self.0, f),
        }
    }
}

fn nat(desired: &Desired, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    // By whichever interface, so before those are looked at.
    writeln!(f, "-A WEFT-PRE -j WEFT-NODE")?;
    match &desired.catch {
        Catch::Only(names) => {
            for name in names {
                writeln!(f, "-A WEFT-PRE -i {name} -j WEFT-SVC")?;
            }
        }
        Catch::AllBut(names) => {
            for name in names {
                writeln!(f, "-A WEFT-PRE -i {name} -j RETURN")?;
            }
            writeln!(f, "-A WEFT-PRE -j WEFT-SVC")?;
        }
    }
    writeln!(f, "-A WEFT-SVC -m mark --mark {0:#x}/{0:#x} -j RETURN", desired.mark)?;
    for (chain, rules) in [("WEFT-NODE", &desired.outside), ("WEFT-SVC", &desired.rules)] {
        for Rule { address, protocol: p, port, action } in rules {
            let (p, host, to) = (protocol(*p), Net::host(*address), SocketAddr::new(desired.address, action.port()));
            writeln!(f, "-A {chain} -d {host} -p {p} -m {p} --dport {port} -j DNAT --to-destination {to}")?;
        }
    }
    Ok(())
}

/// Refusals, the way in through a closed INPUT, and what is sent to our address without having been
/// redirected (that of the host itself is left to the proxy, which closes and counts it).
fn filter(desired: &Desired, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const RESET: &str = "-j REJECT --reject-with tcp-reset";
    let own = Net::host(desired.address);
    let (icmp, many) = if desired.address.is_ipv4() { ("icmp", "224.0.0.0/4") } else { ("icmp6", "ff00::/8") };
    let unreachable = format!("-j REJECT --reject-with {icmp}-port-unreachable");
    writeln!(f, "-A WEFT-INPUT -d {own} -p tcp -m tcp --dport {REFUSED} {RESET}")?;
    writeln!(f, "-A WEFT-INPUT -d {own} -p udp -m udp --dport {REFUSED} {unreachable}")?;
    for p in ["tcp", "udp"] {
        writeln!(f, "-A WEFT-INPUT -d {own} -p {p} -m {p} --dport {DISCARD} -j DROP")?;
    }
    writeln!(f, "-A WEFT-INPUT -d {own} -m conntrack --ctstate DNAT -j ACCEPT")?;
    writeln!(f, "-A WEFT-INPUT -d {own} -i lo -j ACCEPT")?;
    writeln!(f, "-A WEFT-INPUT -d {own} -p tcp {RESET}")?;
    writeln!(f, "-A WEFT-INPUT -d {own} -p udp {unreachable}")?;
    // What was redirected still names weft0 in OUTPUT: the route was chosen before.
    writeln!(f, "-A WEFT-REJECT -m conntrack --ctstate DNAT -j RETURN")?;
    if desired.address.is_ipv6() {
        // Neighbour discovery.
        writeln!(f, "-A WEFT-REJECT -p ipv6-icmp -j RETURN")?;
    }
    writeln!(f, "-A WEFT-REJECT -d {many} -j RETURN")?;
    writeln!(f, "-A WEFT-REJECT -p tcp {RESET}")?;
    writeln!(f, "-A WEFT-REJECT {unreachable}")
}

/// The tables that are there for us alone. Whoever flushes them takes our mark too: the caller remembers.
pub fn made(saved: &Saved) -> impl Iterator<Item = Kind> + '_ {
    let ours = |kind: &Kind| !saved.table(*kind).present || saved.table(*kind).chains.contains(MADE);
    Kind::ALL.into_iter().filter(ours)
}

/// The text that brings about what we want from what is there. Our own chains are rewritten; a jump that
/// is there stays where it is, but behind kube-proxy's: two programs that both want to be first would never come to
/// rest.
/// `made` holds the tables that were not there before us, see [`made`].
#[must_use]
pub fn apply(desired: &Desired, saved: &Saved, made: &[Kind]) -> String {
    let mut out = String::with_capacity(1024 + desired.rules.len() * 100);
    for kind in Kind::ALL {
        let there = saved.table(kind);
        let _ = writeln!(out, "*{}", kind.name());
        for chain in kind.chains() {
            let _ = writeln!(out, ":{chain} - [0:0]");
        }
        if made.contains(&kind) && !there.chains.contains(MADE) {
            let _ = writeln!(out, ":{MADE} - [0:0]");
        }
        jumps(&mut out, kind, there);
        let _ = write!(out, "{}", Body(desired, kind));
        let stale = there.chains.iter().filter(|c| *c != MADE && !kind.chains().contains(&c.as_str()));
        remove_chains(&mut out, stale);
        out.push_str("COMMIT\n");
    }
    out
}

/// Each of our jumps once, at the head; one that is in place stays there. Of several all are taken
/// out, because a delete takes the first, which is the one that matters.
fn jumps(out: &mut String, kind: Kind, there: &SavedTable) {
    let once =
        |jump: &(&str, &str)| there.jumps.iter().filter(|(chain, rule)| (&**chain, &**rule) == *jump).count() == 1;
    let in_place = |jump: &(&str, &str)| once(jump) && !there.behind.contains(jump.0);
    for (chain, rule) in &there.jumps {
        if !kind.jumps().contains(&(chain, rule)) || !in_place(&(chain, rule)) {
            let _ = writeln!(out, "-D {chain} {rule}");
        }
    }
    for (chain, rule) in kind.jumps().iter().filter(|jump| !in_place(jump)) {
        let _ = writeln!(out, "-I {chain} 1 {rule}");
    }
}

fn remove_chains<'c>(out: &mut String, chains: impl Iterator<Item = &'c String> + Clone) {
    for chain in chains.clone() {
        let _ = writeln!(out, "-F {chain}");
    }
    for chain in chains {
        let _ = writeln!(out, "-X {chain}");
    }
}

/// The text that takes all of ours away, for each table that has some; None: nothing is there.
#[must_use]
pub fn undo(saved: &Saved) -> Option<String> {
    let mut out = String::new();
    for kind in Kind::ALL {
        let there = saved.table(kind);
        if there.ours() {
            let _ = writeln!(out, "*{}", kind.name());
            for (chain, rule) in &there.jumps {
                let _ = writeln!(out, "-D {chain} {rule}");
            }
            remove_chains(&mut out, there.chains.iter());
            out.push_str("COMMIT\n");
        }
    }
    (!out.is_empty()).then_some(out)
}

/// A table that only we needed: with iptables-nft its empty remains would show up in `iptables-save`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remains {
    pub table: &'static str,
    /// Removes the built-in chains that our jumps made; refused by the kernel unless they are empty.
    pub text: String,
}

/// The tables that were not there before us, and are empty once [`undo`] is done.
#[must_use]
pub fn remains(saved: &Saved) -> Vec<Remains> {
    let made = |kind: &Kind| saved.table(*kind).chains.contains(MADE) && !saved.table(*kind).foreign;
    let text = |kind: Kind| {
        let chains = kind.jumps().iter().fold(String::new(), |text, (chain, _)| text + "-X " + chain + "\n");
        format!("*{}\n{chains}COMMIT\n", kind.name())
    };
    Kind::ALL.into_iter().filter(made).map(|kind| Remains { table: kind.name(), text: text(kind) }).collect()
}

const _: () = assert!(matches!(DEVICE.as_bytes(), b"weft0"), "the jumps name the device");

#[cfg(test)]
mod tests;
