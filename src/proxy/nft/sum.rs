//! What is in our table, as sums: they stay the same where nobody has touched ours.

use super::{
    ruleset::TABLE,
    wire::{Kind, attr, attrs, text},
};

/// What the kernel lists of our table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Of chains and rules, in their order.
    frame: u64,
    /// Of elements, in any order, which is how a hash table lists them.
    contents: u64,
    pub rules: usize,
    pub elements: usize,
}

/// FNV-1a: tells a change from none, and is no defence against an author of rules.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Sum {
    /// Takes the next message of a list; those of other tables count nothing.
    pub fn take(&mut self, kind: u16, body: &[u8]) {
        let Some(inside) = body.get(4..).filter(|b| attr(b, 1).and_then(text) == Some(TABLE)) else { return };
        if kind == Kind::NewElement.number() {
            for (_, element) in attrs(attr(inside, 3).unwrap_or_default()) {
                self.contents = self.contents.wrapping_add(hash(element));
                self.elements += 1;
            }
        } else {
            // Without nfgenmsg, whose res_id is the number of anybody's last transaction.
            self.frame = self.frame.rotate_left(5) ^ hash(inside);
            self.rules += usize::from(kind == Kind::NewRule.number());
        }
    }

    /// Whether only what we sent since may have changed: the same chains and rules, and as many elements as there
    /// should be now.
    #[must_use]
    pub fn holds(&self, before: &Self, elements: usize) -> bool {
        (self.frame, self.rules, self.elements) == (before.frame, before.rules, elements)
    }

    /// Whether anything is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain as the kernel lists it: nfgenmsg with the number of the last transaction, the table's name, and the chain's.
    fn chain(transaction: u8, table: &[u8; 4], name: u8) -> Vec<u8> {
        let attr = |kind: u16, value: &[u8]| {
            let len = 4 + u16::try_from(value.len()).unwrap();
            let mut out = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
            out.extend(value);
            out.resize(out.len().next_multiple_of(4), 0);
            out
        };
        let name = [name, 0];
        [vec![2, 0, 0, transaction], attr(1, &[&table[..], &[0]].concat()), attr(3, &name)].concat()
    }

    fn sum(chains: &[Vec<u8>]) -> Sum {
        let mut sum = Sum::default();
        chains.iter().for_each(|chain| sum.take(Kind::NewChain.number(), chain));
        sum
    }

    #[test]
    fn what_others_do_elsewhere_changes_no_sum() {
        let before = sum(&[chain(1, b"weft", b'a'), chain(1, b"weft", b'b')]);
        let after = sum(&[chain(2, b"weft", b'a'), chain(2, b"else", b'x'), chain(2, b"weft", b'b')]);
        assert!(!before.is_empty());
        assert_eq!(before, after);
        for other in [vec![chain(2, b"weft", b'a')], vec![chain(1, b"weft", b'b'), chain(1, b"weft", b'a')]] {
            assert_ne!(before, sum(&other));
        }
    }
}
