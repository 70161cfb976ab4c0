//! Which input chains of others would drop what we redirected to ourselves, and what of ours is in them. An accept in
//! a table of our own does not override a drop in another base chain: each needs a rule of its own.

use super::{
    ruleset::TABLE,
    wire::{Family, Kind, attr, attrs, long, number, text},
};
use crate::sorted::{Map, Set};
use std::fmt;

/// Of iptables-nft; kube-proxy's jumps in them must not come before ours.
const BUILT_IN: [&str; 4] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT"];

/// What says whose rule it is, to us and to who lists the chain; of the address of each family.
const COMMENTS: [(Family, &str); 2] =
    [(Family::V4, "weft: connections to Services"), (Family::V6, "weft: connections to Services by IPv6")];
/// NFTNL_UDATA_RULE_COMMENT, libnftnl/udata.h
const UDATA_COMMENT: u8 = 0;

/// Chains of others that are looked at; a firewall of more than these is not understood, and gets no rule.
const CHAINS_MOST: usize = 4_096;

/// A base chain of somebody else that sees what comes in to this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    pub family: Family,
    pub table: String,
    pub chain: String,
    /// The table that iptables-nft looks after.
    pub of_iptables: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} {} {}", self.family.name(), self.table, self.chain)
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// It has a rule that ends what it matches, and matches more than single addresses, ports or states.
    refuses: bool,
    /// Where such a rule leads.
    leads_to: Set<String>,
}

pub type Ours = (Way, Family, u64);
type Place = (Family, String, String);

/// Takes what the kernel lists, and says what is to be done.
#[derive(Debug, Default)]
pub struct Ways {
    /// With their policy's being to drop.
    inputs: Map<Way, bool>,
    chains: Map<Place, Seen>,
    /// Our rules, in order, the family of the address that each lets in, and its handle.
    ours: Vec<Ours>,
    overflow: bool,
}

/// The comment as nft writes it into a rule.
#[must_use]
pub fn comment(family: Family) -> Vec<u8> {
    let text = COMMENTS[usize::from(family == Family::V6)].1;
    // Its length with the final zero; far below 256.
    let mut out = vec![UDATA_COMMENT, text.len() as u8 + 1];
    out.extend(text.bytes().chain([0]));
    out
}

/// For which family a rule with this userdata is ours.
fn ours(userdata: &[u8]) -> Option<Family> {
    COMMENTS.into_iter().map(|(family, _)| family).find(|family| userdata == comment(*family))
}

fn place(body: &[u8], table: u16, chain: u16) -> Option<Place> {
    let family = Family::of(*body.first()?)?;
    let attrs = body.get(4..)?;
    Some((family, text(attr(attrs, table)?)?.to_owned(), text(attr(attrs, chain)?)?.to_owned()))
}

impl Ways {
    /// A chain as the kernel lists it.
    pub fn chain(&mut self, body: &[u8]) {
        let Some((family, table, chain)) = place(body, 1, 3) else { return };
        let attrs = &body[4..];
        let filters = attr(attrs, 7).and_then(text) == Some("filter");
        let Some(hook) = attr(attrs, 4).filter(|_| filters && table != TABLE) else { return };
        // NF_INET_LOCAL_IN
        if attr(hook, 1).and_then(number) == Some(1) {
            let drops = attr(attrs, 5).and_then(number) == Some(0);
            let of_iptables = family != Family::Inet && chain == "INPUT";
            self.inputs.insert(Way { family, table, chain, of_iptables }, drops);
        }
    }

    /// The tables whose rules are to be looked at.
    pub fn tables(&self) -> Set<(Family, String)> {
        self.inputs.keys().map(|way| (way.family, way.table.clone())).collect()
    }

    /// A rule as the kernel lists it.
    pub fn rule(&mut self, body: &[u8]) {
        let Some((family, table, chain)) = place(body, 1, 2) else { return };
        let attrs = &body[4..];
        if let Some(serves) = attr(attrs, 7).and_then(ours) {
            let of_iptables = family != Family::Inet && chain == "INPUT";
            let handle = attr(attrs, 3).and_then(long);
            self.ours.extend(handle.map(|h| (Way { family, table, chain, of_iptables }, serves, h)));
            return;
        }
        let Some(end) = attr(attrs, 4).and_then(broad) else { return };
        if self.chains.len() >= CHAINS_MOST {
            self.overflow = true;
            return;
        }
        let seen = self.chains.or_insert_with((family, table, chain), Default::default);
        match end {
            End::Refuses => seen.refuses = true,
            End::LeadsTo(chain) => drop(seen.leads_to.insert(chain)),
        }
    }

    fn refuses(&self, way: &Way) -> bool {
        let mut todo = vec![way.chain.clone()];
        let mut been = Set::new();
        while let Some(chain) = todo.pop() {
            if !been.insert(chain.clone()) {
                continue;
            }
            if let Some(seen) = self.chains.get(&(way.family, way.table.clone(), chain)) {
                if seen.refuses {
                    return true;
                }
                todo.extend(seen.leads_to.iter().cloned());
            }
        }
        false
    }

    /// Chains that want a rule of ours and have none, for an address of `family`; `skip` those of iptables.
    #[must_use]
    pub fn missing(&self, family: Family, skip_iptables: bool) -> Vec<Way> {
        let applies = |way: &Way| way.family == family || way.family == Family::Inet;
        let left_alone = |way: &Way| way.of_iptables && skip_iptables || self.overflow;
        let served = |way: &Way| self.ours.iter().any(|(ours, serves, _)| ours == way && *serves == family);
        let drops = |(way, policy): &(&Way, &bool)| **policy || self.refuses(way);
        let wants = |it: &(&Way, &bool)| applies(it.0) && !left_alone(it.0) && !served(it.0) && drops(it);
        self.inputs.iter().filter(wants).map(|(way, _)| way.clone()).collect()
    }

    /// Rules of ours that nobody needs: in a chain that no longer drops, of a family that is not served, or there twice.
    #[must_use]
    pub fn spare(&self, served: &[Family]) -> Vec<Ours> {
        let mut first = Set::new();
        let drops = |way: &Way| self.inputs.get(way).is_some_and(|drops| *drops || self.refuses(way));
        let needed = |way: &Way, family: &Family| served.contains(family) && drops(way);
        self.ours
            .iter()
            .filter(|(way, family, _)| !needed(way, family) || !first.insert((way, *family)))
            .cloned()
            .collect()
    }

    /// All rules of ours.
    #[must_use]
    pub fn ours(&self) -> &[Ours] {
        &self.ours
    }
}

/// Whether a notification may be about our table, or about who drops what we redirect: thousands of elements that others
/// change each second are not.
#[must_use]
pub fn concerns_us(kind: u16, body: &[u8]) -> bool {
    let Some(inside) = body.get(4..).filter(|_| body.first().copied().and_then(Family::of).is_some()) else {
        return false;
    };
    let is = |kinds: &[Kind]| kinds.iter().any(|k| k.number() == kind);
    attr(inside, 1).and_then(text) == Some(TABLE)
        || is(&[Kind::NewTable, Kind::DelTable])
        || is(&[Kind::NewChain, Kind::DelChain]) && attr(inside, 4).is_some()
        || is(&[Kind::NewRule, Kind::DelRule])
            && (attr(inside, 7).and_then(ours).is_some()
                || attr(inside, 2).and_then(text).is_some_and(|chain| BUILT_IN.contains(&chain)))
}

enum End {
    Refuses,
    LeadsTo(String),
}

/// How a rule ends that looks at nothing but the interface and the protocol; None: it matches less, or goes on.
fn broad(expressions: &[u8]) -> Option<End> {
    let mut end = None;
    for (_, expression) in attrs(expressions) {
        let data = attr(expression, 2).unwrap_or_default();
        let of = |kind| attr(data, kind);
        match text(attr(expression, 1)?)? {
            // meta: NFT_META_IIF, OIF, IIFNAME, OIFNAME, NFPROTO, L4PROTO, IIFGROUP.
            "meta" if matches!(of(2).and_then(number)?, 4..=7 | 15 | 16 | 20) => {}
            "cmp" | "bitwise" | "counter" | "log" => {}
            // Into the verdict's register: of a map that is not looked into.
            "lookup" if of(3).and_then(number) == Some(0) => end = Some(End::Refuses),
            "lookup" => {}
            "reject" => end = Some(End::Refuses),
            // iptables-nft: a target by its name.
            "target" if matches!(of(1).and_then(text)?, "REJECT" | "DROP") => end = Some(End::Refuses),
            "immediate" if of(1).and_then(number)? < 1 => end = verdict(of(2)?),
            _ => return None,
        }
    }
    end
}

/// NFT_JUMP and NFT_GOTO lead on; NF_DROP ends.
fn verdict(data: &[u8]) -> Option<End> {
    let verdict = attr(data, 2)?;
    match number(attr(verdict, 1)?)?.cast_signed() {
        0 => Some(End::Refuses),
        -3 | -4 => Some(End::LeadsTo(text(attr(verdict, 2)?)?.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
